"""A whole recipe, resumable: a stage runs again only when what it is made from has changed.

What a run leaves in its folder:

    OUT/recipe.yaml        the recipe as it ran
    OUT/scores.json        what the selector measured
    OUT/plan.json          who keeps full attention
    OUT/checkpoint/        the verified hybrid
    OUT/evaluation.json    the numbers
    OUT/report.html, report.md, *.png
    OUT/tuned/, restored/  where the recipe fine-tunes: the hybrid after it, and restored
    OUT/repair.json        the three beside each other; also repair.html, repair.md, repair.png
    OUT/run.json           digests of what each stage was made from, and what it cost
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import __version__, checkpoint, strict
from morph import plan as planning
from morph.errors import OutputExists, UsageError
from morph.pipeline import _convert, _data, _score, _select, _start
from morph.pipeline._source import Say, Source, open_source, quiet, write_result
from morph.plan import Plan, Scores
from morph.recipes import schema
from morph.recipes.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

    from morph.evaluation import Evaluation


# Settings of a training that do not change what comes of it
_ASIDE = ("tokens", "keep_states", "teacher_cache", "trackers")


@dataclass
class Run:
    """One run: the recipe, its folder, and what the stages share."""

    recipe: Recipe
    out: Path
    source: Source
    corpus: _data.Corpus
    say: Say
    progress: Callable[[Mapping[str, Any]], None] | None
    record: dict[str, Any] = field(default_factory=dict)
    _model: nn.Module | None = None

    def model(self) -> nn.Module:
        """Return the source model, loaded once."""
        if self._model is None:
            self._model = self.source.model(self.recipe.dtype)
        return self._model

    def fresh(self, stage: str, inputs: Any, made: Path) -> bool:
        """Return True where the stage's file is there and was made from these inputs."""
        done = self.record.setdefault("stages", {}).get(stage, {})
        same = done.get("inputs") == digest(inputs) and made.exists()
        if same:
            self.say(f"{stage}: unchanged, kept {made}")
        return same

    def note(self, stage: str, inputs: Any, start: float, **more: Any) -> None:
        """Remember what a stage was made from and what it cost."""
        self.record["stages"][stage] = {
            "inputs": digest(inputs),
            "seconds": round(time.perf_counter() - start, 2),
            **more,
        }
        text = json.dumps(self.record, sort_keys=True, indent=1) + "\n"
        write_result(self.out / "run.json", text)

    def set_aside(self, name: str, inputs: Mapping[str, Any]) -> None:
        """Move the training in the folder `name` out of the way where it is for other inputs."""
        folder, stamp = self.out / name, self.out / name / "inputs.sha256"
        text = json.dumps(strict.plain(inputs), sort_keys=True)
        now = hashlib.sha256(text.encode()).hexdigest()
        then = stamp.read_text().strip() if stamp.is_file() else None
        if folder.exists() and then not in (None, now):
            kept = self.out / f"{name}-{then[:8]}"  # type: ignore[index]
            folder.rename(kept)
            self.say(f"the training in {folder} was for other settings; it is now {kept}")
        earlier = self.out / f"{name}-{now[:8]}"
        if earlier.is_dir() and not folder.exists():
            earlier.rename(folder)
            self.say(f"{earlier} was for these settings; it is {folder} again")
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(now + "\n")


