"""The records of a training log, read by stage, and the table of the stages.

Records come from files that anybody may have written: whatever is not a number of a sane size is
taken as not there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from morph.errors import escape
from morph.report._pages import Grid

Record = Mapping[str, Any]
Points = list[tuple[float, float]]  # (tokens, value)

MOST_STAGES, MOST_LAYERS, MOST_GROUPS, MOST_RECORDS = 40, 160, 6, 2_000_000


@dataclass(kw_only=True)
class StageRecords:
    """What the log has of one stage, in the order it was written."""

    name: str
    first: float = math.nan  # tokens before and after
    last: float = math.nan
    shift: float = 0.0
    steps: int = 0
    seconds: float = math.nan
    text: Points = field(default_factory=list)
    needles: Points = field(default_factory=list)
    layers: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    probes: dict[str, Points] = field(default_factory=dict)
    gates: dict[str, list[tuple[float, tuple[float, ...]]]] = field(default_factory=dict)

    def losses(self) -> list[float]:
        """The losses, those of text where there are any."""
        return [y for _, y in self.text or self.needles]


PROBES = ("recall", "perplexity", "teacher_recall", "teacher_perplexity")


def training_log(folder: str | Path) -> list[dict[str, Any]]:
    """Return the records of `log.jsonl` in a folder, each with its `seconds` of `seconds.jsonl`.

    Lines that hold no JSON object are left out; a missing file is an empty one.
    """
    found = []
    for record, times in zip_longest(*(_lines(Path(folder) / f) for f in _FILES)):
        if not isinstance(record, dict):
            continue
        if isinstance(times, dict) and _place(times) == _place(record):
            record = {**record, "seconds": times.get("seconds")}
        found.append(record)
    return found


_FILES = ("log.jsonl", "seconds.jsonl")


def _lines(path: Path) -> list[Any]:
    found: list[Any] = []
    if not path.is_file():  # a pipe would hang
        return found
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in islice(file, MOST_RECORDS):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                found.append(None)  # keeps the two files in step
    return found


def _place(record: Record) -> list[int | str | None]:
    places = (record.get(key) for key in ("stage", "step"))
    return [x if isinstance(x, (int, str)) else None for x in places]


def stage_grid(records: Sequence[Record]) -> Grid | None:
    """Return a row per stage: steps, tokens, seconds, losses and recalls; None without stages.

    Losses are means of the first and of the last tenth of the steps, of text where there is any.
    Columns without a number are left out.
    """
    rows, recall = [], ""
    for stage in read_stages(records):
        losses = stage.losses()
        few = max(1, len(losses) // 10)
        ends = [f"{fmean(x):.4g}" if x else "" for x in (losses[:few], losses[-few:])]
        seen = stage.probes.get("recall")
        after = f"{seen[-1][1]:.2f}" if seen else ""
        counts = [_count(x) for x in (stage.steps, stage.last - stage.first, stage.seconds)]
        rows.append([stage.name, *counts, *ends, recall if after else "", after])
        recall = after or recall
    if not rows:
        return None
    head = ["stage", "steps", "tokens", "seconds", "loss at start", "loss at end"]
    head += ["recall before", "recall after"]
    used = [n for n in range(len(head)) if n == 0 or any(row[n] for row in rows)]
    return Grid(head=[head[n] for n in used], rows=[[row[n] for n in used] for row in rows])


def _count(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.{0 if value >= 10 or value == int(value) else 1}f}"


# --- Reading records ----------------------------------------------------------------------------


def read_stages(records: Sequence[Record]) -> list[StageRecords]:
    """Return what the records say of each stage, in the order in which stages begin."""
    found: dict[str, StageRecords] = {}
    records = [r for r in records if isinstance(r, Mapping)]
    # A log that counts no tokens is drawn against its lines.
    line = 0.0 if any(_number(r.get("tokens"), 0) is not None for r in records) else 1.0
    before = 0.0
    for record in records:
        name = _name(record)
        if name not in found and len(found) == MOST_STAGES:
            continue
        stage = found.setdefault(name, StageRecords(name=name))
        tokens = _number(record.get("tokens"), 0)
        if math.isnan(stage.first):
            # A log counts tokens from the start of the run; one that counts from that of the
            # stage is moved to where the stage before it ended.
            behind = tokens is not None and tokens <= before
            stage.first, stage.shift = before, before if behind else 0.0
        at = before + line if tokens is None else tokens + stage.shift
        if at < before:
            continue  # no log of ours goes back
        stage.steps += 1
        before = stage.last = at
        _take(stage, record, at)
    return list(found.values())


def _take(stage: StageRecords, record: Record, tokens: float) -> None:
    loss = _number(record.get("loss"))
    if loss is not None:
        kind = stage.needles if record.get("needles") is True else stage.text
        kind.append((tokens, loss))
    seconds = _number(record.get("seconds"), 0)
    if seconds is not None:
        stage.seconds = seconds + (0.0 if math.isnan(stage.seconds) else stage.seconds)
    layers = record.get("layers")
    if isinstance(layers, Mapping):
        errors = {_index(k): _number(v, 0) for k, v in islice(layers.items(), MOST_LAYERS)}
        known = {k: v for k, v in errors.items() if k is not None and v is not None}
        if known:
            stage.layers.append((tokens, known))
    for probe in PROBES:
        value = _number(record.get(probe), 0)
        if value is not None:
            stage.probes.setdefault(probe, []).append((tokens, value))
    gates = record.get("gates")
    if isinstance(gates, Mapping):
        for group, points in islice(gates.items(), 4 * MOST_GROUPS):
            whole = isinstance(points, (list, tuple)) and len(points) == 7
            numbers = [_number(x) for x in points] if whole else []
            if isinstance(group, str) and numbers and None not in numbers:
                stage.gates.setdefault(group, []).append((tokens, tuple(numbers)))  # type: ignore[arg-type]


def _number(value: Any, least: float = -1e30) -> float | None:
    """Return a finite number of a size that can be drawn, or None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if least <= value <= 1e30 else None


def _index(key: Any) -> int | None:
    text = key if isinstance(key, str) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def _name(record: Record) -> str:
    index = record.get("stage", 0)
    if isinstance(index, int) and abs(index) < 10**6:
        index = index + 1
    elif isinstance(index, int):
        index = "?"  # Python refuses to print a very long one
    label = f"stage {escape(index, 60) if isinstance(index, (str, int)) else '?'}"
    name = record.get("name")
    return f"{label}: {escape(name, 60)}" if isinstance(name, str) else label
