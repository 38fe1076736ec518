"""From a config and the shapes of a checkpoint's tensors to what every row of them is for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from morph.errors import CheckpointError, UsageError, escape
from morph.layouts._layout import Layout, Rows, Segment
from morph.layouts._settings import Settings, joined
from morph.layouts._shapes import Heads

Shapes = Mapping[str, tuple[int, ...]]

# what may stand before the decoder's `layers.N.`, in text models and in wrappers around them
PREFIXES = (
    *("", "model.", "backbone.", "language_model.", "transformer.", "gpt_neox."),
    *("model.language_model.", "language_model.model.", "language_model.backbone."),
    *("model.text_model.", "text_model.model.", "model.decoder.", "model.backbone."),
)
_NUMBER = re.compile("[0-9]{1,9}")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embeddings?|wte|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")
_NORM = re.compile(r"(^|[._])(layer_?norm|norm|ln)(?![a-z])|norm[._]|norm$")
_BIASED = ("q", "k", "v", "o", "gate")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the heads of one layer attend with, where they differ: a kind per head and KV head.

    `groups` has the kind of each group of heads, which may bring parameters of its own.
    """

    q: tuple[str, ...]
    k: tuple[str, ...]
    groups: tuple[str, ...]

    @property
    def whole(self) -> str:
        """The kind of what serves all heads at once."""
        return strongest(self.q)


