"""The Triton path of the sliding kernel: interpreted in float32, or compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morph.errors import KernelUnavailable
from morph.kernels import _triton, sliding
from morph.testing import assert_close, error_ratio, exactly, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.reason(torch.zeros(1, device=DEVICE))
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"the Triton path cannot run: {REASON}")

# Small and short wherever it can be, since the interpreter is slow
SMALL = {"B": 1, "H": 4, "G": 2, "K": 8, "V": 5}
ROWS = {"B": 3, "H": 2, "G": 1}
each_example = pytest.mark.parametrize("example", list(sliding.EXAMPLES))


def inputs_of(T: int, sizes: dict[str, int] | None = None, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    sizes = {**SMALL, **(sizes or {})}
    return sliding.example(T=T, dtype=torch.float64, generator=generator, **sizes, **options)


def cast(
    inputs: dict[str, Any], dtype: torch.dtype, learns: bool = False, device: str = DEVICE
) -> dict[str, Any]:
    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if not x.is_floating_point():
            return x.to(device)
        return x.detach().to(device, dtype, copy=True).requires_grad_(learns)

    return {name: one(x) for name, x in inputs.items()}


def learn(
    inputs: dict[str, Any], path: str, dtype: torch.dtype, do: torch.Tensor, device: str = DEVICE
) -> dict[str, torch.Tensor]:
    """The output and the gradient of every floating input, on the CPU."""
    inputs = cast(inputs, dtype, learns=True, device=device)
    leaves = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    o, _ = sliding.forward(**inputs, path=path)
    grads = torch.autograd.grad(o, list(leaves.values()), do.to(o))
    found = {"o": o.detach(), **{f"d{n}": g for n, g in zip(leaves, grads)}}
    return {n: x.cpu() for n, x in found.items()}


def gradient_of(inputs: dict[str, Any]) -> torch.Tensor:
    size = (*inputs["q"].shape[:3], inputs["v"].shape[3])
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def check(inputs: dict[str, Any]) -> None:
    do = gradient_of(inputs)
    expected = learn(inputs, "reference", torch.float64, do, "cpu")
    for name, got in learn(inputs, "triton", torch.float32, do).items():
        if expected[name].abs().max() < 1e-12:  # such as dq where one key takes all weight
            assert got.abs().max() < 1e-5, name
        else:
            assert_close(name, expected[name], got)


def ragged(T: int) -> torch.Tensor:
    """Padding on the left of row 0, on the right of row 1, and over all of row 2."""
    real = torch.ones(3, T, dtype=torch.bool)
    real[0, : T // 3] = False
    real[1, T - T // 4 :] = False
    real[2] = False
    return real


@each_example
@pytest.mark.parametrize("T", (1, 15, 16, 17, 63, 65, 130))
def test_forward_and_gradients_match_the_float64_reference(example: str, T: int) -> None:
    sizes = {} if T < 63 else {"H": 2, "G": 1}
    check(inputs_of(T, sizes, **sliding.EXAMPLES[example]))


@pytest.mark.parametrize("window", (1, 33, 64, 70, 200))
def test_windows_at_and_off_the_edges_of_blocks(window: int) -> None:
    check(inputs_of(70, {"H": 3, "G": 1}, window_size=window, sink_bias=True))


@pytest.mark.parametrize(
    "sizes",
    (
        {"K": 60, "V": 60},
        {"H": 3, "G": 1, "K": 60, "V": 20},
        {"H": 2, "G": 2, "K": 16, "V": 64},
        {"H": 17, "G": 1},
        {"H": 1, "G": 1, "K": 130, "V": 8},
    ),
    ids=lambda sizes: "-".join(f"{n}{x}" for n, x in sizes.items()),
)
def test_odd_head_sizes_and_shared_heads(sizes: dict[str, int]) -> None:
    check(inputs_of(19, sizes, window_size=9, num_sinks=2, softcap=3.0))


def test_more_sinks_than_one_block_and_more_rows_than_one_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from morph.kernels import _triton_sliding

    monkeypatch.setattr(_triton_sliding, "_SINK_ROWS", 48)
    check(inputs_of(40, {"H": 2, "G": 1}, window_size=4, num_sinks=19))


def test_a_cap_bends_small_and_large_scores() -> None:
    inputs = inputs_of(40, {"H": 2}, window_size=None, softcap=30.0)
    inputs["q"] = inputs["q"] * torch.logspace(-2, 1.5, 40)[:, None, None]
    check(inputs)


@each_example
def test_padding_is_finite_and_matches_the_reference(example: str) -> None:
    inputs = inputs_of(36, ROWS, **sliding.EXAMPLES[example])
    inputs["padding"] = ragged(36)
    check(inputs)
    o, _ = sliding.forward(**cast(inputs, torch.float32), path="triton")
    assert not o[2].any(), "rows of padding are zeros"


@each_example
@pytest.mark.parametrize("padded", (False, True), ids=("real", "padded"))
def test_split_with_carried_state_is_unsplit(example: str, padded: bool) -> None:
    """Single tokens take the kernel of a decoded token."""
    T, cuts = 34, (20, 21, 22, 32, 34)
    inputs = inputs_of(T, ROWS, **sliding.EXAMPLES[example])
    if padded:
        inputs["padding"] = torch.ones(3, T, dtype=torch.bool)
        inputs["padding"][0, :6] = False
        inputs["padding"][1, :31] = False
    whole, end = sliding.reference(**inputs, output_final_state=True)
    inputs, outputs, state = cast(inputs, torch.float32), [], None
    for start, stop in zip((0, *cuts), cuts):
        part = {n: x[:, start:stop] if n in "qkv" else x for n, x in inputs.items()}
        if padded:
            part["padding"] = inputs["padding"][:, :stop]
        o, state = sliding.forward(
            **part, initial_state=state, output_final_state=True, path="triton"
        )
        outputs.append(o.cpu())
    assert_close("o", whole, torch.cat(outputs, dim=1))
    assert state is not None and end is not None
    if not padded:  # entries of a state that are void may hold anything
        assert_close("k", end.k, state.k.cpu())
        assert_close("v", end.v, state.v.cpu())


@pytest.mark.parametrize("example", ("window", "sinks_bias"))
def test_gradients_flow_through_a_carried_state(example: str) -> None:
    T, cut = 50, 21
    inputs = inputs_of(T, **sliding.EXAMPLES[example])
    do = gradient_of(inputs)
    expected = learn(inputs, "reference", torch.float64, do, "cpu")
    given = cast(inputs, torch.float32, learns=True)
    halves = [
        {n: x[:, part] if n in "qkv" else x for n, x in given.items()}
        for part in (slice(cut), slice(cut, T))
    ]
    first, state = sliding.forward(**halves[0], output_final_state=True, path="triton")
    second, _ = sliding.forward(**halves[1], initial_state=state, path="triton")
    leaves = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
    o = torch.cat([first, second], dim=1)
    for name, grad in zip(leaves, torch.autograd.grad(o, list(leaves.values()), do.to(o))):
        assert_close(f"d{name}", expected[f"d{name}"], grad.cpu())


@pytest.mark.parametrize("past", (31, 32, 150))
@pytest.mark.parametrize(
    ("heads", "options"),
    (((4, 2), {}), ((17, 1), {"sink_bias": True, "softcap": 2.0})),
    ids=("R2-plain", "R17-all"),
)
def test_a_decoded_token_over_a_full_window(
    past: int, heads: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many keys as one program takes in one step, one more, and so many that they take two."""
    from morph.kernels import _triton_sliding

    monkeypatch.setattr(_triton_sliding, "_SPLITS", 4)
    sizes = {"B": 2, "H": heads[0], "G": heads[1]}
    inputs = inputs_of(past + 1, sizes, window_size=past, **options)
    real = torch.ones(2, past + 1, dtype=torch.bool)
    real[1, : past // 2] = False

    def last(path: str, dtype: torch.dtype, padding: torch.Tensor | None, device: str) -> Any:
        given = cast(inputs, dtype, device=device)
        q, k, v = (given.pop(n) for n in "qkv")
        state = sliding.SlidingState(k[:, :past], v[:, :past], past)
        given["padding"] = padding
        one = (x[:, past:] for x in (q, k, v))
        return sliding.forward(*one, **given, initial_state=state, path=path)[0].cpu()

    for padding in (None, real):
        expected = last("reference", torch.float64, padding, "cpu")
        assert_close("o", expected, last("triton", torch.float32, padding, DEVICE))


@each_example
def test_causality_is_bit_exact(example: str) -> None:
    sizes = {"H": 2, "G": 1}
    inputs = cast(inputs_of(66, sizes, **sliding.EXAMPLES[example]), torch.float32)
    before, _ = sliding.forward(**inputs, path="triton")
    for t in (1, 31, 64):
        changed = dict(inputs)
        for leaf in "qkv":
            changed[leaf] = inputs[leaf].clone()
            changed[leaf][:, t] += 3.0
        after, _ = sliding.forward(**changed, path="triton")
        exactly("outputs before the change", before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


@each_example
def test_two_runs_are_equal_and_nothing_reads_unwritten_memory(example: str) -> None:
    inputs = inputs_of(36, ROWS, **sliding.EXAMPLES[example])
    inputs["padding"] = ragged(36)
    do = gradient_of(inputs)
    first = learn(inputs, "triton", torch.float32, do)
    with poison_empty():
        second = learn(inputs, "triton", torch.float32, do)
    for name, x in first.items():
        exactly(name, x, second[name])
    with torch.no_grad(), poison_empty():  # the kernel of a decoded token
        one = {n: x[:, :1] if n in (*"qkv", "padding") else x for n, x in inputs.items()}
        o, _ = sliding.forward(**cast(one, torch.float32), path="triton")
    assert torch.isfinite(o).all()


def test_strided_inputs() -> None:
    inputs = cast(inputs_of(40, {"K": 16, "V": 16}, window_size=9), torch.float32)
    expected, _ = sliding.forward(**inputs, path="triton")
    for leaf in "qkv":
        inputs[leaf] = inputs[leaf].transpose(1, 2).contiguous().transpose(1, 2)
    exactly("heads first", expected, sliding.forward(**inputs, path="triton")[0])
    for leaf in "qkv":
        inputs[leaf] = torch.stack([inputs[leaf], inputs[leaf]], dim=-1)[..., 0]
    exactly("every other", expected, sliding.forward(**inputs, path="triton")[0])


def test_heads_that_are_too_large_are_refused() -> None:
    inputs = cast(inputs_of(3, {"K": 264}, window_size=2), torch.float32)
    with pytest.raises(KernelUnavailable, match="264"):
        sliding.forward(**inputs, path="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "options",
    ({}, {"num_sinks": 4, "sink_bias": True}, {"softcap": 20.0}),
    ids=("window", "sinks", "cap"),
)
def test_halves_are_at_most_twice_as_wrong_as_plain_torch(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    sizes = {"B": 2, "H": 8, "G": 2, "K": 128, "V": 128}
    inputs = cast(inputs_of(1000, sizes, window_size=128, **options), dtype, device="cpu")
    do = gradient_of(inputs).to(dtype)
    expected = learn(inputs, "reference", torch.float64, do.double(), "cpu")
    plain = learn(inputs, "reference", dtype, do)
    first = learn(inputs, "triton", dtype, do)
    for name, got in first.items():
        bound = 2 * error_ratio(expected[name], plain[name])
        assert error_ratio(expected[name], got) <= bound, name
    for _ in range(100):
        for name, got in learn(inputs, "triton", dtype, do).items():
            exactly(name, first[name], got)
