"""GLM-4.5 to 4.7: full attention, norms in some models, experts beside it.

Where: `self_attn.q_proj` and k_proj of every layer; q_norm and k_norm where `use_qk_norm` is true.
Trap: half of each head turns. The layer beyond num_hidden_layers predicts further tokens.
"""

from __future__ import annotations

from morph.layouts._kinds import full
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention."""
    return settings.heads(share=settings.share(0.5), qk_norm=settings.flag("use_qk_norm"))


LAYOUT = Layout(
    model_type="glm4_moe",
    kinds=full,
    heads=heads,
    q_norm="q_norm",
    k_norm="k_norm",
    defaults={
        "num_hidden_layers": 46,
        "hidden_size": 4096,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
    },
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
)
