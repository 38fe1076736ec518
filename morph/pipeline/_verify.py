"""Is the written checkpoint what we say it is? Fresh processes, never two models in one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from morph import checkpoint, registry
from morph import plan as planning
from morph.errors import MismatchError, MorphError, VerificationFailed, escape
from morph.families._family import Move, StockTarget
from morph.pipeline._source import Source
from morph.plan import Plan

if TYPE_CHECKING:
    from torch import nn

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
SMALL = 512 * 2**20  # bytes of weights up to which both sides compute in float32
KEEP = 32  # logits of the last tokens: they have seen the most
# RMS of the difference over RMS of the reference; bf16 and fp16 round differently per algorithm
LIMITS = {"float32": 1e-5, "float64": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


def load_and_compare(
    source: Source,
    plan: Plan,
    staged: Path,
    stock: StockTarget | None,
    moves: list[Move] | None,
    changed: set[str],
    student: nn.Module | None = None,
    remote_code: bool = False,
    dropped: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Load `staged` in a fresh process and compare it with the hybrid made in memory.

    Checks that untouched tensors are byte-equal, nothing is missing or unexpected, every layer has
    the class and mixer of the plan, every mixer ran, and logits agree; with `remote_code` once
    more without morph, by the code in the folder. Returns the numbers; raises VerificationFailed
    naming the first thing that differs.
    """
    from morph.pipeline._convert import probe_ids

    equal = _kept_tensors(source, staged, moves, changed, dropped or {})
    with tempfile.TemporaryDirectory(prefix="morph-verify-") as folder:
        work = Path(folder)
        np.save(work / "ids.npy", probe_ids(source, plan))
        dtype = compute_dtype(source, student)
        extra: dict[str, Any] = {}
        if student is None:
            extra = _reference(source, plan, work, dtype)
            reference, original = np.load(work / "hybrid.npy"), np.load(work / "source.npy")
        else:
            reference, original = _logits(student, work / "ids.npy"), None
        outside = [m for m in plan.mixers if m not in registry.names("mixers")]
        how = {"dtype": dtype, "attention": source.family.attention_implementation}
        report = run_fresh(staged, work, use_morph=stock is None, outside=outside, **how)
        _check_report(report, plan, stock, staged)
        error = _check_logits(work, reference, report["dtype"], _shown(staged))
        if remote_code:
            bare = run_fresh(staged, work, use_morph=False, remote_code=True, **how)
            _check_report(bare, plan, None, staged, remote_code=True)
            what = f"{_shown(staged)} by its own code"
            extra["remote_code_error"] = _check_logits(work, reference, bare["dtype"], what)
    numbers = {
        "logit_error": error,
        "limit": LIMITS[report["dtype"]],
        "dtype": report["dtype"],
        "class": report["class"],
        "tensors_byte_equal": equal,
        "mixer_runs": report["runs"],
        "model_bytes": report["model_bytes"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        **extra,
    }
    if original is not None:
        numbers["changed_by_plan"] = _rms(reference - original, original)
    return numbers


def compute_dtype(source: Source, student: nn.Module | None) -> str:
    """Return the dtype in which both sides compute: float32 where memory allows, else as stored.

    Stored 16-bit weights are exact in float32, and there a wrong mask cannot hide in rounding.
    """
    if student is not None:
        return str(next(student.parameters()).dtype).removeprefix("torch.")
    return "float32" if source.checkpoint.nbytes <= SMALL else "auto"


def against(source: Source, path: Path, plan: Plan) -> dict[str, Any]:
    """Compare the written folder `path` with the source it was made of, as `convert` did.

    Trained tensors of a distilled hybrid may differ from the source; the logits of what is stored
    must be those of the same tensors put into the source's own model. Raises MismatchError where
    source and folder do not belong together, VerificationFailed where the folder is not right.
    """
    from morph import surgery
    from morph.families import _stock
    from morph.pipeline import _train, was_distilled
    from morph.pipeline._convert import mapping

    given = checkpoint.Checkpoint.open(path)
    stock = None
    if not str(given.config["model_type"]).startswith("morph_"):
        stock, reasons = _stock.pick(source.family, source.checkpoint.config, plan)
        if stock is None or stock.model_type != given.config["model_type"]:
            raise MismatchError(
                f"{escape(path)} is a {escape(given.config['model_type'])}; morph does not write "
                f"this plan of a {source.family.model_type} so. {' '.join(reasons)}"
            )
    own = set(surgery.own_parameter_names(source.family, plan))
    names = tuple(sorted({*source.checkpoint.tensors, *own}))
    moves, dropped = mapping(source, plan, stock, names)
    student, changed = None, own
    if own or was_distilled(path):  # what their start was made of is not known here
        student = _train.student_of(source.model(compute_dtype(source, None)), plan, source, given)
    if was_distilled(path):
        changed = set(given.tensors) | set(source.checkpoint.tensors)
    elif stock is not None and stock.undo is not None:
        _check_computed(source, stock.undo(source.checkpoint.config, plan, given.read_float), path)
    try:
        return load_and_compare(source, plan, path, stock, moves, changed, student, dropped=dropped)
    except VerificationFailed as error:  # here nothing was about to be kept
        raise VerificationFailed(str(error).removesuffix(" Nothing was kept.")) from error


def _check_logits(work: Path, reference: np.ndarray, dtype: str, what: str) -> float:
    """Return how far the logits in `work` are from the reference; raise where it is too far."""
    error, limit = _rms(np.load(work / "logits.npy") - reference, reference), LIMITS[dtype]
    if not error <= limit:
        raise VerificationFailed(
            f"{what}: logits of the loaded checkpoint differ from the hybrid in memory by "
            f"{error:.2e} of their size; {limit:.0e} is allowed for {dtype}. Nothing was kept."
        )
    return error


def _shown(folder: Path) -> str:
    """Return the name a user gave: without what the hidden folder it is checked in adds."""
    return escape(re.sub(r"^\.(.+)\.partial-(?:\d+-)?[0-9a-f]+$", r"\1", folder.name))


def _kept_tensors(
    source: Source,
    staged: Path,
    moves: list[Move] | None,
    changed: set[str],
    dropped: Mapping[str, str],
) -> int:
    equal, differ, _ = checkpoint.kept_equal(
        source.checkpoint, checkpoint.Checkpoint.open(staged, strict=False), moves, dropped
    )
    wrong = [n for n in differ if n not in changed and _source_of(n, moves) not in changed]
    if wrong:
        raise VerificationFailed(
            f"{_shown(staged)}: tensor {escape(wrong[0])} should be untouched, but its bytes "
            f"differ from the source ({len(wrong)} such tensors)."
        )
    return len(equal)


def _check_computed(source: Source, values: Mapping[str, np.ndarray], path: Path) -> None:
    """Raise where a source tensor that computed ones were made of is not what it was.

    Output projections may have taken a factor per column.
    """
    for name in values.keys() & source.checkpoint.tensors.keys():
        want, got = source.checkpoint.read_float(name), values[name]
        if name.endswith(".o_proj.weight"):
            want = want * ((got * want).sum(0) / np.maximum((want * want).sum(0), 1e-30))
        if not _rms(got - want, want) <= LIMITS["float32"]:
            raise VerificationFailed(
                f"{_shown(path)}: tensor {escape(name)} should be untouched, but what was computed "
                "with it says otherwise."
            )


def _source_of(target: str, moves: list[Move] | None) -> str | None:
    if moves is None:
        return target
    return next((m.source for m in moves if m.target == target), None)


def _reference(source: Source, plan: Plan, work: Path, dtype: str) -> dict[str, Any]:
    job = {
        "dtype": dtype,
        "path": str(source.path.resolve()),
        "family": source.family.model_type,
        "plan": planning.dumps(plan),
        "ids": str(work / "ids.npy"),
        "keep": KEEP,
        "out": str(work),
    }
    # -P: what lies in the working folder, such as a json.py of a download, must not be imported
    paths = [os.path.abspath(p) for p in sys.path]
    start = f"import sys; sys.path.insert(0, {str(PACKAGE_ROOT)!r}); sys.path += {paths!r}; "
    code = f"{start}import morph._reference as r; r.main()"
    _run([sys.executable, "-P", "-c", code], job, "the source model with its plan")
    return {"reference_peak_rss_bytes": _json(work / "reference.json")["peak_rss_bytes"]}


def run_fresh(
    path: Path,
    work: Path,
    *,
    use_morph: bool,
    dtype: str | None = None,
    attention: str | None = None,
    remote_code: bool = False,
    outside: Sequence[str] = (),
) -> dict[str, Any]:
    """Load `path` in a process of its own; return its report. `use_morph` allows `import morph`.

    With `remote_code` the code in the folder runs; transformers' copy of it goes into `work`.
    """
    job = {
        "path": str(path.resolve()),
        "dtype": dtype or "auto",
        "attention": attention,
        "ids": str(work / "ids.npy"),
        "keep": KEEP,
        "out": str(work),
        "morph": str(PACKAGE_ROOT) if use_morph else None,
        # last, so that nothing is shadowed: mixers from outside live where this process found them
        "paths": [os.path.abspath(p) for p in sys.path] if use_morph else [],
        "imports": [m.partition(":")[0] for m in outside] if use_morph else [],
        "remote_code": remote_code,
    }
    script = Path(__file__).resolve().parents[1] / "_fresh.py"
    how = " by its own code, without morph," if remote_code else ""
    _run([sys.executable, "-I", str(script)], job, f"the written checkpoint {_shown(path)}{how}")
    return _json(work / "report.json")


def _run(command: list[str], job: Mapping[str, Any], what: str) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "HF_MODULES_CACHE": str(Path(job["out"]) / "modules")},
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [x for x in done.stderr.strip().splitlines() if x.strip()]
        why = lines[-1] if lines else f"exit status {done.returncode}"
        raise VerificationFailed(
            f"{what} could not be loaded in a fresh process: {escape(why, 400)}"
        )


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _logits(model: nn.Module, ids: Path) -> np.ndarray:
    import torch

    with torch.no_grad():
        tokens = torch.from_numpy(np.load(ids)).to(next(model.parameters()).device)
        return model(input_ids=tokens, use_cache=False, logits_to_keep=KEEP).logits.float().numpy()


