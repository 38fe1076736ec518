"""The sliding kernel beside full causal attention and beside transformers' own sliding path.

    python benchmarks/bench_sliding.py [--window 512] [--rounds 5] [--json out.json]

4 heads of 64 in float32 on one thread: CPU seconds of a forward, and of forward and backward, as
ratios within one run; one decoded token; peak memory of forward and backward at doubling lengths.
Gates first: outputs and gradients equal torch's attention under a dense band mask. Goals at 8192
tokens and window 512: forward at least 3 times as fast as full attention and 8 times as fast as
transformers' path (its sdpa function with a dense band mask), and peak memory linear in length.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import _bench
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from morph.kernels import sliding

HEADS, SIZE = 4, 64
LENGTHS, PEAKS = (4096, 8192), (4096, 8192, 16384)
MODULE = SimpleNamespace(num_key_value_groups=1, is_causal=True)


def tensors(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, HEADS, SIZE, generator=generator) for _ in range(4)]


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def band(tokens: int, window: int) -> torch.Tensor:
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return ((gap >= 0) & (gap < window))[None, None]


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a sliding layer of transformers runs; the mask is made once for all layers."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa_attention_forward(MODULE, q, k, v, mask)[0]


def learn(run: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)  # type: ignore[operator]
    return o, *torch.autograd.grad(o, leaves, do)


def measure(tokens: int, window: int, rounds: int) -> dict[str, float]:
    q, k, v, do = tensors(tokens)
    mask = band(tokens, window)

    def ours(*x: torch.Tensor) -> torch.Tensor:
        return sliding.forward(*x, window_size=window)[0]

    def theirs(*x: torch.Tensor) -> torch.Tensor:
        return masked(*x, mask)

    for name, one, other in zip(
        ("o", "dq", "dk", "dv"), learn(theirs, q, k, v, do), learn(ours, q, k, v, do)
    ):
        _bench.gate(f"{name} at {tokens} tokens", one, other)
    sides = {"full": full, "transformers": theirs, "sliding": ours}
    with torch.no_grad():
        taken = _bench.in_turns({n: lambda f=f: f(q, k, v) for n, f in sides.items()}, rounds)
    found = {f"forward_{n}_s": s for n, s in taken.items()}
    del sides["transformers"]
    runs = {n: lambda f=f: learn(f, q, k, v, do) for n, f in sides.items()}
    taken = _bench.in_turns(runs, max(1, rounds // 2))
    return found | {f"training_{n}_s": s for n, s in taken.items()}


def decode(tokens: int, window: int, rounds: int) -> dict[str, float]:
    """One token after `tokens`: a full cache beside the window, states moved on each time."""
    q, k, v, _ = tensors(tokens)
    step = [x[:, -1:] for x in (q, k, v)]
    states = {}
    for name, size in (("full", None), ("sliding", window)):
        state = sliding.forward(q, k, v, window_size=size, output_final_state=True)[1]
        states[name] = {"window_size": size, "initial_state": state, "output_final_state": True}

    def many(options: dict[str, object]) -> None:
        for _ in range(20):
            sliding.forward(*step, **options)

    with torch.no_grad():
        taken = _bench.in_turns({n: lambda o=o: many(o) for n, o in states.items()}, rounds)
    return {f"decode_{n}_s": s / 20 for n, s in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=512, help="tokens, the query's own included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    _bench.one_thread()
    if args.peak:

        def prepare() -> _bench.Run:
            q, k, v, do = tensors(args.peak)

            def ours(*x: torch.Tensor) -> torch.Tensor:
                return sliding.forward(*x, window_size=args.window)[0]

            learn(ours, *(x[:, :1024] for x in (q, k, v, do)))  # libraries load what they need
            return lambda: learn(ours, q, k, v, do)

        _bench.say_peak(prepare)
        return
    lines, result = [f"window {args.window}, {HEADS} heads of {SIZE}, float32, one thread"], {}
    for tokens in LENGTHS:
        found = measure(tokens, args.window, args.rounds)
        window = min(args.window, tokens)
        limit = (tokens**2 / 2) / (tokens * window - window**2 / 2)
        ratios = {
            "forward_vs_full": found["forward_full_s"] / found["forward_sliding_s"],
            "forward_vs_transformers": found["forward_transformers_s"] / found["forward_sliding_s"],
            "training_vs_full": found["training_full_s"] / found["training_sliding_s"],
            "pair_count_limit": limit,
        }
        result[f"T{tokens}"] = found | ratios
        lines.append(
            f"T={tokens}: forward {found['forward_sliding_s'] * 1e3:.0f} ms, "
            f"{ratios['forward_vs_full']:.2f}x full (limit {limit:.1f}), "
            f"{ratios['forward_vs_transformers']:.2f}x transformers; forward and backward "
            f"{found['training_sliding_s'] * 1e3:.0f} ms, {ratios['training_vs_full']:.2f}x full"
        )
    found = decode(LENGTHS[-1], args.window, args.rounds)
    result["decode"] = found
    ratio = found["decode_full_s"] / found["decode_sliding_s"]
    taken = f"{found['decode_sliding_s'] * 1e3:.2f} ms"
    lines.append(f"one token after {LENGTHS[-1]}: {taken}, {ratio:.1f}x full")
    peaks = {
        t: _bench.peak_bytes(__file__, "--peak", str(t), "--window", str(args.window))
        for t in PEAKS
    }
    result["peak_bytes"] = {f"T{t}": peak for t, peak in peaks.items()}
    lines.append(
        "peak memory of forward and backward: "
        + ", ".join(f"T={t} {peak / 2**20:.0f} MiB" for t, peak in peaks.items())
    )
    _bench.report(lines, result, args.json)


if __name__ == "__main__":
    main()
