"""Stock targets are exact: same weights, same logits, every config field carried over."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from morph import registry
from morph.errors import CheckpointError
from morph.families import _stock
from morph.plan import HeadGroup, LayerPlan, Plan, full_plan

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW, TOKENS = 8, 29
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SAME_ROPE = {k: {"rope_type": "default", "rope_theta": 4000.0} for k in (FULL, SLIDING)}
BIASED = {"attention_bias": True, "mlp_bias": True}


@dataclasses.dataclass
class Case:
    """A source, the target it must get, and the window that new sliding layers take."""

    family: str
    target: str
    changes: dict = dataclasses.field(default_factory=dict)
    window: int = WINDOW
    sinks: bool = False
    note: str = ""

    def __str__(self):
        return "-".join(filter(None, [self.family, self.note, self.target]))


CASES = [
    Case("llama", "ministral"),
    Case("llama", "ministral", {"tie_word_embeddings": False, "head_dim": None}, note="untied"),
    Case("llama", "ministral", {"rope_scaling": LLAMA3}, note="llama3"),
    Case("llama", "ministral", {"rope_scaling": YARN}, note="yarn"),
    Case("llama", "smollm3", {"attention_bias": True}, note="qkvo-bias"),
    Case("llama", "smollm3", {**BIASED, "rope_scaling": LLAMA3}, note="bias"),
    Case("llama", "granite_swa", sinks=True),
    Case("llama", "granite_swa", {**BIASED, "rope_scaling": LLAMA3}, sinks=True, note="bias"),
    Case("mistral", "ministral"),
    Case("mistral", "ministral", {"sliding_window": WINDOW}, note="windowed"),
    Case("mistral", "granite_swa", sinks=True),
    Case("ministral", "ministral"),
    Case("granite", "granite_swa"),
    Case("granite", "granite_swa", {"attention_bias": False, "mlp_bias": False}, note="no-bias"),
    Case("granite", "granite_swa", sinks=True, note="sinks"),
    Case("qwen2", "qwen2"),
    Case(
        "qwen2",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
        note="windowed",
    ),
    Case("qwen3", "qwen3"),
    Case("qwen3", "qwen3", {"attention_bias": True, "rope_scaling": YARN}, note="bias"),
    Case("smollm3", "smollm3"),
    Case("smollm3", "smollm3", {"no_rope_layers": None, **{k: False for k in BIASED}}, note="bare"),
    Case("gemma2", "gemma2"),
    Case("gemma3_text", "gemma3_text", {"rope_parameters": SAME_ROPE}, note="one-rope"),
    Case("gemma3_text", "gemma3_text", {"layer_types": [FULL] * 4}, note="all-full"),
    Case("olmo2", "olmo3"),
    Case("olmo2", "olmo3", {"rope_scaling": YARN}, note="yarn"),
    Case("olmo3", "olmo3"),
    Case("gemma", "vaultgemma"),
    Case("gemma", "vaultgemma", {"tie_word_embeddings": False}, note="untied"),
    Case("phi3", "ministral"),
    Case("phi3", "ministral", {"sliding_window": WINDOW}, note="windowed"),
    Case("phi3", "granite_swa", sinks=True),
]
MIXED = [c for c in CASES if c.note != "windowed" or c.family == "qwen2"]


def family(name):
    return registry.load("families", name).FAMILY


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def source(tmp_path):
    """Return a function that saves a random tiny model and loads it from disk, in eager attention.

    The config.json is what was given, in whichever spelling, not what transformers would write.
    """

    def make(name, changes=None, dtype=torch.float32):
        part = family(name)
        raw = {**part.tiny_config, **(changes or {})}
        raw = {**raw, "model_type": name, "architectures": [part.causal_class]}
        if "rope_parameters" in raw:
            raw.pop("rope_theta", None)
        raw["dtype"] = str(dtype).removeprefix("torch.")
        model = part.part(part.causal_class)(part.part(part.config_class)(**_copy(raw)))
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng(parameter.numel()))
            parameter.data = parameter.data * (parameter.dim() == 1) + 0.25 * noise
        model.to(dtype).save_pretrained(tmp_path / "source")
        (tmp_path / "source" / "config.json").write_text(json.dumps(raw))
        return raw, load(tmp_path / "source")

    return make


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def sliding(name, raw, layers, window=WINDOW, **options):
    """The plan that slides over `layers` and leaves the others as they are."""
    shape = family(name).geometry(raw)
    heads = tuple(range(shape.num_attention_heads))
    kept = LayerPlan(groups=(HeadGroup(mixer="full", heads=heads),))
    group = HeadGroup(mixer="sliding", heads=heads, options={"window": window, **options})
    swapped = LayerPlan(groups=(group,))
    return Plan(
        model_type=name,
        geometry=shape,
        layers=tuple(swapped if i in layers else kept for i in range(shape.num_hidden_layers)),
    )


def splice(folder, out, config, target, plan, new):
    """Write the target folder as the checkpoint writer does, tensor by tensor."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    moves = target.moves(config, plan, tuple(tensors)) if target.moves else None
    tensors |= new
    written = tensors
    if moves is not None:
        written = {}
        dtype = next(iter(tensors.values())).dtype
        for move in moves:
            assert move.target not in written, move
            if move.source is None:
                written[move.target] = np.full(move.shape, move.fill, dtype)
            else:
                rows = slice(*move.rows) if move.rows else slice(None)
                written[move.target] = np.ascontiguousarray(tensors[move.source][rows])
    out.mkdir()
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(target.config(config, plan)))
    return load(out)


