"""Recall and perplexity against the share of the causal pairs that sparse mixers do not read.

    python benchmarks/bench_sparse_quality.py [--mixers dash ...] [--work DIR] [--picture PATH]

On the embedded checkpoint: mixers in all 8 layers, or with the quarter of the layers full that
Fisher scores keep. Every setting is asked for a sparsity at 1,024 tokens; what is reported is
measured on held-out text, in the converted layers, together with recall of `multikey` at 1,024 (40
questions) and 2,048 tokens (16) and perplexity in contexts of 1,024 tokens (16K tokens). First as
converted and calibrated, without training; then after 64K tokens of `logits` (half of the batches
questions; rows of 1,024 tokens). Before that the indexers of shared routing are aligned on 32K
tokens; which layers own one is chosen once, at 87.5 %. Blocks have 16 tokens, as 64 would leave 16
blocks in a context of 1,024. Rows already in the work folder are not run again, and a run that was
stopped goes on. The teacher's hidden states are shared by all runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _bench import one_thread, report
from bench_curves import Bench

from morph import distill, evaluate, modeling, registry, surgery
from morph import plan as planning
from morph.pipeline import _data, _start
from morph.recipes.schema import Evaluate, Select, Stage, Training
from morph.report._pictures import MARKERS, MODEL_COLOURS, canvas, legend_below
from morph.surgery._owners import choose_owners, with_owners

BLOCK, LENGTH = 16, 1024
SPARSITIES = (0.5, 0.75, 0.875, 0.9375)
ALIGN = Stage(loss="align", tokens=32768, seq_len=LENGTH, batch_size=2, lr=1e-3, save_every=16)
LOGITS = Stage(
    loss="logits", tokens=65536, seq_len=LENGTH, batch_size=2, lr=3e-4, needles=0.5, save_every=16
)
LAYOUTS = {"all layers": "", "a quarter full": "1/4"}


def read_share(tokens: list[int]) -> float:
    """Return which share of the causal pairs is read, where query t reads `tokens[t]` keys."""
    return sum(tokens) / (len(tokens) * (len(tokens) + 1) / 2)


def window_for(sparsity: float) -> int:
    """Return the window in tokens that comes nearest."""

    def off(window: int) -> float:
        return abs(1 - sparsity - read_share([min(t + 1, window) for t in range(LENGTH)]))

    return min(range(1, LENGTH + 1), key=off)


def blocks_for(sparsity: float) -> int:
    """Return how many blocks a query may read at most, its own included, to come nearest."""

    def off(count: int) -> float:
        read = [min(t // BLOCK, count - 1) * BLOCK + t % BLOCK + 1 for t in range(LENGTH)]
        return abs(1 - sparsity - read_share(read))

    return min(range(2, LENGTH // BLOCK + 1), key=off)


def bigbird(sparsity: float) -> dict[str, Any]:
    """The first block, and windows and random blocks alike, as many as the paper has."""
    rest = blocks_for(sparsity) - 1
    return {"block": BLOCK, "initial": 1, "local": rest - rest // 2, "random": rest // 2}


def block_topk(sparsity: float) -> dict[str, Any]:
    """The first block, the own one, and for the rest the best by means of keys."""
    return {"block": BLOCK, "k": blocks_for(sparsity), "initial": 1, "local": 1}


def dash(sparsity: float) -> dict[str, Any]:
    """Its option counts the blocks before the own one, which is always read."""
    own = read_share([t % BLOCK + 1 for t in range(LENGTH)])
    return {"block": BLOCK, "sparsity": round(sparsity / (1 - own), 4)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A mixer, its options by sparsity, and which share of its layers owns an indexer."""

    mixer: str
    options: Callable[[float], dict[str, Any]]
    owners: float = 1.0
    stages: tuple[Stage, ...] = (LOGITS,)


def shared(owners: float) -> Setting:
    return Setting(
        mixer="shared_routing",
        options=lambda sparsity: {"block": BLOCK, "k": BLOCK * blocks_for(sparsity)},
        owners=owners,
        stages=(ALIGN, LOGITS),
    )


SETTINGS: dict[str, Setting] = {
    "sliding": Setting(mixer="sliding", options=lambda sparsity: {"window": window_for(sparsity)}),
    "bigbird": Setting(mixer="bigbird", options=bigbird),
    "dash": Setting(mixer="dash", options=dash),
    "block_topk": Setting(mixer="block_topk", options=block_topk),
    "shared_routing 1/1": shared(1.0),
    "shared_routing 1/2": shared(0.5),
    "shared_routing 1/4": shared(0.25),
}


