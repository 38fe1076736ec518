"""Layouts of the families of `morph/families`, derived from what their files say."""

from __future__ import annotations

from functools import partial

from morph import registry
from morph.errors import CheckpointError, escape
from morph.families._family import Family
from morph.families._windows import FULL, SLIDING
from morph.layouts._layout import Layout, RowMap, key, query, query_key_value, value
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def layout_of(stem: str) -> Layout:
    """Return the layout of the family in the file `stem`."""
    family: Family = registry.load("families", stem).FAMILY
    separate: dict[str, RowMap] = {family.q: query, family.k: key, family.v: value}
    return Layout(
        model_type=family.model_type,
        kinds=partial(_kinds, family),
        heads=partial(_heads, family),
        tiny_config=family.tiny_config,
        defaults=family.defaults,
        layers=family.layers,
        attention=family.attention,
        projections={family.qkv: query_key_value} if family.qkv else separate,
        o=family.o,
        q_norm=family.q_norm,
        k_norm=family.k_norm,
        norm_scope="projection" if family.norm_scope == "projection" else "head",
    )


def _kinds(family: Family, settings: Settings) -> tuple[str, ...]:
    count = settings.layers
    if family.windows is None:
        return ("full",) * count
    if settings.get("layer_types") is not None:
        settings.words("layer_types", {FULL: "full", SLIDING: "sliding"})
    try:
        windows = family.windows(settings.given)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{settings.where}sliding_window and its companions do not say which layers slide "
            f"({escape(error)})."
        ) from error
    return tuple("full" if window is None else "sliding" for window in windows)


def _heads(family: Family, settings: Settings, layer: int, kind: str) -> Heads:
    rotary = True
    if family.rotary_switch is not None:  # smollm3: every so many layers have no positions
        if settings.get("no_rope_layers"):
            rotary = bool(settings.list_for_layers("no_rope_layers")[layer])
        else:
            rotary = (layer + 1) % settings.size("no_rope_layer_interval", 4) != 0
    # of the families, only phi3 lets a share of each head turn under plain rotary positions
    share = settings.share() if family.model_type == "phi3" else 1.0
    return settings.heads(rotary=rotary, share=share, qk_norm=family.q_norm is not None)
