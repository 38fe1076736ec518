"""The Triton path of the decay kernel: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to run")

from morph.errors import KernelUnavailable
from morph.kernels import _triton, decay
from morph.testing import assert_close, error_ratio, exactly, poison_empty

DEVICE = "cpu" if _triton.interpreted() else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

GATES = pytest.mark.parametrize("per_token", (False, True), ids=("per_head", "per_token"))
# Chunks are of 64 tokens interpreted, of 32 compiled in float32
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 150)


def inputs(
    T: int, *, B: int = 1, H: int = 2, G: int = 1, K: int = 8, V: int = 5, per_token: bool = False
) -> dict[str, Any]:
    """Random float64 inputs, with a state that earlier tokens left."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"B": B, "T": T, "H": H, "G": G, "K": K, "V": V}
    made = decay.example(**sizes, dtype=torch.float64, generator=generator, per_token=per_token)
    made["initial_state"] = torch.randn(B, H, K, V, generator=generator, dtype=torch.float64)
    return {n: x.to(DEVICE) for n, x in made.items()}


def cast(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Leaves of `dtype`; gates and states stay in float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        n: t.detach().to(dtype if n in "qkv" else wide).clone().requires_grad_()
        for n, t in x.items()
    }


def learn(
    x: dict[str, Any], dtype: torch.dtype, path: str, **options: Any
) -> dict[str, torch.Tensor]:
    """Output, final state and all gradients, from both the output and the final state.

    The output's gradient is rounded to the dtype of x["q"], so that all dtypes get the same.
    """
    rounded = x["q"].dtype
    x = cast(x, dtype)
    o, state = decay.forward(**x, **options, output_final_state=True, path=path)
    generator = torch.Generator().manual_seed(2)
    back = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(rounded).to(t)
        for t in (o, state)
    ]
    found = torch.autograd.grad([o, state], list(x.values()), back)
    return {"o": o, "state": state, **{f"d{n}": t for n, t in zip(x, found)}}


def compare(x: dict[str, Any], **options: Any) -> None:
    expected = learn(x, torch.float64, "reference", **options)
    for name, got in learn(x, torch.float32, "triton", **options).items():
        assert_close(name, expected[name], got)


@GATES
@pytest.mark.parametrize("T", LENGTHS)
def test_everything_matches_the_float64_reference(T: int, per_token: bool) -> None:
    compare(inputs(T, per_token=per_token))


@GATES
@pytest.mark.parametrize(
    "sizes",
    ({"B": 2, "H": 4, "G": 2}, {"H": 2, "G": 2, "K": 60, "V": 60}, {"H": 1, "K": 96, "V": 80}),
    ids=("G2", "K60", "K96"),
)
def test_any_heads_and_sizes_match_the_float64_reference(
    sizes: dict[str, int], per_token: bool
) -> None:
    compare(inputs(70, **sizes, per_token=per_token))


@GATES
def test_gates_that_forget_everything_match_the_float64_reference(per_token: bool) -> None:
    x = inputs(70, per_token=per_token)
    g = x["g"][..., :1] if not per_token else x["g"][:, 40:41]
    g.fill_(float("-inf"))
    compare(x)


@GATES
def test_padding_matches_the_float64_reference(per_token: bool) -> None:
    real = torch.ones(2, 70, dtype=torch.bool)
    real[0, :9], real[1, 66:] = False, False
    compare(inputs(70, B=2, per_token=per_token), padding=real.to(DEVICE))


@GATES
def test_split_with_carried_state_is_unsplit(per_token: bool) -> None:
    x = inputs(130, per_token=per_token)
    expected = learn(x, torch.float64, "reference")
    x = cast(x, torch.float32)
    state, outputs = x["initial_state"], []
    timed = ["q", "k", "v", *(["g"] * per_token)]
    for start, stop in ((0, 63), (63, 128), (128, 129), (129, 130)):
        now = {n: t[:, start:stop] if n in timed else t for n, t in x.items()}
        with torch.set_grad_enabled(stop < 130):  # the last token takes the fused step
            o, state = decay.forward(
                **{**now, "initial_state": state}, output_final_state=True, path="triton"
            )
        outputs.append(o)
    assert_close("o", expected["o"], torch.cat(outputs, dim=1))
    assert_close("state", expected["state"], state)


