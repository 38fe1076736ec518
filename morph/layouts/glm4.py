"""GLM-4: attention whose rotary pairs are neighbours.

Where: `self_attn.q_proj` and k_proj of every layer; biases on q, k and v.
Trap: half of each head turns, in pairs (2 i, 2 i + 1) rather than (i, i + dim / 2).
"""

from __future__ import annotations

from morph.layouts._kinds import full, plain
from morph.layouts._layout import Layout

LAYOUT = Layout(
    model_type="glm4",
    kinds=full,
    heads=plain(share=0.5, interleaved=True, head_dim=128),
    defaults={"num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "pad_token_id": 0,
        "eos_token_id": 2,
    },
)
