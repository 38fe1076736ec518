"""A layer whose heads have different mixers, beside the weighted sum of its uniform parts.

    python benchmarks/bench_mixture.py [--tokens 4096] [--rounds 5] [--json out.json]

One attention layer of a small random Llama, float32, one thread: CPU seconds of prefill and of
decode with half of the KV heads full and the other half on a mixer, against half the time of the
full layer plus half that of the layer on the mixer alone. Gate: the heads' outputs equal those of
the uniform layers within 1e-5, or no time is printed. Goal: at most 1.15 times the sum.
"""

from __future__ import annotations

import argparse
import functools
from types import SimpleNamespace
from typing import Any

import _bench
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from morph import surgery
from morph.cache import MixerCacheLayer
from morph.mixers._hybrid import HybridAttention
from morph.plan import HeadGroup, LayerPlan

MIXERS: dict[str, dict[str, Any]] = {
    "sliding": {"window": 512},
    "decay": {},
    "gated_delta": {},
    "mamba2": {},
}
HEADS, DECODED = 8, 32


def layers(mixer: str) -> tuple[dict[str, HybridAttention], Any, int]:
    """Return the layer full, on the mixer, and mixed; they share the source's projections."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    model = LlamaForCausalLM(config).eval()
    base = surgery.base_of(model)
    family, shape = surgery.family_of(config.to_dict()), surgery.geometry_of(model)
    own = functools.partial(HeadGroup, mixer=mixer, options=MIXERS[mixer])
    every, first, second = range(HEADS), range(HEADS // 2), range(HEADS // 2, HEADS)
    plans = {
        "full": (HeadGroup(mixer="full", heads=tuple(every)),),
        "mixer": (own(heads=tuple(every)),),
        "mixed": (HeadGroup(mixer="full", heads=tuple(first)), own(heads=tuple(second))),
    }
    source = surgery.attention_of(base, family, 0)
    made = {
        name: HybridAttention(source, family, shape, LayerPlan(groups=groups), 0).eval()
        for name, groups in plans.items()
    }
    return made, base.rotary_emb, config.hidden_size


def gate(mixer: str, made: dict[str, HybridAttention], x: torch.Tensor, at: Any) -> None:
    half = HEADS // 2
    expected = torch.cat(
        [made["full"].mix(x, at)[:, :, :half], made["mixer"].mix(x, at)[:, :, half:]], dim=2
    )
    _bench.gate(f"{mixer} mixed", expected, made["mixed"].mix(x, at))


def decoder(layer: HybridAttention, x: torch.Tensor, at: Any, tokens: int) -> Any:
    """Return a function that decodes on from `tokens`, each time from the same past."""
    held = MixerCacheLayer()
    view = SimpleNamespace(layers=[held])
    layer(x[:, :tokens], tuple(p[:, :tokens] for p in at), past_key_values=view)
    kept = [state.clone() for state in held.states]

    def run() -> None:
        held.states = [state.clone() for state in kept]
        for t in range(tokens, tokens + DECODED):
            layer(x[:, t : t + 1], tuple(p[:, t : t + 1] for p in at), past_key_values=view)

    return run


def measure(mixer: str, tokens: int, rounds: int) -> dict[str, float]:
    made, rotary, hidden = layers(mixer)
    x = torch.randn(1, tokens + DECODED, hidden)
    at = rotary(x, torch.arange(tokens + DECODED)[None])
    gate(mixer, made, x[:, :600], tuple(p[:, :600] for p in at))
    prompt, places = x[:, :tokens], tuple(p[:, :tokens] for p in at)
    prefill = _bench.in_turns(
        {n: functools.partial(layer, prompt, places) for n, layer in made.items()}, rounds
    )
    steps = _bench.in_turns({n: decoder(m, x, at, tokens) for n, m in made.items()}, rounds)
    found = {}
    for name, taken in (("prefill", prefill), ("decode", steps)):
        found[f"{name}_mixed_s"] = taken["mixed"]
        found[f"{name}_ratio"] = taken["mixed"] / (0.5 * taken["full"] + 0.5 * taken["mixer"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    args = parser.parse_args()
    _bench.one_thread()
    lines, result = (
        [f"one layer, {HEADS} heads of 64, {args.tokens} tokens, float32, one thread"],
        {},
    )
    with torch.no_grad():
        for mixer in MIXERS:
            found = result[mixer] = measure(mixer, args.tokens, args.rounds)
            lines.append(
                f"half full, half {mixer:12} prefill {found['prefill_mixed_s'] * 1e3:.0f} ms, "
                f"{found['prefill_ratio']:.2f}x the weighted sum; {DECODED} tokens decoded in "
                f"{found['decode_mixed_s'] * 1e3:.0f} ms, {found['decode_ratio']:.2f}x"
            )
    _bench.report(lines, {"tokens": args.tokens, "mixers": result}, args.json)


if __name__ == "__main__":
    main()
