"""A causal window, the first blocks and random past blocks, fixed by a seed (BigBird).

What it does: tokens are counted in blocks of `block`. Every query sees the `local` blocks up to
its own (that included, up to itself), the `initial` first blocks and `random` blocks in between,
all by the source's own softmax. Which blocks are random depends on nothing but the `seed`, the
layer, the head and the query's block: it is the same in training, prefill and decoding, on every
device and for ever, and the seed stands in the checkpoint's plan.
Why it works: nearby tokens and the first ones carry most weight, and over some layers random
blocks connect everything with everything.
Cost: all keys and values are kept, `local` + `initial` + `random` blocks of them are read for a
token; time linear in the length.
Options: block 64 tokens, local 3 blocks, initial 1 block, random 3 blocks, seed 0; per `kv_head`
draws for every KV head, `layer` once for all of a layer. Both read the same bytes, and `kv_head`
reaches more of the past; query heads that share a KV head always share its blocks, since a draw for
each would read up to as many times the bytes as heads share one.
Known limits: what is far away is seen by chance, not by need: a baseline for mixers that choose. In
a layer that slides in the source this is the source's window, and the options do nothing.
Reference: Zaheer et al., BigBird, arXiv 2007.14062, an encoder. Deviations, since a decoder must
not see the future: the window lies before the query, global blocks are the first ones only and are
read but do not read everything, random blocks are past ones; fewer than all blocks are never
replaced by full attention below some length, since such a text is covered anyway.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import _blocks
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._random_blocks import block_lists
from morph.mixers._softmax import attend
from morph.plan import CacheCost

SEES = "(local + initial + random) * block"
LINEAR = False
_MOST_BLOCK = 65536  # tokens: room for whole blocks is made from the first token on
_MOST_SEED = 2**32 - 1
_AHEAD = 16  # blocks whose lists are made together, so that decoding makes them rarely
_KEPT = 2**20  # numbers in the lists that are kept from call to call


@dataclass(frozen=True, kw_only=True)
class Options:
    """`block` tokens in a block; `local`, `initial` and `random` count blocks; as told above."""

    block: int = 64
    local: int = 3
    initial: int = 1
    random: int = 3
    seed: int = 0
    per: Literal["layer", "kv_head"] = "kv_head"

    def __post_init__(self) -> None:
        if not 1 <= self.block <= _MOST_BLOCK:
            raise RecipeError(
                f"mixer bigbird: block is {self.block}; give 1 to {_MOST_BLOCK} tokens, usually 64."
            )
        if self.local < 1:
            raise RecipeError(
                f"mixer bigbird: local is {self.local}; it counts the query's own block, so give "
                "1 block or more. The default is 3."
            )
        for name, usual in (("initial", 1), ("random", 3)):
            if getattr(self, name) < 0:
                raise RecipeError(
                    f"mixer bigbird: {name} is {getattr(self, name)}; give 0 (none) or more "
                    f"blocks, usually {usual}."
                )
        if not 0 <= self.seed <= _MOST_SEED:
            raise RecipeError(
                f"mixer bigbird: seed is {self.seed}; give a whole number from 0 to {_MOST_SEED}."
            )


class Mixer(MixerBase):
    """Block-sparse attention of a head group over fixed lists of blocks; no parameters."""

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        self._held: tuple[range, torch.Tensor] | None = None  # query blocks, and their lists

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros.

        The state's tensors are `k` [B, room, G, K] and `v` [B, room, G, V], real tokens first.
        """
        shape, block = self.shape, self.options.block
        if shape.window is not None:
            return attend(inputs, state, shape, shape.window)
        v = inputs.v
        # under autocast norms and rotary positions leave q and k in float32, v is what autocast
        # wants
        q, k = inputs.q.to(v.dtype), inputs.k.to(v.dtype)
        past = 0 if state is None else state.seen
        total = past + v.shape[1]
        rows = _blocks.Rows.of(inputs.padding, v.shape[0], past, v.shape[1], v.device)
        k, v = rows.front(k), rows.front(v)
        if state is not None:
            step = _blocks.room_step(block)
            k, v = (
                _blocks.append(state.tensors.get(name), new, rows, total, step, in_place=True)
                for name, new in (("k", k), ("v", v))
            )
            state.tensors, state.seen = {"k": k, "v": v}, total
        o = _blocks.attend(
            rows.front(q),
            k,
            v,
            self._lists(rows),
            block_size=block,
            at=rows.at,
            query_block=block,
            scale=shape.scale,
            softcap=shape.softcap,
        )
        return rows.back(o)

    def blocks_read(self, inputs: Inputs) -> torch.Tensor:
        """Return how many blocks each query reads, [B, T, J] int64: its own too, 0 for padding.

        J is the KV heads, or 1 with `per` layer. In a layer that slides in the source these are the
        blocks that the window touches.
        """
        (batch, tokens), block = inputs.v.shape[:2], self.options.block
        rows = _blocks.Rows.of(inputs.padding, batch, 0, tokens, inputs.v.device)
        if self.shape.window is None:
            read = (self._lists(rows) >= 0).sum(dim=-1)
        else:
            at = rows.positions()
            oldest = (at - self.shape.window + 1).clamp(min=0)
            read = (at // block - oldest // block + 1)[..., None]
        return rows.back(read.expand(batch, -1, -1))

    def _lists(self, rows: _blocks.Rows) -> torch.Tensor:
        """Return the list of every query of a call [B or 1, T, J, N], -1 for nothing."""
        block = self.options.block
        first = rows.at if isinstance(rows.at, int) else int(rows.at.min())
        last = first if isinstance(rows.at, int) else int(rows.at.max())
        blocks = range(first // block, (last + rows.tokens - 1) // block + 1)
        held = self._held
        if held is None or held[1].device != rows.device or not _covers(held[0], blocks):
            blocks = range(blocks.start, max(blocks.stop, blocks.start + _AHEAD))
            held = blocks, self._make(blocks, rows.device)
            self._held = held if held[1].numel() <= _KEPT else None
        return held[1][rows.positions() // block - held[0].start]

    def _make(self, blocks: range, device: torch.device) -> torch.Tensor:
        options, shape = self.options, self.shape
        # a KV head goes by the first query head that it serves here: so heads of one layer differ,
        # whatever groups they are in
        each = shape.num_heads // shape.num_key_value_heads
        with torch.inference_mode(False):  # what is kept may meet gradients later
            return block_lists(
                blocks,
                window=options.local,
                initial=options.initial,
                random=options.random,
                seed=options.seed,
                layer=shape.layer_idx,
                heads=shape.heads[::each] if options.per == "kv_head" else (0,),
                device=device,
            )

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """All keys and values, in whole blocks; the source's window where it has one."""
        if shape.window is not None:
            return CacheCost(tokens=shape.window)
        return CacheCost(step=_blocks.room_step(options.block))

    @classmethod
    def decode_bytes(cls, options: Options, shape: GroupShape, seq_len: int, itemsize: int) -> int:
        """The keys and values of the listed blocks, the own one up to the token itself."""
        if shape.window is not None:
            return super().decode_bytes(options, shape, seq_len, itemsize)
        before, own = divmod(max(seq_len, 1) - 1, options.block)
        listed = min(before, options.local - 1 + options.initial + options.random)
        tokens = listed * options.block + own + 1
        entry = (shape.head_dim + shape.v_head_dim) * itemsize
        return tokens * entry * shape.num_key_value_heads

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return as many random blocks as `seq_len` tokens have."""
        return dataclasses.replace(options, random=-(-max(seq_len, 1) // options.block))

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The blocks that are no more than a list holds."""
        return (options.local + options.initial + options.random) * options.block


def _covers(held: range, wanted: range) -> bool:
    return held.start <= wanted.start and wanted.stop <= held.stop
