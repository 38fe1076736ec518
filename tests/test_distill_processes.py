"""Distillation in two processes on a CPU: weights replicated and split, resume, dying processes.

The jobs of two processes run in one launch, because the imports are what costs time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("_distill_worker.py")
FOUR = {"tokens": 4 * 48}  # steps
STAGES = [
    {"loss": "align", "train": "new", **FOUR},
    {"loss": "logits", "train": "attention", "needles": 0.25, **FOUR},
    {"loss": "long", "train": "all", "lr": 1e-3, "weight_decay": 0.1, "micro_batch": 1, **FOUR},
]
LORA = {"loss": "logits", "train": "lora", "recompute": "layer", **FOUR}
SPLIT = {"shard": True}
ALL: dict[str, Any] = {"stages": STAGES, "rows": "packed"}
JOBS: dict[str, dict[str, Any]] = {
    "whole": {**ALL, "training": {"keep_states": 9}},
    "split": {**ALL, "training": {"keep_states": 9, **SPLIT}},
    # States are saved after the third and the last step of a stage
    "resumed-whole.stopped": {**ALL, "stop": 8},
    "resumed-whole": ALL,
    "resumed-split.stopped": {**ALL, "stop": 12, "training": SPLIT},
    "resumed-split": {**ALL, "training": SPLIT},
    "ctrl-c-whole": {**ALL, "ctrl_c": 6},
    "ctrl-c-split": {**ALL, "ctrl_c": 6, "training": SPLIT},
    "apart.stopped": {**ALL, "stop": 4, "apart": True},
    "apart": {**ALL, "apart": True},
    "odd": {"stages": [*STAGES[:2], {**STAGES[2], "batch_size": 3}]},
    "dies.stopped": {**ALL, "die": [1, 7]},  # the last: nothing runs after it
}


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("_distill_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def placed(folder: Path, jobs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Give jobs their folders: that of `name.stopped` is that of `name`, which goes on in it."""
    return [
        {
            "out": str(folder / name.partition(".")[0]),
            "result": str(folder / f"{name}-result"),
            **job,
        }
        for name, job in jobs.items()
    ]


