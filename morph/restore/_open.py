"""Open PRE and POST; where that is allowed, headers are believed and not a wrong index."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morph.checkpoint import Checkpoint, Weights, dump_json, load_json
from morph.checkpoint._folder import INDEX, clean_config, find_shards, quantisation, read_config
from morph.checkpoint._format import MAX_JSON, read_small
from morph.checkpoint._weights import read_weights
from morph.errors import CheckpointError


def open_checkpoint(folder: Path, *, partial: bool = False, headers: bool = False) -> Checkpoint:
    """Return a checked checkpoint, quantised or not; with `headers` its index is not compared.

    Raises what `Checkpoint.open` raises, and says so where only the index is wrong.
    """
    if headers and folder.is_dir():
        return _by_headers(folder.resolve(), partial)
    try:
        return Checkpoint.open(folder, strict=False, partial=partial, quantised=True)
    except CheckpointError as error:
        if _only_index(folder, partial):
            raise CheckpointError(
                f"{error} --allow index believes the headers, and writes OUT's index anew."
            ) from error
        raise


def _only_index(folder: Path, partial: bool) -> bool:
    """Whether the folder opens once its index is not compared with the headers."""
    try:
        return bool(_by_headers(folder.resolve(), partial).index)
    except (CheckpointError, OSError):
        return False


def _by_headers(folder: Path, partial: bool) -> Checkpoint:
    raw = read_config(folder)
    dropped: list[str] = []
    config = clean_config(raw, dropped)
    shards = dataclasses.replace(find_shards(folder, partial=partial), weight_map=None)
    weights = read_weights(folder, shards)
    return Checkpoint(
        **vars(weights),
        config=config,
        raw_config=raw,
        dropped_keys=tuple(dropped),
        quantised=quantisation(config, weights.tensors),
    )


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
