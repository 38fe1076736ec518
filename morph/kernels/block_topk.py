"""Attention over the blocks whose summaries fit a query best (MoBA, InfLLMv2, NSA).

What it does: every query reads `k_blocks` blocks of `block_size` tokens by softmax: the `initial`
first ones, the `local` last ones, its own (up to itself) among them, and those of the highest
scores, of which `_topk` has the exact words. `summary` is what stands for a block's keys when it is
scored: their "mean", their "max" element by element, or "windows", the means of `pool` tokens every
`pool_stride` tokens, the best of those that touch it. A list is chosen `per` query "head", or per
"group", for all query heads of a KV head. The compressed branch, for which `compress_gate` is
given, is attention over the means of keys and of values of the same windows, those that end before
the query: o = select_gate o_select + compress_gate o_compress. Blocks count the real tokens of a
row, so a padded row is the row alone. With k_blocks as many as the blocks there are, o_select is
full attention.
Cost: 2 T^2 H K / block_size flops to choose (4 times that by windows), 2 T H k_blocks block_size
(K + V) to attend; no tensor of all queries times all blocks, with gradients or without.
State: k and v with room for whole blocks; summaries in float32 (float64 where q is), each made
once, when its last token has come; with the compressed branch the means of windows. A decoded token
reads all summaries, unless it reads all blocks, and the blocks it chose.
Paths: listed (the best by a threshold, lists of blocks, chunks of queries), reference (a sort of
all scores, a dense mask).
Known limits: no gradient through the choice, no second derivatives; scores closer than rounding may
choose differently on different paths and in different splits; the choice knows no score cap.
Reference: Lu et al., MoBA, arXiv 2502.13189; InfLLM-V2, 2509.24663; Yuan et al., NSA, 2502.11089.
Deviations: windows end before the query, where InfLLMv2 and NSA let them end with it; by windows a
block has the best of them, as in InfLLMv2, where NSA adds them up; means of windows, where NSA
learns a small network; NSA's third branch, a window, is `local` of the same softmax; one k and v
for all branches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from morph.kernels import _blocks, _checks, _topk
from morph.kernels._topk import Ask, Pool

PATHS = ("listed",)
SUMMARIES = ("mean", "max", "windows")
# Settings under which the laws of tests/test_kernels.py hold this kernel: like MoBA, InfLLMv2, NSA.
# `example` draws queries anew whose choice a rounding could change.
EXAMPLES: dict[str, dict[str, Any]] = {
    "moba": {"k_blocks": 3, "block_size": 8, "per": "head"},
    "infllm": {"k_blocks": 5, "block_size": 8, "summary": "windows", "initial": 1, "local": 2},
    "nsa": {"k_blocks": 4, "block_size": 6, "initial": 1, "local": 1, "compress": True},
    "max": {"k_blocks": 2, "block_size": 16, "summary": "max"},
}
# How near to each other the last score that is in and the first that is out are never in examples
_MARGIN = 1e-4


class BlockTopkState(NamedTuple):
    """What is kept after `seen` tokens, padding counted, real ones first.

    k [B, room, G, K], v [B, room, G, V], room the next multiple of `_blocks.room_step(block_size)`;
    summaries [B, n, G, K] of the keys, for each block of room one, or ceil(block_size / stride)
    windows; k_windows and v_windows so many means for the compressed branch, None without one, and
    k_windows None too where the summaries are the same. Void entries are zeros.
    """

    k: torch.Tensor
    v: torch.Tensor
    summaries: torch.Tensor
    k_windows: torch.Tensor | None
    v_windows: torch.Tensor | None
    seen: int


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    k_blocks: int,
    block_size: int,
    initial: int = 0,
    local: int = 1,
    summary: str = "mean",
    per: str = "group",
    pool: int | None = None,
    pool_stride: int | None = None,
    select_gate: torch.Tensor | None = None,
    compress_gate: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: BlockTopkState | None = None,
    output_final_state: bool = False,
    in_place: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, BlockTopkState | None]:
    """Return (o [B, T, H, V], final state or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype.
    select_gate (None: 1) and compress_gate (None: no such branch) [B, T, H], any floating dtype.
    k_blocks >= initial + local, local >= 1. pool and pool_stride default to half and a quarter of a
    block, 1 at least. scale defaults to K ** -0.5, of the choice too. padding [B, P + T] bool, True
    for real tokens, over the P tokens of `initial_state` and the T new ones; None: all real. Rows
    of padding come out as zeros. `in_place` lets it write into the tensors of `initial_state` where
    no gradient is recorded. `path` demands a path by name. Raises ValueError with the sizes where
    they do not fit, KernelUnavailable where a demanded path cannot run.
    """
    state, usual = initial_state, _topk.windows(max(block_size, 1))
    pools = Pool(pool or usual.size, pool_stride or usual.stride)
    _check(q, k, v, select_gate, compress_gate, padding)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_numbers(k_blocks, block_size, initial, local, summary, per, pool, pool_stride, softcap)
    by_block = summary != "windows"
    chosen = Pool(block_size, block_size, summary == "max") if by_block else pools
    ask = Ask(k_blocks, block_size, initial, local, per == "head", chosen, by_block, scale, softcap)
    _check_state(q, v, state, ask, pools, compress_gate is not None)
    plain = _checks.pick("block_topk", path, {n: unsupported(n, q) for n in PATHS}) == "reference"
    past, tokens = 0 if state is None else state.seen, q.shape[1]
    total, in_place = past + tokens, in_place and not torch.is_grad_enabled()
    with torch.autocast(q.device.type, enabled=False):
        rows = _blocks.Rows.of(padding, q.shape[0], past, tokens, q.device)
        after = _append(state, k, v, rows, total, ask, pools, compress_gate is not None, in_place)
        q = rows.front(q)
        o = rows.back(_selected(q, after, rows, total, ask, plain))
        if select_gate is not None:
            o = o.to(after.summaries.dtype) * select_gate[..., None]
        if compress_gate is not None:
            o = o + compress_gate[..., None] * rows.back(
                _compressed(q, after, rows, total, pools, ask, plain)
            )
    return o.to(q.dtype), after if output_final_state else None


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, BlockTopkState | None]:
    """Return what `forward` returns, slowly, in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(path: str, q: torch.Tensor, *args: Any, **options: Any) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    return _checks.float_reason(q)


def _append(
    state: BlockTopkState | None,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: _blocks.Rows,
    total: int,
    ask: Ask,
    pools: Pool,
    compress: bool,
    in_place: bool,
) -> BlockTopkState:
    held = BlockTopkState(None, None, None, None, None, 0) if state is None else state  # type: ignore[arg-type]
    step, block = _blocks.room_step(ask.block), ask.block
    k, v = (
        _blocks.append(old, rows.front(new), rows, total, step, in_place)
        for old, new in ((held.k, k), (held.v, v))
    )
    both = compress and not ask.by_block  # the branch reads what is chosen by
    with torch.set_grad_enabled(torch.is_grad_enabled() and both):
        summaries = _topk.append(held.summaries, k, ask.pool, block, rows, total, in_place)
    k_windows = v_windows = None
    if compress:
        if not both:
            k_windows = _topk.append(held.k_windows, k, pools, block, rows, total, in_place)
        v_windows = _topk.append(held.v_windows, v, pools, block, rows, total, in_place)
    return BlockTopkState(k, v, summaries, k_windows, v_windows, total)


def _selected(
    q: torch.Tensor, held: BlockTopkState, rows: _blocks.Rows, total: int, ask: Ask, plain: bool
) -> torch.Tensor:
    index = _topk.route(q, held.summaries, rows, total, ask, plain)
    return _blocks.attend(
        q,
        held.k,
        held.v,
        index,
        block_size=ask.block,
        at=rows.at,
        query_block=ask.block if total <= ask.k * ask.block else 1,
        scale=ask.scale,
        softcap=ask.softcap,
        path="reference" if plain else None,
    )


def _compressed(
    q: torch.Tensor,
    held: BlockTopkState,
    rows: _blocks.Rows,
    total: int,
    pools: Pool,
    ask: Ask,
    plain: bool,
) -> torch.Tensor:
    k = held.summaries if held.k_windows is None else held.k_windows
    v = held.v_windows
    assert v is not None
    if plain:
        k, v = k.to(q.dtype), v.to(q.dtype)
    return _topk.compressed(q, k, v, rows, total, pools, ask)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    select_gate: torch.Tensor | None,
    compress_gate: torch.Tensor | None,
    padding: torch.Tensor | None,
) -> None:
    _checks.check_qkv(q, k, v, padding, None)
    for name, gate in (("select_gate", select_gate), ("compress_gate", compress_gate)):
        if gate is not None and (gate.shape != q.shape[:3] or not gate.is_floating_point()):
            raise ValueError(
                f"{name} must be floating, {list(q.shape[:3])}; got {gate.dtype} "
                f"{list(gate.shape)}."
            )


