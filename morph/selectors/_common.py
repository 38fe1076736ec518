"""What selectors share: units, the shape of a score file, examples in an order of their own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from morph.errors import PlanError
from morph.plan import Granularity, Scores
from morph.selectors._sweep import Sweep as Sweep
from morph.selectors._sweep import digest as digest
from morph.selectors._sweep import verify_and_swap as verify_and_swap
from morph.surgery import Batch, Morphable

Unit = tuple[int, int]
Values = dict[Unit, float]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a selector will spend: whole-model forwards and ways back.

    Both count passes over all calibration examples, or over `rows` of them where that is given;
    `whole` counts further forwards over all.
    """

    forwards: float
    backwards: float = 0.0
    rows: int | None = None
    whole: float = 0.0


def units(morphable: Morphable, granularity: Granularity) -> list[Unit]:
    """Return every (layer, unit) that can be replaced, in order."""
    width = morphable.geometry.units(granularity)
    return [(i, u) for i in morphable.candidates for u in range(width)]


def scores(
    morphable: Morphable,
    selector: str,
    granularity: Granularity,
    values: Values,
    unit: str,
    provenance: dict[str, Any],
    pairs: dict[tuple[Unit, Unit], float] | None = None,
) -> Scores:
    """Return Scores from a value per unit; layers that cannot be replaced get 0.

    `pairs` are interactions of two units, each pair given once or twice. Raises PlanError where a
    value is not finite.
    """
    shape = morphable.geometry
    width = shape.units(granularity)
    for unit_, value in values.items():
        if not math.isfinite(value):
            raise PlanError(
                f"selector {selector}: the score of layer {unit_[0]} unit {unit_[1]} is {value}. "
                "The model's outputs overflow on these examples; try --dtype float32 or other text."
            )
    return Scores(
        selector=selector,
        model_type=morphable.family.model_type,
        granularity=granularity,
        values=tuple(
            tuple(float(values.get((i, u), 0.0)) for u in range(width))
            for i in range(shape.num_hidden_layers)
        ),
        pairs=_matrix(pairs, shape.num_hidden_layers, width) if pairs is not None else None,
        unit=unit,
        provenance={
            "mixer": morphable.mixer,
            "mixer_options": dict(morphable.options),
            "forwards": round(morphable.forwards, 3),
            "backwards": round(morphable.backwards, 3),
            "tokens": round(morphable.tokens),
            "backward_tokens": round(morphable.backward_tokens),
            **provenance,
        },
    )


def _matrix(
    pairs: dict[tuple[Unit, Unit], float], layers: int, width: int
) -> tuple[tuple[float, ...], ...]:
    found = [[0.0] * (layers * width) for _ in range(layers * width)]
    for ((i, u), (j, v)), value in pairs.items():
        a, b = i * width + u, j * width + v
        found[a][b] = found[b][a] = float(value)
    return tuple(map(tuple, found))


def need_batches(batches: Sequence[Batch], selector: str) -> None:
    """Raise PlanError when a selector that runs the model was given nothing to run it on."""
    if not batches:
        raise PlanError(f"selector {selector!r} needs examples; give --data or a text file.")


def canonical(batches: Sequence[Batch]) -> list[Batch]:
    """Return the same examples in an order that does not depend on how they were given.

    Rows are sorted by their content and put into batches of as many rows as the largest had, so
    that a selector which takes examples in turn finds the same whatever their order was.
    """
    rows: dict[int, list[tuple[bytes, torch.Tensor, torch.Tensor]]] = {}
    size = max((b.ids.shape[0] for b in batches), default=1)
    for batch in batches:
        for ids, answers in zip(batch.ids, batch.answers):
            content = ids.cpu().numpy().tobytes() + answers.cpu().numpy().tobytes()
            key = hashlib.sha256(content).digest()
            rows.setdefault(ids.shape[0], []).append((key, ids, answers))
    found = []
    for length in sorted(rows):
        ordered = sorted(rows[length], key=lambda row: row[0])
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            found.append(
                Batch(
                    ids=torch.stack([row[1] for row in part]),
                    answers=torch.stack([row[2] for row in part]),
                )
            )
    return found


def to_units(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return per-head numbers `[L, H]` summed over the heads of each of `width` units."""
    return values.unflatten(-1, (width, -1)).sum(-1)


def group_max(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return per-head numbers `[L, H]` as the largest of each of `width` units.

    What one query head of a group needs, the whole KV head must keep.
    """
    return values.unflatten(-1, (width, -1)).amax(-1)


def as_values(morphable: Morphable, table: torch.Tensor) -> Values:
    """Return a value per unit from `[number of candidates, units]`."""
    rows = table.detach().double().cpu().tolist()
    return {
        (i, u): value for i, row in zip(morphable.candidates, rows) for u, value in enumerate(row)
    }


def kept_units(scores_: Values, count: int) -> list[Unit]:
    """Return the `count` highest units; ties go to the lower index."""
    return sorted(sorted(scores_, key=lambda u: (-scores_[u], u))[:count])


def spread(values: Iterable[float]) -> float:
    """Return the largest minus the smallest value."""
    found = list(values)
    return max(found) - min(found) if found else 0.0
