"""Jet-Nemotron: softmax, sliding and JetBlock layers, all called `self_attn`.

Where: `self_attn.q_proj` and k_proj of the layers that `layer_types` calls "attn" (full) or "swa"
(sliding over efficient_attention_config.swa.window_size), with biases on q, k and v as in Qwen2.
Trap: JetBlock layers ("jet") have q_proj and k_proj under the same name, for a linear recurrence.
Source: the code and the configs that NVlabs published; the model itself was not run, because
transformers does not have this architecture.
"""

from __future__ import annotations

from morph.layouts._kinds import full, listed, plain
from morph.layouts._layout import Layout

LAYOUT = Layout(
    model_type="jet_nemotron",
    kinds=listed({"attn": "full", "swa": "sliding", "jet": "linear"}, full),
    heads=plain(),
    defaults={
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
)
