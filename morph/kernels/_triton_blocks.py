"""Sparse-block attention for GPUs: what `_blocks.attend` computes, and one decoded token.

Queries go in tiles of neighbours, aligned by position. The union of the blocks that a tile's lists
name, and where each list names them, are made by torch (`_blocks_lists`), for some tiles at a time,
so that tables stay small however long the sequence; none of it waits for the GPU. The forward pass
saves the logarithm of each row's sum of weights; the backward pass makes the same tables again, and
inverts them for the gradients of keys and values. Nothing is added atomically.

Blocks of fewer keys than a product has columns are read several at a time; only the gradients of
keys and values pad such a block to 16. A block that all queries read, as the first one often is, is
one program's work there. How rows are tiled was chosen by arithmetic: wide tiles read fewer bytes
wherever neighbours choose alike, and no more where they do not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from morph.kernels import _triton
from morph.kernels._blocks_backward import keys_kernel, queries_kernel
from morph.kernels._blocks_decode import decode_kernel
from morph.kernels._blocks_forward import forward_kernel
from morph.kernels._blocks_lists import Lists, Tiles, origin_of
from morph.kernels._sliding_forward import join_kernel
from morph.kernels._triton_sliding import _bends, _device, _flags, _plain, _strides

_SIZE = 256  # the largest head that the tables below know
_RATIO = 64  # query heads of one KV head, at most
_FREE = 16  # queries with lists of their own in one tile, at most
_SPLITS = 64  # of a decoded token's list, at most
_EACH = 256  # keys of a list that are worth a program
# Rows of a tile; (BLOCK_N, warps, stages) by padded head size; BLOCK_M of the keys' gradients
_HALF: dict[str, Any] = {
    "rows": {64: 64, 128: 64, 256: 32},
    "forward": {64: (64, 4, 3), 128: (64, 8, 2), 256: (32, 8, 2)},
    "queries": {64: (64, 4, 2), 128: (64, 8, 2), 256: (32, 8, 1)},
    "keys": {64: (64, 4, 2), 128: (64, 8, 2), 256: (32, 8, 1)},
    "decode": {64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 2)},
    "BLOCK_M": 32,
}
_FULL: dict[str, Any] = {
    "rows": {64: 32, 128: 16, 256: 16},
    "forward": {64: (16, 8, 1), 128: (16, 4, 1), 256: (16, 4, 1)},
    "queries": {64: (16, 8, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
    "keys": {64: (32, 8, 1), 128: (32, 4, 1), 256: (16, 8, 1)},
    "decode": {64: (32, 4, 1), 128: (32, 4, 1), 256: (16, 4, 1)},
    "BLOCK_M": 16,
}


def unsupported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, block_size: int
) -> str:
    """Return why these kernels cannot take such tensors here, or an empty string."""
    why = _triton.reason(q)
    if why:
        return why
    if max(q.shape[3], v.shape[3]) > _SIZE:
        sizes = f"q and k have heads of {q.shape[3]}, v of {v.shape[3]}"
        return f"{sizes}; the Triton kernels take heads of up to {_SIZE}."
    if q.shape[2] // k.shape[2] > _RATIO:
        heads = f"{q.shape[2]} query heads share {k.shape[2]} KV heads"
        return f"{heads}; the Triton kernels take up to {_RATIO} query heads to a KV head."
    if len({x.device for x in (q, k, v, index)}) > 1:
        where = ", ".join(f"{n} on {x.device}" for n, x in zip("qkv", (q, k, v)))
        return f"{where}, index on {index.device}; the Triton kernels need them on one device."
    if block_size * index.shape[3] >= 1 << 31 or k.shape[1] >= 1 << 30:
        return f"{k.shape[1]} keys do not fit the 32 bits in which the Triton kernels count them."
    return ""


def triton_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: int,
    at: int | torch.Tensor = 0,
    query_block: int = 1,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return what `_blocks.attend` returns, for the same arguments; sums run in float32."""
    if index.shape[3] == 0:
        index, bias = index.new_full((*index.shape[:3], 1), -1), None
    if isinstance(at, torch.Tensor):  # tiles are aligned by position, so rows have their own lists
        index, bias = (None if x is None else _batched(x, len(q)) for x in (index, bias))
    return _Blocks.apply(q, k, v, index, bias, block_size, at, query_block, scale, softcap)


