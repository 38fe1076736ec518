"""OLMo Hybrid: attention and Gated DeltaNet layers that both have a q_proj.

Where: `self_attn` of the full layers; q_norm and k_norm see the whole projection, with a weight
for every row. Where `rope_parameters.rope_theta` is null these layers have no positions.
Trap: the linear layers have `linear_attn.q_proj` and `linear_attn.k_proj`: a filter on `q_proj`
alone hits them.
"""

from __future__ import annotations

from morph.layouts._kinds import HYBRID, every, listed
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer; by default each fourth is full, and at least the last."""
    found = every("full", "linear", 4)(settings)
    return found if "full" in found else (*found[:-1], "full")


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention; a base of null leaves the positions out."""
    return settings.heads(rotary=settings.rope().get("rope_theta", 0) is not None, qk_norm=True)


LAYOUT = Layout(
    model_type="olmo_hybrid",
    kinds=listed(HYBRID, kinds),
    heads=heads,
    q_norm="q_norm",
    k_norm="k_norm",
    norm_scope="projection",
    mixers=("linear_attn",),
    defaults={"num_hidden_layers": 32, "num_attention_heads": 30, "hidden_size": 3840},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "pad_token_id": 0,
        "eos_token_id": 2,
    },
)
