"""The command line: help, flags, exit codes, clean outputs, and the happy road on a tiny model.

`python tests/test_cli.py` prints what tests/cli_help.txt holds, whatever the terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from morph import cli, registry

HERE = Path(__file__).resolve().parent
COMMANDS = (
    *("list", "show", "env", "inspect", "check", "score", "plan", "compare", "align"),
    *(
        "convert",
        "share",
        "distill",
        "evaluate",
        "diff",
        "restore",
        "verify",
        "convert-pickle",
        "run",
    ),
)
# Every flag there is. A new one needs a reason: could it be a value for --set instead?
FLAGS = {
    "list": "json",
    "show": "",
    "env": "json",
    "inspect": "health json",
    "check": "set json",
    "score": "selector granularity mixer budget data out export stream family seed dtype set force"
    " dry-run json",
    "plan": "model budget mixer keep replace data no-swaps out export seed set force json",
    "compare": "selectors budgets granularity mixer data seeds max-sets no-swaps out family seed"
    " dtype set force json",
    "align": "mixer data tokens family seed dtype set force json",
    "convert": "plan aligned selector budget mixer granularity keep replace data target with-code"
    " no-swaps family seed dtype set force dry-run json",
    "share": "owners teacher data family seed set force json",
    "distill": "teacher out data stages target seed set force dry-run json",
    "evaluate": "against data out seed set force json",
    "diff": "tensors out force json",
    "restore": "method rho alpha layers budget include allow copy no-hash force restart dry-run"
    " json",
    "verify": "against pre json",
    "convert-pickle": "force restart dry-run json",
    "run": "out set force dry-run json",
}
SELECT = ["--set", "mixer.window=8", "--set", "select.task=single_2", "--set", "select.examples=4"]
SELECT += ["--set", "select.seq_len=128"]
MEASURE = {"tasks": "[single_2]", "lengths": "[128]", "examples": "4", "depths": "2"}
MEASURE |= {"perplexity_tokens": "256", "seq_len": "64", "speed_length": "32", "decode_tokens": "2"}


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def next(self) -> list[str]:
        """The command that the last line names, as arguments."""
        last = self.err.splitlines()[-1]
        assert last.startswith("next: morph "), self.err
        return shlex.split(last)[2:]


def morph(*arguments: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as done:
            return Result(int(done.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main returned")


def good(*arguments: object) -> Result:
    """Run a command that must succeed."""
    found = morph(*arguments)
    assert found.code == 0, found.err
    return found


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds morph."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


def write_text(path: Path, words: int = 6000) -> Path:
    """Write text in which every word is one of few, so that a small tokenizer spells it."""
    names = "river window garden stone winter music silver bridge forest candle".split()  # noqa: SIM905
    text = " ".join(
        f"The {names[i % 10]} is soft near the {names[(i * 7 + i // 10) % 10]} in {i % 97}."
        for i in range(words // 9)
    )
    path.write_text(text)
    return path


def write_model(
    folder: Path, text: str, model_type: str = "llama", bos: str | None = "<s>"
) -> Path:
    """Write a random model of a family's tiny size with a BPE tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from morph._tiny import tiny_model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = "Some secret codes are hidden in this text. Remember them. What is the secret code of"
    tokenizer.train_from_iterator([text, f"{asked} fire? The secret code: fire" * 20], trainer)
    made = tiny_model(model_type, vocab_size=512)
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(0.5)
    made.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "some text.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "source", text.read_text())


# --- Help and flags -----------------------------------------------------------------------------


