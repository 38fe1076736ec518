"""The exact command that goes on from where one ended, as arguments of `morph`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from morph.recipes.schema import TASKS, Data, Evaluate, Recipe, Select

Command = list[str]


def flags(**given: Any) -> Command:
    """Return options as arguments: nothing for None, one pair per entry of a list."""
    found: Command = []
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        for one in values:
            found += [f"--{name.replace('_', '-')}", str(one)]
    return found


def data_sets(recipe: Recipe) -> list[str]:
    """Return the settings of the data section, besides its files, that are not the defaults."""
    plain, own = Data(), recipe.data
    changed = [f.name for f in fields(Data) if f.name != "text"]
    changed = [name for name in changed if getattr(own, name) != getattr(plain, name)]
    return [f"data.{name}={as_yaml(getattr(own, name))}" for name in changed]


def as_yaml(value: Any) -> str:
    """Return an option's value as `--set` reads it."""
    plain = isinstance(value, bool) or value is None
    return {True: "true", False: "false", None: "null"}[value] if plain else str(value)


def after_score(recipe: Recipe, out: Path, sets: Iterable[str] | None) -> Command:
    """Return `plan` with the same mixer, data and questions, so that its swaps fit the scores."""
    kept = [x for x in sets or () if not x.startswith(("selector.", "select.selector"))]
    kept = [x for x in kept if x.partition("=")[0].strip() not in ("model", "select.granularity")]
    kept += [f"family={recipe.family}"] * (recipe.family is not None)
    kept += [f"dtype={recipe.dtype}"] * (recipe.dtype != "float32")
    named = {x.partition("=")[0].strip() for x in kept}
    return [
        *("plan", str(out), "--model", recipe.model),
        *flags(
            budget=None if "select.budget" in named else recipe.select.budget,
            mixer=None if "mixer.name" in named else recipe.mixer.name,
            data=None if "data.text" in named else recipe.data.text,
            seed=recipe.seed or None if "seed" not in named else None,
            set=list(dict.fromkeys(kept)),
        ),
    ]


def after_compare(recipe: Recipe, found: Any, sets: Iterable[str] | None) -> Command:
    """Return `score` with the selector of least mean regret, the cheapest of equals."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for entry in found.entries:
        if entry.regret is not None:
            cost = round(entry.regret, 9), entry.forwards + entry.backwards
            rows.setdefault(entry.row.removesuffix(" + swaps"), []).append(cost)
    means = {name: [sum(x) / len(x) for x in zip(*costs)] for name, costs in rows.items()}
    best = min(means, key=lambda name: (means[name], name), default="")
    selector, *options = best.split(" ")
    kept = [x for x in sets or () if not x.startswith(("select.granularity", "mixer.name"))]
    named = {x.partition("=")[0].strip() for x in kept}
    return [
        *("score", recipe.model),
        *flags(
            selector=selector or None,
            granularity=recipe.select.granularity,
            mixer=recipe.mixer.name,
            data=None if "data.text" in named else recipe.data.text,
            family=None if "family" in named else recipe.family,
            seed=recipe.seed or None if "seed" not in named else None,
            dtype=recipe.dtype if recipe.dtype != "float32" and "dtype" not in named else None,
            set=[*kept, *(f"selector.{x}" for x in options)],
        ),
    ]


def after_align(recipe: Recipe, bank: Path, mixers: Iterable[Any]) -> Command:
    """Return `convert` from the bank with the mixer that came nearest, with no aligning first."""
    best = min(mixers, key=lambda m: sum(m["after"].values()))
    sets = [f"mixer.{key}={as_yaml(value)}" for key, value in best["given"].items()]
    return [
        *("convert", recipe.model, f"{Path(recipe.model).name or 'model'}-hybrid"),
        *flags(
            aligned=bank,
            mixer=best["name"],
            data=recipe.data.text,
            family=recipe.family,
            seed=recipe.seed or None,
            set=[*sets, "select.align=0", *data_sets(recipe)],
        ),
    ]


def after_plan(recipe: Recipe, out: Path) -> Command:
    """Return `convert` into a new folder named after the model."""
    folder = f"{Path(recipe.model).name or 'model'}-hybrid"
    mixer = recipe.mixer.name  # one from outside is imported on the user's word, not on the plan's
    outside = "." in mixer or ":" in mixer
    return [
        *(("--import", mixer.partition(":")[0]) if outside else ()),
        *("convert", recipe.model, folder, "--plan", str(out)),
        *flags(
            family=recipe.family,
            data=recipe.data.text,
            seed=recipe.seed or None,
            set=data_sets(recipe),
        ),
    ]


def after_convert(recipe: Recipe, out: Path) -> Command:
    """Return `evaluate` beside the source on the same text; `verify` where there was none."""
    if not recipe.data.text:
        return ["verify", str(out), "--against", recipe.model]
    select, sets = recipe.select, []
    if select.task != Select().task and select.task in TASKS:
        sets += [f"evaluate.tasks=[{select.task}]", f"evaluate.lengths=[{select.seq_len}]"]
    if recipe.evaluate != Evaluate():
        sets = []  # told by --set, which the user knows better
    return [
        *("evaluate", str(out), "--against", recipe.model),
        *flags(data=recipe.data.text, seed=recipe.seed or None, set=[*sets, *data_sets(recipe)]),
    ]


def after_evaluate(recipe: Recipe, model: str, against: str | None) -> Command:
    """Return `distill` for a fresh hybrid, `verify` for a distilled one, `score` for a source."""
    from morph.pipeline import was_aligned, was_distilled

    shared = flags(data=recipe.data.text, seed=recipe.seed or None, set=data_sets(recipe))
    if against is None:
        if (Path(model) / "morph.json").is_file():
            return ["verify", model]
        return ["score", model, *shared]
    if was_distilled(Path(model)):
        return ["verify", model, "--against", against]
    out = f"{str(model).rstrip('/')}-distilled"
    left = flags(stages="logits=1M" if was_aligned(Path(model)) else None)
    return ["distill", model, "--teacher", against, "--out", out, *left, *shared]
