"""A gated delta state beside a bounded cache of the tokens that it found hardest to hold (HOLA).

What it does: the state path runs S = exp(g_t) S, e_t = v_t - S^T k_t, S += beta_t k_t e_t^T and
reads S^T q_t, on q and k of unit length. The cache path is softmax attention of q over k as they
are (`scale`, `softcap`): a token sees the `cache_size` tokens of highest score from before its
block of `block_size` tokens, the tokens of its own block up to itself, and a sink, a logit per head
that takes weight and gives nothing. o = mix_state o_state + mix_cache o_cache; `norm_eps` first
brings o_state to unit root mean square per head, and mix_state None leaves it out. The score is
||beta_t e_t||, the size of what a token writes, over all query heads that share its KV head; equal
scores keep the earlier token. Blocks count the real tokens of a row, so a padded row is the row
alone. A `window_size` hides what is further back; at a block's start the cache drops what lies
beyond it, and never takes back what it let go.
Cost: the gated delta rule's, and 2 T H (cache_size + block_size) (K + V) flops; memory linear in T.
A decoded token reads all that is kept.
State: S [B, H, K, V], scores and positions in float32 (float64 where q is), and the keys and values
of the best tokens and of the current block, cache_size + block_size at most.
Paths: chunked (delta rule in chunks; a block of queries against its gathered and its own keys),
reference (token by token, an explicit sort of the scores, a dense mask).
Known limits: no gradient through the choice of tokens, no second derivatives; scores closer than
rounding may choose differently on different paths; products of the cache path are float32; exact
for 16 million tokens, where float32 positions end; on a GPU the gradients of shared cache entries
are added in no fixed order.
Reference: HOLA, arXiv 2607.02303; Yang et al., Gated Delta Networks, 2412.06464. Deviations: tokens
are chosen per KV head and not per query head (the paper does not say which), by the norm of all its
heads' writes together, so that an entry is a key and a value once; the gains are given, where the
paper has a learned one for the cache and 1 for the state; q and k of the cache path are not normed,
so that a layer of softmax attention can be continued.
"""

from __future__ import annotations

from typing import Any

import torch

from morph.kernels import _checks, _delta
from morph.kernels._hola_cache import Ask, Rows, dense, gather_rows, next_state, step, tiles
from morph.kernels._hola_cache import HolaState as HolaState

PATHS = ("chunked",)
_EPS = 1e-6
# Settings under which the laws of tests/test_kernels.py hold this kernel. Random scores of these
# sizes lie further apart than float32 rounds. The large norm_eps keeps gradients of a first token,
# whose normed output does not depend on q or k, from being all cancellation.
EXAMPLES: dict[str, dict[str, Any]] = {
    "plain": {"cache_size": 5, "block_size": 7},
    "sink_cap": {"cache_size": 6, "block_size": 16, "with_sink": True, "softcap": 2.0},
    "normed": {"cache_size": 3, "block_size": 4, "norm_eps": 0.3},
    "window": {"cache_size": 4, "block_size": 6, "window_size": 9, "with_sink": True},
    "wide": {"cache_size": 70, "block_size": 40},
}


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    mix_state: torch.Tensor | None,
    mix_cache: torch.Tensor,
    cache_size: int,
    block_size: int,
    window_size: int | None = None,
    sink: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    norm_eps: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: HolaState | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, HolaState | None]:
    """Return (o [B, T, H, V], final state or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype. g, log
    decay <= 0, and beta [B, T, H], mix_state [H] or [H, V], mix_cache and sink [H], any floating
    dtype. scale, of the cache path, defaults to K ** -0.5. padding [B, P + T] bool, True for real
    tokens, over the P tokens of `initial_state` and the T new ones; None: all real. Rows of padding
    come out as zeros. `path` demands a path by name. Raises ValueError with the sizes where they do
    not fit, KernelUnavailable where a demanded path cannot run.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    ask = Ask(cache_size, block_size, window_size, scale, softcap, sink)
    _check(q, k, v, g, beta, mix_state, mix_cache, padding, initial_state, ask)
    taken = _checks.pick("hola", path, {name: unsupported(name, q, k, v) for name in PATHS})
    plain, tokens = taken == "reference", q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        real = _checks.some_padding(padding, q.device)
        new = None if real is None else real[:, -tokens:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and mix_state is not None):
            o_state, s, score = _state_path(q, k, v, g, beta, new, initial_state, work, plain)
        rows = gather_rows(k, v, score, real, initial_state)
        attend = _reference if plain else tiles if tokens > 1 else step
        o, keep = attend(q, rows, ask, output_final_state)
        o = o * mix_cache.to(o.dtype)[:, None]
        if mix_state is not None:
            if norm_eps is not None:
                size = o_state.square().mean(dim=-1, keepdim=True)
                o_state = o_state * torch.rsqrt(size + norm_eps)
            mix = mix_state.to(o.dtype)
            o = o + o_state * (mix[:, None] if mix.ndim == 1 else mix)
        if new is not None:
            o = o.masked_fill(~new[..., None, None], 0.0)
        final = next_state(s.to(work), rows, keep, ask) if output_final_state else None
        return o.to(q.dtype), final


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, HolaState | None]:
    """Return what `forward` returns, slowly, in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(path: str, q: torch.Tensor, *args: Any, **options: Any) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    return _checks.float_reason(q)


