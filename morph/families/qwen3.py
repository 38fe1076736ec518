"""Qwen3 dense: a norm over each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _delta_hosts, _stock, _windows
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer, or None where it attends to everything."""
    return _windows.qwen({**DEFAULTS, **config})


FAMILY = Family(
    model_type="qwen3",
    module="transformers.models.qwen3.modeling_qwen3",
    config_class="Qwen3Config",
    base_class="Qwen3Model",
    causal_class="Qwen3ForCausalLM",
    attention_class="Qwen3Attention",
    tiny_config={
        "vocab_size": 103,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "rope_theta": 20000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    defaults=DEFAULTS,
    q_norm="q_norm",
    k_norm="k_norm",
    windows=windows,
    stock=(
        _stock.qwen("qwen3", "Qwen3ForCausalLM", DEFAULTS),
        _delta_hosts.qwen3_5(DEFAULTS),
    ),
)
