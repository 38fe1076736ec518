"""Softmax attention over a band for GPUs: what `_banded.banded` computes, and one decoded token.

The forward pass saves the logarithm of each row's sum of weights, from which the backward pass
recomputes them. A decoded token sees all that the state holds: the keys are split among programs,
each of which reads them once for all query heads of a KV head, and a second kernel adds the shares
up. How many programs there are depends on the number of keys alone, not on the batch.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from morph.kernels import _triton
from morph.kernels._banded import Band
from morph.kernels._sliding_backward import keys_kernel, queries_kernel
from morph.kernels._sliding_forward import decode_kernel, forward_kernel, join_kernel

_LOG2_E = 1.0 / math.log(2.0)
_FOREVER = 1 << 30  # a window that no sequence fills, and positions stay inside 32 bits
_SINK_BLOCK = 16  # the smallest side of a product
_SINK_ROWS = 2048  # rows of queries whose share of the sinks' gradients is one partial sum
_SPLITS = 32  # of a decoded token's keys, at most
_UNIT = 8  # elements: 16 bytes of the narrowest dtype, as wide as one load can be
# (BLOCK_M, BLOCK_N, warps, stages) by padded head size: rows of queries, and keys
_HALF = {
    "forward": {64: (64, 64, 4, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    "queries": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (64, 32, 8, 2)},
    "keys": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    "decode": {64: (16, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)},
}
_FULL = {
    "forward": {64: (32, 32, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    "queries": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "keys": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "decode": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1)},
}


def triton_banded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    band: Band,
    sink_bias: torch.Tensor | None = None,
    k_sinks: torch.Tensor | None = None,
    v_sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `_banded.banded` returns, for the same arguments; sums run in float32."""
    return _Banded.apply(q, k, v, sink_bias, k_sinks, v_sinks, band)


