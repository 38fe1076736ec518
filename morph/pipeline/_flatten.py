"""Cut what is needed out of a package's source, as flat files that import each other relatively.

Transformers copies remote code from one folder, by the relative imports it finds in the text. So
every module becomes one file, `morph.mixers._base` the file `morph_mixers__base.py`, and holds only
the top-level statements that the wanted names reach. Text and comments stay as they were written;
imports are rewritten. Nothing is imported here: sources are read with `ast`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Present wherever transformers runs a model. Anything else is imported in a `try`, since
# transformers asks for every library that a file imports outside of one, used or not.
PRESENT = {"torch", "transformers", "numpy", "safetensors"} | set(sys.stdlib_module_names)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a local name stands for: `name` of `module`, or `module` itself where it is None."""

    module: str
    name: str | None
    inside: bool  # a module of the package that is being flattened


@dataclass(kw_only=True)
class Module:
    """One source file: its statements, what they define, and which of them are kept."""

    name: str
    lines: list[str]
    body: list[ast.stmt]
    defines: dict[str, int] = field(default_factory=dict)  # name -> index of its statement
    imports: dict[str, Target] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    used: set[str] = field(default_factory=set)  # imported names that kept statements use


def flat_name(module: str) -> str:
    """Return the name of the file, without suffix, that stands for a module."""
    return module.replace(".", "_")


def flatten(
    roots: Mapping[str, tuple[str, ...]],
    *,
    package: str = "morph",
    given: tuple[str, ...] = (),
    edit: Callable[[str, str], str] = lambda module, text: text,
) -> dict[str, str]:
    """Return flat module name -> text for what `roots` (module -> names) reach in a package.

    `given` modules are imported under their flat names but not written: the caller supplies them.
    `edit(module, text)` may change a source before it is read.
    """
    work = _Work(package=package, given=set(given), edit=edit)
    for module, names in roots.items():
        for name in names:
            work.need(module, name)
    work.settle()
    return {flat_name(m.name): _text(work, m) for _, m in sorted(work.modules.items())}


@dataclass(kw_only=True)
class _Work:
    package: str
    given: set[str]
    edit: Callable[[str, str], str]
    modules: dict[str, Module] = field(default_factory=dict)

    def need(self, module: str, name: str) -> None:
        """Keep the statement that binds `name` in `module`, and all that it reaches."""
        if module in self.given:
            return
        found = self.read(module)
        if name in found.defines:
            self.keep(found, found.defines[name])
        elif name in found.imports:
            self.use(found, name)
        else:
            raise LookupError(f"{module} has no top-level name {name!r}")

    def keep(self, module: Module, index: int) -> None:
        if index in module.kept:
            return
        module.kept.add(index)
        statement = module.body[index]
        local = {}
        for node in _nested_imports(statement):
            local.update(self.targets(module.name, node))
        for name, target in local.items():
            if target.inside and target.name is not None:
                self.need(target.module, target.name)
            elif target.inside:
                self.attributes(statement, name, target.module)
        for name in set(_loads(statement)) - set(local):
            if name in module.defines:
                self.keep(module, module.defines[name])
            elif name in module.imports:
                self.use(module, name, statement)

    def use(self, module: Module, name: str, statement: ast.stmt | None = None) -> None:
        """Keep the import of `name`, and what it brings from inside the package."""
        module.used.add(name)
        target = module.imports[name]
        if not target.inside:
            return
        if target.name is not None:
            self.need(target.module, target.name)
        elif statement is not None:
            self.attributes(statement, name, target.module)

    def attributes(self, statement: ast.stmt, name: str, module: str) -> None:
        """Need every `name.x` of a statement; a module may not be used in any other way.

        Where the statement also binds the name itself, uses of that other thing are passed over.
        """
        if module in self.given:
            return
        rebound = name in _rebound(statement)
        attributes = [
            n for n in ast.walk(statement)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
        ]  # fmt: skip
        if not rebound and len(attributes) != _loads(statement).count(name):
            raise LookupError(f"module {module} is used as a value; only its names can be followed")
        found = self.read(module)
        for node in attributes:
            if not rebound or node.attr in {*found.defines, *found.imports}:
                self.need(module, node.attr)

    def settle(self) -> None:
        """Keep statements that act on what is kept: decorated by it, or assigning to its parts."""
        before = -1
        while before != (before := sum(len(m.kept) for m in self.modules.values())):
            for module in list(self.modules.values()):
                names = {n for n, i in module.defines.items() if i in module.kept}
                for i, statement in enumerate(module.body):
                    if _acts_on(statement) & names:
                        self.keep(module, i)

    def read(self, name: str) -> Module:
        """Return a module of the package, parsed on first use."""
        if name in self.modules:
            return self.modules[name]
        path = _file(name)
        if path is None:
            raise LookupError(f"{name} is no module of {self.package}")
        text = self.edit(name, path.read_text(encoding="utf-8"))
        made = Module(name=name, lines=text.splitlines(), body=ast.parse(text).body)
        self.modules[name] = made
        for i, statement in enumerate(made.body):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                made.imports.update(self.targets(name, statement))
            elif not _only_for_types(statement):
                made.defines.update(dict.fromkeys(_bound(statement), i))
        return made

    def targets(self, module: str, node: ast.Import | ast.ImportFrom) -> dict[str, Target]:
        """Return local name -> target of an import statement that stands in `module`."""
        found = {}
        source = self.origin(module, node)
        for alias in node.names:
            if source is None:  # import a.b as c
                local, name = alias.asname or alias.name.split(".")[0], alias.name
                if name.split(".")[0] == self.package:
                    raise LookupError(f"{module}: write `from {self.package} import ...`")
                found[local] = Target(module=name, name=None, inside=False)
                continue
            inside, whole = source.split(".")[0] == self.package, f"{source}.{alias.name}"
            is_module = inside and (whole in self.given or _file(whole) is not None)
            found[alias.asname or alias.name] = Target(
                module=whole if is_module else source,
                name=None if is_module else alias.name,
                inside=inside,
            )
        return found

    def origin(self, module: str, node: ast.Import | ast.ImportFrom) -> str | None:
        """Return the absolute name of the module that a `from` import names."""
        if isinstance(node, ast.Import):
            return None
        if not node.level:
            return node.module
        path = _file(module)
        parents = module.split(".")
        if path is None or path.name != "__init__.py":
            parents.pop()
        parents = parents[: len(parents) - node.level + 1]
        return ".".join([*parents, node.module] if node.module else parents)


