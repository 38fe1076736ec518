"""Units restored or removed one at a time, with intervals for their ranks; and greedy sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from morph.plan import Geometry, Granularity
from morph.selectors import _common
from morph.selectors._sweep import Sweep
from morph.surgery import Batch, Morphable

Unit = tuple[int, int]


def cost(
    shape: Geometry, granularity: Granularity, mode: str, count: int | None = None
) -> _common.Cost:
    """Return the forwards of a sweep, in which a change in layer i runs only layers >= i."""
    layers = len(shape.candidates)
    total = layers * shape.units(granularity)
    rounds = min(count or total, total) if mode == "greedy" else 1
    tried = sum(total - n for n in range(rounds))
    return _common.Cost(forwards=rounds + tried * (layers + 1) / (2 * layers))


def one_by_one(
    morphable: Morphable,
    batches: Sequence[Batch],
    granularity: Granularity,
    measure: str,
    mode: str,
    bootstrap: int,
) -> tuple[_common.Values, dict[str, Any]]:
    """Return what each unit is worth, alone (`add`) or as the only one missing (`remove`).

    Also the measure of the base, and, where `bootstrap` resamples of the examples are wanted, the
    90 % interval of every unit's rank (1 is the highest score).
    """
    found = _common.units(morphable, granularity)
    base = frozenset() if mode == "add" else frozenset(found)
    sweep = Sweep(morphable, batches, base, granularity, measure)
    rows = sweep.rows([base, *(base ^ {u} for u in found)])
    gain = (rows[:1] - rows[1:]) if mode == "add" else (rows[1:] - rows[:1])  # [units, R]
    values = (gain.sum(1) / sweep.counts.sum()).tolist()
    told: dict[str, Any] = {"mode": mode, "base": float(rows[0].sum() / sweep.counts.sum())}
    if bootstrap and rows.shape[1] > 1:
        low, high = rank_intervals(gain, sweep.counts, bootstrap)
        told["ranks"] = {
            name: _table(morphable, granularity, dict(zip(found, part)))
            for name, part in (("low", low), ("high", high))
        }
    return dict(zip(found, values)), told


def rank_intervals(
    gain: torch.Tensor, counts: torch.Tensor, resamples: int
) -> tuple[list[int], list[int]]:
    """Return the 5th and 95th percentile of every unit's rank over resampled examples.

    `gain` `[units, R]` sums over each example's answer tokens, `counts` `[R]` of them. Examples are
    brought into an order of their own first, so that the order they were given in is irrelevant.
    """
    order = sorted(range(gain.shape[1]), key=lambda r: (gain[:, r].tolist(), float(counts[r])))
    gain, counts = gain[:, order], counts[order]
    generator = torch.Generator().manual_seed(0)
    examples = gain.shape[1]
    drawn = torch.randint(examples, (resamples, examples), generator=generator)
    means = gain[:, drawn].sum(-1) / counts[drawn].sum(-1)  # [units, resamples]
    ranks = means.argsort(dim=0, descending=True, stable=True).argsort(dim=0) + 1
    ordered = ranks.sort(dim=1).values
    low, high = int(0.05 * (resamples - 1)), -int(-0.95 * (resamples - 1) // 1)
    return ordered[:, low].tolist(), ordered[:, high].tolist()


def _table(
    morphable: Morphable, granularity: Granularity, values: dict[Unit, int]
) -> list[list[int | None]]:
    """Return a value per layer and unit; None where the source's own window stands."""
    width = morphable.geometry.units(granularity)
    layers = morphable.geometry.num_hidden_layers
    return [[values.get((i, u)) for u in range(width)] for i in range(layers)]


def greedy(
    morphable: Morphable,
    batches: Sequence[Batch],
    granularity: Granularity,
    measure: str,
    count: int | None,
) -> tuple[_common.Values, dict[str, Any]]:
    """Add the unit that helps most, again and again; later rounds see earlier picks.

    Values are ranks: the unit picked first scores highest, those never picked follow by what they
    were worth in the last round.
    """
    found = _common.units(morphable, granularity)
    rounds = min(count or len(found), len(found))
    kept: list[Unit] = []
    picked: list[dict[str, object]] = []
    last: dict[Unit, float] = {}
    for _ in range(rounds):
        sweep = Sweep(morphable, batches, kept, granularity, measure)
        free = [u for u in found if u not in kept]
        last = dict(zip(free, sweep.means([[*kept, u] for u in free])))
        best = min(last, key=lambda u: (last[u], u))
        kept.append(best)
        picked.append({"unit": list(best), measure: last[best]})
    rest = sorted((u for u in found if u not in kept), key=lambda u: (last[u], u))
    order = [*kept, *rest]
    values = {u: float(len(order) - i) for i, u in enumerate(order)}
    return values, {"mode": "greedy", "picked": picked}
