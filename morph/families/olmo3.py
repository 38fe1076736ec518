"""OLMo 3: OLMo 2 with three sliding layers to each full one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _rope, _stock, _windows
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
    "rope_theta": 500000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "layer_types": None,
}


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer, or None where it attends to everything."""
    full = {**DEFAULTS, **config}
    types = full["layer_types"] or _windows.every(full["num_hidden_layers"], 4)
    return _windows.typed(full, types, full["sliding_window"])


def rope(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters of full and of sliding layers.

    In the older spelling `rope_theta` and `rope_scaling` speak of full layers only; that is how
    transformers reads them.
    """
    full = {**DEFAULTS, **config}
    return _rope.typed(full, {"sliding_attention": DEFAULTS["rope_theta"]})


FAMILY = Family(
    model_type="olmo3",
    module="transformers.models.olmo3.modeling_olmo3",
    config_class="Olmo3Config",
    base_class="Olmo3Model",
    causal_class="Olmo3ForCausalLM",
    attention_class="Olmo3Attention",
    tiny_config={
        "vocab_size": 73,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "sliding_window": 8,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "full_attention",
            "full_attention",
        ],
        "eos_token_id": 2,
    },
    defaults=DEFAULTS,
    q_norm="q_norm",
    k_norm="k_norm",
    norm_scope="projection",
    windows=windows,
    stock=(_stock.olmo3(DEFAULTS, rope),),
)
