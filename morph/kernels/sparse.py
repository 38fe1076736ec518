"""Softmax attention over the blocks of keys that are listed for every query.

What it does: block c holds the tokens [c block_size, (c + 1) block_size) of a row, counting real
tokens only, so that a padded row is the row alone. `blocks` lists block numbers for every query,
for all heads, per KV head or per query head, -1 for nothing; the query sees the tokens of its
blocks up to itself. Its own block is seen where it is listed; blocks after it, or after the last
token, may be listed and give nothing. `bias` is added to all scores of a listed block, and -inf
there hides it. A query that sees nothing gives zeros. `softcap` turns a score s into
softcap * tanh(s / softcap), before the bias. `block_size` 1 makes lists of tokens.
Cost: 2 H (K + V) flops per listed token; memory linear in T, forward and backward; a decoded token
reads its listed blocks.
State: `SparseState`, all keys and values, with room for whole blocks (`_blocks.room_step`).
Paths: triton (on a GPU; `_triton_blocks`), gathered (per span of keys, the queries that list it;
`_gathered`), reference (a dense mask).
Known limits: a block listed twice for one query is an error that is only found where it costs
nothing to look; no second derivatives on the triton and gathered paths.
Reference: Lu et al., MoBA, arXiv 2502.13189; Yuan et al., NSA, 2502.11089: the second stage that
they share with others, whatever chose the blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from morph.kernels import _blocks, _checks

PATHS = _blocks.PATHS
# Lists of more entries are not sorted to find what is listed twice
_FEW = 1 << 16
# Settings under which the laws of tests/test_kernels.py hold this kernel; num_listed counts the
# random blocks before the query's own one, None: all of them
EXAMPLES: dict[str, dict[str, Any]] = {
    "random": {"block_size": 8, "num_listed": 3},
    "bias": {"block_size": 5, "num_listed": 4, "with_bias": True, "lists": "group"},
    "heads_cap": {"block_size": 16, "num_listed": 2, "lists": "head", "softcap": 2.0},
    "tokens": {"block_size": 1, "num_listed": 9, "with_bias": True},
    "everything": {"block_size": 16, "num_listed": None},
    "large": {"block_size": 64, "num_listed": 1, "lists": "group"},
}


class SparseState(NamedTuple):
    """Keys k [B, room, G, K], values v [B, room, G, V] and `seen`, the tokens so far.

    Real tokens of a row come first, in order, and zeros after them; room is `seen` rounded up to
    `_blocks.room_step`.
    """

    k: torch.Tensor
    v: torch.Tensor
    seen: int


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    blocks: torch.Tensor,
    bias: torch.Tensor | None = None,
    block_size: int,
    query_block: int = 1,
    scale: float | None = None,
    softcap: float | None = None,
    padding: torch.Tensor | None = None,
    initial_state: SparseState | None = None,
    output_final_state: bool = False,
    path: str | None = None,
) -> tuple[torch.Tensor, SparseState | None]:
    """Return (o [B, T, H, V], final state or None) by the fastest path that can run.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], H a multiple of G, one floating dtype. blocks
    [B or 1, T, J, N] int32 or int64 and bias [B or 1, T, J, N] floating, J = 1, G or H. scale
    defaults to K ** -0.5. `query_block` promises that queries whose positions share
    position // query_block have the same lists and biases. padding [B, P + T] bool, True for real
    tokens, over the P tokens of `initial_state` and the T new ones; None: all real. Rows of padding
    come out as zeros. `path` demands a path by name. Raises ValueError with the sizes where they do
    not fit or a block is found twice, KernelUnavailable where a demanded path cannot run.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    seen = 0 if initial_state is None else initial_state.seen
    _checks.check_qkv(q, k, v, padding, seen)
    _check(q, k, v, blocks, bias, block_size, query_block, softcap, initial_state)
    reasons = {name: unsupported(name, q, k, v, blocks, block_size=block_size) for name in PATHS}
    taken = _checks.pick("sparse", path, reasons)
    rows = _blocks.Rows.of(padding, q.shape[0], seen, q.shape[1], q.device)
    total, step = seen + q.shape[1], _blocks.room_step(block_size)
    keys, values = rows.front(k), rows.front(v)
    if initial_state is not None or output_final_state:
        old = (None, None) if initial_state is None else (initial_state.k, initial_state.v)
        keys, values = (
            _blocks.append(one, new, rows, total, step, False)
            for one, new in zip(old, (keys, values))
        )
    if rows.order is not None:
        blocks = blocks.expand(len(q), -1, -1, -1)
        blocks = rows.front(blocks).masked_fill(~rows.held()[..., None, None], -1)
        bias = None if bias is None else rows.front(bias.expand(blocks.shape))
    o = _blocks.attend(
        rows.front(q),
        keys,
        values,
        blocks,
        bias,
        block_size=block_size,
        at=rows.at,
        query_block=query_block,
        scale=scale,
        softcap=softcap,
        path=taken,
    )
    state = SparseState(keys, values, total) if output_final_state else None
    return rows.back(o), state


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, SparseState | None]:
    """Return what `forward` returns, by a dense mask in the dtype of q; takes the same options."""
    return forward(q, k, v, **options, path="reference")