def triton_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    block_size: int,
    at: int | torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the same for one token, q [B, 1, H, K]: its list is split among programs.

    How many programs there are depends on the width of the list alone. No gradients.
    """
    (batch, _, heads, _), groups = q.shape, k.shape[2]
    q, k, v = (_plain(x) for x in (q, k, v))
    index, bias = index.contiguous(), None if bias is None else bias.contiguous()
    lists, wide = max(groups, index.shape[2]), index.shape[3]
    ratio = heads // lists
    (strides, unit), (inner, outer) = _strides(q, k, v), _bends(scale, softcap)
    blocks, how = _blocks("decode", q, v, block_size)
    blocks["BLOCK_M"] = max(16, triton.next_power_of_2(ratio))
    splits = max(1, min(_SPLITS, triton.cdiv(wide * block_size, _EACH)))
    parts = q.new_empty(batch, lists, splits, ratio, v.shape[3], dtype=torch.float32)
    logs, o = parts.new_empty(parts.shape[:-1]), q.new_empty(batch, 1, heads, v.shape[3])
    first, origin = origin_of(at)
    with _device(q):
        decode_kernel[(batch * lists * splits,)](
            q, k, v, index, bias, origin, parts, logs,
            *strides, *_steps(index), *((0, 0) if bias is None else _steps(bias)),
            first, k.shape[1], lists, splits, wide, inner, outer,
            **blocks, **how, **_flags(q, softcap), UNIT=unit, R=ratio, SHARE=lists // groups,
        )  # fmt: skip
        join_kernel[(batch * heads,)](
            parts, logs, None, o, k.shape[1], lists, splits,
            R=ratio, V=v.shape[3], BLOCK_V=blocks["BLOCK_V"], SPLITS=_SPLITS,
        )  # fmt: skip
    return o


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        q, k, v, index, bias, *rest = args
        q, k, v = (_plain(x) for x in (q, k, v))
        bias = None if bias is None else bias.contiguous()
        call = _Call(q, k, v, index, bias, *rest)
        o = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(*call.rows, dtype=torch.float32)
        with _device(q):
            for first, tiles in call.tiles.chunks():
                lists = call.tiles.lists(first, tiles)
                forward_kernel[call.grid(tiles)](
                    q, k, v, *lists, bias, call.tiles.origin, o, lse,
                    *call.sizes(lists, first, tiles), *call.bends, **call.meta("forward"),
                )  # fmt: skip
        ctx.rest = rest
        ctx.save_for_backward(q, k, v, index, bias, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, index, bias, o, lse = ctx.saved_tensors
        call, do = _Call(q, k, v, index, bias, *ctx.rest), do.contiguous()
        delta, dq = torch.empty_like(lse), q.new_empty(q.shape)
        biased, chunks = ctx.needs_input_grad[4], call.chunks(ctx.needs_input_grad[4])
        dk, dv = call.sums(k, chunks), call.sums(v, chunks)
        parts: list[torch.Tensor] = []
        with _device(q):
            for first, tiles in chunks:
                lists = call.tiles.lists(first, tiles)
                part, sizes = call.bias_part(tiles) if biased else None, (lists, first, tiles)
                queries_kernel[call.grid(tiles)](
                    q, k, v, *lists, bias, call.tiles.origin, o, do, lse, delta, dq, part,
                    *call.sizes(*sizes), index.shape[3], *call.bends, call.scale,
                    **call.meta("queries"),
                )  # fmt: skip
                if part is not None:
                    parts.append(call.bias_sum(part))
                order, bounds = call.tiles.inverted(lists)
                keys_kernel[call.keys_grid()](
                    q, k, v, order, bounds, lists.places, bias, call.tiles.origin,
                    do, lse, delta, dk, dv,
                    *call.sizes(*sizes), call.tiles.blocks, first, *call.bends, call.scale,
                    **call.meta("keys"),
                )  # fmt: skip
        dbias = call.tiles.unaligned(torch.cat(parts, dim=1)).to(bias.dtype) if biased else None
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, dbias, *[None] * len(ctx.rest)


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        bias: torch.Tensor | None,
        block_size: int,
        at: int | torch.Tensor,
        query_block: int,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.q, self.k, self.v, self.bias, self.size = q, k, v, bias, block_size
        (batch, tokens, heads, _), (room, groups) = q.shape, k.shape[1:3]
        self.ratio = heads // groups
        self.rows, self.pairs = (batch, groups, tokens, self.ratio), batch * groups
        self.padded = triton.next_power_of_2(self.ratio)
        tile, shared = _tile(q, v, self.padded, query_block)
        blocks = triton.cdiv(room, block_size)
        self.tiles = Tiles(index, groups, at, tile, shared=shared, blocks=blocks)
        self.scale, self.softcap, self.bends = scale, softcap, _bends(scale, softcap)

    def chunks(self, gradients: bool) -> list[tuple[int, int]]:
        """Return (first tile, tiles); `gradients` of the bias are held for each query head."""
        return list(self.tiles.chunks(self.pairs * self.tiles.each * self.tiles.wide * gradients))

    def grid(self, tiles: int) -> tuple[int]:
        return (self.pairs * tiles,)

    def keys_grid(self) -> tuple[int]:
        sizes = _blocks("keys", self.q, self.v, self.size)[0]
        return (self.pairs * self.tiles.blocks * triton.cdiv(sizes["ROOM"], sizes["BLOCK_N"]),)

    def sums(self, x: torch.Tensor, chunks: list[tuple[int, int]]) -> torch.Tensor:
        """Return room for gradients of keys or values, in float32 if chunks add to them."""
        return x.new_empty(x.shape, dtype=torch.float32 if len(chunks) > 1 else None)

    def sizes(self, lists: Lists, first: int, tiles: int) -> tuple[int, ...]:
        """Return the strides of q, k and v, of lists in tiles and of the bias, and all sizes."""
        apart, wide = self.tiles.apart, self.tiles.wide
        found = _strides(self.q, self.k, self.v)[0]
        found += apart * tiles if len(self.tiles.index) > 1 else 0, tiles if apart > 1 else 0
        if self.bias is None:
            found += 0, 0, 0, 0
        else:
            found += self.bias.stride(0) if len(self.bias) > 1 else 0, self.bias.stride(1)
            found += self.tiles.each * wide if apart > 1 else 0, wide if self.tiles.each > 1 else 0
        found += self.tiles.at, first, tiles, self.rows[2], self.k.shape[1], self.rows[1]
        return *found, lists.blocks.shape[1]

    def meta(self, kind: str) -> dict[str, Any]:
        blocks, how = _blocks(kind, self.q, self.v, self.size)
        unit = _strides(self.q, self.k, self.v)[1]
        rows = {"R": self.ratio, "RP": self.padded, "QT": self.tiles.size, "UNIT": unit}
        rows |= {"JR": self.tiles.each, "L": self.tiles.names}
        return {**rows, **blocks, **how, **_flags(self.q, self.softcap)}

    def bias_part(self, tiles: int) -> torch.Tensor:
        size = (*self.rows[:2], tiles, self.tiles.size, self.tiles.each, self.tiles.wide)
        return self.q.new_zeros(size, dtype=torch.float32)

    def bias_sum(self, part: torch.Tensor) -> torch.Tensor:
        """Return gradients of the bias of some tiles, [B or 1, tokens of tiles, J, N]."""
        if self.tiles.apart == 1:
            part = part.sum(dim=1, keepdim=True)
        if len(self.bias) < len(part):
            part = part.sum(dim=0, keepdim=True)
        return part.permute(0, 2, 3, 1, 4, 5).reshape(len(part), -1, *self.tiles.index.shape[2:])


def _tile(q: torch.Tensor, v: torch.Tensor, padded: int, query_block: int) -> tuple[int, bool]:
    """Return the queries of a tile, a power of two, and whether all have one list."""
    most = max(1, _table(q)["rows"][_wide(q, v)] // padded)
    free, together = min(_FREE, most), math.gcd(query_block, most)
    return (together, True) if together >= free else (free, False)


def _blocks(
    kind: str, q: torch.Tensor, v: torch.Tensor, block_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes that a kernel is compiled for, and its warps and stages."""
    table, room = _table(q), triton.next_power_of_2(block_size)
    n, warps, stages = table[kind][_wide(q, v)]
    sizes = {"K": q.shape[3], "V": v.shape[3], "SIZE": block_size, "ROOM": room, "BLOCK_N": n}
    sizes |= {f"BLOCK_{n}": max(16, triton.next_power_of_2(sizes[n])) for n in "KV"}
    if kind == "keys":
        sizes |= {"BLOCK_M": table["BLOCK_M"], "BLOCK_N": max(16, min(n, room))}
    return sizes, {"num_warps": warps, "num_stages": stages}


