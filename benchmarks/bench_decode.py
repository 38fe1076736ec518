"""Decode speed of a hybrid with one layer in four full, the others a window, beside full attention.

    python benchmarks/bench_decode.py [--tokens 8192] [--decode 64] [--window 512] [--rounds 5]

A small random Qwen3; the hybrid shares its weights. Gates first: with a window as long as the text
the hybrid's logits, prefill and decode, are those of the source, and with the measured window its
decode is its own forward without a cache (relative RMS 1e-5), or no speed is printed. Each model
is prefilled once; then they decode in turns. Goal: at least twice the tokens per second at 8192.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from morph import modeling, surgery
from morph.cache import held_bytes
from morph.plan import Plan, uniform_plan

GOAL, LIMIT = 2.0, 1e-5
VOCAB, GATE_TOKENS, GATE_DECODE = 1024, 768, 16


def make(args: argparse.Namespace) -> nn.Module:
    """Return a random Qwen3 whose cache at 8192 tokens outweighs its weights, as in real use."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2 * args.tokens,
    )
    return Qwen3ForCausalLM(config).eval().to(args.device)


def plan_for(model: nn.Module, window: int) -> Plan:
    """Return the plan that keeps every fourth layer full, with what its mixer holds."""
    geometry = surgery.geometry_of(model)
    full = range(3, geometry.num_hidden_layers, 4)
    plan = uniform_plan("qwen3", geometry, full, "sliding", {"window": window}, None)
    return surgery.resolve_costs(plan)


class Decoder:
    """One model with its cache, fed token by token."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, prompt: int) -> None:
        self.model, self.ids, self.at = model, ids, prompt
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        self.cache, self.logits = out.past_key_values, [out.logits[:, -1]]

    def step(self, count: int) -> tuple[float, float]:
        """Decode `count` tokens; return wall and CPU seconds."""
        _wait(self.ids)
        start = time.perf_counter(), time.process_time()
        for _ in range(count):
            token = self.ids[:, self.at : self.at + 1]
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            self.logits.append(out.logits[:, -1])
            self.at += 1
        _wait(self.ids)
        return time.perf_counter() - start[0], time.process_time() - start[1]


def gates(source: nn.Module, window: int, ids: torch.Tensor) -> dict[str, float]:
    """Return the relative errors of the two equalities that the speed rests on."""
    total = GATE_TOKENS + GATE_DECODE
    found = {}
    wide = modeling.hybrid(source, plan_for(source, total))
    narrow = modeling.hybrid(source, plan_for(source, min(window, GATE_TOKENS // 4)))
    for name, model, reference in (("identity", wide, source), ("cache", narrow, narrow)):
        decoder = Decoder(model, ids, GATE_TOKENS)
        decoder.step(GATE_DECODE - 1)
        got = torch.stack(decoder.logits, 1)
        whole = reference(input_ids=ids[:, : total - 1], use_cache=False).logits
        wanted = whole[:, GATE_TOKENS - 1 :]
        found[name] = ((got - wanted).norm() / wanted.norm()).item()
    return found


def measure(args: argparse.Namespace, source: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """Return the speeds and what the caches hold."""
    plan = plan_for(source, args.window)
    models = {"full": source, "hybrid": modeling.hybrid(source, plan)}
    decoders = {name: Decoder(model, ids, args.tokens) for name, model in models.items()}
    held = {name: held_bytes(decoder.cache) for name, decoder in decoders.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for decoder in decoders.values():
        decoder.step(4)
    for _ in range(args.rounds):
        for name, decoder in decoders.items():
            times[name].append(decoder.step(args.decode))
    found: dict[str, Any] = {"pattern": plan.pattern}
    for name, rounds in times.items():
        wall, cpu = zip(*rounds)
        found[name] = {
            "tokens_per_second": args.decode / statistics.median(wall),
            "tokens_per_second_best": args.decode / min(wall),
            "cpu_seconds": statistics.median(cpu),
            "cache_bytes": held[name],
        }
    found["hybrid"]["cache_bytes_planned"] = plan.cache_bytes(args.tokens, "float32")
    pairs = list(zip(times["full"], times["hybrid"]))
    found["ratio"] = statistics.median(a[0] / b[0] for a, b in pairs)
    found["ratio_cpu"] = statistics.median(a[1] / b[1] for a, b in pairs)
    found["cache_ratio"] = held["hybrid"] / held["full"]
    return found


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main() -> int:
    """Gate, then measure, then print JSON; return 1 where a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"tokens": 8192, "decode": 64, "window": 512, "rounds": 5, "layers": 8}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        source = make(args)
        length = max(args.tokens + 4 + args.rounds * args.decode, GATE_TOKENS + GATE_DECODE)
        ids = torch.randint(VOCAB, (1, length)).to(args.device)
        errors = gates(source, args.window, ids)
        if not max(errors.values()) <= LIMIT:
            print(json.dumps({"gate": "failed", "relative_errors": errors}), file=sys.stderr)
            return 1
        found = measure(args, source, ids)
    head = {"gate": "passed", "relative_errors": errors, "arguments": vars(args)}
    print(json.dumps(head | found | {"goal": GOAL, "met": found["ratio"] >= GOAL}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