def help_text() -> str:
    """The help of every command at 80 columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        calls = [["--help"], *([c, "--help"] for c in COMMANDS)]
        pages = [f"$ morph {' '.join(call)}\n{morph(*call).out.rstrip()}\n" for call in calls]
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return "\n".join(pages)


def test_help_is_the_stored_help() -> None:
    assert help_text() == (HERE / "cli_help.txt").read_text(), (
        "the help has changed: if that is meant, `python tests/test_cli.py > tests/cli_help.txt`"
    )


@pytest.mark.parametrize("columns", [50, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_no_literal_over_two_lines(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in good(command, "--help").out.splitlines():
        assert line.count("`") % 2 == 0, line
        assert not line.endswith("-"), line
        assert len(line) <= columns or len(line.split()) < 4, line


def test_flags_are_frozen() -> None:
    import typer

    found = typer.main.get_command(cli.app)
    assert list(found.commands) == list(COMMANDS)
    for name, command in found.commands.items():
        flags = [o for p in command.params for o in p.opts if o.startswith("--")]
        assert sorted(f[2:] for f in flags) == sorted(FLAGS[name].split()), name


def test_no_arguments_show_the_help() -> None:
    assert good().out == good("--help").out


def test_version() -> None:
    import morph as package

    assert good("--version").out == f"morph {package.__version__}\n"


# --- What starts fast, and how it may be started ------------------------------------------------


def light_commands(source: Path, recipe: Path) -> dict[str, list[str]]:
    """Commands that must not load torch."""
    return {
        "help": ["--help"],
        "convert-help": ["convert", "--help"],
        "list": ["list"],
        "show": ["show", "mixers/sliding"],
        "check": ["check", str(recipe)],
        "inspect": ["inspect", "--health", str(source)],
        "verify": ["verify", str(source)],
    }


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, list[str]]:
    from morph.checkpoint import Checkpoint, write_checkpoint

    folder = tmp_path_factory.mktemp("light")
    found = Checkpoint.open(source)
    write_checkpoint(folder / "copy", config=found.config, source=found)
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: some/model\nselect:\n  selector: uniform\n")
    return light_commands(folder / "copy", recipe)


@pytest.mark.parametrize("name", list(light_commands(Path(), Path())))
def test_loads_no_torch(name: str, light: dict[str, list[str]]) -> None:
    code = (
        "import sys\nfrom morph.cli import main\ntry:\n main(sys.argv[1:])\n"
        "except SystemExit as e:\n code = e.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    done = python(code, *light[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_by_path_it_refuses_politely() -> None:
    script = HERE.parent / "morph" / "cli.py"
    done = subprocess.run(
        [sys.executable, str(script), "list"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "python -m morph" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_as_a_module() -> None:
    done = python("import runpy; runpy.run_module('morph', run_name='__main__')", "--version")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("background", [False, True], ids=["", "background"])
def test_a_schedulers_stop_is_a_stop(background: bool) -> None:
    code = (
        "import os, signal, sys\nfrom morph import cli, registry\n"
        f"if {background}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "registry.summary = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\ncli.main()"
    )
    done = python(code, "list")
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("error: stopped") and len(done.stderr.splitlines()) == 1


def test_a_reader_that_hangs_up_is_no_error() -> None:
    code = "import sys\nfrom morph.cli import main\nmain(['list'])"
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    pipe = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.close()
    assert "Traceback" not in (errors := pipe.stderr.read()), errors
    assert "Exception ignored" not in errors
    pipe.stderr.close()
    assert pipe.wait() == 0


# --- Exit codes ---------------------------------------------------------------------------------


def test_exit_code_of_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "summary", lambda kind, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        morph("list")


EXITS = {
    "UsageError": 2,
    "RecipeError": 2,
    "UnknownName": 2,
    "PlanError": 2,
    "OutputExists": 2,
    "CheckpointError": 3,
    "UnsupportedModel": 3,
    "DataError": 3,
    "MismatchError": 4,
    "StorageError": 5,
    "VerificationFailed": 6,
    "Interrupted": 7,
    "TrainingError": 1,
    "KernelUnavailable": 1,
}


def raising(error: BaseException) -> Any:
    def act(*args: object) -> None:
        raise error

    return act


@pytest.mark.parametrize("name", EXITS)
def test_exit_code_of_every_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from morph import errors

    monkeypatch.setattr(registry, "summary", raising(getattr(errors, name)("what is\nwrong")))
    found = morph("list")
    assert (found.code, found.out) == (EXITS[name], "")
    assert found.err == "error: what is wrong\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 7),
        (PermissionError(13, "denied", "a/b"), 5),
        (OSError(28, "No space left on device"), 5),
        (MemoryError(), 5),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 5),
    ],
    ids=["ctrl-c", "permission", "full-disk", "memory", "torch-memory"],
)
def test_exit_code_of_the_systems_errors(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "summary", raising(error))
    found = morph("list")
    assert found.code == code
    assert found.err.startswith("error: ") and len(found.err.splitlines()) == 1


def test_debug_shows_the_traceback_and_keeps_the_code() -> None:
    found = morph("--debug", "show", "nothing")
    assert found.code == 2
    assert "Traceback" in found.err and found.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in morph("show", "nothing").err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["scor"], "'score'"),
        (["score", "M", "--budgt", "2"], "--budget"),
        (["score", "M", "--selector", "nil"], "'nll'"),
        (["score", "M", "--mixer", "slidng"], "'sliding'"),
        (["score", "M", "--family", "lama"], "'llama'"),
        (["score", "M", "--granularity", "kv_heads"], "'kv_head'"),
        (["score", "M", "--dtype", "bfloat"], "'bfloat16'"),
        (["score", "M", "--set", "mixer.windo=3"], "'window'"),
        (["score", "M", "--set", "select.buget=3"], "'budget'"),
        (["score", "M", "--set", "select.task=singel_1"], "'single_1'"),
        (["distill", "M", "--teacher", "T", "--out", "O", "--stages", "logit=1M"], "'logits'"),
        (["convert", "M", "O", "--target", "stok"], "'stock'"),
        (["list", "mixer_"], "'mixers'"),
        (["show", "slidin"], "'sliding'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_unknown_words_name_the_nearest(arguments: list[str], nearest: str) -> None:
    found = morph(*arguments)
    assert (found.code, found.out) == (2, "")
    assert nearest in found.err
    assert len(found.err.splitlines()) == 1


# --- Light commands -----------------------------------------------------------------------------


def test_list_names_everything() -> None:
    found = json.loads(good("list", "--json").out)
    assert {kind: tuple(parts) for kind, parts in found.items()} == {
        kind: registry.names(kind) for kind in registry.KINDS
    }
    text = good("list").out
    assert all(name in text for kind in registry.KINDS for name in registry.names(kind))


@pytest.mark.parametrize("part", [f"{k}/{n}" for k in registry.KINDS for n in registry.names(k)])
def test_show_every_part(part: str) -> None:
    kind, _, name = part.partition("/")
    found = good("show", part)
    assert registry.summary(kind, name).split()[0] in found.out
    for option, _, _ in registry.options(kind, name):
        assert f".{option} " in found.out


def test_env() -> None:
    found = json.loads(good("env", "--json").out)
    assert "torch" in found
    for name in registry.names("kernels"):
        assert "runs here" in found[f"kernel {name}"]
    assert good("env").next == ["list"]


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect(source: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = good("inspect", "--health", source)
    assert "None" not in found.out and "none" not in found.out
    assert all(len(line) <= columns and line == line.rstrip() for line in found.out.splitlines())
    assert found.next[:2] == ["score", str(source)]
    told = json.loads(good("inspect", "--json", source).out)
    assert (told["model_type"], told["num_hidden_layers"]) == ("llama", 4)


def test_check_prints_the_whole_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("model: some/model\n")
    found = good("check", recipe, "--set", "mixer.window=9")
    assert yaml.safe_load(found.out)["mixer"]["options"] == {"window": 9}
    start = ["run", str(recipe), "--out", "my recipe-run"]
    assert found.next == [*start, "--set", "mixer.window=9"]
    assert json.loads(good("check", recipe, "--json").out)["model"] == "some/model"


def test_names_with_control_characters_are_quoted(tmp_path: Path) -> None:
    recipe = tmp_path / "it's \x1b[31m.yaml"
    recipe.write_text("model: some/model\nout: there\n")
    found = good("check", recipe)
    assert "\x1b" not in found.out + found.err
    last = found.err.splitlines()[-1].removeprefix("next: morph run ")
    bash = shutil.which("bash")
    if bash:
        shown = subprocess.run(
            [bash, "-c", f"printf %s {last}"], capture_output=True, text=True, check=True
        )
        assert shown.stdout == str(recipe)


# --- The happy road -----------------------------------------------------------------------------


class Road(NamedTuple):
    """What every stage printed, and the folder it all happened in."""

    folder: Path
    stages: dict[str, Result]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, source: Path, text: Path) -> Road:
    """Go the whole road once, each command being the one that the last named where it can be."""
    folder = tmp_path_factory.mktemp("road")
    at: dict[str, Result] = {}
    with contextlib.chdir(folder):
        at["score"] = good(
            *("score", source, "--data", text, "--budget", "2", "--out", "my scores.json"), *SELECT
        )
        at["plan"] = good(*at["score"].next)
        at["convert"] = good(*at["plan"].next, "--json")
        sets = [x for key, value in MEASURE.items() for x in ("--set", f"evaluate.{key}={value}")]
        at["evaluate"] = good(*at["convert"].next, "--out", "report", *sets)
        tiny = ["--stages", "align=1K,logits=1K", "--set", "distill.align.seq_len=64"]
        at["distill"] = good(*at["evaluate"].next, *tiny, "--set", "distill.logits.seq_len=64")
        at["verify"] = good("verify", "source-hybrid-distilled", "--against", source, "--json")
    return Road(folder, at)


def test_road_scores(road: Road) -> None:
    found = json.loads((road.folder / "my scores.json").read_text())
    assert [len(row) for row in found["values"]] == [1, 1, 1, 1]
    assert found["selector"] == "nll"
    assert any(row[0] != 0 for row in found["values"])


def test_road_plan(road: Road) -> None:
    from morph import plan

    found = plan.loads_plan((road.folder / "plan.json").read_text())
    assert sorted(found.pattern) == list("FFSS")
    group = found.layers[found.pattern.index("S")].groups[0]
    assert group.options["window"] == 8  # from the --set of `score`, carried by its last line


def test_road_checkpoint(road: Road, source: Path) -> None:
    from morph.checkpoint import Checkpoint, kept_equal, verify_manifest

    told = json.loads(road.stages["convert"].out)
    out = road.folder / "source-hybrid"
    assert told["wrote"] == out.name and told["format"] == "ministral"
    written, before = Checkpoint.open(out), Checkpoint.open(source)
    assert kept_equal(before, written)[1:] == ([], [])
    assert set(written.tensors) == set(before.tensors)
    words = {"F": "full_attention", "S": "sliding_attention"}
    assert written.config["layer_types"] == [words[x] for x in told["pattern"]]
    assert verify_manifest(out) == []
    assert told["verification"]["logit_error"] <= told["verification"]["limit"]
    cache = told["cache_bytes"]["32K"]
    assert 0.4 < cache["hybrid"] / cache["source"] < 0.6


def test_same_inputs_same_bytes(
    road: Road, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph.pipeline import _verify

    told = json.loads(road.stages["convert"].out)["verification"]
    monkeypatch.setattr(_verify, "load_and_compare", lambda *a, **k: told)
    good("convert", source, tmp_path / "another name", "--plan", road.folder / "plan.json")
    one, two = road.folder / "source-hybrid", tmp_path / "another name"
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_road_evaluation(road: Road) -> None:
    found = json.loads((road.folder / "report" / "evaluation.json").read_text())
    assert [m["name"] for m in found["models"]] == ["source", "hybrid", "uniform", "window"]
    perplexities = [m["perplexity"]["ppl"] for m in found["models"]]
    assert len(set(perplexities)) > 1
    assert (road.folder / "report" / "report.html").is_file()
    assert all(len(line) <= 100 for line in road.stages["evaluate"].out.splitlines())


def test_road_distillation(road: Road, source: Path) -> None:
    from morph.checkpoint import Checkpoint, kept_equal

    out = Checkpoint.open(road.folder / "source-hybrid-distilled")
    equal, changed, new = kept_equal(Checkpoint.open(source), out)
    pattern = json.loads(road.stages["convert"].out)["pattern"]
    swapped = tuple(f"model.layers.{i}.self_attn." for i, x in enumerate(pattern) if x == "S")
    assert changed and not new
    assert all(name.startswith(swapped) for name in changed)
    assert len(equal) + len(changed) == len(out.tensors)


def test_road_verify(road: Road) -> None:
    told = json.loads(road.stages["verify"].out)
    assert told["logit_error"] <= told["limit"]
    assert 0 < told["tensors_byte_equal"] < told["tensors"]


def test_road_leaves_nothing_else(road: Road) -> None:
    names = {p.name for p in road.folder.iterdir()}
    results = {"my scores.json", "plan.json", "report", "source-hybrid", "source-hybrid-distilled"}
    assert names - results == {"source-hybrid-distilled.distill"}  # the state that resumes


def test_road_notes_go_to_stderr(road: Road) -> None:
    assert "wrote" in road.stages["score"].err and "wrote" not in road.stages["score"].out
    assert "next:" not in "".join(stage.out for stage in road.stages.values())


def test_verify_names_what_was_changed(road: Road, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(road.folder / "source-hybrid", copy)
    assert good("verify", copy).next == ["inspect", str(copy)]
    shard = copy / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    found = morph("verify", copy)
    assert (found.code, found.out) == (6, "")
    assert "model.safetensors" in found.err


@pytest.mark.parametrize(
    ("mixer", "setting", "said"),
    [
        ("dash", "sparsity=-1", "sparsity is -1"),
        ("block_topk", "k=1", "k is 1"),
        ("sliding", "window=0", "window is 0"),
        ("shared_routing", "owner=99", "layer 99"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    source: Path, mixer: str, setting: str, said: str
) -> None:
    given = ("convert", source, "o", "--mixer", mixer, "--set", f"mixer.{setting}", "--dry-run")
    found = morph(*given)
    assert found.code == 2
    assert said in found.err.replace("\n", " ")


def test_sharing_does_not_change_mixers(source: Path) -> None:
    found = morph("share", source, "o", "--set", "mixer.k=9")
    assert found.code == 2
    assert "--set mixer.k: the hybrid's mixers are what they are" in found.err.replace("\n", " ")


def test_a_sparsity_that_was_not_calibrated_is_told(source: Path, tmp_path: Path) -> None:
    given = ["--mixer", "dash", "--set", "mixer.sparsity=0.75", "--selector", "uniform"]
    found = good("convert", source, tmp_path / "o", *given)
    assert "sparsity 0.75 is not met, as there is no text" in found.err.replace("\n", " ")


def test_dry_runs_write_nothing(source: Path, tmp_path: Path, road: Road) -> None:
    with contextlib.chdir(tmp_path):
        told = json.loads(good("score", source, "--dry-run", "--json", "--budget", "2").out)
        assert (told["kept_full"], told["layers"]) == (2, 4)
        assert good("score", source, "--dry-run", "--seed", "1").next[2:] == ["--seed", "1"]
        plan_file = road.folder / "plan.json"
        told = json.loads(
            good("convert", source, "o", "--plan", plan_file, "--dry-run", "--json").out
        )
        assert sorted(told["pattern"]) == list("FFSS")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"model: {source}\ndistill:\n- {{loss: logits, tokens: 1M}}\n")
        told = json.loads(good("run", recipe, "--dry-run", "--json").out)
        assert told["distillation_tokens"] == 10**6
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


if __name__ == "__main__":
    print(help_text(), end="")
