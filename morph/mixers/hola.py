"""A gated delta state and the exact keys and values of the tokens that it could not hold (HOLA).

What it does: per query head a Gated DeltaNet state, and softmax attention, with the source's own
rotated q, k, scale and score cap, over the `cache` tokens that changed the states most when they
were written, the tokens of the current `block`, and a learned `sink` logit per head that takes
weight and gives nothing. The output is mix_state times the state's, plus mix_cache times the
cache's. `norm` brings the state's output to unit root mean square per head, times a learned weight.
`state` false reads the cache alone: decays (ALiBi's slopes) and writing strengths (1/2) then only
choose tokens, and are not learned. Decay and strength come from the layer's input as in
gated_delta.
Why it works: what a state holds badly is what surprised it, and that is what the cache keeps.
Cost: K V float32 numbers per query head and `cache` + `block` keys and values with two numbers
each, whatever the length; time linear in the length.
Options: cache 64 tokens, block 256 tokens, norm true, sink true, state true.
Known limits: choosing tokens has no gradient; the source's window also bounds the cache, which
never takes back a token it let go.
Reference: HOLA, arXiv 2607.02303, as a conversion of softmax attention, which the paper does not
try. Deviations: q and k of the cache keep the source's norms, positions and scale instead of an RMS
norm of their own, so that a `cache` as long as the text, without sink and state, is the source
exactly; hence the start is the whole cache and 1/64 of the state, about sigmoid(-4), where the
paper starts the other way round; tokens are chosen per KV head, by the writes of all its query
heads together, so that an entry is stored once; no convolution and no output gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import hola
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

SEES = "cache + block"
_STATE_START = 2.0**-6  # about sigmoid(-4), and the same in every dtype
# exp(-8) beside a softmax sum of about 1 or more moves an output by 3e-4 at most, and still learns
_SINK_START = -8.0
# Scores and positions of all entries are held from the first token on: 8 MiB per KV head at most
_MOST_TOKENS = 2**20
_LEAST = 1e-3  # of the target's squares: of less than this, little is more than rounding
_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
_WRITES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`cache` tokens kept from before the current `block` of tokens; the rest as told above."""

    cache: int = 64
    block: int = 256
    norm: bool = True
    sink: bool = True
    state: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.cache < _MOST_TOKENS:
            raise RecipeError(
                f"mixer hola: cache is {self.cache}; give 0 to {_MOST_TOKENS - 1} tokens, usually "
                "64."
            )
        if not 1 <= self.block <= _MOST_TOKENS - self.cache:
            raise RecipeError(
                f"mixer hola: block is {self.block}; it holds the token itself, so give 1 to "
                f"{_MOST_TOKENS - self.cache}, which with a cache of {self.cache} makes "
                f"{_MOST_TOKENS}. The default is 256."
            )


