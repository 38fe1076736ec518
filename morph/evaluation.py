"""What an evaluation found: the records, their JSON, and the statistics behind the intervals.

`morph.evaluate` fills these, `morph.report` shows them. Standard library only, no torch.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from morph import strict
from morph.errors import DataError, escape
from morph.recipes.schema import Evaluate

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
CAN_RECALL = 0.2  # below this share the source is said not to do the task


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A mean over tokens: `value` in nats per token, `ppl` its exponential.

    `stderr` is the standard error over sequences (None with one sequence), `sequences` the mean
    of each sequence, in order: two models on the same text are compared sequence by sequence.
    """

    value: float
    ppl: float
    tokens: int
    stderr: float | None
    sequences: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answered example; `chance` is the share of right answers that guessing would give."""

    example: int
    task: str
    length: int
    depth: float
    correct: bool
    chance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Recall of one cell with its Wilson 95 % interval; `depth` None is all depths together."""

    task: str
    length: int
    depth: float | None
    count: int
    correct: int
    recall: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over rounds, by the wall clock unless named CPU; ratios are to the first model."""

    length: int
    decode_tokens: int
    rounds: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_cpu_seconds: float
    decode_cpu_seconds: float
    prefill_ratio: float
    decode_ratio: float


@dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Generation state of one sequence of `tokens` tokens, and its share of the source's.

    `read` are the bytes of it that one more token reads and writes, where that is known.
    """

    tokens: int
    bytes: int
    ratio: float
    read: int | None = None


@dataclass(frozen=True, kw_only=True)
class BlocksRead:
    """How many blocks of keys, of `block` tokens each, the queries of one head group read.

    By bins of positions: `positions` are their middles, `mean`, `low` and `high` the mean and the
    10 % and 90 % points over queries, rows and KV heads, `causal` what there was to read.
    `sparsity` is the share of all causal pairs of query and key that were not read.
    """

    layer: int
    mixer: str
    heads: tuple[int, ...]
    block: int
    positions: tuple[int, ...]
    causal: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sparsity: float

    def __post_init__(self) -> None:
        bins = len(self.positions)
        found = [len(getattr(self, name)) for name in ("causal", "mean", "low", "high")]
        if not bins or set(found) != {bins}:
            raise DataError(
                f"blocks read in layer {self.layer}: causal, mean, low and high have {found} "
                f"numbers for {bins} positions; they need one for each, and one position at least."
            )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model against the source on the same questions or the same text.

    Recall: `lost` answers only the source had right, `gained` only the model; `p_value` is the
    exact McNemar test. Perplexity (`task` is "perplexity"): nats per token, `length` is 0.
    `low` and `high` bound the 95 % interval. Where `source_can` is False, the source could not do
    the task before any conversion and the difference says nothing.
    """

    model: str
    task: str
    length: int
    count: int
    difference: float
    low: float
    high: float
    lost: int = 0
    gained: int = 0
    p_value: float | None = None
    source_can: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """Everything measured on one model; `held` is the cache of a real prefill of `speed` length.

    `blocks` has an entry for every head group whose mixer chooses what its queries read.
    """

    name: str
    pattern: str | None = None
    recall: tuple[Row, ...] = ()
    perplexity: Measured | None = None
    cache: tuple[CacheBytes, ...] = ()
    held: CacheBytes | None = None
    speed: Speed | None = None
    blocks: tuple[BlocksRead, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All models beside each other; `models[0]` is the source. Read by `report`, kept as JSON."""

    models: tuple[ModelResult, ...]
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Evaluate = field(default_factory=Evaluate)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise DataError("an evaluation needs at least one model, the source first.")


def dumps(evaluation: Evaluation) -> str:
    """Return canonical JSON: sorted keys, a newline at the end."""
    return json.dumps(strict.plain(evaluation), sort_keys=True, indent=1, allow_nan=False) + "\n"