def triton_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_bias: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return o [B, 1, H, V] of one token q [B, 1, H, K] that sees all of k [B, S, G, K] and v.

    real [B, S] bool marks the keys that are no padding, the token's own last; a token of padding
    comes out as zeros. No gradients.
    """
    (batch, _, heads, _), (seen, groups) = q.shape, k.shape[1:3]
    q, k, v = (_plain(x) for x in (q, k, v))
    real, (blocks, how) = _bytes(real), _blocks("decode", q, v, heads // groups)
    (strides, unit), (inner, outer) = _strides(q, k, v), _bends(scale, softcap)
    each = blocks["BLOCK_N"] * triton.cdiv(seen, blocks["BLOCK_N"] * _SPLITS)
    splits = triton.cdiv(seen, each)
    parts = q.new_empty(batch, groups, splits, heads // groups, v.shape[3], dtype=torch.float32)
    logs, o = parts.new_empty(parts.shape[:-1]), q.new_empty(batch, 1, heads, v.shape[3])
    with _device(q):
        decode_kernel[(batch * groups * splits,)](
            q, k, v, real, _log2(sink_bias), parts, logs,
            *strides, seen, groups, splits, each, inner, outer,
            **blocks, **how, **_flags(q, softcap), UNIT=unit,
        )  # fmt: skip
        join_kernel[(batch * heads,)](
            parts, logs, real, o, seen, groups, splits,
            R=heads // groups, V=v.shape[3], BLOCK_V=blocks["BLOCK_V"], SPLITS=_SPLITS,
        )  # fmt: skip
    return o


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        q, k, v, sink_bias, k_sinks, v_sinks, band = args
        q, k, v = (_plain(x) for x in (q, k, v))
        if k_sinks is not None:
            k_sinks, v_sinks = k_sinks.contiguous(), v_sinks.contiguous()
        bias, call = _log2(sink_bias), _Call(q, k, band)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(*call.rows, dtype=torch.float32)
        (strides, unit), (blocks, how) = _strides(q, k, v), _blocks("forward", q, v, call.ratio)
        sinks = 0 if k_sinks is None else k_sinks.shape[1]
        with _device(q):
            forward_kernel[call.grid(blocks["BLOCK_M"])](
                q, k, v, k_sinks, v_sinks, call.sinks_at, call.real, bias, o, lse,
                *strides, call.at_b, q.shape[1], k.shape[1], sinks, *call.numbers,
                **blocks, **how, **call.flags, BLOCK_S=_SINK_BLOCK, UNIT=unit,
            )  # fmt: skip
        ctx.band, ctx.bias_dtype = band, None if sink_bias is None else sink_bias.dtype
        ctx.save_for_backward(q, k, v, bias, k_sinks, v_sinks, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bias, k_sinks, v_sinks, o, lse = ctx.saved_tensors
        do, call = do.contiguous(), _Call(q, k, ctx.band)
        delta, dq = torch.empty_like(lse), q.new_empty(q.shape)
        (strides, unit), (blocks, how) = _strides(q, k, v), _blocks("queries", q, v, call.ratio)
        sinks = 0 if k_sinks is None else k_sinks.shape[1]
        with _device(q):
            queries_kernel[call.grid(blocks["BLOCK_M"])](
                q, k, v, k_sinks, v_sinks, call.sinks_at, call.real, o, do, lse, delta, dq,
                *strides, call.at_b, q.shape[1], k.shape[1], sinks, *call.numbers,
                ctx.band.scale,
                **blocks, **how, **call.flags, BLOCK_S=_SINK_BLOCK, UNIT=unit,
            )  # fmt: skip
            dk, dv = _keys(call, q, k, v, do, lse, delta, None)
            grads: list[torch.Tensor | None] = [None, None]
            if k_sinks is not None:
                parts = _keys(call, q, k_sinks, v_sinks, do, lse, delta, call.sinks_at)
                grads = [x.sum(dim=0).to(k.dtype) for x in parts]
        dbias = None
        if bias is not None:  # the weight that went to it, times what the others missed
            lost = torch.exp2(bias.view(call.groups, 1, call.ratio) - lse) * delta
            dbias = -lost.sum(dim=(0, 2)).flatten().to(ctx.bias_dtype)
        return dq, dk, dv, dbias, *grads, None


class _Call:
    """What the kernels of one call share."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, band: Band) -> None:
        self.groups, self.ratio = k.shape[2], q.shape[2] // k.shape[2]
        self.rows = (q.shape[0], self.groups, q.shape[1], self.ratio)
        self.real = _bytes(band.real)
        self.sinks_at, self.at_b = None, 0
        if band.sinks_at is not None:
            self.sinks_at = band.sinks_at.to(torch.int32).contiguous()
            self.at_b = self.sinks_at.stride(0) if len(self.sinks_at) > 1 else 0
        window = _FOREVER if band.window is None else min(band.window, _FOREVER)
        self.numbers = (self.groups, band.past, window, *_bends(band.scale, band.softcap))
        self.scale = band.scale
        self.flags = _flags(q, band.softcap)

    def grid(self, block: int) -> tuple[int]:
        batch, groups, tokens, ratio = self.rows
        return (batch * groups * triton.cdiv(tokens * ratio, block),)


