"""`--set key=value`: single values put into a recipe's raw data by dotted name."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from typing import Any

from morph.errors import UsageError, escape, nearest
from morph.recipes import _yaml


def apply(data: Any, sets: Iterable[str], own: Collection[str]) -> tuple[Any, list[str]]:
    """Return the changed copy, and the dotted names that were set as messages spell them.

    `own` are the fields of the section `mixer`; any other name there is an option of the mixer.
    """
    out, places = copy.deepcopy(data), []
    for text in sets:
        key, equals, value = text.partition("=")
        steps = key.strip().split(".")
        if not equals or not all(steps):
            raise UsageError(
                f"--set {escape(text)!r}: give key=value, such as mixer.window=512 or seed=1."
            )
        place = _put(
            out, _option_path(steps, own), _yaml.read(value, f"--set {escape(key)}")[0], key
        )
        if place in places:
            raise UsageError(f"--set {escape(key)}: set twice; give it once.")
        places.append(place)
    return out, places


def _option_path(steps: list[str], own: Collection[str]) -> list[str]:
    """Turn the user's dotted name into a path of the recipe."""
    if len(steps) == 2 and steps[0] == "selector":
        return ["select", "options", steps[1]]
    if len(steps) == 2 and steps[0] == "mixer" and steps[1] not in own:
        return ["mixer", "options", steps[1]]
    return steps


def _put(data: Any, steps: list[str], value: Any, key: str) -> str:
    """Set one value in place; return its dotted name as the loader spells it."""
    place = ""
    for i, step in enumerate(steps):
        if not isinstance(data, (dict, list)):
            raise UsageError(
                f"--set {escape(key)}: {place or 'the recipe'} has no keys of its own."
            )
        at: Any = _stage(data, step, key) if isinstance(data, list) else step
        place += f"[{at}]" if isinstance(data, list) else "." * bool(place) + escape(at, 60)
        if i == len(steps) - 1:
            data[at] = value
        elif isinstance(data, dict):
            data = data.setdefault(at, [] if place == "distill" else {})
        else:
            data = data[at]
    return place


def _stage(stages: list[Any], step: str, key: str) -> int:
    losses = [str(s.get("loss", "")) if isinstance(s, dict) else "" for s in stages]
    if re.fullmatch(r"[0-9]{1,4}", step) and int(step) < len(stages):
        return int(step)
    if losses.count(step) == 1:
        return losses.index(step)
    why = "is no entry"
    hint = "" if step in ("align", "logits", "long") else nearest(step, losses)
    if step in losses:
        why = f"names more than one entry; give its number, such as distill.{losses.index(step)}"
    names = ", ".join(f"{i} ({loss})" if loss else str(i) for i, loss in enumerate(losses))
    raise UsageError(
        f"--set {escape(key)}: {escape(step)!r} {why}.{hint} There are: {names or 'none'}."
    )
