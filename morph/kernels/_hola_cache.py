"""The cache path of HOLA: which tokens a block of queries sees, and attention over them.

Rows are the entries of the state, then the tokens of the call. A row's tokens lie in blocks of
`block` positions; running down the blocks gives the best `cache` rows before each. Then every block
is one tile of queries against the rows it sees and its own tokens, done again in the backward pass,
so that memory is linear in the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Elements of one tile's scores, so that it stays in the CPU's cache
_CPU_ELEMENTS = 1 << 19
_GPU_ELEMENTS = 1 << 26

Found = tuple[torch.Tensor, torch.Tensor | None]
_Set = tuple[torch.Tensor, torch.Tensor]  # scores [B, G, n] and rows [B, G, n] of some tokens


class HolaState(NamedTuple):
    """What is kept after `seen` tokens: s [B, H, K, V], and N entries in the order of positions.

    k [B, N, G, K], v [B, N, G, V], score and at (position among the row's real tokens) [B, N, G].
    N = min(seen, cache_size + block_size, window_size). Void entries come first: zeros, with score
    and position -1. The last ones are the current block's tokens.
    """

    s: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    score: torch.Tensor
    at: torch.Tensor
    seen: int


class Ask(NamedTuple):
    """The options of one call."""

    cache: int
    block: int
    window: int | None
    scale: float
    softcap: float | None
    sink: torch.Tensor | None

    @property
    def most(self) -> int:
        """Entries kept at most."""
        return min(self.cache + self.block, self.window or self.cache + self.block)

    def expired(self, at: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return where positions are void or out of the window of the queries' positions."""
        return at < 0 if self.window is None else (at < 0) | (at <= query - self.window)


class Rows(NamedTuple):
    """The entries of the state, then the tokens of this call.

    k [B, S, G, K], v [B, S, G, V], score and at [B, S, G] (-1 where void, positions int64).
    `before` [B] real tokens before this call, `total` [B] with it; `held` entries of the state, and
    `seen` tokens in all; `even` where no row has padding, so that all rows have the same positions.
    """

    k: torch.Tensor
    v: torch.Tensor
    score: torch.Tensor
    at: torch.Tensor
    before: torch.Tensor
    total: torch.Tensor
    held: int
    seen: int
    even: bool


def gather_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    score: torch.Tensor,
    real: torch.Tensor | None,
    state: HolaState | None,
) -> Rows:
    """Return the rows of a call with k, v, scores [B, T, G] and real [B, P + T] or None."""
    seen, held = (0, 0) if state is None else (state.seen, state.k.shape[1])
    batch, tokens, groups = score.shape
    count = torch.arange(1, seen + tokens + 1, device=k.device).expand(batch, -1)
    if real is not None:
        count = real.cumsum(dim=1)
    at = (count[:, seen:, None] - 1).expand(-1, -1, groups)
    if real is not None:
        gone = ~real[:, seen:, None]
        at, score = at.masked_fill(gone, -1), score.masked_fill(gone, -1.0)
    if state is not None:
        k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        score = torch.cat([state.score.to(score.dtype), score], dim=1)
        at = torch.cat([state.at.long(), at], dim=1)
    before = count[:, seen - 1] if seen else torch.zeros_like(count[:, 0])
    return Rows(k, v, score, at, before, count[:, -1], held, seen + tokens, real is None)


def next_state(s: torch.Tensor, rows: Rows, keep: torch.Tensor | None, ask: Ask) -> HolaState:
    """Return the final state; keep [B, S, G] marks the rows to hold, None all that are in sight."""
    count = min(rows.seen, ask.most)
    fields: tuple[torch.Tensor, ...] = (
        rows.k,
        rows.v,
        rows.score[..., None],
        rows.at[..., None].to(s.dtype),
    )
    if keep is None:
        void = ask.expired(rows.at, rows.total[:, None, None])[:, -count:]
        fields = tuple(x[:, -count:] for x in fields)
    else:
        order = keep.to(torch.uint8).sort(dim=1, stable=True).indices[:, -count:]
        void = ~keep.gather(1, order)
        fields = tuple(
            x.gather(1, order[..., None].expand(*order.shape, x.shape[3])) for x in fields
        )
    k, v = (x.masked_fill(void[..., None], 0.0) for x in fields[:2])
    score, at = (x[..., 0].masked_fill(void, -1.0) for x in fields[2:])
    return HolaState(s, k, v, score, at, rows.seen)


