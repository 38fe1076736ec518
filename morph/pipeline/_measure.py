"""A hybrid beside its source, the same budget placed uniformly, and windows everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from morph import checkpoint
from morph.errors import UsageError
from morph.pipeline import _data, _select
from morph.pipeline._source import Say, Source, open_source, quiet
from morph.plan import Plan
from morph.recipes.schema import Mixer, Recipe

if TYPE_CHECKING:
    from torch import nn

    from morph.evaluation import Evaluation


def compare(recipe: Recipe, model: str, against: str | None, *, say: Say = quiet) -> Evaluation:
    """Return the evaluation of `model`, with source and baselines beside it where one is named."""
    from morph.pipeline import plan_of_folder

    if against is None:
        alone = open_source(model, recipe.family)
        corpus = _data.corpus(recipe.data, alone.tokenizer())
        plan = None
        if (alone.path / "morph.json").is_file():
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
    corpus = _data.corpus(recipe.data, source.tokenizer())
    return beside(recipe, source, plan, given, corpus, say=say)


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
    mixer = _mixer_of(plan)
    full = [i for i in plan.full_layers if source.geometry.windows[i] is None]
    for name in recipe.evaluate.baselines:
        if name == "window":  # the training-free floor, whatever the hybrid's mixer is
            options = mixer.options if mixer.name == "sliding" else {}
            other = _select.baseline(source, Mixer(name="sliding", options=options), 0, "window")
        else:
            count = max(1, len(full))
            other = _select.baseline(source, mixer, count, "uniform")
        plans[name] = other
        models[name] = lambda other=other: _start.hybrid_of(
            base, other, corpus, recipe.mixer.calibrate
        )
    return evaluate(recipe, models, plans, corpus, source.tokenizer(), say=say)


def _mixer_of(plan: Plan) -> Mixer:
    """Return the mixer, with options, that most replaced heads have; the first of several."""
    heads: dict[str, int] = {}
    found: dict[str, Mixer] = {}
    for layer in plan.layers:
        for group in layer.groups:
            if group.mixer != "full":
                key = f"{group.mixer} {sorted(group.options.items())}"
                found.setdefault(key, Mixer(name=group.mixer, options=dict(group.options)))
                heads[key] = heads.get(key, 0) + len(group.heads)
    if not heads:
        raise UsageError("the plan replaces nothing; there is nothing to compare.")
    return found[max(heads, key=heads.__getitem__)]


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
