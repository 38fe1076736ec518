"""One function per stage, and `run`, which does them all; what the package `pipeline` offers."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import checkpoint, registry
from morph import plan as planning
from morph._processes import rank
from morph.errors import MismatchError, RecipeError, UsageError, escape, nearest
from morph.pipeline import _bank, _data, _select
from morph.pipeline._choosing import (
    check_folder,
    corpus_of,
    describe,
)
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

if TYPE_CHECKING:
    from morph.evaluation import Evaluation


def environment() -> dict[str, Any]:
    """Return versions, devices and which fast paths can run here."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("morph-hybrid", "torch", "transformers", "triton", "accelerate", "safetensors"):
        found[name] = _installed(name)
    found["flash-linear-attention"] = _installed("flash-linear-attention")
    found["threads"] = torch.get_num_threads()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"

    # What a model in use would ask for: 16 bits on a GPU, float32 elsewhere
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    sizes = {"B": 1, "T": 4, "H": 2, "G": 1, "K": 8, "V": 8}
    for name in registry.names("kernels"):
        kernel = registry.load("kernels", name)
        made = kernel.example(**sizes, dtype=dtype, generator=torch.Generator())
        inputs = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in made.items()}
        reasons = {path: kernel.unsupported(path, **inputs) for path in kernel.PATHS}
        found[f"kernel {name}"] = " | ".join(
            f"{path}: {reason.rstrip('.') or 'runs here'}" for path, reason in reasons.items()
        )
    return found


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


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
    _check_mixer(recipe, source)
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
        **_repair_words(recipe),
    }


def _check_mixer(recipe: Recipe, source: Source) -> None:
    """Raise PlanError where the mixer refuses its options, as it would once all is scored."""
    from morph import surgery

    mixer, model_type = recipe.mixer, source.family.model_type
    surgery.resolve_costs(
        planning.uniform_plan(model_type, source.geometry, (), mixer.name, mixer.options, None)
    )


def _repair_words(recipe: Recipe) -> dict[str, str]:
    """Return what a recipe tunes after the conversion, and what it puts back."""
    from morph.recipes import _tuning

    return _tuning.words(recipe.finetune, recipe.restore)


def score_estimate(recipe: Recipe, *, stream: bool = False) -> dict[str, Any]:
    """Return what scoring would cost: passes, tokens, and, with text, minutes by a short probe.

    With `stream` no model is loaded, and so nothing probed.
    """
    from morph.pipeline import _estimate

    source = open_source(recipe.model, recipe.family)
    corpus = None if stream else corpus_of(recipe, source)
    told = {k: v for k, v in dry_run(recipe).items() if not k.startswith("distillation_")}
    return {**told, **_estimate.estimate(recipe, source, corpus)}


def _training_cost(recipe: Recipe, source: Source, plan: Plan | None = None) -> dict[str, Any]:
    """Return tokens, FLOPs, memory and hours of the stages, all by arithmetic.

    Without a plan the layers that stay are thought to be the last, which is the dearest.
    """
    from morph.pipeline import _cost, _cost_words

    told: dict[str, Any] = {"distillation_tokens": sum(stage.tokens for stage in recipe.distill)}
    if not recipe.distill:
        return {**told, "distillation_flops": 0}
    shape, select = source.geometry, recipe.select
    sizes = _cost.sizes_of({**source.family.defaults, **source.checkpoint.config}, shape)
    if plan is not None:
        layers = _cost.planned_layers(plan)
    else:
        kept = _select.kept_count(source, select)
        layers = _cost.expected_layers(recipe.mixer, shape, kept, select.granularity)
    folder = recipe.training.teacher_cache
    cached = folder is not None and Path(folder).is_dir() and any(Path(folder).iterdir())
    found = _cost.cost(recipe, sizes, layers, cached=cached)
    hours = _cost_words.gpu_lines(found)
    if not _cost.computes_in_16_bits(recipe):
        hours = ["none in float32; dtype=bfloat16 or training.mixed_precision=bf16 has one"]
    return {
        **told,
        "distillation_flops": round(found.flops),
        "distillation_memory_bytes": round(found.memory_bytes),
        "distillation_stages": _cost_words.stage_lines(found, recipe.distill),
        "distillation_estimate": hours,
    }


def check_distill(recipe: Recipe) -> None:
    """Raise UsageError for settings of the command line that `morph distill` has no use for."""
    from morph.pipeline import _train

    _train.check_settings(recipe)


def distill_dry_run(
    recipe: Recipe, hybrid: str, out: Path | None = None, *, force: bool = False
) -> dict[str, Any]:
    """Return what `distill_command` would do; no weight is read, and of the text nothing.

    Raises for settings, an output or files of text that the command would refuse at once.
    """
    source = open_source(recipe.model, recipe.family)
    folder = checkpoint.resolve(hybrid)
    if out is not None:
        checkpoint.check_output(out, [source.path, folder], force)
    _data.check_files(recipe.data)
    plan = plan_of_folder(folder, source)
    return {
        "teacher": str(source.path),
        "hybrid": hybrid,
        "pattern": plan.pattern,
        **_training_cost(recipe, source, plan),
    }


