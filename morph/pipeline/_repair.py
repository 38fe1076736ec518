"""Pre, post and restored on the same items: what a fine-tuning took and what a restore returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import checkpoint, layouts, repair, strict
from morph import restore as restoring
from morph.errors import escape
from morph.evaluation import Hit, Measured
from morph.pipeline import _convert, _train
from morph.pipeline._data import Corpus
from morph.pipeline._source import Say, quiet, write_result
from morph.recipes.schema import Recipe, Restore
from morph.repair import Drift, Repair

if TYPE_CHECKING:
    from torch import nn

    from morph.pipeline._run import Run
    from morph.plan import Plan

TOLD = ("layers", "tensors", "bytes", "total_bytes")
DRIFTED = ("q", "k", "v", "o", "q_norm", "k_norm", "mlp")


def stages(state: Run, plan: Plan, base: Mapping[str, Any]) -> Repair:
    """Tune the finished hybrid of a run, restore it, and measure all three; return what was found.

    Writes OUT/tuned, OUT/restored (where the recipe restores) and OUT/repair.json. `base` is what
    every stage of the run is made from. A stage is kept where its inputs have not changed.
    """
    pre = state.out / "checkpoint"
    if state.recipe.restore is not None:
        check(state.recipe.restore, _opened(pre))
    post = _tuned(state, plan, base)
    folders = {repair.PRE: pre, repair.POST: post}
    told: dict[str, Any] = {}
    if state.recipe.restore is not None:
        folders["restored"], told = _restored(state, pre, post)
    file, recipe = state.out / "repair.json", state.recipe
    inputs = {
        "checkpoints": {name: _opened(folder).fingerprint for name, folder in folders.items()},
        "evaluate": strict.plain(recipe.evaluate),
        "problems": strict.plain(recipe.finetune),
        **base,
    }
    if state.fresh("repair", inputs, file):
        return repair.loads(file.read_text(encoding="utf-8"), str(file))
    start = time.perf_counter()

    def loader(folder: Path) -> Callable[[], nn.Module]:
        return lambda: _train.student_of(state.model(), plan, state.source, _opened(folder))

    found = measure(
        recipe,
        {name: loader(folder) for name, folder in folders.items()},
        state.corpus,
        state.source.tokenizer(),
        say=state.say,
        drift=drift(pre, post),
        tuning=state.record["stages"]["finetune"]["told"],
        restoring=told,
    )
    write_result(file, repair.dumps(found))
    state.note("repair", inputs, start)
    return found


def _opened(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint.open(folder, strict=False)


def _tuned(state: Run, plan: Plan, base: Mapping[str, Any]) -> Path:
    """Return the folder of the tuned hybrid, written where it is not there yet."""
    from morph.pipeline import _finetune

    recipe, folder, pre = state.recipe, state.out / "tuned", _opened(state.out / "checkpoint")
    section = recipe.finetune
    assert section is not None
    inputs = {
        **base,
        "checkpoint": pre.fingerprint,
        "finetune": {k: v for k, v in strict.plain(section).items() if k != "problems"},
        "probe": {k: v for k, v in strict.plain(recipe.training).items() if k[:6] == "probe_"},
    }
    if state.fresh("finetune", inputs, folder):
        return folder
    start = time.perf_counter()
    student = _train.student_of(state.model(), plan, state.source, pre)
    state.set_aside("finetune", inputs)
    tuned = _finetune.tune(
        recipe,
        student,
        state.model(),
        state.source,
        plan,
        state.corpus,
        state.out / "finetune",
        say=state.say,
        progress=state.progress,
    )
    told = tuned.told(section)
    _convert.convert(
        state.source,
        plan,
        folder,
        force=folder.exists(),
        student=student,
        provenance={"finetune": told, "pre": {"name": pre.path.name, "sha256": pre.fingerprint}},
        say=state.say,
    )
    state.note("finetune", inputs, start, told=told)
    return folder


def _restored(state: Run, pre: Path, post: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the restored hybrid, and what was put back."""
    section, folder = state.recipe.restore, state.out / "restored"
    assert section is not None
    inputs = {
        "pre": _opened(pre).fingerprint,
        "post": _opened(post).fingerprint,
        "restore": strict.plain(section),
    }
    if state.fresh("restore", inputs, folder):
        return folder, dict(state.record["stages"]["restore"]["told"])
    start = time.perf_counter()
    found = restore(section, pre, post, folder, say=state.say)
    told = {**strict.plain(section), **{k: found[k] for k in TOLD if k in found}}
    state.note("restore", inputs, start, told=told)
    return folder, told


