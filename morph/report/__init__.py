"""What a run did, cost and kept, for people: pictures, a terminal table, one HTML and one Markdown.

Everything is drawn from the files of the run (scores, plan, evaluation, training log), without
torch. The HTML page holds its pictures and loads nothing. The same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from morph import strict
from morph.errors import escape
from morph.evaluation import Difference, Evaluation, ModelResult, Row
from morph.plan import Plan, Scores, full_plan
from morph.report._blocks_read import blocks_picture, read_blocks
from morph.report._compare import comparison_report, comparison_table, regret_table
from morph.report._diff import difference_picture
from morph.report._pages import (
    Block,
    Bullets,
    Code,
    Grid,
    Heading,
    Paragraph,
    Picture,
    to_markdown,
    write_page,
)
from morph.report._pictures import (
    cache_picture,
    depth_picture,
    plan_picture,
    recall_picture,
    size,
    tokens,
)
from morph.report._records import stage_grid, training_log
from morph.report._repair import (
    repair_conclusion,
    repair_numbers,
    repair_picture,
    repair_report,
    repair_table,
)
from morph.report._scores import pairs_picture, scores_picture
from morph.report._selection import agreement_picture, budget_picture
from morph.report._training import training_picture

__all__ = [
    "agreement_picture",
    "blocks_picture",
    "budget_picture",
    "cache_picture",
    "comparison_report",
    "comparison_table",
    "depth_picture",
    "difference_picture",
    "markdown",
    "numbers",
    "pairs_picture",
    "plan_picture",
    "recall_picture",
    "regret_table",
    "repair_conclusion",
    "repair_numbers",
    "repair_picture",
    "repair_report",
    "repair_table",
    "report",
    "scores_picture",
    "table",
    "training_log",
    "training_picture",
]

Record = Mapping[str, Any]


def numbers(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Return the table of an evaluation as (head, rows) of text, one column per model.

    Rows whose name starts with two spaces belong to the row above.
    """
    models = evaluation.models
    rows: list[list[str]] = []
    if any(m.pattern for m in models):
        rows.append(["layers as in source", *[_kept(m) for m in models]])
    rows += _recall_rows(evaluation)
    if any(m.perplexity for m in models):
        ppl = [m.perplexity.ppl if m.perplexity else None for m in models]
        rows.append(["perplexity", *[_beside(x, ppl[0], ".4g") for x in ppl]])
        if len(models) > 1:
            rows.append(_difference_row(evaluation, "perplexity", 0, "  nats/token, 95 %", "+.3f"))
    for n, entry in enumerate(models[0].cache):
        cells = [m.cache[n] if n < len(m.cache) else None for m in models]
        rows.append([f"cache at {tokens(entry.tokens)}", *[_bytes(c, cells[0]) for c in cells]])
    rows += _read_rows(models)
    if models[0].held:
        label = f"cache held at {tokens(models[0].held.tokens)}"
        rows.append([label, *[_bytes(m.held, models[0].held) for m in models]])
    for kind in ("prefill", "decode"):
        if all(m.speed for m in models):
            rows.append([f"{kind}, tokens/s", *[_speed(m, kind, n) for n, m in enumerate(models)]])
    return ["", *[escape(m.name, 40) for m in models]], rows


def table(evaluation: Evaluation) -> Table:
    """Return the numbers as a rich table; names are shown as they are, never read as markup."""
    head, rows = numbers(evaluation)
    out = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    out.add_column("", no_wrap=True)
    for name in head[1:]:
        out.add_column(Text(name), justify="right")
    for row in rows:
        style = "dim" if row[0].startswith("  ") else ""
        out.add_row(*[Text(cell, style=style) for cell in row])
    if evaluation.notes:
        out.caption = Text("\n".join(escape(note, 400) for note in evaluation.notes))
        out.caption_justify = "left"
    return out


def markdown(evaluation: Evaluation) -> str:
    """Return the numbers as a Markdown table, with the notes below."""
    page = to_markdown("Numbers", _evaluation_blocks(evaluation))
    return page.split("\n\n", 1)[1]


def report(
    out_dir: str | Path,
    *,
    recipe: Any = None,
    scores: Scores | None = None,
    plan: Plan | None = None,
    evaluation: Evaluation | None = None,
    provenance: Record | None = None,
    commands: Mapping[str, str] | None = None,
    training: Sequence[Record] = (),
) -> list[Path]:
    """Write report.html, report.md and its pictures into `out_dir`; return their paths.

    Whatever is not given is left out. `commands` maps a title ("Load it", "Serve it", "Next") to
    code, shown in that order. `training` holds the records of the log, as `training_log` returns
    them; what is missing or odd in them is left out. Numbers of `provenance` under a name that ends
    in " seconds" are listed as costs. Raises StorageError where nothing can be written.
    """
    facts = strict.plain(recipe) if recipe is not None else {}
    blocks = _done_blocks(facts, scores, plan)
    if evaluation:
        blocks += [Heading(text="What it kept"), *_evaluation_blocks(evaluation)]
        blocks += read_blocks(evaluation)
    known = strict.plain(provenance or {})
    blocks += _training_blocks(training)
    blocks += _cost_blocks(scores, known)
    pictures = _pictures(scores, plan, evaluation, training, _dtype(facts))
    if pictures:
        blocks += [Heading(text="Pictures"), *pictures]
    for n, (title, text) in enumerate((commands or {}).items()):
        blocks += [Heading(text="How to use it")] * (n == 0) + [Code(title=title, text=text)]
    rows = _flat({k: v for k, v in known.items() if not _is_cost(k, v)}) if known else []
    if rows:
        blocks += [Heading(text="Provenance"), Grid(head=("", ""), rows=rows)]
    name = facts.get("model") or (plan.model_type if plan else "")
    title = f"morph: {name} as a hybrid" if name else "morph: what was measured"
    return write_page(out_dir, "report", title, blocks)


