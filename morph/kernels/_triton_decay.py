"""Triton kernels of the simple-decay linear attention in `decay.py`, forward and backward.

With chunks of C tokens, G_i the sum of a chunk's gates up to token i, S the state before the chunk:

    o_i  = scale (exp(G_i) S^T q_i + sum over j <= i of exp(G_i - G_j) (q_i . k_j) v_j)
    S'   = exp(G_C) S + sum over j of exp(G_C - G_j) k_j v_j^T

Backward runs the same two passes from the end: D, the gradient of the state after a chunk, takes
the place of S, with q and do for k and v, and D, k and do for S, q and v. Gates get
dg_t = the parts in the loss of all pairs i >= t > j, where the state before the chunk counts as the
first j and the one after it as the last i. The common identity, a running sum of q . dq - k . dk
from the end, is the same in exact numbers; kept to one chunk and to float32 products, before they
are rounded to the inputs' dtype, its error does not grow with T.

States [B, H, N, K, V] of all N chunks are made again in backward, not kept. KV heads are read
where they lie; dk and dv are written per query head and summed after, so two runs agree in bits.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from morph.kernels._triton import Variant, interpreted, precision

# exp of it is 0 in float32, and differences of sums stay finite where a gate is -inf
FLOOR = tl.constexpr(-100.0)


class Blocks(NamedTuple):
    """Tokens of a chunk, the largest blocks of K and V, and the warps of a program."""

    C: int
    BK: int
    BV: int
    num_warps: int
    num_stages: int


def blocks(dtype: torch.dtype, size: int, value_size: int, gradient: bool = False) -> Blocks:
    """Return what the kernels are launched with; no tuning, so that two runs are the same.

    The largest that spill no registers on sm_80, sm_90 and sm_100. The interpreter takes float32
    only, and runs the blocks of the half formats there. C must not depend on `gradient`.
    """
    small = dtype == torch.float32 and not interpreted()
    chunk, warps = (32, 4) if small else (64, 8 if gradient else 4)
    bk, bv = (min(chunk, max(16, triton.next_power_of_2(n))) for n in (size, value_size))
    return Blocks(chunk, bk, min(bv, 32) if gradient else bv, warps, 2)


@triton.jit
def _gates(g, b, h, start, T, H: tl.constexpr, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Return the gates, their sums up to each token of a chunk [C], and the sum of all."""
    i = tl.arange(0, C)
    if PER_TOKEN:
        gate = tl.load(g + (b * T + start) * H + h + i * H, mask=i < T - start, other=0.0)
        gate = tl.where(gate < FLOOR, FLOOR, gate)
        sums = tl.cumsum(gate, axis=0)
        whole = tl.sum(tl.where(i == C - 1, sums, 0.0), axis=0)
    else:
        gate = tl.load(g + h)
        gate = tl.where(gate < FLOOR, FLOOR, gate)
        sums = gate * tl.minimum(i + 1, T - start).to(tl.float32)
        whole = gate * tl.minimum(C, T - start).to(tl.float32)
    return gate, sums, whole


