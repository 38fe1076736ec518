"""Which blocks the queries of DashAttention read, and the summaries that they choose by.

Everything here is float32 at least, in the front order of `_blocks.Rows`, and counts blocks of a
row's real tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from morph.kernels import _blocks, _pooled, _triton
from morph.kernels._entmax import entmax
from morph.kernels._pooled import most_elements

# Places in the lists that are tried first where nobody knows how many are needed
_FIRST_LISTS = 64


class Ask(NamedTuple):
    """The options of one call; gamma [H] and query [G, K] in the dtype of the routing."""

    query: torch.Tensor
    gamma: torch.Tensor
    alpha: float
    sigma: float
    block: int
    scale: float
    softcap: float | None


def summarise(k: torch.Tensor, ask: Ask) -> torch.Tensor:
    """Return the summaries [B, C, G, K] of keys [B, C, block, G, K], their means for query 0.

    Sums of products and no matrix product, so that a block's summary has the same bits whatever
    number of blocks is done with it.
    """
    k = k.to(ask.query.dtype)
    weight = torch.softmax((k * ask.query).sum(dim=-1, keepdim=True) * ask.scale, dim=2)
    return (weight * k).sum(dim=2)


def append_summaries(
    held: torch.Tensor | None,
    k: torch.Tensor,
    rows: _blocks.Rows,
    total: int,
    ask: Ask,
    in_place: bool,
) -> torch.Tensor:
    """Return the summaries [B, room / block, G, K] after the tokens of this call.

    k [B, room, G, K] holds all keys. A block's summary is made once, when its last token has come;
    until then it is zeros. `held` is written to where `in_place` is true, it has the room and
    nothing records gradients.
    """

    def make(tokens: torch.Tensor) -> torch.Tensor:
        return summarise(tokens.movedim(-1, 2), ask)

    pool = _pooled.Pool(ask.block, ask.block)
    return _pooled.append(held, k, pool, ask.block, rows, total, make, in_place)


def weights(
    q: torch.Tensor, summaries: torch.Tensor, before: torch.Tensor, ask: Ask, exact: bool = False
) -> torch.Tensor:
    """Return the mean routing weights [B, t, G, C] of the query heads of every KV head.

    q [B, t, H, K], summaries [B, C, G, K]; `before` [B or 1, t] counts the blocks that are complete
    and before the query's own: only these take part.
    """
    groups, ratio = summaries.shape[2], q.shape[2] // summaries.shape[2]
    q = q.to(ask.gamma.dtype) * (ask.gamma * ask.scale)[:, None]
    q = q.unflatten(2, (groups, ratio)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    z = torch.matmul(q, summaries.permute(0, 2, 3, 1)).unflatten(2, (-1, ratio))  # [B, G, t, R, C]
    block = torch.arange(summaries.shape[1], device=q.device)
    seen = (block < before[..., None])[:, None, :, None]
    return entmax(z, seen, ask.alpha, exact).mean(dim=3).transpose(1, 2)


def biases(p: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return (log p - the mean of log p over the support) / sigma, and 0 off the support."""
    inside = p > 0
    log = torch.where(inside, p, 1.0).log()
    mean = log.sum(dim=-1, keepdim=True) / inside.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(inside, (log - mean) / sigma, 0.0)


