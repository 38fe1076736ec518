"""Selection files of other projects, read and written as our Scores.

What is understood, told apart by content and not by suffix:

    scores            our own scores.json
    duo_attention     TSV of DuoAttention and PruLong: a row per layer, a column per KV head
    retrieval_head    JSON of Retrieval_Head: {"layer-head": [scores]}, per query head
    swaa              a SWAAConfig as JSON or YAML: the layers that do not slide, and the window
    keep_full_attention_layers   YAML of fla-org/hybrid-distillation: the layers that stay full

A list of layers becomes scores of 1 (kept) and 0; `provenance["placed"]` says how many are kept.
Files are hostile until read: no code runs, sizes and depths are bounded, names are escaped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from morph import plan as planning
from morph import strict
from morph.errors import PlanError, RecipeError, StorageError, escape, nearest
from morph.plan import MAX_DEPTH, Geometry, Granularity, Scores
from morph.recipes import _yaml

MAX_BYTES = 64 << 20  # the pairs of a large model's heads are about half of that
MAX_TOKENS = 2**31 - 1

FORMATS = {
    "scores": "scores.json of morph",
    "duo_attention": "tab-separated numbers, a row per layer, a column per KV head",
    "retrieval_head": 'JSON {"layer-head": [scores]}',
    "swaa": "JSON or YAML with sliding_window_size and non_sliding_layers",
    "keep_full_attention_layers": "YAML with a list of that name",
}
_KEEP = "keep_full_attention_layers"
_NEEDS = {"duo_attention": "kv_head", "retrieval_head": "head", "swaa": "layer", _KEEP: "layer"}
_HEAD = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NO_FA_DECODE = (
    "force_fa_decode gives full attention to every generated token; a converted checkpoint slides "
    "there too, so it may recall less than the numbers published with this file."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Swaa:
    """The keys of a SWAAConfig, with its defaults."""

    sliding_window_size: int | None = None
    keep_first: int = 0
    force_fa_decode: bool | tuple[Any, ...] = False
    non_sliding_layers: tuple[Any, ...] = ()


_SWAA_KEYS = frozenset(field.name for field in dataclasses.fields(_Swaa))


def read(path: str | Path, geometry: Geometry, model_type: str) -> Scores:
    """Return the Scores that a selection file of any known format holds.

    Foreign files get `model_type` and a provenance of `format`, `file` and `sha256`; our own are
    returned as they are, so that their digest stays. Raises PlanError naming the file, the row or
    key, the value and what is allowed: for an unknown format, and where file and geometry differ.
    """
    where = escape(path)
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(
            f"{where}: byte {error.start} is not UTF-8; a selection file is plain text."
        ) from error
    try:
        form, content = _sniff(text, where)
        if form == "scores":
            found = planning.loads_scores(text, where)
            shape = len(found.values), len(found.values[0])
            _check_shape(found.granularity, *shape, geometry, f"{where}: the file")
            return found
        granularity, values, unit, more = _READERS[form](content, geometry, where)
        return Scores(
            selector=form,
            model_type=model_type,
            granularity=granularity,
            values=values,
            unit=unit,
            provenance={
                "format": form,
                "file": Path(path).name,
                "sha256": hashlib.sha256(data).hexdigest(),
                **more,
            },
        )
    except OverflowError as error:
        raise PlanError(f"{where}: a number in it is too large for a float (1.8e308).") from error
    except (PlanError, RecipeError) as error:  # what is wrong inside a value knows no file
        text = str(error)
        raise PlanError(text if text.startswith(where) else f"{where}: {text}") from error


def dumps(scores: Scores, format: str, *, keep: Iterable[int] | None = None) -> str:
    """Return scores as the text of one of FORMATS.

    `keep`, the layers that stay full, is what the two lists of layers say; the others ignore it. A
    SWAA file takes its window and sinks from the provenance: of an imported file, or of the
    sliding mixer the scores were measured with. Raises PlanError where the format cannot hold
    these scores.
    """
    if format not in FORMATS:
        raise PlanError(
            f"format {_say(format)} is unknown.{nearest(format, FORMATS)} "
            f"Allowed: {', '.join(FORMATS)}."
        )
    if format == "scores":
        return planning.dumps(scores)
    if scores.granularity != _NEEDS[format]:
        raise PlanError(
            f"format {format} holds {_NEEDS[format]} scores; these are per {scores.granularity}. "
            f"Choose another format, or score with --granularity {_NEEDS[format]}."
        )
    if format == "duo_attention":
        return "".join("\t".join(map(repr, row)) + "\n" for row in scores.values)
    if format == "retrieval_head":
        rows = enumerate(scores.values)
        heads = {f"{i}-{h}": [value] for i, row in rows for h, value in enumerate(row)}
        return json.dumps(heads) + "\n"
    if keep is None:
        raise PlanError(f"format {format} lists the kept layers; pass keep, such as [3, 7].")
    layers = sorted(_layers(list(keep), len(scores.values), "keep"))
    if format == _KEEP:
        return _yaml.dump({"student_model": {_KEEP: layers}})
    return json.dumps({**_window(scores), "non_sliding_layers": layers}, indent=1) + "\n"


def write(
    scores: Scores, path: str | Path, format: str, *, keep: Iterable[int] | None = None
) -> None:
    """Write scores to a file in one of FORMATS, whole or not at all; see `dumps`.

    A file that is there is replaced. Raises PlanError like `dumps`, StorageError where the disk
    refuses.
    """
    text = dumps(scores, format, keep=keep)
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{escape(path)}: cannot be written ({error.strerror}). Give another place."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def aggregate(
    scores: Scores,
    geometry: Geometry,
    granularity: Granularity,
    how: Literal["max", "mean"] = "max",
) -> Scores:
    """Return head scores per KV head or layer, or KV-head scores per layer.

    Query head h reads KV head h // (heads / KV heads). `max`, the default, says that a KV head is
    needed as much as the neediest of its query heads: one retrieval head keeps its group. Raises
    PlanError for a finer granularity, another geometry, and scores with pairs.
    """
    width = len(scores.values[0])
    _check_shape(scores.granularity, len(scores.values), width, geometry, "aggregate: the input")
    if scores.granularity == granularity:
        return scores
    if how not in ("max", "mean"):
        raise PlanError(f"how is {_say(how)}. Allowed: max, mean.")
    if geometry.units(granularity) > width or granularity == "head":
        raise PlanError(f"{scores.granularity} scores cannot be split into {granularity} scores.")
    if scores.pairs is not None:
        raise PlanError(f"scores with pairs cannot be aggregated to {granularity} scores.")
    span = width // geometry.units(granularity)

    def one(group: Sequence[float]) -> float:
        return max(group) if how == "max" else math.fsum(value / span for value in group)

    note = f"{how} over {scores.granularity} scores"
    return dataclasses.replace(
        scores,
        granularity=granularity,
        values=tuple(
            tuple(one(row[k : k + span]) for k in range(0, width, span)) for row in scores.values
        ),
        provenance={**scores.provenance, "aggregated": note},
    )


def read_bytes(path: str | Path) -> bytes:
    """Return what is in a file of scores or a plan; raise PlanError for what cannot be one."""
    file, where = Path(path), escape(path)
    try:
        if file.exists() and not file.is_file():  # a pipe would block for ever
            raise PlanError(f"{where}: is not a file. Give a file of scores, or a plan.")
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except PlanError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PlanError(f"{where}: cannot be read ({escape(error)}).") from error
    if len(data) > MAX_BYTES:
        raise PlanError(f"{where}: larger than {MAX_BYTES >> 20} MiB; no such file is.")
    return data


def _sniff(text: str, where: str) -> tuple[str, Any]:
    """Return the format and what its reader takes."""
    start = text.lstrip()
    first = start.split("\n", 1)[0].rstrip("\r")
    if start.startswith(("{", "[")):
        data = _json(text, where)
    elif ("\t" in first and ":" not in first) or _NUMBER.fullmatch(first.strip()):
        return "duo_attention", text
    else:
        data = _yaml.read(text, where)[0]
    keys = list(data) if isinstance(data, dict) else []
    if len({"selector", "model_type", "granularity", "values", "unit"} & set(keys)) >= 3:
        return "scores", None
    if any(map(_HEAD.fullmatch, keys)):
        return "retrieval_head", data
    found: list[tuple[str, str, Any]] = []
    for place, inner in _mappings(data):
        if _KEEP in inner:
            found.append((place, _KEEP, inner[_KEEP]))
        if "non_sliding_layers" in inner or len(_SWAA_KEYS & inner.keys()) > 1:
            found.append((place, "swaa", inner))
    if len(found) == 1:
        return found[0][1], (": ".join(filter(None, (where, found[0][0]))), found[0][2])
    if found:
        places = ", ".join(f"{place} {form}".lstrip() for place, form, _ in found[:3])
        raise PlanError(f"{where}: holds {len(found)} selections: {places}, ... Leave one.")
    known = [_KEEP, "values", *sorted(_SWAA_KEYS)]
    hint = next((h for h in (nearest(key, known) for key in keys[:100]) if h), "")
    shown = ", ".join(escape(key, 40) for key in keys[:5]) or _say(data)
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    raise PlanError(f"{where}: no known selection ({shown}).{hint} Give one of: {formats}.")


def _json(text: str, where: str) -> Any:
    """Return JSON data without doubled keys, at most MAX_DEPTH deep."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise PlanError(f"{where}: key {_say(twice)} appears twice. Leave one.")
        return found

    planning.check_branches(text, where)
    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except PlanError:
        raise
    except RecursionError as error:
        raise PlanError(f"{where}: nested deeper than {MAX_DEPTH} levels.") from error
    except ValueError as error:
        raise PlanError(f"{where}: not valid JSON ({escape(error)}).") from error
    if strict.nested_deeper(data, MAX_DEPTH):
        raise PlanError(f"{where}: nested deeper than {MAX_DEPTH} levels.")
    return data


