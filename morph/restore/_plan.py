"""From two folders and options to a plan of what is spliced; nothing is written here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morph.checkpoint import Checkpoint, Splice, Weights
from morph.checkpoint._hub import name_of
from morph.errors import UsageError, escape
from morph.layouts import Reading
from morph.layouts import read as read_layout
from morph.restore import _adapter, _checks, _content, _methods, _record
from morph.restore._adapter import Drop
from morph.restore._open import open_checkpoint
from morph.restore._options import PARTS, Options
from morph.restore._pair import Place, place
from morph.restore._select import Span, merged, ranges, select

DROPPED = "the delta is dropped (zeros)"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of POST: every restored row with its place in PRE and in POST.

    `places` come from PRE; `drops` are rows of an adapter that become zero. `layers` are those of
    which something is restored, `reading` is the layout of the model. `notes` are for the user.
    `drift` maps roles to |POST - PRE| / |PRE| in samples of the chosen layers, `cosines` layers to
    the cosine of their sampled queries; both are empty for an adapter.
    """

    pre: Checkpoint
    post: Weights
    options: Options
    reading: Reading = field(repr=False)
    places: tuple[Place, ...] = field(repr=False)
    drops: tuple[Drop, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    drift: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[int, float] = field(default_factory=dict)

    @property
    def items(self) -> tuple[Place | Drop, ...]:
        """Everything that is restored: the places, then the drops."""
        return (*self.places, *self.drops)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of which something is restored."""
        return tuple(sorted({p.part.layer for p in self.items}))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names in POST of the tensors of which something is restored."""
        return tuple(sorted({p.part.tensor for p in self.items}))

    @property
    def nbytes(self) -> int:
        """Bytes of POST that are replaced."""
        return sum(p.nbytes for p in self.items)

    @property
    def is_adapter(self) -> bool:
        """Whether POST is a LoRA adapter."""
        return not isinstance(self.post, Checkpoint)

    def splices(self) -> list[Splice]:
        """Return the splices that make OUT of POST, in the order of files and bytes."""
        found = [splice for drop in self.drops for splice in drop.splices()]
        found += _methods.splices(self.pre, self.post, self.reading, self.places, self.options)
        return sorted(found, key=lambda s: (s.shard, s.start))

    def rules(self) -> list[dict[str, Any]]:
        """Return what becomes of each part: its rule, layers, tensors, rows and bytes."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for item in self.items:
            part = item.part
            name = {"q_norm": "norm", "k_norm": "norm"}.get(part.role, part.role)
            how = DROPPED if isinstance(item, Drop) else _methods.rule(item, self.options)
            name = f"{name} bias" if part.bias else name
            empty: dict[str, Any] = {"layers": set(), "tensors": 0, "rows": 0, "bytes": 0}
            entry = found.setdefault((name, how), empty)
            entry["layers"].add(part.layer)
            entry["tensors"] += 1
            entry["rows"] += part.rows
            entry["bytes"] += item.nbytes
        return [
            {"part": name, "rule": how, **entry, "layers": sorted(entry["layers"])}
            for (name, how), entry in sorted(found.items(), key=lambda f: _place_of(*f[0]))
        ]

    def rows(self) -> dict[str, list[list[int]]]:
        """Return the rows that are restored of tensors that are not restored whole.

        All of them for an adapter: without its base, nothing tells what its tensors are for.
        """
        found: dict[str, list[Span]] = {}
        for item in self.items:
            found.setdefault(item.part.tensor, []).extend(item.part.spans)
        spans = {name: merged(sorted(found[name])) for name in sorted(found)}
        count = {name: self.post.tensors[name].shape[0] for name in spans}
        part = {n: s for n, s in spans.items() if self.is_adapter or s != ((0, count[n]),)}
        return {n: [list(x) for x in s] for n, s in part.items()}

    def record(self) -> dict[str, Any]:
        """Return the provenance of this restore: no path, no time, no machine."""
        return _record.record(
            self.pre, self.post, self.options.plain(), self.rules(), self.rows(), self.notes
        )

    def summary(self) -> dict[str, Any]:
        """Return the plan for people and for `--json`."""
        count = len(self.reading.kinds)
        total = self.post.nbytes
        return {
            "pre": str(self.pre.path),
            "post": str(self.post.path),
            "method": self.options.method,
            **{n: v for n in ("rho", "alpha") if (v := getattr(self.options, n)) is not None},
            "adapter": self.is_adapter,
            "layers": list(self.layers),
            "layers_of": count,
            "parts": self.rules(),
            "tensors": len(self.tensors),
            "bytes": self.nbytes,
            "total_bytes": total,
            "share": self.nbytes / total if total else 0.0,
            "drift": dict(self.drift),
            "cosine_of_q": min(self.cosines.values(), default=None),
            "notes": list(self.notes),
        }


def plan(
    pre: str | os.PathLike[str], post: str | os.PathLike[str], options: Options | None = None
) -> Plan:
    """Return what restoring PRE's queries and keys in POST would change; nothing is written.

    `pre` is the model just before its fine-tuning (a folder; shards without a needed tensor may be
    absent), `post` the fine-tuned one, or a LoRA adapter of `pre`. Headers and a few KiB of each
    tensor are read. Raises UsageError, CheckpointError, UnsupportedModel or MismatchError, each
    saying which file, tensor or key, and what to do.
    """
    options = options or Options()
    before, after = Path(pre).expanduser(), Path(post).expanduser()
    _check_folders(before, after)
    if after.is_dir() and _adapter.is_adapter(after):
        return _plan_adapter(before, after, options)
    headers = options.allows("index")
    source = open_checkpoint(before, partial=True, headers=headers)
    tuned = open_checkpoint(after, headers=headers)
    _checks.check_schemes(source, tuned, options)
    reading = _checks.read_post(tuned)
    earlier = _checks.read_pre(source, tuned)
    notes = _checks.check_layers(source, tuned, earlier, reading)
    notes += _checks.check_parent(source, tuned, options)
    parts, found = select(reading, _checks.shapes_of(tuned), options, tuned.quantised)
    notes += found
    places, found = place(source, tuned, parts)
    notes += found
    notes += _checks.check_packing(source, tuned, places)
    widened = _checks.check_tensors(places, source, tuned, options)
    if widened:
        notes.append(f"{widened} tensors are narrower in PRE and were widened, which is exact.")
    notes += _checks.check_norms(
        None if source.absent else earlier, reading, {p.layer for p in parts}, options
    )
    notes += _checks.check_geometry(source, tuned, options)
    notes += _checks.check_heads(earlier, reading, {p.layer for p in parts}, options)
    notes += _checks.differences_told(source, tuned)
    notes += _checks.check_ties(tuned, options)
    content = _content.look(source, tuned, reading, places, options)
    notes += [*content.notes, *_choices(reading, places, options)]
    if _record.restored_records(tuned):
        notes.append("POST was written by morph restore before; both are recorded in morph.json.")
    return Plan(
        pre=source,
        post=tuned,
        options=options,
        reading=reading,
        places=tuple(places),
        notes=(*reading.notes, *notes),
        drift=content.drift,
        cosines=content.cosines,
    )


def _plan_adapter(before: Path, after: Path, options: Options) -> Plan:
    config = _adapter.check_config(after, options)
    source = open_checkpoint(before, headers=options.allows("index"))
    adapter = Weights.open(after)
    reading = read_layout(source.config, _checks.shapes_of(source))
    drops, copies, notes = _adapter.select_adapter(source, adapter, reading, options)
    if _checks.check_tensors(copies, source, source, options):
        notes.append("PRE's numbers are narrower than the adapter's copies: widened, exactly.")
    _adapter.check_dropped(adapter, drops, copies, options)
    base = _base_name(config.get("base_model_name_or_path"))
    if base.rpartition("/")[2] not in ("", name_of(source.path).rpartition("/")[2]):
        notes.append(f"the adapter names {escape(base, 120)} as its base; PRE was taken for it.")
    folders, _ = _adapter.others_inside(adapter)
    if folders:
        shown = ", ".join(escape(f, 60) for f in folders[:3])
        notes.append(f"adapters inside the folder are not in OUT, restore each by itself: {shown}.")
    notes.append(
        "OUT is the adapter without these deltas; all other weights are the base model's, PRE's, "
        "anyway."
    )
    return Plan(
        pre=source,
        post=adapter,
        options=options,
        reading=reading,
        places=tuple(copies),
        drops=tuple(drops),
        notes=(*reading.notes, *notes),
    )


def _base_name(named: object) -> str:
    """Return a Hub id, or the last name of a path: a record holds no path of a machine."""
    if not isinstance(named, str):
        return ""
    parts = [part for part in re.split(r"[/\\]", named) if part]
    hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", named)
    return named if hub else "".join(parts[-1:])


def _check_folders(pre: Path, post: Path) -> None:
    if pre.is_dir() and _adapter.is_adapter(pre):
        raise UsageError(
            f"PRE ({escape(pre)}) is a LoRA adapter; give its base model. An adapter goes second, "
            f"as POST. {_checks.NOTHING}"
        )
    if pre.exists() and post.exists() and os.path.samefile(pre, post):
        raise UsageError(
            f"PRE and POST are the same folder, {escape(pre.resolve())}. Give the model before its "
            f"fine-tuning, and the one after. {_checks.NOTHING}"
        )


def _place_of(name: str, how: str) -> tuple[int, str, str]:
    return PARTS.index(name.partition(" ")[0]), name, how


def _choices(reading: Reading, places: Sequence[Place], options: Options) -> list[str]:
    """Return notes on what the method leaves open, so that nobody takes our choice for it."""
    have = {p.part.role for p in places}
    layers = sorted({p.part.layer for p in places})
    notes = []
    if any(p.part.bias for p in places):
        notes.append(
            "biases were restored with their projections: morph's choice, the paper does not "
            "settle it (--include q,k leaves them)."
        )
    norms = {r.layer for r in reading.rows if r.role in ("q_norm", "k_norm")} & set(layers)
    if norms and have & {"q_norm", "k_norm"}:
        notes.append("q and k norms are restored too, as asked; the paper does not settle it.")
    elif norms:
        notes.append(
            "q and k norms are left as POST's: morph's choice, the paper does not settle it "
            "(--include q,k,bias,norm restores them)."
        )
    slid = sorted({p.part.layer for p in places if p.part.kind == "sliding"})
    if slid:
        notes.append(
            f"layers {ranges(slid)} attend to a window: no evidence says that restoring them helps."
        )
    if "gate" in have:
        notes.append("output gates were restored too, which the paper does not do.")
    if options.method == "ridge":
        notes.append(
            "ridge is morph's own, not the paper's QK-Pro, whose shapes are not published."
        )
        notes += _ridge_notes(reading, layers)
    return notes


def _ridge_notes(reading: Reading, layers: list[int]) -> list[str]:
    shapes = {layer: reading.attention(layer) for layer in layers}
    turned = [i for i, s in shapes.items() if s.rotary is not None]
    normed = [i for i, s in shapes.items() if s.qk_norm]
    notes = []
    if turned:
        notes.append(
            f"layers {ranges(turned)} rotate q and k: there the blend is the diagonal one, which "
            "commutes with rotations."
        )
    if normed:
        notes.append(
            f"layers {ranges(normed)} normalise q and k: there the blend is a heuristic, since "
            "scores are not bilinear in the weights."
        )
    return notes
