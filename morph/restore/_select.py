"""Which rows of which tensors are restored: layers and parts, by what the layout says of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from morph import plan as planning
from morph import selection
from morph.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedModel,
    UsageError,
    escape,
    nearest,
)
from morph.layouts import Heads, Reading, Rows
from morph.plan import Budget, Geometry
from morph.restore._options import PARTS, PROJECTIONS, Options

Shapes = Mapping[str, tuple[int, ...]]
Span = tuple[int, int]
SOFTMAX = ("full", "sliding")
MAX_SCORES = 64 << 20
_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one tensor of POST that are restored.

    `role` is q, k, v, o, gate, q_norm or k_norm; `bias` marks a bias vector. `spans` are (start,
    stop) rows in order; `whole` says that they are all rows of the tensor.
    """

    tensor: str
    layer: int
    role: str
    bias: bool
    kind: str
    spans: tuple[Span, ...]
    whole: bool

    @property
    def rows(self) -> int:
        """How many rows are restored."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layers that are restored, and, where scores chose heads, which heads of each.

    `kinds` are those of the rows that are taken. `heads` maps layers to query heads, `kv_heads` to
    KV heads; None: all of them.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    heads: Mapping[int, frozenset[int]] | None = None
    kv_heads: Mapping[int, frozenset[int]] | None = None
    notes: tuple[str, ...] = ()


def select(
    reading: Reading, shapes: Shapes, options: Options, quantised: str = ""
) -> tuple[list[Part], list[str]]:
    """Return the parts that the options name, in the order of layers, and notes.

    `quantised` says what shows that rows of a tensor are not rows of a matrix. Raises
    UnsupportedModel where the layout refuses, UsageError for layers that cannot be meant and for
    parts that this model does not have, MismatchError for scores of another model, or of heads
    where weights are quantised.
    """
    if reading.refusal:
        raise UnsupportedModel(
            f"model_type {escape(reading.model_type, 60)}: {reading.refusal} Nothing was written."
        )
    choice = choose(reading, options)
    if choice.heads is not None and quantised:
        raise MismatchError(
            f"the weights are quantised ({quantised}), and only some rows of them would be "
            "restored. Restore before quantising, then quantise. Nothing was written."
        )
    taken = set(choice.layers)
    found = [
        _part(row, row.layer, shapes, choice, reading)
        for row in reading.rows
        if row.layer in taken and row.kind in choice.kinds and wanted(row, options)
    ]
    found = [part for part in found if part.spans]
    _check_found(found, options)
    order = {role: i for i, role in enumerate((*PROJECTIONS, *_NORMS))}
    ordered = sorted(found, key=lambda p: (p.layer, order[p.role], p.bias, p.tensor))
    return ordered, list(choice.notes)


def wanted(row: Rows, options: Options) -> bool:
    """Whether `include` names what these rows are."""
    if row.role in _NORMS:
        return "norm" in options.include
    return (
        row.role in PROJECTIONS
        and row.role in options.include
        and (not row.bias or "bias" in options.include)
    )


def _check_found(found: list[Part], options: Options) -> None:
    """Raise UsageError for a part that no chosen layer has; biases may be absent."""
    have = {"norm" if p.role in _NORMS else p.role for p in found if not p.bias}
    for part in PARTS:
        if part in options.include and part not in have and part != "bias":
            there = ", ".join(p for p in PARTS if p in have) or "none of those asked for"
            raise UsageError(
                f"--include {part}: the chosen layers have no such rows of their own in this "
                f"architecture; they have {there}. Leave {part} out."
            )


def choose(reading: Reading, options: Options) -> Choice:
    """Return the layers, and the heads in them, that `--layers` names."""
    rows: dict[str, set[int]] = {kind: set() for kind in SOFTMAX}
    for row in reading.rows:
        if row.layer is not None and row.role == "q" and row.kind in rows:
            rows[row.kind].add(row.layer)
    full, both = sorted(rows["full"]), sorted(rows["full"] | rows["sliding"])
    if not both:
        raise UnsupportedModel(
            f"model_type {escape(reading.model_type, 60)}: no layer has softmax attention, so there"
            " is nothing to restore."
        )
    text = options.layers.strip()
    if options.by_scores:
        return _by_scores(reading, options)
    if text == "all":
        return Choice(layers=tuple(both), kinds=SOFTMAX)
    if text == "full":
        if not full:
            raise UsageError(
                "--layers full: no layer attends to everything; sliding ones are "
                f"{ranges(both)}. Give --layers all."
            )
        return Choice(layers=tuple(full), kinds=("full",))
    return Choice(layers=_numbers(text, both, len(reading.kinds)), kinds=SOFTMAX)


def _numbers(text: str, allowed: list[int], count: int) -> tuple[int, ...]:
    found = set()
    for word in text.split(","):
        name = word.strip()
        if not name.isdecimal() or len(name) > 6:
            hint = nearest(name, ("full", "all")) if name == text else ""
            raise UsageError(
                f"--layers: {escape(name, 60)!r} is no layer.{hint} Give full, all, numbers of "
                f"{ranges(allowed)}, each by itself (3,7), or a file of scores (scores.json)."
            )
        if int(name) not in allowed:
            what = "has no softmax attention" if int(name) < count else "does not exist"
            raise UsageError(
                f"--layers: layer {int(name)} {what} in this model. Layers with softmax "
                f"attention: {ranges(allowed)}."
            )
        found.add(int(name))
    return tuple(sorted(found))


def ranges(numbers: list[int] | tuple[int, ...]) -> str:
    """Return sorted numbers as 0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _by_scores(reading: Reading, options: Options) -> Choice:
    """Return what a file of scores puts on top; the model must be all softmax attention."""
    scores = _read_scores(Path(options.layers.strip()).expanduser())
    other = sorted(set(reading.kinds) - set(SOFTMAX))
    if other:
        layer = next(i for i, kind in enumerate(reading.kinds) if kind in other)
        raise UsageError(
            f"--layers {escape(Path(options.layers).name, 60)}: scores choose among the layers of "
            f"a pure softmax model; layer {layer} of this one is {other[0]}. Give full, all, or "
            "numbers."
        )
    base = reading.model_type.removeprefix("morph_").replace("-", "_")
    if scores.model_type.removeprefix("morph_").replace("-", "_") != base:
        raise MismatchError(
            f"--layers: the scores are of model type {escape(scores.model_type, 60)!r}, the "
            f"checkpoint is {escape(reading.model_type, 60)!r}. Score this one: `morph score`."
        )
    budget = Budget.parse(options.budget or "1/4")
    units = selection.choose_units(scores, budget, geometry=_geometry(reading))
    layers = tuple(sorted({layer for layer, _ in units}))
    if scores.granularity == "layer":
        return Choice(layers=layers, kinds=("full",))
    return _by_heads(reading, options, scores.granularity, units)


