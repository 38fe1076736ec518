"""The chunked path of hedgehog: chunks of queries with the keys in reach, and sums for the older.

Memory is linear in the number of tokens, forward and backward: the way back computes every step
again from the sums before it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 64
# Scores of one step stay inside this many elements: on the CPU so that passes over them hit the
# cache, elsewhere so that a step fits into memory
_CPU_ELEMENTS, _ELEMENTS = 1 << 18, 1 << 24


class Ask(NamedTuple):
    """The options of one call; `held` tokens of the initial state come before the new ones."""

    window: int
    held: int
    scale: float
    softcap: float | None
    formula: str


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # o and the sums s and z


class Parts(NamedTuple):
    """Tensors of a call or of a step: keys and values with those held first, and the features of
    the tokens that leave the window, `left` [B, <= T, H, F]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    fq: torch.Tensor
    left: torch.Tensor
    mix: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor


def chunked(x: Parts, real: torch.Tensor | None, ask: Ask) -> Three:
    if torch.is_grad_enabled() and any(t.requires_grad for t in x):
        return _Chunked.apply(*x, real, ask)
    return _steps(x, real, ask, None)


class _Chunked(torch.autograd.Function):
    """Keeps its inputs and the sums before each step; the backward pass computes a step again.

    Differentiating slices the usual way would allocate a full-length tensor of zeros for each.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Three:
        x, (real, ctx.ask) = Parts(*args[:8]), args[8:]
        sums: list[torch.Tensor] = []
        out = _steps(x, real, ctx.ask, sums)
        ctx.save_for_backward(*x[:6], real, *sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # under checkpointing they may be read only once
        (do, ds, dz), (*inputs, real), sums = grads, saved[:7], saved[7:]
        dtype, needs = ds.dtype, ctx.needs_input_grad
        whole, wanted = Parts(*inputs, ds, dz), [*needs[:6], True, True]
        total = [torch.zeros_like(t, dtype=dtype) if n else None for t, n in zip(inputs, needs)]
        steps = list(zip(_bounds(whole, ctx.ask), sums[::2], sums[1::2]))
        with torch.autocast(ds.device.type, enabled=False):
            for (start, stop), s, z in reversed(steps):
                cuts = _cuts(whole, start, stop, ctx.ask)
                part = [*(t[c].to(dtype) for t, c in zip(inputs, cuts)), s, z]
                part = [t.detach().requires_grad_(w) for t, w in zip(part, wanted)]
                seen = None if real is None else real[cuts[1]]
                with torch.enable_grad():
                    out = _step(Parts(*part), seen, ctx.ask)
                leaves = [t for t, w in zip(part, wanted) if w]
                own = (do[:, start:stop].to(dtype), ds, dz)
                found = iter(torch.autograd.grad(out, leaves, own, allow_unused=True))
                for buffer, cut in zip(total, cuts):
                    if buffer is not None and (grad := next(found)) is not None:
                        buffer[cut] += grad
                ds, dz = found
        first = [None if g is None else g.to(t.dtype) for g, t in zip(total, inputs)]
        return (*first, ds, dz, None, None)


def _steps(x: Parts, real: torch.Tensor | None, ask: Ask, kept: list[torch.Tensor] | None) -> Three:
    """Return o and the new sums; the sums before each step are appended to `kept`."""
    o, s, z = x.q.new_empty(*x.q.shape[:3], x.v.shape[3]), x.s.clone(), x.z.clone()
    for start, stop in _bounds(x, ask):
        if kept is not None:
            kept += [s, z]
        cuts = _cuts(x, start, stop, ask)
        part = Parts(*(t[c].to(s.dtype) for t, c in zip(x, cuts)), s, z)
        seen = None if real is None else real[cuts[1]]
        o[:, start:stop], s, z = _step(part, seen, ask)
    return o, s, z


def _bounds(x: Parts, ask: Ask) -> list[tuple[int, int]]:
    """Return the first and last token of each step: chunks together, then the rest as one."""
    (batch, tokens, heads), chunk = x.q.shape[:3], chunk_size(ask.window)
    whole, left = divmod(tokens, chunk)
    reach = min(ask.window, x.k.shape[1]) + chunk
    each, cpu = batch * heads * chunk * reach, x.q.device.type == "cpu"
    span = max(1, (_CPU_ELEMENTS if cpu else _ELEMENTS) // each)
    edges = [chunk * n for n in range(0, whole, span)] + [chunk * whole] + [tokens] * (left > 0)
    return list(itertools.pairwise(edges))


def chunk_size(window: int) -> int:
    """Return how many queries form a chunk: small ones waste few scores, large ones few copies."""
    return min(max(window // 8, CHUNK), 256)


def _cuts(x: Parts, start: int, stop: int, ask: Ask) -> list[Any]:
    """Return the index of a step into q, k, v, fq, left and mix."""
    whole, end = slice(None), ask.held + stop
    low = max(0, ask.held + start - ask.window)
    new, reach, left = slice(start, stop), slice(low, end), slice(low, max(0, end - ask.window))
    return [(whole, new), (whole, reach), (whole, reach), (whole, new), (whole, left), whole]


def _step(x: Parts, real: torch.Tensor | None, ask: Ask) -> Three:
    """T = N chunks, or one shorter chunk: o [B, T, H, V] and the sums after them.

    Chunk n meets the W + C keys that end with its own; its row i sees those i < a <= i + W as the
    window, and of the first C, which leave the window now, those a <= i as older ones. Where fewer
    keys than that came before, the first of them are void. Heads that share a KV head are stacked
    as rows of one matrix.
    """
    batch, tokens, heads, _ = x.q.shape
    total, groups = x.k.shape[1:3]
    window, chunk = min(ask.window, total), min(chunk_size(ask.window), tokens)
    ratio, count, void = heads // groups, tokens // chunk, window + tokens - total
    q = _fold(x.q * ask.scale, chunk, groups).flatten(3, 4)  # [B, G, N, R C, K]
    k, v = (F.pad(t, (0, 0, 0, 0, void, 0)).transpose(1, 2) for t in (x.k, x.v))
    a = q @ _reach(k, window, chunk)  # [B, G, N, R C, W + C]
    if ask.softcap is not None:
        a = ask.softcap * torch.tanh(a / ask.softcap)
    a = a.unflatten(3, (ratio, chunk)) + _hidden(x, real, void, window, chunk)
    peak = a.amax(dim=-1, keepdim=True)  # [B, G, N, R, C, 1]
    top = bottom = None
    s, z = x.s, x.z
    if x.left.shape[1] or ask.held:  # else nothing can be older than the window yet
        left = F.pad(x.left, (0, 0, 0, 0, tokens - x.left.shape[1], 0))
        values = v[:, :, :tokens].unflatten(2, (count, chunk))
        top, bottom, s, z = _linear(x, _fold(left, chunk, groups), values)
    share = 1 / x.mix.view(groups, 1, ratio, 1, 1)  # of older tokens beside the window's weights
    if ask.formula == "paper":
        peak = peak.detach()
        if bottom is not None:  # what both are divided by, so that neither overflows
            peak = torch.maximum(peak, bottom.detach().log())
            share = share * (-peak).clamp(max=700.0 if peak.dtype == torch.float64 else 85.0).exp()
    a = (a - peak).exp()
    own = a.flatten(3, 4) @ _reach(v, window, chunk).transpose(-1, -2)
    own, all_ = own.unflatten(3, (ratio, chunk)), a.sum(dim=-1, keepdim=True)
    if top is not None and bottom is not None:
        own, all_ = own + share * top, all_ + share * bottom
    o = (own / all_).permute(0, 2, 4, 1, 3, 5)
    return o.reshape(batch, tokens, heads, -1), s, z


def _linear(x: Parts, fk: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the linear numerators and denominators [B, G, N, R, C, .] and the sums after them.

    fk [B, G, N, R, C, F] and v [B, G, N, C, V] are of the tokens that leave the window.
    """
    groups, ratio, chunk = fk.shape[1], fk.shape[3], fk.shape[4]
    fq = _fold(x.fq, chunk, groups)
    pairs = (fq @ fk.transpose(-1, -2)).tril()
    written = (fk.transpose(-1, -2).flatten(3, 4) @ v).unflatten(3, (ratio, -1))
    s, z = (t.unflatten(1, (groups, ratio)) for t in (x.s, x.z))
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for new, weight in zip(written.unbind(2), fk.sum(dim=-2).unbind(2)):
        before.append((s, z))
        s, z = s + new, z + weight
    sums, weights = (torch.stack(t, dim=2) for t in zip(*before))
    top = (pairs.flatten(3, 4) @ v).unflatten(3, (ratio, chunk)) + fq @ sums
    bottom = pairs.sum(dim=-1, keepdim=True) + fq @ weights[..., None]
    return top, bottom, s.flatten(1, 2), z.flatten(1, 2)


