"""What a selector found, what it may cost, and which mixer each head gets.

Frozen, keyword-only dataclasses with a JSON round trip, checked when they are made; no torch.
`Scores` and `Budget` go into `selection.choose`, a `Plan` comes out. A plan can also be written
by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from morph import strict
from morph.errors import PlanError, escape

Granularity = Literal["layer", "kv_head", "head"]
Fusion = Literal["none", "scale"]
Unit = int | tuple[int, int]
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}
MAX_DEPTH, MAX_BRANCHES = 32, 200_000  # of files
STATE_BYTES = 4  # recurrent states are kept in float32 whatever the model's dtype


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a decoder's attention.

    `windows` has one entry per layer: the source's own sliding window in tokens (the query's own
    included), or None where the source attends to everything.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    hidden_size: int
    windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name != "windows"):
            if getattr(self, name) < 1:
                raise PlanError(f"geometry.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise PlanError(
                f"geometry: {self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} KV heads evenly."
            )
        if len(self.windows) != self.num_hidden_layers:
            raise PlanError(
                f"geometry.windows has {len(self.windows)} entries for "
                f"{self.num_hidden_layers} layers."
            )
        for i, window in enumerate(self.windows):
            if window is not None and window < 1:
                raise PlanError(f"geometry.windows[{i}] is {window}; a window is at least 1 token.")

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def candidates(self) -> tuple[int, ...]:
        """The layers that attend to everything in the source, and so can be replaced."""
        return tuple(i for i, w in enumerate(self.windows) if w is None)

    def units(self, granularity: Granularity) -> int:
        """Units per layer at a granularity: 1, the KV heads, or the query heads."""
        return {
            "layer": 1,
            "kv_head": self.num_key_value_heads,
            "head": self.num_attention_heads,
        }[granularity]

    def kv_heads(self, heads: Sequence[int]) -> tuple[int, ...]:
        """Return the KV heads that a group of query heads is handed, in order.

        Each once where the query heads use them evenly; otherwise one copy per query head.
        """
        used = [h // self.group_size for h in heads]
        distinct = sorted(set(used))
        share = len(used) // len(distinct)
        even = used == [kv for kv in distinct for _ in range(share)]
        return tuple(distinct if even else used)

    def entry_elements(self) -> int:
        """Elements that one KV head stores for one token: a key and a value."""
        return self.head_dim + self.v_head_dim


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """What a mixer keeps between tokens.

    `tokens` is how many KV entries it holds at most (None: all of them), `per_token` multiplies
    the size of an entry, `state_elements` counts constant float32 elements per query head and
    `kv_state_elements` those per KV head that the group is handed. Room for entries is made for
    `step` tokens at a time, and beside each entry stand `token_elements` float32 elements per KV
    head, such as K / 64 for a summary of K elements of every 64 tokens.
    """

    tokens: int | None = None
    per_token: float = 1.0
    state_elements: int = 0
    kv_state_elements: int = 0
    step: int = 1
    token_elements: float = 0.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise PlanError(f"cache.step is {self.step}; it must be 1 token or more.")

    def room(self, tokens: int) -> int:
        """Return for how many entries there is room once `tokens` are held."""
        return -(-tokens // self.step) * self.step

    def token_bytes(self, entry: int) -> float:
        """Return what one token takes per KV head, where a key and a value take `entry` bytes."""
        return self.per_token * entry + STATE_BYTES * self.token_elements

    def state_bytes(self, num_heads: int, num_key_value_heads: int) -> int:
        """Return the constant bytes of a group of that many query and KV heads."""
        elements = self.state_elements * num_heads + self.kv_state_elements * num_key_value_heads
        return STATE_BYTES * elements


@dataclass(frozen=True, kw_only=True)
class HeadGroup:
    """Query heads of one layer that share a mixer. `full` means the source's own attention."""

    mixer: str
    heads: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: CacheCost | None = None

    def __post_init__(self) -> None:
        if not self.heads:
            raise PlanError(f"a head group of mixer {self.mixer!r} has no heads.")
        if list(self.heads) != sorted(set(self.heads)):
            raise PlanError(f"heads {escape(list(self.heads))} must be listed once each, in order.")


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Head groups that partition the query heads of one layer; one group is a uniform layer.

    `fusion` is what joins them: `none` hands every head's output on as it is, `scale` brings each
    to unit root mean square and multiplies it by a learned gain per head, as HydraHead does.
    """

    groups: tuple[HeadGroup, ...]
    fusion: Fusion = "none"

    @property
    def is_full(self) -> bool:
        """True where the source's attention stays untouched."""
        return all(g.mixer == "full" for g in self.groups)

    @property
    def mixer(self) -> str | None:
        """The mixer of a uniform layer, or None where heads differ."""
        return self.groups[0].mixer if len(self.groups) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a selector measured. HIGHER = MORE NEED FOR FULL ATTENTION, for every selector.

    `values` has one row per layer and one column per unit. `pairs`, where present, is a symmetric
    matrix over units counted row by row: replacing the set C costs the sum of its values plus the
    sum of `pairs[i][j]` over i < j in C.
    """

    selector: str
    model_type: str
    granularity: Granularity
    values: tuple[tuple[float, ...], ...]
    unit: str
    pairs: tuple[tuple[float, ...], ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or not self.values[0]:
            raise PlanError("scores.values is empty; a selector must score at least one layer.")
        width = len(self.values[0])
        for i, row in enumerate(self.values):
            if len(row) != width:
                raise PlanError(f"scores.values[{i}] has {len(row)} units, layer 0 has {width}.")
            for j, value in enumerate(row):
                if not math.isfinite(value):
                    raise PlanError(f"scores.values[{i}][{j}] is {value}; scores must be finite.")
        # an integer would come back from JSON as a float, and the digest would change
        object.__setattr__(self, "values", tuple(tuple(map(float, row)) for row in self.values))
        if self.pairs is not None:
            self._check_pairs(self.pairs, width * len(self.values))

    def _check_pairs(self, pairs: tuple[tuple[float, ...], ...], count: int) -> None:
        if {len(pairs), *map(len, pairs)} != {count}:
            raise PlanError(f"scores.pairs must be {count} x {count}, one row per unit.")
        for i, row in enumerate(pairs):
            for j, value in enumerate(row):
                if not math.isfinite(value):
                    raise PlanError(f"scores.pairs[{i}][{j}] is {value}; it must be finite.")
                if value != pairs[j][i]:
                    raise PlanError(f"scores.pairs is not symmetric at [{i}][{j}].")
        object.__setattr__(self, "pairs", tuple(tuple(map(float, row)) for row in pairs))

    @property
    def digest(self) -> str:
        """The sha256 of the canonical JSON."""
        return hashlib.sha256(dumps(self).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much full attention may stay: exactly one of the three limits, plus pins.

    `full_layers` counts layers (for heads: that many layers' worth of units), `full_fraction` is
    a share of what can be replaced, `cache_bytes_per_token` bounds the growth of the KV cache in
    bytes per token at 2 bytes per element. `keep` and `replace` name a layer, or (layer, unit),
    and win over scores.
    """

    full_layers: int | None = None
    full_fraction: float | None = None
    cache_bytes_per_token: int | None = None
    keep: tuple[Unit, ...] = ()
    replace: tuple[Unit, ...] = ()
    min_full_per_layer: int = 0

    def __post_init__(self) -> None:
        limits = {
            "full_layers": self.full_layers,
            "full_fraction": self.full_fraction,
            "cache_bytes_per_token": self.cache_bytes_per_token,
        }
        given = [f"{k}={v}" for k, v in limits.items() if v is not None]
        if len(given) != 1:
            raise PlanError(
                f"a budget takes exactly one of {', '.join(limits)}; "
                f"got {' and '.join(given) or 'none'}."
            )
        if self.full_layers is not None and self.full_layers < 1:
            raise PlanError(f"budget.full_layers is {self.full_layers}; keep at least 1 layer.")
        if self.full_fraction is not None and not 0 < self.full_fraction <= 1:
            raise PlanError(f"budget.full_fraction is {self.full_fraction}; it lies in (0, 1].")
        if self.cache_bytes_per_token is not None and self.cache_bytes_per_token < 1:
            raise PlanError(
                f"budget.cache_bytes_per_token is {self.cache_bytes_per_token}; give at least 1."
            )
        if self.min_full_per_layer < 0:
            raise PlanError(f"budget.min_full_per_layer is {self.min_full_per_layer}, below 0.")

    @classmethod
    def parse(cls, text: str, **pins: Any) -> Budget:
        """Return the budget that `7`, `1/4`, `0.25`, `25%` or `4096B` (bytes a token) names."""
        value = text.strip()
        try:
            if value.endswith("%"):
                return cls(full_fraction=float(value[:-1]) / 100, **pins)
            if value.upper().endswith("B"):
                return cls(cache_bytes_per_token=int(value[:-1]), **pins)
            if "/" in value:
                top, bottom = value.split("/")
                return cls(full_fraction=int(top) / int(bottom), **pins)
            if "." in value:
                return cls(full_fraction=float(value), **pins)
            return cls(full_layers=int(value), **pins)
        except PlanError:
            raise
        except (ValueError, ArithmeticError) as error:
            raise PlanError(
                f"budget '{escape(text, 60)}' is not understood. Give layers (7), a share (1/4, "
                "0.25, 25%) or cache bytes per token (4096B)."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which mixer every head of every layer gets, and the geometry it was made for."""

    model_type: str
    geometry: Geometry
    layers: tuple[LayerPlan, ...]
    scores_digest: str | None = None

    def __post_init__(self) -> None:
        shape = self.geometry
        if len(self.layers) != shape.num_hidden_layers:
            raise PlanError(
                f"the plan has {len(self.layers)} layers, the model {shape.num_hidden_layers}."
            )
        for i, layer in enumerate(self.layers):
            seen = [h for g in layer.groups for h in g.heads]
            wrong = [h for h in seen if not 0 <= h < shape.num_attention_heads]
            if wrong:
                raise PlanError(
                    f"layer {i}: head {wrong[0]} does not exist; this model has "
                    f"{shape.num_attention_heads} query heads (0-{shape.num_attention_heads - 1})."
                )
            # all are in range; counted first, for a file may claim any number of heads
            if len(seen) != shape.num_attention_heads or len(set(seen)) != len(seen):
                raise PlanError(
                    f"layer {i}: every one of the {shape.num_attention_heads} heads must be in "
                    f"exactly one group; got {escape(sorted(seen))}."
                )

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers whose attention stays untouched."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_full)

    @property
    def replaced_layers(self) -> tuple[int, ...]:
        """Layers in which at least one head gets a cheaper mixer."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.is_full)

    @property
    def mixers(self) -> tuple[str, ...]:
        """Names of the mixers in use, `full` excluded."""
        return tuple(sorted({g.mixer for x in self.layers for g in x.groups} - {"full"}))

    @property
    def pattern(self) -> str:
        """One letter a layer, such as `FFSSFSSF`.

        F is untouched full attention, o the source's own window, * a mixture of heads; other
        mixers show their initial, or the first letter that no other mixer of the plan has.
        """
        letters, own = [], self.letters
        for layer, window in zip(self.layers, self.geometry.windows):
            if layer.is_full:
                letters.append("F" if window is None else "o")
            else:
                letters.append(own[layer.mixer] if layer.mixer else "*")
        return "".join(letters)

    @property
    def letters(self) -> dict[str, str]:
        """The letter of every mixer in `pattern`, by the mixer's name."""
        found: dict[str, str] = {}
        for mixer in self.mixers:
            name = _last_part(mixer).upper()
            free = [c for c in name if c.isalpha() and c not in ("F", *found.values())]
            found[mixer] = (free or [name[:1] or "?"])[0]
        return found

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The layers in Hugging Face's words: full, sliding or linear attention, or hybrid.

        They have none for mixers that keep every token and read some: `sparse_attention`.
        """
        words = {"full": "full_attention", "sliding": "sliding_attention"}
        found = []
        for layer, window in zip(self.layers, self.geometry.windows):
            if layer.is_full:
                found.append("full_attention" if window is None else "sliding_attention")
            elif layer.mixer is None:
                found.append("hybrid")
            else:
                found.append(words.get(layer.mixer) or _word(layer.groups[0].cache))
        return tuple(found)

    def cache_bytes(self, seq_len: int, dtype: str = "bfloat16") -> int:
        """Return the bytes of generation state that one sequence of `seq_len` tokens holds.

        Every group keeps the KV heads that its query heads read (`Geometry.kv_heads`), so a KV
        head whose query heads are split over two groups is held twice. Raises PlanError for an
        unknown dtype, and for groups whose mixer has not said what it keeps (`CacheCost`).
        """
        if dtype not in DTYPE_BYTES:
            raise PlanError(f"dtype {dtype!r} is unknown. There are: {', '.join(DTYPE_BYTES)}.")
        shape, total = self.geometry, 0.0
        entry = shape.entry_elements() * DTYPE_BYTES[dtype]
        for i, layer in enumerate(self.layers):
            for group in layer.groups:
                cost = group.cache or (CacheCost() if group.mixer == "full" else None)
                if cost is None:
                    raise PlanError(f"layer {i}: no cache cost is recorded for {group.mixer!r}.")
                bounds = [seq_len, cost.tokens, shape.windows[i]]
                tokens = cost.room(min(b for b in bounds if b is not None))
                kv_heads = len(shape.kv_heads(group.heads))
                total += tokens * cost.token_bytes(entry) * kv_heads
                total += cost.state_bytes(len(group.heads), kv_heads)
        return round(total)


def _word(cost: CacheCost | None) -> str:
    """Return the word for a mixer by what it keeps: all tokens, and no state, is no linear one."""
    if cost is None or cost.tokens is not None or cost.state_bytes(1, 1):
        return "linear_attention"
    return "full_attention" if cost == CacheCost() else "sparse_attention"


def _last_part(mixer: str) -> str:
    """Return a mixer's name, or the last part of `package.module:object`."""
    parts = [part.strip("_") for part in re.split("[.:]", mixer)]
    return next((part for part in reversed(parts) if part), "")


def full_plan(model_type: str, geometry: Geometry) -> Plan:
    """Return the identity plan: every layer keeps the source's attention."""
    return uniform_plan(model_type, geometry, range(geometry.num_hidden_layers), "full", {}, None)


def uniform_plan(
    model_type: str,
    geometry: Geometry,
    full: Sequence[int],
    mixer: str,
    options: Mapping[str, Any],
    cache: CacheCost | None,
) -> Plan:
    """Return the plan that keeps the layers in `full` and gives every other candidate `mixer`.

    Layers that slide in the source are left as they are.
    """
    bad = [i for i in full if not 0 <= i < geometry.num_hidden_layers]
    if bad:
        raise PlanError(
            f"layer {bad[0]} does not exist; this model has {geometry.num_hidden_layers} layers "
            f"(0-{geometry.num_hidden_layers - 1})."
        )
    heads = tuple(range(geometry.num_attention_heads))
    kept = LayerPlan(groups=(HeadGroup(mixer="full", heads=heads),))
    swapped = LayerPlan(
        groups=(HeadGroup(mixer=mixer, heads=heads, options=dict(options), cache=cache),)
    )
    keep = set(full) | (set(range(geometry.num_hidden_layers)) - set(geometry.candidates))
    return Plan(
        model_type=model_type,
        geometry=geometry,
        layers=tuple(kept if i in keep else swapped for i in range(geometry.num_hidden_layers)),
    )


def dumps(value: Scores | Plan | Budget) -> str:
    """Return canonical JSON: sorted keys, fixed separators, a newline at the end."""
    return json.dumps(strict.plain(value), sort_keys=True, indent=1) + "\n"


def loads_scores(text: str, where: str = "scores") -> Scores:
    """Return the Scores that `dumps` wrote; raise PlanError naming the first wrong key."""
    return strict.build(Scores, _json(text, where), where, PlanError)


def loads_plan(text: str, where: str = "plan") -> Plan:
    """Return the Plan that `dumps` wrote; raise PlanError naming the first wrong key."""
    if text.count(",") > MAX_BRANCHES:
        raise PlanError(f"{where}: more than {MAX_BRANCHES} values; no plan has so many.")
    return strict.build(Plan, _json(text, where), where, PlanError)


def check_branches(text: str, where: str) -> None:
    """Raise PlanError for JSON of so many lists that to look at each takes seconds."""
    if text.count("[") + text.count("{") > MAX_BRANCHES:
        raise PlanError(f"{where}: more than {MAX_BRANCHES} lists; no model has so many units.")


def _json(text: str, where: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise PlanError(f"{where}: key '{escape(twice)}' appears twice.")
        return found

    check_branches(text, where)
    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except PlanError:
        raise
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{where}: not valid JSON ({escape(error)}).") from error
    if strict.nested_deeper(data, MAX_DEPTH):
        raise PlanError(f"{where}: nested deeper than {MAX_DEPTH} levels.")
    return data
