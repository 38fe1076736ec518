"""What a comparison of selectors found: the records, their JSON, and rank correlation.

`morph compare` fills these, `morph.report` shows them. Standard library only, no torch. Losses are
nats per answer token; a regret is the loss of a chosen set minus that of the best set of its size.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from morph import strict
from morph.errors import DataError, escape, nearest
from morph.plan import Granularity

BASELINES = ("random", "uniform")  # selectors that look at no model
Kept = tuple[tuple[int, int], ...]  # (layer, unit) pairs


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One set that one selector chose at one budget, with what it is worth and what it cost.

    `loss` is measured on the examples that the choice was made on, `held_out_loss` and `recall`
    (the share of answer tokens right) on others; a regret is None where no best set is known.
    `cpu_seconds` and the passes are those of this choice alone; `swaps` is None where no swap
    pass ran. Entries whose labels differ in a closing ` (seed N)` only are one row of a table.
    """

    selector: str
    label: str
    budget: str
    kept: Kept
    loss: float
    held_out_loss: float | None = None
    regret: float | None = None
    held_out_regret: float | None = None
    recall: float | None = None
    forwards: float = 0.0
    backwards: float = 0.0
    cpu_seconds: float = 0.0
    swaps: int | None = None
    note: str = ""

    @property
    def row(self) -> str:
        """The label without its seed."""
        return re.sub(r"\s*\(seed \d+\)$", "", self.label)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The set of lowest `loss` at a budget.

    `exhaustive`: every set of that size was tried. Otherwise it is the best of `sets_tried`, and a
    regret measured against it may be too small.
    """

    budget: str
    kept: Kept
    loss: float
    held_out_loss: float | None = None
    recall: float | None = None
    sets_tried: int
    exhaustive: bool
    forwards: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Selectors beside each other on one model, mixer and task; read by `report`, kept as JSON.

    `source_*` is the untouched model, `cheap_*` the one with everything replaced. `agreement` holds
    the Spearman correlation of the scores of two labels; `default` is the label that morph would
    choose by.
    """

    model: str
    model_sha256: str
    mixer: str
    mixer_options: Mapping[str, Any] = field(default_factory=dict)
    granularity: Granularity = "layer"
    budgets: tuple[str, ...]
    task: str
    examples: int
    seq_len: int
    seeds: tuple[int, ...] = ()
    source_loss: float
    source_held_out_loss: float | None = None
    source_recall: float | None = None
    cheap_loss: float
    cheap_held_out_loss: float | None = None
    cheap_recall: float | None = None
    best: tuple[Best, ...] = ()
    entries: tuple[Entry, ...] = ()
    agreement: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    default: str | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _once(self.budgets, "comparison.budgets")
        _once([b.budget for b in self.best], "comparison.best")
        used = {f"best[{i}]": b.budget for i, b in enumerate(self.best)}
        used |= {f"entries[{i}]": e.budget for i, e in enumerate(self.entries)}
        for where, budget in used.items():
            if budget not in self.budgets:
                raise DataError(
                    f"comparison.{where}.budget is {escape(budget, 40)!r}, which is not in "
                    f"budgets.{nearest(budget, self.budgets)}"
                )

    def best_at(self, budget: str) -> Best | None:
        """Return the best set of a budget, if one is known."""
        return next((b for b in self.best if b.budget == budget), None)


def _once(budgets: Sequence[str], where: str) -> None:
    for i, budget in enumerate(budgets):
        if budget in budgets[:i]:
            raise DataError(f"{where} names {escape(budget, 40)!r} twice.")


def dumps(comparison: Comparison) -> str:
    """Return canonical JSON: sorted keys, a newline at the end; raise DataError for a NaN."""
    # Through the loader: what could not be read back is never written, and 1 becomes 1.0 here
    # rather than on the way back.
    checked = strict.build(Comparison, strict.plain(comparison), "comparison", DataError)
    return json.dumps(strict.plain(checked), sort_keys=True, indent=1, allow_nan=False) + "\n"


def loads(text: str, where: str = "comparison") -> Comparison:
    """Return the Comparison that `dumps` wrote; raise DataError naming the first wrong key."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    return strict.build(Comparison, data, where, DataError)


# --- What the tables and pictures need ----------------------------------------------------------


class Spread(NamedTuple):
    """The mean of some numbers, the lowest and the highest, and how many there are."""

    mean: float
    low: float
    high: float
    number: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the spread of the numbers among `values`, or None where there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), min(known), max(known), len(known))


def rows(comparison: Comparison) -> dict[str, tuple[Entry, ...]]:
    """Return the entries by label, seeds together; lowest mean regret first.

    The mean is over budgets; a label that lacks one comes after those that have them all, and
    where no regret is known the loss decides.
    """
    found: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        found.setdefault(entry.row, []).append(entry)

    def mean(entries: Sequence[Entry], name: str) -> tuple[int, float]:
        by_budget = [
            spread(getattr(e, name) for e in entries if e.budget == budget)
            for budget in comparison.budgets
        ]
        known = [s.mean for s in by_budget if s]
        missing = len(by_budget) - len(known)
        return missing, statistics.fmean(known) if known else math.inf

    order = sorted(found, key=lambda x: (mean(found[x], "regret"), mean(found[x], "loss"), x))
    return {label: tuple(found[label]) for label in order}


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value, 1 for the lowest; equal values share their mean rank."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for i in order[start:end]:
                found[i] = (start + 1 + end) / 2
            start = end
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the Spearman rank correlation of two lists of equal length, ties at their mean rank.

    0.0 where one of them is constant, or shorter than two: nothing is known then.
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} values cannot be compared with {len(b)}; give as many of each.")
    if len(a) < 2:
        return 0.0
    x, y = ranks(a), ranks(b)
    middle = (len(a) + 1) / 2
    shared = math.fsum((p - middle) * (q - middle) for p, q in zip(x, y))
    size = math.sqrt(
        math.fsum((p - middle) ** 2 for p in x) * math.fsum((q - middle) ** 2 for q in y)
    )
    return max(-1.0, min(1.0, shared / size)) if size else 0.0