def lists(
    p: torch.Tensor, own: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the blocks that every query reads, its own first, [B, t, G, N], and their biases.

    p [B, t, G, C], own [B or 1, t]. Blocks of the support follow in ascending order, then -1.
    """
    inside = p.detach() > 0
    slot = inside.cumsum(dim=-1).masked_fill_(~inside, 0)
    most = int(slot.amax())
    index = slot.new_full((*p.shape[:3], most + 1), -1)
    index.scatter_(-1, slot, torch.arange(p.shape[3], device=p.device).expand_as(slot))
    index[..., 0] = own[..., None]  # where the scatter left what is in no support
    if math.isinf(sigma):
        return index, None
    routed = index[..., 1:]
    extra = biases(p, sigma).gather(-1, routed.clamp(min=0)).masked_fill(routed < 0, 0.0)
    return index, torch.cat([extra.new_zeros(*extra.shape[:3], 1), extra], dim=-1)


def listed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summaries: torch.Tensor,
    rows: _blocks.Rows,
    total: int,
    ask: Ask,
) -> torch.Tensor:
    """Return the outputs [B, T, H, V]: queries choose, chunk by chunk, and read what they chose.

    No tensor has the size of all queries times all blocks; where gradients are wanted of more than
    one chunk, the choice is made again in the backward pass.
    """
    position = rows.positions()
    outputs = []
    bounds = chunks(q, total, ask.block)
    for start, stop in bounds:
        # of int positions it is known what lies ahead; of others, that it is no more than all
        ahead = rows.at + stop if isinstance(rows.at, int) else total
        some = summaries[:, : max(1, (ahead - 1) // ask.block)]
        part, own = q[:, start:stop], position[:, start:stop] // ask.block
        if torch.is_grad_enabled():
            again = len(bounds) > 1
            index, bias = (
                checkpoint(_choose, part, some, own, ask, use_reentrant=False)
                if again
                else _choose(part, some, own, ask)
            )
        elif _fused(part, some, ask):
            index, bias = _choose_fused(part, some, own, rows.at + start, ask)
        else:
            index, bias = _choose(part, some, own, ask)
        outputs.append(
            _blocks.attend(
                part,
                k[:, :ahead],
                v[:, :ahead],
                index,
                bias,
                block_size=ask.block,
                at=rows.at + start,
                scale=ask.scale,
                softcap=ask.softcap,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def chunks(q: torch.Tensor, total: int, block: int) -> list[tuple[int, int]]:
    """Return the bounds of the chunks of queries whose choices are made together."""
    batch, tokens, heads = q.shape[:3]
    row = batch * heads * max(1, (total - 1) // block)
    each = max(1, most_elements(q.device) // row)
    return [(start, min(start + each, tokens)) for start in range(0, tokens, each)]


def _choose(
    q: torch.Tensor, summaries: torch.Tensor, own: torch.Tensor, ask: Ask
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return lists(weights(q, summaries, own, ask), own, ask.sigma)


def _fused(q: torch.Tensor, summaries: torch.Tensor, ask: Ask) -> bool:
    """Return whether Triton's routing can run; its interpreter is for its own tests alone."""
    if q.device.type == "cpu" or _triton.reason(q):
        return False
    from morph.kernels import _triton_routing  # only here, as triton need not be installed

    return not _triton_routing.unsupported(q, summaries, ask.alpha)


def _choose_fused(
    q: torch.Tensor,
    summaries: torch.Tensor,
    own: torch.Tensor,
    at: int | torch.Tensor,
    ask: Ask,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `_choose` returns, without the scores of all blocks ever standing in memory."""
    from morph.kernels import _triton_routing

    blocks = summaries.shape[1]
    most = min(blocks, _FIRST_LISTS)
    while True:
        index, prior, count = _triton_routing.entmax_route(
            q,
            summaries,
            gamma=ask.gamma,
            alpha=ask.alpha,
            at=at,
            block_size=ask.block,
            scale=ask.scale,
            most=most,
        )
        found = int(count.amax())
        if found <= most:
            break
        most = min(blocks, max(found, 2 * most))
    index, prior = index[..., : max(1, found)], prior[..., : max(1, found)]
    first = own[..., None, None].expand(*index.shape[:3], 1).to(index.dtype)
    index = torch.cat([first, index], dim=-1)
    if math.isinf(ask.sigma):
        return index, None
    bias = biases(prior, ask.sigma)
    return index, torch.cat([bias.new_zeros(*bias.shape[:3], 1), bias], dim=-1)
