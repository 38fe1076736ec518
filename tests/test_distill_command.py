"""`morph distill` from the command line: probes, targets, documents, the cache, bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from morph import cli

REPO = Path(__file__).resolve().parent.parent
CHECKPOINT = REPO / "examples" / "checkpoint"
NOVEL = REPO / "examples" / "data" / "sherlock_holmes.txt"


def morph(*arguments) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as done:
            code = done.code
    return int(code or 0), out.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random model, its text, the same as documents, and a hybrid of it."""
    root = tmp_path_factory.mktemp("tiny")
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(REPO / "examples" / "tiny_model.py"))["main"](root)
    text = (root / "text.txt").read_text()
    parts = [text[i : i + 400] for i in range(0, 40_000, 400)]
    lines = (json.dumps({"body": part}) for part in parts)
    (root / "documents.jsonl").write_text("\n".join(lines))
    code, told = morph(
        "convert", root / "model", root / "hybrid", "--selector", "uniform", "--mixer", "decay"
    )
    assert code == 0, told
    return root


@pytest.fixture(scope="module")
def recalling(tmp_path_factory) -> Path:
    """A hybrid of the checkpoint that can recall, with windows."""
    out = tmp_path_factory.mktemp("recalling") / "hybrid"
    keep = ["--keep", "5", "--keep", "7"]
    code, told = morph(
        "convert", CHECKPOINT, out, "--selector", "uniform", "--budget", "2", *keep,
        "--set", "mixer.window=64",
    )  # fmt: skip
    assert code == 0, told
    return out


def distilled(tiny, out, *more):
    text = [] if "--data" in more else ["--data", tiny / "text.txt"]
    base = ["--teacher", tiny / "model", *text, "--out", out]
    sets = ["--set", "distill.logits.seq_len=64", "--set", "distill.logits.batch_size=2"]
    return morph("distill", tiny / "hybrid", *base, "--stages", "logits=512", *sets, *more)


def records(out: Path) -> list[dict]:
    log = out.with_name(out.name + ".distill") / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_stage_ends_when_recall_reaches_the_target(recalling, tmp_path):
    out = tmp_path / "out"
    code, told = morph(
        "distill", recalling, "--teacher", CHECKPOINT, "--data", NOVEL, "--out", out,
        "--stages", "logits=16K", "--set", "training.probe_every=2",
        "--set", "training.probe_length=256", "--set", "training.probe_examples=8",
        "--set", "training.recall_target=0.95", "--set", "distill.logits.seq_len=128",
    )  # fmt: skip
    assert code == 0, told
    assert "ends after step 2 of 32" in told
    found = records(out)
    assert len(found) == 2
    assert found[-1]["recall"] >= 0.95 * found[-1]["teacher_recall"] > 0.9
    assert found[-1]["perplexity"] < 80


def test_a_target_is_refused_for_a_teacher_that_cannot_recall(tiny, tmp_path):
    code, told = distilled(
        tiny, tmp_path / "out", "--set", "training.probe_every=2",
        "--set", "training.probe_length=160", "--set", "training.recall_target=0.9",
    )  # fmt: skip
    assert code == 2, told
    assert "the teacher itself recalls 0.00" in told
    assert not (tmp_path / "out").exists()


def test_documents_are_packed_and_the_teacher_is_kept(tiny, tmp_path):
    cache = tmp_path / "cache"
    more = [
        "--data", tiny / "documents.jsonl", "--set", "data.column=body",
        "--set", "distill.logits.rows=documents", "--set", f"training.teacher_cache={cache}",
    ]  # fmt: skip
    code, told = distilled(tiny, tmp_path / "a", *more)
    assert code == 0, told
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 4
    code, told = distilled(tiny, tmp_path / "b", *more)
    assert code == 0, told
    assert sorted(cache.rglob("*.safetensors")) == files
    assert records(tmp_path / "a") == records(tmp_path / "b")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in "ab")
    assert a == b


def test_text_that_would_be_read_too_often_is_refused(tiny, tmp_path):
    (tmp_path / "short.txt").write_text((tiny / "text.txt").read_text()[:3000])
    code, told = distilled(
        tiny, tmp_path / "out", "--data", tmp_path / "short.txt", "--set", "data.epochs=0.2",
    )  # fmt: skip
    assert code == 3
    assert "data.epochs allows 0.2" in told
    assert not (tmp_path / "out.distill").exists()


def test_another_tokenizer_is_refused(tiny, tmp_path):
    shutil.copytree(tiny / "hybrid", tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "tokenizer.json"
    file.write_text(file.read_text().replace('"id"', '"id" ', 1))
    code, told = morph(
        "distill", tmp_path / "hybrid", "--teacher", tiny / "model", "--data", tiny / "text.txt",
        "--out", tmp_path / "out", "--stages", "logits=512",
    )  # fmt: skip
    assert code == 4
    assert "is not the teacher's" in told


@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ("distill.logits.lora_rank=0", 2, "lora_rank"),
        ("distill.logits.kl=sideways", 2, "kl"),
        ("distill.logits.cross_entropy=1.5", 2, "cross_entropy"),
        ("distill.logits.recompute=all", 2, "recompute"),
        ("distill.logits.rows=lines", 2, "rows"),
        ("training.trackers=[tensorbord]", 2, "tensorboard"),
        ("training.keep_states=0", 2, "keep_states"),
        ("training.recall_target=0.9", 2, "probe_every"),
        ("training.probe_task=name_recall", 2, "probe_task"),
        ("training.mixed_precision=fp8", 2, "mixed_precision"),
        ("distill.logits.tokens=1K", 2, "a flag says this already"),
        ("model=elsewhere", 2, "a flag says this already"),
        ("data.text=[elsewhere.txt]", 2, "a flag says this already"),
        ("distill.logits.cross_entropy=1", 0, "wrote"),
        ("data.column=text", 0, "wrote"),
        ("distill.logits.recompute=mlp", 0, "wrote"),
        ("distill.logits.train=lora", 0, "wrote"),
        ("training.mixed_precision=bf16", 0, "wrote"),
    ],
)
def test_settings(setting, code, says, tiny, tmp_path):
    found, told = distilled(tiny, tmp_path / "out", "--set", setting)
    assert found == code, told
    assert says in told
    assert (tmp_path / "out").exists() == (code == 0)


