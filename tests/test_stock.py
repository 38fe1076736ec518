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
from morph.families import _stock
from morph.mixers._hybrid import HybridAttention
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
PAIRS = list({(c.family, c.target): c for c in reversed(CASES)}.values())


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
        return model(ids, use_cache=False).logits


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


@pytest.mark.parametrize("case", [c for c in CASES if not c.sinks], ids=str)
def test_all_full_is_the_source_bit_by_bit(case, source, tmp_path):
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


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_export_is_the_hybrid_in_memory(case, source, tmp_path):
    raw, model = source(case.family, case.changes)
    part, layers = family(case.family), (1, 2, 3) if case.family != "ministral" else (0, 2, 3)
    layers = [i for i in layers if part.geometry(raw).windows[i] is None]
    plan = sliding(case.family, raw, layers, case.window, sink_bias=case.sinks)
    for i in layers:
        layer = model.base_model.layers[i]
        layer.self_attn = HybridAttention(
            layer.self_attn, part, plan.geometry, plan.layers[i], i
        ).eval()
        for parameter in layer.self_attn.mixers.parameters():
            parameter.data = torch.linspace(-1, 3, parameter.numel())
    new = {k: v.numpy() for k, v in model.state_dict().items() if k.endswith(".mixers.0.sinks")}
    assert len(new) == len(layers) * case.sinks
    _, written = exported(tmp_path, case.family, raw, plan, new)
    ids = tokens(model)
    assert (logits(written, ids) - logits(model, ids)).abs().max() <= 1e-5


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


@pytest.mark.parametrize("case", PAIRS, ids=str)
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
    target, _ = _stock.pick(family(case.family), raw, plan)
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


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_targets_say_outright_what_their_defaults_would_say_differently(case):
    """No field of the target class is left to its default, where the config could say it."""
    raw = {**family(case.family).tiny_config, **case.changes, "model_type": case.family}
    plan = sliding(case.family, raw, [3], sink_bias=case.sinks)
    target, _ = _stock.pick(family(case.family), raw, plan)
    written = target.config(raw, plan)
    cls = type(AutoConfig.for_model(case.target))
    base = {f.name for f in dataclasses.fields(cls.__mro__[1])}
    silent = {f.name for f in dataclasses.fields(cls)} - base - written.keys()
    if "rope_theta" in written:
        silent -= {"rope_parameters"}
    assert silent <= {"no_rope_layer_interval", "use_bidirectional_attention"}
    assert json.loads(json.dumps(written)) == written
