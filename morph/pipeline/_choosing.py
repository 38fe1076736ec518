"""From a model to who keeps full attention: score, plan, compare, as commands that write files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import plan as planning
from morph.errors import OutputExists, UsageError, escape
from morph.pipeline import _data, _select
from morph.pipeline._source import Say, Source, open_source, quiet, write_result
from morph.plan import Plan, Scores
from morph.recipes.schema import Recipe, Select
from morph.selection import choose_units

if TYPE_CHECKING:
    from morph.comparison import Comparison

LENGTHS = {"1K": 1024, "32K": 32768, "128K": 131072}


def check_result(path: Path, force: bool, inputs: Sequence[Path | str] = ()) -> None:
    """Raise where a small result file may not be written, before anything is computed for it."""
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder; make it first, or give another --out.")
    for given in map(Path, inputs):
        if given.is_dir() and given.resolve() in path.resolve().parents:
            raise OutputExists(f"{path} lies inside the input {given}. Give another --out.")
        if path.exists() and given.exists() and os.path.samefile(path, given):
            raise OutputExists(f"{path} is the input. Give another --out.")
    if path.is_dir():
        raise OutputExists(f"{path} is a folder; --out names a file here.")
    if path.exists() and not force:
        raise OutputExists(f"{path} exists. Give another --out, or --force to replace it.")


def _check_results(
    out: Path, exports: Mapping[str, Path], force: bool, inputs: Sequence[Path | str]
) -> None:
    """Raise as `check_result` does for the result or any export, or where two are one file."""
    paths = [out, *exports.values()]
    for path in paths:
        check_result(path, force, inputs)
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--export names a file that is written already; give each its own.")


def corpus_of(recipe: Recipe, source: Source, root: Path | None = None) -> _data.Corpus | None:
    if not recipe.data.text:
        return None
    return _data.corpus(recipe.data, source.tokenizer(), root, seed=recipe.seed)


def score_command(
    recipe: Recipe,
    out: Path,
    *,
    exports: Mapping[str, Path] | None = None,
    stream: bool = False,
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score the recipe's model and write scores.json, and what `exports` names by format.

    Exported lists of layers hold those that the budget keeps. What was measured waits in
    OUT.partial until it is done; the same command goes on from there.
    """
    from morph.pipeline import _score

    source, exports = open_source(recipe.model, recipe.family), exports or {}
    _check_results(out, exports, force, [source.path, *recipe.data.text])
    probed = {"mixer": recipe.mixer.name, "mixer_options": {"window": 1, **recipe.mixer.options}}
    _refuse_exports(_select.blank(source, recipe.select.granularity, probed), exports)
    partial = out.with_name(f"{out.name}.partial")
    found = _score.score(
        source,
        recipe.select,
        recipe.mixer,
        corpus_of(recipe, source),
        seed=recipe.seed,
        dtype=recipe.dtype,
        memo=partial,
        work=out.parent,
        stream=stream,
        say=say,
        progress=progress,
    )
    write_result(out, planning.dumps(found))
    say(f"wrote {out}")
    if exports:
        kept = choose_units(found, _select.budget_of(recipe.select), geometry=source.geometry)
        _export(found, exports, [layer for layer, _ in kept], say)
    partial.unlink(missing_ok=True)
    return found


def _refuse_exports(scores: Scores, exports: Mapping[str, Path]) -> None:
    """Raise PlanError where scores like these cannot be exported so: before anything is done."""
    from morph import exchange

    for name in exports:
        exchange.dumps(scores, name, keep=[0])


def _export(scores: Scores, exports: Mapping[str, Path], keep: Sequence[int], say: Say) -> None:
    from morph import exchange

    for name, path in exports.items():
        exchange.write(scores, path, name, keep=keep)
        say(f"wrote {path} ({name})")


def plan_command(
    recipe: Recipe,
    scores: Path,
    out: Path,
    *,
    exports: Mapping[str, Path] | None = None,
    force: bool = False,
    say: Say = quiet,
) -> dict[str, Any]:
    """Turn scores, ours or another tool's, into plan.json; return what people want to know of it.

    `exports` are further files by format; lists of layers hold those the plan keeps.
    """
    source, exports = open_source(recipe.model, recipe.family), exports or {}
    _check_results(out, exports, force, [source.path, scores, *recipe.data.text])
    found = _select.read_scores(scores, source)
    _refuse_exports(found, exports)
    if note := found.provenance.get("note"):
        say(f"note: {escape(note, 600)}")
    made, swaps = _select.make_plan(
        found,
        recipe.select,
        recipe.mixer,
        source,
        corpus=corpus_of(recipe, source),
        seed=recipe.seed,
        dtype=recipe.dtype,
        work=out.parent,
        say=say,
    )
    write_result(out, planning.dumps(made))
    say(f"wrote {out}")
    _export(_for_plan(found, made), exports, list(made.full_layers), say)
    return {**describe(made), "swaps": swaps or None}


