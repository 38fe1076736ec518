"""Softmax over the blocks that each query's routing leaves, as many as it needs (DashAttention).

What it does: tokens are counted in blocks of `block`. A complete block's rotated keys are summed up
to one per KV head, weighted by a learned `summary_query` that starts at 0, their mean. A query
weighs the summaries before its own block by entmax of order `alpha` over gamma times the source's
scaled score, and reads the blocks whose weight, averaged over the query heads of a KV head, is not
exactly 0, and its own block always, by the source's own softmax. `gamma`, one number per query
head, is the knob: larger reads less. Every block read but the own one has the log of its weight,
less the mean of these logs, divided by `sigma`, added to its scores.
Why it works: how many blocks matter differs from query to query, and entmax leaves out what does
not matter instead of keeping a fixed number; all of it has gradients, so training moves the choice.
Cost: all keys and values are kept, and 1 / block of a float32 key beside each. A decoded token
reads the summaries and the blocks it chose. Time is that of the blocks read, and of T / block
scores per query.
Options: block 64 tokens; alpha 1.5 (1 reads everything, 2 reads least); gamma 1.0, where it starts;
sigma 100; sparsity none, or the share of past blocks that should not be read: calibration then sets
gamma per KV head so that on its text the blocks read are that part of all complete blocks before
the queries' own, summed over all queries (early ones, that have few, count little; the paper leaves
out the first 4096). A share that no gamma reaches, since a query always keeps one past block, ends
as near as there is. ramp 0: share of training over which alpha rises from 1.25 (or alpha, if that
is less) to alpha; decoding and evaluation use alpha.
Known limits: nothing is forgotten, so no memory is saved. Without `sparsity` all may be read, and
counted bytes say so; with it, they count that share, which another text or length need not meet.
Gamma at 0 is full attention; one that training pushes below prefers the blocks that fit worst. In a
layer that slides in the source this is the source's window, without parameters.
Reference: Fang et al., DashAttention, arXiv 2605.18753. Deviations: sigma is 100 where the paper
has 1e6 to 1e8, under which the gradient of the routing is next to nothing: at 100 the bias moves a
score by some hundredths and gradients are 10000 times as large; gamma is learned, one per query
head; the mean of the logs takes part in the gradient; no previous block that is always read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import _blocks, dash
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.mixers._softmax import attend
from morph.plan import CacheCost

SEES = "0"
LINEAR = False
_MOST_BLOCK = 2**20
_MOST_GAMMA, _LEAST_SIGMA, _MOST_SIGMA = 1e6, 1e-3, 1e12
_RAMP_START = 1.25
# Calibration looks for gamma between these; the finest step is far below what moves a block
_LEAST_FOUND, _MOST_FOUND, _HALVINGS = 2.0**-10, 2.0**20, 30


@dataclass(frozen=True, kw_only=True)
class Options:
    """`block` tokens; `gamma` is where it starts, `sparsity` what calibration sets it by."""

    block: int = 64
    alpha: float = 1.5
    gamma: float = 1.0
    sigma: float = 100.0
    sparsity: float | None = None
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.block <= _MOST_BLOCK:
            raise RecipeError(
                f"mixer dash: block is {self.block}; give 1 to {_MOST_BLOCK} tokens, usually 64."
            )
        if not 1.0 <= self.alpha <= 2.0:
            raise RecipeError(
                f"mixer dash: alpha is {self.alpha}; give 1 (reads everything) to 2 (reads least), "
                "usually 1.5."
            )
        if not 0.0 <= self.gamma <= _MOST_GAMMA:
            raise RecipeError(
                f"mixer dash: gamma is {self.gamma}; give 0 (full attention) to {_MOST_GAMMA:g}, "
                "usually 1. Larger reads less."
            )
        if not _LEAST_SIGMA <= self.sigma <= _MOST_SIGMA:
            raise RecipeError(
                f"mixer dash: sigma is {self.sigma}; give {_LEAST_SIGMA:g} to {_MOST_SIGMA:g}, "
                "usually 100. Larger adds less to the scores."
            )
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise RecipeError(
                f"mixer dash: sparsity is {self.sparsity}; give the share of past blocks that "
                "should not be read, 0 to below 1, such as 0.75, or leave it out."
            )
        if not 0.0 <= self.ramp <= 1.0:
            raise RecipeError(
                f"mixer dash: ramp is {self.ramp}; give the share of training over which alpha "
                "rises, 0 (none) to 1."
            )


class Mixer(MixerBase):
    """DashAttention of a head group: `summary_query` [G, K] and `gamma` [H]."""

    gates: ClassVar[tuple[str, ...]] = ("summary_query", "gamma")
    settings: ClassVar[tuple[str, ...]] = ("gamma",)

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        self._alpha = options.alpha
        self.summary_query = self.gamma = None
        if shape.window is None:
            size = (shape.num_key_value_heads, shape.head_dim)
            self.summary_query = nn.Parameter(torch.empty(size))
            self.gamma = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros.

        The state's tensors are `k` [B, room, G, K], `v` [B, room, G, V] and `summaries`
        [B, room / block, G, K], real tokens first.
        """
        options, shape, v = self.options, self.shape, inputs.v
        if self.summary_query is None or self.gamma is None:
            return attend(inputs, state, shape, shape.window)
        # under autocast norms and rotary positions leave q and k in float32, v is what autocast
        # wants
        o, after = dash.forward(
            inputs.q.to(v.dtype),
            inputs.k.to(v.dtype),
            v,
            summary_query=self.summary_query,
            gamma=self.gamma,
            alpha=self._alpha,
            sigma=options.sigma,
            block_size=options.block,
            scale=shape.scale,
            softcap=shape.softcap,
            padding=inputs.padding,
            initial_state=None if state is None else _load(state, v),
            output_final_state=state is not None,
            in_place=True,
        )
        if state is not None:
            assert after is not None
            state.tensors = {"k": after.k, "v": after.v, "summaries": after.summaries}
            state.seen = after.seen
        return o

    def progress(self, share: float) -> None:
        """Raise alpha evenly over the first `ramp` of training."""
        alpha, ramp = self.options.alpha, self.options.ramp
        start = min(_RAMP_START, alpha)
        self._alpha = alpha if share >= ramp else start + (alpha - start) * share / ramp

    def blocks_read(self, inputs: Inputs) -> torch.Tensor:
        """Return how many blocks each query reads, [B, T, G] int64: its own too, 0 for padding.

        In a layer that slides in the source these are the blocks that the window touches.
        """
        if self.summary_query is not None:
            return self._read(inputs, self.gamma)
        (batch, tokens), block = inputs.v.shape[:2], self.options.block
        rows = _blocks.Rows.of(inputs.padding, batch, 0, tokens, inputs.v.device)
        at, window = rows.positions(), self.shape.window
        assert window is not None
        read = at // block - (at - window + 1).clamp(min=0) // block + 1
        return rows.back(read[..., None].expand(batch, -1, self.shape.num_key_value_heads))

    def _read(self, inputs: Inputs, gamma: torch.Tensor | None) -> torch.Tensor:
        assert self.summary_query is not None and gamma is not None
        return dash.blocks_read(
            inputs.q.to(inputs.v.dtype),
            inputs.k.to(inputs.v.dtype),
            summary_query=self.summary_query,
            gamma=gamma,
            alpha=self._alpha,
            block_size=self.options.block,
            scale=self.shape.scale,
            padding=inputs.padding,
        )

    def reset_parameters(self) -> None:
        """Start with means as summaries and the option's gamma."""
        if self.summary_query is not None and self.gamma is not None:
            with torch.no_grad():
                self.summary_query.zero_()
                self.gamma.fill_(self.options.gamma)

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Set gamma, one for the heads of each KV head, by the `sparsity` asked for, if any.

        What is not read falls as gamma rises, block by block, so halving finds the gamma whose
        share is nearest. Where no query has a past block to choose from, gamma stays.
        """
        target = self.options.sparsity
        if target is None or self.gamma is None:
            return
        past = sum(int(self._past(x).sum()) for x, _ in batches)
        if not past:
            return
        ratio = self.shape.num_heads // self.shape.num_key_value_heads

        def unread(gamma: torch.Tensor) -> torch.Tensor:
            """Return the share of past blocks that each KV head leaves, [G]."""
            each = gamma.repeat_interleave(ratio)
            read = sum(
                ((self._read(x, each) - 1).clamp(min=0)).sum(dim=(0, 1)).double()
                for x, _ in batches
            )
            return 1.0 - read / past

        groups = self.shape.num_key_value_heads
        low = torch.full((groups,), math.log(_LEAST_FOUND), dtype=torch.float64)
        high = torch.full((groups,), math.log(_MOST_FOUND), dtype=torch.float64)
        low, high = low.to(self.gamma.device), high.to(self.gamma.device)
        with torch.no_grad():
            for _ in range(_HALVINGS):
                middle = (low + high) / 2.0
                enough = unread(middle.exp()) >= target
                low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
            over, under = ((unread(x.exp()) - target).abs() for x in (high, low))
            found = torch.where(over <= under, high, low).exp()
            self.gamma.copy_(found.repeat_interleave(ratio))

    def _past(self, inputs: Inputs) -> torch.Tensor:
        """Return how many complete blocks lie before each query's own, [B, T], 0 for padding."""
        (batch, tokens), block = inputs.v.shape[:2], self.options.block
        rows = _blocks.Rows.of(inputs.padding, batch, 0, tokens, inputs.v.device)
        return rows.back((rows.positions() // block).expand(batch, -1))

    @classmethod
    def asks(cls, options: Options) -> str:
        """The sparsity, where one is wanted."""
        return "" if options.sparsity is None else f"sparsity {options.sparsity:g}"

    @classmethod
    def calibration_length(cls, options: Options) -> int:
        """Return 32 blocks where gamma is set by them, so that nine tenths can be left out."""
        return 512 if options.sparsity is None else max(512, 32 * options.block)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """All keys and values in whole blocks, and summaries; or the source's window."""
        if shape.window is not None:
            return CacheCost(tokens=shape.window)
        step = _blocks.room_step(options.block)
        return CacheCost(step=step, token_elements=shape.head_dim / options.block)

    @classmethod
    def decode_bytes(cls, options: Options, shape: GroupShape, seq_len: int, itemsize: int) -> int:
        """The summaries, the own block up to the token and the share of past blocks to be read.

        That share is 1 - `sparsity`, one block at least; all where no sparsity is asked for.
        """
        if shape.window is not None:
            return super().decode_bytes(options, shape, seq_len, itemsize)
        before, own = divmod(max(seq_len, 1) - 1, options.block)
        read = max(min(before, 1), math.ceil(before * (1.0 - (options.sparsity or 0.0))))
        tokens = read * options.block + own + 1
        entry = (shape.head_dim + shape.v_head_dim) * itemsize
        return shape.num_key_value_heads * (tokens * entry + 4 * before * shape.head_dim)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return blocks of which `seq_len` tokens are two: one past block is always read."""
        return dataclasses.replace(options, block=max(options.block, -(-seq_len // 2), 1))

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The first two blocks: the second's queries have one past block, and keep it."""
        return 2 * options.block


def _load(state: State, v: torch.Tensor) -> dash.DashState | None:
    if not state.tensors:
        return None
    held: dict[str, Any] = {name: x.to(v.device) for name, x in state.tensors.items()}
    return dash.DashState(held["k"], held["v"], held["summaries"], state.seen)
