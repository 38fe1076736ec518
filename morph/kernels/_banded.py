"""Softmax attention over a band, block by block, with memory linear in the number of tokens.

Queries are cut into blocks; each block meets only the keys its band reaches, as a view of the whole
keys, so that nothing is copied or kept per block. The backward pass recomputes the weights of a
block and adds into one buffer per input: differentiating slices the usual way would allocate a
full-length tensor of zeros for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Scores of one step stay inside this many elements, so that the passes over them hit the CPU's L2
_CPU_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Band:
    """Which keys a query sees, and how scores are made.

    Query t stands at key `past + t` and sees keys (past + t - window, past + t]; `window` None: all
    before. `real` [B, S] bool marks keys that are no padding. `sinks_at` [B or 1, N] holds the key
    index of each extra sink key, which is seen once it has left the window.
    """

    window: int | None
    past: int
    scale: float
    softcap: float | None = None
    real: torch.Tensor | None = None
    sinks_at: torch.Tensor | None = None


def banded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    band: Band,
    sink_bias: torch.Tensor | None = None,
    k_sinks: torch.Tensor | None = None,
    v_sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention outputs [B, T, H, V] of q [B, T, H, K] over k [B, S, G, K], v [B, S, G, V].

    sink_bias [H]: a logit per head that takes weight and gives nothing. k_sinks, v_sinks
    [B, N, G, K or V]: the keys `band.sinks_at` speaks of. Sums run in float32, or in float64 where
    q is float64.
    """
    return _Banded.apply(q, k, v, sink_bias, k_sinks, v_sinks, band)


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        q, k, v, sink_bias, k_sinks, v_sinks, band = args
        ctx.band, ctx.none = band, [x is None for x in args[:6]]
        ctx.save_for_backward(*(x for x in args[:6] if x is not None))
        with torch.autocast(q.device.type, enabled=False):
            work = _Work(q, k, v, sink_bias, k_sinks, v_sinks, band)
            o = work.q.new_empty(work.q.shape[0], work.q.shape[1], v.shape[3])
            for step in work.steps():
                o[step.heads, step.rows] = work.mix(work.weights(step).p, step)
            return work.unfold(work.silence(o), q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args: list[Any] = [None if none else next(saved) for none in ctx.none]
        q, k, v, sink_bias, k_sinks, v_sinks = args
        with torch.autocast(q.device.type, enabled=False):
            work = _Work(q, k, v, sink_bias, k_sinks, v_sinks, ctx.band)
            do = work.silence(work.fold(do))
            grads = _backward(work, do)
        out = [
            work.unfold(grads[0].mul_(ctx.band.scale), q),
            work.unfold_keys(grads[1], k),
            work.unfold_keys(grads[2], v),
            None if sink_bias is None else grads[3].to(sink_bias.dtype),
            None if k_sinks is None else work.unfold_keys(grads[4], k_sinks),
            None if v_sinks is None else work.unfold_keys(grads[5], v_sinks),
        ]
        return (*out, None)


@dataclass(frozen=True)
class _Step:
    """One block of queries of some heads: tokens [start, stop), keys [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    heads: slice
    rows: slice
    plain: bool  # no key in reach is padding, and every sink is in sight of every query


@dataclass(frozen=True)
class _Weights:
    p: torch.Tensor  # softmax weights of the real keys, sinks first
    tanh: torch.Tensor | None  # of the capped scores
    p_bias: torch.Tensor | None  # weight that went to the sink bias


class _Work:
    """The tensors of one call, laid out for matrix products.

    Queries that share a KV head become rows of one matrix: q [B G, T R, K], with R = H / G; keys
    are [B G, S, K].
    """

    def __init__(
        self, q: Any, k: Any, v: Any, sink_bias: Any, k_sinks: Any, v_sinks: Any, band: Band
    ) -> None:
        self.band = band
        self.batch, self.tokens, heads = q.shape[:3]
        self.groups = k.shape[2]
        self.ratio = heads // self.groups
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q = self.fold(q) * band.scale
        self.sinks = 0 if k_sinks is None else k_sinks.shape[1]
        self.real_from, self.sinks_to = _clear_from(band)
        self.k, self.v = self.fold_keys(k), self.fold_keys(v)
        self.k_sinks = None if k_sinks is None else self.fold_keys(k_sinks)
        self.v_sinks = None if v_sinks is None else self.fold_keys(v_sinks)
        self.sink_bias = None
        if sink_bias is not None:
            bias = sink_bias.to(self.dtype).view(1, self.groups, 1, self.ratio)
            self.sink_bias = bias.expand(self.batch, -1, -1, -1).flatten(0, 1)  # [B G, 1, R]

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(2, (self.groups, self.ratio)).transpose(1, 2)  # [B, G, T, R, K]
        return x.reshape(self.batch * self.groups, self.tokens * self.ratio, -1).to(self.dtype)

    def unfold(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        x = x.view(self.batch, self.groups, self.tokens, self.ratio, -1).transpose(1, 2)
        return x.flatten(2, 3).to(like.dtype)

    def fold_keys(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1).to(self.dtype)

    def unfold_keys(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (self.batch, self.groups)).transpose(1, 2).to(like.dtype)

    def silence(self, x: torch.Tensor) -> torch.Tensor:
        """Zero the rows of padding queries."""
        if self.band.real is None:
            return x
        real = self.band.real[:, self.band.past :, None].expand(-1, -1, self.ratio)
        real = real[:, None].expand(-1, self.groups, -1, -1).reshape(x.shape[0], -1, 1)
        return x.masked_fill(~real, 0.0)

    def steps(self) -> Iterator[_Step]:
        window, past = self.band.window, self.band.past
        span = block_size(window)
        for start in range(0, self.tokens, span):
            stop = min(start + span, self.tokens)
            low = 0 if window is None else max(0, past + start - window + 1)
            high, rows = past + stop, slice(start * self.ratio, stop * self.ratio)
            each, count = (stop - start) * self.ratio * (high - low), self.q.shape[0]
            plain = low >= self.real_from
            if self.band.sinks_at is not None:
                plain = plain and window is not None and past + start - window >= self.sinks_to
            # where the mask differs from row to row of the batch, all rows go together
            chunk = count
            if plain and self.q.device.type == "cpu":
                chunk = max(1, _CPU_ELEMENTS // each)
            for first in range(0, count, chunk):
                heads = slice(first, min(first + chunk, count))
                yield _Step(start, stop, low, high, heads, rows, plain)

    def scores(self, step: _Step) -> torch.Tensor:
        q = self.q[step.heads, step.rows]
        s = torch.bmm(q, self.k[step.heads, step.low : step.high].transpose(1, 2))
        if self.k_sinks is None:
            return s
        return torch.cat([torch.bmm(q, self.k_sinks[step.heads].transpose(1, 2)), s], dim=2)

    def mix(self, p: torch.Tensor, step: _Step) -> torch.Tensor:
        """Return the values of a step weighed by p."""
        own = self.v[step.heads, step.low : step.high]
        if self.v_sinks is None:
            return torch.bmm(p, own)
        o = torch.bmm(p[:, :, self.sinks :], own)
        return o.baddbmm_(p[:, :, : self.sinks], self.v_sinks[step.heads])

    def weights(self, step: _Step) -> _Weights:
        s = self.scores(step)
        cap, tanh = self.band.softcap, None
        if cap is not None:
            tanh = s.div_(cap).tanh_()
            s = tanh * cap
        s = self._mask(s, step)
        if self.sink_bias is None:
            return _Weights(torch.softmax(s, dim=-1), tanh, None)
        bias = self.sink_bias[step.heads].repeat(1, step.stop - step.start, 1).flatten(1)[..., None]
        top = torch.maximum(s.amax(dim=-1, keepdim=True), bias)
        e, own = s.sub_(top).exp_(), (bias - top).exp_()
        total = e.sum(dim=-1, keepdim=True) + own
        return _Weights(e.div_(total), tanh, own.div_(total))

    def _mask(self, s: torch.Tensor, step: _Step) -> torch.Tensor:
        """Add -inf where a query of this step does not see a key; sinks come first."""
        band, count = self.band, step.stop - step.start
        if step.plain:  # only the two edges of the band hide anything
            s = s.unflatten(1, (count, self.ratio))
            s[..., -count:] += _right_edge(count, s.dtype, s.device)
            if band.window is not None:
                hidden = band.past + step.stop - band.window - step.low  # by the last query
                if hidden > 0:
                    own = slice(self.sinks, self.sinks + hidden)
                    s[..., own] += _left_edge(count, hidden, s.dtype, s.device)
            return s.flatten(1, 2)
        seen = _seen(count, step.high - step.low, band.window, s.device)[None]
        if band.real is not None:
            own = _seen(count, step.high - step.low, 1, s.device)  # keeps padding rows finite
            seen = (seen & band.real[:, None, step.low : step.high]) | own
        if band.sinks_at is not None:
            assert band.window is not None
            at = torch.arange(band.past + step.start, band.past + step.stop, device=s.device)
            left = band.sinks_at[:, None, :] <= at[None, :, None] - band.window
            rows = max(left.shape[0], seen.shape[0])
            seen = torch.cat([left.expand(rows, -1, -1), seen.expand(rows, -1, -1)], dim=2)
        s = s.view(self.batch, self.groups, count, self.ratio, -1)
        s = s.masked_fill_(~seen[:, None, :, None, :], float("-inf"))
        return s.flatten(0, 1).flatten(1, 2)


def _backward(work: _Work, do: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of q (still to be scaled), k, v, sink_bias, k_sinks and v_sinks."""
    dq, dk, dv = (torch.zeros_like(x) for x in (work.q, work.k, work.v))
    dk_sinks, dv_sinks = (
        dq.new_zeros(0) if x is None else torch.zeros_like(x) for x in (work.k_sinks, work.v_sinks)
    )
    dbias, sinks = dq.new_zeros(work.groups * work.ratio), work.sinks
    for step in work.steps():
        q, g = work.q[step.heads, step.rows], do[step.heads, step.rows]
        keys, values = (x[step.heads, step.low : step.high] for x in (work.k, work.v))
        w, own = work.weights(step), slice(step.low, step.high)
        ds = torch.bmm(g, values.transpose(1, 2))
        if work.v_sinks is not None:
            ds = torch.cat([torch.bmm(g, work.v_sinks[step.heads].transpose(1, 2)), ds], dim=2)
            dv_sinks[step.heads].baddbmm_(w.p[:, :, :sinks].transpose(1, 2), g)
        dv[step.heads, own] += torch.bmm(w.p[:, :, sinks:].transpose(1, 2), g)
        ds.mul_(w.p)
        total = ds.sum(dim=-1, keepdim=True)
        ds.addcmul_(w.p, total, value=-1)
        if w.tanh is not None:
            ds.mul_(1 - w.tanh.square())
        dq[step.heads, step.rows] = torch.bmm(ds[:, :, sinks:], keys)
        dk[step.heads, own] += torch.bmm(ds[:, :, sinks:].transpose(1, 2), q)
        if work.k_sinks is not None:
            dq[step.heads, step.rows] += torch.bmm(ds[:, :, :sinks], work.k_sinks[step.heads])
            dk_sinks[step.heads].baddbmm_(ds[:, :, :sinks].transpose(1, 2), q)
        if w.p_bias is not None:
            lost = (w.p_bias * total).view(-1, step.stop - step.start, work.ratio).sum(dim=1)
            rows = torch.arange(*step.heads.indices(do.shape[0]), device=do.device) % work.groups
            dbias.view(work.groups, work.ratio).index_add_(0, rows, lost, alpha=-1)
    return [dq, dk, dv, dbias, dk_sinks, dv_sinks]


def _clear_from(band: Band) -> tuple[int, int]:
    """Return the first key after all padding, and the last sink's key, as far as that is known.

    Asking a GPU would stop it, so there every block is taken to need its mask.
    """
    real_from, sinks_to = 0, 0
    if band.real is not None:
        padding = (~band.real).any(dim=0)
        real_from = padding.shape[0]
        if padding.device.type == "cpu":
            real_from = int((padding * torch.arange(1, real_from + 1)).max())
    if band.sinks_at is not None:
        cpu = band.sinks_at.device.type == "cpu"
        sinks_to = int(band.sinks_at.max()) if cpu else torch.iinfo(torch.int64).max
    return real_from, sinks_to


def block_size(window: int | None) -> int:
    """Return how many queries form a block: small blocks waste few scores, large ones few calls."""
    return 128 if window is None else min(max(window // 8, 64), 256)


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys each query sees, [queries, keys] bool; the last query is the last key."""
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    seen = key <= at
    return seen if window is None else seen & (key > at - window)


@lru_cache(maxsize=32)
def _right_edge(queries: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return -inf where a key comes after the query, else 0: [queries, 1, queries]."""
    bias = torch.full((queries, queries), float("-inf"), dtype=dtype, device=device)
    return bias.triu_(1)[:, None]


@lru_cache(maxsize=32)
def _left_edge(queries: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return -inf where a key has left the window, else 0: [queries, 1, hidden].

    `hidden` keys have left the window of the last query, one fewer that of the query before it.
    """
    bias = torch.full((queries, hidden), float("-inf"), dtype=dtype, device=device)
    return bias.tril_(hidden - queries)[:, None]
