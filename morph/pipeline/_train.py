"""Distillation as the pipeline runs it: the student, its data, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from morph import strict
from morph.checkpoint import Checkpoint
from morph.errors import MismatchError, UsageError
from morph.pipeline._data import Corpus
from morph.pipeline._source import Say, Source, quiet
from morph.plan import Plan
from morph.recipes.schema import Mixer, Recipe, Select

if TYPE_CHECKING:
    from torch import nn

    from morph.distill import Event, Log


def student_of(teacher: nn.Module, plan: Plan, source: Source, given: Checkpoint) -> nn.Module:
    """Return the hybrid in the folder `given` as a student of `teacher`.

    Tensors that equal the source's stay shared with the teacher; the others are loaded. Works for
    stock and package checkpoints alike.
    """
    import torch

    from morph import modeling
    from morph.pipeline import _convert

    student = modeling.hybrid(teacher, plan)
    parameters = dict(student.named_parameters(remove_duplicate=False))
    changed = []
    for name, array in _convert.as_source(source, plan, given).items():
        parameter = parameters.get(name)
        if parameter is None:
            continue
        loaded = torch.from_numpy(np.ascontiguousarray(array)).to(parameter)
        if not torch.equal(loaded, parameter):
            owner, _, leaf = name.rpartition(".")
            fresh = torch.nn.Parameter(loaded, requires_grad=parameter.requires_grad)
            student.get_submodule(owner)._parameters[leaf] = fresh
            changed.append(name)
    student.morph_trained = tuple(changed)  # type: ignore[assignment]
    return student


def check_settings(recipe: Recipe) -> None:
    """Raise UsageError for sections that `morph distill` has no use for: the hybrid is made."""
    if recipe.mixer != Mixer():
        raise UsageError(
            "--set mixer...: the hybrid brings its mixers; convert again to have others."
        )
    if replace(recipe.select, task=Select().task) != Select():
        raise UsageError(
            "--set select...: nothing is selected here; only select.task is looked at, for needles."
        )


def check_tokenizer(source: Source, given: Checkpoint) -> None:
    """Raise MismatchError where a hybrid has another vocabulary file than its source."""
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        mine, theirs = given.path / name, source.path / name
        if mine.is_file() and theirs.is_file() and mine.read_bytes() != theirs.read_bytes():
            raise MismatchError(
                f"{mine} is not the teacher's {theirs}: the same ids would be other words. Put the "
                "teacher's tokenizer files back, or convert again."
            )


def distill(
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module,
    corpus: Corpus,
    tokenizer: Any,
    work: Path,
    *,
    say: Say = quiet,
    progress: Callable[[Event], None] | None = None,
) -> Log:
    """Run the recipe's stages on `student`; state and log live in the folder `work`.

    Needle batches hide in the training text and use the task of the select section where that is
    one, `multikey` otherwise. Marks the student with the names of what changed.
    """
    from morph import data
    from morph import distill as training
    from morph.pipeline import _probe

    task = recipe.select.task if recipe.select.task in data.NEEDLE_TASKS else "multikey"
    wants = any(stage.needles for stage in recipe.distill)

    def told(event: Event) -> None:
        if event.kind == "note":
            say(event.text)
        elif progress is not None:
            progress(event)

    training.check_epochs(recipe.distill, len(corpus.train), recipe.data.epochs)
    times = training.epochs_of(recipe.distill, len(corpus.train))
    if times > 1.05 and len(corpus.train) >= max(s.seq_len for s in recipe.distill):
        say(f"the stages read the {len(corpus.train):,} tokens of text {times:.1f} times")
    if recipe.training.probe_every and not recipe.training.shard:
        from accelerate import PartialState

        teacher.to(PartialState().device)  # where it will be; questions wait for no CPU
    probe = _probe.probe_of(recipe.training, student, teacher, corpus, tokenizer, recipe.seed)
    log = training.distill(
        student,
        teacher,
        recipe.distill,
        rows_of(corpus, tokenizer, recipe.seed),
        out=work,
        text=corpus.identity,
        training=recipe.training,
        probe=probe,
        seed=recipe.seed,
        needles=training.needle_batches(task, tokenizer, corpus.train, seed=recipe.seed)
        if wants
        else None,
        progress=told,
    )
    earlier = getattr(student, "morph_trained", ())
    student.morph_trained = tuple(sorted({*log.trained, *earlier}))  # type: ignore[assignment]
    student.eval()
    return log


def rows_of(corpus: Corpus, tokenizer: Any, seed: int) -> Any:
    """Return the batches of plain text of every stage: windows of it, or whole documents."""
    from morph import distill as training

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    windows = training.text_batches(corpus.train, seed=seed, bos=bos)
    starts = corpus.train_starts
    documents = training.document_batches(corpus.train, starts, seed=seed, bos=bos, eos=eos)
    kinds = {"windows": windows, "documents": documents}
    return lambda index, stage: kinds[stage.rows](index, stage)


def summary(log: Log, recipe: Recipe) -> dict[str, Any]:
    """Return what card and report say of a distillation: stages, tokens, first and last loss."""
    stages = []
    for i, stage in enumerate(recipe.distill):
        losses = log.losses(i)
        entry = strict.plain(stage)
        if losses:
            entry |= {"first_loss": losses[0], "last_loss": losses[-1]}
        stages.append(entry)
    return {"stages": stages, "tokens": log.tokens, "notes": list(log.remarks)}
