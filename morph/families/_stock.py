"""Which architectures of plain transformers hold which plans: shared by the family files.

Every target here was checked to be exact: same weights, same logits. A target's config is written
out in full, because the defaults of two architectures differ. No torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from morph.families import _rope
from morph.families._family import Family, Move, StockTarget
from morph.families._layout import Layout, layout, must
from morph.families._windows import FULL, SLIDING
from morph.plan import Plan

Config = Mapping[str, Any]
Moves = Callable[[Config, Plan, tuple[str, ...]], list[Move]]

# sigmoid(lse - sink), the share that a sink leaves, is exactly 1 here in every dtype
NO_SINK = -1e4
VLLM = "vllm serve {path}"
VLLM_GENERIC = "vllm serve {path} --model-impl transformers"
# What a target spells in its own way, or must not inherit
_RESPELLED = frozenset(
    """model_type architectures auto_map morph attn_implementation _attn_implementation
    _attn_implementation_autoset rope_parameters rope_scaling rope_theta rope_local_base_freq
    partial_rotary_factor original_max_position_embeddings layer_types sliding_window
    use_sliding_window max_window_layers sliding_window_pattern _sliding_window_pattern
    no_rope_layers no_rope_layer_interval layer_rope_theta use_bidirectional_attention
    pretraining_tp resid_pdrop embd_pdrop hidden_activation""".split()  # noqa: SIM905
)


def pick(family: Family, config: Config, plan: Plan) -> tuple[StockTarget | None, list[str]]:
    """Return the first stock target that holds `plan`, and why each earlier one does not.

    The target is None where none holds it; the list then has every reason, one sentence each.
    """
    reasons: list[str] = []
    for target in family.stock:
        reason = target.refuses(config, plan)
        if not reason:
            return target, reasons
        reasons.append(f"{target.model_type}: {reason}")
    if not family.stock:
        reasons.append(f"no stock architecture is known to hold a hybrid of {family.model_type}.")
    return None, reasons


def complete(defaults: Config, config: Config) -> dict[str, Any]:
    """Return config.json with the config class's defaults and the derived sizes filled in."""
    full = {**defaults, **config}
    heads = full["num_attention_heads"]
    full["num_key_value_heads"] = full.get("num_key_value_heads") or heads
    full["head_dim"] = full.get("head_dim") or full["hidden_size"] // heads
    return full


def retag(full: Config, model_type: str, causal_class: str, **fields: Any) -> dict[str, Any]:
    """Return a whole config.json of another architecture: every field kept, then `fields`."""
    kept = {k: v for k, v in full.items() if k not in _RESPELLED}
    kept["attention_dropout"] = kept.get("attention_dropout") or 0.0
    return {**kept, "model_type": model_type, "architectures": [causal_class], **fields}


def _window_fields(found: Layout, full: Config) -> dict[str, Any]:
    """Return the types and the window; without a sliding layer the window is never looked at."""
    return {
        "layer_types": list(found.layer_types),
        "sliding_window": found.window or full["max_position_embeddings"],
    }


def _reason(config: Config, plan: Plan, *, sinks: bool = False) -> str:
    """Return why no stock architecture of this kind holds the plan, or an empty string."""
    if config.get("per_layer_config"):
        return "its config changes sizes from layer to layer (per_layer_config)."
    found = layout(plan)
    if isinstance(found, str):
        return found
    if any(found.sinks) and not sinks:
        return f"layer {found.sinks.index(True)} has learned sinks, which it has no place for."
    return ""


def _biases(full: Config, defaults: Config) -> list[str]:
    return [k for k in ("attention_bias", "mlp_bias") if k in defaults and full[k]]


def ministral(
    defaults: Config, moves: Moves | None = None, refuse: Callable[[Config], str] | None = None
) -> StockTarget:
    """Return the target for Llama-like sources without biases."""

    def refuses(config: Config, plan: Plan) -> str:
        biased = _biases({**defaults, **config}, defaults)
        if biased:
            return f"the source has biases ({biased[0]}), which it has no place for."
        return (refuse(config) if refuse else "") or _reason(config, plan)

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full = complete(defaults, config)
        fields = {**_rope.fields(_rope.whole(_rope.flat(full))), **_window_fields(must(plan), full)}
        out = retag(full, "ministral", "MinistralForCausalLM", **fields)
        return {k: v for k, v in out.items() if k not in ("attention_bias", "mlp_bias")}

    return StockTarget(
        model_type="ministral", refuses=refuses, config=write, moves=moves, serve=VLLM
    )


