"""Public helpers for testing kernels and mixers, from inside the package or outside.

`assert_close` compares with a reference, `poison_empty` fills fresh memory with NaN, `exactly`
compares bits, `tiny_model` makes a random model of any family, `planted_model` one of which it is
known where far recall sits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from morph._planted import Planted as Planted
from morph._planted import planted_model as planted_model
from morph._tiny import tiny_model as tiny_model

# Largest RMS(error) / RMS(reference) by dtype of the result. Rounding alone gives 2.6e-8 in
# float32, 2e-4 in float16 and 1.7e-3 in bfloat16; a kernel adds a few roundings to that.
RATIOS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}


def error_ratio(reference: torch.Tensor, got: torch.Tensor) -> float:
    """Return RMS(got - reference) / RMS(reference) in float64.

    Where the reference is all zeros the ratio is 0 for a result of zeros, else infinite.
    """
    expected, result = reference.detach().double(), got.detach().double()
    error = (result - expected).square().mean().sqrt().item()
    size = expected.square().mean().sqrt().item()
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def assert_close(
    name: str, reference: torch.Tensor, got: torch.Tensor, ratio: float | None = None
) -> None:
    """Raise AssertionError unless `got` has the reference's shape, no NaN, and a small RMS error.

    `ratio` bounds RMS(error) / RMS(reference); by default `RATIOS` of the dtype of `got`. The
    message gives the ratio, and where the largest error is.
    """
    if reference.shape != got.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(reference.shape)}")
    wrong = ~torch.isfinite(got) & torch.isfinite(reference)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} values are NaN or infinite, first at {where}"
        )
    bound = RATIOS[got.dtype] if ratio is None else ratio
    found = error_ratio(reference, got)
    if not found <= bound:
        gap = (got.detach().double() - reference.detach().double()).abs()
        worst = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
        raise AssertionError(
            f"{name}: RMS error ratio {found:.3g} exceeds {bound:.3g}; largest error "
            f"{gap.max().item():.3g} at {worst}"
        )


def exactly(name: str, reference: torch.Tensor, got: torch.Tensor) -> None:
    """Raise AssertionError unless both have the same shape, dtype and bits."""
    if reference.dtype != got.dtype or reference.shape != got.shape:
        raise AssertionError(
            f"{name}: {got.dtype} {list(got.shape)}, expected {reference.dtype} "
            f"{list(reference.shape)}"
        )
    if not torch.equal(reference, got):
        count = int((reference != got).sum())
        raise AssertionError(f"{name}: {count} of {got.numel()} values differ")


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill memory of `torch.empty` and its kin with NaN (integers: their maximum) inside a `with`.

    A result that reads memory nobody wrote then shows it. Torch's own switch does the filling, so
    memory that operators allocate for themselves through `empty` is covered too.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
