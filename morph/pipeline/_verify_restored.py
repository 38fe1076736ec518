"""A restored folder beside POST and PRE: only the recorded rows changed, and they are PRE's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from morph import restore
from morph.checkpoint import Checkpoint, Splice, TensorInfo, Weights
from morph.checkpoint._format import byte_size
from morph.difference import Reader
from morph.errors import CheckpointError, MismatchError, VerificationFailed, escape
from morph.pipeline._diff import Meter, roles_of
from morph.pipeline._source import Say
from morph.pipeline._verify_files import (
    BLOCK,
    OWN_FILES,
    compare_side_files,
    first_difference,
)
from morph.restore import _record
from morph.restore._select import ranges

Spans = dict[str, list[tuple[int, int]]]  # bytes of a tensor that were restored


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The last restore that morph.json tells of, checked."""

    pre: Mapping[str, Any]
    post: Mapping[str, Any]
    options: Mapping[str, Any]
    rules: Sequence[Mapping[str, Any]]
    rows: Mapping[str, Sequence[Sequence[int]]]

    @property
    def layers(self) -> list[int]:
        """The layers of which something was restored."""
        return sorted({layer for rule in self.rules for layer in rule["layers"]})


def read(opened: Weights) -> Restored:
    """Return the last record of a restored folder; raise CheckpointError where it is broken."""
    records = restore.restored_records(opened)
    where = f"{escape(opened.path / 'morph.json')}: restored"
    if not records:
        raise CheckpointError(f"{where} is empty.")
    record = records[-1]
    kinds = {"pre": dict, "post": dict, "options": dict, "rules": list, "rows": dict}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise CheckpointError(f"{where} needs {key}, as `morph restore` writes it.")
    for rule in record["rules"]:
        fine = isinstance(rule, dict) and isinstance(rule.get("part"), str)
        layers = rule.get("layers") if fine else None
        if not isinstance(layers, list) or not all(type(n) is int and n >= 0 for n in layers):
            raise CheckpointError(f"{where}: a rule needs a part and layers.")
    for name, spans in record["rows"].items():
        if name not in opened.tensors:
            raise CheckpointError(f"{where} names {escape(name, 100)}, which is not here.")
        _check_spans(where, name, spans, opened.tensors[name].shape)
    return Restored(**{key: record[key] for key in kinds})


def _check_spans(where: str, name: str, spans: Any, shape: Sequence[int]) -> None:
    at, fine = 0, isinstance(spans, list)
    for span in spans if fine else ():
        pair = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        fine = fine and pair and at <= span[0] < span[1] <= (shape[0] if shape else 1)
        at = span[1] if fine else 0
    if not fine:
        raise CheckpointError(f"{where}: rows of {escape(name, 100)} are no ranges of its rows.")


def summary(opened: Weights) -> str:
    """Return the last restore in words."""
    record = read(opened)
    parts = ", ".join(dict.fromkeys(escape(rule["part"], 20) for rule in record.rules))
    layers = f"layer{'s' * (len(record.layers) != 1)} {ranges(record.layers)}"
    method = escape(record.options.get("method"), 20)
    return f"{parts} of {layers} from {escape(record.pre.get('name'), 80)} ({method})"


def against(opened: Weights, post: Path, pre: Path | None, *, say: Say) -> dict[str, Any]:
    """Compare a restored folder with POST, and with PRE where it is given.

    Every row that the record does not name must be POST's, byte for byte, and every one that it
    names PRE's, or what the recorded method makes of both. Raises MismatchError where POST or PRE
    is not the recorded one, VerificationFailed naming what differs.
    """
    record = read(opened)
    tuned = _open(post)
    _check_identity(record.post, tuned, "--against", "POST")
    _check_headers(opened, tuned)
    spans = _restored_bytes(record, tuned)
    told = {"against": str(post), "restored_bytes": _total(spans)}
    with Reader(opened) as here, Reader(tuned) as there:
        told["tensors_byte_equal"] = _check_kept(here, there, opened, tuned, spans, say)
    told |= _check_side_files(opened, tuned)
    if pre is not None:
        told |= _check_restored(opened, tuned, pre, record, spans)
    return told


