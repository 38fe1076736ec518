"""Triton kernels of attention over listed blocks: the forward, and what all kernels share.

A tile is QT queries that stand side by side times the R query heads of one KV head, each query's
heads padded to RP, a power of two: row m is query m // RP and head m % RP. It walks through the
union of the blocks that its queries list, so that what neighbours both read is loaded once.
`places` says, for each block of the union, where each of the tile's L lists names it, or -1; where
L is 1 there is none, and the list is its own union. Scores count powers of two. `b` and `g`, the
places in the batch and among KV heads, are int64, since every large offset starts with them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._sliding_forward import dense, dot, load, store, strided, tanh

# Numbers that change from call to call: kernels gain nothing by being compiled anew for them
CHANGING = ["at", "first", "tiles", "T", "S", "W", "N", "C", "again", "splits"]


@triton.jit
def rows_of(m, tile, shift, T, R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr):
    """Return the token and head of rows m, and which of them there are."""
    t, r = tile * QT - shift + m // RP, m % RP
    return t, r, (t >= 0) & (t < T) & (r < R)


@triton.jit
def list_of(m, JR: tl.constexpr, RP: tl.constexpr, L: tl.constexpr):
    """Return which of a tile's lists rows m follow: L are JR of each query, or JR of them all."""
    own = m * 0
    if L > JR:
        own += m // RP * JR
    if JR > 1:
        own += m % RP
    return own


@triton.jit
def steps_of(count, ROOM: tl.constexpr, BLOCK_N: tl.constexpr):
    if ROOM >= BLOCK_N:
        steps = count * (ROOM // BLOCK_N)
    else:
        steps = tl.cdiv(count, BLOCK_N // ROOM)
    return steps


@triton.jit
def keys_of(
    blocks, start, x, count, SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Return the entries of a list that step x reads, their keys, and which of those there are.

    A step is a piece of one block, whose entry is a number, or several small blocks. A block of
    SIZE keys takes ROOM places, the next power of two.
    """
    cols = tl.arange(0, BLOCK_N)
    if ROOM >= BLOCK_N:
        entry = x // (ROOM // BLOCK_N)
        inside = x % (ROOM // BLOCK_N) * BLOCK_N + cols
        block = tl.load(blocks + start + entry).to(tl.int32)
    else:
        entry = x * (BLOCK_N // ROOM) + cols // ROOM
        inside = cols % ROOM
        block = tl.load(blocks + start + entry, mask=entry < count, other=-1).to(tl.int32)
    return entry, block * SIZE + inside, (block >= 0) & (inside < SIZE)


@triton.jit
def places_of(
    places, start, entry, count, lists, ok,
    L: tl.constexpr, ROOM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return where rows' lists name the entries, -1 for nowhere: [rows, 1] or [rows, entries]."""
    if ROOM >= BLOCK_N:
        if places is None:
            place = tl.where(ok, entry, -1)
        else:
            place = tl.load(places + (start + entry) * L + lists, mask=ok, other=-1)
        place = place[:, None]
    else:
        ask = ok[:, None] & (entry < count)[None, :]
        if places is None:
            place = tl.where(ask, entry[None, :], -1)
        else:
            at = (start + entry)[None, :] * L + lists[:, None]
            place = tl.load(places + at, mask=ask, other=-1)
    return place


@triton.jit
def bias_at(b, g, t, r, bias_b, bias_t, bias_g, bias_r):
    return b * bias_b + g * bias_g + t.to(tl.int64) * bias_t + r * bias_r


@triton.jit
def raised(s, bias, at, place, outer):
    """Return scores in powers of two, with the bias of the rows' places."""
    s = s * outer
    if bias is not None:
        extra = tl.load(bias + at + place, mask=place >= 0, other=0.0)
        s += extra.to(tl.float32) * 1.4426950408889634
    return s


@triton.jit
def mix(acc, top, total, s, v, seen, PRECISION: tl.constexpr):
    """Take the scores of some keys into the running output, largest score and sum of weights."""
    s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    acc = acc * fade[:, None] + dot(p.to(v.dtype), v, PRECISION)
    return acc, new, total * fade + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(
    q, k, v, blocks, counts, places, bias, origin, o, lse,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, list_b, list_g, bias_b, bias_t, bias_g, bias_r,
    at, first, tiles, T, S, G, W, inner, outer,
    R: tl.constexpr, RP: tl.constexpr, QT: tl.constexpr, JR: tl.constexpr, L: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles - 1 - tl.program_id(0) % tiles  # late queries list more: they go first
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, g = row // G, row % G
    if origin is not None:
        at = tl.load(origin + b)
    shift = at % QT
    m = tl.arange(0, QT * RP)
    t, r, ok = rows_of(m, first + tile, shift, T, R, RP, QT)
    lists, where = list_of(m, JR, RP, L), at + t
    table = b * list_b + g * list_g + tile
    start, count = table * W, tl.load(counts + table)
    limit = tl.minimum(tl.minimum(S, at + T), at - shift + (first + tile + 1) * QT)
    q_tile = load(q, strided(b, g, t * R + r, q_b, q_t, q_h, R, UNIT), ok, K, BLOCK_K)
    biases = bias_at(b, g, t, r, bias_b, bias_t, bias_g, bias_r)[:, None]
    acc = tl.zeros([QT * RP, BLOCK_V], tl.float32)
    top = tl.full([QT * RP], float("-inf"), tl.float32)
    total = tl.zeros([QT * RP], tl.float32)
    for x in range(0, steps_of(count, ROOM, BLOCK_N)):
        entry, keys, near = keys_of(blocks, start, x, count, SIZE, ROOM, BLOCK_N)
        near = near & (keys < limit)
        k_tile = load(k, strided(b, g, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
        v_tile = load(v, strided(b, g, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
        place = places_of(places, start, entry, count, lists, ok, L, ROOM, BLOCK_N)
        seen = (place >= 0) & near[None, :] & (keys[None, :] <= where[:, None])
        s = dot(q_tile, tl.trans(k_tile), PRECISION)
        if CAP:
            s = tanh(s * inner)
        s = raised(s, bias, biases, place, outer)
        acc, top, total = mix(acc, top, total, s, v_tile, seen, PRECISION)
    whole = tl.where(total > 0, total, 1.0)
    rows = t * R + r
    store(o, dense(b, g, rows, T, G, R, V), ok, acc / whole[:, None], V, BLOCK_V)
    # infinite where nothing was seen, so that the backward pass finds weights of 0
    log = tl.where(total > 0, top + tl.log2(whole), float("inf"))
    tl.store(lse + row * T * R + rows, log, mask=ok)
