"""Attention over listed blocks beside full causal attention.

    python benchmarks/bench_sparse.py [--share 0.25] [--rounds 5] [--json out.json]

4 heads of 64 in float32 on one thread, blocks of 64: CPU seconds of a forward, and of forward and
backward, as ratios within one run; one decoded token over a cache, the same one each time and 24 in
turn as a model's layers would have them; peak memory of forward and backward at doubling lengths.
Lists hold the query's own block and random earlier ones, `--share` of all: for every query anew,
for neighbours alike (each query changes one block in ten of its neighbour's), the same for 64
queries, or for every query and head. Gates first: outputs and gradients equal torch's attention
under the dense mask of the lists. Goals at 8192 tokens and a share of 0.25: forward at least 2
times, a decoded token at least 3 times as fast as torch's attention over everything in its own
best layout, and peak memory linear in length.
"""

from __future__ import annotations

import argparse

import _bench
import torch
from torch.nn.functional import scaled_dot_product_attention

from morph.kernels import _blocks, sparse

HEADS, SIZE, BLOCK, LAYERS = 4, 64, 64, 24
GATE, LENGTH, PEAKS = 1024, 8192, (4096, 8192, 16384)
KINDS = ("random", "alike", "shared", "heads")


def tensors(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, HEADS, SIZE, generator=generator) for _ in range(4)]


