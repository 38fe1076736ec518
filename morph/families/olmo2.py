"""OLMo 2: norms over the whole q and k projections, and after the sublayers."""

from __future__ import annotations

from morph.families import _delta_hosts, _stock
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
}

FAMILY = Family(
    model_type="olmo2",
    module="transformers.models.olmo2.modeling_olmo2",
    config_class="Olmo2Config",
    base_class="Olmo2Model",
    causal_class="Olmo2ForCausalLM",
    attention_class="Olmo2Attention",
    tiny_config={
        "vocab_size": 73,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 8000.0,
        "eos_token_id": 2,
        "attention_bias": True,
    },
    defaults=DEFAULTS,
    q_norm="q_norm",
    k_norm="k_norm",
    norm_scope="projection",
    stock=(
        _stock.olmo3(DEFAULTS),
        _delta_hosts.olmo_hybrid(),
    ),
)
