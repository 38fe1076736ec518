"""Pickled weights become safetensors: the layout from a closed process, the bytes from the file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morph.checkpoint import (
    Staging,
    Weights,
    check_output,
    clean_config,
    dump_json,
    load_json,
    text_config,
)
from morph.checkpoint._copying import Meter, copy_side_files, file_identity, reading
from morph.checkpoint._folder import ADAPTER, INDEX, MANIFEST, SINGLE, side_files
from morph.checkpoint._format import MAX_JSON, MIB, read_at, read_small
from morph.errors import CheckpointError, MorphError, VerificationFailed, escape
from morph.pipeline._pickle_shards import Shard, make_shard, write_shard
from morph.pipeline._torch_files import ADAPTER as PICKLED_ADAPTER
from morph.pipeline._torch_files import PICKLE_INDEX, Found, TorchFile, find, look
from morph.pipeline._unpickling import Layout, Stored, hashes, layouts

Say = Callable[[str], None]
Progress = Callable[[int, int], object]
# The two ends of a model that share one tensor where config.json says so
_HEAD = re.compile(r"(?:.*\.)?lm_head\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?(embed_tokens|wte|word_embeddings|embed_in|embeddings)\.weight")
_MOST = 64  # how many times its own bytes a file may have in tensors that share them


@dataclass(kw_only=True)
class _Job:
    """What is converted, and what is found out while it is."""

    found: Found
    files: list[TorchFile]
    config: dict[str, Any] | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> Weights:
        """The folder as a source of side files; it has no weights that are checked."""
        return Weights(
            path=self.found.folder,
            tensors={},
            shards=(),
            index="",
            absent={},
            other_files=tuple(self.copies),
            ignored_files=tuple(self.left_out),
            notes=(),
            headers={},
        )


def convert_pickle_command(
    model: str,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the pickled weights of `model`, a folder or a file, as safetensors to `out`.

    A process without files, network and further processes loads the pickles with
    `weights_only=True` and tells where each tensor lies; its bytes are copied from the file, in
    their dtype. Afterwards a second such process loads all tensors as torch does, and every tensor
    of the output is compared with them. Side files are copied; code, pickles and training state
    are not. Returns what was written, for `terminal.emit`; `dry_run` unpickles nothing.

    Raises CheckpointError for what is no plain weights, UsageError where there are safetensors
    already, VerificationFailed where a tensor differs, OutputExists, StorageError; Interrupted
    after Ctrl-C. Then nothing was written.
    """
    say = say or (lambda message: None)
    found = find(model)
    target = check_output(Path(out), found.inputs, force)
    with ExitStack() as stack:
        job = _Job(found=found, files=[], notes=list(found.notes))
        for name in found.names:
            job.files.append(look(found.folder, name))
            stack.callback(os.close, job.files[-1].fd)
        _side(job)
        if dry_run:
            return _dry(job, Path(out), target)
        say("reading the pickles in a process without files, network and processes")
        read, protections = layouts(job.files)
        shards = _shards(job, read)
        return _write(job, shards, protections, Path(out), force, restart, say, progress)


def _side(job: _Job) -> None:
    """Decide what becomes of the files beside the weights."""
    folder = job.found.folder
    if job.found.alone:
        more = os.path.lexists(folder / "config.json")
        job.notes.append(
            "Weights alone are written"
            + (f"; give {escape(folder)} to take its config.json along." if more else ".")
        )
        return
    other, ignored = side_files(folder, {*job.found.names, PICKLE_INDEX})
    job.copies = {name: name for name in other if name not in (MANIFEST, "morph.json")}
    job.left_out = list(ignored)
    if not os.path.lexists(folder / "config.json"):
        if "adapter_config.json" not in other:
            job.notes.append(
                "There is no config.json: what is written holds weights, but is no model yet."
            )
        return
    raw = read_small(folder, "config.json", MAX_JSON["config"])
    config = load_json(raw, escape(folder / "config.json"))
    if not isinstance(config, dict):
        raise CheckpointError(f"{escape(folder / 'config.json')} must be a JSON object.")
    dropped: list[str] = []
    job.config = clean_config(config, dropped)
    job.texts["config.json"] = dump_json(job.config) if dropped else raw
    if dropped:
        job.notes.append(f"config.json: left out {', '.join(map(escape, dropped))}.")


def _dry(job: _Job, out: Path, target: Path) -> dict[str, Any]:
    free = shutil.disk_usage(target.parent).free
    return {
        "would_write": str(out),
        "files": [
            f"{escape(f.name)}: {'zip' if f.zip else 'format before torch 1.6'}, {f.nbytes} bytes"
            for f in job.files
        ],
        "bytes": sum(file.weight_bytes for file in job.files),
        "bytes_free": free,
        "left_out": job.left_out or None,
        "notes": [*job.notes, "Nothing was unpickled, and nothing was written."],
    }


