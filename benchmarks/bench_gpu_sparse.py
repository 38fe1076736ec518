"""Attention over listed blocks on a GPU, beside SDPA, FlexAttention and NSA.

    python benchmarks/bench_gpu_sparse.py [--seconds 420] [--json out.json]
    python benchmarks/bench_gpu_sparse.py --dry       tiny sizes, torch paths: tries the logic

**No number of this benchmark has been measured yet**: it was written where there was no GPU.

bfloat16, heads of 128, blocks of 64 keys: every block of 128 queries reads the first block, its own
and a random quarter of its past (75 % sparsity). Prefill of 16K to 128K tokens, forward and with
backward, by 32 query heads on 8 KV heads and on 2, beside FlexAttention with the same blocks and,
on 2, NSA of flash-linear-attention; one decoded token at 96K beside SDPA over all keys. The kernels
are first compared with the float64 reference at 1,000 tokens, outputs and gradients: their error
may be twice that of plain torch in bfloat16. A rival is compared with ours on the timed inputs, and
no time is printed for what fails. `roof` is the share of the roofline: the larger of bytes over
bandwidth and operations over the tensor cores' peak; for decode the share of bandwidth. Goals are
printed with the worst that was found. Without CUDA nothing is measured, and that is said.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from morph.kernels import _blocks
from morph.testing import error_ratio

# Bytes per second and dense bfloat16 operations per second, by a word of the device's name
PEAKS = {"H200": (4.07e12, 7.9e14), "H100": (3.35e12, 7.9e14), "A100": (1.94e12, 3.1e14)}
SPARSITY = 0.75
# What a row has, the ratio to reach, and why
GOALS = {
    "forward sdpa": (2.0, "prefill at 75 % sparsity, against full attention"),
    "both sdpa": (2.0, "the same with gradients"),
    "forward flex": (1.0, "never slower than FlexAttention with the same blocks"),
    "forward nsa": (1.0, "never slower than NSA with the same blocks"),
    "decode sdpa": (2.5, "decode; DashAttention reports 1.96 over FlashAttention 3 at 96K"),
    "bandwidth": (0.8, "share of the device's bandwidth in decode"),
}
Run = Callable[..., torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes of a run, and where it runs."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    path: str = "triton"
    heads: tuple[tuple[int, int], ...] = ((32, 8), (32, 2))
    size: int = 128
    block: int = 64
    queries: int = 128
    lengths: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    gate: int = 1000
    past: int = 98_304
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5


DRY = Scale(
    device="cpu",
    dtype=torch.float32,
    path="gathered",
    heads=((4, 2),),
    size=16,
    block=16,
    queries=32,
    lengths=(256,),
    gate=100,
    past=1024,
    batches=(2,),
    repeats=1,
)


def milliseconds(run: Callable[[], Any], scale: Scale) -> float:
    """Return the median milliseconds of a run by the device's own clock, after two to warm up."""
    for _ in range(2):
        run()
    taken = []
    for _ in range(scale.repeats):
        if scale.device == "cpu":
            began = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - began))
            continue
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)


