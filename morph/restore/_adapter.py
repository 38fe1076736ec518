"""A LoRA adapter as POST: the deltas of q and k are dropped, their copies come from PRE.

Tensors of PEFT's LoRA: `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out,
r], whose product is added to the base's weight [out, in]. Rows of B are rows of the weight, so a
delta is dropped, whole or in part, by zeros in rows of B.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from morph.checkpoint import Checkpoint, Splice, TensorInfo, Weights, load_json
from morph.checkpoint._folder import INDEX, SINGLE
from morph.checkpoint._format import MAX_JSON, read_small
from morph.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedModel,
    UsageError,
    escape,
    nearest,
)
from morph.layouts import Reading, Rows
from morph.restore._checks import NOTHING
from morph.restore._numbers import is_zero
from morph.restore._options import Options
from morph.restore._pair import Files, Place, core, rows_of
from morph.restore._select import Part, select

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.(weight|bias))?")
_COPY = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# initialisations that leave the base's weights alone, so that without its delta a module is PRE's
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_VARIANTS = {
    "use_dora": "DoRA scales each row by a learned magnitude",
    "use_qalora": "QA-LoRA groups the inputs",
    "use_bdlora": "BD-LoRA splits its factors into blocks",
    "monteclora_config": "MonteCLoRA samples its deltas",
    "kasa_config": "KaSA changes the base's weights",
    "arrow_config": "Arrow routes between adapters",
    "layer_replication": "it repeats layers of the base",
}


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Rows of an adapter's tensor that become zero."""

    part: Part  # its spans are rows of the adapter's tensor
    post: TensorInfo

    @property
    def nbytes(self) -> int:
        """Bytes that become zero."""
        return sum(r.nbytes for r in self.runs())

    def runs(self) -> list[TensorInfo]:
        """Return the places that become zero."""
        return [rows_of(self.post, span) for span in self.part.spans]

    def splices(self) -> list[Splice]:
        """Return the splices that write the zeros."""
        return [Splice(r.file.name, r.start, r.stop, None) for r in self.runs()]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no model."""
    there = [name for name in (CONFIG, SINGLE, INDEX) if os.path.lexists(folder / name)]
    return there == [CONFIG]


def others_inside(post: Weights) -> tuple[list[str], list[str]]:
    """Return the folders inside a folder that hold adapters of their own, and all files in them."""
    folders = [n.removesuffix(f"/{CONFIG}") for n in post.other_files if n.endswith(f"/{CONFIG}")]
    files = [n for n in post.other_files if any(n.startswith(f"{f}/") for f in folders)]
    return folders, files


def check_config(folder: Path, options: Options) -> Mapping[str, Any]:
    """Return adapter_config.json; raise UnsupportedModel for what is no plain LoRA."""
    if options.method != "exact":
        raise UsageError(
            f"POST ({escape(folder.name, 80)}) is a LoRA adapter: --method {options.method} needs "
            "its weights. Merge it first (peft: merge_and_unload), and restore the merged model. "
            f"{NOTHING}"
        )
    where = escape(folder / CONFIG)
    config = load_json(read_small(folder, CONFIG, MAX_JSON["config"]), where)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} must be a JSON object, not {type(config).__name__}.")
    kind = config.get("peft_type")
    why = "" if kind == "LORA" else f"its peft_type is {escape(repr(kind), 40)}"
    for key, words in _VARIANTS.items():
        if not why and config.get(key):
            why = f"{key} is set: {words}"
    start = config.get("init_lora_weights", True)
    if not why and start not in _PLAIN_STARTS:
        why = (
            f"init_lora_weights is {escape(repr(start), 40)}, which changes the base's weights, so "
            "that without the delta q and k would not be PRE's"
        )
    if why:
        raise UnsupportedModel(
            f"{where}: {why}. Only plain LoRA can be restored as an adapter: merge it into its "
            f"base first (peft: merge_and_unload), then restore the merged model. {NOTHING}"
        )
    return config


def select_adapter(
    pre: Checkpoint, post: Weights, reading: Reading, options: Options
) -> tuple[list[Drop], list[Place], list[str]]:
    """Return the rows that become zero, the copies that come from PRE, and notes.

    `reading` is PRE's. Raises MismatchError where the adapter does not fit PRE, UnsupportedModel
    for tensors that are no plain LoRA.
    """
    shapes = {name: info.shape for name, info in pre.tensors.items()}
    parts, notes = select(reading, shapes, options)
    wanted: dict[tuple[str, bool], list[Part]] = {}
    for part in parts:
        wanted.setdefault((part.tensor, part.bias), []).append(part)
    # a bias of lora_B is a part of the delta, whether or not the base has biases
    base = _Base(pre, wanted, reading, options)
    drops: list[Drop] = []
    copies: list[Place] = []
    for name, info in post.tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            copies += base.copies(name, info)
        elif match[2] == "A":
            base.check(name, match[1], info, post)
        elif match[2] == "B":
            base.check(name, match[1], info, post)
            drops += base.drops(name, match[1], match[3] or "weight", info)
    return drops, copies, notes


class _Base:
    """The base model, looked up by what an adapter calls its modules."""

    def __init__(
        self,
        pre: Checkpoint,
        wanted: Mapping[tuple[str, bool], list[Part]],
        reading: Reading,
        options: Options,
    ) -> None:
        self.pre, self.wanted, self.options = pre, wanted, options
        self.names = {core(n): n for n in pre.tensors}
        self.roles: dict[str, list[Rows]] = {}
        for row in reading.rows:
            self.roles.setdefault(row.tensor, []).append(row)

    def find(self, module: str, leaf: str = "weight") -> str | None:
        """Return the name of a module's tensor in PRE, or None."""
        path = module.removeprefix(_PREFIX).replace(".base_layer", "")
        return self.names.get(core(f"{path}.{leaf}"))

    def check(self, name: str, module: str, info: TensorInfo, post: Weights) -> None:
        """Raise MismatchError where a factor of a delta does not fit PRE."""
        base = self.find(module)
        where = f"the adapter's '{escape(name, 140)}'"
        if base is None:
            if re.search(r"\.(experts|mlp|block_sparse_moe|feed_forward)\b", module):
                return  # fused in memory, apart on disk; no attention either way
            wanted = f"{module.removeprefix(_PREFIX)}.weight"
            raise MismatchError(
                f"{where} has no module in PRE ({escape(self.pre.path.name, 80)})."
                f"{nearest(wanted, self.pre.tensors)} PRE must be the adapter's base model. "
                f"{NOTHING}"
            )
        shape, own = self.pre.tensors[base].shape, info.shape
        if name.endswith(".bias"):
            fits = own == shape[:1]
        elif ".lora_B" in name:
            fits = len(own) == 2 == len(shape) and own[0] == shape[0]
        else:
            fits = len(own) == 2 == len(shape) and own[1] == shape[1]
        if not fits:
            raise MismatchError(
                f"{where} has shape {list(own)} and does not fit '{escape(base, 120)}' of PRE, "
                f"which has {list(shape)}. PRE must be the adapter's base model. {NOTHING}"
            )

    def drops(self, name: str, module: str, leaf: str, info: TensorInfo) -> list[Drop]:
        """Return the rows of a lora_B that are dropped."""
        base = self.find(module)
        if base is None or (leaf == "bias" and "bias" not in self.options.include):
            return []
        return [
            Drop(part=replace(part, tensor=name, bias=leaf == "bias"), post=info)
            for part in self.wanted.get((base, False), [])
        ]

    def copies(self, name: str, info: TensorInfo) -> list[Place]:
        """Return the parts of a whole tensor in the adapter that PRE replaces."""
        match = _COPY.fullmatch(name)
        base = self.find(match[1], match[2]) if match else None
        if base is None:
            module = name.removeprefix(_PREFIX).rpartition(".")[0]
            known = self.find(module) or self.find(module.rpartition(".")[0])
            if known is not None and any(r.role in ("q", "k") for r in self.roles[known]):
                raise UnsupportedModel(
                    f"the adapter's '{escape(name, 140)}' changes q or k of PRE in a way that is "
                    f"not known. Merge it into its base first, then restore that. {NOTHING}"
                )
            return []
        found = []
        for bias in (False, True):
            for part in self.wanted.get((base, bias), []):
                source = self.pre.tensors[base]
                renamed = replace(part, tensor=name, bias=bias)
                found.append(Place(part=renamed, post=info, pre=source, source=base))
        return found


def check_dropped(post: Weights, drops: list[Drop], copies: list[Place], options: Options) -> None:
    """Raise MismatchError where the adapter has no delta of what is restored."""
    if options.allows("unchanged"):
        return
    if not drops and not copies:
        raise MismatchError(
            "the adapter holds nothing of the chosen layers' "
            f"{','.join(options.include)}: there is nothing to restore, q and k are PRE's already. "
            f"--allow unchanged goes on. {NOTHING}"
        )
    with Files(post) as files:
        zero = all(is_zero(files.read(run)) for drop in drops for run in drop.runs())
    if zero and not copies:
        raise MismatchError(
            "the adapter's deltas of the chosen rows are zero already: there is nothing to restore."
            f" --allow unchanged goes on. {NOTHING}"
        )