class Mixer(MixerBase):
    """HOLA of a head group.

    `mix_cache` [H], and `sinks` [H] or None; of the state, or None without one: `mix_state` [H],
    `norm_weight` [H, V], `a_weight` [H, D], `dt_bias` [H] and `A_log` [H] for the decay, `b_weight`
    [H, D] for the writing strength.
    """

    gates: ClassVar[tuple[str, ...]] = (
        "mix_state",
        "mix_cache",
        "sinks",
        "dt_bias",
        "A_log",
        "norm_weight",
    )

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        heads, width = shape.num_heads, shape.hidden_size
        self.mix_cache = nn.Parameter(torch.empty(heads))
        self.sinks = nn.Parameter(torch.empty(heads)) if options.sink else None
        self.mix_state = self.norm_weight = None
        self.a_weight = self.dt_bias = self.A_log = self.b_weight = None
        if options.state:
            self.mix_state = nn.Parameter(torch.empty(heads))
            if options.norm:
                self.norm_weight = nn.Parameter(torch.empty(heads, shape.v_head_dim))
            self.a_weight = nn.Parameter(torch.empty(heads, width))
            self.dt_bias = nn.Parameter(torch.empty(heads))
            self.A_log = nn.Parameter(torch.empty(heads))
            self.b_weight = nn.Parameter(torch.empty(heads, width))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros."""
        mix: torch.Tensor | None = self.mix_state
        if mix is not None and self.norm_weight is not None:
            mix = _linear.wide(mix)[:, None] * _linear.wide(self.norm_weight)
        return self._run(inputs, state, mix, self.mix_cache)

    def _run(
        self,
        inputs: Inputs,
        state: State | None,
        mix_state: torch.Tensor | None,
        mix_cache: torch.Tensor,
    ) -> torch.Tensor:
        options, v = self.options, inputs.v
        # under autocast norms and rotary positions leave q and k in float32
        q, k = inputs.q.to(v.dtype), inputs.k.to(v.dtype)
        g, beta = self._gates(inputs.hidden)
        o, after = hola.forward(
            q,
            k,
            v,
            g=g,
            beta=beta,
            mix_state=mix_state,
            mix_cache=mix_cache,
            cache_size=options.cache,
            block_size=options.block,
            window_size=self.shape.window,
            sink=self.sinks,
            scale=self.shape.scale,
            softcap=self.shape.softcap,
            norm_eps=self.shape.norm_eps if options.norm else None,
            padding=inputs.padding,
            initial_state=None if state is None else _load(state, v),
            output_final_state=state is not None,
        )
        if state is not None:
            assert after is not None
            most = _most(options, self.shape)
            state.tensors = {"s": after.s, "k": after.k, "v": after.v}
            for name, x in (("score", after.score), ("at", after.at)):
                # of a fixed size, as the plan counts what is kept in float32
                state.tensors[name] = F.pad(x, (0, 0, most - x.shape[1], 0), value=-1.0)
            state.seen = after.seen
        return o

    def _gates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log decays and writing strengths [B, T, H]."""
        if self.a_weight is None or self.b_weight is None:
            work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            slopes = torch.tensor(_linear.slopes(self.shape), dtype=work, device=hidden.device)
            g = -slopes.expand(*hidden.shape[:2], -1)
            return g, torch.full_like(g, 0.5)
        g = _linear.log_decay(hidden, self.a_weight, self.dt_bias, self.A_log)
        return g, torch.sigmoid(_linear.project(hidden, self.b_weight))

    def reset_parameters(self) -> None:
        """The cache whole, a small share of the state, decays as ALiBi's, half-strength writes."""
        with torch.no_grad():
            self.mix_cache.fill_(1.0)
            if self.sinks is not None:
                self.sinks.fill_(_SINK_START)
            if self.norm_weight is not None:
                self.norm_weight.fill_(1.0)
            if self.mix_state is None or self.dt_bias is None:
                return
            assert self.a_weight is not None and self.b_weight is not None
            assert self.A_log is not None
            self.mix_state.fill_(_STATE_START)
            self.a_weight.zero_()
            self.b_weight.zero_()
            self.A_log.zero_()
            start = torch.tensor(_linear.slopes(self.shape))
            self.dt_bias.copy_(_linear.inverse_softplus(start))

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Fit decays, writing strengths and the state's weight to what the cache leaves out.

        Every head takes the decay and the strength of a small grid that bring its state nearest to
        the teacher less the cache; the cache is that of the start, as it changes with them. Heads
        from which the cache leaves out next to nothing, as on rows that fit into it, stay as they
        start: fitted to rounding, their states would be switched off.
        """
        if self.norm_weight is None:
            return
        assert self.b_weight is not None and self.dt_bias is not None
        assert self.mix_state is not None
        one = _linear.constant_direction(batches)
        grid = [
            {
                "dt_bias": _linear.inverse_softplus(torch.tensor(decay)),
                "b_weight": one.to(self.b_weight) * torch.logit(torch.tensor(write)),
            }
            for decay in _DECAYS
            for write in _WRITES
        ]
        parameters = {"dt_bias": self.dt_bias, "b_weight": self.b_weight}
        with torch.no_grad():
            left = self._left(batches)
            fitted = _squares(left) >= _LEAST * _squares(batches)
            if not fitted.any():
                return
            start = {name: x.clone() for name, x in parameters.items()}
            _linear.best_per_head(self._state_alone, left, parameters, grid)
            for name, x in parameters.items():
                x[~fitted] = start[name][~fitted]
            left = self._left(batches)  # by the cache that the chosen gates make
            states = torch.cat([self._state_alone(x).flatten(0, 1) for x, _ in left])
            weight, _ = _linear.fit_weight(states, torch.cat([y.flatten(0, 1) for _, y in left]))
            self.norm_weight[fitted] = weight[fitted].to(self.norm_weight)
            self.mix_state[fitted] = 1.0

    def _state_alone(self, inputs: Inputs) -> torch.Tensor:
        return self._run(inputs, None, torch.ones_like(self.mix_cache), 0.0 * self.mix_cache)

    def _left(self, batches: Sequence[Seen]) -> list[Seen]:
        return [(x, y - self._run(x, None, None, self.mix_cache)) for x, y in batches]

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """The cache and the block, each entry's score and position, one K x V state per head."""
        most = _most(options, shape)
        return CacheCost(
            tokens=most,
            state_elements=shape.head_dim * shape.v_head_dim,
            kv_state_elements=2 * most,
        )

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return a cache that holds `seq_len` tokens, read alone and without a sink."""
        return dataclasses.replace(options, cache=max(seq_len, 1), sink=False, state=False)

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The blocks before which nothing was let go; none where sink or state have a share."""
        if options.sink or options.state:
            return 0
        return (options.cache // options.block + 1) * options.block


def _most(options: Options, shape: GroupShape) -> int:
    """Return how many tokens are kept at most."""
    both = options.cache + options.block
    return both if shape.window is None else min(both, shape.window)


def _squares(batches: Sequence[Seen]) -> torch.Tensor:
    """Return the sum of the squares of every head's outputs [H]."""
    return torch.stack([y.double().square().sum(dim=(0, 1, 3)) for _, y in batches]).sum(dim=0)


def _load(state: State, v: torch.Tensor) -> hola.HolaState | None:
    if not state.tensors:
        return None
    held = {name: x.to(v.device) for name, x in state.tensors.items()}
    k, values = held["k"].to(v.dtype), held["v"].to(v.dtype)
    score, at = (held[name][:, held[name].shape[1] - k.shape[1] :] for name in ("score", "at"))
    return hola.HolaState(held["s"], k, values, score, at, state.seen)
