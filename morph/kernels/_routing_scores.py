"""Triton kernels of routing: what a query's scores of block summaries are, for all who rank them.

A tile is QT queries that stand side by side times the R query heads of one KV head, each query's
heads padded to RP, a power of two. Whoever ranks needs the scores several times; they are computed
again each time from queries and summaries, and only where one tile holds all queries, as for a
decoded token, kept in a scratch [B G, T R, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._sliding_forward import load, strided


@triton.jit
def factors(gamma, g, r, ok, factor, R: tl.constexpr):
    """Return what the products of rows with heads r of group g are multiplied by."""
    each = tl.where(ok, factor, 0.0)
    if gamma is not None:
        each *= tl.load(gamma + g * R + r, mask=ok, other=0.0)
    return each


@triton.jit
def product(x, y, acc):
    """Add x y^T for y in float32; halves meet it as three of their own, which hold all its bits."""
    y = tl.trans(y)
    if x.dtype == tl.float32:
        acc = tl.dot(x, y, acc, input_precision="ieee")
    else:
        high = y.to(x.dtype)
        rest = y - high.to(tl.float32)
        mid = rest.to(x.dtype)
        acc = tl.dot(x, (rest - mid.to(tl.float32)).to(x.dtype), acc)
        acc = tl.dot(x, mid, acc)
        acc = tl.dot(x, high, acc)
    return acc


@triton.jit
def scores(
    q, summaries, scratch, b, g, G, rows, ok, cols, near, each, C, q_b, q_t, q_h, s_b, s_c, s_g,
    R: tl.constexpr, ALL: tl.constexpr, BLOCK_M: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Return the scores [BLOCK_M, BLOCK_N] of a tile's rows for blocks `cols`.

    ALL is how many rows a scratch has; `each` are the rows' factors.
    """
    if scratch is not None:
        at = rows[:, None] * C + cols[None, :]
        z = tl.load(
            scratch + (b * G + g) * ALL * C + at, mask=ok[:, None] & near[None, :], other=0.0
        )
    else:
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        q_at = strided(b, g, rows, q_b, q_t, q_h, R, UNIT)
        s_at = strided(b, g, cols, s_b, s_c, s_g, 1, UNIT)
        for start in tl.static_range(0, BLOCK_K, PIECE):
            x = load(q + start, q_at, ok, K - start, PIECE)
            z = product(x, load(summaries + start, s_at, near, K - start, PIECE), z)
        z = z * each[:, None]
    return z


@triton.jit
def grouped(x, RP: tl.constexpr, QT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the sums of x [QT RP, BLOCK_N] over the heads of each query."""
    return tl.sum(tl.reshape(x, [QT, RP, BLOCK_N]), axis=1)


@triton.jit
def scratch_kernel(
    q, summaries, gamma, scratch, q_b, q_t, q_h, s_b, s_c, s_g, G, C, factor,
    R: tl.constexpr, ALL: tl.constexpr, BLOCK_M: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write the scores of all ALL = T R rows of a KV head for BLOCK_N of the blocks."""
    pieces = tl.cdiv(C, BLOCK_N)
    cols = tl.program_id(0) % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    b, g, rows = row // G, row % G, tl.arange(0, BLOCK_M)
    ok, near = rows < ALL, cols < C
    each = factors(gamma, g, rows % R, ok, factor, R)
    z = scores(
        q, summaries, None, b, g, G, rows, ok, cols, near, each, C, q_b, q_t, q_h, s_b, s_c, s_g,
        R, ALL, BLOCK_M, K, BLOCK_N, BLOCK_K, PIECE, UNIT,
    )  # fmt: skip
    at = rows[:, None] * C + cols[None, :]
    tl.store(scratch + row * ALL * C + at, z, mask=ok[:, None] & near[None, :])
