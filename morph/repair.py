"""What a repair brought back: three checkpoints on the same items, item by item.

`morph run` fills this where a recipe fine-tunes, `morph.report` shows it. Standard library only.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from morph import strict
from morph.errors import DataError
from morph.evaluation import (
    Difference,
    Hit,
    Measured,
    Row,
    cannot,
    differences,
    summarise,
)

DRAWS = 2000  # resamples of a bootstrap
PRE, POST = "pre", "post"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One checkpoint: recall and solved problems by task and length, and perplexity.

    `outcomes` has a letter per item, `1` for right, under `task` or `task/length`: the same items
    in the same order for every side.
    """

    name: str
    rows: tuple[Row, ...]
    perplexity: Measured | None = None
    outcomes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one checkpoint differs from another (`since`) on the same items; see `Difference`."""

    since: str
    found: Difference


@dataclass(frozen=True, kw_only=True)
class Back:
    """The share of what a fine-tuning lost that a restored checkpoint has again.

    (restored - post) / (pre - post), with the 95 % interval of a paired bootstrap over items. Below
    0 the restore did harm, above 1 it is better than before. `share` is None where the
    fine-tuning's loss is not distinguishable from none, so that there is nothing to have a share
    of.
    """

    name: str
    task: str
    length: int
    share: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the fine-tuning moved one role of one layer: norm of the change over the norm."""

    layer: int
    role: str
    drift: float


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Everything that is known of a fine-tuning and of what was put back after it.

    `sides` are pre, post and the restored ones, in this order. `tuned` are the tasks tuned on, the
    other rows are recall. `tuning` and `restoring` tell what was done, in plain data.
    """

    sides: tuple[Side, ...]
    changes: tuple[Change, ...]
    back: tuple[Back, ...]
    drift: tuple[Drift, ...] = ()
    tuned: tuple[str, ...] = ()
    tuning: Mapping[str, Any] = field(default_factory=dict)
    restoring: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if [side.name for side in self.sides[:2]] != [PRE, POST]:
            raise DataError("a repair needs the checkpoints pre and post, in this order.")

    def side(self, name: str) -> Side:
        """Return the checkpoint of that name."""
        return next(side for side in self.sides if side.name == name)


def dumps(repair: Repair) -> str:
    """Return canonical JSON: sorted keys, a newline at the end."""
    return json.dumps(strict.plain(repair), sort_keys=True, indent=1, allow_nan=False) + "\n"


def loads(text: str, where: str = "repair") -> Repair:
    """Return the Repair that `dumps` wrote; raise DataError naming the first wrong key."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    return strict.build(Repair, data, where, DataError)


def compare(
    hits: Mapping[str, Sequence[Hit]],
    losses: Mapping[str, Measured | None],
    *,
    tuned: Sequence[str],
    seed: int = 0,
    **told: Any,
) -> Repair:
    """Return the repair that per-item hits and losses of pre, post and restored sides make.

    Hits of all sides are of the same items in the same order; those of `tuned` tasks are one cell
    each, of length 0. Intervals of differences are those of `evaluation.paired_interval`: unlike a
    bootstrap it keeps its width where no item differs, as between two checkpoints that are both
    perfect. `told` are the other fields of Repair. Raises DataError without pre and post first.
    """
    if list(hits)[:2] != [PRE, POST]:
        raise DataError("a repair needs the checkpoints pre and post, in this order.")

    def order(found: Row | Difference) -> tuple[bool, bool, str, int]:
        return found.task == "perplexity", found.task in tuned, found.task, found.length

    cells = {name: _by_cell(found, tuned) for name, found in hits.items()}
    flat = {name: [h for part in found.values() for h in part] for name, found in cells.items()}
    sides = tuple(
        Side(
            name=name,
            rows=tuple(sorted((r for r in summarise(flat[name]) if r.depth is None), key=order)),
            perplexity=losses.get(name),
            outcomes={_label(*key): _letters(found) for key, found in cells[name].items()},
        )
        for name in hits
    )
    unable = cannot(sides[0].rows, PRE)
    recall = {key: text for key, text in unable.items() if key[0] not in tuned}
    changes = []
    for since in (PRE, POST):
        after = [since, *list(hits)[1 + (since == POST) :]]
        pairs = differences(
            {n: flat[n] for n in after}, {n: losses.get(n) for n in after}, unable=recall
        )
        names = {name: n for n, name in enumerate(after)}
        ordered = sorted(pairs, key=lambda found: (names[found.model], *order(found)))
        changes += [Change(since=since, found=found) for found in ordered]
    notes = (*told.pop("notes", ()), *recall.values())
    return Repair(
        sides=sides,
        changes=tuple(changes),
        back=tuple(_back(cells, changes, tuned, seed)),
        tuned=tuple(tuned),
        notes=notes,
        seed=seed,
        **told,
    )


def _by_cell(hits: Sequence[Hit], tuned: Sequence[str]) -> dict[tuple[str, int], list[Hit]]:
    cells: dict[tuple[str, int], list[Hit]] = {}
    for hit in hits:
        length = 0 if hit.task in tuned else hit.length
        same = Hit(
            example=hit.example,
            task=hit.task,
            length=length,
            depth=0.0,
            correct=hit.correct,
            chance=hit.chance,
        )
        cells.setdefault((hit.task, length), []).append(same)
    return dict(sorted(cells.items()))


def _label(task: str, length: int) -> str:
    return f"{task}/{length}" if length else task


def _letters(hits: Sequence[Hit]) -> str:
    return "".join("01"[hit.correct] for hit in hits)


def _back(
    cells: Mapping[str, Mapping[tuple[str, int], Sequence[Hit]]],
    changes: Sequence[Change],
    tuned: Sequence[str],
    seed: int,
) -> list[Back]:
    found = []
    for change in changes:
        lost = change.found
        if change.since != PRE or lost.model != POST or lost.task in ("perplexity", *tuned):
            continue
        if not lost.source_can:
            continue
        key = lost.task, lost.length
        for name in list(cells)[2:]:
            items = [
                tuple(int(h.correct) for h in of)
                for of in zip(cells[PRE][key], cells[POST][key], cells[name][key], strict=True)
            ]
            shares: tuple[float | None, ...] = (None, None, None)
            if lost.high < 0:
                shares = share_back(items, seed=seed)
            share, low, high = shares
            found.append(
                Back(name=name, task=key[0], length=key[1], share=share, low=low, high=high)
            )
    return found


def share_back(
    items: Sequence[tuple[int, ...]], *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float, float]:
    """Return (restored - post) / (pre - post) over (pre, post, restored) items, and its interval.

    Percentiles 2.5 and 97.5 of a paired bootstrap: whole items are drawn again. Draws that lost
    nothing have no share and are left out. Raises DataError where the items themselves lost
    nothing.
    """
    whole = _share(items)
    if whole is None:
        raise DataError("nothing was lost on these items; there is no share of it to have back.")
    rng = random.Random(f"{seed}/share back")
    again = (_share(rng.choices(items, k=len(items))) for _ in range(draws))
    known = sorted(share for share in again if share is not None)
    return whole, _percentile(known, 0.025), _percentile(known, 0.975)


def _share(items: Sequence[tuple[int, ...]]) -> float | None:
    before, after, restored = (sum(column) for column in zip(*items))
    return (restored - after) / (before - after) if before > after else None


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
