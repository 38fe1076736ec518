"""Selectors beside each other in text: the regret table, its terminal form, and the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from morph import comparison as compared
from morph.comparison import BASELINES, Comparison, Entry, Kept, spread
from morph.errors import escape
from morph.report._pages import Block, Bullets, Grid, Heading, Paragraph, Picture, write_page
from morph.report._selection import agreement_picture, budget_picture

GAP = 2  # blanks between the columns of the terminal


def regret_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the regrets as (head, rows) of text: a row per selector, a column per budget.

    A cell is the mean over seeds on the examples that the choice was made on, then in parentheses
    on held-out ones. Rows whose name starts with two spaces belong to the row above.
    """
    budgets, rows = comparison.budgets, []
    if comparison.best:
        best = [comparison.best_at(b) for b in budgets]
        losses = [_pair(_loss(b.loss), _loss(b.held_out_loss)) if b else "-" for b in best]
        cost = spread(b.forwards for b in best if b)
        rows.append(["best set: its loss", *losses, _count(cost.mean if cost else None), "-"])
        tried = [_tried(b.sets_tried, b.exhaustive) if b else "" for b in best]
        rows.append(["  sets tried", *tried, "", ""])
    for label, entries in compared.rows(comparison).items():
        at = [[e for e in entries if e.budget == b] for b in budgets]
        here = [spread(e.regret for e in found) for found in at]
        away = [spread(e.held_out_regret for e in found) for found in at]
        cells = [_pair(*(_regret(s and s.mean) for s in both)) for both in zip(here, away)]
        rows.append([_name(comparison, label, entries), *cells, *_costs(entries)])
        seeds = max((len(found) for found in at), default=0)
        if seeds > 1 and any(here):
            ranges = [_range(_regret(s.low), _regret(s.high)) if s else "" for s in here]
            rows.append([f"  range, {seeds} seeds", *ranges, "", ""])
    return ["", *[escape(b, 12) for b in budgets], "passes", "CPU s"], rows


def comparison_table(comparison: Comparison) -> RenderableType:
    """Return the regret table for a terminal, with what its numbers mean below.

    Columns that do not fit beside each other go on below, with the names again. Names are shown as
    they are, never read as markup.
    """
    head, rows = regret_table(comparison)
    lines = [*_legend(comparison), *(escape(note, 400) for note in comparison.notes)]
    return _Folded(head=head, rows=rows, lines=lines)


def comparison_report(out_dir: str | Path, comparison: Comparison) -> list[Path]:
    """Write compare.html, compare.md and the pictures into `out_dir`; return their paths.

    Raises StorageError where nothing can be written.
    """
    head, rows = regret_table(comparison)
    blocks: list[Block] = [*_facts(comparison), Heading(text="Regret")]
    blocks += [Grid(head=head, rows=rows), Bullets(items=_legend(comparison))]
    blocks += _recall_blocks(comparison)
    if comparison.best:
        blocks += [Heading(text="The best sets"), _best_grid(comparison)]
    pictures = _pictures(comparison)
    if pictures:
        blocks += [Heading(text="Pictures"), *pictures]
    notes = [*comparison.notes, *_entry_notes(comparison)]
    if notes:
        blocks += [Heading(text="Notes"), Bullets(items=notes)]
    if comparison.versions:
        rows = [[str(k), str(v)] for k, v in comparison.versions.items()]
        blocks += [Heading(text="Versions"), Grid(head=("", ""), rows=rows)]
    return write_page(out_dir, "compare", f"morph: selectors on {comparison.model}", blocks)


