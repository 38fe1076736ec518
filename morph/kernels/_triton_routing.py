"""Routing on GPUs: which earlier blocks a query reads, by entmax or as its best k.

Neither ever holds a tensor [H, T, C] of the scores of C blocks: a tile of queries goes through the
summaries several times and computes its scores anew each time, and what is written is the lists.
`_routing_entmax` and `_routing_topk` say how tau and the k-th largest are found.

Bytes moved: with P passes, B G ceil(T / QT) P C K 4 / 2 bytes of summaries for a causal prefill of
T tokens, nearly all of them from the cache on the chip, as a KV head's summaries are C K 4 bytes;
the queries once; and 8 bytes (entmax) or 4 bytes (top-k) for every place of the lists. QT is how
many queries a tile has, 64 rows over the heads of a group in bfloat16. P is 2 for entmax plus the
passes that find tau; 2 for top-k plus one for every two bits by which the k-th and the next best
score differ, 17 at most. Where all queries fit one tile, as for a decoded token,
the programs would be too few to be quick, and their scores are computed once, by many programs,
and kept for the call: B T H C 4 bytes, which all passes then read instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from morph.kernels import _triton
from morph.kernels._routing_entmax import entmax_kernel
from morph.kernels._routing_scores import scratch_kernel
from morph.kernels._routing_topk import topk_kernel
from morph.kernels._triton_sliding import _LOG2_E, _device, _plain, _strides

SCORES = ("group_softmax", "group_sum", "head")
_SIZE = 256  # the largest head that the tables below know
_RATIO = 32  # query heads of one KV head, at most
_KEPT = 1024  # numbers of a tile whose scores are kept, and 1024 blocks at most
# (rows, blocks, warps, stages) of a tile, by padded head size
_HALF = {
    "entmax": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    "topk": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2)},
    "head": dict.fromkeys((64, 128, 256), (16, 32, 4, 1)),
}
_FULL = {
    "entmax": dict.fromkeys((64, 128, 256), (16, 16, 8, 1)),
    "topk": dict.fromkeys((64, 128, 256), (16, 16, 4, 1)),
    "head": dict.fromkeys((64, 128, 256), (16, 16, 4, 1)),
}


def unsupported(q: torch.Tensor, summaries: torch.Tensor, alpha: float | None = None) -> str:
    """Return why these kernels cannot route such queries here, or an empty string.

    `alpha` is that of `entmax_route`; None for `topk_route`.
    """
    why = _triton.reason(q)
    if why:
        return why
    if q.shape[3] > _SIZE:
        return f"q has heads of {q.shape[3]}; the Triton kernels take heads of up to {_SIZE}."
    if q.shape[2] // summaries.shape[2] > _RATIO:
        heads = f"{q.shape[2]} query heads share {summaries.shape[2]} KV heads"
        return f"{heads}; the Triton kernels take up to {_RATIO} query heads to a KV head."
    if summaries.dtype != torch.float32:
        return f"the summaries are {summaries.dtype}; the Triton kernels take float32."
    if summaries.device != q.device:
        return f"q is on {q.device}, the summaries on {summaries.device}."
    if alpha is not None and not 1 < alpha <= 2:
        return f"alpha is {alpha}; the Triton kernel takes 1 < alpha <= 2 (softmax has no support)."
    return ""


def entmax_route(
    q: torch.Tensor,
    summaries: torch.Tensor,
    *,
    gamma: torch.Tensor,
    alpha: float,
    at: int | torch.Tensor,
    block_size: int,
    scale: float,
    most: int,
    iterations: int = 32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (index, prior, count) of the blocks that entmax of a group's scores does not rule out.

    q [B, T, H, K], summaries [B, C, G, K] float32, gamma [H]; `at` is the position of the first
    query, an int or [B]. Query head h of query t weighs the blocks c < (at + t) // block_size by
    entmax of gamma_h scale <q, summary_c>; prior is the mean over the H / G heads of a KV head.
    index [B, T, G, most] int32 lists the blocks of positive prior [B, T, G, most] in ascending
    order, the query's own never, -1 and 0 beyond; count [B, T, G] int32 is how many there are,
    which may exceed `most`, and then the earliest are listed.

    `iterations` bounds the passes that look for tau. A tile stops as soon as its rows stand still,
    so a large number costs nothing; too small a one leaves a support that is too wide, whose prior
    still sums to 1. Arithmetic is float32: the relative error of a prior is about
    1e-7 / (alpha - 1) times the largest score. No gradients.
    """
    (batch, tokens), groups = q.shape[:2], summaries.shape[2]
    if most < 1 or iterations < 1:
        raise ValueError(f"most and iterations must be at least 1; got {most} and {iterations}.")
    gamma = gamma.detach().to(device=q.device, dtype=torch.float32).contiguous()
    call = _Call("entmax", q, summaries, gamma, (alpha - 1) * scale, at, block_size)
    index = q.new_empty(batch, tokens, groups, most, dtype=torch.int32)
    prior, count = index.new_empty(index.shape, dtype=torch.float32), index[..., 0].clone()
    with _device(q):
        scratch = call.scratch()
        entmax_kernel[call.grid](
            call.q, call.summaries, gamma, scratch, call.origin, index, prior, count,
            *call.numbers, most, call.factor, 1 / (alpha - 1), iterations,
            **call.meta, SQUARE=alpha == 1.5,
        )  # fmt: skip
    return index, prior, count