def _table(q: torch.Tensor) -> dict[str, Any]:
    return _HALF if q.dtype in _triton.HALVES else _FULL


def _wide(q: torch.Tensor, v: torch.Tensor) -> int:
    return max(64, triton.next_power_of_2(max(q.shape[3], v.shape[3])))


def _batched(x: torch.Tensor, batch: int) -> torch.Tensor:
    return x.expand(batch, *x.shape[1:])


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """Return the strides of batch and lists of x [B or 1, 1, J, N], 0 where all share one."""
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 2))


_TYPES = dict.fromkeys(("blocks", "counts", "places", "origin", "order", "bounds", "index"), "*i32")
_TYPES |= dict.fromkeys(("bias", "dbias", "lse", "delta", "logs", "parts"), "*fp32")
_TYPES |= dict.fromkeys(("scale", "inner", "outer"), "fp32")
_KERNELS = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}
_KERNELS |= {"decode": decode_kernel, "join": join_kernel}


def variants() -> list[_triton.Variant]:
    """Return what is launched: heads of 64 and 128, blocks of 16 and 64, 1 to 16 heads a group."""
    half, full = torch.bfloat16, torch.float32
    plain = {"bias": None, "dbias": None}
    together = {**plain, "places": None}  # lists of query blocks
    return [
        *(_variant(kind, half, 128, 64, 4) for kind in ("forward", "queries", "keys")),
        *(_variant(kind, half, 64, 16, 1, CAP=True) for kind in ("forward", "queries", "keys")),
        *(_variant(kind, full, 64, 64, 8) for kind in ("forward", "queries", "keys")),
        _variant("forward", half, 128, 64, 16, **together),
        _variant("decode", half, 128, 64, 16),
        _variant("join", half, 128, 64, 16),
    ]


def _variant(
    kind: str, dtype: torch.dtype, size: int, block: int, ratio: int, **extras: Any
) -> _triton.Variant:
    meta, names = torch.empty(1, 1, 1, size, dtype=dtype, device="meta"), _KERNELS[kind].arg_names
    blocks, how = _blocks(kind, meta, meta, block) if kind != "join" else ({}, {})
    queries = _tile(meta, meta, ratio, 1)[0]
    constants: dict[str, Any] = {"R": ratio, "RP": ratio, "QT": queries, "JR": 1, "L": queries}
    constants |= {"V": size, "BLOCK_V": size, "BLOCK_M": 16, "SHARE": 1, "SPLITS": _SPLITS}
    constants |= {**blocks, **_flags(meta, None), "UNIT": 8, "real": None, "origin": None, **extras}
    tensors = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), _POINTERS[dtype])
    types = {**_TYPES, **tensors}
    return _triton.Variant(
        name=f"{kind}_{size}_{block}_{ratio}_{tensors['q'][1:]}",
        kernel=_KERNELS[kind],
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={n: x for n, x in constants.items() if n in names},
        **how,
    )


_POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
