"""Attention over the blocks that an entmax over block summaries leaves (DashAttention).

What it does: the keys of every complete block of `block_size` tokens are summed up to one, weighted
by a softmax of <summary_query, k> scale per KV head; summary_query 0 gives their mean. A query
head's routing weights are p = entmax_alpha(gamma scale <q, summary>) over the complete blocks
before its own, `pbar` is their mean over the query heads of a KV head. A query reads the blocks
where pbar > 0, and its own up to itself, by softmax with one bias per block: 0 on its own, and
(log pbar - its mean over the blocks read) / sigma on the others. Gradients flow through all of it.
gamma = 0 weighs all past blocks the same, whose bias is then 0: full attention, as are texts of up
to two blocks. A gamma below 0 is legal: it prefers the blocks that fit worst. `sigma` infinite is
no bias. Blocks count the real tokens of a row, so a padded row is the row alone.
Cost: 2 T^2 / block_size H K flops to choose, 2 T H (K + V) flops per key read; no tensor of all
queries times all blocks without gradients.
State: k and v with room for whole blocks, a summary per block in float32 (float64 where q is) that
is made once, when the block's last token has come. A decoded token reads all summaries and the
blocks of its support.
Paths: listed (entmax by steps, lists of blocks, chunks of queries), reference (entmax by sorting or
halving, a bias on every block, a dense mask).
Known limits: no second derivatives; scores closer than rounding to where a weight becomes zero may
choose differently on different paths and in different splits; near there the gradient of log p
grows without bound, times 1 / sigma; what later queries choose may set the length of the lists of
earlier ones in the same call, and with it the rounding of their sums.
Reference: Fang et al., DashAttention, arXiv 2605.18753. Deviations: entmax by Newton's steps that
cannot pass the root; sigma's mean is not detached (the official benchmark does that), so that the
gradient is that of the function; float32 summaries; gamma is learned, one per query head; the
diagonal has bias 0 (`estimate_diagonal`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from morph.kernels import _blocks, _checks, _dash_routing
from morph.kernels._dash_routing import Ask
from morph.kernels._entmax import entmax

PATHS = ("listed",)
# Settings under which the laws of tests/test_kernels.py hold this kernel. `example` draws queries
# anew that a rounding could bring across the border of their support. With a cap all past blocks
# are read: tanh rounds by how many numbers it is given, which is how many queries read a block.
EXAMPLES: dict[str, dict[str, Any]] = {
    "plain": {"block_size": 8, "gamma": 3.0, "sigma": 100.0},
    "capped": {"block_size": 16, "gamma": 0.5, "sigma": 0.5, "softcap": 2.0, "alpha": 1.25},
    "odd": {"block_size": 5, "gamma": 1.75, "sigma": 1000.0, "alpha": 1.75},
}
# How far every score times alpha - 1 stays from the threshold in examples
_MARGIN = 0.06


class DashState(NamedTuple):
    """What is kept after `seen` tokens, padding counted, real ones first.

    k [B, room, G, K], v [B, room, G, V], room the next multiple of `_blocks.room_step(block_size)`,
    summaries [B, room / block_size, G, K] float32 or float64; void entries are zeros.
    """

    k: torch.Tensor
    v: torch.Tensor
    summaries: torch.Tensor
    seen: int


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    summary_query: torch.Tensor,
    gamma: torch.Tensor | float = 1.0,
    alpha: float = 1.5,
    sigma: float = math.inf,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: DashState | None = None,
    output_final_state: bool = False,
    in_place: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, DashState | None]:
    """Return (o [B, T, H, V], final state or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype.
    summary_query [G, K], gamma [H] or one number, any floating dtype; 1 <= alpha <= 2, sigma > 0,
    infinity included. scale defaults to K ** -0.5, of the choice too. padding [B, P + T] bool, True
    for real tokens, over the P tokens of `initial_state` and the T new ones; None: all real. Rows
    of padding come out as zeros. `in_place` lets it write into the tensors of `initial_state` where
    no gradient is recorded. `path` demands a path by name. Raises ValueError with the sizes where
    they do not fit, KernelUnavailable where a demanded path cannot run.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    _check(q, k, v, summary_query, gamma, padding, initial_state, block_size)
    _check_numbers(alpha, sigma, block_size, softcap)
    taken = _checks.pick("dash", path, {name: unsupported(name, q, k, v) for name in PATHS})
    past, tokens = 0 if initial_state is None else initial_state.seen, q.shape[1]
    total = past + tokens
    with torch.autocast(q.device.type, enabled=False):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        gamma = torch.as_tensor(gamma, dtype=work, device=q.device).expand(q.shape[2])
        query = summary_query.to(work)
        ask = Ask(query, gamma, alpha, sigma, block_size, scale, softcap)
        rows = _blocks.Rows.of(padding, q.shape[0], past, tokens, q.device)
        held = DashState(None, None, None, 0) if initial_state is None else initial_state  # type: ignore[arg-type]
        step = _blocks.room_step(block_size)
        k, v = (
            _blocks.append(old, rows.front(new), rows, total, step, in_place)
            for old, new in ((held.k, k), (held.v, v))
        )
        summaries = _dash_routing.append_summaries(held.summaries, k, rows, total, ask, in_place)
        run = _reference if taken == "reference" else _dash_routing.listed
        o = rows.back(run(rows.front(q), k, v, summaries, rows, total, ask))
        return o, DashState(k, v, summaries, total) if output_final_state else None


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, DashState | None]:
    """Return what `forward` returns, slowly, in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(path: str, q: torch.Tensor, *args: Any, **options: Any) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    return _checks.float_reason(q)


def blocks_read(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    summary_query: torch.Tensor,
    gamma: torch.Tensor | float = 1.0,
    alpha: float = 1.5,
    block_size: int,
    scale: float | None = None,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how many blocks every query reads, its own too, [B, T, G] int64; 0 for padding.

    The arguments are those of `forward`, without gradients.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, k, summary_query, gamma, padding, None, block_size)
    _check_numbers(alpha, 1.0, block_size, None)
    (batch, tokens), work = q.shape[:2], torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        gamma = torch.as_tensor(gamma, dtype=work, device=q.device).expand(q.shape[2])
        ask = Ask(summary_query.to(work), gamma, alpha, math.inf, block_size, scale, None)
        rows = _blocks.Rows.of(padding, batch, 0, tokens, q.device)
        keys = _blocks.append(None, rows.front(k), rows, tokens, block_size, False)
        summaries = _dash_routing.append_summaries(None, keys, rows, tokens, ask, True)
        front, own, found = rows.front(q), rows.positions() // block_size, []
        for start, stop in _dash_routing.chunks(q, tokens, block_size):
            p = _dash_routing.weights(front[:, start:stop], summaries, own[:, start:stop], ask)
            found.append((p > 0).sum(dim=-1) + 1)
        return rows.back(torch.cat(found, dim=1))


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summaries: torch.Tensor,
    rows: _blocks.Rows,
    total: int,
    ask: Ask,
) -> torch.Tensor:
    """Return the outputs [B, T, H, V] from a bias on every block there is room for."""
    own = rows.positions() // ask.block
    p = _dash_routing.weights(q, summaries, own, ask, exact=True)
    block = torch.arange(p.shape[3], device=q.device)
    bias = _dash_routing.biases(p, ask.sigma).masked_fill(p <= 0, -math.inf)
    bias = bias.masked_fill(block == own[..., None, None], 0.0)
    return _blocks.attend(
        q,
        k,
        v,
        block.expand(p.shape),
        bias,
        block_size=ask.block,
        at=rows.at,
        scale=ask.scale,
        softcap=ask.softcap,
        path="reference",
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    summary_query: torch.Tensor,
    gamma: torch.Tensor | float,
    padding: torch.Tensor | None,
    state: DashState | None,
    block_size: int,
) -> None:
    seen = 0 if state is None else state.seen
    _checks.check_qkv(q, k, v, padding, seen)
    (batch, _, heads, size), (groups, wide) = q.shape, v.shape[2:]
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be 1 token or more.")
    if list(summary_query.shape) != [groups, size] or not summary_query.is_floating_point():
        raise ValueError(
            f"summary_query must be floating, {[groups, size]}; got {summary_query.dtype} "
            f"{list(summary_query.shape)}."
        )
    if isinstance(gamma, torch.Tensor) and gamma.ndim:
        _checks.check_heads("gamma", gamma, heads)
    if state is None:
        return
    step = _blocks.room_step(block_size)
    room = -(-seen // step) * step
    wants = {
        "k": [batch, room, groups, size],
        "v": [batch, room, groups, wide],
        "summaries": [batch, room // block_size, groups, size],
    }
    for name, want in wants.items():
        got = list(getattr(state, name).shape)
        if got != want:
            raise ValueError(
                f"initial_state.{name} must be {want} after {seen} tokens with block_size "
                f"{block_size}; got {got}."
            )


def _check_numbers(alpha: float, sigma: float, block_size: int, softcap: float | None) -> None:
    if not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha is {alpha}; it must be 1 (softmax) to 2 (sparsemax).")
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it must be above 0, infinite for no bias.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for no cap.")


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
    gamma: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes; options are passed through.

    No query has a routing weight, or would have one, so near to zero that rounding decides; nor
    where the first third of the tokens is padding, which moves the borders of the blocks.
    """
    options = {"block_size": 16, **options}
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V), "summary_query": (G, K)}
    wide = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    wide["gamma"] = gamma * (1.0 + 0.2 * torch.rand(H, generator=generator, dtype=torch.float64))
    alpha, block = options.get("alpha", 1.5), options["block_size"]
    for _ in range(1000):
        near, late = _near(wide, alpha, block), T // 3
        rest = {n: x[:, late:] if n in ("q", "k") else x for n, x in wide.items()}
        near[:, late:] |= _near(rest, alpha, block)
        if not near.any():
            break
        fresh = torch.randn(shapes["q"], generator=generator, dtype=torch.float64)
        wide["q"] = torch.where(near[..., None], fresh, wide["q"])
    return {**{n: x.to(dtype) for n, x in wide.items()}, **options}


