"""MiniMax-Text-01: lightning and softmax layers with two layouts under one name.

Where: full layers have `self_attn.q_proj`, k_proj, v_proj and o_proj.
Trap: lightning layers are called `self_attn` too and hold `qkv_proj`, `output_gate` and `out_proj`
for a linear recurrence; only `layer_types` tells. A `sliding_window` bounds the softmax layers.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, every, listed, plain
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer; the softmax layers slide where a window is set."""
    found = listed(HYBRID, every("linear", "full", 2))(settings)
    if settings.get("sliding_window") is None:
        return found
    settings.size("sliding_window")
    return tuple("sliding" if kind == "full" else kind for kind in found)


LAYOUT = Layout(
    model_type="minimax",
    kinds=kinds,
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
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 4,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
)
