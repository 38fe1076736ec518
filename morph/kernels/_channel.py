"""What the operators with a decay per channel share: GLA (gla.py) and KDA (kda.py).

Both need, inside chunks of C tokens, A[i, j] = sum_c x_ic k_jc w_ijc for i >= j, where the weight
w_ijc = exp(g_{j+1,c} + ... + g_{i,c}) is another one for every channel. A factor per token that
held for the whole chunk would be exp of a large positive number, so the pairs are taken by halves
instead: the later half of a block of 2s tokens looks at its earlier half across the border between
them, where w is (what decays from the border to i) x (what decays from j to the border), two
products of numbers of at most 1. With s = 1, 2, 4, ..., C / 2 every pair is met once. Products grow
from one s to the next, so one exp per token and channel is enough, nothing overflows, nothing is a
difference of large sums, and any g down to -inf will do.
Cost: C R K multiplications for R rows per token, log2(C) passes over half of k and of the rows.
Known limits: C is a power of two; no second derivatives; on a CPU, weights below 1e-19 (float64:
1e-154) count as 0.
Reference: the border between sub-chunks is that of Yang et al., GLA, arXiv 2312.06635, section 4.3;
deviations: halves at every size instead of sub-chunks of 16 with an exact inner part; products of
decays instead of exp of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from morph.kernels import _checks

CHUNK = 64
_CPU_ELEMENTS = 1 << 17
# q, k, v, g, [beta [B, T, H, 1],] scale, state [B, H, K, V] -> o, state
Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    padding: torch.Tensor | None,
    state: torch.Tensor | None,
) -> None:
    """Raise ValueError, with the sizes, where the inputs of a call do not fit."""
    _checks.check_qkv(q, k, v, padding, None)
    batch, tokens, heads, size = q.shape
    wanted = {
        "g": (g, [batch, tokens, heads, size]),
        "beta": (beta, [batch, tokens, heads]),
        "initial_state": (state, [batch, heads, size, v.shape[3]]),
    }
    for name, (x, want) in wanted.items():
        if x is not None and list(x.shape) != want:
            raise ValueError(f"{name} must be {want}; got {list(x.shape)}.")


def call(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *beta: torch.Tensor,
    scale: float | None,
    padding: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (o in the dtype of q, final state or None) of `run(q, k, v, g, [beta,] scale, state)`.

    Tokens of padding write nothing (k = 0) and forget nothing (g = 0); their rows of o are zeros.
    """
    batch, tokens, heads, size = q.shape
    with torch.autocast(q.device.type, enabled=False):
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = size**-0.5 if scale is None else scale
        real = None if padding is None else _checks.some_padding(padding[:, -tokens:], q.device)
        void = None if real is None else ~real[..., None, None]
        if void is not None:
            k, g = k.masked_fill(void, 0.0), g.masked_fill(void, 0.0)
        state = initial_state
        if state is None:
            state = torch.zeros(batch, heads, size, v.shape[3], dtype=work, device=q.device)
        o, state = run(q, k, v, g, *beta, scale, state.to(work))
        o = o if void is None else o.masked_fill(void, 0.0)
        return o.to(q.dtype), state.to(work) if output_final_state else None