def convert_command(
    recipe: Recipe,
    out: Path,
    *,
    plan_file: Path | None = None,
    aligned: Path | None = None,
    target: str = "auto",
    with_code: bool = False,
    force: bool = False,
    say: Say = quiet,
) -> dict[str, Any]:
    """Write the hybrid of the recipe's model; score and plan first where no plan is given.

    `aligned` is a bank that the converted layers start from, as `align_command` writes it.
    """
    from morph.pipeline import _convert

    _check_target(target)
    source = open_source(recipe.model, recipe.family)
    checkpoint.check_output(out, [source.path], force)
    bank = _bank.read(aligned, source) if aligned is not None else None
    found, swaps = None, {}
    if plan_file is not None:
        from morph import surgery

        made = _select.read_plan(plan_file)
        _select.check_plan(made, source)
        made = surgery.resolve_costs(made)
    else:
        if bank is not None:
            _bank.check(bank, recipe, source)
        found, made, swaps = _chosen(recipe, source, say)
    more: dict[str, Any] = {}
    if aligned is not None and bank is not None:
        student, more = _bank.student(source, made, aligned, bank)
    else:
        corpus = corpus_of(recipe, source) if recipe.data.text else None
        student = _started(source, made, corpus, recipe.mixer.calibrate, say)
    written = _convert.convert(
        source,
        made,
        out,
        target=target,  # type: ignore[arg-type]
        force=force,
        with_code=with_code,
        student=student,
        provenance={**_select.provenance_of(found, swaps), **more},
        say=say,
    )
    return _tell(written, made)


def _started(source: Source, plan: Plan, corpus: _data.Corpus | None, tokens: int, say: Say) -> Any:
    """Return the calibrated hybrid in memory, or None where its start needs no text."""
    from morph import surgery
    from morph.pipeline import _start, _verify

    if not surgery.own_parameter_names(source.family, plan) or not plan.replaced_layers:
        return None
    refuse_nonfinite(source)
    teacher = source.model(_verify.compute_dtype(source, None))
    return _start.hybrid_of(teacher, plan, corpus, tokens, say=say)


def _check_target(target: str) -> None:
    allowed = ("auto", "stock", "package")
    if target not in allowed:
        raise UsageError(
            f"--target {escape(target)!r} is unknown.{nearest(target, allowed)} "
            f"There are: {', '.join(allowed)}."
        )


def _chosen(recipe: Recipe, source: Source, say: Say) -> tuple[Scores, Plan, dict[str, Any]]:
    from morph.pipeline import _score

    corpus = corpus_of(recipe, source)
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
        "notes": list(written.notes) or None,
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
        asked = tokens.strip()
        count = int(asked) if asked.isdecimal() else asked
        stages.append({"loss": name.strip(), "tokens": count})
    if not stages:
        raise RecipeError(f"--stages {escape(text)!r}: name a stage, such as logits=1M.")
    for key in (text.partition("=")[0].strip() for text in sets):
        if key.startswith("distill.") and key.endswith(".tokens"):
            raise UsageError(f"--set {escape(key)}: a flag says this already; give one of the two.")
    raw = {**strict.plain(recipe), "distill": stages}
    keys = dict.fromkeys((text.partition("=")[0].strip() for text in sets), 0)
    return schema.from_data(schema.apply_sets(raw, sets), "command line", keys)


def distill_command(
    recipe: Recipe,
    hybrid: str,
    out: Path,
    *,
    target: str = "auto",
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[Any], None] | None = None,
) -> dict[str, Any] | None:
    """Distil a written hybrid from its source and write the result; state lives beside `out`.

    Several processes, as torchrun starts them, train together; the first one writes and tells, the
    others return None.
    """
    from morph.pipeline import _convert, _train

    _check_target(target)
    source = open_source(recipe.model, recipe.family)
    given = checkpoint.Checkpoint.open(checkpoint.resolve(hybrid), strict=False)
    checkpoint.check_output(out, [source.path, given.path], force)
    made = plan_of_folder(given.path, source)
    _convert.find_target(source, made, target)  # refuses now what it would refuse after training
    _train.check_tokenizer(source, given)
    corpus = _data.corpus(recipe.data, source.tokenizer(), seed=recipe.seed)
    teacher = source.model(recipe.dtype)
    student = _train.student_of(teacher, made, source, given)
    work = out.with_name(out.name + ".distill")
    log = _train.distill(
        recipe, student, teacher, corpus, source.tokenizer(), work, say=say, progress=progress
    )
    if rank():
        return None
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


def record_of(path: Path) -> dict[str, Any]:
    """Return what morph.json of a folder tells, or an empty mapping where there is none."""
    file = path / "morph.json"
    if not file.is_file():
        return {}
    found = checkpoint.load_json(file.read_bytes(), str(file))
    return found if isinstance(found, dict) else {}


def was_distilled(path: Path) -> bool:
    """Return True for a folder whose morph.json tells of a distillation."""
    told = record_of(path).get("provenance")
    if not isinstance(told, dict):
        return False
    recipe = told.get("recipe")
    return bool(told.get("distill") or (isinstance(recipe, dict) and recipe.get("distill")))


def was_aligned(path: Path) -> bool:
    """Return True for a folder whose morph.json tells of layers that came from a bank."""
    told = record_of(path).get("provenance")
    return isinstance(told, dict) and bool(told.get("aligned"))


def plan_of_folder(path: Path, source: Source | None = None) -> Plan:
    """Return the plan of a hybrid that morph wrote.

    Raises MismatchError for any other folder, and where `source` is not what it was made of.
    """
    found = record_of(path)
    if "restored" in found and "plan" not in found:
        raise MismatchError(
            f"{escape(path)} was restored, and its morph.json names no plan to compare by, since "
            "the fine-tuned checkpoint had none. Evaluate it and the fine-tuned one each by "
            "itself, without --against."
        )
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
        check_folder(out, [model, *([source] if source else [])], force)
    found = _measure.compare(recipe, model, source, say=say)
    if out is not None:
        from morph import report

        out.mkdir(parents=True, exist_ok=True)
        write_result(out / "evaluation.json", evaluations.dumps(found))
        paths = report.report(out, evaluation=found)
        say(f"wrote {', '.join(map(str, paths[:2]))}")
    return found


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
