"""The source's own softmax attention, for the heads of a mixed layer that keep it.

What it does: causal softmax attention over everything, or over the source's own window where the
source slides; the source's scale and score cap apply. A layer whose heads all keep full attention
is not replaced at all, so this mixer only serves layers in which heads differ.
Cost: what full attention costs, for these heads alone; every key and value is kept.
Options: none.
Known limits: none.
Reference: Vaswani et al., Attention Is All You Need, arXiv 1706.03762.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from morph.cache import State
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._softmax import attend
from morph.plan import CacheCost

LINEAR = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """Full attention has no options."""


class Mixer(MixerBase):
    """Full attention of a head group; the identity under any options."""

    dense = True

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros."""
        return attend(inputs, state, self.shape, self.shape.window)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """Every token, or the source's own window of them."""
        return CacheCost(tokens=shape.window)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return the options: they always give the source's attention."""
        return options

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """Every token comes out as in the source."""
        return sys.maxsize
