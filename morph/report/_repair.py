"""What a repair brought back, for people: a table, a picture, and a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from morph.errors import escape
from morph.evaluation import Difference, Row
from morph.repair import POST, PRE, Back, Repair, Side
from morph.report._pages import Block, Bullets, Grid, Heading, Paragraph, Picture, write_page
from morph.report._pictures import (
    INK,
    MARKERS,
    MODEL_COLOURS,
    canvas,
    legend_below,
    short,
    tokens,
)

COLOURS = (INK, "#D55E00", *MODEL_COLOURS[1:5])  # pre, post, restored
EXPLAINED = (
    "Recall and solved are shares of the same items for every checkpoint; a problem is solved "
    "where the whole solution is what greedy decoding writes. Differences have 95 % intervals "
    "(paired, adjusted Wald after Bonett and Price 2012); one around 0 means that no difference "
    "was found. `back` is (restored - post) / (pre - post), with the interval of a paired "
    "bootstrap; it is given where a loss was found."
)


def repair_numbers(repair: Repair) -> tuple[list[str], list[list[str]]]:
    """Return the table of a repair as (head, rows) of text, one column per checkpoint.

    Rows whose name starts with two spaces belong to the row above.
    """
    rows: list[list[str]] = []
    for cell in repair.sides[0].rows:
        what = "solved" if cell.task in repair.tuned else tokens(cell.length)
        found = [_row(side, cell) for side in repair.sides]
        label = f"{escape(cell.task, 20)} {what}, n={cell.count}"
        rows.append([label, *[f"{r.recall:.3f}" if r else "-" for r in found]])
        rows += _difference_rows(repair, cell.task, cell.length, "+.3f")
        if any(_back(repair, side.name, cell) for side in repair.sides):
            shares = [_share(_back(repair, side.name, cell)) for side in repair.sides]
            rows.append(["  back, 95 %", *shares])
    if all(side.perplexity for side in repair.sides):
        shown = [f"{side.perplexity.ppl:.4g}" if side.perplexity else "" for side in repair.sides]
        rows.append(["perplexity", *shown])
        rows += _difference_rows(repair, "perplexity", 0, "+.3f", " nats")
    return ["", *[escape(side.name, 40) for side in repair.sides]], rows


def repair_table(repair: Repair) -> Table:
    """Return the numbers as a rich table; names are shown as they are, never read as markup."""
    head, rows = repair_numbers(repair)
    out = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    out.add_column("", no_wrap=True)
    for name in head[1:]:
        out.add_column(Text(name), justify="right")
    for row in rows:
        style = "dim" if row[0].startswith("  ") else ""
        out.add_row(*[Text(cell, style=style) for cell in row])
    return out


def repair_conclusion(repair: Repair) -> str:
    """Return in words what the fine-tuning took, and what is back."""
    lost = [
        change.found
        for change in repair.changes
        if (change.since, change.found.model) == (PRE, POST)
        and change.found.task not in ("perplexity", *repair.tuned)
    ]
    if not lost:
        return "No recall was asked for."
    down = [d for d in lost if d.high < 0]
    text = f"The fine-tuning lowered recall in {len(down)} of {len(lost)} cells."
    for side in repair.sides[2:]:
        changes = [
            change.found
            for change in repair.changes
            if (change.since, change.found.model) == (POST, side.name)
            and change.found.task not in ("perplexity", *repair.tuned)
        ]
        better = sum(d.low > 0 for d in changes)
        worse = sum(d.high < 0 for d in changes)
        text += (
            f" Against post, {escape(side.name, 40)} is better in {better}, worse in {worse}, and "
            f"not told apart in {len(changes) - better - worse}."
        )
    return text


def repair_report(out_dir: str | Path, repair: Repair) -> list[Path]:
    """Write repair.html, repair.md and repair.png into `out_dir`; return their paths.

    Raises StorageError where nothing can be written.
    """
    head, rows = repair_numbers(repair)
    blocks: list[Block] = [
        Heading(text="What came back"),
        Paragraph(text=repair_conclusion(repair)),
        Grid(head=head, rows=rows),
        Paragraph(text=EXPLAINED),
        Picture(
            name="repair.png",
            alt="Recall by length, solved problems, and paired differences of the checkpoints",
            png=repair_picture(repair),
        ),
    ]
    if repair.notes:
        blocks.append(Bullets(items=repair.notes))
    if repair.drift:
        blocks += [Heading(text="How far the fine-tuning moved what"), _drift_grid(repair)]
    told = [("fine-tuning", repair.tuning), ("restore", repair.restoring)]
    for title, facts in told:
        if facts:
            shown = [(str(k), _plain(v)) for k, v in facts.items() if v is not None]
            blocks += [Heading(text=f"The {title}"), Grid(head=("", ""), rows=shown)]
    return write_page(out_dir, "repair", "morph: a fine-tuning and what restoring brought", blocks)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(side: Side, cell: Row) -> Row | None:
    return next((r for r in side.rows if (r.task, r.length) == (cell.task, cell.length)), None)


def _back(repair: Repair, name: str, cell: Row) -> Back | None:
    key = (name, cell.task, cell.length)
    return next((b for b in repair.back if (b.name, b.task, b.length) == key), None)


def _share(back: Back | None) -> str:
    if back is None:
        return ""
    if back.share is None:
        return "nothing lost"
    return f"{back.share:.2f} ({back.low:.2f}…{back.high:.2f})"


def _found(repair: Repair, since: str, name: str, task: str, length: int) -> Difference | None:
    for change in repair.changes:
        d = change.found
        if (change.since, d.model, d.task, d.length) == (since, name, task, length):
            return d
    return None


def _difference_rows(
    repair: Repair, task: str, length: int, style: str, unit: str = ""
) -> list[list[str]]:
    rows = []
    for since in (PRE, POST):
        cells = [_found(repair, since, side.name, task, length) for side in repair.sides]
        if any(cells):
            shown = [f"{d.low:{style}}…{d.high:{style}}" if d else "" for d in cells]
            rows.append([f"  since {since}{unit}, 95 %", *shown])
    return rows


def _drift_grid(repair: Repair) -> Grid:
    roles = list(dict.fromkeys(d.role for d in repair.drift))
    layers = sorted({d.layer for d in repair.drift})
    known = {(d.layer, d.role): d.drift for d in repair.drift}
    rows = [
        [str(i), *[f"{known[i, r]:.3f}" if (i, r) in known else "" for r in roles]] for i in layers
    ]
    return Grid(head=["layer", *[role.replace("_", " ") for role in roles]], rows=rows)


# --- The picture --------------------------------------------------------------------------------


def repair_picture(repair: Repair) -> bytes:
    """Draw recall by length and solved problems of every checkpoint, and the paired differences."""
    rows = repair.sides[0].rows
    tasks = list(dict.fromkeys(r.task for r in rows if r.task not in repair.tuned))
    panels = [*tasks[:3], *([None] if repair.tuned else [])]
    pairs = _pairs(repair)
    height = 3.1 + 0.7 + 0.2 * sum(len(found) + 1 for _, found in pairs)
    with canvas(8, height) as (figure, png):
        grid = figure.add_gridspec(2, max(1, len(panels)), height_ratios=[3.1, height - 3.1])
        for n, task in enumerate(panels):
            axes = figure.add_subplot(grid[0, n])
            if task is None:
                _solved_panel(axes, repair)
            else:
                _recall_panel(axes, repair, task)
            axes.set(ylim=(-0.03, 1.05))
            axes.grid(axis="y")
            if n == 0:
                axes.set_ylabel("share right, 95 % interval")
                legend_below(figure, axes)
        _difference_panel(figure.add_subplot(grid[1, :]), pairs)
        return png()


def _recall_panel(axes: Any, repair: Repair, task: str) -> None:
    lengths = sorted({r.length for r in repair.sides[0].rows if r.task == task})
    for n, side in enumerate(repair.sides):
        rows = [r for r in side.rows if r.task == task]
        # Side by side, or the intervals of checkpoints that score alike would hide each other.
        x = [lengths.index(r.length) + _shift(n, len(repair.sides)) for r in rows]
        _points(axes, n, side.name, x, rows, "-")
    axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axes.set(title=short(task, 16), xlabel="length, tokens", xlim=(-0.5, len(lengths) - 0.5))


def _solved_panel(axes: Any, repair: Repair) -> None:
    for n, side in enumerate(repair.sides):
        rows = [r for task in repair.tuned for r in side.rows if r.task == task]
        x = [i + _shift(n, len(repair.sides)) for i in range(len(rows))]
        _points(axes, n, side.name, x, rows, "")
    axes.set_xticks(range(len(repair.tuned)), [short(task, 12) for task in repair.tuned])
    axes.set(title="Tuned on", xlabel="problems solved", xlim=(-0.7, len(repair.tuned) - 0.3))


def _shift(n: int, count: int) -> float:
    return 0.12 * (n - (count - 1) / 2)


def _points(
    axes: Any, n: int, name: str, x: Sequence[float], rows: Sequence[Row], line: str
) -> None:
    share = [r.recall for r in rows]
    spread = [[r.recall - r.low for r in rows], [r.high - r.recall for r in rows]]
    look = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}
    axes.errorbar(
        x, share, yerr=spread, label=short(name), linestyle=line or "none", capsize=2.5,
        markersize=5, linewidth=1.4, elinewidth=1.1, **look,
    )  # fmt: skip


Pair = tuple[str, list[tuple[str, Difference]]]


def _pairs(repair: Repair) -> list[Pair]:
    """Return the groups of differences that are drawn: post since pre, the others since post."""
    found: list[Pair] = []
    for since, names in ((PRE, [POST]), (POST, [s.name for s in repair.sides[2:]])):
        for name in names:
            changes = [
                (_cell(repair, c.found), c.found)
                for c in repair.changes
                if (c.since, c.found.model) == (since, name) and c.found.task != "perplexity"
            ]
            if changes:
                found.append((f"{name} - {since}", changes))
    return found


def _cell(repair: Repair, found: Difference) -> str:
    if found.task in repair.tuned:
        return f"{short(found.task, 12)} solved"
    return f"{short(found.task, 12)} {tokens(found.length)}"


def _difference_panel(axes: Any, pairs: Sequence[Pair]) -> None:
    y, places, labels = 0.0, [], []
    for n, (title, found) in enumerate(pairs):
        colour = COLOURS[(n + 1) % len(COLOURS)]
        axes.text(0.0, y, short(title, 40), transform=axes.get_yaxis_transform(), va="center",
                  ha="left", fontsize=9, fontweight="bold", color=colour)  # fmt: skip
        y += 1
        for label, d in found:
            axes.plot([d.low, d.high], [y, y], color=colour, linewidth=1.6)
            axes.plot(
                d.difference, y, color=colour, marker=MARKERS[(n + 1) % len(MARKERS)], markersize=5
            )
            places.append(y)
            labels.append(label)
            y += 1
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(places, labels, fontsize=9)
    axes.set(ylim=(max(y, 1) - 0.4, -0.7), title="Paired differences, 95 % intervals")
    axes.set_xlabel("change of the share right")
    axes.grid(axis="x")
