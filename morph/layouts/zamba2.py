"""Zamba2: a few attention blocks that many layers share, which is refused.

Where: `shared_transformer.self_attn` of the first layers that use a block; the others use the same
weights, each with small adapters of its own.
Trap: one tensor changes many layers, and copies on disk would have to stay equal.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, listed, plain
from morph.layouts._layout import Layout
from morph.layouts._refusals import shared
from morph.layouts._settings import Settings


def hybrid(settings: Settings) -> tuple[str, ...]:
    """Raise CheckpointError: the default of the config class fits one model only."""
    raise settings.wrong("layers_block_type", "a list with a word for every layer")


LAYOUT = Layout(
    model_type="zamba2",
    kinds=listed({**HYBRID, "hybrid": "full"}, hybrid, "layers_block_type", "layer_types"),
    heads=plain(rotary=False),
    attention="shared_transformer",
    mixers=("mamba", "mamba_decoder"),
    refuses=shared,
    defaults={"num_hidden_layers": 54},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "n_mamba_heads": 4,
        "chunk_size": 4,
        "adapter_rank": 4,
    },
)
