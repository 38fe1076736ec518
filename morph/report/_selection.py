"""The pictures of selectors beside each other, as PNG bytes. No torch.

A selector has one colour and marker, whatever its place; the same inputs give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from morph import comparison as compared
from morph.comparison import BASELINES, Comparison, Entry, spread
from morph.errors import DataError
from morph.report._pictures import (
    INK,
    MODEL_COLOURS,
    PALE,
    canvas,
    legend_below,
    print_cells,
    short,
)

SEEDS = ", all seeds"
NATS = "nats per answer token"
UNITS = {"recall": "share right", "loss": NATS, "held_out_loss": NATS}
GREY, BAND = "#777777", "#E4E4E4"
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#882255")
SHAPES = "osD^vPX<"  # one more than colours, so that few share both


def agreement_picture(comparison: Comparison) -> bytes:
    """Draw the rank correlation of every two selectors; those alike stand together.

    Raises DataError where no agreement was measured.
    """
    known = comparison.agreement
    if not known:
        raise DataError("comparison.agreement is empty; there is nothing to draw.")
    names = _alike({a: {b: _between(known, a, b) for b in known} for a in known})
    cells = [[_between(known, a, b) for b in names] for a in names]
    count, labels = len(names), [short(name, 28) for name in names]
    with canvas(8, min(8.5, 2.6 + 0.36 * count)) as (figure, png):
        axes = figure.subplots()
        axes.set_facecolor(PALE)
        image = axes.imshow(cells, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        figure.colorbar(image, ax=axes, label="rank correlation (Spearman)", pad=0.02)
        if count <= 20:
            print_cells(axes, image, cells, "{:.2f}".format, 9 if count <= 14 else 7)
        size = 9 if count <= 24 else 216 / count
        axes.set_yticks(range(count), labels, fontsize=size)
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(count), labels, fontsize=size, **turned)
        axes.set(title="Do the selectors rank alike?")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return png()


def _between(known: Mapping[str, Mapping[str, float]], a: str, b: str) -> float:
    mirrored = known.get(b, {}).get(a, 1.0 if a == b else math.nan)
    return known.get(a, {}).get(b, mirrored)


def _alike(known: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Order names so that similar ones are neighbours: average linkage, the near ends joined."""

    def near(a: str, b: str) -> float:
        return -2.0 if math.isnan(known[a][b]) else known[a][b]

    def link(p: Sequence[str], q: Sequence[str]) -> float:
        return sum(near(a, b) for a in p for b in q) / (len(p) * len(q))

    groups = [[name] for name in sorted(known)]
    while len(groups) > 1:
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        i, j = max(pairs, key=lambda ij: link(groups[ij[0]], groups[ij[1]]))
        p, q = groups[i], groups.pop(j)
        turns = [(x, y) for x in (p, p[::-1]) for y in (q, q[::-1])]
        first, second = max(turns, key=lambda xy: near(xy[0][-1], xy[1][0]))
        groups[i] = [*first, *second]
    return groups[0]


def budget_picture(comparison: Comparison) -> bytes:
    """Draw recall and loss against the budget: a line per selector, the best set dashed.

    Random is a band from its worst seed to its best. With a single budget, a row per selector.
    """
    measures = _measures(comparison)
    if len(comparison.budgets) == 1:
        return _one_budget(comparison, measures)
    labels = [_shown(comparison, label) for label in compared.rows(comparison)]
    columns = _columns(labels)
    lines = math.ceil((len(labels) + 3) / columns)
    with canvas(8, 1.0 + 3.1 * len(measures) + 0.2 * lines) as (figure, png):
        panels = figure.subplots(len(measures), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, title, *ends) in zip(panels, measures):
            _budget_panel(axes, comparison, name, ends)
            axes.set(title=title, ylabel=UNITS[name])
            axes.grid(axis="y")
        order = _by_size(comparison)
        ticks = [f"{short(budget, 12)}\n{_size_of(comparison, budget)}" for budget in order]
        panels[-1].set_xticks(range(len(order)), ticks)
        panels[-1].set(xlabel="budget", xlim=(-0.3, len(order) - 0.7 if order else 1))
        _legend(figure, panels, labels, columns)
        return png()


def _columns(labels: Sequence[str]) -> int:
    """Return how many columns of such labels a legend has room for."""
    longest = max([12, *map(len, labels)])
    return max(1, min(4, int(7.8 / (0.65 + 0.09 * longest))))


