"""What a family file says: where a Hugging Face model keeps its attention, as data.

A file in this folder holds one literal, `FAMILY = Family(...)`, named after `config.model_type`
(`-` becomes `_`). Model classes are wrapped, never forked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from morph.errors import CheckpointError, escape
from morph.plan import Geometry, Plan

if TYPE_CHECKING:  # arrays are only at hand where tensors are computed
    import numpy as np

MAX_LAYERS = 10_000  # a hostile config must not cost memory before it is refused


@dataclass(frozen=True, kw_only=True)
class Move:
    """One tensor of the target: rows of a source tensor, a new constant, or a computed tensor.

    With `source` it is the rows `start:stop` of that one (None: all), byte for byte, under another
    `shape` if one is given. With `make` it is what that returns for the values of `sources`, as
    float32 arrays (float64 where stored so); it must have `shape`, and is rounded once to the dtype
    of the first source. `exact` stores it in float32 where 16 bits cannot hold every value. With
    neither it is a new tensor of `shape` filled with `fill`. All of it is done without torch.
    """

    target: str
    source: str | None = None
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    fill: float = 0.0
    sources: tuple[str, ...] = ()
    make: Callable[[list[np.ndarray]], np.ndarray] | None = None
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class StockTarget:
    """An architecture of plain transformers that can hold some plans of this family.

    `refuses(config, plan)` returns an empty string, or why this plan does not fit. `config(config,
    plan)` returns the whole target config.json. `moves(config, plan, names)` returns one `Move`
    per target tensor, given the source's tensor names (None: all names unchanged); `dropped(config,
    plan, names)` maps those it leaves out to the reason. `layer_types(plan)` is what the loaded
    config calls its layers (None: as the plan does). `notes(config, plan, read)` returns sentences
    that the user of the result must know; `read(name)` gives a source tensor's values.
    `undo(config, plan, read)`, given the target's, returns those that `moves` computed with: not
    always the same numbers, always the same function.
    """

    model_type: str
    refuses: Callable[[Mapping[str, Any], Plan], str]
    config: Callable[[Mapping[str, Any], Plan], dict[str, Any]]
    moves: Callable[[Mapping[str, Any], Plan, tuple[str, ...]], list[Move]] | None = None
    dropped: Callable[[Mapping[str, Any], Plan, tuple[str, ...]], dict[str, str]] | None = None
    layer_types: Callable[[Plan], tuple[str, ...]] | None = None
    notes: Callable[[Mapping[str, Any], Plan, Callable[[str], np.ndarray]], list[str]] | None = None
    undo: (
        Callable[[Mapping[str, Any], Plan, Callable[[str], np.ndarray]], dict[str, np.ndarray]]
        | None
    ) = None
    serve: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a decoder keeps its attention and what the parts are called.

    `module` is the transformers modeling module; class names live in it. `qkv` names one fused
    projection (rows in the order q, k, v) where q, k and v are not separate. `norm_scope` says
    whether q/k norms see one head (`head`) or the whole projection (`projection`). `defaults` are
    the values that the config class supplies where config.json is silent, with the rotary base
    under its older name `rope_theta`.
    """

    model_type: str
    module: str
    config_class: str
    base_class: str
    causal_class: str
    attention_class: str
    tiny_config: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "layers"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm_scope: str = "head"
    # attribute of the attention module that says whether this layer rotates q and k
    rotary_switch: str | None = None
    # attribute of the attention module that holds a soft cap on the scores, or None
    softcap: str | None = None
    windows: Callable[[Mapping[str, Any]], tuple[int | None, ...]] | None = None
    stock: tuple[StockTarget, ...] = field(default_factory=tuple)

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Return the attention geometry of a config.json; defaults come from the config class.

        Raises CheckpointError where a size is not a positive whole number.
        """
        full = {**self.defaults, **config}
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        hidden, layers, heads = (_size(full, name) for name in names)
        if layers > MAX_LAYERS:
            raise CheckpointError(
                f"config.json: num_hidden_layers is {layers}; more than {MAX_LAYERS} is no decoder."
            )
        kv_heads = _size(full, "num_key_value_heads", heads)
        head_dim = _size(full, "head_dim", max(1, hidden // heads))
        return Geometry(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim,
            hidden_size=hidden,
            windows=self.windows(config) if self.windows else (None,) * layers,
        )

    @property
    def attention_implementation(self) -> str | None:
        """`eager` where scores are capped (sdpa of transformers 5.17 drops caps); None: any."""
        return "eager" if self.softcap else None

    def part(self, name: str) -> Any:
        """Import and return a class or function of this family's modeling module."""
        return getattr(importlib.import_module(self.module), name)


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"config.json: {name} is {escape(repr(value), 60)}; it must be a whole number of at "
            "least 1."
        )
    return value
