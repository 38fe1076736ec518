"""What a recipe may say: dataclasses, and the strict YAML loader that fills them.

A recipe is data. Every section goes to one stage of the pipeline and is all that stage sees.
Unknown, doubled and mistyped keys are errors that name the nearest key. No torch.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from morph import registry, strict
from morph.errors import MorphError, RecipeError, UnknownName, escape, nearest
from morph.plan import Budget, Granularity, Unit
from morph.recipes import _rules, _sets, _tuning, _yaml
from morph.recipes._tuning import Finetune as Finetune
from morph.recipes._tuning import Restore as Restore

TASKS = ("single_1", "single_2", "single_3", "multikey", "name_recall")
MAX_STAGES = 100
TRACKERS = ("tensorboard", "wandb", "trackio")
BASELINES = ("uniform", "window")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where calibration, distillation and evaluation text comes from.

    `text` are local files (.txt, .json, .jsonl, .parquet) or datasets of the Hub
    (`hub:owner/name`, `hub:owner/name:config`), which are streamed; `column` holds the text of
    .jsonl, .parquet and datasets, `split` is that of a dataset. The last `held_out` share of the
    tokens is kept for evaluation and never trained on. `limit` is the most tokens read of every
    entry; a dataset needs it. With `chat` the column holds lists of messages, which the
    tokenizer's chat template turns into text. `epochs` is the most often that training may read
    the text; None: as often as the stages ask for.
    """

    text: tuple[str, ...] = ()
    held_out: float = 0.1
    column: str = "text"
    split: str = "train"
    limit: int | None = None
    chat: bool = False
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Select:
    """Which layers or heads keep full attention, and who decides.

    `seq_len` None is 512 tokens, or twice the mixer's window where that is more. `align` are the
    tokens on which mixers with parameters are aligned before anything is measured (0: not at all).
    `task_options` shape the task `passkeys`: keys, words, label_span, intervals. `swap_tries`
    bounds the swaps that one round of the swap pass measures.
    """

    selector: str = "nll"
    granularity: Granularity = "layer"
    budget: str = "1/4"
    keep: tuple[Unit, ...] = ()
    replace: tuple[Unit, ...] = ()
    min_full_per_layer: int = 0
    verify_swaps: bool = True
    swap_tries: int = 64
    align: int = 128_000
    examples: int = 16
    seq_len: int | None = None
    task: str = "multikey"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """What stands where attention stood.

    `kept` is the mixer of the heads that the budget keeps: `full`, the source's own attention, or
    `nope` for HyPE. `fusion` joins the heads of converted layers (`scale`: HydraHead's).
    `calibrate` is how many tokens of text start the mixers from what the source computes; 0: none.
    """

    name: str = "sliding"
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: str = "full"
    kept_options: Mapping[str, Any] = field(default_factory=dict)
    fusion: Literal["none", "scale"] = "none"
    calibrate: int = 4096


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of distillation.

    `loss` align: each new mixer regresses its layer's teacher output. logits: KL to the teacher.
    long: cross-entropy, meant for long sequences. `tokens` is the budget; a recipe may give
    `share` instead, of `training.tokens`. A step has `batch_size` rows, over all processes;
    `micro_batch` are the rows of one process that are computed at once, None: all.

    `train` new: the mixers' own parameters; attention: also the projections of converted layers;
    all: everything; lora: the mixers' own, and low-rank updates (`lora_rank`, `lora_alpha`) of
    those projections, merged at the end of the stage. `lr` is the peak learning rate, `gate_lr`
    that of gates, decays and gains, which never get weight decay.

    `kl` is the direction: forward is KL(teacher || student). `cross_entropy` is the share of
    next-token cross-entropy in the loss, the rest being KL; None is 0 for logits and 1 for long.
    `needles` is the share of batches made of needle tasks instead of plain text. `rows` windows:
    pieces of the text as it runs on; documents: whole documents packed, each mixed on its own.
    `recompute` keeps fewer activations: those of every layer, or of its MLP, are made again on the
    way back.
    """

    loss: Literal["align", "logits", "long"]
    tokens: int
    seq_len: int = 512
    batch_size: int = 4
    micro_batch: int | None = None
    train: Literal["new", "attention", "all", "lora"] = "attention"
    lr: float = 1e-3
    gate_lr: float = 1e-2
    min_lr_fraction: float = 0.1
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    kl: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    cross_entropy: float | None = None
    chunk_tokens: int = 256
    needles: float = 0.0
    rows: Literal["windows", "documents"] = "windows"
    recompute: Literal["none", "mlp", "layer"] = "none"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    save_every: int = 50


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the stages run, apart from what they are.

    `tokens` is what the shares of stages are shares of. `keep_states` saved states stay.
    Every `probe_every` steps (0: never) recall of `probe_task` is measured on `probe_examples`
    questions of `probe_length` tokens; with `recall_target` a stage of `logits` or `long` ends
    once recall reaches that share of the teacher's. `teacher_cache` is a folder that keeps the
    teacher's final hidden states, so that other runs on the same text need no teacher forward.
    `mixed_precision` computes in bfloat16 over float32 weights. `trackers` are told besides the
    local log. `shard` splits weights over processes (FSDP2).
    """

    tokens: int | None = None
    keep_states: int = 2
    probe_every: int = 0
    probe_task: str = "multikey"
    probe_length: int = 512
    probe_examples: int = 32
    recall_target: float | None = None
    teacher_cache: str | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    trackers: tuple[str, ...] = ()
    shard: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured before and after."""

    tasks: tuple[str, ...] = ("multikey",)
    lengths: tuple[int, ...] = (512,)
    depths: int = 5
    examples: int = 20
    perplexity_tokens: int = 16384
    seq_len: int = 512
    decode_tokens: int = 32
    speed_length: int = 1024
    baselines: tuple[str, ...] = ("uniform", "window")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything `morph run` does, in order."""

    model: str
    family: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    data: Data = field(default_factory=Data)
    select: Select = field(default_factory=Select)
    mixer: Mixer = field(default_factory=Mixer)
    distill: tuple[Stage, ...] = ()
    training: Training = field(default_factory=Training)
    evaluate: Evaluate = field(default_factory=Evaluate)
    finetune: Finetune | None = None
    restore: Restore | None = None
    out: str | None = None


