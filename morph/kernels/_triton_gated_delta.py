"""Triton path of the gated delta rule: chunks in the WY form, forward and backward, and one step.

What it does: three kernels forward (the inverse with U and W, the states between chunks, the
outputs) and six backward, two of which compute U, W, Vn and the states again: only the inputs are
kept. Every query head has gradients of its own for k and v; torch sums those that share a KV head,
so two runs agree bit for bit.
Cost: U, W, Vn [B, H, T, .] and a state per chunk in the inputs' dtype, alive within one call.
Known limits: some kernels spill to local memory with heads of 256. Of 16-bit inputs only the
inverse, gates and sums are float32; states are rounded for products, never as they are carried.
g above 0 overflows.
Reference: Yang et al., Gated Delta Networks, arXiv 2412.06464. The inverse is made from blocks of
doubling size; the gradients are derived in `_gated_delta_backward.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from morph.kernels import _gated_delta_backward as back
from morph.kernels import _gated_delta_forward as fore
from morph.kernels._triton import Variant

# Largest blocks of K and V, warps and stages of each kernel; 0 is all of K. Chosen so that nothing
# spills on sm_80, sm_90 and sm_100 with heads of 128
_HALVES = {
    "prepare": (64, 64, 4, 1),
    "states": (0, 32, 4, 2),
    "output": (64, 64, 4, 2),
    "decode": (0, 32, 4, 1),
    "local_new": (64, 64, 4, 2),
    "reverse_states": (0, 32, 8, 2),
    "attend_grads": (32, 64, 4, 2),
    "solve_grads": (32, 64, 8, 1),
}
_FLOAT32 = {
    "prepare": (32, 32, 4, 1),
    "states": (0, 32, 4, 2),
    "output": (32, 32, 4, 1),
    "decode": (0, 32, 4, 1),
    "local_new": (32, 32, 4, 1),
    "reverse_states": (0, 32, 8, 2),
    "attend_grads": (32, 16, 4, 1),
    "solve_grads": (32, 32, 8, 1),
}

# Pointers that are float32 whatever the inputs are
_FLOATS = {"g", "beta", "gate", "first", "last", "dlast", "dfirst", "dgate", "dg", "dbeta"}
_FLOATS |= {"dk_local"}


def chunk_gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o [B, T, H, V] like q, final state [B, H, K, V] float32), with gradients.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]; g and beta [B, T, H] float32, g at most 0;
    state [B, H, K, V] float32.
    """
    return _ChunkGatedDelta.apply(q, k, v, g, beta, scale, state)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `chunk_gated_delta` returns for T = 1, without gradients."""
    q, k, v, g, beta, state = (x.contiguous() for x in (q, k, v, g, beta, state))
    batch, _, heads, size = q.shape
    o, last = q.new_empty(batch, 1, heads, v.shape[3]), torch.empty_like(state)
    made = settings("decode", size, v.shape[3], q.dtype)
    grid = (batch * heads, triton.cdiv(v.shape[3], made["BV"]))
    with torch.cuda.device_of(q):
        fore.decode[grid](
            q, k, v, g, beta, state, o, last, scale, heads, heads // k.shape[2], **made
        )
    return o, last


class _ChunkGatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, beta, scale, state = inputs
        q, k, v, g, beta, state = (x.contiguous() for x in (q, k, v, g, beta, state))
        ctx.save_for_backward(q, k, v, g, beta, state)
        ctx.scale = scale
        call = _Call(q, k, v)
        o, last = q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(state)
        with torch.cuda.device_of(q):
            u, w, gate, _ = call.prepare(k, v, g, beta, keep=False)
            before, new = call.states(k, u, w, gate, state, last)
            call(fore.output, "NV", q, k, gate, before, new, o, scale)
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor, dlast: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, g, beta, state = ctx.saved_tensors
        do, dlast, scale = do.contiguous(), dlast.contiguous(), ctx.scale
        call = _Call(q, k, v)
        groups, heads = k.shape[2], q.shape[2]
        shared = torch.float32 if heads > groups else k.dtype  # summed below, rounded once
        dq, dg, dbeta, dfirst = (torch.empty_like(x) for x in (q, g, beta, state))
        dk = torch.empty_like(q, dtype=shared)
        dv = torch.empty_like(do, dtype=shared)
        with torch.cuda.device_of(q):
            u, w, gate, inverse = call.prepare(k, v, g, beta, keep=True)
            before, new = call.states(k, u, w, gate, state, torch.empty_like(state))
            local, dnew, dafter = (torch.empty_like(x) for x in (new, new, before))
            call(back.local_new, "NV", q, k, gate, do, local, scale)
            call(
                back.reverse_states,
                "V",
                *(q, k, w, gate, do, dlast, local, dnew, dafter, dfirst, scale),
            )
            dw, dk_local = torch.empty_like(w), torch.empty_like(w, dtype=torch.float32)
            parts = triton.cdiv(q.shape[3], call.made("attend_grads")["BK"])
            dgate = gate.new_empty(*gate.shape[:3], parts, gate.shape[4])
            call(
                back.attend_grads,
                "NK",
                *(q, k, gate, before, dafter, new, dnew, do, dq, dk_local, dw, dgate, scale),
            )
            call(
                back.solve_grads,
                "N",
                *(k, v, g, beta, u, w, inverse, gate, dnew, dw, dk_local, dgate),
                *(dk, dv, dg, dbeta),
                PARTS=parts,
            )
        if heads > groups:
            dk = dk.unflatten(2, (groups, -1)).sum(3).to(k.dtype)
            dv = dv.unflatten(2, (groups, -1)).sum(3).to(k.dtype)
        return dq, dk, dv, dg, dbeta, None, dfirst


class _Call:
    """Launches kernels for inputs of one size."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.batch, self.tokens, self.heads, self.K = q.shape
        self.V, self.ratio, self.dtype = v.shape[3], self.heads // k.shape[2], q.dtype
        self.chunk = chunk_size(q.dtype)
        self.count = triton.cdiv(self.tokens, self.chunk)
        self.chunks = (self.batch, self.heads, self.count)
        self.empty = functools.partial(torch.empty, device=q.device)

    def made(self, name: str) -> dict[str, Any]:
        return settings(name, self.K, self.V, self.dtype)

    def __call__(self, kernel: Any, axes: str, *args: Any, **options: Any) -> None:
        """Launch on B * H programs times chunks (N) and blocks of K or V, as `axes` says."""
        made = self.made(kernel.fn.__name__)
        counts = {"N": lambda: self.count}
        counts["K"] = lambda: triton.cdiv(self.K, made["BK"])
        counts["V"] = lambda: triton.cdiv(self.V, made["BV"])
        grid = (self.batch * self.heads, *(counts[a]() for a in axes))
        sizes = (self.tokens, self.heads, self.ratio, self.count)
        kernel[grid](*args, *sizes, **{**made, **options})

    def prepare(
        self, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return U [B, H, N, C, V], W [B, H, N, C, K], G [B, H, N, 2, C] and Tm [B, H, N, C, C]."""
        rows = (*self.chunks, self.chunk)
        u = self.empty(*rows, self.V, dtype=self.dtype)
        w = self.empty(*rows, self.K, dtype=self.dtype)
        gate = self.empty(*self.chunks, 2, self.chunk, dtype=torch.float32)
        inverse = self.empty(*rows, self.chunk, dtype=self.dtype) if keep else u
        self(fore.prepare, "N", k, v, g, beta, u, w, inverse, gate, KEEP=keep)
        return u, w, gate, inverse

    def states(
        self,
        k: torch.Tensor,
        u: torch.Tensor,
        w: torch.Tensor,
        gate: torch.Tensor,
        state: torch.Tensor,
        last: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the state before each chunk [B, H, N, K, V] and Vn [B, H, N, C, V]."""
        before, new = (
            self.empty(*self.chunks, self.K, self.V, dtype=self.dtype),
            torch.empty_like(u),
        )
        self(fore.states, "V", k, u, w, gate, state, before, new, last)
        return before, new


def chunk_size(dtype: torch.dtype) -> int:
    """Return C: 64, or 32 in float32, of which less fits into registers and shared memory."""
    return 32 if dtype == torch.float32 else 64


@functools.cache
def settings(name: str, K: int, V: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return constants, warps and stages of a kernel."""
    chunk = chunk_size(dtype)
    most_k, most_v, warps, stages = (_FLOAT32 if dtype == torch.float32 else _HALVES)[name]
    if most_k == 0 and _block(K) * dtype.itemsize > 256:  # rows too long to hold them twice
        most_v, stages = 16, 1
    values = {
        "K": K,
        "V": V,
        "C": chunk,
        "BK": min(_block(K), most_k or _block(K)),
        "BV": min(_block(V), most_v),
        "LEVELS": chunk.bit_length() - 2,
        # Three TF32 products are as right as float32; "ieee" does without tensor cores, keeps whole
        # rows in registers, spills kilobytes and compiles for a minute
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    chosen = {n: x for n, x in values.items() if n in _kernel(name).arg_names}
    return {**chosen, "num_warps": warps, "num_stages": stages}


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _kernel(name: str) -> Any:
    return {
        "prepare": fore.prepare,
        "states": fore.states,
        "output": fore.output,
        "decode": fore.decode,
        "local_new": back.local_new,
        "reverse_states": back.reverse_states,
        "attend_grads": back.attend_grads,
        "solve_grads": back.solve_grads,
    }[name]


def variants() -> list[Variant]:
    """Return the kernels as launched for heads of 128 in bfloat16, and the large ones in float32.

    The others do in float32 what a listed one does too.
    """
    made = [_variant(name, torch.bfloat16, 128) for name in _HALVES]
    large = ("prepare", "reverse_states", "attend_grads", "solve_grads")
    return made + [_variant(name, torch.float32, 64) for name in large]


def _variant(name: str, dtype: torch.dtype, size: int) -> Variant:
    kernel, made = _kernel(name), settings(name, size, size, dtype)
    warps, stages = made.pop("num_warps"), made.pop("num_stages")
    constants = {**made, "KEEP": True, "PARTS": triton.cdiv(size, made["BK"])}
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    short = "fp32" if dtype == torch.float32 else "bf16"

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return "*fp32" if argument.removesuffix("_ptr") in _FLOATS else f"*{short}"
        return "fp32" if argument == "scale" else "i32"

    return Variant(
        name=f"{name}_{short}_{size}",
        kernel=kernel,
        signature={argument: kind(argument) for argument in kernel.arg_names},
        constexprs=constants,
        num_warps=warps,
        num_stages=stages,
    )
