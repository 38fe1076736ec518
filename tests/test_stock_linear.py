"""Hybrids with linear layers as plain transformers: same weights, same logits, nothing of morph."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer, Olmo2RotaryEmbedding
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import (
    OlmoHybridConfig,
    OlmoHybridLinearAttentionDecoderLayer,
)

from morph import checkpoint, modeling, registry, surgery
from morph.checkpoint import from_float
from morph.checkpoint._plan import plan_shards
from morph.errors import CheckpointError, UsageError, VerificationFailed
from morph.families import _mamba_hosts, _stock
from morph.families._family import Move
from morph.pipeline import _convert, _source, _train, _verify
from morph.plan import HeadGroup, LayerPlan, Plan

# Heads together as wide as the layer, which granitemoehybrid needs and most models have
SIZES = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LETTERS = {"F": "full", "M": "mamba2", "G": "gated_delta", "P": "parallel", "S": "sliding"}
TOKENS = 21
OLD = _mamba_hosts.transformers_version() < (5, 23)


@dataclasses.dataclass
class Case:
    """A source, a letter per layer, and the target that must hold them."""

    family: str
    pattern: str
    target: str
    changes: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    biased: bool = False  # biases of q, k and v reach the convolution of left padding
    note: str = ""

    def __str__(self):
        return "-".join(filter(None, [self.family, self.note, self.target]))


CASES = [
    Case("llama", "FMMF", "granitemoehybrid"),
    Case(
        "llama",
        "FMMF",
        "granitemoehybrid",
        {"attention_bias": True, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
        {"mamba2": {"conv": 3}},
        biased=True,
        note="bias-llama3-conv3",
    ),
    Case("llama", "MFFM", "granitemoehybrid", {"head_dim": 12}, note="expand2"),
    Case("mistral", "MMMF", "granitemoehybrid"),
    Case("ministral", "FMFF", "granitemoehybrid", {"layer_types": ["full_attention"] * 4}),
    Case("qwen2", "FMMF", "granitemoehybrid", {"head_dim": None}, biased=True),
    Case("llama", "FPMF", "falcon_h1", {"head_dim": 10}),
    Case(
        "llama",
        "FPMP",
        "falcon_h1",
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": YARN},
        {"parallel": {"branch_options": {"conv": 2}}, "mamba2": {"conv": 2}},
        biased=True,
        note="bias-yarn-conv2",
    ),
    Case("qwen3", "FGGF", "qwen3_5_text", {"head_dim": 10}),
    Case(
        "qwen3",
        "GFGG",
        "qwen3_5_text",
        {"rope_scaling": YARN, "tie_word_embeddings": True},
        {"gated_delta": {"conv": 2}},
        note="yarn-tied-conv2",
    ),
]


def family(name):
    return registry.load("families", name).FAMILY


def write_source(folder, case, dtype=torch.float32):
    """A tiny model with random weights, norms included, and its config.json as it was given."""
    part = family(case.family)
    raw = {**part.tiny_config, **SIZES, **case.changes, "model_type": case.family}
    raw |= {"architectures": [part.causal_class], "dtype": str(dtype).removeprefix("torch.")}
    raw = {k: v for k, v in raw.items() if v is not None or k != "head_dim"}
    rng = torch.Generator().manual_seed(1)
    model = part.part(part.causal_class)(part.part(part.config_class)(**_copy(raw)))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.data = parameter.data * (parameter.dim() == 1) + 0.25 * noise
    model.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def plan_of(name, raw, pattern, options=None):
    shape, options = family(name).geometry(raw), options or {}
    heads = tuple(range(shape.num_attention_heads))
    groups = [
        HeadGroup(mixer=LETTERS[x], heads=heads, options=options.get(LETTERS[x], {}))
        for x in pattern
    ]
    return Plan(
        model_type=name, geometry=shape, layers=tuple(LayerPlan(groups=(g,)) for g in groups)
    )


def trained(source, plan, dtype="float32"):
    """The hybrid, every tensor of its mixers random, and a few of the source's as if trained."""
    model = modeling.hybrid(source.model(dtype), plan).eval()
    rng = torch.Generator().manual_seed(3)
    near_one = ("norm_weight", "D", "gain_full", "gain_branch")
    with torch.no_grad():
        for name, parameter in surgery.mixer_parameters(model):
            noise = 0.4 * torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise + (name.rpartition(".")[2] in near_one))
    changed = [n for n, _ in model.named_parameters() if n.endswith(".1.self_attn.q_proj.weight")]
    changed += [f"model.layers.2.{n}.weight" for n in ("mlp.up_proj", "input_layernorm")]
    for name in changed:
        owner, _, leaf = name.rpartition(".")
        old = getattr(model.get_submodule(owner), leaf)
        fresh = torch.nn.Parameter(old.detach() + 0.1)
        setattr(model.get_submodule(owner), leaf, fresh)
    model.morph_trained = changed
    return model