_MIXER = {f.name for f in fields(Mixer)}


# --- Reading ------------------------------------------------------------------------------------


def load(path_or_name: str | Path, sets: Iterable[str] = ()) -> Recipe:
    """Return the recipe in a `.yaml` file, or the shipped one of that name, `sets` applied.

    Raises RecipeError for a file that is missing, larger than 1 MiB or not UTF-8, UnknownName for
    a name that is not shipped, and whatever `load_text` raises.
    """
    data, where, lines = _read(path_or_name)
    data, set_keys = _sets.apply(data, sets, _MIXER)
    return from_data(data, where, lines | dict.fromkeys(set_keys, 0))


def folder(path_or_name: str | Path) -> Path:
    """Return the folder that a recipe's relative paths start from.

    A file's own folder; for a shipped recipe the one that holds the package, which in a clone is
    the repository with its examples.
    """
    if _is_file_name(str(path_or_name)):
        return Path(path_or_name).resolve().parent
    return registry.ROOT.parent


def load_text(text: str, where: str = "recipe") -> Recipe:
    """Return the recipe that a YAML text describes; `where` names the text in messages.

    Nothing is included, expanded or imported. Raises RecipeError, PlanError (the budget) or
    UnknownName, each with the line, for the first thing that was not meant.
    """
    data, lines = _yaml.read(text, where)
    return from_data(data, where, lines)


def from_data(data: Any, where: str = "recipe", lines: Mapping[str, int] | None = None) -> Recipe:
    """Return the recipe that plain data describes, checked; see `check`.

    `where`, and the line that `lines` has for a dotted key (0: it came from `--set`), go in front
    of the message of what is raised.
    """
    lines = lines or {}
    try:
        data = _rules.shares_as_tokens(_budget_as_text(data), lines.get("training.tokens") == 0)
        recipe = strict.build(Recipe, data)
        check(recipe)
    except MorphError as error:
        key, line = str(error).partition(": ")[0], None
        while key and (line := lines.get(key)) is None:
            key = re.sub(r"(\[\d+\]|(^|\.)[^.\[]*)$", "", key)
        place = "--set" if line == 0 else f"{where}, line {line}" if line else where
        raise type(error)(f"{place}: {error}") from error
    return recipe