def lists(kind: str, tokens: int, share: float) -> torch.Tensor:
    """Return block lists [1, T, J, N]: own block and the best of random scores before it.

    Made for some queries at a time, so that only the lists themselves count in a peak.
    """
    generator = torch.Generator().manual_seed(1)
    total, each = -(-tokens // BLOCK), HEADS if kind == "heads" else 1
    most = max(1, round(total * share))
    out = torch.full((1, tokens, each, most), -1, dtype=torch.int32)
    score = torch.rand(1, each, total, generator=generator)
    for start in range(0, tokens, BLOCK):
        own = start // BLOCK
        fresh = torch.rand(min(BLOCK, tokens - start), each, total, generator=generator)
        if kind == "shared":
            fresh = fresh[:1].expand_as(fresh)
        if kind == "alike":  # one score in ten is drawn anew from query to query
            anew = torch.rand(fresh.shape, generator=generator) < 0.1
            rows = []
            for row, new in zip(fresh, anew):
                score = torch.where(new, row, score)
                rows.append(score)
            fresh = torch.cat(rows)
        fresh = fresh.clone()
        fresh[..., own], fresh[..., own + 1 :] = 2.0, -1.0
        count = max(1, round((own + 1) * share))
        best = fresh.sort(dim=-1, descending=True).indices[..., :count]
        out[0, start : start + BLOCK, :, :count] = best.to(torch.int32)
    return out


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k and v as torch likes them best: heads first, and contiguous."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(blocks: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
    tokens = x[0].shape[1]
    seen = torch.zeros(tokens, blocks.shape[2], -(-tokens // BLOCK) + 1, dtype=torch.bool)
    seen.scatter_(2, blocks[0].long() % seen.shape[2], True)  # -1 is a column after the last
    seen = seen[..., torch.arange(tokens) // BLOCK].transpose(0, 1)
    q, k, v = (y.transpose(1, 2) for y in x)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen.tril()[None]).transpose(1, 2)


def learn(run: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)  # type: ignore[operator]
    return o, *torch.autograd.grad(o, leaves, do)


def ours(blocks: torch.Tensor, *x: torch.Tensor, **options: object) -> torch.Tensor:
    return sparse.forward(*x, blocks=blocks, block_size=BLOCK, **options)[0]  # type: ignore[arg-type]


def gates(share: float) -> None:
    x = tensors(GATE)
    for kind in KINDS:
        blocks = lists(kind, GATE, share)
        right = learn(lambda *y, b=blocks: masked(b, *y), *x)
        got = learn(lambda *y, b=blocks: ours(b, *y), *x)
        for name, one, other in zip(("o", "dq", "dk", "dv"), right, got):
            _bench.gate(f"{name} of {kind} lists at {GATE} tokens", one, other)
        q, k, v, _ = x
        last = _blocks.attend(
            q[:, -1:], k, v, blocks[:, -1:], block_size=BLOCK, at=GATE - 1, scale=SIZE**-0.5
        )
        _bench.gate(f"a decoded token of {kind} lists", right[0][:, -1:], last)


def measure(kind: str, share: float, rounds: int) -> dict[str, float]:
    x = tensors(LENGTH)
    first = [y.transpose(1, 2).contiguous() for y in x]
    blocks = lists(kind, LENGTH, share)
    same = BLOCK if kind == "shared" else 1

    def run(*y: torch.Tensor) -> torch.Tensor:
        return ours(blocks, *y, query_block=same)

    with torch.no_grad():
        sides = {"full": lambda: full(*first[:3]), "sparse": lambda: run(*x[:3])}
        found = {f"forward_{n}_s": s for n, s in _bench.in_turns(sides, rounds).items()}
    sides = {"full": lambda: learn(full, *first), "sparse": lambda: learn(run, *x)}
    taken = _bench.in_turns(sides, max(1, rounds // 2))
    found |= {f"training_{n}_s": s for n, s in taken.items()}
    for what in ("forward", "training"):
        found[f"{what}_vs_full"] = found[f"{what}_full_s"] / found[f"{what}_sparse_s"]
    found["pairs"] = float((blocks >= 0).sum()) / blocks.shape[2] * BLOCK / (LENGTH**2 / 2)
    return found


def decode(kind: str, share: float, layers: int, rounds: int) -> dict[str, float]:
    """One token over a cache of 8192 tokens, `layers` caches in turn."""
    q = tensors(1)[0]
    caches = [[torch.randn(1, LENGTH, HEADS, SIZE) for _ in "kv"] for _ in range(layers)]
    blocks = lists(kind, LENGTH, share)[:, -1:].contiguous()

    def steps(run: object) -> None:
        for step in range(24):
            run(*caches[step % layers])  # type: ignore[operator]

    def sparsely(k: torch.Tensor, v: torch.Tensor) -> None:
        _blocks.attend(q, k, v, blocks, block_size=BLOCK, at=LENGTH - 1, scale=SIZE**-0.5)

    def everything(k: torch.Tensor, v: torch.Tensor) -> None:
        shape = (1, HEADS, LENGTH, SIZE)  # a cache of the same numbers of bytes, heads first
        scaled_dot_product_attention(q.transpose(1, 2), k.view(shape), v.view(shape))

    sides = {"full": lambda: steps(everything), "sparse": lambda: steps(sparsely)}
    with torch.no_grad():
        taken = _bench.in_turns(sides, rounds)
    found = {f"{n}_s": s / 24 for n, s in taken.items()}
    return found | {"vs_full": found["full_s"] / found["sparse_s"]}


def peak(tokens: int, share: float) -> None:
    def prepare() -> _bench.Run:
        x, blocks = tensors(tokens), lists("random", tokens, share * LENGTH / tokens)

        def run(*y: torch.Tensor) -> torch.Tensor:
            return ours(blocks[:, : y[0].shape[1]], *y)

        learn(run, *(y[:, :512] for y in x))  # libraries load what they need
        return lambda: learn(run, *x)

    _bench.say_peak(prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.25, help="of all blocks that are listed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    _bench.one_thread()
    if args.peak:
        peak(args.peak, args.share)
        return
    gates(args.share)
    lines, result = [f"T={LENGTH}, {HEADS} heads of {SIZE}, blocks of {BLOCK}, float32"], {}
    for kind in KINDS:
        result[kind] = found = measure(kind, args.share, args.rounds)
        lines.append(
            f"{kind} lists ({found['pairs']:.0%} of the pairs): forward "
            f"{found['forward_sparse_s'] * 1e3:.0f} ms, {found['forward_vs_full']:.2f}x full; "
            f"forward and backward {found['training_sparse_s'] * 1e3:.0f} ms, "
            f"{found['training_vs_full']:.2f}x full"
        )
    for kind in ("random", "heads"):
        for layers in (1, LAYERS):
            found = decode(kind, args.share, layers, args.rounds)
            result[f"decode_{kind}_{layers}"] = found
            lines.append(
                f"one token, {kind} lists, {layers} cache(s) in turn: {found['sparse_s'] * 1e3:.2f}"
                f" ms, {found['vs_full']:.2f}x full"
            )
    peaks = {
        t: _bench.peak_bytes(__file__, "--peak", str(t), "--share", str(args.share)) for t in PEAKS
    }
    result["peak_bytes"] = {f"T{t}": found for t, found in peaks.items()}
    lines.append(
        f"peak memory of forward and backward, {round(LENGTH // BLOCK * args.share)} blocks each: "
        + ", ".join(f"T={t} {found / 2**20:.0f} MiB" for t, found in peaks.items())
    )
    _bench.report(lines, result, args.json)


if __name__ == "__main__":
    main()
