"""Laws of every mixer module alone: a new file in morph/mixers is tested by existing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import typing
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from morph import registry, strict
from morph.cache import State
from morph.errors import MorphError, RecipeError
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.plan import Geometry, HeadGroup, LayerPlan, Plan
from morph.testing import assert_close, exactly, poison_empty

B, T, D = 3, 40, 24


def variants(name: str) -> dict[str, Any]:
    """The default options, each field changed alone, and all changed at once.

    Integers become 3, which is small enough to bind within `T` tokens.
    """
    cls = registry.load("mixers", name).Options
    found, everything = {"default": cls()}, {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if hints[field.name] is bool:
            values = [not field.default]
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            values = [v for v in typing.get_args(hints[field.name]) if v != field.default]
        elif hints[field.name] is int:
            values = [3]
        else:
            continue
        for value in values:
            try:
                found[f"{field.name}={value}"] = cls(**{field.name: value})
            except MorphError:
                continue
            everything[field.name] = value
    with contextlib.suppress(MorphError):
        found["all"] = cls(**everything)
    return found


CASES = [(n, v) for n in registry.names("mixers") for v in variants(n)]
each_case = pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
SOURCES = {"plain": {}, "window": {"window": 6}, "softcap": {"softcap": 2.0}}
each_source = pytest.mark.parametrize("source", list(SOURCES.values()), ids=list(SOURCES))


def shape(**changes: Any) -> GroupShape:
    """Four of eight heads, two KV heads, V not K, a scale that is not K ** -0.5."""
    values: dict[str, Any] = {
        "layer_idx": 1,
        "num_hidden_layers": 4,
        "heads": (0, 1, 6, 7),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "v_head_dim": 5,
        "hidden_size": D,
        "scale": 0.3,
    }
    return GroupShape(**{**values, **changes})


def make(
    name: str,
    variant: str = "default",
    dtype: torch.dtype = torch.float64,
    options: Any = None,
    **changes: Any,
) -> MixerBase:
    module = registry.load("mixers", name)
    options = variants(name)[variant] if options is None else options
    return module.Mixer(shape(**changes), options).to(dtype)


def parameter_names(name: str) -> set[str]:
    return {n for v in variants(name) for n, _ in make(name, v).named_parameters()}


def inputs(dtype: torch.dtype = torch.float64, batch: int = B, tokens: int = T) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch, tokens, *size, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(q=random(4, 6), k=random(2, 6), v=random(2, 5), hidden=random(D))


def cut(x: Inputs, start: int, stop: int, rows: slice = slice(None)) -> Inputs:
    """The tokens start:stop of some rows; padding covers everything up to stop."""
    parts = {n: getattr(x, n)[rows, start:stop] for n in ("q", "k", "v", "hidden")}
    padding = None if x.padding is None else x.padding[rows, :stop]
    return Inputs(**parts, padding=padding)


def rounded(x: Inputs) -> Inputs:
    """The same values in float64."""
    return Inputs(**{n: getattr(x, n).double() for n in ("q", "k", "v", "hidden")})


def attention(x: Inputs, shape: GroupShape) -> torch.Tensor:
    """What the source computes, written out: float64, a dense mask."""
    tokens = x.q.shape[1]
    k, v = (t.repeat_interleave(2, dim=2).double() for t in (x.k, x.v))
    s = torch.einsum("bthk,bshk->bhts", x.q.double(), k) * shape.scale
    if shape.softcap:
        s = shape.softcap * torch.tanh(s / shape.softcap)
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (gap < 0) | (gap >= (shape.window or tokens))
    p = torch.softmax(s.masked_fill(hidden, -math.inf), dim=-1)
    return torch.einsum("bhts,bshv->bthv", p, v)


@each_case
@each_source
def test_the_identity_setting_is_the_sources_attention(
    name: str, variant: str, source: dict[str, Any]
) -> None:
    module = registry.load("mixers", name)
    options = module.Mixer.identity(variants(name)[variant], T)
    if options is None:
        assert module.Mixer.exact_prefix(variants(name)[variant]) == 0
        return
    mixer, x = make(name, options=options, **source), inputs()
    assert_close("heads", attention(x, mixer.shape), mixer(x))
    assert module.Mixer.exact_prefix(options) >= T


@each_case
@each_source
def test_the_exact_prefix_is_exact(name: str, variant: str, source: dict[str, Any]) -> None:
    mixer, x = make(name, variant, **source), inputs()
    exact = min(T, mixer.exact_prefix(mixer.options))
    if exact:
        expected = attention(x, mixer.shape)
        assert_close("heads", expected[:, :exact], mixer(x)[:, :exact])


@each_case
@each_source
@pytest.mark.parametrize("padded", (False, True), ids=("real", "padded"))
@pytest.mark.parametrize("cuts", ((25,), (2, 4, 11), tuple(range(1, T)), (9, *range(30, T))))
def test_split_with_state_is_unsplit(
    name: str, variant: str, source: dict[str, Any], cuts: tuple[int, ...], padded: bool
) -> None:
    mixer, x, state = make(name, variant, **source), inputs(), State()
    if padded:
        real = torch.ones(B, T, dtype=torch.bool)
        real[0, :5], real[1, :28] = False, False
        x = dataclasses.replace(x, padding=real)
    bounds = [0, *cuts, T]
    outputs = [mixer(cut(x, a, b), state) for a, b in itertools.pairwise(bounds)]
    assert_close("heads", mixer(x), torch.cat(outputs, dim=1))
    assert state.seen == T


@each_case
def test_a_left_padded_row_is_the_row_alone(name: str, variant: str) -> None:
    mixer, x, pads = make(name, variant), inputs(), (0, 5, 31)
    real = torch.stack([torch.arange(T) >= pad for pad in pads])
    x = dataclasses.replace(x, padding=real)
    state, outputs = State(), []
    for start, stop in ((0, 20), (20, 21), (21, T)):
        outputs.append(mixer(cut(x, start, stop), state))
    for together in (mixer(x), torch.cat(outputs, dim=1)):
        assert torch.isfinite(together).all()
        for row, pad in enumerate(pads):
            alone = cut(dataclasses.replace(x, padding=None), pad, T, slice(row, row + 1))
            assert_close(f"row {row}", mixer(alone)[0], together[row, pad:])


@each_case
@each_source
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_state_bytes_are_what_the_plan_says(
    name: str, variant: str, source: dict[str, Any], dtype: torch.dtype
) -> None:
    whole = {"heads": (0, 1, 2, 3), "num_attention_heads": 4}
    mixer = make(name, variant, dtype, **whole, **source)
    options, held = mixer.options, State()
    group = HeadGroup(
        mixer=name,
        heads=(0, 1, 2, 3),
        options=strict.plain(options),
        cache=mixer.cache_cost(options, mixer.shape),
    )
    geometry = Geometry(
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        v_head_dim=5,
        hidden_size=D,
        windows=(mixer.shape.window,),
    )
    plan = Plan(model_type="test", geometry=geometry, layers=(LayerPlan(groups=(group,)),))
    x = inputs(dtype)
    with torch.no_grad():
        for start, stop in ((0, 2), (2, 20), *((t, t + 1) for t in range(20, 26))):
            mixer(cut(x, start, stop), held)
            expected = B * plan.cache_bytes(stop, str(dtype).removeprefix("torch."))
            assert held.nbytes() == expected, f"after {stop} tokens"
            stored = sum(t.untyped_storage().nbytes() for t in held.tensors.values())
            assert stored == expected, "a view keeps more memory alive than it shows"


@each_case
def test_a_state_is_reordered_by_batch(name: str, variant: str) -> None:
    mixer, x, order = make(name, variant), inputs(), torch.tensor([2, 0, 0])
    state = State()
    mixer(cut(x, 0, 30), state)
    state.map(lambda t: t.index_select(0, order))
    got = mixer(cut(x, 30, T, order), state)
    assert_close("heads", mixer(x)[order][:, 30:], got)


@each_case
def test_parameters_start_finite_and_always_the_same(name: str, variant: str) -> None:
    with poison_empty():
        first, second = make(name, variant), make(name, variant)
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.isfinite(value).all(), key
        exactly(key, value, second.state_dict()[key])
    with torch.device("meta"):
        late = make(name, variant)
    late.to_empty(device="cpu").reset_parameters()
    for key, value in first.state_dict().items():
        exactly(key, value, late.state_dict()[key])
    assert not list(first.buffers()), "what is not in the checkpoint is lost on loading"


@each_case
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_parameters_are_born_in_the_default_dtype(
    name: str, variant: str, dtype: torch.dtype
) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        mixer = registry.load("mixers", name).Mixer(shape(), variants(name)[variant])
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in mixer.parameters()} <= {dtype}
    assert mixer(inputs(dtype)).dtype == dtype


@each_case
def test_gradients_reach_every_parameter_and_input(name: str, variant: str) -> None:
    mixer = make(name, variant)
    exact = mixer.exact_prefix(mixer.options)  # up to there some parameters have no part in it
    x = inputs(tokens=max(T, exact + 10) if exact < 1000 else T)
    leaves = {n: getattr(x, n).requires_grad_() for n in ("q", "k", "v")}
    o = mixer(x)
    o.backward(torch.randn_like(o))
    for key, value in [*mixer.named_parameters(), *leaves.items()]:
        assert value.grad is not None and torch.isfinite(value.grad).all(), key
        assert (value.grad != 0).any(), key


@each_case
def test_gradients_are_the_same_under_checkpointing(name: str, variant: str) -> None:
    mixer = make(name, variant)
    found = []
    for run in (mixer, functools.partial(checkpoint, mixer, use_reentrant=False)):
        x = inputs()
        leaves = [getattr(x, n).requires_grad_() for n in ("q", "k", "v", "hidden")]
        o = run(x)
        wanted = [*leaves, *mixer.parameters()]
        torch.manual_seed(0)
        found.append(torch.autograd.grad(o, wanted, torch.randn_like(o), allow_unused=True))
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            assert_close("gradient", plain, again)


class _Made(TorchDispatchMode):
    """Counts the numbers in tensors that operations made on the CPU."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.numel += out.numel()
        return out


