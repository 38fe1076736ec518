"""Falcon-H1: attention and Mamba-2 side by side in every layer.

Where: `self_attn` of every layer; its keys are multiplied by `key_multiplier`.
Trap: "the attention layers" are all layers, and `mamba` beside them is none of it; the MLP is
`feed_forward`.
"""

from __future__ import annotations

from morph.layouts._kinds import full, plain
from morph.layouts._layout import Layout

LAYOUT = Layout(
    model_type="falcon_h1",
    kinds=full,
    heads=plain(),
    mixers=("mamba",),
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "attention_bias": True,
        "key_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_chunk_size": 4,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    },
)
