"""Triton kernels of attention over listed blocks: the backward, which recomputes the weights.

Gradients of queries and biases go by tiles of queries, as the forward does; those of keys and
values by blocks, through the inverted lists: for each block the entries of tiles' lists that name
it, in the order of the tiles. Every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._blocks_forward import (
    CHANGING,
    bias_at,
    keys_of,
    list_of,
    places_of,
    raised,
    rows_of,
    steps_of,
)
from morph.kernels._sliding_forward import dense, dot, load, store, strided, tanh


@triton.jit
def slopes(s, dp, seen, lse, delta, bias, at, place, inner, outer, CAP: tl.constexpr):
    """Return the weights of products s, the gradients of their scores, and those of s / scale."""
    bent = 1.0
    if CAP:
        s = tanh(s * inner)
        bent = 1 - s * s
    p = tl.where(seen, tl.exp2(raised(s, bias, at, place, outer) - lse), 0.0)
    slope = p * (dp - delta)
    return p, slope, slope * bent


@triton.jit
def bias_grads(
    dbias, out, slope, row, places, start, x, count, tile, shift, T, N,
    R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr, JR: tl.constexpr, L: tl.constexpr,
    ROOM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the bias of the entries of step x; return the sums of a part block.

    The heads that follow one list are added up, and the pieces of one block, in `row`.
    """
    M: tl.constexpr = QT * RP
    PIECES: tl.constexpr = ROOM // BLOCK_N if ROOM > BLOCK_N else 1
    EACH: tl.constexpr = BLOCK_N // ROOM if ROOM < BLOCK_N else 1
    sums = tl.sum(tl.reshape(slope, (M, EACH, BLOCK_N // EACH)), axis=2)
    if PIECES > 1:
        row = tl.where(x % PIECES == 0, 0.0, row) + sums
        sums = row
    last, d = x % PIECES == PIECES - 1, tl.arange(0, M)
    if JR == 1:
        sums = tl.sum(tl.reshape(sums, (QT, RP, EACH)), axis=1)
        d = tl.arange(0, QT) * RP
    _, r, ok = rows_of(d, tile, shift, T, R, RP, QT)
    entry = x // PIECES * EACH + tl.arange(0, EACH)
    lists = list_of(d, JR, RP, L)
    place = places_of(places, start, entry, count, lists, ok, L, 1, 2)  # [rows, entries]
    at = out + (d // RP * JR + (r if JR > 1 else 0)).to(tl.int64)[:, None] * N + place
    tl.store(dbias + at, sums, mask=(place >= 0) & last)
    return row


@triton.jit(do_not_specialize=CHANGING)
def queries_kernel(
    q, k, v, blocks, counts, places, bias, origin, o, do, lse, delta, dq, dbias,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, list_b, list_g, bias_b, bias_t, bias_g, bias_r,
    at, first, tiles, T, S, G, W, N, inner, outer, scale,
    R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr, JR: tl.constexpr, L: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, g = row // G, row % G
    if origin is not None:
        at = tl.load(origin + b)
    shift = at % QT
    m = tl.arange(0, QT * RP)
    t, r, ok = rows_of(m, first + tile, shift, T, R, RP, QT)
    lists, where, rows = list_of(m, JR, RP, L), at + t, t * R + r
    table = b * list_b + g * list_g + tile
    start, count = table * W, tl.load(counts + table)
    limit = tl.minimum(tl.minimum(S, at + T), at - shift + (first + tile + 1) * QT)
    q_tile = load(q, strided(b, g, rows, q_b, q_t, q_h, R, UNIT), ok, K, BLOCK_K)
    biases = bias_at(b, g, t, r, bias_b, bias_t, bias_g, bias_r)[:, None]
    out = dense(b, g, rows, T, G, R, V)
    do_tile = load(do, out, ok, V, BLOCK_V)
    o_tile = load(o, out, ok, V, BLOCK_V)
    log = tl.load(lse + row * T * R + rows, mask=ok, other=float("inf"))
    dots = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), axis=1)
    tl.store(delta + row * T * R + rows, dots, mask=ok)
    acc = tl.zeros([QT * RP, BLOCK_K], tl.float32)
    part = tl.zeros([QT * RP, 1], tl.float32)
    for x in range(0, steps_of(count, ROOM, BLOCK_N)):
        entry, keys, near = keys_of(blocks, start, x, count, SIZE, ROOM, BLOCK_N)
        near = near & (keys < limit)
        k_tile = load(k, strided(b, g, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
        v_tile = load(v, strided(b, g, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
        place = places_of(places, start, entry, count, lists, ok, L, ROOM, BLOCK_N)
        seen = (place >= 0) & near[None, :] & (keys[None, :] <= where[:, None])
        s = dot(q_tile, tl.trans(k_tile), PRECISION)
        dp = dot(do_tile, tl.trans(v_tile), PRECISION)
        _, slope, ds = slopes(
            s, dp, seen, log[:, None], dots[:, None], bias, biases, place, inner, outer, CAP
        )
        acc += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
        if dbias is not None:
            part = bias_grads(
                dbias, (row * tiles + tile) * QT * JR * N, slope, part, places, start, x, count,
                first + tile, shift, T, N, R, RP, QT, JR, L, ROOM, BLOCK_N,
            )  # fmt: skip
    store(dq, dense(b, g, rows, T, G, R, K), ok, acc * scale, K, BLOCK_K)


@triton.jit(do_not_specialize=CHANGING)
def keys_kernel(
    q, k, v, order, bounds, places, bias, origin, do, lse, delta, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, list_b, list_g, bias_b, bias_t, bias_g, bias_r,
    at, first, tiles, T, S, G, W, C, again, inner, outer, scale,
    R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr, JR: tl.constexpr, L: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys of one block, added to what is there where `again` is not 0."""
    M: tl.constexpr = QT * RP
    PIECES: tl.constexpr = ROOM // BLOCK_N if ROOM > BLOCK_N else 1
    pieces = C * PIECES
    block, piece = (tl.program_id(0) % pieces) // PIECES, tl.program_id(0) % PIECES
    row = (tl.program_id(0) // pieces).to(tl.int64)
    b, g = row // G, row % G
    if origin is not None:
        at = tl.load(origin + b)
    shift = at % QT
    inside = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * SIZE + inside
    mine = (inside < SIZE) & (keys < S)
    near = mine & (keys < at + T)
    k_tile = load(k, strided(b, g, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
    v_tile = load(v, strided(b, g, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    table = (b * list_b + g * list_g).to(tl.int32)  # the first tile of this row's lists
    bound = table // tiles * C + block
    begin, end = tl.load(bounds + bound), tl.load(bounds + bound + 1)
    for x in range(begin * M, end * M, BLOCK_M):
        at_m = x + tl.arange(0, BLOCK_M)
        here = at_m // M < end
        flat = tl.load(order + at_m // M, mask=here, other=0)
        m, tile = at_m % M, flat // W - table
        t, r, ok = rows_of(m, first + tile, shift, T, R, RP, QT)
        ok = ok & here
        rows = t * R + r
        if places is None:
            place = tl.where(ok, flat % W, -1)
        else:
            place = flat.to(tl.int64) * L + list_of(m, JR, RP, L)
            place = tl.load(places + place, mask=ok, other=-1)
        seen = (place >= 0)[None, :] & near[:, None] & (keys[:, None] <= (at + t)[None, :])
        q_tile = load(q, strided(b, g, rows, q_b, q_t, q_h, R, UNIT), ok, K, BLOCK_K)
        do_tile = load(do, dense(b, g, rows, T, G, R, V), ok, V, BLOCK_V)
        log = tl.load(lse + row * T * R + rows, mask=ok, other=float("inf"))
        dots = tl.load(delta + row * T * R + rows, mask=ok, other=0.0)
        biases = bias_at(b, g, t, r, bias_b, bias_t, bias_g, bias_r)[None, :]
        s = dot(k_tile, tl.trans(q_tile), PRECISION)
        dp = dot(v_tile, tl.trans(do_tile), PRECISION)
        p, _, ds = slopes(
            s, dp, seen, log[None, :], dots[None, :], bias, biases, place[None, :],
            inner, outer, CAP,
        )  # fmt: skip
        dv_tile += dot(p.to(do_tile.dtype), do_tile, PRECISION)
        dk_tile += dot(ds.to(q_tile.dtype), q_tile, PRECISION)
    dk_at, dv_at = dense(b, g, keys, S, G, 1, K), dense(b, g, keys, S, G, 1, V)
    old = mine & (again != 0)
    dk_tile = dk_tile * scale + load(dk, dk_at, old, K, BLOCK_K)
    dv_tile += load(dv, dv_at, old, V, BLOCK_V)
    store(dk, dk_at, mine, dk_tile, K, BLOCK_K)
    store(dv, dv_at, mine, dv_tile, V, BLOCK_V)