def export(source, plan, student, out):
    """Write what `convert` writes, without its processes; return the target and the notes."""
    stock, reasons = _stock.pick(source.family, source.checkpoint.config, plan)
    assert stock is not None, reasons
    new, replaced = _convert._tensors(source, student)
    given = {**new, **replaced}
    names = tuple(sorted({*source.checkpoint.tensors, *new}))
    moves, dropped = _convert.mapping(source, plan, stock, names)
    written = checkpoint.write_checkpoint(
        out,
        source=source.checkpoint,
        config=stock.config(source.checkpoint.config, plan),
        moves=moves,
        dropped=dropped,
        given=given,
        durable=False,
    )
    _verify._kept_tensors(source, out, moves, set(given), dropped)
    return stock, written, _convert._notes(source, plan, stock, given)


def load(folder, **how):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def skip_where_too_old(case):
    if OLD and case.target != "qwen3_5_text":
        pytest.skip("transformers before 5.23 is refused: see the test of its own")


@dataclasses.dataclass
class Exported:
    """One case, written once for all tests of this file."""

    case: Case
    source: object
    hybrid: object
    folder: object
    written: object
    notes: list


@pytest.fixture(scope="module", params=CASES, ids=str)
def exported(request, tmp_path_factory):
    case, folder = request.param, tmp_path_factory.mktemp("linear")
    skip_where_too_old(case)
    raw = write_source(folder / "source", case)
    source = _source.open_source(str(folder / "source"))
    plan = plan_of(case.family, raw, case.pattern, case.options)
    hybrid = trained(source, plan)
    stock, written, notes = export(source, plan, hybrid, folder / "out")
    assert stock.model_type == case.target
    model = load(folder / "out")
    report = list(getattr(model.config, "layer_types", None) or model.config.layers_block_type)
    assert report == list(stock.layer_types(plan))
    assert not set(written.kept) & set(hybrid.morph_trained)
    return Exported(case, source, hybrid, folder / "out", model, notes)


def test_what_was_written_can_be_read_back_as_a_hybrid(exported):
    source, plan = exported.source, modeling.plan_of(exported.hybrid.config)
    found = _convert.as_source(source, plan, checkpoint.Checkpoint.open(exported.folder))
    again = modeling.hybrid(source.model("float32"), plan).eval()
    shapes = {n: p.shape for n, p in again.named_parameters(remove_duplicate=False)}
    own = set(surgery.own_parameter_names(source.family, plan))
    assert own <= set(found) <= set(shapes)
    assert {n: x.shape for n, x in found.items()} == {n: shapes[n] for n in found}
    fresh = {n: torch.from_numpy(np.ascontiguousarray(x)).float() for n, x in found.items()}
    ids = tokens(again)
    got = torch.func.functional_call(again, fresh, (ids,), {"use_cache": False}).logits
    assert error(got, logits(exported.hybrid, ids)) <= 1e-5
    if exported.case.target != "qwen3_5_text":  # there norm and projection are one
        for name, parameter in surgery.mixer_parameters(exported.hybrid):
            if not name.endswith(("gain_full", "gain_branch")):
                assert torch.equal(fresh[name], parameter), name


def tokens(model, batch=2, count=TOKENS):
    rng = torch.Generator().manual_seed(5)
    return torch.randint(3, model.config.vocab_size, (batch, count), generator=rng)


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, use_cache=False, **more).logits


def error(got, expected):
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_the_export_is_the_hybrid_in_memory(exported):
    ids = tokens(exported.written)
    expected = logits(exported.hybrid, ids)
    assert error(logits(exported.written, ids), expected) <= 1e-5
    assert type(exported.written).__module__.startswith("transformers.models.")
    untrained = logits(exported.source.model("float32"), ids)
    assert error(expected, untrained) > 1e-2  # what was compared is not the source


