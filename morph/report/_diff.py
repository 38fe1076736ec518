"""The picture of a comparison of two checkpoints: how far every role moved in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from morph.report._pictures import INK, canvas, print_cells, short, whole_ticks

# from top to bottom: what `morph restore` is about comes first
ROLES = ("q", "k", "v", "o", "gate", "q_norm", "k_norm", "mixer", "mlp", "norm", "other")
KINDS = {  # colour, letter, words
    "full": ("#0072B2", "F", "full attention"),
    "sliding": ("#E69F00", "S", "sliding window"),
    "mixed": ("#CC79A7", "M", "heads of several kinds"),
    "linear": ("#999999", "L", "no softmax attention"),
    "": ("#EEEEEE", "", "not known"),
}
EQUAL, ODD = "#DCE4EC", "#D55E00"
DECADES = 4  # below the largest drift; what moved less has the colour of the least


def difference_picture(found: Mapping[str, Any]) -> bytes:
    """Draw the drift of `diff.json` by layer (across) and role (down), as PNG; colours are a log.

    The strip above says which layers are softmax attention. Equal cells are pale, and cells whose
    drift is not a number are marked with a cross.
    """
    layers = found["layers"]
    roles = _roles(layers)
    title = f"Drift from {short(_name(found['a']))} to {short(_name(found['b']))}"
    with canvas(8 if len(layers) <= 48 else 11, 2.2 + 0.3 * max(4, len(roles))) as (figure, png):
        if not roles:
            axes = figure.subplots()
            axes.set(title=title)
            axes.set_axis_off()
            axes.text(0.5, 0.5, "No tensor that was compared belongs to a layer.", ha="center")
            return png()
        share = {"height_ratios": [0.7, max(4, len(roles))]}
        strip, axes = figure.subplots(2, 1, sharex=True, gridspec_kw=share)
        _draw_kinds(strip, layers)
        strip.set(title=title)
        image = _draw_drift(axes, layers, roles)
        if image is not None:
            bar = figure.colorbar(image, ax=[strip, axes], label="||B-A|| / ||A||", pad=0.02)
            bar.set_ticks(_ticks(image.norm.vmin, image.norm.vmax), minor=False)
            bar.minorticks_off()
            bar.formatter = "{:.1g}".format
            bar.update_ticks()
        axes.set_xlabel("layer")
        _number_layers(axes, [row["layer"] for row in layers])
        _legend(figure, layers, roles)
        return png()


def _roles(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    there = {role for row in layers for role in row["roles"]}
    order = [name for role in ROLES for name in (role, f"{role} bias")]
    return [role for role in order if role in there] + sorted(there - set(order))


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _cell(layer: Mapping[str, Any], role: str) -> float | str:
    """Return the drift of a cell, or why it has none: `absent`, `equal` or `odd`."""
    told = layer["roles"].get(role)
    if told is None:
        return "absent"
    if not told["entries_changed"]:
        return "equal"
    drift = told["drift"]
    return "odd" if drift is None or drift <= 0 else float(drift)


def _draw_kinds(axes: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.patches import Rectangle

    for x, row in enumerate(layers):
        colour, letter, _ = KINDS[row["kind"]]
        box = Rectangle((x - 0.5, 0), 1, 1, facecolor=colour)
        box.set(edgecolor="white", linewidth=1.2 if len(layers) <= 48 else 0.4)
        axes.add_patch(box)
        if len(layers) <= 48:
            shade = "white" if row["kind"] == "full" else INK
            where = {"ha": "center", "va": "center", "fontsize": 9}
            axes.text(x, 0.5, letter, color=shade, **where)
    axes.set(ylim=(0, 1))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False)


def _draw_drift(axes: Any, layers: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> Any:
    """Draw the cells; return the image that the colour bar explains, or None without numbers."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    cells = [[_cell(layer, role) for layer in layers] for role in roles]
    values = [[c if isinstance(c, float) else math.nan for c in row] for row in cells]
    known = [v for row in values for v in row if not math.isnan(v)]
    image = None
    if known:
        top = max(known)
        low = min(max(min(known), top / 10**DECADES), 0.8 * top)
        norm = LogNorm(low, top, clip=True)
        image = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto")
        if len(layers) <= 12:
            print_cells(axes, image, values, "{:.2g}".format, 7)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell in ("equal", "odd"):
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=EQUAL, linewidth=0))
            if cell == "odd":
                axes.plot(x, y, marker="x", color=ODD, markersize=5 if len(layers) <= 48 else 3)
    axes.hlines([y + 0.5 for y in range(len(roles))], -0.5, len(layers) - 0.5, color="white")
    if len(layers) <= 48:
        axes.vlines([x + 0.5 for x in range(len(layers))], -0.5, len(roles) - 0.5, color="white")
    axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(roles) - 0.5, -0.5))
    axes.set_yticks(range(len(roles)), [role.replace("_", " ") for role in roles])
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    return image


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of every power of ten between two numbers; 1 alone over many powers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    every = [float(f"{d}e{n}") for n in range(first, last + 1) for d in digits]
    return [tick for tick in every if low <= tick <= high] or [low, high]


def _number_layers(axes: Any, numbers: Sequence[int]) -> None:
    if list(numbers) == list(range(len(numbers))):
        whole_ticks(axes.xaxis, len(numbers))
    else:  # some layers have no tensor in common
        step = -(-len(numbers) // 24)
        axes.set_xticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]])


def _legend(figure: Any, layers: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [row["kind"] for row in layers]
    there = {_cell(layer, role) for layer in layers for role in roles}
    handles: list[Any] = []
    for kind, (colour, letter, words) in KINDS.items():
        if count := kinds.count(kind):
            label = f"{letter}: {words}, {count}" if letter else f"{words}, {count}"
            handles.append(Patch(color=colour, label=label))
    if "equal" in there:
        handles.append(Patch(color=EQUAL, label="equal in A and B"))
    if "odd" in there:
        handles.append(Line2D([], [], color=ODD, marker="x", linestyle="", label="no number"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
