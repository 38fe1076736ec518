"""Every linear operator in chunks beside full causal attention, and its decode at growing length.

    python benchmarks/bench_linear.py [--ops decay gated_delta] [--tokens 8192] [--rounds 5]

4 heads of 64 in float32 on one thread: CPU seconds of a forward, and of forward and backward, as
ratios within one run; then one new token after 128 tokens and after `--tokens`. Gate first, or
nothing is printed for the operator: outputs and gradients at 1,000 tokens equal the token-by-token
reference in float64 within 1e-5. Goals: a forward at least 10 times as fast as full attention at
8,192 tokens, and decode whose time does not depend on the length.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import _bench
import torch
from torch.nn.functional import scaled_dot_product_attention

from morph import registry
from morph.testing import error_ratio

HEADS, SIZE, GATE_TOKENS = 4, 64, 1000
# The example of each kernel that is measured, at sizes that somebody would use
OPS: dict[str, dict[str, Any]] = {
    "decay": {},
    "gated_delta": {},
    "gla": {},
    "kda": {},
    "hedgehog": {"window_size": 64},
    "hola": {"cache_size": 64, "block_size": 256},
}


def inputs(op: str, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made = registry.load("kernels", op).example(
        B=1,
        T=tokens,
        H=HEADS,
        G=HEADS,
        K=SIZE,
        V=SIZE,
        dtype=torch.float64,
        generator=generator,
        **OPS[op],
    )
    return {n: x.to(dtype) if _floats(x) else x for n, x in made.items()}


def _floats(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


def learn(run: Any, given: dict[str, Any], do: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {n: x.detach().requires_grad_() for n, x in given.items() if _floats(x)}
    names = ["q", "k", "v"] if run is full else list(leaves)
    o, _ = run(**{**given, **leaves})
    found = torch.autograd.grad(o, [leaves[n] for n in names], do.to(o.dtype))
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(names, found)}}


def errors(op: str) -> dict[str, float]:
    """Gate outputs and gradients against the float64 reference, and return the error ratios."""
    module = registry.load("kernels", op)
    exact = inputs(op, GATE_TOKENS, torch.float64)
    do = torch.randn(exact["v"].shape, generator=torch.Generator().manual_seed(1)).double()
    right = learn(module.reference, exact, do)
    got = learn(module.forward, {n: x.float() if _floats(x) else x for n, x in exact.items()}, do)
    for name, one in right.items():
        if one.abs().max() > 1e-12:
            _bench.gate(f"{op} {name}", one, got[name])
    return {n: error_ratio(one, got[n]) for n, one in right.items() if one.abs().max() > 1e-12}


def measure(op: str, tokens: int, rounds: int) -> dict[str, float]:
    module, given = registry.load("kernels", op), inputs(op, tokens)
    do = torch.randn_like(given["v"])
    sides = {"full": full, "chunked": module.forward}
    with torch.no_grad():
        runs = {n: functools.partial(f, **given) for n, f in sides.items()}
        forward = _bench.in_turns(runs, rounds)
    runs = {n: functools.partial(learn, f, given, do) for n, f in sides.items()}
    training = _bench.in_turns(runs, max(1, rounds // 2))
    return {
        "forward_s": forward["chunked"],
        "forward_vs_full": forward["full"] / forward["chunked"],
        "training_s": training["chunked"],
        "training_vs_full": training["full"] / training["chunked"],
        **decode(op, tokens, rounds),
    }


def decode(op: str, tokens: int, rounds: int) -> dict[str, float]:
    """Time one new token after a short and a long past, fifty at a time."""
    module, runs = registry.load("kernels", op), {}
    for past in (128, tokens):
        given = inputs(op, past + 1)
        before, one = part(given, 0, past), part(given, past, past + 1)
        with torch.no_grad():
            _, state = module.forward(**before, output_final_state=True)
        step = functools.partial(
            module.forward, **one, initial_state=state, output_final_state=True
        )
        runs[str(past)] = functools.partial(_often, step)
    with torch.no_grad():
        taken = _bench.in_turns(runs, rounds)
    short, long = taken.values()
    return {"decode_s": long / 50, "decode_long_vs_short": long / short}


def part(given: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    total = given["q"].shape[1]
    timed = {n for n, x in given.items() if _floats(x) and x.ndim > 2 and x.shape[1] == total}
    return {n: x[:, start:stop] if n in timed else x for n, x in given.items()}


def _often(step: Any) -> None:
    for _ in range(50):
        step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    args = parser.parse_args()
    _bench.one_thread()
    lines = [f"{HEADS} heads of {SIZE}, float32, one thread, {args.tokens} tokens"]
    result: dict[str, Any] = {"tokens": args.tokens}
    for op in args.ops:
        wrong = errors(op)
        found = measure(op, args.tokens, args.rounds)
        result[op] = {**found, "error_ratios": wrong}
        lines.append(
            f"{op:12} forward {found['forward_s'] * 1e3:5.0f} ms, "
            f"{found['forward_vs_full']:4.1f}x full; with backward "
            f"{found['training_s'] * 1e3:5.0f} ms, {found['training_vs_full']:4.1f}x; decode "
            f"{found['decode_s'] * 1e3:.2f} ms, {found['decode_long_vs_short']:.2f}x that after "
            f"128 tokens; worst error {max(wrong.values()):.1e}"
        )
        print(lines[-1], flush=True)
    _bench.report(lines, result, args.json)


if __name__ == "__main__":
    main()
