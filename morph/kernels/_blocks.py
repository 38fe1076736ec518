"""Attention over listed blocks of keys, and the rows and buffers that it works on.

Blocks count the real tokens of a row: a token's position is the number of real tokens before it,
and block c holds the positions [c block_size, (c + 1) block_size). Padding is taken out by moving
the real tokens of a row to its front, so that a padded row is the row alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from morph.kernels import _checks, _triton
from morph.kernels._gathered import gathered

PATHS = ("triton", "gathered")
# Tokens by which a buffer of keys grows, at least
STEP = 256


def room_step(block_size: int) -> int:
    """Return by how many tokens buffers grow: whole blocks, `STEP` tokens at least."""
    return block_size * -(-STEP // block_size)


class Rows(NamedTuple):
    """What padding does to the rows of one call.

    `at` is the position of the first new real token: one int where nothing is padding, else [B].
    `order` [B, T] holds the tokens of every row, real ones first, and `real` [B, T] which of this
    call's tokens are real; both None where nothing is padding.
    """

    at: int | torch.Tensor
    tokens: int
    device: torch.device
    real: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        padding: torch.Tensor | None,
        batch: int,
        past: int,
        tokens: int,
        device: torch.device,
    ) -> Rows:
        """Return the rows of a call of `tokens` tokens after `past`, padding [B, P + T] or None."""
        padding = _checks.some_padding(padding, device)
        if padding is None:
            return cls(past, tokens, device)
        real = padding[:, past:].expand(batch, -1)
        order = (~real).to(torch.uint8).sort(dim=1, stable=True).indices
        at = padding[:, :past].expand(batch, -1).sum(dim=1)
        return cls(at, tokens, device, real, order)

    def front(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, T, ...] with the real tokens of every row first, and zeros after them."""
        if self.order is None:
            return x
        return _rows(x, self.order).masked_fill(~_like(self.held(), x), 0)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [B, T, ...], real tokens first, in the order of the call; padding is zeros."""
        if self.order is None or self.real is None:
            return x
        return _rows(x, self.order.argsort(dim=1)).masked_fill(~_like(self.real, x), 0)

    def held(self) -> torch.Tensor:
        """Return which places of the front order hold a real token, [B or 1, T] bool."""
        places = torch.arange(self.tokens, device=self.device)[None]
        if self.real is None:
            return torch.ones_like(places, dtype=torch.bool)
        return places < self.real.sum(dim=1, keepdim=True)

    def positions(self) -> torch.Tensor:
        """Return the position of every place of the front order, [B or 1, T] int64."""
        return starts(self.at, self.device)[:, None] + torch.arange(self.tokens, device=self.device)

    def counts(self) -> torch.Tensor:
        """Return the real tokens of every row after this call, [B or 1] int64."""
        new = self.tokens if self.real is None else self.real.sum(dim=1)
        return starts(self.at, self.device) + new


def starts(at: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `at`, one position for all rows or one for each, as a tensor [B or 1]."""
    if isinstance(at, torch.Tensor):
        return at.to(device=device, dtype=torch.int64).view(-1)
    return torch.full((1,), at, dtype=torch.int64, device=device)