def listed(tokens: int, scale: Scale) -> torch.Tensor:
    """Return the blocks that each block of queries reads, [query blocks, blocks] bool."""
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(0, tokens, scale.queries)[:, None]
    block = torch.arange(-(-tokens // scale.block))[None]
    past, own = block < first // scale.block, block >= first // scale.block
    own = own & (block * scale.block < first + scale.queries)
    order = torch.rand(past.shape, generator=generator).masked_fill(~past, -1.0)
    order[:, 0] = 2.0  # first of all, where it is past
    wanted = (past.sum(dim=1, keepdim=True) * (1 - SPARSITY)).ceil()
    rank = order.argsort(dim=1, descending=True).argsort(dim=1)
    return ((rank < wanted) & past) | own


def index_of(seen: torch.Tensor, tokens: int, scale: Scale) -> torch.Tensor:
    """Return the lists of all tokens, [1, tokens, 1, N] int32, void places last."""
    wide = int(seen.sum(dim=1).max())
    order = seen.int().argsort(dim=1, descending=True, stable=True)[:, :wide]
    order = order.masked_fill(~seen.gather(1, order), -1).int()
    return order.repeat_interleave(scale.queries, dim=0)[None, :tokens, None].to(scale.device)


def inputs(heads: tuple[int, int], tokens: int, scale: Scale, batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator(scale.device).manual_seed(0)

    def random(count: int) -> torch.Tensor:
        size = (batch, tokens, count, scale.size)
        return torch.randn(size, generator=generator, dtype=scale.dtype, device=scale.device)

    return {"q": random(heads[0]), "k": random(heads[1]), "v": random(heads[1])}


def ours(scale: Scale, index: torch.Tensor, path: str | None = None, **x: Any) -> torch.Tensor:
    options = {"block_size": scale.block, "query_block": scale.queries, "scale": scale.size**-0.5}
    return _blocks.attend(index=index, path=path or scale.path, **{**options, **x})


def learned(run: Run, given: dict[str, torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Return a run that gives the output and the gradients of q, k and v."""
    leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
    do = torch.ones_like(given["q"]) / given["q"].shape[3]

    def step() -> list[torch.Tensor]:
        o = run(**leaves)
        return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), do)]

    return step


def gate(scale: Scale) -> str:
    """Return why our kernels are not to be believed, or an empty string."""
    for heads in scale.heads:
        given = inputs(heads, scale.gate, scale)
        index = index_of(listed(scale.gate, scale), scale.gate, scale)
        exact = {n: x.double() for n, x in given.items()}
        runs = (exact, "reference"), (given, "reference"), (given, scale.path)
        found = [learned(functools.partial(ours, scale, index, p), x)() for x, p in runs]
        for name, right, plain, got in zip(("o", "dq", "dk", "dv"), *found):
            bound, error = max(1e-6, 2 * error_ratio(right, plain)), error_ratio(right, got)
            if not error <= bound:
                return f"{name} of {heads} heads is off by {error:.1e}; at most {bound:.1e} may be"
        last = {"q": given["q"][:, -1:], "k": given["k"], "v": given["v"]}
        one = {**last, "at": scale.gate - 1, "index": index[:, -1:], "query_block": 1}
        error = error_ratio(found[0][0][:, -1:], ours(scale, **one))
        if not error <= max(1e-6, 4 * error_ratio(found[0][0], found[1][0])):
            return f"a decoded token of {heads} heads is off by {error:.1e}"
    return ""


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return o.transpose(1, 2)


def flex(seen: torch.Tensor, scale: Scale) -> Run:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    seen = seen.to(scale.device)
    first = torch.arange(len(seen), device=seen.device)[:, None] * scale.queries
    whole = torch.arange(seen.shape[1], device=seen.device)[None] * scale.block < first

    def ordered(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = part[None, None].int()
        order = part.argsort(dim=-1, descending=True, stable=True)
        return part.sum(dim=-1, dtype=torch.int32), order.int()

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:  # asked in blocks that are not whole
        return (j <= i) & seen[i // scale.queries, j // scale.block]

    mask = BlockMask.from_kv_blocks(
        *ordered(seen & ~whole),
        *ordered(seen & whole),
        BLOCK_SIZE=(scale.queries, scale.block),
        mask_mod=mask_mod,
    )
    attend = flex_attention
    if scale.device == "cuda":
        attend = torch.compile(attend, dynamic=False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def nsa(index: torch.Tensor, heads: tuple[int, int], scale: Scale) -> Run | None:
    """Return NSA's attention over chosen blocks, or None where it is missing or cannot."""
    try:
        from fla.ops.nsa.parallel import parallel_nsa
    except ImportError:
        return None
    ratio = heads[0] // heads[1]
    if scale.device != "cuda" or ratio < 16 or ratio & (ratio - 1):
        return None
    blocks = index.long().clamp(min=0).expand(-1, -1, heads[1], -1).contiguous()
    counts = (index >= 0).sum(dim=-1).expand(-1, -1, heads[1]).contiguous()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return parallel_nsa(
            q=q,
            k=k,
            v=v,
            g_slc=q.new_ones(q.shape[:3]),
            block_indices=blocks,
            block_counts=counts,
            block_size=scale.block,
            scale=scale.size**-0.5,
        )

    return run


def roofline(seen: torch.Tensor, given: dict[str, torch.Tensor], scale: Scale) -> float:
    """Return the milliseconds that the bytes and the operations of the forward need at least."""
    moved = sum(x.numel() * x.element_size() for x in (*given.values(), given["q"]))
    pairs = int(seen.sum()) * scale.queries * scale.block
    done = 4 * pairs * given["q"].shape[2] * scale.size
    bandwidth, peak = peaks(scale)
    return 1e3 * max(moved / bandwidth, done / peak)


def peaks(scale: Scale) -> tuple[float, float]:
    name = device_name(scale)
    return next((p for word, p in PEAKS.items() if word in name), (1e12, 1e14))


def device_name(scale: Scale) -> str:
    return torch.cuda.get_device_name() if scale.device == "cuda" else "cpu"


def prefill(scale: Scale, until: float) -> Iterator[dict[str, Any]]:
    for heads in scale.heads:
        for tokens in scale.lengths:
            if time.perf_counter() > until:
                return
            seen, given = listed(tokens, scale), inputs(heads, tokens, scale)
            index = index_of(seen, tokens, scale)
            run = functools.partial(ours, scale, index)
            row: dict[str, Any] = {"heads": heads, "tokens": tokens}
            with torch.no_grad():
                expected = run(**given)
                row["forward ours"] = milliseconds(functools.partial(run, **given), scale)
            row["both ours"] = milliseconds(learned(run, given), scale)
            row["roof"] = roofline(seen, given, scale) / row["forward ours"]
            rivals = {"sdpa": lambda: sdpa, "flex": functools.partial(flex, seen, scale)}
            rivals["nsa"] = functools.partial(nsa, index, heads, scale)
            for name, make in rivals.items():
                try:
                    row |= timed(name, make(), given, expected, scale)
                except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
                    row[f"failed {name}"] = str(error).splitlines()[0][:200]
            yield row


def timed(
    name: str,
    rival: Run | None,
    given: dict[str, torch.Tensor],
    expected: torch.Tensor,
    scale: Scale,
) -> dict[str, float]:
    """Return a rival's times, or how far it is off where it must compute the same and does not."""
    if rival is None:
        return {}
    with torch.no_grad():
        error = error_ratio(expected, rival(**given))
        if name != "sdpa" and not error <= 2e-2:
            return {f"refused {name}": error}
        taken = {f"forward {name}": milliseconds(functools.partial(rival, **given), scale)}
    if scale.device == "cpu" and name == "flex":
        return taken  # has no gradients there
    return {**taken, f"both {name}": milliseconds(learned(rival, given), scale)}


def decode(scale: Scale, until: float) -> Iterator[dict[str, Any]]:
    """Time one token after a long past, whose lists name a quarter of the blocks."""
    for heads in scale.heads:
        for batch in scale.batches:
            if time.perf_counter() > until:
                return
            given = inputs(heads, scale.past, scale, batch)
            given["q"] = given["q"][:, -1:].contiguous()
            blocks = scale.past // scale.block
            wide = int(blocks * (1 - SPARSITY))
            lists = torch.rand(batch, 1, heads[1], blocks - 1).argsort(dim=-1)[..., : wide - 1]
            lists = F.pad(lists, (0, 1), value=blocks - 1).int().to(scale.device)
            options = {"at": scale.past - 1, "query_block": 1}
            one = functools.partial(ours, scale, lists, **given, **options)
            with torch.no_grad():
                row: dict[str, Any] = {"heads": heads, "past": scale.past, "batch": batch}
                row["decode ours"] = milliseconds(one, scale)
                full = functools.partial(sdpa, **given, causal=False)
                row["decode sdpa"] = milliseconds(full, scale)
            kept = 2 * lists.numel() * scale.block * scale.size * given["k"].element_size()
            row["bandwidth"] = kept / peaks(scale)[0] * 1e3 / row["decode ours"]
            yield row


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Return how many times faster ours is, by `kind rival`, and the share of bandwidth."""
    found = {}
    for name, value in row.items():
        kind, _, who = name.partition(" ")
        if kind in ("forward", "both", "decode") and who != "ours":
            found[name] = value / row[f"{kind} ours"]
    return found | {n: row[n] for n in ("bandwidth",) if n in row}


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each goal with the worst that was found of it, and whether that is enough."""
    found = []
    for name, (goal, why) in GOALS.items():
        seen = [r[name] for r in map(ratios, rows) if name in r]
        worst = min(seen, default=None)
        held = None if worst is None else worst >= goal
        found.append({"name": name, "goal": goal, "why": why, "worst": worst, "held": held})
    return found


def shown(row: dict[str, Any]) -> str:
    where = f"{row['heads'][0]} heads on {row['heads'][1]}, "
    if "past" in row:
        where += f"decode at {row['past']}, batch {row['batch']}: {row['decode ours']:.3f} ms"
    else:
        where += f"{row['tokens']} tokens: forward {row['forward ours']:.3f} ms "
        where += f"({row['roof']:.0%} of the roofline), with backward {row['both ours']:.3f} ms"
    parts = [where, *(f"{n} {x:.2f}" for n, x in ratios(row).items())]
    parts += [f"{n}: {x}" for n, x in row.items() if n.startswith(("refused", "failed"))]
    return "; ".join(parts)


def verdict(goal: dict[str, Any]) -> str:
    said = {None: "not measured", True: "pass", False: "miss"}[goal["held"]]
    worst = "" if goal["worst"] is None else f"worst {goal['worst']:.2f}, "
    return f"goal: {goal['name']} >= {goal['goal']} ({goal['why']}): {worst}{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: no benchmark")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing was measured. --dry tries the logic.")
        return
    scale = DRY if args.dry else Scale()
    began, name = time.perf_counter(), device_name(scale)
    print(f"{name}, torch {torch.__version__}; a ratio above 1: ours is faster")
    if args.dry:
        print("a dry run: the times say nothing, and no goal is judged by them")
    why = gate(scale)
    if why:
        print(f"refused: the gate failed, so no speed is reported. {why}", file=sys.stderr)
        raise SystemExit(6)
    rows = []
    for part, share in ((decode, 0.3), (prefill, 1.0)):
        for row in part(scale, began + args.seconds * share):
            rows.append(row)
            print(shown(row), flush=True)
            if scale.device == "cuda":
                torch.cuda.empty_cache()
    goals = [] if args.dry else judged(rows)
    for goal in goals:
        print(verdict(goal))
    if args.json:
        told = {"device": name, "torch": torch.__version__, "dry": args.dry}
        text = json.dumps({**told, "rows": rows, "goals": goals}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