def _check_report(
    report: Mapping[str, Any],
    plan: Plan,
    stock: StockTarget | None,
    staged: Path,
    remote_code: bool = False,
) -> None:
    def fail(message: str) -> MorphError:
        return VerificationFailed(f"{_shown(staged)}: {message} Nothing was kept.")

    for kind in ("missing", "unexpected", "mismatched"):
        if report[kind]:
            raise fail(f"{len(report[kind])} {kind} tensors, first {escape(report[kind][0])}.")
    if (stock is not None or remote_code) and report["morph_loaded"]:
        raise fail("the check without morph ran with morph loaded.")
    wanted = stock.model_type if stock else f"morph_{plan.model_type}"
    if report["model_type"] != wanted:
        raise fail(f"loaded as {report['model_type']}, not {wanted}.")
    words = stock.layer_types(plan) if stock and stock.layer_types else plan.layer_types
    for i, (layer, found) in enumerate(zip(plan.layers, report["layers"], strict=True)):
        if stock is not None:
            kind = (report["layer_types"] or [])[i : i + 1]
            if kind != [words[i]]:
                raise fail(f"layer {i} loaded as {kind}, not as {words[i]}.")
            continue
        mixers = [] if layer.is_full else [g.mixer for g in layer.groups]
        if (found["attention"] == "HybridAttention") != bool(mixers):
            raise fail(f"layer {i} loaded as {found['attention']}, the plan says {mixers}.")
        prefix = "morph_mixers_" if remote_code else ""  # the file that stands for the module
        if found["mixers"] != [prefix + _stem(m) for m in mixers]:
            raise fail(f"layer {i} has mixers {found['mixers']}, the plan says {mixers}.")
        idle = [j for j in range(len(mixers)) if report["runs"][f"{i}.{j}"] < 1]
        if idle:
            raise fail(f"layer {i}: mixer {mixers[idle[0]]} did not run.")


def _stem(mixer: str) -> str:
    """Return the last name of the module that a mixer's class comes from."""
    if mixer in registry.names("mixers"):
        return mixer
    return str(registry.load("mixers", mixer).Mixer.__module__).rpartition(".")[2]


def _rms(error: np.ndarray, reference: np.ndarray) -> float:
    scale = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(error, dtype=np.float64)))) / max(scale, 1e-30)
