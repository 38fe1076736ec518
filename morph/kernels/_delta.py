"""The gated delta rule with one decay per head: in chunks, one token, or token by token.

S_t = exp(g_t) S_{t-1}, e_t = v_t - S_t^T k_t, S_t += beta_t k_t e_t^T and o_t = scale S_t^T q_t.
The writes x_t = beta_t e_t are what a token adds to the state along its key.

In a chunk of C tokens with G = cumsum(g) and D[i, j] = exp(G_i - G_j), unrolling the rule from the
state S before the chunk gives (I + A) X = beta (V - exp(G) K S) with A[i, j] = beta_i k_i.k_j
D[i, j] for j < i. The outputs are exp(G) Q S + P X with P[i, j] = q_i.k_j D[i, j] for j <= i, and
the state after the chunk is exp(G_C) S + (exp(G_C - G) K)^T X. Solving for X itself, instead of for
the parts of it that do and do not depend on S, saves a product, and the writes come for nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

CHUNK = 64
_CPU_CHUNK = 32  # fewer products, which on a CPU outweighs the greater number of steps
# Elements of one intermediate: fewer would pay more for launching operators than for the cache
_CPU_ELEMENTS = 1 << 18
_GONE = -750.0  # exp of it is 0 even in float64, and differences stay finite

Inputs = tuple[torch.Tensor, ...]  # q, k, v, g and beta
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def silence(
    k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return k, g and beta where tokens outside `real` [B, T] write nothing and forget nothing."""
    if real is None:
        return k, g, beta
    gone = ~real[..., None]
    return (
        k.masked_fill(gone[..., None], 0.0),
        g.masked_fill(gone, 0.0),
        beta.masked_fill(gone, 0.0),
    )


def sequential(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
    writes: bool = False,
) -> Result:
    """Return what `chunked` returns, token by token in the dtype of q: the reference."""
    ratio = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    decay, beta = g.to(q.dtype).exp()[..., None, None], beta.to(q.dtype)[..., None]
    outputs, wrote = [], []
    for t in range(q.shape[1]):
        state = decay[:, t] * state.to(q.dtype)
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        wrote.append(beta[:, t] * error)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], wrote[-1])
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state, torch.stack(wrote, dim=1) if writes else None


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
    writes: bool = False,
) -> Result:
    """Return what `chunked` returns for T = 1, in three passes over the state."""
    work, ratio = state.dtype, q.shape[2] // k.shape[2]
    q, k, v = q[:, 0].to(work), k[:, 0].to(work), v[:, 0].to(work)
    if ratio > 1:
        k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
    decay, beta = g[:, 0].to(work).exp()[..., None], beta[:, 0].to(work)[..., None]
    found = decay[..., None] * (torch.stack([k, q], dim=2) @ state)
    wrote = beta * (v - found[:, :, 0])
    state = (decay[..., None] * state).addcmul_(k[..., None], wrote[:, :, None])
    o = scale * torch.addcmul(found[:, :, 1], (q * k).sum(dim=-1, keepdim=True), wrote)
    return o[:, None], state, wrote[:, None] if writes else None


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
    writes: bool = False,
) -> Result:
    """Return o [B, T, H, V], the final state [B, H, K, V] and the writes [B, T, H, V] or None.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], g and beta [B, T, H], any floating dtypes; the
    work and the results have the dtype of `state`. All but scale is differentiable, once.
    """
    inputs = (q, k, v, g, beta)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state)):
        o, state, wrote = _Chunked.apply(*inputs, state, scale)
    else:
        o, state, wrote, _ = _forward(inputs, state, scale, writes, keep=False)
    return o, state, wrote if writes else None


class _Chunked(torch.autograd.Function):
    """Keeps the writes and the state before every step of some chunks; the rest is done again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        o, state, wrote, starts = _forward(args[:5], *args[5:], writes=True, keep=True)
        ctx.scale = args[6]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:5], wrote, torch.stack(starts))
        return o, state, wrote

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.autocast(saved[0].device.type, enabled=False):
            return (*_backward(saved[:5], *saved[5:], ctx.scale, *grads), None)


class _Scratch:
    """Memory that the steps of one call share: fresh pages cost more than the arithmetic."""

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like
        self.held: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)


class _Step(NamedTuple):
    """N chunks in the order [N, B, G, R, ...], R = H / G, so that each chunk is a slice.

    qk [N, B, G, 1 + R, C, K] holds the keys, then the queries of R heads. The rest is
    [N, B, G, R, C, ...]: `inside` is D (1 above the diagonal), `mask` [C, C] the scale on and below
    the diagonal and 0 above, `upto` exp(G), `reach` scale exp(G), `rest` exp(G_C - G), `whole`
    exp(G_C), `keys` A / beta, `pairs` scale P, `inverse` (I + A)^-1. What keys holds on and above
    the diagonal means nothing.
    """

    qk: torch.Tensor
    beta: torch.Tensor
    inside: torch.Tensor
    mask: torch.Tensor
    upto: torch.Tensor
    reach: torch.Tensor
    rest: torch.Tensor
    whole: torch.Tensor  # [N, B H, 1, 1]
    keys: torch.Tensor
    pairs: torch.Tensor
    inverse: torch.Tensor  # [N, B H, C, C]

    @property
    def k(self) -> torch.Tensor:
        return self.qk[:, :, :, :1]

    @property
    def q(self) -> torch.Tensor:
        return self.qk[:, :, :, 1:]

    def times_k(self, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return factor * K as [N, B H, C, K]."""
        torch.mul(self.k, factor, out=out)
        return out.view(*self.inverse.shape[:3], -1)


