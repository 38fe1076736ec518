"""Patch a folder of weights: each file byte for byte the source's, but for the spliced ranges."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from morph import __version__
from morph.checkpoint._copying import Meter, copy_side_files, identities, reading, side_copies
from morph.checkpoint._folder import INDEX, MANIFEST
from morph.checkpoint._format import TensorInfo, check_basename, open_regular, read_at
from morph.checkpoint._format import identity as state_of
from morph.checkpoint._newfile import NewFile
from morph.checkpoint._staging import Staging
from morph.checkpoint._verify import manifest_entries
from morph.checkpoint._weights import Weights
from morph.errors import CheckpointError, UsageError, VerificationFailed, escape

Copy: TypeAlias = Literal["auto", "copy", "link"]


@dataclass(frozen=True)
class Splice:
    """Bytes `start:stop` of a shard of the patched folder that come from elsewhere.

    Positions count from the start of the file. `data` is a place of the same length in another
    file, a function that gives the bytes when they are written, or None for zeros.
    """

    shard: str
    start: int
    stop: int
    data: TensorInfo | Callable[[], Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes that are replaced."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Patched:
    """A finished patch: its folder, and the sha256 of every file (None: not hashed).

    `nbytes` are those of all files: `copied_bytes` from the source, `spliced_bytes` from elsewhere,
    the rest texts. `resumed` names files that an earlier run had finished, `linked` shards that are
    second names of the source's, `not_copied` files of the source that were left out. `notes` are
    for the user.
    """

    path: Path
    files: Mapping[str, str] | None
    nbytes: int
    copied_bytes: int
    spliced_bytes: int
    resumed: tuple[str, ...]
    linked: tuple[str, ...]
    not_copied: tuple[str, ...]
    notes: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__


def patch_folder(
    out: str | os.PathLike[str],
    *,
    source: Weights,
    splices: Iterable[Splice],
    inputs: Iterable[Weights | str | os.PathLike[str]] = (),
    texts: Mapping[str, bytes] | None = None,
    skip_files: Iterable[str] = (),
    identity: Mapping[str, Any] | None = None,
    copy: Copy = "auto",
    hashing: bool = True,
    force: bool = False,
    restart: bool = False,
    durable: bool = True,
    verify: Callable[[Path], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Patched:
    """Write `out`: the files of `source` verbatim, but for `splices`; whole, or not at all.

    Every shard keeps its name, its length and the bytes of its header. Side files are copied,
    `texts` take their place or come beside them; code, pickles and `skip_files` are left out.
    `splices` are in order within a shard. `inputs` are what else was read: folders that `out` may
    not touch, and weights whose files must be as they were opened. `identity` says what the
    splices and texts were made from (a mapping for JSON): a stopped write goes on only where it is
    the same. `copy`: "auto" shares blocks where the file system can, "copy" never, "link" makes
    shards without a splice second names of the source's. `hashing` takes the sha256 of every file,
    writes MANIFEST.json, and compares shards without a splice with the names of blobs in a hub
    cache and with the source's own manifest. `verify(folder)` runs on the complete hidden folder
    just before the rename. `progress(done, total)` counts bytes. `restart` drops what a write of
    other inputs left. Memory is bounded by a buffer of 1 MiB, and by what a splice computes.

    Raises CheckpointError for a splice that cannot be and for files that change meanwhile,
    MismatchError for an unfinished write of other inputs, VerificationFailed, OutputExists,
    UsageError, StorageError; Interrupted after Ctrl-C.
    """
    if copy not in ("auto", "copy", "link"):
        raise UsageError(f"copy is '{escape(copy)}'; it can be auto, copy or link.")
    if source.absent:
        name = next(iter(source.absent.values()))
        raise CheckpointError(f"{escape(source.path)} is not complete: {escape(name)} is missing.")
    inputs = list(inputs)
    by_shard = _by_shard(source, splices)
    opened = [source, *(i for i in inputs if isinstance(i, Weights))]
    job = _Job(source=source, splices=by_shard, donors=_donors(by_shard, opened), copy=copy)
    texts = dict(texts or {})
    for name in texts:
        if check_basename(name, "texts") in {*source.shards, MANIFEST} or name.startswith("."):
            raise CheckpointError(f"text '{escape(name)}' has a name that is not for texts.")
    copies, not_copied = _copies(source, set(texts), set(skip_files))
    side = sum((source.path / original).stat().st_size for original in copies.values())
    shards = sum(map(job.size, source.shards))
    total = shards + side + sum(map(len, texts.values()))
    meter = Meter(total, progress)
    with Staging(
        out,
        inputs=sorted({source.path, *(f.parent for f in job.donors), *map(_folder, inputs)}),
        force=force,
        durable=durable,
        hashing=hashing,
        key=_key(job, copies, identity or {}),
        restart=restart,
    ) as stage:
        stage.check_space(total - _shared(stage, job))
        for name in source.shards:
            _write_shard(stage, job, name, meter)
        copy_side_files(stage, source, copies, meter, share=copy != "copy")
        for name in sorted(texts):
            stage.write(name, texts[name])
            meter.add(len(texts[name]))
        _check_written(stage.path, source)
        if hashing:
            _check_digests(job, stage.digests())
        files = stage.publish(verify)
    spliced = sum(s.nbytes for found in job.splices.values() for s in found)
    return Patched(
        path=stage.out,
        files=files if hashing else None,
        nbytes=total,
        copied_bytes=shards - spliced + side,
        spliced_bytes=spliced,
        resumed=tuple(sorted(stage.resumed)),
        linked=tuple(job.linked),
        not_copied=not_copied,
        notes=tuple(job.notes),
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is written, and what is found out while it is.

    `donors` are the files that splices are taken from, and the state in which they must stay.
    """

    source: Weights
    splices: Mapping[str, tuple[Splice, ...]]
    donors: Mapping[Path, tuple[int, int, int, int]]
    copy: Copy
    linked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def size(self, shard: str) -> int:
        """Bytes of a shard's file."""
        return self.source.headers[shard].identity[0]


