"""The splices that make OUT of POST: bytes of PRE, or what a method computes when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from morph.checkpoint import Checkpoint, Splice, TensorInfo, Weights, from_float, to_float
from morph.errors import VerificationFailed, escape
from morph.layouts import Reading
from morph.restore._numbers import widened
from morph.restore._options import Options
from morph.restore._pair import Files, Place, row_bytes, rows_of
from morph.restore._select import Span, head_spans

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 20  # bytes of POST that are computed at a time, where rows are independent
PLAIN = {"exact": "bytes of PRE", "ridge": "morph's own ridge", "interpolate": "interpolated"}


def rule(place: Place, options: Options) -> str:
    """Return how the rows of a part are made, in the words of the record."""
    if options.is_exact or (options.method == "ridge" and not _blended(place)):
        if place.pre.dtype != place.post.dtype:
            return f"numbers of PRE, {place.pre.dtype} as {place.post.dtype}"
        return PLAIN["exact"]
    return PLAIN[options.method]


def _blended(place: Place) -> bool:
    """Whether ridge computes these rows; all others come back outright."""
    return place.part.role == "q" and not place.part.bias


def splices(
    pre: Checkpoint, post: Weights, reading: Reading, places: Sequence[Place], options: Options
) -> list[Splice]:
    """Return the splices for all places, in the order of files and bytes."""
    found: list[Splice] = []
    for place in places:
        how = rule(place, options)
        if how == PLAIN["exact"]:
            found += [_copied(a, b) for a, b in place.runs()]
        elif how == PLAIN["ridge"]:
            found += _Ridge(pre, post, reading, place, places, float(options.rho or 0)).splices()
        else:
            found += _computed(pre, post, place, options)
    return _ordered(found)


def _copied(a: TensorInfo, b: TensorInfo) -> Splice:
    return Splice(b.file.name, b.start, b.stop, a)


def _ordered(found: Iterable[Splice]) -> list[Splice]:
    """Return splices in order, those that continue each other on both sides made one."""
    ordered: list[Splice] = []
    for splice in sorted(found, key=lambda s: (s.shard, s.start)):
        joined = _joined(ordered[-1], splice) if ordered else None
        if joined is not None:
            ordered[-1] = joined
        else:
            ordered.append(splice)
    return ordered


def _joined(one: Splice, other: Splice) -> Splice | None:
    """Return two splices as one where they are neighbours here and there, else None."""
    a, b = one.data, other.data
    if not (isinstance(a, TensorInfo) and isinstance(b, TensorInfo)):
        return None
    here = (one.shard, one.stop) == (other.shard, other.start)
    if not here or (a.file, a.stop) != (b.file, b.start):
        return None
    place = replace(a, dtype="U8", shape=(b.stop - a.start,), stop=b.stop)
    return Splice(one.shard, one.start, other.stop, place)


def _computed(pre: Checkpoint, post: Weights, place: Place, options: Options) -> list[Splice]:
    """Return splices of rows that are widened or interpolated, a few MiB each."""
    alpha = None if options.is_exact else options.alpha
    step = max(1, BLOCK // max(1, row_bytes(place.post)))
    found = []
    for start, stop in place.part.spans:
        for first in range(start, stop, step):
            span = (first, min(stop, first + step))
            a, b = rows_of(place.pre, span), rows_of(place.post, span)
            made = _made(pre, post, a, b, alpha, place.part.tensor)
            found.append(Splice(b.file.name, b.start, b.stop, made))
    return found


def _made(
    pre: Checkpoint, post: Weights, a: TensorInfo, b: TensorInfo, alpha: float | None, name: str
) -> Callable[[], bytes]:
    def make() -> bytes:
        with Files(pre, post) as files:
            if alpha is None:
                return widened(a.dtype, files.read(a))
            from morph.restore._maths import interpolate

            old, new = numbers(files, a), numbers(files, b)
            return stored(b.dtype, interpolate(old, new, alpha), name)

    return make


def numbers(files: Files, *places: TensorInfo) -> np.ndarray:
    """Return rows, those of all places below each other, as float32 (float64 stays)."""
    import numpy as np

    from morph.checkpoint._format import NUMPY

    found = [
        to_float(p.dtype, np.frombuffer(files.read(p), NUMPY[p.dtype])).reshape(p.shape)
        for p in places
    ]
    return found[0] if len(found) == 1 else np.concatenate(found)


def stored(dtype: str, values: np.ndarray, name: str) -> bytes:
    """Return numbers in a stored type, rounded once; raise VerificationFailed on overflow."""
    import numpy as np

    found = from_float(dtype, values)
    if dtype == "F16" and np.isinf(found).any() and np.isfinite(values).all():
        raise VerificationFailed(
            f"'{escape(name, 120)}': a computed value exceeds float16. Use --method exact, or save "
            "both checkpoints in bfloat16. Nothing was written."
        )
    return found.tobytes()


class _Ridge:
    """The ridge blend of one layer's queries, one query head at a time."""

    def __init__(
        self,
        pre: Checkpoint,
        post: Weights,
        reading: Reading,
        place: Place,
        places: Sequence[Place],
        rho: float,
    ) -> None:
        layer = place.part.layer
        self.folders, self.place, self.rho = (pre, post), place, rho
        shapes = {name: post.tensors[name].shape for name in self._tensors(reading, layer)}
        _, self.q, self.shape = head_spans(reading, layer, "q", shapes)
        _, self.k, _ = head_spans(reading, layer, "k", shapes)
        keys = [
            p for p in places if (p.part.layer, p.part.role, p.part.bias) == (layer, "k", False)
        ]
        self.keys = keys[0].pre
        self._projector: tuple[int, np.ndarray] | None = None

    @staticmethod
    def _tensors(reading: Reading, layer: int) -> set[str]:
        return {r.tensor for r in reading.rows if r.layer == layer and r.role in ("q", "k")}

    def splices(self) -> list[Splice]:
        """Return one splice for every run of rows of every head that is restored."""
        found = []
        for head, spans in enumerate(self.q):
            at = 0
            for span in spans:
                if any(a <= span[0] and span[1] <= b for a, b in self.place.part.spans):
                    b = rows_of(self.place.post, span)
                    rows = (at, at + span[1] - span[0])
                    made = self._rows(head, rows)
                    found.append(Splice(b.file.name, b.start, b.stop, made))
                at += span[1] - span[0]
        return found

    def _rows(self, head: int, rows: Span) -> Callable[[], bytes]:
        def make() -> bytes:
            from morph.restore._maths import blended

            with Files(*self.folders) as files:
                old = numbers(files, *(rows_of(self.place.pre, s) for s in self.q[head]))
                new = numbers(files, *(rows_of(self.place.post, s) for s in self.q[head]))
                blend = self._blend(files, head // self.shape.group_size)
            made = blended(old, new, blend)
            return stored(self.place.post.dtype, made[slice(*rows)], self.place.part.tensor)

        return make

    def _blend(self, files: Files, kv: int) -> np.ndarray:
        """Return P of a KV head; its query heads follow each other, so the last is kept."""
        if self._projector is None or self._projector[0] != kv:
            from morph.restore._maths import projector

            keys = numbers(files, *(rows_of(self.keys, s) for s in self.k[kv]))
            self._projector = kv, projector(keys, self.rho, self.shape.rotary)
        return self._projector[1]