def append(
    buffer: torch.Tensor | None,
    new: torch.Tensor,
    rows: Rows,
    total: int,
    step: int,
    in_place: bool,
) -> torch.Tensor:
    """Return a buffer [B, room, ...] of what `buffer` holds and, after each row's tokens, `new`.

    new [B, T, ...] is in the front order, zeros in void places; void entries of a buffer are zeros.
    `total` is the tokens of the longest row with the new ones (padding counted), room the next
    multiple of `step`. The buffer itself is written to where it has the room, `in_place` is true
    and nothing records gradients; else a new one is made, through which gradients flow.
    """
    room = -(-total // step) * step
    if buffer is not None:
        buffer = buffer.to(device=new.device, dtype=new.dtype)
    if in_place and buffer is not None and buffer.shape[1] >= room and _writable(buffer):
        if isinstance(rows.at, int):
            buffer[:, rows.at : rows.at + rows.tokens] = new
        else:
            buffer[_lines(new), rows.positions()] = new
        return buffer
    if isinstance(rows.at, int):
        parts = [new] if buffer is None else [buffer[:, : rows.at], new]
        void = new.new_zeros(new.shape[0], room - rows.at - rows.tokens, *new.shape[2:])
        return torch.cat([*parts, void], dim=1)
    held = 0 if buffer is None else buffer.shape[1]
    void = new.new_zeros(new.shape[0], max(0, room - held), *new.shape[2:])
    wide = void if buffer is None else torch.cat([buffer, void], dim=1)
    return wide.index_put((_lines(new), rows.positions()), new)


def _writable(buffer: torch.Tensor) -> bool:
    inference = buffer.is_inference() and not torch.is_inference_mode_enabled()
    return not torch.is_grad_enabled() and not inference


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: int,
    at: int | torch.Tensor = 0,
    query_block: int = 1,
    scale: float,
    softcap: float | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """Return o [B, T, H, V]: softmax attention of every query over the blocks listed for it.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]. index [B or 1, T, J, N], int32 or int64: block
    numbers, -1 for nothing, no block twice; J is 1 (for all heads), G or H. bias [B or 1, T, J, N]
    floating or None is added to the scaled and capped scores of every key of its block; -inf hides
    the block. Query t stands at position at + t (`at` an int, or [B]) and sees the keys of its
    blocks up to its own position; its own block must be listed to be seen, blocks after it never
    are. A query that sees nothing gets zeros. Keys may lie beyond the real ones. `query_block` is a
    promise that queries whose positions have the same position // query_block have the same lists
    and biases. Gradients flow to q, k, v and bias.
    """
    reasons = {name: unsupported(name, q, k, v, index, block_size) for name in PATHS}
    taken = _checks.pick("blocks", path, reasons)
    with torch.autocast(q.device.type, enabled=False):
        if taken == "reference":
            return _reference(q, k, v, index, bias, block_size, at, scale, softcap)
        if taken == "gathered":
            return gathered(
                q, k, v, index, bias, block_size=block_size, at=at, scale=scale, softcap=softcap
            )
        # imported only here, as triton need not be installed
        from morph.kernels._triton_blocks import triton_attend, triton_decode

        listed: dict[str, Any] = {"block_size": block_size, "at": at}
        listed |= {"scale": scale, "softcap": softcap}
        if q.shape[1] == 1 and not _learns(q, k, v, bias):
            return triton_decode(q, k, v, index, bias, **listed)
        return triton_attend(q, k, v, index, bias, query_block=query_block, **listed)


def _learns(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def unsupported(
    path: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    block_size: int,
) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    if path == "triton":
        why = _triton.reason(q)
        if why:
            return why
        from morph.kernels import _triton_blocks

        return _triton_blocks.unsupported(q, k, v, index, block_size)
    return _checks.float_reason(q)


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: int,
    at: int | torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return what `attend` returns by a dense mask, in the dtype of q."""
    (tokens, heads), (size, groups) = q.shape[1:3], k.shape[1:3]
    blocks = -(-size // block_size)
    listed = (index >= 0) & (index < blocks)
    place = index.long().masked_fill(~listed, blocks)  # nothing goes to a block after the last
    none = place.new_zeros(*place.shape[:3], blocks + 1)
    extra = None
    if bias is not None:
        lists = torch.broadcast_shapes(bias.shape, place.shape)
        bias, place, listed = (
            bias.to(q.dtype).expand(lists),
            place.expand(lists),
            listed.expand(lists),
        )
        gone = torch.isneginf(bias)
        listed, bias = listed & ~gone, bias.masked_fill(gone, 0.0)
        none = place.new_zeros(*lists[:3], blocks + 1)
        extra = torch.zeros_like(none, dtype=q.dtype).scatter(-1, place, bias)
    seen = none.bool().scatter(-1, place, listed)
    key = torch.arange(size, device=q.device)
    own = key // block_size
    position = starts(at, q.device)[:, None] + torch.arange(tokens, device=q.device)
    visible = seen[..., own] & (key <= position[..., None, None])  # [B or 1, T, J, S]
    each = heads // visible.shape[2]
    visible = visible.repeat_interleave(each, dim=2).transpose(1, 2)  # [B or 1, H, T, S]
    k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
    s = torch.einsum("bthk,bshk->bhts", q, k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if extra is not None:
        s = s + extra[..., own].repeat_interleave(each, dim=2).transpose(1, 2)
    some = visible.any(dim=-1, keepdim=True)
    s = s.masked_fill(~visible & some, -math.inf)  # a query that sees nothing stays finite
    p = torch.softmax(s, dim=-1).masked_fill(~some, 0.0)
    return torch.einsum("bhts,bshv->bthv", p, v)


def _rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x[_lines(order), order]


def _lines(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0], device=x.device)[:, None]


def _like(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a mask [B, T] with the dimensions of x [B, T, ...]."""
    return mask.view(*mask.shape, *([1] * (x.ndim - 2)))
