"""Gemma 2: every other layer slides, scores and logits are softly capped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _stock, _windows
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer, or None where it attends to everything."""
    full = {**DEFAULTS, **config}
    _windows.causal(full)
    types = full["layer_types"] or _windows.every(full["num_hidden_layers"], 2)
    return _windows.typed(full, types, full["sliding_window"])


FAMILY = Family(
    model_type="gemma2",
    module="transformers.models.gemma2.modeling_gemma2",
    config_class="Gemma2Config",
    base_class="Gemma2Model",
    causal_class="Gemma2ForCausalLM",
    attention_class="Gemma2Attention",
    tiny_config={
        "vocab_size": 71,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 12,
        "max_position_embeddings": 512,
        "rope_theta": 12000.0,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
    },
    defaults=DEFAULTS,
    softcap="attn_logit_softcapping",
    windows=windows,
    stock=(_stock.gemma2(DEFAULTS),),
)
