"""What people see: tables and messages. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from morph import registry
from morph._processes import rank, world
from morph._progress import copying as copying
from morph._progress import measuring as measuring
from morph._progress import training as training
from morph.errors import MorphError, UnknownName, escape, nearest

DEBUG = False


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def say(message: str) -> None:
    """Print one line to stderr, control characters made visible; of many processes, one does."""
    if rank() == 0:
        print(escape(message, 2000), file=sys.stderr, flush=True)


def next_command(arguments: Sequence[str]) -> None:
    """Print the command that goes on from here, quoted for a shell. It is the last line."""
    if rank():
        return
    sys.stdout.flush()
    print(f"next: {_quoted(['morph', *arguments])}", file=sys.stderr, flush=True)


def _quoted(words: Sequence[str]) -> str:
    # a name with control characters has no plain form; $'...' is how bash and zsh spell it
    odd = [w if w.isprintable() else "" for w in words]
    return " ".join(
        shlex.quote(w) if w == plain else "$'" + escape(w, 4000).replace("'", "\\'") + "'"
        for w, plain in zip(words, odd)
    )


def fail(error: MorphError) -> int:
    """Print one line that says what is wrong; return the exit code."""
    if DEBUG:
        traceback.print_exception(error)
    red, plain = ("\033[31m", "\033[0m") if _colour() else ("", "")
    text = escape(" ".join(str(error).split("\n")) or type(error).__name__, 4000)
    sys.stdout.flush()
    where = f" (process {rank()} of {world()})" if world() > 1 else ""
    print(f"{red}error:{plain}{where} {text}", file=sys.stderr, flush=True)
    return error.exit_code


def usage(error: Any) -> int:
    """Print a usage error of the command line with the nearest flag or command."""
    context = getattr(error, "ctx", None)
    where = f" See `{context.command_path} --help`." if context else ""
    text = " ".join(error.format_message().split())
    text = text if text.endswith((".", "?", ")")) else f"{text}."
    print(f"error: {escape(text, 1000)}{where}", file=sys.stderr)
    return 2


def hung_up() -> int:
    """The reader of our output is gone, as in `morph list | head`: stop without a word."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    return 0


def _colour() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def emit(value: Any, as_json: bool, pretty: Callable[[Any], None]) -> None:
    """Print a result as JSON or for people."""
    if as_json:
        from morph import strict

        print(json.dumps(strict.plain(value), sort_keys=True, indent=1, default=str))
    else:
        pretty(value)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: int = 99
) -> None:
    """Print a table; columns from index `right` on are right-aligned, none is cut off."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        justify: Any = "right" if i >= right else "left"
        made.add_column(Text(column), justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows:
        made.add_row(*(Text(escape(cell, 600)) for cell in row))
    if title:
        print(escape(title))
    show(made)


def show(renderable: Any) -> None:
    """Print a rich object without the blanks that pad its lines."""
    console = _console()
    with console.capture() as captured:
        console.print(renderable)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def parts(found: Mapping[str, Mapping[str, str]]) -> None:
    """Print `morph list`."""
    for i, (kind, items) in enumerate(found.items()):
        print("\n" * (i > 0) + kind)
        if items:
            table("", ["", ""], [[f"  {n}", s] for n, s in items.items()])
        else:
            print("  none yet")


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


def part(kind: str, name: str, text: str, options: Sequence[tuple[str, str, str]]) -> None:
    """Print `morph show`."""
    print(f"{kind}/{name}\n\n{_reflowed(text)}\n")
    if options:
        section = {"mixers": "mixer", "selectors": "selector"}.get(kind, kind)
        rows = [[f"{section}.{n}", t, d.strip("'")] for n, t, d in options]
        table("", ["option, for --set", "type", "default"], rows)


def _reflowed(text: str) -> str:
    """Return a docstring at the width of the terminal; labelled and indented lines stay lines."""
    width = min(shutil.get_terminal_size().columns, 100)
    lines: list[str] = []
    for line in text.splitlines():
        starts = not line or line[0] in " -*|#" or re.match(r"[A-Z][\w' ]{1,30}:( |$)", line)
        if starts or not lines or not lines[-1] or lines[-1].startswith(" "):
            lines.append(line)
        else:
            lines[-1] += " " + line
    return "\n".join(
        line if line.startswith(" ") or len(line) < width
        else textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )  # fmt: skip


def pairs(found: Mapping[str, Any]) -> None:
    """Print a mapping as two columns; what is None is left out, and each sentence has a row."""
    rows = []
    for key, value in found.items():
        texts = [_value(value)] if value is not None else []
        if isinstance(value, list) and any(isinstance(v, str) and " " in v for v in value):
            texts = [_value(v) for v in value]
        rows += [[str(key).replace("_", " ") * (not i), text] for i, text in enumerate(texts)]
    if rows:
        table("", ["", ""], rows)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        found = (f"{str(k).replace('_', ' ')} {_value(v)}" for k, v in value.items())
        return ", ".join(found) or "none"
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


def _swaps(report: Mapping[str, Any]) -> str:
    """Say what the swap pass did: which units, and what the answers gained."""

    def name(unit: Any) -> str:
        return str(unit[0]) if unit[1] == 0 else f"{unit[0]}.{unit[1]}"

    taken = [f"{name(s['out'])} -> {name(s['in'])}" for s in report["swaps"]]
    return (
        f"{', '.join(taken) or 'none'}; answer NLL {report['nll_before']:.4g} -> "
        f"{report['nll_after']:.4g} ({report['sets_tried']} sets tried, {report['seconds']:.1f} s)"
    )


def plan(found: Mapping[str, Any]) -> None:
    """Print a plan: its pattern and what it saves."""
    apart = ("cache_bytes", "decode_bytes", "load", "serve")
    told = {k: v for k, v in found.items() if k not in apart}
    told["full_heads"] = "; ".join(
        f"layer {layer}: {', '.join(map(str, heads)) or 'none'}"
        for layer, heads in (found.get("full_heads") or {}).items()
    )
    if not told["full_heads"]:
        told.pop("full_heads")
    if found.get("swaps"):
        told["swaps"] = _swaps(found["swaps"])
    cache, reads = found.get("cache_bytes") or {}, found.get("decode_bytes") or {}
    told |= {f"cache at {name}": _beside(entry) for name, entry in cache.items()}
    for name, entry in reads.items():  # told where a mixer keeps tokens that it does not read
        if entry["hybrid"] < 0.95 * cache[name]["hybrid"]:
            told[f"read a token at {name}"] = _beside(entry)
    pairs(told)


def _beside(entry: Mapping[str, int]) -> str:
    """Return the bytes of a hybrid beside its source's."""
    before, after = entry["source"], entry["hybrid"]
    return f"{size(after)} of {size(before)} ({after / before:.2f}x, 16 bit)"


