"""A plan of full and linear layers in a stock architecture's words, and what its tensors become.

No torch, no transformers; numpy only where a tensor is computed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from morph import registry
from morph.errors import escape
from morph.families._family import Move
from morph.plan import Geometry, HeadGroup, Plan

if TYPE_CHECKING:
    import numpy as np

FULL = "full"
WORDS = ("full_attention", "linear_attention")
# Options that a stock layer has no choice about
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "gated_delta": {"inputs": "projected", "gate": "silu"},
    "mamba2": {},
    "parallel": {"branch": "mamba2", "window": 0},
}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A plan in a stock architecture's words: a mixer per layer, one width of convolution."""

    mixers: tuple[str, ...]
    conv: int


def linear(plan: Plan, allowed: Collection[str]) -> Linear | str:
    """Return the plan as full layers and layers of the mixers `allowed`, or why it is not that."""
    mixers = []
    widths: dict[int, int] = {}  # width: first layer that has it
    for i, (layer, window) in enumerate(zip(plan.layers, plan.geometry.windows)):
        name = FULL if layer.is_full else layer.mixer
        if name is None:
            return f"layer {i} mixes heads, and a stock layer treats all heads alike."
        mixers.append(name)
        if name not in (FULL, *allowed):
            known = " or ".join(sorted(allowed))
            return f"layer {i} is {escape(repr(name))}, and its layers are full or {known}."
        if name in (FULL, "parallel") and window is not None:
            return f"layer {i} has a window of {window} tokens, and its attention has none."
        if name != FULL:
            width = _width(i, name, layer.groups[0])
            if isinstance(width, str):
                return width
            widths.setdefault(width, i)
    if not widths:
        return f"no layer is {' or '.join(sorted(allowed))}, and without one it is another kind."
    if len(widths) > 1:
        (a, i), (b, j) = list(widths.items())[:2]
        return (
            f"layers {i} and {j} convolve over {a} and {b} tokens, and a stock config has one "
            "width; give both the same conv."
        )
    return Linear(mixers=tuple(mixers), conv=next(iter(widths)))


def must(plan: Plan, allowed: Collection[str]) -> Linear:
    """Return the layout of a plan that was not refused."""
    found = linear(plan, allowed)
    assert isinstance(found, Linear), found
    return found


def words(found: Linear) -> tuple[str, ...]:
    """Return the layers in transformers' words, as most hosts call them."""
    return tuple(WORDS[x != FULL] for x in found.mixers)


def not_silu(full: Mapping[str, Any]) -> str:
    """Return why a host whose convolutions take the MLP's activation does not fit, or nothing."""
    if full["hidden_act"] == "silu":
        return ""
    act = escape(repr(full["hidden_act"]), 40)
    return f"its convolutions take the source's hidden_act, which is {act} and not 'silu'."


def _width(i: int, name: str, group: HeadGroup) -> int | str:
    """Return the width of a layer's convolution, or why no stock layer is like this one."""
    settings = {**_defaults(name), **group.options}
    for key, value in _FIXED[name].items():
        if settings.get(key, value) != value:
            return (
                f"layer {i} is {name} with {key}={escape(repr(settings[key]), 60)}, which no stock "
                f"layer can; {key}={value} would fit."
            )
    if name == "parallel":
        settings = {**_defaults("mamba2"), **(settings.get("branch_options") or {})}
    width = settings.get("conv")
    if type(width) is not int or width < 2:
        return f"layer {i} is {name} without a convolution; conv=4, or 2 or more, would fit."
    return width


def _defaults(mixer: str) -> dict[str, Any]:
    """Return what a mixer assumes where a plan is silent; read, not imported."""
    found = {}
    for name, _, default in registry.options("mixers", mixer):
        with suppress(ValueError):  # a default that is made anew each time
            found[name] = ast.literal_eval(default)
    return found


def assemble(
    names: tuple[str, ...],
    made: list[Move],
    dropped: Collection[str] = (),
    rename: Callable[[str], str] = str,
) -> list[Move]:
    """Return `made`, and a plain move for every tensor that none of them reads."""
    used = {n for m in made for n in (*m.sources, m.source)}
    left = [n for n in names if n not in used and n not in dropped]
    return made + [Move(target=rename(n), source=n) for n in left]


def join(parts: list[np.ndarray]) -> np.ndarray:
    """Return arrays one after another along their first dimension."""
    import numpy as np

    return np.concatenate(parts)


def per_query_head(x: np.ndarray, shape: Geometry) -> np.ndarray:
    """Return rows of KV heads [G S, ...] repeated for every query head [H S, ...]."""
    rows = x.reshape(shape.num_key_value_heads, -1, *x.shape[1:])
    return rows.repeat(shape.group_size, axis=0).reshape(-1, *x.shape[1:])


def per_kv_head(x: np.ndarray, shape: Geometry) -> np.ndarray:
    """Return what `per_query_head` was given."""
    rows = x.reshape(shape.num_key_value_heads, shape.group_size, -1, *x.shape[1:])
    return rows[:, 0].reshape(-1, *x.shape[1:])


