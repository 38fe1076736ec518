"""Zamba: one attention block that many layers share, which is refused.

Where: `shared_transf.self_attn` of the first hybrid layer; later hybrid layers use the same
weights, whether or not the file repeats them.
Trap: one tensor changes many layers, and copies on disk would have to stay equal. The block reads
the hidden state and the embeddings side by side.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, listed, plain
from morph.layouts._layout import Layout
from morph.layouts._refusals import shared
from morph.layouts._settings import Settings


def hybrid(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer, from the period of the hybrid layers and its offset."""
    period = settings.size("attn_layer_period")
    offset = settings.size("attn_layer_offset", least=0)
    later = (i % period == offset for i in range(settings.layers))
    found = ["linear", "linear", "full", *("full" if hit else "linear" for hit in later)]
    return tuple(found[: settings.layers])


LAYOUT = Layout(
    model_type="zamba",
    kinds=listed({**HYBRID, "hybrid": "full"}, hybrid, "layers_block_type", "layer_types"),
    heads=plain(rotary=False),
    attention="shared_transf",
    mixers=("mamba", "mamba_decoder"),
    refuses=shared,
    defaults={"num_hidden_layers": 76, "attn_layer_period": 6, "attn_layer_offset": 4},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
        "mamba_expand": 1,
    },
)
