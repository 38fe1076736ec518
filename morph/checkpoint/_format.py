"""The safetensors format, JSON and file names, read as the hostile data they may be.

Layout of a file: 8 bytes little-endian header length N, N bytes of JSON, then the data, which the
tensors must cover once, without holes, to the last byte. Format: safetensors 0.8, with the limits
below and stricter rules for doubled keys and names.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from morph.errors import CheckpointError, escape

MIB = 1 << 20
MAX_HEADER = 16 * MIB
MAX_JSON = {"config": 8 * MIB, "index": 32 * MIB, "manifest": 32 * MIB}
MAX_VALUES = 1_000_000  # parsed, a value takes some 75 bytes: a header holds about 100,000 tensors
MAX_DEPTH = 100
MAX_TENSORS = 1_000_000
MAX_NAME = 1024

BITS = {
    **{"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "I16": 16, "U16": 16},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"C64": 64, "F64": 64, "I64": 64, "U64": 64},
}
# bfloat16 and float8 have no numpy type: their bits come as unsigned integers
NUMPY = {
    **{"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2"},
    **{"BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "C64": "<c8", "F64": "<f8"},
    **{"I64": "<i8", "U64": "<u8"},
    **{name: "u1" for name in BITS if name.startswith("F8")},
}
TORCH_NAMES = {
    **{"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "bool": "BOOL"},
    **{"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"},
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: safetensors dtype, shape, file, and the bytes `start:stop` of it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return self.stop - self.start


def dtype_code(name: str) -> str:
    """Return the safetensors code of `BF16`, `bfloat16` or `torch.bfloat16`."""
    code = TORCH_NAMES.get(str(name).removeprefix("torch."), str(name))
    if code not in BITS:
        raise CheckpointError(f"dtype '{escape(name)}' is unknown. There are: {', '.join(BITS)}.")
    return code


def byte_size(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes that a tensor takes; sub-byte dtypes are rounded up."""
    return (prod(shape) * BITS[dtype] + 7) // 8


def load_json(data: bytes, where: str) -> Any:
    """Return parsed JSON; doubled keys, NaN, infinities and deep nesting are CheckpointErrors."""

    _check_extent(data, where)

    def refuse(text: str) -> Any:
        raise CheckpointError(f"{where}: {escape(text, 40)} is not a number that JSON allows.")

    def real(text: str) -> float:
        value = float(text)
        return value if isfinite(value) else refuse(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            last = {k: i for i, (k, _) in enumerate(pairs)}
            double = next(k for i, (k, _) in enumerate(pairs) if last[k] != i)
            raise CheckpointError(f"{where}: key '{escape(double)}' appears twice.")
        return found

    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=real,
        )
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deeply.") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({escape(error)}).") from error
    _check_depth(found, data, where)
    return found


def _check_extent(data: bytes, where: str) -> None:
    """Refuse a text of too many values before it is parsed: a small one can fill the memory."""
    if len(data) > MAX_VALUES and sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise CheckpointError(
            f"{where}: more than {MAX_VALUES:,} values; that is no file of a model."
        )