def exported(tmp_path, name, raw, plan, new=None):
    target, reasons = _stock.pick(family(name), raw, plan)
    assert target is not None, reasons
    return target, splice(tmp_path / "source", tmp_path / "out", raw, target, plan, new or {})


def tokens(model):
    return torch.randint(3, model.config.vocab_size, (2, TOKENS), generator=rng(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def banded_logits(model, ids, windows):
    """Logits of the source with an additive mask of our own in every layer."""
    ago = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    handles = []
    for layer, window in zip(model.base_model.layers, windows, strict=True):
        seen = (ago >= 0) & (ago < (window or TOKENS))
        mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~seen, torch.finfo(torch.float32).min)

        def swap(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.self_attn.register_forward_pre_hook(swap, with_kwargs=True))
    found = logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_full_is_the_source_bit_by_bit(case, source, tmp_path):
    if case.sinks:
        pytest.skip("a source without sinks is not exported to an architecture with them")
    raw, model = source(case.family, case.changes)
    plan = full_plan(case.family, family(case.family).geometry(raw))
    target, written = exported(tmp_path, case.family, raw, plan)
    assert target.model_type == written.config.model_type == case.target
    assert type(written).__name__ == written.config.architectures[0]
    ids = tokens(model)
    if case.family == "phi3":  # one product cut in three may round differently, so in float64
        assert (logits(written.double(), ids) - logits(model.double(), ids)).abs().max() < 1e-12
    else:
        assert torch.equal(logits(written, ids), logits(model, ids))
    assert "{path}" in target.serve


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_mixed_layers_are_the_source_under_a_banded_mask(case, source, tmp_path, monkeypatch):
    raw, model = source(case.family, case.changes)
    layers = [i for i in (1, 2) if family(case.family).geometry(raw).windows[i] is None]
    plan = sliding(case.family, raw, layers, case.window, sink_bias=case.sinks)
    heads = plan.geometry.num_attention_heads
    new = {
        f"model.layers.{i}.self_attn.mixers.0.sinks": np.linspace(-2, 3, heads, dtype=np.float32)
        for i in layers
        if case.sinks
    }
    target, written = exported(tmp_path, case.family, raw, plan, new)
    assert target.model_type == case.target
    windows = [case.window if i in layers else w for i, w in enumerate(plan.geometry.windows)]
    assert written.config.layer_types == [SLIDING if w else FULL for w in windows]
    assert written.config.sliding_window == case.window
    ids = tokens(model)
    if case.sinks:
        use_sinks(monkeypatch, case.family, new)
    expected = banded_logits(model, ids, windows)
    got = logits(written, ids)
    assert (got - expected).abs().max() <= 1e-5
    assert (got - logits(model, ids)).abs().max() > 1e-2  # the window matters at this length
    assert cached_difference(written, ids) <= 1e-5


@pytest.mark.parametrize("name", ["stories260K", "stories260K-yarn2", "tinystories656K"])
def test_real_checkpoints_that_nobody_here_trained(name, shared_models, tmp_path):
    folder = shared_models / name
    raw, model = json.loads((folder / "config.json").read_text()), load(folder)
    plan = sliding("llama", raw, [0])
    target, _ = _stock.pick(family("llama"), raw, plan)
    written = splice(folder, tmp_path / "out", raw, target, plan, {})
    ids = tokens(model)
    windows = [WINDOW] + [None] * (len(plan.layers) - 1)
    assert (logits(written, ids) - banded_logits(model, ids, windows)).abs().max() <= 1e-5


def cached_difference(model, ids):
    """Largest difference between one forward and a prefill with single steps after it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, :11], past_key_values=cache).logits]
        for t in range(11, TOKENS):
            parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return (torch.cat(parts, 1) - logits(model, ids)).abs().max()


def use_sinks(monkeypatch, name, new):
    """Give the source's attention one more column of scores, a constant per head."""
    sinks = {int(re.search(r"layers\.(\d+)\.", k)[1]): torch.from_numpy(v) for k, v in new.items()}
    module = importlib.import_module(family(name).module)

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling + attention_mask
        if module.layer_idx in sinks:
            extra = sinks[module.layer_idx].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, extra], -1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(module, "eager_attention_forward", attend)


