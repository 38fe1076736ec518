"""Triton kernels of attention over a band: the backward, which recomputes weights from logarithms.

Queries' gradients go by blocks of rows, keys' and values' by blocks of keys, the sinks' by chunks
of rows that are added afterwards: every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._sliding_forward import dense, dot, load, store, strided, tanh


@triton.jit
def slopes(s, dp, seen, lse, delta, inner, outer, CAP: tl.constexpr):
    """Return the weights of products s, and the gradients of s up to the scale."""
    bent = 1.0
    if CAP:
        s = tanh(s * inner)
        bent = 1 - s * s
    p = tl.where(seen, tl.exp2(s * outer - lse), 0.0)
    return p, p * (dp - delta) * bent


@triton.jit
def queries_kernel(
    q, k, v, k_sinks, v_sinks, sinks_at, real, o, do, lse, delta, dq,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, at_b,
    T, S, N, G, past, window, inner, outer, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr, UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T * R, BLOCK_M)
    first = (tl.program_id(0) % blocks) * BLOCK_M
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = row // G, row % G
    rows = first + tl.arange(0, BLOCK_M)
    ok = rows < T * R
    at = past + rows // R
    q_tile = load(q, strided(b, g, rows, q_b, q_t, q_h, R, UNIT), ok, K, BLOCK_K)
    asks = ok
    if real is not None:
        asks = asks & (tl.load(real + b * S + at, mask=ok, other=0) != 0)
    out = dense(b, g, rows, T, G, R, V)
    do_tile = load(do, out, asks, V, BLOCK_V)
    o_tile = load(o, out, asks, V, BLOCK_V)
    log = tl.load(lse + row * T * R + rows, mask=ok, other=float("inf"))
    dots = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), axis=1)
    tl.store(delta + row * T * R + rows, dots, mask=ok)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if sinks_at is not None:
        for n in range(0, N, BLOCK_S):
            sinks = n + tl.arange(0, BLOCK_S)
            near = sinks < N
            where = tl.load(sinks_at + b * at_b + sinks, mask=near, other=0)
            k_tile = load(k_sinks, dense(b, g, sinks, N, G, 1, K), near, K, BLOCK_K)
            v_tile = load(v_sinks, dense(b, g, sinks, N, G, 1, V), near, V, BLOCK_V)
            seen = (where[None, :] <= (at - window)[:, None]) & near[None, :]
            s = dot(q_tile, tl.trans(k_tile), PRECISION)
            dp = dot(do_tile, tl.trans(v_tile), PRECISION)
            _, ds = slopes(s, dp, seen, log[:, None], dots[:, None], inner, outer, CAP)
            acc += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
    low = tl.maximum(past + first // R - window + 1, 0)
    high = tl.minimum(past + (first + BLOCK_M - 1) // R + 1, S)
    for n in range(low, high, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        near = keys < S
        k_tile = load(k, strided(b, g, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
        v_tile = load(v, strided(b, g, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
        gap = at[:, None] - keys[None, :]
        seen = (gap >= 0) & (gap < window)
        if real is not None:
            seen = seen & (tl.load(real + b * S + keys, mask=near, other=0) != 0)[None, :]
        s = dot(q_tile, tl.trans(k_tile), PRECISION)
        dp = dot(do_tile, tl.trans(v_tile), PRECISION)
        _, ds = slopes(s, dp, seen, log[:, None], dots[:, None], inner, outer, CAP)
        acc += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
    store(dq, dense(b, g, rows, T, G, R, K), ok, acc * scale, K, BLOCK_K)


@triton.jit
def keys_kernel(
    q, k, v, sinks_at, real, do, lse, delta, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, at_b,
    T, S, pairs, span, G, past, window, inner, outer, scale,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of S keys: of the band, or of the sinks by the rows of one chunk of `span`."""
    blocks = tl.cdiv(S, BLOCK_N)
    first = (tl.program_id(0) % blocks) * BLOCK_N
    chunk = (tl.program_id(0) // blocks) // pairs
    row = ((tl.program_id(0) // blocks) % pairs).to(tl.int64)
    b, g = row // G, row % G
    keys = first + tl.arange(0, BLOCK_N)
    near = keys < S
    k_tile = load(k, strided(b, g, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
    v_tile = load(v, strided(b, g, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
    if sinks_at is not None:
        where = tl.load(sinks_at + b * at_b + keys, mask=near, other=0)
        low, high = chunk * span, tl.minimum(chunk * span + span, T * R)
    else:
        low = tl.maximum(first - past, 0) * R
        high = tl.minimum(first + BLOCK_N - 1 + window - past, T) * R
        if real is not None:
            near = near & (tl.load(real + b * S + keys, mask=near, other=0) != 0)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for m in range(low, high, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        ok = rows < high
        at = past + rows // R
        asks = ok
        if real is not None:
            asks = asks & (tl.load(real + b * (past + T) + at, mask=ok, other=0) != 0)
        q_tile = load(q, strided(b, g, rows, q_b, q_t, q_h, R, UNIT), ok, K, BLOCK_K)
        out = dense(b, g, rows, T, G, R, V)
        do_tile = load(do, out, asks, V, BLOCK_V)
        log = tl.load(lse + row * T * R + rows, mask=ok, other=float("inf"))
        dots = tl.load(delta + row * T * R + rows, mask=ok, other=0.0)
        if sinks_at is not None:
            seen = (where[:, None] <= (at - window)[None, :]) & near[:, None]
        else:
            gap = at[None, :] - keys[:, None]
            seen = (gap >= 0) & (gap < window) & near[:, None]
        s = dot(k_tile, tl.trans(q_tile), PRECISION)
        dp = dot(v_tile, tl.trans(do_tile), PRECISION)
        p, ds = slopes(s, dp, seen, log[None, :], dots[None, :], inner, outer, CAP)
        dv_tile += dot(p.to(do_tile.dtype), do_tile, PRECISION)
        dk_tile += dot(ds.to(q_tile.dtype), q_tile, PRECISION)
    b += chunk * (pairs // G)
    store(dk, dense(b, g, keys, S, G, 1, K), keys < S, dk_tile * scale, K, BLOCK_K)
    store(dv, dense(b, g, keys, S, G, 1, V), keys < S, dv_tile, V, BLOCK_V)
