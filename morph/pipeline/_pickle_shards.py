"""Safetensors files whose bytes lie in files of torch.save: in runs, or to be put in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from morph.checkpoint import Staging
from morph.checkpoint._copying import Meter
from morph.checkpoint._format import BITS, MAX_HEADER, MIB, encode_header, read_at
from morph.errors import CheckpointError, escape
from morph.pipeline._torch_files import TorchFile
from morph.pipeline._unpickling import Stored

if TYPE_CHECKING:
    import numpy as np

BLOCK, WINDOW = 24 * MIB, 8 * MIB  # of a tensor that is put in order: written, read at a time


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file: its name, its header, its tensors in order, and the file they are from."""

    name: str
    source: TorchFile
    tensors: tuple[Stored, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def make_shard(name: str, file: TorchFile, tensors: Sequence[Stored]) -> Shard:
    """Return the output file of these tensors; raise CheckpointError for a header too large."""
    # widest types first keeps every tensor aligned to its own size; otherwise the file's order
    ordered = sorted(tensors, key=lambda t: (-BITS[t.dtype], t.start, t.name))
    at, entries = 0, {}
    for tensor in ordered:
        entries[tensor.name] = (tensor.dtype, tensor.shape, at, at + tensor.nbytes)
        at += tensor.nbytes
    header = encode_header(entries)
    if len(header) - 8 > MAX_HEADER:
        raise CheckpointError(
            f"{escape(file.path)} holds {len(tensors)} tensors: their names take {len(header)} "
            f"bytes, and a header may have {MAX_HEADER}."
        )
    return Shard(name=name, source=file, tensors=tuple(ordered), header=header)


def write_shard(stage: Staging, shard: Shard, meter: Meter) -> None:
    """Write header and data; tensors that follow each other in the file are copied as one."""
    if stage.reuse(shard.name, shard.nbytes):
        meter.add(shard.nbytes)
        return
    source = shard.source
    with stage.create(shard.name) as target:
        target.reserve(shard.nbytes)
        target.append(shard.header)
        meter.add(len(shard.header))
        for start, count, tensor in _runs(shard.tensors):
            if tensor is None:
                target.copy(source.fd, source.path, start, count, meter.add)
                continue
            for block in in_order(source, tensor):
                target.append(block)
                meter.add(len(block))


def _runs(tensors: Sequence[Stored]) -> Iterator[tuple[int, int, Stored | None]]:
    """Yield (place, bytes, None) of what is copied as it lies, or a tensor that needs an order."""
    start = stop = 0
    for tensor in tensors:
        if tensor.contiguous and tensor.start == stop and stop > start:
            stop += tensor.nbytes
            continue
        if stop > start:
            yield start, stop - start, None
        start = stop = 0
        if not tensor.contiguous:
            yield tensor.start, tensor.nbytes, tensor
        elif tensor.nbytes:
            start, stop = tensor.start, tensor.start + tensor.nbytes
    if stop > start:
        yield start, stop - start, None


@dataclass(frozen=True)
class _View:
    """A part of a tensor in its file: place of the first element, sizes, steps in bytes."""

    start: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        found = 1
        for n in self.shape:
            found *= n
        return found

    @property
    def spans(self) -> list[int]:
        """How far apart the first and the last element lie, along each axis."""
        return [(n - 1) * step for n, step in zip(self.shape, self.steps)]

    def halves(self, axis: int) -> Iterator[tuple[slice, _View]]:
        """Yield both halves along an axis, and where they lie in the whole."""
        middle, end = self.shape[axis] // 2, self.shape[axis]
        for low, high in ((0, middle), (middle, end)):
            shape = (*self.shape[:axis], high - low, *self.shape[axis + 1 :])
            yield slice(low, high), _View(self.start + low * self.steps[axis], shape, self.steps)


def in_order(source: TorchFile, tensor: Stored) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the order of its elements, a block at a time.

    Memory is bounded by `BLOCK` and `WINDOW`; what lies scattered is read once for every block.
    """
    import numpy as np

    kind = np.dtype(f"V{tensor.width}")
    steps = tuple(step * tensor.width for step in tensor.stride)
    for part in _parts(_View(tensor.start, tensor.shape, steps), BLOCK // tensor.width):
        block = np.empty(part.shape, kind)
        _fill(block, part, source)
        yield memoryview(block.reshape(-1).view(np.uint8))


def _parts(view: _View, most: int) -> Iterator[_View]:
    """Yield parts in the order of their elements, of at most so many each."""
    if view.size <= most:
        yield view
        return
    axis = next(i for i, size in enumerate(view.shape) if size > 1)
    for _, half in view.halves(axis):
        yield from _parts(half, most)


def _fill(block: np.ndarray[Any, Any], view: _View, source: TorchFile) -> None:
    """Read a part of a tensor into `block`, through windows of the file that are small enough."""
    import numpy as np

    spans = view.spans
    if sum(spans) <= WINDOW:
        data = read_at(source.fd, view.start, sum(spans) + block.itemsize, source.path)
        block[...] = np.ndarray(view.shape, block.dtype, data, 0, view.steps)
        return
    axis = spans.index(max(spans))
    for where, half in view.halves(axis):
        _fill(block[(slice(None),) * axis + (where,)], half, source)