@pytest.mark.parametrize("case", [c for c in CASES if not c.note], ids=str)
def test_every_config_field_that_both_know_is_carried_over(case, source, tmp_path):
    odd = {
        "initializer_range": 0.017,
        "attention_dropout": 0.125,
        "max_position_embeddings": 384,
        "rms_norm_eps": 3e-4,
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
        "pad_token_id": 3,
        "use_cache": False,
        "chunk_size_feed_forward": 0,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "problem_type": "regression",
    }
    act = "hidden_act" if "hidden_act" in family(case.family).defaults else "hidden_activation"
    odd[act] = "relu"
    raw, model = source(case.family, {**case.changes, **odd}, torch.bfloat16)
    plan = sliding(case.family, raw, [2], case.window, sink_bias=case.sinks)
    target, reasons = _stock.pick(family(case.family), raw, plan)
    if target is None:
        assert case.family == "gemma3_text", reasons
        pytest.skip("two rotary settings: " + reasons[0])
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(target.config(raw, plan)))
    written = AutoConfig.from_pretrained(folder)
    ours = {f.name for f in dataclasses.fields(written)}
    theirs = {f.name for f in dataclasses.fields(model.config)}
    placed = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
    placed |= {"architectures", "transformers_version", "rope_parameters"}
    assert odd.keys() - {act} <= ours | {"dtype"}
    for name in sorted(ours & theirs - placed):
        assert getattr(written, name) == getattr(model.config, name), name
    assert getattr(written, "head_dim", None) in (plan.geometry.head_dim, None)
    assert getattr(written, act, None) == "relu" or written.hidden_activation == "relu"
    assert written.dtype == torch.bfloat16
    rope = written.rope_parameters
    flat = model.config.rope_parameters
    for one in rope.values() if FULL in rope else [rope]:
        for key in ("rope_type", "rope_theta"):
            assert one[key] == flat.get(FULL, flat)[key]


@pytest.mark.parametrize("case", [c for c in CASES if not c.note], ids=str)
def test_targets_say_outright_what_their_defaults_would_say_differently(case):
    """No field of the target class is left to its default, where the config could say it."""
    raw = {**family(case.family).tiny_config, "model_type": case.family}
    plan = sliding(case.family, raw, [3], sink_bias=case.sinks)
    target, reasons = _stock.pick(family(case.family), raw, plan)
    if target is None:
        pytest.skip("two rotary settings: " + reasons[0])
    written = target.config(raw, plan)
    cls = type(AutoConfig.for_model(case.target))
    base = {f.name for f in dataclasses.fields(cls.__mro__[1])}
    silent = {f.name for f in dataclasses.fields(cls)} - base - written.keys()
    if "rope_theta" in written:
        silent -= {"rope_parameters"}
    assert silent <= {"no_rope_layer_interval", "use_bidirectional_attention"}
    assert json.loads(json.dumps(written)) == written


def test_a_native_vllm_class_that_would_ignore_the_windows_is_made_to_refuse():
    for name in ("qwen2", "qwen3"):
        raw = family(name).tiny_config
        plan = sliding(name, raw, [1, 3])
        target, _ = _stock.pick(family(name), raw, plan)
        config = target.config(raw, plan)
        assert config["use_sliding_window"] is True
        assert config["max_window_layers"] == 1 < config["num_hidden_layers"]
        assert "--model-impl transformers" in target.serve


def heads_mixed(raw, name):
    plan = sliding(name, raw, [1])
    heads = plan.layers[1].groups[0].heads
    mixed = LayerPlan(
        groups=(
            HeadGroup(mixer="full", heads=heads[:2]),
            HeadGroup(mixer="sliding", heads=heads[2:], options={"window": WINDOW}),
        )
    )
    return dataclasses.replace(plan, layers=(plan.layers[0], mixed, *plan.layers[2:]))


def two_windows(raw, name):
    plan, other = sliding(name, raw, [1]), sliding(name, raw, [2], 16)
    return dataclasses.replace(plan, layers=(*plan.layers[:2], *other.layers[2:]))


