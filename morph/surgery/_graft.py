"""Put a plan into a live model, and take it out again.

`graft` replaces `self_attn` in the layers a plan converts and hooks the base model so that every
converted layer learns of padding and finds its own kind of cache. The source's tensors are used,
not copied. `modeling` builds registered classes on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from morph import strict
from morph.cache import adopt
from morph.errors import MismatchError, PlanError, UnsupportedModel
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.mixers._hybrid import (
    Context,
    HybridAttention,
    group_shape,
    make_mixer,
    mixer_module,
)
from morph.mixers._packed import Documents
from morph.plan import DTYPE_BYTES, CacheCost, Geometry, HeadGroup, LayerPlan, Plan


@dataclass(kw_only=True)
class Graft:
    """What `graft` changed, and how to undo it."""

    base: nn.Module
    family: Family
    plan: Plan
    originals: dict[int, nn.Module]
    handle: Any

    def undo(self) -> None:
        """Put the source's attention modules back; the model is as it was."""
        layers = layers_of(self.base, self.family)
        for i, module in self.originals.items():
            setattr(layers[i], self.family.attention, module)
        self.handle.remove()
        self.originals = {}


def base_of(model: nn.Module) -> nn.Module:
    """Return the decoder without its head: `model.model` of a causal LM, or the model itself."""
    return getattr(model, "base_model", model)


def layers_of(base: nn.Module, family: Family) -> nn.ModuleList:
    """Return the decoder layers."""
    found: Any = base
    for name in family.layers.split("."):
        found = getattr(found, name)
    return found


def attention_of(base: nn.Module, family: Family, layer_idx: int) -> nn.Module:
    """Return the attention module of one layer, source or hybrid."""
    return getattr(layers_of(base, family)[layer_idx], family.attention)


def geometry_of(model: nn.Module, family: Family | None = None) -> Geometry:
    """Return the attention geometry of a live model."""
    config = model.config.to_dict()
    return (family or family_of(config)).geometry(config)


def hybrid_layers(model: nn.Module) -> dict[int, HybridAttention]:
    """Return the converted attention modules of a model by layer index."""
    return {m.layer_idx: m for m in model.modules() if isinstance(m, HybridAttention)}


def graft(model: nn.Module, family: Family, plan: Plan, *, inherit: bool = False) -> Graft:
    """Replace the attention of every layer that `plan` converts, in place, sharing all tensors.

    `inherit` also lets every mixer start from the source attention's weights.
    Raises MismatchError when the plan was made for another shape of model.
    """
    base = base_of(model)
    geometry = geometry_of(base, family)
    if geometry != plan.geometry:
        raise MismatchError(f"the plan was made for {plan.geometry}, the model has {geometry}.")
    check_followed(plan)
    layers, originals = layers_of(base, family), {}
    for i in plan.replaced_layers:
        source = getattr(layers[i], family.attention)
        if not isinstance(source, family.part(family.attention_class)):
            raise UnsupportedModel(
                f"layer {i}: attention is a {type(source).__name__}; family "
                f"{family.model_type} expects {family.attention_class}."
            )
        hybrid = HybridAttention(source, family, geometry, plan.layers[i], i)
        for module in hybrid.own.values():
            module.to(next(source.parameters()).device)
        for mixer in hybrid.mixers if inherit else ():
            mixer.inherit(source)
        hybrid.train(source.training)
        originals[i] = source
        setattr(layers[i], family.attention, hybrid)
    handle = inform(base, plan.replaced_layers)
    return Graft(base=base, family=family, plan=plan, originals=originals, handle=handle)