def _for_plan(scores: Scores, plan: Plan) -> Scores:
    """Return the scores told of the plan's mixer: an exported window is the plan's."""
    groups = (g for layer in plan.layers for g in layer.groups if g.mixer != "full")
    used = next(groups, None)
    if used is None:
        return scores
    told = {k: v for k, v in scores.provenance.items() if k not in ("window", "keep_first")}
    told |= {"mixer": used.mixer, "mixer_options": dict(used.options)}
    return replace(scores, provenance=told)


def compare_command(
    recipe: Recipe,
    selectors: str | None,
    budgets: str,
    out: Path,
    *,
    seeds: int = 1,
    max_sets: int = 4096,
    with_swaps: bool = True,
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare selectors on the recipe's model; write compare.json, the page and its pictures."""
    from morph import comparison as comparing
    from morph import report
    from morph.pipeline import _compare, _judge

    found = _judge.with_baselines(_judge.candidates(selectors))
    wanted = [b.strip() for b in budgets.split(",") if b.strip()]
    if not wanted:
        raise UsageError("--budgets names none; give some, such as 1/8,1/4,1/2.")
    if twice := [b for n, b in enumerate(wanted) if b in wanted[:n]]:
        raise UsageError(f"--budgets names {escape(twice[0])} twice; name it once.")
    _refuse_choice(recipe)
    check_folder(out, [recipe.model], force, ("compare.json", "compare.html", "compare.md"))
    made = _compare.compare(
        recipe,
        found,
        wanted,
        seeds=range(seeds),
        max_sets=max_sets,
        with_swaps=with_swaps,
        out=out,
        say=say,
        progress=progress,
    )
    write_result(out / "compare.json", comparing.dumps(made))
    paths = report.comparison_report(out, made)
    say(f"wrote {out / 'compare.json'}, {', '.join(map(str, paths[:2]))}")
    return made


def _refuse_choice(recipe: Recipe) -> None:
    """Raise UsageError where a recipe says what a comparison takes from its own flags, or not."""
    plain = Select()
    names = ("selector", "options", "budget", "keep", "replace", "min_full_per_layer")
    for name in names:
        if getattr(recipe.select, name) != getattr(plain, name):
            raise UsageError(
                f"select.{name} has no part in a comparison: --selectors (with options, such as "
                "kl:mode=remove) and --budgets say what is compared, and nothing is pinned."
            )


def describe(plan: Plan) -> dict[str, Any]:
    """Return pattern, mixers, and what is kept and read, beside the source's, both at 16 bit."""
    from morph import surgery

    full = planning.full_plan(plan.model_type, plan.geometry)
    return {
        "pattern": plan.pattern,
        "full_layers": list(plan.full_layers),
        "full_heads": {
            i: [h for g in layer.groups if g.mixer == "full" for h in g.heads]
            for i, layer in enumerate(plan.layers)
            if layer.mixer is None
        },
        "mixers": list(plan.mixers),
        "cache_bytes": {
            name: {"source": full.cache_bytes(length), "hybrid": plan.cache_bytes(length)}
            for name, length in LENGTHS.items()
        },
        "decode_bytes": {
            name: {"source": full.cache_bytes(n), "hybrid": surgery.decode_bytes(plan, n)}
            for name, n in LENGTHS.items()
        },
    }


def check_folder(
    out: Path,
    inputs: Sequence[str],
    force: bool,
    names: Sequence[str] = ("evaluation.json", "report.html", "report.md"),
) -> None:
    """Raise OutputExists where a folder for reports is a file, has one, or lies in an input."""
    if out.exists() and not out.is_dir():
        raise OutputExists(f"{out} is a file; --out names a folder here.")
    for given in map(Path, inputs):
        here = given.resolve()
        if given.is_dir() and here in (out.resolve(), *out.resolve().parents):
            raise OutputExists(f"{out} is, or lies inside, the input {given}. Write elsewhere.")
    for name in names:
        if (out / name).exists() and not force:
            raise OutputExists(
                f"{out / name} exists. Give another --out, or --force to replace the report."
            )
