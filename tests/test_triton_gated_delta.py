"""The Triton path of the gated delta rule, interpreted in float32, against a float64 recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from morph.kernels import _triton, gated_delta
from morph.testing import assert_close, error_ratio, exactly, poison_empty

path = pytest.importorskip(
    "morph.kernels._triton_gated_delta", reason="triton is not installed", exc_type=ImportError
)
NAMES = ("q", "k", "v", "g", "beta", "state")
SIZES = {"G1-K8-V5": (1, 2, 1, 8, 5), "K60-V20": (1, 1, 1, 60, 20)}  # B, H, G, K, V
DEVICE = "cpu" if _triton.interpreted() else "cuda"

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="needs a CUDA device, or TRITON_INTERPRET=1",
)


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule token by token, in whatever dtype the tensors have."""
    ratio, outputs = q.shape[2] // k.shape[2], []
    k, v = (x.repeat_interleave(ratio, dim=2) for x in (k, v))
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        e = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], e)
        outputs.append(q.shape[3] ** -0.5 * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def inputs(T: int, B: int, H: int, G: int, K: int, V: int, kind: str = "usual") -> dict[str, Any]:
    """Float64 inputs that float32 holds exactly.

    `equal` keys differ by a thousandth and beta is near 1; `reset` forgets all now and then.
    """
    made = torch.Generator().manual_seed(T + K)
    q, k, v, state = (
        torch.randn(*s, generator=made)
        for s in ((B, T, H, K), (B, T, G, K), (B, T, G, V), (B, H, K, V))
    )
    g, beta = (torch.rand(B, T, H, generator=made) for _ in range(2))
    g = -0.3 * g
    if kind == "equal":
        k, beta, g = (
            torch.randn(B, 1, G, K, generator=made) + 1e-3 * k,
            0.98 + 0.02 * beta,
            0.03 * g,
        )
    if kind == "reset":
        g = torch.where(torch.rand(B, T, H, generator=made) < 0.1, 300 * g, 0.1 * g)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return {n: x.double() for n, x in zip(NAMES, (q, k, v, g, beta, state))}


def chunked(**given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, g, beta, state = (given[n].to(DEVICE) for n in NAMES)
    o, last = path.chunk_gated_delta(q, k, v, g, beta, q.shape[3] ** -0.5, state)
    return o.cpu(), last.cpu()


def both(
    run: Any, given: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Outputs, final state and every gradient; the final state has a gradient of its own."""
    leaves = {n: x.to(dtypes[n]).requires_grad_() for n, x in given.items()}
    o, last = run(**leaves)
    made = torch.Generator().manual_seed(0)
    do, dlast = (torch.randn(x.shape, generator=made).to(x.dtype) for x in (o, last))
    grads = torch.autograd.grad([o, last], list(leaves.values()), [do, dlast])
    return {"o": o, "last": last, **{f"d{n}": x for n, x in zip(leaves, grads)}}


def all_of(dtype: torch.dtype, gates: torch.dtype | None = None) -> dict[str, torch.dtype]:
    return {n: dtype if n in "qkv" else gates or dtype for n in NAMES}


def check(given: dict[str, torch.Tensor]) -> None:
    expected = both(recurrence, given, all_of(torch.float64))
    for name, x in both(chunked, given, all_of(torch.float32)).items():
        assert_close(name, expected[name], x, 1e-5)


@pytest.mark.parametrize("T", (1, 15, 16, 63, 64, 65, 130))
@pytest.mark.parametrize("sizes", list(SIZES.values()), ids=list(SIZES))
def test_outputs_state_and_gradients_match(sizes: tuple[int, ...], T: int) -> None:
    check(inputs(T, *sizes))


@pytest.mark.parametrize("sizes", ((2, 2, 1, 8, 5), (1, 1, 1, 72, 40)), ids=("B2-G1", "two-blocks"))
def test_batches_groups_and_heads_of_several_blocks_match(sizes: tuple[int, ...]) -> None:
    check(inputs(33, *sizes))


@pytest.fixture
def halves_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks and blocks of 16-bit inputs, which the interpreter cannot run, for float32."""
    monkeypatch.setattr(path, "chunk_size", lambda dtype: 64)
    monkeypatch.setattr(path, "_FLOAT32", path._HALVES)
    path.settings.cache_clear()
    yield
    path.settings.cache_clear()


@pytest.mark.parametrize("T", (1, 64, 130))
def test_the_blocks_of_halves_match(halves_blocks: None, T: int) -> None:
    assert path.settings("prepare", 72, 80, torch.float32)["C"] == 64
    check(inputs(T, 1, 1, 1, 72, 80))


def test_the_blocks_of_halves_match_on_nearly_equal_keys(halves_blocks: None) -> None:
    check(inputs(65, 1, 2, 1, 16, 16, "equal"))


@pytest.mark.parametrize("kind", ("equal", "reset"))
def test_nearly_equal_keys_and_sudden_forgetting_match(kind: str) -> None:
    check(inputs(65, 1, 2, 1, 16, 16, kind))


def test_no_decay_is_too_strong() -> None:
    given = inputs(40, 1, 1, 1, 8, 8)
    given["g"][:, 1::3] = float("-inf")
    expected = both(recurrence, {**given, "g": given["g"].clamp(min=-300)}, all_of(torch.float64))
    for name, x in both(chunked, given, all_of(torch.float32)).items():
        assert_close(name, expected[name], x, 1e-5)


def part(given: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {n: x if n == "state" else x[:, start:stop] for n, x in given.items()}


def test_split_with_carried_state_is_unsplit() -> None:
    def halves(**given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, state = chunked(**part(given, 0, 41))
        second, last = chunked(**{**part(given, 41, 75), "state": state})
        return torch.cat([first, second], dim=1), last

    given = inputs(75, *SIZES["G1-K8-V5"])
    expected = both(recurrence, given, all_of(torch.float64))
    for name, x in both(halves, given, all_of(torch.float32)).items():
        assert_close(name, expected[name], x, 1e-5)


def test_one_step_is_the_recurrence_and_keeps_its_inputs() -> None:
    for sizes in ((2, 4, 2, 8, 5), (1, 1, 1, 60, 40)):
        given = inputs(1, *sizes)
        expected, last = recurrence(**given)
        q, k, v, g, beta, state = (given[n].float().to(DEVICE) for n in NAMES)
        kept = state.clone()
        o, new = path.step(q, k, v, g, beta, q.shape[3] ** -0.5, state)
        assert_close("o", expected, o.cpu(), 1e-5)
        assert_close("state", last, new.cpu(), 1e-5)
        exactly("state before", kept, state)


@pytest.mark.parametrize("t", (1, 32, 50))
def test_causality_is_bit_exact(t: int) -> None:
    given = {n: x.float() for n, x in inputs(70, *SIZES["G1-K8-V5"]).items()}
    before, _ = chunked(**given)
    for name in ("q", "k", "v", "g", "beta"):
        given[name] = given[name].clone()
        given[name][:, t] *= 0.5
    after, _ = chunked(**given)
    exactly("outputs before the change", before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_two_runs_are_equal_and_read_no_memory_that_nobody_wrote() -> None:
    given = inputs(40, *SIZES["G1-K8-V5"])
    first = both(chunked, given, all_of(torch.float32))
    with poison_empty():
        second = both(chunked, given, all_of(torch.float32))
    for name, x in first.items():
        exactly(name, x, second[name])


def test_strided_inputs() -> None:
    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x], dim=-1)[..., 0]

    given = {n: x.float() for n, x in inputs(20, *SIZES["G1-K8-V5"]).items()}
    apart = {n: strided(x) for n, x in given.items()}
    assert not apart["q"].is_contiguous()
    for one, other in zip(chunked(**given), chunked(**apart)):
        exactly("result", one, other)


HALVES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("size", (16, 60, 64, 128, 256))
def test_halves_forward_are_at_most_twice_as_wrong_as_plain_torch(
    dtype: torch.dtype, size: int
) -> None:
    given = inputs(1000, 1, 2, 1, size, size)
    given = {n: x.to(dtype).double() if n in "qkv" else x for n, x in given.items()}
    right, rough = recurrence(**given), recurrence(**{n: x.to(dtype) for n, x in given.items()})
    low = {n: x.to(dtype if n in "qkv" else torch.float32) for n, x in given.items()}
    for name, exact, plain, x in zip(("o", "last"), right, rough, chunked(**low), strict=True):
        bound = max(2 * error_ratio(exact, plain), 2**-8)
        assert error_ratio(exact, x) <= bound, name


@pytest.mark.gpu
@HALVES
def test_gradients_in_halves_are_not_asked_of_these_kernels(dtype: torch.dtype) -> None:
    """They were wrong or faulted on an H100 with Triton 3.6; see RESULTS.md."""
    given = {n: x.to(DEVICE, dtype) for n, x in inputs(40, 1, 2, 1, 64, 64).items()}
    q, k, v, g, beta = (given[n] for n in NAMES[:5])
    assert gated_delta.unsupported("triton", q, k, v) == ""
    for leaf in (q, g):
        leaf.requires_grad_()
        assert "16 bits" in gated_delta.unsupported("triton", q, k, v, g, beta)
        with torch.no_grad():
            assert gated_delta.unsupported("triton", q, k, v, g, beta) == ""
        leaf.requires_grad_(False)
    given = {n: x.to(dtype).double() for n, x in inputs(40, 1, 2, 1, 64, 64).items()}
    right = both(recurrence, given, all_of(torch.float64))

    def forward(state: torch.Tensor, **named: torch.Tensor) -> Any:
        there = {n: x.to(DEVICE) for n, x in named.items()}
        o, last = gated_delta.forward(
            **there, initial_state=state.to(DEVICE), output_final_state=True
        )
        return o.cpu(), last.cpu()

    for name, x in both(forward, given, all_of(dtype, torch.float32)).items():
        assert error_ratio(right[name], x) <= 2e-2, name


@pytest.mark.gpu
def test_a_hundred_runs_are_equal() -> None:
    given = inputs(1000, 1, 4, 2, 128, 128)
    first = both(chunked, given, all_of(torch.float32))
    for _ in range(99):
        for name, x in both(chunked, given, all_of(torch.float32)).items():
            exactly(name, first[name], x)


@pytest.mark.gpu
@pytest.mark.parametrize("size", (64, 128, 256))
def test_float32_on_a_gpu_is_float32(size: int) -> None:
    check(inputs(130, 1, 2, 1, size, size))
    check(inputs(130, 1, 2, 1, size, size, "equal"))
