"""One function per stage, and `run`, which does them all. What the command line calls.

Importing this loads no torch; stages that need it load it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import checkpoint, registry
from morph import plan as planning
from morph.errors import MismatchError, OutputExists, RecipeError, UsageError, escape, nearest
from morph.pipeline import _data, _select
from morph.pipeline._source import (
    Say,
    Source,
    open_source,
    quiet,
    refuse_nonfinite,
    write_result,
)
from morph.plan import Plan, Scores
from morph.recipes import schema
from morph.recipes.schema import Recipe
from morph.selection import choose_units

if TYPE_CHECKING:
    from morph.comparison import Comparison
    from morph.evaluation import Evaluation

__all__ = [
    "Source",
    "compare_command",
    "convert_command",
    "distill_command",
    "distill_dry_run",
    "dry_run",
    "environment",
    "evaluate_command",
    "open_source",
    "plan_command",
    "run",
    "score_command",
    "score_estimate",
    "verify_command",
    "with_stages",
]

LENGTHS = {"1K": 1024, "32K": 32768, "128K": 131072}


def environment() -> dict[str, Any]:
    """Return versions, devices and which fast paths can run here."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("morph-hybrid", "torch", "transformers", "triton", "accelerate", "safetensors"):
        found[name] = _installed(name)
    found["flash-linear-attention"] = _installed("flash-linear-attention")
    found["threads"] = torch.get_num_threads()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"

    sizes = {"B": 1, "T": 4, "H": 2, "G": 1, "K": 8, "V": 8}
    for name in registry.names("kernels"):
        kernel = registry.load("kernels", name)
        inputs = kernel.example(**sizes, dtype=torch.float32, generator=torch.Generator())
        reasons = {path: kernel.unsupported(path, **inputs) for path in kernel.PATHS}
        found[f"kernel {name}"] = ", ".join(
            f"{path}: {reason or 'runs here'}" for path, reason in reasons.items()
        )
    return found


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


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


def _corpus(recipe: Recipe, source: Source, root: Path | None = None) -> _data.Corpus | None:
    if not recipe.data.text:
        return None
    return _data.corpus(recipe.data, source.tokenizer(), root)


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
        _corpus(recipe, source),
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
        corpus=_corpus(recipe, source),
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
    from morph.pipeline import _compare

    found = _compare.candidates(selectors)
    wanted = [b.strip() for b in budgets.split(",") if b.strip()]
    if not wanted:
        raise UsageError("--budgets names none; give some, such as 1/8,1/4,1/2.")
    if twice := [b for n, b in enumerate(wanted) if b in wanted[:n]]:
        raise UsageError(f"--budgets names {escape(twice[0])} twice; name it once.")
    _refuse_choice(recipe)
    _check_folder(out, [recipe.model], force, ("compare.json", "compare.html", "compare.md"))
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
    plain = schema.Select()
    names = ("selector", "options", "budget", "keep", "replace", "min_full_per_layer")
    for name in names:
        if getattr(recipe.select, name) != getattr(plain, name):
            raise UsageError(
                f"select.{name} has no part in a comparison: --selectors (with options, such as "
                "kl:mode=remove) and --budgets say what is compared, and nothing is pinned."
            )


def describe(plan: Plan) -> dict[str, Any]:
    """Return pattern, mixers and cache bytes of a plan beside its source's, both at 16 bit."""
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
    }


def dry_run(
    recipe: Recipe, plan_file: Path | None = None, root: Path | None = None
) -> dict[str, Any]:
    """Return what a command would do: limits, cache bytes, tokens. No weight is read."""
    source = open_source(_model_path(recipe.model, root), recipe.family)
    if plan_file is not None:
        from morph import surgery

        made = _select.read_plan(plan_file)
        _select.check_plan(made, source)
        return describe(surgery.resolve_costs(made))
    shape = source.geometry
    kept = _select.kept_count(source, recipe.select)
    width = shape.units(recipe.select.granularity)
    per_token = 2 * shape.entry_elements() * shape.num_key_value_heads
    length = _select.with_length(recipe.select, recipe.mixer, source).seq_len or 0
    return {
        "model": str(source.path),
        "family": source.family.model_type,
        "layers": shape.num_hidden_layers,
        "weight_bytes": source.checkpoint.nbytes,
        "selector": recipe.select.selector,
        "granularity": recipe.select.granularity,
        "kept_full": kept,
        "candidates": len(shape.candidates) * width,
        "mixer": recipe.mixer.name,
        "full_cache_bytes_per_token": per_token * len(shape.candidates),
        "kept_cache_bytes_per_token": per_token * kept // width,
        "calibration_tokens": recipe.select.examples * length,
        **_training_cost(recipe, source),
    }


