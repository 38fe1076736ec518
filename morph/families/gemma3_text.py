"""Gemma 3, text only: five sliding layers to each full one, each kind with its own rotary base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _rope, _stock, _windows
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer, or None where it attends to everything."""
    full = {**DEFAULTS, **config}
    _windows.causal(full)
    types = full["layer_types"] or _windows.every(
        full["num_hidden_layers"], full["sliding_window_pattern"]
    )
    return _windows.typed(full, types, full["sliding_window"])


def rope(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters of full and of sliding layers, from either spelling."""
    full = {**DEFAULTS, **config}
    return _rope.typed(full, {"sliding_attention": full["rope_local_base_freq"]})


FAMILY = Family(
    model_type="gemma3_text",
    module="transformers.models.gemma3.modeling_gemma3",
    config_class="Gemma3TextConfig",
    base_class="Gemma3TextModel",
    causal_class="Gemma3ForCausalLM",
    attention_class="Gemma3Attention",
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 14,
        "max_position_embeddings": 512,
        "sliding_window": 8,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "full_attention",
            "full_attention",
        ],
    },
    defaults=DEFAULTS,
    q_norm="q_norm",
    k_norm="k_norm",
    windows=windows,
    stock=(_stock.gemma3(DEFAULTS, rope),),
)