# --- The table ----------------------------------------------------------------------------------


def _kept(model: ModelResult) -> str:
    if not model.pattern:
        return "-"
    return f"{sum(c in 'Fo' for c in model.pattern)} of {len(model.pattern)}"


def _recall_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for cell in [r for r in evaluation.models[0].recall if r.depth is None]:
        found = [_whole(m, cell) for m in evaluation.models]
        label = f"{escape(cell.task, 20)} {tokens(cell.length)}, n={cell.count}"
        difference = _difference_row(
            evaluation, cell.task, cell.length, "  difference, 95 %", "+.2f"
        )
        shares = [f"{r.recall:.2f}" if r else "-" for r in found]
        able = all(d.source_can for d in _of(evaluation, cell.task, cell.length))
        if able:
            rows += [[label, *shares], difference] if len(found) > 1 else [[label, *shares]]
        else:
            rows.append([label, shares[0] + ", cannot", *[f"({s})" for s in shares[1:]]])
    return rows


def _whole(model: ModelResult, cell: Row) -> Row | None:
    key = (cell.task, cell.length, None)
    return next((r for r in model.recall if (r.task, r.length, r.depth) == key), None)


def _of(evaluation: Evaluation, task: str, length: int) -> list[Difference]:
    return [d for d in evaluation.differences if (d.task, d.length) == (task, length)]


def _difference_row(
    evaluation: Evaluation, task: str, length: int, label: str, style: str
) -> list[str]:
    found = {d.model: d for d in _of(evaluation, task, length)}
    cells = []
    for model in evaluation.models:
        d = found.get(model.name)
        cells.append(f"{d.low:{style}}…{d.high:{style}}" if d else "")
    return [label, *cells]


def _beside(value: float | None, source: float | None, style: str) -> str:
    if value is None:
        return "-"
    if not source or value is source:
        return f"{value:{style}}"
    return f"{value:{style}} ×{value / source:.2f}"


def _read_rows(models: Sequence[ModelResult]) -> list[list[str]]:
    """Return what a decoded token reads, where a model keeps tokens that it does not read."""
    rows = []
    for n, entry in enumerate(models[0].cache):
        cells = [m.cache[n] if n < len(m.cache) else None for m in models]
        if all(c is None or c.read is None or c.read >= 0.95 * c.bytes for c in cells):
            continue
        first = entry.read or entry.bytes
        read = [c and c.read and replace(c, bytes=c.read, ratio=c.read / first) for c in cells]
        told = [_bytes(c, read[0]) for c in read]
        rows.append([f"read a token at {tokens(entry.tokens)}", *told])
    return rows


def _bytes(entry: Any, source: Any) -> str:
    if not entry:
        return "-"
    held = size(entry.bytes).replace(" ", "")  # or four models would not fit 80 columns
    return held if entry is source else f"{held} ×{entry.ratio:.{1 if entry.ratio < 0.01 else 2}g}"


def _speed(model: ModelResult, kind: str, n: int) -> str:
    rate = getattr(model.speed, f"{kind}_tokens_per_second")
    ratio = getattr(model.speed, f"{kind}_ratio")
    text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    return text if n == 0 else f"{text} ×{ratio:.2f}"


# --- The page -----------------------------------------------------------------------------------


def _dtype(facts: Record) -> str:
    return str(facts.get("dtype") or "bfloat16")


def _done_blocks(facts: Record, scores: Scores | None, plan: Plan | None) -> list[Block]:
    blocks: list[Block] = []
    rows: list[tuple[str, str]] = []
    if plan:
        count = plan.geometry.num_hidden_layers
        whole = full_plan(plan.model_type, plan.geometry)
        share = _cache_share(plan, whole)
        text = (
            f"{len(plan.full_layers)} of {count} layers keep the attention of the source"
            + (f"; {len(plan.replaced_layers)} use {' and '.join(plan.mixers)}" * bool(plan.mixers))
            + "."
        )
        blocks.append(Paragraph(text=text + share))
        rows += [("pattern", plan.pattern), ("layers as in source", _listed(plan.full_layers))]
    if facts.get("model"):
        rows.insert(0, ("source", str(facts["model"])))
    if scores:
        rows.append(("chosen by", f"{scores.selector}, per {scores.granularity.replace('_', ' ')}"))
    if facts.get("select", {}).get("budget"):
        rows.append(("budget", str(facts["select"]["budget"])))
    mixer = facts.get("mixer")
    if mixer:
        options = [f"{k}={v}" for k, v in (mixer.get("options") or {}).items()]
        rows.append(("mixer", " ".join([str(mixer.get("name")), *options])))
    for n, stage in enumerate(facts.get("distill") or ()):
        what = f"{stage['loss']}: {stage['tokens']:,} tokens, trains {stage['train']}"
        rows.append((f"stage {n + 1}", what))
    if rows:
        blocks = [Heading(text="What was done"), *blocks, Grid(head=("", ""), rows=rows)]
    return blocks