def _check_numbers(
    k_blocks: int,
    block_size: int,
    initial: int,
    local: int,
    summary: str,
    per: str,
    pool: int | None,
    pool_stride: int | None,
    softcap: float | None,
) -> None:
    wanted = {"block_size": (block_size, 1), "initial": (initial, 0), "local": (local, 1)}
    wanted |= {"pool": (pool or 1, 1), "pool_stride": (pool_stride or 1, 1)}
    for name, (value, least) in wanted.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more.")
    if pool == 0 or pool_stride == 0:
        raise ValueError(f"pool and pool_stride must be 1 or more; got {pool} and {pool_stride}.")
    if k_blocks < initial + local:
        raise ValueError(
            f"k_blocks is {k_blocks}; the {initial} initial and {local} local blocks count among "
            f"them, so it must be {initial + local} or more."
        )
    if summary not in SUMMARIES:
        raise ValueError(f"summary is {summary!r}; it must be one of {', '.join(SUMMARIES)}.")
    if per not in ("head", "group"):
        raise ValueError(f"per is {per!r}; it must be head or group.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for no cap.")


def _check_state(
    q: torch.Tensor,
    v: torch.Tensor,
    state: BlockTopkState | None,
    ask: Ask,
    pools: Pool,
    compress: bool,
) -> None:
    if state is None:
        return
    step = _blocks.room_step(ask.block)
    room = -(-state.seen // step) * step
    batch, size, (groups, wide) = q.shape[0], q.shape[3], v.shape[2:]
    blocks = room // ask.block
    chosen, windows = (blocks * p.per_block(ask.block) for p in (ask.pool, pools))
    wants: dict[str, list[int] | None] = {
        "k": [batch, room, groups, size],
        "v": [batch, room, groups, wide],
        "summaries": [batch, chosen, groups, size],
        "k_windows": [batch, windows, groups, size] if compress and ask.by_block else None,
        "v_windows": [batch, windows, groups, wide] if compress else None,
    }
    for name, want in wants.items():
        held = getattr(state, name)
        got = None if held is None else list(held.shape)
        if got != want:
            raise ValueError(
                f"initial_state.{name} must be {want} after {state.seen} tokens with block_size "
                f"{ask.block}; got {got}."
            )


def example(
    *,
    B: int,
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    compress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through.

    No query's choice is so near that rounding decides. Without options 4 blocks of 16 are read.
    """
    options = {"k_blocks": 4, "block_size": 16, **options}
    shapes: dict[str, tuple[int, ...]] = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    if compress:
        shapes |= {"select_gate": (B, T, H), "compress_gate": (B, T, H)}
    wide = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    for _ in range(1000):
        near = _near(wide["q"], wide["k"], **options)
        if not near.any():
            break
        fresh = torch.randn(shapes["q"], generator=generator, dtype=torch.float64)
        wide["q"] = torch.where(near[..., None, None], fresh, wide["q"])
    return {**{n: x.to(dtype) for n, x in wide.items()}, **options}


def _near(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    k_blocks: int,
    block_size: int,
    initial: int = 0,
    local: int = 1,
    summary: str = "mean",
    per: str = "group",
    **_: Any,
) -> torch.Tensor:
    """Return which queries [B, T] have two scores at the border of the choice that nearly tie.

    Of scores that are equal, being those of one window, the choice is sure.
    """
    tokens, by_block = q.shape[1], summary != "windows"
    if -(-tokens // block_size) <= k_blocks:
        return torch.zeros(q.shape[:2], dtype=torch.bool)
    pool = Pool(block_size, block_size, summary == "max") if by_block else _topk.windows(block_size)
    scale = q.shape[3] ** -0.5
    ask = Ask(k_blocks, block_size, initial, local, per == "head", pool, by_block, scale, None)
    rows = _blocks.Rows.of(None, q.shape[0], 0, tokens, q.device)
    keys = _blocks.append(None, k, rows, tokens, block_size, False)
    held = _topk.append(None, keys, pool, block_size, rows, tokens, True)
    position = rows.positions()
    s = _topk.scores(q, held, position, tokens, ask)
    s = _topk.ranked(s, (position // block_size)[..., None, None], ask)
    last, out = s.topk(k_blocks + 1, dim=-1).values[..., -2:].unbind(dim=-1)
    size = torch.maximum(last.abs(), out.abs()) if per == "group" else torch.ones_like(last)
    gap = last - out
    return ((gap > 0) & (gap < _MARGIN * size)).any(dim=-1)


def flops(
    *, B: int, T: int, H: int, K: int, V: int, k_blocks: int, block_size: int, **_: Any
) -> int:
    """Return the floating-point operations of a forward without the compressed branch."""
    choose = B * H * T * (T // block_size) * K
    return choose + 2 * B * T * H * min(k_blocks * block_size, T) * (K + V)


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v in, o out."""
    return itemsize * B * T * (H + G) * (K + V)