def _steps(q: torch.Tensor, v: torch.Tensor) -> list[tuple[slice, int]]:
    """Return the tokens and the chunk of each step: some whole chunks, then what is left."""
    tokens, chunk = q.shape[1], CHUNK
    span = tokens
    if q.device.type == "cpu":
        chunk = _CPU_CHUNK
        each = chunk * q.shape[0] * q.shape[2] * max(q.shape[3], v.shape[3])
        span = max(1, _CPU_ELEMENTS // each) * chunk
    end = tokens - tokens % chunk
    out = [(slice(a, min(a + span, end)), chunk) for a in range(0, end, span)]
    return out if end == tokens else [*out, (slice(end, tokens), tokens - end)]


def _fold(x: torch.Tensor, chunk: int, groups: int) -> torch.Tensor:
    """Return x [B, N C, G R, ...] as a view [N, B, G, R, C, ...]."""
    x = x.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk))
    return x.permute(1, 0, 3, 4, 2, *range(5, x.ndim))


def _prepare(inputs: Inputs, at: slice, chunk: int, scale: float, scratch: _Scratch) -> _Step:
    q, k, _, g, beta = (x[:, at] for x in inputs)
    groups, size, work = k.shape[2], k.shape[3], scratch.like.dtype
    # differences of large sums must keep the digits that count near the diagonal
    wide = work if q.device.type == "mps" else torch.float64
    upto = _fold(g, chunk, groups).to(wide).clamp(min=_GONE).cumsum(dim=-1)
    lead = upto.shape  # [N, B, G, R, C]
    rows = (1 + lead[3]) * chunk
    qk = scratch("qk", *lead[:3], 1 + lead[3], chunk, size)
    qk[:, :, :, :1].copy_(_fold(k, chunk, groups))
    qk[:, :, :, 1:].copy_(_fold(q, chunk, groups))
    beta = _fold(beta, chunk, groups).to(work).contiguous()[..., None]
    inside = scratch("inside", *lead, chunk)
    torch.sub(upto[..., :, None], upto[..., None, :], out=inside)
    inside.clamp_(max=0.0).exp_()  # -inf above the diagonal would do too, but slows exp tenfold
    decay = upto.exp().to(work)[..., None]
    scores = scratch("scores", *qk.shape[:5], chunk)
    flat = qk.view(-1, rows, size)
    torch.bmm(flat, flat[:, :chunk].mT, out=scores.view(-1, rows, chunk))
    mask = inside.new_full((chunk, chunk), scale).tril()
    keys = torch.mul(scores[:, :, :, :1], inside, out=scratch("keys", *lead, chunk))
    lower = torch.mul(keys, beta, out=scratch("lower", *lead, chunk)).flatten(0, 3)
    return _Step(
        qk=qk,
        beta=beta,
        inside=inside,
        mask=mask,
        upto=decay,
        reach=decay * scale,
        rest=(upto[..., -1:] - upto).exp().to(work)[..., None],
        whole=decay[..., -1, :].reshape(lead[0], -1, 1, 1),
        keys=keys,
        pairs=scores[:, :, :, 1:].mul_(inside).mul_(mask),
        inverse=_unit_inverse(lower).unflatten(0, (lead[0], -1)),
    )


def _unit_inverse(lower: torch.Tensor) -> torch.Tensor:
    """Return (I + A)^-1 for the part A of `lower` [N, C, C] below the diagonal, by substitution.

    Powers of A would do as well, but they grow like binomials where keys are alike, and then no
    digit of their sum is right.
    """
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    # X (I + A) = I: the side that LAPACK, which thinks in columns, need not copy
    return torch.linalg.solve_triangular(lower, eye, upper=False, left=False, unitriangular=True)


