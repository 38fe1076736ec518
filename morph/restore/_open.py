"""Open PRE and POST; where that is allowed, headers are believed and not a wrong index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morph.checkpoint import Checkpoint, Weights, dump_json, load_json, refuse_adapter
from morph.checkpoint._folder import INDEX
from morph.checkpoint._format import MAX_JSON, read_small
from morph.errors import CheckpointError


def open_checkpoint(folder: Path, *, partial: bool = False, headers: bool = False) -> Checkpoint:
    """Return a checked checkpoint, quantised or not; with `headers` its index is not compared.

    Raises what `Checkpoint.open` raises, and says so where only the index is wrong; CheckpointError
    where an adapter lies beside the model.
    """
    found = _opened(folder, partial, headers)
    refuse_adapter(found)
    return found


def _opened(folder: Path, partial: bool, headers: bool) -> Checkpoint:
    options = {"strict": False, "partial": partial, "quantised": True}
    try:
        return Checkpoint.open(folder, **options, index=not headers)
    except CheckpointError as error:
        if not headers and _only_index(folder, options):
            raise CheckpointError(
                f"{error} --allow index believes the headers, and writes OUT's index anew."
            ) from error
        raise


def _only_index(folder: Path, options: Mapping[str, bool]) -> bool:
    """Whether the folder opens once its index is not compared with the headers."""
    try:
        return bool(Checkpoint.open(folder, **options, index=False).index)
    except CheckpointError:
        return False


def index_text(source: Weights) -> dict[str, bytes]:
    """Return the index that the headers call for, where the one in the folder says otherwise."""
    if not source.index or not os.path.lexists(source.path / INDEX):
        return {}
    found: Any = load_json(read_small(source.path, INDEX, MAX_JSON["index"]), INDEX)
    weight_map = {name: info.file.name for name, info in source.tensors.items()}
    if found.get("weight_map") == weight_map:
        return {}
    metadata = found.get("metadata")
    kept = {k: v for k, v in metadata.items()} if isinstance(metadata, Mapping) else {}
    kept["total_size"] = source.nbytes
    return {INDEX: dump_json({"metadata": kept, "weight_map": weight_map})}