def _file(module: str) -> Path | None:
    """Return the file of a module beside this package, or None where there is none."""
    path = ROOT.joinpath(*module.split("."))
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement binds, also inside `if`, `try` and loops."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
        return
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        yield from (a.asname or a.name.split(".")[0] for a in statement.names)
        return
    for node in ast.iter_child_nodes(statement):
        if isinstance(node, ast.stmt):
            yield from _bound(node)
        elif isinstance(node, ast.ExceptHandler):
            for inner in node.body:
                yield from _bound(inner)
        elif isinstance(node, ast.expr):
            for n in ast.walk(node):
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                    yield n.id


def _loads(statement: ast.stmt) -> list[str]:
    """Return the names that a statement reads, or changes as globals, once for every use."""
    found = []
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif isinstance(node, ast.Global):
            found += node.names
    return found


def _rebound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds anywhere inside: variables, fields, parameters."""
    walk = list(ast.walk(statement))
    stored = {n.id for n in walk if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in walk if isinstance(n, ast.arg)}


def _only_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)


def _acts_on(statement: ast.stmt) -> set[str]:
    """Return the names that a statement changes: owners of its decorators or of its targets."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        places: list[ast.expr] = list(statement.decorator_list)
    elif isinstance(statement, ast.Assign):
        places = [t for t in statement.targets if not isinstance(t, ast.Name)]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        places = [statement.value.func]
    else:
        return set()
    return {n.id for p in places for n in ast.walk(p) if isinstance(n, ast.Name)}


def _nested_imports(statement: ast.stmt) -> list[ast.Import | ast.ImportFrom]:
    return [n for n in ast.walk(statement) if isinstance(n, (ast.Import, ast.ImportFrom))]


def _text(work: _Work, module: Module) -> str:
    """Return the kept statements of a module with their comments, imports rewritten."""
    parts, end = [], 0
    for i, statement in enumerate(module.body):
        decorators = getattr(statement, "decorator_list", ())
        first = min([statement.lineno, *(d.lineno for d in decorators)])
        lead = module.lines[end : first - 1]
        end = statement.end_lineno or first
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            lines = _import(work, module, statement, module.used)
        elif i in module.kept or (i == 0 and _is_docstring(statement)):
            lines = _rewritten(work, module, statement, first)
        else:
            continue
        if lines:
            parts += [*lead, *lines]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(parts)).strip() + "\n"


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _rewritten(work: _Work, module: Module, statement: ast.stmt, first: int) -> list[str]:
    """Return the lines of a statement, with the imports inside it rewritten."""
    lines = list(module.lines[first - 1 : statement.end_lineno])
    nested = _nested_imports(statement)
    for node in sorted(nested, key=lambda n: n.lineno, reverse=True):
        made = _import(work, module, node, None)
        lines[node.lineno - first : (node.end_lineno or node.lineno) - first + 1] = [
            " " * node.col_offset + line for line in made
        ]
    return lines


def _import(
    work: _Work, module: Module, node: ast.Import | ast.ImportFrom, used: set[str] | None
) -> list[str]:
    """Return the lines that replace an import statement, without names that are not `used`."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return [ast.unparse(node)]
    targets = work.targets(module.name, node)
    chosen = {n: t for n, t in targets.items() if used is None or n in used}
    lines, grouped, outside = [], {}, []
    for local, target in chosen.items():
        if not target.inside:
            outside.append(local)
        elif target.name is None:
            lines.append(f"from . import {_as(flat_name(target.module), local)}")
        else:
            grouped.setdefault(target.module, []).append(_as(target.name, local))
    for source, names in grouped.items():
        lines += _wrapped(f"from .{flat_name(source)} import ", names)
    if outside:
        kept = [a for a in node.names if (a.asname or a.name.split(".")[0]) in outside]
        again = (
            ast.Import(kept) if isinstance(node, ast.Import)
            else ast.ImportFrom(node.module, kept, 0)
        )  # fmt: skip
        line = ast.unparse(again)
        tops = {t.module.split(".")[0] for n, t in chosen.items() if n in outside}
        guarded = ["try:", f"    {line}", "except ImportError:", "    raise"]
        lines += [line] if tops <= PRESENT else guarded
    return lines


def _as(name: str, local: str) -> str:
    return name if name == local else f"{name} as {local}"


def _wrapped(start: str, names: list[str]) -> list[str]:
    line = start + ", ".join(names)
    return [line] if len(line) <= 100 else [f"{start}(", *(f"    {n}," for n in names), ")"]