def spans(state: torch.Tensor, *inputs: torch.Tensor) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield (T', [x [B, H, N, C, .] for x in inputs]): T' tokens in N chunks, in order of time.

    Inputs are [B, T, heads, .], of which H is a multiple. Tokens that do not fill a chunk come
    last, as one shorter chunk, with zeros up to a power of two. What is yielded may be a view.
    """
    heads, tokens = state.shape[1], inputs[0].shape[1]
    whole, left = divmod(tokens, CHUNK)
    each = whole
    if state.device.type == "cpu":  # a few chunks at a time, so that what they need stays in cache
        numbers = CHUNK * state.shape[0] * heads * max(state.shape[2:])
        each = max(1, min(whole, _CPU_ELEMENTS // numbers))
    sizes = [CHUNK * min(each, whole - n) for n in range(0, whole, max(1, each))]
    sizes += [left] * (left > 0)
    for size, *parts in zip(sizes, *(x.split(sizes, dim=1) for x in inputs)):
        chunk = CHUNK if size >= CHUNK else 1 << (size - 1).bit_length()
        yield size, [_arrange(x, heads, chunk).to(state.dtype) for x in parts]


def _arrange(x: torch.Tensor, heads: int, chunk: int) -> torch.Tensor:
    """[B, T, G, .] as [B, H, N, C, .]."""
    if x.shape[1] % chunk:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, chunk - x.shape[1]))
    x = x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def restore(o: torch.Tensor, like: torch.Tensor, tokens: int) -> torch.Tensor:
    """[B H N, C, V] as [B, T, H, V], without the zeros that filled the last chunk."""
    o = o.view(*like.shape[:4], -1).permute(0, 2, 3, 1, 4)
    return o.flatten(1, 2)[:, :tokens]


def by_chunk(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """[B H N, ...] as N tensors [B H, ...]."""
    return x.unflatten(0, (-1, count)).unbind(1)


def pairs(
    g: torch.Tensor, k: torch.Tensor, *rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (A [M, R, C, C], rows decayed [M, C, R, K], k decayed [M, C, K], whole [M, K]).

    For M = B H N chunks of C tokens; g, k and each of R rows [B, H, N, C, K]: A[r, i, j] =
    sum_c rows[r]_ic k_jc w_ijc for i > j, for i = j of the first row only, else 0. Rows are decayed
    from before the chunk up to and with their token, k from after its token to the end of the
    chunk; `whole` is what all its tokens decay.
    """
    return _Pairs.apply(g, k, *rows)  # type: ignore[no-any-return]


class _Pairs(torch.autograd.Function):
    """`pairs`, of which only the inputs are kept for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, g: torch.Tensor, k: torch.Tensor, *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(g, k, *rows)
        late, early, whole = _start(g, k, rows)
        chunks, count = early.shape[:2]
        found = late.new_zeros(chunks, len(rows), count, count)
        own = (rows[0] * k).sum(dim=-1)
        found[:, 0].diagonal(dim1=1, dim2=2).copy_(own.reshape(chunks, count))
        for half in _halves(count):
            queries, keys = _half(late, half, 1), _half(early, half, 0)
            block = _across(found, half)
            block.copy_((queries @ keys.transpose(-1, -2)).view(block.shape))
            whole = _grow(queries, keys, whole)
        whole, found = _flush(whole, found)
        return found, late, early, whole[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g, k, *rows = ctx.saved_tensors
        return _backward(g, k, rows, *grads)


def _backward(
    g: torch.Tensor,
    k: torch.Tensor,
    rows: Sequence[torch.Tensor],
    dfound: torch.Tensor,
    dlate: torch.Tensor,
    dearly: torch.Tensor,
    dwhole: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `pairs`: its steps once more, then back through them.

    The gradient of the log of a product is summed down to the decays that it was made of; the
    difference of two sums over the chunk would be shorter, and would lose small gradients.
    """
    late, early, whole = _start(g, k, rows)
    decay, steps = whole.view(g.shape), []
    for half in _halves(early.shape[1]):
        queries, keys = _half(late, half, 1), _half(early, half, 0)
        steps.append((half, queries.clone(), keys.clone(), whole))
        whole = _grow(queries, keys, whole)
    dfound = dfound.contiguous()
    dlate = dlate.clone(memory_format=torch.contiguous_format)
    dearly = dearly.clone(memory_format=torch.contiguous_format)
    dlog = dwhole[:, None] * whole
    for half, queries, keys, whole in reversed(steps):
        dqueries, dkeys = _half(dlate, half, 1), _half(dearly, half, 0)
        first, second = whole.view(len(keys), 2, 1, -1).unbind(1)
        dqueries.mul_(first)
        dkeys.mul_(second)
        dlog = dlog.view(len(keys), 1, -1)
        dfirst = dlog + (queries * dqueries).sum(dim=1, keepdim=True)
        dlog = torch.cat([dfirst, dlog + (keys * dkeys).sum(dim=1, keepdim=True)], dim=1)
        block = _across(dfound, half).reshape(len(keys), -1, half)
        dqueries.add_(block @ keys)  # in one call, baddbmm_ would go matrix by matrix
        dkeys.add_(block.transpose(-1, -2) @ queries)
    dg, dk, drows = dlog.view(g.shape), dearly.view(g.shape), []
    for row, drow in zip(rows, dlate.unbind(2)):
        drows.append(drow.reshape(g.shape) * decay)
        dg = dg.addcmul(row, drows[-1])
    own = dfound[:, 0].diagonal(dim1=1, dim2=2).reshape(*g.shape[:4], 1)
    drows[0].addcmul_(own, k)
    return dg, dk.addcmul_(own, rows[0]), *drows


def _start(
    g: torch.Tensor, k: torch.Tensor, rows: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [M, C, R, K] and keys [M, C, K] decayed as in blocks of one token, and its decay."""
    count, size = k.shape[-2:]
    decay = _flush(g.exp().contiguous())[0]
    late = decay.new_empty(*k.shape[:4], len(rows), size)
    for n, row in enumerate(rows):
        torch.mul(row, decay, out=late[..., n, :])
    early = k.clone(memory_format=torch.contiguous_format)
    early, decay = early.view(-1, count, size), decay.view(-1, count, size)
    return late.view(-1, count, len(rows), size), early, decay


def _halves(count: int) -> list[int]:
    return [1 << n for n in range(count.bit_length() - 1)]


def _half(x: torch.Tensor, half: int, side: int) -> torch.Tensor:
    """The earlier (0) or later (1) halves of blocks of 2s tokens: a view [M C / 2s, s (R), K]."""
    return x.view(x.shape[0] * x.shape[1] // (2 * half), 2, -1, x.shape[-1])[:, side]


def _across(x: torch.Tensor, half: int) -> torch.Tensor:
    """Where later halves look at earlier ones in [M, R, C, C]: a view [M, C / 2s, s, R, s]."""
    chunks, ratio, count, _ = x.shape
    shape = (chunks, count // (2 * half), half, ratio, half)
    strides = (ratio * count * count, 2 * half * (count + 1), count, count * count, 1)
    return x.as_strided(shape, strides, x.storage_offset() + half * count)


def _grow(late: torch.Tensor, early: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Decay later and earlier halves in place by the other half, and return what both decay."""
    first, second = whole.view(len(late), 2, 1, -1).unbind(1)
    late.mul_(first)
    early.mul_(second)
    both, *_ = _flush(first * second, late, early)
    return both.view(len(whole), -1, whole.shape[-1])


def _flush(decay: torch.Tensor, *decayed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Set tiny values to 0, in place, where anything decays to such: a CPU is slow on denormals."""
    if decay.device.type == "cpu" and bool(decay.min() < _tiny(decay)):
        for x in (decay, *decayed):
            x.copy_(torch.nn.functional.hardshrink(x, _tiny(x)))
    return decay, *decayed


def flushed(x: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return x with tiny values set to 0 if `whole` of any chunk is; gradients pass unchanged."""
    if x.device.type != "cpu" or bool(whole.all()):
        return x
    now = x.detach()
    return x + (torch.nn.functional.hardshrink(now, _tiny(x)) - now)


def _tiny(x: torch.Tensor) -> float:
    """1e-19 in float32: smaller values may make denormals when multiplied by each other."""
    return float(torch.finfo(x.dtype).tiny) ** 0.5