def _check_depth(found: Any, data: bytes, where: str) -> None:
    """Refuse what later walks, which are recursive, could not follow."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    level = [found]
    for _ in range(MAX_DEPTH):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in inner for y in x if isinstance(y, (dict, list))]
        if not level:
            return
    raise CheckpointError(f"{where}: nested too deeply: more than {MAX_DEPTH} levels.")


def dump_json(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, two spaces, infinities spelled as transformers does."""
    return (json.dumps(_special(value), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _special(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        name = "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}
    if isinstance(value, Mapping):
        return {str(k): _special(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_special(v) for v in value]
    return value


def check_basename(name: str, where: str) -> str:
    """Return `name` if it is a plain file name under POSIX and Windows rules."""
    plain = (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "replace")) <= 255
        and name not in (".", "..")
        and name.isprintable()
        and not set(name) & set('/\\:*?"<>|')
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )
    if not plain:
        raise CheckpointError(
            f"{where}: '{escape(name)}' is no plain file name. Files of a checkpoint lie in its "
            "own folder; a name may not hold a folder, a drive or '..'."
        )
    return name


def open_regular(root: Path, name: str) -> int:
    """Return a read-only descriptor of the regular file `name` under the folder `root`.

    A link may stay inside `root` or, in a Hugging Face cache, lead to its own `blobs` folder.
    Opening never blocks. Raises CheckpointError otherwise.
    """
    path = root / name
    shown = escape(path)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        what = "a broken link (is the download complete?)" if path.is_symlink() else "missing"
        raise CheckpointError(f"{shown} is {what}.") from error
    home = root.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            f"{shown} is a link that leaves its folder. Copy the file into the folder if it "
            "belongs there."
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(f"{shown} is not a regular file.")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        fd = os.open(real, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(f"{shown} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # swapped between the two looks
        os.close(fd)
        raise CheckpointError(f"{shown} is not a regular file.")
    return fd


def read_small(root: Path, name: str, limit: int) -> bytes:
    """Return the whole content of a file of at most `limit` bytes."""
    fd = open_regular(root, name)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(
                f"{escape(root / name)} has {size} bytes; more than {limit} is not plausible."
            )
        return read_at(fd, 0, size, root / name)
    finally:
        os.close(fd)


def read_at(fd: int, start: int, count: int, path: Path) -> bytes:
    """Return exactly `count` bytes from `start`; a file that ends early is a CheckpointError."""
    parts, done = [], 0
    while done < count:
        try:
            block = os.pread(fd, min(count - done, 64 * MIB), start + done)
        except OSError as error:
            raise CheckpointError(f"{escape(path)} cannot be read: {error.strerror}.") from error
        if not block:
            raise CheckpointError(f"{escape(path)} ended at byte {start + done}: was it changed?")
        parts.append(block)
        done += len(block)
    return b"".join(parts)


def identity(fd: int) -> tuple[int, int, int, int]:
    """Return what tells that an open file was neither changed nor replaced."""
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: tensors, metadata, and the state of the file it describes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    raw: bytes
    identity: tuple[int, int, int, int]


def read_header(root: Path, name: str) -> Header:
    """Return the checked header of a shard; raise CheckpointError naming file and tensor."""
    path = root / name
    shown = escape(path)
    fd = open_regular(root, name)
    try:
        size = os.fstat(fd).st_size
        start = read_at(fd, 0, min(size, 64), path)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{shown} is a git-lfs pointer: run `git lfs pull` to fetch it.")
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise CheckpointError(f"{shown} is an HTML page, not weights: download it again.")
        if size < 8:
            raise CheckpointError(f"{shown} has {size} bytes; a safetensors file has at least 8.")
        length = int.from_bytes(start[:8], "little")
        if length < 2 or length > size - 8:
            raise CheckpointError(
                f"{shown}: the header claims {length} bytes, the file has {size}. It is truncated "
                "or no safetensors file."
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{shown}: a header of {length} bytes exceeds {MAX_HEADER}.")
        raw = read_at(fd, 8, length, path)
        state = identity(fd)
    finally:
        os.close(fd)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{shown}: the header does not start with '{{'.")
    data = load_json(raw, f"{shown}: header")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{shown}: __metadata__ must map text to text.")
    if len(data) > MAX_TENSORS:
        raise CheckpointError(f"{shown} lists {len(data)} tensors; at most {MAX_TENSORS}.")
    tensors = {key: _tensor(key, info, path, 8 + length) for key, info in data.items()}
    _check_cover(tensors, shown, 8 + length, size)
    return Header(tensors, metadata, raw, state)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(key: str, info: Any, path: Path, base: int) -> TensorInfo:
    where = f"{escape(path)}: tensor '{escape(key, 80)}'"
    if not 0 < len(key) <= MAX_NAME or not key.isprintable():
        raise CheckpointError(f"{where}: the name is empty, too long or holds control characters.")
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype '{escape(dtype, 40)}'.")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_count, shape)):
        raise CheckpointError(f"{where}: shape {escape(shape, 60)} is no list of sizes.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets {escape(offsets, 60)} are no two positions.")
    first, last = offsets
    want = prod(shape) * BITS[dtype]
    if last < first or (last - first) * 8 != want:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {want / 8:g} bytes, data_offsets {offsets} span "
            f"{last - first}."
        )
    return TensorInfo(dtype, tuple(shape), path, base + first, base + last)


def _check_cover(tensors: Mapping[str, TensorInfo], shown: str, base: int, size: int) -> None:
    """Data must be covered once: no overlap, no hole, nothing after the last tensor."""
    at = base
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "follows a hole"
            raise CheckpointError(
                f"{shown}: tensor '{escape(key, 80)}' {what} (byte {info.start}, expected {at})."
            )
        at = info.stop
    if at != size:
        what = "is truncated" if at > size else "has bytes after the last tensor"
        raise CheckpointError(f"{shown} {what}: expected {at} bytes, found {size}.")


def encode_header(entries: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """Return length and header for name -> (dtype, shape, start, stop), always the same bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in sorted(entries):
        dtype, shape, start, stop = entries[name]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    raw = json.dumps(table, separators=(",", ":"), sort_keys=True).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def natural(name: str) -> tuple[Any, ...]:
    """Return a sort key that puts `layers.9` before `layers.10`."""
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name))
