"""Who may write an output folder: a lock that others see, and what dead writers left there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from morph.checkpoint._journal import Past, differences, key_of, read_journal
from morph.errors import MismatchError, OutputExists, escape


class Claim:
    """The one right to write `out`, and the hidden names beside it that belong to its writers."""

    def __init__(self, out: Path) -> None:
        self.out = out
        stem = out.name
        if len(stem.encode()) > 180:  # leave room for our own prefix and suffix in 255 bytes
            stem = hashlib.sha256(stem.encode()).hexdigest()[:32]
        self._stem = stem
        self._lock: int | None = None

    @property
    def held(self) -> bool:
        """Whether we are the one writer."""
        return self._lock is not None

    def folder(self, key: str, kind: str = "partial") -> Path:
        """Return the hidden folder of a key: `partial`, or `old` for an output that is replaced."""
        return self.out.parent / f".{self._stem}.{kind}-{key}"

    def journal(self, key: str) -> Path:
        """Return the journal of a key."""
        return self.out.parent / f".{self._stem}.partial-{key}.jsonl"

    def acquire(self) -> None:
        """Take the lock; raise OutputExists with its holder where there is one."""
        path = self.out.parent / f".{self._stem}.lock"
        while True:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):  # the holder before us removed what we locked
                    if os.path.samestat(os.fstat(fd), os.stat(path)):
                        break
            except BlockingIOError as error:
                holder = os.pread(fd, 200, 0).decode("utf-8", "replace")
                os.close(fd)
                raise OutputExists(
                    f"{escape(self.out)} is being written by another process "
                    f"({escape(holder) or 'unknown'}). Wait for it, or write elsewhere."
                ) from error
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        self._lock = fd
        os.ftruncate(fd, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        os.pwrite(fd, f"pid {os.getpid()} on {os.uname().nodename} since {since}".encode(), 0)

    def release(self) -> None:
        """Give the lock back, once."""
        fd, self._lock = self._lock, None
        if fd is None:
            return
        try:
            with suppress(OSError):
                os.unlink(self.out.parent / f".{self._stem}.lock")
        finally:
            os.close(fd)

    def clear(self, line: bytes | None, force: bool, restart: bool) -> Past | None:
        """Remove what dead writers left: we hold the lock, so nobody else is at it.

        What a writer of the same first line finished stays, and its journal is returned. Raises
        MismatchError for what one of another line finished (without `restart`).
        """
        pattern = re.compile(
            rf"\.{re.escape(self._stem)}\.(partial|old)-((?:\d+-)?[0-9a-f]{{8}})(?:\.jsonl)?"
        )
        matches = [pattern.fullmatch(entry.name) for entry in os.scandir(self.out.parent)]
        past = None
        for kind, key in sorted({(m[1], m[2]) for m in matches if m}):
            folder, journal = self.folder(key, kind), self.journal(key)
            whole = folder.is_dir() and not folder.is_symlink()
            if kind == "old":
                self._settle(folder, whole, force)
                continue
            known = read_journal(journal, key) if whole and "-" not in key else None
            if known is not None and line is not None and key == key_of(line):
                past = known
                continue
            if known is not None and known.done and line is not None and not restart:
                self._refuse(known, line)
            if whole:
                shutil.rmtree(folder)
            if os.path.lexists(journal):
                os.unlink(journal)
        return past

    def _settle(self, old: Path, whole: bool, force: bool) -> None:
        """Put an output back whose writer died between the two renames of a swap."""
        if whole and not os.path.lexists(self.out):
            os.rename(old, self.out)
            if not force:
                raise OutputExists(f"{escape(self.out)} exists. Give --force to replace it.")
        elif whole:
            shutil.rmtree(old)

    def _refuse(self, past: Past, line: bytes) -> None:
        found = differences(past.identity, json.loads(line))
        changed = [text.removeprefix("files.").removeprefix("identity.") for text in found]
        # what was asked for says more than what follows from it
        changed.sort(key=lambda text: (not text.startswith("options."), "splices was" in text))
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        nbytes = sum(done.nbytes for done in past.done.values())
        raise MismatchError(
            f"{escape(self.out)}: an unfinished write is there ({len(past.done)} finished "
            f"file{'s' * (len(past.done) != 1)}, {nbytes} bytes), of other inputs or options: "
            f"{'; '.join(changed[:3])}{more}. Give --restart to drop it, or another output."
        )
