"""Granite 4: attention in some layers, Mamba-2 in the others.

Where: `self_attn` of the layers that `layer_types` calls attention; positions only where
`position_embedding_type` is "rope". This is also what `morph convert` writes as a stock target of
Llama-like models.
Trap: older configs say "attention" and "mamba" under `layers_block_type`; the MLP of dense models
is `shared_mlp`.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, listed, none
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention."""
    return settings.heads(rotary=settings.get("position_embedding_type") == "rope")


LAYOUT = Layout(
    model_type="granitemoehybrid",
    kinds=listed(HYBRID, none, "layer_types", "layers_block_type"),
    heads=heads,
    mixers=("mamba",),
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "shared_intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_chunk_size": 4,
        "tie_word_embeddings": True,
    },
)
