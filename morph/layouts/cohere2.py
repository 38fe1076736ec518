"""Command R7B and A: sliding layers with positions, full layers without.

Where: `self_attn.q_proj` and k_proj of every layer; each fourth is full by default.
Trap: full layers have no rotary positions; sliding ones turn in pairs (2 i, 2 i + 1).
"""

from __future__ import annotations

from morph.layouts._kinds import WINDOWED, every, listed
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention; only sliding layers know positions."""
    return settings.heads(rotary=kind == "sliding", interleaved=True)


LAYOUT = Layout(
    model_type="cohere2",
    kinds=listed(WINDOWED, every("full", "sliding", "sliding_window_pattern")),
    heads=heads,
    defaults={
        "num_hidden_layers": 40,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "sliding_window_pattern": 4,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "sliding_window": 4,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "layer_types": ["sliding_attention", "full_attention"],
        "eos_token_id": 2,
        "bos_token_id": 1,
    },
)
