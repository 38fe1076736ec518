"""From a config.json to its layout, or a sentence that says why there is none."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from morph import registry
from morph.errors import CheckpointError, UnsupportedModel, escape, nearest
from morph.families._lookup import PREFIX
from morph.layouts import _families, _hybrid
from morph.layouts._layout import Layout
from morph.layouts._read import Reading, Shapes
from morph.layouts._read import read as read_layout
from morph.layouts._settings import Settings, joined
from morph.layouts._shapes import Heads

_ATTENTION = re.compile(
    r"(.*?\.(\d+)\..*?)(?:q_proj|k_proj|qkv_proj|query_key_value|c_attn|Wqkv|wqkv|wq|wk|q_b_proj)\."
)


def model_types() -> tuple[str, ...]:
    """Return the model types whose layout is known, by the names of their files, sorted."""
    return tuple(sorted({*registry.names("layouts"), *registry.names("families")}))


def read(config: Mapping[str, Any], shapes: Shapes) -> Reading:
    """Return what every row of a checkpoint is for.

    `config` is config.json, `shapes` maps the tensor names of the headers to their shapes. A
    wrapper around a known text model, as of images, is read as the text model in its text_config.
    Raises CheckpointError where the config is wrong or disagrees with the tensors, and
    UnsupportedModel, with the layers that look like attention, where no layout is known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError("config.json names no model_type, so this is no transformers model.")
    if model_type.startswith(PREFIX):
        return _hybrid_reading(model_type, config, shapes)
    inner = config.get("text_config")
    named = inner.get("model_type") if isinstance(inner, Mapping) else None
    for name in (model_type, named):
        if isinstance(name, str) and _stem(name) in model_types():
            return read_layout(layout(name), config, shapes, model_type=model_type)
    raise _unknown(model_type, shapes)


@cache
def layout(model_type: str) -> Layout:
    """Return the layout of an architecture; raise UnknownName where there is none."""
    stem = _stem(model_type)
    if stem in registry.names("families"):
        return _families.layout_of(stem)
    found = registry.load("layouts", stem).LAYOUT
    assert isinstance(found, Layout)
    return found


def _stem(model_type: str) -> str:
    return model_type.replace("-", "_")


def _hybrid_reading(model_type: str, config: Mapping[str, Any], shapes: Shapes) -> Reading:
    base = _stem(model_type.removeprefix(PREFIX))
    if base not in registry.names("families"):
        raise _unknown(model_type, shapes)
    family, plan = layout(base), _hybrid.plan_of(config)
    settings = Settings(config, family.defaults)
    if settings.layers != plan.geometry.num_hidden_layers:
        raise CheckpointError(
            f"config.json: num_hidden_layers is {settings.layers}, but morph.plan is for "
            f"{plan.geometry.num_hidden_layers} layers."
        )
    own, found = plan.geometry, family.heads(settings, 0, "full")
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        if getattr(own, name) != getattr(found, name):
            raise CheckpointError(
                f"config.json: {name} is {getattr(found, name)}, but morph.plan is for "
                f"{getattr(own, name)}."
            )

    def heads(settings: Settings, layer: int, kind: str) -> Heads:
        found = family.heads(settings, layer, kind)
        turns = _hybrid.turns(plan.layers[layer])
        return found if turns else dataclasses.replace(found, rotary=None)

    made = dataclasses.replace(
        family, model_type=model_type, kinds=lambda _: _hybrid.kinds(plan), heads=heads
    )
    return read_layout(made, config, shapes, _hybrid.mixtures(plan))


def _unknown(model_type: str, shapes: Shapes) -> UnsupportedModel:
    """Return the error for a model type without a layout, with the layers that may be attention."""
    found: dict[int, str] = {}
    for name in sorted(shapes):
        match = _ATTENTION.match(name[:300])  # a name may be of any length
        if match and len(match[2]) < 6:
            found.setdefault(int(match[2]), name)
    stem = _stem(model_type)
    if found:
        layers = [f"{i} ({found[i]})" for i in sorted(found)]
        count = f"{len(found)} layer{'s' if len(found) > 1 else ''}"
        seen = f"By their names, {count} may be attention: {joined(layers, 4)}."
    else:
        seen = "No tensor is named like attention."
    return UnsupportedModel(
        f"model_type {escape(repr(model_type), 60)} has no layout: nothing says which rows of its "
        f"tensors are q and k.{nearest(stem, model_types())} {seen} Names alone do not tell "
        "softmax attention from linear layers; `morph list layouts` lists what is known, and one "
        f"file, morph/layouts/{escape(stem, 40)}.py, adds an architecture (docs/layouts.md)."
    )
