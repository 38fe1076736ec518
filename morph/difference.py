"""How far a tensor moved between two checkpoints: streamed in blocks, summed in float64. No torch.

Whether an entry changed is a question of its bytes; drift, cosine and the largest change are sums
over its values, in which an entry that is NaN or infinite on either side has no part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from morph.checkpoint._format import (
    BITS,
    NUMPY,
    Header,
    TensorInfo,
    identity,
    open_regular,
    read_at,
)
from morph.errors import CheckpointError, escape

if TYPE_CHECKING:  # numpy is loaded where the first block is read
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

ENTRIES = 1 << 16  # of a block: what it takes as float64 stays in the cache of a core
OPEN_FILES = 16
DIRECTIONS, PASSES = 8, 6  # of the block power iteration: 0.9 of the largest share, or more


class Folder(Protocol):
    """What is read here of a checkpoint: its place, and the headers of its shards."""

    @property
    def path(self) -> Path: ...

    @property
    def headers(self) -> Mapping[str, Header]: ...


@dataclass
class Sums:
    """What is known of two tensors, or of the same rows of two, after every block is added.

    `entries` were compared, `changed` of them differ in their bytes (in their values, where the
    dtypes differ). `a`, `b` and `change` are sums of squares, `product` is the inner product, and
    `largest` the largest change of an entry. `bad_a` and `bad_b` count NaN and infinity.
    """

    entries: int = 0
    changed: int = 0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    change: float = 0.0
    largest: float = 0.0
    bad_a: int = 0
    bad_b: int = 0
    numbers: bool = True  # False: a packed dtype, whose bytes are no numbers by themselves

    def add(self, other: Sums) -> None:
        """Count the entries of another place in as well."""
        for name in ("entries", "changed", "a", "b", "product", "change", "bad_a", "bad_b"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)
        self.numbers = self.numbers and other.numbers

    @property
    def drift(self) -> float | None:
        """||B-A|| / ||A||; None for packed dtypes, and where A is zero and B is not."""
        if not self.numbers:
            return None
        if self.change == 0:
            return 0.0
        return _finite(math.sqrt(self.change / self.a)) if self.a else None

    @property
    def cosine(self) -> float | None:
        """The cosine between A and B; None for packed dtypes, and where either is zero."""
        if not self.numbers or not self.a or not self.b:
            return None
        if self.change == 0:
            return 1.0
        found = _finite(self.product / math.sqrt(self.a) / math.sqrt(self.b))
        return None if found is None else max(-1.0, min(1.0, found))

    def told(self) -> dict[str, Any]:
        """Return what people ask for, fit for JSON."""
        return {
            "entries": self.entries,
            "entries_changed": self.changed,
            "share_changed": self.changed / self.entries if self.entries else 0.0,
            "drift": self.drift,
            "cosine": self.cosine,
            "max_abs_change": _finite(self.largest) if self.numbers else None,
            "norm_a": _finite(math.sqrt(self.a)) if self.numbers else None,
            "norm_b": _finite(math.sqrt(self.b)) if self.numbers else None,
            "nonfinite_a": self.bad_a,
            "nonfinite_b": self.bad_b,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # squares of float64 can overflow


class Reader:
    """Reads places of a checkpoint's shards; raises CheckpointError where one changes meanwhile."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._open:
            self._close(next(iter(self._open)), check=error is None)

    def read(self, info: TensorInfo, start: int, count: int) -> bytes:
        """Return `count` bytes of a tensor from byte `start` of it."""
        shard = info.file.name
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._close(next(iter(self._open)), check=True)
            self._open[shard] = open_regular(self._folder.path, shard)
            self._check(shard)
        return read_at(self._open[shard], info.start + start, count, info.file)

    def _close(self, shard: str, *, check: bool) -> None:
        try:
            if check:
                self._check(shard)
        finally:
            os.close(self._open.pop(shard))

    def _check(self, shard: str) -> None:
        if identity(self._open[shard]) != self._folder.headers[shard].identity:
            raise CheckpointError(
                f"{escape(self._folder.path / shard)} was changed since it was opened. Start again."
            )


