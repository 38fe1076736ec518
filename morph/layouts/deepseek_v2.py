"""DeepSeek-V2: latent attention in every layer, which is refused.

Where: queries from `self_attn.q_proj`, or from q_a_proj and q_b_proj; keys and values from one
latent, `kv_a_proj_with_mqa` (its last rows are the rotary key of all heads) and `kv_b_proj` (per
head, rows of the key and then of the value).
Trap: no tensor is W_K alone: the latent feeds the values too.
"""

from __future__ import annotations

from morph.layouts._kinds import full, plain
from morph.layouts._layout import Layout
from morph.layouts._refusals import latent

LAYOUT = Layout(
    model_type="deepseek_v2",
    kinds=full,
    heads=plain(),
    refuses=latent,
    defaults={"num_hidden_layers": 32},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 1,
    },
)
