"""Files that torch.save wrote, and folders of them, looked at without unpickling anything.

Since torch 1.6 such a file is a zip archive, whose entries are stored and not compressed: one
pickle, and the bytes of every storage. Before, it was a row of pickles with the storages after it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from morph.checkpoint._folder import INDEX, PICKLES
from morph.checkpoint._format import (
    MAX_JSON,
    MAX_TENSORS,
    MIB,
    check_basename,
    identity,
    load_json,
    open_regular,
    read_at,
    read_small,
)
from morph.errors import CheckpointError, UsageError, escape

SINGLE, ADAPTER = "pytorch_model.bin", "adapter_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
MAX_PICKLE, MAX_DIRECTORY = 64 * MIB, 32 * MIB
# What a training leaves beside the weights: it is no model, and is not opened
TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state)([_.-].*)?\.(bin|pt|pth|ckpt)"
)
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how the old format starts
_NO_ZIP = {
    b"version https://git-lfs": "is a git-lfs pointer: run `git lfs pull` to fetch it",
    b"<": "is a web page, not weights: download it again",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"\x80": "is a pickle that torch.save did not write. It is not opened",
}


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """A file of torch.save: open, recognised, not read.

    `storages` maps the places of the stored blocks in the file to their bytes; the old format has
    no table of them, and an empty one here.
    """

    path: Path
    fd: int
    nbytes: int
    zip: bool
    storages: Mapping[int, int]
    identity: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored blocks, about the bytes of the tensors."""
        return sum(self.storages.values()) if self.zip else self.nbytes

    def check_unchanged(self) -> None:
        """Raise CheckpointError where the file is not what it was when it was opened."""
        if identity(self.fd) != self.identity:
            raise CheckpointError(f"{escape(self.path)} was changed meanwhile. Start again.")


@dataclass(frozen=True, kw_only=True)
class Found:
    """Which files of a folder hold the weights, in order, and what their index says."""

    folder: Path
    names: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    alone: bool  # the file itself was named: what lies beside it is none of ours
    notes: tuple[str, ...]

    @property
    def inputs(self) -> list[Path]:
        """What an output may not touch."""
        return [self.folder / self.names[0] if self.alone else self.folder]


def find(model: str) -> Found:
    """Return the pickled weights of a folder, or the one file that is named.

    Raises UsageError where there are safetensors already, CheckpointError where there is nothing
    to convert, or several files without an index.
    """
    path = Path(model).expanduser()
    if not os.path.exists(path):
        raise CheckpointError(
            f"'{escape(model)}' is no local folder or file. morph downloads no pickles: fetch them "
            "with `hf download`, and give the folder."
        )
    path = path.parent.resolve() / path.name if path.is_file() else path.resolve()
    if not path.is_dir():
        if not path.name.lower().endswith(ENDINGS):
            raise UsageError(f"{escape(path)}: pickled weights end with {', '.join(ENDINGS)}.")
        return Found(folder=path.parent, names=(path.name,), weight_map=None, alone=True, notes=())
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{escape(path)} cannot be read: {error.strerror}.") from error
    safe = [n for n in names if n.endswith((".safetensors", INDEX))]
    if safe:
        raise UsageError(
            f"{escape(path)} has safetensors already ({escape(safe[0], 60)}), and these are what "
            "is used, by morph and by transformers: there is nothing to convert."
        )
    return _in_folder(path, names)


