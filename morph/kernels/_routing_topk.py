"""Triton kernel of top-k routing: forced blocks, then the best of the rest, ties to the earlier.

Nothing is sorted. Scores become integers in the same order, and the k-th largest is enclosed by
counting, in each pass over the blocks, how many reach three thresholds: each pass leaves a quarter
of the bracket, and a tile stops when every list has a threshold that exactly as many reach as it
has places, or the value itself. The last pass writes. Counting and writing must agree on every
score to the bit, so they are two branches of one loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._blocks_forward import rows_of
from morph.kernels._routing_scores import factors, grouped, scores


@triton.jit
def ordered(x):
    """Return int32 in the order of the float32; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value(
    z, seen, log,
    HEAD: tl.constexpr, SOFTMAX: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return what lists rank by, from the scores of their heads."""
    if SOFTMAX:
        z = tl.exp2(tl.where(seen, z - log[:, None], float("-inf")))
    if HEAD:
        x = z
    else:
        x = grouped(tl.where(seen, z, 0.0), RP, QT, BLOCK_N)
    return x


@triton.jit
def narrow(x, count, need, lo, held, hi, above):
    """Take into the bracket that `count` candidates reach threshold x."""
    left, right = (count >= need) & (x >= lo), (count < need) & (x <= hi)
    lo, held = tl.where(left, x, lo), tl.where(left, count, held)
    return lo, held, tl.where(right, x, hi), tl.where(right, count, above)


@triton.jit
def topk_kernel(
    q, summaries, scratch, origin, index,
    q_b, q_t, q_h, s_b, s_c, s_g, at, tiles, T, C, G, k, initial, local, factor,
    SIZE: tl.constexpr, HEAD: tl.constexpr, SOFTMAX: tl.constexpr,
    R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr, ALL: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = QT * RP if HEAD else QT
    tile = tiles - 1 - tl.program_id(0) % tiles  # late queries see more: they go first
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, g = row // G, row % G
    if origin is not None:
        at = tl.load(origin + b)
    m = tl.arange(0, QT * RP)
    t, r, ok = rows_of(m, tile, 0, T, R, RP, QT)
    rows, seen = t * R + r, tl.where(ok, tl.minimum((at + t) // SIZE, C), 0)
    limit = tl.max(seen, axis=0)
    each = factors(None, g, r, ok, factor, R)

    if HEAD:
        mine, real, lists, first = t, ok, G * R, g * R + r
    else:
        mine = tile * QT + tl.arange(0, QT)
        real, lists, first = mine < T, G, g
    start = (((b * T + mine) * lists + first) * k)[:, None]
    own = (at + mine) // SIZE
    # Forced: [0, early) and [late, own]; candidates lie between, and are complete
    early = tl.minimum(initial, own + 1)
    late = tl.maximum(own + 1 - local, early)
    stop = tl.minimum(late, tl.minimum(own, C))
    choices = tl.where(real, tl.maximum(stop - early, 0), 0)
    need = tl.minimum(tl.maximum(k - early - (own + 1 - late), 0), choices)

    top = tl.full([QT * RP], float("-inf"), tl.float32)
    total = tl.zeros([QT * RP], tl.float32)
    low = tl.full([L], float("inf"), tl.float32)
    high = tl.full([L], float("-inf"), tl.float32)
    for n in range(0, limit, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        z = scores(
            q, summaries, scratch, b, g, G, rows, ok, cols, cols < limit, each, C,
            q_b, q_t, q_h, s_b, s_c, s_g, R, ALL, QT * RP, K, BLOCK_N, BLOCK_K, PIECE, UNIT,
        )  # fmt: skip
        there = cols[None, :] < seen[:, None]
        if SOFTMAX:
            z = tl.where(there, z, float("-inf"))
            new = tl.maximum(top, tl.max(z, axis=1))
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(z - base[:, None]), axis=1)
            top = new
        else:
            x = value(z, there, top, HEAD, SOFTMAX, RP, QT, BLOCK_N)
            fair = (cols[None, :] >= early[:, None]) & (cols[None, :] < stop[:, None])
            low = tl.minimum(low, tl.min(tl.where(fair, x, float("inf")), axis=1))
            high = tl.maximum(high, tl.max(tl.where(fair, x, float("-inf")), axis=1))
    log = tl.where(seen > 0, top + tl.log2(tl.maximum(total, 1.0)), 0.0)

    if SOFTMAX:  # sums of R weights of at most 1
        low, high = tl.zeros([L], tl.float32), tl.full([L], R + 1.0, tl.float32)
    # This pass may have rounded otherwise than the next ones will, hence some slack
    lo, hi = ordered(low).to(tl.int64) - 64, ordered(high).to(tl.int64) + 64
    held, above = choices, tl.zeros([L], tl.int32)
    go = (need > 0) & (choices > need)
    lo, hi = tl.where(go, lo, -2147483648), tl.where(go, hi, 2147483647)
    ends = tl.max(tl.where(real, own, -1), axis=0) + 1
    base, ties = tl.zeros([L], tl.int32), tl.zeros([L], tl.int32)
    state = tl.where(tl.max(go.to(tl.int32), axis=0) > 0, 0, 1)  # counting, writing, done
    while state < 2:
        x1, x2, x3 = lo + (hi - lo) // 4, lo + (hi - lo) // 2, hi - (hi - lo) // 4
        c1, c2, c3 = tl.zeros([L], tl.int32), tl.zeros([L], tl.int32), tl.zeros([L], tl.int32)
        reach = tl.where(state == 0, limit, ends)
        for n in range(0, reach, BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            z = scores(
                q, summaries, scratch, b, g, G, rows, ok, cols, cols < limit, each, C,
                q_b, q_t, q_h, s_b, s_c, s_g, R, ALL, QT * RP, K, BLOCK_N, BLOCK_K, PIECE, UNIT,
            )  # fmt: skip
            there = cols[None, :] < seen[:, None]
            key = ordered(value(z, there, log, HEAD, SOFTMAX, RP, QT, BLOCK_N))
            fair = (cols[None, :] >= early[:, None]) & (cols[None, :] < stop[:, None])
            if state == 0:
                c1 += tl.sum((fair & (key >= x1.to(tl.int32)[:, None])).to(tl.int32), axis=1)
                c2 += tl.sum((fair & (key >= x2.to(tl.int32)[:, None])).to(tl.int32), axis=1)
                c3 += tl.sum((fair & (key >= x3.to(tl.int32)[:, None])).to(tl.int32), axis=1)
            else:
                least, most = lo.to(tl.int32), hi.to(tl.int32)
                late_ones = (cols[None, :] >= late[:, None]) & (cols[None, :] <= own[:, None])
                sure = (
                    (fair & (key >= most[:, None])) | late_ones | (cols[None, :] < early[:, None])
                )
                maybe = fair & (key >= least[:, None]) & (key < most[:, None])
                order = ties[:, None] + tl.cumsum(maybe.to(tl.int32), axis=1)
                take = sure | (maybe & (order <= (need - above)[:, None]))
                place = base[:, None] + tl.cumsum(take.to(tl.int32), axis=1) - 1
                write = take & real[:, None] & (place < k)
                block = tl.broadcast_to(cols[None, :], [L, BLOCK_N])
                tl.store(index + start + place, block, mask=write)
                ties += tl.sum(maybe.to(tl.int32), axis=1)
                base += tl.sum(take.to(tl.int32), axis=1)
        lo, held, hi, above = narrow(x1, c1, need, lo, held, hi, above)
        lo, held, hi, above = narrow(x2, c2, need, lo, held, hi, above)
        lo, held, hi, above = narrow(x3, c3, need, lo, held, hi, above)
        go = go & (hi - lo > 1) & (held != need)
        counting = tl.max(go.to(tl.int32), axis=0) > 0
        state = tl.where(state == 1, 2, tl.where(counting, 0, 1))
    for n in range(0, k, BLOCK_N):
        cols = (n + tl.arange(0, BLOCK_N))[None, :]
        void = real[:, None] & (cols >= base[:, None]) & (cols < k)
        tl.store(index + start + cols, tl.full([L, BLOCK_N], -1, tl.int32), mask=void)
