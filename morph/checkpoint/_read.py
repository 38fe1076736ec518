"""A checked checkpoint folder, and its tensors as bytes or numpy arrays. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.checkpoint._folder import (
    clean_config,
    collect_tensors,
    disagreements,
    find_folder,
    find_shards,
    read_config,
    refuse_quantised,
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
class Checkpoint:
    """A checked checkpoint folder.

    `config` is config.json without the keys that choose code (`dropped_keys`, dotted), `raw_config`
    the original. `tensors` maps names to `TensorInfo`. `other_files` are relative names of side
    files that a copy takes along, `ignored_files` those it never does. `notes` are for the user.
    """

    path: Path
    config: Mapping[str, Any]
    raw_config: Mapping[str, Any]
    dropped_keys: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    other_files: tuple[str, ...]
    ignored_files: tuple[str, ...]
    notes: tuple[str, ...]
    headers: Mapping[str, Header] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, strict: bool = True) -> Checkpoint:
        """Open `path`; `strict` also compares config and tensors and refuses what disagrees.

        Raises CheckpointError naming file, tensor or key, and UnsupportedModel for quantised
        weights. Reads headers only.
        """
        folder = find_folder(path)
        raw = read_config(folder)
        dropped: list[str] = []
        config = clean_config(raw, dropped)
        shards, weight_map, notes = find_shards(folder)
        headers = {name: read_header(folder, name) for name in shards}
        tensors = collect_tensors(folder, headers, weight_map)
        refuse_quantised(folder, config, tensors)
        if dropped:
            notes.append(f"config.json: ignored {', '.join(map(escape, dropped))}.")
        other, ignored = side_files(folder, set(shards))
        found = cls(
            path=folder,
            config=config,
            raw_config=raw,
            dropped_keys=tuple(dropped),
            tensors=tensors,
            shards=shards,
            other_files=other,
            ignored_files=ignored,
            notes=tuple(notes),
            headers=headers,
        )
        if strict:
            problems = disagreements(found.config, tensors)
            if problems:
                raise CheckpointError(f"{escape(folder)}: {' '.join(problems)}")
        return found

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

    @property
    def fingerprint(self) -> str:
        """A quick identity: sha256 over config, headers and the first and last 2 KiB of tensors.

        It tells models apart; it does not prove that two are equal.
        """
        digest = hashlib.sha256(repr(sorted(_flat(self.config))).encode())
        for shard in self.shards:
            digest.update(self.headers[shard].raw)
            with self._file(shard) as fd:
                infos = [i for i in self.tensors.values() if i.file.name == shard]
                for info in sorted(infos, key=lambda i: i.start):
                    take = min(2048, info.nbytes)
                    digest.update(read_at(fd, info.start, take, info.file))
                    digest.update(read_at(fd, info.stop - take, take, info.file))
        return digest.hexdigest()

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; raise CheckpointError with the nearest name."""
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

    def tie_conflict(self) -> str:
        """Return why stored tied embeddings contradict each other, or an empty string."""
        tied = self.config.get("tie_word_embeddings", False)
        heads = [n for n in self.tensors if n.endswith("lm_head.weight")]
        embeddings = [n for n in self.tensors if n.endswith("embed_tokens.weight")]
        if not tied or not heads or not embeddings:
            return ""
        a, b = self.info(heads[0]), self.info(embeddings[0])
        if (a.dtype, a.shape) == (b.dtype, b.shape):
            pairs = zip(self.blocks(heads[0]), self.blocks(embeddings[0]), strict=True)
            if all(x == y for x, y in pairs):
                return ""
        return (
            f"config.json ties the embeddings, but {heads[0]} and {embeddings[0]} are stored with "
            "different values. Set tie_word_embeddings to what is meant, or delete one of them."
        )

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


def to_float(dtype: str, array: np.ndarray) -> np.ndarray:
    """Return what `Checkpoint.read` gave as float32; bfloat16 is decoded, float64 stays."""
    import numpy as np

    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype.startswith(("F8", "F4", "F6")):
        raise CheckpointError(f"{dtype} cannot be turned into numbers here.")
    return array if dtype == "F64" else array.astype(np.float32)


def _flat(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}")
    else:
        yield f"{place}={value!r}"
