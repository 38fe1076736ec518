"""The pictures of a score file: every unit, and every two units, as PNG bytes. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from morph.comparison import ranks
from morph.errors import PlanError
from morph.plan import Plan, Scores
from morph.report._pictures import (
    INK,
    PALE,
    canvas,
    head_mixer,
    layer_mixer,
    legend_below,
    mixer_colours,
    print_cells,
    short,
    whole_ticks,
)


def scores_picture(scores: Scores, plan: Plan | None = None) -> bytes:
    """Draw the score of every layer as a bar, or of every head as a cell; kept units stand out.

    Where `provenance` has `ranks` (`low` and `high`, laid out as `values`, rank 1 the highest
    score), the layers also get a panel with the 90 % interval of their rank.
    """
    title = f"Need for full attention, by {short(scores.selector)}"
    if scores.granularity == "layer":
        return _score_bars(scores, plan, title)
    return _score_cells(scores, plan, title)


def _score_bars(scores: Scores, plan: Plan | None, title: str) -> bytes:
    values = [row[0] for row in scores.values]
    mixers = [layer_mixer(plan, i) if plan else "all layers" for i in range(len(values))]
    colours = mixer_colours(list(dict.fromkeys(mixers)))
    intervals = _rank_intervals(scores, plan)
    with canvas(8, 5.4 if intervals else 3.2) as (figure, png):
        panels = figure.subplots(1 + bool(intervals), 1, squeeze=False, sharex=True)[:, 0]
        axes = panels[0]
        for mixer, colour in colours.items():
            label = {"full": "kept full", "all layers": None}.get(mixer, f"becomes {short(mixer)}")
            layers = [i for i, m in enumerate(mixers) if m == mixer]
            axes.bar(layers, [values[i] for i in layers], color=colour, width=0.8, label=label)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(title=title, ylabel=short(scores.unit, 30))
        axes.grid(axis="y")
        if intervals:
            kept = sum(mixers[i] == "full" for i in intervals) if plan else 0
            _rank_panel(panels[1], values, intervals, [colours[m] for m in mixers], kept)
        panels[-1].set_xlabel("layer")
        whole_ticks(panels[-1].xaxis, len(values))
        if plan:
            legend_below(figure, axes)
        return png()


def _rank_intervals(scores: Scores, plan: Plan | None) -> dict[int, tuple[float, float]]:
    """Return the rank interval of every layer that has one and can be replaced."""
    found = scores.provenance.get("ranks")
    if not isinstance(found, Mapping):
        return {}
    ends = [found.get(name) for name in ("low", "high")]
    if not all(isinstance(x, Sequence) and len(x) == len(scores.values) for x in ends):
        return {}
    known = {}
    for i, pair in enumerate(zip(*ends)):
        low, high = (x[0] if isinstance(x, Sequence) and x else x for x in pair)
        numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (low, high))
        if numbers and not (plan and plan.geometry.windows[i] is not None):
            known[i] = (float(low), float(high))
    return known


def _rank_panel(
    axes: Any,
    values: Sequence[float],
    intervals: Mapping[int, tuple[float, float]],
    colours: Sequence[str],
    kept: int,
) -> None:
    layers = list(intervals)
    order = ranks([-values[i] for i in layers])
    for i, rank in zip(layers, order):
        low, high = intervals[i]
        axes.vlines(i, low, high, color=colours[i], linewidth=3)
        axes.plot(i, rank, color=INK, marker="o", markersize=4 if len(values) <= 40 else 3)
    title = "Its rank, with 90 % interval"
    if 0 < kept < len(layers):
        axes.axhline(kept + 0.5, color=INK, linewidth=0.9, linestyle="--")
        title += f"; there is room for {kept}"
    axes.set(title=title, ylabel="rank (1: most need)")
    room = 0.5 + 0.03 * len(values)
    axes.set_ylim(len(values) + room, 1 - room)
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(values) / s <= 7)
    axes.set_yticks(sorted({1, *range(step, len(values) + 1, step)}))
    axes.grid(axis="y")


def _score_cells(scores: Scores, plan: Plan | None, title: str) -> bytes:
    rows = list(map(list, zip(*scores.values)))  # units down, layers across
    span = plan.geometry.group_size if plan and scores.granularity == "kv_head" else 1
    with canvas(8, min(7.0, max(3.0, 1.6 + 0.22 * len(rows)))) as (figure, png):
        axes = figure.subplots()
        image = axes.imshow(rows, cmap="cividis", aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label=short(scores.unit, 30), pad=0.02)
        if plan:
            kept = [
                (i, u)
                for i, layer in enumerate(plan.layers)
                for u in range(len(rows))
                if head_mixer(plan, i, layer, u * span) == "full"
            ]
            _outline(axes, kept, len(scores.values))
            legend_below(figure, axes)
        unit = {"kv_head": "KV head", "head": "query head"}[scores.granularity]
        axes.set(title=title, xlabel="layer", ylabel=unit)
        whole_ticks(axes.xaxis, len(scores.values))
        whole_ticks(axes.yaxis, len(rows))
        return png()


def _outline(axes: Any, cells: Sequence[tuple[int, int]], columns: int) -> None:
    """Draw a frame in each of the cells that shows on dark and on bright colours alike."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [Rectangle((i - 0.4, u - 0.4), 0.8, 0.8) for i, u in cells]
    for colour, width in ((INK, 2.6), ("white", 1.2)):
        thick = width if columns <= 40 else 0.6 * width
        frame = PatchCollection(boxes, facecolor="none", edgecolor=colour, linewidth=thick)
        axes.add_collection(frame, autolim=False)
    mark = {"marker": "s", "facecolor": "white", "edgecolor": INK, "s": 40}
    axes.scatter([], [], label="kept full", **mark)


