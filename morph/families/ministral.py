"""Ministral: Mistral with a window per layer, and what morph writes for Llama-like sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _mamba_hosts, _stock, _windows
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "attention_dropout": 0.0,
    "layer_types": None,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer, or None where it attends to everything."""
    full = {**DEFAULTS, **config}
    kind = _windows.FULL if full["sliding_window"] is None else _windows.SLIDING
    types = full["layer_types"] or [kind] * full["num_hidden_layers"]
    return _windows.typed(full, types, full["sliding_window"])


FAMILY = Family(
    model_type="ministral",
    module="transformers.models.ministral.modeling_ministral",
    config_class="MinistralConfig",
    base_class="MinistralModel",
    causal_class="MinistralForCausalLM",
    attention_class="MinistralAttention",
    tiny_config={
        "vocab_size": 89,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 2e-5,
        "sliding_window": 8,
        "layer_types": [
            "full_attention",
            "sliding_attention",
            "full_attention",
            "full_attention",
        ],
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    defaults=DEFAULTS,
    windows=windows,
    stock=(
        _stock.ministral(DEFAULTS),
        _stock.granite_swa(DEFAULTS),
        _mamba_hosts.granitemoehybrid(DEFAULTS),
    ),
)
