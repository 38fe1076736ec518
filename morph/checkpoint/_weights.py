"""The checked safetensors files of a folder, and their tensors as bytes or arrays. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from morph.checkpoint._folder import (
    ADAPTER,
    Shards,
    collect_tensors,
    find_folder,
    find_shards,
    side_files,
)
from morph.checkpoint._format import (
    MIB,
    NUMPY,
    Header,
    TensorInfo,
    identity,
    open_regular,
    read_at,
    read_header,
)
from morph.errors import CheckpointError, escape, nearest

if TYPE_CHECKING:  # loaded where arrays are read, so that `morph inspect` starts fast
    import numpy as np

BLOCK = 4 * MIB


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """The safetensors files of a folder, every header checked: a model's, or a LoRA adapter's.

    `tensors` maps names to `TensorInfo`. `index` is the name of the index in use, or "". `absent`
    maps names of tensors to shards that the index names and that are not here (`partial` only).
    `other_files` are relative names of side files that a copy takes along, config.json and the
    index apart; `ignored_files` those it never does. `notes` are for the user.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    index: str
    absent: Mapping[str, str]
    other_files: tuple[str, ...]
    ignored_files: tuple[str, ...]
    notes: tuple[str, ...]
    headers: Mapping[str, Header] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, partial: bool = False) -> Weights:
        """Open `path`; a config is not asked for. `partial` allows shards that are not here.

        Raises CheckpointError naming file and tensor. Reads headers only.
        """
        folder = find_folder(path)
        return read_weights(folder, find_shards(folder, partial=partial, adapters=True))

    @property
    def is_adapter(self) -> bool:
        """Whether these are the weights of a LoRA adapter."""
        return self.shards == (ADAPTER,)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes per safetensors dtype."""
        found: dict[str, int] = {}
        for info in self.tensors.values():
            found[info.dtype] = found.get(info.dtype, 0) + info.nbytes
        return dict(sorted(found.items()))

    @property
    def main_dtype(self) -> str:
        """The dtype that holds most bytes; the first by name where two hold the same."""
        return max(self.dtypes.items(), key=lambda item: item[1], default=("F32", 0))[0]

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; raise CheckpointError with its shard or the nearest name."""
        if name in self.absent:
            raise CheckpointError(
                f"{escape(self.path)}: tensor '{escape(name)}' is in {escape(self.absent[name])}, "
                "which is not here. Download that file too."
            )
        if name not in self.tensors:
            hint = nearest(name, self.tensors)
            raise CheckpointError(f"{escape(self.path)} has no tensor '{escape(name)}'.{hint}")
        return self.tensors[name]

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[bytes]:
        """Yield the bytes of a tensor in blocks of `size`."""
        info = self.info(name)
        with self._file(info.file.name) as fd:
            for at in range(info.start, info.stop, size):
                yield read_at(fd, at, min(size, info.stop - at), info.file)

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        return b"".join(self.blocks(name, 64 * MIB))

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only array; bfloat16 and float8 come as unsigned integers."""
        import numpy as np

        info = self.info(name)
        if info.dtype not in NUMPY:
            raise CheckpointError(f"{escape(name)}: {info.dtype} has no array form.")
        return np.frombuffer(self.read_bytes(name), NUMPY[info.dtype]).reshape(info.shape)

    def read_float(self, name: str) -> np.ndarray:
        """Return a tensor as float32 (float64 stays)."""
        return to_float(self.info(name).dtype, self.read(name))

    def sha256(self, name: str) -> str:
        """Return the sha256 of a tensor's bytes."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def nonfinite(self) -> list[str]:
        """Return the names of the tensors that hold NaN or infinity; reads every weight once."""
        return [name for name in self.tensors if self._is_nonfinite(name)]

    def _is_nonfinite(self, name: str) -> bool:
        import numpy as np

        dtype = self.tensors[name].dtype
        masks = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF << 52}
        masks |= {"C64": 0x7F800000, "F8_E5M2": 0x7C}
        if dtype not in masks:
            return False
        kind = {0x7C: "u1", 0x7F80: "<u2", 0x7C00: "<u2", 0x7F800000: "<u4"}.get(
            masks[dtype], "<u8"
        )
        mask = np.array(masks[dtype], kind)
        return any(
            bool(((np.frombuffer(block, kind) & mask) == mask).any()) for block in self.blocks(name)
        )

    @contextmanager
    def _file(self, shard: str) -> Iterator[int]:
        fd = open_regular(self.path, shard)
        try:
            if identity(fd) != self.headers[shard].identity:
                raise CheckpointError(
                    f"{escape(self.path / shard)} was changed since it was opened. Start again."
                )
            yield fd
        finally:
            os.close(fd)


def read_weights(folder: Path, found: Shards) -> Weights:
    """Return the weights in the shards that `find_shards` found; raise CheckpointError."""
    headers = {name: read_header(folder, name) for name in found.names}
    tensors, absent = collect_tensors(folder, headers, found)
    other, ignored = side_files(folder, set(found.names))
    notes, nbytes = found.notes, sum(info.nbytes for info in tensors.values())
    if not absent and found.total_size not in (None, nbytes):
        notes += (
            f"{found.index} says total_size {escape(found.total_size, 40)}; the tensors have "
            f"{nbytes} bytes.",
        )
    return Weights(
        path=folder,
        tensors=tensors,
        shards=found.names,
        index=found.index,
        absent=absent,
        other_files=other,
        ignored_files=ignored,
        notes=notes,
        headers=headers,
    )


def to_float(dtype: str, array: np.ndarray) -> np.ndarray:
    """Return what `Weights.read` gave as float32; bfloat16 is decoded, float64 stays."""
    import numpy as np

    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith(("F8", "F4", "F6_")):
        raise CheckpointError(f"{dtype} cannot be turned into numbers here.")
    return array if dtype == "F64" else array.astype(np.float32)


def from_float(dtype: str, array: np.ndarray) -> np.ndarray:
    """Return numbers in a floating dtype, rounded to nearest, ties to even (bfloat16 as bits)."""
    import numpy as np

    with np.errstate(over="ignore"):
        narrow = array.astype("<f4" if dtype == "BF16" else NUMPY[dtype])
    if dtype != "BF16":
        return narrow
    bits = narrow.view("<u4")
    if array.dtype == np.float64:  # a tie that float32 made of a number beside it is none
        tied = (bits & 0xFFFF) == 0x8000
        bits = bits + (tied & (abs(narrow) < abs(array))) - (tied & (abs(narrow) > abs(array)))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(narrow), bits >> 16 | 0x40, rounded).astype("<u2")
