"""Registered classes, so that `AutoModelForCausalLM` loads what we wrote.

For every family there is a `morph_<model_type>` config, base model and causal LM, made on demand
by subclassing the family's own classes. The plan travels in `config.morph`. The model code is the
family's; only the attention of converted layers is replaced.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import nn

from morph import plan as planning
from morph import registry, strict, surgery
from morph.errors import CheckpointError
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.mixers._hybrid import HybridAttention
from morph.plan import Plan

PREFIX = "morph_"


def plan_of(config: Any) -> Plan:
    """Return the plan that a hybrid's config carries; raise CheckpointError where it has none."""
    data = getattr(config, "morph", None)
    if not isinstance(data, dict) or "plan" not in data:
        raise CheckpointError(f"config of {config.model_type}: key 'morph.plan' is missing.")
    plan = planning.loads_plan(json.dumps(data["plan"]), "config.morph.plan")
    registry.refuse_imports("mixers", plan.mixers, "config.morph.plan")
    return plan


class _Morph:
    """What hybrid classes add to a family's own: the graft, and start values for new tensors."""

    def initialize_weights(self) -> None:
        """Initialise as transformers does, then give mixers' missing tensors their start values."""
        super().initialize_weights()  # type: ignore[misc]
        for module in surgery.hybrid_layers(self).values():  # type: ignore[arg-type]
            _reset_missing(module)


def _reset_missing(hybrid: HybridAttention) -> None:
    """Call every `reset_parameters`, keeping the tensors that a checkpoint has already filled."""
    loaded = {
        name: p.detach().clone()
        for name, p in hybrid.own_parameters()
        if getattr(p, "_is_hf_initialized", False)
    }
    hybrid.reset_parameters()
    with torch.no_grad():
        for name, parameter in hybrid.own_parameters():
            if name in loaded:
                parameter.copy_(loaded[name])


@cache
def classes(model_type: str) -> tuple[type, type, type]:
    """Return (config, base model, causal LM) classes for a family's hybrids, registering them."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    family: Family = registry.load("families", model_type).FAMILY
    config_class = type(
        f"Morph{family.config_class}",
        (family.part(family.config_class),),
        {"model_type": PREFIX + family.model_type, "__module__": __name__},
    )
    base_class, causal_class = model_classes(family, config_class, __name__)
    for made in (config_class, base_class, causal_class):
        globals()[made.__name__] = made  # so that pickling and deepcopy find them
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, base_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)
    return config_class, base_class, causal_class


def model_classes(family: Family, config_class: type, module: str) -> tuple[type, type]:
    """Return (base model, causal LM) classes of a family's hybrids, as if defined in `module`.

    Nothing is registered: checkpoints with remote code make their classes here too.
    """
    source_base, source_causal = family.part(family.base_class), family.part(family.causal_class)

    def base_init(self: Any, config: Any) -> None:
        plan = plan_of(config)
        source_base.__init__(self, config)
        surgery.graft(self, family, plan)

    def causal_init(self: Any, config: Any) -> None:
        # The family's constructor names its own base class; the graft turns that instance into
        # ours instead of building the decoder twice.
        plan = plan_of(config)
        source_causal.__init__(self, config)
        base = surgery.base_of(self)
        base.__class__ = base_class
        surgery.graft(base, family, plan)

    common = {
        "config_class": config_class,
        "_is_stateful": True,
        "_can_compile_fullgraph": False,
        # transformers 5.17 drops a cap on the scores under sdpa without a word
        "_supports_sdpa": bool(source_base._supports_sdpa) and family.softcap is None,
        "_no_split_modules": [*(source_base._no_split_modules or ()), "HybridAttention"],
        "__module__": module,
    }
    base_class = type(
        f"Morph{family.base_class}", (_Morph, source_base), {**common, "__init__": base_init}
    )
    causal_class = type(
        f"Morph{family.causal_class}",
        (_Morph, source_causal),
        {**common, "__init__": causal_init},
    )
    return base_class, causal_class


def __getattr__(name: str) -> Any:
    """Make `morph.modeling.MorphLlamaForCausalLM` importable by name."""
    for model_type in registry.names("families") if name.startswith("Morph") else ():
        for made in classes(model_type):
            if made.__name__ == name:
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hybrid_config(config: Any, plan: Plan) -> Any:
    """Return the config of the hybrid that `plan` makes of a model with `config`."""
    family = family_of(config.to_dict())
    config_class = classes(family.model_type)[0]
    data = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    made = config_class.from_dict({**data, "morph": {"plan": strict.plain(plan)}})
    made.architectures = [classes(family.model_type)[2].__name__]
    return made


def hybrid(source: nn.Module, plan: Plan) -> nn.Module:
    """Return the hybrid of a source causal LM, sharing every tensor of the source.

    The source stays whole and usable. New parameters get their start values and then whatever
    their mixer inherits from the source attention. Raises MismatchError where the plan does not
    fit, and PlanError for mixers and options that do not exist.
    """
    family = family_of(source.config.to_dict())
    plan = surgery.resolve_costs(plan)
    config = hybrid_config(source.config, plan)
    causal_class = classes(family.model_type)[2]
    first = next(source.parameters())
    with torch.device("meta"):
        made = causal_class._from_config(
            config, attn_implementation=source.config._attn_implementation, dtype=first.dtype
        )
    for name, tensor in source.named_parameters(remove_duplicate=False):
        _put(made, name, tensor)
    for name, tensor in source.named_buffers(remove_duplicate=False):
        _put(made, name, tensor)
    base = surgery.base_of(source)
    for i, module in surgery.hybrid_layers(made).items():
        for own in module.own.values():
            own.to_empty(device=first.device)
        module.reset_parameters()
        for mixer in module.mixers:
            mixer.inherit(surgery.attention_of(base, family, i))
    made.generation_config = source.generation_config
    made.train(source.training)
    return made


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set the parameter or buffer `name` of `model` to the very object `tensor`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    target = owner._parameters if leaf in owner._parameters else owner._buffers
    target[leaf] = tensor
