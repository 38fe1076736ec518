"""What only the hedgehog kernel and mixer promise; the laws of all are in test_kernels.py and
test_mixers.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from morph import registry, strict
from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import hedgehog
from morph.mixers._base import GroupShape, Inputs
from morph.testing import assert_close, exactly

each_formula = pytest.mark.parametrize("formula", hedgehog.FORMULAS)


def kernel_inputs(
    T: int,
    B: int = 2,
    H: int = 6,
    G: int = 2,
    K: int = 8,
    V: int = 5,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    options = {"window_size": 7, **options}
    return hedgehog.example(
        B=B, T=T, H=H, G=G, K=K, V=V, dtype=dtype, generator=generator, **options
    )


def written_out(x: dict[str, Any]) -> torch.Tensor:
    """Row by row and weight by weight, with nothing done for the sake of stability."""
    q, k, v, fq, fk, mix = (x[n] for n in ("q", "k", "v", "fq", "fk", "mix"))
    ratio, window, o = q.shape[2] // k.shape[2], x["window_size"], []
    for t in range(q.shape[1]):
        rows = []
        for h in range(q.shape[2]):
            scores = (q[:, None, t, h] * k[:, : t + 1, h // ratio]).sum(-1) / math.sqrt(q.shape[3])
            old = max(0, t + 1 - window)
            near = scores[:, old:].exp()
            if x.get("formula") == "code":
                near = near / near.amax(dim=1, keepdim=True)
            far = (fq[:, None, t, h] * fk[:, :old, h]).sum(-1)
            weights = torch.cat([far, mix[h] * near], dim=1)
            weights = weights / weights.sum(dim=1, keepdim=True)
            rows.append((weights[..., None] * v[:, : t + 1, h // ratio]).sum(dim=1))
        o.append(torch.stack(rows, dim=1))
    return torch.stack(o, dim=1)


def leaves(x: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        n: t.detach().to(dtype).clone().requires_grad_()
        for n, t in x.items()
        if isinstance(t, torch.Tensor)
    }


@each_formula
@pytest.mark.parametrize("path", ("chunked", "reference"))
@pytest.mark.parametrize("T", (1, 40, 130))
def test_both_formulas_and_their_gradients_are_as_written(formula: str, path: str, T: int) -> None:
    x = kernel_inputs(T, H=2, G=1, K=6, formula=formula)
    ours, theirs = leaves(x, torch.float64), leaves(x, torch.float64)
    expected, (o, _) = written_out({**x, **theirs}), hedgehog.forward(**{**x, **ours}, path=path)
    assert_close("o", expected, o)
    do = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(theirs.values()), do)
    for name, want, got in zip(ours, wanted, torch.autograd.grad(o, list(ours.values()), do)):
        if want.abs().max() > 1e-12:
            assert_close(f"d{name}", want, got, ratio=1e-11)
        else:
            assert got.abs().max() < 1e-12, name


@each_formula
@pytest.mark.parametrize("sizes", ({"K": 8, "V": 5}, {"K": 60, "V": 33}), ids=("K8", "K60"))
def test_float32_of_odd_sizes_and_lengths_is_close_in_every_gradient(
    formula: str, sizes: dict[str, int]
) -> None:
    x = kernel_inputs(300, window_size=37, F=11, formula=formula, **sizes)
    _, start = hedgehog.reference(
        **kernel_inputs(50, **{**sizes, "window_size": 37, "F": 11}), output_final_state=True
    )
    names = ("k", "v", "fk", "s", "z")

    def run(function: Any, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = leaves(x, dtype)
        held = {n: getattr(start, n).detach().to(dtype).requires_grad_() for n in names}
        o, end = function(
            **{**x, **own},
            initial_state=hedgehog.HedgehogState(**held, seen=50),
            output_final_state=True,
        )
        out = [o, end.s, end.z]
        torch.manual_seed(0)
        do = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in out]
        return out, list(torch.autograd.grad(out, [*own.values(), *held.values()], do))

    expected, wanted = run(hedgehog.reference, torch.float64)
    out, found = run(hedgehog.forward, torch.float32)
    for want, got in zip([*expected, *wanted], [*out, *found], strict=True):
        assert_close("tensor", want, got)


@each_formula
@pytest.mark.parametrize("path", ("chunked", "reference"))
def test_a_window_over_all_tokens_is_softmax_whatever_the_mix(formula: str, path: str) -> None:
    x = kernel_inputs(150, formula=formula)
    k, v = (x[n].repeat_interleave(3, dim=2) for n in "kv")
    a = torch.einsum("bthk,bshk->bhts", x["q"], k) / math.sqrt(8)
    a = a.masked_fill(~torch.ones(150, 150, dtype=torch.bool).tril(), -math.inf)
    expected = torch.einsum("bhts,bshv->bthv", a.softmax(dim=-1), v)
    for window in (150, 151, 10**6):
        o, _ = hedgehog.forward(**{**x, "window_size": window}, path=path)
        assert_close("o", expected, o)


def test_a_vanishing_mix_leaves_linear_attention_alone() -> None:
    """All but the first token, which has nothing else to see, and the own token of each."""
    x = kernel_inputs(100, window_size=1, G=6)
    x["mix"] = torch.full((6,), 1e-30, dtype=torch.float64)
    pairs = torch.einsum("bthf,bshf->bhts", x["fq"], x["fk"])
    pairs = pairs.tril(-1)
    pairs[..., 0, 0] = 1.0
    pairs = pairs / pairs.sum(dim=-1, keepdim=True)
    expected = torch.einsum("bhts,bshv->bthv", pairs, x["v"])
    assert_close("o", expected, hedgehog.forward(**x)[0])


def test_scores_and_features_of_any_size_stay_finite() -> None:
    for factor, features in (
        (60.0, 1.0),
        (-60.0, 1.0),
        (60.0, 1e-25),
        (-60.0, 1e-25),
        (1.0, 0.0),
        (0.0, 1e15),
    ):
        x = kernel_inputs(90, dtype=torch.float32)
        x["q"] = torch.ones_like(x["q"]) * factor  # scores up to hundreds, of one sign
        x["k"] = 1 + 0.1 * x["k"]
        x["fq"] = x["fq"] * features
        own = leaves(x, torch.float32)
        o, _ = hedgehog.forward(**{**x, **own})
        for grad in (o, *torch.autograd.grad(o.sum(), list(own.values()))):
            assert torch.isfinite(grad).all(), (factor, features)
        if factor >= 0:
            wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in x.items()}
            assert_close("o", hedgehog.reference(**wide)[0], o)


def test_features_given_when_tokens_leave_are_those_that_the_state_would_have_held() -> None:
    x, window = kernel_inputs(60), 7
    timed = ("q", "k", "v", "fq")
    expected, _ = hedgehog.forward(**x)
    state, outputs = None, []
    for start, stop in itertools.pairwise((0, 3, 5, 30, 31, 32, 60)):
        held = 0 if state is None else state.k.shape[1]
        more = hedgehog.leaving(held, stop - start, window)
        fk = torch.cat([x["fk"][:, start - held : start - held + more], x["fk"][:, start:stop]], 1)
        now = {**x, **{n: x[n][:, start:stop] for n in timed}, "fk": fk}
        o, state = hedgehog.forward(**now, initial_state=state, output_final_state=True)
        assert state.k.shape[1] == min(stop, window)
        state = state._replace(fk=None)
        outputs.append(o)
    assert_close("o", expected, torch.cat(outputs, dim=1))
    with pytest.raises(ValueError, match=r"fk must be \[2, 2, 6, 6\]"):
        short = {**x, **{n: x[n][:, :1] for n in (*timed, "fk")}}
        hedgehog.forward(**short, initial_state=state)


def test_sums_are_float32_and_own_their_memory() -> None:
    for path in ("chunked", "reference"):
        for T in (1, 5, 200):
            x = kernel_inputs(T, B=1, H=2, G=1, dtype=torch.bfloat16)
            _, state = hedgehog.forward(**x, output_final_state=True, path=path)
            assert state.s.dtype == state.z.dtype == torch.float32
            for t in state[:-1]:
                assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("window", (7, 4096))
def test_no_tensor_is_quadratic_in_the_tokens(window: int) -> None:
    x = kernel_inputs(4096, B=1, H=1, G=1, dtype=torch.float32, window_size=window)
    own = leaves(x, torch.float32)
    with _Largest() as largest:
        o, _ = hedgehog.forward(**{**x, **own})
        o.sum().backward()
    assert largest.numel <= 8 * (1 << 18) < 4096**2 // 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"window_size": 0}, "window_size is 0"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"formula": "other"}, "paper, code"),
        ({"mix": torch.ones(3)}, r"mix must be \[6\]"),
        ({"fq": torch.ones(2, 9, 5, 6)}, r"got \[2, 9, 5, 6\]"),
        ({"fk": torch.ones(2, 9, 6, 7)}, r"got \[2, 9, 6, 7\]"),
    ],
)
def test_wrong_options_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        hedgehog.forward(**{**kernel_inputs(9), **changed})


def test_a_state_of_another_size_is_refused() -> None:
    x = kernel_inputs(9)
    _, state = hedgehog.forward(**x, output_final_state=True)
    for name in ("k", "v", "fk", "s", "z"):
        wrong = state._replace(**{name: getattr(state, name)[:, 1:]})
        with pytest.raises(ValueError, match=f"initial_state.{name} must be"):
            hedgehog.forward(**x, initial_state=wrong)


def shape(**changes: Any) -> GroupShape:
    values: dict[str, Any] = {
        "layer_idx": 0,
        "num_hidden_layers": 1,
        "heads": (0, 1, 2, 3),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "v_head_dim": 8,
        "hidden_size": 64,
        "scale": 0.25,
    }
    return GroupShape(**{**values, **changes})


def mixer_inputs(T: int) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    sizes = {"q": (4, 16), "k": (2, 16), "v": (2, 8), "hidden": (64,)}
    made = {n: torch.randn(2, T, *s, generator=generator).double() for n, s in sizes.items()}
    return Inputs(**made)


def make(changes: dict[str, Any] | None = None, **options: Any) -> Any:
    module = registry.load("mixers", "hedgehog")
    return module.Mixer(shape(**(changes or {})), module.Options(**options)).double()


def test_options_that_cannot_be_are_refused() -> None:
    options = registry.load("mixers", "hedgehog").Options
    for name, most in (("window", 2**20), ("features", 4096)):
        strict.build(options, {name: most})
        for bad in (0, most + 1, 10**12):
            said = rf"mixer hedgehog: {name} is {bad}; .*1 to {most}\W"
            with pytest.raises(RecipeError, match=said):
                strict.build(options, {name: bad})
    mixer = registry.load("mixers", "hedgehog").Mixer
    assert mixer.identity(options(window=5), 2**20).window == 2**20


@each_formula
def test_the_mixer_is_the_formula_with_its_own_maps(formula: str) -> None:
    mixer, x = make(window=5, features=7, formula=formula), mixer_inputs(30)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    k = x.k.repeat_interleave(2, dim=2)
    made = {}
    for name, t, weight in (("fq", x.q, mixer.q_map), ("fk", k, mixer.k_map)):
        y = torch.einsum("bthk,hkf->bthf", t, weight)
        made[name] = torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)
    mix = torch.sigmoid(mixer.mix)
    asked = {"q": x.q, "k": x.k, "v": x.v, **made, "mix": mix}
    assert_close("o", written_out({**asked, "window_size": 5, "formula": formula}), mixer(x))


def test_a_source_window_inside_the_window_leaves_nothing_to_the_linear_part() -> None:
    x = mixer_inputs(30)
    full = registry.load("mixers", "full")
    for window in (6, 9):
        mixer = make({"window": 6}, window=window)
        expected = full.Mixer(mixer.shape, full.Options())(x)
        exactly("heads", expected, mixer(x))
        assert mixer.cache_cost(mixer.options, mixer.shape).state_elements == 0
    assert not torch.equal(expected, make({"window": 6}, window=5)(x))


def test_the_state_of_a_mixer_holds_no_features() -> None:
    mixer, x, state = make(window=5), mixer_inputs(30), State()
    mixer(x, state)
    assert {n: list(t.shape) for n, t in state.tensors.items()} == {
        "k": [2, 5, 2, 16],
        "v": [2, 5, 2, 8],
        "s": [2, 4, 128, 8],
        "z": [2, 4, 128],
    }


@pytest.mark.parametrize("features", (8, 16, 64))
def test_the_start_is_nearer_to_softmax_than_a_window_alone(features: int) -> None:
    """Directions are orthogonal within K columns, so that few of them already follow exp(q k)."""
    mixer, x = make(window=8, features=features), mixer_inputs(200)
    own = min(features, 16)
    block = mixer.q_map[0, :, :own]
    assert_close("products", 0.25 * 16 * torch.eye(own).double(), block.T @ block, ratio=1e-6)
    exactly("maps", mixer.q_map, mixer.k_map)
    expected = make(window=200)(x)
    error = (mixer(x) - expected).square().mean()
    sliding = registry.load("mixers", "sliding")
    alone = sliding.Mixer(shape(), sliding.Options(window=8))(x)
    assert error < 0.5 * (alone - expected).square().mean()