# --- The table ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Folded:
    """A table whose columns go on below where the terminal is too narrow for all of them."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for n, columns in enumerate(self._blocks(options.max_width)):
            if n:
                yield Text("")
            yield self._table(columns)
        if self.rows and self.lines:
            yield Text("")
        for line in self.lines:
            yield Text(line, style="dim")

    def _blocks(self, width: int) -> list[list[int]]:
        table = [self.head, *self.rows]
        widths = [max(cell_len(row[n]) for row in table) for n in range(len(self.head))]
        blocks: list[list[int]] = [[]]
        left = width - widths[0]
        for n, wide in enumerate(widths[1:], start=1):
            if blocks[-1] and wide + GAP > left:
                blocks.append([])
                left = width - widths[0]
            blocks[-1].append(n)
            left -= wide + GAP
        return blocks

    def _table(self, columns: Sequence[int]) -> Table:
        out = Table(box=None, pad_edge=False, padding=(0, 0, 0, GAP), header_style="bold")
        out.add_column("", no_wrap=True)
        for n in columns:
            out.add_column(Text(self.head[n]), justify="right", overflow="fold")
        for row in self.rows:
            if any(row[n] for n in columns):
                style = "dim" if row[0].startswith("  ") else ""
                out.add_row(*[Text(row[n], style=style) for n in (0, *columns)])
        return out


def _name(comparison: Comparison, label: str, entries: Sequence[Entry]) -> str:
    mark = " *" if label == comparison.default else ""
    kind = " (baseline)" if entries[0].selector in BASELINES else ""
    swaps = " + swaps" if label.endswith(" + swaps") else ""
    return escape(label.removesuffix(swaps), 28 - len(swaps)) + swaps + mark + kind


def _pair(here: str, away: str) -> str:
    return here if away == "-" else f"{here} ({away})"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _regret(value: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-9:
        return "0"
    if size < 0.0005:  # not 0, and not to be taken for it
        return "<.001" if value > 0 else ">-.001"
    return f"{value:.{3 if size < 1 else 2 if size < 100 else 0}f}"


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low}…{high}"


def _tried(count: int, exhaustive: bool) -> str:
    return f"all {count:,}" if exhaustive else f"{count:,}, not all"


def _costs(entries: Sequence[Entry]) -> list[str]:
    passes = spread(e.forwards + e.backwards for e in entries)
    seconds = spread(e.cpu_seconds for e in entries)
    return [_count(passes.mean if passes else None), _count(seconds.mean if seconds else None)]


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _legend(comparison: Comparison) -> list[str]:
    c = comparison
    lines = [
        "Regret: loss above that of the best set, nats per answer token, on the "
        f"{c.examples:,} examples that the choice was made on; lower is better."
    ]
    if any(e.held_out_regret is not None for e in c.entries):
        lines.append(
            "In parentheses: on held-out examples, above the best set that anybody chose at that "
            "budget."
        )
    if any(not b.exhaustive for b in c.best):
        lines.append("Where not all sets were tried the true regret may be larger.")
    lines.append(
        f"Loss of the source {_loss(c.source_loss)}, with everything replaced "
        f"{_loss(c.cheap_loss)}."
    )
    lines.append("passes: forwards + backwards; passes and CPU s are means of one choice.")
    if c.default in compared.rows(c):
        lines.append("* what morph chooses by unless told otherwise.")
    return lines


# --- The page -----------------------------------------------------------------------------------


def _facts(comparison: Comparison) -> list[Block]:
    c = comparison
    options = [f"{key}={value}" for key, value in c.mixer_options.items()]
    ends = [("source", c.source_loss, c.source_held_out_loss, c.source_recall)]
    ends += [("everything replaced", c.cheap_loss, c.cheap_held_out_loss, c.cheap_recall)]
    rows = [
        ("model", c.model),
        ("sha256", c.model_sha256),
        ("mixer", " ".join([c.mixer, *options])),
        ("chosen per", c.granularity.replace("_", " ")),
        ("task", f"{c.task}, {c.examples:,} examples of {c.seq_len:,} tokens"),
        ("seeds", ", ".join(map(str, c.seeds)) or "none"),
    ]
    for name, loss, held_out, recall in ends:
        words = [f"loss {_pair(_loss(loss), _loss(held_out))}"]
        words += [f"recall {recall:.2f}"] if recall is not None else []
        rows.append((name, ", ".join(words)))
    count = len(compared.rows(c))
    text = (
        f"{count} way{'s' * (count != 1)} to choose which {c.granularity.replace('_', ' ')}s keep "
        "full attention, each given the same model, mixer and examples at the same budgets."
    )
    return [Paragraph(text=text), Grid(head=("", ""), rows=rows)]


def _recall_blocks(comparison: Comparison) -> list[Block]:
    parts = [*comparison.entries, *comparison.best]
    if all(part.recall is None for part in parts):
        return []
    found = {b.budget: b.recall for b in comparison.best}
    rows = []
    if found:
        shares = [found.get(b) for b in comparison.budgets]
        rows.append(["best set", *["-" if x is None else f"{x:.2f}" for x in shares]])
    for label, entries in compared.rows(comparison).items():
        at = [spread(e.recall for e in entries if e.budget == b) for b in comparison.budgets]
        cells = ["-" if s is None else _share(s) for s in at]
        rows.append([_name(comparison, label, entries), *cells])
    grid = Grid(head=["", *comparison.budgets], rows=rows)
    text = "The share of held-out answer tokens that are right, and its range over seeds."
    return [Heading(text="Recall"), grid, Paragraph(text=text)]


def _share(found: compared.Spread) -> str:
    ends = _range(f"{found.low:.2f}", f"{found.high:.2f}")
    return f"{found.mean:.2f}" + f" ({ends})" * (found.number > 1)


def _best_grid(comparison: Comparison) -> Grid:
    rows = [
        [b.budget, _listed(b.kept, comparison.granularity), _tried(b.sets_tried, b.exhaustive)]
        for b in comparison.best
    ]
    return Grid(head=("budget", "kept full", "sets tried"), rows=rows)


def _listed(kept: Kept, granularity: str) -> str:
    names = [str(i) if granularity == "layer" else f"{i}.{u}" for i, u in kept]
    shown = names if len(names) <= 48 else [*names[:48], f"and {len(names) - 48} more"]
    return ", ".join(shown) or "none"


def _entry_notes(comparison: Comparison) -> Iterable[str]:
    return [f"{e.label}, {e.budget}: {e.note}" for e in comparison.entries if e.note]


def _pictures(comparison: Comparison) -> list[Picture]:
    found = []
    if comparison.entries:
        alt = "Recall and loss against the budget, a line per selector"
        found.append(Picture(name="budget.png", alt=alt, png=budget_picture(comparison)))
    if comparison.agreement:
        alt = "The rank correlation of every two selectors"
        found.append(Picture(name="agreement.png", alt=alt, png=agreement_picture(comparison)))
    return found
