"""Two checkpoints beside each other, tensor by tensor and role by role: did q and k move, where?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morph import checkpoint, difference, layouts
from morph.checkpoint import TensorInfo, Weights, clean_config
from morph.checkpoint._folder import LAYER, read_config
from morph.checkpoint._format import byte_size, natural
from morph.difference import Reader
from morph.errors import (
    InputFileError,
    MismatchError,
    StorageError,
    escape,
    nearest,
)
from morph.layouts import PREFIXES, Rows
from morph.pipeline import _diff_tables, _diff_words
from morph.pipeline._choosing import check_folder
from morph.pipeline._diff_tables import Part
from morph.pipeline._source import Say, quiet

UNCOMPARED = ("shape differs", "only in A", "only in B", "shard missing")
STATUSES = ("equal", "changed", "dtype differs", *UNCOMPARED)
TOLD = 8 * 2**30  # bytes from which on progress is told
# what a name says where no layout is known; the first that fits
_NAMES = (
    ("q_norm", r"(^|\.)(q|query)_?(layer)?norm"),
    ("k_norm", r"(^|\.)(k|key)_?(layer)?norm"),
    ("mixer", r"(^|\.)(linear_attn|mamba|ssm|mixer|conv|time_mix\w*)\."),
    ("norm", r"(^|[._])(layer_?norm|norm|ln)(?![a-z])|norm[._]|norm$"),
    ("mlp", r"(^|\.)(mlp|feed_forward|ffn|moe|block_sparse_moe|experts)\."),
    ("q", r"(^|\.)(q_proj|wq|query|q_lin|q)\."),
    ("k", r"(^|\.)(k_proj|wk|key|k_lin|k)\."),
    ("v", r"(^|\.)(v_proj|wv|value|v_lin|v)\."),
    ("o", r"(^|\.)(o_proj|wo|out_proj|out_lin|dense)\."),
    ("embedding", r"(^|\.)(embed_tokens|embeddings?|wte|wpe|tok_embeddings)\."),
    ("head", r"(^|\.)(lm_head|embed_out|output)\."),
)


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What every row of a checkpoint is for; `known` is False where only names tell it."""

    rows: Mapping[str, Sequence[Rows]]
    kinds: tuple[str, ...] = ()
    model_type: str = ""
    known: bool = False
    refusal: str = ""
    notes: tuple[str, ...] = ()


class Meter:
    """Says how far a long reading is, ten times at most."""

    def __init__(self, total: int, say: Say) -> None:
        self.total, self.say, self.done, self.told = total, say, 0, 0

    def add(self, nbytes: int) -> None:
        """Count bytes that were compared."""
        self.done += nbytes
        if self.total >= TOLD and self.done * 10 // max(1, self.total) > self.told:
            self.told = self.done * 10 // self.total
            self.say(f"compared {self.done / 2**30:.0f} of {self.total / 2**30:.0f} GiB")


def diff_command(
    a: str, b: str, *, out: Path | None = None, force: bool = False, say: Say = quiet
) -> dict[str, Any]:
    """Compare two checkpoints, or two LoRA adapters; with `out` write diff.json and diff.png.

    Tensors are matched by name, whatever shard they lie in; roles are those of B. Both are read
    once, in blocks; q and k of the full layers that changed are read again for their top direction.
    Raises MismatchError where no tensor can be compared, OutputExists, and what is raised where a
    folder is no checkpoint.
    """
    folders = [checkpoint.resolve(model) for model in (a, b)]
    if out is not None:
        check_folder(out, [str(f) for f in folders], force, ("diff.json", "diff.png"))
    first, second = (Weights.open(folder, partial=True) for folder in folders)
    shared = _matched(first, second)
    _refuse_strangers(first, second, shared)
    roles = roles_of(second, first)
    with Reader(first) as left, Reader(second) as right:
        parts = _compare(left, right, first, second, shared, roles, say)
    tensors = _tensors(first, second, shared, parts)
    every = [part for found in parts.values() for part in found]
    found: dict[str, Any] = {
        "a": a,
        "b": b,
        "adapters": first.is_adapter and second.is_adapter,
        "bytes": [first.nbytes, second.nbytes],
        "model_type": roles.model_type or None,
        "roles_known": roles.known,
        "kinds": list(roles.kinds),
        "refusal": roles.refusal or None,
        "counts": _counts(tensors),
        "groups": _diff_tables.groups(every),
        "layers": _diff_tables.layers(every, roles.kinds),
        "restore": _diff_tables.restorable(every, second.nbytes),
        "config_differs": _config_differences(first, second),
        "notes": [*roles.notes, *_renamed(shared), *_differing(tensors)],
        "tensors": tensors,
    }
    found["conclusion"], found["next"] = _diff_words.conclude(found)
    if out is not None:
        _write(out, found)
        say(f"wrote {out / 'diff.json'}, {out / 'diff.png'}")
    return found


