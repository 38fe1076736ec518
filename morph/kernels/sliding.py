"""Softmax attention over a sliding window, with optional sink tokens.

What it does: query i sees key j where i - window_size < j <= i: `window_size` counts the query's
own token, as Hugging Face's `sliding_window` does. `window_size` None, or no smaller than the
tokens seen, is full causal attention. `num_sinks` adds the first real tokens of each row, which
stay visible for ever at their absolute positions (keys are not rotated again, unlike the original
StreamingLLM code, which uses positions inside the cache). `sink_bias` [H] adds a logit per head to
the softmax's denominator and no value: o becomes o * sigmoid(logsumexp(scores) - sink_bias), as in
GPT-OSS and granite_swa. `softcap` turns a score s into softcap * tanh(s / softcap).
Cost: 4 T W H K flops; memory linear in T forward and backward; a decoded token reads W entries.
State: `SlidingState`, min(tokens seen, window_size + num_sinks) keys and values, never more.
Paths: triton (on a GPU, heads of 256 at most; `_triton_sliding`), banded (blocks of queries against
the keys they reach), reference (a dense mask).
Known limits: no second derivatives on the triton and banded paths.
Reference: Beltagy et al., Longformer, arXiv 2004.05150; Xiao et al., StreamingLLM, 2309.17453.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from morph.kernels import _checks, _triton
from morph.kernels._banded import Band, banded

PATHS = ("triton", "banded")
_TRITON_LARGEST = 256
# Settings under which the laws of tests/test_kernels.py hold this kernel
EXAMPLES: dict[str, dict[str, Any]] = {
    "window": {"window_size": 7},
    "sinks": {"window_size": 5, "num_sinks": 3},
    "bias_cap": {"window_size": 6, "sink_bias": True, "softcap": 2.0},
    "sinks_bias": {"window_size": 4, "num_sinks": 2, "sink_bias": True},
    "full": {"window_size": None},
    "full_bias": {"window_size": None, "sink_bias": True},
}


class SlidingState(NamedTuple):
    """Keys k [B, N, G, K], values v [B, N, G, V] and `seen`, the tokens so far.

    N = min(seen, window_size + num_sinks). Up to that many tokens all are kept, in order; after
    that the first num_sinks entries are each row's sink tokens and the rest the last window_size.
    """

    k: torch.Tensor
    v: torch.Tensor
    seen: int


class _Ask(NamedTuple):
    """The options of one call; `state` is the initial one."""

    window: int | None
    num_sinks: int
    sink_bias: torch.Tensor | None
    softcap: float | None
    scale: float
    padding: torch.Tensor | None
    state: SlidingState | None

    @property
    def seen(self) -> int:
        return self.state.seen if self.state else 0


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window_size: int | None = None,
    num_sinks: int = 0,
    sink_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: SlidingState | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, SlidingState | None]:
    """Return (o [B, T, H, V], final state or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype.
    sink_bias [H] any floating dtype; scale defaults to K ** -0.5. padding [B, P + T] bool, True for
    real tokens, over the P tokens of `initial_state` and the T new ones; None: all real. Rows of
    padding come out as zeros. `path` demands a path by name. Raises ValueError with the sizes where
    they do not fit, KernelUnavailable where a demanded path cannot run.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    seen = initial_state.seen if initial_state is not None else 0
    _checks.check_qkv(q, k, v, padding, seen)
    real = _checks.some_padding(padding, q.device)
    ask = _Ask(window_size, num_sinks, sink_bias, softcap, scale, real, initial_state)
    _check(k, v, ask, q.shape[2])
    taken = _checks.pick("sliding", path, {name: unsupported(name, q, k, v) for name in PATHS})
    new = _update(k, v, ask)
    if taken == "reference":
        o = _reference(q, k, v, ask)
    else:
        o = _fast(q, k, v, ask, new, taken == "triton")
    if not output_final_state:
        return o, None
    return o, SlidingState(_owned(new.k, k), _owned(new.v, v), new.seen)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, SlidingState | None]:
    """Return what `forward` returns, by a dense mask in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(
    path: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    if path != "triton":
        return _checks.float_reason(q)
    size = max(q.shape[3], v.shape[3])
    large = "" if size <= _TRITON_LARGEST else f"a head has size {size}; at most 256 fit."
    return large or _triton.reason(q)


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ask: _Ask) -> torch.Tensor:
    batch, tokens, heads, _ = q.shape
    seen, total, window = ask.seen, ask.seen + tokens, ask.window
    real = ask.padding
    if real is None:
        real = torch.ones(batch, total, dtype=torch.bool, device=q.device)
    at = torch.arange(seen, total, device=q.device).expand(batch, -1)  # positions of the keys
    if ask.state is not None:
        at = torch.cat([_positions(ask, real[:, :seen]), at], dim=1)
        k, v = torch.cat([ask.state.k, k], dim=1), torch.cat([ask.state.v, v], dim=1)
    query = torch.arange(seen, total, device=q.device)[None, :, None]
    visible = at[:, None] <= query
    if window is not None:
        rank = real.cumsum(dim=1).gather(1, at.clamp(max=total - 1))
        visible = visible & ((at[:, None] > query - window) | (rank <= ask.num_sinks)[:, None])
    visible = visible & real.gather(1, at.clamp(max=total - 1))[:, None]
    ratio = heads // k.shape[2]
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    s = torch.einsum("bthk,bshk->bhts", q, k) * ask.scale
    if ask.softcap is not None:
        s = ask.softcap * torch.tanh(s / ask.softcap)
    asks = real[:, None, seen:, None]
    # rows of padding are zeroed below; seeing all keys until then keeps them finite
    s = s.masked_fill(~visible[:, None] & asks, -math.inf)
    if ask.sink_bias is not None:
        bias = ask.sink_bias.to(s.dtype).view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        s = torch.cat([s, bias], dim=-1)
    p = torch.softmax(s, dim=-1).masked_fill(~asks, 0.0)[..., : k.shape[1]]
    return torch.einsum("bhts,bshv->bthv", p, v)


def _positions(ask: _Ask, real: torch.Tensor) -> torch.Tensor:
    """Return the position of every entry of the state, [B, N]; far in the future where void."""
    state, window, num_sinks = ask.state, ask.window, ask.num_sinks
    assert state is not None
    held, never = state.k.shape[1], torch.iinfo(torch.int64).max
    at = torch.arange(state.seen - held, state.seen, device=real.device).expand(len(real), -1)
    if held == state.seen:
        return at
    assert window is not None
    sinks = _sink_positions(real, num_sinks)
    # a sink token that the window still holds counts there
    return torch.cat([sinks.masked_fill(sinks >= state.seen - window, never), at[:, num_sinks:]], 1)


def _fast(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ask: _Ask,
    new: SlidingState,
    use_triton: bool,
) -> torch.Tensor:
    seen, total, window, state = ask.seen, ask.seen + q.shape[1], ask.window, ask.state
    held = new.k.shape[1]
    plain = ask.softcap is None and ask.sink_bias is None
    split = use_triton and not _learns(q, new, ask)  # its kernel has no gradients
    alone = q.shape[1] == 1 and (ask.padding is None or not ask.num_sinks or held == total)
    if alone and (plain or split):
        real = None if ask.padding is None else ask.padding[:, total - held :]
        real = _checks.some_padding(real, q.device)
        if split:
            from morph.kernels._triton_sliding import triton_decode

            return triton_decode(q, new.k, new.v, ask.scale, ask.softcap, ask.sink_bias, real)
        return _decode(q, new, ask.scale, real)
    if window is not None and window >= total:
        window = None
    if plain and ask.padding is None and window is None and not seen and q.shape[3] == v.shape[3]:
        return _causal(q, k, v, ask.scale)
    held = 0
    if state is not None:
        held = state.k.shape[1]
        if held < seen:  # sinks first, then the window
            held -= ask.num_sinks
        held = held if window is None else min(held, window - 1)
        k = torch.cat([state.k[:, state.k.shape[1] - held :], k], dim=1)
        v = torch.cat([state.v[:, state.v.shape[1] - held :], v], dim=1)
    at = k_sinks = v_sinks = None
    if window is not None and ask.num_sinks:
        at, k_sinks, v_sinks = _sinks(new, ask)
        at = at - (seen - held)
    band = Band(
        window=window,
        past=held,
        scale=ask.scale,
        softcap=ask.softcap,
        real=None if ask.padding is None else ask.padding[:, seen - held : total],
        sinks_at=at,
    )
    run = banded
    if use_triton:  # imported only here, as triton need not be installed
        from morph.kernels._triton_sliding import triton_banded as run
    return run(q, k, v, band, ask.sink_bias, k_sinks, v_sinks)


def _learns(q: torch.Tensor, new: SlidingState, ask: _Ask) -> bool:
    tensors = (q, new.k, new.v, ask.sink_bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _decode(
    q: torch.Tensor, new: SlidingState, scale: float, real: torch.Tensor | None
) -> torch.Tensor:
    """One new token sees exactly what the new state holds; query heads of a KV head share a row.

    real [B, N] marks the entries that are no padding; None: all.
    """
    batch, _, heads, size = q.shape
    groups, mask = new.k.shape[2], None
    if real is not None:
        own = torch.arange(real.shape[1], device=real.device) == real.shape[1] - 1
        mask = (real | own)[:, None, None]  # a row of padding sees itself, and is zeroed below
    rows = q.reshape(batch, groups, heads // groups, size)
    o = F.scaled_dot_product_attention(
        rows, new.k.transpose(1, 2), new.v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    o = o.reshape(batch, 1, heads, -1)
    return o if real is None else o.masked_fill(~real[:, -1, None, None, None], 0.0)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    return o.transpose(1, 2)


def _sinks(new: SlidingState, ask: _Ask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the positions [B or 1, N] of the sink tokens, their keys and their values.

    After the update they stand first in the new state, or that holds every token in order.
    """
    if ask.padding is None:
        at = torch.arange(min(ask.num_sinks, new.seen), device=new.k.device)[None]
        return at, new.k[:, : at.shape[1]], new.v[:, : at.shape[1]]
    at = _sink_positions(ask.padding, ask.num_sinks)
    if new.k.shape[1] == new.seen:
        index = at.clamp(max=new.seen - 1)
        return at, _rows(new.k, index), _rows(new.v, index)
    return at, new.k[:, : ask.num_sinks], new.v[:, : ask.num_sinks]


