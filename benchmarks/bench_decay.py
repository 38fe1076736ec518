"""The decay kernel's chunked path beside full causal attention and beside its own recurrence.

    python benchmarks/bench_decay.py [--rounds 5] [--json out.json]

4 heads of 64 in float32 on one thread: CPU seconds of a forward, and of forward and backward, as
ratios within one run. Gate first: outputs and gradients equal the token-by-token recurrence in
float64, whose error ratios are reported. Goal at 8192 tokens: forward at least 10 times as fast as
full attention.
"""

from __future__ import annotations

import argparse

import _bench
import torch
from torch.nn.functional import scaled_dot_product_attention

from morph.kernels import decay
from morph.testing import error_ratio

HEADS, SIZE, GATE_TOKENS = 4, 64, 1000
LENGTHS = (2048, 8192, 16384)


def tensors(tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, HEADS, SIZE)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def slopes() -> torch.Tensor:
    return -(2.0 ** (-8.0 * torch.arange(1.0, HEADS + 1) / HEADS))


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def chunked(*x: torch.Tensor) -> torch.Tensor:
    return decay.forward(*x[:3], g=x[3], path="chunked")[0]


def recurrent(*x: torch.Tensor) -> torch.Tensor:
    return decay.reference(*x[:3], g=x[3])[0]


def learn(run: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, slopes().to(q.dtype))]
    o = run(*leaves)  # type: ignore[operator]
    used = [x for x in leaves if run is not full or x.ndim > 1]
    return o, *torch.autograd.grad(o, used, do)


def errors() -> dict[str, float]:
    """Gate outputs and gradients against the float64 recurrence, and return the error ratios."""
    exact = learn(recurrent, *tensors(GATE_TOKENS, torch.float64))
    found = {}
    sides = {"chunked": learn(chunked, *tensors(GATE_TOKENS))}
    sides["recurrent"] = learn(recurrent, *tensors(GATE_TOKENS))
    for side, got in sides.items():
        for name, one, other in zip(("o", "dq", "dk", "dv", "dg"), exact, got):
            _bench.gate(f"{side} {name}", one, other)
            found[f"{side}_{name}"] = error_ratio(one, other)
    return found


def measure(tokens: int, rounds: int, recurrence: bool) -> dict[str, float]:
    q, k, v, do = tensors(tokens)
    g, sides = slopes(), {"full": full, "chunked": chunked}
    once = {"recurrent": recurrent} if recurrence else {}
    with torch.no_grad():
        runs = {n: lambda f=f: f(q, k, v, g) for n, f in (sides | once).items()}
        forward = _bench.in_turns(runs, rounds)
    runs = {n: lambda f=f: learn(f, q, k, v, do) for n, f in sides.items()}
    training = _bench.in_turns(runs, max(1, rounds // 2))
    return {
        **{f"forward_{n}_s": s for n, s in forward.items()},
        **{f"training_{n}_s": s for n, s in training.items()},
        **{f"forward_vs_{n}": forward[n] / forward["chunked"] for n in forward if n != "chunked"},
        "training_vs_full": training["full"] / training["chunked"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    args = parser.parse_args()
    _bench.one_thread()
    wrong = errors()
    lines = [
        f"{HEADS} heads of {SIZE}, float32, one thread; error ratio of o to the float64 recurrence:"
        f" chunked {wrong['chunked_o']:.1e}, recurrent float32 {wrong['recurrent_o']:.1e}"
    ]
    result: dict[str, object] = {"error_ratios": wrong}
    for tokens in LENGTHS:
        found = measure(tokens, args.rounds, tokens == LENGTHS[0])
        result[f"T{tokens}"] = found
        line = (
            f"T={tokens}: forward {found['forward_chunked_s'] * 1e3:.0f} ms, "
            f"{found['forward_vs_full']:.1f}x full; forward and backward "
            f"{found['training_chunked_s'] * 1e3:.0f} ms, {found['training_vs_full']:.1f}x full"
        )
        if "forward_vs_recurrent" in found:
            line += f"; {found['forward_vs_recurrent']:.0f}x the recurrence"
        lines.append(line)
    _bench.report(lines, result, args.json)


if __name__ == "__main__":
    main()