def loads(text: str, where: str = "evaluation") -> Evaluation:
    """Return the Evaluation that `dumps` wrote; raise DataError naming the first wrong key."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    return strict.build(Evaluation, data, where, DataError)


# --- Statistics ---------------------------------------------------------------------------------


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927, no continuity correction)."""
    if count < 1:
        return 0.0, 1.0
    share, z2 = correct / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return low, 1.0 if correct == count else min(1.0, centre + half)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value of `lost` against `gained` discordant pairs."""
    total = lost + gained
    tail: int = sum(math.comb(total, k) for k in range(min(lost, gained) + 1))
    return min(1.0, tail / 2 ** (total - 1)) if total else 1.0


def paired_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of (gained - lost) / count.

    Adjusted Wald interval of Bonett and Price (2012): unlike a bootstrap it keeps an honest width
    where no pair is discordant, and it needs no seed.
    """
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z95 * math.sqrt(max(0.0, up + down - (up - down) ** 2) / (count + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def summarise(hits: Sequence[Hit], *, depths: Sequence[float] | None = None) -> tuple[Row, ...]:
    """Return recall by task, length and depth, and (depth None) by task and length.

    With `depths`, a hit counts for the nearest one listed (ties: the earlier); without, for its
    own.
    """
    cells: dict[tuple[str, int, float | None], list[Hit]] = {}
    for hit in hits:
        depth = min(depths, key=lambda d: abs(d - hit.depth)) if depths else hit.depth
        for key in ((hit.task, hit.length, None), (hit.task, hit.length, depth)):
            cells.setdefault(key, []).append(hit)
    whole_first = sorted(cells, key=lambda c: (c[0], c[1], -1 if c[2] is None else c[2]))
    return tuple(_row(key, cells[key]) for key in whole_first)


def _row(key: tuple[str, int, float | None], hits: Sequence[Hit]) -> Row:
    task, length, depth = key
    count, correct = len(hits), sum(h.correct for h in hits)
    low, high = wilson(correct, count)
    return Row(
        task=task,
        length=length,
        depth=depth,
        count=count,
        correct=correct,
        recall=correct / count,
        low=low,
        high=high,
        chance=statistics.fmean(h.chance for h in hits),
    )


def cannot(rows: Sequence[Row], source: str) -> dict[tuple[str, int], str]:
    """Return the (task, length) cells that the source fails by itself, each with a sentence.

    It fails where it has less than `CAN_RECALL` right, or is not clearly above guessing.
    """
    cells = {}
    for row in rows:
        if row.depth is None and (row.recall < CAN_RECALL or row.low <= row.chance):
            guess = f", guessing gives {row.chance:.2f}" if row.chance else ""
            cells[row.task, row.length] = (
                f"{escape(source)} itself cannot do {escape(row.task, 40)} at {row.length} tokens "
                f"({row.correct} of {row.count} right{guess}): what other models score there "
                "says nothing about damage."
            )
    return cells


def differences(
    hits: Mapping[str, Sequence[Hit]],
    losses: Mapping[str, Measured | None],
    *,
    unable: Collection[tuple[str, int]] = (),
) -> tuple[Difference, ...]:
    """Return every model against the first one, question by question and context by context.

    `unable` holds the (task, length) cells that the first model cannot do by itself.
    """
    source, *others = hits
    found: list[Difference] = []
    for name in others:
        found += _recall_differences(name, hits[source], hits[name], unable)
        before, after = losses.get(source), losses.get(name)
        if before and after:
            found.append(_loss_difference(name, before, after))
    return tuple(found)


def _recall_differences(
    name: str,
    before: Sequence[Hit],
    after: Sequence[Hit],
    unable: Collection[tuple[str, int]],
) -> list[Difference]:
    cells: dict[tuple[str, int], list[int]] = {}
    for a, b in zip(before, after, strict=True):
        cells.setdefault((a.task, a.length), []).append(int(b.correct) - int(a.correct))
    found = []
    for (task, length), changes in sorted(cells.items()):
        lost, gained, count = changes.count(-1), changes.count(1), len(changes)
        low, high = paired_interval(lost, gained, count)
        found.append(
            Difference(
                model=name,
                task=task,
                length=length,
                count=count,
                difference=(gained - lost) / count,
                low=low,
                high=high,
                lost=lost,
                gained=gained,
                p_value=mcnemar(lost, gained),
                source_can=(task, length) not in unable,
            )
        )
    return found


def _loss_difference(name: str, before: Measured, after: Measured) -> Difference:
    changes = [b - a for a, b in zip(before.sequences, after.sequences, strict=True)]
    mean, count = statistics.fmean(changes), len(changes)
    # One context gives no spread: the interval is then as wide as nothing is known.
    half = Z95 * statistics.stdev(changes) / math.sqrt(count) if count > 1 else abs(mean)
    return Difference(
        model=name,
        task="perplexity",
        length=0,
        count=count,
        difference=mean,
        low=mean - half,
        high=mean + half,
    )