# --- what goes where ------------------------------------------------------------------------------


def _shards(job: _Job, read: Sequence[Layout]) -> list[Shard]:
    """Return the output files, one for each input that holds tensors."""
    homes: dict[str, TorchFile] = {}
    kept: list[tuple[TorchFile, list[Stored]]] = []
    for file, layout in zip(job.files, read, strict=True):
        for tensor in layout.tensors:
            if tensor.name in homes:
                raise CheckpointError(
                    f"{escape(job.found.folder)}: tensor '{escape(tensor.name, 80)}' is in two "
                    f"files, {escape(homes[tensor.name].name)} and {escape(file.name)}."
                )
            homes[tensor.name] = file
        job.dropped |= {name: f"{what}, no tensor" for name, what in layout.others.items()}
        job.left_out += [f"{escape(file.name)}: {what}" for what in layout.beside]
        kept.append((file, _untied(job, file, layout.tensors)))
    _check_index(job, homes)
    kept = [(file, tensors) for file, tensors in kept if tensors]
    if not kept:
        raise CheckpointError(f"{escape(job.found.folder)}: the pickles hold no tensors.")
    names = _names(job, len(kept))
    return [make_shard(n, file, tensors) for n, (file, tensors) in zip(names, kept, strict=True)]


def _names(job: _Job, count: int) -> list[str]:
    if count > 1:
        return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    alone = "adapter_config.json" in job.copies and job.config is None
    return [ADAPTER if alone or job.found.names == (PICKLED_ADAPTER,) else SINGLE]


def _check_index(job: _Job, homes: Mapping[str, TorchFile]) -> None:
    weight_map = job.found.weight_map
    if weight_map is None:
        return
    where = escape(job.found.folder / PICKLE_INDEX)
    for name, file in weight_map.items():
        if name not in homes or homes[name].name != file:
            raise CheckpointError(
                f"{where} puts tensor '{escape(name, 80)}' into {escape(file)}, which does not "
                "hold it. Nothing was written."
            )
    for name, home in homes.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{escape(home.path)} holds tensor '{escape(name, 80)}', which {PICKLE_INDEX} does "
                "not list. Nothing was written."
            )


def _untied(job: _Job, file: TorchFile, tensors: Sequence[Stored]) -> list[Stored]:
    """Return the tensors that are written; a head that is the embedding is not, if config says so.

    All others that share their bytes are written in full, each: what they mean is not known here.
    """
    config = job.config or {}
    tied = True in (
        config.get("tie_word_embeddings"),
        text_config(config).get("tie_word_embeddings"),
    )
    places: dict[Any, list[Stored]] = {}
    for tensor in tensors:
        if tensor.nbytes:
            key = (tensor.start, tensor.dtype, tensor.shape, tensor.stride)
            places.setdefault(key, []).append(tensor)
    gone: set[str] = set()
    shared = 0
    for group in places.values():
        ends = [t.name for t in group if _EMBEDDING.fullmatch(t.name)]
        heads = [t.name for t in group if _HEAD.fullmatch(t.name)] if tied and ends else []
        for name in heads:
            job.dropped[escape(name, 80)] = (
                f"the same storage as {escape(ends[0], 80)}, tied by config.json"
            )
        gone.update(heads)
        shared += max(0, len(group) - len(heads) - 1)
    if shared:
        job.notes.append(
            f"{escape(file.name)}: {shared} tensors share the bytes of others and are written in "
            "full, each."
        )
    found = [tensor for tensor in tensors if tensor.name not in gone]
    nbytes = sum(tensor.nbytes for tensor in found)
    if nbytes > _MOST * file.nbytes:
        raise CheckpointError(
            f"{escape(file.path)} has {file.nbytes} bytes, and tensors of {nbytes} made of them. "
            "That is not plausible, and nothing was written."
        )
    return found


# --- writing --------------------------------------------------------------------------------------


