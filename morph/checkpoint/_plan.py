"""What goes where in a checkpoint that is about to be written: every tensor accounted for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from morph.checkpoint._format import (
    BITS,
    NUMPY,
    TensorInfo,
    byte_size,
    dtype_code,
    encode_header,
    natural,
)
from morph.checkpoint._read import Checkpoint
from morph.checkpoint._weights import from_float, to_float
from morph.errors import CheckpointError, escape, nearest

if TYPE_CHECKING:  # loaded where arrays are at hand, so that `morph inspect` starts fast
    import numpy as np


class MoveLike(Protocol):
    """What `morph.families._family.Move` offers."""

    @property
    def target(self) -> str: ...
    @property
    def source(self) -> str | None: ...
    @property
    def rows(self) -> tuple[int, int] | None: ...
    @property
    def shape(self) -> tuple[int, ...] | None: ...
    @property
    def fill(self) -> float: ...
    @property
    def sources(self) -> tuple[str, ...]: ...
    @property
    def make(self) -> Callable[[list[np.ndarray]], np.ndarray] | None: ...
    @property
    def exact(self) -> bool: ...


# bytes, an array (bfloat16 as uint16), a place in another file, or a function that gives bytes
Data: TypeAlias = "bytes | memoryview | np.ndarray | TensorInfo | Callable[[], Any]"
NewTensor = tuple[str, Sequence[int], Data]


@dataclass(frozen=True)
class Piece:
    """One tensor of the output: its name, type, shape, and where its bytes come from.

    `origin` is the source tensor whose bytes are kept, None where the bytes are new or replaced.
    """

    target: str
    dtype: str
    shape: tuple[int, ...]
    data: Data
    origin: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return byte_size(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header, and its pieces in the order of their data."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(p.nbytes for p in self.pieces)


def plan_shards(
    source: Checkpoint,
    moves: Sequence[MoveLike] | None,
    new_tensors: Mapping[str, NewTensor],
    replaced: Mapping[str, NewTensor],
    dropped: Mapping[str, str],
    max_shard_bytes: int,
    given: Mapping[str, NewTensor] | None = None,
) -> tuple[Shard, ...]:
    """Return the output files: one per source shard, and the new tensors in or after the last.

    `given` are values, in memory, that the moves read instead of the checkpoint's, or that it does
    not have. Raises CheckpointError for a source tensor that is neither copied, replaced nor
    dropped by name, and for moves, replacements or new tensors that contradict each other or the
    source.
    """
    inputs = _Inputs(source, given or {})
    homes = {shard: i for i, shard in enumerate(source.shards)}
    groups: list[list[tuple[tuple[int, int], Piece]]] = [[] for _ in homes]
    loose: list[Piece] = []
    targets: dict[str, Piece] = {}
    for move in _moves(inputs, moves, dropped):
        if move.target in targets:
            raise CheckpointError(f"two moves make tensor '{escape(move.target)}'.")
        piece = _moved(inputs, move)
        if move.target in replaced:
            piece = _replacement(piece, replaced[move.target])
        targets[move.target] = piece
        stored = [source.tensors[n] for n in _reads(move) if n in source.tensors]
        if stored:
            order = (stored[0].start, (move.rows or (0, 0))[0])
            groups[homes[stored[0].file.name]].append((order, piece))
        else:
            loose.append(piece)
    _check_names(targets, new_tensors, replaced)
    loose += [_given(n, *new_tensors[n]) for n in sorted(new_tensors)]
    shards = [[p for _, p in sorted(g, key=lambda e: (e[0], e[1].target))] for g in groups]
    shards = [s for s in shards if s]
    for piece in sorted(loose, key=lambda p: natural(p.target)):
        if not shards or sum(p.nbytes for p in shards[-1]) + piece.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(piece)
    if not shards:
        raise CheckpointError("the output would hold no tensors.")
    return tuple(
        _shard(_shard_name(i, len(shards)), pieces) for i, pieces in enumerate(shards, start=1)
    )


def kept_pieces(
    source: Checkpoint, moves: Sequence[MoveLike] | None, dropped: Mapping[str, str]
) -> list[Piece]:
    """Return the pieces whose bytes the moves take from the source as they are."""
    if moves is None:
        moves = [_Same(n, n) for n in source.tensors if n not in dropped]
    inputs = _Inputs(source, {})
    return [_moved(inputs, m) for m in moves if m.make is None and m.source in source.tensors]


class _Inputs:
    """What moves read: the source checkpoint, and values given in place of its own or beside."""

    def __init__(self, source: Checkpoint, given: Mapping[str, NewTensor]) -> None:
        self.source, self.given = source, {n: _given(n, *given[n]) for n in given}
        for name, piece in self.given.items():
            if callable(piece.data) or isinstance(piece.data, TensorInfo):
                raise CheckpointError(f"tensor '{escape(name)}' is given, but not in memory.")
            if name in source.tensors and source.tensors[name].shape != piece.shape:
                raise CheckpointError(
                    f"tensor '{escape(name)}' is given with shape {list(piece.shape)}; the source "
                    f"has {list(source.tensors[name].shape)}."
                )

    @property
    def names(self) -> list[str]:
        """All tensors that must go somewhere: the source's, then the given ones beside."""
        return [*self.source.tensors, *(n for n in self.given if n not in self.source.tensors)]

    def about(self, name: str) -> Piece | TensorInfo:
        """Return a tensor's dtype and shape; raise CheckpointError where there is none."""
        return self.given[name] if name in self.given else self.source.info(name)

    def values(self, name: str) -> np.ndarray:
        """Return a tensor as float32 (float64 stays)."""
        import numpy as np

        if name not in self.given:
            return self.source.read_float(name)
        piece = self.given[name]
        flat = np.frombuffer(_held(piece), NUMPY[piece.dtype])
        return to_float(piece.dtype, flat.reshape(piece.shape))


