"""Softmax attention inside a window and linear attention beyond it, under one denominator.

What it does: query t weighs key j by mix * exp(s) where t - j < window_size, s = scale * q k
(`softcap` c turns s into c * tanh(s / c)), and by fq_t fk_j where it is older; the weights are then
made to sum to 1. `formula` says what a weight of the window is worth beside the linear ones:
`paper` takes it as written, `code` divides it by exp(m), m the row's largest s in the window, as
the official code does. Under `code` the share of the window depends on how peaked the scores are,
under `paper` on how large they are. fq and fk [B, T, H, F] are features >= 0 that the caller makes;
every query head has its own, while k and v are shared by H / G heads. Keys enter the linear state
when they leave the window, and stay for ever: it has no decay. Tokens of padding are not seen.
Cost: 2 T H ((W + C) (K + V) + C (F + V) + 2 F V) flops with chunks of C tokens; memory linear in T
forward and backward; a decoded token reads W entries and reads and writes the linear state.
State: `HedgehogState`: the last min(tokens seen, window_size) keys, values and features, and sums
[B, H, F, V] and [B, H, F] in float32 (float64 where q is).
Paths: chunked (chunks of queries with the keys in reach), reference (a dense mask).
Known limits: no second derivatives on the chunked path. A mix of 0 gives NaN.
Reference: Zhang et al., LoLCATs, arXiv 2410.10254; Zhang et al., Hedgehog, 2402.04347. Deviation:
the official code's terraced window of two blocks is not here, only its sliding one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch

from morph.kernels import _checks, _hedgehog
from morph.kernels._hedgehog import Ask, Parts, Three

PATHS = ("chunked",)
FORMULAS = ("paper", "code")
CHUNK = _hedgehog.CHUNK
# Settings under which the laws of tests/test_kernels.py hold this kernel
EXAMPLES: dict[str, dict[str, Any]] = {
    "window": {"window_size": 7},
    "code": {"window_size": 6, "formula": "code"},
    "cap": {"window_size": 5, "softcap": 2.0, "scale": 0.7},
    "own_token": {"window_size": 1, "F": 10},
    "wide": {"window_size": 70, "F": 3},
    "all": {"window_size": 1000},
}


class HedgehogState(NamedTuple):
    """Keys k [B, N, G, K] and values v [B, N, G, V] of the last N = min(seen, window_size) tokens,
    their features fk [B, N, H, F], the sums s [B, H, F, V] of fk v and z [B, H, F] of fk over all
    older tokens, and `seen`, the tokens so far.

    fk None: `forward` wants the features of tokens that leave the window along with the new ones.
    """

    k: torch.Tensor
    v: torch.Tensor
    fk: torch.Tensor | None
    s: torch.Tensor
    z: torch.Tensor
    seen: int


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    fq: torch.Tensor,
    fk: torch.Tensor,
    window_size: int,
    mix: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    formula: Literal["paper", "code"] = "paper",
    padding: torch.Tensor | None = None,
    initial_state: HedgehogState | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, HedgehogState | None]:
    """Return (o [B, T, H, V], final state or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype. fq and fk
    [B, T, H, F] >= 0 and mix [H] in (0, 1], any floating dtype. Where `initial_state.fk` is None,
    fk starts with the features of the tokens that leave the state: `leaving` says how many.
    window_size counts the query's own token; scale defaults to K ** -0.5. padding [B, P + T] bool,
    True for real tokens, over the P tokens of `initial_state` and the T new ones; None: all real.
    Rows of padding come out as zeros. `path` demands a path by name. Raises ValueError with the
    sizes where they do not fit, KernelUnavailable where a demanded path cannot run.
    """
    state, tokens = initial_state, q.shape[1] if q.ndim == 4 else 0
    seen = state.seen if state else 0
    _checks.check_qkv(q, k, v, padding, seen)
    held = min(seen, window_size)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    ask = Ask(window_size, held, scale, softcap, formula)
    _check(q, k, v, fq, fk, mix, ask, state)
    taken = _checks.pick("hedgehog", path, {"chunked": unsupported("chunked", q, k, v)})
    real = padding if padding is None else padding[:, -held - tokens :]
    real = _checks.some_padding(real, q.device)
    if state:
        k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        fk = fk if state.fk is None else torch.cat([state.fk, fk], dim=1)
    gone = max(0, held + tokens - window_size)
    left = fk[:, :gone]
    if real is not None:
        left = left.masked_fill(~real[:, :gone, None, None], 0.0)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state:
        s, z = state.s.to(work), state.z.to(work)
    else:
        z = q.new_zeros(q.shape[0], q.shape[2], fq.shape[3], dtype=work)
        s = z.new_zeros(*z.shape, v.shape[3])
    with torch.autocast(q.device.type, enabled=False):
        run = _reference if taken == "reference" else _hedgehog.chunked
        o, s, z = run(Parts(q, k, v, fq, left, mix, s, z), real, ask)
    if real is not None:
        o = o.masked_fill(~real[:, held:, None, None], 0.0)
    if not output_final_state:
        return o, None
    features = _last(fk, window_size) if not state or state.fk is not None else None
    end = (_last(k, window_size), _last(v, window_size), features, s, z, seen + tokens)
    return o, HedgehogState(*end)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, HedgehogState | None]:
    """Return what `forward` returns, by a dense mask in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(path: str, q: torch.Tensor, *args: Any, **options: Any) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    return _checks.float_reason(q)


def leaving(held: int, tokens: int, window_size: int) -> int:
    """Return how many of the `held` tokens of a state leave the window under `tokens` new ones."""
    return min(held, max(0, held + tokens - window_size))


def _last(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last tokens of x as a copy: a state must not hold a prompt alive."""
    return x[:, -count:].clone(memory_format=torch.contiguous_format)


def _reference(x: Parts, real: torch.Tensor | None, ask: Ask) -> Three:
    heads, (total, groups) = x.q.shape[2], x.k.shape[1:3]
    k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (x.k, x.v))
    mix, fq, left = (t.to(x.q.dtype) for t in (x.mix, x.fq, x.left))
    at = torch.arange(total, device=k.device)
    age = at[ask.held :, None] - at
    near = (age >= 0) & (age < ask.window)
    if real is not None:
        near = (near & real[:, None] | (age == 0))[:, None]
    a = torch.einsum("bthk,bshk->bhts", x.q, k) * ask.scale
    if ask.softcap is not None:
        a = ask.softcap * torch.tanh(a / ask.softcap)
    a = a.masked_fill(~near, -math.inf)
    peak = a.amax(dim=-1, keepdim=True)
    if ask.formula == "paper":  # all weights are divided by exp(peak) below, so o does not change
        peak = peak.detach()
    a = (a - peak).exp()
    far = torch.einsum("bthf,bshf->bhts", fq, left)
    far = far.masked_fill(age[:, : left.shape[1]] < ask.window, 0.0)
    old = v[:, : left.shape[1]]
    top = torch.einsum("bhts,bshv->bhtv", far, old)
    top = top + torch.einsum("bthf,bhfv->bhtv", fq, x.s.to(fq))
    bottom = far.sum(dim=-1) + torch.einsum("bthf,bhf->bht", fq, x.z.to(fq))
    share = 1 / mix[:, None, None]
    if ask.formula == "paper":
        share = share * (-peak).exp()
    top = torch.einsum("bhts,bshv->bhtv", a, v) + share * top
    o = top / (a.sum(dim=-1, keepdim=True) + share * bottom[..., None])
    s = x.s.to(fq) + torch.einsum("bshf,bshv->bhfv", left, old)
    z = x.z.to(fq) + left.sum(dim=1)
    return o.transpose(1, 2), s.to(x.s.dtype), z.to(x.z.dtype)


def _check(
    q: Any, k: Any, v: Any, fq: Any, fk: Any, mix: Any, ask: Ask, state: HedgehogState | None
) -> None:
    (batch, tokens, heads), (window, held) = q.shape[:3], ask[:2]
    _checks.check_heads("mix", mix, heads)
    if ask.formula not in FORMULAS:
        raise ValueError(f"formula is {ask.formula!r}; it must be one of {', '.join(FORMULAS)}.")
    if window < 1:
        raise ValueError(f"window_size is {window}; it counts the query's own token, so >= 1.")
    if ask.softcap is not None and not ask.softcap > 0:
        raise ValueError(f"softcap is {ask.softcap}; it must be above 0, or None for no cap.")
    if fq.ndim != 4 or list(fq.shape[:3]) != [batch, tokens, heads] or not fq.shape[3]:
        raise ValueError(f"fq must be {[batch, tokens, heads]} and features; got {list(fq.shape)}.")
    size = fq.shape[3]
    more = leaving(held, tokens, window) if state is not None and state.fk is None else 0
    wants = [("fk", fk, [batch, more + tokens, heads, size])]
    if state is not None:
        wants += [
            ("initial_state.k", state.k, [batch, held, *k.shape[2:]]),
            ("initial_state.v", state.v, [batch, held, *v.shape[2:]]),
            ("initial_state.s", state.s, [batch, heads, size, v.shape[3]]),
            ("initial_state.z", state.z, [batch, heads, size]),
        ]
        if state.fk is not None:
            wants.append(("initial_state.fk", state.fk, [batch, held, heads, size]))
    for name, tensor, want in wants:
        if list(tensor.shape) != want:
            raise ValueError(f"{name} must be {want}; got {list(tensor.shape)}.")


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
    F: int = 6,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    for name in ("fq", "fk"):
        out[name] = torch.randn(B, T, H, F, generator=generator).softmax(dim=-1).to(dtype)
    out["mix"] = (0.1 + 0.9 * torch.rand(H, generator=generator)).to(dtype)
    return {**out, **options}


def flops(
    *, B: int, T: int, H: int, K: int, V: int, window_size: int, F: int = 128, **_: Any
) -> int:
    """Return the floating-point operations of a chunked forward, masked pairs included."""
    chunk = _hedgehog.chunk_size(window_size)
    reach = min(window_size, T) + chunk
    return 2 * B * T * H * (reach * (K + V) + chunk * (F + V) + 2 * F * V)


def bytes(
    *, B: int, T: int, H: int, G: int, K: int, V: int, F: int = 128, itemsize: int = 4, **_: Any
) -> int:
    """Return the bytes a forward must move: q, k, v and features in, o out, the sums once."""
    return itemsize * B * T * ((H + G) * (K + V) + 2 * H * F) + 4 * B * H * F * (V + 1)
