"""Qwen3.5, mixture of experts: each head's output gate shares q_proj with its query.

Where: as in dense Qwen3.5 (`qwen3_5_text`): q_proj of every fourth layer holds, per head, head_dim
rows of the query and then head_dim rows of its gate; `model.language_model.layers.` beside a
vision tower (`qwen3_5_moe`).
Trap: the gates in q_proj, and the prefix. The experts' own gates have nothing to do with it.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, every, listed, plain
from morph.layouts._layout import GATED, Layout

LAYOUT = Layout(
    model_type="qwen3_5_moe_text",
    kinds=listed(HYBRID, every("full", "linear", "full_attention_interval")),
    heads=plain(share=0.25, qk_norm=True, head_dim=256),
    projections=GATED,
    q_norm="q_norm",
    k_norm="k_norm",
    mixers=("linear_attn",),
    defaults={
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "full_attention_interval": 4,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 4,
        "rope_parameters": {
            "rope_theta": 100.0,
            "rope_type": "default",
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
        "layer_types": ["linear_attention", "full_attention"],
    },
)
