"""The lists of blocks that tiles of queries read, and the inverse of them, made by torch.

Plain torch on the tensors' own device, which it never waits for: every size is known before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

_TABLE = 1 << 26  # numbers in the tables of the tiles that are worked on together


class Lists(NamedTuple):
    """The blocks that tiles read, [rows, W], rows being (batch, KV heads, tiles) of lists.

    `counts` [rows] of them are used. `places` [rows, W, L] says where the tile's lists name them,
    -1 for nowhere; None where each tile has one list, whose entries are the blocks.
    """

    blocks: torch.Tensor
    counts: torch.Tensor
    places: torch.Tensor | None


class Tiles:
    """The queries of one call in tiles of `size`, a power of two, aligned by position.

    index [B or 1, T, J, N] as in `_blocks.attend`, numbers of at most `blocks` blocks; J is 1,
    `groups`, or a multiple of it. `shared`: all queries of a tile have one list.
    """

    def __init__(
        self,
        index: torch.Tensor,
        groups: int,
        at: int | torch.Tensor,
        size: int,
        *,
        shared: bool,
        blocks: int,
    ) -> None:
        self.index, self.size, self.blocks = index, size, blocks
        self.tokens, lists, self.wide = index.shape[1:]
        # KV heads with lists of their own, and lists of each
        self.apart, self.each = (1, 1) if lists == 1 else (groups, lists // groups)
        self.queries = 1 if shared else size  # of a tile, with lists of their own
        self.names = self.queries * self.each
        self.union = self.wide if self.names == 1 else min(self.names * self.wide, blocks)
        self.at, self.origin = origin_of(at)
        self.shift = self.at % size if self.origin is None else self.origin % size
        spare = self.at % size if self.origin is None else size - 1
        self.count = -(-(self.tokens + spare) // size)

    def chunks(self, more: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (first tile, tiles) so that tables, and `more` numbers per query, stay small."""
        cost = self.union * (self.names + 2) + 4 * self.names * self.wide
        cost = len(self.index) * self.apart * cost + self.size * more
        step = max(1, min(self.count, _TABLE // max(1, cost)))
        for first in range(0, self.count, step):
            yield first, min(step, self.count - first)

    def lists(self, first: int, tiles: int) -> Lists:
        """Return what tiles first, first + 1, ... read."""
        picked = self._picked(first, tiles)
        size = len(picked), tiles, self.queries, self.apart, self.each, self.wide
        picked = picked.view(size).permute(0, 3, 1, 2, 4, 5).reshape(-1, self.names * self.wide)
        if self.names > 1:
            return _union(picked, self.blocks, self.union, self.names)
        ends = torch.arange(1, self.wide + 1, device=picked.device, dtype=torch.int32)
        return Lists(picked, (ends * (picked >= 0)).amax(dim=1), None)

    def _picked(self, first: int, tiles: int) -> torch.Tensor:
        """Return the rows of the index that tiles follow, [B or 1, tiles * queries, J, N]."""
        device, tokens = self.index.device, self.tokens
        t = first * self.size + torch.arange(tiles * self.size, device=device)
        t = t.view(1, -1) - (self.shift if self.origin is None else self.shift[:, None])
        if self.queries < self.size:  # all have the list of the first query that there is
            t = t[:, :: self.size].clamp(min=0)
        inside = t.clamp(0, tokens - 1)
        if self.origin is None:
            picked = self.index[:, inside[0]]
        else:
            where = inside[:, :, None, None].expand(-1, -1, *self.index.shape[2:])
            picked = self.index.gather(1, where)
        picked = picked.masked_fill((t != inside)[:, :, None, None], -1)
        return picked.masked_fill(picked >= self.blocks, -1).int()

    def inverted(self, lists: Lists) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers of all entries by KV head and block, and where each block's begin.

        Block c of the lists of row r, of (batch, KV heads), has entries `order[bounds[i] :
        bounds[i + 1]]` with i = r * blocks + c, in the order of the tiles.
        """
        wide = lists.blocks.shape[1]
        total = len(self.index) * self.apart
        kind = torch.int32 if total * self.blocks < 1 << 31 else torch.int64
        numbers = torch.arange(total, device=lists.blocks.device, dtype=kind) * self.blocks
        keys = lists.blocks.view(total, -1) + numbers[:, None]
        used = torch.arange(wide, device=keys.device) < lists.counts[:, None]
        used = (used & (lists.blocks >= 0)).view(total, -1)
        keys = keys.masked_fill(~used, total * self.blocks).flatten()
        keys, order = keys.sort(stable=True)
        edges = torch.arange(total * self.blocks + 1, device=keys.device, dtype=kind)
        return order.int(), torch.searchsorted(keys, edges, out_int32=True)

    def unaligned(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens that there are of x [B, tokens of all tiles, J, N]."""
        if self.origin is None:
            return x[:, self.shift : self.shift + self.tokens]
        t = torch.arange(self.tokens, device=x.device) + self.shift[:, None]
        return x.gather(1, t[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _union(picked: torch.Tensor, many: int, wide: int, names: int) -> Lists:
    """Return the union of each row's lists, picked [rows, names * N], in ascending order.

    Blocks are below `many`, -1 for nothing; no more than `wide` of them are different.
    """
    rows, total = picked.shape
    picked = picked.masked_fill(picked < 0, many)
    blocks, order = picked.sort(dim=1)
    there = blocks < many
    new = there & (blocks != F.pad(blocks, (1, 0), value=-1)[:, :-1])
    rank = new.cumsum(dim=1)
    counts = rank[:, -1].int()
    # What is no entry of the union goes to one more column, which nothing reads
    union = blocks.new_full((rows, wide + 1), -1)
    union.scatter_(1, (rank - 1).masked_fill(~new, wide), blocks)
    places = blocks.new_full((rows, (wide + 1) * names), -1)
    name, place = order // (total // names), order % (total // names)
    where = ((rank - 1) * names + name).masked_fill(~there, wide * names)
    places.scatter_(1, where, place.int())
    return Lists(union, counts, places)


def origin_of(at: int | torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """Return the position of the first query as (a number, None), or (0, one for each row)."""
    return (0, at.int().contiguous()) if isinstance(at, torch.Tensor) else (int(at), None)
