"""Architectures of plain transformers that hold full layers and Gated DeltaNet, as targets.

What is written was checked to be exact: same weights, same logits. A target's config is written out
in full, because the defaults of two architectures differ. No torch, no transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from morph.families import _rope
from morph.families._family import Move, StockTarget
from morph.families._linear_plans import (
    FULL,
    assemble,
    join,
    linear,
    must,
    not_silu,
    per_kv_head,
    per_query_head,
    scaled_columns,
    split,
    taps,
    words,
)
from morph.families._stock import VLLM, complete, retag
from morph.plan import Plan

if TYPE_CHECKING:
    import numpy as np

Config = Mapping[str, Any]
Read = Callable[[str], "np.ndarray"]

LOSS = 2.0**-9  # what rounding to bfloat16 costs any number


def qwen3_5(defaults: Config) -> StockTarget:
    """Return the target for Qwen 3 with Gated DeltaNet layers.

    Its attention is gated and its norms multiply by 1 + w: the gate is held at one half, what comes
    out is doubled, and the norms are written as w - 1.
    """
    kinds = ("gated_delta",)

    def refuses(config: Config, plan: Plan) -> str:
        full, found = complete(defaults, config), linear(plan, kinds)
        if isinstance(found, str):
            return found
        if full.get("attention_bias"):
            return "the source has biases (attention_bias), which its linear layers have none of."
        return not_silu(full)

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        full, shape, found = complete(defaults, config), plan.geometry, must(plan, kinds)
        heads, third = shape.num_attention_heads, shape.head_dim // 2 // 3
        rope = {
            **_rope.flat(full),
            "partial_rotary_factor": 1.0,
            "mrope_interleaved": True,  # of text, whose three positions are one
            "mrope_section": [shape.head_dim // 2 - 2 * third, third, third],
        }
        fields = {
            **_rope.fields(rope),
            "partial_rotary_factor": 1.0,
            "layer_types": list(words(found)),
            "attention_bias": False,
            "linear_conv_kernel_dim": found.conv,
            **{"linear_num_key_heads": heads, "linear_num_value_heads": heads},
            "linear_key_head_dim": shape.head_dim,
            "linear_value_head_dim": shape.v_head_dim,
        }
        return retag(full, "qwen3_5_text", "Qwen3_5ForCausalLM", **fields)

    def moves(config: Config, plan: Plan, names: tuple[str, ...]) -> list[Move]:
        made = [
            Move(target=n, sources=(n,), shape=(size,), make=_less_one, exact=True)
            for n, size in _qwen_norms(plan).items()
        ]
        for i, mixer in enumerate(must(plan, kinds).mixers):
            made += _gated_attention(plan, i) if mixer == FULL else _delta_net(plan, i)
        return assemble(names, made, dropped(config, plan, names))

    def dropped(config: Config, plan: Plan, names: tuple[str, ...]) -> dict[str, str]:
        mixers = must(plan, kinds).mixers
        unused = [f"model.layers.{i}.self_attn" for i, x in enumerate(mixers) if x != FULL]
        found = [f"{a}.{n}_norm.weight" for a in unused for n in "qk"]
        return {n: "a gated_delta layer takes q and k before the norms" for n in found}

    def undo(config: Config, plan: Plan, read: Read) -> dict[str, np.ndarray]:
        shape, found = plan.geometry, {n: read(n) + 1 for n in _qwen_norms(plan)}
        for i, mixer in enumerate(must(plan, kinds).mixers):
            if mixer != FULL:
                found |= _delta_values(plan, i, read)
                continue
            q, o = (f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qo")
            gated = read(q).reshape(shape.num_attention_heads, 2, shape.head_dim, -1)
            found |= {q: gated[:, 0].reshape(-1, shape.hidden_size), o: read(o) / 2}
        return found

    return StockTarget(
        model_type="qwen3_5_text",
        refuses=refuses,
        config=write,
        moves=moves,
        undo=undo,
        dropped=dropped,
        layer_types=lambda plan: words(must(plan, kinds)),
        notes=lambda config, plan, read: _norm_notes(config, _qwen_norms(plan), read),
        serve=VLLM,
    )


def _qwen_norms(plan: Plan) -> dict[str, int]:
    """Return the names and sizes of the norms that multiply by 1 + w in Qwen 3.5."""
    shape, found = plan.geometry, {"model.norm.weight": plan.geometry.hidden_size}
    for i, layer in enumerate(plan.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = shape.hidden_size
        if layer.is_full:
            for norm in ("q_norm", "k_norm"):
                found[f"model.layers.{i}.self_attn.{norm}.weight"] = shape.head_dim
    return found


def _less_one(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] - 1


def _gated_attention(plan: Plan, i: int) -> list[Move]:
    """Return attention whose gate is sigmoid(0): one half of what its doubled projection gives."""
    shape, attention = plan.geometry, f"model.layers.{i}.self_attn"
    heads, size = shape.num_attention_heads, shape.head_dim

    def gated(parts: list[np.ndarray]) -> np.ndarray:
        import numpy as np

        q = parts[0].reshape(heads, size, -1)
        return np.concatenate([q, np.zeros_like(q)], axis=1).reshape(2 * heads * size, -1)

    q, o = f"{attention}.q_proj.weight", f"{attention}.o_proj.weight"
    return [
        Move(target=q, sources=(q,), shape=(2 * heads * size, shape.hidden_size), make=gated),
        Move(
            target=o,
            sources=(o,),
            shape=(shape.hidden_size, heads * shape.v_head_dim),
            make=lambda parts: 2 * parts[0],
            exact=True,
        ),
    ]


def _delta_net(plan: Plan, i: int) -> list[Move]:
    """Return the tensors `linear_attn.*`; the per-head weight of the norm goes into out_proj."""
    shape, attention = plan.geometry, f"model.layers.{i}.self_attn"
    own, new = f"{attention}.mixers.0", f"model.layers.{i}.linear_attn"
    heads, keys, size = shape.num_attention_heads, shape.head_dim, shape.v_head_dim
    rows = heads * (2 * keys + size)
    same = {"in_proj_a.weight": "a_weight", "in_proj_b.weight": "b_weight"}
    same |= {"in_proj_z.weight": "z_weight", "A_log": "A_log", "dt_bias": "dt_bias"}

    def projections(parts: list[np.ndarray]) -> np.ndarray:
        q, k, v = parts
        return join([q, per_query_head(k, shape), per_query_head(v, shape)])

    return [
        Move(
            target=f"{new}.in_proj_qkv.weight",
            sources=tuple(f"{attention}.{n}_proj.weight" for n in "qkv"),
            shape=(rows, shape.hidden_size),
            make=projections,
        ),
        Move(
            target=f"{new}.conv1d.weight",
            sources=tuple(f"{own}.conv.{n}" for n in "qkv"),
            shape=(rows, 1, must(plan, ("gated_delta",)).conv),
            make=lambda parts: join([taps(x, shape) for x in parts]),
        ),
        Move(target=f"{new}.norm.weight", shape=(size,), fill=1.0),
        Move(
            target=f"{new}.out_proj.weight",
            sources=(f"{attention}.o_proj.weight", f"{own}.norm_weight"),
            shape=(shape.hidden_size, heads * size),
            make=lambda parts: scaled_columns(*parts),
            exact=True,
        ),
        *[Move(target=f"{new}.{n}", source=f"{own}.{o}") for n, o in same.items()],
    ]


def _delta_values(plan: Plan, i: int, read: Read) -> dict[str, np.ndarray]:
    """Return what `_delta_net` computed with, but for the norm's weight, which stays in o_proj."""
    import numpy as np

    shape, attention = plan.geometry, f"model.layers.{i}.self_attn"
    own, new = f"{attention}.mixers.0", f"model.layers.{i}.linear_attn"
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    keys, size = shape.head_dim, shape.v_head_dim
    sizes = (heads * keys, heads * keys, heads * size)
    q, k, v = split(read(f"{new}.in_proj_qkv.weight"), sizes)
    q_taps, k_taps, v_taps = split(read(f"{new}.conv1d.weight")[:, 0], sizes)
    return {
        f"{attention}.q_proj.weight": q,
        f"{attention}.k_proj.weight": per_kv_head(k, shape),
        f"{attention}.v_proj.weight": per_kv_head(v, shape),
        f"{attention}.o_proj.weight": read(f"{new}.out_proj.weight"),
        f"{own}.conv.q": q_taps.reshape(heads, keys, -1),
        f"{own}.conv.k": per_kv_head(k_taps, shape).reshape(groups, keys, -1),
        f"{own}.conv.v": per_kv_head(v_taps, shape).reshape(groups, size, -1),
        f"{own}.norm_weight": np.ones((heads, size), np.float32),
    }


