"""Linear attention with a constant decay per head (lightning attention, RetNet, simple GLA).

What it does: S_t = exp(g) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t: no softmax, no
denominator. g [H] is the log decay of each head, at most 0; g [B, T, H] gives every token its own.
KV heads are shared by H / G query heads, but every query head has its own state, since decays
differ. Tokens of padding write nothing and forget nothing: a padded row is the row alone.
Cost: 4 T H K V + 2 T H C (K + V) flops with chunks of C tokens; a decoded token reads and writes
the state once.
State: [B, H, K, V] float32 (float64 where q is), whatever the dtype of q.
Paths: triton; fla (flash-linear-attention on a GPU, where it gives the same answer sooner); chunked
(products inside chunks, a recurrence between them); reference (token by token).
Known limits: g above 0 is not refused (it would cost a synchronisation) and overflows. No second
derivatives on the triton path.
Reference: Qin et al., Lightning Attention-2, arXiv 2401.04658; Sun et al., RetNet, 2307.08621.
"""

from __future__ import annotations

from typing import Any

import torch

from morph.kernels import _checks, _fla, _triton

PATHS = ("triton", "fla", "chunked")
CHUNK = 64
_TRITON_SIZE = 256  # largest K and V of the triton path
_CPU_ELEMENTS = 1 << 17
# Settings under which the laws of tests/test_kernels.py hold this kernel
EXAMPLES: dict[str, dict[str, Any]] = {"per_head": {}, "per_token": {"per_token": True}}


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (o [B, T, H, V], final state [B, H, K, V] or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype. g [H] or
    [B, T, H], log decay <= 0, any floating dtype. scale defaults to K ** -0.5. padding [B, P + T]
    bool, True for real tokens, of which the last T matter; rows of padding come out as zeros.
    `path` demands a path by name. Raises ValueError with the sizes where they do not fit,
    KernelUnavailable where a demanded path cannot run.
    """
    _check(q, k, v, g, padding, initial_state)
    reasons = {name: unsupported(name, q, k, v) for name in PATHS}
    batch, tokens, heads, size = q.shape
    with torch.autocast(q.device.type, enabled=False):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = size**-0.5 if scale is None else scale
        real = None if padding is None else _checks.some_padding(padding[:, -tokens:], q.device)
        state = initial_state
        if state is None:
            state = torch.zeros(batch, heads, size, v.shape[3], dtype=work, device=q.device)
        given = (*_silence(q, k, v, g, real), scale, state.to(work))
        by = lambda name: _run(name)(*given)
        o, state = by(_fla.settle("decay", path, reasons, q, by))
        o = o if real is None else o.masked_fill(~real[..., None, None], 0.0)
        return o.to(q.dtype), state.to(work) if output_final_state else None


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `forward` returns, token by token in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(
    path: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    if path != "triton":
        return _fla.reason(q) if path == "fla" else _checks.float_reason(q)
    sizes = q.shape[3], v.shape[3]
    if max(sizes) > _TRITON_SIZE:
        return f"heads of {max(sizes)} are larger than {_TRITON_SIZE}."
    return _triton.reason(q)


def _run(path: str) -> Any:
    return {"reference": _reference, "triton": _fused, "fla": _foreign}.get(path, _plain)


def _foreign(q: Any, k: Any, v: Any, g: Any, scale: float, state: Any) -> Any:
    return _fla.run("decay", q, k, v, g=g, scale=scale, state=state)


def _plain(q: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _chunked(q, *given) if q.shape[1] > 1 else _step(q, *given)


def _silence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make tokens of padding write nothing (k = 0) and forget nothing (g = 0)."""
    if real is None:
        return q, k, v, g
    g = g.expand(*real.shape, g.shape[-1]).masked_fill(~real[..., None], 0.0)
    return q, k.masked_fill(~real[..., None, None], 0.0), v, g


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    decay = g.to(q.dtype).exp().expand(*q.shape[:3])
    outputs = []
    for t in range(q.shape[1]):
        new = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = decay[:, t, :, None, None] * state.to(q.dtype) + new
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    from morph.kernels import _triton_decay

    if q.shape[1] > 1:
        return _triton_decay.chunk_decay(q, k, v, g, scale, state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, state)):
        return _step(q, k, v, g, scale, state)
    return _triton_decay.step_decay(q, k, v, g, scale, state)


