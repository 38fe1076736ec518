"""Bamba: attention in the layers of a list, Mamba-2 elsewhere.

Where: `self_attn` of the layers in `attn_layer_indices`; half of each head turns.
Trap: without that list there is no attention at all; the other layers hold `mamba`.
"""

from __future__ import annotations

from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer, from the list of attention layers."""
    count = settings.layers
    if settings.get("attn_layer_indices") is None:
        return ("linear",) * count
    full = set(settings.numbers("attn_layer_indices"))
    if full and max(full) >= count:
        raise settings.wrong("attn_layer_indices", f"layers below num_hidden_layers {count}")
    return tuple("full" if i in full else "linear" for i in range(count))


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention; a share beside the rotary parameters is ignored."""
    return settings.heads(share=settings.share(0.5, older=""))


LAYOUT = Layout(
    model_type="bamba",
    kinds=kinds,
    heads=heads,
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
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_chunk_size": 4,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
)
