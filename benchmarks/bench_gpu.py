"""The Triton kernels on a GPU beside flash-linear-attention, FlexAttention and SDPA.

    python benchmarks/bench_gpu.py [--seconds 420] [--json out.json]

bfloat16, one sequence, 16 and 32 heads of 128, 2K to 128K tokens; forward, forward and backward,
and one decoded token. Each operator is first compared with the float64 recurrence at 1,000 tokens
(error at most twice that of plain torch in bfloat16); a rival is compared with ours on the timed
inputs. No time is printed for what fails. `roof` is the share of the roofline: the larger of bytes
over bandwidth and operations over the tensor cores' peak. Decode shows its share of bandwidth.
Goals: never slower than flash-linear-attention, the window at least 0.75 of the best window kernel
present, decode at least 80 % of bandwidth. Stops starting new rows when the seconds are spent.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from morph import registry
from morph.kernels import _fla
from morph.testing import error_ratio

# Bytes per second and dense bfloat16 operations per second, by a word of the device's name
PEAKS = {"H200": (4.07e12, 7.9e14), "H100": (3.35e12, 7.9e14), "A100": (1.94e12, 3.1e14)}
SIZE, HEADS, LENGTHS = 128, (16, 32), (2048, 8192, 32768, 131072)
WINDOW, SINKS = 2048, 4
Run = Callable[..., Any]


def milliseconds(run: Callable[[], Any], budget: float = 0.3) -> float:
    """Return the median milliseconds of a run by the GPU's own clock, after two to warm up."""
    for _ in range(2):
        run()
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 5 or (len(taken) < 50 and time.perf_counter() - began < budget):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)


def settings(op: str) -> dict[str, Any]:
    return {"window_size": WINDOW, "num_sinks": SINKS} if op == "sliding" else {}


def inputs(op: str, heads: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    made = registry.load("kernels", op).example(
        B=1,
        T=tokens,
        H=heads,
        G=heads,
        K=SIZE,
        V=SIZE,
        dtype=dtype,
        generator=generator,
        **settings(op),
    )
    return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in made.items()}


def gate(op: str) -> str:
    """Return why the Triton path of `op` is not to be believed, or an empty string."""
    module, rough = registry.load("kernels", op), inputs(op, 4, 1000)
    exact = {n: _double(x) for n, x in rough.items()}
    right, _ = module.reference(**exact)
    plain, _ = module.reference(**rough)
    got, _ = module.forward(**rough, path="triton")
    bound, found = 2 * error_ratio(right, plain), error_ratio(right, got)
    return "" if found <= bound else f"error {found:.1e}, twice plain torch is {bound:.1e}"


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def rivals(op: str) -> dict[str, Run]:
    """Return the other kernels that compute `op`, as functions of the same inputs."""
    found: dict[str, Run] = {"sdpa": _sdpa}
    if op == "sliding":
        found["flex"] = _flex()
        return found
    if not _fla.missing():
        found["fla"] = lambda **x: _fla.run(op, **x)[0]
    return found


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _flex() -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend, masks = torch.compile(flex_attention, dynamic=False), {}

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((i - j < WINDOW) | (j < SINKS))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        tokens = q.shape[1]
        if tokens not in masks:
            masks[tokens] = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=masks[tokens]).transpose(1, 2)

    return run


def roofline(op: str, heads: int, tokens: int) -> float:
    """Return the milliseconds that bytes and operations need at least."""
    module = registry.load("kernels", op)
    shape = {"B": 1, "T": tokens, "H": heads, "G": heads, "K": SIZE, "V": SIZE}
    moved = module.bytes(**shape, itemsize=2, **settings(op))
    done = module.flops(**shape, **settings(op))
    bandwidth, peak = peaks()
    return 1e3 * max(moved / bandwidth, done / peak)


def peaks() -> tuple[float, float]:
    name = torch.cuda.get_device_name()
    return next((p for word, p in PEAKS.items() if word in name), (1e12, 1e14))