def launch(folder: Path, jobs: dict[str, dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Run jobs in two processes started by torchrun."""
    (folder / "jobs.json").write_text(json.dumps(placed(folder, jobs)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(WORKER), str(folder / "jobs.json")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_here(folder: Path, jobs: dict[str, dict[str, Any]]) -> Done:
    worker = load_worker()
    for job in placed(folder, jobs):
        worker.run(job)
    return Done(folder)


class Done:
    """What jobs came to."""

    def __init__(self, folder: Path, process: Any = None) -> None:
        self.folder, self.process = folder, process

    def told(self, name: str, rank: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}-result-{rank}.json").read_text())
        return found

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}-result.safetensors")

    def states(self, name: str) -> list[str]:
        return sorted(p.name for p in (self.folder / name / "states").iterdir())

    def state(self, name: str, step: int) -> dict[str, torch.Tensor]:
        file = self.folder / name / "states" / f"step-{step:08d}" / "tensors.safetensors"
        return load_file(file)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """JOBS in two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = Done(folder, launch(folder, JOBS))
    assert (folder / "odd-result-1.json").exists(), done.process.stderr
    return done


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The same distillation in this process."""
    return run_here(tmp_path_factory.mktemp("one"), {"whole": JOBS["whole"]})


def assert_near(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Every tensor is there, whole, and as near as 1e-5 of its size."""
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    gaps = {n: (t.double() - theirs[n].double()).norm() for n, t in mine.items()}
    assert [n for n, gap in gaps.items() if gap > 1e-5 * theirs[n].double().norm()] == []


def assert_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []


def assert_same_numbers(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Records of the same form whose losses are as near as 1e-5."""
    assert [r.keys() for r in mine] == [r.keys() for r in theirs]
    for key in ("stage", "step", "tokens", "lr"):
        assert [r[key] for r in mine] == [r[key] for r in theirs]
    assert [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    for a, b in zip(mine, theirs):
        assert a.get("layers", {}) == pytest.approx(b.get("layers", {}), rel=1e-5)


@pytest.mark.parametrize("name", ["whole", "split"])
def test_losses_and_weights_are_those_of_one_process(name: str, one: Done, two: Done) -> None:
    assert_same_numbers(two.told(name)["records"], one.told("whole")["records"])
    assert_near(two.weights(name), one.weights("whole"))


@pytest.mark.parametrize("name", ["whole", "split"])
def test_both_processes_have_the_same_student_and_one_writes(name: str, two: Done) -> None:
    first, second = two.told(name, 0), two.told(name, 1)
    for key in ("weights", "records", "trained", "notes"):
        assert first[key] == second[key]
    lines = (two.folder / name / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == first["records"]
    assert (first["saves"], second["saves"]) == (6, 0)
    assert first["events"].count("saved") == 6 and second["events"] == []
    files = {p.name for p in (two.folder / name).iterdir()}
    assert files == {"log.jsonl", "seconds.jsonl", "states"}
    assert first["teacher_has_its_bits"] and second["teacher_has_its_bits"]


def test_split_weights_are_halves_and_the_whole_ones_stay_in_place(two: Done) -> None:
    for told in (two.told("split", 0), two.told("split", 1)):
        assert told["teacher_is_where_it_was"]
        assert set(told["share"]) == {"align new", "logits attention", "long all"}
        for stage, (student, teacher) in told["share"].items():
            assert 0.49 < teacher < 0.51
            # align computes with the converted layers alone
            assert stage == "align new" or 0.49 < student < 0.51
    assert two.told("whole")["share"]["long all"] == [1.0, 1.0]


@pytest.mark.parametrize("step", [3, 7, 8, 11])
def test_saved_states_are_whole(step: int, one: Done, two: Done) -> None:
    """Of split weights too: what was trained, and the optimizer."""
    theirs = one.state("whole", step)
    kinds = {name.partition("/")[0] for name in theirs}
    assert "optimizer" in kinds or step == 8  # where no stage is running
    for mine in (two.state("whole", step), two.state("split", step)):
        assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
        weights = ({n: t for n, t in s.items() if n[:6] == "model/"} for s in (mine, theirs))
        assert_near(*weights)


@pytest.mark.parametrize(("name", "after"), [("whole", 7), ("split", 11)])
def test_resumed_run_equals_the_uninterrupted_one(name: str, after: int, two: Done) -> None:
    again = f"resumed-{name}"
    assert [two.told(f"{again}.stopped", rank)["error"] for rank in (0, 1)] == ["Stop", "Stop"]
    assert f"resuming after {after} steps" in two.told(again)["notes"][0]
    assert two.told(again)["records"] == two.told(name)["records"]
    assert_bits(two.weights(again), two.weights(name))
    assert_bits(two.state(again, 12), two.state(name, 12))
    log = (two.folder / again / "log.jsonl").read_bytes()
    assert log == (two.folder / name / "log.jsonl").read_bytes()


def test_state_of_two_processes_is_refused_by_one(two: Done) -> None:
    (job,) = placed(two.folder, {"whole": {**ALL, "result": str(two.folder / "refused")}})
    told = load_worker().run(job)
    assert told["error"].startswith("MismatchError")
    assert "the state of another run: processes differs (now 1, then 2)" in told["error"]


def test_ctrl_c_ends_all_processes(two: Done) -> None:
    """Whole weights are saved by the first process alone; split ones need all of them."""
    words = {"whole": "the state is saved in", "split": "the state after 4 is kept in"}
    for name, states in {"whole": ["step-00000004", "step-00000006"], "split": None}.items():
        for rank in (0, 1):
            error = two.told(f"ctrl-c-{name}", rank)["error"]
            assert error.startswith("Interrupted: stopped after 6 steps; ")
            assert words[name] in error
        assert two.states(f"ctrl-c-{name}") == states or ["step-00000003", "step-00000004"]


def test_processes_that_see_different_folders_are_refused(two: Done) -> None:
    for rank in (0, 1):
        error = two.told("apart", rank)["error"]
        assert error.startswith("MismatchError")
        assert "found states after [3, 0] steps" in error


def test_rows_that_processes_cannot_share_are_refused(two: Done) -> None:
    for rank in (0, 1):
        error = two.told("odd", rank)["error"]
        assert error.startswith("RecipeError: distill[2].batch_size: 3 rows")
        assert "2 processes; give a multiple" in error


def test_a_process_that_dies_ends_all_and_leaves_the_last_state(two: Done) -> None:
    assert two.process.returncode != 0
    assert "exitcode  : 3" in two.process.stderr
    assert not (two.folder / "dies.stopped-result-0.json").exists()
    assert two.states("dies") == ["step-00000004", "step-00000007"]
    assert_bits(two.state("dies", 7), two.state("whole", 7))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """No accelerate state of other tests, and none for them."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_is_near_float32_and_keeps_float32_weights(tmp_path: Path) -> None:
    """Twice in one process, which accelerate allows one precision."""
    plain = {"stages": [STAGES[0], {**STAGES[1], "needles": 0.0}, STAGES[2]], "rows": "packed"}
    mixed = {**plain, "training": {"mixed_precision": "bf16"}}
    stopped = {**mixed, "stop": 8}
    jobs = {"plain": plain, "mixed": mixed, "again.stopped": stopped, "again": mixed}
    done = run_here(tmp_path, jobs)
    losses = [[r["loss"] for r in done.told(name)["records"]] for name in ("mixed", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)
    assert {t.dtype for t in done.weights("mixed").values()} == {torch.float32}
    assert done.told("again.stopped")["error"] == "Stop"
    assert_bits(done.weights("again"), done.weights("mixed"))
    assert done.told("again")["records"] == done.told("mixed")["records"]


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_of_another_precision_is_left_alone(tmp_path: Path) -> None:
    from accelerate import Accelerator

    theirs = Accelerator(mixed_precision="no")
    job = {"stages": STAGES[:1], "training": {"mixed_precision": "bf16"}}
    error = run_here(tmp_path, {"mixed": job}).told("mixed")["error"]
    assert error.startswith("UsageError") and "pass distill that `accelerator`" in error
    assert theirs.mixed_precision == "no"


# --- more, which takes longer -------------------------------------------------------------------

MORE: dict[str, dict[str, Any]] = {
    "tied": {"stages": [{**STAGES[1], "train": "all"}], "config": {"tie_word_embeddings": True}},
    "projections": {"stages": [{**STAGES[0], "train": "attention"}]},
    "cached": {"stages": STAGES[1:3]},
    "lora": {"stages": [STAGES[0], LORA], "rows": "packed"},
    "lora-bfloat16": {"stages": [LORA], "dtype": "bfloat16"},
    "bfloat16": {"stages": STAGES, "dtype": "bfloat16"},
    "mixed": {"stages": STAGES, "training": {"mixed_precision": "bf16"}},
}


def both_ways(folder: Path) -> dict[str, dict[str, Any]]:
    """Return every job of MORE with whole and with split weights, stopped and resumed too."""
    found = {}
    for name, job in MORE.items():
        for way, extra in (("whole", {}), ("split", SPLIT)):
            cache = {"teacher_cache": str(folder / "cache")} if name == "cached" else {}
            job = {**job, "training": {**job.get("training", {}), **cache, **extra}}
            found[f"{name}-{way}"] = job
            stop = 4 * len(job["stages"])  # the last step of all, after a state inside its stage
            found[f"{name}-{way}-again.stopped"] = {**job, "stop": stop}
            found[f"{name}-{way}-again"] = job
    return found


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Done]:
    """MORE in one process and in two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("more-one", "more-two")]
    alone = run_here(folders[0], {f"{name}-whole": job for name, job in MORE.items()})
    process = launch(folders[1], both_ways(folders[1]))
    assert process.returncode == 0, process.stderr
    return alone, Done(folders[1])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "split"])
@pytest.mark.parametrize("name", MORE)
def test_more_runs_equal_one_process_and_resume(
    name: str, way: str, more: tuple[Done, Done]
) -> None:
    alone, together = more
    mine, theirs = together.told(f"{name}-{way}"), alone.told(f"{name}-whole")
    assert mine["teacher_has_its_bits"]
    weights = together.weights(f"{name}-{way}")
    rounded = "bfloat16" in name or name == "mixed"  # to 3 digits
    if rounded:
        losses = pytest.approx([r["loss"] for r in theirs["records"]], rel=0.03)
        assert [r["loss"] for r in mine["records"]] == losses
    else:
        assert_same_numbers(mine["records"], theirs["records"])
        assert_near(weights, alone.weights(f"{name}-whole"))
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    assert {t.dtype for t in weights.values()} == {dtype}
    assert_bits(together.weights(f"{name}-{way}-again"), weights)
    assert together.told(f"{name}-{way}-again")["records"] == mine["records"]


@pytest.mark.slow
def test_a_run_goes_on_where_a_process_died(two: Done, tmp_path: Path) -> None:
    process = launch(two.folder, {"dies": ALL})
    assert process.returncode == 0, process.stderr
    assert "resuming after 7 steps" in two.told("dies")["notes"][0]
    assert_bits(two.weights("dies"), two.weights("whole"))


@pytest.mark.slow
def test_a_cache_that_one_process_has_lost_is_no_deadlock(tmp_path: Path) -> None:
    """A split teacher computes in all processes or in none."""
    job = {"stages": STAGES[1:2], "cache": str(tmp_path / "cache-"), "training": SPLIT}
    jobs = {"filled": job, "kept": job, "lost": {**job, "forgets": 1}}
    process = launch(tmp_path, jobs)
    assert process.returncode == 0, process.stderr
    done = Done(tmp_path)
    for name in ("kept", "lost"):
        assert_bits(done.weights(name), done.weights("filled"))
