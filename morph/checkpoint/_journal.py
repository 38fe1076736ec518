"""What a folder that is being written is made from, and which of its files are finished.

A journal lies beside the folder. Its first line is the identity of what is written; the name holds
the start of that line's sha256, so that a torn line is no identity. Each further line is a file
whose bytes the disk has, or a file that is no longer to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morph.checkpoint._format import MAX_JSON, dump_json, load_json, read_small
from morph.errors import CheckpointError, escape

_FILE = {"bytes", "mtime_ns"}  # keys by which a mapping is known to be the identity of a file


@dataclass(frozen=True)
class Done:
    """A finished file: its bytes, and its sha256 where it was taken."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Past:
    """What a journal says: the identity, the finished files, and the bytes that were readable."""

    identity: Mapping[str, Any]
    done: Mapping[str, Done]
    nbytes: int


def first_line(identity: Mapping[str, Any]) -> bytes:
    """Return the line that says what is written: canonical JSON."""
    plain = json.loads(dump_json(identity))
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def key_of(line: bytes) -> str:
    """Return the key of an identity, for names of files."""
    return hashlib.sha256(line).hexdigest()[:8]


class Journal:
    """A journal that is open for appending; threads may share it."""

    def __init__(self, path: Path, line: bytes, past: Past | None, durable: bool) -> None:
        self.path, self.durable = path, durable
        self.done = dict(past.done) if past else {}
        self._turn = threading.Lock()
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_APPEND
        fresh = os.O_CREAT | os.O_EXCL if past is None else 0
        self._fd: int | None = os.open(path, flags | fresh, 0o666)
        try:
            if past is None:
                self._append(line)
            elif os.fstat(self._fd).st_size > past.nbytes:
                os.ftruncate(self._fd, past.nbytes)  # a line that was torn
        except BaseException:
            self.close()
            if past is None:
                with suppress(OSError):
                    os.unlink(path)
            raise

    def add(self, name: str, done: Done) -> None:
        """Say that a file is finished; its bytes are on the disk already."""
        self._append(_line({"name": name, "bytes": done.nbytes, "sha256": done.sha256}))
        self.done[name] = done

    def forget(self, name: str) -> None:
        """Say that a file is not to be trusted, before it is written anew."""
        self.done.pop(name, None)
        self._append(_line({"name": name, "dropped": True}))

    def close(self) -> None:
        """Close the file, once."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _append(self, line: bytes) -> None:
        with self._turn:
            assert self._fd is not None
            done = 0
            while done < len(line):
                done += os.write(self._fd, line[done:])
            if self.durable:
                os.fsync(self._fd)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def read_journal(path: Path, key: str) -> Past | None:
    """Return what a journal says up to the first line that is torn; None where that is nothing."""
    try:
        raw = read_small(path.parent, path.name, MAX_JSON["manifest"])
        head, end, rest = raw.partition(b"\n")
        identity = load_json(head, escape(path))
    except CheckpointError:
        return None
    if not end or key_of(head + end) != key or not isinstance(identity, dict):
        return None
    found: dict[str, Done] = {}
    at = len(head) + 1
    for line in rest.split(b"\n")[:-1]:
        entry = _entry(line)
        if entry is None:
            break
        name, done = entry
        found.pop(name, None)
        if done is not None:
            found[name] = done
        at += len(line) + 1
    return Past(identity, found, at)


def _entry(line: bytes) -> tuple[str, Done | None] | None:
    try:
        entry = load_json(line, "journal")
    except CheckpointError:
        return None
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or any(part in ("", ".", "..") for part in name.split("/")):
        return None
    if set(entry) == {"name", "dropped"}:
        return name, None
    nbytes, digest = entry.get("bytes"), entry.get("sha256")
    known = digest is None or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest))
    if set(entry) != {"name", "bytes", "sha256"} or type(nbytes) is not int or not known:
        return None
    return name, Done(nbytes, digest)


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yield what tells two identities apart, a file or an option each."""
    if old == new:
        return
    if isinstance(old, Mapping) and new is None:
        yield f"{escape(place)} is not read now"
    elif isinstance(new, Mapping) and old is None:
        yield f"{escape(place)} was not read then"
    elif not isinstance(old, Mapping) or not isinstance(new, Mapping):
        shown = ["not there" if v is None else escape(v, 40) for v in (old, new)]
        yield f"{escape(place)} was {shown[0]}, is {shown[1]}"
    elif old.keys() >= _FILE and new.keys() >= _FILE:
        keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        yield f"{escape(place)} was changed ({', '.join(keys)})"
    else:
        for key in sorted(old.keys() | new.keys()):
            inner = f"{place}.{key}" if place else str(key)
            yield from differences(old.get(key), new.get(key), inner)
