"""The one module that replaces `self_attn`: source projections, and a mixer per head group.

Projections, norms and rotary positions stay the source's own modules under their own names, so
source weights load straight in. Training, prefill and decode take the same path; documents packed
into one row are mixed each on its own, whatever the mixer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from morph import registry, strict
from morph.cache import MixerCacheLayer, State
from morph.errors import PlanError, escape
from morph.families._family import Family
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._packed import Documents
from morph.plan import Geometry, HeadGroup, LayerPlan


@dataclass(frozen=True, kw_only=True)
class Projected:
    """What the projections of one layer give: v [B, T, G, V], and q and k at each of their stages.

    Stages are `projected`, `raw` (after the q/k norms) and `rotated`.
    """

    v: torch.Tensor
    stages: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Fusion(nn.Module):
    """Scale-normalised fusion: every head at unit root mean square, times its own `gain` [H].

    Source: HydraHead (arXiv 2606.20097). Gains start at the heads' mean root mean square in the
    source where that can be measured (`calibrate`), else at 1.
    """

    gates: ClassVar[tuple[str, ...]] = ("gain",)

    def __init__(self, heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V] at their gains."""
        return _linear.head_norm(outputs, self.eps) * self.gain.to(outputs.dtype)[:, None]

    def reset_parameters(self) -> None:
        """Set every gain to 1."""
        nn.init.ones_(self.gain)

    def calibrate(self, outputs: Sequence[torch.Tensor]) -> None:
        """Set the gains to the mean over tokens of the heads' root mean square."""
        sizes = [x.double().square().mean(dim=-1).sqrt().mean(dim=(0, 1)) for x in outputs]
        with torch.no_grad():
            self.gain.copy_(torch.stack(sizes).mean(dim=0))


