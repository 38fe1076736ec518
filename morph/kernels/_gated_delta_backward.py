"""Triton kernels of the backward of the gated delta rule.

With P = tril(Q K^T) D, eG = exp(G), eC = exp(G_C), after = exp(G_C - G) and X^ the gradient of X:

    Vn^ = scale P^T O^ + after K S1^              local_new, then reverse_states
    S0^ = eC S1^ + scale (eG Q)^T O^ - W^T Vn^    reverse_states
    Q^  = scale eG O^ S0^T + dS K,  dS = scale tril(O^ Vn^T) D
    K^  = dS^T Q + after Vn S1^^T + (via A and W), W^ = -Vn^ S0^T

U = Tm beta V and W = Tm beta eG K give Y = Tm^T Vn^ and Z = Tm^T W^: V^ = beta Y,
K^ += beta eG Z, and as Tm^ Tm^T = Vn^ U^T + W^ W^T in A's triangle, A^ = -(Y U^T + Z W^T) there.
Every exp(G) pairs with a product that one of the gradients holds already, so G^ is sums of rows:
+ Q Q^ where G decays a row from before, - K K^ where it decays it afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from morph.kernels._gated_delta_forward import decay, dot, load, store, token


@triton.jit
def local_new(
    q_ptr,
    k_ptr,
    gate_ptr,
    do_ptr,
    dnew_ptr,
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
    """What the outputs of a chunk want of its own Vn: scale P^T O^, BV columns."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, cols = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    own, shared = token(bh, H, R, T, n, C)
    at, left = bh * N + n, T - n * C
    hi, lo = tl.load(gate_ptr + at * 2 * C + row), tl.load(gate_ptr + at * 2 * C + C + row)
    pairs = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        cols_k = start + tl.arange(0, BK)
        q = load(q_ptr + own * K, row, left, H * K, cols_k, K)
        k = load(k_ptr + shared * K, row, left, (H // R) * K, cols_k, K)
        pairs += dot(k, tl.trans(q), PRECISION)
    # rows are keys here, so the decay is that of negated sums
    pairs *= decay(-hi, -lo, -hi, -lo, row[:, None] <= row[None, :]) * scale
    do = load(do_ptr + own * V, row, left, H * V, cols, V)
    store(dnew_ptr + at * C * V, row, C, V, cols, V, dot(pairs.to(do.dtype), do, PRECISION))


@triton.jit
def reverse_states(
    q_ptr,
    k_ptr,
    w_ptr,
    gate_ptr,
    do_ptr,
    dlast_ptr,
    local_ptr,
    dnew_ptr,
    dafter_ptr,
    dfirst_ptr,
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
    """Walk the chunks backwards with BV columns of S1^; write it for each chunk, and all of Vn^."""
    bh = tl.program_id(0).to(tl.int64)
    row, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(1) * BV + tl.arange(0, BV)
    ds = load(dlast_ptr + bh * K * V, cols_k, K, V, cols, V).to(tl.float32)
    for step in range(N):
        n = N - 1 - step
        at, left = bh * N + n, T - n * C
        own, shared = token(bh, H, R, T, n, C)
        gate = gate_ptr + at * 2 * C
        hi, lo = tl.load(gate + row), tl.load(gate + C + row)
        end_hi, end_lo = tl.load(gate + C - 1), tl.load(gate + 2 * C - 1)
        k = load(k_ptr + shared * K, row, left, (H // R) * K, cols_k, K)
        rounded = ds.to(k.dtype)
        store(dafter_ptr + at * K * V, cols_k, K, V, cols, V, rounded)
        dnew = dot(k, rounded, PRECISION) * tl.exp((end_hi - hi) + (end_lo - lo))[:, None]
        dnew += load(local_ptr + at * C * V, row, C, V, cols, V).to(tl.float32)
        dnew = dnew.to(k.dtype)
        store(dnew_ptr + at * C * V, row, C, V, cols, V, dnew)
        do = load(do_ptr + own * V, row, left, H * V, cols, V).to(tl.float32)
        do = (do * (tl.exp(hi + lo) * scale)[:, None]).to(k.dtype)
        q = load(q_ptr + own * K, row, left, H * K, cols_k, K)
        w = load(w_ptr + at * C * K, row, C, K, cols_k, K)
        ds = ds * tl.exp(end_hi + end_lo)
        ds += dot(tl.trans(q), do, PRECISION)
        ds -= dot(tl.trans(w), dnew, PRECISION)
    store(dfirst_ptr + bh * K * V, cols_k, K, V, cols, V, ds)


@triton.jit
def attend_grads(
    q_ptr,
    k_ptr,
    gate_ptr,
    before_ptr,
    dafter_ptr,
    new_ptr,
    dnew_ptr,
    do_ptr,
    dq_ptr,
    dk_local_ptr,
    dw_ptr,
    dgate_ptr,
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
    """Q^, W^ and what K^ and G^ owe to outputs and states, for BK columns of K in one chunk.

    dgate [B, H, N, K blocks, C] is summed over blocks by the next kernel.
    """
    bh, n, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, cols_k = tl.arange(0, C), part * BK + tl.arange(0, BK)
    own, shared = token(bh, H, R, T, n, C)
    at, left = bh * N + n, T - n * C
    ds = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    dw = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        do = load(do_ptr + own * V, row, left, H * V, cols, V)
        new = load(new_ptr + at * C * V, row, C, V, cols, V)
        dnew = load(dnew_ptr + at * C * V, row, C, V, cols, V)
        before = load(before_ptr + at * K * V, cols_k, K, V, cols, V)
        dafter = load(dafter_ptr + at * K * V, cols_k, K, V, cols, V)
        ds += dot(do, tl.trans(new), PRECISION)
        dq += dot(do, tl.trans(before), PRECISION)
        dk += dot(new, tl.trans(dafter), PRECISION)
        dw -= dot(dnew, tl.trans(before), PRECISION)
        kept += tl.sum(before.to(tl.float32) * dafter.to(tl.float32), 1)
    store(dw_ptr + at * C * K, row, C, K, cols_k, K, dw)

    gate = gate_ptr + at * 2 * C
    hi, lo = tl.load(gate + row), tl.load(gate + C + row)
    end_hi, end_lo = tl.load(gate + C - 1), tl.load(gate + 2 * C - 1)
    q = load(q_ptr + own * K, row, left, H * K, cols_k, K)
    k = load(k_ptr + shared * K, row, left, (H // R) * K, cols_k, K)
    ds = (ds * decay(hi, lo, hi, lo, row[:, None] >= row[None, :]) * scale).to(q.dtype)
    dq = dq * (tl.exp(hi + lo) * scale)[:, None] + dot(ds, k, PRECISION)
    store(dq_ptr + own * K, row, left, H * K, cols_k, K, dq)
    dk = dk * tl.exp((end_hi - hi) + (end_lo - lo))[:, None]
    written = tl.sum(dk * k) + tl.sum(kept, 0) * tl.exp(end_hi + end_lo)
    dk += dot(tl.trans(ds), q, PRECISION)
    store(dk_local_ptr + at * C * K, row, C, K, cols_k, K, dk)
    dgate = tl.sum(dq * q, 1) - tl.sum(dk * k, 1) + tl.where(row == C - 1, written, 0.0)
    tl.store(dgate_ptr + (at * tl.num_programs(2) + part) * C + row, dgate)


@triton.jit
def solve_grads(
    k_ptr,
    v_ptr,
    g_ptr,
    beta_ptr,
    u_ptr,
    w_ptr,
    inverse_ptr,
    gate_ptr,
    dnew_ptr,
    dw_ptr,
    dk_local_ptr,
    dgate_ptr,
    dk_ptr,
    dv_ptr,
    dg_ptr,
    dbeta_ptr,
    T,
    H,
    R,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """V^, beta^, all of K^, and g^ as what its chunk still sums up from each token on."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, C)
    own, shared = token(bh, H, R, T, n, C)
    at, left = bh * N + n, T - n * C
    hi, lo = tl.load(gate_ptr + at * 2 * C + row), tl.load(gate_ptr + at * 2 * C + C + row)
    into = tl.exp(hi + lo)
    beta = tl.load(beta_ptr + own + row * H, mask=row < left, other=0.0).to(tl.float32)
    turned = tl.trans(load(inverse_ptr + at * C * C, row, C, C, row, C))
    da = tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        y = dot(turned, load(dnew_ptr + at * C * V, row, C, V, cols, V), PRECISION)
        store(dv_ptr + own * V, row, left, H * V, cols, V, y * beta[:, None])
        v = load(v_ptr + shared * V, row, left, (H // R) * V, cols, V)
        dbeta += tl.sum(y * v, 1)
        u = load(u_ptr + at * C * V, row, C, V, cols, V)
        da -= dot(y.to(u.dtype), tl.trans(u), PRECISION)
    pairs = tl.zeros([C, C], tl.float32)
    read = tl.zeros([C], tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        z = dot(turned, load(dw_ptr + at * C * K, row, C, K, cols, K), PRECISION)
        k = load(k_ptr + shared * K, row, left, (H // R) * K, cols, K)
        read += tl.sum(z * k, 1)
        pairs += dot(k, tl.trans(k), PRECISION)
        w = load(w_ptr + at * C * K, row, C, K, cols, K)
        da -= dot(z.to(w.dtype), tl.trans(w), PRECISION)

    da *= decay(hi, lo, hi, lo, row[:, None] > row[None, :])
    pairs *= da
    dbeta += into * read + tl.sum(pairs, 1)
    tl.store(dbeta_ptr + own + row * H, dbeta, mask=row < left)
    dgate = beta * (into * read + tl.sum(pairs, 1)) - tl.sum(pairs * beta[:, None], 0)
    for part in range(PARTS):
        dgate += tl.load(dgate_ptr + (at * PARTS + part) * C + row)
    dg = tl.cumsum(dgate, 0, reverse=True)
    g = tl.load(g_ptr + own + row * H, mask=row < left, other=0.0).to(tl.float32)
    tl.store(dg_ptr + own + row * H, tl.where(g > -100.0, dg, 0.0), mask=row < left)

    da *= beta[:, None]
    both = da + tl.trans(da)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        z = dot(turned, load(dw_ptr + at * C * K, row, C, K, cols, K), PRECISION)
        dk = load(dk_local_ptr + at * C * K, row, C, K, cols, K) + z * (beta * into)[:, None]
        k = load(k_ptr + shared * K, row, left, (H // R) * K, cols, K)
        dk += dot(both.to(k.dtype), k, PRECISION)
        store(dk_ptr + own * K, row, left, H * K, cols, K, dk)