def _open(path: Path) -> Weights:
    if not os.path.lexists(path / "config.json") and os.path.lexists(path / "adapter_config.json"):
        return Weights.open(path)
    return Checkpoint.open(path, strict=False, partial=True, quantised=True)


def _check_identity(recorded: Mapping[str, Any], given: Weights, flag: str, role: str) -> None:
    """Raise MismatchError where a folder is not the one that was recorded."""
    found = _record.identity(given)
    known = recorded.get("shards")
    known = known if isinstance(known, dict) else {}
    shared = [name for name in found["shards"] if isinstance(known.get(name), dict)]
    partial = recorded.get("partial") or found.get("partial")
    same = bool(shared) and (partial or set(known) == set(found["shards"]))
    for name in shared:
        keys = known[name].keys() & found["shards"][name].keys()
        same = same and all(known[name][key] == found["shards"][name][key] for key in keys)
    if not partial and "sha256" in recorded and "sha256" in found:
        same = same and recorded["sha256"] == found["sha256"]
    if not same:
        raise MismatchError(
            f"{flag} {escape(given.path)} is not the {role} that was recorded, "
            f"{escape(recorded.get('name'), 80)}: its weights or config differ."
        )


def _check_headers(opened: Weights, tuned: Weights) -> None:
    for name in sorted({*opened.shards, *tuned.shards}):
        one, other = opened.headers.get(name), tuned.headers.get(name)
        if one is None or other is None or one.raw != other.raw:
            raise VerificationFailed(
                f"{escape(opened.path)}: the header of {escape(name)} is not POST's."
            )


def _restored_bytes(record: Restored, tuned: Weights) -> Spans:
    """Return the bytes of each tensor that the record says were restored.

    It names the rows of tensors that were restored in part, and of all of an adapter; of whole
    ones, parts and layers.
    """
    wanted = {(part, rule["part"].endswith(" bias"), layer)
              for rule in record.rules for layer in rule["layers"]
              for part in _roles(rule["part"])}  # fmt: skip
    found: Spans = {}
    for name, rows in ({} if tuned.is_adapter else roles_of(tuned).rows).items():
        whole = all((r.role, r.bias, r.layer) in wanted for r in rows)
        if whole and name not in record.rows:
            found[name] = [(0, tuned.tensors[name].nbytes)]
    for name, spans in record.rows.items():
        info = tuned.tensors[name]
        row = byte_size(info.dtype, info.shape[1:])
        found[name] = [(start * row, stop * row) for start, stop in spans]
    return found


def _roles(part: str) -> tuple[str, ...]:
    role = part.removesuffix(" bias")
    return ("q_norm", "k_norm") if role == "norm" else (role,)


def _total(spans: Spans) -> int:
    return sum(stop - start for found in spans.values() for start, stop in found)


def _check_kept(
    here: Reader, there: Reader, opened: Weights, tuned: Weights, spans: Spans, say: Say
) -> int:
    """Compare all that was not restored with POST; return how many tensors are equal as a whole."""
    meter, whole = Meter(2 * tuned.nbytes, say), 0
    places = {n: (info.file.name, info.start, n) for n, info in tuned.tensors.items()}
    for name in sorted(places, key=places.__getitem__):
        one, other = opened.tensors[name], tuned.tensors[name]
        for start, stop in _rest(spans.get(name, []), other.nbytes):
            at = first_difference(here, one, there, other, start, stop)
            if at is not None:
                row = at // max(1, other.nbytes // max(1, other.shape[0] if other.shape else 1))
                raise VerificationFailed(
                    f"{escape(opened.path)}: row {row} of {escape(name, 100)} should be POST's, "
                    f"but its bytes differ from byte {at} on."
                )
        whole += name not in spans
        meter.add(2 * other.nbytes)
    return whole


