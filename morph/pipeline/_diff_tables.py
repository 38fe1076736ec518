"""What every role, and every layer, adds up to in a comparison of two checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from morph.difference import Sums
from morph.layouts import ROLES, Rows

KINDS = ("full", "mixed", "sliding", "linear", "")


@dataclass(kw_only=True)
class Part:
    """Rows of one tensor that serve one purpose, and how far they moved."""

    rows: Rows
    nbytes: int  # in B
    sums: Sums = field(default_factory=Sums)
    top: float | None = None

    @property
    def label(self) -> str:
        """Role of the rows; biases are counted by themselves."""
        return f"{self.rows.role} bias" if self.rows.bias else self.rows.role

    def told(self) -> dict[str, Any]:
        """Return what is known of the rows, fit for JSON."""
        rows = self.rows
        return {
            "role": rows.role,
            "kind": rows.kind,
            "layer": rows.layer,
            "bias": rows.bias,
            "row_ranges": None if rows.ranges is None else [list(r) for r in rows.ranges],
            "bytes": self.nbytes,
            **self.sums.told(),
            "top_direction": self.top,
        }


def groups(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Return a row per role and kind of attention, in the order of `ROLES` and `KINDS`."""
    by_group: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        by_group.setdefault((part.label, part.rows.kind), []).append(part)

    def order(group: tuple[str, str]) -> tuple[int, bool, int]:
        role, _, bias = group[0].partition(" ")
        return ROLES.index(role), bool(bias), KINDS.index(group[1])

    return [_group(*key, by_group[key]) for key in sorted(by_group, key=order)]


def _group(role: str, kind: str, parts: Sequence[Part]) -> dict[str, Any]:
    drifts = [(d, p) for p in parts if (d := p.sums.drift) is not None]
    cosines = [c for p in parts if (c := p.sums.cosine) is not None]
    worst = max(drifts, key=lambda found: found[0], default=None)
    total = Sums()
    for part in parts:
        total.add(part.sums)
    return {
        "role": role,
        "kind": kind,
        "tensors": len(parts),
        "tensors_changed": sum(p.sums.changed > 0 for p in parts),
        "bytes": sum(p.nbytes for p in parts),
        "entries": total.entries,
        "entries_changed": total.changed,
        "drift_median": median(d for d, _ in drifts) if drifts else None,
        "drift_max": worst[0] if worst else None,
        "drift_max_tensor": worst[1].rows.tensor if worst and worst[0] else None,
        "drift_max_layer": worst[1].rows.layer if worst and worst[0] else None,
        "cosine_min": min(cosines, default=None),
        "max_abs_change": total.told()["max_abs_change"],
        "nonfinite_a": total.bad_a,
        "nonfinite_b": total.bad_b,
    }


def layers(parts: Iterable[Part], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per layer, with the drift of all that has one role in it."""
    sums: dict[int, dict[str, Sums]] = {}
    tops: dict[tuple[int, str], list[float | None]] = {}
    for part in parts:
        layer = part.rows.layer
        if layer is not None:
            sums.setdefault(layer, {}).setdefault(part.label, Sums()).add(part.sums)
            tops.setdefault((layer, part.label), []).append(part.top)
    told = []
    for layer in sorted(sums):
        roles = {}
        for role, found in sums[layer].items():
            roles[role] = {
                "drift": found.drift,
                "cosine": found.cosine,
                "entries": found.entries,
                "entries_changed": found.changed,
            }
            if len(only := tops[layer, role]) == 1 and only[0] is not None:
                roles[role]["top_direction"] = only[0]
        kind = kinds[layer] if layer < len(kinds) else ""
        told.append({"layer": layer, "kind": kind, "roles": roles})
    return told


def restorable(parts: Iterable[Part], nbytes: int) -> dict[str, Any]:
    """Return what `morph restore` would put back by default: q and k of the full layers."""
    ours = [p for p in parts if p.rows.role in ("q", "k") and p.rows.kind == "full"]
    changed = [p for p in ours if p.sums.changed]
    count = sum(p.nbytes for p in changed)
    return {
        "layers": sorted({p.rows.layer for p in ours if p.rows.layer is not None}),
        "layers_changed": sorted({p.rows.layer for p in changed if p.rows.layer is not None}),
        "bytes": count,
        "share": count / nbytes if nbytes else 0.0,
    }
