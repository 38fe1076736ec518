"""Triton kernels of attention over a band: the forward, and one decoded token.

The R = H / G query heads of a KV head are rows of one tile, m = t R + r, so that a tile spans few
tokens and meets few keys outside its band. Scores count powers of two. `b` and `g`, the places in
the batch and among KV heads, are int64, since every large offset starts with them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def strided(b, g, rows, stride_b, stride_t, stride_h, R: tl.constexpr, UNIT: tl.constexpr):
    """Where rows m = t R + r of group g start; in 64 bits, as a batch can pass 2^31 elements.

    Strides count UNIT elements, so that the compiler knows when rows are aligned.
    """
    t, h = (rows // R).to(tl.int64), (g * R + rows % R).to(tl.int64)
    return (b * stride_b + t * stride_t + h * stride_h) * UNIT


@triton.jit
def dense(b, g, rows, T, G, R: tl.constexpr, SIZE: tl.constexpr):
    """The same for a tensor [B, T, G R, SIZE] without gaps; b, g and so all sums have 64 bits."""
    return ((b * T + rows // R) * G * R + g * R + rows % R) * SIZE


@triton.jit
def load(x, at, ok, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    return tl.load(
        x + at[:, None] + cols[None, :], mask=ok[:, None] & (cols < SIZE)[None, :], other=0.0
    )


@triton.jit
def store(x, at, ok, value, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = ok[:, None] & (cols < SIZE)[None, :]
    tl.store(x + at[:, None] + cols[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def tanh(x):
    """By its series near 0, where the quotient would lose digits."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    e = tl.exp2(-2.885390081777927 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.0625, x * series, tl.where(x < 0, -far, far))


@triton.jit
def mix(acc, top, total, q, k, v, seen, inner, outer, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """Take one block of keys into the running output, largest score and sum of weights."""
    s = dot(q, tl.trans(k), PRECISION)
    if CAP:
        s = tanh(s * inner)
    s = tl.where(seen, s * outer, float("-inf"))
    new = tl.maximum(top, tl.max(s, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    acc = acc * fade[:, None] + dot(p.to(v.dtype), v, PRECISION)
    return acc, new, total * fade + tl.sum(p, axis=1)


@triton.jit
def forward_kernel(
    q, k, v, k_sinks, v_sinks, sinks_at, real, bias, o, lse,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, at_b, T, S, N, G, past, window, inner, outer,
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
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if bias is not None:
        top = tl.load(bias + g * R + rows % R)
        total += 1.0
    if sinks_at is not None:
        for n in range(0, N, BLOCK_S):
            sinks = n + tl.arange(0, BLOCK_S)
            near = sinks < N
            where = tl.load(sinks_at + b * at_b + sinks, mask=near, other=0)
            k_tile = load(k_sinks, dense(b, g, sinks, N, G, 1, K), near, K, BLOCK_K)
            v_tile = load(v_sinks, dense(b, g, sinks, N, G, 1, V), near, V, BLOCK_V)
            seen = (where[None, :] <= (at - window)[:, None]) & near[None, :]
            acc, top, total = mix(
                acc, top, total, q_tile, k_tile, v_tile, seen, inner, outer, CAP, PRECISION
            )
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
        acc, top, total = mix(
            acc, top, total, q_tile, k_tile, v_tile, seen, inner, outer, CAP, PRECISION
        )
    whole = tl.where(total > 0, total, 1.0)
    acc = acc / whole[:, None]
    if real is not None:
        asks = tl.load(real + b * S + at, mask=ok, other=0) != 0
        acc = tl.where(asks[:, None], acc, 0.0)
    store(o, dense(b, g, rows, T, G, R, V), ok, acc, V, BLOCK_V)
    # infinite where nothing was seen, so that the backward pass finds weights of 0
    log = tl.where(total > 0, top + tl.log2(whole), float("inf"))
    tl.store(lse + row * T * R + rows, log, mask=ok)


@triton.jit
def decode_kernel(
    q, k, v, real, bias, parts, logs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, S, G, splits, span, inner, outer,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log of the sum over `span` keys, of all query heads of one KV head."""
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    b, g = row // G, row % G
    heads = tl.arange(0, BLOCK_M)
    ok = heads < R
    q_tile = load(q, (b * q_b + (g * R + heads) * q_h) * UNIT, ok, K, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if bias is not None:  # counts once, in the first split
        own = heads + split * BLOCK_M < R
        top = tl.load(bias + g * R + heads, mask=own, other=float("-inf"))
        total = tl.where(own, 1.0, 0.0)
    stop = tl.minimum(split * span + span, S)
    for n in range(split * span, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        near = keys < stop
        k_tile = load(k, strided(b, g, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
        v_tile = load(v, strided(b, g, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
        if real is not None:
            near = near & (tl.load(real + b * S + keys, mask=near, other=0) != 0)
        seen = near[None, :] & ok[:, None]
        acc, top, total = mix(
            acc, top, total, q_tile, k_tile, v_tile, seen, inner, outer, CAP, PRECISION
        )
    whole = tl.where(total > 0, total, 1.0)
    out = (row * splits + split) * R + heads
    store(parts, out * V, ok, acc / whole[:, None], V, BLOCK_V)
    tl.store(logs + out, tl.where(total > 0, top + tl.log2(whole), float("-inf")), mask=ok)


@triton.jit
def join_kernel(
    parts, logs, real, o, S, G, splits,
    R: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row, r = (tl.program_id(0) // R).to(tl.int64), tl.program_id(0) % R
    ids = tl.arange(0, SPLITS)
    at, ok = (row * splits + ids) * R + r, ids < splits
    log = tl.load(logs + at, mask=ok, other=float("-inf"))
    top = tl.max(log, axis=0)
    weight = tl.exp2(log - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    value = tl.sum(load(parts, at * V, ok, V, BLOCK_V) * weight[:, None], axis=0)
    value = value / tl.where(total > 0, total, 1.0)
    if real is not None:
        value = tl.where(tl.load(real + (row // G) * S + S - 1) != 0, value, 0.0)
    cols = tl.arange(0, BLOCK_V)
    tl.store(o + (row * R + r) * V + cols, value.to(o.dtype.element_ty), mask=cols < V)
