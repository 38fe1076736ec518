"""What people see: tables and messages. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from morph import registry
from morph.errors import MorphError, UnknownName, escape, nearest

DEBUG = False


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def say(message: str) -> None:
    """Print one line to stderr, control characters made visible."""
    print(escape(message, 2000), file=sys.stderr, flush=True)


def next_command(command: str) -> None:
    """Print the command that goes on from here."""
    say(f"next: {command}")


def fail(error: MorphError) -> int:
    """Print one line that says what is wrong; return the exit code."""
    if DEBUG:
        raise error
    red, plain = ("\033[31m", "\033[0m") if _colour() else ("", "")
    lines = str(error).splitlines() or [type(error).__name__]
    text = "\n".join(escape(line, 4000) for line in lines)
    print(f"{red}error:{plain} {text}", file=sys.stderr, flush=True)
    return error.exit_code


def usage(error: Any) -> int:
    """Print a usage error of the command line with the nearest flag or command."""
    context = getattr(error, "ctx", None)
    where = f" See `{context.command_path} --help`." if context else ""
    text = error.format_message().rstrip(".")
    print(f"error: {escape(text, 1000)}.{where}", file=sys.stderr)
    return 2


def _colour() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def emit(value: Any, as_json: bool, pretty: Callable[[Any], None]) -> None:
    """Print a result as JSON or for people."""
    if as_json:
        from morph import strict

        print(json.dumps(strict.plain(value), sort_keys=True, indent=1, default=str))
    else:
        pretty(value)


def table(title: str, columns: list[str], rows: list[list[Any]], right: int = 99) -> None:
    """Print a table; columns from index `right` on are right-aligned."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i >= right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(escape(cell, 600)) for cell in row))
    _console().print(made)


def parts(found: Mapping[str, Mapping[str, str]]) -> None:
    """Print `morph list`."""
    for kind, items in found.items():
        table(kind, ["name", "what it is"], [[n, s] for n, s in items.items()])
        print()


def find_part(name: str) -> list[tuple[str, str]]:
    """Return the (kind, name) pairs that a name means; raise UnknownName where there is none."""
    kind, slash, stem = name.partition("/")
    if slash:
        registry.path(kind, stem)
        return [(registry.check_kind(kind), stem)]
    found = [(k, name) for k in registry.KINDS if name in registry.names(k)]
    if not found:
        known = [n for k in registry.KINDS for n in registry.names(k)]
        raise UnknownName(
            f"{escape(name)!r} is no part.{nearest(name, known)} `morph list` shows all."
        )
    return found


def part(kind: str, name: str, text: str, options: list[tuple[str, str, str]]) -> None:
    """Print `morph show`."""
    print(f"{kind}/{name}\n")
    print(text)
    if options:
        print()
        table("options", ["name", "type", "default"], [list(o) for o in options])
    print()


def pairs(found: Mapping[str, Any]) -> None:
    """Print a mapping as two columns."""
    table("", ["", ""], [[k, _value(v)] for k, v in found.items()])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(v) for v in value) or "none"
    return str(value)


def size(count: float) -> str:
    """Return bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def inspection(found: Mapping[str, Any]) -> None:
    """Print `morph inspect`."""
    pairs({k: v for k, v in found.items() if not isinstance(v, list)})
    for key, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            columns = list(value[0])
            print()
            table(key, columns, [[_value(row.get(c, "")) for c in columns] for row in value], 1)
        elif isinstance(value, list):
            print()
            pairs({key: value})


def scores(found: Any) -> None:
    """Print scores: a row per layer with a bar, or a row of units per layer."""
    values = [x for row in found.values for x in row]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    rows = []
    for i, row in enumerate(found.values):
        if len(row) == 1:
            bar = "█" * round(24 * (row[0] - low) / span)
            rows.append([str(i), f"{row[0]:.5g}", bar])
        else:
            rows.append([str(i), " ".join(f"{x:.3g}" for x in row), ""])
    table(f"{found.selector}: {found.unit}", ["layer", "score", ""], rows)


def plan(found: Mapping[str, Any]) -> None:
    """Print a plan: its pattern and what it saves."""
    pairs(found)


def written(found: Mapping[str, Any]) -> None:
    """Print what was written and verified."""
    pairs(found)


def evaluation(found: Any) -> None:
    """Print the table of an evaluation and its notes."""
    from morph import report

    _console().print(report.table(found))
    for note in found.notes:
        say(f"note: {note}")


def run(found: Mapping[str, Any]) -> None:
    """Print the end of a run: the table and where everything is."""
    if found.get("evaluation") is not None:
        evaluation(found["evaluation"])
        print()
    pairs({k: v for k, v in found.items() if k != "evaluation"})


@contextmanager
def training() -> Iterator[Callable[[Any], None]]:
    """Show training progress on stderr: loss, tokens a second, time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=_console(stderr=True),
        transient=False,
    )
    tasks: dict[str, Any] = {}

    def update(event: Any) -> None:
        if event.kind != "step":
            return
        if not tasks:
            progress.start()
        name = f"{event.stage + 1} {event.name}"
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=event.steps, note="")
        note = f"loss {event.loss:.4g}  {event.tokens_per_second:,.0f} tok/s"
        progress.update(tasks[name], completed=event.step, note=note)

    try:
        yield update
    finally:
        if tasks:
            progress.stop()
