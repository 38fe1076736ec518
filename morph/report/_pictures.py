"""The pictures of a report, as PNG bytes. matplotlib is imported on first use; no torch.

Colours are those of Okabe and Ito, which people with any common colour blindness can tell apart;
lines also differ by marker. The same inputs give the same bytes.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from morph.errors import escape
from morph.evaluation import Evaluation, ModelResult, Row
from morph.plan import LayerPlan, Plan

INK, PALE = "#222222", "#DDDDDD"
PALETTE = ("#009E73", "#CC79A7", "#D55E00", "#F0E442", "#999999", "#882255", "#44AA99")
OWN_WINDOW = "window of the source"
MIXER_COLOURS = {"full": "#0072B2", "sliding": "#E69F00", OWN_WINDOW: "#56B4E9"}
MODEL_COLOURS = ("#222222", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
MARKERS = "osD^vP"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def plan_picture(plan: Plan) -> bytes:
    """Draw the plan as one cell per layer, or per layer and head where heads differ."""
    mixed = any(len(layer.groups) > 1 for layer in plan.layers)
    heads = plan.geometry.num_attention_heads if mixed else 1
    cells = [
        [head_mixer(plan, i, layer, h) for i, layer in enumerate(plan.layers)] for h in range(heads)
    ]
    names = list(dict.fromkeys(["full", *sorted({m for row in cells for m in row})]))
    names = [n for n in names if any(n in row for row in cells)]
    colours, count = mixer_colours(names), len(plan.layers)
    with canvas(8, 1.9 if not mixed else min(7.0, 1.9 + 0.2 * heads)) as (figure, png):
        from matplotlib.patches import Patch, Rectangle

        axes = figure.subplots()
        for h, row in enumerate(cells):
            for i, mixer in enumerate(row):
                box = Rectangle((i - 0.5, h - 0.5), 1, 1, facecolor=colours[mixer])
                box.set(edgecolor="white", linewidth=1.2 if count <= 64 else 0.4)
                axes.add_patch(box)
                if not mixed and count <= 48:
                    shade = _ink_on(colours[mixer])
                    letter = plan.pattern[i]
                    axes.text(i, h, letter, ha="center", va="center", color=shade, fontsize=9)
        axes.set(xlim=(-0.5, count - 0.5), ylim=(heads - 0.5, -0.5), xlabel="layer")
        axes.set(title="Which attention each layer gets" if not mixed else "Attention by head")
        axes.spines[:].set_visible(False)
        whole_ticks(axes.xaxis, count)
        if mixed:
            axes.set_ylabel("query head")
            whole_ticks(axes.yaxis, heads)
        else:
            axes.set_yticks([])
        unit = "heads" if mixed else "layers"
        handles = []
        for name in names:
            number = sum(row.count(name) for row in cells)
            handles.append(Patch(color=colours[name], label=f"{short(name)}: {number} {unit}"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
        return png()


def recall_picture(evaluation: Evaluation) -> bytes:
    """Draw recall by length and depth: one panel per model, one row of panels per task."""
    models = evaluation.models
    tasks = list(dict.fromkeys(r.task for r in models[0].recall))
    depths, _ = _axes_of(evaluation, tasks[0])
    height = 0.9 + len(tasks) * (0.8 + 0.3 * max(3, len(depths)))
    unable = _unable(evaluation)
    with canvas(8, min(10.0, height)) as (figure, png):
        panels = figure.subplots(len(tasks), len(models), squeeze=False, sharey="row")
        for task, line in zip(tasks, panels):
            depths, lengths = _axes_of(evaluation, task)
            for model, axes in zip(models, line):
                image = _recall_panel(axes, model, task, depths, lengths, unable)
            line[0].set_ylabel(f"{short(task)}\ndepth of the answer")
        for model, axes in zip(models, panels[0]):
            axes.set_title(short(model.name, 64 // len(models)))
        for axes in panels[-1]:
            axes.set_xlabel("length, tokens")
        figure.colorbar(image, ax=panels, label="share right", fraction=0.03, pad=0.02)
        if unable:
            figure.text(
                0.01, 0.0, "hatched: the source itself cannot do this", fontsize=9, va="bottom"
            )
            figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
        return png()


def _recall_panel(
    axes: Any,
    model: ModelResult,
    task: str,
    depths: Sequence[float],
    lengths: Sequence[int],
    unable: set[tuple[str, int]],
) -> Any:
    from matplotlib.patches import Rectangle

    cells = {(r.depth, r.length): r for r in model.recall if r.task == task}
    grid = [[_share(cells.get((d, n))) for n in lengths] for d in depths]
    axes.set_facecolor("#F4F4F4")
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if (task, lengths[x]) in unable:
                box = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///")
                box.set(edgecolor="white", linewidth=0)
                axes.add_patch(box)
            if not math.isnan(value) and len(lengths) <= 8:
                shade = "white" if value < 0.55 else INK
                back = {"facecolor": image.cmap(value), "edgecolor": "none", "pad": 1.0}
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", color=shade,
                    fontsize=9, bbox=back,
                )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def depth_picture(evaluation: Evaluation) -> bytes:
    """Draw recall by depth with 95 % intervals: a line per model, a panel per task and length."""
    cells = [(r.task, r.length) for r in evaluation.models[0].recall if r.depth is None][:6]
    unable = _unable(evaluation)
    columns = min(2, len(cells))
    lines = math.ceil(len(cells) / columns)
    with canvas(8, 0.6 + 2.7 * lines) as (figure, png):
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in panels.flat[len(cells) :]:
            axes.set_visible(False)
        for (task, length), axes in zip(cells, panels.flat):
            for n, model in enumerate(evaluation.models):
                rows = [r for r in model.recall if (r.task, r.length) == (task, length)]
                _depth_line(axes, n, model, [r for r in rows if r.depth is not None])
            note = ", source cannot" if (task, length) in unable else ""
            axes.set(title=f"{short(task, 14)}, {tokens(length)} tokens{note}", ylim=(-0.03, 1.03))
            axes.set(xlabel="depth of the answer in the text, %", xlim=(-6, 106))
            axes.grid(axis="y")
        for axes in panels[:, 0]:
            axes.set_ylabel("share right, 95 % interval")
        legend_below(figure, panels[0, 0])
        return png()


def _depth_line(axes: Any, n: int, model: ModelResult, rows: Sequence[Row]) -> None:
    # Side by side, or the intervals of models that score alike would hide each other.
    shift = 1.2 * (n - 1.5)
    x = [100 * (r.depth or 0.0) + shift for r in rows]
    axes.errorbar(
        x,
        [r.recall for r in rows],
        yerr=[[r.recall - r.low for r in rows], [r.high - r.recall for r in rows]],
        color=MODEL_COLOURS[n % len(MODEL_COLOURS)],
        marker=MARKERS[n % len(MARKERS)],
        markersize=4,
        linewidth=1.6,
        elinewidth=0.8,
        capsize=2,
        label=short(model.name),
    )


def cache_picture(plans: Mapping[str, Plan], dtype: str = "bfloat16") -> bytes:
    """Draw the cache bytes of one sequence against its length, one line per plan, log-log."""
    lengths = [2**n for n in range(8, 18)]
    with canvas(8, 3.6) as (figure, png):
        axes = figure.subplots()
        for n, (name, plan) in enumerate(plans.items()):
            held = [plan.cache_bytes(x, dtype) for x in lengths]
            style = {
                "color": MODEL_COLOURS[n % len(MODEL_COLOURS)],
                "marker": MARKERS[n % len(MARKERS)],
                "linestyle": ("-", "-", "--", ":")[n % 4],
            }
            axes.plot(lengths, held, label=short(name), markersize=4, linewidth=1.8, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [tokens(x) for x in lengths])
        axes.yaxis.set_major_formatter(lambda value, _: size(value))
        axes.minorticks_off()
        axes.set(title=f"Cache of one sequence, {short(dtype)}", xlabel="length, tokens")
        axes.set_ylabel("bytes")
        axes.grid()
        legend_below(figure, axes)
        return png()


def tokens(count: int) -> str:
    """Return a length as people say it: 512, 32K, 1M, and 1000 as it is."""
    for unit, step in (("M", 1 << 20), ("K", 1 << 10)):
        if count and count % step == 0:
            return f"{count // step}{unit}"
    return str(count)


def thousands(count: float) -> str:
    """Return a number of tokens read off an axis, in powers of ten: 500, 1.5K, 30M."""
    for unit, step in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= step:
            return f"{count / step:.3g}{unit}"
    return f"{count:.3g}"


def size(count: float) -> str:
    """Return bytes in binary units with three digits: 512 B, 1.5 KiB, 28 MiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    n = 0
    while count >= 1000 and n < len(units) - 1:
        count, n = count / 1024, n + 1
    return f"{count:.3g} {units[n]}"