def strongest(kinds: Iterable[str]) -> str:
    """Return `full` where any is, else `sliding` where any is, else `linear`."""
    found = set(kinds)
    return next(k for k in ("full", "sliding", "linear") if k in found)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What every row of a checkpoint is for.

    `kinds` has one entry per decoder layer: `full`, `sliding`, `linear` (no softmax attention) or
    `mixed` (its heads differ). `rows` covers every tensor, each row once. `refusal` says why q and
    k cannot be restored in this architecture (empty: they can).
    """

    model_type: str
    kinds: tuple[str, ...]
    rows: tuple[Rows, ...]
    refusal: str = ""
    notes: tuple[str, ...] = ()
    heads: tuple[Heads | None, ...] = field(default=(), repr=False)

    def attention(self, layer: int) -> Heads:
        """Return the shape of a layer's softmax attention.

        Raises UsageError for a layer that has none, or that does not exist.
        """
        found = self.heads[layer] if 0 <= layer < len(self.heads) else None
        if found is None:
            layers = joined(i for i, h in enumerate(self.heads) if h is not None) or "none"
            raise UsageError(f"layer {layer} has no softmax attention; layers that do: {layers}.")
        return found


def read(
    layout: Layout,
    config: Mapping[str, object],
    shapes: Shapes,
    mixtures: Mapping[int, Mixture] | None = None,
    model_type: str | None = None,
) -> Reading:
    """Return what every row of a checkpoint of this architecture is for.

    Raises CheckpointError where the config is wrong, or disagrees with the tensors.
    """
    settings = Settings(config, layout.defaults)
    kinds = tuple(layout.kinds(settings))
    types = config.get("layer_types")
    if isinstance(types, (list, tuple)) and len(types) != len(kinds):
        raise CheckpointError(
            f"config.json: layer_types has {len(types)} entries for {len(kinds)} layers."
        )
    refusal = layout.refuses(settings)
    mixed = {i for i, m in (mixtures or {}).items() if len(set(m.q)) > 1}
    reader = _Reader(layout, settings, kinds, shapes, mixtures or {}, bool(refusal))
    rows = tuple(reader.rows())
    if reader.unknown and not refusal:
        refusal = (
            f"{joined(reader.unknown, 2)} is no weight or bias, so its rows cannot be told apart."
        )
    return Reading(
        model_type=model_type or layout.model_type,
        kinds=tuple("mixed" if i in mixed else k for i, k in enumerate(kinds)),
        rows=rows,
        refusal=refusal,
        notes=layout.notes,
        heads=reader.heads,
    )


@dataclass
class _Reader:
    """One checkpoint being read; `unknown` collects what a row map says nothing about."""

    layout: Layout
    settings: Settings
    kinds: tuple[str, ...]
    shapes: Shapes
    mixtures: Mapping[int, Mixture]
    refused: bool
    unknown: list[str] = field(default_factory=list)

    @cached_property
    def heads(self) -> tuple[Heads | None, ...]:
        """The shape of each layer's attention; one object where layers are alike."""
        if self.refused:
            return (None,) * len(self.kinds)
        known: dict[Heads, Heads] = {}
        found: list[Heads | None] = []
        for layer, kind in enumerate(self.kinds):
            # the projections of a layer of our own hybrids stay whatever mixes their heads
            if kind == "linear" and layer not in self.mixtures:
                found.append(None)
            else:
                shape = self.layout.heads(self.settings, layer, kind)
                found.append(known.setdefault(shape, shape))
        return tuple(found)

    @cached_property
    def instead(self) -> Sequence[str]:
        """The role of the attention module in each layer without softmax attention."""
        found = self.layout.instead
        return found(self.settings) if found is not None else ["mixer"] * len(self.kinds)

    def rows(self) -> Iterator[Rows]:
        """Yield the rows of every tensor, in order of names."""
        placed = self._placed()
        if not self.refused:
            self._complete(placed)
        for name in sorted(self.shapes):
            if name in placed:
                yield from self._in_layer(name, *placed[name])
            else:
                yield Rows(tensor=name, layer=None, role=_outside(name))

    def _placed(self) -> dict[str, tuple[int, str]]:
        """Return the layer, and the name within it, of every tensor of the decoder's layers."""
        prefix = find_prefix(self.layout.layers, self.shapes)
        placed, beyond, count = {}, set(), len(self.kinds)
        for name in self.shapes:
            number, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and _NUMBER.fullmatch(number):
                if int(number) < count:
                    placed[name] = int(number), rest
                else:
                    beyond.add(int(number))
        layers = {layer for layer, _ in placed.values()}
        key = "num_nextn_predict_layers"  # they predict further tokens
        extra = self.settings.get(key) or self.settings.get("num_mtp_layers")
        allowed = extra if type(extra) is int and 0 < extra < 100 else 0
        if len(layers) < count or (beyond and max(beyond) >= count + allowed):
            stored = sorted(layers | beyond)
            said = "num_hidden_layers is"
            if self.settings.get("num_hidden_layers") != count:  # nemotron_h
                said = "the number of layers listed is"
            raise CheckpointError(
                f"{self.settings.where}{said} {count}, the weights hold "
                f"{len(stored)} layers ({stored[0]}-{stored[-1]}). The download is incomplete, or "
                "the config belongs to another model."
            )
        return placed

    def _complete(self, placed: Mapping[str, tuple[int, str]]) -> None:
        """Raise CheckpointError where a layer lacks a projection that its kind calls for."""
        there: dict[int, set[str]] = {}
        for layer, rest in placed.values():
            there.setdefault(layer, set()).add(rest)
        for layer, kind in enumerate(self.kinds):
            if self.heads[layer] is None:
                continue
            for part in self.layout.projections:
                module = f"{self.layout.attention}.{part}"
                if not any(rest.startswith(f"{module}.") for rest in there[layer]):
                    raise CheckpointError(
                        f"layer {layer} is {kind} attention by config.json, but the weights have "
                        f"no {module} in it; they have {joined(sorted(there[layer]), 4)}. Does the "
                        "config belong to another model?"
                    )

    def _in_layer(self, name: str, layer: int, rest: str) -> Iterator[Rows]:
        """Yield the rows of one tensor of a layer."""
        head, _, inner = rest.partition(".")
        if head == self.layout.attention:
            yield from self._in_attention(name, layer, inner)
        elif head in self.layout.mixers:
            yield Rows(tensor=name, layer=layer, role="mixer", kind="linear")
        elif head in self.layout.mlp:
            yield Rows(tensor=name, layer=layer, role="mlp")
        else:
            yield Rows(tensor=name, layer=layer, role="norm" if _NORM.search(rest) else "other")

    def _in_attention(self, name: str, layer: int, rest: str) -> Iterator[Rows]:
        shape, kind = self.heads[layer], self.kinds[layer]
        if shape is None:
            if kind == "linear" and self.layout.mixers:  # those stand under names of their own
                raise CheckpointError(
                    f"layer {layer} has no softmax attention by config.json, but the weights hold "
                    f"{escape(name)}. Does the config belong to another model?"
                )
            role = "other" if kind != "linear" else self.instead[layer]
            serves = kind if role in ("mixer", "other") else ""
            yield Rows(tensor=name, layer=layer, role=role, kind=serves)
            return
        part, _, leaf = rest.partition(".")
        if part in self.layout.projections:
            yield from self._projection(name, layer, part, leaf)
            return
        layers = (self.layout.o, self.layout.gate, self.layout.q_norm, self.layout.k_norm)
        role = dict(zip(layers, ("o", "gate", "q_norm", "k_norm"))).get(part, "other")
        mixture = self.mixtures.get(layer)
        if mixture is not None and role in ("q_norm", "k_norm"):
            yield from self._norm(name, layer, role, shape)
        elif mixture is not None and rest.startswith(("mixers.", "fusion.")):
            yield Rows(tensor=name, layer=layer, role="mixer", kind=_group(mixture, rest))
        else:
            bias = role in _BIASED and leaf == "bias"
            serves = mixture.whole if mixture is not None else kind
            yield Rows(tensor=name, layer=layer, role=role, kind=serves, bias=bias)

    def _projection(self, name: str, layer: int, part: str, leaf: str) -> Iterator[Rows]:
        shape = self.heads[layer]
        assert shape is not None
        segments = list(self.layout.projections[part](shape))
        if leaf not in ("weight", "bias"):  # a scale, say: its rows are not those of the weight
            roles = {role for role, _, _ in segments}
            whole = len(roles) == 1 and layer not in self.mixtures
            role = roles.pop() if whole else "other"
            if not whole:
                self.unknown.append(name)
            yield Rows(tensor=name, layer=layer, role=role, kind=self.kinds[layer])
            return
        rows, stored = sum(count for _, _, count in segments), self.shapes[name]
        if len(stored) != (1 if leaf == "bias" else 2) or stored[0] != rows:
            raise CheckpointError(
                f"{escape(name)} has shape {list(stored)}; by config.json it has {rows} rows "
                f"({shape.num_attention_heads} query heads, {shape.num_key_value_heads} KV heads, "
                f"head_dim {shape.head_dim}). Is it quantised, or the config of another model?"
            )
        yield from self._cut(name, layer, segments, leaf == "bias")

    def _norm(self, name: str, layer: int, role: str, shape: Heads) -> Iterator[Rows]:
        """Yield the rows of a q or k norm of a layer whose heads differ."""
        mixture, dim = self.mixtures[layer], shape.head_dim
        kinds = mixture.q if role == "q_norm" else mixture.k
        if self.layout.norm_scope == "projection" and self.shapes[name] == (len(kinds) * dim,):
            segments = [(role, i, dim) for i in range(len(kinds))]
            yield from self._cut(name, layer, segments, bias=False)
        else:
            yield Rows(tensor=name, layer=layer, role=role, kind=strongest(kinds))

    def _cut(self, name: str, layer: int, segments: list[Segment], bias: bool) -> Iterator[Rows]:
        """Yield one entry per role and kind, with the rows that have it."""
        mixture, at = self.mixtures.get(layer), 0
        found: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for role, head, rows in segments:
            kind = self.kinds[layer]
            if mixture is not None:
                kind = (mixture.k if role in ("k", "v", "k_norm") else mixture.q)[head]
            ranges = found.setdefault((role, kind), [])
            if ranges and ranges[-1][1] == at:
                ranges[-1] = ranges[-1][0], at + rows
            else:
                ranges.append((at, at + rows))
            at += rows
        for (role, kind), ranges in found.items():
            whole = len(found) == 1
            yield Rows(
                tensor=name,
                layer=layer,
                role=role,
                kind=kind,
                bias=bias,
                ranges=None if whole else tuple(ranges),
            )


