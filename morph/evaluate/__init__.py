"""What a model keeps and what it costs: recall, perplexity, cache bytes and speed, side by side.

Every function is a pure function of a causal language model and token ids. `evaluate` measures
several models on the same tokens, so that differences are paired, and says where the source could
not do a task to begin with: a zero that was there before is not damage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from morph import surgery
from morph.data import NEEDLE_TASKS, Example, name_recall_examples, needle_examples
from morph.errors import DataError, InputFileError, PlanError, RecipeError, escape, nearest
from morph.evaluate._common import Model, Source, make
from morph.evaluate._cost import (
    CACHE_LENGTHS,
    cache_bytes_held,
    cache_bytes_planned,
    speed,
    speeds,
)
from morph.evaluate._quality import perplexity, recall
from morph.evaluate._sparsity import blocks_read, text_rows
from morph.evaluation import (
    CacheBytes,
    Evaluation,
    Hit,
    ModelResult,
    cannot,
    differences,
    summarise,
)
from morph.plan import Plan, full_plan, loads_plan
from morph.recipes.schema import Evaluate

__all__ = [
    "CACHE_LENGTHS",
    "TASKS",
    "blocks_read",
    "build_examples",
    "cache_bytes_held",
    "cache_bytes_planned",
    "evaluate",
    "perplexity",
    "recall",
    "speed",
    "speeds",
    "summarise",
    "text_rows",
]

TASKS = (*NEEDLE_TASKS, "name_recall")


def evaluate(
    models: Mapping[str, Source],
    settings: Evaluate,
    tokenizer: Any,
    text_ids: torch.Tensor | None,
    *,
    stories: Sequence[str] | None = None,
    seed: int = 0,
    plans: Mapping[str, Plan | None] | None = None,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure every model on the same questions, text and lengths; the first one is the source.

    A model is given itself, or as a function that makes it when its turn comes (it is dropped
    before the next one is made). text_ids `[N]` is held-out text for perplexity and haystacks;
    without it perplexity is left out. `stories` serve the task name_recall. Without
    a plan, a model's own is used. Raises DataError where a task lacks its text, and as `data` does.
    """
    if not models:
        raise DataError("there is no model to evaluate; give at least the source.")
    _check_settings(settings)
    tell = progress or (lambda message: None)
    examples = build_examples(settings, tokenizer, text_ids, stories=stories, seed=seed)
    hits: dict[str, list[Hit]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, source in models.items():
        tell(f"{escape(name)}: {len(examples)} questions, perplexity, cache")
        hits[name], found[name] = _all_but_speed(
            make(source),
            (plans or {}).get(name),
            examples,
            settings,
            tokenizer,
            text_ids,
            seed,
            batch_size,
        )
    tell(f"speed of {len(models)} models at {settings.speed_length} tokens")
    fast = speeds(models, settings.speed_length, settings.decode_tokens, seed=seed)
    first = next(iter(models))
    unable = cannot(found[first]["recall"], first)
    notes = list(unable.values())
    whole = found[first]["held"]
    results = []
    for name in models:
        held, dtype, plan = (found[name].pop(key) for key in ("held", "dtype", "plan"))
        results.append(
            ModelResult(
                name=name,
                pattern=plan.pattern if plan else None,
                cache=_planned(plan, dtype, name, notes, settings.speed_length, held),
                held=CacheBytes(
                    tokens=settings.speed_length, bytes=held, ratio=held / max(1, whole)
                ),
                speed=fast[name],
                **found[name],
            )
        )
    return Evaluation(
        models=tuple(results),
        differences=differences(
            hits,
            {result.name: result.perplexity for result in results},
            unable=unable,
        ),
        notes=tuple(notes),
        settings=settings,
        seed=seed,
    )


def build_examples(
    settings: Evaluate,
    tokenizer: Any,
    text_ids: torch.Tensor | None,
    *,
    stories: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Example]:
    """Return the questions of an evaluation: `settings.examples` per task and length.

    name_recall has stories of any length up to the longest, and so `settings.examples` in all.
    """
    found: list[Example] = []
    for task in settings.tasks:
        if task not in TASKS:
            raise DataError(
                f"task {escape(task)!r} is unknown.{nearest(task, TASKS)} "
                f"There are: {', '.join(TASKS)}."
            )
        if task == "name_recall":
            if not stories:
                raise DataError("the task name_recall needs stories; give a .json file of texts.")
            found += name_recall_examples(
                stories,
                tokenizer,
                seed=seed,
                count=settings.examples,
                max_length=max(settings.lengths),
            )
            continue
        for length in settings.lengths:
            found += needle_examples(
                task,
                tokenizer,
                text_ids,
                seed=seed,
                length=length,
                depths=_depths(settings.depths),
                count=settings.examples,
            )
    return found


def _depths(count: int) -> tuple[float, ...]:
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)


