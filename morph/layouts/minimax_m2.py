"""MiniMax-M2: full attention in every layer, norms over the whole projection.

Where: `self_attn.q_proj` and k_proj; q_norm and k_norm have a weight for every row.
Trap: only the first `rotary_dim` numbers of a head turn, and experts are `block_sparse_moe` on
disk but `mlp` in memory.
"""

from __future__ import annotations

from morph.layouts._kinds import full
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention; `rotary_dim` is the older spelling of its share."""
    if settings.get("rotary_dim") is None:
        return settings.heads(share=settings.share(), qk_norm=True, head_dim=128)
    dim = settings.size("head_dim", 128)
    return settings.heads(share=settings.size("rotary_dim", most=dim) / dim, qk_norm=True)


LAYOUT = Layout(
    model_type="minimax_m2",
    kinds=full,
    heads=heads,
    q_norm="q_norm",
    k_norm="k_norm",
    norm_scope="projection",
    defaults={
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.4},
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
