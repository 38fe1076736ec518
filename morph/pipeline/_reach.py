"""How far a mixer's softmax sees, as its file states, read without importing it; no torch.

A file in `morph/mixers` may have two constants. `SEES` is an expression over its options, such as
"k * block": over how many tokens softmax runs for one token at most (0: over all). `LINEAR = False`
says that there is nothing but softmax.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from morph import registry


def options_of(mixer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the defaults that the mixer's source states; outside parts have none."""
    return {**_stated(mixer)[0], **given}


def sees(mixer: str, given: Mapping[str, Any]) -> int | None:
    """Return for how many tokens the mixer's softmax reaches back; None: no bound is stated."""
    expression = _stated(mixer)[1].get("SEES")
    if expression is None:
        return None
    return _value(ast.parse(str(expression), mode="eval").body, options_of(mixer, given)) or None


def parts(mixer: str) -> tuple[bool, bool]:
    """Return whether the mixer has a softmax part and a linear one; an outside part counts so."""
    stated = _stated(mixer)[1]
    linear = bool(stated.get("LINEAR", True))
    return "SEES" in stated or not linear, linear


def _stated(mixer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if mixer not in registry.names("mixers"):
        return {}, {}
    return _read(registry.path("mixers", mixer))


@cache
def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options' defaults and the constants that a file states as literals."""
    options, constants = {}, {}
    for name, _, default in registry.options("mixers", file.stem):
        with suppress(ValueError):  # a constant's name, or no default
            options[name] = ast.literal_eval(default)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with suppress(ValueError):
                constants[node.targets[0].id] = ast.literal_eval(node.value)
    return options, constants


def _value(node: ast.expr, options: Mapping[str, Any]) -> int | None:
    """Return a sum or product of options; None where one of them is no number."""
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        found = options.get(node.id)
        return found if isinstance(found, int) and not isinstance(found, bool) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left, options), _value(node.right, options)
        if left is None or right is None:
            return None
        return left + right if isinstance(node.op, ast.Add) else left * right
    raise ValueError(f"SEES may add and multiply options; got {ast.unparse(node)}")
