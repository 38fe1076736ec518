"""Write a folder so that it appears whole or not at all.

Everything goes to a hidden sibling, `.OUT.partial-PID-ID`: each file is made anew, written,
flushed; MANIFEST.json comes last; the caller's check runs on the hidden folder; then one rename
makes it OUT. A lock keeps a second writer out, and whoever holds it may clear what a dead one left.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from morph import __version__
from morph.checkpoint._folder import MANIFEST
from morph.checkpoint._format import MIB, dump_json
from morph.checkpoint._newfile import NewFile, storage_errors
from morph.errors import (
    OutputExists,
    StorageError,
    UsageError,
    VerificationFailed,
    escape,
)


class Staging:
    """A hidden folder that becomes `out` when the `with` block calls `publish`.

    Raises OutputExists where `out` exists (without `force`), is an input, lies inside one or holds
    one, or is being written by another process; UsageError where its parent does not exist;
    StorageError where fewer than `need` bytes are free. Leaving the block by an exception removes
    the hidden folder. `durable=False` skips fsync: for benchmarks only.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        inputs: Sequence[Path] = (),
        need: int = 0,
        force: bool = False,
        durable: bool = True,
    ) -> None:
        self.out = check_output(Path(out), inputs, force)
        self.need, self.force, self.durable = need, force, durable
        stem = self.out.name
        if len(stem.encode()) > 180:  # leave room for our own prefix and suffix in 255 bytes
            stem = hashlib.sha256(stem.encode()).hexdigest()[:32]
        self._stem = stem
        self._id = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.path = self.out.parent / f".{stem}.partial-{self._id}"
        self.files: dict[str, int] = {}
        self._digests: dict[str, Future[str]] = {}
        self._flushed: list[Future[None]] = []
        self._open: list[NewFile] = []
        workers = min(4, os.cpu_count() or 1) + 1  # hashing, and one to wait for the disk
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="morph-write")
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            with storage_errors(self.out.parent):
                self._acquire()
                self._clear_stale()
                self._check_space()
                os.mkdir(self.path, 0o777)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    @contextmanager
    def create(self, name: str) -> Iterator[NewFile]:
        """Yield a new file to append to; at the end it is flushed while the next is written."""
        path = self.path / name
        with storage_errors(path):
            if "/" in name:
                path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            file = NewFile(path, os.open(path, flags, 0o666))
        self._open.append(file)
        self._digests[name] = self._pool.submit(file.digest)
        with storage_errors(path):
            yield file
        file.finish()
        self.files[name] = file.size
        self._flushed.append(self._pool.submit(file.flush, self.durable))

    def write(self, name: str, data: bytes) -> None:
        """Make one file of `data`."""
        with self.create(name) as file:
            file.append(data)

    def publish(self, verify: Callable[[Path], object] | None = None) -> dict[str, str]:
        """Write the manifest, run `verify(folder)`, and rename the folder to `out`.

        Returns name -> sha256. What `verify` raises goes through, and `out` does not appear.
        """
        digests = {name: self._digests[name].result() for name in sorted(self.files)}
        self._wait()
        entries = {n: {"bytes": self.files[n], "sha256": digests[n]} for n in digests}
        manifest = {"format": 1, "morph": __version__, "files": entries}
        expected = {*digests, MANIFEST}
        self.write(MANIFEST, dump_json(manifest))
        self._wait()
        if verify is not None:
            verify(self.path)
            self._check_untouched(expected)
        with storage_errors(self.out):
            for folder in sorted({p for n in digests for p in Path(n).parents}, reverse=True):
                self._sync_folder(self.path / folder)
            self._rename()
        return digests

    def _wait(self) -> None:
        while self._flushed:
            self._flushed.pop(0).result()

    def _check_untouched(self, expected: set[str]) -> None:
        found = {
            p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir()
        }
        sizes = {n: (self.path / n).stat().st_size for n in found & set(self.files)}
        wrong = (found ^ expected) | {n for n, size in sizes.items() if size != self.files[n]}
        if wrong:
            raise VerificationFailed(
                f"{escape(self.out.name)}: {escape(sorted(wrong)[0])} changed while the result was "
                "being checked. Nothing was written."
            )

    def _rename(self) -> None:
        if not os.path.lexists(self.out):
            os.rename(self.path, self.out)
            self._sync_folder(self.out.parent)
            return
        if not self.force:
            raise OutputExists(f"{escape(self.out)} appeared meanwhile and was left alone.")
        old = self.path  # where the two could be exchanged in one step
        if not exchange(self.path, self.out):
            old = self.out.parent / f".{self._stem}.old-{self._id}"
            try:
                os.rename(self.out, old)
                os.rename(self.path, self.out)
            except BaseException:
                if os.path.lexists(old) and not os.path.lexists(self.out):
                    os.rename(old, self.out)
                raise
        try:
            self._sync_folder(self.out.parent)
        finally:
            shutil.rmtree(old, ignore_errors=True)

    def _sync_folder(self, folder: Path) -> None:
        if not self.durable:
            return
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _acquire(self) -> None:
        path = self.out.parent / f".{self._stem}.lock"
        while True:
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # the holder before us may have removed the file that we locked
                if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
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
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _clear_stale(self) -> None:
        """Remove what dead writers of `out` left: we hold the lock, so nobody else is at it."""
        pattern = re.compile(rf"\.{re.escape(self._stem)}\.(partial|old)-\d+-[0-9a-f]{{8}}")
        for entry in sorted(os.scandir(self.out.parent), key=lambda e: e.name):
            match = pattern.fullmatch(entry.name)
            if not match or not entry.is_dir(follow_symlinks=False):
                continue
            if match[1] == "old" and not os.path.lexists(self.out):
                os.rename(entry.path, self.out)  # died between the two renames of a swap
                if not self.force:
                    raise OutputExists(f"{escape(self.out)} exists. Give --force to replace it.")
            else:
                shutil.rmtree(entry.path)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.out.parent).free
        need = self.need + self.need // 100 + MIB
        if free < need:
            raise StorageError(
                f"{escape(self.out.parent)} has {free} bytes free, {need} are needed. Free some "
                "space, or write elsewhere."
            )

    def _leave(self) -> None:
        for file in self._open:
            file.abandon()
        self._pool.shutdown(cancel_futures=True)
        for file in self._open:
            file.close()
        shutil.rmtree(self.path, ignore_errors=True)  # gone already where it was published
        if self._lock is not None:
            with suppress(OSError):
                os.unlink(self.out.parent / f".{self._stem}.lock")
            os.close(self._lock)
            self._lock = None