def test_a_changed_setting_does_not_resume_another_run(tiny, tmp_path):
    out = tmp_path / "out"
    code, told = distilled(tiny, out)
    assert code == 0, told
    code, told = distilled(tiny, out, "--force", "--set", "distill.logits.lr=1e-4")
    assert code == 4
    assert "another run" in told and "lr" in told and "delete" in told
    code, told = distilled(tiny, out, "--force")
    assert code == 0, told


@pytest.mark.parametrize("command", ["evaluate", "run", "score"])
def test_other_commands_run_in_one_process(command, tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, told = morph(command, tiny / "model")
    assert code == 2
    assert "error: (process 1 of 2)" in told and "runs in one process" in told


def test_a_dataset_with_a_limit_is_looked_for(tiny, tmp_path):
    code, told = distilled(
        tiny, tmp_path / "out", "--data", "hub:nobody/nothing", "--set", "data.limit=1K"
    )
    assert code == 3, told
    assert "nobody/nothing" in told and "set that" not in told


def test_the_next_command_reads_the_same_data(tiny, tmp_path):
    more = ["--data", tiny / "documents.jsonl", "--set", "data.column=body"]
    code, told = distilled(tiny, tmp_path / "out", *more, "--set", "data.held_out=0.2")
    assert code == 0, told
    following = told.rsplit("next: ", 1)[1]
    assert "--set data.held_out=0.2" in following and "--set data.column=body" in following


def test_no_stage_is_no_training(tiny, tmp_path):
    code, told = morph(
        "distill", tiny / "hybrid", "--teacher", tiny / "model", "--data", tiny / "text.txt",
        "--out", tmp_path / "out", "--stages", "",
    )  # fmt: skip
    assert code == 2
    assert "name a stage" in told


def test_a_window_that_holds_every_row_is_told(tiny, tmp_path):
    hybrid = tmp_path / "hybrid"
    code, told = morph("convert", tiny / "model", hybrid, "--selector", "uniform",
                       "--set", "mixer.window=64")  # fmt: skip
    assert code == 0, told
    code, told = morph(
        "distill", hybrid, "--teacher", tiny / "model", "--data", tiny / "text.txt",
        "--out", tmp_path / "out", "--stages", "logits=512", "--set", "distill.logits.seq_len=64",
    )  # fmt: skip
    assert code == 0, told
    assert "the loss is 0" in told and "longer seq_len" in told


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"--data": "nowhere.txt"}, 3, "no such text file"),
        ({"--data": None}, 2, "no text was given"),
        ({"--out": "hybrid"}, 2, "is the input"),
        ({"--set": "mixer.window=8"}, 2, "brings its mixers"),
        ({"--set": "select.budget=2"}, 2, "nothing is selected"),
        ({}, 0, "pattern"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_the_run_would(changes, code, says, tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    given = {"--teacher": "model", "--data": "text.txt", "--out": "new", "--stages": "logits=1K"}
    flags = [x for pair in (given | changes).items() if pair[1] for x in pair]
    found, told = morph("distill", "hybrid", *flags, "--dry-run")
    assert found == code, told
    assert says in told


def test_a_rank_without_a_world_is_the_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as schedulers set it
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code, told = distilled(tiny, tmp_path / "out")
    assert code == 0, told
    assert "wrote" in told and (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tokens", "512,logits=1K"], "one stage, align"),
        (["--set", "distill=[]"], "one stage, align"),
        (["--set", "distill.align.needles=0.5"], "needles"),
        (["--set", "training.probe_every=2"], "probe_every"),
        (["--set", "distill.align.train=lora"], "without lora"),
        (["--set", "distill.align.recompute=layer"], "recompute"),
        (["--set", "training.teacher_cache=here"], "teacher_cache"),
    ],
)
def test_align_refuses_what_it_would_ignore(more, says, tiny, tmp_path):
    code, told = morph(
        "align", tiny / "model", tmp_path / "bank", "--mixer", "decay",
        "--data", tiny / "text.txt", *more,
    )  # fmt: skip
    assert code == 2, told
    assert says in told


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_write_one_whole_checkpoint(shard, tiny, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "morph"]
    arguments = [
        "distill", tiny / "hybrid", "--teacher", tiny / "model", "--data", tiny / "text.txt",
        "--out", tmp_path / "out", "--stages", "align=512,logits=512",
        "--set", "distill.align.seq_len=64", "--set", "distill.logits.seq_len=64",
        "--set", f"training.shard={str(shard).lower()}",
    ]  # fmt: skip
    done = subprocess.run(
        [*launch, *map(str, arguments)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote") == 1
    assert len(records(tmp_path / "out")) == 4
    code, told = morph("verify", tmp_path / "out", "--against", tiny / "model")
    assert code == 0, told
