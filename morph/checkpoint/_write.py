"""Write a checkpoint by copying byte ranges between files; memory is bounded by a buffer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from morph import strict
from morph.checkpoint._copying import (
    PROVENANCE,
    Meter,
    copy_side_files,
    identities,
    reading,
    side_copies,
)
from morph.checkpoint._folder import INDEX, MANIFEST, clean_config, disagreements
from morph.checkpoint._format import (
    MIB,
    TensorInfo,
    check_basename,
    dump_json,
    read_at,
)
from morph.checkpoint._plan import MoveLike, NewTensor, Piece, Shard, kept_pieces, plan_shards
from morph.checkpoint._read import Checkpoint
from morph.checkpoint._staging import Staging
from morph.errors import CheckpointError, VerificationFailed, escape

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished checkpoint: its folder, sha256 of every file, and what was left out on purpose.

    `kept` are target tensors whose bytes come from the source, `made` all others. `not_copied`
    are files of the source, `dropped_keys` keys of its config that choose code, `resumed` files
    that an earlier run had finished.
    """

    path: Path
    files: Mapping[str, str]
    nbytes: int
    kept: tuple[str, ...]
    made: tuple[str, ...]
    dropped: Mapping[str, str]
    not_copied: tuple[str, ...]
    dropped_keys: tuple[str, ...]
    resumed: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__  # from_pretrained asks for str(), not for a path


