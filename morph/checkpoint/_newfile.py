"""A file that is written, hashed and flushed side by side, and errors of the disk in words."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from morph.checkpoint._format import MIB, read_at
from morph.errors import CheckpointError, MorphError, StorageError, escape

STEP = 8 * MIB
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space, or write elsewhere.",
    errno.EDQUOT: "The disk quota is used up: free some space, or write elsewhere.",
    errno.EFBIG: "A file would exceed the size limit here: write elsewhere.",
    errno.EACCES: "Permission is missing: write to a folder of yours.",
    errno.EPERM: "Permission is missing: write to a folder of yours.",
    errno.EROFS: "The file system is read-only: write elsewhere.",
    errno.EIO: "The disk reports a failure: check it, or write elsewhere.",
}


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that says what to do; nothing stays behind."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        place = escape(error.filename or where)
        raise StorageError(f"{place}: {error.strerror or error}. {advice}".strip()) from error


class NewFile:
    """A file that grows at its end; its sha256 is taken while it grows, by reading it back."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.size = path, 0
        self._fd: int | None = fd
        self._grown = threading.Condition()
        self._complete = self._abandoned = False

    def append(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        assert self._fd is not None
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            step = os.pwrite(self._fd, view[done : done + STEP], self.size)
            done += step
            self._advance(step)

    def copy(
        self, fd: int, path: Path, start: int, count: int, done: Callable[[int], object]
    ) -> None:
        """Append bytes of another open file: in the kernel, or in blocks where it cannot.

        `done` is told the bytes of every step. Raises CheckpointError where `path` ends early.
        """
        assert self._fd is not None
        stop, kernel = start + count, hasattr(os, "copy_file_range")
        while start < stop:
            if kernel:
                try:
                    step = os.copy_file_range(
                        fd, self._fd, min(stop - start, STEP), start, self.size
                    )
                except OSError as error:
                    if error.errno not in _NO_KERNEL_COPY:
                        raise
                    kernel = False
                    continue
                if step == 0:
                    raise CheckpointError(f"{escape(path)} ended early: was it changed?")
                self._advance(step)
            else:
                step = min(stop - start, MIB)
                self.append(read_at(fd, start, step, path))
            start += step
            done(step)

    def digest(self) -> str:
        """Return the sha256 of the finished file; runs beside the writing."""
        digest, at = hashlib.sha256(), 0
        buffer = memoryview(bytearray(MIB // 4))  # stays in the cache of the core
        with open(self.path, "rb", buffering=0) as file:
            while True:
                with self._grown:
                    self._grown.wait_for(
                        lambda: self.size > at or self._complete or self._abandoned  # noqa: B023
                    )
                    end, complete = self.size, self._complete
                    if self._abandoned:
                        raise MorphError("abandoned")
                while at < end:
                    count = file.readinto(buffer[: min(len(buffer), end - at)])
                    if not count:
                        raise StorageError(f"{escape(self.path)} is shorter than what was written.")
                    digest.update(buffer[:count])
                    at += count
                if complete:
                    return digest.hexdigest()

    def finish(self) -> None:
        """Say that nothing more is appended."""
        with self._grown:
            self._complete = True
            self._grown.notify_all()

    def abandon(self) -> None:
        """Let a digest that nobody needs any more end."""
        with self._grown:
            self._abandoned = True
            self._grown.notify_all()

    def flush(self, durable: bool) -> None:
        """Wait until the disk has the file, and close it."""
        with storage_errors(self.path):
            if durable and self._fd is not None:
                os.fsync(self._fd)
            self.close()

    def close(self) -> None:
        """Close the descriptor, once."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _advance(self, count: int) -> None:
        with self._grown:
            self.size += count
            self._grown.notify_all()