def _all_but_speed(
    model: Model,
    plan: Plan | None,
    examples: Sequence[Example],
    settings: Evaluate,
    tokenizer: Any,
    text_ids: torch.Tensor | None,
    seed: int,
    batch_size: int,
) -> tuple[list[Hit], dict[str, Any]]:
    """Everything that does not depend on the clock; the model is let go on return."""
    # Stories have any length: they are one cell, under the length they were cut to.
    longest = max(settings.lengths, default=0)
    hits = [
        replace(hit, length=longest) if hit.task == "name_recall" else hit
        for hit in recall(model, examples, batch_size)
    ]
    loss = None
    if text_ids is not None and settings.perplexity_tokens:
        loss = perplexity(
            model,
            text_ids,
            seq_len=settings.seq_len,
            max_tokens=settings.perplexity_tokens,
            batch_size=batch_size,
            bos=tokenizer.bos_token_id,
        )
    rows = text_rows(text_ids, max(settings.seq_len, longest), tokenizer.bos_token_id)
    return hits, {
        "blocks": () if rows is None else blocks_read(model, rows),
        "recall": summarise(hits, depths=_depths(settings.depths)),
        "perplexity": loss,
        "held": cache_bytes_held(model, settings.speed_length, seed),
        "plan": _plan_of(model, plan),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _plan_of(model: Model, given: Plan | None) -> Plan | None:
    """The plan given, the one a hybrid carries, or the source's own attention; None if unknown."""
    if given is not None:
        return given
    carried = getattr(model.config, "morph", None)
    if carried:
        return loads_plan(json.dumps(carried["plan"]))
    try:
        return full_plan(model.config.model_type, surgery.geometry_of(model))
    except InputFileError:  # of no known family: everything else can still be measured
        return None


def _planned(
    plan: Plan | None, dtype: str, name: str, notes: list[str], tokens: int, held: int
) -> tuple[CacheBytes, ...]:
    if plan is None:
        return ()
    try:
        said = plan.cache_bytes(tokens, dtype)
        found = cache_bytes_planned(plan, dtype)
    except PlanError as error:  # an evaluation of hours is worth more than one of its columns
        notes.append(f"{escape(name)}: cache bytes are not known: {escape(error)}")
        return ()
    if abs(held - said) > 0.05 * said:
        notes.append(
            f"{escape(name)} really holds {held:,} bytes after {tokens} tokens; its plan says "
            f"{said:,}."
        )
    return found


def _check_settings(settings: Evaluate) -> None:
    for name in ("depths", "examples", "seq_len", "decode_tokens", "speed_length"):
        if getattr(settings, name) < 1:
            raise RecipeError(f"evaluate.{name} is {getattr(settings, name)}; give at least 1.")
    if settings.tasks and (not settings.lengths or min(settings.lengths) < 1):
        raise RecipeError(
            f"evaluate.lengths is {list(settings.lengths)}; give one or more lengths in tokens."
        )
