"""Which blocks a query of block_topk reads: summaries of keys, scores of blocks, the best k.

Summaries, per KV head, of rotated keys, float32 at least. "mean" and "max" sum up each block of
`block` tokens by its mean or, element by element, its maximum; "windows" takes the means of `size`
tokens that start every `stride` tokens, whatever blocks they lie in. A summary is made once, when
its last token has come, and a query at position p sees those that end before p: of blocks, the
complete ones before its own, p // block many; of windows, (p - size) // stride + 1.

Scores. z = scale <q, summary>, without a cap, of the summaries that the query sees. Per "head" a
summary's score is z itself, one list for every query head. Per "group" it is the softmax of z over
all summaries the query sees, those of forced blocks among them, summed over the query heads of a KV
head, one list for each of these. A block's score is that of its summary; with "windows" it is the
largest among the windows seen that share a token with it, and where there is none, 0 per group and
minus infinity per head.

Choice. The candidates are the blocks before the query's own, which are all complete. The `initial`
first blocks and the `local` last ones, the query's own among them (so `local` >= 1), are forced;
they count among the `k` blocks that are read in all, hence k >= initial + local. The places left go
to the candidates of the highest scores, the lower block of two that are equal. A query with no more
than k blocks up to its own reads them all. Lists are in ascending order, -1 beyond.

Everything is float32, float64 where q is, in the front order of `_blocks.Rows`; no gradient flows
through the choice. `_triton_routing.topk_route` makes the same lists on a GPU, by its scores "head"
and "group_softmax", where summaries are of blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from morph.kernels import _blocks, _checks, _pooled, _triton
from morph.kernels._pooled import Pool as Pool
from morph.kernels._pooled import most_elements


def windows(block: int) -> Pool:
    """Return the usual windows: half a block, every quarter of it."""
    return Pool(max(1, block // 2), max(1, block // 4))


class Ask(NamedTuple):
    """The options of one call; `pool` is what is chosen by, `by_block` whether it is blocks."""

    k: int
    block: int
    initial: int
    local: int
    heads: bool
    pool: Pool
    by_block: bool
    scale: float
    softcap: float | None


def summarise(x: torch.Tensor, pool: Pool) -> torch.Tensor:
    """Return the summaries [B, n, G, K] of tokens [B, n, G, K, size].

    Means are sums of two halves, again and again, so that a summary has the same bits whatever
    number of them is made with it.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if pool.maxima:
        return x.amax(dim=-1)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        odd = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if odd.shape[-1]:
            x = torch.cat([x, odd], dim=-1)
    return x[..., 0] / pool.size


def append(
    held: torch.Tensor | None,
    x: torch.Tensor,
    pool: Pool,
    block: int,
    rows: _blocks.Rows,
    total: int,
    in_place: bool,
) -> torch.Tensor:
    """Return the summaries [B, room / block * pool.per_block(block), G, K] after this call.

    As `_pooled.append` does, of x [B, room, G, K], all tokens.
    """

    def make(tokens: torch.Tensor) -> torch.Tensor:
        return summarise(tokens, pool)

    return _pooled.append(held, x, pool, block, rows, total, make, in_place)


