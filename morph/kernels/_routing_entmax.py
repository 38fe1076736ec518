"""Triton kernel of entmax routing: the support and the mean weights of a group of query heads.

With x = (alpha - 1) z and e = 1 / (alpha - 1), entmax is p = max(x - tau, 0)^e for the tau at which
the weights sum to 1. What decreases in tau and is convex is not only that sum s but also its root
g = s^(1/e), a norm, which is nearly straight. So tangents of g at a point left of tau and chords
from there to a point right of it enclose tau, for every alpha; both close in quadratically, and the
middle of the bracket, tried in the same pass, halves it whatever happens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._blocks_forward import rows_of
from morph.kernels._routing_scores import factors, grouped, scores


@triton.jit
def weights(y, tau, power, SQUARE: tl.constexpr):
    """Return max(y - tau, 0)^(e - 1) and ^e."""
    d = tl.maximum(y - tau[:, None], 0.0)
    if SQUARE:
        low = d
    else:
        low = tl.where(d > 0, tl.exp2((power - 1) * tl.log2(tl.maximum(d, 1e-37))), 0.0)
    return low, low * d


@triton.jit
def root(total, power, SQUARE: tl.constexpr):
    return tl.sqrt(total) if SQUARE else tl.exp2(tl.log2(tl.maximum(total, 1e-37)) / power)


@triton.jit
def narrow(x, slope, total, lo, lo_slope, lo_total, hi, hi_total):
    """Take what was found at x into the bracket; a sum that rounding alone keeps below 1 is 1."""
    left = (total >= 0.9999997) | (lo_total == 0)
    better, nearer = left & (x >= lo), (total < 0.9999997) & (x <= hi)
    lo, lo_slope = tl.where(better, x, lo), tl.where(better, slope, lo_slope)
    lo_total = tl.where(better, total, lo_total)
    return lo, lo_slope, lo_total, tl.where(nearer, x, hi), tl.where(nearer, total, hi_total)


@triton.jit
def tries(lo, lo_slope, lo_total, hi, hi_total, power, SQUARE: tl.constexpr):
    """Return where to look next: at the tangent's root, the chord's and the middle; and whether."""
    g = root(lo_total, power, SQUARE)
    tangent = lo + (g - 1) * lo_total / tl.maximum(lo_slope * g, 1e-30)
    bend = tl.maximum(g - root(hi_total, power, SQUARE), 1e-30)
    x = tl.minimum(tangent, hi)
    chord = tl.minimum(tl.maximum(lo + (hi - lo) * ((g - 1) / bend), x), hi)
    least = 1.2e-7 * tl.abs(lo)
    go = (lo_total > 1.0000003) & (tangent - lo > least) & (hi - lo > least)
    return x, chord, (lo + hi) * 0.5, go


@triton.jit
def entmax_kernel(
    q, summaries, gamma, scratch, origin, index, prior, counts,
    q_b, q_t, q_h, s_b, s_c, s_g, at, tiles, T, C, G, most, factor, power, iterations,
    SIZE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr, ALL: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr,
    UNIT: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(0) % tiles  # late queries see more: they go first
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, g = row // G, row % G
    if origin is not None:
        at = tl.load(origin + b)
    m = tl.arange(0, QT * RP)
    t, r, ok = rows_of(m, tile, 0, T, R, RP, QT)
    rows, seen = t * R + r, tl.where(ok, tl.minimum((at + t) // SIZE, C), 0)
    limit = tl.max(seen, axis=0)
    each = factors(gamma, g, r, ok, factor, R)

    top = tl.full([QT * RP], float("-inf"), tl.float32)
    for n in range(0, limit, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        z = scores(
            q, summaries, scratch, b, g, G, rows, ok, cols, cols < limit, each, C,
            q_b, q_t, q_h, s_b, s_c, s_g, R, ALL, QT * RP, K, BLOCK_N, BLOCK_K, PIECE, UNIT,
        )  # fmt: skip
        z = tl.where(cols[None, :] < seen[:, None], z, float("-inf"))
        top = tl.maximum(top, tl.max(z, axis=1))
    top = tl.where(seen > 0, top, 0.0)

    none = tl.zeros([QT * RP], tl.float32)
    # Were all scores equal to the largest, tau would be at `hi`: it cannot be further right
    lo, hi = none - 1.0, -tl.exp2(-tl.log2(tl.maximum(seen, 1).to(tl.float32)) / power)
    lo_slope, lo_total, hi_total = none, none, none
    x1, x2, x3 = lo, hi, (lo + hi) * 0.5
    left = tl.where(limit > 0, iterations, 0)
    while left > 0:
        s1, s2, s3, f1, f2, f3 = none, none, none, none, none, none
        for n in range(0, limit, BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            z = scores(
                q, summaries, scratch, b, g, G, rows, ok, cols, cols < limit, each, C,
                q_b, q_t, q_h, s_b, s_c, s_g, R, ALL, QT * RP, K, BLOCK_N, BLOCK_K, PIECE, UNIT,
            )  # fmt: skip
            y = tl.where(cols[None, :] < seen[:, None], z - top[:, None], float("-inf"))
            low, p = weights(y, x1, power, SQUARE)
            s1, f1 = s1 + tl.sum(low, axis=1), f1 + tl.sum(p, axis=1)
            low, p = weights(y, x2, power, SQUARE)
            s2, f2 = s2 + tl.sum(low, axis=1), f2 + tl.sum(p, axis=1)
            low, p = weights(y, x3, power, SQUARE)
            s3, f3 = s3 + tl.sum(low, axis=1), f3 + tl.sum(p, axis=1)
        lo, lo_slope, lo_total, hi, hi_total = narrow(
            x1, s1, f1, lo, lo_slope, lo_total, hi, hi_total
        )
        lo, lo_slope, lo_total, hi, hi_total = narrow(
            x2, s2, f2, lo, lo_slope, lo_total, hi, hi_total
        )
        lo, lo_slope, lo_total, hi, hi_total = narrow(
            x3, s3, f3, lo, lo_slope, lo_total, hi, hi_total
        )
        x1, x2, x3, go = tries(lo, lo_slope, lo_total, hi, hi_total, power, SQUARE)
        left = tl.where(tl.max(go.to(tl.int32), axis=0) > 0, left - 1, 0)

    share = 1.0 / (tl.where(lo_total > 0, lo_total, 1.0) * R)
    mine = tile * QT + tl.arange(0, QT)
    real = (mine < T)[:, None]
    start = (((b * T + mine) * G + g) * most)[:, None]
    held = tl.zeros([QT], tl.int32)
    for n in range(0, limit, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        z = scores(
            q, summaries, scratch, b, g, G, rows, ok, cols, cols < limit, each, C,
            q_b, q_t, q_h, s_b, s_c, s_g, R, ALL, QT * RP, K, BLOCK_N, BLOCK_K, PIECE, UNIT,
        )  # fmt: skip
        y = tl.where(cols[None, :] < seen[:, None], z - top[:, None], float("-inf"))
        _, p = weights(y, lo, power, SQUARE)
        mean = grouped(p * share[:, None], RP, QT, BLOCK_N)
        listed = mean > 0
        place = held[:, None] + tl.cumsum(listed.to(tl.int32), axis=1) - 1
        write = listed & real & (place < most)
        tl.store(index + start + place, tl.broadcast_to(cols[None, :], [QT, BLOCK_N]), mask=write)
        tl.store(prior + start + place, mean, mask=write)
        held += tl.sum(listed.to(tl.int32), axis=1)
    tl.store(counts + (b * T + mine) * G + g, held, mask=mine < T)
    for n in range(0, most, BLOCK_N):
        cols = (n + tl.arange(0, BLOCK_N))[None, :]
        void = real & (cols >= held[:, None]) & (cols < most)
        tl.store(index + start + cols, tl.full([QT, BLOCK_N], -1, tl.int32), mask=void)
        tl.store(prior + start + cols, tl.zeros([QT, BLOCK_N], tl.float32), mask=void)