def digest(value: Any) -> str:
    """Return the sha256 of a plain value's canonical JSON."""
    text = json.dumps(strict.plain(value), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    root: Path | None = None,
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Score, plan, convert or distil, evaluate and report; return the evaluation and the paths.

    `root` is the folder that the recipe's relative paths start from. A folder that another recipe
    filled is refused unless `force`. Stopped runs go on with the first stage that is missing or
    whose inputs changed.
    """
    folder = out or (Path(recipe.out) if recipe.out else None)
    if folder is None:
        raise UsageError("say where the run goes: --out FOLDER, or `out:` in the recipe.")
    local = (root / recipe.model) if root is not None else Path(recipe.model)
    name = str(local) if local.is_dir() else recipe.model
    source = open_source(name, recipe.family)
    record = _open_folder(folder, source, force)
    corpus = _data.corpus(recipe.data, source.tokenizer(), root, seed=recipe.seed)
    state = Run(recipe, folder, source, corpus, say, progress, record)
    started = time.perf_counter()
    write_result(folder / "recipe.yaml", schema.dumps(recipe))
    scores = _scores(state)
    plan = _plan(state, scores)
    serve = _checkpoint(state, plan)
    found = _evaluation(state, plan)
    paths = _report(state, scores, plan, found, serve)
    more = _repair(state, plan) if recipe.finetune is not None else {}
    return {
        "evaluation": found,
        **more,
        "model": name,
        "pattern": plan.pattern,
        "checkpoint": str(folder / "checkpoint"),
        "report": str(paths[0]),
        "pictures": [str(p) for p in paths if p.suffix == ".png"],
        "load": serve["load"],
        "serve": serve["serve"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def _open_folder(folder: Path, source: Source, force: bool) -> dict[str, Any]:
    here = folder.resolve()
    if source.path.resolve() in (here, *here.parents):
        raise OutputExists(f"{folder} is, or lies inside, the model {source.path}.")
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"{folder} is a file; give a folder.")
    file = folder / "run.json"
    if folder.exists() and any(folder.iterdir()) and not file.is_file() and not force:
        raise OutputExists(f"{folder} holds other files. Give another --out, or --force.")
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        found = checkpoint.load_json(file.read_bytes(), str(file))
        if isinstance(found, dict) and isinstance(found.get("stages"), dict):
            known = {k: v for k, v in found["stages"].items() if _is_whole(k, v)}
            return {**found, "stages": known}
    write_result(file, json.dumps({"stages": {}}) + "\n")
    return {"stages": {}}


def _is_whole(stage: str, entry: Any) -> bool:
    """False for what a stage cannot have noted: it runs again."""
    if not isinstance(entry, dict) or not isinstance(entry.get("seconds"), (int, float)):
        return False
    if stage in ("finetune", "restore") and not isinstance(entry.get("told"), dict):
        return False
    use = entry.get("use")
    return stage != "checkpoint" or (isinstance(use, dict) and {"load", "serve"} <= set(use))


def _base(state: Run) -> dict[str, Any]:
    recipe = state.recipe
    return {
        "morph": __version__,
        "model": state.source.checkpoint.fingerprint,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "text": state.corpus.identity,
        "mixer": strict.plain(recipe.mixer),
        "select": strict.plain(recipe.select),
    }


def _scores(state: Run) -> Scores:
    file, inputs = state.out / "scores.json", _base(state)
    if state.fresh("scores", inputs, file):
        return _select.read_scores(file)
    start, recipe = time.perf_counter(), state.recipe
    partial = state.out / "scores.json.partial"
    found = _score.score(
        state.source,
        recipe.select,
        recipe.mixer,
        state.corpus,
        seed=recipe.seed,
        model=state.model(),
        memo=partial,
        work=state.out,
        say=state.say,
    )
    write_result(file, planning.dumps(found))
    partial.unlink(missing_ok=True)
    state.note("scores", inputs, start, forwards=found.provenance.get("forwards"))
    return found


def _plan(state: Run, scores: Scores) -> Plan:
    file, inputs = state.out / "plan.json", {**_base(state), "scores": scores.digest}
    if state.fresh("plan", inputs, file):
        mixer = state.recipe.mixer
        return _select.read_plan(file, (mixer.name, mixer.kept))
    start, recipe = time.perf_counter(), state.recipe
    found, swaps = _select.make_plan(
        scores,
        recipe.select,
        recipe.mixer,
        state.source,
        corpus=state.corpus,
        seed=recipe.seed,
        model=state.model(),
        work=state.out,
        say=state.say,
    )
    write_result(file, planning.dumps(found))
    state.note("plan", inputs, start, swaps=swaps, pattern=found.pattern)
    return found


def _checkpoint(state: Run, plan: Plan) -> dict[str, str]:
    recipe, folder = state.recipe, state.out / "checkpoint"
    inputs = {
        **_base(state),
        "plan": planning.dumps(plan),
        "distill": strict.plain(recipe.distill),
        "training": {k: v for k, v in strict.plain(recipe.training).items() if k not in _ASIDE},
    }
    if state.fresh("checkpoint", inputs, folder):
        return dict(state.record["stages"]["checkpoint"]["use"])
    start = time.perf_counter()
    from morph import surgery

    teacher, log, student = state.model(), None, None
    if recipe.distill or surgery.own_parameter_names(state.source.family, plan):
        tokens = recipe.mixer.calibrate
        student = _start.hybrid_of(teacher, plan, state.corpus, tokens, say=state.say)
    if recipe.distill:
        from morph.pipeline import _train

        state.set_aside("distill", inputs)
        log = _train.distill(
            recipe,
            student,
            teacher,
            state.corpus,
            state.source.tokenizer(),
            state.out / "distill",
            say=state.say,
            progress=state.progress,
        )
    written = _convert.convert(
        state.source,
        plan,
        folder,
        force=folder.exists(),
        student=student,
        provenance={"recipe": replace(recipe, out=None)},
        say=state.say,
    )
    use = {"load": written.load, "serve": written.serve, "format": written.format}
    more: dict[str, Any] = {"verification": dict(written.verification)}
    if log is not None:
        from morph.pipeline import _train

        more["distill"] = _train.summary(log, recipe)
    state.note("checkpoint", inputs, start, use=use, **more)
    return use


def _evaluation(state: Run, plan: Plan) -> Evaluation:
    from morph import evaluation as evaluations
    from morph.pipeline import _measure

    file = state.out / "evaluation.json"
    given = checkpoint.Checkpoint.open(state.out / "checkpoint", strict=False)
    inputs = {
        **_base(state),
        "checkpoint": given.fingerprint,
        "evaluate": strict.plain(state.recipe.evaluate),
    }
    if state.fresh("evaluation", inputs, file):
        return evaluations.loads(file.read_text(encoding="utf-8"), str(file))
    start = time.perf_counter()
    found = _measure.beside(
        state.recipe, state.source, plan, given, state.corpus, base=state.model(), say=state.say
    )
    write_result(file, evaluations.dumps(found))
    state.note("evaluation", inputs, start)
    return found


def _report(
    state: Run, scores: Scores, plan: Plan, found: Evaluation, use: Mapping[str, str]
) -> list[Path]:
    from morph import report

    stages = state.record["stages"]
    training = report.training_log(state.out / "distill") if state.recipe.distill else []
    cost = {f"{name} seconds": entry["seconds"] for name, entry in stages.items()}
    return report.report(
        state.out,
        recipe=state.recipe,
        scores=scores,
        plan=plan,
        evaluation=found,
        provenance={
            "model": state.source.path.name,
            "model sha256": state.source.checkpoint.fingerprint,
            "morph": __version__,
            **cost,
        },
        commands={"Load it": use["load"], "Serve it": use["serve"]},
        training=training,
    )


def _repair(state: Run, plan: Plan) -> dict[str, Any]:
    from morph import report
    from morph.pipeline import _repair as repairs

    found = repairs.stages(state, plan, _base(state))
    paths = report.repair_report(state.out, found)
    more = {"restored": str(state.out / "restored")} if state.recipe.restore is not None else {}
    return {
        "repair": found,
        "tuned": str(state.out / "tuned"),
        **more,
        "repair_report": str(paths[0]),
    }