def check_output(out: Path, inputs: Sequence[Path], force: bool) -> Path:
    """Return the absolute path of a folder that may be written; `Staging` says what may not."""
    out = out.expanduser()
    try:
        parent = out.parent.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{escape(out.parent)} does not exist: create it, or write elsewhere."
        ) from error
    if not parent.is_dir() or out.name in ("", "..") or not out.name.isprintable():
        raise UsageError(
            f"{escape(out)} cannot be an output folder: give the name of a new folder."
        )
    found = parent / out.name
    if any(part.startswith("models--") for part in found.parts):
        raise UsageError(f"{escape(found)} lies inside a Hugging Face cache: write elsewhere.")
    for source in inputs:
        real = source.resolve()
        if found == real or (found.exists() and os.path.samefile(found, real)):
            raise OutputExists(f"{escape(found)} is the input. Give another output folder.")
        if real in found.parents:
            raise OutputExists(f"{escape(found)} lies inside the input {escape(real)}.")
        if found in real.parents:
            raise OutputExists(f"{escape(found)} holds the input {escape(real)}.")
    if not os.path.lexists(found):
        return found
    if not force:
        raise OutputExists(f"{escape(found)} exists. Give --force to replace it, or another name.")
    ours = found.is_dir() and not found.is_symlink()
    if not ours or not (
        (found / "config.json").exists() or (found / MANIFEST).exists() or not any(found.iterdir())
    ):
        raise OutputExists(
            f"{escape(found)} exists and is no checkpoint folder; it is not replaced even with "
            "--force."
        )
    return found


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where the system cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: int = call(here, os.fsencode(one), here, os.fsencode(other), swap)
    return done == 0
