"""Entmax: the softmax whose weights reach zero, and its derivative.

entmax(z) of order alpha is the p >= 0 with sum 1 of the form p = max((alpha - 1) z - tau, 0) ^ r,
r = 1 / (alpha - 1). At alpha 1 it is softmax, at 2 the projection on the simplex (sparsemax).
tau is the root of ||max(x - tau, 0)||_r = 1, a convex and falling function of tau. Newton's steps
from the left of the root therefore never pass it and end up at it, whatever the row, and on flat
rows, where steps on the sum of the powers need many, the norm is nearly a straight line.
Reference: Peters et al., Sparse Sequence-to-Sequence Models, arXiv 1905.05702; the derivative is
that of Correia et al., arXiv 1909.00015. Deviation: Newton's steps where they bisect.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Rows of thousands of equal, of normal and of single scores are done after 6 to 9; a GPU does as
# many for all rows, as asking whether they are done would stop it.
_STEPS = 12
_MOST_STEPS = 60


def entmax(
    z: torch.Tensor,
    seen: torch.Tensor | None = None,
    alpha: float = 1.5,
    exact: bool = False,
) -> torch.Tensor:
    """Return entmax of order `alpha` over the last dimension, in float32 (float64 where z is).

    z any floating dtype; `seen` bool, broadcastable to z, marks the entries that take part: the
    others get exactly 0, and a row without any is all zeros. 1 <= alpha <= 2. Sums are 1 to
    rounding, equal scores get equal weights. Differentiable once, exactly 0 off the support.
    `exact` takes the slow way that the other one is tested against: sorting for order 1.5, and
    halving the bracket of tau else. Raises ValueError for an alpha outside of its bounds.
    """
    if not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha is {alpha}; it must be 1 (softmax) to 2 (sparsemax).")
    z = z if z.dtype == torch.float64 else z.float()
    if not z.shape[-1]:
        return z
    if seen is not None:
        z = z.masked_fill(~seen, -math.inf)
    return _Entmax.apply(z, float(alpha), exact)


class _Entmax(torch.autograd.Function):
    """Entmax of scores that are -inf where an entry takes no part."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, alpha: float, exact: bool) -> torch.Tensor:
        p = _weights(z, alpha, exact)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (p,) = ctx.saved_tensors
        s = p.sqrt() if ctx.alpha == 1.5 else p.pow(2.0 - ctx.alpha).masked_fill_(p == 0, 0.0)
        dz = s * g
        whole = s.sum(dim=-1, keepdim=True)
        whole = whole.masked_fill_(whole == 0, 1.0)
        dz.addcmul_(s, dz.sum(dim=-1, keepdim=True) / whole, value=-1.0)
        return dz, None, None


def _weights(z: torch.Tensor, alpha: float, exact: bool) -> torch.Tensor:
    """Return the weights, by the steps or the `exact` way."""
    x, empty = _shifted(z, alpha)
    if alpha == 1.0:
        return _normal(x.exp())
    power = 1.0 / (alpha - 1.0)
    if exact:
        tau = _sorted(x) if alpha == 1.5 else _halved(x, power)
    else:
        tau = _root(x, power)
        tau = _closed(x, tau) if alpha == 1.5 else tau
    return _normal(_power((x - tau).clamp_(min=0.0), power)).masked_fill_(empty, 0.0)


def _shifted(z: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (alpha - 1) (z - the largest), z itself shifted for alpha 1, and which rows are empty.

    With the largest at 0 the root lies in [-1, 0).
    """
    top = z.amax(dim=-1, keepdim=True)
    empty = torch.isneginf(top)
    x = z - top.masked_fill(empty, 0.0)
    return (x if alpha == 1.0 else x.mul_(alpha - 1.0)), empty


def _root(x: torch.Tensor, power: float) -> torch.Tensor:
    """Return where the norm of max(x - tau, 0) is 1, from below, [..., 1]."""
    tau = torch.full_like(x[..., :1], -1.0)
    near = 4.0 * torch.finfo(x.dtype).eps
    moving = torch.ones_like(tau, dtype=torch.bool)
    watched = x.device.type == "cpu"
    for _ in range(_MOST_STEPS if watched else _STEPS):
        y = (x - tau).clamp_(min=0.0)
        if power == 2.0:
            slope = y.sum(dim=-1, keepdim=True)
            total = y.square_().sum(dim=-1, keepdim=True)
            step = (total - total.sqrt()) / slope.clamp_(min=1e-30)
        else:
            slope = _power(y, power - 1.0).sum(dim=-1, keepdim=True)
            total = y.pow_(power).sum(dim=-1, keepdim=True)
            norm = total.pow(1.0 / power)
            step = (norm - 1.0) * norm.pow(power - 1.0) / slope.clamp_(min=1e-30)
        # a row that has arrived stays, so that it does not depend on the rows beside it
        moving &= step > near
        tau = torch.where(moving, tau + step, tau)
        if watched and not moving.any():
            break
    return tau


def _closed(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Return the root for power 2 of the entries above tau: a quadratic equation."""
    inside = x > tau
    count = inside.sum(dim=-1, keepdim=True).clamp_(min=1)
    kept = x.masked_fill(~inside, 0.0)
    mean = kept.sum(dim=-1, keepdim=True) / count
    spread = (kept - mean).masked_fill_(~inside, 0.0).square_().sum(dim=-1, keepdim=True)
    return mean - ((1.0 - spread) / count).clamp_(min=0.0).sqrt_()


def _sorted(x: torch.Tensor) -> torch.Tensor:
    """Return the root for power 2 from the sorted entries.

    The support is the longest run of largest entries whose own root lies below the last of them.
    """
    ordered = x.sort(dim=-1, descending=True).values
    real = ordered > -math.inf
    ordered = ordered.masked_fill(~real, 0.0)
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = ordered.cumsum(dim=-1) / count
    spread = ordered.square().cumsum(dim=-1) - count * mean.square()
    tau = mean - ((1.0 - spread) / count).clamp(min=0.0).sqrt()
    size = (real & (tau <= ordered)).sum(dim=-1, keepdim=True).clamp(min=1)
    return tau.gather(-1, size - 1)


def _halved(x: torch.Tensor, power: float) -> torch.Tensor:
    """Return the root by halving its bracket: one entry alone has -1, n equal ones the other."""
    low = torch.full_like(x[..., :1], -1.0)
    high = torch.full_like(low, -(float(x.shape[-1]) ** (-1.0 / power)))
    for _ in range(_MOST_STEPS):
        middle = (low + high) / 2.0
        total = _power((x - middle).clamp(min=0.0), power).sum(dim=-1, keepdim=True)
        low, high = torch.where(total >= 1.0, middle, low), torch.where(total < 1.0, middle, high)
    return low


def _power(y: torch.Tensor, power: float) -> torch.Tensor:
    """Return y ** power, 0 where y is 0 whatever the power."""
    if power == 1.0:
        return y
    if power == 2.0:
        return y.square()
    if power == 0.0:
        return (y > 0).to(y.dtype)
    return y.pow(power)


def _normal(p: torch.Tensor) -> torch.Tensor:
    total = p.sum(dim=-1, keepdim=True)
    return p / total.masked_fill_(total == 0, 1.0)
