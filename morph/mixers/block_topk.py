"""Softmax over the blocks that fit a query best (as MoBA, InfLLMv2 and NSA choose them).

What it does: tokens are counted in blocks of `block`. A query reads `k` of them by the source's own
softmax: the `initial` first ones, the `local` last ones, its own among them, and those whose
summaries of rotated keys fit it best. With `compressed`, attention over the means of keys and of
values of windows, half a block each and one every quarter of a block, is added: o = select times
the selection's plus compress times this. The two gates are read from the layer's input, per head.
Why it works: for a query most of the weight lies in few blocks, which the summaries often tell.
Cost: all keys and values are kept, and a float32 key per block beside (with windows one per
quarter of a block; with `compressed` those and as many float32 values). A decoded token reads k
blocks and, once there are more than these, the summaries. Time is that of k blocks read, and of
T / block scores per query.
Options: block 64 tokens; k 16 blocks, in which `initial` 1 and `local` 2 count; summary mean (or
max, element by element, or windows: the best of those that touch the block); per group, one list
for the query heads of a KV head by the sum of their softmax over the summaries, or head, one list
for each; compressed false. MoBA chooses as summary mean, per head, initial 0, local 1, with blocks
of 512 and more; InfLLMv2 as summary windows, per group, initial 1, local 16; NSA as summary
windows, per group, initial 1, local 2, compressed true, and its public code with summary mean.
Known limits: nothing is forgotten, so no memory is saved; the choice has no gradient and is made
without the score cap; it is exact while a text has no more than k blocks. `per` head lists up to as
many blocks more per KV head as query heads share one. In a layer that slides in the source this is
the source's window, without parameters.
Reference: Lu et al., MoBA, arXiv 2502.13189; InfLLM-V2, 2509.24663; Yuan et al., NSA, 2502.11089.
Deviations: windows end before the query, not with it; by windows a block has its best one, as in
InfLLMv2, where NSA adds them up; window means where NSA learns a small network; NSA's own third
branch, a window with own keys and values, is `local` in the same softmax; gates are 2 sigmoid
(select) and tanh (compress) of maps that start at 0, where NSA has sigmoids, so that it starts as
the selection alone, exactly, with gradients that are alive.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import _blocks, _topk, block_topk
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._softmax import attend
from morph.plan import CacheCost

SEES = "k * block"
LINEAR = False
_MOST_BLOCK = 65536  # tokens: room for whole blocks is made from the first token on
_MOST_K = 2**31 - 1  # blocks: lists are int32


@dataclass(frozen=True, kw_only=True)
class Options:
    """`block` tokens in a block; `k`, `initial` and `local` count blocks; as told above."""

    block: int = 64
    k: int = 16
    initial: int = 1
    local: int = 2
    summary: Literal["mean", "max", "windows"] = "mean"
    per: Literal["head", "group"] = "group"
    compressed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.block <= _MOST_BLOCK:
            raise RecipeError(
                f"mixer block_topk: block is {self.block}; give 1 to {_MOST_BLOCK} tokens, usually "
                "64."
            )
        if self.initial < 0:
            raise RecipeError(
                f"mixer block_topk: initial is {self.initial}; give 0 (none) or more blocks, "
                "usually 1."
            )
        if self.local < 1:
            raise RecipeError(
                f"mixer block_topk: local is {self.local}; it counts the query's own block, so "
                "give 1 block or more, usually 2."
            )
        least = self.initial + self.local
        if not least <= self.k <= _MOST_K:
            raise RecipeError(
                f"mixer block_topk: k is {self.k}; it counts all blocks read, initial "
                f"{self.initial} and local {self.local} among them, so give {least} to {_MOST_K} "
                "blocks, or fewer of those two. The default is 16."
            )


class Mixer(MixerBase):
    """Best blocks of a head group.

    With `compressed`, for the gates: `select_weight` and `compress_weight` [H, D], `select_bias`
    and `compress_bias` [H]; else no parameters.
    """

    gates: ClassVar[tuple[str, ...]] = ("select_bias", "compress_bias")

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        self.select_weight = self.select_bias = None
        self.compress_weight = self.compress_bias = None
        if options.compressed and shape.window is None:
            size = (shape.num_heads, shape.hidden_size)
            self.select_weight = nn.Parameter(torch.empty(size))
            self.select_bias = nn.Parameter(torch.empty(shape.num_heads))
            self.compress_weight = nn.Parameter(torch.empty(size))
            self.compress_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates of 1 for the selection and 0 for the compressed branch."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros.

        The state's tensors are those of `block_topk.BlockTopkState` that are there.
        """
        options, shape, v = self.options, self.shape, inputs.v
        if shape.window is not None:
            return attend(inputs, state, shape, shape.window)
        select = compress = None
        if self.select_weight is not None and self.compress_weight is not None:
            select = _linear.project(inputs.hidden, self.select_weight, self.select_bias)
            select = 2.0 * torch.sigmoid(select)
            compress = _linear.project(inputs.hidden, self.compress_weight, self.compress_bias)
            compress = torch.tanh(compress)
        # under autocast norms and rotary positions leave q and k in float32, v is what autocast
        # wants
        o, after = block_topk.forward(
            inputs.q.to(v.dtype),
            inputs.k.to(v.dtype),
            v,
            k_blocks=options.k,
            block_size=options.block,
            initial=options.initial,
            local=options.local,
            summary=options.summary,
            per=options.per,
            select_gate=select,
            compress_gate=compress,
            scale=shape.scale,
            softcap=shape.softcap,
            padding=inputs.padding,
            initial_state=None if state is None else _load(state, v),
            output_final_state=state is not None,
            in_place=True,
        )
        if state is not None:
            assert after is not None
            held = after._asdict()
            state.seen = held.pop("seen")
            state.tensors = {name: x for name, x in held.items() if x is not None}
        return o

    def blocks_read(self, inputs: Inputs) -> torch.Tensor:
        """Return how many blocks each query reads, [B, T, J] int64: its own too, 0 for padding.

        J is the KV heads, the query heads with `per` head. In a layer that slides in the source
        these are the blocks that the window touches.
        """
        (batch, tokens), options, shape = inputs.v.shape[:2], self.options, self.shape
        rows = _blocks.Rows.of(inputs.padding, batch, 0, tokens, inputs.v.device)
        at, lists = rows.positions(), shape.num_key_value_heads
        if shape.window is None:
            read = (at // options.block + 1).clamp(max=options.k)
            lists = shape.num_heads if options.per == "head" else lists
        else:
            oldest = (at - shape.window + 1).clamp(min=0)
            read = at // options.block - oldest // options.block + 1
        return rows.back(read[..., None].expand(batch, -1, lists))

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """All keys and values in whole blocks, and summaries; the source's window if it has one."""
        if shape.window is not None:
            return CacheCost(tokens=shape.window)
        per_block = _topk.windows(options.block).per_block(options.block)
        windows = options.summary == "windows"
        elements = shape.head_dim * (per_block if windows or options.compressed else 0)
        elements += 0 if windows else shape.head_dim
        elements += shape.v_head_dim * (per_block if options.compressed else 0)
        step = _blocks.room_step(options.block)
        return CacheCost(step=step, token_elements=elements / options.block)

    @classmethod
    def decode_bytes(cls, options: Options, shape: GroupShape, seq_len: int, itemsize: int) -> int:
        """The k blocks, the own one up to the token itself, and the summaries that are looked at.

        No summaries are while all blocks are read; windows are counted once where the choice and
        the compressed branch read the same. With `per` head, the query heads of a KV head may list
        different blocks: as many as they are times k, at most all of them.
        """
        if shape.window is not None:
            return super().decode_bytes(options, shape, seq_len, itemsize)
        before, own = divmod(max(seq_len, 1) - 1, options.block)
        past = options.k - 1
        local = min(before, options.local - 1)
        first = min(before - local, options.initial)
        if options.per == "head":
            ratio = shape.num_heads // shape.num_key_value_heads
            past = (past - local - first) * ratio + local + first
        tokens = min(before, past) * options.block + own + 1
        seen = _topk.windows(options.block).complete(max(seq_len, 1) - 1)
        chooses, windows = before >= options.k, options.summary == "windows"
        elements = before * shape.head_dim if chooses and not windows else 0
        elements += seen * shape.head_dim if options.compressed or (chooses and windows) else 0
        elements += seen * shape.v_head_dim if options.compressed else 0
        entry = (shape.head_dim + shape.v_head_dim) * itemsize
        return shape.num_key_value_heads * (tokens * entry + 4 * elements)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return as many blocks as `seq_len` tokens have, and no compressed branch."""
        blocks = max(options.k, -(-seq_len // options.block))
        return dataclasses.replace(options, k=blocks, compressed=False)

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The first k blocks; none where the compressed branch may have a share."""
        return 0 if options.compressed else options.k * options.block


def _load(state: State, v: torch.Tensor) -> block_topk.BlockTopkState | None:
    if not state.tensors:
        return None
    held: dict[str, Any] = {"k_windows": None, "v_windows": None}
    held |= {name: x.to(v.device) for name, x in state.tensors.items()}
    return block_topk.BlockTopkState(**held, seen=state.seen)
