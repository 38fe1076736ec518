"""A file that is written, hashed and flushed side by side, and errors of the disk in words."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from morph.checkpoint._format import MIB
from morph.checkpoint._linux import clone, reserve
from morph.errors import CheckpointError, MorphError, StorageError, escape

STEP = 8 * MIB
BLOCK = MIB // 4  # stays in the cache of the core
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
    """Turn an OSError into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        place = escape(error.filename or where)
        raise StorageError(f"{place}: {error.strerror or error}. {advice}".strip()) from error


class NewFile:
    """A file whose bytes become final from its start to its end.

    `size` counts the final bytes; they are read back and hashed while more follow. `share` says
    whether blocks may be shared with the files that are copied from.
    """

    def __init__(self, path: Path, fd: int, share: bool = True) -> None:
        self.path, self.size, self.share = path, 0, share
        self._fd: int | None = fd
        self._grown = threading.Condition()
        self._complete = self._abandoned = self._cloned = False

    def reserve(self, size: int) -> None:
        """Take the space of the whole file at once, where the file system can."""
        assert self._fd is not None
        reserve(self._fd, size)

    def clone(self, fd: int) -> bool:
        """Share all blocks of another open file, so that its bytes need only be kept."""
        assert self._fd is not None
        self._cloned = self.share and clone(fd, self._fd)
        return self._cloned

    def append(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        assert self._fd is not None
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            step = os.pwrite(self._fd, view[done : done + STEP], self.size)
            done += step
            self._advance(step)

    def zeros(self, count: int) -> None:
        """Write zeros."""
        block = memoryview(bytes(min(count, BLOCK)))
        for at in range(0, count, BLOCK):
            self.append(block[: count - at])

    def keep(self, fd: int, path: Path, stop: int, done: Callable[[int], object]) -> None:
        """Go on to `stop` with the bytes that the other file has at the same place."""
        if self._cloned:
            count = stop - self.size
            self._advance(count)
            done(count)
        else:
            self.copy(fd, path, self.size, stop - self.size, done)

    def copy(
        self, fd: int, path: Path, start: int, count: int, done: Callable[[int], object]
    ) -> None:
        """Append bytes of another open file: in the kernel, or in blocks where it cannot.

        `done` is told the bytes of every step. Raises CheckpointError where `path` ends early.
        """
        stop, kernel = start + count, self.share and hasattr(os, "copy_file_range")
        buffer = memoryview(b"")
        while start < stop:
            if kernel:
                step = self._kernel_copy(fd, path, start, min(stop - start, STEP))
                if step < 0:
                    kernel = False
                    continue
                self._advance(step)
            else:
                buffer = buffer or memoryview(bytearray(min(count, MIB)))
                step = _read_into(fd, path, start, buffer[: stop - start])
                self.append(buffer[:step])
            if step == 0:
                raise CheckpointError(f"{escape(path)} ended early: was it changed?")
            start += step
            done(step)

    def _kernel_copy(self, fd: int, path: Path, start: int, count: int) -> int:
        """Return the bytes that were copied, -1 where the kernel cannot."""
        assert self._fd is not None
        try:
            return os.copy_file_range(fd, self._fd, count, start, self.size)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return -1
            if error.errno == errno.EIO:  # of reading or of writing: the system does not say
                error.filename = f"{path} or {self.path}"
            raise

    def digest(self) -> str:
        """Return the sha256 of the finished file; runs beside the writing."""
        digest, at = hashlib.sha256(), 0
        buffer = memoryview(bytearray(BLOCK))
        with storage_errors(self.path), open(self.path, "rb", buffering=0) as file:
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


def _read_into(fd: int, path: Path, start: int, buffer: memoryview) -> int:
    try:
        return os.preadv(fd, [buffer], start)
    except OSError as error:
        error.filename = str(path)
        raise


def file_digest(path: Path, stop: threading.Event) -> str:
    """Return the sha256 of a file; raise MorphError once `stop` is set."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop.is_set():
                raise MorphError("abandoned")
            digest.update(buffer[:count])
    return digest.hexdigest()
