"""HypeNet (HALO): softmax and linear layers with the same names and shapes, all called `self_attn`.

Where: `self_attn.q_proj` and k_proj of the layers that `mixer_types` calls "attn", with norms per
head; the output gate is a matrix of its own, `o_gate`. Positions only where `attn_use_rope` is
true; the published models have it false.
Trap: the other layers (lightning attention, Gated DeltaNet, KDA) have q_proj, k_proj, q_norm and
k_norm too: neither names nor shapes tell, only `mixer_types` does.
Source: the code and the configs that its authors published; the model itself was not run, because
transformers does not have this architecture.
"""

from __future__ import annotations

from morph.layouts._kinds import full
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads

WORDS = {
    "attn": "full",
    "lightning-attn": "linear",
    "lightning_attn": "linear",
    "gdn": "linear",
    "kda": "linear",
}


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer; an empty list means attention everywhere."""
    if settings.get("mixer_types") in (None, []):
        return full(settings)
    return settings.words("mixer_types", WORDS)


def heads(settings: Settings, layer: int, kind: str) -> Heads:
    """Return the shape of a layer's attention."""
    return settings.heads(rotary=settings.flag("attn_use_rope"), qk_norm=True, head_dim=128)


LAYOUT = Layout(
    model_type="hypenet",
    kinds=kinds,
    heads=heads,
    gate="o_gate",
    q_norm="q_norm",
    k_norm="k_norm",
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "attn_use_rope": True,
    },
)
