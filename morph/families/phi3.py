"""Phi-3 and Phi-4: q, k and v in one projection, gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _rope, _stock, _windows
from morph.families._family import Family, Move
from morph.plan import Plan

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "sliding_window": None,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer; it is the same everywhere, or None."""
    return _windows.uniform({**DEFAULTS, **config})


def split(config: Mapping[str, Any], plan: Plan, names: tuple[str, ...]) -> list[Move]:
    """Return the moves that cut the two fused projections of every layer into their parts."""
    shape = plan.geometry
    q = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    inner = {**DEFAULTS, **config}["intermediate_size"]
    parts = {
        "qkv_proj": (("q_proj", 0, q), ("k_proj", q, q + kv), ("v_proj", q + kv, q + 2 * kv)),
        "gate_up_proj": (("gate_proj", 0, inner), ("up_proj", inner, 2 * inner)),
    }
    moves = []
    for name in names:
        fused = next((p for p in parts if name.endswith(f".{p}.weight")), None)
        if fused is None:
            moves.append(Move(target=name, source=name))
            continue
        stem = name.removesuffix(f"{fused}.weight")
        moves += [
            Move(target=f"{stem}{part}.weight", source=name, rows=(start, stop))
            for part, start, stop in parts[fused]
        ]
    return moves


def rotary_refusal(config: Mapping[str, Any]) -> str:
    """Return why this model's rotary positions have no stock target, or an empty string."""
    rope = _rope.flat({**DEFAULTS, **config})
    if rope["rope_type"] != "default":
        return f"its rotary positions are {rope['rope_type']!r}; only the plain kind has a target."
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        return (
            f"it rotates a share of {rope['partial_rotary_factor']} of each head; the target "
            "rotates all of it."
        )
    return ""


FAMILY = Family(
    model_type="phi3",
    module="transformers.models.phi3.modeling_phi3",
    config_class="Phi3Config",
    base_class="Phi3Model",
    causal_class="Phi3ForCausalLM",
    attention_class="Phi3Attention",
    tiny_config={
        "vocab_size": 79,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "rope_theta": 6000.0,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    defaults=DEFAULTS,
    qkv="qkv_proj",
    windows=windows,
    stock=(
        _stock.ministral(DEFAULTS, split, rotary_refusal),
        _stock.granite_swa(DEFAULTS, split, rotary_refusal),
    ),
)
