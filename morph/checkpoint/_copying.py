"""What every writer of a checkpoint shares: watched sources, side files, and a count of bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from morph.checkpoint._folder import MANIFEST
from morph.checkpoint._format import identity, open_regular, read_at
from morph.checkpoint._staging import Staging
from morph.checkpoint._weights import Weights
from morph.errors import CheckpointError, escape

PROVENANCE, CARD, SOURCE_CARD = "morph.json", "README.md", "README.source.md"


class Meter:
    """Bytes done, told to the caller's `progress`."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def add(self, count: int) -> None:
        """Count bytes that are done."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


@contextmanager
def reading(
    root: Path, name: str, expect: tuple[int, int, int, int] | None = None
) -> Iterator[int]:
    """Open a source file, and check at the end that it is still the one that was opened."""
    fd = open_regular(root, name)
    try:
        before = identity(fd)
        if expect is not None and before != expect:
            raise CheckpointError(f"{escape(root / name)} was changed since it was opened.")
        yield fd
        if identity(fd) != before:
            raise CheckpointError(f"{escape(root / name)} was changed while it was being copied.")
    finally:
        os.close(fd)


def file_identity(root: Path, name: str, header: bool = True) -> dict[str, Any]:
    """Return what tells a file from a changed one: size, time, and sha256 of its header.

    In a Hugging Face cache the name of a blob is told too: it is a hash of the content.
    """
    fd = open_regular(root, name)
    try:
        nbytes, mtime, *_ = identity(fd)
        found: dict[str, Any] = {"bytes": nbytes, "mtime_ns": mtime}
        if header:
            length = int.from_bytes(read_at(fd, 0, 8, root / name), "little")
            found["header"] = hashlib.sha256(read_at(fd, 8, length, root / name)).hexdigest()
    finally:
        os.close(fd)
    real = (root / name).resolve()
    if real.parent.name == "blobs":
        found["blob"] = real.name
    return found


def identities(
    source: Weights, copies: Iterable[str], donors: Iterable[Path] = ()
) -> dict[str, dict[str, Any]]:
    """Return the identity of every file that an output is made from."""
    found = {name: file_identity(source.path, name) for name in source.shards}
    found |= {name: file_identity(source.path, name, header=False) for name in sorted(copies)}
    for path in sorted(donors):
        short = f"{path.parent.name}/{path.name}"
        found[str(path) if short in found else short] = file_identity(path.parent, path.name)
    return found


def copy_side_files(
    stage: Staging, source: Weights, copies: dict[str, str], meter: Meter, share: bool = True
) -> None:
    """Copy output name <- source name, each whole."""
    for name, original in sorted(copies.items()):
        with reading(source.path, original) as fd:
            size = os.fstat(fd).st_size
            if stage.reuse(name, size):
                meter.add(size)
                continue
            with stage.create(name, share=share) as target:
                target.reserve(size)
                target.copy(fd, source.path / original, 0, size, meter.add)


def side_copies(
    source: Weights, texts: set[str], skip: set[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return output name -> source name of side files, and what is not copied.

    A card that is written anew leaves the source's beside it under another name.
    """
    names = set(source.other_files)
    copies = {n: n for n in names if n not in skip | texts | {MANIFEST}}
    if CARD in names and CARD in texts and SOURCE_CARD not in names:
        copies[SOURCE_CARD] = CARD
    left = names - set(copies.values()) - {MANIFEST, PROVENANCE}
    return copies, tuple(sorted(left | set(source.ignored_files)))
