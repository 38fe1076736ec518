"""Granite 3 dense: Llama with four multipliers."""

from __future__ import annotations

from morph.families import _stock
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
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}

FAMILY = Family(
    model_type="granite",
    module="transformers.models.granite.modeling_granite",
    config_class="GraniteConfig",
    base_class="GraniteModel",
    causal_class="GraniteForCausalLM",
    attention_class="GraniteAttention",
    tiny_config={
        "vocab_size": 109,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 13000.0,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
    defaults=DEFAULTS,
    stock=(_stock.granite_swa(DEFAULTS),),
)
