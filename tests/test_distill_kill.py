"""Distillation killed with SIGKILL at any time, also while it saves, and resumed by the same call.

The runs are processes forked from one that has done the imports; see `_distill_worker`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from morph.distill._states import RunStates

WORKER = Path(__file__).with_name("_distill_worker.py")
REPO = WORKER.parent.parent
TWENTY = {"tokens": 20 * 48, "save_every": 7}  # steps
LONG: dict[str, Any] = {
    "stages": [
        {"loss": "align", "train": "new", **TWENTY},
        {"loss": "logits", "train": "attention", "needles": 0.25, **TWENTY},
        {"loss": "long", "train": "all", "lr": 1e-3, "weight_decay": 0.1, **TWENTY},
    ]
}
SHORT: dict[str, Any] = {
    "stages": [{**stage, "tokens": 4 * 48, "save_every": 3} for stage in LONG["stages"]]
}
# States of the short run after 7, 8, 11 and 12 steps: what is killed is the saving after 11
AFTER = {"after": 9}
POINTS = (1, 6, 8, 12)  # of what a save does to the disk; `slow` has them all
SLOW_POINTS = tuple(range(1, 31))


def kills(count: int, seed: int) -> list[list[float]]:
    """Return (lines of the log, seconds later), at which a run is killed."""
    draw = random.Random(seed)
    return [[draw.randrange(56), draw.uniform(0, 0.02)] for _ in range(count)]


class Runs:
    """Jobs in forked processes: how each ended, what states it left, what it said."""

    def __init__(self, folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
        self.folder, file = folder, folder / "jobs.json"
        placed = [
            {**job, "out": str(self.out(name)), "result": str(folder / name)}
            for name, job in jobs.items()
        ]
        file.write_text(json.dumps(placed))
        process = subprocess.run(
            [sys.executable, str(WORKER), "--fork", str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        self.ended = dict(zip(jobs, json.loads(process.stdout)))

    def out(self, name: str) -> Path:
        """Return the folder of a job: that of `name.killed` is that of `name`, which resumes it."""
        return self.folder / f"out-{name.partition('.')[0]}"

    def told(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}-0.json").read_text())
        return found

    def assert_same(self, name: str, theirs: str) -> None:
        """Weights, log and every file of the last states have the bytes of an unbroken run."""
        assert self.ended[name]["status"] == 0
        assert self.told(name)["weights"] == self.told(theirs)["weights"]
        one, two = contents(self.out(theirs)), contents(self.out(name))
        last = sorted(n for n in one if n.startswith("states"))
        assert last and [n for n in last if two.get(n) != one[n]] == []
        assert two["log.jsonl"] == one["log.jsonl"]
        assert two["seconds.jsonl"].count(b"\n") == one["seconds.jsonl"].count(b"\n")


def assert_newest_is_whole(ended: dict[str, Any]) -> None:
    """There is a good state, or none yet; an older one may be half deleted."""
    states = ended["states"]
    assert not states or states[max(states)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def with_kills(places: list[list[float]]) -> dict[str, dict[str, Any]]:
    found = {"long": LONG}
    for i, place in enumerate(places):
        found |= {f"kill-{i}.killed": {**LONG, "kill": place}, f"kill-{i}": LONG}
    return found


def with_points(points: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    found = {"short": SHORT}
    for at in points:
        found |= {f"save-{at}.killed": {**SHORT, **AFTER, "at": at}, f"save-{at}": SHORT}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    jobs = {
        **with_kills(kills(4, seed=1)),
        **with_points(POINTS),
        "half.killed": {**SHORT, **AFTER, "half": True},
        "half": SHORT,
        "full.stopped": {**SHORT, **AFTER, "limit": 20_000},
        "full": SHORT,
    }
    return Runs(tmp_path_factory.mktemp("killed"), jobs)


def test_the_last_states_hold_an_optimizer(runs: Runs) -> None:
    """So that comparing their bytes compares it."""
    file = runs.out("long") / "states" / "step-00000054" / "tensors.safetensors"
    assert any(name.startswith("optimizer/exp_avg_sq/") for name in load_file(file))


@pytest.mark.parametrize("i", range(4))
def test_killed_run_ends_with_the_bytes_of_an_unbroken_one(i: int, runs: Runs) -> None:
    check_kill(runs, i)


def check_kill(runs: Runs, i: int) -> None:
    killed = runs.ended[f"kill-{i}.killed"]
    assert killed["status"] in (-9, 0)  # 0: it was through before the signal came
    assert_newest_is_whole(killed)
    runs.assert_same(f"kill-{i}", "long")


@pytest.mark.parametrize("at", POINTS)
def test_a_save_that_is_killed_leaves_the_old_state_or_the_new_one(at: int, runs: Runs) -> None:
    check_point(runs, at)


def check_point(runs: Runs, at: int) -> None:
    killed = runs.ended[f"save-{at}.killed"]
    assert killed["status"] == -9
    newest = max(killed["states"])
    assert newest in ("step-00000008", "step-00000011", "step-00000012")
    assert_newest_is_whole(killed)
    runs.assert_same(f"save-{at}", "short")
    assert f"resuming after {int(newest[-8:])} steps" in runs.told(f"save-{at}")["notes"][0]


def test_half_a_file_of_tensors_is_no_state(runs: Runs) -> None:
    killed = runs.ended["half.killed"]
    assert (killed["status"], killed["states"]) == (-9, BEFORE)
    runs.assert_same("half", "short")
    assert not [p.name for p in (runs.out("half") / "states").iterdir() if p.name[0] == "."]


BEFORE = {"step-00000007": True, "step-00000008": True}


def test_full_disk_is_told_and_leaves_the_last_state(runs: Runs) -> None:
    stopped = runs.ended["full.stopped"]
    assert (stopped["status"], stopped["states"]) == (0, BEFORE)
    error = runs.told("full.stopped")["error"]
    assert error.startswith("StorageError: ") and "File too large" in error
    assert error.endswith("the last state is intact.")
    runs.assert_same("full", "short")


# --- states ------------------------------------------------------------------------------------


def saved(folder: Path, count: int, keep: int) -> None:
    """Save states 1 to `count`, each with a tensor that holds its number."""
    states = RunStates(folder, {"seed": 1}, print, keep=keep)
    for i in range(1, count + 1):
        states.save(i, {"model/x": torch.full((3,), float(i))}, {"step": i})


def loaded(folder: Path) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return RunStates(folder, {"seed": 1}, notes.append).load(), notes


def test_as_many_states_stay_as_were_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, 5, keep=3)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["3", "4", "5"]
    for damaged in (5, 4):
        (tmp_path / f"step-0000000{damaged}" / "tensors.safetensors").write_bytes(b"short")
        (tensors, position), notes = loaded(tmp_path)
        assert position == {"step": damaged - 1}
        assert tensors["model/x"].tolist() == [damaged - 1.0] * 3
        assert notes[-1].startswith(f"step-0000000{damaged} is damaged")
        assert len(notes) == 6 - damaged


def test_other_versions_are_noted(tmp_path: Path) -> None:
    saved(tmp_path, 1, keep=2)
    assert loaded(tmp_path)[1] == []
    file = tmp_path / "step-00000001" / "state.json"
    content = json.loads(file.read_text())
    assert set(content["versions"]) == {"morph", "torch", "transformers"}
    now = content["versions"]["torch"]
    content["versions"]["torch"] = "2.1\x1b[31m"
    file.write_text(json.dumps(content))
    (_, position), notes = loaded(tmp_path)
    assert position == {"step": 1}
    said = f"saved with torch 2.1\\x1b[31m, now {now}: the numbers may differ in the last bits."
    assert notes == [f"step-00000001 was {said}"]


@pytest.mark.parametrize("versions", [None, [], "2.1", {"torch": None}, {"numpy": "1"}], ids=str)
def test_versions_that_say_nothing_are_no_trouble(versions: Any, tmp_path: Path) -> None:
    saved(tmp_path, 1, keep=2)
    file = tmp_path / "step-00000001" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "versions": versions}))
    found, _ = loaded(tmp_path)
    assert found is not None


# --- more, which takes longer -------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    runs = Runs(tmp_path, with_kills(kills(20, seed=2)))
    for i in range(20):
        check_kill(runs, i)


@pytest.mark.slow
def test_every_point_of_a_save(tmp_path: Path) -> None:
    runs = Runs(tmp_path, with_points(SLOW_POINTS))
    ended = [runs.ended[f"save-{at}.killed"]["status"] for at in SLOW_POINTS]
    points = ended.count(-9)
    assert ended == [-9] * points + [0] * (len(ended) - points)
    assert 15 < points < len(ended)  # the last ones were not reached: there are no more
    for at in SLOW_POINTS[:points]:
        check_point(runs, at)


@pytest.mark.slow
def test_killed_command_goes_on(tmp_path: Path) -> None:
    """`morph distill`, killed while it trains, writes the checkpoint it would have written."""
    source, text = str(REPO / "examples" / "checkpoint"), tmp_path / "text.txt"
    text.write_text("The river is soft near the window, and the garden is not. " * 300)

    def morph(*arguments: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "morph", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def good(*arguments: str) -> None:
        process = morph(*arguments)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()

    plan = ["--selector", "uniform", "--budget", "1/2", "--mixer", "decay"]
    good("convert", source, "hybrid", *plan)
    sets = [f"distill.{x}" for x in ("0.seq_len=64", "1.seq_len=64", "1.save_every=5")]
    given = ["distill", "hybrid", "--teacher", source, "--data", str(text)]
    given += ["--stages", "align=4K,logits=6K", *[x for s in sets for x in ("--set", s)]]
    good(*given, "--out", "whole")
    process = morph(*given, "--out", "killed")
    log = tmp_path / "killed.distill" / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 28:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert not (tmp_path / "killed").exists()
    good(*given, "--out", "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert log.read_bytes() == (tmp_path / "whole.distill" / "log.jsonl").read_bytes()
