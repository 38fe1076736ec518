"""Layouts are proven by what models do, not by names.

Every architecture that transformers has is built tiny and saved. Rows that its layout calls q, k,
v, gate or o are changed in the FILE, the model is loaded again, and what reaches the softmax is
compared: exactly those heads must have changed, and nothing else. Every layer gets an input of its
own, so that a change in one layer cannot show in another. A new file in morph/layouts, and a new
family, is tested by existing.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from morph import layouts, modeling, registry, surgery
from morph.errors import CheckpointError
from morph.plan import HeadGroup, LayerPlan, Plan
from morph.testing import tiny_model

_spec = importlib.util.spec_from_file_location(
    "_tiny_layouts", Path(__file__).with_name("_tiny_layouts.py")
)
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

TOKENS = 10  # more than any window of the tiny models
REFUSED = ("deepseek_v2", "deepseek_v3", "kimi_linear", "zamba", "zamba2")
PROVEN = [m for m in tiny.MODEL_TYPES if m not in (*tiny.ELSEWHERE, *REFUSED)]


# --------------------------------------------------------------------------------------------------
# What a model does


@dataclass
class Seen:
    """What one forward showed, per layer: q, k, v [H, T, D], and what the layer returned.

    `mixed` is what the output projection gets, the constant attention output, gated or not, and
    `far` whether the last token sees the first.
    """

    q: dict[int, torch.Tensor] = field(default_factory=dict)
    k: dict[int, torch.Tensor] = field(default_factory=dict)
    v: dict[int, torch.Tensor] = field(default_factory=dict)
    far: dict[int, bool] = field(default_factory=dict)
    mixed: dict[int, torch.Tensor] = field(default_factory=dict)
    projected: dict[int, torch.Tensor] = field(default_factory=dict)
    out: dict[int, torch.Tensor] = field(default_factory=dict)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's layers, in models of every make."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.endswith("layers")
        and name.count(".") < 4
        and "visual" not in name
    ]
    return list(found[0])


def attended(layer: int, heads: int, dim: int) -> torch.Tensor:
    """What stands in for a layer's attention output [1, T, H, D], at every position the same."""
    draw = torch.Generator().manual_seed(100 + layer)
    return torch.randn(heads, dim, generator=draw).expand(1, TOKENS, -1, -1).clone()


