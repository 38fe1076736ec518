"""The fuzzer finds nothing in a few thousand cases, and finds what is planted in a few hundred."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from morph import checkpoint
from morph.checkpoint import TensorInfo
from morph.errors import CheckpointError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OURS = ("fuzz", "_readers", "_mutate", "_seeds")

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from /proc"
)


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module; it and what it imports are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("fuzz")
    for name in OURS:
        sys.modules.pop(name, None)


def test_every_case_is_read_or_refused(fuzz: ModuleType, tmp_path: Path) -> None:
    tally = fuzz.run(range(2000), 0, tmp_path)
    assert tally.failures == []
    found = {outcome.partition(":")[0] for outcome in tally.outcomes if "accepted" in outcome}
    assert found == {
        outcome.partition(":")[0] for outcome in tally.outcomes if "refused" in outcome
    }
    assert len(found) == 10
    assert tally.only_safetensors  # we are stricter, by named reasons


def test_a_case_depends_on_its_seed_and_number_alone(fuzz: ModuleType, tmp_path: Path) -> None:
    def ran(name: str, numbers: Iterable[int], seed: int) -> dict[int, Any]:
        root = tmp_path / name
        root.mkdir()
        known, found = fuzz.targets(root), {}
        for number in numbers:
            tally = fuzz.Tally()
            data = fuzz.case(number, seed, known, root, tally)
            found[number] = data, tally.outcomes, tally.refusals
        return found

    forwards, backwards = ran("a", range(60), 1), ran("b", reversed(range(60)), 1)
    assert forwards == backwards
    assert ran("c", [3], 2)[3] != forwards[3]


# --- What is planted is found -------------------------------------------------------------------


def lenient(path: Path, **more: Any) -> Any:
    """A reader that believes what a header says: no overlap, hole or size is looked for."""
    file = Path(path) / "model.safetensors"
    raw = file.read_bytes()
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(i["dtype"], tuple(i["shape"]), file, *i["data_offsets"])
            for name, i in header.items()
        }
    except Exception as error:
        raise CheckpointError(f"{path} is broken.") from error
    return SimpleNamespace(tensors=tensors, read_bytes=lambda name: b"")


def bug(path: Path, **more: Any) -> Any:
    raise KeyError("a bug")


def endless(path: Path, **more: Any) -> Any:
    while True:
        pass


def waiting(path: Path, **more: Any) -> Any:
    time.sleep(60)


def greedy(path: Path, **more: Any) -> Any:
    held = b"x" * (300 << 20)
    raise CheckpointError(f"{path} has {len(held) >> 40} bytes.")


def warning(path: Path, **more: Any) -> Any:
    warnings.warn("deprecated", DeprecationWarning, stacklevel=2)


def two_lines(path: Path, **more: Any) -> Any:
    raise CheckpointError(f"{path} is broken.\nBadly.")


def nameless(path: Path, **more: Any) -> Any:
    raise CheckpointError("a file is broken.")


def leaky(path: Path, **more: Any) -> Any:
    os.dup(0)
    raise CheckpointError(f"{path} is broken.")


PLANTED: dict[str, tuple[Callable[..., Any], str]] = {
    "believes-the-header": (lenient, "safetensors sees something else"),
    "another-exception": (bug, "KeyError: 'a bug'"),
    "hangs": (endless, "hang"),
    "waits": (waiting, "hang"),
    "takes-memory": (greedy, "memory: 3"),
    "warns": (warning, "DeprecationWarning: deprecated"),
    "says-two-lines": (two_lines, "not one printable line"),
    "names-no-file": (nameless, "names no file"),
    "leaves-a-file-open": (leaky, "left open"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(
    name: str, fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, why = PLANTED[name]
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "WALL_SECONDS", 1.0)
    (tmp_path / "root").mkdir()
    known = fuzz.targets
    monkeypatch.setattr(fuzz, "targets", lambda root: {"shard": known(root)["shard"]})
    count = 200 if name == "believes-the-header" else 2

    def plant(number: int) -> None:  # once the good folders are made
        monkeypatch.setattr(checkpoint.Weights, "open", reader)

    tally = fuzz.run(range(1, count), 0, tmp_path / "root", keep=tmp_path / "keep", at=plant)
    assert any(why in failure["why"] for failure in tally.failures), tally.failures
    if name != "leaves-a-file-open":
        number = tally.failures[0]["case"]
        assert (tmp_path / "keep" / f"case-0-{number}.safetensors").stat().st_size > 0


# --- The command --------------------------------------------------------------------------------


def command(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the fuzzer in a process of its own, `before` planted in it."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport fuzz\n{before}\n"
    call = [sys.executable, "-c", code + "sys.exit(fuzz.main())", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    return subprocess.run(call, env=env, capture_output=True, text=True, check=False)


def test_batches_that_are_done_are_not_run_again(tmp_path: Path) -> None:
    more = ["--targets", "plan", "--folder", tmp_path / "found", "--json", tmp_path / "j"]
    assert command("--cases", 30, *more).returncode == 0
    first = json.loads((tmp_path / "j").read_text())
    assert first["cases"] == 30 == sum(first["outcomes"].values())
    assert first["failures"] == [] and set(first["versions"]) >= {"python", "safetensors"}
    (done,) = (tmp_path / "found").glob("seed-0-0-30.json")
    told = json.loads(done.read_text())
    done.write_text(json.dumps(told | {"outcomes": {"plan: taken over": 30}}))
    assert command("--cases", 30, *more).returncode == 0
    assert json.loads((tmp_path / "j").read_text())["outcomes"] == {"plan: taken over": 30}


def test_a_case_that_kills_the_process_is_found_and_the_rest_is_run(tmp_path: Path) -> None:
    plant = (
        "import os\nreal = fuzz.case\n"
        "fuzz.case = lambda n, *a: os.kill(os.getpid(), 9) if n == 7 else real(n, *a)"
    )
    more = ["--targets", "plan", "--folder", tmp_path / "found", "--json", tmp_path / "j"]
    done = command("--cases", 12, *more, before=plant)
    assert done.returncode == 6
    assert "case 7 (): the process ended with -9" in done.stdout
    assert "--seed 0 --only 7" in done.stdout
    assert sum(json.loads((tmp_path / "j").read_text())["outcomes"].values()) == 11