def first_full(exported, model, ids):
    """What comes out of the first full layer."""
    seen, layer = [], model.base_model.layers[exported.case.pattern.index("F")]
    layer_hook = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    logits(model, ids)
    layer_hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_full_layers_are_the_source_s_own(exported):
    # one product in place of two may round differently, and so may twice a half
    limit = {"falcon_h1": 0.0, "granitemoehybrid": 1e-7, "qwen3_5_text": 5e-6}[exported.case.target]
    if exported.case.pattern[0] != "F":  # what goes in has been through another layer
        limit = 5e-6
    ids = tokens(exported.written)
    got, expected = (first_full(exported, m, ids) for m in (exported.written, exported.hybrid))
    assert error(got, expected) <= limit


def test_names_and_shapes_are_those_that_transformers_would_save(exported, tmp_path):
    exported.written.save_pretrained(tmp_path / "saved")
    saved = checkpoint.Checkpoint.open(tmp_path / "saved", strict=False)
    ours = checkpoint.Checkpoint.open(exported.folder)
    assert {n: i.shape for n, i in ours.tensors.items()} == {
        n: i.shape for n, i in saved.tensors.items()
    }


def test_a_cache_changes_nothing(exported):
    model, ids = exported.written, tokens(exported.written)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, :11], past_key_values=cache, use_cache=True).logits]
        for t in range(11, TOKENS):
            step = ids[:, t : t + 1]
            parts.append(model(step, past_key_values=cache, use_cache=True).logits)
    whole = logits(model, ids)
    assert error(torch.cat(parts, 1)[:, -1], whole[:, -1]) <= 1e-5
    assert error(torch.cat(parts, 1), whole) <= 1e-5
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached, plain = (model.generate(ids[:1, :7], use_cache=u, **how) for u in (True, False))
    assert torch.equal(cached, plain)


def test_a_left_padded_batch_is_its_singles(exported):
    model = exported.written
    ids = tokens(model)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :6], mask[1, :6] = 0, 0
    got = logits(model, padded, attention_mask=mask)
    alone = logits(model, ids[1:, 6:])
    told = any("left padding" in note for note in exported.notes)
    assert told == exported.case.biased
    if exported.case.biased:  # what the note says is so
        assert error(got[1:, 6:], alone) > 1e-4
    else:
        assert error(got[1:, 6:], alone) <= 1e-5
    assert error(got[:1], logits(model, ids[:1])) <= 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if not c.note], ids=str)
def test_a_16_bit_source_is_stored_without_loss(case, tmp_path):
    skip_where_too_old(case)
    raw = write_source(tmp_path / "source", case, torch.bfloat16)
    source = _source.open_source(str(tmp_path / "source"))
    hybrid = trained(source, plan := plan_of(case.family, raw, case.pattern, case.options))
    _, _, notes = export(source, plan, hybrid, tmp_path / "out")
    model = load(tmp_path / "out", dtype=torch.float32)
    ids = tokens(model)
    assert error(logits(model, ids), logits(hybrid, ids)) <= 1e-5
    stored = checkpoint.Checkpoint.open(tmp_path / "out").tensors
    wide = {n.rsplit(".", 2)[-2] for n, i in stored.items() if i.dtype == "F32"}
    allowed = {"out_proj", "o_proj", "norm", "q_norm", "k_norm"}
    allowed |= {"input_layernorm", "post_attention_layernorm"}
    assert wide <= allowed
    assert {i.dtype for i in stored.values()} <= {"BF16", "F32"}
    loss = [n for n in notes if "1 + w" in n]
    assert bool(loss) == (case.target == "qwen3_5_text")
    assert all("at worst by" in n and "dtype=torch.float32" in n for n in loss)
    again = load(tmp_path / "out")  # as its config says
    assert again.dtype == torch.bfloat16
    assert error(logits(again, ids).float(), logits(model, ids)) < 0.1


