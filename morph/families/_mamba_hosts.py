"""Architectures of plain transformers that hold full layers and Mamba-2, as targets.

Every one was checked to be exact: same weights, same logits. A target's config is written out in
full, because the defaults of two architectures differ. No torch, no transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from morph.families import _rope
from morph.families._family import Move, StockTarget
from morph.families._linear_plans import (
    FULL,
    assemble,
    join,
    linear,
    mamba_moves,
    mamba_values,
    must,
    not_silu,
    scaled_columns,
    silent_mamba,
    split,
    words,
)
from morph.families._stock import VLLM, complete, retag
from morph.plan import Plan

if TYPE_CHECKING:
    import numpy as np

Config = Mapping[str, Any]
Read = Callable[[str], "np.ndarray"]

# Before, granitemoehybrid norms all heads together, whatever its number of groups, and falcon_h1
# decodes a batch of more than one wrongly where it norms at all; both load without a word
NORM_PER_GROUP = (5, 23)


def transformers_version() -> tuple[int, int]:
    """Return the first two numbers of the version that is installed."""
    found = re.match(r"(\d+)\.(\d+)", metadata.version("transformers"))
    return (int(found[1]), int(found[2])) if found else NORM_PER_GROUP


def _too_old(what: str) -> str:
    if transformers_version() >= NORM_PER_GROUP:
        return ""
    version = metadata.version("transformers")
    return f"the installed transformers {version} {what}; 5.23 or newer would fit."


def _padding_note(conv: int) -> list[str]:
    return [
        "The biases of q, k and v make left padding visible: in a padded batch the first "
        f"{conv - 1} tokens of a sequence see biases where, alone, they see nothing. Without "
        "padding it is exact."
    ]


def granitemoehybrid(defaults: Config, qkv_bias: bool = False) -> StockTarget:
    """Return the target for Llama-like sources with Mamba-2 layers.

    `qkv_bias` says that q, k and v have biases and o has none, as in Qwen 2.
    """

    def biases(full: Config) -> tuple[bool, bool]:
        both = not qkv_bias and bool(full.get("attention_bias"))
        return both or qkv_bias, both

    def refuses(config: Config, plan: Plan) -> str:
        full, shape, found = complete(defaults, config), plan.geometry, linear(plan, ("mamba2",))
        if isinstance(found, str):
            return found
        wide = shape.num_attention_heads * shape.v_head_dim
        if wide % shape.hidden_size:
            return (
                f"its heads together are {wide} wide, which is no whole multiple of hidden_size "
                f"{shape.hidden_size} (mamba_expand)."
            )
        if full.get("mlp_bias"):
            return "the source has biases (mlp_bias), which it has no place for."
        return not_silu(full) or _too_old("norms all heads of a Mamba-2 layer together")

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full, shape, found = complete(defaults, config), plan.geometry, must(plan, ("mamba2",))
        heads, size = shape.num_attention_heads, shape.v_head_dim
        fields = {
            **_rope.fields(_rope.whole(_rope.flat(full))),
            "layer_types": list(words(found)),
            "position_embedding_type": "rope",
            "attention_bias": biases(full)[0],
            "attention_multiplier": full["head_dim"] ** -0.5,
            **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0),
            "shared_intermediate_size": full["intermediate_size"],
            **{"num_local_experts": 0, "num_experts_per_tok": 0, "output_router_logits": False},
            **{"mamba_n_heads": heads, "mamba_n_groups": heads, "mamba_d_head": size},
            **{"mamba_d_state": shape.head_dim, "mamba_d_conv": found.conv},
            "mamba_expand": heads * size // shape.hidden_size,
            "mamba_chunk_size": 256,
            **{"mamba_conv_bias": False, "mamba_proj_bias": True},
        }
        return retag(full, "granitemoehybrid", "GraniteMoeHybridForCausalLM", **fields)

    def moves(config: Config, plan: Plan, names: tuple[str, ...]) -> list[Move]:
        full = complete(defaults, config)
        return _granite_moves(full, plan, names, *biases(full))

    def undo(config: Config, plan: Plan, read: Read) -> dict[str, np.ndarray]:
        full = complete(defaults, config)
        return _granite_values(full, plan, biases(full)[0], read)

    def notes(config: Config, plan: Plan, read: Read) -> list[str]:
        told = [
            "It needs transformers 5.23 or newer: older ones load it and norm all heads of a "
            "Mamba-2 layer together, without a word."
        ]
        biased = biases(complete(defaults, config))[0]
        return told + (_padding_note(must(plan, ("mamba2",)).conv) if biased else [])

    return StockTarget(
        model_type="granitemoehybrid",
        refuses=refuses,
        config=write,
        moves=moves,
        undo=undo,
        layer_types=lambda plan: words(must(plan, ("mamba2",))),
        notes=notes,
        serve=VLLM,
    )


def _granite_moves(
    full: Config, plan: Plan, names: tuple[str, ...], biased: bool, o_biased: bool
) -> list[Move]:
    shape, found = plan.geometry, must(plan, ("mamba2",))
    made: list[Move] = []
    for i, mixer in enumerate(found.mixers):
        layer = f"model.layers.{i}"
        made.append(
            Move(
                target=f"{layer}.shared_mlp.input_linear.weight",
                sources=(f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
                shape=(2 * full["intermediate_size"], shape.hidden_size),
                make=join,
            )
        )
        bias = f"{layer}.{'self_attn.o_proj' if mixer == FULL else 'mamba.out_proj'}.bias"
        if o_biased:
            made.append(Move(target=bias, source=f"{layer}.self_attn.o_proj.bias"))
        elif biased or mixer != FULL:
            made.append(Move(target=bias, shape=(shape.hidden_size,)))
        if mixer != FULL:
            own = f"{layer}.self_attn.mixers.0"
            made += mamba_moves(shape, found.conv, i, own, biased)
    return assemble(
        names, made, rename=lambda n: n.replace(".mlp.down_proj.", ".shared_mlp.output_linear.")
    )


def _granite_values(full: Config, plan: Plan, biased: bool, read: Read) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for i, mixer in enumerate(must(plan, ("mamba2",)).mixers):
        layer = f"model.layers.{i}"
        both = split(
            read(f"{layer}.shared_mlp.input_linear.weight"), (full["intermediate_size"],) * 2
        )
        for name, part in zip(("gate", "up"), both):
            found[f"{layer}.mlp.{name}_proj.weight"] = part
        if mixer != FULL:
            own = f"{layer}.self_attn.mixers.0"
            found |= mamba_values(plan.geometry, i, own, biased, read)
    return found


def falcon_h1(defaults: Config) -> StockTarget:
    """Return the target for Llama with attention and Mamba-2 side by side.

    Every layer of it has both: a full layer's Mamba-2 adds nothing, nor does the attention of a
    layer that is Mamba-2 alone.
    """
    kinds = ("parallel", "mamba2")

    def refuses(config: Config, plan: Plan) -> str:
        found = linear(plan, kinds)
        if isinstance(found, str):
            return found
        if "parallel" not in found.mixers:
            return "no layer is parallel, and every layer would carry a branch for nothing."
        return not_silu(complete(defaults, config)) or _too_old("decodes a batch wrongly")

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full, shape, found = complete(defaults, config), plan.geometry, must(plan, kinds)
        heads, size = shape.num_attention_heads, shape.v_head_dim
        ones = """attention_in_multiplier attention_out_multiplier embedding_multiplier
            key_multiplier lm_head_multiplier ssm_in_multiplier ssm_out_multiplier"""
        fields = {
            **_rope.fields(_rope.whole(_rope.flat(full))),
            **dict.fromkeys(ones.split(), 1.0),
            **{"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5},
            "attention_bias": bool(full.get("attention_bias")),
            "mlp_bias": bool(full.get("mlp_bias")),
            "projectors_bias": False,
            **{"mamba_n_heads": heads, "mamba_n_groups": heads, "mamba_d_head": size},
            **{"mamba_d_state": shape.head_dim, "mamba_d_conv": found.conv},
            **{"mamba_d_ssm": heads * size, "mamba_expand": 2, "mamba_chunk_size": 256},
            **{"mamba_conv_bias": False, "mamba_proj_bias": True},
            **{"mamba_rms_norm": True, "mamba_norm_before_gate": False},
        }
        return retag(full, "falcon_h1", "FalconH1ForCausalLM", **fields)

    def moves(config: Config, plan: Plan, names: tuple[str, ...]) -> list[Move]:
        shape, found = plan.geometry, must(plan, kinds)
        biased = bool(config.get("attention_bias"))
        made: list[Move] = []
        for i, mixer in enumerate(found.mixers):
            attention = f"model.layers.{i}.self_attn"
            if mixer == FULL:
                made += silent_mamba(shape, found.conv, i)
                continue
            own, out = f"{attention}.mixers.0", f"{attention}.o_proj.weight"
            size = (shape.hidden_size, shape.num_attention_heads * shape.v_head_dim)
            if mixer == "mamba2":
                made += mamba_moves(shape, found.conv, i, own, biased)
                made.append(Move(target=out, shape=size))
            else:
                branch, gain = f"{own}.branch", f"{own}.gain_branch"
                made += mamba_moves(shape, found.conv, i, branch, biased, gain)
                made.append(
                    Move(
                        target=out,
                        sources=(out, f"{own}.gain_full"),
                        shape=size,
                        make=lambda parts: scaled_columns(*parts),
                        exact=True,
                    )
                )
            shared = [f"{attention}.{n}_proj.{kind}" for n in "qkv" for kind in ("weight", "bias")]
            made += [Move(target=n, source=n) for n in shared if n in names]
        return assemble(names, made, rename=_falcon_name)

    def notes(config: Config, plan: Plan, read: Read) -> list[str]:
        told = [
            "It needs transformers 5.23 or newer: older ones load it and decode a batch of more "
            "than one sequence wrongly, without a word."
        ]
        return told + (
            _padding_note(must(plan, kinds).conv) if config.get("attention_bias") else []
        )

    def undo(config: Config, plan: Plan, read: Read) -> dict[str, np.ndarray]:
        biased, found = bool(config.get("attention_bias")), {}
        for i, mixer in enumerate(must(plan, kinds).mixers):
            own = f"model.layers.{i}.self_attn.mixers.0"
            if mixer == "mamba2":
                found |= mamba_values(plan.geometry, i, own, biased, read)
            elif mixer == "parallel":
                found |= mamba_values(plan.geometry, i, f"{own}.branch", biased, read)
                found |= _parted(plan, i, own, read)
        return found

    return StockTarget(
        model_type="falcon_h1",
        refuses=refuses,
        config=write,
        moves=moves,
        undo=undo,
        layer_types=lambda plan: ("hybrid",) * len(plan.layers),
        notes=notes,
        serve=VLLM,
    )


def _parted(plan: Plan, i: int, own: str, read: Read) -> dict[str, np.ndarray]:
    """Return one output projection and two gains from two projections that differ by head in size.

    Each head takes the larger of the two, with a gain of 1.
    """
    import numpy as np

    layer, heads = f"model.layers.{i}", plan.geometry.num_attention_heads
    out = read(f"{layer}.self_attn.o_proj.weight"), read(f"{layer}.mamba.out_proj.weight")
    both = np.stack([x.reshape(len(x), heads, -1) for x in out])  # [2, D, H, V]
    sizes = (both.astype(np.float64) ** 2).sum(axis=(1, 3))  # [2, H]
    larger = np.where((sizes[0] >= sizes[1])[:, None], both[0], both[1])  # [D, H, V]
    gains = (both * larger.astype(np.float64)).sum(axis=(1, 3)) / np.maximum(sizes.max(0), 1e-30)
    return {
        f"{layer}.self_attn.o_proj.weight": larger.reshape(len(larger), -1),
        f"{own}.gain_full": gains[0],
        f"{own}.gain_branch": gains[1],
    }


def _falcon_name(name: str) -> str:
    if name.startswith("model.norm."):
        return name.replace("model.norm.", "model.final_layernorm.")
    name = name.replace(".post_attention_layernorm.", ".pre_ff_layernorm.")
    return name.replace(".mlp.", ".feed_forward.")
