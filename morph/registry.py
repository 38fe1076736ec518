"""A folder is a registry: the stem of a file is its name in the CLI, in YAML and in configs.

Nothing here imports what it lists: names come from the folder and descriptions from the
docstring, read with `ast`, so that `morph list` and `morph show` stay free of torch.
From outside the package a name may be `package.module` or `package.module:object`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from morph.errors import CheckpointError, UnknownName, escape, nearest

KINDS = ("families", "layouts", "kernels", "mixers", "selectors", "recipes")
ROOT = Path(__file__).parent


def check_kind(kind: str) -> str:
    """Return `kind` in its plural form, accepting the singular; raise UnknownName otherwise."""
    plural = {"family": "families"}.get(kind, kind if kind.endswith("s") else kind + "s")
    if plural not in KINDS:
        hint = nearest(kind, KINDS)
        raise UnknownName(f"{escape(kind)!r} is no kind of part.{hint} Kinds: {', '.join(KINDS)}.")
    return plural


@cache
def names(kind: str) -> tuple[str, ...]:
    """Return the sorted names of one kind: every file or folder whose name has no leading `_`."""
    folder = ROOT / check_kind(kind)
    suffix = ".yaml" if folder.name == "recipes" else ".py"
    found = {p.stem for p in folder.glob(f"*{suffix}") if not p.name.startswith("_")}
    if suffix == ".py":
        found |= {p.parent.name for p in folder.glob("[!_]*/__init__.py")}
    return tuple(sorted(found - {"schema"}))


def path(kind: str, name: str) -> Path:
    """Return the file of `name`; raise UnknownName with the nearest name and the list."""
    kind = check_kind(kind)
    if name not in names(kind):
        raise UnknownName(
            f"{escape(name)!r} is no {_one(kind)}.{nearest(name, names(kind))} "
            f"There are: {', '.join(names(kind))}."
        )
    if kind == "recipes":
        return ROOT / kind / f"{name}.yaml"
    file = ROOT / kind / f"{name}.py"
    return file if file.exists() else ROOT / kind / name / "__init__.py"


def docstring(kind: str, name: str) -> str:
    """Return the text that `morph show` prints: the docstring, or a recipe's leading comment."""
    file = path(kind, name)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        lines = []
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            lines.append(line[1:].removeprefix(" "))
        return "\n".join(lines).strip()
    return (ast.get_docstring(ast.parse(text)) or "").strip()


def summary(kind: str, name: str) -> str:
    """Return the first line of the docstring, which `morph list` prints."""
    return (docstring(kind, name).splitlines() or [""])[0]


def options(kind: str, name: str) -> list[tuple[str, str, str]]:
    """Return (field, type, default) of a part's `Options` dataclass without importing the part."""
    file = path(kind, name)
    if file.suffix != ".py":
        return []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "Options":
            return [
                (
                    str(item.target.id),
                    ast.unparse(item.annotation),
                    ast.unparse(item.value) if item.value else "required",
                )
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            ]
    return []


def load(kind: str, name: str) -> Any:
    """Import and return a part: a module of this package, or an outside `package.module[:object]`.

    Raises UnknownName when neither a file nor an importable object has that name.
    """
    kind = check_kind(kind)
    if name in names(kind):
        return importlib.import_module(f"morph.{kind}.{name}")
    if "." in name or ":" in name:
        return _outside(kind, name)
    path(kind, name)  # raises UnknownName
    raise AssertionError("unreachable")


def import_module(name: str) -> None:
    """Import a module that the user names; raise UnknownName where that fails."""
    try:
        importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        raise UnknownName(
            f"module {escape(name)!r} cannot be imported: {escape(error)}."
        ) from error


def refuse_imports(kind: str, found: Iterable[str], where: str) -> None:
    """Raise CheckpointError where data names an outside part that nobody has imported yet.

    A checkpoint or a plan may name parts, but not make morph import a module: that runs code.
    """
    for name in found:
        module = name.partition(":")[0]
        if name not in names(kind) and module not in sys.modules:
            raise CheckpointError(
                f"{where}: {_one(kind)} {escape(name)!r} is not part of morph, and a file may "
                f"not choose what is imported. If you trust it, import {escape(module)} first "
                f"(on the command line: morph --import {escape(module)} ...)."
            )


def _outside(kind: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UnknownName(
            f"{escape(name)!r} is no {_one(kind)}: {escape(error)}. Give one of "
            f"{', '.join(names(kind))}, or 'package.module:object' that can be imported."
        ) from error
    return found


def _one(kind: str) -> str:
    return {"families": "family"}.get(kind, kind.removesuffix("s"))
