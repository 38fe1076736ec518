"""What the answers lose when one unit is made cheap: exact sweeps.

What it measures: how the loss on answer tokens changes when one unit is made cheap (`remove`),
restored in a model where all are cheap (`add`), or added to the set chosen so far (`greedy`,
re-scored every round).
Why it works: a unit that carries far recall moves exactly these tokens; text loss hardly sees it.
Cost: L+1 forwards for L units, about half with the morphable model's reuse; greedy about K/2 times
that. No gradients.
Options: mode (remove, add, greedy), count (rounds of greedy; filled in from the budget), bootstrap
(resamples of the examples for the intervals of ranks; 200).
Known limits: `remove` ranks units that back each other up low; `add` cannot see units that only
work together. Both are repaired by the verify-and-swap pass, more surely from `remove`. Where the
context fits in the window every score is zero. With few examples ranks are uncertain: the score
file gives a 90 % interval for each.
Reference: NLL-guided layer selection (arXiv 2606.27791), eq. 1. Deviations: the cheap mixer also
runs on answer tokens, as it will in the converted model (the paper keeps full attention there,
because it converts prefill only); the paper's mode is `add`. `remove`, the default because it was
right far more often (RESULTS.md), `greedy` and the intervals are additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common, _single
from morph.surgery import Batch, Morphable

NEEDS = "forward"
STREAMS = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the nll selector."""

    mode: Literal["remove", "add", "greedy"] = "remove"
    count: int | None = None
    bootstrap: int = 200

    def __post_init__(self) -> None:
        if self.bootstrap < 0:
            raise PlanError(f"selector nll: bootstrap is {self.bootstrap}; give 0 (none) or more.")


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """Half a forward for every unit and round, by the reuse of lower layers."""
    return _single.cost(shape, granularity, options.mode, options.count)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return, per unit, the nats per answer token that full attention there is worth.

    Greedy scores are ranks: the unit picked first scores highest. Raises PlanError without batches.
    """
    _common.need_batches(batches, "nll")
    if options.mode == "greedy":
        values, told = _single.greedy(morphable, batches, granularity, "nll", options.count)
        return _common.scores(morphable, "nll", granularity, values, "rank", told)
    values, told = _single.one_by_one(
        morphable, batches, granularity, "nll", options.mode, options.bootstrap
    )
    told["base_nll"] = told.pop("base")
    unit = "nats per answer token"
    return _common.scores(morphable, "nll", granularity, values, unit, told)