REFUSALS = [
    ("llama", "FMSF", {}, {}, "layer 2 is 'sliding', and its layers are full or mamba2."),
    ("llama", "FMMF", {"head_dim": 10}, {}, "heads together are 60 wide"),
    ("llama", "FMMF", {"mlp_bias": True}, {}, "mlp_bias"),
    ("llama", "FMMF", {"hidden_act": "gelu"}, {}, "hidden_act, which is 'gelu'"),
    ("llama", "FGGF", {}, {}, "falcon_h1: layer 1 is 'gated_delta'"),
    ("llama", "FMMF", {"head_dim": 10}, {}, "falcon_h1: no layer is parallel"),
    ("llama", "FPFF", {}, {"parallel": {"window": 8}}, "window=8, which no stock layer can;"),
    ("llama", "FPFF", {}, {"parallel": {"branch": "decay"}}, "branch=mamba2 would fit"),
    ("mistral", "FMMF", {"sliding_window": 8}, {}, "layer 0 has a window of 8 tokens"),
    ("ministral", "FFMF", {}, {}, "layer 1 has a window of 8 tokens"),
    ("qwen3", "FGGF", {}, {"gated_delta": {"conv": 0}}, "without a convolution; conv=4"),
    ("qwen3", "FGGF", {}, {"gated_delta": {"inputs": "rotated"}}, "inputs=projected would fit"),
    ("qwen3", "FGGF", {}, {"gated_delta": {"gate": "none"}}, "gate=silu would fit"),
    ("qwen3", "FGGF", {"attention_bias": True}, {}, "biases (attention_bias)"),
    ("qwen3", "FMMF", {}, {}, "layer 1 is 'mamba2', and its layers are full or gated_delta."),
    ("olmo2", "FGGF", {}, {}, "olmo_hybrid: its linear layers norm what goes into"),
    ("olmo2", "FMMF", {}, {}, "olmo_hybrid: no layer is gated_delta"),
]


@pytest.mark.parametrize("name, pattern, changes, options, reason", REFUSALS)
def test_a_plan_that_does_not_fit_is_told_why(name, pattern, changes, options, reason):
    raw = {**family(name).tiny_config, **SIZES, **changes, "model_type": name}
    stock, reasons = _stock.pick(family(name), raw, plan_of(name, raw, pattern, options))
    assert stock is None
    assert any(reason in r for r in reasons), reasons
    assert all(r.endswith(".") for r in reasons)


def test_layers_that_differ_in_width_are_named():
    raw = {**family("llama").tiny_config, **SIZES}
    plan = plan_of("llama", raw, "FMFF", {"mamba2": {"conv": 3}})
    other = plan_of("llama", raw, "FFMF").layers[2]
    plan = dataclasses.replace(plan, layers=(*plan.layers[:2], other, plan.layers[3]))
    _, reasons = _stock.pick(family("llama"), raw, plan)
    assert any("layers 1 and 2 convolve over 3 and 4 tokens" in r for r in reasons)


def test_heads_of_one_layer_that_differ_are_refused():
    raw = {**family("llama").tiny_config, **SIZES}
    plan = plan_of("llama", raw, "FMFF")
    mixed = LayerPlan(
        groups=(
            HeadGroup(mixer="mamba2", heads=(0, 1, 2)),
            HeadGroup(mixer="full", heads=(3, 4, 5)),
        )
    )
    plan = dataclasses.replace(plan, layers=(mixed, *plan.layers[1:]))
    _, reasons = _stock.pick(family("llama"), raw, plan)
    assert any("granitemoehybrid: layer 0 mixes heads" in r for r in reasons)


def test_an_older_transformers_that_would_load_it_wrongly_is_refused(monkeypatch):
    raw = {**family("llama").tiny_config, **SIZES}
    plan = plan_of("llama", raw, "FMMF")
    monkeypatch.setattr(_mamba_hosts, "transformers_version", lambda: (5, 23))
    assert _stock.pick(family("llama"), raw, plan)[0].model_type == "granitemoehybrid"
    monkeypatch.setattr(_mamba_hosts, "transformers_version", lambda: (5, 22))
    stock, reasons = _stock.pick(family("llama"), raw, plan)
    assert stock is None
    assert any("norms all heads of a Mamba-2 layer together; 5.23" in r for r in reasons)
    parallel = plan_of("llama", raw, "FPMF")
    stock, reasons = _stock.pick(family("llama"), raw, parallel)
    assert stock is None and any("decodes a batch wrongly" in r for r in reasons)


def test_a_plan_outside_becomes_a_package_and_stock_alone_is_an_error(tmp_path):
    case = Case("llama", "FMMF", "", {"head_dim": 10})
    raw = write_source(tmp_path / "source", case)
    source = _source.open_source(str(tmp_path / "source"))
    plan = plan_of("llama", raw, "FMMF")
    stock, reasons = _convert.find_target(source, plan, "auto")
    assert stock is None and any("60 wide" in r for r in reasons)
    with pytest.raises(UsageError, match="60 wide"):
        _convert.find_target(source, plan, "stock")