def inform(base: nn.Module, swapped: tuple[int, ...]) -> Any:
    """Hook the base model so that converted layers get their context and cache; return the handle.

    The hook makes the cache where transformers would have, gives it the layers that converted
    layers need while it is still empty, and passes padding down by keyword.
    """
    names = tuple(inspect.signature(type(base).forward).parameters)[1:]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {**dict(zip(names, args)), **kwargs}
        if "morph_context" in kwargs:
            return (), kwargs
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None and len(cache.layers) else 0
        found = context(kwargs, past, cache)
        if found.documents is not None:
            kwargs["use_cache"] = False  # what a border has cut off cannot be gone on with
        elif cache is None and _wants_cache(module, kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=module.config)
        if cache is not None and past == 0:
            adopt(cache, swapped, module.config.num_hidden_layers)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping) or (mask is not None and mask.dim() == 4):
            # masks made ahead for a static cache have its full size; let the model make its own
            kwargs["attention_mask"] = found.padding
        kwargs["morph_context"] = found
        return (), kwargs

    return base.register_forward_pre_hook(before, with_kwargs=True)


def _wants_cache(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    wanted = kwargs.get("use_cache")
    if wanted is None:
        wanted = getattr(module.config, "use_cache", False)
    checkpointing = module.training and getattr(module, "gradient_checkpointing", False)
    return bool(wanted) and not checkpointing


def context(kwargs: Mapping[str, Any], past: int, cache: Cache | None = None) -> Context:
    """Return the Context of a forward called with `kwargs` after `past` tokens.

    Where position ids start again inside a row and there is neither mask nor cache, the row holds
    packed documents, as transformers takes it. Raises MismatchError for masks that do not fit.
    """
    ids = kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    length = past + tokens.shape[1]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Mapping):  # made ahead by generate(), one for every kind of layer
        mask = mask.get("full_attention")
    if mask is None:
        return Context(documents=None if cache is not None else _documents(kwargs, tokens.shape[0]))
    if mask.dim() == 4:
        mask = _padding_of(mask, past, length)
    real = mask[:, :length].to(torch.bool)
    if real.shape[1] != length:
        raise MismatchError(
            f"attention_mask covers {real.shape[1]} tokens; {past} were seen and "
            f"{length - past} are given."
        )
    return Context(padding=None if bool(real.all()) else real)


def _padding_of(mask: torch.Tensor, past: int, length: int) -> torch.Tensor:
    """Return the padding `[B, S]` behind a causal mask `[B, 1, T, S]`, bool or additive.

    Raises MismatchError for any other mask: mixers know padding only.
    """
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :length]
    real = seen[:, -1]  # the last query sees every real key
    causal = torch.ones(length - past, length, dtype=torch.bool, device=mask.device).tril(past)
    rows = real[:, past:, None]
    if not torch.equal(seen & rows, causal & real[:, None] & rows):
        raise MismatchError(
            "attention_mask has four dimensions and is not causal with padding; converted layers "
            "cannot honour it. Give a two-dimensional mask."
        )
    return real


def _documents(kwargs: Mapping[str, Any], rows: int) -> Documents | None:
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[-1] < 2:
        return None
    return Documents.of(positions.expand(max(rows, len(positions)), -1))


def resolve_costs(plan: Plan) -> Plan:
    """Return the plan with options checked and every group's `CacheCost` filled in.

    Raises UnknownName and PlanError for mixers and options that do not exist.
    """
    layers = []
    for i, layer in enumerate(plan.layers):
        groups = []
        for group in layer.groups:
            options, cost = group_cost(group, plan.geometry, i)
            groups.append(
                HeadGroup(mixer=group.mixer, heads=group.heads, options=options, cache=cost)
            )
        layers.append(LayerPlan(groups=tuple(groups), fusion=layer.fusion))
    resolved = Plan(
        model_type=plan.model_type,
        geometry=plan.geometry,
        layers=tuple(layers),
        scores_digest=plan.scores_digest,
    )
    check_followed(resolved)
    return resolved