def _rest(spans: Iterable[tuple[int, int]], nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield what lies between the spans of a tensor."""
    at = 0
    for start, stop in [*sorted(spans), (nbytes, nbytes)]:
        if start > at:
            yield at, start
        at = max(at, stop)


def _check_side_files(opened: Weights, tuned: Weights) -> dict[str, Any]:
    """Raise where a file that was copied is not POST's."""
    told = compare_side_files(opened, tuned)
    wrong = [name for name in told["side_files_differ"] if name not in OWN_FILES]
    if wrong:
        raise VerificationFailed(
            f"{escape(opened.path)}: {escape(wrong[0])} should be POST's, but differs "
            f"({len(wrong)} such files)."
        )
    return {"side_files_equal": told["side_files_equal"]}


# --- With PRE -----------------------------------------------------------------------------------


def _check_restored(
    opened: Weights, tuned: Weights, pre: Path, record: Restored, spans: Spans
) -> dict[str, Any]:
    """Make the restored rows again, of PRE and POST, and compare them with what is stored."""
    options = restore.Options(
        method=record.options.get("method", "exact"),
        rho=record.options.get("rho"),
        alpha=record.options.get("alpha"),
        layers=",".join(map(str, record.layers)),
        include=tuple(record.options.get("include", ())),
        allow=tuple(record.options.get("allow", ())),
    )
    _check_identity(record.pre, _open(pre), "--pre", "PRE")
    plan = restore.plan(pre, tuned.path, options)
    checked = 0
    places = _places(tuned, spans)
    with Reader(opened) as here, Reader(plan.pre) as before:
        for splice in plan.splices():
            made: memoryview | None = None
            for name, info, start, stop in places.get(splice.shard, ()):
                first, last = max(start, splice.start), min(stop, splice.stop)
                if first >= last:
                    continue
                if callable(splice.data) and made is None:
                    made = memoryview(splice.data()).cast("B")
                _check_splice(here, before, opened, name, info, (first, last), splice, made)
                checked += last - first
    if checked != _total(spans):
        raise VerificationFailed(
            f"{escape(opened.path)}: {_total(spans) - checked} restored bytes of "
            f"{_total(spans)} could not be made again from PRE and POST."
        )
    return {"pre": str(pre), "restored_bytes_equal": checked}


def _places(tuned: Weights, spans: Spans) -> dict[str, list[tuple[str, TensorInfo, int, int]]]:
    """Return by shard the (tensor, place, first byte, last) in its file that were restored."""
    found: dict[str, list[tuple[str, TensorInfo, int, int]]] = {}
    for name, parts in spans.items():
        info = tuned.tensors[name]
        for start, stop in parts:
            place = (name, info, info.start + start, info.start + stop)
            found.setdefault(info.file.name, []).append(place)
    return found


def _check_splice(
    here: Reader,
    before: Reader,
    opened: Weights,
    name: str,
    info: TensorInfo,
    span: tuple[int, int],
    splice: Splice,
    made: memoryview | None,
) -> None:
    """Compare the part `span` (bytes of the shard) of a splice with what is stored."""
    stored = opened.tensors[name]
    for at in range(span[0], span[1], BLOCK):
        count, inside = min(BLOCK, span[1] - at), at - splice.start
        got = here.read(stored, at - info.start, count)
        if isinstance(splice.data, TensorInfo):
            want: Any = before.read(splice.data, inside, count)
        elif made is not None:
            want = made[inside : inside + count]
        else:
            want = bytes(count)
        if got != want:
            row = (at - info.start) // max(1, info.nbytes // max(1, prod(info.shape[:1])))
            raise VerificationFailed(
                f"{escape(opened.path)}: {escape(name, 100)} is not what the restore makes of PRE "
                f"and POST, at or after its row {row}."
            )
