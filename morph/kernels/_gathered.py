"""Attention over listed blocks in plain torch, with memory linear in the number of tokens.

Many queries: a tile of queries walks over spans of keys, and the queries of the tile that list a
span meet it in one matrix product, however scattered they are; lists are inverted per tile, so
nothing of the size of all pairs exists. Small blocks share a span, in which what is not listed is
hidden. Sums are kept against a fixed reference score per query, moved only where a score exceeds
it by far, so that a span adds to a query's sum and seldom rescales it. The backward pass makes the
weights again from the saved log of the sums. Few queries go to `_gathered_few`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from morph.kernels._gathered_few import Ask, few

# Elements of a tile's queries and scores: larger tiles take fewer steps, smaller ones less memory
_CPU_ELEMENTS = 1 << 20
_GPU_ELEMENTS = 1 << 24
# Entries of a tile's inverted lists
_ENTRIES = 1 << 21
# How far a score may be from its reference: exp(60) times 1e8 keys does not overflow float32
_SLACK = 60.0
# A span's own cost, in elements that could have been gathered instead
_SPAN_COST = 1 << 16


class _Unit(NamedTuple):
    """Heads of one row that share a list: `groups` KV heads of `ratio` query heads each."""

    row: int
    list: int
    heads: slice
    keys: slice
    groups: int
    ratio: int

    def fold(self, x: torch.Tensor, tile: slice, work: torch.dtype) -> torch.Tensor:
        """Return x [B, T, H, K] of this unit's heads and tile as [groups, n, ratio * K]."""
        x = x[self.row, tile, self.heads].to(work)
        x = x.unflatten(1, (self.groups, self.ratio)).transpose(0, 1)
        return x.contiguous().flatten(2)  # picking rows is slow where they are strided


class _Span(NamedTuple):
    """Keys `own` and the queries of a tile that list one of their blocks, in order.

    `rows` [n]; the first `early` of them do not see all of the span, `cut` [early, 1, keys] says
    which keys they miss. `slots` [n, blocks] is the place of each block in the query's list, -1
    where it is not listed; None where all are and nobody asks for their places.
    """

    rows: torch.Tensor
    own: slice
    early: int
    cut: torch.Tensor | None
    slots: torch.Tensor | None


