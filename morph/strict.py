"""Build frozen dataclasses from plain mappings, refusing whatever was not meant.

One loader serves recipes, plans, scores and the `Options` of every part: unknown keys, missing
keys and wrong types are errors that name the place and the nearest key. Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from morph.errors import MorphError, RecipeError, escape, nearest

T = TypeVar("T")
_SUFFIX = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


def build(cls: type[T], data: Any, where: str = "", error: type[MorphError] = RecipeError) -> T:
    """Return `cls(**data)` with every key known and every value of the declared type.

    `where` is the dotted place printed in messages; `error` is the class raised. Integers accept
    `2M` and `64K` (powers of ten), floats accept `1/4`, tuples accept lists.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where or 'top level'}: expected a mapping of keys, got {_say(data)}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise error(
                f"{_join(where, key)}: unknown key.{nearest(str(key), fields)} "
                f"Allowed: {', '.join(sorted(fields)) or 'none'}."
            )
    hints = _hints(typing.cast(Any, cls))
    values = {k: convert(hints[k], v, _join(where, k), error) for k, v in data.items()}
    missing = [
        n
        for n, f in fields.items()
        if n not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise error(f"{where or 'top level'}: missing {', '.join(missing)}.")
    return cls(**values)


def convert(hint: Any, value: Any, where: str, error: type[MorphError] = RecipeError) -> Any:
    """Return `value` as the type `hint` declares; raise `error` naming `where` otherwise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, where, error)
    if origin is typing.Literal:
        if any(a == value and type(a) is type(value) for a in args):  # True is no 1
            return value
        hint_text = nearest(str(value), [str(a) for a in args])
        allowed = ", ".join(map(str, args))
        raise error(f"{where}: {_say(value)} is not allowed.{hint_text} Allowed: {allowed}.")
    if origin is tuple:
        return _tuple(args, value, where, error)
    if origin in (dict, Mapping) or hint in (dict, Mapping) or _is_mapping(origin):
        if not isinstance(value, Mapping):
            raise error(f"{where}: expected a mapping of keys, got {_say(value)}.")
        if not args or (args == (str, Any) and all(type(key) is str for key in value)):
            return dict(value)
        return {
            convert(args[0], k, where, error): convert(args[1], v, _join(where, k), error)
            for k, v in value.items()
        }
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return build(typing.cast(type, hint), value, where, error)
    return _scalar(hint, value, where, error)


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and mappings as dicts and lists fit for JSON; None fields stay."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


@lru_cache(maxsize=256)
def _hints(cls: Any) -> dict[str, Any]:
    # evaluated anew each time by typing, which takes seconds for a list of thousands
    return typing.get_type_hints(cls)


def nested_deeper(data: Any, levels: int) -> bool:
    """Return whether plain data holds lists or mappings more than `levels` deep.

    Walks that are recursive come to Python's limit at some hundreds.
    """
    level = [data] if isinstance(data, (dict, list)) else []
    for _ in range(levels):
        inner = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [x for values in inner for x in values if isinstance(x, (dict, list))]
    return bool(level)


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _union(args: tuple[Any, ...], value: Any, where: str, error: type[MorphError]) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [a for a in args if a is not type(None)]
    for candidate in rest:  # an exact type first, so that `int | str` keeps 3 an int
        if isinstance(candidate, type) and type(value) is candidate:
            return value
    failures = []
    for candidate in rest:
        try:
            return convert(candidate, value, where, error)
        except MorphError as failure:
            failures.append(failure)
    raise failures[0]


def _tuple(args: tuple[Any, ...], value: Any, where: str, error: type[MorphError]) -> Any:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise error(f"{where}: expected a list, got {_say(value)}.")
    if len(args) == 2 and args[1] is Ellipsis:
        # where nothing needs a message it is quick to see, for the pairs of a large model
        if args[0] in (int, str, bool) and all(type(v) is args[0] for v in value):
            return tuple(value)
        if args[0] is float and all(type(v) is float or type(v) is int for v in value):
            numbers = tuple(real for v in value if (real := _real(v)) is not None)
            if all(map(math.isfinite, numbers)):
                return numbers
        return tuple(convert(args[0], v, f"{where}[{i}]", error) for i, v in enumerate(value))
    if len(args) != len(value):
        raise error(f"{where}: expected {len(args)} entries, got {len(value)}.")
    return tuple(convert(a, v, f"{where}[{i}]", error) for i, (a, v) in enumerate(zip(args, value)))


def _scalar(hint: Any, value: Any, where: str, error: type[MorphError]) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is int and not isinstance(value, bool):
        number = _count(value)
        if number is not None:
            return number
    if hint is float and not isinstance(value, bool):
        real = _real(value)
        if real is not None:
            if math.isfinite(real):
                return real
            raise error(f"{where}: {_say(value)} is not a finite number.")
    if hint is type(None) and value is None:
        return None
    raise error(f"{where}: expected {_name(hint)}, got {_say(value)}.")


def _count(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGB])", value)
        if match:
            scaled = float(match[1]) * _SUFFIX[match[2]]
            return int(scaled) if scaled.is_integer() else None
    return None


def _real(value: Any) -> float | None:
    try:
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            match = re.fullmatch(r"(\d{1,400})/([1-9]\d{0,400})", value)
            return int(match[1]) / int(match[2]) if match else None
    except OverflowError:  # an integer beyond 1.8e308
        return math.inf
    return None


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, str(hint))


def _say(value: Any) -> str:
    kinds = {str: "text", bool: "true/false", int: "integer", float: "number", list: "list"}
    if value is None:
        return "nothing"
    return f"{escape(repr(value), 60)} ({kinds.get(type(value), type(value).__name__)})"


def _join(where: str, key: Any) -> str:
    name = escape(key, 60)
    return f"{where}.{name}" if where else name
