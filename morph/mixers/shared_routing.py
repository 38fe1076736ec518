"""Attention to the tokens or blocks that one index chose, for this layer and for those that follow.

What it does: an owner layer (`owner` null) scores the past for every query and lists its `k` best
tokens, or as many whole blocks of `block` tokens; all heads attend, as in the source, to what is
listed. The query's own block is always in, and within k the blocks of the last `local` tokens. A
follower (`owner` the number of an earlier layer) attends to the very list of that layer, by its own
q, k and v, and has no parameters. The score is <W_q a, W_k b> times the source's scale over G: a
are the rotated queries of the layer, the mean over the query heads of every KV head, b its rotated
keys, side by side [G K]; W_q, W_k [I, G K], I being `index_dim`. Of a block b is the mean. Without
a reduction this is exactly the mean over all heads of the layer's own scores.
Why it works: what one layer looks for, its neighbours mostly look for too, so that one index can
serve several, and the attention of a token is mostly on a few others.
Cost: every key and value is kept and k are read; an owner keeps and reads I float32 numbers per
block, and scores every block for every query: prefill stays quadratic, in I instead of H K.
Options: k 2048 tokens, block 1, local 0, index_dim 64 (G K at most), owner null, share_kv false,
kl 1. `share_kv` lets a follower read its owner's keys and values too and keep none.
Training: whatever is trained, each served layer adds, on its way back, `kl` times the gradient of
KL(mean over its heads of its full attention || softmax of the scores) by W_q and W_k, over what is
chosen from, a query weighted by the attention it has there; the mean over the call's tokens, the
sum over the layers served. Nothing else gets that gradient, and W_q, W_k get no other. It is left
out of the loss that is reported, and no scaling of the loss reaches it.
Known limits: the choice has no gradient. In a layer that slides in the source it is the source's
window and has no index to share. A follower and its owner need the same k, block and local; where a
layer has several groups of heads that own, followers read that of the same heads, or the first.
`share_kv` uses projections made for another layer: it does damage and needs healing, and its heads
must be those of the owner. A W reduced by calibration has seen the distances of that text only.
Not with weights split over processes (training.shard) where layers are aligned one by one.
Reference: CLSA, arXiv 2606.06467 ("You Only Index Once"), and DSA, as a conversion of ordinary
grouped-query attention, which neither tries. Deviations: the index sees the layer's rotated q and k
instead of its input, by which it starts near the attention it stands for; no ReLU and one head; the
loss leaves out what is always in; keys and values per layer, and with `share_kv` the owner's
projections as they are, not their mean over the layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from morph.cache import State
from morph.errors import MismatchError, RecipeError
from morph.kernels import _blocks, sliding
from morph.kernels._blocks import Rows
from morph.mixers import _indexer, _softmax
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

SEES = "k"
_NAME, _MOST = "shared_routing", 2**31 - 1
_MOST_BLOCK = 65536  # tokens: room for whole blocks is made from the first token on


@dataclass(frozen=True, kw_only=True)
class Options:
    """`k` tokens read by a query, in blocks of `block`; the rest as told above."""

    k: int = 2048
    block: int = 1
    local: int = 0
    index_dim: int = 64
    owner: int | None = None
    share_kv: bool = False
    kl: float = 1.0

    def __post_init__(self) -> None:
        where = f"mixer {_NAME}"
        for name, low, most, usual in (
            ("k", 1, _MOST, 2048),
            ("block", 1, _MOST_BLOCK, 1),
            ("local", 0, _MOST, 0),
        ):
            value = getattr(self, name)
            if not low <= value <= most:
                raise RecipeError(
                    f"{where}: {name} is {value}; give {low} to {most} tokens, usually {usual}."
                )
        if not 1 <= self.index_dim <= 4096:
            raise RecipeError(
                f"{where}: index_dim is {self.index_dim}; give 1 to 4096, usually 64."
            )
        if self.owner is not None and self.owner < 0:
            raise RecipeError(
                f"{where}: owner is {self.owner}; give the number of an earlier layer, or null for "
                "an index of its own."
            )
        if self.share_kv and self.owner is None:
            raise RecipeError(
                f"{where}: share_kv is for layers that follow; give the owner whose keys and "
                "values are read too, or leave it false."
            )
        if not (math.isfinite(self.kl) and self.kl >= 0):
            raise RecipeError(
                f"{where}: kl is {self.kl}; give 0 or more: it weighs the index's own loss, "
                "usually 1."
            )

    @property
    def choice(self) -> _indexer.Choice:
        """What is chosen, in blocks."""
        return _indexer.Choice(self.block, -(-self.k // self.block), self.local)


class _Left(NamedTuple):
    """What an owner leaves for its followers; `listed` None: a query sees all before it."""

    options: Options
    heads: tuple[int, ...]
    listed: torch.Tensor | None
    index: _indexer.Index
    weights: tuple[torch.Tensor, torch.Tensor]
    k: torch.Tensor
    v: torch.Tensor


class Mixer(MixerBase):
    """Shared routing of a head group; `q_weight` and `k_weight` [I, G K], None in a follower."""

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        self.choice = options.choice
        self.q_weight = self.k_weight = None
        if options.owner is None:
            size, width = _size(options, shape), shape.num_key_value_heads * shape.head_dim
            self.q_weight = nn.Parameter(torch.empty(size, width))
            self.k_weight = nn.Parameter(torch.empty(size, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores that are on average the mean of the layer's own, exactly where I = G K."""
        with torch.no_grad():
            for weight in (self.q_weight, self.k_weight):
                if weight is not None:
                    weight.copy_(_indexer.sketch(*weight.shape, weight.device))

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros.

        Raises MismatchError in a follower whose owner has left nothing, or something else.
        """
        shape, v = self.shape, inputs.v
        if shape.window is not None:
            return _softmax.attend(inputs, state, shape, shape.window)
        batch, tokens = v.shape[:2]
        past = 0 if state is None else state.seen
        rows = Rows.of(inputs.padding, batch, past, tokens, v.device)
        # under autocast norms and rotary positions leave q and k in float32
        q, k, v = (rows.front(x.to(v.dtype)) for x in (inputs.q, inputs.k, v))
        new = k
        left = None if self.options.owner is None else self._followed(inputs)
        if left is not None and self.options.share_kv:
            apart = not inputs.hidden.requires_grad  # the owner's graph is not of this loss
            k, v = (_on(x.detach() if apart else x, q) for x in (left.k, left.v))
        else:
            k, v = _kept(state, k, v, rows, past + tokens, self.options.block)
        if left is None:
            left = self._own(q, new, k, v, rows, state)
            if inputs.shared is not None:
                of_layer = inputs.shared.setdefault((_NAME, shape.layer_idx), {})
                of_layer[shape.heads] = left
        if state is not None:
            state.seen = past + tokens
        o = self._attend(q, k, v, left.listed, rows, past + tokens)
        return rows.back(self._supervise(o, q, k, left, rows))

    def _followed(self, inputs: Inputs) -> _Left:
        """Return what the owner has left, of the same heads where there are several groups."""
        owner, shape = self.options.owner, self.shape
        where = f"layer {shape.layer_idx}: mixer {_NAME} follows layer {owner}"
        found: dict[tuple[int, ...], _Left] = (inputs.shared or {}).get((_NAME, owner), {})
        if not found:
            raise MismatchError(
                f"{where}, whose index is not there. Run the whole model, or the layers in order "
                "with one morph_context; a layer that slides in the source has no index; with "
                "owner null this layer has its own."
            )
        left = found.get(shape.heads) or found[min(found)]
        for name in ("k", "block", "local"):
            asked, there = getattr(self.options, name), getattr(left.options, name)
            if asked != there:
                raise MismatchError(
                    f"{where}, which has {name} {there}, not {asked}. Give both the same {name}."
                )
        if self.options.share_kv and left.heads != shape.heads:
            raise MismatchError(
                f"{where} and shares its keys and values, but not its heads. Let both have the "
                "same heads, or set share_kv to false."
            )
        return left

    def _own(
        self,
        q: torch.Tensor,
        new: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: Rows,
        state: State | None,
    ) -> _Left:
        """Return this layer's index of q [B, T, H, K] over all keys, and what it chooses.

        k and v [B, S, G, K or V] are all keys and values, `new` [B, T, G, K] this call's keys.
        """
        assert self.q_weight is not None and self.k_weight is not None
        choice, groups, in_place = self.choice, k.shape[2], not torch.is_grad_enabled()
        total = rows.tokens + (0 if state is None else state.seen)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            features = _indexer.query_features(q, groups)
            factor = self.shape.scale / groups / choice.block
            queries = _indexer.project(features, self.q_weight) * factor
            keys = _indexer.project(_indexer.key_features(new), self.k_weight)
            held = None if state is None else state.tensors.get("index")
            held = None if held is None else held.to(keys)
            sums = _indexer.add_sums(held, keys, rows, total, choice.block, in_place)
            if state is not None:
                state.tensors["index"] = sums
            index = _indexer.Index(queries, sums, features, k.detach(), factor)
            listed = None
            if not self._all(total):
                blocks = -(-total // choice.block)
                listed = _indexer.choose(queries, sums, rows, blocks, choice)
        weights = self.q_weight, self.k_weight
        return _Left(self.options, self.shape.heads, listed, index, weights, k, v)

    def _all(self, total: int) -> bool:
        return total <= self.choice.most * self.choice.block

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        listed: torch.Tensor | None,
        rows: Rows,
        total: int,
    ) -> torch.Tensor:
        shape, block, tokens = self.shape, self.choice.block, rows.tokens
        how: dict[str, Any] = {"scale": shape.scale, "softcap": shape.softcap}
        if listed is None and total == tokens:  # void keys lie behind every real query
            return sliding.forward(q, k[:, :tokens], v[:, :tokens], window_size=None, **how)[0]
        if listed is None and tokens > 1 and isinstance(rows.at, int):
            at = rows.at
            before = sliding.SlidingState(k[:, :at], v[:, :at], at)
            k, v = k[:, at:total], v[:, at:total]
            return sliding.forward(q, k, v, window_size=None, initial_state=before, **how)[0]
        if listed is None:
            every = torch.arange(-(-total // block), device=q.device, dtype=torch.int32)
            listed = every.expand(1, tokens, 1, -1)
        return _blocks.attend(q, k, v, listed.to(q.device), block_size=block, at=rows.at, **how)

    def _supervise(
        self, o: torch.Tensor, q: torch.Tensor, k: torch.Tensor, left: _Left, rows: Rows
    ) -> torch.Tensor:
        """Return o, on whose way back the indexer learns what this layer attends to."""
        kl = self.options.kl
        if not (kl and torch.is_grad_enabled() and any(w.requires_grad for w in left.weights)):
            return o
        seen = _indexer.Served(q, k, self.shape.scale, self.shape.softcap)
        index = left.index._replace(**{n: _on(x, q) for n, x in left.index._asdict().items()})
        return _indexer.supervised(o, left.weights, seen, index, rows, self.choice, kl)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Start from the scores nearest to the mean of the layer's own, as sharp as its attention.

        Nearest in squares over all pairs of queries and keys of the batches; how sharp, by a grid,
        for the least loss.
        """
        if self.q_weight is None or self.k_weight is None or self.shape.window is not None:
            return
        groups = self.shape.num_key_value_heads
        if self.q_weight.shape[0] < self.q_weight.shape[1]:
            found = _indexer.fitted(
                [_indexer.query_features(x.q, groups) for x, _ in batches],
                [_indexer.key_features(x.k) for x, _ in batches],
                len(self.q_weight),
            )
            for weight, value in zip((self.q_weight, self.k_weight), found):
                weight.copy_(value)
        losses = torch.stack([self._losses(x) for x, _ in batches]).sum(dim=0)
        factor = _indexer.FACTORS[int(losses.argmin())]
        self.q_weight.mul_(math.sqrt(factor))
        self.k_weight.mul_(math.sqrt(factor))

    @classmethod
    def calibration_length(cls, options: Options) -> int:
        """Twice as many tokens as are read, up to 4096: of fewer there is nothing to choose."""
        return max(512, min(2 * options.k, 4096))

    def _losses(self, inputs: Inputs) -> torch.Tensor:
        """Return the indexer's loss for this layer under every factor of the grid, float64."""
        batch, tokens = inputs.q.shape[:2]
        rows = Rows.of(inputs.padding, batch, 0, tokens, inputs.q.device)
        q, k, v = (rows.front(x) for x in (inputs.q, inputs.k, inputs.v))
        left = self._own(q, k, k, v, rows, None)
        seen = _indexer.Served(q, k, self.shape.scale, self.shape.softcap)
        found = _indexer.divergence(seen, left.index, rows, self.choice, _indexer.FACTORS)
        return found.double().cpu()

    @torch.no_grad()
    def blocks_read(self, inputs: Inputs) -> torch.Tensor:
        """Return how many blocks every query reads, [B, T, 1], its own included."""
        if self.shape.window is not None:
            raise MismatchError(
                f"layer {self.shape.layer_idx} slides in the source: it reads no chosen blocks."
            )
        batch, tokens = inputs.q.shape[:2]
        rows = Rows.of(inputs.padding, batch, 0, tokens, inputs.q.device)
        many = rows.positions() // self.choice.block + 1
        many = many.clamp_max(self.choice.most).expand(batch, -1)[..., None]
        return rows.back(many)

    @classmethod
    def follows(cls, options: Options) -> tuple[int, ...]:
        """The owner's layer, in a follower."""
        return () if options.owner is None else (options.owner,)

    @classmethod
    def cannot_follow(
        cls,
        options: Options,
        heads: tuple[int, ...],
        owner: Options,
        owner_heads: tuple[int, ...],
    ) -> str:
        """Return which option differs, or that keys are shared and heads are not."""
        for name in ("k", "block", "local"):
            asked, there = getattr(options, name), getattr(owner, name)
            if asked != there:
                return f"that has {name} {there}, this {asked}. Give both the same {name}."
        if options.share_kv and heads != owner_heads:
            return "keys and values are shared, heads are not. Give both the same heads."
        return ""

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """All keys and values, and in an owner the index of every block."""
        if shape.window is not None:
            return CacheCost(tokens=shape.window)
        if options.share_kv:
            return CacheCost(tokens=0)
        step = _blocks.room_step(options.block)
        if options.owner is not None:
            return CacheCost(step=step)
        each = _size(options, shape) / (shape.num_key_value_heads * options.block)
        return CacheCost(step=step, token_elements=each)

    @classmethod
    def decode_bytes(cls, options: Options, shape: GroupShape, seq_len: int, itemsize: int) -> int:
        """The listed keys and values, and in an owner the index of every block."""
        entry = (shape.head_dim + shape.v_head_dim) * itemsize * shape.num_key_value_heads
        if shape.window is not None:
            return min(seq_len, shape.window) * entry
        choice = options.choice
        read = min(seq_len, choice.most * choice.block) * entry
        if options.owner is not None:
            return read
        return read + 4 * _size(options, shape) * -(-seq_len // choice.block)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options | None:
        """Return a `k` of the whole text; None where keys are another layer's."""
        return None if options.share_kv else dataclasses.replace(options, k=max(seq_len, 1))

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The tokens that are all read."""
        return 0 if options.share_kv else options.choice.most * options.block


def _size(options: Options, shape: GroupShape) -> int:
    """Return the dimensions of the index: more than the features have would add nothing."""
    return min(options.index_dim, shape.num_key_value_heads * shape.head_dim)


def _on(x: Any, like: torch.Tensor) -> Any:
    return x.to(like.device) if isinstance(x, torch.Tensor) else x


def _kept(
    state: State | None, k: torch.Tensor, v: torch.Tensor, rows: Rows, total: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all keys and values with the new ones, kept in the state where there is one."""
    if state is None:
        return k, v
    step, in_place = _blocks.room_step(block), not torch.is_grad_enabled()
    for name, new in (("k", k), ("v", v)):
        held = state.tensors.get(name)
        state.tensors[name] = _blocks.append(held, new, rows, total, step, in_place)
    return state.tensors["k"], state.tensors["v"]