def smollm3(defaults: Config, rotating: Callable[[Config], list[int]] | None = None) -> StockTarget:
    """Return the target for Llama-like sources with biases, and for SmolLM3 itself."""

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full = complete(defaults, config)
        turns = rotating(config) if rotating else [1] * full["num_hidden_layers"]
        fields = {
            **_rope.fields(_rope.flat(full)),
            **_window_fields(must(plan), full),
            "use_sliding_window": True,
            "no_rope_layers": list(turns),
        }
        return retag(full, "smollm3", "SmolLM3ForCausalLM", **fields)

    return StockTarget(model_type="smollm3", refuses=_reason, config=write, serve=VLLM)


def granite_swa(
    defaults: Config, moves: Moves | None = None, refuse: Callable[[Config], str] | None = None
) -> StockTarget:
    """Return the target with a learned sink per head, and for Granite whatever its plan.

    Layers without a sink of their own get a constant that no score comes near.
    """
    multipliers = "attention_multiplier" in defaults

    def refuses(config: Config, plan: Plan) -> str:
        reason = (refuse(config) if refuse else "") or _reason(config, plan, sinks=True)
        if not reason and not multipliers and not any(must(plan).sinks):
            return "no layer has learned sinks, and without them it is not this source's kind."
        return reason

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full = complete(defaults, config)
        rope = _rope.whole(_rope.flat(full))
        fields = {
            "attention_bias": bool("attention_bias" in defaults and full["attention_bias"]),
            "mlp_bias": bool("mlp_bias" in defaults and full["mlp_bias"]),
            "layer_rope_theta": [rope["rope_theta"]] * full["num_hidden_layers"],
            **_rope.fields(rope),
            **_window_fields(must(plan), full),
        }
        if not multipliers:
            fields |= dict.fromkeys(
                ("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0
            )
            fields["attention_multiplier"] = full["head_dim"] ** -0.5
        return retag(full, "granite_swa", "GraniteSWAForCausalLM", **fields)

    def splice(config: Config, plan: Plan, names: tuple[str, ...]) -> list[Move]:
        kept = tuple(n for n in names if not n.endswith(".self_attn.mixers.0.sinks"))
        found = moves(config, plan, kept) if moves else [Move(target=n, source=n) for n in kept]
        return found + _sink_moves(plan)

    return StockTarget(
        model_type="granite_swa", refuses=refuses, config=write, moves=splice, serve=VLLM
    )


def _sink_moves(plan: Plan) -> list[Move]:
    moves = []
    for i, learned in enumerate(must(plan).sinks):
        stem = f"model.layers.{i}.self_attn"
        if learned:
            moves.append(Move(target=f"{stem}.sinks", source=f"{stem}.mixers.0.sinks"))
        else:
            shape = (plan.geometry.num_attention_heads,)
            moves.append(Move(target=f"{stem}.sinks", shape=shape, fill=NO_SINK))
    return moves


def vaultgemma(defaults: Config, moves: Moves) -> StockTarget:
    """Return the target for Gemma 1."""

    def refuses(config: Config, plan: Plan) -> str:
        if config.get("hidden_act") == "gelu":
            return (
                "its hidden_act is 'gelu', which only some versions of transformers read as the "
                "'gelu_pytorch_tanh' that Gemma was trained with; write that in config.json."
            )
        return _reason(config, plan)

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full = complete(defaults, config)
        fields = {
            "hidden_activation": full.pop("hidden_act"),
            "query_pre_attn_scalar": full["head_dim"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            **_rope.fields(_rope.flat(full)),
            **_window_fields(must(plan), full),
        }
        return retag(full, "vaultgemma", "VaultGemmaForCausalLM", **fields)

    return StockTarget(
        model_type="vaultgemma", refuses=refuses, config=write, moves=moves, serve=VLLM_GENERIC
    )


def qwen(model_type: str, causal_class: str, defaults: Config) -> StockTarget:
    """Return Qwen2 or Qwen3 itself, with a type per layer.

    vLLM's own Qwen classes would run a mixture as full attention without a word; they refuse it
    where `max_window_layers` is below the number of layers, and transformers ignores that field
    beside `layer_types`. So the first sliding layer is written there.
    """

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full, found = {**defaults, **config}, must(plan)
        fields: dict[str, Any] = {"layer_types": list(found.layer_types)}
        if found.window is not None:
            fields["use_sliding_window"] = True
            fields["sliding_window"] = found.window
            fields["max_window_layers"] = found.layer_types.index(SLIDING)
        return _itself(config, full, model_type, causal_class, fields)

    return StockTarget(model_type=model_type, refuses=_reason, config=write, serve=VLLM_GENERIC)


def gemma2(defaults: Config) -> StockTarget:
    """Return Gemma 2 itself, with a type per layer."""

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full = {**defaults, **config}
        fields = _window_fields(must(plan), full)
        return _itself(config, full, "gemma2", "Gemma2ForCausalLM", fields)

    return StockTarget(model_type="gemma2", refuses=_reason, config=write, serve=VLLM)


def _itself(
    config: Config, full: Config, model_type: str, causal_class: str, fields: Config
) -> dict[str, Any]:
    """Return the same architecture's config: as it stood, defaults written out, then `fields`."""
    stale = ("auto_map", "morph", "sliding_window_pattern", "_sliding_window_pattern")
    kept = {k: v for k, v in full.items() if k not in stale}
    if kept.get("rope_parameters") is None:
        kept.pop("rope_parameters", None)
    elif "rope_theta" not in config:
        kept.pop("rope_theta", None)
    return {**kept, "model_type": model_type, "architectures": [causal_class], **fields}


Ropes = Callable[[Config], dict[str, dict[str, Any]]]


def olmo3(defaults: Config, ropes: Ropes | None = None) -> StockTarget:
    """Return the target for OLMo 2 (one rotary setting), and for OLMo 3 itself."""
    return _per_type(defaults, "olmo3", "Olmo3ForCausalLM", ropes, VLLM)


def gemma3(defaults: Config, ropes: Ropes) -> StockTarget:
    """Return Gemma 3 itself, with a type per layer."""
    return _per_type(defaults, "gemma3_text", "Gemma3ForCausalLM", ropes, VLLM_GENERIC)


def _per_type(
    defaults: Config, model_type: str, causal_class: str, ropes: Ropes | None, serve: str
) -> StockTarget:
    """Return a target that rotates by layer type.

    A full layer that slides must go on rotating as it did, so the sliding type takes over the
    full type's setting; where the source's own sliding layers need another one, that is refused.
    """

    def settings(config: Config) -> dict[str, dict[str, Any]]:
        if ropes:
            return ropes(config)
        rope = _rope.flat({**defaults, **config})
        return {FULL: rope, SLIDING: dict(rope)}

    def refuses(config: Config, plan: Plan) -> str:
        reason, rope = _reason(config, plan), settings(config)
        if reason or rope[FULL] == rope[SLIDING] or not must(plan).slides_more:
            return reason
        if all(own is None for own in plan.geometry.windows):
            return ""
        return (
            f"its sliding layers rotate with base {rope[SLIDING]['rope_theta']} and its full "
            f"layers with base {rope[FULL]['rope_theta']} or otherwise scaled; a full layer that "
            "slides would take the wrong one."
        )

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full, found, rope = complete(defaults, config), must(plan), settings(config)
        if found.slides_more:
            rope[SLIDING] = dict(rope[FULL])
        fields = {"rope_parameters": rope, **_window_fields(found, full)}
        if "hidden_activation" in defaults:
            fields["hidden_activation"] = full["hidden_activation"]
        return retag(full, model_type, causal_class, **fields)

    return StockTarget(model_type=model_type, refuses=refuses, config=write, serve=serve)