def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token: two passes over the state."""
    batch, _, heads, size = q.shape
    groups, ratio, work = k.shape[2], heads // k.shape[2], state.dtype
    decay = g.to(work).exp().reshape(-1, groups, ratio, 1, 1)
    k, v = k.to(work).reshape(batch, groups, 1, size, 1), v.to(work)
    state = torch.addcmul(
        k * v.reshape(batch, groups, 1, 1, -1), decay, state.unflatten(1, (groups, ratio))
    ).flatten(1, 2)
    rows = (q.to(work) * scale).reshape(batch, heads, 1, size)
    return (rows @ state).transpose(1, 2), state


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole chunks at once, then the tokens that are left as one shorter chunk."""
    work = state.dtype
    g = g.to(work).clamp(min=-100.0)  # exp of it is 0 in float32, and differences stay finite
    whole, left = divmod(q.shape[1], CHUNK)
    span = whole
    if q.device.type == "cpu":  # a few chunks at a time, so that what they need stays in the cache
        each = CHUNK * q.shape[0] * q.shape[2] * max(q.shape[3], v.shape[3])
        span = max(1, min(whole, _CPU_ELEMENTS // each))
    sizes = [CHUNK * min(span, whole - n) for n in range(0, whole, span)] + [left] * (left > 0)
    parts = [x.split(sizes, dim=1) for x in (q, k, v)]
    gates = [g] * len(sizes) if g.ndim == 1 else g.split(sizes, dim=1)
    outputs = []
    shared = _decays(g, k.shape[2], CHUNK, scale) if g.ndim == 1 else None
    for size, qs, ks, vs, gs in zip(sizes, *parts, gates):
        chunk = min(size, CHUNK)
        if shared is None or chunk < CHUNK:
            decays = _decays(gs, k.shape[2], chunk, scale)
        else:
            decays = shared
        o, state = _chunks(qs, ks, vs, decays, state)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


def _chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decays: tuple[torch.Tensor, ...],
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T = N chunks. Query heads of a KV head are stacked as rows, so that k and v are not repeated.

    Inside a chunk, D[i, j] = exp(g (i - j)) weighs pair i >= j; the state before the chunk reaches
    row i times exp(g (i + 1)); key j reaches the state after it times exp(g (C - 1 - j)).
    """
    inside, before, after, whole = decays
    (batch, tokens, heads, size), work = q.shape, state.dtype
    groups, ratio, chunk = k.shape[2], heads // k.shape[2], inside.shape[-1]
    count = tokens // chunk
    # [B, G, N, R, C, K], [B, G, N, C, K], [B, G, N, C, V]
    q = q.reshape(batch, count, chunk, groups, ratio, size).permute(0, 3, 1, 4, 2, 5)
    q = q.to(work).contiguous()
    k = k.reshape(batch, count, chunk, groups, size).permute(0, 3, 1, 2, 4).to(work).contiguous()
    v = v.reshape(batch, count, chunk, groups, -1).permute(0, 3, 1, 2, 4).to(work).contiguous()
    pairs = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, (ratio, chunk)) * inside
    o = (pairs.flatten(3, 4) @ v).unflatten(3, (ratio, chunk))
    written = (k[:, :, :, None] * after[..., None]).transpose(-1, -2).flatten(3, 4) @ v
    s, states = state.unflatten(1, (groups, ratio)), []
    steps = written.unflatten(3, (ratio, size)).unbind(2)
    for n, new in enumerate(steps):
        states.append(s)
        s = torch.addcmul(new, whole[:, :, n % whole.shape[2], :, None, None], s)
    o = o.add_((q * before[..., None]) @ torch.stack(states, dim=2))
    o = o.permute(0, 2, 4, 1, 3, 5).reshape(batch, tokens, heads, -1)
    return o.contiguous(), s.flatten(1, 2)


def _decays(g: torch.Tensor, groups: int, chunk: int, scale: float) -> tuple[torch.Tensor, ...]:
    """Return D [., G, N, R, C, C], the decays before and after [., G, N, R, C], and whole chunks'.

    D and the decays before carry the scale of the output.

    For g [H] the batch and chunk sizes are 1.
    """
    ids = torch.arange(chunk, device=g.device)
    if g.ndim == 1:
        g = g.view(1, groups, 1, -1, 1)
        upto = g * (ids + 1)
        between = g[..., None] * (ids[:, None] - ids)  # exact, unlike a difference of sums
    else:
        g = g.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)).permute(0, 3, 1, 4, 2)
        upto = g.cumsum(dim=-1)
        between = upto[..., :, None] - upto[..., None, :]
    inside = between.masked_fill(ids[:, None] < ids, float("-inf")).exp()
    return inside * scale, upto.exp() * scale, (upto[..., -1:] - upto).exp(), upto[..., -1].exp()


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    padding: torch.Tensor | None,
    state: torch.Tensor | None,
) -> None:
    _checks.check_qkv(q, k, v, padding, None)
    batch, tokens, heads, size = q.shape
    if list(g.shape) not in ([heads], [batch, tokens, heads]):
        raise ValueError(f"g must be [{heads}] or {[batch, tokens, heads]}; got {list(g.shape)}.")
    want = [batch, heads, size, v.shape[3]]
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
    per_token: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    g = -torch.rand((B, T, H) if per_token else (H,), generator=generator)
    return {**out, "g": g.to(torch.float64 if dtype == torch.float64 else torch.float32), **options}


def flops(*, B: int, T: int, H: int, K: int, V: int, chunk: int = CHUNK, **_: Any) -> int:
    """Return the floating-point operations of a chunked forward, masked pairs included."""
    return 2 * B * T * H * (2 * K * V + chunk * (K + V))


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v in, o out, the float32 state once."""
    return itemsize * B * T * (H + G) * (K + V) + 4 * B * H * K * V
