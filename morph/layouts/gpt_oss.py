"""GPT-OSS: full and sliding layers in turn, with a learned sink per head.

Where: `self_attn.q_proj` and k_proj, with biases; `self_attn.sinks` has one logit per head.
Trap: sliding layers have the same names as full ones. The sinks take part in every softmax but are
neither q nor k, and the experts may be quantised where attention is not.
"""

from __future__ import annotations

from morph.layouts._kinds import WINDOWED, every, listed, plain
from morph.layouts._layout import Layout

LAYOUT = Layout(
    model_type="gpt_oss",
    kinds=listed(WINDOWED, every("full", "sliding", 2)),
    heads=plain(head_dim=64),
    defaults={"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "sliding_window": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    },
)
