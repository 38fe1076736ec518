"""LFM2: attention in some layers, short convolutions in the others.

Where: `self_attn.q_proj` and k_proj of the full layers; norms are `q_layernorm` and `k_layernorm`,
the output projection is `out_proj`.
Trap: the names of norms and output differ from Qwen3's; older configs list the attention layers in
`full_attn_idxs`. The other layers hold `conv`.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, listed, plain
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer by the older list; without one all layers are full."""
    count = settings.layers
    if settings.get("full_attn_idxs") is None:
        return ("full",) * count
    full = set(settings.numbers("full_attn_idxs"))
    return tuple("full" if i in full else "linear" for i in range(count))


LAYOUT = Layout(
    model_type="lfm2",
    kinds=listed({**HYBRID, "conv": "linear"}, kinds),
    heads=plain(qk_norm=True),
    o="out_proj",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    mixers=("conv",),
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "layer_types": ["conv", "full_attention", "conv"],
    },
)
