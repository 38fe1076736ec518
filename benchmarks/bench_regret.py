"""Every selector beside the best set there is: regret on small trained models.

    python benchmarks/bench_regret.py --jobs 2 --out regret/ [--models checkpoint llama two_hop]
    python benchmarks/bench_regret.py --table regret/*.json

Model x mixer (sliding and decay; others with --mixers) x granularity x seed of the examples;
budgets 1/8, 1/4 and 1/2. For layers the best set is found by trying all of them, for KV heads it is
the best that anybody found. Each comparison runs on one thread in a process of its own and is kept
as JSON, so that a second run does only what is missing. No speed is printed: costs are passes over
the examples, and CPU seconds beside them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
MODELS = ("checkpoint", "llama", "two_hop")
# On rows of 256 tokens, 16 blocks: 64 tokens seen, as the window has; dash at three quarters unread
OPTIONS: dict[str, dict[str, Any]] = {
    "sliding": {"window": 64},
    "block_topk": {"block": 16, "k": 4, "initial": 1, "local": 1},
    "dash": {"block": 16, "sparsity": 0.75},
}
BUDGETS = ("1/8", "1/4", "1/2")
CHEAP = (
    "uniform,random,nll:mode=add:bootstrap=0,nll:mode=remove:bootstrap=0,nll:mode=greedy,"
    "kl:mode=add:bootstrap=0,kl:mode=remove:bootstrap=0,fisher,beam,halo,halo:mode=faithful,lazy,razor,"
    "retrieval_head,hydrahead"
)
TRAINED = (
    "flashmorph:steps={n},flashmorph:align_on=residual:steps={n},duo:steps={n},consa:steps={n}"
)
SWAPPED = (
    "nll mode=greedy",
    "nll mode=add bootstrap=0",
    "nll mode=remove bootstrap=0",
    "kl mode=remove bootstrap=0",
    "fisher",
)


def two_hop_questions(section: Any, corpus: Any, tokenizer: Any, seed: int, held_out: bool) -> Any:
    """Return batches of two-hop questions, made by the script that trained the model."""
    sys.path.insert(0, str(EXAMPLES))
    from _two_hop import two_hop_examples

    from morph.pipeline._data import batches_of

    made = two_hop_examples(
        tokenizer,
        corpus.held_out if held_out else corpus.train,
        length=section.seq_len,
        depths=[i / 7 for i in range(8)],
        count=section.examples,
        seed=seed,
    )
    return batches_of(made, section.seq_len, 8)


def one(args: argparse.Namespace, model: str, mixer: str, granularity: str, seed: int) -> None:
    """Compare on one model and write the JSON."""
    import torch

    from morph import comparison
    from morph.pipeline import _compare, _judge
    from morph.recipes import schema

    torch.set_num_threads(1)
    recipe = schema.from_data(
        {
            "model": str(EXAMPLES / model),
            "seed": seed,
            "data": {"text": [str(EXAMPLES / "data" / "sherlock_holmes.txt")]},
            "mixer": {"name": mixer, "options": OPTIONS.get(mixer, {})},
            "select": {
                "granularity": granularity,
                "examples": args.examples,
                "seq_len": args.seq_len,
                "align": args.align,
            },
        }
    )
    trained = TRAINED.format(n=args.steps)
    wanted = args.selectors or (CHEAP if args.steps == 0 else f"{CHEAP},{trained}")
    swapped = (*SWAPPED, *(c.label for c in _judge.candidates(trained)))
    found = _compare.compare(
        recipe,
        _judge.candidates(wanted),
        BUDGETS,
        max_sets=4096,
        with_swaps=swapped,
        questions=two_hop_questions if model == "two_hop" else None,
        say=lambda text: print(f"{model} {mixer} {granularity} {seed}: {text}", flush=True),
    )
    (args.out / f"{model}-{mixer}-{granularity}-{seed}.json").write_text(comparison.dumps(found))


def many(args: argparse.Namespace) -> None:
    """Run what is missing, `--jobs` at a time, each in a process of its own."""
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [
        (model, mixer, granularity, str(seed))
        for granularity in args.granularities
        for seed in range(args.seeds if granularity == "layer" else args.head_seeds)
        for mixer in args.mixers
        for model in args.models
        if not (args.out / f"{model}-{mixer}-{granularity}-{seed}.json").exists()
    ]
    running: list[subprocess.Popen] = []
    passed = [f"--{k}={getattr(args, k)}" for k in ("examples", "seq_len", "steps", "align", "out")]
    passed += [f"--selectors={args.selectors}"] if args.selectors else []
    while wanted or running:
        while wanted and len(running) < args.jobs:
            command = [sys.executable, __file__, *passed, "--one", *wanted.pop(0)]
            running.append(subprocess.Popen(command))
        running[0].wait()
        running = [p for p in running if p.poll() is None]


def table(files: list[Path]) -> str:
    """Return a Markdown table per mixer and granularity: mean regret and its largest value."""
    from morph import comparison

    groups: dict[tuple[str, str], list[Any]] = {}
    for file in files:
        found = comparison.loads(file.read_text(), str(file))
        groups.setdefault((found.granularity, found.mixer), []).append(found)
    lines = []
    for (granularity, mixer), made in sorted(groups.items()):
        models = sorted({c.model for c in made})
        lines += [f"\n{granularity}, {mixer}: {len(made)} comparisons\n"]
        heads = [f"{m} {b}" for m in models for b in BUDGETS]
        lines += ["| selector | " + " | ".join(heads) + " | mean | worst | passes | CPU s |"]
        lines += ["|---" * (len(heads) + 5) + "|"]
        rows: dict[str, dict[tuple[str, str], list[Any]]] = {}
        for c in made:
            for e in c.entries:
                rows.setdefault(e.row, {}).setdefault((c.model, e.budget), []).append(e)
        ranked = sorted(rows, key=lambda r: (statistics.mean(_regrets(rows[r])), r))
        for name in ranked:
            cells = [_cell(rows[name].get((m, b), [])) for m in models for b in BUDGETS]
            every = [e for part in rows[name].values() for e in part]
            told = _regrets(rows[name])
            passes = statistics.mean(e.forwards + e.backwards for e in every)
            cpu = statistics.mean(e.cpu_seconds for e in every)
            cells += [f"{statistics.mean(told):.3f}", f"{max(told):.2f}"]
            lines += [f"| {name} | " + " | ".join(cells) + f" | {passes:.1f} | {cpu:.1f} |"]
        best = {
            (c.model, b.budget): f"{b.sets_tried}{'' if b.exhaustive else ' (not all)'}"
            for c in made
            for b in c.best
        }
        cells = [best.get((m, b), "") for m in models for b in BUDGETS]
        lines += ["| sets tried for the best | " + " | ".join(cells) + " | | | | |"]
    return "\n".join(lines)


def _regrets(row: dict[tuple[str, str], list[Any]]) -> list[float]:
    return [e.regret for part in row.values() for e in part]


def _cell(entries: list[Any]) -> str:
    """Return the mean regret of entries; held out in brackets; 0 only for exactly 0."""
    if not entries:
        return ""
    mean = statistics.mean(e.regret for e in entries)
    held = statistics.mean(e.held_out_regret for e in entries)
    return f"{_short(mean)} ({_short(held)})"


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.2f}" if abs(value) >= 0.005 else ("<.005" if value > 0 else ">-.005")


def main() -> None:
    """Run the comparisons, or print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--mixers", nargs="*", default=["sliding", "decay"])
    parser.add_argument("--granularities", nargs="*", default=["layer", "kv_head"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--head_seeds", type=int, default=1)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="of trained selectors; 0: none")
    parser.add_argument("--align", type=int, default=32_000)
    parser.add_argument("--selectors")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("regret"))
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "MIXER", "GRANULARITY", "SEED"))
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.one:
        one(args, *args.one[:3], int(args.one[3]))
    else:
        many(args)


if __name__ == "__main__":
    main()
