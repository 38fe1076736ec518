"""The contract of a mixer: a module that serves a group of heads of one layer.

A file in this folder has two names: `Options`, a frozen keyword-only dataclass, and `Mixer`, a
subclass of `MixerBase`. The same `forward` serves training, prefill and decode: with a `State` it
continues from what the state remembers and updates it, without one it starts from nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from morph.cache import State
from morph.plan import CacheCost


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """The shape of one head group: H query heads, G KV heads, sizes K and V, and the layer.

    `heads` are the query-head indices in the layer, `num_attention_heads` all heads of the layer,
    `window` is the source's own sliding window in tokens or None, `scale` multiplies the scores,
    `softcap` bounds them (None: unbounded). `norm_eps` is the source's `rms_norm_eps`, for norms
    that a stock architecture computes with it.
    """

    layer_idx: int
    num_hidden_layers: int
    heads: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int  # G: KV heads handed to this group; H is a multiple of G
    head_dim: int
    v_head_dim: int
    hidden_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    norm_eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        """H: query heads of this group."""
        return len(self.heads)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a mixer sees of one forward.

    q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`, as far on their way as the mixer `wants`
    them: `projected`, then normed by the source's q/k norms (`raw`), then `rotated`.
    hidden `[B, T, D]`: the layer's input. padding `[B, P + T]` bool, True for real tokens, over the
    `P` tokens seen before and the `T` of this call; None: all real. `earlier` has q and k of every
    stage by name, for a mixer made of others. `shared` is what layers leave for later layers of the
    same forward, under keys of their own; None where a layer runs alone.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor
    padding: torch.Tensor | None = None
    earlier: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    shared: MutableMapping[Any, Any] | None = None


# What the source computes for a group of heads: its inputs, and the heads' outputs [B, T, H, V]
Seen = tuple[Inputs, torch.Tensor]
Wants = Literal["projected", "raw", "rotated"]


class MixerBase(nn.Module, ABC):
    """Base of all mixers; concrete ones are final. `wants` may be set per instance."""

    wants: Wants = "rotated"

    def __init__(self, shape: GroupShape, options: Any) -> None:
        super().__init__()
        self.shape, self.options = shape, options

    @abstractmethod
    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs `[B, T, H, V]`; rows of padding may hold anything finite.

        A state is read and updated in place, `state.seen` included.
        """

    def reset_parameters(self) -> None:
        """Set every parameter of the mixer's own to its start value (in place, any device).

        Called after construction and again when a checkpoint lacks a parameter.
        """

    def inherit(self, source: nn.Module) -> None:
        """Start the mixer's own parameters from the source attention module, where that helps.

        Called once, after `reset_parameters`, when a source model is converted.
        """

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Set the mixer's own parameters from what the source computes on a few batches.

        Called once, after `inherit`, where the source can be run. The default changes nothing. A
        layer that comes out farther from the source goes back to its start, but for `settings`.
        """

    @classmethod
    def calibration_length(cls, options: Any) -> int:
        """Return how many tokens long the rows should be that `calibrate` is shown."""
        return 512

    def progress(self, share: float) -> None:
        """Be told, before every step of training, which share of all its tokens is done.

        1 is the end, and what a mixer is outside of training. The default does nothing.
        """

    @classmethod
    def asks(cls, options: Any) -> str:
        """Return what an option asks of `calibrate`, in words; empty where it asks nothing."""
        return ""

    @classmethod
    def follows(cls, options: Any) -> tuple[int, ...]:
        """Return the earlier layers whose mixer, the same with its own index, must run before."""
        return ()

    @classmethod
    def cannot_follow(
        cls, options: Any, heads: tuple[int, ...], owner: Any, owner_heads: tuple[int, ...]
    ) -> str:
        """Return why a group with `options` cannot follow one with options `owner`, or nothing."""
        return ""

    @classmethod
    @abstractmethod
    def cache_cost(cls, options: Any, shape: GroupShape) -> CacheCost:
        """Return what this mixer keeps between tokens."""

    @classmethod
    def decode_bytes(cls, options: Any, shape: GroupShape, seq_len: int, itemsize: int) -> int:
        """Return the bytes of state read and written for one decoded token of one sequence."""
        cost = cls.cache_cost(options, shape)
        bounds = [b for b in (seq_len, cost.tokens, shape.window) if b is not None]
        token = cost.token_bytes((shape.head_dim + shape.v_head_dim) * itemsize)
        recurrent = 2 * cost.state_bytes(shape.num_heads, shape.num_key_value_heads)
        return round(min(bounds) * token * shape.num_key_value_heads) + recurrent

    @classmethod
    def identity(cls, options: Any, seq_len: int) -> Any | None:
        """Return options under which `seq_len` tokens come out as full attention; None: no such."""
        return None

    @classmethod
    def exact_prefix(cls, options: Any) -> int:
        """Return how many leading tokens come out exactly as full attention (0: none)."""
        return 0

    @classmethod
    def uses(cls, options: Any) -> tuple[str, ...]:
        """Return the names of the mixers that this one is made of: `Inputs.earlier` is for them."""
        return ()

    # Names (relative to the mixer) of parameters that get their own learning rate, no weight decay
    gates: ClassVar[tuple[str, ...]] = ()
    # Whether every token is read: a layer with such a mixer counts as one that keeps attention
    dense: ClassVar[bool] = False
    # Names of parameters that `calibrate` sets to what an option asks for, near the source or not
    settings: ClassVar[tuple[str, ...]] = ()