def check(section: Restore, pre: checkpoint.Checkpoint) -> None:
    """Raise what `morph restore` would raise for the layers and parts of the section, sooner."""
    from morph.restore._select import select

    shapes = {name: info.shape for name, info in pre.tensors.items()}
    options = restoring.Options(**strict.plain(section) | {"include": section.include})
    select(layouts.read(pre.config, shapes), shapes, options)


def restore(section: Restore, pre: Path, post: Path, out: Path, *, say: Say) -> dict[str, Any]:
    """Write `post` with what the section names from `pre` as the folder `out`; return what was."""
    from morph.pipeline import _restore

    return _restore.restore_command(
        str(pre),
        str(post),
        out,
        method=section.method,
        rho=section.rho,
        alpha=section.alpha,
        layers=section.layers,
        include=",".join(section.include),
        force=out.exists(),
        say=say,
    )


def measure(
    recipe: Recipe,
    models: Mapping[str, Callable[[], nn.Module]],
    corpus: Corpus,
    tokenizer: Any,
    *,
    say: Say = quiet,
    **told: Any,
) -> Repair:
    """Ask every model the same questions and held-out problems, and compare them item by item.

    `models` are pre, post and the restored ones, each made when its turn comes. Questions, lengths
    and perplexity are those of the recipe's evaluate section. `told` are further fields of Repair.
    """
    tuned = recipe.finetune
    assert tuned is not None
    hits: dict[str, list[Hit]] = {}
    losses: dict[str, Measured | None] = {}
    for name, make in models.items():
        say(f"{escape(name)}: questions, problems, perplexity")
        hits[name], losses[name] = ask(recipe, make(), corpus, tokenizer)
    return repair.compare(hits, losses, tuned=tuned.tasks, seed=recipe.seed, **told)


def ask(
    recipe: Recipe, model: nn.Module, corpus: Corpus, tokenizer: Any
) -> tuple[list[Hit], Measured | None]:
    """Return what a model answers to the recipe's questions and held-out problems, and its loss."""
    from morph import evaluate

    section = recipe.evaluate
    questions = evaluate.build_examples(
        section, tokenizer, corpus.held_out, stories=corpus.held_out_stories, seed=recipe.seed
    )
    longest = max(section.lengths, default=0)
    # Stories have any length: they are one cell, under the length they were cut to.
    hits = [
        replace(hit, length=longest) if hit.task == "name_recall" else hit
        for hit in evaluate.recall(model, [*questions, *problems(recipe, tokenizer)])
    ]
    if not section.perplexity_tokens:
        return hits, None
    return hits, evaluate.perplexity(
        model,
        corpus.held_out,
        seq_len=section.seq_len,
        max_tokens=section.perplexity_tokens,
        bos=tokenizer.bos_token_id,
    )


def problems(recipe: Recipe, tokenizer: Any) -> list[Any]:
    """Return the held-out problems of the tasks tuned on."""
    from morph.reasoning import reasoning_examples

    tuned = recipe.finetune
    assert tuned is not None
    return [
        example
        for task in tuned.tasks
        for example in reasoning_examples(tokenizer, task, count=tuned.problems, seed=recipe.seed)
    ]


def drift(pre: Path, post: Path) -> tuple[Drift, ...]:
    """Return how far every role of every layer moved from `pre` to `post`, from their files."""
    from morph.pipeline import _diff

    return tuple(
        Drift(layer=row["layer"], role=role, drift=float(row["roles"][role]["drift"]))
        for row in _diff.diff_command(str(pre), str(post))["layers"]
        for role in DRIFTED
        if role in row["roles"] and row["roles"][role]["drift"] is not None
    )
