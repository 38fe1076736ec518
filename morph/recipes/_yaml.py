"""The strict subset of YAML that recipes are written in: plain data and nothing else.

Scalars follow the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3), which PyYAML's own
loaders do not. Data is built from parser events, so no constructor exists that a tag could call.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from morph.errors import RecipeError, escape

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000  # a mebibyte of short ones takes seconds to check

# The core schema of YAML 1.2: unlike 1.1, `no` and `12:30` are text and `1e-4` is a number
_CORE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
                         r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
)  # fmt: skip
_TAG = "tag:yaml.org,2002:"


def read(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """Return the data of one YAML document, and the line of every key by its dotted name.

    YAML 1.2 scalars, strings, lists and mappings; no other tags, no anchors or aliases, no doubled
    keys, at most 1 MiB, 32 levels and 100,000 values. Raises RecipeError with the line.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{where}: larger than 1 MiB; a recipe is a page of text.")
    reader = _Reader(where)
    try:
        events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return reader.document(events), reader.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {escape(error.problem)}.") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise RecipeError(f"{where}: not valid YAML: {escape(error)}.") from error


class _Reader:
    """Builds plain data from YAML events. Nothing is constructed by tag, so nothing can run."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[str, int] = {}
        self.values = 0

    def document(self, events: Any) -> Any:
        """Return the data of the only document."""
        data, found = None, 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                found += 1
                if found > 1:
                    raise self.error(event, "a second document; a recipe is one.")
            elif isinstance(event, yaml.NodeEvent):
                data = self.node(event, events, "", 1)
        return data

    def node(self, event: Any, events: Any, path: str, depth: int) -> Any:
        """Return the data that starts at `event`."""
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            name = escape(event.anchor, 60)
            raise self.error(event, f"anchors and aliases (&, *) are off: {name!r}.")
        if depth > MAX_DEPTH:
            raise self.error(event, f"nested deeper than {MAX_DEPTH} levels.")
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.error(event, f"more than {MAX_VALUES} values; a recipe is a page of text.")
        self.lines.setdefault(path, event.start_mark.line + 1)
        kind = self.tag(event)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, kind)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(self.node(event, events, f"{path}[{len(items)}]", depth + 1))
            return items
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = event.value if isinstance(event, yaml.ScalarEvent) else None
            if key is None:
                raise self.error(event, "a key must be plain text.")
            self.tag(event)
            if key in found:
                raise self.error(event, f"key {escape(key)!r} appears twice.")
            inner = f"{path}.{escape(key, 60)}" if path else escape(key, 60)
            self.lines[inner] = event.start_mark.line + 1
            found[key] = self.node(next(events), events, inner, depth + 1)
        return found

    def tag(self, event: Any) -> str:
        """Return the core type an explicit tag names, or an empty string."""
        tag = event.tag
        if not tag:
            return ""
        if tag == "!":  # "not what it looks like": text
            return "str"
        allowed: tuple[str, ...] = tuple(_SCALARS)
        if isinstance(event, yaml.CollectionStartEvent):
            allowed = ("seq",) if isinstance(event, yaml.SequenceStartEvent) else ("map",)
        if tag in [_TAG + name for name in allowed]:
            return str(tag.removeprefix(_TAG))
        raise self.error(event, f"tag {escape(tag)!r} is not allowed; a recipe is plain data.")

    def scalar(self, event: Any, kind: str) -> Any:
        """Return the value of a scalar; quoted ones are text."""
        text, core = event.value, _core_type(event.value)
        if kind == "float" and core == "int":
            core = "float"
        if kind not in ("", "str", core):
            raise self.error(event, f"{escape(text, 60)!r} is no {kind}.")
        found = kind or (core if event.implicit[0] else "str")
        if found == "int" and len(text) > 40:
            raise self.error(event, f"the number {escape(text, 20)} is too long.")
        return _SCALARS[found](text)

    def error(self, event: Any, message: str) -> RecipeError:
        """Return the error, with the line of the event."""
        return RecipeError(f"{self.where}, line {event.start_mark.line + 1}: {message}")


def _core_type(text: str) -> str:
    return next((name for name, pattern in _CORE if pattern.fullmatch(text)), "str")


def _int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


_SCALARS: dict[str, Any] = {
    "str": str,
    "int": _int,
    "float": lambda text: float(re.sub(r"\.(?=[a-zA-Z])", "", text)),
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
}


def dump(data: Any) -> str:
    """Return plain data as YAML that `read` reads back as it was, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """No aliases, and quotes around text that would be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _core_type(text) == "str" else '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)