def unsupported(
    path: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    *,
    block_size: int,
    **options: Any,
) -> str:
    """Return why `path` cannot run on these inputs, or an empty string."""
    return _blocks.unsupported(path, q, k, v, blocks, block_size)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: int,
    query_block: int,
    softcap: float | None,
    state: SparseState | None,
) -> None:
    (batch, tokens, heads, _), groups = q.shape, k.shape[2]
    for name, value in (("block_size", block_size), ("query_block", query_block)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it counts tokens, so it must be 1 or more.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None for no cap.")
    if blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"blocks must be int32 or int64 block numbers; got {blocks.dtype}.")
    got, lists = list(blocks.shape), sorted({1, groups, heads})
    if len(got) != 4 or got[0] not in (1, batch) or got[1] != tokens or got[2] not in lists:
        wanted = " or ".join(str(n) for n in lists)
        raise ValueError(
            f"blocks must be [{batch}, {tokens}, J, N], J = {wanted} lists per token; got {got}."
        )
    if bias is not None:
        shape = list(bias.shape)
        if shape[1:] != got[1:] or shape[0] not in (1, batch) or not bias.is_floating_point():
            raise ValueError(
                f"bias must be floating, one number for every entry of blocks {got}; got "
                f"{bias.dtype} {shape}."
            )
    if blocks.device.type == "cpu" and blocks.numel() <= _FEW:
        _check_twice(blocks)
    if state is None:
        return
    room = -(-state.seen // _blocks.room_step(block_size)) * _blocks.room_step(block_size)
    for name, old, new in (("k", state.k, k), ("v", state.v, v)):
        want = [batch, room, *new.shape[2:]]
        if list(old.shape) != want:
            raise ValueError(
                f"initial_state.{name} must be {want} after {state.seen} tokens with block_size "
                f"{block_size}; got {list(old.shape)}."
            )


def _check_twice(blocks: torch.Tensor) -> None:
    ordered = blocks.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        row, token, which, place = twice.nonzero()[0].tolist()
        raise ValueError(
            f"blocks lists block {int(ordered[row, token, which, place])} twice for token {token} "
            f"of row {row}, list {which}; list every block once, and -1 for nothing."
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
    block_size: int = 16,
    num_listed: int | None = 3,
    lists: str = "all",
    with_bias: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Return random inputs for `forward` of the given sizes: own block and random earlier ones.

    `num_listed` earlier blocks (None: all) for `lists` "all" heads together, each "group" or "head"
    alone; other options are passed through.
    """
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, V)}
    out = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    total = -(-T // block_size)
    count = total if num_listed is None else min(num_listed + 1, total)
    own = torch.arange(T)[:, None, None] // block_size
    score = torch.rand((B, T, {"all": 1, "group": G, "head": H}[lists], total), generator=generator)
    block = torch.arange(total)
    score = score.masked_fill(block > own, -1.0).masked_fill(block == own, 2.0)
    best = score.sort(dim=-1, descending=True)
    out["blocks"] = best.indices.masked_fill(best.values < 0, -1)[..., :count]
    if with_bias:
        out["bias"] = torch.randn(out["blocks"].shape, generator=generator).to(dtype)
    return {**out, "block_size": block_size, **options}


def flops(
    *, B: int, T: int, H: int, K: int, V: int, block_size: int, num_listed: int | None, **_: Any
) -> int:
    """Return the floating-point operations of a forward: 2 (K + V) per listed token that is seen.

    `num_listed` earlier blocks for every query, or all (None), and half of the own one.
    """
    far = T if num_listed is None else min(T, num_listed * block_size)
    pairs = far * (far + 1) // 2 + (T - far) * far + T * min(block_size, T) // 2
    return 2 * B * H * (K + V) * min(pairs, T * (T + 1) // 2)


def bytes(
    *,
    B: int,
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    block_size: int = 1,
    num_listed: int | None = None,
    itemsize: int = 4,
    **_: Any,
) -> int:
    """Return the bytes a forward must move: q, k, v and one int32 list per token in, o out."""
    total = -(-T // block_size)
    listed = total if num_listed is None else min(num_listed + 1, total)
    return itemsize * B * T * (H + G) * (K + V) + 4 * B * T * listed
