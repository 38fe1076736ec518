"""Lists of blocks that never change: a window, the first blocks, and random ones in between.

What is random here is a hash of (seed, layer, head, query block), worked out in integers that no
device rounds or overflows: a checkpoint means the same for ever and everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF  # hashes are 32 bits, in int64
_STEP = 0x9E3779B9  # 2^32 over the golden ratio: so that zeros do not hash to zero
_NEVER = 2**62


def block_lists(
    blocks: range,
    *,
    window: int,
    initial: int,
    random: int,
    seed: int,
    layer: int,
    heads: Sequence[int],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return the lists [C, J, N] int64 of the query blocks in `blocks`, for each of J `heads`.

    Query block c lists blocks 0 to `initial` - 1, `random` of those between them and the window,
    and the `window` blocks up to c, each once and in that order, which is ascending; -1 stands for
    a block that is not there. Where no more than `random` lie between, all are listed.
    """
    window = min(window, blocks.stop)
    initial = min(initial, blocks.stop - window)
    random = min(random, blocks.stop - window - initial)
    c = torch.arange(blocks.start, blocks.stop, device=device)[:, None]
    near = c - torch.arange(window - 1, -1, -1, device=device)  # [C, window]
    first = torch.arange(initial, device=device).expand(len(blocks), -1)
    first = first.masked_fill(first > c - window, -1)
    far = random_blocks(c[:, 0], window, initial, random, seed, layer, heads)
    parts = [x[:, None].expand(-1, len(heads), -1) for x in (first, near.clamp(min=-1))]
    return torch.cat([parts[0], far, parts[1]], dim=-1)


def random_blocks(
    blocks: torch.Tensor,
    window: int,
    initial: int,
    random: int,
    seed: int,
    layer: int,
    heads: Sequence[int],
) -> torch.Tensor:
    """Return [C, J, random] int64: blocks drawn for each of the query `blocks` [C] and `heads`.

    They are distinct, ascending and uniform over the blocks from `initial` up to the window; where
    those are fewer than `random`, all of them, and then -1. By Floyd's algorithm: draw i is below
    room - random + i, and one drawn before gives way to the last that it could have been.
    """
    room = (blocks - window + 1 - initial)[:, None].expand(-1, len(heads))  # [C, J]
    places = torch.arange(random, device=blocks.device).expand(*room.shape, -1)
    found = torch.where(places < room[..., None], places, _NEVER)  # all, where they fit
    if random and (room > random).any():
        heads_at = torch.tensor(list(heads), device=blocks.device)
        state = _hash(_hash(_hash(_hash(0, seed), layer), heads_at), blocks[:, None])  # [C, J]
        drawn = torch.empty_like(found)
        for i in range(random):
            last = (room - random + i).clamp(min=0)
            one = _hash(state, i) * (last + 1) >> 32  # 0 to last
            twice = (drawn[..., :i] == one[..., None]).any(dim=-1)
            drawn[..., i] = torch.where(twice, last, one)
        found = torch.where((room > random)[..., None], drawn.sort(dim=-1).values, found)
    return torch.where(found < _NEVER, found + initial, -1)


def _hash(state: torch.Tensor | int, value: torch.Tensor | int) -> torch.Tensor | int:
    """Return 32 bits of `state` (32 bits) and `value` (0 to 2^32 - 1); MurmurHash3's last step."""
    x = ((state ^ value) + _STEP) & _WORD
    x = _times(x ^ (x >> 16), 0x85EBCA6B)
    x = _times(x ^ (x >> 13), 0xC2B2AE35)
    return x ^ (x >> 16)


def _times(x: torch.Tensor | int, factor: int) -> torch.Tensor | int:
    """Return x times `factor` modulo 2^32, by halves, so that no product outgrows int64."""
    return ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & _WORD
