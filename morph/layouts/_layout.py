"""What a layout file says: where a checkpoint keeps its softmax attention, as data.

A file in this folder holds one literal, `LAYOUT = Layout(...)`, named after `config.model_type`
(`-` becomes `_`). It speaks of names and rows on disk, which may differ from those in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads

Kind = Literal["full", "sliding", "linear", "mixed", ""]
ROLES = (
    *("q", "k", "v", "o", "gate", "q_norm", "k_norm"),
    *("mixer", "mlp", "norm", "embedding", "head", "other"),
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of dimension 0 of one tensor that serve one purpose.

    `layer` is None outside the decoder's layers. `kind` is that of the attention they serve:
    `full`, `sliding`, `linear` (no softmax attention), or empty. `bias` marks the bias vectors of
    q, k, v, o and gate. `ranges` are (start, stop) pairs in order; None: the whole tensor.
    """

    tensor: str
    layer: int | None
    role: str
    kind: str = ""
    bias: bool = False
    ranges: tuple[tuple[int, int], ...] | None = None


Segment = tuple[str, int, int]  # role, head (a KV head for k and v), rows
RowMap = Callable[[Heads], Iterable[Segment]]


def query(heads: Heads) -> list[Segment]:
    """Return the rows of a projection that holds the queries, head after head."""
    return [("q", h, heads.head_dim) for h in range(heads.num_attention_heads)]


def key(heads: Heads) -> list[Segment]:
    """Return the rows of a projection that holds the keys, KV head after KV head."""
    return [("k", g, heads.head_dim) for g in range(heads.num_key_value_heads)]


def value(heads: Heads) -> list[Segment]:
    """Return the rows of a projection that holds the values, KV head after KV head."""
    return [("v", g, heads.head_dim) for g in range(heads.num_key_value_heads)]


def query_key_value(heads: Heads) -> list[Segment]:
    """Return the rows of a fused projection: all queries, then all keys, then all values."""
    return [*query(heads), *key(heads), *value(heads)]


def interleaved(heads: Heads) -> list[Segment]:
    """Return the rows of a fused projection with, per head, query, key and value; no GQA."""
    return [
        (role, h, heads.head_dim)
        for h in range(heads.num_attention_heads)
        for role in ("q", "k", "v")
    ]


def query_and_gate(heads: Heads) -> list[Segment]:
    """Return the rows of a projection with, per head, the query and then its output gate."""
    segments = []
    for h in range(heads.num_attention_heads):
        segments += [("q", h, heads.head_dim), ("gate", h, heads.head_dim)]
    return segments


SEPARATE: Mapping[str, RowMap] = {"q_proj": query, "k_proj": key, "v_proj": value}
GATED: Mapping[str, RowMap] = {"q_proj": query_and_gate, "k_proj": key, "v_proj": value}


def never(settings: Settings) -> str:
    """Return no reason to refuse."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where one architecture keeps its softmax attention on disk.

    `kinds(settings)` returns `full`, `sliding` or `linear` per layer, and `heads(settings, layer,
    kind)` the shape of a softmax layer. `attention` is the module in a layer that holds it and
    `projections` the row map of each projection in it; `o`, `gate`, `q_norm` and `k_norm` name
    further modules (None: there is none), and `norm_scope` says whether the norms see one head
    (`head`) or have a weight for every row of the projection (`projection`). `mixers` and `mlp`
    name the layer's other modules. `instead(settings)` returns, per layer, the role of the
    `attention` module where it holds no softmax attention (None: a mixer). `refuses(settings)`
    returns why q and k cannot be told apart or restored, or an empty string. `defaults` are the
    config class's where config.json is silent. `tiny_config` makes a random model for tests.
    """

    model_type: str
    kinds: Callable[[Settings], Sequence[str]]
    heads: Callable[[Settings, int, str], Heads]
    tiny_config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "layers"
    attention: str = "self_attn"
    projections: Mapping[str, RowMap] = field(default_factory=lambda: SEPARATE)
    o: str = "o_proj"
    gate: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    norm_scope: Literal["head", "projection"] = "head"
    mixers: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("mlp", "feed_forward", "block_sparse_moe", "moe", "shared_mlp")
    instead: Callable[[Settings], Sequence[str]] | None = None
    refuses: Callable[[Settings], str] = never
    notes: tuple[str, ...] = ()