def find_prefix(layers: str, shapes: Shapes) -> str:
    """Return what stands before the layer numbers of the decoder, such as `model.layers.`.

    Raises CheckpointError where nothing does, or where several decoders could be meant.
    """
    pattern = re.compile(rf"(.*?){re.escape(layers)}\.{_NUMBER.pattern}\.", re.ASCII)
    there = {m[1] for m in map(pattern.match, shapes) if m}
    known = sorted(there & set(PREFIXES))
    if len(known) == 1:
        return f"{known[0]}{layers}."
    if known:
        raise CheckpointError(
            f"The weights hold layers under {joined(f'{p}{layers}.N' for p in known)}, and the "
            "config does not say which of them is the decoder. Split the checkpoint first."
        )
    hint = (
        f" There are layers under {joined(f'{p}{layers}.N' for p in sorted(there))}, which no "
        "known model uses."
        if there
        else ""
    )
    raise CheckpointError(f"The weights hold no decoder layers (no tensor {layers}.0.*).{hint}")


def _outside(name: str) -> str:
    """Return the role of a tensor outside the decoder's layers, by its name."""
    if _EMBEDDING.search(name) and name.removesuffix(".weight").count(".") <= 2:
        return "embedding"
    if _HEAD.search(name):
        return "head"
    return "norm" if _NORM.search(name) and name.count(".") <= 3 else "other"


def _group(mixture: Mixture, rest: str) -> str:
    """Return the kind of the group of heads whose own parameter this is."""
    number = rest.split(".")[1]
    if rest.startswith("mixers.") and number.isdecimal() and int(number) < len(mixture.groups):
        return mixture.groups[int(number)]
    return mixture.whole
