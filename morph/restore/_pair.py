"""The two checkpoints, and where each restored row lies in both of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

from morph.checkpoint import Checkpoint, TensorInfo, Weights
from morph.checkpoint._format import BITS, Header, identity, open_regular, read_at
from morph.errors import CheckpointError, MismatchError, escape, nearest
from morph.layouts import PREFIXES
from morph.restore._select import Part, Span

OPEN_FILES = 16


@dataclass(frozen=True, kw_only=True)
class Place:
    """A part with its tensor in POST and in PRE."""

    part: Part
    post: TensorInfo
    pre: TensorInfo
    source: str  # its name in PRE

    @property
    def nbytes(self) -> int:
        """Bytes of POST that are replaced."""
        return self.part.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in POST."""
        return row_bytes(self.post)

    def runs(self) -> Iterator[tuple[TensorInfo, TensorInfo]]:
        """Yield the places (PRE, POST) of each run of rows."""
        for span in self.part.spans:
            yield rows_of(self.pre, span), rows_of(self.post, span)


def row_bytes(info: TensorInfo) -> int:
    """Return the bytes of one row of dimension 0."""
    return prod(info.shape[1:]) * BITS[info.dtype] // 8


def rows_of(info: TensorInfo, span: Span) -> TensorInfo:
    """Return the place of some rows of a tensor; they are contiguous."""
    size = row_bytes(info)
    start, stop = span
    shape = (stop - start, *info.shape[1:])
    first = info.start + start * size
    return TensorInfo(info.dtype, shape, info.file, first, info.start + stop * size)


def place(pre: Checkpoint, post: Weights, parts: list[Part]) -> tuple[list[Place], list[str]]:
    """Return where each part lies in both checkpoints, and notes on names that differ.

    A name that PRE lacks is looked for under the other prefixes that decoders have. Raises
    MismatchError where PRE has no such tensor, CheckpointError where its shard is not here.
    """
    finder, found, renamed = _Finder(pre), [], []
    for part in parts:
        name = finder.name(part.tensor)
        if name != part.tensor:
            renamed.append((name, part.tensor))
        place = Place(part=part, post=post.info(part.tensor), pre=pre.info(name), source=name)
        found.append(place)
    notes = []
    if renamed:
        a, b = renamed[0]
        notes.append(
            f"{len(renamed)} tensors have other names in PRE, such as {escape(a, 80)} for "
            f"{escape(b, 80)}: they were matched by what follows the prefix."
        )
    return found, notes


class _Finder:
    """Names of PRE's tensors, without the prefix in which wrappers and versions differ."""

    def __init__(self, pre: Checkpoint) -> None:
        self.pre, self.names = pre, {*pre.tensors, *pre.absent}
        self.known: dict[str, list[str]] = {}
        for name in sorted(self.names):
            self.known.setdefault(core(name), []).append(name)

    def name(self, wanted: str) -> str:
        """Return PRE's name of a tensor of POST."""
        if wanted in self.names:
            return wanted
        found = self.known.get(core(wanted), [])
        if len(found) == 1:
            return found[0]
        where = f"PRE ({escape(self.pre.path.name, 80)})"
        if found:
            raise MismatchError(
                f"{where} has no tensor '{escape(wanted)}', and {len(found)} that could be meant: "
                f"{', '.join(escape(n, 80) for n in found[:3])}. Nothing was written."
            )
        hint = nearest(wanted, self.names)
        raise MismatchError(
            f"{where} has no tensor '{escape(wanted)}', which POST has.{hint} PRE must be the same "
            "architecture, saved in the same form; a LoRA adapter goes last, as POST. Nothing was "
            "written."
        )


def core(name: str) -> str:
    """Return a tensor's name without what stands before the decoder's layers."""
    head, mark, rest = name.partition("layers.")
    return f"layers.{rest}" if mark and head in PREFIXES else name


class Files:
    """Reads of places in files whose headers were checked; few files are open at a time."""

    def __init__(self, *folders: Weights) -> None:
        self._headers: dict[Path, Header] = {
            w.path / name: header for w in folders for name, header in w.headers.items()
        }
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, place: TensorInfo, start: int = 0, count: int | None = None) -> bytes:
        """Return `count` bytes of a place (None: the rest), from its byte `start` on.

        Raises CheckpointError where the file was changed since its header was read.
        """
        stop = place.nbytes if count is None else min(place.nbytes, start + count)
        return read_at(self._fd(place.file), place.start + start, stop - start, place.file)

    def blocks(self, place: TensorInfo, size: int) -> Iterator[bytes]:
        """Yield the bytes of a place in blocks of `size`."""
        for at in range(0, place.nbytes, size):
            yield self.read(place, at, size)

    def _fd(self, path: Path) -> int:
        if path not in self._open:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            fd = open_regular(path.parent, path.name)
            self._open[path] = fd
            if identity(fd) != self._headers[path].identity:
                raise CheckpointError(
                    f"{escape(path)} was changed since it was opened. Start again."
                )
        return self._open[path]
