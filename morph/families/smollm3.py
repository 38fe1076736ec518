"""SmolLM3: layers without rotary positions among the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morph.families import _stock, _windows
from morph.families._family import Family

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 128004,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": None,
    "rope_theta": 2000000.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


def rotating(config: Mapping[str, Any]) -> list[int]:
    """Return 1 for every layer that rotates q and k and 0 for every layer that does not."""
    full = {**DEFAULTS, **config}
    step = full["no_rope_layer_interval"]
    listed = full["no_rope_layers"]
    return listed or [int((i + 1) % step != 0) for i in range(full["num_hidden_layers"])]


def windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the source's own window of every layer, or None where it attends to everything."""
    full = {**DEFAULTS, **config}
    slides = full["use_sliding_window"] and full["sliding_window"] is not None
    types = full["layer_types"] or [
        _windows.FULL if rope or not slides else _windows.SLIDING for rope in rotating(full)
    ]
    return _windows.typed(full, types[: full["num_hidden_layers"]], full["sliding_window"])


FAMILY = Family(
    model_type="smollm3",
    module="transformers.models.smollm3.modeling_smollm3",
    config_class="SmolLM3Config",
    base_class="SmolLM3Model",
    causal_class="SmolLM3ForCausalLM",
    attention_class="SmolLM3Attention",
    tiny_config={
        "vocab_size": 83,
        "hidden_size": 36,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "no_rope_layers": [1, 0, 1, 1],
        "rope_theta": 9000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    defaults=DEFAULTS,
    rotary_switch="use_rope",
    windows=windows,
    stock=(_stock.smollm3(DEFAULTS, rotating),),
)
