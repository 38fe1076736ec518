"""The exact layer sweep with reuse, beside one whole forward per layer.

    python benchmarks/bench_sweep.py [--layers 24] [--json out.json]

A random decoder of 24 layers and 256 dimensions, 512 tokens, 32 answer tokens; windows of 128 and
256 (half the length). Gate first: scores equal those of whole forwards to 1e-5. Goals: >= 1.8x
fewer layer evaluations, >= 3x where the window is half the length.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _bench import gate, in_turns, one_thread, report
from transformers import LlamaConfig, LlamaForCausalLM

from morph import surgery
from morph.surgery import FULL, Batch


def make(layers: int) -> torch.nn.Module:
    """Return a random decoder whose attention is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config).eval()


def sweep(model: torch.nn.Module, batch: Batch, window: int, reuse: bool) -> tuple[Any, float]:
    """Return (NLL of restoring each layer, layer evaluations spent)."""
    with surgery.morphable(model, "sliding", {"window": window}) as probe, torch.no_grad():
        modes = probe.modes([])
        found = []
        if reuse:
            trace = probe.trace(batch, modes)
            found = [trace.losses({i: FULL}).mean() for i in probe.candidates]
        else:
            probe.logits(batch, modes)
            for i in probe.candidates:
                logits = probe.logits(batch, {**modes, i: FULL})
                found.append(surgery.answer_losses(logits, batch).mean())
        return torch.stack(found), probe.layer_evaluations


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    one_thread()
    model = make(args.layers)
    answers = torch.zeros(1, args.tokens, dtype=torch.bool)
    answers[:, -32:] = True
    batch = Batch(ids=torch.randint(0, 512, (1, args.tokens)), answers=answers)
    lines, result = [], {}
    for window in (args.tokens // 4, args.tokens // 2):
        whole, whole_cost = sweep(model, batch, window, reuse=False)
        quick, quick_cost = sweep(model, batch, window, reuse=True)
        gate(f"scores, window {window}", whole, quick, 1e-5)
        seconds = in_turns(
            {
                "whole": lambda window=window: sweep(model, batch, window, False),
                "reuse": lambda window=window: sweep(model, batch, window, True),
            },
            args.rounds,
        )
        fewer, faster = whole_cost / quick_cost, seconds["whole"] / seconds["reuse"]
        error = float((whole - quick).abs().max())
        lines.append(
            f"window {window} of {args.tokens}: {fewer:.2f}x fewer layer evaluations "
            f"({whole_cost:.0f} -> {quick_cost:.1f}), {faster:.2f}x less CPU time, "
            f"largest score difference {error:.1e}"
        )
        result[f"window_{window}"] = {
            "layer_evaluations": [whole_cost, quick_cost],
            "fewer": fewer,
            "cpu_ratio": faster,
            "largest_difference": error,
        }
    report(lines, result, args.json)


if __name__ == "__main__":
    main()