def is_numeric(dtype: str) -> bool:
    """Return True where the bytes of a dtype are numbers: not for float8 and smaller."""
    return dtype in NUMPY and not dtype.startswith("F8")


def comparable(one: str, other: str) -> bool:
    """Return True where entries of two dtypes can be told equal or not."""
    real = all(is_numeric(d) and d != "C64" for d in (one, other))
    return one == other or real


class Scratch:
    """Where blocks become float64: memory that is asked for once, not for every block."""

    def __init__(self, entries: int = ENTRIES) -> None:
        import numpy as np

        self._wide = np.empty(entries, "<u4")
        self._places = np.empty((2, 2 * entries))  # complex entries take two

    def decode(self, dtype: str, data: bytes, place: int) -> np.ndarray:
        """Return the numbers of a numeric dtype, complex ones as pairs, in place 0 or 1."""
        import numpy as np

        if dtype == "BF16":
            stored = np.frombuffer(data, "<u2")
            wide = self._wide[: len(stored)]
            np.left_shift(stored, 16, out=wide, dtype="<u4")
            numbers = wide.view("<f4")
        else:
            numbers = np.frombuffer(data, "<f4" if dtype == "C64" else NUMPY[dtype])
        out = self._places[place, : len(numbers)]
        out[:] = numbers
        return out


def compare(
    a: Reader,
    b: Reader,
    first: TensorInfo,
    second: TensorInfo,
    segments: Iterable[tuple[int, int, int]],
    parts: int,
) -> list[Sums]:
    """Compare two tensors of one shape; return a `Sums` per part.

    `segments` are (first entry, last entry + 1, part) and cover the tensor. Holds two blocks of
    2^16 entries and what they are as float64.
    """
    found = [Sums() for _ in range(parts)]
    if not comparable(first.dtype, second.dtype):
        return [Sums(numbers=False) for _ in range(parts)]
    numbers = is_numeric(first.dtype)
    scratch = Scratch()
    whole = 8 if BITS[first.dtype] % 8 else 1  # entries of a sub-byte dtype share their bytes
    for start, stop, part in segments:
        for at in range(start, stop, ENTRIES * whole):
            count = min(ENTRIES * whole, stop - at)
            left = _bytes(a, first, at, count)
            right = _bytes(b, second, at, count)
            if numbers:
                found[part].add(_block(first.dtype, second.dtype, left, right, scratch))
            else:
                found[part].add(_packed(first.dtype, left, right, count))
    return found


def _bytes(reader: Reader, info: TensorInfo, at: int, count: int) -> bytes:
    bits = BITS[info.dtype]
    start, stop = at * bits // 8, -(-(at + count) * bits // 8)
    return reader.read(info, start, stop - start)