def _legend(figure: Any, panels: Iterable[Any], rows: Sequence[str], columns: int) -> None:
    """List the best set, the selectors from the lowest regret up, then what bounds them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    place = {label: n for n, label in enumerate(rows, start=1)} | {"best set": 0}
    labels = sorted(found, key=lambda x: place.get(x.removesuffix(SEEDS), len(place)))
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _measures(comparison: Comparison) -> list[tuple[str, str, float | None, float | None]]:
    """Return (field, title, source, all replaced) of every panel: recall if known, and loss."""
    c = comparison
    parts: list[Any] = [*c.entries, *c.best]
    found: list[tuple[str, str, float | None, float | None]] = []
    if any(part.recall is not None for part in parts):
        title = "Recall on held-out examples"
        found.append(("recall", title, c.source_recall, c.cheap_recall))
    if parts and all(part.held_out_loss is not None for part in parts):
        ends = (c.source_held_out_loss, c.cheap_held_out_loss)
        return [*found, ("held_out_loss", "Loss on held-out examples", *ends)]
    title = "Loss on the examples that the choice was made on"
    return [*found, ("loss", title, c.source_loss, c.cheap_loss)]


def _by_size(comparison: Comparison) -> list[str]:
    return sorted(comparison.budgets, key=lambda b: _kept_at(comparison, b) or 0)


def _kept_at(comparison: Comparison, budget: str) -> int | None:
    parts: list[Any] = [*comparison.best, *comparison.entries]
    return next((len(part.kept) for part in parts if part.budget == budget), None)


def _size_of(comparison: Comparison, budget: str) -> str:
    count = _kept_at(comparison, budget)
    unit = {"layer": "layer", "kv_head": "KV head", "head": "head"}[comparison.granularity]
    return "" if count is None else f"{count} {unit}{'s' * (count != 1)}"


def _budget_panel(
    axes: Any, comparison: Comparison, name: str, ends: Sequence[float | None]
) -> None:
    order, rows = _by_size(comparison), compared.rows(comparison)
    plain = sorted(label for label, entries in rows.items() if _is_plain(entries))
    for label, entries in rows.items():
        found = [spread(getattr(e, name) for e in entries if e.budget == b) for b in order]
        points = [(x, s) for x, s in enumerate(found) if s]
        x, mean = [x for x, _ in points], [s.mean for _, s in points]
        shown = _shown(comparison, label)
        if not points:
            continue
        if _is_plain(entries):
            n, count = plain.index(label), len(plain)
            # Side by side, or the lines of selectors that choose alike would hide each other.
            shift = min(0.008, 0.1 / count) * (n - (count - 1) / 2)
            _selector_line(axes, n, shift, points, shown, label == comparison.default)
        elif entries[0].selector == "random" and any(s.number > 1 for _, s in points):
            low, high = ([s[k] for _, s in points] for k in (1, 2))
            axes.fill_between(x, low, high, color=BAND, zorder=0.5, label=shown + SEEDS)
            axes.plot(x, mean, color="#AAAAAA", linewidth=1.2, zorder=0.6)
        else:
            style = {"color": GREY, "marker": "x", "linestyle": "-.", "linewidth": 1.4}
            axes.plot(x, mean, label=shown, **style)
    best = [getattr(comparison.best_at(b), name, None) for b in order]
    if any(value is not None for value in best):
        known = [(x, value) for x, value in enumerate(best) if value is not None]
        style = {"color": "black", "linestyle": "--", "linewidth": 1.8, "zorder": 5}
        axes.plot(*zip(*known), label="best set", marker="*", markersize=8, **style)
    for value, label, look in zip(ends, ("source", "all replaced"), ("-", ":")):
        if value is not None:
            axes.axhline(value, color=INK, linewidth=1.0, linestyle=look, label=label)


def _is_plain(entries: Sequence[Entry]) -> bool:
    return entries[0].selector not in BASELINES


def _shown(comparison: Comparison, label: str) -> str:
    return short(label) + " *" * (label == comparison.default)


def _selector_line(
    axes: Any, n: int, shift: float, points: Sequence[Any], label: str, main: bool
) -> None:
    low, high = ([abs(s[k] - s.mean) for _, s in points] for k in (1, 2))
    axes.errorbar(
        [x + shift for x, _ in points],
        [s.mean for _, s in points],
        yerr=[low, high] if any(low + high) else None,
        color=LINES[n % len(LINES)],
        marker=SHAPES[n % len(SHAPES)],
        linestyle=("-", "--", ":")[n // len(LINES) % 3],
        markersize=6 if main else 4,
        linewidth=2.6 if main else 1.3,
        elinewidth=0.7,
        label=label,
    )


def _one_budget(comparison: Comparison, measures: Iterable[Any]) -> bytes:
    measures, rows = list(measures), compared.rows(comparison)
    best = comparison.best_at(comparison.budgets[0])
    with canvas(8, min(12.0, 1.9 + 0.26 * len(rows))) as (figure, png):
        panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
        for axes, (name, title, *ends) in zip(panels, measures):
            for y, entries in enumerate(rows.values()):
                found = spread(getattr(e, name) for e in entries)
                if found:
                    colour = MODEL_COLOURS[1] if _is_plain(entries) else GREY
                    axes.hlines(y, found.low, found.high, color=colour, linewidth=2.5)
                    axes.plot(found.mean, y, color=colour, marker="o", markersize=6)
            marks = [getattr(best, name, None), *ends]
            words = zip(marks, ("best set", "source", "all replaced"), ("--", "-", ":"))
            for value, label, look in words:
                if value is not None:
                    axes.axvline(value, color="black", linestyle=look, linewidth=1.2, label=label)
            axes.set_title(title if len(measures) == 1 else title.removesuffix(" examples"))
            axes.set_xlabel(UNITS[name])
            axes.grid(axis="x")
        panels[0].set_yticks(range(len(rows)), [_shown(comparison, label) for label in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        budget = comparison.budgets[0]
        title = f"Budget {short(budget, 12)}: {_size_of(comparison, budget) or 'no sets'}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        legend_below(figure, panels[0])
        return png()