class Quality:
    """The source, its questions, and one row for every setting."""

    def __init__(self, work: Path) -> None:
        self.work, self.bench = work, Bench("checkpoint", work, LENGTH, None)
        tokenizer, held_out = self.bench.tokenizer, self.bench.corpus.held_out
        self.bos = tokenizer.bos_token_id
        self.questions = {
            length: evaluate.build_examples(
                Evaluate(tasks=("multikey",), lengths=(length,), examples=count, depths=8),
                tokenizer,
                held_out,
                seed=7,
            )
            for length, count in ((LENGTH, 40), (2 * LENGTH, 16))
        }

    def kept(self, layout: str) -> list[int]:
        """Return the layers that stay full; Fisher scores are taken once for all runs."""
        if not LAYOUTS[layout]:
            return []
        file = self.work / "kept.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.bench.kept(LAYOUTS[layout])), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def measure(self, model: Any) -> dict[str, float]:
        """Return recall at both lengths, perplexity, and the sparsity of the converted layers."""
        found: dict[str, float] = {}
        for length, questions in self.questions.items():
            hits = evaluate.recall(model, questions)
            found[f"recall_{length}"] = sum(h.correct for h in hits) / len(hits)
        held_out = self.bench.corpus.held_out
        loss = evaluate.perplexity(
            model, held_out, seq_len=LENGTH, max_tokens=16 * LENGTH, bos=self.bos
        )
        found["perplexity"] = loss.ppl
        rows = held_out[: 4 * LENGTH].view(4, LENGTH)
        layers = [b.sparsity for b in evaluate.blocks_read(model, rows)]
        for layer in surgery.hybrid_layers(model).values():
            for mixer in layer.mixers:
                if not hasattr(mixer, "blocks_read"):
                    window = mixer.options.window
                    read = [min(t + 1, window) for t in range(LENGTH)]
                    layers.append(1 - read_share(read))
        found["sparsity"] = sum(layers) / max(1, len(layers))
        found["least_sparsity"] = min(layers, default=0.0)
        found["most_sparsity"] = max(layers, default=0.0)
        return found

    def source(self) -> dict[str, float]:
        """Return the same of the source, from the work folder where it is there."""
        return self._kept_row("source", lambda: self.measure(self.bench.teacher))

    def row(self, mixer: str, wanted: float, layout: str, seed: int) -> dict[str, Any]:
        """Return one setting, before and after training."""
        name = f"{mixer}-{layout}-{wanted}-{seed}".replace(" ", "_").replace("/", "_")
        return self._kept_row(name, lambda: self._row(name, mixer, wanted, layout, seed))

    def _kept_row(self, name: str, run: Any) -> dict[str, Any]:
        file = self.work / f"{name}.json"
        if not file.is_file():
            start = time.process_time()
            found = {**run(), "cpu_seconds": time.process_time() - start}
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
            print(f"{name}: {said(found)}, {found['cpu_seconds']:.0f} CPU s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def _row(self, name: str, label: str, wanted: float, layout: str, seed: int) -> dict[str, Any]:
        bench, kept, setting = self.bench, self.kept(layout), SETTINGS[label]
        plan = self._plan(setting, wanted, kept)
        student = self._hybrid(plan)
        start = self.measure(student)
        runs = self.work / "runs" / name
        log = distill.distill(
            student,
            bench.teacher,
            list(setting.stages),
            distill.text_batches(bench.corpus.train, seed=seed, bos=self.bos),
            out=runs,
            seed=seed,
            needles=distill.needle_batches(
                "multikey", bench.tokenizer, bench.corpus.train, seed=seed
            ),
            training=Training(teacher_cache=str(self.work / "teacher")),
        )
        found = {
            "mixer": label,
            "options": setting.options(wanted),
            "owners": owners_of(plan),
            "kept": kept,
            "layout": layout,
            "wanted": wanted,
            "seed": seed,
            "start": start,
            "trained": self.measure(student),
            "train_seconds": log.seconds,
        }
        shutil.rmtree(runs, ignore_errors=True)
        return found

    def _plan(self, setting: Setting, wanted: float, kept: list[int]) -> planning.Plan:
        """Return the plan of a setting, owners of indexers in it."""
        bench = self.bench
        plan = surgery.resolve_costs(
            planning.uniform_plan(
                bench.source.family.model_type,
                bench.source.geometry,
                kept,
                setting.mixer,
                setting.options(wanted),
                None,
            )
        )
        if setting.owners == 1.0:
            return plan
        count = max(1, round(setting.owners * len(owners_of(plan))))
        found = self._owners(setting, kept, count)
        return with_owners(plan, {int(i): owner for i, owner in found.items()})

    def _owners(self, setting: Setting, kept: list[int], count: int) -> dict[str, int | None]:
        """Return whom each layer follows: chosen at one sparsity by KL on questions of training."""
        file = self.work / f"owners-{count}-{'-'.join(map(str, kept)) or 'all'}.json"
        if not file.is_file():
            plan = self._plan(replace(setting, owners=1.0), 0.875, kept)
            section = Select(task="multikey", seq_len=LENGTH, examples=8)
            batches = _data.calibration(section, self.bench.corpus, self.bench.tokenizer, 0)
            chosen = choose_owners(
                self._hybrid(plan), plan, batches, count, teacher=self.bench.teacher
            )
            found = {i: g.options["owner"] for i, g in groups_of(chosen.plan) if i not in kept}
            file.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def _hybrid(self, plan: planning.Plan) -> Any:
        """Return the hybrid, calibrated on rows as long as what is measured."""
        student = modeling.hybrid(self.bench.teacher, plan)
        if any(_start.adapts(layer) for layer in surgery.hybrid_layers(student).values()):
            ids = self.bench.corpus.train[: 4 * LENGTH].view(4, LENGTH)
            surgery.calibrate(student, self.bench.teacher, ids)
        return student


def groups_of(plan: planning.Plan) -> list[tuple[int, planning.HeadGroup]]:
    """Return the head groups with their layers."""
    return [(i, group) for i, layer in enumerate(plan.layers) for group in layer.groups]


def owners_of(plan: planning.Plan) -> list[int]:
    """Return the layers with an indexer of their own."""
    return [i for i, group in groups_of(plan) if group.options.get("owner", 0) is None]


def said(found: dict[str, Any]) -> str:
    """Return a row in words."""
    parts = []
    for when in ("start", "trained"):
        at = found.get(when) or (found if when == "start" and "perplexity" in found else None)
        if at:
            parts.append(
                f"{when}: sparsity {at['sparsity']:.4f}, recall {at[f'recall_{LENGTH}']:.3f} "
                f"({at[f'recall_{2 * LENGTH}']:.3f}), perplexity {at['perplexity']:.2f}"
            )
    return "; ".join(parts)


def lines_of(rows: list[dict[str, Any]], source: dict[str, float]) -> list[str]:
    """Return a table for people."""
    out = [f"source: {said(source).removeprefix('start: ')}"]
    for layout in LAYOUTS:
        mine = [row for row in rows if row["layout"] == layout]
        if mine:
            out.append(f"{layout} (full: {mine[0]['kept'] or 'none'})")
        for row in mine:
            owners = f", indexers in {row['owners']}" if row.get("owners") else ""
            out.append(f"  {row['mixer']} {json.dumps(row['options'])}{owners}")
            out += [f"    {part}" for part in said(row).split("; ")]
    return out


def picture(rows: list[dict[str, Any]], source: dict[str, float]) -> bytes:
    """Draw recall and perplexity against sparsity: a column per layout, dotted without training."""
    layouts = [x for x in LAYOUTS if any(row["layout"] == x for row in rows)]
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    what = {f"recall_{LENGTH}": f"recall at {LENGTH:,} tokens", "perplexity": "perplexity"}
    with canvas(8, 6) as (figure, png):
        panels = figure.subplots(len(what), len(layouts), squeeze=False, sharex=True, sharey="row")
        for line, (key, label) in zip(panels, what.items()):
            for axes, layout in zip(line, layouts):
                for n, mixer in enumerate(mixers):
                    mine = [r for r in rows if (r["mixer"], r["layout"]) == (mixer, layout)]
                    for when, style in (("start", ":"), ("trained", "-")):
                        points = sorted((100 * r[when]["sparsity"], r[when][key]) for r in mine)
                        axes.plot(
                            [x for x, _ in points],
                            [y for _, y in points],
                            color=MODEL_COLOURS[1 + n % (len(MODEL_COLOURS) - 1)],
                            marker=MARKERS[n % len(MARKERS)],
                            markersize=4,
                            linestyle=style,
                            label=mixer if when == "trained" else f"{mixer}, not trained",
                        )
                axes.axhline(source[key], color=MODEL_COLOURS[0], linewidth=0.8)
                axes.grid(axis="y")
            line[0].set_ylabel(label)
        for axes, layout in zip(panels[0], layouts):
            axes.set_title(layout)
        for axes in panels[-1]:
            axes.set_xlabel("causal pairs not read, % (converted layers)")
        legend_below(figure, panels[0, 0])
        return png()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [label for label, s in SETTINGS.items() if s.mixer in registry.names("mixers")]
    parser.add_argument("--work", type=Path, default=Path("bench-sparse-quality"))
    parser.add_argument("--mixers", nargs="+", choices=known, default=known)
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="draw recall and perplexity there (PNG)")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    args = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    bench = Quality(args.work)
    source = bench.source()
    rows = [
        bench.row(mixer, wanted, layout, seed)
        for seed in range(args.seeds)
        for layout in args.layouts
        for wanted in args.sparsities
        for mixer in args.mixers
    ]
    if args.picture:
        args.picture.write_bytes(picture(rows, source))
    report(lines_of(rows, source), {"rows": rows, "source": source}, args.json)


if __name__ == "__main__":
    main()
