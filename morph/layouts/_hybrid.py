"""What the heads of a `morph_<base>` hybrid attend with, from the plan in its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph import registry, strict
from morph.errors import CheckpointError, PlanError, escape
from morph.layouts._read import Mixture, strongest
from morph.layouts._settings import MAX_HEADS
from morph.plan import Geometry, HeadGroup, LayerPlan, Plan

OVER_ALL = ("full", "nope", "parallel")  # softmax over everything, or over the source's window


def plan_of(config: Mapping[str, Any]) -> Plan:
    """Return the plan in config.json; raise CheckpointError where it is none."""
    stored = config.get("morph")
    if not isinstance(stored, Mapping) or not isinstance(stored.get("plan"), Mapping):
        raise CheckpointError("config.json: morph.plan is missing, so no layer has a known mixer.")
    stored, where = stored["plan"], "config.json: morph.plan"
    shape = stored.get("geometry")
    for name in ("num_attention_heads", "num_key_value_heads"):  # before lists of heads are made
        heads = shape.get(name) if isinstance(shape, Mapping) else None
        if type(heads) is not int or not 1 <= heads <= MAX_HEADS:
            value = escape(repr(heads), 60)
            raise CheckpointError(
                f"{where}.geometry.{name} is {value}; it must be a whole number from 1 to "
                f"{MAX_HEADS}."
            )
    try:
        return strict.build(Plan, stored, where, CheckpointError)
    except PlanError as error:
        raise CheckpointError(f"{where}: {error}") from error


def kind_of(group: HeadGroup, window: int | None) -> str:
    """Return what a group of heads attends with; `window` is that of the source's layer."""
    if group.mixer in OVER_ALL:
        own = group.options.get("window") if group.mixer == "parallel" else None
        return "sliding" if window is not None or own else "full"
    if group.mixer == "sliding":
        return "sliding"
    if not _is_sparse(group):
        return "linear"
    return "full" if window is None else "sliding"


def _is_sparse(group: HeadGroup) -> bool:
    """Return whether a mixer of the package keeps tokens and no state: softmax over some."""
    cost = group.cache
    if cost is None or cost.tokens == 0 or cost.state_bytes(1, 1):
        return False
    return group.mixer in registry.names("mixers")


def kinds(plan: Plan) -> tuple[str, ...]:
    """Return the kind of every layer; that of its strongest heads where they differ."""
    windows = plan.geometry.windows
    return tuple(
        strongest(kind_of(g, w) for g in layer.groups) for layer, w in zip(plan.layers, windows)
    )


def mixtures(plan: Plan) -> dict[int, Mixture]:
    """Return what the heads of replaced layers attend with, per head and per KV head.

    Query heads of several groups may read one KV head; its rows belong to the strongest of them.
    """
    shape = plan.geometry
    return {i: _mixture(plan.layers[i], shape, shape.windows[i]) for i in plan.replaced_layers}


def _mixture(layer: LayerPlan, shape: Geometry, window: int | None) -> Mixture:
    found = {h: kind_of(g, window) for g in layer.groups for h in g.heads}
    q = tuple(found[h] for h in range(shape.num_attention_heads))
    step = shape.group_size
    return Mixture(
        q=q,
        k=tuple(strongest(q[g * step : (g + 1) * step]) for g in range(shape.num_key_value_heads)),
        groups=tuple(kind_of(g, window) for g in layer.groups),
    )


def turns(layer: LayerPlan) -> bool:
    """Return whether any softmax head of a layer rotates its q and k."""
    softmax = (g for g in layer.groups if g.mixer in (*OVER_ALL, "sliding") or _is_sparse(g))
    return any(g.mixer != "nope" for g in softmax)
