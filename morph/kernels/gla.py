"""Gated linear attention: a decay for every channel of the keys, token by token (GLA).

What it does: S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, with the log
decay g [B, T, H, K], at most 0. KV heads are shared by H / G query heads, but every query head has
its own gates and state. Tokens of padding write nothing and forget nothing: a padded row is the row
alone.
Cost: T H (4 K V + C (K + 2 V)) flops with chunks of C tokens; a decoded token reads and writes the
state once.
State: [B, H, K, V] float32 (float64 where q is), whatever the dtype of q.
Paths: fla (flash-linear-attention on a GPU, where it gives the same answer sooner), chunked
(products inside chunks, a recurrence between them), reference (token by token).
Known limits: g above 0 is not refused (it would cost a synchronisation) and overflows; the chunked
path has no second derivatives.
Reference: Yang et al., Gated Linear Attention, arXiv 2312.06635. Deviations: _channel.py.
"""

from __future__ import annotations

from typing import Any

import torch

from morph.kernels import _channel, _checks, _fla

PATHS = ("fla", "chunked")
CHUNK = _channel.CHUNK
# Settings under which the laws of tests/test_kernels.py hold this kernel
EXAMPLES: dict[str, dict[str, Any]] = {"per_channel": {}}


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

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype. g
    [B, T, H, K], log decay <= 0, any floating dtype. scale defaults to K ** -0.5. padding
    [B, P + T] bool, True for real tokens, of which the last T matter; rows of padding come out as
    zeros. `path` demands a path by name. Raises ValueError with the sizes where they do not fit,
    KernelUnavailable where a demanded path cannot run.
    """
    _channel.check(q, k, v, g, None, padding, initial_state)
    reasons = {name: unsupported(name, q) for name in PATHS}

    def by(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _channel.call(
            _path(name, q.shape[1]),
            *(q, k, v, g),
            scale=scale,
            padding=padding,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )

    return by(_fla.settle("gla", path, reasons, q, by))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `forward` returns, token by token in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(path: str, q: torch.Tensor, *args: Any, **options: Any) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    return _fla.reason(q) if path == "fla" else _checks.float_reason(q)


def _path(name: str, tokens: int) -> Any:
    if name == "fla":
        return _foreign
    return _reference if name == "reference" else _chunked if tokens > 1 else _step


def _foreign(q: Any, k: Any, v: Any, g: Any, scale: float, state: Any) -> Any:
    return _fla.run("gla", q, k, v, g=g, scale=scale, state=state)


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
    decay, outputs = g.to(q.dtype).exp(), []
    for t in range(q.shape[1]):
        new = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = decay[:, t, :, :, None] * state.to(q.dtype) + new
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


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
    groups, work = k.shape[2], state.dtype
    decay = g.to(work).exp().reshape(batch, groups, -1, size, 1)
    k, v = k.to(work).reshape(batch, groups, 1, size, 1), v.to(work)
    state = torch.addcmul(
        k * v.reshape(batch, groups, 1, 1, -1), decay, state.unflatten(1, (groups, -1))
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
    """A[i, j] weighs the value of token j in row i of its own chunk; the rest is in the state."""
    outputs, s = [], state.flatten(0, 1)
    for tokens, (qs, ks, vs, gs) in _channel.spans(state, q, k, v, g):
        inside, rows, keys, whole = _channel.pairs(gs, ks, qs)
        values = vs.flatten(0, 2)
        states, written = [], keys.transpose(1, 2) @ values
        for decay, new in zip(*(_channel.by_chunk(x, qs.shape[2]) for x in (whole, written))):
            states.append(s)
            s = torch.addcmul(new, decay[..., None], s)
        before = torch.stack(states, dim=1).flatten(0, 1)
        o = torch.baddbmm(inside[:, 0] @ values, rows[:, :, 0], before, beta=scale, alpha=scale)
        outputs.append(_channel.restore(o, qs, tokens))
    return torch.cat(outputs, dim=1), s.view(state.shape)


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
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    g = -torch.rand((B, T, H, K), generator=generator)
    return {**out, "g": g.to(torch.float64 if dtype == torch.float64 else torch.float32), **options}


def flops(*, B: int, T: int, H: int, K: int, V: int, chunk: int = CHUNK, **_: Any) -> int:
    """Return the floating-point operations of a chunked forward, masked values included."""
    return B * T * H * (4 * K * V + chunk * (K + 2 * V))


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v, float32 g in, o out, the state once."""
    return itemsize * B * T * (H + G) * (K + V) + 4 * B * T * H * K + 4 * B * H * K * V