def _fold(x: torch.Tensor, chunk: int, groups: int) -> torch.Tensor:
    """Return x [B, N C, G R, K] as [B, G, N, R, C, K]."""
    return x.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)).permute(0, 3, 1, 4, 2, 5)


def _reach(x: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
    """Return the keys in reach of each chunk, [B, G, N, K, W + C], of x [B, G, W + N C, K]."""
    if x.shape[2] == window + chunk:
        return x[:, :, None].transpose(-1, -2)  # the same, and its gradient is a view
    return x.unfold(2, window + chunk, chunk)


def _hidden(
    x: Parts, real: torch.Tensor | None, void: int, window: int, chunk: int
) -> torch.Tensor:
    """Return 0 where a row of a chunk sees a key, else -inf: [B or 1, 1, N or 1, 1, C, W + C]."""
    device = x.q.device
    row = torch.arange(chunk, device=device)[:, None]
    key = torch.arange(window + chunk, device=device)
    seen = (key > row) & (key <= row + window)
    if void or real is not None:
        if real is None:
            real = torch.ones(1, x.k.shape[1], dtype=torch.bool, device=device)
        known = F.pad(real, (void, 0)).unfold(1, window + chunk, chunk)[:, None, :, None, None]
        # a row of padding sees itself, which keeps it finite, and is zeroed later
        seen = seen & known | (key == row + window)
    return torch.zeros_like(seen, dtype=x.q.dtype).masked_fill_(~seen, -math.inf)