def _keys(
    call: _Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    sinks_at: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of k and v; of sinks, [chunks, B, N, G, K or V] to be added up."""
    batch, groups, tokens, ratio = call.rows
    (strides, unit), (blocks, how) = _strides(q, k, v), _blocks("keys", q, v, ratio)
    chunks = 1
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if sinks_at is not None:
        chunks = triton.cdiv(tokens * ratio, _SINK_ROWS)
        dk, dv = (x.new_empty(chunks, *x.shape, dtype=torch.float32) for x in (k, v))
        blocks["BLOCK_N"] = _SINK_BLOCK
    programs = batch * groups * chunks * triton.cdiv(k.shape[1], blocks["BLOCK_N"])
    keys_kernel[(programs,)](
        q, k, v, sinks_at, call.real, do, lse, delta, dk, dv,
        *strides, call.at_b, tokens, k.shape[1], batch * groups, _SINK_ROWS,
        *call.numbers, call.scale, **blocks, **how, **call.flags, UNIT=unit,
    )  # fmt: skip
    return dk, dv


def _blocks(
    kind: str, q: torch.Tensor, v: torch.Tensor, ratio: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes that kernels are compiled for, and their warps and stages."""
    sizes = q.shape[3], v.shape[3]
    wide, tall, many = (max(16, triton.next_power_of_2(x)) for x in (*sizes, ratio))
    table = _HALF if q.dtype in _triton.HALVES else _FULL
    m, n, warps, stages = table[kind][max(64, wide, tall)]
    m = many if kind == "decode" else m
    blocks = {"R": ratio, "K": sizes[0], "V": sizes[1], "BLOCK_M": m, "BLOCK_N": n}
    return blocks | {"BLOCK_K": wide, "BLOCK_V": tall}, {"num_warps": warps, "num_stages": stages}


def _flags(q: torch.Tensor, softcap: float | None) -> dict[str, Any]:
    return {"CAP": softcap is not None, "PRECISION": _triton.precision(q.dtype)}


def _bends(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return the factors of a product before and after the cap; scores count powers of two."""
    return (1.0, scale * _LOG2_E) if softcap is None else (scale / softcap, softcap * _LOG2_E)


def _strides(*tensors: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """Return the strides of batch, tokens and heads of each tensor, and the unit they count."""
    strides = [n for x in tensors for n in x.stride()[:3]]
    unit = 1 if any(n % _UNIT for n in strides) else _UNIT
    return tuple(n // unit for n in strides), unit


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _bytes(real: torch.Tensor | None) -> torch.Tensor | None:
    return None if real is None else real.contiguous().view(torch.uint8)


def _log2(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float() * _LOG2_E


def _device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def variants() -> list[_triton.Variant]:
    """Return what is launched for bfloat16 and heads of 64 and 128, 4 query heads to a KV head."""
    gone = {n: None for n in ("sinks_at", "k_sinks", "v_sinks", "real", "bias")}
    plain, rich = {**gone, "CAP": False}, {"CAP": True}
    return [
        _variant("forward", forward_kernel, 64, plain),
        _variant("queries", queries_kernel, 64, plain),
        _variant("keys", keys_kernel, 64, plain),
        _variant("forward", forward_kernel, 128, rich),
        _variant("queries", queries_kernel, 128, rich),
        _variant("keys", keys_kernel, 128, {**rich, "sinks_at": None}),
        _variant("keys", keys_kernel, 128, {**rich, "BLOCK_N": _SINK_BLOCK}, "sinks"),
        _variant("decode", decode_kernel, 128, rich),
        _variant("join", join_kernel, 128, {}),
    ]


_TYPES = {"sinks_at": "*i32", "real": "*u8", "scale": "fp32", "inner": "fp32", "outer": "fp32"}
_TYPES |= dict.fromkeys(("bias", "lse", "delta", "logs", "parts"), "*fp32")
_TYPES |= dict.fromkeys(("q", "k", "v", "k_sinks", "v_sinks", "o", "do", "dq", "dk", "dv"), "*bf16")


def _variant(
    kind: str, kernel: Any, size: int, extras: dict[str, Any], name: str = ""
) -> _triton.Variant:
    meta = torch.empty(1, 1, 1, size, dtype=torch.bfloat16, device="meta")
    blocks, how = ({}, {}) if kind == "join" else _blocks(kind, meta, meta, 4)
    constants: dict[str, Any] = {"R": 4, "V": size, "BLOCK_V": size, "SPLITS": _SPLITS, **blocks}
    constants |= {"BLOCK_S": _SINK_BLOCK, "UNIT": _UNIT, "PRECISION": "tf32", **extras}
    names = list(kernel.arg_names)
    return _triton.Variant(
        name=f"{name or kind}_{size}",
        kernel=kernel,
        signature={n: "constexpr" if n in constants else _TYPES.get(n, "i32") for n in names},
        constexprs={n: x for n, x in constants.items() if n in names},
        **how,
    )