def train(run: Run, given: dict[str, Any]) -> Callable[[], Any]:
    leaves = {
        n: x.detach().requires_grad_()
        for n, x in given.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    used = [x for n, x in leaves.items() if run is not _sdpa or n in ("q", "k", "v")]
    do = torch.randn_like(given["v"])

    def step() -> Any:
        o = run(**{**given, **leaves})
        return torch.autograd.grad(o, used, do, allow_unused=True)

    return step


def rows(op: str, until: float) -> Iterator[dict[str, Any]]:
    module, others = registry.load("kernels", op), rivals(op)

    def ours(**x: Any) -> torch.Tensor:
        return module.forward(**x, path="triton")[0]

    for heads in HEADS:
        for tokens in LENGTHS:
            if time.perf_counter() > until:
                return
            given = inputs(op, heads, tokens)
            row: dict[str, Any] = {"op": op, "heads": heads, "tokens": tokens}
            with torch.no_grad():
                expected = ours(**given)
                row["forward ours"] = milliseconds(functools.partial(ours, **given))
            row["roof"] = roofline(op, heads, tokens) / row["forward ours"]
            row["both ours"] = milliseconds(train(ours, given))
            for name, other in others.items():
                try:
                    with torch.no_grad():
                        got = other(**given)
                        if name != "sdpa" and error_ratio(expected, got) > 2e-2:
                            row[f"refused {name}"] = error_ratio(expected, got)
                            continue
                        row[f"forward {name}"] = milliseconds(functools.partial(other, **given))
                    row[f"both {name}"] = milliseconds(train(other, given))
                except (RuntimeError, NotImplementedError, AssertionError) as error:
                    row[f"failed {name}"] = str(error).splitlines()[0][:200]
            yield row


def decode(op: str) -> Iterator[dict[str, Any]]:
    """Time one new token after a long past: bytes that must move over bandwidth."""
    module = registry.load("kernels", op)
    for batch in (1, 32):
        past = inputs(op, 32, 8192)
        _, state = module.forward(**past, path="triton", output_final_state=True)
        state = _wider(state, batch)
        one = {n: _first(x, batch) for n, x in past.items()}
        step = functools.partial(module.forward, **one, path="triton", initial_state=state)
        recurrent = isinstance(state, torch.Tensor)
        with torch.no_grad():  # a window's new state is a copy that a ring buffer would not make
            taken = milliseconds(functools.partial(step, output_final_state=recurrent))
        held = state if recurrent else torch.cat([state.k, state.v], dim=-1)
        moved = held.numel() * held.element_size() * (2 if recurrent else 1)
        share = moved / peaks()[0] * 1e3 / taken
        yield {"op": op, "decode batch": batch, "ms": taken, "bandwidth": share}


def _first(x: Any, batch: int) -> Any:
    if not isinstance(x, torch.Tensor) or x.ndim < 3:
        return x
    return x[:, :1].expand(batch, *x[:, :1].shape[1:]).contiguous()


def _wider(state: Any, batch: int) -> Any:
    if isinstance(state, torch.Tensor):
        return state.expand(batch, *state.shape[1:]).contiguous()
    k, v = (x.expand(batch, *x.shape[1:]).contiguous() for x in (state.k, state.v))
    return state._replace(k=k, v=v)


def shown(row: dict[str, Any]) -> str:
    if "decode batch" in row:
        return (
            f"{row['op']:12} decode, batch {row['decode batch']}: {row['ms']:.3f} ms, "
            f"{row['bandwidth']:.0%} of bandwidth"
        )
    parts = [f"{row['op']:12} {row['heads']} x {SIZE}, {row['tokens']:6} tokens:"]
    parts.append(f"forward {row['forward ours']:.3f} ms ({row['roof']:.0%} of the roofline),")
    parts.append(f"with backward {row['both ours']:.3f} ms")
    for name in ("fla", "flex", "sdpa"):
        for kind in ("forward", "both"):
            if f"{kind} {name}" in row:
                ratio = row[f"{kind} {name}"] / row[f"{kind} ours"]
                parts.append(f"; {kind} {ratio:.2f}x {name}")
        for kind in ("refused", "failed"):
            if f"{kind} {name}" in row:
                parts.append(f"; {name} {kind}: {row[f'{kind} {name}']}")
    return " ".join(parts).replace(" ;", ";")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible: there is nothing to measure.")
    began, ops, found, bad = time.perf_counter(), ("decay", "gated_delta", "sliding"), [], False
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; a ratio above 1: ours is faster")
    for i, op in enumerate(ops):
        why = gate(op)
        if why:
            print(f"{op}: refused, no speed is reported: {why}", file=sys.stderr)
            bad = True
            continue
        until = began + args.seconds * (i + 1) / len(ops)
        for row in [*decode(op)]:
            found.append(row)
            print(shown(row), flush=True)
        for row in rows(op, until):
            found.append(row)
            print(shown(row), flush=True)
            torch.cuda.empty_cache()
    if args.json:
        told = {"device": name, "torch": torch.__version__, "rows": found}
        Path(args.json).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if bad:
        raise SystemExit(6)


if __name__ == "__main__":
    main()
