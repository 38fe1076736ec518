"""A plan in the words of a stock architecture, or why it has none. No torch, no transformers."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from morph import registry
from morph.errors import escape
from morph.families._windows import FULL, SLIDING
from morph.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A plan in a stock architecture's words: a type per layer, one window, learned sinks."""

    layer_types: tuple[str, ...]
    window: int | None
    sinks: tuple[bool, ...]
    slides_more: bool  # at least one layer that is full in the source slides


def layout(plan: Plan) -> Layout | str:
    """Return the plan as a stock architecture would say it, or the reason why none can."""
    types, sinks, more = [], [], False
    windows: dict[int, int] = {}  # window: first layer that has it
    for i, (layer, own) in enumerate(zip(plan.layers, plan.geometry.windows)):
        window, sink = own, False
        if not layer.is_full:
            if layer.mixer is None:
                return f"layer {i} mixes heads, and a stock layer treats all heads alike."
            if layer.mixer != "sliding":
                return f"layer {i} is {layer.mixer!r}, and stock layers are full or sliding."
            usual = _defaults()
            settings = {**usual, **layer.groups[0].options}
            window = settings.pop("window", None)
            sink = bool(settings.pop("sink_bias", False))
            odd = [k for k, v in settings.items() if k not in usual or usual[k] != v]
            if odd:
                value = escape(repr(settings[odd[0]]), 60)
                return f"layer {i} slides with {odd[0]}={value}, which no stock layer can."
            if type(window) is not int or window < 1:
                return f"layer {i} slides without saying over how many tokens."
            window, more = min(window, own or window), more or own is None
        types.append(FULL if window is None else SLIDING)
        sinks.append(sink)
        if window is not None:
            windows.setdefault(window, i)
    if len(windows) > 1:
        (a, i), (b, j) = list(windows.items())[:2]
        return (
            f"layer {i} has a window of {a} tokens and layer {j} one of {b}; "
            "a stock config has one window for all."
        )
    return Layout(
        layer_types=tuple(types),
        window=next(iter(windows), None),
        sinks=tuple(sinks),
        slides_more=more,
    )


def _defaults() -> dict[str, Any]:
    """Return what the sliding mixer assumes where a plan is silent; read, not imported."""
    return {
        name: ast.literal_eval(default)
        for name, _, default in registry.options("mixers", "sliding")
        if default != "required"
    }


def must(plan: Plan) -> Layout:
    """Return the layout of a plan that no target refused."""
    found = layout(plan)
    assert isinstance(found, Layout), found
    return found