def _packed(dtype: str, left: bytes, right: bytes, count: int) -> Sums:
    """Compare bytes that hold no plain numbers; of entries below a byte, any in it changed."""
    import numpy as np

    differ = int(np.count_nonzero(np.frombuffer(left, "u1") != np.frombuffer(right, "u1")))
    changed = min(count, -(-differ * 8 // BITS[dtype])) if differ else 0
    return Sums(entries=count, changed=changed, numbers=False)


def _block(one: str, other: str, left: bytes, right: bytes, scratch: Scratch) -> Sums:
    """Compare a block of numbers."""
    import numpy as np

    with np.errstate(all="ignore"):  # float64 values may be too large to be squared
        x = scratch.decode(one, left, 0)
        if one == other and left == right:
            square = float(x @ x)
            bad = 0 if math.isfinite(square) else int(np.count_nonzero(~np.isfinite(x)))
            if bad:
                x = np.where(np.isfinite(x), x, 0.0)
                square = float(x @ x)
            entries = len(left) * 8 // BITS[one]
            return Sums(entries=entries, a=square, b=square, product=square, bad_a=bad, bad_b=bad)
        y = scratch.decode(other, right, 1)
        entries, changed = len(left) * 8 // BITS[one], _changed(one, other, left, right, x, y)
        bad_a = bad_b = 0
        a, b = float(x @ x), float(y @ y)
        if not math.isfinite(a + b):
            fine_x, fine_y = np.isfinite(x), np.isfinite(y)
            bad_a, bad_b = (int(np.count_nonzero(~fine)) for fine in (fine_x, fine_y))
            both = fine_x & fine_y
            x, y = np.where(both, x, 0.0), np.where(both, y, 0.0)
            a, b = float(x @ x), float(y @ y)
        product = float(x @ y)
        y -= x
        np.abs(y, out=y)
        return Sums(
            entries=entries,
            changed=changed,
            a=a,
            b=b,
            product=product,
            change=float(y @ y),
            largest=float(y.max(initial=0.0)),
            bad_a=bad_a,
            bad_b=bad_b,
        )


def _changed(one: str, other: str, left: bytes, right: bytes, x: Any, y: Any) -> int:
    """Count entries that differ: in their bytes, or, between dtypes, in their values."""
    import numpy as np

    if one == other:
        kind = f"<u{BITS[one] // 8}"
        return int(np.count_nonzero(np.frombuffer(left, kind) != np.frombuffer(right, kind)))
    return int(np.count_nonzero((x != y) & ~(np.isnan(x) & np.isnan(y))))


def segments_of(
    shape: Sequence[int], ranges: Sequence[Sequence[tuple[int, int]] | None]
) -> list[tuple[int, int, int]]:
    """Return (first entry, last entry + 1, part) for the rows of each part, in order of place."""
    row = math.prod(shape[1:])
    whole = shape[0] if shape else 1
    found = []
    for part, rows in enumerate(ranges):
        for start, stop in [(0, whole)] if rows is None else rows:
            found.append((start * row, stop * row, part))
    return sorted(found)


def top_direction(
    a: Reader,
    b: Reader,
    first: TensorInfo,
    second: TensorInfo,
    rows: Sequence[tuple[int, int]],
    change: float,
) -> float | None:
    """Return the share of ||B-A||^2 in its largest singular direction, for rows of a matrix.

    Block power iteration from a fixed start, streamed: `PASSES` readings, no copy of the matrix in
    memory. It comes from below: what is returned is at most the true share. `change` is ||B-A||^2.
    None where it is not a number above 0.
    """
    import numpy as np

    columns = first.shape[1]
    if not (change > 0 and math.isfinite(change)) or not columns:
        return None
    scale = 1 / math.sqrt(change)  # tiny changes would vanish when they are squared in float32

    step = max(1, ENTRIES // columns)
    scratch = Scratch(step * columns)
    narrow = np.empty(step * columns, np.float32)

    def blocks() -> Iterator[np.ndarray]:
        for start, stop in rows:
            for at in range(start, stop, step):
                place = at * columns, min(step, stop - at) * columns
                x = scratch.decode(first.dtype, _bytes(a, first, *place), 0)
                y = scratch.decode(second.dtype, _bytes(b, second, *place), 1)
                y -= x
                np.multiply(y, scale, out=narrow[: len(y)], casting="same_kind")
                yield narrow[: len(y)].reshape(-1, columns)

    return _largest_share(blocks, columns)


def _largest_share(blocks: Callable[[], Iterator[np.ndarray]], columns: int) -> float | None:
    import numpy as np

    start = np.random.default_rng(0).standard_normal((columns, min(DIRECTIONS, columns)))
    basis, share = np.linalg.qr(start)[0], 0.0
    for _ in range(PASSES):
        image = np.zeros_like(basis)
        narrow = basis.astype(np.float32)
        for block in blocks():
            image += block.T @ (block @ narrow)
        if not np.isfinite(image).all():
            return None
        projected = basis.T @ image
        share = float(np.linalg.eigvalsh((projected + projected.T) / 2)[-1])
        basis = np.linalg.qr(image)[0]
    return max(0.0, min(1.0, share))
