"""Rotary settings from either spelling of config.json, as transformers reads them.

Today's spelling is `rope_parameters`, flat or one mapping per layer type; the older one is
`rope_theta` with `rope_scaling`. No torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.errors import CheckpointError, escape
from morph.families._windows import FULL, SLIDING

Config = Mapping[str, Any]


def flat(full: Config) -> dict[str, Any]:
    """Return the rotary parameters in today's spelling, from either spelling.

    `full` has the defaults filled in. Raises CheckpointError where they are no mapping.
    """
    rope = _mapping(full, "rope_scaling") or _mapping(full, "rope_parameters")
    return _fill(rope, full, full["rope_theta"])


def typed(full: Config, theta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters of full and of sliding layers, from either spelling.

    `rope_theta` and `rope_scaling` of the older spelling speak of full layers; `theta` has the
    base of sliding layers.
    """
    nested = _mapping(full, "rope_parameters")
    ropes = {kind: dict(nested.get(kind) or {}) for kind in (FULL, SLIDING)}
    ropes[FULL].update(_mapping(full, "rope_scaling"))
    return {k: _fill(r, full, theta.get(k, full["rope_theta"])) for k, r in ropes.items()}


def _fill(rope: dict[str, Any], full: Config, theta: Any) -> dict[str, Any]:
    rope.setdefault("rope_theta", theta)
    if full.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", full["partial_rotary_factor"])
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", full["max_position_embeddings"])
    return rope


def _mapping(full: Config, name: str) -> dict[str, Any]:
    value = full.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"config.json: {name} is {escape(repr(value), 60)}; expected a mapping of keys."
        )
    return dict(value)


def fields(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields of one rotary setting for all layers.

    The older spelling stands beside today's: readers that know only that one would otherwise
    rotate with their own default, silently.
    """
    found: dict[str, Any] = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return found


def whole(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters without a share of 1, which only some architectures know."""
    if rope.get("partial_rotary_factor") in (1, 1.0):
        rope.pop("partial_rotary_factor")
    return rope