def topk_route(
    q: torch.Tensor,
    summaries: torch.Tensor,
    *,
    scale: float,
    at: int | torch.Tensor,
    block_size: int,
    k: int,
    initial: int,
    local: int,
    score: str = "group_softmax",
) -> torch.Tensor:
    """Return index [B, T, J, k] int32: the blocks each query reads, ascending, -1 beyond.

    q [B, T, H, K], summaries [B, C, G, K] float32; `at` is the position of the first query, an int
    or [B]. The first `initial` blocks and the last `local`, the query's own among them, are always
    listed. The remaining places go to the complete earlier blocks of the highest scores, the
    earlier of two that are equal. `score` is, of a query's scale <q_h, summary_c>:

    - "head": that itself, a list for every query head (J = H),
    - "group_sum": its sum over the heads of a KV head (J = G),
    - "group_softmax": its softmax over all complete earlier blocks, forced ones among them, summed
      over the heads of a KV head (J = G).

    Raises ValueError where `k` is less than `initial + local`. No gradients.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}.")
    if k < max(1, initial + local) or initial < 0 or local < 0:
        raise ValueError(
            f"k must be at least 1 and have room for the forced blocks; got k {k}, "
            f"initial {initial}, local {local}."
        )
    (batch, tokens, heads, _), groups = q.shape, summaries.shape[2]
    soft, head = score == "group_softmax", score == "head"
    factor = scale * _LOG2_E if soft else scale
    call = _Call("head" if head else "topk", q, summaries, None, factor, at, block_size)
    lists = heads if head else groups
    index = q.new_empty(batch, tokens, lists, k, dtype=torch.int32)
    with _device(q):
        scratch = call.scratch()
        topk_kernel[call.grid](
            call.q, call.summaries, scratch, call.origin, index,
            *call.numbers, k, initial, local, call.factor,
            **call.meta, HEAD=head, SOFTMAX=soft,
        )  # fmt: skip
    return index


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        kind: str,
        q: torch.Tensor,
        summaries: torch.Tensor,
        gamma: torch.Tensor | None,
        factor: float,
        at: int | torch.Tensor,
        block_size: int,
    ) -> None:
        self.q, self.summaries, self.gamma, self.factor = (
            _plain(q),
            _plain(summaries),
            gamma,
            factor,
        )
        (batch, tokens, heads, _), (blocks, groups) = q.shape, summaries.shape[1:3]
        ratio = heads // groups
        self.sizes, self.how, self.kept = _sizes(kind, q, tokens, ratio)
        tiles = triton.cdiv(tokens, self.sizes["QT"])
        self.grid = (batch * groups * tiles,)
        self.origin, first = None, at
        if isinstance(at, torch.Tensor):
            self.origin, first = at.to(device=q.device, dtype=torch.int32).contiguous(), 0
        self.strides, self.unit = _strides(self.q, self.summaries)
        self.numbers = (*self.strides, first, tiles, tokens, blocks, groups)
        self.rows = tokens * ratio
        self.meta: dict[str, Any] = {**self.sizes, **self.how, "ALL": self.rows if self.kept else 0}
        self.meta |= {"SIZE": block_size, "UNIT": self.unit}

    def scratch(self) -> torch.Tensor | None:
        """Return the scores of all queries where they make one tile, else None."""
        if not self.kept:
            return None
        (batch, blocks, groups), size = self.summaries.shape[:3], self.q.shape[3]
        made = self.q.new_empty(batch * groups, self.rows, blocks, dtype=torch.float32)
        _, wide, warps, stages = _table("topk", self.q.dtype, size)
        scratch_kernel[(batch * groups * triton.cdiv(blocks, wide),)](
            self.q, self.summaries, self.gamma, made, *self.strides, groups, blocks, self.factor,
            R=self.rows // self.q.shape[1], ALL=self.rows, K=size, BLOCK_N=wide,
            BLOCK_M=max(16, triton.next_power_of_2(self.rows)),
            BLOCK_K=self.sizes["BLOCK_K"], PIECE=self.sizes["PIECE"],
            UNIT=self.unit, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return made


def _sizes(
    kind: str, q: torch.Tensor, tokens: int, ratio: int
) -> tuple[dict[str, int], dict[str, int], bool]:
    """Return what the ranking kernels are compiled for, and whether scores are kept."""
    rows, wide, warps, stages = _table(kind, q.dtype, q.shape[3])
    padded, all_of_them = triton.next_power_of_2(ratio), triton.next_power_of_2(tokens)
    kept = all_of_them * padded <= rows
    queries = all_of_them if kept else max(1, rows // padded)
    if kept:
        wide, warps, stages = min(1024, _KEPT // (queries * padded)), 4, 1
    sizes = {"R": ratio, "RP": padded, "QT": queries, "K": q.shape[3], "BLOCK_N": wide}
    sizes["BLOCK_K"] = max(16, triton.next_power_of_2(q.shape[3]))
    sizes["PIECE"] = min(sizes["BLOCK_K"], 64 if q.dtype in _triton.HALVES else 32)
    return sizes, {"num_warps": warps, "num_stages": stages}, kept


def _table(kind: str, dtype: torch.dtype, size: int) -> tuple[int, int, int, int]:
    table = _HALF if dtype in _triton.HALVES else _FULL
    return table[kind][max(64, triton.next_power_of_2(size))]


def variants() -> list[_triton.Variant]:
    """Return what is launched: heads of 64 and 128, 1 to 16 heads a group, long and one token."""
    half, full, gone = torch.bfloat16, torch.float32, {"origin": None}
    square = {**gone, "SQUARE": True}
    soft = {**gone, "HEAD": False, "SOFTMAX": True}
    head = {**gone, "HEAD": True, "SOFTMAX": False}
    return [
        _variant(entmax_kernel, half, 128, 4, 4096, square),
        _variant(entmax_kernel, full, 64, 8, 4096, {"SQUARE": False}),
        _variant(entmax_kernel, half, 128, 16, 1, square),
        _variant(topk_kernel, half, 128, 16, 4096, soft),
        _variant(topk_kernel, full, 128, 1, 4096, head),
        _variant(topk_kernel, half, 128, 4, 4096, head),
        _variant(topk_kernel, half, 64, 4, 1, soft),
        _variant(scratch_kernel, half, 128, 16, 1, gone),
    ]


_TYPES = {"q": "*bf16", "at": "i32", "factor": "fp32", "power": "fp32"}
_TYPES |= dict.fromkeys(("summaries", "gamma", "scratch", "prior"), "*fp32")
_TYPES |= dict.fromkeys(("origin", "index", "counts"), "*i32")


def _variant(
    kernel: Any, dtype: torch.dtype, size: int, ratio: int, tokens: int, extras: dict[str, Any]
) -> _triton.Variant:
    meta, names = torch.empty(1, 1, 1, size, dtype=dtype, device="meta"), list(kernel.arg_names)
    kind = "entmax" if kernel is entmax_kernel else "head" if extras.get("HEAD") else "topk"
    sizes, how, kept = _sizes(kind, meta, tokens, ratio)
    types = {**_TYPES, "q": "*bf16" if dtype == torch.bfloat16 else "*fp32"}
    constants: dict[str, Any] = {**sizes, "SIZE": 64, "UNIT": 8}
    constants["ALL"] = tokens * ratio if kept else 0
    if kernel is scratch_kernel:
        constants |= {"BLOCK_M": max(16, tokens * ratio), "BLOCK_N": _table(kind, dtype, size)[1]}
    elif not kept:
        constants["scratch"] = None
    constants |= extras
    return _triton.Variant(
        name=f"{kernel.__name__.removesuffix('_kernel')}_{size}_{ratio}_{types['q'][1:]}_{tokens}",
        kernel=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={n: x for n, x in constants.items() if n in names},
        **how,
    )
