"""A folder made of pickles beside them, without opening one: sha256 of files, and of every tensor.

`morph convert-pickle` compared every tensor with what torch loads, in a closed process, and wrote
down the sha256 of both sides. Equal sums on both sides now say as much again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from morph.checkpoint import Weights
from morph.checkpoint._format import MIB, check_basename, open_regular, read_at
from morph.errors import CheckpointError, MismatchError, VerificationFailed, escape
from morph.pipeline._diff import Meter
from morph.pipeline._source import Say

KEY = "converted_from_pickle"
_HEX = re.compile(r"[0-9a-f]{64}")


def check_tensors(opened: Weights, record: Mapping[str, Any], *, say: Say) -> dict[str, Any]:
    """Compare the sha256 of every tensor with the record; raise VerificationFailed."""
    sums = _record(opened, record)["tensors"]
    if sums.keys() != opened.tensors.keys():
        name = min(sums.keys() ^ opened.tensors.keys())
        where = "missing" if name in sums else "not in the record of morph.json"
        raise VerificationFailed(f"{escape(opened.path)}: {escape(name, 100)} is {where}.")
    meter = Meter(opened.nbytes, say)
    for name, info in opened.tensors.items():
        if opened.sha256(name) != sums[name]:
            raise VerificationFailed(
                f"{escape(opened.path)}: {escape(name, 100)} is not what torch loaded from the "
                "pickle: its sha256 differs from the one in morph.json."
            )
        meter.add(info.nbytes)
    return {"tensors_equal_to_pickle": len(sums)}


def holds_pickles(opened: Weights, record: Mapping[str, Any], folder: Path) -> bool:
    """Return whether any of the recorded pickles lies in a folder."""
    return any(os.path.lexists(folder / name) for name in _record(opened, record)["files"])


def check_files(opened: Weights, record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Compare the pickles in a folder with the record; raise MismatchError where one is another."""
    files = _record(opened, record)["files"]
    for name, entry in files.items():
        why = _compare(folder, name, entry)
        if why:
            raise MismatchError(
                f"{escape(folder)} is not what {escape(opened.path)} was converted from: "
                f"{escape(name, 80)} {why}."
            )
    return {"against": str(folder), "pickles_equal": len(files)}


def _record(opened: Weights, record: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the record of a conversion, checked; raise CheckpointError where it is broken."""
    found = record.get(KEY)
    where = f"{escape(opened.path / 'morph.json')}: {KEY}"
    parts = [found.get(k) if isinstance(found, dict) else None for k in ("files", "tensors")]
    files, tensors = parts
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        raise CheckpointError(f"{where} needs files and tensors.")
    for name in files:
        check_basename(name, where)
    sums = [e.get("sha256") if isinstance(e, dict) else None for e in files.values()]
    if not files or not _are_sums([*sums, *tensors.values()]):
        raise CheckpointError(f"{where}: every file and tensor needs a sha256.")
    return {"files": files, "tensors": tensors}


def _are_sums(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) and _HEX.fullmatch(value) for value in values)


def _compare(folder: Path, name: str, entry: Mapping[str, Any]) -> str:
    """Return why a file is not the recorded one, or an empty string."""
    if not os.path.lexists(folder / name):
        return "is missing"
    fd = open_regular(folder, name)
    try:
        size, digest = os.fstat(fd).st_size, hashlib.sha256()
        if size != entry.get("bytes"):
            return f"has {size} bytes, not {escape(entry.get('bytes'), 40)}"
        for at in range(0, size, MIB):
            digest.update(read_at(fd, at, min(MIB, size - at), folder / name))
    finally:
        os.close(fd)
    return "" if digest.hexdigest() == entry["sha256"] else "has another sha256"