def _cache_share(plan: Plan, whole: Plan) -> str:
    if any(g.mixer != "full" and g.cache is None for x in plan.layers for g in x.groups):
        return ""
    share = plan.cache_bytes(32 * 1024) / whole.cache_bytes(32 * 1024)
    return f" At 32K tokens the cache is {share:.0%} of the source's."


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _evaluation_blocks(evaluation: Evaluation) -> list[Block]:
    head, rows = numbers(evaluation)
    blocks: list[Block] = [Grid(head=head, rows=rows)]
    if evaluation.notes:
        blocks.append(Bullets(items=evaluation.notes))
    text = (
        "Recall is the share of questions with every answer token right. Differences and ratios "
        "compare with the first column, on the same questions and text; an interval around 0 "
        "means that no difference was found. Cache bytes are those of the dtype computed in."
    )
    return [*blocks, Paragraph(text=text)]


def _training_blocks(training: Sequence[Record]) -> list[Block]:
    grid = stage_grid(training)
    if grid is None:
        return []
    text = (
        "Losses are means of the first and of the last tenth of the steps. They are comparable "
        "within a stage only: align is a relative error, logits a divergence from the teacher."
    )
    return [Heading(text="Training"), grid, Paragraph(text=text)]


def _cost_blocks(scores: Scores | None, provenance: Record) -> list[Block]:
    rows = []
    if scores:
        seconds, count = (scores.provenance.get(k) for k in ("seconds", "tokens"))
        rows.append([f"scoring by {scores.selector}", _count(count), _count(seconds)])
    for key, value in provenance.items():
        if _is_cost(key, value):
            rows.append([str(key).removesuffix(" seconds"), "", _count(value)])
    if not rows:
        return []
    head = ("stage", "tokens", "seconds")
    used = [n for n in range(len(head)) if n == 0 or any(row[n] for row in rows)]
    grid = Grid(head=[head[n] for n in used], rows=[[row[n] for n in used] for row in rows])
    return [Heading(text="What it cost"), grid]


def _is_cost(key: str, value: Any) -> bool:
    return str(key).endswith(" seconds") and _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _count(value: Any) -> str:
    return (
        f"{value:,.{0 if value >= 10 or value == int(value) else 1}f}" if _is_number(value) else ""
    )


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        rows = []
        for key, item in value.items():
            rows += _flat(item, f"{name}.{key}" if name else str(key))
        return rows
    if isinstance(value, list) and all(isinstance(x, (str, int, float)) for x in value):
        value = ", ".join(map(str, value)) or "none"
    return [(name, str(value))]


def _pictures(
    scores: Scores | None,
    plan: Plan | None,
    evaluation: Evaluation | None,
    training: Sequence[Record],
    dtype: str,
) -> list[Picture]:
    found: list[tuple[str, str, bytes]] = []
    if plan:
        alt = f"The attention each layer gets: {plan.pattern}"
        found.append(("plan.png", alt, plan_picture(plan)))
    if scores:
        alt = "How much each layer needs full attention; kept ones in blue"
        fits = plan if plan and len(plan.layers) == len(scores.values) else None
        found.append(("scores.png", alt, scores_picture(scores, fits)))
    if scores and scores.pairs is not None:
        alt = "What replacing two units costs beyond each alone"
        found.append(("pairs.png", alt, pairs_picture(scores)))
    if evaluation and any(r.depth is not None for r in evaluation.models[0].recall):
        alt = "Recall by length and depth of the answer, one panel per model"
        found.append(("recall.png", alt, recall_picture(evaluation)))
        alt = "Recall by depth of the answer, with 95 % intervals"
        found.append(("depth.png", alt, depth_picture(evaluation)))
    read = blocks_picture(evaluation) if evaluation else None
    if read is not None:
        alt = "Blocks that a query reads against its position, one panel per layer"
        found.append(("blocks.png", alt, read))
    if plan and _cache_share(plan, plan):
        plans = {"source": full_plan(plan.model_type, plan.geometry), "hybrid": plan}
        alt = "Cache bytes of one sequence against its length"
        found.append(("cache.png", alt, cache_picture(plans, dtype)))
    drawn = training_picture(training)
    if drawn is not None:
        alt = "Loss, align errors, recall and gates of the training, as far as they were logged"
        found.append(("training.png", alt, drawn))
    return [Picture(name=name, alt=alt, png=png) for name, alt, png in found]