def _donors(
    splices: Mapping[str, tuple[Splice, ...]], opened: Iterable[Weights]
) -> dict[Path, tuple[int, int, int, int]]:
    """Return the files that splices are taken from, as they were opened or as they are now."""
    places = [s.data for found in splices.values() for s in found]
    donors = {place.file for place in places if isinstance(place, TensorInfo)}
    known = {w.path / name: header.identity for w in opened for name, header in w.headers.items()}
    found = {}
    for file in sorted(donors):
        if file in known:
            found[file] = known[file]
            continue
        with reading(file.parent, file.name) as fd:
            found[file] = state_of(fd)
    return found


def _folder(given: Weights | str | os.PathLike[str]) -> Path:
    return given.path if isinstance(given, Weights) else Path(given)


def _by_shard(source: Weights, splices: Iterable[Splice]) -> dict[str, tuple[Splice, ...]]:
    """Return the splices of each shard; raise CheckpointError for one that cannot be."""
    found: dict[str, list[Splice]] = {}
    for splice in splices:
        where = f"splice {splice.start}:{splice.stop} of {escape(splice.shard)}"
        header = source.headers.get(splice.shard)
        if header is None:
            raise CheckpointError(f"{where}: {escape(source.path)} has no such shard.")
        first, last = 8 + len(header.raw), header.identity[0]
        if not first <= splice.start < splice.stop <= last:
            raise CheckpointError(f"{where}: the data of the shard are the bytes {first}:{last}.")
        before = found.setdefault(splice.shard, [])
        if before and splice.start < before[-1].stop:
            raise CheckpointError(
                f"{where}: it overlaps or precedes the one before, which ends at {before[-1].stop}."
            )
        if isinstance(splice.data, TensorInfo) and splice.data.nbytes != splice.nbytes:
            raise CheckpointError(
                f"{where}: it takes {splice.nbytes} bytes, the place in "
                f"{escape(splice.data.file)} has {splice.data.nbytes}."
            )
        before.append(splice)
    return {name: tuple(s) for name, s in found.items()}