@each_case
def test_on_meta_nothing_large_is_made(name: str, variant: str) -> None:
    """Names and sizes are read off there, from a plan that may ask for anything."""
    with torch.device("meta"), _Made() as made:
        make(name, variant)
    assert made.numel <= 100


@pytest.mark.parametrize("name", ("gla", "kda"))
def test_ranks_are_bounded(name: str) -> None:
    options = registry.load("mixers", name).Options
    strict.build(options, {"rank": 1024})
    for bad in (0, -3, 1025, 10**9):
        said = f"mixer {name}: rank is {bad}; give 1 to 1024, usually 16"
        with pytest.raises(RecipeError, match=said):
            strict.build(options, {"rank": bad})


@each_case
def test_bfloat16_and_autocast_follow_float64(name: str, variant: str) -> None:
    x = inputs(torch.bfloat16)
    expected = make(name, variant)(rounded(x))
    assert_close("bf16", expected, make(name, variant, torch.bfloat16)(x).double(), ratio=2e-2)
    # as under autocast: rotary positions and norms leave q and k in float32
    x = dataclasses.replace(x, q=x.q.float(), k=x.k.float(), hidden=x.hidden.float())
    mixer = make(name, variant, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state, outputs = State(), []
        for start, stop in ((0, 20), (20, 21), (21, T)):
            outputs.append(mixer(cut(x, start, stop), state))
    assert_close("autocast", expected, torch.cat(outputs, dim=1).double(), ratio=2e-2)


@each_case
def test_options_survive_the_recipe(name: str, variant: str) -> None:
    module = registry.load("mixers", name)
    options = variants(name)[variant]
    assert strict.build(module.Options, strict.plain(options)) == options
    with pytest.raises(RecipeError, match="nosuch"):
        strict.build(module.Options, {"nosuch": 1})


@each_case
def test_costs_and_gates_make_sense(name: str, variant: str) -> None:
    mixer = make(name, variant)
    short, long = (mixer.decode_bytes(mixer.options, mixer.shape, n, 2) for n in (1, 1000))
    assert 0 < short <= long
    assert set(mixer.gates) <= parameter_names(name)


def test_parameter_names_are_those_of_written_checkpoints() -> None:
    """Renaming one breaks every checkpoint that has it: add a migration first."""
    conv = {"conv.q", "conv.k", "conv.v"}
    delta = {"A_log", "dt_bias", "b_weight", "norm_weight"}
    mamba2 = conv | {"dt_weight", "dt_bias", "A_log", "D", "z_weight", "z_bias", "norm_weight"}
    assert {n: parameter_names(n) for n in registry.names("mixers")} == {
        "full": set(),
        "sliding": {"sinks"},
        "bigbird": set(),
        "block_topk": {
            f"{gate}_{kind}" for gate in ("select", "compress") for kind in ("weight", "bias")
        },
        "nope": {"z_weight", "z_bias"},
        "decay": {"g", "gate_weight", "norm_weight", "q_weight", "k_weight"},
        "gated_delta": conv | delta | {"a_weight", "z_weight"},
        "kda": conv | delta | {"f_down", "f_up", "b_bias", "z_weight", "z_bias"},
        "gla": {"f_down", "f_up", "f_bias", "z_weight", "norm_weight"},
        "mamba2": mamba2,
        "hedgehog": {"q_map", "k_map", "mix"},
        "dash": {"summary_query", "gamma"},
        "hola": delta | {"a_weight", "mix_state", "mix_cache", "sinks"},
        "shared_routing": {"q_weight", "k_weight"},
        "parallel": {"gain_full", "gain_branch"} | {f"branch.{n}" for n in mamba2},
    }


def test_sliding_says_what_options_are_allowed() -> None:
    module = registry.load("mixers", "sliding")
    for bad, said in (({"window": 0}, "window is 0"), ({"num_sinks": -1}, "num_sinks is -1")):
        with pytest.raises(RecipeError, match=said):
            strict.build(module.Options, bad)


def test_sink_logits_start_next_to_the_plain_window() -> None:
    module, x = registry.load("mixers", "sliding"), inputs()
    plain = make("sliding", options=module.Options(window=9))(x)
    biased = make("sliding", options=module.Options(window=9, sink_bias=True))(x)
    assert_close("heads", plain, biased, ratio=1e-3)
    assert not torch.equal(plain, biased)


def test_sliding_never_outgrows_the_sources_window() -> None:
    module, x = registry.load("mixers", "sliding"), inputs()
    mixer = make("sliding", options=module.Options(window=100, num_sinks=4), window=6)
    assert_close("heads", attention(x, mixer.shape), mixer(x))
    assert mixer.cache_cost(mixer.options, mixer.shape).tokens == 6


def test_heads_of_a_group_keep_the_decays_of_their_layer() -> None:
    module = registry.load("mixers", "decay")
    for kind in ("alibi", "lightning"):
        options = module.Options(decay=kind)
        whole = make("decay", options=options, heads=tuple(range(8)))
        group = make("decay", options=options, heads=(0, 1, 6, 7))
        exactly(kind, whole.g[[0, 1, 6, 7]], group.g)
        if kind == "alibi":
            assert_close("slopes", -(2.0 ** -torch.arange(1.0, 9.0)), whole.g)
        else:
            assert_close("slopes", -torch.arange(8.0) * (1 - 1 / 4), whole.g)


def test_a_decay_pushed_above_zero_counts_as_zero_and_can_come_back() -> None:
    mixer, x = make("decay"), inputs()
    with torch.no_grad():
        mixer.g.zero_()
        at_zero = mixer(x)
        mixer.g.fill_(0.5)
    above = mixer(x)
    exactly("heads", at_zero, above.detach())
    above.square().sum().backward()
    assert (mixer.g.grad != 0).all()
