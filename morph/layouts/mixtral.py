"""Mixtral: attention as in Mistral, experts beside it.

Where: `self_attn.q_proj` and k_proj of every layer.
Trap: `sliding_window`, where set, bounds every layer. Experts are `block_sparse_moe` on disk.
"""

from __future__ import annotations

from morph.layouts._kinds import one_window, plain
from morph.layouts._layout import Layout

LAYOUT = Layout(
    model_type="mixtral",
    kinds=one_window,
    heads=plain(),
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    },
)
