"""What people see of the commands that work on files; see `terminal` for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def verified(found: Mapping[str, Any]) -> None:
    """Print `morph verify`: the files, and, where a source was named, what is computed."""
    told = {k: found[k] for k in ("manifest", "tensors")} | {"bytes": size(found["bytes"])}
    if "logit_error" in found:
        told["class"] = found["class"]
        told["tensors equal to the source, byte by byte"] = found["tensors_byte_equal"]
        told["logits differ from the hybrid in memory by"] = (
            f"{found['logit_error']:.1e} of their size ({found['limit']:.0e} is allowed)"
        )
        told["logits differ from the source by"] = found.get("changed_by_plan")
    pairs(told)
