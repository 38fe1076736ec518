"""Gated delta rule: a state that is corrected towards each value, and forgets at a learned rate.

What it does: S_t = exp(g_t) S_{t-1}; e_t = v_t - S_t^T k_t, what the state gets wrong about t;
S_t += beta_t k_t e_t^T; o_t = scale * S_t^T q_t. beta 1 replaces what is stored at k_t, beta 0
leaves it alone. The caller normalises q and k: where beta |k|^2 exceeds 2 the state diverges. KV
heads are shared by H / G query heads, but every query head has its own gates and state. Tokens of
padding write nothing and forget nothing: a padded row is the row alone.
Cost: 2 T H (3 K V + 2 C (K + V)) flops with chunks of C tokens; a decoded token passes over the
state three times. Training keeps one [B, T, H, V] tensor and computes the rest again.
State: [B, H, K, V] float32 (float64 where q is), whatever the dtype of q.
Paths: triton; fla (flash-linear-attention on a GPU, where it gives the same answer sooner); chunked
(products inside chunks, a recurrence between them); reference (token by token).
Known limits: no second derivatives on the fast paths. Gradients in bfloat16 and float16 are not
taken from the Triton path: on a real GPU they were wrong for some head sizes; the other paths
serve. g above 0 and beta outside [0, 1] are not refused (it would cost a synchronisation); the
chunked path takes the decay between two tokens of a chunk as at most 1, and g below -750 as -750,
which forgets everything.
Reference: Yang et al., Gated Delta Networks, arXiv 2412.06464, without its convolutions, norms and
output gate, which are the mixer's; the chunked path solves for the writes themselves, not for the
two factors of the WY form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from morph.kernels import _checks, _delta, _fla, _triton

PATHS = ("triton", "fla", "chunked")
CHUNK = 64
_TRITON_SIZE = 256
# Seen with Triton 3.6 on an H100 (RESULTS.md); the same kernels are right in float32, and forwards
_WRONG = "gradients in 16 bits came out wrong on a GPU; float32 is right, and so is inference."
# Settings under which the laws of tests/test_kernels.py hold this kernel
EXAMPLES: dict[str, dict[str, Any]] = {"gated": {}, "no_decay": {"decay": 0.0}}


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (o [B, T, H, V], final state [B, H, K, V] or None) by the fastest path that can run.

    q [B, T, H, K] and k [B, T, G, K] normalised by the caller, v [B, T, G, V], H a multiple of G,
    one floating dtype. g [B, T, H], log decay <= 0, and beta [B, T, H] in [0, 1], any floating
    dtype. scale defaults to K ** -0.5. padding [B, P + T] bool, True for real tokens, of which the
    last T matter; rows of padding come out as zeros. `path` demands a path by name. Raises
    ValueError with the sizes where they do not fit, KernelUnavailable where a demanded path cannot
    run.
    """
    _check(q, k, v, g, beta, padding, initial_state)
    reasons = {name: unsupported(name, q, k, v, g, beta, initial_state) for name in PATHS}
    batch, tokens, heads, size = q.shape
    with torch.autocast(q.device.type, enabled=False):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = size**-0.5 if scale is None else scale
        real = None if padding is None else _checks.some_padding(padding[:, -tokens:], q.device)
        k, g, beta = _delta.silence(k, g, beta, real)
        state = initial_state
        if state is None:
            state = torch.zeros(batch, heads, size, v.shape[3], dtype=work, device=q.device)
        given = (q, k, v, g, beta, scale, state.to(work))
        by = lambda name: _run(name, *given)
        o, state = by(_fla.settle("gated_delta", path, reasons, q, by))
        o = o if real is None else o.masked_fill(~real[..., None, None], 0.0)
        return o.to(q.dtype), state.to(work) if output_final_state else None


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `forward` returns, token by token in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(path: str, q: torch.Tensor, *args: Any, **options: Any) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    if path != "triton":
        return _fla.reason(q) if path == "fla" else _checks.float_reason(q)
    v = args[1] if len(args) > 1 else options.get("v", q)
    largest = max(q.shape[-1], v.shape[-1])
    if largest > _TRITON_SIZE:
        return f"the head size is {largest}; the Triton kernels take up to {_TRITON_SIZE}."
    given = [x for x in (q, *args, *options.values()) if isinstance(x, torch.Tensor)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if learns and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _WRONG
    return _triton.reason(q)


def _run(
    path: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    one = q.shape[1] == 1
    if path == "fla":
        return _fla.run("gated_delta", q, k, v, g=g, beta=beta, scale=scale, state=state)
    if path == "triton":
        from morph.kernels import _triton_gated_delta as fast

        tensors = (q, k, v, g, beta, state)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        run = fast.step if one and not learns else fast.chunk_gated_delta
        return run(q, k, v, g.float(), beta.float(), scale, state)
    plain = _delta.sequential if path == "reference" else _delta.step if one else _delta.chunked
    o, state, _ = plain(q, k, v, g, beta, scale, state)
    return o, state


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    padding: torch.Tensor | None,
    state: torch.Tensor | None,
) -> None:
    _checks.check_qkv(q, k, v, padding, None)
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != q.shape[:3] or not gate.is_floating_point():
            raise ValueError(
                f"{name} must be floating, {list(q.shape[:3])}; got {gate.dtype} "
                f"{list(gate.shape)}."
            )
    want = [q.shape[0], q.shape[2], q.shape[3], v.shape[3]]
    if state is not None and list(state.shape) != want:
        raise ValueError(f"initial_state must be {want}; got {list(state.shape)}.")


def example(
    *,
    B: int,
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    decay: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes, q and k of length 1, g in -[0, decay].

    Options are passed through.
    """
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    for name in ("q", "k"):
        out[name] = F.normalize(out[name], dim=-1)
    out = {n: x.to(dtype) for n, x in out.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out["g"] = -decay * torch.rand((B, T, H), generator=generator).to(wide)
    out["beta"] = torch.rand((B, T, H), generator=generator).to(wide)
    return {**out, **options}


def flops(*, B: int, T: int, H: int, K: int, V: int, chunk: int = CHUNK, **_: Any) -> int:
    """Return the floating-point operations of a chunked forward, masked pairs included."""
    return 2 * B * T * H * (3 * K * V + 2 * chunk * (K + V))


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v in, o out, the gates and the float32 state."""
    return itemsize * B * T * (H + G) * (K + V) + 8 * B * T * H + 4 * B * H * K * V