def dense(q: torch.Tensor, rows: Rows, visible: torch.Tensor, ask: Ask) -> torch.Tensor:
    """Return attention of q [B, T, H, K] over the rows by a mask [B, G, T, S], in the dtype of q.

    Every query sees at least its own row, so that no row of the softmax is empty.
    """
    ratio = q.shape[2] // rows.k.shape[2]
    k, v = (x.to(q.dtype).repeat_interleave(ratio, dim=2) for x in (rows.k, rows.v))
    s = torch.einsum("bthk,bshk->bhts", q, k) * ask.scale
    if ask.softcap is not None:
        s = ask.softcap * torch.tanh(s / ask.softcap)
    visible = visible.clone()
    visible[..., rows.held :].diagonal(dim1=-2, dim2=-1).fill_(True)
    s = s.masked_fill(~visible.repeat_interleave(ratio, dim=1), -math.inf)
    if ask.sink is not None:
        s = torch.cat([s, ask.sink.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], dim=-1)
    return torch.einsum("bhts,bshv->bthv", torch.softmax(s, dim=-1)[..., : k.shape[1]], v)


def step(q: torch.Tensor, rows: Rows, ask: Ask, final: bool) -> Found:
    """Return what `tiles` returns for T = 1: the token sees all that is kept, and itself."""
    gone = ask.expired(rows.at, rows.total[:, None, None] - 1)
    o = dense(q.to(rows.score.dtype), rows, ~gone.transpose(1, 2)[:, :, None], ask)
    if not final or (rows.even and rows.seen % ask.block):
        return o, None
    return o, _select(rows, _Grid(rows, ask), ask, True)[2]


def tiles(q: torch.Tensor, rows: Rows, ask: Ask, final: bool) -> Found:
    """Return outputs [B, T, H, V] in float32 at least, and the rows to keep [B, S, G] if final."""
    grid = _Grid(rows, ask)
    index, live, keep = _select(rows, grid, ask, final)
    own = grid.spread(q, 0), grid.spread(rows.k, rows.held), grid.spread(rows.v, rows.held)
    hidden = _hider(rows, grid, index, live, ask)
    o = _Tiles.apply(*own, rows.k, rows.v, ask.sink, index, hidden, ask)
    return grid.collect(o), keep


