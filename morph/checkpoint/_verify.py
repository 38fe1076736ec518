"""Compare a written folder with its manifest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from morph.checkpoint._folder import MANIFEST, find_folder
from morph.checkpoint._format import MAX_JSON, MIB, load_json, open_regular, read_small
from morph.checkpoint._read import Checkpoint
from morph.errors import CheckpointError, VerificationFailed, escape


def verify_manifest(path: str | os.PathLike[str]) -> list[str]:
    """Return what differs from MANIFEST.json: file, expected, actual; empty where all is well.

    Reads every file once. Raises CheckpointError where there is no usable manifest.
    """
    folder = find_folder(path)
    files = manifest_entries(folder)
    problems = []
    for name, entry in sorted(files.items()):
        problem = _compare(folder, name, entry)
        if problem:
            problems.append(problem)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    problems += [
        f"{escape(name)}: not in the manifest."
        for name in sorted(found - set(files) - {MANIFEST})
        if not name.startswith(".") and "/." not in name
    ]
    return problems


def verify(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the opened checkpoint if it matches its manifest.

    Raises VerificationFailed listing every file that differs, CheckpointError where it is broken.
    """
    problems = verify_manifest(path)
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise VerificationFailed(f"{escape(Path(path))}: {' '.join(problems[:10])}{more}")
    return Checkpoint.open(path)


def manifest_entries(folder: Path) -> dict[str, Any]:
    """Return name -> {bytes, sha256} of a folder's MANIFEST.json; raise CheckpointError."""
    if not os.path.lexists(folder / MANIFEST):
        raise CheckpointError(
            f"{escape(folder)} has no {MANIFEST}: it was not written by morph, or is incomplete."
        )
    where = escape(folder / MANIFEST)
    data = load_json(read_small(folder, MANIFEST, MAX_JSON["manifest"]), where)
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or data.get("format") != 1:
        raise CheckpointError(f"{where}: expected format 1 and files.")
    for name, entry in files.items():
        parts = name.split("/")
        plain = name.isprintable() and "\\" not in name and ":" not in name
        if not plain or any(part in ("", ".", "..") for part in parts):
            raise CheckpointError(f"{where}: '{escape(name)}' is no file inside this folder.")
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise CheckpointError(f"{where}: '{escape(name)}' needs bytes and sha256.")
    return files


def _compare(folder: Path, name: str, entry: dict[str, Any]) -> str:
    if not os.path.lexists(folder / name):
        return f"{escape(name)}: missing."
    fd = open_regular(folder, name)
    try:
        size = os.fstat(fd).st_size
        if size != entry["bytes"]:
            return f"{escape(name)}: expected {escape(entry['bytes'])} bytes, found {size}."
        digest = hashlib.sha256()
        while block := os.read(fd, MIB):
            digest.update(block)
    finally:
        os.close(fd)
    if digest.hexdigest() != entry["sha256"]:
        return (
            f"{escape(name)}: expected sha256 {escape(entry['sha256'], 64)}, found "
            f"{digest.hexdigest()}."
        )
    return ""
