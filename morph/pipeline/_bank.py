"""A bank: every candidate layer of a model aligned to several mixers, all in one pass of the text.

`align` writes it; `compose` starts any plan over its mixers from it, with nothing to align again.

    BANK/bank.json          the model, the mixers with all options, how they were aligned, errors
    BANK/MIXER.safetensors  one file a mixer, tensors under the names that they have in a hybrid
    BANK/MANIFEST.json      sha256 of every file

Reference: Zebra-Llama (arXiv 2505.17272) aligns an all-MLA and an all-Mamba2 student and composes
the pattern from the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import checkpoint, strict
from morph.checkpoint._format import MAX_JSON, check_basename, dtype_code, encode_header, read_small
from morph.errors import (
    CheckpointError,
    DataError,
    MismatchError,
    UsageError,
    VerificationFailed,
    escape,
    nearest,
)
from morph.pipeline import _align, _data, _next, _select
from morph.pipeline._source import (
    Say,
    Source,
    open_source,
    quiet,
    refuse_hybrid,
    refuse_nonfinite,
)
from morph.plan import Plan
from morph.recipes import _yaml, schema
from morph.recipes.schema import Mixer, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from morph.distill import Event

RECORD = "bank.json"
MEASURED = 2048  # tokens on which errors are measured


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A mixer of a bank: all its options, its file, and each layer's error before and after.

    Errors are squares of the difference over squares of the source's output, by layer.
    """

    mixer: str
    options: Mapping[str, Any]
    file: str
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Bank:
    """What bank.json says: `source` and `sha256` of the model, and how the mixers were aligned."""

    source: str
    sha256: str
    text_sha256: str
    seed: int
    calibrate: int
    stage: Mapping[str, Any]
    mixers: tuple[Entry, ...]
    format: int = 1


# --- The mixers that are asked for --------------------------------------------------------------


def parse(texts: Sequence[str], calibrate: int = Mixer().calibrate) -> list[Mixer]:
    """Return the mixers that texts such as `hola:cache=32,block=32` name.

    A mixer from outside is `package.module:object`. Raises UsageError, RecipeError, UnknownName.
    """
    if not texts:
        raise UsageError("name what to align: --mixer NAME, repeatable. `morph list mixers` helps.")
    found = []
    for text in texts:
        where, options = f"--mixer {escape(text)}", {}
        name, _, rest = text.partition(":")
        if "." in name:
            attribute, _, rest = rest.partition(":")
            name = f"{name}:{attribute}"
        for setting in filter(None, rest.split(",")):
            key, equals, value = (x.strip() for x in setting.partition("="))
            if not equals:
                raise UsageError(f"{where}: options are key=value, parted by commas.")
            if key in options:
                raise UsageError(f"{where}: {escape(key)} is given twice.")
            options[key] = _yaml.read(value, where)[0]
        raw = {"name": name, "options": options, "calibrate": calibrate}
        found.append(schema.from_data({"model": "-", "mixer": raw}, where).mixer)
    return found


def spelled(mixer: str, options: Mapping[str, Any]) -> str:
    """Return a mixer as `parse` reads it."""
    told = ",".join(f"{k}={_next.as_yaml(v)}" for k, v in options.items())
    return f"{mixer}:{told}" if told else mixer


# --- Aligning -----------------------------------------------------------------------------------


