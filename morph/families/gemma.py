"""Gemma 1: wide heads, scaled embeddings, norms around one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _stock, _windows
from morph.families._family import Family, Move
from morph.plan import Plan

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
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
    "use_bidirectional_attention": None,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return None for every layer; raise UnsupportedModel for an encoder."""
    full: dict[str, Any] = {**DEFAULTS, **config}
    _windows.causal(full)
    count: int = full["num_hidden_layers"]
    return (None,) * count


def rename(config: Mapping[str, Any], plan: Plan, names: tuple[str, ...]) -> list[Move]:
    """Return the moves that give the second norm of every layer VaultGemma's name for it."""
    old, new = ".post_attention_layernorm.", ".pre_feedforward_layernorm."
    return [Move(target=name.replace(old, new), source=name) for name in names]


FAMILY = Family(
    model_type="gemma",
    module="transformers.models.gemma.modeling_gemma",
    config_class="GemmaConfig",
    base_class="GemmaModel",
    causal_class="GemmaForCausalLM",
    attention_class="GemmaAttention",
    tiny_config={
        "vocab_size": 107,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11000.0,
        "attention_bias": True,
    },
    defaults=DEFAULTS,
    windows=windows,
    stock=(_stock.vaultgemma(DEFAULTS, rename),),
)
