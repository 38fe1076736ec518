"""Rows of attention for selectors that look at where heads look: never a `[T, T]` matrix.

A probe of the morphable model hands over rotated q and k; the scale and the score cap stand in the
shape of the layer's exact mixer.
"""

from __future__ import annotations

import math

import torch

from morph.errors import PlanError
from morph.mixers._base import GroupShape
from morph.surgery import Morphable


def shape_of(morphable: Morphable, layer: int) -> GroupShape:
    """Return the shape of a candidate layer as its own attention sees it: scale, softcap."""
    return morphable.switches[layer].exact.mixers[0].shape


def scores(
    q: torch.Tensor, k: torch.Tensor, shape: GroupShape, at: torch.Tensor, first: int = 0
) -> torch.Tensor:
    """Return the scores `[n, H, S]`, float32, of n queries of one sequence; -inf for later keys.

    q `[n, H, K]` stand at the positions `at` `[n]`, k `[S, G, K]` at `first` and after.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    found = torch.einsum("ngrk,sgk->ngrs", grouped, k.float()).flatten(1, 2) * shape.scale
    if shape.softcap is not None:
        found = shape.softcap * torch.tanh(found / shape.softcap)
    keys = torch.arange(first, first + k.shape[0], device=at.device)
    return found.masked_fill((keys > at[:, None])[:, None], -math.inf)


def need_finite(x: torch.Tensor, selector: str) -> None:
    """Raise PlanError where what the model put out is not finite: NaN would win every argmax."""
    if not bool(torch.isfinite(x).all()):
        raise PlanError(
            f"selector {selector}: the model puts out NaN or infinity on these examples. Try "
            "--dtype float32, or other text."
        )