def _copies(
    source: Weights, texts: set[str], skip: set[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return output name -> source name of all files but shards, and what is not copied."""
    copies, not_copied = side_copies(source, texts, skip)
    for name in ("config.json", source.index):
        if name and name not in texts and os.path.lexists(source.path / name):
            copies[name] = name
    if not source.index and os.path.lexists(source.path / INDEX):
        not_copied = tuple(sorted((*not_copied, INDEX)))  # it is of files that are not in use
    return copies, not_copied


def _key(job: _Job, copies: Mapping[str, str], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the output is made from; texts are compared when they are there already."""
    layout = [
        (name, s.start, s.stop, (str(s.data.file), s.data.start, s.data.stop))
        if isinstance(s.data, TensorInfo)
        else (name, s.start, s.stop, "zeros" if s.data is None else "computed")
        for name, found in sorted(job.splices.items())
        for s in found
    ]
    return {
        "format": 1,
        "morph": __version__,
        "files": identities(job.source, copies.values(), job.donors),
        "copies": dict(copies),
        "splices": hashlib.sha256(repr(layout).encode()).hexdigest(),
        "identity": dict(identity),
    }


def _shared(stage: Staging, job: _Job) -> int:
    """Return bytes of the output that take no space, because they are the source's own blocks."""
    whole = sum(job.size(n) for n in job.source.shards)
    if job.copy != "copy":
        with reading(job.source.path, job.source.shards[0]) as fd:
            if stage.clones(fd):
                return whole - sum(s.nbytes for found in job.splices.values() for s in found)
    if job.copy != "link":
        return 0
    alike = [n for n in job.source.shards if n not in job.splices]
    return sum(job.size(n) for n in alike if not _unlinkable(stage, job.source.path / n))


def _write_shard(stage: Staging, job: _Job, name: str, meter: Meter) -> None:
    source, size, splices = job.source, job.size(name), job.splices.get(name, ())
    path = source.path / name
    with reading(source.path, name, source.headers[name].identity) as fd, ExitStack() as stack:
        if stage.reuse(name, size, lambda made: _is_ours(made, job, name)):
            meter.add(size)
            return
        if job.copy == "link" and not splices and _linked(stage, job, name, fd):
            meter.add(size)
            return
        with stage.create(name, share=job.copy != "copy") as target:
            if not target.clone(fd):
                target.reserve(size)
            files: dict[Path, int] = {}
            for splice in splices:
                target.keep(fd, path, splice.start, meter.add)
                if isinstance(splice.data, TensorInfo):
                    file = splice.data.file
                    if file not in files:
                        opened = reading(file.parent, file.name, job.donors[file])
                        files[file] = stack.enter_context(opened)
                    target.copy(files[file], file, splice.data.start, splice.nbytes, meter.add)
                else:
                    _fill(target, splice)
                    meter.add(splice.nbytes)
            target.keep(fd, path, size, meter.add)


def _fill(target: NewFile, splice: Splice) -> None:
    """Write the bytes that come from no file."""
    if splice.data is None:
        target.zeros(splice.nbytes)
        return
    assert callable(splice.data)
    view = memoryview(splice.data()).cast("B")
    if len(view) != splice.nbytes:
        raise CheckpointError(
            f"splice {splice.start}:{splice.stop} of {escape(splice.shard)} takes "
            f"{splice.nbytes} bytes, got {len(view)}."
        )
    target.append(view)


def _is_ours(path: Path, job: _Job, name: str) -> bool:
    """Whether a file that is there has the shard's header, and is no link but where asked for."""
    raw = job.source.headers[name].raw
    if job.copy != "link" and path.stat().st_nlink > 1:
        return False
    fd = open_regular(path.parent, path.name)
    try:
        return read_at(fd, 8, len(raw), path) == raw
    finally:
        os.close(fd)


def _unlinkable(stage: Staging, path: Path) -> str:
    """Return why a file may not get a second name, or an empty string."""
    real = path.resolve()
    if real.parent.name == "blobs" or any(p.startswith("models--") for p in real.parts):
        return "it lies in a Hugging Face cache"
    if real.stat().st_uid != os.geteuid():
        return "it belongs to another user"
    if real.stat().st_dev != stage.path.stat().st_dev:
        return "it lies on another file system"
    return ""


def _linked(stage: Staging, job: _Job, name: str, fd: int) -> bool:
    """Make a shard a second name of the source's; False, and a note, where it must be copied."""
    path = job.source.path / name
    why = _unlinkable(stage, path)
    if not why and not stage.link(name, path.resolve(), fd):
        why = "the file system cannot link it"
    if why:
        job.notes.append(f"{escape(name)} was copied, not linked: {why}.")
    else:
        job.linked.append(name)
    return not why


def _check_written(folder: Path, source: Weights) -> None:
    """Open what was written as a reader would, and compare it with the source's headers."""
    try:
        found = Weights.open(folder)
    except CheckpointError as error:
        raise VerificationFailed(f"What was written is broken: {error} It was removed.") from error
    for name in source.shards:
        if found.headers[name].raw != source.headers[name].raw:
            raise VerificationFailed(
                f"{escape(name)} does not read as the source's does. Nothing was written."
            )


def _check_digests(job: _Job, digests: Mapping[str, str]) -> None:
    """Compare shards that were only copied with the digests that the source says they have."""
    told: dict[str, tuple[str, str]] = {}
    folder = job.source.path
    if os.path.lexists(folder / MANIFEST):
        try:
            entries = manifest_entries(folder)
        except CheckpointError as error:
            job.notes.append(f"The source's {MANIFEST} is not understood, nor copied: {error}")
        else:
            told = {n: (entries[n]["sha256"], MANIFEST) for n in job.source.shards if n in entries}
    for name in job.source.shards:
        real = (folder / name).resolve()
        if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
            told[name] = real.name, "the name of its blob"
    for name, (digest, where) in sorted(told.items()):
        if name not in job.splices and digests[name] != digest:
            raise VerificationFailed(
                f"{escape(folder / name)} is damaged: its sha256 is {digests[name]}, "
                f"{where} says {escape(digest, 64)}. Get it again. Nothing was written."
            )
