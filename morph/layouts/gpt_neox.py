"""GPT-NeoX and Pythia: query, key and value of each head interleaved in one matrix.

Where: `attention.query_key_value` holds, per head, head_dim rows of the query, of the key and of
the value; the output is `attention.dense`. A quarter of each head turns by default (`rotary_pct`).
Trap: not thirds of the matrix but of every head; layers lie under `gpt_neox.layers.`.
"""

from __future__ import annotations

from morph.layouts._kinds import full
from morph.layouts._layout import Layout, interleaved
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention; every head has a key of its own."""
    found = settings.heads(share=settings.share(0.25, "rotary_pct"))
    if found.group_size != 1:
        raise settings.wrong("num_key_value_heads", "absent: every head has a key of its own")
    return found


LAYOUT = Layout(
    model_type="gpt_neox",
    kinds=full,
    heads=heads,
    attention="attention",
    projections={"query_key_value": interleaved},
    o="dense",
    defaults={"num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads": 64},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.4},
    },
)
