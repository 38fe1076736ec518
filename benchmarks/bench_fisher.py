"""The fisher selector beside the exact sweep: rank correlation, and what both cost.

    python benchmarks/bench_fisher.py [--models checkpoint llama two_hop] [--json out.json]

Exact: KL from the source with one unit made cheap, for every layer, KV head and head. Fisher: one
forward and S = 4 ways back give all three. Goals: Spearman >= 0.95 for layers and heads on every
model; CPU time of at most 1 + 1.6 S plain forwards. Gate: two exact sweeps of the layers, with and
without reuse of lower layers, agree to 1e-5 of the largest.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _bench import gate, one_thread, report

from morph import data, surgery
from morph.comparison import spearman
from morph.pipeline._data import batches_of
from morph.pipeline._source import open_source
from morph.selectors import _common, fisher

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GRANULARITIES = ("layer", "kv_head", "head")


def questions(name: str, tokenizer: Any, args: argparse.Namespace) -> list[surgery.Batch]:
    """Return the examples of one model."""
    text = data.read_text(EXAMPLES / "data" / "sherlock_holmes.txt")
    ids = data.token_ids(tokenizer, text[: len(text) * 9 // 10])
    depths = [i / 7 for i in range(8)]
    common = {"length": args.seq_len, "depths": depths, "count": args.examples, "seed": 0}
    if name == "two_hop":
        sys.path.insert(0, str(EXAMPLES))
        from _two_hop import two_hop_examples

        made = two_hop_examples(tokenizer, ids, **common)
    else:
        made = data.needle_examples("multikey", tokenizer, ids, **common)
    return batches_of(made, args.seq_len, 8)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return correlations of five draws and the CPU time of both, in plain forwards."""
    source = open_source(str(EXAMPLES / name))
    model, batches = source.model(), questions(name, source.tokenizer(), args)
    told: dict[str, Any] = {}
    with surgery.morphable(model, "sliding", {"window": args.window}) as probe:
        plain, ours = [], []
        for _ in range(args.rounds):
            start = time.process_time()
            with torch.no_grad():
                for batch in batches:
                    probe.logits(batch, {})
            plain.append(time.process_time() - start)
            probe.memo.clear()
            start = time.process_time()
            fisher.score(probe, batches, fisher.Options(samples=args.samples))
            ours.append(time.process_time() - start)
        told["forwards_of_time"] = min(ours) / min(plain)
        for granularity in GRANULARITIES:
            units = _common.units(probe, granularity)
            sets = [[u for u in units if u != v] for v in units]
            exact, seconds = _swept(probe, batches, units, sets, granularity)
            if granularity == "layer":
                trace = [probe.trace(b, probe.modes(units), reuse=False) for b in batches]
                whole = [
                    sum(float(_kl(t, probe.modes(s))) for t in trace)
                    / sum(int(b.answers.sum()) for b in batches)
                    for s in sets
                ]
                gate("exact sweep", torch.tensor(whole), torch.tensor(exact), 1e-5)
            found = []
            for seed in range(5):
                options = fisher.Options(samples=args.samples, seed=seed)
                scores = fisher.score(probe, batches, options, granularity=granularity)
                found.append(spearman([scores.values[i][u] for i, u in units], exact))
            told[granularity] = {
                "units": len(units),
                "spearman": found,
                "exact_forwards_of_time": seconds / min(plain),
                "exact_largest": max(exact),
                "exact_median": sorted(exact)[len(exact) // 2],
            }
    return told


def _swept(probe: Any, batches: Any, units: Any, sets: Any, granularity: Any) -> Any:
    start = time.process_time()
    found = _common.Sweep(probe, batches, units, granularity, "kl").means(sets)
    return found, time.process_time() - start


def _kl(trace: Any, modes: Any) -> torch.Tensor:
    p = torch.log_softmax(trace.logits.float(), -1)
    return (p.exp() * (p - torch.log_softmax(trace.variant(modes).float(), -1))).sum()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["checkpoint", "llama", "two_hop"])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    one_thread()
    result = {name: measure(name, args) for name in args.models}
    lines = []
    for name, told in result.items():
        bound = 1 + 1.6 * args.samples
        lines.append(f"{name}: {told['forwards_of_time']:.2f} forwards of CPU time (<= {bound})")
        for granularity in GRANULARITIES:
            part = told[granularity]
            found = part["spearman"]
            lines.append(
                f"  {granularity}, {part['units']} units: Spearman {min(found):.3f}-"
                f"{max(found):.3f} over 5 draws; the exact sweep takes "
                f"{part['exact_forwards_of_time']:.1f} forwards of time; KL median "
                f"{part['exact_median']:.1e}, largest {part['exact_largest']:.2g}"
            )
    report(lines, result, args.json)


if __name__ == "__main__":
    main()