def other_mixer(raw, name):
    plan = sliding(name, raw, [1])
    group = HeadGroup(mixer="decay", heads=plan.layers[1].groups[0].heads)
    layers = (plan.layers[0], LayerPlan(groups=(group,)), *plan.layers[2:])
    return dataclasses.replace(plan, layers=layers)


REFUSED = {
    "heads": ("llama", {}, heads_mixed, "layer 1 mixes heads"),
    "windows": ("llama", {}, two_windows, "layer 1 has a window of 8 tokens and layer 2 one of 16"),
    "mixer": ("llama", {}, other_mixer, "layer 1 is 'decay'"),
    "sink-tokens": (
        "llama",
        {},
        lambda raw, n: sliding(n, raw, [2], num_sinks=4),
        "layer 2 slides with num_sinks=4",
    ),
    "unknown-option": (
        "qwen3",
        {},
        lambda raw, n: sliding(n, raw, [2], stride=2),
        "layer 2 slides with stride=2",
    ),
    "learned-sinks": (
        "qwen3",
        {},
        lambda raw, n: sliding(n, raw, [2], sink_bias=True),
        "layer 2 has learned sinks",
    ),
    "own-window": (
        "gemma2",
        {},
        lambda raw, n: sliding(n, raw, [1], 5),
        "layer 0 has a window of 8 tokens and layer 1 one of 5",
    ),
    "own-window-changed": (
        "gemma2",
        {},
        lambda raw, n: sliding(n, raw, [0], 5),
        "layer 0 has a window of 8 in the source and 5 in the plan",
    ),
    "two-ropes": ("gemma3_text", {}, lambda raw, n: sliding(n, raw, [2]), "rotate with base"),
    "two-scalings": (
        "olmo3",
        {"rope_scaling": YARN},
        lambda raw, n: sliding(n, raw, [2]),
        "otherwise scaled",
    ),
    "longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        lambda raw, n: sliding(n, raw, [2]),
        "'longrope'",
    ),
    "partial-rotary": (
        "phi3",
        {"partial_rotary_factor": 0.5},
        lambda raw, n: sliding(n, raw, [2]),
        "share of 0.5",
    ),
    "old-gelu": ("gemma", {"hidden_act": "gelu"}, lambda raw, n: sliding(n, raw, [2]), "'gelu'"),
    "per-layer-config": (
        "llama",
        {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
        lambda raw, n: sliding(n, raw, [2]),
        "per_layer_config",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plans_without_a_stock_home_are_refused_with_a_sentence(name):
    model_type, changes, make, words = REFUSED[name]
    raw = {**family(model_type).tiny_config, **changes}
    target, reasons = _stock.pick(family(model_type), raw, make(raw, model_type))
    assert target is None
    assert len(reasons) == len(family(model_type).stock)
    assert any(words in reason for reason in reasons), reasons
    assert all(reason.endswith(".") and ": " in reason for reason in reasons)


def test_pick_says_why_better_targets_were_passed_over():
    raw = {**family("llama").tiny_config, "mlp_bias": True}
    target, reasons = _stock.pick(family("llama"), raw, sliding("llama", raw, [1]))
    assert target.model_type == "smollm3"
    assert reasons == ["ministral: the source has biases (mlp_bias), which it has no place for."]


def test_stray_fields_of_the_target_do_not_slip_through():
    stray = {
        "layer_types": [SLIDING] * 4,
        "sliding_window": 3,
        "no_rope_layers": [0] * 4,
        "attention_multiplier": 9.0,
        "layer_rope_theta": [0, 0, 0, 0],
        "auto_map": {"AutoModelForCausalLM": "evil.py"},
    }
    raw = {**family("llama").tiny_config, **stray, "attention_bias": True}
    plan = sliding("llama", raw, [1])
    config = _stock.pick(family("llama"), raw, plan)[0].config(raw, plan)
    assert config["layer_types"] == [FULL, SLIDING, FULL, FULL]
    assert (config["sliding_window"], config["no_rope_layers"]) == (WINDOW, [1] * 4)
    assert "auto_map" not in config
    plan = sliding("llama", raw, [1], sink_bias=True)
    config = _stock.pick(family("llama"), raw, plan)[0].config(raw, plan)
    assert config["attention_multiplier"] == 10**-0.5
    assert config["layer_rope_theta"] == [5000.0] * 4


def test_rotary_settings_that_are_no_mapping_are_named():
    raw = {**family("llama").tiny_config, "rope_scaling": 3}
    plan = sliding("llama", raw, [1])
    with pytest.raises(CheckpointError, match="rope_scaling is 3"):
        _stock.pick(family("llama"), raw, plan)[0].config(raw, plan)
