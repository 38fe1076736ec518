"""What is written about a restore: the record in morph.json, and the card."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from morph import __version__
from morph.checkpoint import Checkpoint, Weights, dump_json, load_json
from morph.checkpoint._copying import CARD, PROVENANCE, SOURCE_CARD
from morph.checkpoint._folder import MANIFEST
from morph.checkpoint._format import MAX_JSON, read_small
from morph.checkpoint._hub import name_of
from morph.errors import CheckpointError, escape

MARK = "<!-- morph restore wrote what is above -->"
FORMAT = 1
_HEX = re.compile(r"[0-9a-f]{64}")


def read_record(source: Weights) -> dict[str, Any]:
    """Return the morph.json of a folder; empty where there is none."""
    if not os.path.lexists(source.path / PROVENANCE):
        return {}
    where = escape(source.path / PROVENANCE)
    found = load_json(read_small(source.path, PROVENANCE, MAX_JSON["config"]), where)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} must be a JSON object, not {type(found).__name__}.")
    return found


def restored_records(source: Weights) -> list[dict[str, Any]]:
    """Return what morph.json says of earlier restores, the last one last."""
    found = read_record(source).get("restored", [])
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise CheckpointError(
            f"{escape(source.path / PROVENANCE)}: 'restored' must be a list of objects."
        )
    return found


def identity(source: Weights) -> dict[str, Any]:
    """Return what tells a folder of weights from others: names and hashes, no path, no time.

    `sha256` of a shard is there where it is known without reading it: from a manifest of morph, or
    from the name of a blob in a Hub cache.
    """
    known = _known_hashes(source)
    shards = {}
    for name in source.shards:
        header = source.headers[name]
        shards[name] = {
            "bytes": header.identity[0],
            "header_sha256": hashlib.sha256(header.raw).hexdigest(),
            **({"sha256": known[name]} if name in known else {}),
        }
    found: dict[str, Any] = {"name": name_of(source.path), "shards": shards}
    if isinstance(source, Checkpoint):
        found |= {"model_type": source.config["model_type"], "sha256": source.fingerprint}
    if source.absent:
        found["partial"] = True
    return found


def _known_hashes(source: Weights) -> dict[str, str]:
    found = {}
    for name in source.shards:
        real = (source.path / name).resolve()
        if real.parent.name == "blobs" and _HEX.fullmatch(real.name):
            found[name] = real.name
    if os.path.lexists(source.path / MANIFEST):
        data = load_json(read_small(source.path, MANIFEST, MAX_JSON["manifest"]), MANIFEST)
        files = data.get("files") if isinstance(data, dict) else None
        for name, entry in files.items() if isinstance(files, dict) else ():
            digest = entry.get("sha256") if isinstance(entry, dict) else None
            same = name in source.headers and entry.get("bytes") == source.headers[name].identity[0]
            if same and isinstance(digest, str) and _HEX.fullmatch(digest):
                found[name] = digest
    return found


def state(source: Weights) -> dict[str, Any]:
    """Return what changes when a weight file does: for going on after a stop, not for a result."""
    found = {}
    for name in source.shards:
        size, changed, *_ = source.headers[name].identity
        digest = hashlib.sha256(source.headers[name].raw).hexdigest()
        found[name] = {"bytes": size, "mtime_ns": changed, "header": digest}
    return found


def merged(source: Weights, record: Mapping[str, Any]) -> bytes:
    """Return morph.json of the result: what POST's held, and this restore at the end."""
    found = read_record(source)
    found["restored"] = [*restored_records(source), dict(record)]
    found["parent"] = {k: record["post"][k] for k in ("name", "sha256") if k in record["post"]}
    return dump_json(found)


def record(
    pre: Checkpoint,
    post: Weights,
    options: Mapping[str, Any],
    rules: Iterable[Mapping[str, Any]],
    rows: Mapping[str, list[list[int]]],
    notes: Iterable[str],
) -> dict[str, Any]:
    """Return the provenance of a restore, the same for the same inputs and options."""
    return {
        "format": FORMAT,
        "morph": __version__,
        "pre": identity(pre),
        "post": identity(post),
        "options": dict(options),
        "rules": [dict(r) for r in rules],
        "rows": dict(rows),
        "notes": list(notes),
    }


def card(source: Weights, text: str) -> bytes:
    """Return the card of the result: POST's front matter, `text`, and POST's own card.

    The front matter holds the license and the base model, which the Hub reads from README.md only.
    What follows it goes below `text` where POST has a README.source.md already; otherwise the
    writer keeps POST's README.md under that name. `text` of an earlier restore is replaced.
    """
    found = ""
    if os.path.lexists(source.path / CARD):
        found = read_small(source.path, CARD, MAX_JSON["config"]).decode("utf-8", "replace")
    front = re.match(r"---\r?\n.*?\n---\r?\n", found, flags=re.DOTALL)
    head = front[0] if front else ""
    if not found:
        rest = ""
    elif os.path.lexists(source.path / SOURCE_CARD):
        rest = found[len(head) :].rpartition(MARK)[2]
    else:
        rest = f"\n\nThe card of the fine-tuned model is {SOURCE_CARD}.\n"
    return f"{head}{text}{MARK}{rest or chr(10)}".encode()
