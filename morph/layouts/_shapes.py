"""The shape of one layer's softmax attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: the first `dim` numbers of a head turn, in pairs.

    A pair is (i, i + dim / 2), or (2 i, 2 i + 1) where `interleaved`.
    """

    dim: int
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The softmax attention of one layer; `rotary` is None where q and k carry no positions.

    `qk_norm` says that a norm stands between the projections and the scores.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary: Rotary | None = None
    qk_norm: bool = False

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads
