"""What the queries of sparse mixers read: a table and a picture."""

from __future__ import annotations

import math
from typing import Any

from morph.errors import escape
from morph.evaluation import BlocksRead, Evaluation, ModelResult
from morph.report._pages import Block, Grid, Paragraph
from morph.report._pictures import INK, canvas, mixer_colours, short, tokens

MOST_PANELS = 12


def read_blocks(evaluation: Evaluation) -> list[Block]:
    """Return the table of what the queries of every sparse layer read; nothing without such."""
    chosen = [m for m in evaluation.models if m.blocks]
    if not chosen:
        return []
    places = sorted({_place(b) for m in chosen for b in m.blocks})
    rows = []
    for layer, heads in places:
        found = [next((b for b in m.blocks if _place(b) == (layer, heads)), None) for m in chosen]
        several = sum(i == layer for i, _ in places) > 1
        label = f"layer {layer}" + f", heads {_listed(heads)}" * several
        rows.append([label, *[_cell(b) for b in found]])
    whole = [sum(b.sparsity for b in m.blocks) / len(m.blocks) for m in chosen]
    rows.append(["mean", *[f"{x:.1%}" for x in whole]])
    text = (
        "The share of all pairs of a query and a key before it that is not read, on held-out text, "
        "in layers whose mixer chooses blocks of keys."
    )
    head = ("not read", *[escape(m.name, 40) for m in chosen])
    return [Grid(head=head, rows=rows), Paragraph(text=text)]


def blocks_picture(evaluation: Evaluation) -> bytes | None:
    """Draw the blocks that a query reads against its position, a panel per layer; None without.

    Of the first model that has sparse mixers. Every panel has the mean, a band from the 10 % to the
    90 % point over queries, rows and KV heads, and all causal blocks. Of more than twelve layers or
    head groups, twelve that are evenly spaced are shown.
    """
    model = next((m for m in evaluation.models if m.blocks), None)
    if model is None:
        return None
    shown = _spaced(model.blocks)
    columns = 3 if len(shown) in (5, 6, 9) else min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    colours = mixer_colours(list(dict.fromkeys(b.mixer for b in model.blocks)))
    with canvas(8, 1.2 + 1.75 * lines) as (figure, png):
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        for n, (entry, axes) in enumerate(zip(shown, panels.flat)):
            _panel(axes, entry, colours[entry.mixer])
            if n + columns >= len(shown):
                axes.set_xlabel("position, tokens")
                axes.xaxis.set_tick_params(labelbottom=True)
        for axes in panels[:, 0]:
            axes.set_ylabel(_unit({b.block for b in shown}))
        figure.suptitle(_title(model, len(shown)), x=0.01, ha="left", fontsize=11, weight="bold")
        labelled = (axes.get_legend_handles_labels() for axes in panels.flat)
        named = {name: handle for found in labelled for handle, name in zip(*found)}
        figure.legend(named.values(), named, loc="outside lower center", ncols=min(4, len(named)))
        return png()


def _panel(axes: Any, entry: BlocksRead, colour: str) -> None:
    x, name = entry.positions, short(entry.mixer, 20)
    axes.plot(x, entry.causal, color=INK, linewidth=0.9, linestyle="--", label="all before it")
    axes.fill_between(x, entry.low, entry.high, color=colour, alpha=0.3, linewidth=0)
    axes.plot(x, entry.mean, color=colour, linewidth=1.6, label=f"{name}: mean, 10-90 %")
    whole = x[-1] + x[0]  # the bins are of one size, and these are middles
    step = 2 ** math.ceil(math.log2(max(1, whole / 3)))
    axes.set_xticks(range(0, whole + 1, step), [tokens(n) for n in range(0, whole + 1, step)])
    axes.set(xlim=(0, max(1, whole)))
    axes.set_yscale("log", base=2)  # or a few blocks of very many are a line at the bottom
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_title(
        f"layer {entry.layer}: {entry.sparsity:.0%} not read", fontsize=9, fontweight="normal"
    )
    axes.tick_params(labelsize=8)
    axes.grid(axis="y")


def _unit(sizes: set[int]) -> str:
    if sizes == {1}:
        return "tokens read"
    return f"blocks of {min(sizes)} read" if len(sizes) == 1 else "blocks read"


def _title(model: ModelResult, shown: int) -> str:
    part = f" ({shown} of {len(model.blocks)} shown)" if shown < len(model.blocks) else ""
    return f"What a query of {short(model.name)} reads{part}"


def _spaced(blocks: tuple[BlocksRead, ...]) -> list[BlocksRead]:
    if len(blocks) <= MOST_PANELS:
        return list(blocks)
    step = (len(blocks) - 1) / (MOST_PANELS - 1)
    return [blocks[round(n * step)] for n in range(MOST_PANELS)]


def _place(entry: BlocksRead) -> tuple[int, tuple[int, ...]]:
    return entry.layer, entry.heads


def _listed(heads: tuple[int, ...]) -> str:
    return ", ".join(map(str, heads))


def _cell(entry: BlocksRead | None) -> str:
    return "-" if entry is None else f"{entry.sparsity:.1%} {escape(entry.mixer, 20)}"