def written(found: Mapping[str, Any]) -> None:
    """Print what was written and verified, and the lines to use it, which are never wrapped."""
    told = dict(found)
    checked = told.pop("verification")
    told["verified"] = (
        f"{checked['tensors_byte_equal']} tensors byte-equal; logits within "
        f"{checked['logit_error']:.1e} of the hybrid in memory"
    )
    plan(told)
    _use(found)


def _use(found: Mapping[str, Any]) -> None:
    for key in ("load", "serve"):
        lines = escape(found[key], 4000).split("; ")
        print(f"\n{key}\n" + "\n".join(f"  {line}" for line in lines))


def aligned(found: Mapping[str, Any]) -> None:
    """Print what a bank holds: the layers' errors, a column for every mixer."""
    rows = [
        [layer, *(f"{m['before'][layer]:.4f} -> {m['after'][layer]:.4f}" for m in found["mixers"])]
        for layer in found["mixers"][0]["after"]
    ]
    names = [m["mixer"] for m in found["mixers"]]
    table("relative error of the layers' outputs", ["layer", *names], rows, 1)
    pairs({"wrote": found["wrote"], "tokens": found["tokens"]})


def evaluation(found: Any) -> None:
    """Print the table of an evaluation, its notes below."""
    from morph import report

    made = report.table(found)
    made.caption = None  # as wide as the table, which may be narrow
    show(made)
    _notes(found.notes)


def _notes(notes: Sequence[str]) -> None:
    width = shutil.get_terminal_size().columns
    for note in notes:
        print(textwrap.fill(f"note: {escape(note, 1000)}", width, subsequent_indent="  "))


def comparison(found: Any) -> None:
    """Print the regret table of a comparison."""
    from morph import report

    show(report.comparison_table(found))


def run(found: Mapping[str, Any]) -> None:
    """Print the end of a run: the table and where everything is."""
    if found.get("evaluation") is not None:
        evaluation(found["evaluation"])
        print()
    if found.get("repair") is not None:
        from morph import report

        show(report.repair_table(found["repair"]))
        _notes([report.repair_conclusion(found["repair"]), *found["repair"].notes])
        print()
    apart = ("evaluation", "repair", "load", "serve")
    pairs({k: v for k, v in found.items() if k not in apart})
    _use(found)
