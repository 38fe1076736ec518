"""Llama 1-3 and the many models that share its code."""

from __future__ import annotations

from morph.families import _mamba_hosts, _stock
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "head_dim": None,
}

FAMILY = Family(
    model_type="llama",
    module="transformers.models.llama.modeling_llama",
    config_class="LlamaConfig",
    base_class="LlamaModel",
    causal_class="LlamaForCausalLM",
    attention_class="LlamaAttention",
    tiny_config={
        "vocab_size": 97,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    defaults=DEFAULTS,
    stock=(
        _stock.ministral(DEFAULTS),
        _stock.smollm3(DEFAULTS),
        _stock.granite_swa(DEFAULTS),
        _mamba_hosts.granitemoehybrid(DEFAULTS),
        _mamba_hosts.falcon_h1(DEFAULTS),
    ),
)