def score_estimate(recipe: Recipe, *, stream: bool = False) -> dict[str, Any]:
    """Return what scoring would cost: passes, tokens, and, with text, minutes by a short probe.

    With `stream` no model is loaded, and so nothing probed.
    """
    from morph.pipeline import _estimate

    source = open_source(recipe.model, recipe.family)
    corpus = None if stream else _corpus(recipe, source)
    told = {k: v for k, v in dry_run(recipe).items() if not k.startswith("distillation_")}
    return {**told, **_estimate.estimate(recipe, source, corpus)}


def _training_cost(recipe: Recipe, source: Source) -> dict[str, int]:
    tokens = sum(stage.tokens for stage in recipe.distill)
    parameters = sum(math.prod(info.shape) for info in source.checkpoint.tensors.values())
    flops = 8 * parameters * tokens  # teacher and student forward, and the student's way back
    return {"distillation_tokens": tokens, "distillation_flops": flops}


def distill_dry_run(recipe: Recipe, hybrid: str) -> dict[str, Any]:
    """Return what `distill_command` would do; no weight is read."""
    source = open_source(recipe.model, recipe.family)
    plan = plan_of_folder(checkpoint.resolve(hybrid), source)
    return {
        "teacher": str(source.path),
        "hybrid": hybrid,
        "pattern": plan.pattern,
        "stages": [f"{stage.loss} {stage.tokens:,} tokens" for stage in recipe.distill],
        **_training_cost(recipe, source),
    }


def convert_command(
    recipe: Recipe,
    out: Path,
    *,
    plan_file: Path | None = None,
    target: str = "auto",
    with_code: bool = False,
    force: bool = False,
    say: Say = quiet,
) -> dict[str, Any]:
    """Write the hybrid of the recipe's model; score and plan first where no plan is given."""
    from morph.pipeline import _convert

    _check_target(target)
    source = open_source(recipe.model, recipe.family)
    checkpoint.check_output(out, [source.path], force)
    found, swaps = None, {}
    if plan_file is not None:
        from morph import surgery

        made = _select.read_plan(plan_file)
        _select.check_plan(made, source)
        made = surgery.resolve_costs(made)
    else:
        found, made, swaps = _chosen(recipe, source, say)
    written = _convert.convert(
        source,
        made,
        out,
        target=target,  # type: ignore[arg-type]
        force=force,
        with_code=with_code,
        provenance=_select.provenance_of(found, swaps),
        say=say,
    )
    return _tell(written, made)


def _check_target(target: str) -> None:
    allowed = ("auto", "stock", "package")
    if target not in allowed:
        raise UsageError(
            f"--target {escape(target)!r} is unknown.{nearest(target, allowed)} "
            f"There are: {', '.join(allowed)}."
        )


def _chosen(recipe: Recipe, source: Source, say: Say) -> tuple[Scores, Plan, dict[str, Any]]:
    from morph.pipeline import _score

    corpus = _corpus(recipe, source)
    refuse_nonfinite(source)
    model = source.model(recipe.dtype)
    common: dict[str, Any] = {"seed": recipe.seed, "model": model, "say": say}
    with tempfile.TemporaryDirectory(prefix="morph-") as scratch:  # mixers are aligned once
        common["work"] = Path(scratch)
        found = _score.score(source, recipe.select, recipe.mixer, corpus, **common)
        made, swaps = _select.make_plan(
            found, recipe.select, recipe.mixer, source, corpus=corpus, **common
        )
    return found, made, swaps


def _tell(written: Any, plan: Plan) -> dict[str, Any]:
    return {
        "wrote": str(written.path),
        "format": written.format,
        "not_stock_because": " ".join(written.reasons) or None,
        **describe(plan),
        "verification": dict(written.verification),
        "load": written.load,
        "serve": written.serve,
    }


def with_stages(recipe: Recipe, text: str, sets: list[str]) -> Recipe:
    """Return the recipe with stages from `align=64K,logits=1M`, `--set` applied last."""
    from morph import strict

    stages = []
    for part in filter(None, text.split(",")):
        name, _, tokens = part.partition("=")
        if not tokens:
            raise RecipeError(f"--stages {escape(part)!r}: give tokens, such as {escape(name)}=1M.")
        stages.append({"loss": name.strip(), "tokens": tokens.strip()})
    raw = {**strict.plain(recipe), "distill": stages}
    return schema.from_data(schema.apply_sets(raw, sets), "command line")