@torch.no_grad()
def look(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, o_name: str) -> Seen:
    """Run a model whose layers each get the same vector at every position, and record.

    Softmax is replaced by a constant, so that q and k show nowhere else.
    """
    seen, layers = Seen(), decoder_layers(model)
    place = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    hidden = getattr(model.config, "text_config", model.config).hidden_size

    def softmax(module, query, key, value, mask, *args, **kwargs):
        i = place[module]
        assert i not in seen.q, f"layer {i} attends twice"
        seen.q[i], seen.k[i], seen.v[i] = query[0], key[0], value[0]
        seen.far[i] = bool(mask[0, 0, -1, 0] == 0)
        return attended(i, query.shape[1], value.shape[-1]), None

    def replace(module, args, kwargs):
        draw = torch.Generator().manual_seed(place[module])
        given = torch.randn(hidden, generator=draw).expand(1, TOKENS, -1).clone()
        if args:
            return (given, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": given}

    def before_o(module, args):
        seen.mixed[place[module]] = args[0][0]

    def after_o(module, args, output):
        seen.projected[place[module]] = output[0]

    def after(module, args, output):
        seen.out[place[module]] = (output[0] if isinstance(output, tuple) else output)[0]

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(replace, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
    monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", softmax)
    for name, module in model.named_modules():
        if name.endswith(f".{o_name}") and module in place:
            hooks.append(module.register_forward_pre_hook(before_o))
            hooks.append(module.register_forward_hook(after_o))
    model(input_ids=torch.arange(3, 3 + TOKENS)[None])
    for hook in hooks:
        hook.remove()
    return seen


def build(model_type: str) -> torch.nn.Module:
    """A random model, every parameter moved, biases and norms too."""
    model, generator = tiny.tiny_model(model_type), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() < 2 else 2 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# What a file holds


class File:
    """A saved float32 checkpoint whose rows can be changed in place."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        with open(self.path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            self.header = json.loads(stream.read(length))
        self.header.pop("__metadata__", None)
        self.start = 8 + length
        self.original = self.path.read_bytes()
        self.config = json.loads((folder / "config.json").read_text())
        self.shapes = {name: tuple(info["shape"]) for name, info in self.header.items()}

    def scale(self, rows: Iterator[tuple[str, int, int]], factor: float) -> None:
        """Multiply rows (tensor, start, stop) of the file by a factor."""
        data = np.memmap(self.path, dtype=np.uint8, mode="r+")
        for tensor, start, stop in rows:
            info = self.header[tensor]
            assert info["dtype"] == "F32"
            first, last = (self.start + at for at in info["data_offsets"])
            numbers = data[first:last].view("<f4").reshape(info["shape"])
            numbers[start:stop] *= factor
        data.flush()

    def restore(self) -> None:
        self.path.write_bytes(self.original)


def rows_of(
    reading: layouts.Reading, shapes: Mapping[str, tuple[int, ...]], role: str, heads=None
) -> Iterator[tuple[str, int, int]]:
    """The rows (tensor, start, stop) of a role, head after head; of some heads only, if given."""
    for rows in reading.rows:
        if rows.role != role:
            continue
        ranges = rows.ranges or ((0, shapes[rows.tensor][0]),)
        if heads is None:
            yield from ((rows.tensor, *r) for r in ranges)
            continue
        dim = reading.attention(rows.layer).head_dim
        numbers = [n for start, stop in ranges for n in range(start, stop)]
        for head in heads:
            yield from ((rows.tensor, n, n + 1) for n in numbers[head * dim : (head + 1) * dim])


@pytest.mark.parametrize("model_type", PROVEN)
def test_rows_are_what_reaches_the_softmax(model_type, tmp_path, monkeypatch):
    model = build(model_type)
    model.save_pretrained(tmp_path)
    file = File(tmp_path)
    reading = layouts.read(file.config, file.shapes)
    assert not reading.refusal
    assert file.shapes == tiny.shapes(model_type)
    assert reading == layouts.read(tiny.config(model_type), tiny.shapes(model_type))
    o_name = ".".join(next(r.tensor for r in reading.rows if r.role == "o").split(".")[-3:-1])
    before = look(model, monkeypatch, o_name)
    softmax = [i for i, kind in enumerate(reading.kinds) if kind in ("full", "sliding")]
    assert sorted(before.q) == sorted(before.mixed) == softmax
    for i in softmax:
        shape = reading.attention(i)
        assert before.far[i] == (reading.kinds[i] == "full")
        assert before.q[i].shape == (shape.num_attention_heads, TOKENS, shape.head_dim)
        assert before.k[i].shape == (shape.num_key_value_heads, TOKENS, shape.head_dim)
        for states in (before.q[i], before.k[i]):
            assert_turns(states, shape.rotary)

    file.restore()
    silence_one_head(reading, file)
    assert_one_head_is_silent(reading, file, before, look(load(file), monkeypatch, o_name))

    file.restore()
    for role, factor in (("q", 4), ("k", 4), ("v", 0), ("gate", 0), ("o", 0)):
        file.scale(rows_of(reading, file.shapes, role), factor)
    assert_all_heads_follow(reading, before, look(load(file), monkeypatch, o_name))


def assert_turns(states: torch.Tensor, rotary: layouts.Rotary | None) -> None:
    """Positions turn the pairs that `rotary` says, and leave the rest as at the first token."""
    dim = rotary.dim if rotary is not None else 0
    rest = states[..., dim:]
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), rtol=1e-5, atol=1e-6)
    if not dim:
        return
    assert 0 < dim <= states.shape[-1]
    half = dim // 2
    first = states[..., :dim:2] if rotary.interleaved else states[..., :half]
    second = states[..., 1:dim:2] if rotary.interleaved else states[..., half:dim]
    size = first.square() + second.square()
    torch.testing.assert_close(size, size[:, :1].expand_as(size), rtol=1e-4, atol=1e-6)
    moved = (first - first[:, :1]).abs() + (second - second[:, :1]).abs()
    assert (moved[:, -1] > 1e-6).all()


def load(file: File) -> torch.nn.Module:
    kind = AutoModelForImageTextToText if "vision_config" in file.config else AutoModelForCausalLM
    found, info = kind.from_pretrained(
        file.path.parent, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return found.eval()


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_architectures_are_written_as_their_tiny_checkpoints_say(model_type):
    found = tiny.described(tiny.tiny_model(model_type))["shapes"]
    assert {name: tuple(shape) for name, shape in found.items()} == tiny.shapes(model_type)


def silenced(reading: layouts.Reading) -> tuple[int, int]:
    """The query head and the KV head to silence in every layer."""
    shape = next(h for h in reading.heads if h is not None)
    return shape.num_attention_heads - 2, shape.num_key_value_heads - 1


def silence_one_head(reading: layouts.Reading, file: File) -> None:
    for role, head in zip(("q", "k"), silenced(reading)):
        file.scale(rows_of(reading, file.shapes, role, [head]), 0)


def assert_one_head_is_silent(
    reading: layouts.Reading, file: File, before: Seen, seen: Seen
) -> None:
    """Zeros in the rows of one query head and one KV head silence these, and nothing else."""
    norms = {r.layer: file.shapes[r.tensor][0] for r in reading.rows if r.role == "q_norm"}
    for i, kind in enumerate(reading.kinds):
        assert torch.equal(seen.out[i], before.out[i])
        if kind == "linear":
            continue
        assert torch.equal(seen.v[i], before.v[i])
        shared_norm = norms.get(i, 0) > reading.attention(i).head_dim
        for got, was, silent in zip(
            (seen.q[i], seen.k[i]), (before.q[i], before.k[i]), silenced(reading)
        ):
            others = [h for h in range(len(was)) if h != silent]
            assert was[silent].any()
            assert not got[silent].any()
            if shared_norm:  # what is silent leaves more to the others
                assert all(got[h].any() for h in others)
            else:
                assert torch.equal(got[others], was[others])


def assert_all_heads_follow(reading: layouts.Reading, before: Seen, seen: Seen) -> None:
    """Four times q and k are four times the states, unless a norm follows; zeros show as such."""
    gated = any(rows.role == "gate" for rows in reading.rows)
    for i, kind in enumerate(reading.kinds):
        if kind == "linear":
            assert torch.equal(seen.out[i], before.out[i])
            continue
        factor = 1 if reading.attention(i).qk_norm else 4
        for got, was in ((seen.q[i], before.q[i]), (seen.k[i], before.k[i])):
            torch.testing.assert_close(got, was * factor, rtol=1e-3, atol=1e-4)
        assert not seen.v[i].any()
        assert not seen.projected[i].any()
        constant = attended(i, len(before.q[i]), before.v[i].shape[-1])[0].flatten(1)
        torch.testing.assert_close(seen.mixed[i], constant * (0.5 if gated else 1))
        assert torch.equal(before.mixed[i], constant) == (not gated)


# --------------------------------------------------------------------------------------------------
# Our own hybrids

SOME = {"full": (1, 5), "sliding": (0, 4), "gated_delta": (2, 3)}  # three query heads a KV head
HALF = {"full": (0, 1, 2), "sliding": (3, 4, 5)}
BASES = ("qwen3", "olmo2", "phi3")  # norms per head, norms over the projection, one fused matrix


def mixed(heads: Mapping[str, tuple[int, ...]], fusion: str = "none") -> LayerPlan:
    groups = tuple(
        HeadGroup(mixer=m, heads=h, options={"window": 4} if m == "sliding" else {})
        for m, h in heads.items()
    )
    return LayerPlan(groups=groups, fusion=fusion)


ALL = tuple(range(6))
LAYERS = (mixed({"full": ALL}), mixed(SOME, "scale"), mixed({"gated_delta": ALL}), mixed(HALF))


def hybrid(base: str, layers: tuple[LayerPlan, ...]) -> torch.nn.Module:
    """A tiny hybrid of a family, parameters off their starts."""
    model = tiny_model(base)
    made = modeling.hybrid(
        model, Plan(model_type=base, geometry=surgery.geometry_of(model), layers=layers)
    )
    with torch.no_grad():
        for _, parameter in surgery.mixer_parameters(made):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


@torch.no_grad()
def mixers_see(model: torch.nn.Module) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """The q and k [T, H, K] of each head group (layer, group), every layer on its own input."""
    seen, hooks = {}, []
    for i, layer in enumerate(decoder_layers(model)):
        given = torch.randn(1, TOKENS, model.config.hidden_size, generator=torch.manual_seed(i))
        hooks.append(
            layer.register_forward_pre_hook(lambda _, args, given=given: (given, *args[1:]))
        )
        for j, mixer in enumerate(getattr(layer.self_attn, "mixers", ())):

            def record(module, args, place=(i, j)):
                seen[place] = args[0].q[0], args[0].k[0]

            hooks.append(mixer.register_forward_pre_hook(record))
    model(input_ids=torch.arange(3, 3 + TOKENS)[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("base", BASES)
def test_hybrids_split_rows_by_what_their_heads_attend_with(base, tmp_path):
    """Zeros in the `full` rows of q and k silence the full heads, and other heads only where the
    KV head is shared with a full one."""
    model = hybrid(base, LAYERS).eval()
    model.save_pretrained(tmp_path)
    file = File(tmp_path)
    reading = layouts.read(file.config, file.shapes)
    assert (reading.model_type, reading.refusal) == (f"morph_{base}", "")
    assert reading.kinds == ("full", "mixed", "linear", "mixed")
    tiny.assert_covered(reading, file.shapes)
    for rows in reading.rows:
        own = re.search(r"layers\.(\d)\.self_attn\.(?:mixers\.(\d)|fusion)\.", rows.tensor)
        assert (rows.role == "mixer") == bool(own), rows
        if own and own[2]:
            group = LAYERS[int(own[1])].groups[int(own[2])]
            assert rows.kind == {"gated_delta": "linear"}.get(group.mixer, group.mixer)
    before = mixers_see(model)
    for role in ("q", "k"):
        full = (r for r in reading.rows if r.role == role and r.kind == "full")
        for r in full:
            ranges = r.ranges or ((0, file.shapes[r.tensor][0]),)
            file.scale(((r.tensor, *span) for span in ranges), 0)
    after = mixers_see(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    kv_full = {1: {0, 1}, 2: set(), 3: {0}}  # KV heads that a full head reads
    for (i, j), (q, k) in after.items():
        group, was = LAYERS[i].groups[j], before[i, j]
        unchanged = base != "olmo2" or i == 2  # its norms see all heads at once
        if group.mixer == "full":
            assert not q.any() and not k.any()
            assert was[0].any() and was[1].any()
        else:
            assert torch.equal(q, was[0]) if unchanged else q.any()
            for n, head in enumerate(surgery.geometry_of(model).kv_heads(group.heads)):
                if head in kv_full[i]:
                    assert not k[:, n].any()
                else:
                    assert torch.equal(k[:, n], was[1][:, n]) if unchanged else k[:, n].any()


def saved(base: str, layers: tuple[LayerPlan, ...]) -> tuple[dict, dict]:
    """The config.json and the shapes of a hybrid."""
    found = tiny.described(hybrid(base, layers))
    return found["config"], {name: tuple(shape) for name, shape in found["shapes"].items()}


@pytest.mark.parametrize("mixer", [m for m in registry.names("mixers") if m != "full"])
def test_every_mixer_has_a_kind(mixer):
    """Full attention is what keeps every token, whatever the mixer is called."""
    one = LayerPlan(groups=(HeadGroup(mixer=mixer, heads=ALL),))
    geometry = surgery.geometry_of(tiny_model("gemma2"))  # slides in layers 0 and 2
    _, cost = surgery.group_cost(one.groups[0], geometry, 1)
    config, shapes = saved("gemma2", (one, one, mixed({"full": ALL}), mixed({"full": ALL})))
    reading = layouts.read(config, shapes)
    everything = cost.tokens is None
    assert (reading.kinds[1] == "full") == everything
    assert reading.kinds[1] in ("full", "sliding" if mixer == "sliding" else "linear")
    _, there = surgery.group_cost(one.groups[0], geometry, 0)
    window = there.tokens and not there.state_bytes(1, 1)  # what becomes the source's window there
    assert reading.kinds[0] == ("sliding" if everything or window else reading.kinds[1])
    assert reading.kinds[2:] == ("sliding", "full")
    turns = reading.kinds[1] != "linear" and mixer != "nope"
    assert reading.attention(1).rotary == (layouts.Rotary(dim=10) if turns else None)
    assert reading.attention(3).rotary == layouts.Rotary(dim=10)
    for rows in reading.rows:
        if rows.role in ("q", "k", "v", "o"):
            assert rows.kind == reading.kinds[rows.layer]


def test_parallel_branches_may_slide():
    group = HeadGroup(mixer="parallel", heads=ALL, options={"window": 4})
    one, rest = LayerPlan(groups=(group,)), mixed({"full": ALL})
    assert layouts.read(*saved("llama", (one, rest, rest, rest))).kinds[0] == "sliding"


PLANS = [
    ({"morph": None}, "morph.plan is missing"),
    ({"morph": {"plan": [1]}}, "morph.plan is missing"),
    ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but morph.plan is for 4 layers"),
    ({"num_attention_heads": 12}, "num_attention_heads is 12, but morph.plan is for 6"),
    ({"head_dim": 5}, "head_dim is 5, but morph.plan is for 10"),
    (("geometry",), "geometry.num_attention_heads is None"),
    (("geometry", "num_attention_heads"), "geometry.num_attention_heads is 1000000000"),
    (("geometry", "num_key_value_heads"), "geometry.num_key_value_heads is 1000000000"),
    (("geometry", "num_hidden_layers"), "geometry.windows has 4 entries for 1000000000 layers"),
    (("geometry", "head_dim"), "head_dim is 10, but morph.plan is for 1000000000"),
    (("layers",), "morph.plan.layers"),
    (("layers", 1), "morph.plan.layers"),
    (("layers", 1, "groups", 0, "heads", 1), "morph.plan: layer 1: head 1000000000 does not exist"),
    (("layers", 1, "groups", 0, "mixer"), "morph.plan.layers"),
]


@pytest.mark.parametrize(("change", "message"), PLANS)
def test_plans_that_mean_harm(change, message, plan_of_llama):
    config, shapes = json.loads(json.dumps(plan_of_llama[0])), plan_of_llama[1]
    if isinstance(change, dict):
        config |= change
    else:
        place = config["morph"]["plan"]
        for key in change[:-1]:
            place = place[key]
        place[change[-1]] = 10**9
    with pytest.raises(CheckpointError) as caught:
        layouts.read(config, shapes)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def plan_of_llama():
    return saved("llama", LAYERS)


def test_an_unknown_mixer_is_no_softmax(plan_of_llama):
    """A mixer from outside the package is not imported, and its heads are not restored."""
    config = json.loads(json.dumps(plan_of_llama[0]))
    config["morph"]["plan"]["layers"][3]["groups"][0]["mixer"] = "no.such:Mixer"
    reading = layouts.read(config, plan_of_llama[1])
    assert reading.kinds == ("full", "mixed", "linear", "mixed")
    assert not [r for r in reading.rows if r.layer == 3 and r.kind == "full"]
