"""The examples run on the tiny model, and the parts they define serve from outside the package."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import morph
from morph import cli
from morph.plan import uniform_plan
from morph.surgery import geometry_of

REPO = Path(__file__).resolve().parent.parent
EXAMPLES = REPO / "examples"
PACKAGE = "parts_from_outside"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and text.txt."""
    root = tmp_path_factory.mktemp("examples")
    runpy.run_path(str(EXAMPLES / "tiny_model.py"))["main"](root)
    return root


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that is not part of morph and holds the parts of the examples."""
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("custom_mixer", "custom_selector"):
        shutil.copy(EXAMPLES / f"{name}.py", package)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield PACKAGE
    for name in [m for m in sys.modules if m.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def run(name: str, *arguments: object) -> str:
    """Run an example as a user does; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tour(folder):
    told = run("tour.py", folder / "model")
    assert "8 layers of 8 query heads on 4 KV heads" in told
    assert "90 tensors are" in told
    assert "vllm serve OUT --model-impl transformers" in told
    assert "Loaded back as Qwen3ForCausalLM" in told


def test_custom_mixer_runs(folder):
    told = run("custom_mixer.py", folder / "model")
    assert told.startswith("CCCCCCCF: ")
    assert "56 numbers to learn in 7 layers" in told


def test_custom_selector_runs(folder):
    told = run("custom_selector.py", folder / "model")
    assert told.count("layer ") == 8
    assert told.splitlines()[-1].count("F") == 2


def test_parts_from_outside_are_scored_and_planned_by_name(folder, outside):
    parts = ["--selector", f"{outside}.custom_selector", "--mixer", f"{outside}.custom_mixer"]
    for arguments in (
        ["score", str(folder / "model"), *parts, "--granularity", "kv_head", "--out", "s.json"],
        ["plan", "s.json", "--model", str(folder / "model"), *parts[2:], "--out", "p.json"],
    ):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert not done.value.code


def test_mixer_from_outside_is_the_window_at_the_start_and_decodes_what_it_prefills(
    folder, outside
):
    source = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    shape, options = geometry_of(source), {"window": 16}
    mine = uniform_plan("qwen3", shape, [7], f"{outside}.custom_mixer", options, None)
    plain = uniform_plan("qwen3", shape, [7], "sliding", options, None)
    ids = torch.randint(0, 512, (1, 60))
    hybrid = morph.hybrid(source, mine)
    with torch.no_grad():
        assert torch.equal(hybrid(ids).logits, morph.hybrid(source, plain)(ids).logits)
        for module in hybrid.modules():
            if hasattr(module, "sharpness"):
                module.sharpness.fill_(0.3)
        whole = hybrid(ids).logits
        first = hybrid(ids[:, :40], use_cache=True)
        rest = hybrid(ids[:, 40:], past_key_values=first.past_key_values).logits
    assert torch.allclose(whole[:, 40:], rest, atol=1e-5)


def test_a_mixer_from_outside_is_written_and_verified(folder, outside):
    mixer = ["--mixer", f"{outside}.custom_mixer", "--set", "mixer.window=16"]
    command = ["convert", str(folder / "model"), "mine", "--selector", "uniform", *mixer]
    with pytest.raises(SystemExit) as done:
        cli.main(command)
    assert not done.value.code
