"""Evenly spaced layers: the baseline every other selector must beat.

What it measures: nothing. Units are spread evenly over the model.
Why it works: neighbouring layers often do similar work, so spacing wastes little.
Cost: no forward.
Options: convention (which of each block of layers is kept: first, last or centre), offset (layers
to shift by, wrapping around), count (units to keep; filled in from the budget).
Known limits: blind to what the layers do. Without a count the order is nested (each next unit as
far from the others as possible), which equals even spacing only for some counts.
Reference: KL-guided selection keeps the last layer of each block, FlashMorph's uniform baseline
the first, SWAA starts at offset 1; all are expressible here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from morph.errors import PlanError
from morph.plan import Granularity, Scores
from morph.selectors import _common
from morph.surgery import Batch, Morphable

NEEDS = "weights"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the uniform selector."""

    convention: Literal["first", "last", "centre"] = "last"
    offset: int = 0
    count: int | None = None


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return 1 for the units an even spread keeps and 0 for the rest, or a nested order."""
    found = _common.units(morphable, granularity)
    if options.count is None:
        order = nested_order(len(found))
        values = {found[p]: float(len(found) - rank) for rank, p in enumerate(order)}
    else:
        kept = positions(len(found), options.count, options.convention, options.offset)
        values = {unit: float(i in kept) for i, unit in enumerate(found)}
    return _common.scores(morphable, "uniform", granularity, values, "kept", {})


def positions(total: int, count: int, convention: str, offset: int = 0) -> set[int]:
    """Return `count` of `range(total)`, one in each of `count` equal blocks."""
    if not 1 <= count <= total:
        raise PlanError(f"selector uniform: count is {count}; it lies in 1-{total}.")
    edges = [round(b * total / count) for b in range(count + 1)]
    pick = {
        "first": lambda a, b: a,
        "last": lambda a, b: b - 1,
        "centre": lambda a, b: (a + b - 1) // 2,
    }[convention]
    return {(pick(a, b) + offset) % total for a, b in itertools.pairwise(edges)}


def nested_order(total: int) -> list[int]:
    """Return `range(total)` with every prefix spread out: farthest first, lower index wins."""
    order = [total - 1]
    while len(order) < total:
        rest = [i for i in range(total) if i not in order]
        order.append(max(rest, key=lambda i: (min(abs(i - j) for j in order), -i)))
    return order