def check(recipe: Recipe) -> None:
    """Raise where a recipe names what does not exist or a number lies outside its range.

    Options of mixers and selectors are compared with the source of their `Options` class: their
    names, and their types where these are plain. Nothing is imported.
    """
    select, mixer, evaluate = recipe.select, recipe.mixer, recipe.evaluate
    if len(recipe.distill) > MAX_STAGES:
        raise RecipeError(f"distill: {len(recipe.distill)} stages; {MAX_STAGES} is the most.")
    _known("families", recipe.family, "family")
    _known("selectors", select.selector, "select.selector")
    _known("mixers", mixer.name, "mixer.name")
    _options("selectors", select.selector, select.options, "select.options")
    _options("mixers", mixer.name, mixer.options, "mixer.options")
    if mixer.kept != "full":
        _known("mixers", mixer.kept, "mixer.kept")
    _options("mixers", mixer.kept, mixer.kept_options, "mixer.kept_options")
    _among((*TASKS, "passkeys", "text"), (select.task,), "select.task")
    if select.task_options and select.task != "passkeys":
        raise RecipeError(f"select.task_options: task {select.task} has none; passkeys has some.")
    _among(TASKS, evaluate.tasks, "evaluate.tasks")
    _among(BASELINES, evaluate.baselines, "evaluate.baselines")
    _among([t for t in TASKS if t != "name_recall"], (recipe.training.probe_task,), _PROBE)
    _among(TRACKERS, recipe.training.trackers, "training.trackers")
    pins = {"keep": select.keep, "replace": select.replace}
    for name, units in pins.items():
        _pins(units, f"select.{name}")
    if both := set(select.keep) & set(select.replace):
        raise RecipeError(f"select.keep: {min(both, key=str)} is both kept and replaced.")
    try:
        Budget.parse(select.budget, min_full_per_layer=select.min_full_per_layer, **pins)
    except MorphError as error:
        raise type(error)(f"select.budget: {error}") from error
    _ranges(recipe)
    _rules.together(recipe)
    _tuning.check(recipe.finetune, recipe.restore)


def apply_sets(data: Any, sets: Iterable[str]) -> Any:
    """Return a copy of a recipe's raw data with `key=value` texts put in.

    `mixer.window=512` and `selector.samples=4` set an option of the chosen part, `mixer.name=...`
    and `select.budget=1/4` a field of the section, `distill.align.tokens=2M` or
    `distill.0.tokens=2M` a field of a stage. Values are read as YAML. Raises UsageError for a text
    that is not `key=value`, comes twice, or names a stage that does not exist.
    """
    return _sets.apply(data, sets, _MIXER)[0]


def dumps(recipe: Recipe) -> str:
    """Return canonical YAML: every field in its declared order; `load_text` reads it back."""
    return _yaml.dump(strict.plain(recipe))


def recipe_digest(recipe: Recipe) -> str:
    """Return the sha256 of the canonical YAML."""
    return hashlib.sha256(dumps(recipe).encode()).hexdigest()