def test_olmo_2_and_its_hybrid_differ_whatever_the_weights():
    """A host that norms its input cannot tell x from 3 x; OLMo 2's own MLP half can."""
    raw = {**family("olmo2").tiny_config, **{k: v for k, v in SIZES.items() if k != "head_dim"}}
    config = family("olmo2").part("Olmo2Config")(**raw, attn_implementation="eager")
    theirs = OlmoHybridConfig(
        **{**raw, "rms_norm_eps": 1e-12}, layer_types=["linear_attention"] * 3 + ["full_attention"]
    )
    x = torch.randn(1, 4, 36)
    turns = Olmo2RotaryEmbedding(config)(x, torch.arange(4)[None])
    olmo, host = Olmo2DecoderLayer(config, 0), OlmoHybridLinearAttentionDecoderLayer(theirs, 0)

    def half(layer, pre, y):
        found = layer.mlp(layer.post_attention_layernorm(y) if pre else y)
        return found if pre else layer.post_feedforward_layernorm(found)

    with torch.no_grad():
        for module in (olmo, host):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.5 + (parameter.dim() == 1))
        assert olmo(x, position_embeddings=turns).shape == host(x).shape
        assert error(half(host, True, 3 * x), half(host, True, x)) < 1e-5
        assert error(half(olmo, False, 3 * x), half(olmo, False, x)) > 0.1


# ---- computed tensors in the writer


@pytest.fixture
def numbers(tmp_path):
    write_source(tmp_path / "source", Case("llama", "FFFF", ""), torch.bfloat16)
    return checkpoint.Checkpoint.open(tmp_path / "source")


def others(source, *names):
    return [Move(target=n, source=n) for n in source.tensors if n not in names]


def pieces(source, moves, given=None):
    shards = plan_shards(source, moves, {}, {}, {}, 2**40, given)
    return {p.target: p for s in shards for p in s.pieces}


def test_a_computed_tensor_is_rounded_once_to_its_source_s_dtype(numbers):
    name, norm = "model.embed_tokens.weight", "model.norm.weight"
    shape = numbers.tensors[name].shape
    third = Move(target="x", sources=(name, norm), shape=shape, make=lambda p: p[0] * p[1] / 3)
    found = pieces(numbers, [*others(numbers, name), third])["x"]
    values = torch.from_numpy(numbers.read_float(name) * numbers.read_float(norm) / 3)
    expected = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert found.dtype == "BF16" and found.origin is None
    assert np.array_equal(found.data(), expected)
    exact = dataclasses.replace(third, exact=True)
    found = pieces(numbers, [*others(numbers, name), exact])["x"]
    assert found.dtype == "F32" and np.array_equal(found.data(), values.numpy())
    half = dataclasses.replace(exact, make=lambda p: p[0] / 2)
    assert pieces(numbers, [*others(numbers, name), half])["x"].dtype == "BF16"


def test_rounding_is_that_of_torch():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=rng) * torch.logspace(-38, 38, 4096)
    x[:64] = torch.arange(64) / 64 * 2**-7 + 1  # ties among them
    for code, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        expected = x.to(dtype)
        bits = expected.view(torch.uint16) if code == "BF16" else expected
        assert np.array_equal(from_float(code, x.numpy()), bits.numpy())


def test_every_tensor_of_the_mixers_must_go_somewhere(numbers):
    moves = [Move(target=n, source=n) for n in numbers.tensors]
    given = {"model.layers.0.self_attn.mixers.0.A_log": ("F32", (2,), np.ones(2, "f4").tobytes())}
    with pytest.raises(CheckpointError, match=r"neither copied, .*mixers\.0\.A_log"):
        pieces(numbers, moves, given)
    named = Move(target="A_log", source=next(iter(given)), shape=(2, 1))
    found = pieces(numbers, [*moves, named], given)["A_log"]
    assert (found.dtype, found.shape, found.origin) == ("F32", (2, 1), None)


def test_given_values_take_the_place_of_stored_ones(numbers):
    name = "model.norm.weight"
    size = numbers.tensors[name].shape[0]
    given = {name: ("F32", (size,), np.arange(size, dtype="f4"))}
    doubled = Move(target="y", sources=(name,), shape=(size,), make=lambda p: 2 * p[0])
    rows = Move(target="z", source=name, rows=(1, 3))
    found = pieces(numbers, [*others(numbers, name), doubled, rows], given)
    assert np.array_equal(found["y"].data(), 2 * np.arange(size, dtype="f4"))
    assert bytes(found["z"].data) == np.arange(1, 3, dtype="f4").tobytes()
    with pytest.raises(CheckpointError, match="is given with shape"):
        pieces(numbers, None, {name: ("F32", (2,), np.ones(2, "f4"))})
    with pytest.raises(CheckpointError, match="not in memory"):
        pieces(numbers, None, {name: ("F32", (size,), lambda: b"")})