def _by_heads(
    reading: Reading, options: Options, granularity: str, units: tuple[tuple[int, int], ...]
) -> Choice:
    shared = [p for p in ("norm", "o") if p in options.include]
    if shared:
        raise UsageError(
            f"--include {shared[0]}: all heads of a layer share it, and the scores choose single "
            f"heads ({granularity}). Leave it out, or use scores of layers."
        )
    heads: dict[int, set[int]] = {}
    kv_heads: dict[int, set[int]] = {}
    beside = 0
    for layer, unit in units:
        step = reading.attention(layer).group_size
        kv = unit if granularity == "kv_head" else unit // step
        chosen = range(unit * step, (unit + 1) * step) if granularity == "kv_head" else [unit]
        heads.setdefault(layer, set()).update(chosen)
        kv_heads.setdefault(layer, set()).add(kv)
    for layer, found in kv_heads.items():
        beside += len(found) * reading.attention(layer).group_size - len(heads[layer])
    note = f"{beside} query heads that were not chosen read restored keys: KV heads are shared."
    return Choice(
        layers=tuple(sorted(heads)),
        kinds=("full",),
        heads={k: frozenset(v) for k, v in heads.items()},
        kv_heads={k: frozenset(v) for k, v in kv_heads.items()},
        notes=(note,) if beside else (),
    )


