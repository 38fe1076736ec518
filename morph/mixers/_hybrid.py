"""The one module that replaces `self_attn`: source projections, and a mixer per head group.

Projections, norms and rotary positions stay the source's own modules under their own names, so
source weights load straight in. Training, prefill and decode take the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from morph import registry, strict
from morph.cache import MixerCacheLayer, State
from morph.errors import PlanError
from morph.families._family import Family
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.plan import Geometry, HeadGroup, LayerPlan

# q, k and v without positions, then q and k rotated
Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What one forward of the whole model tells every converted layer.

    padding `[B, P + T]` bool, True for real tokens (None: all real). `shared` carries state from
    one layer to another within the forward.
    """

    padding: torch.Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)


class HybridAttention(nn.Module):
    """Attention whose head groups each have their own mixer.

    Takes and returns what the source's `self_attn` does: hidden states `[B, T, D]` in,
    `([B, T, D], None)` out. `morph_context` carries padding; without it every token is real.
    """

    def __init__(
        self,
        source: nn.Module,
        family: Family,
        geometry: Geometry,
        layer: LayerPlan,
        layer_idx: int,
    ) -> None:
        super().__init__()
        self.family, self.geometry, self.layer_idx = family, geometry, layer_idx
        self.config, self.head_dim = source.config, geometry.head_dim
        names = [family.o, *([family.qkv] if family.qkv else [family.q, family.k, family.v])]
        names += [n for n in (family.q_norm, family.k_norm) if n]
        for name in names:
            self.add_module(name, getattr(source, name))
        self.rotates = bool(getattr(source, family.rotary_switch)) if family.rotary_switch else True
        self._rotary = family.part("apply_rotary_pos_emb")
        self.heads = [g.heads for g in layer.groups]
        self.kv_heads = [geometry.kv_heads(g.heads) for g in layer.groups]
        joined = [h for heads in self.heads for h in heads]
        self.order = sorted(range(len(joined)), key=joined.__getitem__)
        softcap = getattr(source, family.softcap, None) if family.softcap else None
        self.mixers = nn.ModuleList(
            make_mixer(group, geometry, layer_idx, float(source.scaling), softcap)
            for group in layer.groups
        )

    def reset_parameters(self) -> None:
        """Set the mixers' own parameters to their start values; projections are left alone."""
        for mixer in self.mixers:
            mixer.reset_parameters()

    def project(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q `[B, T, H, K]`, k `[B, T, G, K]`, v `[B, T, G, V]`: projected and normed."""
        fam, shape = self.family, self.geometry
        q_rows = shape.num_attention_heads * shape.head_dim
        k_rows = shape.num_key_value_heads * shape.head_dim
        if fam.qkv:
            fused = getattr(self, fam.qkv)(hidden_states)
            q, k, v = fused.split(
                [q_rows, k_rows, shape.num_key_value_heads * shape.v_head_dim], dim=-1
            )
        else:
            q, k, v = (getattr(self, name)(hidden_states) for name in (fam.q, fam.k, fam.v))
        if fam.norm_scope == "projection":
            q, k = self._norm(fam.q_norm, q), self._norm(fam.k_norm, k)
        lead = hidden_states.shape[:-1]
        q = q.view(*lead, shape.num_attention_heads, shape.head_dim)
        k = k.view(*lead, shape.num_key_value_heads, shape.head_dim)
        v = v.view(*lead, shape.num_key_value_heads, shape.v_head_dim)
        if fam.norm_scope == "head":
            q, k = self._norm(fam.q_norm, q), self._norm(fam.k_norm, k)
        return q, k, v

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k with the source's rotary positions applied, where this layer has them."""
        if not self.rotates or position_embeddings is None:
            return q, k
        return self._rotary(q, k, *position_embeddings, unsqueeze_dim=2)

    def projected(self, hidden_states: torch.Tensor, position_embeddings: Any) -> Projected:
        """Return q, k, v as `project` does, and q and k rotated."""
        q, k, v = self.project(hidden_states)
        return (q, k, v, *self.rotate(q, k, position_embeddings))

    def mix(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        morph_context: Context | None = None,
        projected: Projected | None = None,
    ) -> torch.Tensor:
        """Return the heads' outputs `[B, T, H, V]` in head order, before the output projection.

        `projected` are the projections of the same hidden states, where they are at hand.
        """
        q, k, v, *rotated = projected or self.projected(hidden_states, position_embeddings)
        padding = morph_context.padding if morph_context is not None else None
        outputs = []
        for i, mixer in enumerate(self.mixers):
            qi, ki = rotated if mixer.wants == "rotated" else (q, k)
            inputs = Inputs(
                q=self._pick(qi, self.heads[i]),
                k=self._pick(ki, self.kv_heads[i]),
                v=self._pick(v, self.kv_heads[i]),
                hidden=hidden_states,
                padding=padding,
            )
            outputs.append(mixer(inputs, self._state(past_key_values, i)))
        if len(outputs) == 1:
            return outputs[0]
        return self._pick(torch.cat(outputs, dim=2), self.order)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        morph_context: Context | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return (attention output `[B, T, D]`, None). Transformers' own mask is not used."""
        heads = self.mix(hidden_states, position_embeddings, past_key_values, morph_context)
        return self.output(heads), None

    def output(self, heads: torch.Tensor) -> torch.Tensor:
        """Return the output projection `[B, T, D]` of head outputs `[B, T, H, V]`."""
        return getattr(self, self.family.o)(heads.flatten(2))

    def _norm(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)(x) if name else x

    def _state(self, cache: Any, group: int) -> State | None:
        if cache is None:
            return None
        layer = cache.layers[self.layer_idx]
        if not isinstance(layer, MixerCacheLayer):
            raise RuntimeError(
                f"layer {self.layer_idx} is converted, but its cache is a {type(layer).__name__}"
            )
        return layer.state(group)

    @staticmethod
    def _pick(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """Return the heads `heads` of `x`, as a view where they are neighbours."""
        first, count = heads[0], len(heads)
        if list(heads) == list(range(first, first + count)):
            return x if count == x.shape[2] else x[:, :, first : first + count]
        return x[:, :, list(heads)]


def make_mixer(
    group: HeadGroup,
    geometry: Geometry,
    layer_idx: int,
    scale: float,
    softcap: float | None,
) -> MixerBase:
    """Return the mixer of a head group, its parameters at their start values.

    Raises UnknownName for a mixer that does not exist and PlanError for options it does not have.
    """
    module = registry.load("mixers", group.mixer)
    where = f"layer {layer_idx}: mixer {group.mixer}"
    options = strict.build(module.Options, group.options, where, PlanError)
    mixer = module.Mixer(group_shape(group, geometry, layer_idx, scale, softcap), options)
    mixer.reset_parameters()
    return mixer


def group_shape(
    group: HeadGroup,
    geometry: Geometry,
    layer_idx: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> GroupShape:
    """Return the shape that a mixer of this head group sees."""
    return GroupShape(
        layer_idx=layer_idx,
        num_hidden_layers=geometry.num_hidden_layers,
        heads=group.heads,
        num_attention_heads=geometry.num_attention_heads,
        num_key_value_heads=len(geometry.kv_heads(group.heads)),
        head_dim=geometry.head_dim,
        v_head_dim=geometry.v_head_dim,
        hidden_size=geometry.hidden_size,
        scale=scale,
        window=geometry.windows[layer_idx],
        softcap=softcap,
    )