@GATES
def test_gradients_flow_through_a_carried_state(per_token: bool) -> None:
    x = inputs(80, per_token=per_token)
    x = {n: x[n] for n in ("q", "k", "v", "g")}

    def halves(path: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = cast(x, dtype)
        state, outputs = None, []
        for part in (slice(0, 66), slice(66, 80)):
            now = {n: t[:, part] if t.ndim > 1 else t for n, t in leaves.items()}
            o, state = decay.forward(**now, initial_state=state, output_final_state=True, path=path)
            outputs.append(o)
        return torch.autograd.grad(torch.cat(outputs, dim=1).square().sum(), list(leaves.values()))

    found = zip(halves("reference", torch.float64), halves("triton", torch.float32))
    for name, (expected, got) in zip(x, found):
        assert_close(f"d{name}", expected, got)


@GATES
@pytest.mark.parametrize("sizes", ({}, {"B": 3, "H": 6, "G": 2, "K": 60, "V": 33}), ids=str)
def test_the_fused_step_matches_the_reference(sizes: dict[str, int], per_token: bool) -> None:
    x = inputs(1, **sizes, per_token=per_token)
    expected, end = decay.reference(**x, output_final_state=True)
    got, state = decay.forward(
        **{n: t.float() for n, t in x.items()}, output_final_state=True, path="triton"
    )
    assert_close("o", expected, got)
    assert_close("state", end, state)


@GATES
def test_causality_is_bit_exact(per_token: bool) -> None:
    x = {n: t.float() for n, t in inputs(100, per_token=per_token).items()}
    before, _ = decay.forward(**x, path="triton")
    for t in (1, 63, 64):
        changed = {n: x[n].clone() for n in x}
        for name in ("q", "k", "v", *(["g"] * per_token)):
            changed[name][:, t] -= 3.0
        after, _ = decay.forward(**changed, path="triton")
        exactly("outputs before the change", before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@GATES
def test_two_runs_are_equal_and_no_memory_is_left_unwritten(per_token: bool) -> None:
    x = inputs(70, H=4, G=2, per_token=per_token)
    first = learn(x, torch.float32, "triton")
    with poison_empty():
        second = learn(x, torch.float32, "triton")
    for name, one in first.items():
        exactly(name, one, second[name])


def test_strided_inputs_of_a_fused_projection() -> None:
    x = inputs(20, G=2, V=8)
    fused = torch.cat([x["q"], x["k"], x["v"]], dim=-1).float().requires_grad_()
    q, k, v = fused.split(8, dim=-1)
    o, _ = decay.forward(q, k, v, g=x["g"].float(), initial_state=x["initial_state"], path="triton")
    (found,) = torch.autograd.grad(o.transpose(1, 2).square().sum(), fused)
    wide = fused.detach().double().requires_grad_()
    q, k, v = wide.split(8, dim=-1)
    expected, _ = decay.reference(q, k, v, g=x["g"], initial_state=x["initial_state"])
    assert_close("o", expected, o)
    assert_close("dqkv", torch.autograd.grad(expected.square().sum(), wide)[0], found)


def test_what_it_cannot_take_is_refused_with_the_reason() -> None:
    wide = {n: t.float() for n, t in inputs(2, H=1, K=257).items()}
    with pytest.raises(KernelUnavailable, match="257"):
        decay.forward(**wide, path="triton")
    with pytest.raises(KernelUnavailable, match="float64"):
        decay.forward(**inputs(2), path="triton")


@pytest.mark.gpu
@GATES
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_compiled_is_at_most_twice_as_wrong_as_plain_torch(
    dtype: torch.dtype, per_token: bool
) -> None:
    x = inputs(1000, B=2, H=4, G=2, K=128, V=128, per_token=per_token)
    x = {n: t.detach() for n, t in cast(x, dtype).items()}  # the same rounded values
    expected = learn(x, torch.float64, "reference")
    got = learn(x, dtype, "triton")
    if dtype == torch.float32:
        for name in expected:
            assert_close(name, expected[name], got[name])
        return
    plain = learn(x, dtype, "reference")
    for name in expected:
        bound = max(2 * error_ratio(expected[name], plain[name]), 2**-8)
        assert error_ratio(expected[name], got[name]) <= bound, name


@pytest.mark.gpu
@GATES
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_hundred_runs_are_equal(dtype: torch.dtype, per_token: bool) -> None:
    x = inputs(1000, B=2, H=4, G=2, K=128, V=128, per_token=per_token)
    first = learn(x, dtype, "triton")
    for _ in range(99):
        for name, one in learn(x, dtype, "triton").items():
            exactly(name, first[name], one)