def _write(
    job: _Job,
    shards: list[Shard],
    protections: tuple[str, ...],
    out: Path,
    force: bool,
    restart: bool,
    say: Say,
    progress: Progress | None,
) -> dict[str, Any]:
    if len(shards) > 1:
        weight_map = {t.name: shard.name for shard in shards for t in shard.tensors}
        total = sum(t.nbytes for shard in shards for t in shard.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        job.texts[INDEX] = dump_json(index)
    folder = job.found.folder
    weights = sum(shard.nbytes for shard in shards)
    side = sum((folder / name).stat().st_size for name in job.copies.values())
    need = weights + side + sum(map(len, job.texts.values()))
    meter = Meter(need + weights, progress)
    staging = Staging(
        out,
        inputs=job.found.inputs,
        need=need,
        force=force,
        key=_key(job, shards),
        restart=restart,
    )
    with ExitStack() as stack:
        pool, stop = stack.enter_context(ThreadPoolExecutor(1)), threading.Event()
        stack.callback(stop.set)  # before the pool is waited for
        stage = stack.enter_context(staging)
        digests = [pool.submit(_digest, file, stop) for file in job.files]
        for shard in shards:
            write_shard(stage, shard, meter)
        copy_side_files(stage, job.source, job.copies, meter)
        for name in sorted(job.texts):
            stage.write(name, job.texts[name])
            meter.add(len(job.texts[name]))
        say("comparing every tensor with what torch loads from the pickles")
        sums = _compare(stage.path, shards, meter)
        inputs = {f.name: d.result() for f, d in zip(job.files, digests, strict=True)}
        stage.write("morph.json", dump_json({"converted_from_pickle": _record(job, inputs, sums)}))
        for file in job.files:
            file.check_unchanged()
        stage.publish()
    return {
        "wrote": str(out),
        "from": [file.name for file in job.files],
        "tensors": len(sums),
        "bytes": weights,
        "compared": f"{len(sums)} of {len(sums)} tensors equal to what torch loads, byte by byte",
        "dropped": [f"{name}: {why}" for name, why in job.dropped.items()] or None,
        "left_out": job.left_out or None,
        "resumed": sorted(stage.resumed) or None,
        "protections": list(protections),
        "notes": job.notes or None,
    }


def _key(job: _Job, shards: Sequence[Shard]) -> dict[str, Any]:
    """Return what the output is made from."""
    names = [*job.found.names, *job.copies.values()]
    plan = [
        (s.name, s.header, s.source.name, [(t.start, t.stride) for t in s.tensors]) for s in shards
    ]
    return {
        "files": {n: file_identity(job.found.folder, n, header=False) for n in sorted(names)},
        "plan": hashlib.sha256(repr(plan).encode()).hexdigest(),
    }


def _record(job: _Job, inputs: Mapping[str, str], sums: Mapping[str, str]) -> dict[str, Any]:
    """Return what morph.json tells: where each byte came from, and what was left out."""
    files = {f.name: {"bytes": f.nbytes, "sha256": inputs[f.name], "zip": f.zip} for f in job.files}
    return {
        "files": files,
        "tensors": dict(sums),
        "dropped": job.dropped,
        "left_out": sorted(job.left_out),
    }


def _digest(file: TorchFile, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    for at in range(0, file.nbytes, MIB):
        if stop.is_set():
            raise MorphError("abandoned")
        digest.update(read_at(file.fd, at, min(MIB, file.nbytes - at), file.path))
    return digest.hexdigest()


def _sums(written: Weights, shards: Sequence[Shard]) -> Iterator[tuple[Stored, str]]:
    """Yield every tensor with the sha256 of its bytes in the output, read back."""
    for shard in shards:
        with reading(written.path, shard.name) as fd:
            for tensor in shard.tensors:
                info, digest = written.tensors[tensor.name], hashlib.sha256()
                for at in range(info.start, info.stop, MIB):
                    digest.update(read_at(fd, at, min(MIB, info.stop - at), info.file))
                yield tensor, digest.hexdigest()


def _compare(folder: Path, shards: Sequence[Shard], meter: Meter) -> dict[str, str]:
    """Return tensor -> sha256 after comparing what was written with what torch loads."""
    written = Weights.open(folder)
    wanted = {t.name: (t.dtype, t.shape) for shard in shards for t in shard.tensors}
    have = {n: (info.dtype, info.shape) for n, info in written.tensors.items()}
    if wanted != have:
        name = sorted(n for n in wanted | have if wanted.get(n) != have.get(n))[0]
        raise VerificationFailed(
            f"tensor '{escape(name, 80)}' was written as {have.get(name)}, expected "
            f"{wanted.get(name)}. Nothing was written."
        )
    sums: dict[str, str] = {}
    sources = [shard.source for shard in shards]
    told = hashes(sources, [shard.tensors for shard in shards])
    with closing(told):  # the process ends with this, whatever happens
        for (_, sha256), (tensor, found) in zip(told, _sums(written, shards), strict=True):
            if found != sha256:
                raise VerificationFailed(
                    f"tensor '{escape(tensor.name, 80)}' was written with sha256 {found}, and "
                    f"torch loads {escape(sha256, 64)} from the pickle. Nothing was written."
                )
            sums[tensor.name] = found
            meter.add(tensor.nbytes)
    return sums