def _geometry(reading: Reading) -> Geometry:
    """Return the geometry that `choose_units` needs: heads, and which layers can be chosen."""
    shapes = {reading.attention(i) for i in range(len(reading.kinds))}
    first = reading.attention(0)
    if len({(h.num_attention_heads, h.num_key_value_heads, h.head_dim) for h in shapes}) > 1:
        raise UsageError("--layers: scores need layers with equally many heads; these differ.")
    return Geometry(
        num_hidden_layers=len(reading.kinds),
        num_attention_heads=first.num_attention_heads,
        num_key_value_heads=first.num_key_value_heads,
        head_dim=first.head_dim,
        v_head_dim=first.head_dim,
        hidden_size=first.head_dim * first.num_attention_heads,
        windows=tuple(None if kind == "full" else 1 for kind in reading.kinds),
    )


def _read_scores(path: Path) -> planning.Scores:
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise UsageError(f"--layers {escape(path)}: is not a file. Give a scores.json.")
        if path.stat().st_size > MAX_SCORES:
            raise UsageError(f"--layers {escape(path)}: too large to be scores.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            f"--layers {escape(path)} cannot be read: {reason}. Give full, all, numbers (3,7), or "
            "the scores.json that `morph score` wrote."
        ) from error
    return planning.loads_scores(text, f"--layers {escape(path)}")


def spans_of(row: Rows, shapes: Shapes) -> tuple[Span, ...]:
    """Return the rows of an entry of the layout as (start, stop) pairs."""
    shape = shapes[row.tensor]
    return row.ranges if row.ranges is not None else ((0, shape[0] if shape else 1),)


def _part(row: Rows, layer: int | None, shapes: Shapes, choice: Choice, reading: Reading) -> Part:
    assert layer is not None
    spans = spans_of(row, shapes)
    whole = row.ranges is None
    by_query = row.role in ("q", "gate")
    heads = choice.heads if by_query else choice.kv_heads
    if heads is not None:
        shape = reading.attention(layer)
        count = shape.num_attention_heads if by_query else shape.num_key_value_heads
        pieces = split(spans, count, row.tensor)
        spans = merged([s for h in sorted(heads[layer]) for s in pieces[h]])
        whole = whole and len(heads[layer]) == count
    return Part(
        tensor=row.tensor,
        layer=layer,
        role=row.role,
        bias=row.bias,
        kind=row.kind,
        spans=spans,
        whole=whole,
    )


def split(spans: tuple[Span, ...], count: int, name: str) -> list[list[Span]]:
    """Return the rows of each of `count` heads that lie one after the other in `spans`."""
    total = sum(stop - start for start, stop in spans)
    size, rest = divmod(total, count)
    if rest or not size:
        raise CheckpointError(f"{escape(name)}: {total} rows are not {count} heads of equal size.")
    heads: list[list[Span]] = [[]]
    left = size
    for start, stop in spans:
        while start < stop:
            if not left:
                heads.append([])
                left = size
            take = min(left, stop - start)
            heads[-1].append((start, start + take))
            start, left = start + take, left - take
    return heads


def merged(spans: list[Span]) -> tuple[Span, ...]:
    """Return spans with neighbours made one."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def head_spans(
    reading: Reading, layer: int, role: str, shapes: Shapes
) -> tuple[str, list[list[Span]], Heads]:
    """Return the tensor that holds q or k of a layer, the rows of each head, and the heads.

    Rows of all kinds count, so that a head keeps its number where only some are restored. Raises
    UnsupportedModel where several tensors hold them.
    """
    rows = [r for r in reading.rows if (r.layer, r.role, r.bias) == (layer, role, False)]
    tensors = {r.tensor for r in rows}
    if len(tensors) != 1:
        raise UnsupportedModel(
            f"layer {layer}: its {role} rows lie in {len(tensors)} tensors, and --method ridge "
            "needs one. Use --method exact."
        )
    shape = reading.attention(layer)
    name = tensors.pop()
    spans = tuple(sorted(s for r in rows for s in spans_of(r, shapes)))
    count = shape.num_attention_heads if role == "q" else shape.num_key_value_heads
    return name, split(spans, count, name), shape