def _inside(data: Any) -> Iterable[Any]:
    if isinstance(data, dict):
        return data.values()
    return data if isinstance(data, list) else ()


def _mappings(data: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every mapping with its dotted place."""
    if isinstance(data, dict):
        yield place, data
    names = [f".{escape(k, 60)}" for k in data] if isinstance(data, dict) else itertools.count()
    for name, inner in zip(names, _inside(data)):
        if isinstance(inner, (dict, list)):
            step = name if isinstance(name, str) else f"[{name}]"
            yield from _mappings(inner, f"{place}{step}".removeprefix("."))


_Read = tuple[Granularity, tuple[tuple[float, ...], ...], str, dict[str, Any]]


def _read_duo(text: str, geometry: Geometry, where: str) -> _Read:
    text = text.strip("\r\n")
    width = text.split("\n", 1)[0].count("\t") + 1
    _check_shape("kv_head", text.count("\n") + 1, width, geometry, f"{where}: the file")
    rows = []
    for i, line in enumerate(text.split("\n")):
        cells = line.rstrip("\r").split("\t")
        if len(cells) != width:
            raise PlanError(
                f"{where}: row {i + 1} (layer {i}) has {len(cells)} columns, row 1 has {width}. "
                "Every layer needs the same number of heads."
            )
        for j, cell in enumerate(cells):
            good = len(cell) < 400 and _NUMBER.fullmatch(cell.strip(" "))
            if not good or not math.isfinite(float(cell)):
                raise PlanError(
                    f"{where}: row {i + 1} (layer {i}), column {j + 1} (KV head {j}): "
                    f"{_say(cell)} is not a finite number. Columns are tab-separated."
                )
        rows.append(tuple(map(float, cells)))
    return "kv_head", tuple(rows), "gate (1 full, 0 streaming)", {}


def _read_heads(data: dict[str, Any], geometry: Geometry, where: str) -> _Read:
    layers, heads = geometry.num_hidden_layers, geometry.num_attention_heads
    found: dict[tuple[int, int], float] = {}
    for key, given in data.items():
        match, place = _HEAD.fullmatch(key), f"{where}: key {_say(key)}"
        if not match:
            raise PlanError(f"{place} is no 'layer-head' such as '16-19'. Remove or correct it.")
        unit = int(match[1]), int(match[2])
        if unit[0] >= layers or unit[1] >= heads:
            raise PlanError(
                f"{place}: the model has {layers} layers x {heads} heads (0-0 to "
                f"{layers - 1}-{heads - 1}). Give the file of this model."
            )
        if unit in found:
            raise PlanError(f"{place}: head {unit[0]}-{unit[1]} appears twice. Leave one.")
        if not isinstance(given, list) or not given:
            raise PlanError(f"{place}: expected a list of scores, got {_say(given)}.")
        for n, value in enumerate(given):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= 1e300:
                raise PlanError(f"{place}[{n}]: {_say(value)} is not a finite number.")
        found[unit] = math.fsum(given) / len(given)
    values = tuple(tuple(found.get((i, h), 0.0) for h in range(heads)) for i in range(layers))
    missing = layers * heads - len(found)
    return "head", values, "share of the needle copied", {"missing": missing} if missing else {}


def _read_swaa(given: tuple[str, Any], geometry: Geometry, where: str) -> _Read:
    place, config = given[0], strict.build(_Swaa, given[1], given[0], PlanError)
    window, first, decode = config.sliding_window_size, config.keep_first, config.force_fa_decode
    if window is None:
        raise PlanError(f"{place}: sliding_window_size is empty, so no layer slides. Set a window.")
    for name, value, low in (("sliding_window_size", window, 1), ("keep_first", first, 0)):
        if not low <= value <= MAX_TOKENS:
            raise PlanError(f"{place}: {name} is {_say(value)}; it is {low} to {MAX_TOKENS}.")
    if isinstance(decode, tuple) and decode:
        _layers(list(decode), geometry.num_hidden_layers, f"{place}: force_fa_decode")
    return _listed(
        list(config.non_sliding_layers),
        geometry,
        f"{place}: non_sliding_layers",
        window=window,
        keep_first=first,
        force_fa_decode=decode if isinstance(decode, bool) else list(decode),
        **({"note": _NO_FA_DECODE} if decode else {}),
    )


def _read_keep(given: tuple[str, Any], geometry: Geometry, where: str) -> _Read:
    return _listed(given[1], geometry, f"{given[0]}: {_KEEP}")


def _listed(given: Any, geometry: Geometry, place: str, **more: Any) -> _Read:
    layers = _layers(given, geometry.num_hidden_layers, place)
    for n, layer in enumerate(layers):
        if geometry.windows[layer] is not None:
            raise PlanError(
                f"{place}[{n}]: layer {layer} already slides in the source and cannot stay full. "
                "Remove it."
            )
    values = tuple((float(i in layers),) for i in range(geometry.num_hidden_layers))
    return "layer", values, "1 kept, 0 replaced", {"placed": len(layers), "layers": layers, **more}


_READERS: dict[str, Callable[[Any, Geometry, str], _Read]] = {
    "duo_attention": _read_duo,
    "retrieval_head": _read_heads,
    "swaa": _read_swaa,
    _KEEP: _read_keep,
}


def _layers(given: Any, count: int, place: str) -> list[int]:
    """Return a list of layers in its own order; raise PlanError for what is none."""
    if not isinstance(given, list) or not given:
        raise PlanError(f"{place} is {_say(given)}; list at least one layer (0-{count - 1}).")
    for n, layer in enumerate(given):
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise PlanError(
                f"{place}[{n}] is {_say(layer)}; there are layers 0-{count - 1}. Correct it, or "
                "take a list for this model."
            )
        if layer in given[:n]:
            raise PlanError(f"{place}[{n}]: layer {layer} is listed twice. Leave one.")
    return list(given)


def _check_shape(
    granularity: Granularity, layers: int, width: int, geometry: Geometry, what: str
) -> None:
    """Raise PlanError where layers and units per layer are not the model's."""
    wanted = geometry.num_hidden_layers, geometry.units(granularity)
    if (layers, width) != wanted:
        word = {"layer": "(a score per layer)", "kv_head": "KV heads", "head": "heads"}[granularity]
        raise PlanError(
            f"{what} has {layers} layers x {width} heads, the model {wanted[0]} x "
            f"{wanted[1]} {word}. Take one of this model."
        )


def _window(scores: Scores) -> dict[str, Any]:
    how = scores.provenance
    options = how.get("mixer_options") if how.get("mixer") == "sliding" else None
    options = options if isinstance(options, Mapping) else {}
    window = how.get("window", options.get("window"))
    if window is None:
        raise PlanError(
            "format swaa names a window, these scores do not. Score with the mixer sliding, or "
            "export keep_full_attention_layers."
        )
    return {
        "sliding_window_size": window,
        "keep_first": how.get("keep_first", options.get("num_sinks", 0)),
        "force_fa_decode": how.get("force_fa_decode", False),
    }


def _say(value: Any) -> str:
    if isinstance(value, (list, dict)) and value:
        return f"a {type(value).__name__} of {len(value)}"
    return escape(repr(value[:60] if isinstance(value, str) else value), 60)