def roles_of(weights: Weights, like: Weights | None = None) -> Roles:
    """Return what the rows of a checkpoint are for, by its layout or, without one, by names.

    Shapes of tensors in shards that are not here are those of `like`.
    """
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    if like is not None:
        shapes |= {n: like.tensors[n].shape for n in weights.absent if n in like.tensors}
    if not os.path.lexists(weights.path / "config.json"):
        why = f"{weights.path.name} has no config.json: roles are told by names alone."
        return Roles(rows=_by_names(shapes), notes=(why,))
    config = clean_config(read_config(weights.path), [])
    try:
        reading = layouts.read(config, shapes)
    except InputFileError as error:
        why = (
            f"Roles are told by names alone, and nothing tells which layers are softmax attention: "
            f"{error}"
        )
        return Roles(rows=_by_names(shapes), model_type=str(config.get("model_type")), notes=(why,))
    rows: dict[str, list[Rows]] = {}
    for row in reading.rows:
        rows.setdefault(row.tensor, []).append(row)
    return Roles(
        rows=rows,
        kinds=reading.kinds,
        model_type=reading.model_type,
        known=True,
        refusal=reading.refusal,
        notes=reading.notes,
    )


def _by_names(names: Iterable[str]) -> dict[str, list[Rows]]:
    found = {}
    for name in names:
        place = LAYER.match(name)
        role = next((r for r, pattern in _NAMES if re.search(pattern, name)), "other")
        layer = int(place[1]) if place and len(place[1]) < 10 else None
        bias = role in ("q", "k", "v", "o") and name.endswith(".bias")
        found[name] = [Rows(tensor=name, layer=layer, role=role, kind="", bias=bias)]
    return found


def _matched(first: Weights, second: Weights) -> dict[str, str]:
    """Return B's names of the tensors of both, with A's, in the order in which B is read.

    A name that A lacks is looked for under the other prefixes that decoders have.
    """
    ours: dict[str, list[str]] = {}
    for name in first.tensors:
        ours.setdefault(_core(name), []).append(name)
    found = {}
    places = {name: (info.file.name, info.start, name) for name, info in second.tensors.items()}
    for name in sorted(places, key=places.__getitem__):
        others = [n for n in ours.get(_core(name), []) if n not in second.tensors]
        if name in first.tensors:
            found[name] = name
        elif name not in first.absent and len(others) == 1:
            found[name] = others[0]
    return found


def _core(name: str) -> str:
    """Return a name without what wrappers and versions put before it."""
    return name.removeprefix(max((p for p in PREFIXES if name.startswith(p)), key=len))


def _refuse_strangers(first: Weights, second: Weights, shared: Mapping[str, str]) -> None:
    """Raise MismatchError where no tensor is in both with one shape."""
    if any(first.tensors[one].shape == second.tensors[n].shape for n, one in shared.items()):
        return
    if shared:
        name, one = next(iter(shared.items()))
        raise MismatchError(
            f"{escape(first.path)} and {escape(second.path)} share {len(shared)} names, and every "
            f"shape differs, as of {escape(name, 80)}: {list(first.tensors[one].shape)} and "
            f"{list(second.tensors[name].shape)}. Compare checkpoints of one architecture."
        )
    one, other = (min(w.tensors, default="none") for w in (first, second))
    adapters = [w for w in (first, second) if w.is_adapter]
    hint = nearest(one, second.tensors)
    if len(adapters) == 1:
        hint = (
            f" {escape(adapters[0].path.name)} is a LoRA adapter: compare it with another adapter, "
            "or merge it into its base model first."
        )
    raise MismatchError(
        f"No tensor of {escape(first.path)} (such as {escape(one, 80)}) is in "
        f"{escape(second.path)}, which has {escape(other, 80)}.{hint}"
    )


def _compare(
    left: Reader,
    right: Reader,
    first: Weights,
    second: Weights,
    shared: Mapping[str, str],
    roles: Roles,
    say: Say,
) -> dict[str, list[Part]]:
    """Compare every tensor that is in both with one shape; return its parts by B's name."""
    pairs = [(first.tensors[m], second.tensors[n]) for n, m in shared.items()]
    meter = Meter(sum(one.nbytes + other.nbytes for one, other in pairs), say)
    found: dict[str, list[Part]] = {}
    for name, (one, other) in zip(shared, pairs):
        if one.shape == other.shape:
            found[name] = _parts(left, right, one, other, roles.rows[name])
        meter.add(one.nbytes + other.nbytes)
    return found


