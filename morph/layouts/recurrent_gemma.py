"""RecurrentGemma and Griffin: every layer mixes in `temporal_block`, recurrent or sliding.

Where: `temporal_block.q_proj` and k_proj of the layers that `block_types`, repeated over the
layers, makes attention; half of each head turns.
Trap: the name does not tell the kind, and no layer attends to everything: all attention slides.
"""

from __future__ import annotations

from morph.families._family import MAX_LAYERS
from morph.layouts._kinds import plain
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer; `block_types` is repeated as often as it takes."""
    count, words = settings.layers, {"recurrent": "linear", "attention": "sliding"}
    found = settings.get("block_types")
    if not isinstance(found, (list, tuple)) or not 0 < len(found) <= MAX_LAYERS:
        raise settings.wrong("block_types", "a list of recurrent and attention")
    cycle = settings.words("block_types", words, len(found))
    return tuple(cycle[i % len(cycle)] for i in range(count))


LAYOUT = Layout(
    model_type="recurrent_gemma",
    kinds=kinds,
    heads=plain(share=0.5),
    attention="temporal_block",
    mlp=("mlp_block",),
    defaults={
        "num_hidden_layers": 26,
        "hidden_size": 2560,
        "num_attention_heads": 10,
        "block_types": ("recurrent", "recurrent", "attention"),
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_window_size": 4,
        "block_types": ["recurrent", "attention"],
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.4},
    },
)