@dataclass(frozen=True, kw_only=True)
class Context:
    """What one forward of the whole model tells every converted layer.

    padding `[B, P + T]` bool, True for real tokens (None: all real). `documents` are those packed
    into the rows, which start from nothing each (None: every row is one). `shared` carries state
    from one layer to another within the forward.
    """

    padding: torch.Tensor | None = None
    documents: Documents | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


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
        eps = float(getattr(self.config, "rms_norm_eps", None) or 1e-6)
        self.mixers = nn.ModuleList(
            make_mixer(group, geometry, layer_idx, float(source.scaling), softcap, eps)
            for group in layer.groups
        )
        heads = geometry.num_attention_heads
        self.fusion = Fusion(heads, eps) if layer.fusion == "scale" else None

    @property
    def own(self) -> dict[str, nn.Module]:
        """The modules whose parameters the source does not have, by their name in this one."""
        found = {f"mixers.{i}": mixer for i, mixer in enumerate(self.mixers)}
        return found if self.fusion is None else {**found, "fusion": self.fusion}

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in this module, parameter) of everything that the source does not have."""
        for name, module in self.own.items():
            for sub, parameter in module.named_parameters():
                yield f"{name}.{sub}", parameter

    def reset_parameters(self) -> None:
        """Set the mixers' own parameters to their start values; projections are left alone."""
        for module in self.own.values():
            module.reset_parameters()  # type: ignore[operator]

    def calibrate(self, batches: Sequence[tuple[torch.Tensor, Any, torch.Tensor]]) -> None:
        """Start the mixers from what the source computes.

        Each batch is the layer's input [B, T, D], the positions' embeddings, and the heads' outputs
        [B, T, H, V] of the source's attention.
        """
        with torch.no_grad():
            seen = [(x, self.projected(x, at), heads) for x, at, heads in batches]
            for i, mixer in enumerate(self.mixers):
                own = self.heads[i]
                given = [(self._inputs(i, x, p, None), self._pick(y, own)) for x, p, y in seen]
                mixer.calibrate(given)
            if self.fusion is not None:
                self.fusion.calibrate([heads for _, _, heads in batches])

    def projected(self, hidden_states: torch.Tensor, position_embeddings: Any) -> Projected:
        """Return q `[B, T, H, K]`, k `[B, T, G, K]` and v `[B, T, G, V]`, q and k at each stage.

        Stages that no mixer of this layer wants are left out.
        """
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
        stages = {"projected": (self._split(q), self._split(k))}
        v, wanted = v.unflatten(-1, (-1, shape.v_head_dim)), self._wanted()
        if wanted == "projected":
            return Projected(v=v, stages=stages)
        if fam.norm_scope == "projection":
            q, k = self._norm(fam.q_norm, q), self._norm(fam.k_norm, k)
        q, k = self._split(q), self._split(k)
        if fam.norm_scope == "head":
            q, k = self._norm(fam.q_norm, q), self._norm(fam.k_norm, k)
        stages["raw"] = q, k
        if wanted == "raw":
            return Projected(v=v, stages=stages)
        if self.rotates and position_embeddings is not None:
            q, k = self._rotary(q, k, *position_embeddings, unsqueeze_dim=2)
        stages["rotated"] = q, k
        return Projected(v=v, stages=stages)

    def _wanted(self) -> str:
        """Return the last stage that any mixer of this layer looks at."""
        wants = {m.wants for m in self.mixers}
        if "rotated" in wants or any(m.uses(m.options) for m in self.mixers):
            return "rotated"
        return "raw" if "raw" in wants else "projected"

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
        found = projected or self.projected(hidden_states, position_embeddings)
        padding = morph_context.padding if morph_context is not None else None
        documents = morph_context.documents if morph_context is not None else None
        shared = morph_context.shared if morph_context is not None else None
        outputs = []
        for i, mixer in enumerate(self.mixers):
            inputs = self._inputs(i, hidden_states, found, padding, shared)
            if documents is None:
                outputs.append(mixer(inputs, self._state(past_key_values, i)))
            else:
                outputs.append(documents.each(mixer, inputs))
        if len(outputs) == 1:
            heads = outputs[0]
        else:
            heads = self._pick(torch.cat(outputs, dim=2), self.order)
        return heads if self.fusion is None else self.fusion(heads)

    def _inputs(
        self,
        i: int,
        hidden: torch.Tensor,
        found: Projected,
        padding: torch.Tensor | None,
        shared: dict[Any, Any] | None = None,
    ) -> Inputs:
        """Return what the mixer of group `i` sees."""
        heads, kv_heads, mixer = self.heads[i], self.kv_heads[i], self.mixers[i]
        several = bool(mixer.uses(mixer.options))
        stages = {
            name: (self._pick(q, heads), self._pick(k, kv_heads))
            for name, (q, k) in found.stages.items()
            if several or name == mixer.wants
        }
        q, k = stages[mixer.wants]
        v = self._pick(found.v, kv_heads)
        earlier = stages if several else None
        return Inputs(q=q, k=k, v=v, hidden=hidden, padding=padding, earlier=earlier, shared=shared)

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

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.geometry.head_dim))

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


def mixer_module(name: str) -> Any:
    """Return the module of a mixer; raise PlanError where it is none, UnknownName where unknown."""
    module = registry.load("mixers", name)
    lacking = [n for n in ("Options", "Mixer") if not hasattr(module, n)]
    if lacking:
        raise PlanError(f"{escape(name)!r} is no mixer: it has no {lacking[0]!r}.")
    return module


def make_mixer(
    group: HeadGroup,
    geometry: Geometry,
    layer_idx: int,
    scale: float,
    softcap: float | None,
    norm_eps: float = 1e-6,
) -> MixerBase:
    """Return the mixer of a head group, its parameters at their start values.

    Raises UnknownName for a mixer that does not exist and PlanError for options it does not have.
    """
    module = mixer_module(group.mixer)
    where = f"layer {layer_idx}: mixer {group.mixer}"
    options = strict.build(module.Options, group.options, where, PlanError)
    shape = group_shape(group, geometry, layer_idx, scale, softcap, norm_eps)
    mixer = module.Mixer(shape, options)
    mixer.reset_parameters()
    return mixer


def group_shape(
    group: HeadGroup,
    geometry: Geometry,
    layer_idx: int,
    scale: float = 1.0,
    softcap: float | None = None,
    norm_eps: float = 1e-6,
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
        norm_eps=norm_eps,
    )