def test_a_computed_tensor_of_the_wrong_shape_is_refused(numbers, tmp_path):
    name = "model.norm.weight"
    wrong = Move(target=name, sources=(name,), shape=(3,), make=lambda p: p[0])
    with pytest.raises(CheckpointError, match=r"was computed with shape \[36\], not \[3\]"):
        checkpoint.write_checkpoint(
            tmp_path / "out",
            source=numbers,
            config=numbers.config,
            moves=[*others(numbers, name), wrong],
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="give sources and shape"):
        pieces(numbers, [*others(numbers, name), dataclasses.replace(wrong, shape=None)])


def test_learned_sinks_reach_their_stock_architecture(tmp_path):
    raw = write_source(tmp_path / "source", Case("llama", "FSFF", ""))
    source = _source.open_source(str(tmp_path / "source"))
    options = {"sliding": {"window": 8, "sink_bias": True}}
    plan = plan_of("llama", raw, "FSSF", options)
    hybrid = trained(source, plan)
    stock, _, _ = export(source, plan, hybrid, tmp_path / "out")
    assert stock.model_type == "granite_swa"
    ids = tokens(hybrid)
    model = load(tmp_path / "out")
    assert error(logits(model, ids), logits(hybrid, ids)) <= 1e-5


# ---- as `morph convert` does it, in processes without morph


def convert(case, folder, student=True, dtype=torch.float32):
    skip_where_too_old(case)
    raw = write_source(folder / "source", case, dtype)
    source, said = _source.open_source(str(folder / "source")), []
    plan = surgery.resolve_costs(plan_of(case.family, raw, case.pattern))
    model = trained(source, plan) if student else None
    done = _convert.convert(source, plan, folder / "out", student=model, say=said.append)
    assert done.format == case.target and done.verification["logit_error"] <= 1e-5
    assert "morph" not in done.load
    return source, plan, done, said


def test_convert_tells_what_the_result_needs(tmp_path):
    case = next(c for c in CASES if c.target == "granitemoehybrid")
    # start values, rounded to what is stored
    _, _, done, said = convert(case, tmp_path, student=False, dtype=torch.bfloat16)
    assert any("transformers 5.23 or newer" in x for x in said)
    assert any("transformers 5.23 or newer" in x for x in done.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Note: It needs transformers 5.23 or newer" in card
    assert json.loads((tmp_path / "out" / "morph.json").read_text())["notes"] == list(done.notes)


def test_a_verified_folder_can_be_verified_again(tmp_path, monkeypatch):
    case = next(c for c in CASES if c.target == "qwen3_5_text")
    source, plan, _, _ = convert(case, tmp_path)
    seen = {}
    monkeypatch.setattr(_train, "student_of", lambda *args: None)
    monkeypatch.setattr(_verify, "_check_computed", lambda *args: None)  # it was trained
    monkeypatch.setattr(_verify, "load_and_compare", lambda *args, **more: seen.update(more))
    _verify.against(source, tmp_path / "out", plan)
    assert set(seen["dropped"]) == {
        f"model.layers.{i}.self_attn.{n}_norm.weight" for i in (1, 2) for n in "qk"
    }


def test_a_computed_tensor_that_was_tampered_with_is_found(tmp_path, monkeypatch):
    case = next(c for c in CASES if c.target == "granitemoehybrid")
    skip_where_too_old(case)
    raw = write_source(tmp_path / "source", case)
    source = _source.open_source(str(tmp_path / "source"))
    plan = surgery.resolve_costs(plan_of(case.family, raw, case.pattern))
    export(source, plan, modeling.hybrid(source.model("float32"), plan), tmp_path / "out")
    monkeypatch.setattr(_train, "student_of", lambda *args: None)  # _check_computed comes first
    monkeypatch.setattr(_verify, "load_and_compare", lambda *args, **more: None)
    _verify.against(source, tmp_path / "out", plan)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored["model.layers.1.shared_mlp.input_linear.weight"][3, 5] += 1
    save_file(stored, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"layers\.1\.mlp\.gate_proj\.weight"):
        _verify.against(source, tmp_path / "out", plan)


def test_an_architecture_with_words_of_its_own_is_verified(tmp_path):
    convert(next(c for c in CASES if c.target == "falcon_h1"), tmp_path)