def split(x: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return parts of an array of these sizes, in order."""
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [x[end - size : end] for end, size in zip(ends, sizes)]


def taps(x: np.ndarray, shape: Geometry) -> np.ndarray:
    """Return a convolution [H or G, S, W] as [H S, 1, W]."""
    flat = x.reshape(-1, 1, x.shape[-1])
    return flat if len(x) == shape.num_attention_heads else per_query_head(flat, shape)


def scaled_columns(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return an output projection [D, H V] times [H, V] by column, or times [H] by head."""
    return weight * scale.reshape(-1).repeat(weight.shape[1] // scale.size)


def mamba_moves(
    shape: Geometry, conv: int, i: int, own: str, biased: bool, gain: str | None = None
) -> list[Move]:
    """Return the tensors `mamba.*` of layer `i`, apart from out_proj's bias.

    `own` is the prefix of the mixer's tensors, `biased` says whether q, k and v have biases, `gain`
    names factors [H] of the layer's output.
    """
    heads, size, keys = shape.num_attention_heads, shape.v_head_dim, shape.head_dim
    old, new = f"model.layers.{i}.self_attn", f"model.layers.{i}.mamba"
    wide, state = heads * size, heads * keys
    rows = 2 * wide + 2 * state + heads

    def weight(parts: list[np.ndarray]) -> np.ndarray:
        q, z, v, k, dt = parts
        return join([z, per_query_head(v, shape), per_query_head(k, shape), q, dt])

    def bias(parts: list[np.ndarray]) -> np.ndarray:
        import numpy as np

        z, *rest = parts
        found = np.zeros(rows, z.dtype)
        found[:wide] = z
        if biased:
            q, v, k = rest
            found[wide : rows - heads] = join(
                [per_query_head(v, shape), per_query_head(k, shape), q]
            )
        return found

    def convolution(parts: list[np.ndarray]) -> np.ndarray:
        return join([taps(x, shape) for x in parts])

    q, k, v = (f"{old}.{n}_proj" for n in "qkv")
    projections = (f"{q}.weight", f"{own}.z_weight", f"{v}.weight", f"{k}.weight")
    biases = (f"{q}.bias", f"{v}.bias", f"{k}.bias") if biased else ()
    out = Move(target=f"{new}.out_proj.weight", source=f"{old}.o_proj.weight")
    if gain:
        out = Move(
            target=f"{new}.out_proj.weight",
            sources=(f"{old}.o_proj.weight", gain),
            shape=(shape.hidden_size, wide),
            make=lambda parts: scaled_columns(*parts),
            exact=True,
        )
    return [
        Move(
            target=f"{new}.in_proj.weight",
            sources=(*projections, f"{own}.dt_weight"),
            shape=(rows, shape.hidden_size),
            make=weight,
        ),
        Move(
            target=f"{new}.in_proj.bias",
            sources=(f"{own}.z_bias", *biases),
            shape=(rows,),
            make=bias,
        ),
        Move(
            target=f"{new}.conv1d.weight",
            sources=tuple(f"{own}.conv.{n}" for n in "vkq"),
            shape=(wide + 2 * state, 1, conv),
            make=convolution,
        ),
        Move(target=f"{new}.norm.weight", source=f"{own}.norm_weight", shape=(wide,)),
        *[Move(target=f"{new}.{n}", source=f"{own}.{n}") for n in ("A_log", "D", "dt_bias")],
        out,
    ]


def mamba_values(
    shape: Geometry, i: int, own: str, biased: bool, read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the source tensors that `mamba_moves` computed with, apart from o_proj and a gain."""
    heads, groups, size = shape.num_attention_heads, shape.num_key_value_heads, shape.v_head_dim
    old, new = f"model.layers.{i}.self_attn", f"model.layers.{i}.mamba"
    wide, state = heads * size, heads * shape.head_dim
    order, sizes = "zvkqd", (wide, wide, state, state, heads)
    weight = dict(zip(order, split(read(f"{new}.in_proj.weight"), sizes)))
    bias = dict(zip(order, split(read(f"{new}.in_proj.bias"), sizes)))
    v, k, q = split(read(f"{new}.conv1d.weight")[:, 0], (wide, state, state))
    found = {
        f"{own}.z_weight": weight["z"],
        f"{own}.dt_weight": weight["d"],
        f"{own}.z_bias": bias["z"],
        f"{own}.norm_weight": read(f"{new}.norm.weight").reshape(heads, size),
        f"{own}.conv.q": q.reshape(heads, shape.head_dim, -1),
        f"{own}.conv.k": per_kv_head(k, shape).reshape(groups, shape.head_dim, -1),
        f"{own}.conv.v": per_kv_head(v, shape).reshape(groups, size, -1),
    }
    for kind, parts in [("weight", weight), *([("bias", bias)] if biased else [])]:
        found[f"{old}.q_proj.{kind}"] = parts["q"]
        for name in "kv":
            found[f"{old}.{name}_proj.{kind}"] = per_kv_head(parts[name], shape)
    return found


def silent_mamba(shape: Geometry, conv: int, i: int) -> list[Move]:
    """Return tensors `mamba.*` of layer `i` under which it adds nothing."""
    heads, new = shape.num_attention_heads, f"model.layers.{i}.mamba"
    wide, state = heads * shape.v_head_dim, heads * shape.head_dim
    rows = 2 * wide + 2 * state + heads
    zeros: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (rows, shape.hidden_size),
        "in_proj.bias": (rows,),
        "conv1d.weight": (wide + 2 * state, 1, conv),
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "out_proj.weight": (shape.hidden_size, wide),
    }
    moves = [Move(target=f"{new}.{n}", shape=size) for n, size in zeros.items()]
    return [*moves, Move(target=f"{new}.norm.weight", shape=(wide,), fill=1.0)]