def write_checkpoint(
    out: str | os.PathLike[str],
    *,
    source: Checkpoint,
    config: Mapping[str, Any],
    moves: Iterable[MoveLike] | None = None,
    new_tensors: Mapping[str, NewTensor] | None = None,
    replaced: Mapping[str, NewTensor] | None = None,
    dropped: Mapping[str, str] | None = None,
    given: Mapping[str, NewTensor] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    auto_map: Mapping[str, str] | None = None,
    skip_files: Iterable[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
    verify: Callable[[Path], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
    durable: bool = True,
) -> Written:
    """Write `out` from the bytes of `source`; it appears complete, or not at all.

    `moves` says which rows of which source tensor each target tensor is, or how it is computed
    (None: all unchanged); `given` are values in memory that it reads in place of source tensors or
    beside them. `replaced` gives target tensors other bytes, `new_tensors` adds some: (dtype,
    shape, data), where data are bytes, an array (bfloat16 as uint16), a `TensorInfo` of another
    checkpoint, or a function returning one of the first two. `dropped` maps source tensors to the
    reason why they go. `extra_files` are written as given; side files of the source are copied
    otherwise, its README.md as README.source.md where a new one is given. `auto_map` (auto class ->
    `module.Class` of an extra file) is the only key of its kind that config.json can have.
    `verify(folder)` runs on the complete hidden folder just before the rename; what it raises
    stops the write. `progress(done, total)` counts bytes.

    After Ctrl-C (Interrupted), a kill or a StorageError the same call goes on from the files that
    were finished; what another call left is dropped. Raises CheckpointError where tensors are
    unaccounted for or the source changes, OutputExists, UsageError. Same inputs give the same
    bytes.
    """
    conflict = source.tie_conflict()
    if conflict:
        raise CheckpointError(f"{escape(source.path)}: {conflict}")
    shards = plan_shards(
        source,
        None if moves is None else list(moves),
        dict(new_tensors or {}),
        dict(replaced or {}),
        dict(dropped or {}),
        max_shard_bytes,
        dict(given or {}),
    )
    texts = _texts(config, provenance, extra_files or {}, shards, auto_map)
    copies, not_copied = side_copies(source, set(texts) | {PROVENANCE}, set(skip_files))
    inputs = {source.path} | {
        p.data.file.parent for s in shards for p in s.pieces if isinstance(p.data, TensorInfo)
    }
    sizes = [s.nbytes for s in shards] + [len(t) for t in texts.values()]
    sizes += [(source.path / name).stat().st_size for name in copies.values()]
    meter = Meter(sum(sizes), progress)
    with Staging(
        out,
        inputs=sorted(inputs),
        need=sum(sizes),
        force=force,
        durable=durable,
        key=_key(source, shards, copies),
        restart=True,
    ) as stage:
        for shard in shards:
            _write_shard(stage, source, shard, meter)
        copy_side_files(stage, source, copies, meter)
        for name in sorted(texts):
            stage.write(name, texts[name])
            meter.add(len(texts[name]))
        _check_written(stage.path, shards)
        files = stage.publish(verify)
    pieces = [p for s in shards for p in s.pieces]
    return Written(
        path=stage.out,
        files=files,
        nbytes=sum(sizes),
        kept=tuple(sorted(p.target for p in pieces if p.origin is not None)),
        made=tuple(sorted(p.target for p in pieces if p.origin is None)),
        dropped=dict(dropped or {}),
        not_copied=not_copied,
        dropped_keys=source.dropped_keys,
        resumed=tuple(sorted(stage.resumed)),
    )


def kept_equal(
    source: Checkpoint,
    out: Checkpoint,
    moves: Iterable[MoveLike] | None = None,
    dropped: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Return (equal, changed, new) names of `out`'s tensors, compared with `source` byte by byte.

    With `moves` and `dropped` as they were written, each tensor is compared with the rows it was
    made from; computed ones are new. Streams both; holds two blocks of 4 MiB.
    """
    moves = None if moves is None else list(moves)
    kept = {p.target: p for p in kept_pieces(source, moves, dropped or {})}
    equal, changed, new = [], [], []
    for name, info in out.tensors.items():
        piece = kept.get(name)
        if piece is None:
            new.append(name)
        elif _same_bytes(source, piece, out, info):
            equal.append(name)
        else:
            changed.append(name)
    return equal, changed, new


def _same_bytes(source: Checkpoint, piece: Piece, out: Checkpoint, info: TensorInfo) -> bool:
    place = piece.data
    assert isinstance(place, TensorInfo)
    if (piece.dtype, piece.shape) != (info.dtype, info.shape):
        return False
    with reading(source.path, place.file.name) as a, reading(out.path, info.file.name) as b:
        for at in range(0, info.nbytes, 4 * MIB):
            count = min(4 * MIB, info.nbytes - at)
            left = read_at(a, place.start + at, count, place.file)
            if left != read_at(b, info.start + at, count, info.file):
                return False
    return True


def _texts(
    config: Mapping[str, Any],
    provenance: Mapping[str, Any] | None,
    extra: Mapping[str, bytes],
    shards: tuple[Shard, ...],
    auto_map: Mapping[str, str] | None,
) -> dict[str, bytes]:
    """Return the files that are written from memory."""
    taken = {"config.json", INDEX, MANIFEST, PROVENANCE, *(s.name for s in shards)}
    for name in extra:
        if check_basename(name, "extra_files") in taken or name.startswith("."):
            raise CheckpointError(
                f"extra file '{escape(name)}' has a name that morph writes itself."
            )
    texts = dict(extra)
    cleaned = clean_config(config, [])
    if auto_map is not None:
        for place in auto_map.values():
            if f"{place.partition('.')[0]}.py" not in extra:
                raise CheckpointError(f"auto_map: '{escape(place)}' is in no file that is written.")
        cleaned["auto_map"] = dict(auto_map)
    texts["config.json"] = dump_json(cleaned)
    if provenance is not None:
        texts[PROVENANCE] = dump_json(strict.plain(provenance))
    if len(shards) > 1:
        weight_map = {p.target: s.name for s in shards for p in s.pieces}
        total = sum(p.nbytes for s in shards for p in s.pieces)
        texts[INDEX] = dump_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return texts


def _key(source: Checkpoint, shards: Iterable[Shard], copies: Mapping[str, str]) -> dict[str, Any]:
    """Return what the bytes that come from files are made from.

    Those that come from memory are not in it: a file that is there already is compared with them.
    """
    places = [
        (shard.name, piece.data.file, piece.data.start, piece.data.stop)
        for shard in shards
        for piece in shard.pieces
        if isinstance(piece.data, TensorInfo)
    ]
    donors = {file for _, file, _, _ in places if file.parent != source.path}
    headers = {s.name: hashlib.sha256(s.header).hexdigest() for s in shards}
    layout = [(name, str(file), start, stop) for name, file, start, stop in places]
    return {
        "format": 1,
        "files": identities(source, copies.values(), donors),
        "headers": headers,
        "copies": dict(copies),
        "places": hashlib.sha256(repr(layout).encode()).hexdigest(),
    }


def _write_shard(stage: Staging, source: Checkpoint, shard: Shard, meter: Meter) -> None:
    """Write header and data; tensors that follow each other in the source are copied as one."""
    if stage.reuse(shard.name, shard.nbytes, lambda path: _has(path, shard)):
        meter.add(shard.nbytes)
        return
    with stage.create(shard.name) as target, ExitStack() as stack:
        files: dict[Path, int] = {}
        target.reserve(shard.nbytes)
        target.append(shard.header)
        meter.add(len(shard.header))
        for run in _runs(shard.pieces):
            if not isinstance(run, TensorInfo):
                target.append(_buffer(run))
                meter.add(run.nbytes)
                continue
            if run.file not in files:
                known = source.headers.get(run.file.name)
                expect = known.identity if known and run.file.parent == source.path else None
                files[run.file] = stack.enter_context(
                    reading(run.file.parent, run.file.name, expect)
                )
            target.copy(files[run.file], run.file, run.start, run.nbytes, meter.add)


def _has(path: Path, shard: Shard) -> bool:
    """Return whether a file has the header and, in their places, the pieces that are in memory."""
    with open(path, "rb", buffering=0) as file:
        at = len(shard.header)
        if read_at(file.fileno(), 0, at, path) != shard.header:
            return False
        for piece in shard.pieces:
            if not isinstance(piece.data, TensorInfo):
                view = _buffer(piece)
                for start in range(0, len(view), MIB):
                    block = view[start : start + MIB]
                    if read_at(file.fileno(), at + start, len(block), path) != block:
                        return False
            at += piece.nbytes
    return True


def _runs(pieces: Iterable[Piece]) -> Iterator[TensorInfo | Piece]:
    """Yield places to copy, neighbours merged into one, and pieces whose bytes are in memory."""
    run: TensorInfo | None = None
    for piece in pieces:
        place = piece.data
        if isinstance(place, TensorInfo):
            if run is not None and run.file == place.file and run.stop == place.start:
                run = replace(run, stop=place.stop)
                continue
            if run is not None:
                yield run
            run = place
        else:
            if run is not None:
                yield run
            run = None
            yield piece
    if run is not None:
        yield run


def _buffer(piece: Piece) -> memoryview:
    import numpy as np

    data: Any = piece.data() if callable(piece.data) else piece.data
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    view = memoryview(data).cast("B")
    if len(view) != piece.nbytes:
        raise CheckpointError(
            f"tensor '{escape(piece.target)}' needs {piece.nbytes} bytes, got {len(view)}."
        )
    return view


def _check_written(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Open what was written as a reader would, and compare names, types and shapes."""
    found = Checkpoint.open(folder, strict=False)
    want = {p.target: (p.dtype, p.shape) for s in shards for p in s.pieces}
    have = {n: (i.dtype, i.shape) for n, i in found.tensors.items()}
    if want != have:
        name = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))[0]
        raise VerificationFailed(
            f"tensor '{escape(name)}' was written as {have.get(name)}, expected {want.get(name)}. "
            "Nothing was written."
        )
    problems = disagreements(found.config, found.tensors)
    if problems:
        raise VerificationFailed(
            f"config and tensors do not fit: {' '.join(problems)} Nothing was written."
        )
