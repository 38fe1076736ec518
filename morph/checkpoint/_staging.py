"""Write a folder so that it appears whole or not at all, and so that a stopped write goes on.

Everything goes to a hidden sibling, `.OUT.partial-KEY`: each file is made anew, written, flushed,
and then named in a journal beside the folder; MANIFEST.json comes last; the caller's check runs on
the hidden folder; then one rename makes it OUT. KEY is of what the output is made from: a later
writer of the same goes on from the finished files, one of something else is told. Without a key
nothing is kept.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from morph import __version__
from morph.checkpoint._claim import Claim
from morph.checkpoint._folder import MANIFEST
from morph.checkpoint._format import MIB, dump_json
from morph.checkpoint._journal import Done, Journal, first_line, key_of
from morph.checkpoint._linux import clone, exchange
from morph.checkpoint._newfile import NewFile, file_digest, storage_errors
from morph.checkpoint._output import check_output
from morph.errors import (
    CheckpointError,
    Interrupted,
    OutputExists,
    StorageError,
    VerificationFailed,
    escape,
)

_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


class Staging:
    """A hidden folder that becomes `out` when the `with` block calls `publish`.

    `key` says what the output is made from (a mapping for JSON). Where the block ends by Ctrl-C or
    a StorageError, finished files are kept, and a later Staging of the same key may `reuse` them;
    any other exception removes the hidden folder. `restart` drops what a writer of another key
    left. `hashing=False` takes no sha256 and writes no manifest. `durable=False` skips fsync.

    Raises OutputExists where `out` exists (without `force`), is an input, lies inside one or holds
    one, or is being written by another process; UsageError where its parent does not exist;
    MismatchError where an unfinished write of another key is there; StorageError where fewer than
    `need` bytes are free, or the disk fails; Interrupted after Ctrl-C where files are kept.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        inputs: Sequence[Path] = (),
        need: int = 0,
        force: bool = False,
        durable: bool = True,
        hashing: bool = True,
        key: Mapping[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.out = check_output(Path(out), inputs, force)
        self.need, self.force, self.durable, self.hashing = need, force, durable, hashing
        self._restart, self._line = restart, None if key is None else first_line(key)
        self._claim = Claim(self.out)
        self._mine = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._key = self._mine if self._line is None else key_of(self._line)
        self.path = self._claim.folder(self._key)
        self.files: dict[str, int] = {}
        self.resumed: list[str] = []
        self._journal: Journal | None = None
        self._left: dict[str, tuple[Done, Future[str] | None]] = {}
        self._digests: dict[str, Future[str]] = {}
        self._flushed: list[Future[None]] = []
        self._open: list[NewFile] = []
        workers = min(4, os.cpu_count() or 1) + 1  # hashing, and one to wait for the disk
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="morph-write")
        self._stop = threading.Event()
        self._ours = self._published = False

    def __enter__(self) -> Staging:
        try:
            with storage_errors(self.out.parent):
                self._claim.acquire()
                past = self._claim.clear(self._line, self.force, self._restart)
                if self._line is not None:
                    path = self._claim.journal(self._key)
                    self._journal = Journal(path, self._line, past, self.durable)
                self._ours = True
                if past is None:
                    os.mkdir(self.path, 0o777)
                if self._journal is not None:
                    self._sync_folder(self.out.parent)
                    self._take_over(self._journal)
            self.check_space(self.need)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = isinstance(error, (KeyboardInterrupt, StorageError, Interrupted))
        try:
            kept = self._leave(keep=stopped)
        finally:
            self._claim.release()
        note = " ".join(text for text in (self._missing(error), kept) if text)
        if kept and isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"stopped. {kept}") from None
        if note and isinstance(error, (StorageError, Interrupted)):
            raise type(error)(f"{error} {note}") from error.__cause__

    @contextmanager
    def create(self, name: str, *, share: bool = True) -> Iterator[NewFile]:
        """Yield a new file to append to; at the end it is flushed while the next is written.

        `share` allows that its blocks are shared with the files it is copied from.
        """
        with self._create(name, share, self._journal) as file:
            yield file

    def write(self, name: str, data: bytes) -> None:
        """Make one file of `data`."""
        if not self.reuse(name, len(data), lambda path: path.read_bytes() == data):
            with self.create(name) as file:
                file.append(data)

    def link(self, name: str, original: Path, fd: int) -> bool:
        """Make a second name of the open file `original`; False where that cannot be."""
        path = self._place(name)
        with storage_errors(path):
            try:
                os.link(original, path, follow_symlinks=False)
            except OSError as error:
                if error.errno in _NO_LINK:
                    return False
                raise
            file = NewFile(path, os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
        with self._written(name, file, self._journal):
            if not os.path.samestat(os.fstat(fd), os.lstat(path)):
                raise CheckpointError(f"{escape(original)} was replaced meanwhile. Start again.")
            file.size = os.fstat(fd).st_size
        return True

    def reuse(self, name: str, nbytes: int, same: Callable[[Path], bool] | None = None) -> bool:
        """Take a file that a stopped writer finished, where it is still what the journal says.

        `same` compares what the key does not vouch for.
        """
        if name not in self._left:
            return False
        done, digest = self._left[name]
        with storage_errors(self.path / name):
            good = done.nbytes == nbytes and (digest is None or digest.result() == done.sha256)
            if not good or (same is not None and not same(self.path / name)):
                self._forget(name)
                return False
        del self._left[name]
        self.files[name] = nbytes
        if digest is not None and self.hashing:
            self._digests[name] = digest
        self.resumed.append(name)
        return True

    def clones(self, fd: int) -> bool:
        """Return whether files here can share the blocks of an open file."""
        try:
            trial = os.open(self.path, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC)
        except (OSError, AttributeError):
            return False
        try:
            return clone(fd, trial)
        except OSError:
            return False
        finally:
            os.close(trial)

    def check_space(self, need: int) -> None:
        """Raise StorageError where `need` bytes, less those that are there, are not free."""
        self.need = need
        want = need - sum(done.nbytes for done, _ in self._left.values())
        want += want // 100 + MIB
        free = shutil.disk_usage(self.out.parent).free
        if free < want:
            raise StorageError(
                f"{escape(self.out.parent)} has {free} bytes free, {want} are needed. Free some "
                "space, or write elsewhere."
            )

    def digests(self) -> dict[str, str]:
        """Return name -> sha256 of all files, once they are written and flushed."""
        self._wait()
        return {name: self._digests[name].result() for name in sorted(self._digests)}

    def publish(self, verify: Callable[[Path], object] | None = None) -> dict[str, str]:
        """Write the manifest, run `verify(folder)`, and rename the folder to `out`.

        Returns name -> sha256. What `verify` raises goes through, and `out` does not appear.
        """
        digests = self.digests()
        with storage_errors(self.path):
            for name in list(self._left):
                self._forget(name)
        if self.hashing:
            entries = {n: {"bytes": self.files[n], "sha256": digests[n]} for n in digests}
            manifest = {"format": 1, "morph": __version__, "files": entries}
            with self._create(MANIFEST, True, None) as file:  # nobody goes on from a manifest
                file.append(dump_json(manifest))
            self._wait()
        if verify is not None:
            verify(self.path)
            self._check_untouched()
        with storage_errors(self.out):
            for folder in sorted({p for n in self.files for p in Path(n).parents}, reverse=True):
                self._sync_folder(self.path / folder)
            self._rename()
        return digests

    # --- files ------------------------------------------------------------------------------------

    def _place(self, name: str) -> Path:
        for flushed in [f for f in self._flushed if f.done()]:
            flushed.result()  # a disk that failed is told early
        path = self.path / name
        if "/" in name:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def _create(self, name: str, share: bool, journal: Journal | None) -> Iterator[NewFile]:
        path = self._place(name)
        with storage_errors(path):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            file = NewFile(path, os.open(path, flags, 0o666), share)
        with self._written(name, file, journal), storage_errors(path):
            yield file

    @contextmanager
    def _written(self, name: str, file: NewFile, journal: Journal | None) -> Iterator[None]:
        self._open.append(file)
        if self.hashing:
            self._digests[name] = self._pool.submit(file.digest)
        yield
        file.finish()
        self.files[name] = file.size
        self._flushed.append(self._pool.submit(self._flush, name, file, journal))

    def _flush(self, name: str, file: NewFile, journal: Journal | None) -> None:
        file.flush(self.durable)
        digest = self._digests[name].result() if self.hashing else None
        if journal is not None and (digest is not None or self.durable):
            with storage_errors(journal.path):
                journal.add(name, Done(file.size, digest))

    def _wait(self) -> None:
        while self._flushed:
            self._flushed.pop(0).result()

    def _check_untouched(self) -> None:
        found = {
            p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir()
        }
        sizes = {n: (self.path / n).stat().st_size for n in found & set(self.files)}
        wrong = (found ^ set(self.files)) | {n for n, s in sizes.items() if s != self.files[n]}
        if wrong:
            raise VerificationFailed(
                f"{escape(self.out.name)}: {escape(sorted(wrong)[0])} changed while the result was "
                "being checked. Nothing was written."
            )

    # --- publishing -------------------------------------------------------------------------------

    def _rename(self) -> None:
        if not os.path.lexists(self.out):
            os.rename(self.path, self.out)
            self._published = True
            self._sync_folder(self.out.parent)
            return
        if not self.force:
            raise OutputExists(f"{escape(self.out)} appeared meanwhile and was left alone.")
        old = self.path  # where the two could be exchanged in one step
        if not exchange(self.path, self.out):
            old = self._claim.folder(self._mine, "old")
            try:
                os.rename(self.out, old)
                os.rename(self.path, self.out)
            except BaseException:
                if os.path.lexists(old) and not os.path.lexists(self.out):
                    os.rename(old, self.out)
                raise
        self._published = True
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

    # --- what a writer before us finished, and what we leave to the next --------------------------

    def _take_over(self, journal: Journal) -> None:
        """Keep the files of a writer before us that the journal names; hash them meanwhile."""
        for name, done in list(journal.done.items()):
            path = self.path / name
            found = path.lstat() if os.path.lexists(path) else None
            whole = found and stat.S_ISREG(found.st_mode) and found.st_size == done.nbytes
            if not whole or (self.hashing and not done.sha256):
                journal.forget(name)
            else:
                digest = self._pool.submit(file_digest, path, self._stop) if done.sha256 else None
                self._left[name] = done, digest
        self._drop_unfinished(journal)

    def _drop_unfinished(self, journal: Journal) -> None:
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):
                    path.rmdir()  # where it is empty
            elif path.relative_to(self.path).as_posix() not in journal.done:
                path.unlink()

    def _forget(self, name: str) -> None:
        assert self._journal is not None
        del self._left[name]
        self._journal.forget(name)
        (self.path / name).unlink()

    def _leave(self, keep: bool) -> str:
        """Give everything back; return what is kept and how to go on, or an empty string."""
        self._stop.set()
        for file in self._open:
            file.abandon()
        self._pool.shutdown(cancel_futures=True)
        for file in self._open:
            file.close()
        kept, journal = "", self._journal
        if journal and journal.done and keep and not self._published and self.path.is_dir():
            with suppress(OSError):
                self._drop_unfinished(journal)
            nbytes = sum(done.nbytes for done in journal.done.values())
            kept = (
                f"Finished files are kept in {escape(self.path)} ({len(journal.done)}, {nbytes} "
                "bytes): the same command goes on from there."
            )
        elif self._ours:
            shutil.rmtree(self.path, ignore_errors=True)  # gone already where it was published
            with suppress(OSError):
                os.unlink(self._claim.journal(self._key))
        if journal is not None:
            journal.close()
        return kept

    def _missing(self, error: BaseException | None) -> str:
        """Say how many bytes a full disk lacks, now that what is unfinished is gone."""
        cause = error.__cause__ if isinstance(error, StorageError) else None
        if not isinstance(cause, OSError) or cause.errno != errno.ENOSPC:
            return ""
        there = sum(done.nbytes for done in self._journal.done.values()) if self._journal else 0
        lacks = self.need - there - shutil.disk_usage(self.out.parent).free
        return f"{lacks} more bytes are needed." if lacks > 0 else ""