def check_followed(plan: Plan) -> None:
    """Raise PlanError where a mixer follows a layer that has not what it needs (`follows`)."""
    for i, layer in enumerate(plan.layers):
        for group in layer.groups:
            for owner in _followed(group, i):
                where = f"layer {i}: mixer {group.mixer} follows layer {owner}"
                if not 0 <= owner < i:
                    raise PlanError(f"{where}; it can follow an earlier layer only, or none.")
                same = [g for g in plan.layers[owner].groups if g.mixer == group.mixer]
                owners = [g for g in same if not _followed(g, owner)]
                if not owners:
                    raise PlanError(
                        f"{where}, which has no {group.mixer} of its own. Let it follow a layer "
                        "that has, or none."
                    )
                reasons = [_cannot_follow(group, g) for g in owners]
                if all(reasons):
                    raise PlanError(f"{where}: {reasons[0]}")


def _cannot_follow(group: HeadGroup, owner: HeadGroup) -> str:
    module = mixer_module(group.mixer)
    options, theirs = (
        strict.build(module.Options, g.options, f"mixer {g.mixer}", PlanError)
        for g in (group, owner)
    )
    return module.Mixer.cannot_follow(options, group.heads, theirs, owner.heads)


def _followed(group: HeadGroup, layer_idx: int) -> tuple[int, ...]:
    if group.mixer == "full":  # files written by --with-code lack it where no layer mixes heads
        return ()
    module = mixer_module(group.mixer)
    where = f"layer {layer_idx}: mixer {group.mixer}"
    options = strict.build(module.Options, group.options, where, PlanError)
    return module.Mixer.follows(options)


def group_cost(
    group: HeadGroup, geometry: Geometry, layer_idx: int
) -> tuple[dict[str, Any], CacheCost]:
    """Return a group's complete options and what its mixer keeps."""
    module = mixer_module(group.mixer)
    where = f"layer {layer_idx}: mixer {group.mixer}"
    options = strict.build(module.Options, group.options, where, PlanError)
    cost = module.Mixer.cache_cost(options, group_shape(group, geometry, layer_idx))
    return strict.plain(options), cost


def exact_prefix(group: HeadGroup) -> int:
    """Return how many leading tokens a group's mixer computes as the source does."""
    module = mixer_module(group.mixer)
    options = strict.build(module.Options, group.options, f"mixer {group.mixer}", PlanError)
    return module.Mixer.exact_prefix(options)


def decode_bytes(plan: Plan, seq_len: int, dtype: str = "bfloat16") -> int:
    """Return the bytes of generation state that one decoded token reads and writes.

    After `seq_len` tokens of one sequence. Mixers that keep every token may read some of them only.
    Raises PlanError for mixers and options that do not exist, and for an unknown dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise PlanError(f"dtype {dtype!r} is unknown. There are: {', '.join(DTYPE_BYTES)}.")
    total = 0
    for i, layer in enumerate(plan.layers):
        for group in layer.groups:
            module = mixer_module(group.mixer)
            where = f"layer {i}: mixer {group.mixer}"
            options = strict.build(module.Options, group.options, where, PlanError)
            shape = group_shape(group, plan.geometry, i)
            total += module.Mixer.decode_bytes(options, shape, seq_len, DTYPE_BYTES[dtype])
    return total


def mixer_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of the mixers' own parameters, under their state-dict names."""
    for name, module in model.named_modules():
        if isinstance(module, HybridAttention):
            for sub, parameter in module.own_parameters():
                yield f"{name}.{sub}", parameter


def own_parameter_names(family: Family, plan: Plan) -> list[str]:
    """Return the state-dict names of the mixers' own parameters in a causal LM with this plan."""
    found = []
    for i in plan.replaced_layers:
        stem = f"model.{family.layers}.{i}.{family.attention}"
        for j, group in enumerate(plan.layers[i].groups):
            with torch.device("meta"):
                mixer = make_mixer(group, plan.geometry, i, 1.0, None)
            found += [f"{stem}.mixers.{j}.{name}" for name, _ in mixer.named_parameters()]
        if plan.layers[i].fusion == "scale":
            found.append(f"{stem}.fusion.gain")
    return found
