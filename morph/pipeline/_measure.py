"""A hybrid beside its source, the same budget placed uniformly, and windows everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from morph import checkpoint
from morph import plan as planning
from morph.errors import UnsupportedModel, UsageError, escape
from morph.pipeline import _data, _select
from morph.pipeline._source import Say, Source, open_source, quiet
from morph.plan import Plan
from morph.recipes.schema import Mixer, Recipe

if TYPE_CHECKING:
    from torch import nn

    from morph.evaluation import Evaluation


def compare(recipe: Recipe, model: str, against: str | None, *, say: Say = quiet) -> Evaluation:
    """Return the evaluation of `model`, with source and baselines beside it where one is named."""
    from morph.pipeline import plan_of_folder, record_of

    if against is None:
        alone = _alone(model, recipe.family)
        corpus = _data.corpus(recipe.data, alone.tokenizer(), seed=recipe.seed)
        plan = None
        if "plan" in record_of(alone.path):  # restored ones may have a record without a plan
            plan = plan_of_folder(alone.path)
        return evaluate(
            recipe,
            {"model": lambda: alone.model(recipe.dtype)},
            {"model": plan},
            corpus,
            alone.tokenizer(),
            say=say,
        )
    source = open_source(against, recipe.family)
    given = checkpoint.Checkpoint.open(checkpoint.resolve(model), strict=False)
    plan = plan_of_folder(given.path, source)
    corpus = _data.corpus(recipe.data, source.tokenizer(), seed=recipe.seed)
    return beside(recipe, source, plan, given, corpus, say=say)


def _alone(model: str, family: str | None) -> Source:
    """Return the model to evaluate; raise UsageError for what needs its source beside it."""
    try:
        return open_source(model, family)
    except UnsupportedModel as error:
        if (checkpoint.resolve(model) / "morph.json").is_file():
            raise UsageError(
                f"{escape(model)} was written by morph in another architecture than its source's; "
                "name the source with --against SOURCE."
            ) from error
        raise


def beside(
    recipe: Recipe,
    source: Source,
    plan: Plan,
    given: checkpoint.Checkpoint,
    corpus: _data.Corpus,
    *,
    base: nn.Module | None = None,
    say: Say = quiet,
) -> Evaluation:
    """Evaluate source, hybrid and the recipe's baselines; all hybrids run on morph's own mixers."""
    from morph.pipeline import _start, _train

    base = base if base is not None else source.model(recipe.dtype)
    models: dict[str, Callable[[], nn.Module]] = {
        "source": lambda: base,
        "hybrid": lambda: _train.student_of(base, plan, source, given),
    }
    plans: dict[str, Plan | None] = {"source": None, "hybrid": plan}
    mixer, kept = layout_of(plan)
    for name in recipe.evaluate.baselines:
        if name == "window":  # the training-free floor, whatever the hybrid's mixer is
            options = mixer.options if mixer.name == "sliding" else {}
            other = _select.baseline(source, Mixer(name="sliding", options=options), 0, "window")
        else:
            other = _select.baseline(source, mixer, max(1, kept), "uniform")
        plans[name] = other
        models[name] = lambda other=other: _start.hybrid_of(
            base, other, corpus, recipe.mixer.calibrate
        )
    found = evaluate(recipe, models, plans, corpus, source.tokenizer(), say=say)
    return replace(found, notes=(*found.notes, *_remarks(recipe, plans, given)))


def _remarks(
    recipe: Recipe, plans: Mapping[str, Plan | None], given: checkpoint.Checkpoint
) -> list[str]:
    """Return what a reader must know of the baselines to compare them with the hybrid."""
    from morph.pipeline import was_distilled

    told, names = [], [n for n in plans if n not in ("source", "hybrid")]
    if names and was_distilled(given.path):
        told.append(f"Only the hybrid was distilled; {' and '.join(names)} were not trained.")
    hybrid, uniform, window = (plans.get(n) for n in ("hybrid", "uniform", "window"))
    if uniform is not None and hybrid is not None and uniform.pattern == hybrid.pattern:
        told.append("uniform keeps the layers that the hybrid keeps.")
    longest = max(recipe.evaluate.lengths, default=0)
    options = [] if window is None else [g.options for x in window.layers for g in x.groups]
    sizes = [int(o["window"]) for o in options if "window" in o]
    if sizes and min(sizes) >= longest:
        told.append(f"window sees {min(sizes):,} tokens, so all of every question: full attention.")
    return told


def layout_of(plan: Plan) -> tuple[Mixer, int]:
    """Return what the plan does to layers, as a recipe's section, and how many layers it keeps.

    The mixer is the one that most replaced heads have, the first of several; heads whose mixer
    keeps every token (`nope`) count as kept.
    """
    heads: dict[str, int] = {}
    found: dict[str, planning.HeadGroup] = {}
    kept: planning.HeadGroup | None = None
    whole, fusion = 0, "none"
    for layer, window in zip(plan.layers, plan.geometry.windows):
        others = [g for g in layer.groups if not _keeps(g)]
        whole += not others and window is None
        fusion = layer.fusion if layer.fusion != "none" else fusion
        kept = next((g for g in layer.groups if _keeps(g) and g.mixer != "full"), kept)
        for group in others:
            key = f"{group.mixer} {sorted(group.options.items())}"
            found.setdefault(key, group)
            heads[key] = heads.get(key, 0) + len(group.heads)
    if not heads:
        raise UsageError("the plan replaces nothing; there is nothing to compare.")
    main = found[max(heads, key=heads.__getitem__)]
    mixer = Mixer(
        name=main.mixer,
        options=dict(main.options),
        kept=kept.mixer if kept else "full",
        kept_options=dict(kept.options) if kept else {},
        fusion=fusion,  # type: ignore[arg-type]
    )
    return mixer, whole


def _keeps(group: planning.HeadGroup) -> bool:
    from morph.mixers._hybrid import mixer_module

    return group.mixer == "full" or getattr(mixer_module(group.mixer).Mixer, "dense", False)


def evaluate(
    recipe: Recipe,
    models: dict[str, Any],
    plans: dict[str, Plan | None],
    corpus: _data.Corpus,
    tokenizer: Any,
    *,
    say: Say = quiet,
) -> Evaluation:
    """Measure the models on the held-out text, as the recipe's evaluate section says."""
    from morph import evaluate as measuring

    return measuring.evaluate(
        models,
        recipe.evaluate,
        tokenizer,
        corpus.held_out,
        stories=corpus.held_out_stories or None,
        seed=recipe.seed,
        plans=plans,
        progress=say,
    )
