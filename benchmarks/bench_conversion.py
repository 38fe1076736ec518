"""What every mixer keeps of the embedded checkpoint: straight after surgery, aligned, distilled.

    python benchmarks/bench_conversion.py [--work DIR] [--mixers decay ...] [--tokens 64K]

Budget 1/4: layers 5 and 7 of the eight stay full, the others get the mixer. Every mixer sees the
same tokens: plain start, calibrated start (4,096 tokens, no gradient), after `align` (new
parameters and projections regress the layer's output), after `logits` (KL, half of the batches
needle questions). Measured each time: recall of `multikey` by length, perplexity on held-out text,
bytes of generation state at 1,024 tokens. `window` is the window alone, the baseline to beat.
`--granularity kv_head` and `head` spread full heads over the layers, as many as let the cache grow
by the same bytes a token, where Fisher scores put them. Rows already in the work folder are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from _bench import one_thread, report

from morph import distill, evaluate, pipeline, selection, surgery
from morph import plan as planning
from morph.pipeline import _data, _score, _select, _start
from morph.pipeline._source import Source
from morph.plan import Plan
from morph.recipes.schema import Data, Evaluate, Mixer, Select, Stage

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "data" / "sherlock_holmes.txt"
KEPT = (5, 7)
GROWTH = "1024B"  # what two full layers of four KV heads of 32 add a token, at 16 bits
# name in the table -> mixer and options; 64 tokens of window hold as many bytes as one state here
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("sliding", {"window": 64}),
    "decay": ("decay", {}),
    "gla": ("gla", {}),
    "mamba2": ("mamba2", {}),
    "gated_delta": ("gated_delta", {}),
    "gated_delta rotated": ("gated_delta", {"conv": 0, "inputs": "rotated", "gate": "none"}),
    "kda": ("kda", {}),
    "hedgehog": ("hedgehog", {"window": 64}),
    "hola": ("hola", {"cache": 32, "block": 32}),
}
EVALUATE = Evaluate(
    tasks=("multikey",),
    lengths=(256, 512, 1024),
    depths=5,
    examples=50,
    perplexity_tokens=16384,
    decode_tokens=1,
)


def plan_of(source: Source, mixer: Mixer, granularity: str, corpus: Any, model: Any) -> Plan:
    """Return the plan of a budget of 1/4 at a granularity."""
    if granularity == "layer":
        plan = planning.uniform_plan(
            source.family.model_type, source.geometry, KEPT, mixer.name, mixer.options, None
        )
        return surgery.resolve_costs(_select.dressed(plan, mixer))
    section = Select(
        selector="fisher",
        granularity=granularity,
        budget=GROWTH,
        task="multikey",
        examples=16,
        seq_len=512,
        align=0,
        verify_swaps=False,
    )
    scores = _score.score(source, section, mixer, corpus, model=model)
    keep = selection.choose_units(scores, _select.budget_of(section), geometry=source.geometry)
    plan = selection.plan_of_units(
        scores, keep, geometry=source.geometry, mixer=mixer.name, options=mixer.options
    )
    return surgery.resolve_costs(_select.dressed(plan, mixer))


def measured(model: Any, plan: Plan, source: Source, corpus: Any) -> dict[str, Any]:
    found = evaluate.evaluate(
        {"hybrid": model},
        EVALUATE,
        source.tokenizer(),
        corpus.held_out,
        plans={"hybrid": plan},
    ).models[0]
    return {
        "recall": {str(x.length): x.recall for x in found.recall if x.depth is None},
        "perplexity": found.perplexity.ppl if found.perplexity else None,
        "cache_bytes": plan.cache_bytes(1024),
    }


def row(name: str, granularity: str, tokens: int, fusion: str, work: Path) -> dict[str, Any]:
    """Convert, measure, align, measure, distil, measure."""
    source = pipeline.open_source(str(ROOT / "examples" / "checkpoint"))
    corpus = _data.corpus(Data(text=(str(TEXT),), held_out=0.1), source.tokenizer())
    teacher = source.model("float32")
    kind, options = CASES[name]
    mixer = Mixer(name=kind, options=options, fusion=fusion)
    plan = plan_of(source, mixer, granularity, corpus, teacher)
    found: dict[str, Any] = {"name": name, "granularity": granularity, "pattern": plan.pattern}
    start = time.process_time()
    plain = _start.hybrid_of(teacher, plan, None, 0)
    test = _start.text_ids(corpus, 8192)[8:]
    found["plain"] = measured(plain, plan, source, corpus)
    found["plain"]["output_error"] = _mean(surgery.output_errors(plain, teacher, test))
    student = _start.hybrid_of(teacher, plan, corpus, 4096)
    found["calibrated"] = measured(student, plan, source, corpus)
    found["calibrated"]["output_error"] = _mean(surgery.output_errors(student, teacher, test))
    common: dict[str, Any] = {"tokens": tokens, "seq_len": 512, "batch_size": 4}
    stages = {
        "align": Stage(loss="align", train="attention", lr=1e-3, **common),
        "logits": Stage(loss="logits", train="attention", lr=3e-4, needles=0.5, **common),
    }
    for stage, setting in stages.items():
        folder = work / f"train-{stage}"
        shutil.rmtree(folder, ignore_errors=True)
        bos = source.tokenizer().bos_token_id
        distill.distill(
            student,
            teacher,
            [setting],
            distill.text_batches(corpus.train, seed=0, bos=bos),
            out=folder,
            seed=0,
            needles=distill.needle_batches("multikey", source.tokenizer(), corpus.train, seed=0),
        )
        shutil.rmtree(folder, ignore_errors=True)
        student.eval()
        found[stage] = measured(student, plan, source, corpus)
    return {**found, "cpu_seconds": time.process_time() - start}


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    out = ["recall of multikey at 256 / 512 / 1024 tokens; perplexity; KiB of state at 1024 tokens"]
    for one in rows:
        out.append(
            f"{one['name']} ({one['granularity']}, {one['pattern']}), "
            f"{one['plain']['cache_bytes'] / 1024:.0f} KiB, {one['cpu_seconds']:.0f} CPU s"
        )
        for stage in ("plain", "calibrated", "align", "logits"):
            at = one[stage]
            recall = " / ".join(f"{r:.2f}" for r in at["recall"].values())
            error = f"; output error {at['output_error']:.2f}" if "output_error" in at else ""
            out.append(f"  {stage:10}  {recall}  {at['perplexity']:7.2f}{error}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-conversion"))
    parser.add_argument("--mixers", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--granularity", choices=("layer", "kv_head", "head"), default="layer")
    parser.add_argument("--fusion", choices=("none", "scale"), default="none")
    parser.add_argument("--tokens", default="64K", help="tokens of each stage")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    args = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    tokens = int(args.tokens.upper().removesuffix("K")) * (
        1024 if "K" in args.tokens.upper() else 1
    )
    rows = []
    for name in args.mixers:
        stem = f"{name}-{args.granularity}-{args.fusion}-{tokens}".replace(" ", "_")
        file = args.work / f"{stem}.json"
        if not file.is_file():
            args.work.mkdir(parents=True, exist_ok=True)
            found = row(name, args.granularity, tokens, args.fusion, args.work / stem)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        rows.append(json.loads(file.read_text(encoding="utf-8")))
        print("\n".join(lines_of(rows[-1:])[1:]), flush=True)
    report(lines_of(rows), {"rows": rows, "tokens": tokens}, args.json)


if __name__ == "__main__":
    main()
