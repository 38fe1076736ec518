"""Attention of a few queries over listed blocks: the listed keys are read, and nothing else.

Keys of one query are gathered and meet its heads in one product. Values are summed where they lie
(`embedding_bag`) unless query heads share them: then they too are gathered, once for all heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

# Blocks smaller than this share a span of keys
_SPAN = 64
# Query heads that may each read the values of their KV head for themselves
_READERS = 2


class Ask(NamedTuple):
    """The options of one call; `at` has the position of the first query of every row."""

    block_size: int
    at: list[int]
    scale: float
    softcap: float | None

    def spans(self, size: int) -> tuple[int, int, int]:
        """Return blocks in a span, blocks and spans of `size` keys."""
        merged, blocks = max(1, _SPAN // self.block_size), -(-size // self.block_size)
        return merged, blocks, -(-blocks // merged)


class _Near(NamedTuple):
    """What the lists of one query name.

    `keys` [J, L] positions, those hidden replaced by one that is seen where there is one; `hidden`
    [J, L] bool, None where nothing is; `bias` [J, L] or None; `void` [J] marks lists of nothing.
    """

    keys: torch.Tensor
    hidden: torch.Tensor | None
    bias: torch.Tensor | None
    void: torch.Tensor


def few(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    ask: Ask,
) -> torch.Tensor:
    """Return what `_gathered.gathered` returns, one query after the other and without gradients."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, tokens, heads, _), (size, groups) = q.shape, k.shape[1:3]
    o = q.new_zeros(batch, tokens, heads, v.shape[3])
    for row in range(batch):
        keys, values = (x[row].reshape(size * groups, -1) for x in (k, v))
        for token in range(tokens):
            at = ask.at[row] + token
            listed = index[min(row, len(index) - 1), token].long()
            added = None if bias is None else bias[min(row, len(bias) - 1), token].to(work)
            near = _near(listed, added, at, size, ask)
            if near is not None:
                o[row, token] = _one(q[row, token].to(work), keys, values, near, groups, ask)
    return o


def _near(
    listed: torch.Tensor, added: torch.Tensor | None, at: int, size: int, ask: Ask
) -> _Near | None:
    """Return what the lists [J, N] of the query at position `at` name; None: nothing at all."""
    block = ask.block_size
    live = (listed >= 0) & (listed * block <= min(at, size - 1))
    if added is not None:
        live = live & ~torch.isneginf(added)
    some = live.any(dim=0)
    if not bool(some.all()):  # columns that hold nothing for any list are not read
        listed, live = listed[:, some], live[:, some]
        added = None if added is None else added[:, some]
    if not listed.shape[1]:
        return None
    inside = torch.arange(block, device=listed.device)
    keys = (listed[..., None] * block + inside).flatten(1)
    hidden = (keys > at) | ~live.repeat_interleave(block, dim=1)
    seen = listed.masked_fill(~live, -1).amax(dim=1, keepdim=True).clamp_(min=0)
    keys = torch.where(hidden, seen * block, keys)
    if added is not None:
        added = added.masked_fill(~live, 0.0).repeat_interleave(block, dim=1)
    some_hidden = bool(hidden.sum())  # `any` is slow here
    return _Near(keys, hidden if some_hidden else None, added, ~live.any(dim=1))


def _one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near: _Near, groups: int, ask: Ask
) -> torch.Tensor:
    """Return the outputs [H, V] of one query q [H, K] over rows of k [S G, K] and v [S G, V]."""
    lists, shared = len(near.keys), len(near.keys) == 1
    group = torch.arange(lists, device=q.device)[:, None] * groups // lists
    mine = q.mul(ask.scale).unflatten(0, (groups if shared else lists, -1))
    s = torch.bmm(mine, _gather(k, near.keys, group, groups, q.dtype).mT)  # [G or J, ratio, L]
    if ask.softcap is not None:
        s = s.div_(ask.softcap).tanh_().mul_(ask.softcap)
    if near.bias is not None:
        s.add_(near.bias[:, None])
    if near.hidden is not None:
        s.masked_fill_(near.hidden[:, None], -math.inf)
    p = torch.softmax(s, dim=-1)
    if lists > 1:  # a list of nothing beside one of something
        p = p.masked_fill_(near.void[:, None, None], 0.0)
    if len(q) > _READERS * groups or v.dtype != q.dtype:
        return torch.bmm(p, _gather(v, near.keys, group, groups, q.dtype)).flatten(0, 1)
    group = torch.arange(len(q), device=q.device)[:, None] * groups // len(q)
    rows = near.keys if shared else near.keys.repeat_interleave(len(q) // lists, dim=0)
    return F.embedding_bag(rows * groups + group, v, mode="sum", per_sample_weights=p.flatten(0, 1))


def _gather(
    x: torch.Tensor, keys: torch.Tensor, group: torch.Tensor, groups: int, work: torch.dtype
) -> torch.Tensor:
    """Return the rows of x [S G, K] at positions `keys` [J, L] as [G or J, L, K]."""
    lists, count = keys.shape
    if lists == 1:  # all heads of a token lie together
        x = x.view(-1, groups * x.shape[1]).index_select(0, keys[0]).to(work)
        return x.view(count, groups, -1).transpose(0, 1)
    return x.index_select(0, (keys * groups + group).flatten()).to(work).view(lists, count, -1)
