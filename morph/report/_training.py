"""The picture of a training, from the records of its log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from morph.report._pictures import INK, PALE, canvas, short, thousands
from morph.report._records import MOST_GROUPS, PROBES, Points, Record, StageRecords, read_stages

TEXT, NEEDLES, GATES = "#0072B2", "#E69F00", "#009E73"
BINS, COLUMNS = 80, 48  # points of a curve, cells of a row of layers


def training_picture(records: Sequence[Record]) -> bytes | None:
    """Draw the records of a log against tokens; None where fewer than two have a loss.

    Losses by stage, needle batches apart from text; the align error of every layer; recall and
    perplexity beside the teacher's; the spread of every group of gates. What the log lacks is left
    out.
    """
    stages = read_stages(records)
    if max((len(points) for s in stages for points in (s.text, s.needles)), default=0) < 2:
        return None
    layers = sorted({i for s in stages for _, errors in s.layers for i in errors})
    probes = [p for p in PROBES[:2] if any(s.probes.get(p) for s in stages)]
    groups = list(dict.fromkeys(g for s in stages for g in s.gates))[:MOST_GROUPS]
    heights = [2.9]
    if layers:
        heights.append(1.1 + min(4.0, max(0.5, 0.17 * len(layers))))
    heights += [2.3] * bool(probes)
    columns = min(2 if len(groups) == 4 else 3, len(groups)) or 1
    heights += [1.9] * math.ceil(len(groups) / columns)
    with canvas(8, sum(heights)) as (figure, png):
        grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
        _loss_panel(figure.add_subplot(grid[0, :]), stages)
        row = 1
        if layers:
            _layer_panel(figure, figure.add_subplot(grid[row, :]), stages, layers)
            row += 1
        for n, probe in enumerate(probes):
            width = 6 // len(probes)
            axes = figure.add_subplot(grid[row, n * width : (n + 1) * width])
            _probe_panel(axes, stages, probe)
        row += bool(probes)
        for n, group in enumerate(groups):
            width = 6 // columns
            at = n % columns * width
            axes = figure.add_subplot(grid[row + n // columns, at : at + width])
            _gate_panel(axes, stages, group)
        if groups:
            _gate_legend(figure)
        return png()


def _loss_panel(axes: Any, stages: Sequence[StageRecords]) -> None:
    shown: set[str] = set()
    values = [y for s in stages for _, y in s.text + s.needles]
    logs = _logarithmic(axes, values)
    for stage in stages:
        both = (stage.text, TEXT, "text", "o"), (stage.needles, NEEDLES, "needle batches", "^")
        for points, colour, label, marker in both:
            found = _binned([(x, y) for x, y in points if y > 0 or not logs])
            if not found:
                continue
            x, mean, low, high = found
            axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
            often = len(x) < 40 or marker == "^"
            style = {"marker": marker, "markersize": 3} if often else {}
            label = label if label not in shown else "_nolegend_"
            axes.plot(x, mean, color=colour, linewidth=1.4, label=label, **style)
            shown.add(label)
    axes.set_ylabel("loss")
    _against_tokens(axes, stages, 8.0, named=True)
    axes.set_title("Loss", pad=20)
    if "needle batches" in shown:
        where = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.06), "borderaxespad": 0.0}
        axes.legend(ncols=2, **where)


def _layer_panel(
    figure: Any, axes: Any, stages: Sequence[StageRecords], layers: Sequence[int]
) -> None:
    from matplotlib.colors import LogNorm

    records = [entry for s in stages for entry in s.layers]
    parts = _split(records, COLUMNS)
    cells = [[_mean([e[i] for _, e in part if i in e]) for part in parts] for i in layers]
    seen = [x for row in cells for x in row if x > 1e-12]
    low, high = (min(seen), max(seen)) if seen else (0.1, 1.0)
    norm = LogNorm(low, max(high, 1.01 * low), clip=True)
    image = axes.imshow(cells, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.set(title="Align error of every layer", ylabel="layer", xlabel="tokens")
    step = math.ceil(len(layers) / 24)
    axes.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]], fontsize=8)
    marks = sorted({round(k * (len(parts) - 1) / 4) for k in range(5)})
    axes.set_xticks(marks, [thousands(parts[k][-1][0]) for k in marks])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    last = axes.secondary_yaxis("right")
    ends = [f"{row[-1]:.2g}" if row[-1] == row[-1] else "" for row in cells]
    last.set_yticks(range(0, len(layers), step), ends[::step], fontsize=8)
    last.spines[:].set_visible(False)
    last.tick_params(length=0)
    last.set_ylabel("at the end")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    _plain_log(bar.ax.yaxis, low, high)


def _probe_panel(axes: Any, stages: Sequence[StageRecords], probe: str) -> None:
    colour = TEXT if probe == "recall" else "#D55E00"
    points = [p for s in stages for p in s.probes.get(probe, ())]
    theirs = [p for s in stages for p in s.probes.get(f"teacher_{probe}", ())]
    if probe == "perplexity":
        _logarithmic(axes, [y for _, y in points + theirs])
    x, y = zip(*points)
    marker = "o" if len(x) < 40 else ""
    axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label="student")
    if theirs:
        axes.axhline(theirs[-1][1], color=INK, linestyle="--", linewidth=1.2, label="teacher")
        where = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        tight = {"fontsize": 9, "handlelength": 1.4, "columnspacing": 1.0, "handletextpad": 0.5}
        axes.legend(ncols=2, **tight, **where)  # on the line of the title, clear of the curve
    axes.set_title(probe.capitalize())
    if probe == "recall":
        axes.set(ylim=(-0.03, 1.06), ylabel="share right")
    _against_tokens(axes, stages, 4.0)


def _gate_panel(axes: Any, stages: Sequence[StageRecords], group: str) -> None:
    found = [entry for s in stages for entry in s.gates.get(group, ())]
    found = found[:: math.ceil(len(found) / BINS)] + found[-1:]
    x = [tokens for tokens, _ in found]
    columns = list(zip(*(points for _, points in found)))
    for low, high, alpha in ((1, 5, 0.25), (2, 4, 0.45)):
        axes.fill_between(x, columns[low], columns[high], color=GATES, alpha=alpha, linewidth=0)
    for edge in (0, 6):
        axes.plot(x, columns[edge], color=GATES, linewidth=0.8, linestyle=":")
    marker = "." if len(x) < 30 else ""
    axes.plot(x, columns[3], color=INK, linewidth=1.4, marker=marker)
    axes.set_title(f"Gates: {short(group, 16)}")
    _against_tokens(axes, stages, 2.5)


def _gate_legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=INK, linewidth=1.4, label="gates: median"),
        Patch(color=GATES, alpha=0.6, label="middle half"),
        Patch(color=GATES, alpha=0.25, label="middle 80 %"),
        Line2D([], [], color=GATES, linestyle=":", label="smallest, largest"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


# --- Parts of panels ----------------------------------------------------------------------------


def _against_tokens(
    axes: Any, stages: Sequence[StageRecords], inches: float, named: bool = False
) -> None:
    """Give a panel the tokens of the run below it, and shade every second stage."""
    from matplotlib.ticker import MaxNLocator

    end = max(s.last for s in stages) or 1.0
    axes.set_xlim(-0.01 * end, 1.01 * end)
    axes.xaxis.set_major_locator(MaxNLocator(4 if inches < 6 else 8))
    axes.xaxis.set_major_formatter(lambda value, _: thousands(value))
    axes.set_xlabel("tokens")
    axes.grid(axis="y")
    for n, stage in enumerate(stages):
        if n % 2:
            axes.axvspan(stage.first, stage.last, color=PALE, alpha=0.5, linewidth=0, zorder=0)
        if not named:
            continue
        room = (stage.last - stage.first) / end * inches * 10.5  # letters that fit
        label = stage.name.removeprefix("stage ").replace(": ", " ")
        words = [short(label, max(4, int(room)))] if room >= 6 else [label.split(" ")[0]]
        if room >= len(words[0]):
            where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            at = (stage.first + stage.last) / 2
            axes.text(at, 1.01, words[0], fontsize=9, color=INK, **where)


def _logarithmic(axes: Any, values: Sequence[float]) -> bool:
    """Make the values of a panel logarithmic where they differ by more than ten times."""
    above = [y for y in values if y > 1e-12]
    if not above or max(above) < 10 * min(above):
        return False
    axes.set_yscale("log")
    _plain_log(axes.yaxis, min(above), max(above))
    return True


def _plain_log(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis with plain numbers, between the powers too where it is short."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    decades = math.log10(max(high, 1.01 * low) / low)
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps if decades < 2.5 else (1.0,), numticks=9))
    axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _binned(points: Points) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Return tokens, mean, smallest and largest value of at most `BINS` neighbours each."""
    if not points:
        return None
    parts = _split(points, BINS)
    values = [[y for _, y in part] for part in parts]
    x = [fmean(tokens for tokens, _ in part) for part in parts]
    return x, [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _split(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Return the items as at most `most` runs of nearly equal length."""
    count = min(most, len(items))
    edges = [round(k * len(items) / count) for k in range(count + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