def gathered(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    block_size: int,
    at: int | torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return what `_blocks.attend` returns; sums run in float32, in float64 where q is float64."""
    batch, tokens, _, size = q.shape
    starts = [at] * batch if isinstance(at, int) else at.tolist()
    ask = Ask(block_size, starts * (batch // len(starts)), scale, softcap)
    lists = index.shape[2]
    learns = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, bias)
    )
    each = index.shape[3] * block_size * (size + v.shape[3])
    each *= k.shape[2] if lists == 1 else lists
    if not learns and tokens * (each + _SPAN_COST) <= _SPAN_COST * lists * ask.spans(k.shape[1])[2]:
        return few(q, k, v, index, bias, ask)
    return _Gathered.apply(q, k, v, index, bias, ask)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        bias: torch.Tensor | None,
        ask: Ask,
    ) -> torch.Tensor:
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        with torch.autocast(q.device.type, enabled=False):
            o = torch.empty(*q.shape[:3], v.shape[3], dtype=work, device=q.device)
            lse = torch.empty(q.shape[:3], dtype=work, device=q.device)
            for unit, tile in _tiles(q, k, index, ask):
                o[unit.row, tile, unit.heads], lse[unit.row, tile, unit.heads] = _tile(
                    q, k, v, index, bias, ask, unit, tile
                )
        ctx.save_for_backward(q, k, v, index, bias, o, lse)
        ctx.ask = ask
        return o.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, index, bias, o, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dq = torch.empty_like(q, dtype=o.dtype)
            dk, dv = (
                torch.zeros(x.transpose(1, 2).shape, dtype=o.dtype, device=x.device) for x in (k, v)
            )
            dbias = None if bias is None else torch.zeros_like(bias, dtype=o.dtype)
            for unit, tile in _tiles(q, k, index, ctx.ask):
                dq[unit.row, tile, unit.heads] = _tile_backward(
                    q, k, v, index, bias, ctx.ask, unit, tile, o, lse, do, dk, dv, dbias
                )
        return (
            dq.to(q.dtype),
            dk.transpose(1, 2).to(k.dtype),
            dv.transpose(1, 2).to(v.dtype),
            None,
            None if dbias is None or bias is None else dbias.to(bias.dtype),
            None,
        )


def _tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    ask: Ask,
    unit: _Unit,
    tile: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs [n, heads, V] of a tile and the logs of its sums [n, heads]."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = unit.fold(q, tile, work) * ask.scale
    count, shape = queries.shape[1], (unit.groups, unit.ratio)
    acc = queries.new_zeros(count, unit.groups * unit.ratio * v.shape[3])
    added = _bias(bias, unit, tile, work)
    small = _bound(queries, k, added, ask, unit, tile) <= _SLACK
    total = queries.new_zeros(count, *shape)
    base = queries.new_full((count, *shape), 0.0 if small else -math.inf)
    for span in _spans(k.shape[1], index, added, ask, unit, tile):
        rows, keys = span.rows, _keys(k, unit, span.own, work)
        s, _ = _scores(_pick(queries, rows, unit), keys, span, added, ask, unit)
        if not small:
            s = s.sub_(_raise(s, base, total, acc, rows, unit))
        p = s.exp_()
        total.index_add_(0, rows, p.sum(dim=-1).view(unit.groups, -1, unit.ratio).transpose(0, 1))
        _add(acc, rows, p, _keys(v, unit, span.own, work), unit)
    total, base = total.flatten(1), base.flatten(1)
    none = total == 0
    o = acc.view(*total.shape, -1) / total.masked_fill(none, 1.0)[..., None]
    return o, (base + total.log()).masked_fill_(none, 0.0)


def _bound(
    queries: torch.Tensor,
    k: torch.Tensor,
    added: torch.Tensor | None,
    ask: Ask,
    unit: _Unit,
    tile: slice,
) -> float:
    """Return what no score of a tile exceeds in size, by the norms of its queries and keys."""
    seen = slice(0, ask.at[unit.row] + tile.stop)
    rows = queries.view(*queries.shape[:2], unit.ratio, -1)
    # float32 holds the square of a norm where half precision does not
    keys = torch.linalg.vector_norm(k[unit.row, seen, unit.keys], dim=-1, dtype=queries.dtype)
    most = float(torch.linalg.vector_norm(rows, dim=-1).amax() * keys.amax())
    if ask.softcap is not None:
        most = min(most, ask.softcap)
    if added is None or not added.numel():
        return most
    return most + float(added.masked_fill(torch.isneginf(added), 0.0).abs().amax())


def _raise(
    s: torch.Tensor,
    base: torch.Tensor,
    total: torch.Tensor,
    acc: torch.Tensor,
    rows: torch.Tensor,
    unit: _Unit,
) -> torch.Tensor:
    """Return the reference [groups, n * ratio, 1] of the queries `rows`, raised where it must be.

    Sums of queries whose reference is raised, in `total` and `acc`, shrink with it.
    """
    top = s.amax(dim=-1).view(unit.groups, -1, unit.ratio).transpose(0, 1)  # [n, groups, ratio]
    old = base.index_select(0, rows)
    if float((top - old).amax()) > _SLACK:
        new = torch.where(top > old + _SLACK, top, old)
        shrink = (old - new).exp_()
        total[rows] *= shrink
        each = shrink.flatten(1)[..., None]
        acc[rows] = (acc[rows].view(*each.shape[:2], -1) * each).flatten(1)
        base.index_copy_(0, rows, new)
        old = new
    return old.transpose(0, 1).reshape(unit.groups, -1, 1)


def _tile_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    ask: Ask,
    unit: _Unit,
    tile: slice,
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dbias: torch.Tensor | None,
) -> torch.Tensor:
    """Return dq [n, heads, K] of a tile, adding to dk [B, G, S, K], dv and dbias."""
    work = o.dtype
    queries, grads = unit.fold(q, tile, work) * ask.scale, unit.fold(do, tile, work)
    delta = (do[unit.row, tile, unit.heads].to(work) * o[unit.row, tile, unit.heads]).sum(dim=-1)
    delta, sums = (
        x.unflatten(1, (unit.groups, unit.ratio)).transpose(0, 1).contiguous()
        for x in (delta, lse[unit.row, tile, unit.heads])
    )
    dq = queries.new_zeros(queries.shape[1], unit.groups * unit.ratio * q.shape[3])
    added = _bias(bias, unit, tile, work)
    for span in _spans(k.shape[1], index, added, ask, unit, tile):
        rows, keys = span.rows, _keys(k, unit, span.own, work)
        mine, given = _pick(queries, rows, unit), _pick(grads, rows, unit)
        s, slope = _scores(mine, keys, span, added, ask, unit)
        p = s.sub_(_pick(sums, rows, unit)).exp_()
        dv[unit.row, unit.keys, span.own] += torch.bmm(p.mT, given)
        ds = torch.bmm(given, _keys(v, unit, span.own, work).mT)
        ds = ds.sub_(_pick(delta, rows, unit)).mul_(p)
        if dbias is not None:
            _add_bias(dbias, ds, span, ask, unit, tile)
        if slope is not None:
            ds.mul_(slope)
        _add(dq, rows, ds, keys, unit)
        dk[unit.row, unit.keys, span.own] += torch.bmm(ds.mT, mine)
    return dq.mul_(ask.scale).view(dq.shape[0], unit.groups * unit.ratio, -1)


def _tiles(
    q: torch.Tensor, k: torch.Tensor, index: torch.Tensor, ask: Ask
) -> Iterator[tuple[_Unit, slice]]:
    """Yield the units of heads and, for each, its tiles of queries."""
    (batch, tokens, heads, size), groups, lists = q.shape, k.shape[2], index.shape[2]
    each, (merged, blocks, _) = heads // lists, ask.spans(k.shape[1])
    shared = groups if lists == 1 else 1
    most = _CPU_ELEMENTS if q.device.type == "cpu" else _GPU_ELEMENTS
    count = most // (each * max(size, merged * ask.block_size))
    count = max(16, min(count, _ENTRIES // blocks))
    for row in range(batch):
        for one in range(lists):
            first = one * each * groups // heads
            keys = slice(first, first + shared)
            span = slice(one * each, (one + 1) * each)
            unit = _Unit(row, one, span, keys, shared, each // shared)
            for start in range(0, tokens, count):
                yield unit, slice(start, min(start + count, tokens))


def _spans(
    size: int,
    index: torch.Tensor,
    added: torch.Tensor | None,
    ask: Ask,
    unit: _Unit,
    tile: slice,
) -> Iterator[_Span]:
    """Yield the spans that a tile's queries list, the last one first."""
    merged, _, _ = ask.spans(size)
    start, width = ask.at[unit.row] + tile.start, merged * ask.block_size
    size = min(size, start + tile.stop - tile.start)  # keys after the last query are never seen
    _, blocks, spans = ask.spans(size)
    listed = index[min(unit.row, len(index) - 1), tile, unit.list]  # [n, N]
    position = torch.arange(start, start + len(listed), dtype=index.dtype, device=index.device)
    newest = (position // ask.block_size).clamp_(max=blocks - 1)[:, None]
    live = (listed >= 0) & (listed <= newest)
    if added is not None:
        live = live & ~torch.isneginf(added)
    # what is not listed goes to a row after the last; queries of a block lie together
    place = listed.masked_fill(~live, spans * merged).long()
    row = torch.arange(len(listed), device=index.device)[:, None]
    places = (place * len(listed) + row).flatten()
    member = torch.zeros(
        (spans * merged + 1) * len(listed), dtype=torch.bool, device=index.device
    ).index_fill_(0, places, True)
    member = member.view(-1, len(listed))[:-1]
    slot = None
    if merged > 1 or added is not None:
        slot = member.new_full((member.shape[0] + 1, len(listed)), -1, dtype=torch.int32)
        order = torch.arange(listed.shape[1], dtype=torch.int32, device=index.device)
        slot.view(-1).scatter_(0, places, order.expand(listed.shape).flatten())
        slot = slot[:-1].view(spans, merged, -1)
    counted = member.sum(dim=1)
    if int(counted.sum()) != int(live.sum()):
        raise ValueError(
            f"a query among the tokens {tile.start} to {tile.stop - 1} of row {unit.row} lists a "
            f"block twice (list {unit.list}); list every block once, and -1 for nothing."
        )
    if merged > 1:
        member = member.view(spans, merged, -1).any(dim=1)
        counted = member.sum(dim=1)
    pairs, counts = member.flatten().nonzero().view(-1) % len(listed), counted.tolist()
    stop = len(pairs)
    for one in reversed(range(spans)):
        if not counts[one]:
            continue
        rows = pairs[stop - counts[one] : stop]
        stop -= counts[one]
        own = slice(one * width, min((one + 1) * width, size))
        cut, early = None, 0
        if own.stop - 1 > start:
            early = int(torch.searchsorted(rows, own.stop - 1 - start))
        if early:
            key = torch.arange(own.start, own.stop, device=index.device)
            cut = (key > rows[:early, None] + start)[:, None]
        slots = None if slot is None else slot[one].index_select(1, rows).t()
        yield _Span(rows, own, early, cut, slots)


def _scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    span: _Span,
    added: torch.Tensor | None,
    ask: Ask,
    unit: _Unit,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scores [groups, n * ratio, keys], -inf where hidden, and the cap's slope or None."""
    s, slope = torch.bmm(queries, keys.mT), None
    if ask.softcap is not None:
        s = s.div_(ask.softcap).tanh_()
        slope = s.square().neg_().add_(1.0)
        s = s.mul_(ask.softcap)
    view = s.view(unit.groups, len(span.rows), unit.ratio, -1)
    if span.slots is not None:
        extra = torch.zeros_like(span.slots, dtype=s.dtype)
        if added is not None:
            extra = added[span.rows].gather(1, span.slots.clamp(min=0).long())
        extra = extra.masked_fill(span.slots < 0, -math.inf)
        if extra.shape[1] > 1:
            extra = extra.repeat_interleave(ask.block_size, dim=1)[:, : view.shape[3]]
        view.add_(extra[:, None])
    if span.cut is not None:
        view[:, : span.early].masked_fill_(span.cut, -math.inf)
    return s, slope


def _add_bias(
    dbias: torch.Tensor, ds: torch.Tensor, span: _Span, ask: Ask, unit: _Unit, tile: slice
) -> None:
    """Add the sums of ds over the keys of every block, and over the heads, to dbias in place."""
    own = dbias[min(unit.row, len(dbias) - 1), tile, unit.list]  # [n, N]
    each = ds.view(unit.groups, len(span.rows), unit.ratio, -1).sum(dim=(0, 2))  # [n, keys]
    missing = span.slots.shape[1] * ask.block_size - each.shape[1]
    if span.slots.shape[1] == 1:
        each = each.sum(dim=1, keepdim=True)
    else:
        each = torch.nn.functional.pad(each, (0, missing)).unflatten(1, (-1, ask.block_size))
        each = each.sum(dim=2)
    row, block = (span.slots >= 0).nonzero(as_tuple=True)
    # a block is listed once, so that no place is written twice
    own[span.rows[row], span.slots[row, block].long()] += each[row, block]


def _bias(
    bias: torch.Tensor | None, unit: _Unit, tile: slice, work: torch.dtype
) -> torch.Tensor | None:
    if bias is None:
        return None
    return bias[min(unit.row, len(bias) - 1), tile, unit.list].to(work)  # [n, N]


def _pick(x: torch.Tensor, rows: torch.Tensor, unit: _Unit) -> torch.Tensor:
    """Return the queries `rows` of x [groups, n, ratio * K] as [groups, rows * ratio, K]."""
    return x.index_select(1, rows).view(unit.groups, len(rows) * unit.ratio, -1)


def _keys(x: torch.Tensor, unit: _Unit, own: slice, work: torch.dtype) -> torch.Tensor:
    """Return the keys or values `own` of x [B, S, G, K] as [groups, n, K]."""
    return x[unit.row, own, unit.keys].to(work).transpose(0, 1)


def _add(
    acc: torch.Tensor, rows: torch.Tensor, p: torch.Tensor, x: torch.Tensor, unit: _Unit
) -> None:
    """Add p [groups, n * ratio, keys] times x [groups, keys, V] to the queries `rows` of acc."""
    if unit.ratio > 1:
        out = torch.bmm(p, x).view(unit.groups, len(rows), -1).transpose(0, 1).flatten(1)
    else:
        out = p.new_empty(len(rows), acc.shape[1])
        torch.bmm(p, x, out=out.view(len(rows), unit.groups, -1).transpose(0, 1))
    acc.index_add_(0, rows, out)
