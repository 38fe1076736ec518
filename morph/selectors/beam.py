"""Beam search over sets of full units, every set measured: dear, and hard to fool.

What it measures: the answer loss of whole sets. From the empty set on, each of the `width` best
sets of one size is extended by every unit, all are measured, and the best are carried on.
Why it works: a unit is judged beside the ones that are already there, so chains and redundant
layers are seen as soon as a set of the beam holds the partner; `swaps` then tries single swaps on
the best.
Cost: about width x units x count half forwards, fewer as sets coincide.
Options: count (units to keep; filled in from the budget), width (4), measure (nll, or kl to the
source, which needs no labels), swaps (rounds of single swaps on the final sets; 1).
Known limits: valid for this count only. A chain whose first unit looks worse than every other needs
a beam as wide as the number of units ranked before it, or the swaps.
Reference: PostNAS (Jet-Nemotron, arXiv 2508.15884) searches placements by beam on a trained
super-network. Deviations: the branches are the source's layers and the mixer as it stands, and the
objective is the loss on the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common
from morph.selectors._sweep import Sweep
from morph.surgery import Batch, Morphable

NEEDS = "forward"
STREAMS = True
Set = frozenset[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the beam selector."""

    count: int | None = None
    width: int = 4
    measure: Literal["nll", "kl"] = "nll"
    swaps: int = 1

    def __post_init__(self) -> None:
        if self.width < 1 or self.swaps < 0:
            raise PlanError(
                f"selector beam: width is {self.width} and swaps {self.swaps}; the width is at "
                "least 1, swaps at least 0."
            )


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """Half a forward for every set that is measured."""
    total = len(shape.candidates) * shape.units(granularity)
    count = min(options.count or max(1, total // 4), total)
    sets = total + sum(0.6 * options.width * (total - n) for n in range(1, count))  # some coincide
    sets += options.swaps * count * (total - count)
    return _common.Cost(forwards=1 + sets / 2)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return ranks: the units of the best set found come first, in the order of the beam.

    Raises PlanError without batches and without a count.
    """
    _common.need_batches(batches, "beam")
    found = _common.units(morphable, granularity)
    if options.count is None:
        raise PlanError("selector beam: give selector.count, the units to keep, or a --budget.")
    if not 1 <= options.count <= len(found):
        raise PlanError(f"selector beam: count is {options.count}; it lies in 1-{len(found)}.")
    measured: dict[Set, float] = {}

    def measure(sets: Sequence[Set], base: Set) -> None:
        new = sorted({s for s in sets if s not in measured}, key=sorted)
        if not new:
            return
        sweep = Sweep(morphable, batches, base, granularity, options.measure)
        measured.update(zip(new, sweep.means(new)))

    beam: list[Set] = [frozenset()]
    order: list[tuple[int, int]] = []
    for _ in range(options.count):
        wider = [s | {u} for s in beam for u in found if u not in s]
        measure(wider, beam[0])
        beam = sorted(set(wider), key=lambda s: (measured[s], sorted(s)))[: options.width]
    for _ in range(options.swaps):
        best = beam[0]
        near = [best - {a} | {b} for a in best for b in found if b not in best]
        measure(near, best)
        beam = sorted({*beam, *near}, key=lambda s: (measured[s], sorted(s)))[: options.width]
        if beam[0] == best:
            break
    order = [*sorted(beam[0]), *(u for u in found if u not in beam[0])]
    values = {u: float(len(order) - n) for n, u in enumerate(order)}
    told = {
        "sets_tried": len(measured),
        "placed": options.count,
        options.measure: measured[beam[0]],
        "runners_up": [
            {"kept": [list(u) for u in sorted(s)], options.measure: measured[s]} for s in beam[1:]
        ],
    }
    return _common.scores(morphable, "beam", granularity, values, "rank", told)
