"""Kimi Linear: its full layers are latent attention, which is refused.

Where: full layers (`layer_types`, or the one-based `linear_attn_config.full_attn_layers`) make
keys and values from one latent: `self_attn.kv_a_proj_with_mqa` and `kv_b_proj`; queries come from
q_proj, or q_a_proj and q_b_proj. No positions.
Trap: the other layers, Kimi Delta Attention, are called `self_attn` too and do have q_proj and
k_proj: a filter by name restores the wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from morph.layouts._kinds import HYBRID, plain
from morph.layouts._layout import Layout
from morph.layouts._refusals import latent
from morph.layouts._settings import Settings


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every layer, from either spelling."""
    if settings.get("layer_types") is not None:
        return settings.words("layer_types", HYBRID)
    inner = settings.get("linear_attn_config")
    if inner is None:
        return tuple("linear" if i % 4 or not i else "full" for i in range(settings.layers))
    if not isinstance(inner, Mapping):
        raise settings.wrong("linear_attn_config", "a mapping of keys")
    lists = Settings(inner, {}, f"{settings.where}linear_attn_config.")
    found = [""] * settings.layers
    for key, kind in (("full_attn_layers", "full"), ("kda_layers", "linear")):
        for layer in lists.numbers(key, least=1):  # counted from one
            if layer > len(found) or found[layer - 1]:
                raise lists.wrong(key, f"layers from 1 to {len(found)}, once each in the two lists")
            found[layer - 1] = kind
    if "" in found:
        raise lists.wrong("kda_layers", f"the rest of the layers; {found.index('') + 1} is in none")
    return tuple(found)


LAYOUT = Layout(
    model_type="kimi_linear",
    kinds=kinds,
    heads=plain(rotary=False),
    refuses=latent,
    defaults={"num_hidden_layers": 27},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
        "num_experts_per_tok": 1,
        "num_local_experts": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