def align_command(
    recipe: Recipe,
    mixers: Sequence[str],
    out: Path,
    *,
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Align every candidate layer of the recipe's model to every mixer; write the bank to `out`.

    The recipe has one stage, `align`. State lives beside `out`; the same command goes on from it.
    """
    stages = recipe.distill
    if len(stages) != 1 or stages[0].loss != "align" or stages[0].train == "lora":
        raise UsageError("morph align has one stage, align, without lora; give --tokens a number.")
    if stages[0].needles or recipe.training.probe_every:
        raise UsageError(
            "morph align trains on plain text and measures errors, not recall: leave out "
            "distill.align.needles and training.probe_every."
        )
    if replace(recipe.mixer, calibrate=Mixer().calibrate) != Mixer():
        raise UsageError(
            "--set mixer...: here options go behind the name, such as --mixer sliding:window=64; "
            "only mixer.calibrate is for all."
        )
    given = parse(mixers, recipe.mixer.calibrate)
    source = open_source(recipe.model, recipe.family)
    refuse_hybrid(source, "align")
    asked = _align.complete(source, given)
    checkpoint.check_output(out, [source.path], force)
    _align.refuse_untrained(source, asked, recipe.distill[0])
    work = out.with_name(out.name + ".distill")
    bank, found, tokens = _aligned(recipe, source, asked, work, say, progress)
    write(bank, found, out, source, force)
    say(f"{work} holds the training log and the state to resume from; it may be deleted")
    rows = [
        {
            "mixer": spelled(m.name, m.options),
            "name": m.name,
            "given": dict(m.options),
            "file": e.file,
            "before": dict(e.before),
            "after": dict(e.after),
        }
        for m, e in zip(given, bank.mixers)
    ]
    return {"wrote": str(out), "tokens": tokens, "mixers": rows}


def _aligned(
    recipe: Recipe,
    source: Source,
    mixers: Sequence[Mixer],
    work: Path,
    say: Say,
    progress: Callable[[Any], None] | None,
) -> tuple[Bank, list[dict[str, torch.Tensor]], int]:
    """Return the bank of a model, its tensors, and how many tokens it took."""
    from morph import distill as distillation

    (stage,) = recipe.distill
    corpus = _data.corpus(recipe.data, source.tokenizer(), seed=recipe.seed)
    if len(corpus.train) < 2:
        raise DataError(f"the text has {len(corpus.train)} tokens to train on; give more text.")
    distillation.check_epochs(recipe.distill, len(corpus.train), recipe.data.epochs)
    refuse_nonfinite(source)
    model = source.model(recipe.dtype)
    hybrids = _align.started(source, model, mixers, corpus, say)
    ids = _measured_on(corpus)
    before = _errors(hybrids, model, ids)

    def told(event: Event) -> None:
        if event.kind == "note":
            say(event.text)
        elif progress is not None:
            progress(event)

    common: dict[str, Any] = {
        "seed": recipe.seed,
        "training": recipe.training,
        "progress": told,
    }
    count = f"{len(mixers)} mixer{'s' * (len(mixers) > 1)}"
    say(f"aligning {count} in {len(before[0])} layers ({stage.tokens:,} tokens)")
    found, log = _align.together(source, hybrids, mixers, model, stage, corpus, out=work, **common)
    entries = [
        Entry(mixer=m.name, options=m.options, file=f"{n}.safetensors", before=b, after=a)
        for m, n, b, a in zip(
            mixers, _align.labels(mixers), before, _errors(hybrids, model, ids), strict=True
        )
    ]
    bank = Bank(
        source=source.path.name,
        sha256=source.checkpoint.fingerprint,
        text_sha256=corpus.sha256,
        seed=recipe.seed,
        calibrate=recipe.mixer.calibrate,
        stage=strict.plain(stage),
        mixers=tuple(entries),
    )
    return bank, found, log.tokens


def _measured_on(corpus: _data.Corpus) -> torch.Tensor:
    """Return rows `[B, T]` of the held-out text; of the training text where that is too short."""
    from morph.pipeline import _start

    short = len(corpus.held_out) < 64
    return _start.text_ids(corpus if short else replace(corpus, train=corpus.held_out), MEASURED)


def _errors(
    hybrids: Sequence[nn.Module], model: nn.Module, ids: torch.Tensor
) -> list[dict[str, float]]:
    from morph import surgery

    found = (surgery.output_errors(hybrid, model, ids) for hybrid in hybrids)
    return [{str(i): error for i, error in sorted(errors.items())} for errors in found]


# --- The folder ---------------------------------------------------------------------------------


def write(
    bank: Bank,
    tensors: Sequence[Mapping[str, torch.Tensor]],
    out: Path,
    source: Source,
    force: bool = False,
) -> None:
    """Write a bank, whole or not at all: one dictionary of tensors a mixer, in the bank's order."""
    import torch

    need = sum(t.nbytes for found in tensors for t in found.values())
    with checkpoint.Staging(out, inputs=[source.path], need=need, force=force) as stage:
        for entry, found in zip(bank.mixers, tensors, strict=True):
            places, at = {}, 0
            for name, t in sorted(found.items()):
                places[name] = (dtype_code(str(t.dtype)), tuple(t.shape), at, at + t.nbytes)
                at += t.nbytes
            with stage.create(entry.file) as file:
                file.append(encode_header(places))
                for _, t in sorted(found.items()):
                    flat = t.detach().to("cpu").contiguous().reshape(-1)
                    file.append(flat.view(torch.uint8).numpy().data)
        stage.write(RECORD, checkpoint.dump_json(strict.plain(bank)))
        stage.publish()


def read(path: Path, source: Source) -> Bank:
    """Return the bank in a folder, every file compared with its manifest.

    Raises CheckpointError for what is no bank, VerificationFailed for a damaged one, and
    MismatchError where it is of another model than `source`.
    """
    if not path.is_dir() or not (path / RECORD).is_file():
        raise CheckpointError(
            f"{escape(path)} is no bank: it has no {RECORD}. `morph align` writes one."
        )
    where = escape(path / RECORD)
    problems = checkpoint.verify_manifest(path)
    if problems:
        raise VerificationFailed(
            f"{escape(path)} is damaged: {' '.join(problems[:3])} Align again, or get a good copy."
        )
    raw = checkpoint.load_json(read_small(path, RECORD, MAX_JSON["config"]), where)
    if isinstance(raw, dict) and raw.get("format") != 1:
        raise CheckpointError(f"{where}: format {escape(raw.get('format'))}; 1 is known here.")
    found = strict.build(Bank, raw, where, CheckpointError)
    for entry in found.mixers:
        check_basename(entry.file, where)
    if found.sha256 != source.checkpoint.fingerprint:
        raise MismatchError(
            f"{escape(path)} was aligned to another model ({escape(found.source)}) than "
            f"{source.path}: weights or config differ. Align this model."
        )
    return found


# --- A plan from a bank -------------------------------------------------------------------------


def chosen(bank: Bank, plan: Plan) -> dict[int, Entry]:
    """Return which entry of the bank serves each converted layer of a plan with costs.

    Raises MismatchError for the first layer that the bank cannot serve.
    """
    found = {}
    for i in plan.replaced_layers:
        layer = plan.layers[i]
        if layer.mixer is None or layer.fusion != "none":
            raise MismatchError(
                f"layer {i}: its heads have several mixers, or are fused; a bank was aligned in "
                "whole layers, whose projections fit no mixture. Convert without --aligned, and "
                "let `morph distill --stages align=...` align this plan."
            )
        found[i] = _entry(bank, layer.mixer, layer.groups[0].options, i)
    return found


def _entry(bank: Bank, mixer: str, options: Mapping[str, Any], layer: int) -> Entry:
    named = [e for e in bank.mixers if e.mixer == mixer]
    for entry in named:
        if dict(entry.options) == dict(options):
            if str(layer) in entry.after:
                return entry
            raise MismatchError(
                f"layer {layer}: the bank has {escape(mixer)} for the layers "
                f"{', '.join(map(escape, entry.after))}."
            )
    if not named:
        names = list(dict.fromkeys(e.mixer for e in bank.mixers))
        raise MismatchError(
            f"layer {layer}: the bank has no {escape(repr(mixer))}.{nearest(mixer, names)} "
            f"There are: {', '.join(map(escape, names))}. Align it too."
        )
    unlike = [[k for k in options if e.options.get(k) != options[k]] for e in named]
    differ, entry = min(zip(unlike, named), key=lambda pair: len(pair[0]))
    asked, there = ({k: x.get(k) for k in differ} for x in (options, entry.options))
    raise MismatchError(
        f"layer {layer}: the plan has {escape(spelled(mixer, asked))}, the bank has "
        f"{escape(spelled(mixer, there))}. Align it so too."
    )


def compose(source: Source, model: nn.Module, plan: Plan, path: Path, bank: Bank) -> nn.Module:
    """Return the hybrid of a live source model whose converted layers are those of the bank.

    It is marked with the names of what differs from the source. Raises MismatchError as `chosen`
    does, CheckpointError where a file does not hold what the plan needs.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from morph import modeling, surgery

    entries = chosen(bank, plan)
    made, loaded = modeling.hybrid(model, plan), []
    for i, layer in surgery.hybrid_layers(made).items():
        file, stem = path / entries[i].file, f"{_align.stem(source, i)}."
        parameters, own = dict(layer.named_parameters()), dict(layer.own_parameters())
        try:
            with safe_open(file, framework="pt") as opened:
                there = {n for n in opened.keys() if n.startswith(stem)}  # noqa: SIM118
                there = {n.removeprefix(stem) for n in there}
                if wrong := own.keys() - there | there - parameters.keys():
                    what = "unknown" if min(wrong) in there else "missing"
                    raise CheckpointError(f"{escape(file)}: {stem}{escape(min(wrong))} is {what}.")
                found = {n: opened.get_tensor(stem + n) for n in sorted(there)}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{escape(file)} cannot be read: {escape(error)}.") from error
        for name, tensor in found.items():
            p = parameters[name]
            if tensor.shape != p.shape or not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{escape(file)}: {stem}{escape(name)} is {list(tensor.shape)}, or not finite; "
                    f"finite numbers {list(p.shape)} are needed."
                )
            owner, _, leaf = name.rpartition(".")
            fresh = torch.nn.Parameter(tensor.to(p), requires_grad=p.requires_grad)
            layer.get_submodule(owner)._parameters[leaf] = fresh
            loaded.append(stem + name)
    made.morph_trained = tuple(sorted(loaded))  # type: ignore[assignment]
    return made


def check(bank: Bank, recipe: Recipe, source: Source) -> None:
    """Raise MismatchError where a bank cannot serve what the recipe will plan."""
    if recipe.select.granularity != "layer":
        raise MismatchError(
            f"select.granularity is {recipe.select.granularity}: the plan would mix heads, and a "
            "bank was aligned in whole layers. Choose layers, or convert without --aligned."
        )
    chosen(bank, _select.baseline(source, recipe.mixer, 0, "window"))


def student(
    source: Source, plan: Plan, path: Path, bank: Bank
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Return (the hybrid that starts from the bank, what card and report say of it)."""
    from morph.pipeline import _verify

    chosen(bank, plan)  # before any weight is read
    if not plan.replaced_layers:
        return None, {}
    refuse_nonfinite(source)
    model = source.model(_verify.compute_dtype(source, None))
    digest = hashlib.sha256(checkpoint.dump_json(strict.plain(bank))).hexdigest()
    told = {"bank_sha256": digest, "stage": dict(bank.stage)}
    return compose(source, model, plan, path, bank), {"aligned": told}
