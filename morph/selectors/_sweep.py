"""Sets of kept units, measured: variants of one base assignment, and the swap pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from morph.plan import Granularity
from morph.surgery import Batch, Morphable, Trace, answer_losses, answer_rows, answer_tokens
from morph.surgery._trace import together

Unit = tuple[int, int]


def nll(logits: torch.Tensor, batch: Batch, source: torch.Tensor | None) -> torch.Tensor:
    """Return the negative log-likelihood `[N]` of the answer tokens, in nats."""
    return answer_losses(logits, batch)


def kl(logits: torch.Tensor, batch: Batch, source: torch.Tensor | None) -> torch.Tensor:
    """Return KL(source || variant) `[N]` at the answer tokens, in nats."""
    assert source is not None
    p = torch.log_softmax(source.float(), dim=-1)
    return (p.exp() * (p - torch.log_softmax(logits.float(), dim=-1))).sum(-1)


def wrong(logits: torch.Tensor, batch: Batch, source: torch.Tensor | None) -> torch.Tensor:
    """Return 1 for every answer token that is not the most likely one, else 0: `[N]`."""
    return (logits.argmax(-1) != answer_tokens(batch)).float()


MEASURES: dict[str, Callable[..., torch.Tensor]] = {"nll": nll, "kl": kl, "wrong": wrong}


class Sweep:
    """The same batches under one base assignment, and what its variants cost; lower is better.

    `measure` is a name of MEASURES. Every number is remembered in the morphable's memo, example by
    example, so that what was stopped goes on. R counts the examples of all batches.
    """

    def __init__(
        self,
        morphable: Morphable,
        batches: Sequence[Batch],
        keep: Iterable[Unit],
        granularity: Granularity,
        measure: str = "nll",
    ) -> None:
        self.morphable, self.granularity, self.measure = morphable, granularity, measure
        self.keep = frozenset(keep)
        self.batches = batches
        self.counts = torch.cat([b.answers.sum(1) for b in batches]).double().cpu()
        self._digests = [digest(b) for b in batches]
        self._traces: dict[int, Trace] = {}
        self._sources: dict[int, torch.Tensor] = {}

    def _trace(self, n: int) -> Trace:
        if n not in self._traces:
            modes = self.morphable.modes(self.keep, self.granularity)
            plain = self.granularity == "layer"
            self._traces[n] = self.morphable.trace(self.batches[n], modes, share_prefix=plain)
        return self._traces[n]

    def _source(self, n: int) -> torch.Tensor | None:
        if self.measure != "kl":
            return None
        if n not in self._sources:
            modes = self.morphable.modes([(i, 0) for i in self.morphable.candidates])
            trace = self.morphable.trace(self.batches[n], modes, share_prefix=False)
            self._sources[n] = trace.logits
        return self._sources[n]

    def rows(self, keeps: Sequence[Iterable[Unit]]) -> torch.Tensor:
        """Return, for every kept set, the sum over each example's answer tokens: `[sets, R]`.

        Of a streamed model every layer is read once for all of them: give all sets in one call.
        """
        sets = [frozenset(keep) for keep in keeps]
        missing = [self._missing(n, sets) for n in range(len(self.batches))]
        measure = self._together if self.morphable.streaming else self._in_turn
        measure(missing, len(sets) * len(self.batches))
        found = [[self.morphable.memo.get(self._key(n, s)) for s in sets] for n in self._numbers]
        return torch.cat([torch.tensor(part, dtype=torch.float64) for part in found], dim=1)

    @property
    def _numbers(self) -> range:
        return range(len(self.batches))

    def _key(self, n: int, keep: frozenset[Unit]) -> str:
        return f"{self.measure} {self._digests[n]} {self.granularity} {_named(keep)}"

    def _missing(self, n: int, sets: Sequence[frozenset[Unit]]) -> list[frozenset[Unit]]:
        return [s for s in dict.fromkeys(sets) if self._key(n, s) not in self.morphable.memo]

    def _measured(self, n: int, logits: torch.Tensor) -> list[float]:
        batch = self.batches[n]
        found = MEASURES[self.measure](logits, batch, self._source(n)).double().cpu()
        rows = answer_rows(batch).cpu()
        return torch.zeros(len(batch.ids)).double().index_add(0, rows, found).tolist()

    def _in_turn(self, missing: Sequence[Sequence[frozenset[Unit]]], total: int) -> None:
        """Measure batch after batch, remembering every set as it is done."""
        m = self.morphable
        for n, sets in enumerate(missing):
            done = total - sum(map(len, missing[n:]))
            changes = [self._changes(keep) for keep in sets]
            each = self._trace(n).each(changes, partial(self._measured, n)) if sets else ()
            for index, value in each:
                m.memo.put(self._key(n, sets[index]), value)
                done += 1
                m.progress(done, total)

    def _together(self, missing: Sequence[Sequence[frozenset[Unit]]], total: int) -> None:
        """Measure all batches in one pass over the layers; what is stopped on the way is lost."""
        m = self.morphable
        wanted = [n for n in self._numbers if missing[n]]
        if not wanted:
            return
        source = m.modes([(i, 0) for i in m.candidates])
        # where the source's logits are needed first, the source is variant 0
        lead = [int(self.measure == "kl" and n not in self._sources) for n in wanted]
        changes = [
            [source] * first + [self._changes(keep) for keep in missing[n]]
            for n, first in zip(wanted, lead)
        ]
        count = sum(map(len, missing))

        def reduce(t: int, logits: torch.Tensor) -> list[float]:
            if lead[t]:
                self._sources.setdefault(wanted[t], logits)
            return self._measured(wanted[t], logits)

        def passed(layer: int) -> None:
            m.progress(total - count + count * layer // len(m.base_layers), total)

        for t, index, value in together([self._trace(n) for n in wanted], changes, reduce, passed):
            if index >= lead[t]:
                m.memo.put(self._key(wanted[t], missing[wanted[t]][index - lead[t]]), value)
        m.progress(total, total)

    def _changes(self, keep: frozenset[Unit]) -> dict[int, Any]:
        base = self.morphable.modes(self.keep, self.granularity)
        modes = self.morphable.modes(keep, self.granularity)
        return {i: mode for i, mode in modes.items() if mode is not base[i]}

    def means(self, keeps: Sequence[Iterable[Unit]]) -> list[float]:
        """Return the mean over all answer tokens for every kept set."""
        return (self.rows(keeps).sum(1) / self.counts.sum()).tolist()

    @property
    def base(self) -> float:
        """Mean of the base assignment, per answer token."""
        return self.means([self.keep])[0]

    @property
    def nll(self) -> float:
        """Mean of the base assignment: the NLL in nats, where that is the measure."""
        return self.base

    def nll_with(self, keep: Iterable[Unit]) -> float:
        """Mean when exactly `keep` stays full; only layers from the first change on run."""
        return self.means([keep])[0]


def digest(batch: Batch) -> str:
    """Return a short name for the content of a batch."""
    found = hashlib.sha256(batch.ids.cpu().numpy().tobytes())
    found.update(batch.answers.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _named(keep: frozenset[Unit]) -> str:
    return ",".join(f"{i}.{u}" for i, u in sorted(keep)) or "none"


def verify_and_swap(
    morphable: Morphable,
    batches: Sequence[Batch],
    keep: Sequence[Unit],
    granularity: Granularity,
    *,
    pinned: Iterable[Unit] = (),
    barred: Iterable[Unit] = (),
    min_full_per_layer: int = 0,
    max_rounds: int = 8,
    promise: Callable[[Iterable[Unit]], Callable[[Unit, Unit], float]] | None = None,
    tries: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[tuple[Unit, ...], dict[str, Any]]:
    """Improve a kept set by single swaps until none lowers the answer NLL; forward passes only.

    Every round tries kept units against replaced ones and takes the best swap: all pairs, or, with
    `tries`, the so many for which `promise(kept)(out, in)` is highest. `pinned` units stay kept,
    `barred` ones stay replaced, and no layer falls below `min_full_per_layer` kept units. Returns
    the set and what it took: NLL before and after, swaps taken, sets tried. It repairs rankings
    that miss chains and redundant layers.
    """
    start = time.perf_counter()
    width = morphable.geometry.units(granularity)
    kept, fixed, out = set(keep), set(pinned), set(barred)
    pool = [(i, u) for i in morphable.candidates for u in range(width) if (i, u) not in out]
    taken: list[dict[str, Any]] = []
    sweep = Sweep(morphable, batches, kept, granularity)
    first = best = sweep.base
    tried = 1
    for _ in range(max_rounds):
        ranked = promise(kept) if promise is not None else None
        swaps = _swaps(kept, fixed, pool, min_full_per_layer, ranked, tries)
        if not swaps:
            break
        values = sweep.means([kept - {a} | {b} for a, b in swaps])
        tried += len(swaps)
        value, (old, new) = min(zip(values, swaps))
        if value >= best - 1e-6:
            break
        best, kept = value, kept - {old} | {new}
        taken.append({"out": list(old), "in": list(new), "nll": best})
        if progress:
            progress(f"swap: {_name(old)} out, {_name(new)} in; answer NLL {best:.4f}")
        sweep = Sweep(morphable, batches, kept, granularity)
    return tuple(sorted(kept)), {
        "nll_before": first,
        "nll_after": best,
        "swaps": taken,
        "sets_tried": tried,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _swaps(
    kept: set[Unit],
    fixed: set[Unit],
    pool: Sequence[Unit],
    minimum: int,
    promise: Callable[[Unit, Unit], float] | None,
    tries: int | None,
) -> list[tuple[Unit, Unit]]:
    """Return the (out, in) pairs to try, most promising first where that is known."""
    in_layer = {i: sum(layer == i for layer, _ in kept) for i, _ in pool}
    found = [
        (old, new)
        for old in sorted(kept - fixed)
        for new in pool
        if new not in kept and (in_layer[old[0]] > minimum or new[0] == old[0])
    ]
    if promise is not None:
        found.sort(key=lambda swap: (-promise(*swap), swap))
    return found[:tries]


def _name(unit: Unit) -> str:
    return f"layer {unit[0]}" if unit[1] == 0 else f"layer {unit[0]} unit {unit[1]}"
