"""Triton kernels of the gated delta rule: the forward, and one decoded token.

A program is one chunk of one query head, or one block of V columns of its state. Tensors between
kernels are [B, H, N, C, .] with N chunks of C rows; rows past T hold zeros there. `bh` is
b * H + h and int64, since every large offset starts with it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    # Triton 3.9 no longer defaults to float32
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def load(ptr, row, limit, stride, col, width):
    """Rows `row` < limit and columns `col` < width of a matrix; zeros elsewhere."""
    mask = (row[:, None] < limit) & (col[None, :] < width)
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@triton.jit
def store(ptr, row, limit, stride, col, width, x):
    mask = (row[:, None] < limit) & (col[None, :] < width)
    tl.store(ptr + row[:, None] * stride + col[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def token(bh, H, R, T, n, C: tl.constexpr):
    """Return, for the first token of chunk n: its row of [B, T, H], and of [B, T, H // R]."""
    row = (bh // H) * T + n * C
    return row * H + bh % H, row * (H // R) + (bh % H) // R


@triton.jit
def split_gate(ptr, row, limit, H):
    """Load log decays as a multiple of 2^-10, of which sums are exact, and what is left.

    A plain sum over a chunk loses the small decays behind one large one. At -100 exp is 0.
    """
    g = tl.load(ptr + row * H, mask=row < limit, other=0.0).to(tl.float32)
    g = tl.where(g < -100.0, -100.0, g)
    coarse = tl.floor(g * 1024.0 + 0.5) * 0.0009765625
    return coarse, g - coarse


@triton.jit
def decay(hi_i, lo_i, hi_j, lo_j, keep):
    """exp(G_i - G_j) as [rows i, columns j] where keep, else 0."""
    gap = (hi_i[:, None] - hi_j[None, :]) + (lo_i[:, None] - lo_j[None, :])
    return tl.exp(tl.where(keep, gap, float("-inf")))


@triton.jit
def inverse(a, row, LEVELS: tl.constexpr):
    """(I + a)^-1 of a strictly lower [2^LEVELS, 2^LEVELS]: from blocks of size s to 2 s.

    The powers of `a` reach 1e18 for equal keys and cancel; the inverses of its blocks stay small.
    """
    t = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in range(LEVELS):
        block = row >> level
        below = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
        t -= dot(dot(t, tl.where(below, a, 0.0), "tf32x3"), t, "tf32x3")
    return t


@triton.jit
def prepare(
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    u_ptr,
    w_ptr,
    inverse_ptr,
    gate_ptr,
    T,
    H,
    R,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write G as two sums [2, C], U = Tm beta V, W = Tm beta exp(G) K and, if KEEP, Tm [C, C].

    Tm = (I + A)^-1, A = tril(beta K K^T D, -1), in halves of C / 2 rows:
    the lower left of Tm is -T22 A21 T11.
    """
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = C // 2
    row = tl.arange(0, half)
    left, left2 = T - n * C, T - n * C - half
    own, shared = token(bh, H, R, T, n, C)
    groups = H // R
    hi1, lo1 = split_gate(g_ptr + own, row, left, H)
    hi2, lo2 = split_gate(g_ptr + own, row + half, left, H)
    hi2 = tl.cumsum(hi2, 0) + tl.sum(hi1, 0)
    lo2 = tl.cumsum(lo2, 0) + tl.sum(lo1, 0)
    hi1, lo1 = tl.cumsum(hi1, 0), tl.cumsum(lo1, 0)
    at = bh * N + n
    tl.store(gate_ptr + at * 2 * C + row, hi1)
    tl.store(gate_ptr + at * 2 * C + half + row, hi2)
    tl.store(gate_ptr + at * 2 * C + C + row, lo1)
    tl.store(gate_ptr + at * 2 * C + C + half + row, lo2)
    beta1 = tl.load(beta_ptr + own + row * H, mask=row < left, other=0.0).to(tl.float32)
    beta2 = tl.load(beta_ptr + own + (row + half) * H, mask=row < left2, other=0.0).to(tl.float32)

    a11 = tl.zeros([half, half], tl.float32)
    a21 = tl.zeros([half, half], tl.float32)
    a22 = tl.zeros([half, half], tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        k1 = load(k_ptr + shared * K, row, left, groups * K, cols, K)
        k2 = load(k_ptr + shared * K, row + half, left, groups * K, cols, K)
        a11 += dot(k1, tl.trans(k1), PRECISION)
        a21 += dot(k2, tl.trans(k1), PRECISION)
        a22 += dot(k2, tl.trans(k2), PRECISION)
    below = row[:, None] > row[None, :]
    a11 *= decay(hi1, lo1, hi1, lo1, below) * beta1[:, None]
    a21 *= decay(hi2, lo2, hi1, lo1, row[:, None] >= 0) * beta2[:, None]
    a22 *= decay(hi2, lo2, hi2, lo2, below) * beta2[:, None]
    t11 = inverse(a11, row, LEVELS)
    t22 = inverse(a22, row, LEVELS)
    t21 = -dot(t22, dot(a21, t11, "tf32x3"), "tf32x3")
    if KEEP:
        out = inverse_ptr + at * C * C
        store(out, row, half, C, row, half, t11)
        store(out + half, row, half, C, row, half, tl.zeros_like(t11))
        store(out + half * C, row, half, C, row, half, t21)
        store(out + half * C + half, row, half, C, row, half, t22)

    t11, t21 = t11 * beta1[None, :], t21 * beta1[None, :]
    t22 = t22 * beta2[None, :]
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        x = load(v_ptr + shared * V, row, left, groups * V, cols, V)
        u1 = dot(t11.to(x.dtype), x, PRECISION)
        u2 = dot(t21.to(x.dtype), x, PRECISION)
        x = load(v_ptr + shared * V, row + half, left, groups * V, cols, V)
        u2 += dot(t22.to(x.dtype), x, PRECISION)
        store(u_ptr + at * C * V, row, half, V, cols, V, u1)
        store(u_ptr + at * C * V, row + half, C, V, cols, V, u2)
    into1, into2 = tl.exp(hi1 + lo1), tl.exp(hi2 + lo2)
    t11, t21 = t11 * into1[None, :], t21 * into1[None, :]
    t22 = t22 * into2[None, :]
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        x = load(k_ptr + shared * K, row, left, groups * K, cols, K)
        w1 = dot(t11.to(x.dtype), x, PRECISION)
        w2 = dot(t21.to(x.dtype), x, PRECISION)
        x = load(k_ptr + shared * K, row + half, left, groups * K, cols, K)
        w2 += dot(t22.to(x.dtype), x, PRECISION)
        store(w_ptr + at * C * K, row, half, K, cols, K, w1)
        store(w_ptr + at * C * K, row + half, C, K, cols, K, w2)


@triton.jit
def states(
    k_ptr,
    u_ptr,
    w_ptr,
    gate_ptr,
    first_ptr,
    before_ptr,
    new_ptr,
    last_ptr,
    T,
    H,
    R,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk the chunks with BV columns of the state; write it before each, and Vn = U - W S0."""
    bh = tl.program_id(0).to(tl.int64)
    row, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(1) * BV + tl.arange(0, BV)
    s = load(first_ptr + bh * K * V, cols_k, K, V, cols, V).to(tl.float32)
    for n in range(N):
        at = bh * N + n
        _, shared = token(bh, H, R, T, n, C)
        gate = gate_ptr + at * 2 * C
        hi, lo = tl.load(gate + row), tl.load(gate + C + row)
        end_hi, end_lo = tl.load(gate + C - 1), tl.load(gate + 2 * C - 1)
        after = tl.exp((end_hi - hi) + (end_lo - lo))
        w = load(w_ptr + at * C * K, row, C, K, cols_k, K)
        rounded = s.to(w.dtype)
        store(before_ptr + at * K * V, cols_k, K, V, cols, V, rounded)
        new = load(u_ptr + at * C * V, row, C, V, cols, V).to(tl.float32)
        new -= dot(w, rounded, PRECISION)
        store(new_ptr + at * C * V, row, C, V, cols, V, new)
        k = load(k_ptr + shared * K, row, T - n * C, (H // R) * K, cols_k, K)
        s = s * tl.exp(end_hi + end_lo)
        s += dot(tl.trans(k), (new * after[:, None]).to(k.dtype), PRECISION)
    store(last_ptr + bh * K * V, cols_k, K, V, cols, V, s)


@triton.jit
def output(
    q_ptr,
    k_ptr,
    gate_ptr,
    before_ptr,
    new_ptr,
    o_ptr,
    scale,
    T,
    H,
    R,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O = scale (exp(G) Q S0 + (tril(Q K^T) D) Vn), BV columns of one chunk."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, cols = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    own, shared = token(bh, H, R, T, n, C)
    at, left = bh * N + n, T - n * C
    hi, lo = tl.load(gate_ptr + at * 2 * C + row), tl.load(gate_ptr + at * 2 * C + C + row)
    pairs = tl.zeros([C, C], tl.float32)
    o = tl.zeros([C, BV], tl.float32)
    for start in range(0, K, BK):
        cols_k = start + tl.arange(0, BK)
        q = load(q_ptr + own * K, row, left, H * K, cols_k, K)
        k = load(k_ptr + shared * K, row, left, (H // R) * K, cols_k, K)
        pairs += dot(q, tl.trans(k), PRECISION)
        o += dot(q, load(before_ptr + at * K * V, cols_k, K, V, cols, V), PRECISION)
    pairs *= decay(hi, lo, hi, lo, row[:, None] >= row[None, :])
    o = o * tl.exp(hi + lo)[:, None]
    new = load(new_ptr + at * C * V, row, C, V, cols, V)
    o += dot(pairs.to(new.dtype), new, PRECISION)
    store(o_ptr + own * V, row, left, H * V, cols, V, o * scale)


@triton.jit
def decode(
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    first_ptr,
    o_ptr,
    last_ptr,
    scale,
    H,
    R,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One token: BV columns of the state are read, corrected and written once."""
    bh = tl.program_id(0).to(tl.int64)
    rows, cols = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    shared = bh // H * (H // R) + bh % H // R
    q = tl.load(q_ptr + bh * K + rows, mask=rows < K, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + shared * K + rows, mask=rows < K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + shared * V + cols, mask=cols < V, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + bh).to(tl.float32)
    s = load(first_ptr + bh * K * V, rows, K, V, cols, V).to(tl.float32) * tl.exp(g)
    e = (v - tl.sum(s * k[:, None], 0)) * tl.load(beta_ptr + bh).to(tl.float32)
    s += k[:, None] * e[None, :]
    o = tl.sum(s * q[:, None], 0) * scale
    tl.store(o_ptr + bh * V + cols, o.to(o_ptr.dtype.element_ty), mask=cols < V)
    store(last_ptr + bh * K * V, rows, K, V, cols, V, s)
