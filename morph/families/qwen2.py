"""Qwen2 and Qwen2.5: biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _mamba_hosts, _stock, _windows
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
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
    model_type="qwen2",
    module="transformers.models.qwen2.modeling_qwen2",
    config_class="Qwen2Config",
    base_class="Qwen2Model",
    causal_class="Qwen2ForCausalLM",
    attention_class="Qwen2Attention",
    tiny_config={
        "vocab_size": 101,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 7000.0,
        "tie_word_embeddings": True,
    },
    defaults=DEFAULTS,
    windows=windows,
    stock=(
        _stock.qwen("qwen2", "Qwen2ForCausalLM", DEFAULTS),
        _mamba_hosts.granitemoehybrid(DEFAULTS, qkv_bias=True),
    ),
)