def _near(wide: dict[str, torch.Tensor], alpha: float, block: int) -> torch.Tensor:
    """Return which queries [B, T, H] have an entry within `_MARGIN` of their threshold."""
    q, k, gamma = (wide[name] for name in ("q", "k", "gamma"))
    count, (groups, size) = k.shape[1] // block, k.shape[2:]
    if not count:
        return torch.zeros(q.shape[:3], dtype=torch.bool)
    ask = Ask(wide["summary_query"], gamma, alpha, 1.0, block, size**-0.5, None)
    summaries = _dash_routing.summarise(
        k[:, : count * block].unflatten(1, (count, block)), ask
    ).repeat_interleave(q.shape[2] // groups, dim=2)
    z = torch.einsum("bthk,bchk->bthc", q * gamma[:, None] * size**-0.5, summaries)
    at = torch.arange(count)
    seen = (at < torch.arange(q.shape[1])[:, None] // block)[:, None]
    x = ((alpha - 1.0) * z).masked_fill(~seen, -math.inf)
    p = entmax(z, seen, alpha)
    # the threshold is the same for every entry of the support: the largest shows it best
    top, most = x.max(dim=-1, keepdim=True)
    tau = top - p.gather(-1, most).pow(alpha - 1.0)
    return ((x - tau).abs() < _MARGIN).any(dim=-1)


def flops(
    *, B: int, T: int, H: int, K: int, V: int, block_size: int, share: float = 1.0, **_: Any
) -> int:
    """Return the floating-point operations of a forward that reads `share` of all past blocks."""
    choose = 2 * B * H * T * (T // block_size) * K
    return choose + round(2 * B * T * H * (share * T + block_size) / 2 * (K + V))


def bytes(*, B: int, T: int, H: int, G: int, K: int, V: int, itemsize: int = 4, **_: Any) -> int:
    """Return the bytes a forward must move: q, k, v in, o out."""
    return itemsize * B * T * (H + G) * (K + V)