def distill_command(
    recipe: Recipe,
    hybrid: str,
    out: Path,
    *,
    target: str = "auto",
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Distil a written hybrid from its source and write the result; state lives beside `out`."""
    from morph.pipeline import _convert, _train

    _check_target(target)
    source = open_source(recipe.model, recipe.family)
    given = checkpoint.Checkpoint.open(checkpoint.resolve(hybrid), strict=False)
    checkpoint.check_output(out, [source.path, given.path], force)
    made = plan_of_folder(given.path, source)
    _convert.find_target(source, made, target)  # refuses now what it would refuse after training
    corpus = _data.corpus(recipe.data, source.tokenizer())
    teacher = source.model(recipe.dtype)
    student = _train.student_of(teacher, made, source, given)
    work = out.with_name(out.name + ".distill")
    log = _train.distill(
        recipe, student, teacher, corpus, source.tokenizer(), work, say=say, progress=progress
    )
    written = _convert.convert(
        source,
        made,
        out,
        target=target,  # type: ignore[arg-type]
        force=force,
        student=student,
        provenance={"distill": _train.summary(log, recipe)},
        say=say,
    )
    say(f"{work} holds the training log and the state to resume from; it may be deleted")
    return _tell(written, made)


def _record(path: Path) -> dict[str, Any]:
    """Return what morph.json of a folder tells, or an empty mapping where there is none."""
    file = path / "morph.json"
    if not file.is_file():
        return {}
    found = checkpoint.load_json(file.read_bytes(), str(file))
    return found if isinstance(found, dict) else {}


def was_distilled(path: Path) -> bool:
    """Return True for a folder whose morph.json tells of a distillation."""
    told = _record(path).get("provenance")
    if not isinstance(told, dict):
        return False
    recipe = told.get("recipe")
    return bool(told.get("distill") or (isinstance(recipe, dict) and recipe.get("distill")))


def plan_of_folder(path: Path, source: Source | None = None) -> Plan:
    """Return the plan of a hybrid that morph wrote.

    Raises MismatchError for any other folder, and where `source` is not what it was made of.
    """
    found = _record(path)
    if "plan" not in found:
        raise MismatchError(
            f"{path} was not written by morph: it has no morph.json that names a plan. "
            "Convert a model first."
        )
    where = f"{path / 'morph.json'}: plan"
    plan = planning.loads_plan(json.dumps(found["plan"]), where)
    registry.refuse_imports("mixers", plan.mixers, where)
    if source is not None:
        _select.check_plan(plan, source)
        made_of = found.get("source")
        if isinstance(made_of, dict) and made_of.get("sha256") != source.checkpoint.fingerprint:
            raise MismatchError(
                f"{path} was made of another model ({escape(made_of.get('name'))}) than "
                f"{source.path}: weights or config differ."
            )
    return plan


def evaluate_command(
    recipe: Recipe,
    model: str,
    *,
    source: str | None = None,
    out: Path | None = None,
    force: bool = False,
    say: Say = quiet,
) -> Evaluation:
    """Evaluate a model alone, or a hybrid beside its source and the baselines at its budget."""
    from morph import evaluation as evaluations
    from morph.pipeline import _measure

    if out is not None:
        _check_folder(out, [model, *([source] if source else [])], force)
    found = _measure.compare(recipe, model, source, say=say)
    if out is not None:
        from morph import report

        out.mkdir(parents=True, exist_ok=True)
        write_result(out / "evaluation.json", evaluations.dumps(found))
        paths = report.report(out, evaluation=found)
        say(f"wrote {', '.join(map(str, paths[:2]))}")
    return found


def _check_folder(
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


def verify_command(path: Path, against: str | None, *, say: Say = quiet) -> dict[str, Any]:
    """Check manifest and structure; with `against`, load both in fresh processes and compare."""
    opened = checkpoint.verify(path)
    told: dict[str, Any] = {
        "manifest": "every file is as it was written",
        "tensors": len(opened.tensors),
        "bytes": opened.nbytes,
    }
    if against is not None:
        from morph.pipeline import _verify

        source = open_source(against)
        told |= _verify.against(source, path, plan_of_folder(path, source))
    return told


def _model_path(model: str, root: Path | None) -> str:
    if root is not None and (root / model).is_dir():
        return str(root / model)
    return model


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    root: Path | None = None,
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Do all of a recipe in the folder `out`; see `_run.run`."""
    from morph.pipeline import _run

    return _run.run(recipe, out, root=root, force=force, say=say, progress=progress)


def convert(model: str, out: str | Path, plan: Plan, **options: Any) -> Any:
    """Write the hybrid that `plan` makes of a checkpoint folder; see `_convert.convert`."""
    from morph.pipeline import _convert

    return _convert.convert(open_source(model), plan, out, **options)