def _in_folder(folder: Path, names: list[str]) -> Found:
    notes = []
    weights = [n for n in names if n.lower().endswith(ENDINGS) and not TRAINING.fullmatch(n)]
    if SINGLE in names:
        if PICKLE_INDEX in names:
            notes.append(f"Both {SINGLE} and {PICKLE_INDEX} exist: the single file is used.")
        chosen: tuple[str, ...] = (SINGLE,)
    elif PICKLE_INDEX in names:
        weight_map = _weight_map(folder)
        shards = tuple(sorted(set(weight_map.values())))
        return Found(folder=folder, names=shards, weight_map=weight_map, alone=False, notes=())
    elif ADAPTER in names:
        chosen = (ADAPTER,)
    elif len(weights) == 1:
        chosen = (weights[0],)
    elif weights:
        shown = ", ".join(escape(n, 60) for n in weights[:4])
        raise CheckpointError(
            f"{escape(folder)} has {len(weights)} files that may hold weights ({shown}), but no "
            f"{PICKLE_INDEX} that says how they belong together. Give one of them."
        )
    else:
        raise CheckpointError(f"{escape(folder)} has no pickled weights (*{', *'.join(ENDINGS)}).")
    return Found(folder=folder, names=chosen, weight_map=None, alone=False, notes=tuple(notes))


def _weight_map(folder: Path) -> dict[str, str]:
    where = escape(folder / PICKLE_INDEX)
    data = load_json(read_small(folder, PICKLE_INDEX, MAX_JSON["index"]), where)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map must map tensor names to files.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not check_basename(name, where).endswith(PICKLES):
            raise CheckpointError(
                f"{where}: '{escape(key, 80)}' maps to '{escape(name, 60)}', which is no pickle."
            )
    missing = sorted({n for n in weight_map.values() if not os.path.lexists(folder / n)})
    if missing:
        raise CheckpointError(
            f"{escape(folder)}: {len(missing)} of {len(set(weight_map.values()))} files are "
            f"missing, such as {escape(missing[0])}. Is the download complete?"
        )
    return weight_map


def look(folder: Path, name: str) -> TorchFile:
    """Open a file and recognise its format; the caller closes `fd`. Raises CheckpointError."""
    path = folder / name
    fd = open_regular(folder, name)
    try:
        state = identity(fd)
        size = state[0]
        start = read_at(fd, 0, min(size, 512), path)
        if start.startswith(b"PK\x03\x04"):
            storages = _storages(fd, path, size)
        else:
            _check_old(start, escape(path))
            storages = {}
        return TorchFile(
            path=path,
            fd=fd,
            nbytes=size,
            zip=start.startswith(b"PK"),
            storages=storages,
            identity=state,
        )
    except BaseException:
        os.close(fd)
        raise


def _check_old(start: bytes, shown: str) -> None:
    if start.startswith(_MAGIC):
        return
    if not start:
        raise CheckpointError(f"{shown} is empty: download it again.")
    if start[257:262] == b"ustar" or start[:5] in (b"pickl", b"stora", b"tenso", b"./pic"):
        raise CheckpointError(
            f"{shown} is a tar archive of torch before 0.2, which cannot be read without running "
            "what is in it. Nothing was run. Ask the publisher for safetensors."
        )
    if start[8:9] == b"{":
        raise CheckpointError(f"{shown} looks like safetensors under another name: rename it.")
    lower = start.lstrip().lower()
    for sign, what in _NO_ZIP.items():
        if lower.startswith(sign):
            raise CheckpointError(f"{shown} {what}.")
    raise CheckpointError(f"{shown} is no file of torch.save, or its beginning is lost.")


@dataclass(frozen=True)
class _Entry:
    name: str
    place: int
    nbytes: int


