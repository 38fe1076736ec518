"""What people see of the commands that work on files; see `terminal` for the rest."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from morph.errors import escape
from morph.terminal import pairs, say, size, table


def inspection(found: Mapping[str, Any]) -> None:
    """Print `morph inspect`: what is known, problems last, where they are seen."""
    told = {k: v for k, v in found.items() if k not in ("layers", "problems", "notes")}
    told["path"] = str(found["path"])
    told["family"] = found["family"] or "not known to morph: --family names one to read it as"
    told["cache"] = told.pop("cache_bytes")
    if hybrid := found["hybrid"]:
        pattern = hybrid.get("pattern") or ", ".join(map(str, hybrid["layer_types"]))
        told["hybrid"] = f"{pattern} ({hybrid['kind']})"
    for key in ("bytes", "dtypes", "shards", "cache"):
        told[key] = _sizes(told[key])
    for key, words in (("nonfinite", "no NaN, no infinity"), ("tie_conflict", None)):
        told[key] = words if found[key] == [] else found[key]
    pairs({_word(k): v for k, v in told.items() if v not in (None, [], {})})
    print()
    layers = found["layers"]
    ends = [i for i, row in enumerate(layers) if row != (layers[i + 1 : i + 2] or [None])[0]]
    rows = []
    for first, last in zip([0, *(i + 1 for i in ends)], ends):  # equal neighbours share a row
        name = str(first) if first == last else f"{first}-{last}"
        rows.append([name, *(size(count) for count in layers[last].values())])
    if rows:
        table("", ["layers", *layers[0]], rows, 1)
    for key in ("notes", "problems"):
        for text in found[key]:
            say(f"{key.removesuffix('s')}: {text}")


def _word(key: str) -> str:
    return key.removeprefix("num_").replace("_", " ")


def _sizes(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {size(count)}" for name, count in value.items())
    return size(value) if value is not None else "unknown"


def difference(found: Mapping[str, Any], tensors: bool = False) -> None:
    """Print `morph diff`: roles, softmax layers, with `tensors` every tensor, and what it means."""
    counts = [f"{n:,} {status}" for status, n in found["counts"].items() if n]
    keys = [escape(key, 40) for key in found["config_differs"]]
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    told = {
        "A": f"{found['a']}, {size(found['bytes'][0])}",
        "B": f"{found['b']}, {size(found['bytes'][1])}",
        "layers": _layers_in_words(found),
        "tensors": ", ".join(counts),
        "config differs in": ", ".join(keys[:8]) + more if keys else None,
    }
    pairs(told)
    if found["groups"]:
        print()
        _drift_by_role(found["groups"])
    _drift_by_layer(found)
    if tensors:
        print()
        _drift_by_tensor(found["tensors"])
    print()
    _sentences(found["conclusion"])
    _sentences(f"note: {note}" for note in found["notes"])


def _layers_in_words(found: Mapping[str, Any]) -> str | None:
    kinds = list(found["kinds"])
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return f"{', '.join(counts)} ({found['model_type']})" if kinds else None


def _drift_by_role(groups: Iterable[Mapping[str, Any]]) -> None:
    rows = []
    for group in groups:
        layer = group["drift_max_layer"]
        rows.append(
            [
                group["role"].replace("_", " "),
                group["kind"] or "-",
                f"{group['tensors']:,}",
                f"{group['tensors_changed']:,}",
                _drift(group["drift_median"], group["entries_changed"]),
                _drift(group["drift_max"], group["entries_changed"]),
                "-" if layer is None or not group["drift_max"] else str(layer),
                _cosine(group["cosine_min"], group["entries_changed"]),
            ]
        )
    columns = ("role", "attention", "tensors", "changed", "median", "largest", "in layer")
    table("drift ||B-A||/||A|| by role", [*columns, "least cosine"], rows, 2)


def _drift_by_layer(found: Mapping[str, Any]) -> None:
    """Print q, k, v and o of the softmax layers; neighbours with equal rows share one."""
    parts, shown = ("q", "k", "v", "o"), []
    for row in found["layers"]:
        roles = row["roles"]
        if row["kind"] == "linear" or not any(role in roles for role in parts):
            continue
        cells = [
            _drift(roles[r]["drift"], roles[r]["entries_changed"]) if r in roles else "-"
            for r in parts
        ]
        tops = [roles.get(r, {}).get("top_direction") for r in ("q", "k")]
        cells += ["" if top is None else f"{top:.2f}" for top in tops]
        shown.append((row["layer"], [row["kind"] or "-", *cells]))
    if not shown:
        return
    rows: list[list[str]] = []
    first = last = shown[0][0]
    for (layer, cells), after in zip(shown, [*shown[1:], None]):
        last = layer
        if after is None or after != (layer + 1, cells):
            rows.append([str(first) if first == last else f"{first}-{last}", *cells])
            first = after[0] if after else last
    tops = ["q top", "k top"] if any(row[6] or row[7] for row in rows) else []
    rows = [row if tops else row[:6] for row in rows]
    print()
    title = "drift by softmax layer" if found["kinds"] else "drift by layer"
    table(title, ["layer", "attention", *parts, *tops], rows, 2)
    if tops:
        _sentences(["q top, k top: the share of the change in one direction, at least."])


def _drift_by_tensor(tensors: Iterable[Mapping[str, Any]]) -> None:
    rows = []
    for row in tensors:
        for part in row["parts"] or [None]:
            layer = part and part["layer"]
            name = row["tensor"]
            if layer is not None:
                name = re.sub(rf"^.*?\.{layer}\.", "", name, count=1)
            cells = ["-", "", row["status"], ""]
            if part:
                role = part["role"].replace("_", " ") + " bias" * part["bias"]
                share = f"{100 * part['share_changed']:.1f} %" if part["entries_changed"] else ""
                drift = _drift(part["drift"], part["entries_changed"])
                cells = [role, share, drift, _cosine(part["cosine"], part["entries_changed"])]
            rows.append(["-" if layer is None else str(layer), name, *cells])
    columns = ["layer", "tensor", "role", "changed", "drift", "cosine"]
    table("every tensor; a tensor of several roles has a row for each", columns, rows, 3)


def _drift(value: float | None, changed: int) -> str:
    if not changed:
        return "equal"
    if value is None:
        return "no number"
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}" if value else "0"


def _cosine(value: float | None, changed: int) -> str:
    return "-" if value is None or not changed else f"{value:.5f}"


def _sentences(lines: Iterable[str]) -> None:
    """Print sentences at the width of the terminal."""
    width = shutil.get_terminal_size().columns
    for line in lines:
        text = escape(line, 2000)
        print(textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False))


def verified(found: Mapping[str, Any]) -> None:
    """Print `morph verify`: the files, and, where a source was named, what was compared with it."""
    told = {k: found[k] for k in ("manifest", "tensors")} | {"bytes": size(found["bytes"])}
    told["layers"] = found["layers"]
    told["side files"] = found["side_files"]
    told["never loaded"] = found["never_loaded"] or None
    told["restored"] = found.get("restored")
    told |= {_COMPARED[k]: found[k] for k in _COMPARED if found.get(k) not in (None, [])}
    if "restored_bytes" in found:
        told["restored bytes"] = size(found["restored_bytes"])
        equal = "restored_bytes_equal" in found
        told["made again from PRE"] = "equal" if equal else "not asked: --pre names it"
    if "logit_error" in found:
        told["class"] = found["class"]
        told["logits differ from the hybrid in memory by"] = (
            f"{found['logit_error']:.1e} of their size ({found['limit']:.0e} is allowed)"
        )
        told["logits differ from the source by"] = found.get("changed_by_plan")
    pairs(told)
    _sentences(f"note: {note}" for note in found["notes"])


_COMPARED = {
    "tensors_byte_equal": "tensors equal to the source, byte by byte",
    "tensors_equal_to_pickle": "tensors equal to what torch loaded",
    "pickles_equal": "pickles as they were then",
    "side_files_equal": "side files equal to the source's",
    "side_files_differ": "side files that differ",
    "side_files_only_here": "side files only here",
    "side_files_only_there": "side files only there",
}


def restored(found: Mapping[str, Any]) -> None:
    """Print `morph restore`: what comes back, what it costs, and what to do with it."""
    from morph.checkpoint._hub import name_of

    settings = [f"{k} {found[k]:g}" for k in ("rho", "alpha") if k in found]
    told: dict[str, Any] = {
        "PRE": name_of(Path(found["pre"])),
        "POST": name_of(Path(found["post"])) + " (a LoRA adapter)" * found["adapter"],
        "OUT": found["out"],
        "method": ", ".join([found["method"], *settings]),
        "layers": f"{len(found['layers'])} of {found['layers_of']}: {_runs(found['layers'])}",
        "restored": f"{found['tensors']:,} tensors, {size(found['bytes'])} "
        f"({found['share']:.1%} of {size(found['total_bytes'])})",
        "|POST - PRE| / |PRE|, in samples": _sampled(found["drift"]),
        "least cosine of q rows, in samples": found["cosine_of_q"],
    }
    if found["dry_run"]:
        need, free = size(found["total_bytes"]), size(found["free_bytes"])
        told["disk"] = f"{free} free for {need} and side files; --copy {found['copy']}"
    elif found["resumed"]:
        told["finished by an earlier run"] = found["resumed"]
    if not found.get("hashed", True):
        told["hashes"] = "none: no manifest to verify against"
    if found.get("not_copied"):
        told["left out"] = ", ".join(escape(n, 60) for n in found["not_copied"])
    pairs(told)
    print()
    rows = []
    for part in found["parts"]:
        count, layers = f"{part['tensors']:,}", _runs(part["layers"])
        rows.append([part["part"], part["rule"], layers, count, size(part["bytes"])])
    table("", ["part", "is made of", "layers", "tensors", "bytes"], rows, 3)
    if found["dry_run"]:
        say("dry run: nothing was written.")
    else:
        how = "" if found["adapter"] else " (`morph evaluate FOLDER --data TEXT`)"
        say(f"Recovery is partial, and a restore can do harm: evaluate both, POST and OUT{how}.")


def _sampled(drift: Mapping[str, float]) -> str | None:
    """Return how far the roles moved, those that are restored first."""
    order = ("q", "k", "v", "o", "mlp")
    roles = [r for r in order if r in drift] + [r for r in drift if r not in order and drift[r]]
    return ", ".join(f"{r.replace('_', ' ')} {drift[r]:.2g}" for r in roles) or None


def _runs(numbers: Iterable[int]) -> str:
    """Return sorted numbers as 0-3, 7."""
    found: list[list[int]] = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "none"
