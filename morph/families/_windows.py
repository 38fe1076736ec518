"""The windows that a source already has, read from its config.json. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from morph.errors import CheckpointError, UnsupportedModel, escape

FULL, SLIDING = "full_attention", "sliding_attention"


def uniform(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return one entry per layer: `sliding_window` tokens everywhere, or None where it is null."""
    window: int | None = config["sliding_window"]
    count: int = config["num_hidden_layers"]
    _check(window)
    return (window,) * count


def typed(
    config: Mapping[str, Any], layer_types: Sequence[str], window: int | None
) -> tuple[int | None, ...]:
    """Return one entry per layer: `window` where `layer_types` slides, None where it is full.

    Raises CheckpointError where the types do not cover the layers or a sliding layer has no
    window, UnsupportedModel for other layer types.
    """
    count = config["num_hidden_layers"]
    if not isinstance(layer_types, (list, tuple)) or len(layer_types) != count:
        raise CheckpointError(f"config.json: layer_types must be a list of {count} entries.")
    for i, kind in enumerate(layer_types):
        if kind not in (FULL, SLIDING):
            raise UnsupportedModel(
                f"config.json: layer {i} is {escape(repr(kind), 60)}; morph converts layers of "
                f"{FULL} and {SLIDING}."
            )
        if kind == SLIDING and window is None:
            raise CheckpointError(
                f"config.json: layer_types makes layer {i} slide, but no sliding_window applies."
            )
    _check(window)
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def every(count: int, step: int) -> list[str]:
    """Return the types of `count` layers of which each `step`-th is full and the others slide."""
    return [SLIDING if (i + 1) % step else FULL for i in range(count)]


def qwen(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return one entry per layer by the rules of Qwen2 and Qwen3.

    `use_sliding_window` switches every window off; without `layer_types` the layers from
    `max_window_layers` on slide.
    """
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = config["max_window_layers"]
    types = config["layer_types"] or [
        SLIDING if window is not None and i >= first else FULL
        for i in range(config["num_hidden_layers"])
    ]
    return typed(config, types, window)


def causal(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for an encoder: a model that attends to later tokens."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(
            "config.json: use_bidirectional_attention is set; morph converts causal decoders only."
        )


def _check(window: Any) -> None:
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(
            f"config.json: sliding_window is {escape(repr(window), 60)}; it must be a whole number "
            "of at least 1, or null."
        )