def _parts(
    left: Reader, right: Reader, one: TensorInfo, other: TensorInfo, rows: Sequence[Rows]
) -> list[Part]:
    segments = difference.segments_of(one.shape, [r.ranges for r in rows])
    sums = difference.compare(left, right, one, other, segments, len(rows))
    sizes = [0] * len(rows)
    for start, stop, n in segments:
        sizes[n] += byte_size(other.dtype, (stop - start,))
    parts = [Part(rows=r, nbytes=n, sums=s) for r, n, s in zip(rows, sizes, sums)]
    for part in parts:
        r, bad = part.rows, part.sums.bad_a + part.sums.bad_b
        wanted = r.role in ("q", "k") and r.kind in ("full", "") and len(one.shape) == 2
        real = part.sums.numbers and one.dtype != "C64"
        if wanted and real and part.sums.changed and not bad:
            ranges = r.ranges or ((0, one.shape[0]),)
            change = part.sums.change
            part.top = difference.top_direction(left, right, one, other, ranges, change)
    return parts


def _tensors(
    first: Weights,
    second: Weights,
    shared: Mapping[str, str],
    parts: Mapping[str, Sequence[Part]],
) -> list[dict[str, Any]]:
    """Return a row per tensor of either, in the order people count."""
    absent = {*first.absent, *second.absent}
    names = {*first.tensors, *second.tensors, *absent} - {m for n, m in shared.items() if m != n}
    told = []
    for name in sorted(names, key=natural):
        one = first.tensors.get(shared.get(name, name))
        other = second.tensors.get(name)
        status = _status(one, other, parts.get(name, ()))
        told.append(
            {
                "tensor": name,
                "name_in_a": shared.get(name, name) if one else None,
                "status": "shard missing" if name in absent else status,
                "dtype": [info.dtype if info else None for info in (one, other)],
                "shape": [list(info.shape) if info else None for info in (one, other)],
                "parts": [part.told() for part in parts.get(name, ())],
            }
        )
    return told


def _status(one: TensorInfo | None, other: TensorInfo | None, parts: Sequence[Part]) -> str:
    if one is None or other is None:
        return "only in B" if one is None else "only in A"
    if one.shape != other.shape:
        return "shape differs"
    if one.dtype != other.dtype:
        return "dtype differs"
    return "changed" if any(part.sums.changed for part in parts) else "equal"


def _counts(tensors: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counts = dict.fromkeys(STATUSES, 0)
    for row in tensors:
        counts[row["status"]] += 1
    return counts


def _config_differences(first: Weights, second: Weights) -> list[str]:
    """Return the keys of config.json, dotted, whose values differ."""
    both = []
    for weights in (first, second):
        there = os.path.lexists(weights.path / "config.json")
        both.append(_flat(read_config(weights.path)) if there else {})
    one, other = both
    if not one or not other:
        return []
    return sorted(k for k in one.keys() | other.keys() if one.get(k, "?") != other.get(k, "?"))


def _flat(value: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{place}.{key}" if place else str(key)
        found |= _flat(inner, name) if isinstance(inner, Mapping) else {name: inner}
    return found


def _renamed(shared: Mapping[str, str]) -> list[str]:
    other = [(one, name) for name, one in shared.items() if one != name]
    if not other:
        return []
    return [
        f"{len(other)} tensors have other names in A, such as {escape(other[0][0], 80)} for "
        f"{escape(other[0][1], 80)}: they were matched by what follows the prefix."
    ]


def _differing(tensors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say which tensors could not be compared, or hold what is no number."""
    notes = []
    for status in ("dtype differs", *UNCOMPARED):
        rows = [row for row in tensors if row["status"] == status]
        if rows:
            first = rows[0]
            values = {"shape differs": first["shape"], "dtype differs": first["dtype"]}
            what = f": {values[status][0]} and {values[status][1]}" if status in values else ""
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            notes.append(f"{status}: {escape(first['tensor'], 100)}{what}{more}.")
    for side in "ab":
        bad = [r["tensor"] for r in tensors if any(p[f"nonfinite_{side}"] for p in r["parts"])]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            notes.append(
                f"NaN or infinity in {side.upper()}: {escape(bad[0], 100)}{more}; such entries "
                "have no part in drift and cosine."
            )
    return notes


def _write(out: Path, found: Mapping[str, Any]) -> None:
    """Write diff.json and diff.png, each whole or not at all, when both are made."""
    from morph import report

    files = {"diff.png": report.difference_picture(found), "diff.json": checkpoint.dump_json(found)}
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            partial = out / f".{name}.partial"
            partial.write_bytes(data)
            os.replace(partial, out / name)
    except OSError as error:
        for name in files:
            with suppress(OSError):
                (out / f".{name}.partial").unlink(missing_ok=True)
        if fresh:
            with suppress(OSError):
                out.rmdir()
        raise StorageError(
            f"{escape(out)}: cannot write the comparison ({error.strerror}); give another --out."
        ) from error
