"""Qwen3, mixture of experts: attention as in dense Qwen3.

Where: `self_attn.q_proj` and k_proj of every layer, norms per head.
Trap: one window for all layers, and only where `use_sliding_window` is true; `layer_types` is not
read.
"""

from __future__ import annotations

from morph.layouts._kinds import full, one_window, plain
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return one kind for every layer."""
    return one_window(settings) if settings.flag("use_sliding_window") else full(settings)


LAYOUT = Layout(
    model_type="qwen3_moe",
    kinds=kinds,
    heads=plain(qk_norm=True),
    q_norm="q_norm",
    k_norm="k_norm",
    defaults={
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "attention_bias": True,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    },
)
