"""From a config.json to its family, or a plain sentence that says why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph import registry
from morph.errors import CheckpointError, UnsupportedModel, escape, nearest
from morph.families._family import Family

PREFIX = "morph_"  # model types of the checkpoints that morph writes


def family_of(config: Mapping[str, Any], override: str | None = None) -> Family:
    """Return the family of a config.json, `override` (`--family`) first.

    `morph_<base>` belongs to the family of its base. Raises UnsupportedModel for an unknown model
    type, with the list, and for composite models; CheckpointError where there is no model type;
    UnknownName for an override that does not exist.
    """
    if override is not None:
        name = override.replace("-", "_")
        registry.path("families", name)
        return _load(name)
    found = config.get("model_type")
    if not isinstance(found, str) or not found:
        raise CheckpointError("config.json names no model_type, so this is no transformers model.")
    name = found.removeprefix(PREFIX).replace("-", "_")
    known = registry.names("families")
    if name in known:
        return _load(name)
    if isinstance(config.get("text_config"), Mapping):
        inner = config["text_config"].get("model_type")
        raise UnsupportedModel(
            f"model_type {escape(repr(found), 60)} is a model of several parts (its text_config is "
            f"{escape(repr(inner), 60)}); morph converts plain text decoders. Save the text part "
            "on its own and convert that."
        )
    raise UnsupportedModel(
        f"model_type {escape(repr(found), 60)} is not known.{nearest(name, known)} "
        f"Known: {', '.join(known)}. If the model is built exactly like one of them, name it with "
        "--family."
    )


def _load(name: str) -> Family:
    family = registry.load("families", name).FAMILY
    assert isinstance(family, Family)
    return family
