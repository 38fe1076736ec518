"""What a layer of the morphable model can do instead of its own attention: modes and switch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from morph.cache import MixerCacheLayer
from morph.mixers._hybrid import HybridAttention

FULL: Literal["full"] = "full"
CHEAP: Literal["cheap"] = "cheap"
# A blend maps the heads' full and cheap outputs [B, T, H, V] to what the layer puts out.
Blend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Soft:
    """A mixture: gate * full + (1 - gate) * cheap, on the heads' outputs `[B, T, H, V]`.

    `gate` is a scalar, `[H]`, `[B, H]` or `[B, T, H]`. `full`, where given, stands in for the full
    heads' outputs of this forward (the teacher's stream, as in DuoAttention).
    """

    gate: torch.Tensor
    full: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Nudge:
    """The source's attention, `amount` of the way towards cheap: its derivative at 0 is exact.

    `amount` is zeros, shaped as the gate of `Soft`. No graph is built through the cheap mixer.
    """

    amount: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Fixed:
    """Heads' outputs `[B, T, H, V]` that stand in whatever comes in: a frozen or patched layer."""

    heads: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Patched:
    """The source's attention in which some heads put out `heads` `[B, T, H, V]` instead.

    `mask` `[H]` bool names them. Where `full` is given it stands in for the heads of this forward.
    """

    mask: torch.Tensor
    heads: torch.Tensor
    full: torch.Tensor | None = None


Mode = Literal["full", "cheap"] | Blend | Soft | Nudge | Fixed | Patched
# Called with the layer and its rotated q [B, T, H, K], k [B, T, G, K] and v [B, T, G, V]
Probe = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def weight_of(gate: torch.Tensor) -> torch.Tensor:
    """Return a scalar, `[H]`, `[B, H]` or `[B, T, H]` gate shaped for `[B, T, H, V]`."""
    if gate.dim() == 2:
        gate = gate[:, None]
    return gate[..., None] if gate.dim() else gate


class Switch(nn.Module):
    """Stands at `self_attn`: runs the source, the cheap mixer, or something made of both."""

    def __init__(self, source: nn.Module, cheap: HybridAttention, exact: HybridAttention) -> None:
        super().__init__()
        self.source, self.cheap, self.exact = source, cheap, exact
        self.mode: Mode = FULL
        self.prime: MixerCacheLayer | None = None
        self.probe: Probe | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        morph_prefix: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Return what the chosen mode puts out for `[B, T, D]`."""
        if self.prime is not None:
            return self._remember(hidden_states, position_embeddings, past_key_values), None
        if self.probe is not None:
            found = self.exact.projected(hidden_states, position_embeddings)
            self.probe(self.exact.layer_idx, *found.stages["rotated"], found.v)
        if self.mode == FULL:
            return self.source(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        if self.mode == CHEAP:
            return self.cheap(hidden_states, position_embeddings, past_key_values=morph_prefix)
        return self.exact.output(self._heads(hidden_states, position_embeddings)), None

    def _heads(self, hidden: torch.Tensor, positions: Any) -> torch.Tensor:
        """Return the heads' outputs `[B, T, H, V]` under a mode that is neither full nor cheap."""
        mode = self.mode
        if isinstance(mode, Fixed):
            return mode.heads
        given = mode.full if isinstance(mode, (Soft, Patched)) else None
        if isinstance(mode, Patched) and given is not None:
            return torch.where(mode.mask[:, None].to(given.device), mode.heads, given)
        shared = self.exact.projected(hidden, positions)
        full = self.exact.mix(hidden, positions, projected=shared) if given is None else given
        if isinstance(mode, Patched):
            return torch.where(mode.mask[:, None].to(full.device), mode.heads, full)
        if isinstance(mode, Nudge):
            with torch.no_grad():
                cheap = self.cheap.mix(hidden, positions, projected=shared)
                step = cheap - full
            return full + weight_of(mode.amount).to(full.dtype) * step
        cheap = self.cheap.mix(hidden, positions, projected=shared)
        if isinstance(mode, Soft):
            return cheap + weight_of(mode.gate).to(cheap.dtype) * (full - cheap)
        assert callable(mode)
        return mode(full, cheap)

    def _remember(self, hidden: torch.Tensor, positions: Any, cache: Any) -> torch.Tensor:
        """Run tokens on which full and cheap agree, filling the caches of both."""
        found = self.cheap.projected(hidden, positions)
        k, v = found.stages["rotated"][1], found.v
        cache.update(k.transpose(1, 2), v.transpose(1, 2), self.cheap.layer_idx)
        view = SimpleNamespace(layers={self.cheap.layer_idx: self.prime})
        return self.cheap.output(self.cheap.mix(hidden, positions, view, projected=found))
