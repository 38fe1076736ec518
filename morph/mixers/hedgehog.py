"""Softmax over the last tokens and learned linear attention over all older ones, in one average.

What it does: a token of the last `window` weighs g exp(s), s the source's own score, and an older
one phi_q(q) phi_k(k), with phi(x) = [softmax(x W), softmax(-x W)] of 2 `features` numbers; then all
weights are divided by their sum. W is a map per head for q and another for k, on the source's
rotated queries and keys, and g = sigmoid(mix) one number per head. `formula` paper takes the
weights as written; `code` divides those of the window by exp(largest s of the row), as the
official code does, so that its g means something else on every row.
Why it works: softmax keeps what is near exact, where most weight lies, and the features can
imitate the rest. Only W and g are new, so a short training fits them to the source.
Cost: `window` keys and values, and 2 features (V + 1) float32 numbers per query head, whatever the
length; time linear in the length.
Options: window 64 tokens, features 64, formula paper.
Known limits: the linear part never forgets and its weights are blunt, so far recall needs layers
that stay full. Where the source has a window of its own that is no wider than `window`, this is the
source's attention; where it is wider, tokens beyond it are seen too, which the source dropped.
Reference: Zhang et al., LoLCATs, arXiv 2410.10254. Deviations: the window slides (the official code
also has one of two fixed blocks); W starts at fixed directions under which the features already
follow the source's weights, not at random or at the identity.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import hedgehog
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._softmax import attend
from morph.plan import CacheCost

SEES = "window"
_MIX_START = math.log(0.1 / 0.9)  # of the official code: the window counts a tenth
# Far beyond any use; a checkpoint's configuration must not be able to ask for all memory
_MOST_TOKENS, _MOST_FEATURES = 2**20, 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """`window` tokens of softmax, the query's own included; `features` columns of each map."""

    window: int = 64
    features: int = 64
    formula: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        if not 1 <= self.window <= _MOST_TOKENS:
            raise RecipeError(
                f"mixer hedgehog: window is {self.window}; it counts the token itself, so give 1 "
                f"to {_MOST_TOKENS}. The default is 64."
            )
        if not 1 <= self.features <= _MOST_FEATURES:
            raise RecipeError(
                f"mixer hedgehog: features is {self.features}; give 1 to {_MOST_FEATURES}, usually "
                "the head size."
            )


class Mixer(MixerBase):
    """Hedgehog attention of a head group: `q_map`, `k_map` [H, K, features], `mix` [H] logits."""

    gates: ClassVar[tuple[str, ...]] = ("mix",)

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        size = (shape.num_heads, shape.head_dim, options.features)
        self.q_map = nn.Parameter(torch.empty(size))
        self.k_map = nn.Parameter(torch.empty(size))
        self.mix = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros."""
        if _covers_source(self.options, self.shape):
            return attend(inputs, state, self.shape, self.shape.window)
        v, window = inputs.v, self.options.window
        # under autocast norms and rotary positions leave q and k in float32
        q, k = inputs.q.to(v.dtype), inputs.k.to(v.dtype)
        before, seen = None, k
        if state is not None and state.tensors:
            held = {name: x.to(device=q.device) for name, x in state.tensors.items()}
            old, values = held["k"].to(v.dtype), held["v"].to(v.dtype)
            before = hedgehog.HedgehogState(old, values, None, held["s"], held["z"], state.seen)
            gone = hedgehog.leaving(old.shape[1], k.shape[1], window)
            seen = torch.cat([old[:, :gone], k], dim=1)
        o, after = hedgehog.forward(
            q,
            k,
            v,
            fq=self._features(q, self.q_map),
            fk=self._features(seen, self.k_map),
            window_size=window,
            mix=torch.sigmoid(_wide(self.mix)).clamp(min=1e-30),
            scale=self.shape.scale,
            softcap=self.shape.softcap,
            formula=self.options.formula,
            padding=inputs.padding,
            initial_state=before,
            output_final_state=state is not None,
        )
        if state is not None:
            assert after is not None
            # features are no part of it: they are made again from the keys when these leave
            state.tensors = {"k": after.k, "v": after.v, "s": after.s, "z": after.z}
            state.seen = after.seen
        return o

    def _features(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return phi(x) [B, T, H, 2 features] of x [B, T, H or G, K], in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            x = _wide(x)
            ratio = weight.shape[0] // x.shape[2]
            y = torch.einsum("btgk,grkf->btgrf", x, weight.to(x.dtype).unflatten(0, (-1, ratio)))
            y = y.flatten(2, 3)
            return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1)

    def reset_parameters(self) -> None:
        """Start with maps whose phi_q phi_k follows exp(scale q k), and with g at a tenth.

        The mean of exp(w x) exp(w y) over random directions w of length sqrt(K) is close to
        exp(x y) times a factor of x and one of y; here x = sqrt(scale) q and y = sqrt(scale) k.
        """
        if self.q_map.is_meta:
            return  # nothing to set, and the directions would be made on the CPU
        with torch.no_grad():
            start = math.sqrt(self.shape.scale) * _start(self.shape.head_dim, self.options.features)
            for weight in (self.q_map, self.k_map):
                weight.copy_(start.float())
            self.mix.copy_(torch.tensor(_MIX_START, dtype=torch.float32))

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """The window's keys and values, and the sums of features and of features times values."""
        if _covers_source(options, shape):
            return CacheCost(tokens=shape.window)
        sums = 2 * options.features * (shape.v_head_dim + 1)
        return CacheCost(tokens=options.window, state_elements=sums)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return the window that covers `seq_len` tokens, or the one there is if it does."""
        return dataclasses.replace(options, window=max(options.window, seq_len, 1))

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The tokens that still have all before them in the window."""
        return options.window


def _covers_source(options: Options, shape: GroupShape) -> bool:
    """Return whether the source's layer sees nothing beyond the window."""
    return shape.window is not None and options.window >= shape.window


def _start(size: int, features: int) -> torch.Tensor:
    """Return directions [K, features] of length sqrt(K), orthogonal within each K columns.

    Cosine bases under signs that differ from block to block, and that no library's random numbers
    decide.
    """
    at = torch.arange(size, dtype=torch.float64, device="cpu")
    basis = torch.cos(math.pi / size * (at[:, None] + 0.5) * at)
    basis[:, 1:] *= math.sqrt(2.0)
    blocks = range(1, math.ceil(features / size) + 1)
    signs = (torch.sin(n * (at + 1).square()).sign()[:, None] for n in blocks)
    return torch.cat([sign * basis for sign in signs], dim=1)[:, :features]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()
