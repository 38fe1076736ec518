"""Kimi delta attention: the gated delta rule with a decay for every channel of the keys (KDA).

What it does: S = Diag(exp(g_t)) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T and
o_t = scale * S_t^T q_t: a token corrects what the state answers to its key. The log decay g
[B, T, H, K] is at most 0, the step size beta [B, T, H] usually within 0 and 1; with equal decays in
all channels this is Gated DeltaNet. The caller normalises q and k: for |k| = 1 and beta <= 2 the
state cannot grow by itself. KV heads are shared by H / G query heads, but every query head has its
own gates and state. Tokens of padding write nothing and forget nothing: a padded row is the row
alone.
Cost: T H (6 K V + C (3 K + 3 V)) flops with chunks of C tokens; a decoded token reads the state
twice and writes it once.
State: [B, H, K, V] float32 (float64 where q is), whatever the dtype of q.
Paths: fla (flash-linear-attention on a GPU, where it gives the same answer sooner), chunked
(a triangular system inside chunks, a recurrence between them), reference (token by token).
Known limits: g above 0 and keys that are not normalised are not refused (it would cost a
synchronisation) and may overflow; the chunked path has no second derivatives.
Reference: Kimi Team, Kimi Linear, arXiv 2510.26692; Yang et al., Gated DeltaNet, 2412.06464.
Deviations: the triangular system is solved, not inverted; weights of pairs as in _channel.py.
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
    beta: torch.Tensor,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (o [B, T, H, V], final state [B, H, K, V] or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype. g
    [B, T, H, K], log decay <= 0, and beta [B, T, H], any floating dtype. scale defaults to
    K ** -0.5. padding [B, P + T] bool, True for real tokens, of which the last T matter; rows of
    padding come out as zeros. `path` demands a path by name. Raises ValueError with the sizes where
    they do not fit, KernelUnavailable where a demanded path cannot run.
    """
    _channel.check(q, k, v, g, beta, padding, initial_state)
    reasons = {name: unsupported(name, q) for name in PATHS}

    def by(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _channel.call(
            _path(name, q.shape[1]),
            *(q, k, v, g, beta[..., None]),
            scale=scale,
            padding=padding,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )

    return by(_fla.settle("kda", path, reasons, q, by))


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


def _foreign(q: Any, k: Any, v: Any, g: Any, beta: Any, scale: float, state: Any) -> Any:
    return _fla.run("kda", q, k, v, g=g, beta=beta[..., 0], scale=scale, state=state)


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    decay, beta, outputs = g.to(q.dtype).exp(), beta.to(q.dtype), []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state.to(q.dtype)
        new = beta[:, t] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], new)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token: what k and q read from the old state in one pass, then the new state."""
    ratio, work = q.shape[2] // k.shape[2], state.dtype
    q, k, v, g, beta = (x.to(work).transpose(1, 2) for x in (q, k, v, g, beta))  # [B, H, 1, .]
    if ratio > 1:
        k, v = k.repeat_interleave(ratio, dim=1), v.repeat_interleave(ratio, dim=1)
    q, decay = q * scale, g.exp()
    seen = torch.cat([k, q], dim=2) * decay @ state
    new = beta * (v - seen[:, :, :1])
    o = seen[:, :, 1:] + (q * k).sum(dim=-1, keepdim=True) * new
    state = torch.addcmul(k.transpose(-1, -2) * new, decay.transpose(-1, -2), state)
    return o.transpose(1, 2), state


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What token i writes is beta_i (v_i - what the state and earlier tokens answer to k_i).

    A unit lower triangular system per chunk, linear in the state S before it: with
    L = A[beta_i k_i, k_j] below the diagonal, (1 + L) U = beta V and (1 + L) W = beta K decayed,
    the tokens write U - W S.
    """
    outputs, s = [], state.flatten(0, 1)
    for tokens, (qs, ks, vs, gs, bs) in _channel.spans(state, q, k, v, g, beta):
        found, rows, keys, whole = _channel.pairs(gs, ks, qs, ks * bs)
        values, asked = (_solve(found[:, 1], x) for x in ((vs * bs).flatten(0, 2), rows[:, :, 1]))
        asked = _channel.flushed(asked, whole)
        parts = (whole[..., None], keys.transpose(1, 2), values, asked)
        states, news = [], []
        for decay, key, u, w in zip(*(_channel.by_chunk(x, qs.shape[2]) for x in parts)):
            states.append(s)
            news.append(torch.baddbmm(u, w, s, alpha=-1))
            s = torch.baddbmm(decay * s, key, news[-1])
        before, written = (torch.stack(x, dim=1).flatten(0, 1) for x in (states, news))
        o = found[:, 0] @ written
        o = torch.baddbmm(o, rows[:, :, 0], before, beta=scale, alpha=scale)
        outputs.append(_channel.restore(o, qs, tokens))
    return torch.cat(outputs, dim=1), s.view(state.shape)


def _solve(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return X with (1 + lower) X = right; transposed, as LAPACK then has nothing to rearrange."""
    return torch.linalg.solve_triangular(
        lower.mT, right.mT, upper=True, left=False, unitriangular=True
    ).mT


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
    """Return random inputs for `forward`, keys of norm 1; options are passed through."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    out["k"] = torch.nn.functional.normalize(out["k"], dim=-1)
    out = {n: x.to(dtype) for n, x in out.items()}
    gates = {
        "g": -torch.rand((B, T, H, K), generator=generator),
        "beta": torch.rand((B, T, H), generator=generator),
    }
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    return {**out, **{n: x.to(gate) for n, x in gates.items()}, **options}


def flops(*, B: int, T: int, H: int, K: int, V: int, chunk: int = CHUNK, **_: Any) -> int:
    """Return the floating-point operations of a chunked forward, masked values included."""
    return B * T * H * (6 * K * V + chunk * (3 * K + 3 * V))


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v, float32 g, beta in, o out, the state once."""
    return itemsize * B * T * (H + G) * (K + V) + 4 * B * T * H * (K + 1) + 4 * B * H * K * V