class _Grid:
    """The rows' tokens in blocks: slot i of block n has position base + n block + i.

    `count` blocks of `size` slots; index [B, count size] is the row in a slot, -1 where none.
    """

    def __init__(self, rows: Rows, ask: Ask) -> None:
        self.rows, tokens = rows, rows.at.shape[1] - rows.held
        old, batch = rows.seen - tokens, len(rows.at)
        self.base = rows.before // ask.block * ask.block  # [B]
        self.front = old % ask.block if rows.even else (ask.block - 1) * (old > 0)
        length = self.front + tokens
        self.count = -(-length // ask.block)
        self.size = ask.block if self.count > 1 else length
        slots = self.count * self.size
        # tokens of the current block are the same rows for every KV head
        at = rows.at[:, :, 0]
        slot = at - self.base[:, None]
        slot = slot.masked_fill((at < 0) | (slot < 0), slots)
        index = slot.new_full((batch, slots + 1), -1)
        source = torch.arange(slot.shape[1], device=slot.device).expand(batch, -1)
        self.index = index.scatter_(1, slot, source)[:, :-1]
        self.slot = slot[:, rows.held :].clamp(max=slots - 1)
        self.lines = torch.arange(batch, device=slot.device)[:, None]

    def spread(self, x: torch.Tensor, held: int) -> torch.Tensor:
        """Return x [B, held + T, ...], the first rows from the state, as [B, count, size, ...]."""
        if self.rows.even:
            tail, slots = min(self.front, held), self.count * self.size
            x = x[:, held - tail :]
            pad = (self.front - tail, slots - self.front + tail - x.shape[1])
            x = F.pad(x, (0, 0, 0, 0, *pad)) if any(pad) else x
        else:
            x = x[self.lines, (self.index - self.rows.held + held).clamp(min=0)]
        return x.unflatten(1, (self.count, self.size))

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens of this call [B, T, ...] from x [B, count, size, ...]."""
        x, tokens = x.flatten(1, 2), self.slot.shape[1]
        return (
            x[:, self.front : self.front + tokens] if self.rows.even else x[self.lines, self.slot]
        )


def _select(
    rows: Rows, grid: _Grid, ask: Ask, final: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the cached rows that every block sees [B, N, G, W], where they are not void, and the
    rows to keep in the end [B, S, G] if asked.
    """
    at = rows.at.transpose(1, 2)
    own = grid.index.clamp(min=0)
    scores = rows.score[grid.lines, own].masked_fill((grid.index < 0)[..., None], -1.0)
    scores = scores.unflatten(1, (grid.count, grid.size)).transpose(2, 3)  # [B, N, G, size]
    own = own.unflatten(1, (grid.count, grid.size))[:, :, None].expand_as(scores)
    old = at[..., : rows.held]
    earlier = (old >= 0) & (old < grid.base[:, None, None])
    score = rows.score[:, : rows.held].transpose(1, 2).masked_fill(~earlier, -1.0)
    sets = [_best(score, torch.arange(rows.held, device=at.device).expand_as(old), ask.cache)]
    for n in range(grid.count if final else grid.count - 1):
        score, index = sets[-1]
        score, index = torch.cat([score, scores[:, n]], -1), torch.cat([index, own[:, n]], -1)
        start = (grid.base + (n + 1) * ask.block)[:, None, None]
        gone = ask.expired(at.gather(-1, index), start)
        sets.append(_best(score.masked_fill(gone, -1.0), index, ask.cache))
    index, live = _stack(sets[: grid.count])
    if not final:
        return index, live, None
    last = (rows.total - grid.base) // ask.block
    ends, held = (x[grid.lines[:, 0], last] for x in _stack(sets))
    keep = torch.zeros_like(at).scatter_add_(-1, ends, held.to(at.dtype)) > 0
    keep = keep | (at >= (grid.base + last * ask.block)[:, None, None])
    keep = keep & ~ask.expired(at, rows.total[:, None, None])
    return index, live, keep.transpose(1, 2)


def _best(
    score: torch.Tensor, index: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` highest scores [B, G, n], the earlier of equals, in the given order."""
    if score.shape[-1] <= count:
        return score, index
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    best = best.sort(dim=-1).values
    return score.gather(-1, best), index.gather(-1, best)


def _stack(sets: list[_Set]) -> _Set:
    width = max(score.shape[-1] for score, _ in sets)
    score = [F.pad(x, (width - x.shape[-1], 0), value=-1.0) for x, _ in sets]
    index = [F.pad(x, (width - x.shape[-1], 0)) for _, x in sets]
    return torch.stack(index, dim=1), torch.stack(score, dim=1) >= 0


def _hider(
    rows: Rows, grid: _Grid, index: torch.Tensor, live: torch.Tensor, ask: Ask
) -> Callable[[slice], torch.Tensor]:
    """Return a function from a span of blocks to what is hidden, [B, n, G, 1, C, W + C]."""
    size, (*_, groups, width) = grid.size, index.shape
    slots = torch.arange(size, device=index.device)
    gap = slots[:, None] - slots
    apart = gap < 0 if ask.window is None else (gap < 0) | (gap >= ask.window)
    void = (grid.index < 0).unflatten(1, (grid.count, size))[:, :, None, None, None]
    # a slot without a token sees itself, so that no row of a softmax is empty
    own = apart | (void & (gap != 0))  # [B, N, 1, 1, C, C]

    def hidden(span: slice) -> torch.Tensor:
        gone = ~live[:, span, :, None, None]
        if ask.window is not None:
            at = rows.at.transpose(1, 2)[:, None].expand(-1, gone.shape[1], -1, -1)
            at = at.gather(-1, index[:, span])[:, :, :, None, None]
            first = torch.arange(grid.count, device=at.device)[span] * ask.block
            query = (grid.base[:, None] + first)[..., None, None, None, None] + slots[:, None]
            gone = gone | ask.expired(at, query)
        gone = gone.expand(-1, -1, -1, -1, size, width)
        return torch.cat([gone, own[:, span].expand(-1, -1, groups, -1, -1, -1)], dim=-1)

    return hidden


class _Tiles(torch.autograd.Function):
    """Softmax attention of blocks of queries, some blocks at a time; tiles are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k_own: torch.Tensor,
        v_own: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sink: torch.Tensor | None,
        index: torch.Tensor,
        hidden: Callable[[slice], torch.Tensor],
        ask: Ask,
    ) -> torch.Tensor:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        batch, count, size, heads, _ = q.shape
        o = q.new_empty(batch, count, size, heads, v.shape[3], dtype=work)
        lse = q.new_empty(batch, count, k.shape[2], heads // k.shape[2], size, dtype=work)
        for span in _spans(q, index):
            queries, keys = _queries(q[:, span], k, work), _keys(k_own, k, index, span, work)
            s, _ = _logits(queries, keys, hidden(span), lse[:, span].shape, ask)
            top = s.amax(dim=-1)
            if sink is not None:
                bias = sink.to(work).view(k.shape[2], -1, 1)
                top = torch.maximum(top, bias)
            p = s.sub_(top[..., None]).exp_()
            total = p.sum(dim=-1)
            if sink is not None:
                total += (bias - top).exp()
            values = _keys(v_own, v, index, span, work)
            out = torch.bmm(p.view(*queries.shape[:2], -1), values)
            out = out.view(*total.shape, -1) / total[..., None]
            o[:, span] = out.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
            lse[:, span] = top + total.log()
        ctx.save_for_backward(q, k_own, v_own, k, v, sink, index, o, lse)
        ctx.hidden, ctx.ask = hidden, ask
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k_own, v_own, k, v, sink, index, o, lse = ctx.saved_tensors
        work, (batch, rows, groups, size), wide = o.dtype, k.shape, v.shape[3]
        dq, dk_own, dv_own = (torch.empty_like(x, dtype=work) for x in (q, k_own, v_own))
        dk, dv = (x.new_zeros(batch * rows * groups, x.shape[3], dtype=work) for x in (k, v))
        dsink = None if sink is None else sink.new_zeros(groups, lse.shape[3], dtype=work)
        lines = torch.arange(batch, device=k.device)[:, None, None, None] * rows
        places = (lines + index) * groups + torch.arange(groups, device=k.device)[:, None]
        width = index.shape[3]
        for span in _spans(q, index):
            queries, keys = _queries(q[:, span], k, work), _keys(k_own, k, index, span, work)
            shape = lse[:, span].shape
            s, slope = _logits(queries, keys, ctx.hidden(span), shape, ctx.ask)
            p = s.sub_(lse[:, span, ..., None]).exp_().view(*queries.shape[:2], -1)
            grad, delta = _queries(do[:, span], k, work), (do[:, span] * o[:, span]).sum(dim=-1)
            delta = delta.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)
            if sink is not None:
                share = (sink.to(work).view(groups, -1, 1) - lse[:, span]).exp()
                dsink -= (share * delta).sum(dim=(0, 1, 4))
            new_v = torch.bmm(p.mT, grad).unflatten(0, shape[:3])
            dp = torch.bmm(grad, _keys(v_own, v, index, span, work).mT)
            ds = dp.sub_(delta.reshape(*queries.shape[:2], 1)).mul_(p).mul_(ctx.ask.scale)
            ds = ds if slope is None else ds.mul_(slope)
            new_q = torch.bmm(ds, keys).view(*shape, size)
            dq[:, span] = new_q.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
            new_k = torch.bmm(ds.mT, queries).unflatten(0, shape[:3])
            at = places[:, span].flatten()
            for new, held, block in ((new_k, dk, dk_own), (new_v, dv, dv_own)):
                held.index_add_(0, at, new[:, :, :, :width].flatten(0, 3))
                block[:, span] = new[:, :, :, width:].transpose(2, 3)
        dk, dv = dk.view(batch, rows, groups, size), dv.view(batch, rows, groups, wide)
        grads = [x.to(q.dtype) for x in (dq, dk_own, dv_own, dk, dv)]
        dsink = None if dsink is None else dsink.flatten().to(sink.dtype)
        return *grads, dsink, None, None, None


def _spans(q: torch.Tensor, index: torch.Tensor) -> list[slice]:
    """Return the spans of blocks that are worked on at once."""
    batch, count, size, heads, _ = q.shape
    each = batch * heads * size * (size + index.shape[3])
    many = max(1, (_CPU_ELEMENTS if q.device.type == "cpu" else _GPU_ELEMENTS) // each)
    return [slice(n, n + many) for n in range(0, count, many)]


def _queries(q: torch.Tensor, k: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    """Return q [B, n, C, H, K] as [B n G, R C, K], R = H / G."""
    q = q.unflatten(3, (k.shape[2], -1)).permute(0, 1, 3, 4, 2, 5)
    return q.to(work).reshape(-1, q.shape[3] * q.shape[4], q.shape[5])


def _keys(
    own: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, span: slice, work: torch.dtype
) -> torch.Tensor:
    """Return the cached and the own keys of some blocks, [B n G, W + C, K]."""
    lines = torch.arange(rows.shape[0], device=rows.device)[:, None, None, None]
    heads = torch.arange(rows.shape[2], device=rows.device)[:, None]
    cached = rows[lines, index[:, span], heads]
    return torch.cat([cached, own[:, span].transpose(2, 3)], dim=3).to(work).flatten(0, 2)


def _logits(
    q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor, shape: torch.Size, ask: Ask
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scores [B, n, G, R, C, W + C], -inf where hidden, and the cap's slope or None."""
    s, slope = torch.bmm(q, k.mT).mul_(ask.scale), None
    if ask.softcap is not None:
        s = s.div_(ask.softcap).tanh_()
        slope = s.square().neg_().add_(1.0)
        s = s.mul_(ask.softcap)
    return s.view(*shape, -1).masked_fill_(hidden, -math.inf), slope
