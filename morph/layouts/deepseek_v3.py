"""DeepSeek-V3 and R1: latent attention in every layer, which is refused.

Where: as in DeepSeek-V2: q_a_proj and q_b_proj make the queries, `kv_a_proj_with_mqa` and
`kv_b_proj` the keys and values. Layers beyond num_hidden_layers predict further tokens.
Trap: no tensor is W_K alone: the latent feeds the values too.
"""

from __future__ import annotations

from morph.layouts._kinds import full, plain
from morph.layouts._layout import Layout
from morph.layouts._refusals import latent

LAYOUT = Layout(
    model_type="deepseek_v3",
    kinds=full,
    heads=plain(),
    refuses=latent,
    defaults={"num_hidden_layers": 61, "num_nextn_predict_layers": 1},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
)
