"""Nemotron-H and Nemotron 3: every block is called `mixer`, whatever it is.

Where: `mixer.q_proj`, k_proj, v_proj and o_proj of the blocks that `layers_block_type`, or a `*` in
`hybrid_override_pattern`, makes attention. No positions. On disk the layers lie under `backbone.`
(the models' own code) or `model.` (transformers), and the weights' names do not tell which block
is which.
Trap: each layer is ONE block: Mamba-2, attention, MLP or experts. num_hidden_layers counts blocks.
"""

from __future__ import annotations

from morph.families._family import MAX_LAYERS
from morph.layouts._kinds import HYBRID, plain
from morph.layouts._layout import Layout
from morph.layouts._settings import Settings

WORDS = {**HYBRID, "mlp": "linear", "moe": "linear"}
LETTERS = {"*": "full_attention", "M": "linear_attention", "-": "mlp", "E": "moe"}


def blocks(settings: Settings) -> list[str]:
    """Return the word of every block, from the list or the older pattern of letters."""
    for key in ("layers_block_type", "layer_types"):
        found = settings.get(key)
        if found is not None:
            if not isinstance(found, list) or len(found) > MAX_LAYERS:
                raise settings.wrong(key, "a list with a word for every block")
            settings.words(key, WORDS, len(found))
            return found
    pattern = settings.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or set(pattern) - set(LETTERS) or len(pattern) > MAX_LAYERS:
        raise settings.wrong("hybrid_override_pattern", f"letters of {' '.join(LETTERS)}")
    return [LETTERS[letter] for letter in pattern]


def kinds(settings: Settings) -> tuple[str, ...]:
    """Return the kind of every block; experts and MLPs have no softmax attention either."""
    return tuple(WORDS[word] for word in blocks(settings))


def instead(settings: Settings) -> list[str]:
    """Return the role of every block that is no attention."""
    return ["mlp" if word in ("mlp", "moe") else "mixer" for word in blocks(settings)]


LAYOUT = Layout(
    model_type="nemotron_h",
    kinds=kinds,
    heads=plain(rotary=False, head_dim=128),
    attention="mixer",
    instead=instead,
    defaults={"num_attention_heads": 32, "num_key_value_heads": 8},
    tiny_config={
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 12,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "ssm_state_size": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "expand": 1,
        "chunk_size": 4,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    },
)