def _held(piece: Piece) -> memoryview:
    """Return the bytes of a piece that is in memory."""
    import numpy as np

    data: Any = piece.data
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return memoryview(data).cast("B")


@dataclass(frozen=True)
class _Same:
    """The move that keeps a tensor as it is."""

    target: str
    source: str | None
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    fill: float = 0.0
    sources: tuple[str, ...] = ()
    make: None = None
    exact: bool = False


def _reads(move: MoveLike) -> tuple[str, ...]:
    """Return the names of the tensors that a move takes values from."""
    if move.make is not None:
        return move.sources
    return () if move.source is None else (move.source,)


def _moves(
    inputs: _Inputs, moves: Sequence[MoveLike] | None, dropped: Mapping[str, str]
) -> Sequence[MoveLike]:
    """Return the moves, after checking that they and `dropped` account for every tensor."""
    for name, reason in dropped.items():
        inputs.about(name)
        if not reason:
            raise CheckpointError(f"tensor '{escape(name)}' is dropped without a reason.")
    if moves is None:
        return [_Same(n, n) for n in inputs.names if n not in dropped]
    covered: dict[str, list[tuple[int, int]]] = {}
    for move in moves:
        for name in _reads(move):
            shape = inputs.about(name).shape
            whole = (0, shape[0] if shape else 1)
            rows = move.rows if move.make is None and move.rows else whole
            covered.setdefault(name, []).append(rows)
    both = sorted(set(covered) & set(dropped))
    if both:
        raise CheckpointError(f"tensor '{escape(both[0])}' is both moved and dropped.")
    lost = [n for n in inputs.names if n not in covered and n not in dropped]
    if lost:
        shown = ", ".join(escape(n, 80) for n in lost[:3])
        raise CheckpointError(
            f"{len(lost)} source tensors are neither copied, replaced nor dropped by name: {shown}"
            f"{', …' if len(lost) > 3 else ''}."
        )
    for name, ranges in covered.items():
        shape = inputs.about(name).shape
        at = 0
        for start, stop in sorted(ranges):
            if start > at:
                break
            at = max(at, stop)
        if at < (shape[0] if shape else 1):
            raise CheckpointError(f"no move copies row {at} of source tensor '{escape(name)}'.")
    return moves


def _moved(inputs: _Inputs, move: MoveLike) -> Piece:
    target = _new_name(move.target)
    if move.make is not None:
        return _computed(inputs, target, move)
    if move.source is None:
        if move.shape is None:
            raise CheckpointError(f"tensor '{escape(target)}': a new constant needs a shape.")
        dtype, shape = inputs.source.main_dtype, tuple(move.shape)
        return Piece(target, dtype, shape, _constant(dtype, prod(shape), move.fill))
    info = inputs.about(move.source)
    shape, start, stop = info.shape, 0, info.nbytes
    if move.rows is not None:
        first, last = move.rows
        if not info.shape or not 0 <= first <= last <= info.shape[0]:
            raise CheckpointError(
                f"tensor '{escape(target)}': rows {first}:{last} are not in "
                f"'{escape(move.source)}' of shape {list(info.shape)}."
            )
        row_bits = prod(info.shape[1:]) * BITS[info.dtype]
        shape = (last - first, *info.shape[1:])
        start, stop = first * row_bits // 8, last * row_bits // 8
    if move.shape is not None:
        if prod(move.shape) != prod(shape):
            raise CheckpointError(
                f"tensor '{escape(target)}': {list(shape)} of '{escape(move.source)}' cannot have "
                f"the shape {list(move.shape)}."
            )
        shape = tuple(move.shape)
    if isinstance(info, Piece):
        return Piece(target, info.dtype, shape, _held(info)[start:stop])
    place = TensorInfo(info.dtype, shape, info.file, info.start + start, info.start + stop)
    return Piece(target, info.dtype, shape, place, move.source)


