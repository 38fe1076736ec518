"""Qwen3.5, dense: each head's output gate shares q_proj with its query.

Where: `self_attn` of every fourth layer, with q_proj as in Qwen3-Next: per head, head_dim rows of
the query and then head_dim rows of its gate. The layers lie under `model.layers.` in text models
and under `model.language_model.layers.` beside a vision tower (`qwen3_5`).
Trap: the gates in q_proj, and the prefix. The other layers are Gated DeltaNet under `linear_attn`.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, every, listed, plain
from morph.layouts._layout import GATED, Layout

LAYOUT = Layout(
    model_type="qwen3_5_text",
    kinds=listed(HYBRID, every("full", "linear", "full_attention_interval")),
    heads=plain(share=0.25, qk_norm=True, head_dim=256),
    projections=GATED,
    q_norm="q_norm",
    k_norm="k_norm",
    mixers=("linear_attn",),
    defaults={
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "full_attention_interval": 4,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
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
        "layer_types": [
            "linear_attention",
            "full_attention",
            "linear_attention",
            "full_attention",
        ],
    },
)