@triton.jit
def _decays(gate, sums, C: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Return exp(G_i - G_j) where i >= j, else 0, as [C, C]."""
    i = tl.arange(0, C)
    if PER_TOKEN:
        between = sums[:, None] - sums[None, :]
    else:
        between = gate * (i[:, None] - i[None, :]).to(tl.float32)
    return tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))


@triton.jit
def _rows(x, b, h, start, T, first, H: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    """Return addresses of x [B, T, H, N] at C tokens and BN entries of a head, and which exist."""
    i, n = tl.arange(0, C), first + tl.arange(0, BN)
    x += ((b * T + start) * H + h) * N
    return x + i[:, None] * (H * N) + n[None, :], (i[:, None] < T - start) & (n[None, :] < N)


@triton.jit
def _read(x, b, h, start, T, first, H: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    where, exists = _rows(x, b, h, start, T, first, H, N, C, BN)
    return tl.load(where, mask=exists, other=0.0)


@triton.jit
def _write(x, values, b, h, start, T, first, H: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
           BN: tl.constexpr):  # fmt: skip
    where, exists = _rows(x, b, h, start, T, first, H, N, C, BN)
    tl.store(where, values.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _tile(x, index, k, v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Return addresses of a block of the state number `index` in x [., K, V], and which exist."""
    k, v = k + tl.arange(0, BK), v + tl.arange(0, BV)
    return x + index * (K * V) + k[:, None] * V + v[None, :], (k[:, None] < K) & (v[None, :] < V)


@triton.jit
def _read_tile(x, index, k, v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
               BV: tl.constexpr):  # fmt: skip
    where, exists = _tile(x, index, k, v, K, V, BK, BV)
    return tl.load(where, mask=exists, other=0.0)


@triton.jit
def _write_tile(x, values, index, k, v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                BV: tl.constexpr):  # fmt: skip
    where, exists = _tile(x, index, k, v, K, V, BK, BV)
    tl.store(where, values, mask=exists)


@triton.jit
def _dot_state(x, state, total, PRECISION: tl.constexpr):
    """Return total + x @ state."""
    # a state may outgrow float16; TF32 has its mantissa and the range of float32
    if x.dtype == tl.float16:
        return tl.dot(x.to(tl.float32), state, total, input_precision="tf32")
    else:
        return tl.dot(x, state.to(x.dtype), total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T"])
def _state_pass(
    k, v, g, first, states, last, scale, T,
    H: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the state before each chunk and the last one; REVERSE: gradients, k is q, v is do."""
    bh = tl.program_id(0).to(tl.int64)
    at_k, at_v = tl.program_id(1) * BK, tl.program_id(2) * BV
    b, h = bh // H, bh % H
    state = _read_tile(first, bh, at_k, at_v, K, V, BK, BV)
    count = tl.cdiv(T, C)
    for step in range(0, count):
        n = count - 1 - step if REVERSE else step
        _write_tile(states, state, bh * count + n, at_k, at_v, K, V, BK, BV)
        start = n * C
        _, sums, whole = _gates(g, b, h, start, T, H, C, PER_TOKEN)
        x = _read(k, b, h // RATIO, start, T, at_k, H // RATIO, K, C, BK)
        y = _read(v, b, h // RATIO, start, T, at_v, H // RATIO, V, C, BV)
        weight = tl.exp(sums) * scale if REVERSE else tl.exp(whole - sums)
        x = (x * weight[:, None]).to(y.dtype)
        state = tl.dot(tl.trans(x), y, state * tl.exp(whole), input_precision=PRECISION)
    _write_tile(last, state, bh, at_k, at_v, K, V, BK, BV)


@triton.jit(do_not_specialize=["T"])
def _output_pass(
    q, k, v, g, states, o, scale, T,
    H: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write o; REVERSE: o is dv per query head, v is do, states are the gradients after chunks."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at_v = tl.program_id(2) * BV
    b, h, start = bh // H, bh % H, n * C
    gate, sums, whole = _gates(g, b, h, start, T, H, C, PER_TOKEN)
    pairs = tl.zeros([C, C], tl.float32)
    total = tl.zeros([C, BV], tl.float32)
    for at_k in range(0, K, BK):
        x = _read(q, b, h, start, T, at_k, H, K, C, BK)
        y = _read(k, b, h // RATIO, start, T, at_k, H // RATIO, K, C, BK)
        state = _read_tile(states, bh * tl.cdiv(T, C) + n, at_k, at_v, K, V, BK, BV)
        pairs = tl.dot(x, tl.trans(y), pairs, input_precision=PRECISION)
        total = _dot_state(y if REVERSE else x, state, total, PRECISION)
    pairs = pairs * _decays(gate, sums, C, PER_TOKEN) * scale
    if REVERSE:
        z = _read(v, b, h, start, T, at_v, H, V, C, BV)
        total = total * tl.exp(whole - sums)[:, None]
    else:
        z = _read(v, b, h // RATIO, start, T, at_v, H // RATIO, V, C, BV)
        total = total * (tl.exp(sums) * scale)[:, None]
    pairs = pairs.to(z.dtype)
    if REVERSE:
        pairs = tl.trans(pairs)
    total = tl.dot(pairs, z, total, input_precision=PRECISION)
    _write(o, total, b, h, start, T, at_v, H, V, C, BV)


@triton.jit(do_not_specialize=["T", "B"])
def _gradient_pass(
    q, k, v, do, g, states, dstates, dq, dk, dg, scale, T, B,
    H: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_TOKEN: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, dk per query head, and if GATES the part of dg [K / BK, B, T, H] of a K block."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.program_id(2)
    at_k = block * BK
    b, h, start = bh // H, bh % H, n * C
    gate, sums, whole = _gates(g, b, h, start, T, H, C, PER_TOKEN)
    pairs = tl.zeros([C, C], tl.float32)
    to_q = tl.zeros([C, BK], tl.float32)
    to_k = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for at_v in range(0, V, BV):
        y = _read(v, b, h // RATIO, start, T, at_v, H // RATIO, V, C, BV)
        z = _read(do, b, h, start, T, at_v, H, V, C, BV)
        index = bh * tl.cdiv(T, C) + n
        state = _read_tile(states, index, at_k, at_v, K, V, BK, BV)
        dstate = _read_tile(dstates, index, at_k, at_v, K, V, BK, BV)
        pairs = tl.dot(z, tl.trans(y), pairs, input_precision=PRECISION)
        to_q = _dot_state(z, tl.trans(state), to_q, PRECISION)
        to_k = _dot_state(y, tl.trans(dstate), to_k, PRECISION)
        if GATES:
            kept += tl.sum(state * dstate, axis=1)
    to_q = to_q * (tl.exp(sums) * scale)[:, None]
    to_k = to_k * tl.exp(whole - sums)[:, None]
    pairs = pairs * _decays(gate, sums, C, PER_TOKEN) * scale
    x = _read(q, b, h, start, T, at_k, H, K, C, BK)
    y = _read(k, b, h // RATIO, start, T, at_k, H // RATIO, K, C, BK)
    if GATES:
        i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        part = tl.zeros([C, C], tl.float32)
        part = tl.dot(x, tl.trans(y), part, input_precision=PRECISION)
        part = tl.where(i > t, part * pairs, 0.0)
        # Pairs i >= t > j are those of the rows from t on less those of the columns from t on
        here = tl.sum(to_q * x, axis=1) + tl.sum(part, axis=1) - tl.sum(part, axis=0)
        after = tl.sum(to_k * y, axis=1)
        found = tl.sum(tl.where(i >= t, here[:, None], after[:, None]), axis=0)
        found += tl.exp(whole) * tl.sum(kept, axis=0)
        i = tl.arange(0, C)
        dg += ((block * B + b) * T + start) * H + h
        tl.store(dg + i * H, found, mask=i < T - start)
    pairs = pairs.to(x.dtype)
    to_q = tl.dot(pairs, y, to_q, input_precision=PRECISION)
    to_k = tl.dot(tl.trans(pairs), x, to_k, input_precision=PRECISION)
    _write(dq, to_q, b, h, start, T, at_k, H, K, C, BK)
    _write(dk, to_k, b, h, start, T, at_k, H, K, C, BK)


@triton.jit
def _token(
    q, k, v, g, first, last, o, scale,
    H: tl.constexpr, RATIO: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """One token: a block of columns of the state, read and written once."""
    bh, at_v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV
    kv, rows, columns = bh // RATIO, tl.arange(0, BK), at_v + tl.arange(0, BV)
    gate = tl.load(g + (bh if PER_TOKEN else bh % H))
    x = tl.load(q + bh * K + rows, mask=rows < K, other=0.0).to(tl.float32) * scale
    y = tl.load(k + kv * K + rows, mask=rows < K, other=0.0).to(tl.float32)
    z = tl.load(v + kv * V + columns, mask=columns < V, other=0.0).to(tl.float32)
    state = _read_tile(first, bh, 0, at_v, K, V, BK, BV) * tl.exp(gate) + y[:, None] * z[None, :]
    _write_tile(last, state, bh, 0, at_v, K, V, BK, BV)
    found = tl.sum(state * x[:, None], axis=0)
    tl.store(o + bh * V + columns, found.to(o.dtype.element_ty), mask=columns < V)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        states, last = _states(k, v, g, scale, state, q.shape[2], reverse=False)
        o = _outputs(q, k, v, g, scale, states, q.dtype, reverse=False)
        ctx.save_for_backward(q, k, v, g, state)
        ctx.scale = scale
        return o, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        q, k, v, g, state = ctx.saved_tensors
        do, scale = do.contiguous(), ctx.scale
        batch, tokens, heads, size = q.shape
        groups, value_size = v.shape[2:]
        ratio = heads // groups
        wide = q.dtype if ratio == 1 else torch.float32
        states, _ = _states(k, v, g, scale, state, heads, reverse=False)
        dstates, dstate = _states(q, do, g, scale, dlast.contiguous(), heads, reverse=True)
        dv = _outputs(q, k, do, g, scale, dstates, wide, reverse=True)
        used = blocks(q.dtype, size, value_size, gradient=True)
        split = triton.cdiv(size, used.BK)
        dq, dk = torch.empty_like(q), torch.empty_like(q, dtype=wide)
        dg = g.new_empty(split, batch, tokens, heads) if ctx.needs_input_grad[3] else None
        with _on(q):
            _gradient_pass[(batch * heads, states.shape[2], split)](
                q, k, v, do, g, states, dstates, dq, dk, g if dg is None else dg,
                scale, tokens, batch, **_constants(q, v, g, used, ratio), GATES=dg is not None,
            )  # fmt: skip
        if ratio > 1:
            dk, dv = (x.unflatten(2, (groups, ratio)).sum(3).to(q.dtype) for x in (dk, dv))
        if dg is not None:
            dg = dg.sum((0, 1, 2)) if g.ndim == 1 else dg.sum(0)
        return dq, dk, dv, dg, None, dstate


def chunk_decay(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (o [B, T, H, V], final state) for q, k, v, g as in `decay.forward`.

    state [B, H, K, V] float32. Differentiable once, in all five tensors.
    """
    q, k, v, g, state = (x.contiguous() for x in (q, k, v, g.float(), state))
    return _Chunks.apply(q, k, v, g, scale, state)


@torch.no_grad()
def step_decay(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `chunk_decay` returns for T = 1, in one launch and without gradients."""
    q, k, v, g, state = (x.contiguous() for x in (q, k, v, g.float(), state))
    batch, _, heads, size = q.shape
    value_size = v.shape[3]
    bk, bv = _token_blocks(size, value_size)
    o, last = q.new_empty(batch, 1, heads, value_size), torch.empty_like(state)
    with _on(q):
        _token[(batch * heads, triton.cdiv(value_size, bv))](
            q, k, v, g, state, last, o, scale,
            H=heads, RATIO=heads // k.shape[2], K=size, V=value_size, BK=bk, BV=bv,
            PER_TOKEN=g.ndim > 1, num_warps=4,
        )  # fmt: skip
    return o, last


def _states(
    k: Tensor, v: Tensor, g: Tensor, scale: float, first: Tensor, heads: int, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the states between chunks [B, H, N, K, V] float32, and the last one."""
    batch, tokens, groups, size = k.shape
    used = blocks(k.dtype, size, v.shape[3])
    states = first.new_empty(batch, heads, triton.cdiv(tokens, used.C), size, v.shape[3])
    last = torch.empty_like(first)
    split = triton.cdiv(size, used.BK), triton.cdiv(v.shape[3], used.BV)
    constants = _constants(k, v, g, used, heads // groups) | {"H": heads}
    with _on(k):
        _state_pass[(batch * heads, *split)](
            k, v, g, first, states, last, scale, tokens, **constants, REVERSE=reverse
        )
    return states, last


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    states: Tensor,
    dtype: torch.dtype,
    *,
    reverse: bool,
) -> Tensor:
    batch, tokens, heads, size = q.shape
    used = blocks(q.dtype, size, v.shape[3])
    o = torch.empty(batch, tokens, heads, v.shape[3], dtype=dtype, device=q.device)
    with _on(q):
        _output_pass[(batch * heads, states.shape[2], triton.cdiv(v.shape[3], used.BV))](
            q, k, v, g, states, o, scale, tokens,
            **_constants(q, v, g, used, heads // k.shape[2]), REVERSE=reverse,
        )  # fmt: skip
    return o


def _constants(q: Tensor, v: Tensor, g: Tensor, used: Blocks, ratio: int) -> dict[str, Any]:
    sizes = {"H": q.shape[2], "RATIO": ratio, "K": q.shape[3], "V": v.shape[3]}
    return {
        **sizes, **used._asdict(), "PER_TOKEN": g.ndim > 1, "PRECISION": precision(q.dtype)
    }  # fmt: skip


def _token_blocks(size: int, value_size: int) -> tuple[int, int]:
    """Return BK, all rows, and BV such that a block is 4096 entries, 32 registers a thread."""
    bk = triton.next_power_of_2(size)
    return bk, min(triton.next_power_of_2(value_size), max(16, min(64, 4096 // bk)))


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def variants() -> list[Variant]:
    """Return the kernels as they are launched for heads of 128 in bfloat16 and 64 in float32."""
    found = []
    half, full = ("bf16", torch.bfloat16, 128), ("fp32", torch.float32, 64)
    for kernel, kind, per_token, flag in (
        (_state_pass, half, True, False),
        (_state_pass, half, True, True),
        (_output_pass, half, True, False),
        (_output_pass, half, False, True),
        (_gradient_pass, half, False, True),
        (_gradient_pass, half, True, True),
        (_state_pass, full, True, False),
        (_output_pass, full, True, False),
        (_gradient_pass, full, True, True),
        (_token, half, False, False),
    ):
        found.append(variant(kernel, *kind, per_token=per_token, flag=flag))
    return found


def variant(
    kernel: Any, word: str, dtype: torch.dtype, size: int, *, per_token: bool, flag: bool
) -> Variant:
    """Return one kernel for K = V = size, 4 query heads a KV head; flag: REVERSE or GATES."""
    used = blocks(dtype, size, size, kernel is _gradient_pass)._asdict()
    warps = {n: used.pop(n) for n in ("num_warps", "num_stages")}
    constants = {"H": 32, "RATIO": 4, "K": size, "V": size, **used, "PER_TOKEN": per_token}
    name = f"{kernel.__name__.strip('_')}_{word}_{size}" + "_tokens" * per_token
    if kernel is _token:
        constants["BK"], constants["BV"] = _token_blocks(size, size)
        del constants["C"]
    else:
        constants["PRECISION"] = precision(dtype)
        constants["GATES" if kernel is _gradient_pass else "REVERSE"] = flag
        name += "_back" * (flag and kernel is not _gradient_pass)
    wide = {"g", "first", "last", "states", "dstates", "dg"}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("T", "B"):
            signature[argument] = "i32"
        elif argument == "scale":
            signature[argument] = "fp32"
        else:
            signature[argument] = "*fp32" if argument in wide else f"*{word}"
    return Variant(name=name, kernel=kernel, signature=signature, constexprs=constants, **warps)