def _state_path(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    real: torch.Tensor | None,
    state: HolaState | None,
    work: torch.dtype,
    plain: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the state's outputs [B, T, H, V], the new state and the scores [B, T, G]."""
    groups = k.shape[2]
    if not plain:
        q, k = q.to(work), k.to(work)
    q, k = (x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + _EPS) for x in (q, k))
    k, g, beta = _delta.silence(k, g, beta, real)
    if state is None:
        s = torch.zeros(*q.shape[::2], q.shape[3], v.shape[3], dtype=work, device=q.device)
    else:
        s = state.s.to(work)
    run = _delta.sequential if plain else _delta.chunked if q.shape[1] > 1 else _delta.step
    o, s, writes = run(q, k, v, g, beta, 1.0, s, True)
    assert writes is not None
    sizes = writes.detach().to(work).square().sum(dim=-1)
    return o, s, sizes.view(*sizes.shape[:2], groups, -1).sum(dim=-1).sqrt()


def _reference(
    q: torch.Tensor, rows: Rows, ask: Ask, final: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cache path by a dense mask, and the rows to keep, from lists and sorting."""
    batch, total, groups = rows.at.shape
    shape = (batch, groups, q.shape[1], total)
    visible = torch.zeros(shape, dtype=torch.bool, device=q.device)
    keep = torch.zeros_like(rows.at, dtype=torch.bool)
    for b in range(batch):
        for j in range(groups):
            at, score = rows.at[b, :, j].tolist(), rows.score[b, :, j].tolist()
            seen, left = _oracle(at, score, rows.held, int(rows.before[b]), ask)
            for t, rows_seen in enumerate(seen):
                visible[b, j, t, rows_seen] = True
            keep[b, left, j] = True
    return dense(q, rows, visible, ask), keep


def _oracle(
    at: list[int], score: list[float], held: int, before: int, ask: Ask
) -> tuple[list[list[int]], list[int]]:
    """Return the rows that every token sees, and those to keep after the last, for one KV head."""
    known = [i for i in range(held) if at[i] >= 0]
    window = ask.window or sum(x >= 0 for x in at) + before + 1
    start = before // ask.block * ask.block
    cached = [i for i in known if at[i] < start]
    seen: list[list[int]] = []
    for i in range(held, len(at)):
        now = at[i]
        if now < 0:
            seen.append([])
            continue
        known.append(i)
        own = [j for j in known if at[j] >= start]
        seen.append([j for j in cached + own if now - window < at[j]])
        if (now + 1) % ask.block == 0:
            start = now + 1
            # without a window this is the prefix: what was let go scored less and never returns
            pool = known if ask.window is None else cached + own
            pool = [j for j in pool if start - window < at[j]]
            cached = sorted(pool, key=lambda j: (-score[j], at[j]))[: ask.cache]
    last = max(at[held:] + [before - 1]) + 1
    left = [j for j in cached + [j for j in known if at[j] >= start] if last - window < at[j]]
    return seen, left


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    mix_state: torch.Tensor | None,
    mix_cache: torch.Tensor,
    padding: torch.Tensor | None,
    state: HolaState | None,
    ask: Ask,
) -> None:
    seen = 0 if state is None else state.seen
    _checks.check_qkv(q, k, v, padding, seen)
    (batch, _, heads, size), (groups, wide) = q.shape, v.shape[2:]
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != q.shape[:3] or not gate.is_floating_point():
            raise ValueError(
                f"{name} must be floating, {list(q.shape[:3])}; got {gate.dtype} "
                f"{list(gate.shape)}."
            )
    _checks.check_heads("mix_cache", mix_cache, heads)
    _checks.check_heads("sink", ask.sink, heads)
    if mix_state is not None and list(mix_state.shape) not in ([heads], [heads, wide]):
        raise ValueError(
            f"mix_state must be [{heads}] or {[heads, wide]}; got {list(mix_state.shape)}."
        )
    window = 1 if ask.window is None else ask.window
    for name, value, least in (
        ("cache_size", ask.cache, 0),
        ("block_size", ask.block, 1),
        ("window_size", window, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more.")
    if ask.softcap is not None and not ask.softcap > 0:
        raise ValueError(f"softcap is {ask.softcap}; it must be above 0, or None for no cap.")
    if state is None:
        return
    held = [batch, min(seen, ask.most), groups]
    wants = {"s": [batch, heads, size, wide], "k": [*held, size], "v": [*held, wide]}
    for name, want in {**wants, "score": held, "at": held}.items():
        got = list(getattr(state, name).shape)
        if got != want:
            raise ValueError(
                f"initial_state.{name} must be {want} after {seen} tokens with cache_size "
                f"{ask.cache}, block_size {ask.block} and window_size {ask.window}; got {got}."
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
    with_sink: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    gains = {"mix_state": (H, V), "mix_cache": (H,), **({"sink": (H,)} if with_sink else {})}
    out = {n: torch.randn(s, generator=generator).to(dtype) for n, s in {**shapes, **gains}.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out["g"] = -torch.rand((B, T, H), generator=generator).to(wide)
    out["beta"] = torch.rand((B, T, H), generator=generator).to(wide)
    return {**out, **options}


def flops(
    *, B: int, T: int, H: int, K: int, V: int, cache_size: int, block_size: int, **_: Any
) -> int:
    """Return the floating-point operations of a chunked forward, masked pairs included."""
    pairs = min(cache_size, T) + min(block_size, T)
    return 2 * B * T * H * (3 * K * V + (2 * _delta.CHUNK + pairs) * (K + V))


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v, gates in, o out, the float32 state once."""
    return itemsize * B * T * (H + G) * (K + V) + 8 * B * T * H + 4 * B * H * K * V