@torch.no_grad()
def route(
    q: torch.Tensor,
    summaries: torch.Tensor,
    rows: _blocks.Rows,
    total: int,
    ask: Ask,
    plain: bool = False,
) -> torch.Tensor:
    """Return the list of every query [B or 1, T, J, N] int32; J is 1 where all blocks are read.

    q [B, T, H, K], summaries as `append` makes them. `plain` sorts the scores.
    """
    blocks, position = -(-total // ask.block), rows.positions()
    if blocks <= ask.k:
        return _all(position // ask.block, blocks, blocks)
    q, summaries = q.detach(), summaries.detach()
    if ask.by_block and not plain and _by_triton(q, summaries):
        # imported only here, as triton need not be installed
        from morph.kernels._triton_routing import topk_route

        return topk_route(
            q,
            summaries,
            scale=ask.scale,
            at=rows.at,
            block_size=ask.block,
            k=ask.k,
            initial=ask.initial,
            local=ask.local,
            score="head" if ask.heads else "group_softmax",
        )
    lists = q.shape[2] if ask.heads else summaries.shape[2]
    found = []
    for start, stop in chunks(q, total, ask.pool):
        # of int positions it is known what lies ahead; of others, that it is no more than all
        ahead = rows.at + stop if isinstance(rows.at, int) else total
        at, blocks = position[:, start:stop], -(-ahead // ask.block)
        if blocks <= ask.k:
            index = _all(at // ask.block, blocks, ask.k)
        else:
            s = scores(q[:, start:stop], summaries, at, ahead, ask)
            index = best(s, at // ask.block, ask, plain)
        found.append(index.expand(q.shape[0], -1, lists, -1))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _by_triton(q: torch.Tensor, summaries: torch.Tensor) -> bool:
    """Return whether Triton's routing can run; its interpreter is for tests alone."""
    if q.device.type == "cpu":
        return False
    why = _triton.reason(q)
    if not why:
        from morph.kernels import _triton_routing

        why = _triton_routing.unsupported(q, summaries)
    if why:
        _checks.say_once(f"block_topk: not choosing by Triton: {why}")
    return not why


def _all(own: torch.Tensor, blocks: int, wide: int) -> torch.Tensor:
    """Return lists [B or 1, t, 1, wide] of all of `blocks` blocks up to the own one."""
    block = torch.arange(wide, device=own.device, dtype=torch.int32)
    index = block.expand(*own.shape, 1, -1)
    return index.masked_fill((block > own[..., None, None]) | (block >= blocks), -1)


def chunks(q: torch.Tensor, total: int, pool: Pool) -> list[tuple[int, int]]:
    """Return the bounds of the chunks of queries whose scores are made together."""
    batch, tokens, heads = q.shape[:3]
    row = batch * heads * max(1, pool.complete(total))
    each = max(1, most_elements(q.device) // row)
    return [(start, min(start + each, tokens)) for start in range(0, tokens, each)]


def _products(
    q: torch.Tensor, summaries: torch.Tensor, position: torch.Tensor, pool: Pool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z [B, G, t, R, n], and which of it is seen [B or 1, 1, t, 1, n]."""
    groups = summaries.shape[2]
    q = q.to(summaries.dtype) * scale
    ratio = q.shape[2] // groups
    q = q.unflatten(2, (groups, ratio)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    z = torch.matmul(q, summaries.permute(0, 2, 3, 1)).unflatten(2, (-1, ratio))
    unit = torch.arange(summaries.shape[1], device=q.device)
    return z, (unit < pool.each(position)[..., None])[:, None, :, None]


def scores(
    q: torch.Tensor, summaries: torch.Tensor, position: torch.Tensor, ahead: int, ask: Ask
) -> torch.Tensor:
    """Return the scores [B, t, J, C] of the blocks of the first `ahead` tokens."""
    count, blocks = max(1, ask.pool.complete(ahead - 1)), -(-ahead // ask.block)
    z, seen = _products(q, summaries[:, :count], position, ask.pool, ask.scale)
    z = z.masked_fill(~seen, -math.inf)
    if ask.heads:
        s, none = z.transpose(1, 2).flatten(2, 3), -math.inf
    else:
        s = torch.softmax(z, dim=-1).masked_fill(~seen, 0.0).sum(dim=3).transpose(1, 2)
        none = 0.0
    lacking = s.new_full((*s.shape[:3], blocks - count if ask.by_block else 1), none)
    s = torch.cat([s, lacking], dim=-1)
    if ask.by_block:
        return s
    near = overlaps(blocks, count, ask)
    return s[..., near.flatten()].unflatten(-1, near.shape).amax(dim=-1)


def overlaps(blocks: int, count: int, ask: Ask) -> torch.Tensor:
    """Return the windows that share a token with each block, [C, n]; `count` for none."""
    pool, block = ask.pool, torch.arange(blocks)
    first = torch.div(block * ask.block - pool.size, pool.stride, rounding_mode="floor") + 1
    end = -(-(block + 1) * ask.block // pool.stride)  # the first that starts after the block
    wide = int((end - first).max())
    unit = first[:, None] + torch.arange(wide)
    gone = (unit < 0) | (unit >= end[:, None]) | (unit >= count)
    return unit.masked_fill(gone, count)


def best(s: torch.Tensor, own: torch.Tensor, ask: Ask, plain: bool = False) -> torch.Tensor:
    """Return the lists [B, t, J, k] of the forced blocks and the best of the others."""
    block, own = torch.arange(s.shape[3], device=s.device), own[..., None, None]
    visible = block <= own
    s = ranked(s, own, ask)
    if plain:
        order = s.sort(dim=-1, descending=True, stable=True).indices[..., : ask.k]
        take = torch.zeros_like(s, dtype=torch.bool).scatter(-1, order, True)
    else:
        least = s.topk(ask.k, dim=-1).values[..., -1:]
        above, level = s > least, (s == least) & visible
        room = ask.k - above.sum(dim=-1, keepdim=True)
        take = above | (level & (level.cumsum(dim=-1) <= room))
    take = take & visible
    slot = take.cumsum(dim=-1).masked_fill_(~take, 0)
    index = torch.full((*s.shape[:3], ask.k + 1), -1, dtype=torch.int32, device=s.device)
    index.scatter_(-1, slot, block.int().expand_as(slot))
    return index[..., 1:]  # the first place took all that is not listed


def ranked(s: torch.Tensor, own: torch.Tensor, ask: Ask) -> torch.Tensor:
    """Return scores with forced blocks at infinity, and blocks after the own one at its minus."""
    block = torch.arange(s.shape[3], device=s.device)
    forced = (block < ask.initial) | (block > own - ask.local)
    return s.masked_fill(forced, math.inf).masked_fill(block > own, -math.inf)


def compressed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: _blocks.Rows,
    total: int,
    pool: Pool,
    ask: Ask,
) -> torch.Tensor:
    """Return the attention [B, T, H, V] of queries over the windows they see; zeros for none.

    k [B, n, G, K] and v [B, n, G, V] are window means as `append` makes them. Where gradients are
    wanted of more than one chunk of queries, its weights are made again in the backward pass.
    """
    position, outputs = rows.positions(), []
    bounds = chunks(q, total, pool)
    for start, stop in bounds:
        ahead = rows.at + stop if isinstance(rows.at, int) else total
        count = max(1, pool.complete(ahead - 1))
        part = (q[:, start:stop], k[:, :count], v[:, :count], position[:, start:stop], pool, ask)
        if torch.is_grad_enabled() and len(bounds) > 1:
            outputs.append(checkpoint(_compressed, *part, use_reentrant=False))
        else:
            outputs.append(_compressed(*part))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _compressed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor,
    pool: Pool,
    ask: Ask,
) -> torch.Tensor:
    z, seen = _products(q, k, position, pool, ask.scale)
    if ask.softcap is not None:
        z = ask.softcap * torch.tanh(z / ask.softcap)
    some = seen.any(dim=-1, keepdim=True)
    z = z.masked_fill(~seen & some, -math.inf)  # a query that sees nothing stays finite
    p = torch.softmax(z, dim=-1).masked_fill(~some, 0.0)  # [B, G, t, R, n]
    o = torch.matmul(p.flatten(2, 3), v.transpose(1, 2)).unflatten(2, p.shape[2:4])
    return o.transpose(1, 2).flatten(2, 3)
