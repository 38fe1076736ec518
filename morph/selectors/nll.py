"""Answer-token negative log-likelihood of single swaps, or greedy with re-scoring.

What it measures: how the loss on answer tokens changes when one unit is restored (`add`), made
cheap (`remove`), or added to the set chosen so far (`greedy`, re-scored every round).
Why it works: a unit that carries far recall moves exactly these tokens; text loss hardly sees it.
Cost: L+1 forwards for L units, about half with the morphable model's reuse; greedy about K/2 times
that. No gradients.
Options: mode (add, remove, greedy), count (rounds of greedy; filled in from the budget).
Known limits: `add` starts from a model in which everything is cheap and cannot see units that only
work together; `remove` cannot see units that back each other up. Both are repaired by the
verify-and-swap pass. Where the context fits in the window every score is zero.
Reference: NLL-guided layer selection (arXiv 2606.27791), eq. 1. Deviations: the cheap mixer also
runs on answer tokens, as it will in the converted model (the paper keeps full attention there,
because it converts prefill only); `remove` and `greedy` are additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from morph.plan import Granularity, Scores
from morph.selectors import _common
from morph.surgery import Batch, Morphable

NEEDS = "forward"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the nll selector."""

    mode: Literal["add", "remove", "greedy"] = "add"
    count: int | None = None


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
    found = _common.units(morphable, granularity)
    provenance: dict[str, object] = {"mode": options.mode}
    unit = "nats per answer token"
    if options.mode == "greedy":
        values, provenance["picked"] = _greedy(morphable, batches, options, granularity)
        unit = "rank"
    else:
        base = [] if options.mode == "add" else found
        sweep = _common.Sweep(morphable, batches, base, granularity)
        sign = 1 if options.mode == "add" else -1
        nll, *others = sweep.means([base, *(set(base) ^ {u} for u in found)])
        values = {u: sign * (nll - other) for u, other in zip(found, others)}
        provenance["base_nll"] = nll
    return _common.scores(morphable, "nll", granularity, values, unit, provenance)


def _greedy(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    granularity: Granularity,
) -> tuple[dict[_common.Unit, float], list[dict[str, object]]]:
    """Add the unit that lowers the NLL most, again and again; later rounds see earlier picks."""
    found = _common.units(morphable, granularity)
    rounds = min(options.count or len(found), len(found))
    kept: list[_common.Unit] = []
    picked: list[dict[str, object]] = []
    last: dict[_common.Unit, float] = {}
    for _ in range(rounds):
        sweep = _common.Sweep(morphable, batches, kept, granularity)
        rest = [u for u in found if u not in kept]
        last = dict(zip(rest, sweep.means([[*kept, u] for u in rest])))
        best = min(last, key=lambda u: (last[u], u))
        kept.append(best)
        picked.append({"unit": list(best), "nll": last[best]})
    rest = sorted((u for u in found if u not in kept), key=lambda u: (last[u], u))
    order = [*kept, *rest]
    return {u: float(len(order) - i) for i, u in enumerate(order)}, picked