def _forward(
    inputs: Inputs,
    state: torch.Tensor,
    scale: float,
    writes: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """Return o, the final state, the writes if asked, and the states before every step if kept."""
    q, k, v = inputs[:3]
    (batch, tokens, heads, size), groups, wide = q.shape, k.shape[2], v.shape[3]
    o = state.new_empty(batch, tokens, heads, wide)
    wrote = torch.empty_like(o) if writes else None
    current, starts, scratch = state.reshape(-1, size, wide), [], _Scratch(o)
    for at, chunk in _steps(q, v):
        s = _prepare(inputs, at, chunk, scale, scratch)
        lead = s.upto.shape[:5]
        states = scratch("states", lead[0] + 1, *current.shape)
        states[0] = current
        right = torch.mul(_fold(v[:, at], chunk, groups), s.beta, out=scratch("v", *lead, wide))
        x = scratch("x", *right.shape)
        before = s.times_k(s.beta * s.upto, scratch("before", *lead, size))
        after = s.times_k(s.rest, scratch("after", *lead, size)).mT
        flat = (y.view(*s.inverse.shape[:3], wide) for y in (right, x))
        steps = (*flat, before, after, s.inverse, s.whole, states[:-1], states[1:])
        for right_n, x_n, before_n, after_n, inverse, whole, old, new in zip(*steps, strict=True):
            torch.bmm(inverse, right_n.baddbmm_(before_n, old, alpha=-1), out=x_n)
            torch.mul(old, whole, out=new).baddbmm_(after_n, x_n)
        near, far = scratch("keys", *x.shape), scratch("inside", *x.shape)
        by_head = (-1, chunk, wide)
        torch.bmm(s.pairs.flatten(0, 3), x.view(by_head), out=near.view(by_head))
        flat_states = states[:-1].flatten(0, 1)
        torch.bmm(s.q.flatten(0, 3), flat_states, out=far.view(by_head))
        torch.addcmul(near, far, s.reach, out=_fold(o[:, at], chunk, groups))
        if wrote is not None:
            _fold(wrote[:, at], chunk, groups).copy_(x)
        if keep:
            starts.append(current)
        current = states[-1].clone()
    return o, current.view(batch, heads, size, wide), wrote, starts


def _backward(
    inputs: Inputs,
    wrote: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    do: torch.Tensor | None,
    dstate: torch.Tensor | None,
    dwrote: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of q, k, v, g, beta and the initial state, from the last step back."""
    q, k, v, g, _ = inputs
    groups = k.shape[2]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    do = torch.zeros_like(wrote) if do is None else do
    ds, scratch = torch.zeros_like(starts[0]), _Scratch(wrote)
    if dstate is not None:
        ds.copy_(dstate.reshape(ds.shape))
    for (at, chunk), start in reversed(list(zip(_steps(q, v), starts, strict=True))):
        s = _prepare(inputs, at, chunk, scale, scratch)
        folded = [None if x is None else _fold(x[:, at], chunk, groups) for x in (dwrote, v)]
        x = scratch("x", *s.upto.shape[:5], v.shape[3]).copy_(_fold(wrote[:, at], chunk, groups))
        dy = scratch("do", *x.shape).copy_(_fold(do[:, at], chunk, groups))
        states, ends, dz = _sweep(s, x, dy, folded[0], start, ds, scratch)
        out = [_fold(y[:, at], chunk, groups) for y in grads]
        _products(s, folded[1], x, dy, states, ends[1:].flatten(0, 1), dz, scratch, out)
        out[3].masked_fill_(_fold(g[:, at], chunk, groups) < _GONE, 0.0)
        ds = ends[0].clone()
    return (*grads, ds.view(q.shape[0], q.shape[2], *ds.shape[1:]))


def _sweep(
    s: _Step,
    x: torch.Tensor,
    do: torch.Tensor,
    dwrote: torch.Tensor | None,
    start: torch.Tensor,
    ds: torch.Tensor,
    scratch: _Scratch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the states before each chunk [N B H, K, V], the gradients of the states at the N + 1
    bounds [N + 1, B H, K, V], and dZ, of the right side that the writes solve for [N B H, C, V].

    dX = P^T do + exp(G_C - G) K dS_after and dZ = (I + A)^-T dX.
    """
    (count, many, chunk), (size, wide) = s.inverse.shape[:3], start.shape[1:]
    heads, rows = s.upto.shape[:5], (-1, chunk, wide)
    after = s.times_k(s.rest, scratch("after", *heads, size))
    before = s.times_k(s.beta * s.upto, scratch("before", *heads, size))
    asks = torch.mul(s.q, s.reach, out=scratch("asks", *heads, size)).view(-1, chunk, size)
    states = scratch("states", count, many, size, wide)
    ends = scratch("ends", count + 1, many, size, wide)
    dx = scratch("dx", *heads, wide)
    torch.bmm(s.pairs.flatten(0, 3).mT, do.view(rows), out=dx.view(rows))
    if dwrote is not None:
        dx.add_(dwrote)
    torch.bmm(asks.mT, do.view(rows), out=ends[:count].flatten(0, 1))
    states[0], ends[count] = start, ds
    flat, dflat = x.view(count, many, chunk, wide), dx.view(count, many, chunk, wide)
    dz = scratch("dz", *flat.shape)
    steps = (states[:-1], states[1:], s.whole[:-1], after.mT[:-1], flat[:-1])
    for old, new, whole, after_n, x_n in zip(*steps, strict=True):
        torch.mul(old, whole, out=new).baddbmm_(after_n, x_n)
    steps = (ends[:-1], ends[1:], s.whole, after, before.mT, s.inverse.mT, dflat, dz)
    steps = [reversed(y.unbind(0)) for y in steps]
    for own, later, whole, after_n, before_n, inverse, dx_n, dz_n in zip(*steps, strict=True):
        torch.bmm(inverse, dx_n.baddbmm_(after_n, later), out=dz_n)
        own.addcmul_(later, whole).baddbmm_(before_n, dz_n, alpha=-1)
    return states.flatten(0, 1), ends, dz.flatten(0, 1)


def _products(
    s: _Step,
    v: torch.Tensor,
    x: torch.Tensor,
    do: torch.Tensor,
    states: torch.Tensor,
    ends: torch.Tensor,
    dz: torch.Tensor,
    scratch: _Scratch,
    out: list[torch.Tensor],
) -> None:
    """Fill `out`, the gradients of q, k, v, g and beta, from what `_sweep` found.

    A product of two tensors and a gate gives each its share; the gate's is the sum of all of it.
    """
    heads, (chunk, wide) = s.upto.shape[:5], x.shape[-2:]
    spare = scratch("spare", math.prod(heads) * max(chunk, s.qk.shape[-1], wide))

    def outer(name: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a.view(-1, *a.shape[-2:])
        y = scratch(name, *heads, b.shape[-1])
        torch.bmm(a, b, out=y.view(len(a), chunk, -1))
        return y

    def along(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = spare[: b.numel()].view(b.shape)
        return torch.mul(a, b, out=y).sum(dim=-1, keepdim=True)

    by_k = outer("before", dz, states.mT)  # dZ S^T
    by_q = outer("asks", do, states.mT)
    by_end = outer("after", x, ends.mT).mul_(s.rest)
    by_keys = outer("lower", dz, x.view(dz.shape).mT).mul_(s.mask.new_ones(chunk, chunk).tril(-1))
    by_pairs = outer("dpairs", do, x.view(dz.shape).mT)
    dz = dz.view(x.shape)
    found, kept = s.upto * along(s.k, by_k), along(s.k, by_end)
    torch.sub(along(v, dz) - found, along(s.keys, by_keys), out=out[4][..., None])
    by_keys.mul_(s.beta)
    dg = s.reach * along(s.q, by_q) - s.beta * found - kept
    inner = torch.mul(by_pairs, s.pairs, out=spare[: by_pairs.numel()].view(by_pairs.shape))
    inner.diagonal(dim1=-2, dim2=-1).zero_()
    inner.addcmul_(by_keys, s.keys, value=-1)
    dg = dg.squeeze(-1) + inner.sum(dim=-1) - inner.sum(dim=-2)
    dg[..., -1] += kept.sum(dim=(-2, -1))
    carried = torch.mul(states, ends, out=scratch("carried", *ends.shape)).sum(dim=(-2, -1))
    dg[..., -1] += carried.mul_(s.whole.flatten()).view(dg.shape[:-1])
    out[3].copy_(dg.flip(-1).cumsum(dim=-1).flip(-1))

    by_pairs.mul_(s.inside).mul_(s.mask)
    k, q = s.k.flatten(0, 3), s.q.flatten(3, 4).flatten(0, 2)  # heads of a group as rows
    by_pairs = by_pairs.flatten(3, 4).flatten(0, 2)
    near = torch.bmm(by_pairs, k, out=scratch("dx", *q.shape))
    torch.addcmul(near.view(by_q.shape), by_q, s.reach, out=out[0])
    between = _shared(by_keys.mul_(s.inside)).flatten(0, 2)
    dk = torch.bmm(by_pairs.mT, q, out=scratch("do", *k.shape))
    dk.baddbmm_(between + between.mT, k, alpha=-1)
    by_end.addcmul_(by_k, s.beta * s.upto, value=-1)
    torch.add(dk.view(*heads[:3], chunk, -1), _shared(by_end), out=out[1].squeeze(3))
    out[2].squeeze(3).copy_(_shared(dz.mul_(s.beta)))


def _shared(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the query heads that share a KV head, [N, B, G, ...]."""
    return x[:, :, :, 0] if x.shape[3] == 1 else x.sum(dim=3)
