"""Summaries of runs of tokens, such as the mean of every block, kept while tokens come.

In the front order of `_blocks.Rows`. A summary is made once, when its last token has come, and is
zeros until then, so that prefill and decoding have the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from morph.kernels import _blocks

# Elements of the tokens that are summed up together, and of one chunk's scores of queries
_CPU_ELEMENTS = 1 << 20
_GPU_ELEMENTS = 1 << 26
# Makes summaries [B, n, G, K] of tokens [B, n, G, K, size]
Make = Callable[[torch.Tensor], torch.Tensor]


class Pool(NamedTuple):
    """Summaries of `size` tokens, one every `stride` tokens; `maxima` is for who makes them."""

    size: int
    stride: int
    maxima: bool = False

    def complete(self, tokens: int) -> int:
        """Return how many summaries end within the first `tokens` tokens."""
        return max(0, (tokens - self.size) // self.stride + 1)

    def each(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what `complete` returns for every number of tokens."""
        count = torch.div(tokens - self.size, self.stride, rounding_mode="floor") + 1
        return count.clamp(min=0)

    def per_block(self, block: int) -> int:
        """Return for how many summaries there is room per block."""
        return -(-block // self.stride)


def most_elements(device: torch.device) -> int:
    """Return how many elements a chunk may have."""
    return _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS


def append(
    held: torch.Tensor | None,
    x: torch.Tensor,
    pool: Pool,
    block: int,
    rows: _blocks.Rows,
    total: int,
    make: Make,
    in_place: bool,
) -> torch.Tensor:
    """Return the summaries [B, room / block * pool.per_block(block), G, K] after this call.

    x [B, room, G, K] has all tokens, `total` is how many there are; summaries are float32, float64
    where x is. `held` is written to where `in_place` is true, it has the room and nothing records
    gradients; what `make` learns gets a gradient, of zeros where no summary is complete.
    """
    length = x.shape[1] // block * pool.per_block(block)
    lacking = length - (0 if held is None else held.shape[1])
    if held is None or lacking > 0:
        work = torch.promote_types(x.dtype, torch.float32)
        void = torch.zeros(x.shape[0], lacking, *x.shape[2:], dtype=work, device=x.device)
        held = void if held is None else torch.cat([held.to(void), void], dim=1)
        in_place = True  # it is nobody else's yet
    learns = torch.is_grad_enabled()
    in_place = in_place and not learns and _owned(held)
    if not isinstance(rows.at, int):
        return _append_rows(held, x, pool, rows, make, in_place)
    first, last = pool.complete(rows.at), pool.complete(total)
    made = []
    if learns and first == last:
        made.append(make(x.new_zeros(x.shape[0], 0, *x.shape[2:], pool.size)))
    for start, stop in _pieces(first, last, x, pool):
        near = x[:, start * pool.stride : (stop - 1) * pool.stride + pool.size]
        new = make(near.unfold(1, pool.size, pool.stride))
        if in_place:
            held[:, start:stop] = new
        else:
            made.append(new)
    return torch.cat([held[:, :first], *made, held[:, last:]], dim=1) if made else held


def _append_rows(
    held: torch.Tensor, x: torch.Tensor, pool: Pool, rows: _blocks.Rows, make: Make, in_place: bool
) -> torch.Tensor:
    """Append where every row stands somewhere else."""
    assert isinstance(rows.at, torch.Tensor)
    line = torch.arange(x.shape[0], device=x.device)[:, None]
    inside = torch.arange(pool.size, device=x.device)
    first, last = pool.each(rows.at), pool.each(rows.counts())
    for start, stop in _pieces(0, -(-rows.tokens // pool.stride), x, pool):
        which = first[:, None] + torch.arange(start, stop, device=x.device)
        done = which < last[:, None]
        where = (which[..., None] * pool.stride + inside).clamp(max=x.shape[1] - 1)
        new = make(x[line[..., None], where].movedim(2, -1))
        new = new.masked_fill(~done[..., None, None], 0.0)
        # what is not done adds zeros to something, what is done goes to a place that is zeros
        put = held.index_put_ if in_place else held.index_put
        held = put((line, which.clamp(max=held.shape[1] - 1)), new, accumulate=True)
    return held


def _owned(x: torch.Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not x.is_inference()


def _pieces(first: int, last: int, x: torch.Tensor, pool: Pool) -> list[tuple[int, int]]:
    each = max(1, most_elements(x.device) // (x[:, :1].numel() * pool.size))
    return [(start, min(start + each, last)) for start in range(first, last, each)]
