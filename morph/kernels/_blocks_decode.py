"""Triton kernel of attention over listed blocks: one decoded token, split over its list.

Programs take the entries of a list in turns, since lists are filled from the front: however few of
their places are used, all programs have the same work, and how many there are is known without
asking the GPU. `join_kernel` of the window's decode adds the shares up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._blocks_forward import CHANGING, keys_of, mix, places_of, raised, steps_of
from morph.kernels._sliding_forward import dot, load, store, strided, tanh


@triton.jit(do_not_specialize=CHANGING)
def decode_kernel(
    q, k, v, index, bias, origin, parts, logs,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, list_b, list_g, bias_b, bias_g,
    at, S, lists, splits, N, inner, outer,
    R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log of the sum over one split, of the R query heads that follow one list.

    SHARE lists read the keys of one KV head.
    """
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits).to(tl.int64)
    b, j = row // lists, row % lists
    if origin is not None:
        at = tl.load(origin + b)
    heads = tl.arange(0, BLOCK_M)
    ok = heads < R
    q_tile = load(q, (b * q_b + (j * R + heads) * q_h) * UNIT, ok, K, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    start, limit = b * list_b + j * list_g, tl.minimum(S, at + 1)
    for x in range(split, steps_of(N, ROOM, BLOCK_N), splits):
        entry, keys, near = keys_of(index, start, x, N, SIZE, ROOM, BLOCK_N)
        near = near & (keys < limit)
        k_tile = load(k, strided(b, j // SHARE, keys, k_b, k_t, k_h, 1, UNIT), near, K, BLOCK_K)
        v_tile = load(v, strided(b, j // SHARE, keys, v_b, v_t, v_h, 1, UNIT), near, V, BLOCK_V)
        place = places_of(None, start, entry, N, heads, ok, 1, ROOM, BLOCK_N)
        s = dot(q_tile, tl.trans(k_tile), PRECISION)
        if CAP:
            s = tanh(s * inner)
        s = raised(s, bias, b * bias_b + j * bias_g, place, outer)
        seen = (place >= 0) & near[None, :]
        acc, top, total = mix(acc, top, total, s, v_tile, seen, PRECISION)
    whole = tl.where(total > 0, total, 1.0)
    out = (row * splits + split) * R + heads
    store(parts, out * V, ok, acc / whole[:, None], V, BLOCK_V)
    tl.store(logs + out, tl.where(total > 0, top + tl.log2(whole), float("-inf")), mask=ok)