def _update(k: torch.Tensor, v: torch.Tensor, ask: _Ask) -> SlidingState:
    """Return the state after these tokens; its tensors may be views."""
    total, window, num_sinks = ask.seen + k.shape[1], ask.window, ask.num_sinks
    if ask.state is not None:
        k, v = torch.cat([ask.state.k, k], dim=1), torch.cat([ask.state.v, v], dim=1)
    if window is None or total <= window + num_sinks:
        return SlidingState(k, v, total)
    if not num_sinks:
        return SlidingState(k[:, -window:], v[:, -window:], total)
    if ask.padding is None:
        sinks = [x[:, :num_sinks] for x in (k, v)]
    else:
        at = _sink_positions(ask.padding, num_sinks)
        gone = total - k.shape[1]  # tokens that the old state dropped between sinks and window
        slot = torch.arange(num_sinks, device=k.device)
        index = torch.where(at < num_sinks + gone, slot, at - gone) if gone else at
        sinks = [_rows(x, index.clamp(max=k.shape[1] - 1)) for x in (k, v)]
    k, v = (torch.cat([s, x[:, -window:]], dim=1) for s, x in zip(sinks, (k, v)))
    return SlidingState(k, v, total)


def _owned(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return x, copied if it shares or wastes memory: a state must not hold a prompt alive."""
    wasteful = x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone(memory_format=torch.contiguous_format) if wasteful or x is source else x


def _sink_positions(real: torch.Tensor, num_sinks: int) -> torch.Tensor:
    """Return the positions of each row's first real tokens, [B, num_sinks]; S where too few."""
    rank = real.cumsum(dim=1)
    wanted = torch.arange(1, num_sinks + 1, device=real.device).expand(len(real), -1)
    return torch.searchsorted(rank, wanted.contiguous())


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the entries `index` [B, N] of x [B, S, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _check(k: torch.Tensor, v: torch.Tensor, ask: _Ask, heads: int) -> None:
    window, num_sinks, state = ask.window, ask.num_sinks, ask.state
    _checks.check_heads("sink_bias", ask.sink_bias, heads)
    if window is not None and window < 1:
        raise ValueError(f"window_size is {window}; it counts the query's own token, so >= 1.")
    if num_sinks < 0:
        raise ValueError(f"num_sinks is {num_sinks}; it must be 0 or more.")
    if ask.softcap is not None and not ask.softcap > 0:
        raise ValueError(f"softcap is {ask.softcap}; it must be above 0, or None for no cap.")
    if state is None:
        return
    bound = state.seen if window is None else min(state.seen, window + num_sinks)
    for name, old, fresh in (("k", state.k, k), ("v", state.v, v)):
        want = [fresh.shape[0], bound, *fresh.shape[2:]]
        if list(old.shape) != want:
            raise ValueError(
                f"initial_state.{name} must be {want} after {state.seen} tokens with window_size "
                f"{window} and num_sinks {num_sinks}; got {list(old.shape)}."
            )


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
    sink_bias: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    if sink_bias:
        options["sink_bias"] = torch.randn(H, generator=generator).to(dtype)
    return {**out, **options}


def flops(
    *, B: int, T: int, H: int, K: int, V: int, window_size: int | None = None, **_: Any
) -> int:
    """Return the floating-point operations of a forward: 2 (K + V) per visible pair."""
    window = T if window_size is None else min(window_size, T)
    return 2 * B * H * (K + V) * (T * window - window * (window - 1) // 2)


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v in, o out."""
    return itemsize * B * T * (H + G) * (K + V)
