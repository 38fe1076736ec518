"""What a comparison of two checkpoints says, in sentences, and the command that goes on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from morph.checkpoint._hub import name_of

DESCENDANT = 0.5  # the cosine below which q or k was hardly trained from A's; as `restore` has it


def conclude(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return sentences that answer whether q and k moved and what of it, and the next command."""
    a, b, counts = found["a"], found["b"], found["counts"]
    look = ["verify" if found["adapters"] else "inspect", b]
    if counts["equal"] == sum(counts.values()):
        return [f"A and B hold the same {counts['equal']} tensors, byte for byte."], look
    if not found["roles_known"]:
        return _by_names(found), look
    if found["refusal"]:
        return [f"restore cannot take q and k apart here: {found['refusal']}"], look
    layers = found["restore"]["layers"]
    if not layers:
        return ["No full attention layer could be compared: nothing to restore."], look
    moved = {role: _parts(found, role, "full") for role in ("q", "k", "v", "o")}
    which = f"the {len(layers)} full layers" if len(layers) > 1 else "the one full layer"
    ours = [*moved["q"], *moved["k"]]
    for role in ("q", "k"):
        if _changed(biases := _parts(found, role, "full", bias=True)):
            moved[f"{role} bias"] = biases
    if not found["restore"]["layers_changed"]:
        said = [f"q and k of {which} are equal: nothing to restore."]
        others = [f"{r} {_number(_median(moved[r]))}" for r in ("v", "o") if _changed(moved[r])]
        if others:
            said.append(f"Other parts of them moved: {', '.join(others)} (median ||B-A||/||A||).")
        return [*said, *_elsewhere(found)], look
    said = [_moved(found, which, moved)]
    if _changed(moved["v"]) == 0:
        said.append(
            f"v of {which} is equal while q and k are not: was v frozen, or is a part missing in A?"
        )
    said += _elsewhere(found)
    if strange := _strange(ours):
        where = f"layer {strange['layer']}" if strange["layer"] is not None else "the model"
        said.append(
            f"{strange['role']} of {where} has a cosine of {strange['cosine']:.2f} with A's: B "
            "does not look trained from A. Is A the checkpoint just before the tuning?"
        )
        return said, ["inspect", a]
    name = "".join(c for c in called(b) if c.isprintable()).lstrip("-~") or "model"
    return said, ["restore", a, b, f"{name}-restored"]


def called(model: str) -> str:
    """Return the last part of what a model is called: of its path, or of its Hub id."""
    return name_of(Path(model.rstrip("/"))).rpartition("/")[2]


def _moved(
    found: Mapping[str, Any], which: str, moved: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    restore = found["restore"]
    few = len(restore["layers_changed"]) < len(restore["layers"])
    where = f"{len(restore['layers_changed'])} of {which}" if few else which
    drifts = ", ".join(
        f"{role} {_number(_median(parts))}" for role, parts in moved.items() if parts
    )
    return (
        f"q and k of {where} moved: {drifts} (median ||B-A||/||A||). restore would replace "
        f"{_share(restore['share'])} of the bytes."
    )


def _elsewhere(found: Mapping[str, Any]) -> list[str]:
    """Say that q and k moved in layers that `restore` leaves alone unless asked."""
    said = []
    for kind in ("sliding", "mixed"):
        ours = [p for r in ("q", "k") for p in _parts(found, r, kind) if p["entries_changed"]]
        if ours:
            count = len({p["layer"] for p in ours})
            said.append(
                f"In {count} {kind} layer{'s' * (count != 1)} q and k moved "
                f"{_number(_median(ours))}; --layers all would restore them too."
            )
    return said


def _by_names(found: Mapping[str, Any]) -> list[str]:
    moved = {role: _parts(found, role, "") for role in ("q", "k", "v", "o")}
    words = [
        f"{role} {_number(_median(parts))}" if _changed(parts) else f"{role} equal"
        for role, parts in moved.items()
        if parts
    ]
    if not words:
        return ["No tensor that was compared has the name of a query or key projection."]
    what = "factors of the deltas of " if found["adapters"] else ""
    return [f"By their names: {what}{', '.join(words)} (median ||B-A||/||A||)."]


def _parts(
    found: Mapping[str, Any], role: str, kind: str, bias: bool = False
) -> list[Mapping[str, Any]]:
    """Return the parts of all tensors with a role and a kind of attention, biases apart."""
    parts = (part for row in found["tensors"] for part in row["parts"])
    return [p for p in parts if (p["role"], p["kind"], p["bias"]) == (role, kind, bias)]


def _changed(parts: Iterable[Mapping[str, Any]]) -> int:
    return sum(part["entries_changed"] > 0 for part in parts)


def _median(parts: Iterable[Mapping[str, Any]]) -> float | None:
    drifts = [part["drift"] for part in parts if part["drift"] is not None]
    return median(drifts) if drifts else None


def _strange(parts: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    known = [part for part in parts if part["cosine"] is not None]
    worst = min(known, key=lambda part: part["cosine"], default=None)
    return worst if worst is not None and worst["cosine"] < DESCENDANT else None


def _number(value: float | None) -> str:
    if value is None:
        return "by no known number"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.01 else f"{100 * value:.2g} %"