def pairs_picture(scores: Scores) -> bytes:
    """Draw what replacing two units costs beyond the two alone, for every pair, centred at 0.

    Raises PlanError for scores without `pairs`.
    """
    if scores.pairs is None:
        raise PlanError("scores.pairs is missing; only some selectors measure pairs.")
    count, width = len(scores.pairs), len(scores.values[0])
    largest = max((abs(v) for row in scores.pairs for v in row), default=0.0) or 1.0
    cells = [
        [math.nan if i == j else v for j, v in enumerate(r)] for i, r in enumerate(scores.pairs)
    ]
    with canvas(8, 7.4) as (figure, png):
        axes = figure.subplots()
        axes.set_facecolor(PALE)
        image = axes.imshow(cells, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        figure.colorbar(image, ax=axes, label=short(scores.unit, 40), pad=0.02, shrink=0.8)
        if count <= 10:
            print_cells(axes, image, cells, lambda v: _signed(v, largest), 9)
        title = f"Cost of replacing both, beyond each alone, by {short(scores.selector)}"
        axes.set(title=title, xlabel=_strongest(scores, width))
        for axis in (axes.xaxis, axes.yaxis):
            _unit_ticks(axis, len(scores.values), width)
        axes.set_ylabel("layer" if width == 1 else f"layer, {width} units each")
        axes.spines[:].set_visible(False)
        figure.text(
            0.01, 0.0,
            "above 0: they back each other up, keep one of them\n"
            "below 0: they work together, keep both or neither",
            fontsize=9, va="bottom",
        )  # fmt: skip
        figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
        return png()


def _signed(value: float, largest: float) -> str:
    """Return a number with two digits of the largest one, and 0 where that leaves none."""
    digits = max(0, 1 - math.floor(math.log10(largest)))
    return f"{value:+.{digits}f}" if abs(value) >= 0.5 * 10**-digits else "0"


def _strongest(scores: Scores, width: int) -> str:
    pairs = scores.pairs or ()
    found = [(-abs(v), i, j) for i, r in enumerate(pairs) for j, v in enumerate(r) if i < j and v]
    names = [f"{i // width}.{i % width}" if width > 1 else f"{i}" for i in range(len(pairs))]
    words = [f"{names[i]} and {names[j]}: {pairs[i][j]:+.3g}" for _, i, j in sorted(found)[:3]]
    return "strongest  " + ",  ".join(words) if words else "no pair differs from its parts"


def _unit_ticks(axis: Any, layers: int, width: int) -> None:
    """Name layers; where each has several units, at the middle of its block, with lines between."""
    if width == 1:
        whole_ticks(axis, layers)
        return
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if layers / s <= 24)
    shown = range(0, layers, step)
    axis.set_ticks([i * width + (width - 1) / 2 for i in shown], [str(i) for i in shown])
    axis.set_ticks([i * width - 0.5 for i in range(1, layers)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8 if layers <= 24 else 0.3)
    axis.set_tick_params(which="minor", length=0)