def _read(path_or_name: str | Path) -> tuple[Any, str, dict[str, int]]:
    name = str(path_or_name)
    where, shipped = escape(name), not _is_file_name(name)
    if shipped and ("/" in name or "\\" in name):
        there = ", ".join(registry.names("recipes")) or "none"
        raise RecipeError(f"{where}: a recipe file ends in .yaml. Shipped recipes: {there}.")
    path = registry.path("recipes", name) if shipped else Path(name)
    if not path.is_file():  # a pipe would hang, a device would not end
        raise RecipeError(f"{where}: no such recipe file.")
    try:
        with path.open("rb") as file:
            raw = file.read(_yaml.MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: byte {error.start} is not UTF-8.") from error
    data, lines = _yaml.read(text, where)
    return data, where, lines


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _budget_as_text(data: Any) -> Any:
    """`budget: 7` and `budget: 0.25` need no quotes: here alone a number stands for its text."""
    select = data.get("select") if isinstance(data, Mapping) else None
    if not isinstance(select, Mapping) or type(select.get("budget")) not in (int, float):
        return data
    return {**data, "select": {**select, "budget": str(select["budget"])}}


# --- Checking names, options and ranges ---------------------------------------------------------


def _known(kind: str, name: str | None, where: str) -> None:
    if name is None or "." in name or ":" in name:  # an outside part is found when it is used
        return
    try:
        registry.path(kind, name)
    except UnknownName as error:
        raise UnknownName(f"{where}: {error}") from error


def _options(kind: str, name: str, given: Mapping[str, Any], where: str) -> None:
    if name not in registry.names(kind):
        return
    known = {option: (hint, default) for option, hint, default in registry.options(kind, name)}
    for option, value in given.items():
        if option not in known:
            raise RecipeError(
                f"{where}.{escape(option)}: {name!r} has no such option."
                f"{nearest(option, known)} Options: {', '.join(known) or 'none'}."
            )
        strict.convert(_plain_type(known[option][0]), value, f"{where}.{option}")
    missing = [n for n, (_, default) in known.items() if default == "required" and n not in given]
    if missing:
        raise RecipeError(f"{where}: {name!r} needs {', '.join(missing)}.")


def _plain_type(text: str) -> Any:
    """The type that an annotation spells, where it is plain scalars or a Literal; else anything."""
    plain = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
    if literal := re.fullmatch(r"Literal\[([^\[\]]*)\]", text):
        return Literal[ast.literal_eval(f"({literal[1]},)")]
    parts = [plain.get(part.strip(), object) for part in text.split("|")]
    found = parts[0]
    for part in parts[1:]:
        found = found | part  # type: ignore[assignment]
    return object if object in parts else found


def _among(allowed: Sequence[str], given: Sequence[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise UnknownName(
                f"{where}: {escape(name)!r} does not exist.{nearest(name, allowed)} "
                f"There are: {', '.join(allowed)}."
            )


def _pins(units: Sequence[Unit], where: str) -> None:
    seen = set()
    for unit in units:
        if min(unit if isinstance(unit, tuple) else (unit,)) < 0:
            raise RecipeError(f"{where}: {unit} is negative; layers and heads count from 0.")
        if unit in seen:
            raise RecipeError(f"{where}: {unit} is listed twice.")
        seen.add(unit)


# Fields by the range they must lie in; the values are seen by a person, so the bounds are text
_SHARES = {"held_out", "warmup_fraction", "min_lr_fraction", "needles", "cross_entropy"}
_SHARES |= {"recall_target", "stop_below", "alpha"}
_POSITIVE = {"lr", "gate_lr", "clip", "temperature", "lora_alpha", "epochs"}
_PROBE = "training.probe_task"
_FROM_ZERO = {
    "seed",
    "weight_decay",
    "min_full_per_layer",
    "align",
    "perplexity_tokens",
    "calibrate",
    "probe_every",
    "rho",
}


def _ranges(recipe: Recipe) -> None:
    parts: list[tuple[str, Any]] = [("", recipe), ("data.", recipe.data)]
    parts += [("select.", recipe.select), ("mixer.", recipe.mixer)]
    parts += [("training.", recipe.training), ("evaluate.", recipe.evaluate)]
    parts += [(f"distill[{i}].", stage) for i, stage in enumerate(recipe.distill)]
    parts += [(f"{n}.", part) for n in ("finetune", "restore") if (part := getattr(recipe, n))]
    for prefix, part in parts:
        for f in fields(part):
            value = getattr(part, f.name)
            values = value if isinstance(value, tuple) else (value,)
            numbers = [v for v in values if isinstance(v, (int, float))]
            if not isinstance(value, bool) and f.name not in ("keep", "replace"):
                for number in numbers:
                    _range(f.name, number, prefix + f.name)


def _range(name: str, value: float, where: str) -> None:
    if name in _SHARES or where == "finetune.text":
        ok, allowed = 0 <= value <= 1, "a share between 0 and 1"
    elif name in _POSITIVE:
        ok, allowed = value > 0, "above 0"
    elif name in _FROM_ZERO:
        ok, allowed = value >= 0, "at least 0"
    else:
        ok, allowed = value >= 1, "at least 1"
    if not ok:
        raise RecipeError(f"{where}: {value} is out of range; it must be {allowed}.")