def _storages(fd: int, path: Path, size: int) -> dict[int, int]:
    """Return place -> bytes of the stored blocks of an archive; raise for whatever is odd."""
    shown = escape(path)
    entries = list(_entries(fd, path, size))
    claimed = sum(entry.nbytes for entry in entries)
    if claimed > size:
        raise CheckpointError(
            f"{shown}: its entries claim {claimed} bytes in a file of {size}. It is no checkpoint."
        )
    pickles = [e for e in entries if e.name.endswith("/data.pkl") and e.name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{shown} is a zip archive, but not one that torch.save wrote.")
    root = pickles[0].name.removesuffix("data.pkl")
    if any(e.name == f"{root}constants.pkl" or e.name.startswith(f"{root}code/") for e in entries):
        raise CheckpointError(
            f"{shown} is a TorchScript archive: a program with weights in it, which cannot be read "
            "without running it. Nothing was run. Ask the publisher for safetensors."
        )
    if pickles[0].nbytes > MAX_PICKLE:
        raise CheckpointError(
            f"{shown}: its pickle has {pickles[0].nbytes} bytes; more than {MAX_PICKLE} is not "
            "plausible."
        )
    for entry in entries:
        if entry.name == f"{root}byteorder" and entry.nbytes < 64:
            order = read_at(fd, entry.place, entry.nbytes, path)
            if order != b"little":
                raise CheckpointError(
                    f"{shown} was written in {escape(order.decode('utf-8', 'replace'), 20)} byte "
                    "order. Save it again on a little-endian machine."
                )
    return {e.place: e.nbytes for e in entries if e.name.startswith(f"{root}data/")}


def _entries(fd: int, path: Path, size: int) -> Iterator[_Entry]:
    """Yield the entries of a zip archive; none is compressed, and each lies before the table."""
    shown = escape(path)
    count, start, length = _directory(fd, path, size)
    table, at = read_at(fd, start, length, path), 0
    for _ in range(count):
        if table[at : at + 4] != b"PK\x01\x02" or at + 46 > len(table):
            raise CheckpointError(f"{shown}: the table of its zip archive is broken.")
        flags, method, packed, nbytes, n, extra, comment, local = struct.unpack(
            "<4xHH8xIIHHH8xI", table[at + 4 : at + 46]
        )
        raw, more = table[at + 46 : at + 46 + n], table[at + 46 + n : at + 46 + n + extra]
        at += 46 + n + extra + comment
        name = raw.decode("utf-8", "replace")
        nbytes, packed, local = _wide((nbytes, packed, local), more)
        if method or flags & 1 or packed != nbytes:
            raise CheckpointError(
                f"{shown}: its entry '{escape(name, 80)}' is compressed or encrypted, which "
                "torch.save does not do. It is not unpacked."
            )
        head = read_at(fd, local, 30, path) if local + 30 <= start else b""
        place = local + 30 + sum(struct.unpack("<HH", head[26:30])) if head else start
        if head[:4] != b"PK\x03\x04" or place + nbytes > start:
            raise CheckpointError(
                f"{shown}: its entry '{escape(name, 80)}' lies outside of the data. The file is "
                "damaged: download it again."
            )
        yield _Entry(name, place, nbytes)


def _directory(fd: int, path: Path, size: int) -> tuple[int, int, int]:
    """Return the number of entries, and place and bytes of the table, of a zip archive."""
    shown = escape(path)
    tail_at = max(0, size - 65557)
    tail = read_at(fd, tail_at, size - tail_at, path)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        raise CheckpointError(
            f"{shown} is a zip archive without its end: it is truncated ({size} bytes). Download "
            "it again."
        )
    count, length, start = struct.unpack("<HII", tail[end + 10 : end + 20])
    stop = tail_at + end
    if count == 0xFFFF or 0xFFFFFFFF in (length, start):
        locator = tail[max(0, end - 20) : end]
        wide_at = struct.unpack("<Q", locator[8:16])[0] if locator[:4] == b"PK\x06\x07" else size
        wide = read_at(fd, wide_at, 56, path) if wide_at + 56 <= stop else b""
        if wide[:4] != b"PK\x06\x06":
            raise CheckpointError(f"{shown}: the table of its zip archive is broken.")
        count, length, start = struct.unpack("<QQQ", wide[32:56])
        stop = wide_at
    if count > MAX_TENSORS or length > MAX_DIRECTORY or start + length > stop:
        raise CheckpointError(
            f"{shown}: the table of its zip archive ({count} entries, {length} bytes at {start}) "
            f"does not fit into {size} bytes."
        )
    return count, start, length


def _wide(values: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
    """Return sizes and place of an entry, where they need more than 32 bits from its extra."""
    found, at = list(values), 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        data = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        for i, value in enumerate(found):
            if value == 0xFFFFFFFF and len(data) >= 8:
                found[i] = struct.unpack("<Q", data[:8])[0]
                data = data[8:]
    return found[0], found[1], found[2]