def _computed(inputs: _Inputs, target: str, move: MoveLike) -> Piece:
    """Return a tensor that is computed when it is written, so that one at a time is in memory."""
    make, sources = move.make, move.sources
    assert make is not None
    if move.shape is None or not sources:
        raise CheckpointError(f"tensor '{escape(target)}': to compute it, give sources and shape.")
    shape, dtype = tuple(move.shape), inputs.about(sources[0]).dtype
    if dtype not in ("BF16", "F16", "F32", "F64"):
        raise CheckpointError(f"tensor '{escape(target)}': cannot compute in {dtype}.")

    def values() -> np.ndarray:
        found = make([inputs.values(name) for name in sources])
        if found.shape != shape:
            raise CheckpointError(
                f"tensor '{escape(target)}' was computed with shape {list(found.shape)}, not "
                f"{list(shape)}."
            )
        return found

    if move.exact and BITS[dtype] == 16:
        found = values()
        if (to_float(dtype, from_float(dtype, found)) != found).any():
            dtype = "F32"
    return Piece(target, dtype, shape, lambda: from_float(dtype, values()))


def _replacement(old: Piece, new: NewTensor) -> Piece:
    piece = _given(old.target, *new)
    if piece.shape != old.shape:
        raise CheckpointError(
            f"tensor '{escape(old.target)}' is replaced by shape {list(piece.shape)}; it has "
            f"{list(old.shape)}."
        )
    return piece


def _given(name: str, dtype: str, shape: Sequence[int], data: Data) -> Piece:
    """Return a piece of caller's data, after checking that type, shape and size agree."""
    import numpy as np

    code, sizes = dtype_code(dtype), tuple(int(n) for n in shape)
    piece = Piece(_new_name(name), code, sizes, data)
    if isinstance(data, np.ndarray) and np.dtype(NUMPY.get(code, "V1")) != data.dtype:
        raise CheckpointError(f"tensor '{escape(name)}': an array of {data.dtype} is no {code}.")
    if callable(data):
        return piece
    size = data.nbytes if isinstance(data, (np.ndarray, memoryview, TensorInfo)) else len(data)
    if size != piece.nbytes:
        raise CheckpointError(
            f"tensor '{escape(name)}': {code} {list(sizes)} takes {piece.nbytes} bytes, got {size}."
        )
    return piece


def _new_name(name: str) -> str:
    if not name or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(f"'{escape(name)}' is no tensor name.")
    return name


def _check_names(
    targets: Mapping[str, Piece],
    new_tensors: Mapping[str, NewTensor],
    replaced: Mapping[str, NewTensor],
) -> None:
    for name in replaced:
        if name not in targets:
            raise CheckpointError(
                f"tensor '{escape(name)}' is to be replaced, but the output has none of that name."
                f"{nearest(name, targets)}"
            )
    for name in new_tensors:
        if name in targets:
            raise CheckpointError(f"new tensor '{escape(name)}' exists already.")


def _constant(dtype: str, count: int, fill: float) -> Callable[[], bytes]:
    """Return a function that gives `count` elements of value `fill`."""
    if dtype == "BF16":
        bits = struct.unpack("<I", struct.pack("<f", fill))[0]
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
        one = struct.pack("<H", rounded)
    else:
        import numpy as np

        one = np.asarray(fill).astype(NUMPY[dtype]).tobytes()
    return lambda: one * count


def _shard(name: str, pieces: Sequence[Piece]) -> Shard:
    # widest types first keeps every tensor aligned to its own size; otherwise the source's order
    ordered = sorted(pieces, key=lambda p: -BITS[p.dtype])
    at, entries = 0, {}
    for piece in ordered:
        entries[piece.target] = (piece.dtype, piece.shape, at, at + piece.nbytes)
        at += piece.nbytes
    return Shard(name, encode_header(entries), tuple(ordered))


def _shard_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{count:05d}.safetensors"
