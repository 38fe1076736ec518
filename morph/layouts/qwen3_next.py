"""Qwen3-Next: each head's output gate shares q_proj with its query.

Where: `self_attn` of every fourth layer; q_proj holds, per head, head_dim rows of the query and
then head_dim rows of its gate. k_proj, v_proj, q_norm and k_norm are as in Qwen3.
Trap: the rows of q_proj as a whole would take the gates along. The other layers are Gated
DeltaNet under `linear_attn`, with projections of other names; `mtp.*` is a draft head.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, every, listed, plain
from morph.layouts._layout import GATED, Layout

LAYOUT = Layout(
    model_type="qwen3_next",
    kinds=listed(HYBRID, every("full", "linear", "full_attention_interval")),
    heads=plain(share=0.25, qk_norm=True, head_dim=256),
    projections=GATED,
    q_norm="q_norm",
    k_norm="k_norm",
    mixers=("linear_attn",),
    defaults={
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "full_attention_interval": 4,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 4,
        "layer_types": [
            "linear_attention",
            "full_attention",
            "linear_attention",
            "full_attention",
        ],
    },
)
