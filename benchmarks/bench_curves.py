"""Recall and perplexity against the tokens that distillation has spent, by mixer, budget and seed.

    python benchmarks/bench_curves.py curves   [--model checkpoint] [--seeds 3] [--work DIR]
    python benchmarks/bench_curves.py ablation [...]      what every stage and choice buys
    python benchmarks/bench_curves.py selectors [...]     what ranks choices of layers?

Every run starts from the calibrated hybrid, spends 32K tokens on `align` and 96K on `logits` (half
of the batches questions), and measures recall of `multikey` at 1,024 tokens (40 questions) and
perplexity on 8K tokens of held-out text every 16K tokens. Kept layers are those that Fisher scores
choose. Rows already in the work folder are not run again, and a run that was stopped goes on. The
teacher's hidden states are shared by all runs of one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _bench import one_thread, report

from morph import distill, evaluate, pipeline, selection, surgery
from morph import plan as planning
from morph.pipeline import _data, _score, _select, _start
from morph.recipes.schema import Data, Evaluate, Mixer, Select, Stage, Training

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "data" / "sherlock_holmes.txt"
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding": ("sliding", {"window": 64}),
    "decay": ("decay", {}),
    "gated_delta": ("gated_delta", {}),
    "hola": ("hola", {"cache": 32, "block": 32}),
}
ALIGN = Stage(loss="align", tokens=32768, lr=1e-3, save_every=16)
LOGITS = Stage(loss="logits", tokens=98304, lr=3e-4, needles=0.5, save_every=16)
PROBE_TOKENS = 16384


class Bench:
    """One source model, its text, and the layers that every budget keeps."""

    def __init__(self, name: str, work: Path, length: int, keep: list[int] | None) -> None:
        self.name, self.work, self.length, self.keep = name, work, length, keep
        self.source = pipeline.open_source(str(ROOT / "examples" / name))
        self.tokenizer = self.source.tokenizer()
        self.corpus = _data.corpus(Data(text=(str(TEXT),), held_out=0.1), self.tokenizer)
        self.teacher = self.source.model("float32")
        self._scores: Any = None

    def kept(self, budget: str) -> list[int]:
        """Return the layers that Fisher scores keep at a budget, or those that were given."""
        if self.keep is not None:
            return self.keep
        section = Select(
            selector="fisher",
            budget=budget,
            seq_len=min(512, self.length),
            align=0,
            verify_swaps=False,
        )
        if self._scores is None:
            mixer = Mixer(options={"window": 64})
            self._scores = _score.score(
                self.source, section, mixer, self.corpus, model=self.teacher
            )
        keep = selection.choose_units(
            self._scores, _select.budget_of(section), geometry=self.source.geometry
        )
        return sorted({unit if isinstance(unit, int) else unit[0] for unit in keep})

    def run(
        self, label: str, mixer: str, kept: list[int], stages: list[Stage], seed: int
    ) -> dict[str, Any]:
        """Return the curve of one run, from the work folder where it is there."""
        file = self.work / f"{self.name}-{label}-{seed}.json"
        if not file.is_file():
            found = self._run(label, mixer, kept, stages, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            last = found["curve"][-1]
            print(
                f"{file.stem}: recall {last['recall']:.3f}, perplexity {last['perplexity']:.2f}, "
                f"{found['cpu_seconds']:.0f} CPU s",
                flush=True,
            )
        return json.loads(file.read_text(encoding="utf-8"))

    def _run(
        self, label: str, mixer: str, kept: list[int], stages: list[Stage], seed: int
    ) -> dict[str, Any]:
        start = time.process_time()
        kind, options = MIXERS[mixer]
        plan = surgery.resolve_costs(
            planning.uniform_plan(
                self.source.family.model_type, self.source.geometry, kept, kind, options, None
            )
        )
        student = _start.hybrid_of(self.teacher, plan, self.corpus, 4096)
        probe = self._probe(student)
        curve = [{"tokens": 0, **probe()}]
        every = PROBE_TOKENS // (stages[0].batch_size * stages[0].seq_len)
        log = distill.distill(
            student,
            self.teacher,
            stages,
            distill.text_batches(self.corpus.train, seed=seed, bos=self.tokenizer.bos_token_id),
            out=self.work / "runs" / f"{self.name}-{label}-{seed}",
            seed=seed,
            needles=distill.needle_batches(
                "multikey", self.tokenizer, self.corpus.train, seed=seed
            ),
            training=Training(probe_every=every, teacher_cache=str(self.work / "teacher")),
            probe=probe,
        )
        curve += [
            {k: r[k] for k in ("tokens", "name", "recall", "perplexity")}
            for r in log.records
            if "recall" in r
        ]
        return {
            "label": label,
            "mixer": mixer,
            "kept": kept,
            "pattern": plan.pattern,
            "seed": seed,
            "curve": curve,
            "train_seconds": log.seconds,
            "cpu_seconds": time.process_time() - start,
        }

    def _probe(self, student: Any) -> Any:
        settings = Evaluate(tasks=("multikey",), lengths=(self.length,), examples=40, depths=8)
        examples = evaluate.build_examples(settings, self.tokenizer, self.corpus.held_out, seed=7)
        bos = self.tokenizer.bos_token_id

        def measured(model: Any = student) -> dict[str, float]:
            hits = evaluate.recall(model, examples)
            loss = evaluate.perplexity(
                model, self.corpus.held_out, seq_len=512, max_tokens=8192, bos=bos
            )
            return {"recall": sum(h.correct for h in hits) / len(hits), "perplexity": loss.ppl}

        return measured

    def teacher_row(self) -> dict[str, float]:
        """Return recall and perplexity of the source."""
        return self._probe(self.teacher)()


def curves(bench: Bench, budgets: list[str], mixers: list[str], seeds: int) -> list[dict[str, Any]]:
    rows = []
    for seed in range(seeds):  # the first seed of every case comes before the second of any
        for budget in budgets:
            kept = bench.kept(budget)
            for mixer in mixers:
                label = f"{mixer}-{budget.replace('/', '_')}"
                rows.append(bench.run(label, mixer, kept, [ALIGN, LOGITS], seed))
    return rows


def ablation(bench: Bench, mixers: list[str]) -> list[dict[str, Any]]:
    """The same 128K tokens spent otherwise, on the choice of a budget of 1/4."""
    whole = ALIGN.tokens + LOGITS.tokens
    cases = {
        "align only": [replace(ALIGN, tokens=whole)],
        "logits only": [replace(LOGITS, tokens=whole)],
        "no needles": [ALIGN, replace(LOGITS, needles=0.0)],
        "cross-entropy 0.5": [ALIGN, replace(LOGITS, cross_entropy=0.5)],
        "reverse KL": [ALIGN, replace(LOGITS, kl="reverse")],
        "new parameters": [replace(ALIGN, train="new"), replace(LOGITS, train="new")],
        "lora": [ALIGN, replace(LOGITS, train="lora", lr=1e-3)],
        "everything": [ALIGN, replace(LOGITS, train="all", lr=1e-4)],
        "long at the end": [
            ALIGN,
            replace(LOGITS, tokens=LOGITS.tokens - 32768),
            replace(LOGITS, loss="long", tokens=32768, seq_len=1024, batch_size=2, lr=1e-4),
        ],
    }
    kept, rows = bench.kept("1/4"), []
    for mixer in mixers:
        for name, stages in cases.items():
            if name == "new parameters" and mixer == "sliding":
                continue
            label = f"{mixer}-{name.replace(' ', '_')}"
            rows.append(bench.run(label, mixer, kept, stages, 0))
    return rows


def selectors(bench: Bench) -> list[dict[str, Any]]:
    """Eight choices of two layers, distilled alike: what ranks them, loss or recall?"""
    pairs = [[5, 7], [2, 5], [0, 5], [3, 7], [1, 4], [2, 6], [0, 1], [6, 7]]
    stage = replace(LOGITS, tokens=49152, needles=0.25)
    return [
        bench.run(f"pair-{a}_{b}", "sliding", [a, b], [stage], seed)
        for seed in range(2)
        for a, b in pairs
    ]


def lines_of(rows: list[dict[str, Any]], teacher: dict[str, float]) -> list[str]:
    """Return a table: a line for every case, mean and range over seeds at every mark."""
    out = [
        f"source: recall {teacher['recall']:.3f}, perplexity {teacher['perplexity']:.2f}",
        "recall (lowest-highest) / perplexity over the source's, by tokens spent",
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        out.append(f"{label} ({mine[0]['pattern']}, {len(mine)} seeds)")
        for points in zip(*(row["curve"] for row in mine)):
            recall = [p["recall"] for p in points]
            over = [p["perplexity"] / teacher["perplexity"] for p in points]
            out.append(
                f"  {points[0]['tokens'] // 1024:4d}K {points[0].get('name', 'start'):7s} "
                f"{statistics.fmean(recall):.3f} ({min(recall):.2f}-{max(recall):.2f})  "
                f"{math.exp(statistics.fmean(map(math.log, over))):.3f}"
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", choices=("selectors", "curves", "ablation"), default="selectors"
    )
    parser.add_argument("--model", default="checkpoint", help="a folder of examples/")
    parser.add_argument("--work", type=Path, default=Path("bench-curves"))
    parser.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--budgets", nargs="+", default=["1/4", "1/8"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the questions")
    parser.add_argument("--keep", nargs="+", type=int, help="layers, in place of Fisher scores")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    args = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    bench = Bench(args.model, args.work, args.length, args.keep)
    if args.what == "curves":
        rows = curves(bench, args.budgets, args.mixers, args.seeds)
    elif args.what == "ablation":
        rows = ablation(bench, args.mixers)
    else:
        rows = selectors(bench)
    teacher = bench.teacher_row()
    report(lines_of(rows, teacher), {"rows": rows, "teacher": teacher}, args.json)


if __name__ == "__main__":
    main()