def mixer_colours(names: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    """Return a colour per mixer: fixed for the common ones, else by name, so it never moves."""
    found: dict[str, str] = {}
    for name in names:
        colour = MIXER_COLOURS.get(name, "#0072B2" if name == "all layers" else "")
        start = zlib.crc32(name.encode())
        free = [PALETTE[(start + k) % len(PALETTE)] for k in range(len(PALETTE))]
        unused = [c for c in free if c not in found.values()]
        found[name] = colour or (unused or free)[0]
    return found


def layer_mixer(plan: Plan, i: int) -> str:
    """Return what a layer gets, in the words of `mixer_colours`."""
    layer = plan.layers[i]
    if layer.is_full:
        return "full" if plan.geometry.windows[i] is None else OWN_WINDOW
    return layer.mixer or "a mixture of heads"


def head_mixer(plan: Plan, i: int, layer: LayerPlan, head: int) -> str:
    """Return what a query head gets, in the words of `mixer_colours`."""
    mixer = next(g.mixer for g in layer.groups if head in g.heads)
    return OWN_WINDOW if mixer == "full" and plan.geometry.windows[i] is not None else mixer


def _axes_of(evaluation: Evaluation, task: str) -> tuple[list[float], list[int]]:
    rows = [r for m in evaluation.models for r in m.recall if r.task == task]
    depths = sorted({r.depth for r in rows if r.depth is not None})
    return depths, sorted({r.length for r in rows})


def _unable(evaluation: Evaluation) -> set[tuple[str, int]]:
    return {(d.task, d.length) for d in evaluation.differences if not d.source_can}


def _share(row: Row | None) -> float:
    return row.recall if row else math.nan


def short(text: str, limit: int = 24) -> str:
    """Return a name as a picture can show it: no control characters, no foreign letters."""
    # The font has no glyph for every letter of the world; an escape is better than a box.
    text = escape(text).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= limit else text[: max(4, limit - 3)] + "..."


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def whole_ticks(axis: Any, count: int) -> None:
    """Mark whole numbers below `count`, at most 24 of them."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if count / s <= 24)
    axis.set_major_locator(_ticker().FixedLocator(range(0, count, step)))


def print_cells(
    axes: Any,
    image: Any,
    cells: Sequence[Sequence[float]],
    show: Callable[[float], str],
    size: float,
) -> None:
    """Write every number into its cell, readable on its colour."""
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if not math.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                shade = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
                where = {"ha": "center", "va": "center"}
                axes.text(x, y, show(value), color=shade, fontsize=size, **where)


def legend_below(figure: Any, axes: Any) -> None:
    """Put the legend of `axes` under the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Any, Callable[[], bytes]]]:
    """A figure that no user setting and no global state reaches, and what turns it into PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)

        def png() -> bytes:
            import numpy as np
            from PIL import Image  # comes with matplotlib

            figure.canvas.draw()
            image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
            out = io.BytesIO()
            # 128 colours are enough for flat drawings, and make a file a quarter of the size. Where
            # colours are numbers, rare ones count as much as common ones: in a matrix of 14 x 14
            # none is off by more than 11 of 255, against 40 when picked by how common they are.
            how: dict[str, Any] = {"colors": 128}
            if any(axes.images for axes in figure.axes):
                how = {"colors": 256, "method": Image.Quantize.MAXCOVERAGE, "kmeans": 3}
            image = image.quantize(**how, dither=Image.Dither.NONE)
            image.save(out, format="PNG", optimize=True)
            return out.getvalue()

        yield figure, png