def _norm_notes(config: Config, norms: Mapping[str, int], read: Read) -> list[str]:
    """Return what a load in bfloat16 costs norms that are written as w - 1, where it matters."""
    if str(config.get("dtype") or config.get("torch_dtype")).endswith("float32"):
        return []
    name, worst = max(((n, _loss(read(n))) for n in norms), key=lambda x: x[1])
    if worst <= LOSS:
        return []
    return [
        "This architecture multiplies by 1 + w; norms whose w does not fit 16 bits are stored in "
        f"float32. Loaded in bfloat16 they are rounded all the same, at worst by {worst:.1%} of a "
        f"weight ({name}). Load it with dtype=torch.float32 where that matters."
    ]


def _loss(weight: np.ndarray) -> float:
    """Return the largest share by which a norm weight changes when w - 1 is rounded."""
    import numpy as np

    w = weight.astype(np.float64)
    bits = (w - 1).astype("<f4").view("<u4")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) & np.uint32(0xFFFF0000)).view("<f4")
    return float(np.max(np.abs(rounded + 1.0 - w) / np.maximum(np.abs(w), 1e-30)))


def olmo_hybrid() -> StockTarget:
    """Return the target that looks right for OLMo 2 and is not: it says why."""

    def refuses(config: Config, plan: Plan) -> str:
        if "gated_delta" not in plan.mixers:
            return "no layer is gated_delta, and without one it is another kind."
        return (
            "its linear layers norm what goes into attention and MLP, and OLMo 2 norms what comes "
            "out; no weights make the two equal, and no option of a mixer does."
        )

    def write(config: Config, plan: Plan) -> dict[str, Any]:
        raise AssertionError("olmo_hybrid holds no plan of OLMo 2")

    return StockTarget(model_type="olmo_hybrid", refuses=refuses, config=write)
