"""Jamba: attention without positions once in every few layers, Mamba elsewhere.

Where: `self_attn` of the layers i with i % attn_layer_period == attn_layer_offset.
Trap: the config has no list of layers: two numbers say it, and the layers between hold `mamba`.
"""

from __future__ import annotations

from morph.layouts._kinds import plain
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer, from the period of the attention layers and its offset."""
    period = settings.size("attn_layer_period")
    offset = settings.size("attn_layer_offset", least=0)
    return tuple("full" if i % period == offset else "linear" for i in range(settings.layers))


LAYOUT = Layout(
    model_type="jamba",
    kinds=kinds,
    heads=plain(rotary=False),
    mixers=("mamba",),
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
        "mamba_expand": 1,
        "tie_word_embeddings": True,
    },
)
