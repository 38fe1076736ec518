"""Bad input at the command line: one clear line, its exit code, nothing written, nothing lost.

Every test hashes all files before and after: inputs are as they were, and no output, hidden folder
or lock is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from morph import cli

REPO = Path(__file__).resolve().parent.parent
WINDOW = ["--set", "mixer.window=8"]
TASK = ["--set", "select.task=single_2", "--set", "select.examples=4"]
TASK += ["--set", "select.seq_len=128"]
SHORT = ["--stages", "logits=1K", "--set", "distill.logits.seq_len=64"]
SHORT += ["--set", "distill.logits.batch_size=2"]


class Place(NamedTuple):
    """A folder with good inputs: `model`, `other`, `plan.json`, `scores.json`, `text.txt`."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        stem = {"plan": "plan.json", "scores": "scores.json", "text": "text.txt"}
        return self.root / stem.get(name, name)


def morph(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return its code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as done:
            return int(done.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("main returned")


def good(*arguments: object) -> str:
    code, _, err = morph(*arguments)
    assert code == 0, err
    return err


def hashes(root: Path) -> dict[str, str]:
    """Every file and folder below `root`, files with their hash."""
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "folder"
        for p in sorted(root.rglob("*"))
    }


def refused(root: Path, code: int, *arguments: object, kept: bool = False) -> str:
    """Assert that a command fails as it should, and return its error line.

    `kept` says that finished files stay beside OUT, from which the same command goes on.
    """
    before = hashes(root)
    found, out, err = morph(*arguments)
    lines = err.splitlines()
    assert found == code, err
    assert out == ""
    assert "Traceback" not in err
    assert lines[-1].startswith("error: "), err
    assert sum(line.startswith("error: ") for line in lines) == 1, err
    assert "\x1b" not in err
    hidden = {name for name in hashes(root) if name.startswith(".out.partial-")}
    assert bool(hidden) == kept == ("the same command goes on" in lines[-1])
    assert {n: h for n, h in hashes(root).items() if n not in hidden} == before
    return lines[-1]


def write_model(folder: Path, text: str, bos: str | None = "<s>", **config: Any) -> Path:
    """Write a tiny random Llama with a tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from morph._tiny import tiny_model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = "Some secret codes are hidden in this text. Remember them. What is the secret code of"
    tokenizer.train_from_iterator([text, f"{asked} fire? The secret code: fire" * 20], trainer)
    tiny_model("llama", vocab_size=420, **config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    words = "river window garden stone winter music silver bridge forest candle".split()  # noqa: SIM905
    text = " ".join(f"The {words[i % 10]} is near the {words[i * 7 % 9]}." for i in range(900))
    (root / "text.txt").write_text(text)
    write_model(root / "model", text)
    write_model(root / "other", text, num_hidden_layers=3)
    good("score", root / "model", "--selector", "uniform", "--budget", 2, *WINDOW,
         "--out", root / "scores.json")  # fmt: skip
    good("plan", root / "scores.json", "--model", root / "model", "--budget", 2, *WINDOW,
         "--out", root / "plan.json")  # fmt: skip
    return root


@pytest.fixture
def place(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A fresh copy of the good inputs, which is also the working folder."""
    root = tmp_path / "place"
    shutil.copytree(inputs, root)
    monkeypatch.chdir(root)
    return Place(root)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the two processes of the load-and-compare, where it is not what is tested."""
    from morph.pipeline import _verify

    told = {"logit_error": 0.0, "limit": 1.0, "tensors_byte_equal": 0}
    monkeypatch.setattr(_verify, "load_and_compare", lambda *a, **k: dict(told))


@pytest.fixture
def hybrid(place: Place, unverified: None) -> Path:
    """A hybrid of the good model."""
    good("convert", place.model, place.root / "hybrid", "--plan", place.plan)
    return place.root / "hybrid"


# --- Checkpoints --------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return act


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def index(target: str) -> Callable[[Path], None]:
    """Turn the only file into a shard, and an index that calls it `target`."""

    def act(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        names = [n for n in header if n != "__metadata__"]
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        found = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {names[-1]: target}
        text = json.dumps({"metadata": {}, "weight_map": found})
        (folder / "model.safetensors.index.json").write_text(text)

    return act


def last_number(bits: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + bits)

    return act


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no-json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "pickle-only": (pickle_only, "pickle"),
    "missing-shard": (index("model-00002-of-00002.safetensors"), "model-00002-of-00002"),
    "truncated-shard": (truncate, "model.safetensors"),
    "outside-shard": (index("../other/model.safetensors"), "../other/model.safetensors"),
    "wrong-shapes": (config(num_key_value_heads=3), "k_proj"),
    "too-few-layers": (config(num_hidden_layers=9), "layers"),
    "nan": (last_number(struct.pack("<f", float("nan"))), "NaN"),
    "infinity": (last_number(struct.pack("<f", float("inf"))), "NaN or infinity"),
    "unknown-family": (config(model_type="mamba9"), "mamba9"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
}


@pytest.mark.parametrize("command", ["score", "convert"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(case: str, command: str, place: Place) -> None:
    act, named = BROKEN[case]
    act(place.model)
    more = ["--selector", "uniform", "--out", "s.json"]
    if command == "convert":
        more = ["out", "--plan", place.plan]
    assert named in refused(place.root, 3, command, place.model, *more)


@pytest.mark.parametrize("case", [c for c in BROKEN if c not in ("nan", "infinity")])
def test_broken_checkpoint_is_inspected(case: str, place: Place) -> None:
    """`inspect` says what is wrong: by refusing, or as a problem beside what can be told."""
    BROKEN[case][0](place.model)
    code, out, err = morph("inspect", place.model)
    assert code in (0, 3) and "Traceback" not in err
    assert code == 3 or out


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("nowhere", "nowhere"),
        ("not/a/model", "not/a/model"),
        ("text.txt", "text.txt"),
        ("empty", "config.json"),
        ("\x1b[31m[/x]", "\\x1b[31m[/x]"),
        ("", "'' is neither"),
    ],
    ids=["missing", "too-many-slashes", "a-file", "empty-folder", "hostile", "no-name"],
)
@pytest.mark.parametrize("command", ["inspect", "score", "convert", "evaluate", "verify"])
def test_path_that_is_no_checkpoint(command: str, model: str, named: str, place: Place) -> None:
    (place.root / "empty").mkdir()
    more = {"convert": ["out", "--plan", place.plan], "evaluate": ["--data", place.text]}
    code = 3
    if (command, model) == ("verify", ""):  # a path, which is the folder one is in
        named = "place"
    assert named in refused(place.root, code, command, model, *more.get(command, []))


@pytest.mark.parametrize("content", ["", "{}", "[", '{"model": 3}'])
def test_broken_tokenizer(content: str, place: Place) -> None:
    (place.model / "tokenizer.json").write_text(content)
    data = ["--data", place.text]
    line = refused(place.root, 3, "score", place.model, *data, *TASK, *WINDOW, "--out", "s.json")
    assert "tokenizer" in line


@pytest.mark.parametrize("file", ["tokenizer.json", "both"])
def test_missing_tokenizer(file: str, place: Place, unverified: None) -> None:
    (place.model / "tokenizer.json").unlink()
    if file == "both":
        (place.model / "tokenizer_config.json").unlink()
    line = refused(place.root, 3, "score", place.model, "--data", place.text, *TASK, *WINDOW,
                   "--out", "s.json")  # fmt: skip
    assert "tokenizer" in line
    # a plan needs no text, so it needs no tokenizer
    good("convert", place.model, "out", "--plan", place.plan)


def test_tokenizer_without_bos_works(place: Place, unverified: None) -> None:
    model = write_model(place.root / "no bos", place.text.read_text(), bos=None)
    measure = ["--set", "evaluate.tasks=[single_2]", "--set", "evaluate.lengths=[128]"]
    measure += ["--set", "evaluate.examples=2", "--set", "evaluate.seq_len=64"]
    measure += ["--set", "evaluate.perplexity_tokens=128", "--set", "evaluate.speed_length=16"]
    measure += ["--set", "evaluate.decode_tokens=2"]
    good("score", model, "--data", place.text, *TASK, *WINDOW, "--out", "s.json")
    good("convert", model, "out", "--selector", "uniform", "--budget", 2, *WINDOW)
    good("distill", "out", "--teacher", model, "--out", "out2", "--data", place.text, *SHORT)
    good("evaluate", model, "--data", place.text, *measure)


# --- Limits, names, numbers ---------------------------------------------------------------------

LIMITS: dict[str, tuple[list[str], str]] = {
    "budget-0": (["--budget", "0"], "budget"),
    "budget-negative": (["--budget", "-1"], "budget"),
    "budget-too-many": (["--budget", "5"], "4"),
    "budget-word": (["--budget", "lots"], "lots"),
    "budget-fraction-over-1": (["--budget", "3/2"], "1.5"),
    "budget-no-bytes": (["--budget", "1B"], "budget"),
    "two-budgets": (["--budget", "2", "--budget", "1/4"], "--budget"),
    "budget-and-set": (["--budget", "2", "--set", "select.budget=1/4"], "select.budget"),
    "two-in-one": (["--budget", "2,1/4"], "2,1/4"),
    "set-twice": (["--set", "select.budget=1", "--set", "select.budget=2"], "select.budget"),
    "unknown-selector": (["--selector", "unifrom"], "'uniform'"),
    "unknown-mixer": (["--mixer", "slide"], "'sliding'"),
    "outside-part": (["--selector", "no_such.package:thing"], "no_such.package:thing"),
    "set-nonsense": (["--set", "nonsense"], "nonsense"),
    "set-no-key": (["--set", "=3"], "=3"),
    "set-yaml": (["--set", "select.budget=[1"], "select.budget"),
    "set-deep": (["--set", "mixer.window.size=3"], "window"),
    "set-section": (["--set", "select=3"], "select"),
    "set-inside-a-number": (["--seed", "5", "--set", "seed.x=1"], "seed"),
    "set-inside-a-text": (["--set", "model.o=1"], "model"),
    "set-the-model": (["--set", "model=other"], "model"),
    "window-0": (["--set", "mixer.window=0"], "window"),
    "window-text": (["--set", "mixer.window=wide"], "window"),
    "window-negative": (["--set", "mixer.window=-4"], "window"),
    "window-none": (["--set", "mixer.window=null"], "window"),
    "seed-negative": (["--seed", "-1"], "seed"),
    "seed-text": (["--seed", "one"], "seed"),
    "examples-0": (["--set", "select.examples=0"], "examples"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits_and_names_when_scoring(case: str, place: Place) -> None:
    given, named = LIMITS[case]
    selector = [] if "--selector" in given else ["--selector", "uniform"]
    assert named in refused(
        place.root, 2, "score", place.model, *selector, *given, "--out", "s.json"
    )


@pytest.mark.parametrize("case", [c for c in LIMITS if "budget" in c or c == "two-in-one"])
def test_limits_when_planning(case: str, place: Place) -> None:
    given, named = LIMITS[case]
    line = refused(
        place.root, 2, "plan", place.scores, "--model", place.model, *given, "--out", "p"
    )
    assert named in line


PINS: dict[str, tuple[list[str], str]] = {
    "no-such-unit": (["--keep", "3.99"], "99"),
    "no-such-layer": (["--keep", "4"], "layer 4"),
    "negative": (["--keep", "-1"], "-1"),
    "word": (["--keep", "last"], "last"),
    "three-numbers": (["--keep", "1.2.3"], "1"),
    "kept-and-replaced": (["--keep", "1", "--replace", "1"], "1"),
    "too-many-kept": (["--keep", "0,1,2"], "3"),
    "too-many-replaced": (["--replace", "0,1,2"], "replace"),
}


@pytest.mark.parametrize("case", PINS)
def test_pins(case: str, place: Place) -> None:
    given, named = PINS[case]
    line = refused(place.root, 2, "plan", place.scores, "--model", place.model, "--budget", 2,
                   *given, "--out", "p.json")  # fmt: skip
    assert named in line


# --- Plans and scores ---------------------------------------------------------------------------


def in_plan(change: Callable[[Any], object]) -> Callable[[str], str]:
    def act(text: str) -> str:
        data = json.loads(text)
        swapped = next(x for x in data["layers"] if x["groups"][0]["mixer"] != "full")
        change(swapped["groups"][0] if change.__code__.co_varnames[0] == "group" else data)
        return json.dumps(data)

    return act


PLANS: dict[str, tuple[Callable[[str], str], str]] = {
    "no-json": (lambda text: text[:-9], "plan.json"),
    "a-list": (lambda text: "[]", "mapping"),
    "empty": (lambda text: "", "plan.json"),
    "deep": (lambda text: "[" * 100_000, "plan.json"),
    "unknown-key": (in_plan(lambda data: data.update(layer=3)), "'layers'"),
    "doubled-key": (lambda text: text.replace("{", '{"layers": [],', 1), "twice"),
    "head-99": (in_plan(lambda group: group.update(heads=[0, 1, 2, 3, 4, 99])), "99"),
    "head-twice": (in_plan(lambda group: group.update(heads=[0, 1, 2, 3, 4, 4])), "4"),
    "head-missing": (
        in_plan(lambda group: group.update(heads=[0, 1, 2])),
        "every one of the 6 heads",
    ),
    "head-negative": (in_plan(lambda group: group.update(heads=[-1, 0, 1, 2, 3, 4])), "-1"),
    "unknown-mixer": (in_plan(lambda group: group.update(mixer="slidin")), "'sliding'"),
    "hostile-mixer": (in_plan(lambda group: group.update(mixer="\x1b[2J[/x]")), "\\x1b[2J[/x]"),
    "unknown-option": (in_plan(lambda group: group["options"].update(windo=3)), "'window'"),
    "window-0": (in_plan(lambda group: group["options"].update(window=0)), "window"),
    "nan": (lambda text: text.replace("1.0", "NaN", 1), "nan"),
    "a-layer-less": (in_plan(lambda data: data["layers"].pop()), "layers"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plan_file(case: str, place: Place) -> None:
    act, named = PLANS[case]
    place.plan.write_text(act(place.plan.read_text()))
    assert named in refused(place.root, 2, "convert", place.model, "out", "--plan", place.plan)


def test_plan_that_replaces_nothing(place: Place) -> None:
    place.plan.unlink()
    good("plan", place.scores, "--model", place.model, "--budget", 4, "--out", place.plan)
    assert "nothing" in refused(place.root, 2, "convert", place.model, "out", "--plan", place.plan)


def test_plan_and_flags_that_choose(place: Place) -> None:
    line = refused(
        place.root, 2, "convert", place.model, "out", "--plan", place.plan, "--budget", 1
    )
    assert "--budget" in line


@pytest.mark.parametrize("name", ["plan", "scores", "recipe"])
@pytest.mark.parametrize("what", ["missing", "a-folder", "a-pipe", "not-text"])
def test_files_that_cannot_be_read(name: str, what: str, place: Place) -> None:
    file = place.root / ("bad.yaml" if name == "recipe" else "bad.json")
    if what == "a-folder":
        file.mkdir()
    elif what == "a-pipe":
        os.mkfifo(file)
    elif what == "not-text":
        file.write_bytes(b"\xff\xfe\x00")
    commands: dict[str, list[object]] = {
        "plan": ["convert", place.model, "out", "--plan", file],
        "scores": ["plan", file, "--model", place.model, "--out", "p.json"],
        "recipe": ["run", file, "--out", "o"],
    }
    assert file.name in refused(place.root, 2, *commands[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update(values=[[1.0]] * 3), "3 layers"),
        (lambda s: s.update(values=[[1.0]] * 3 + [[1e999]]), "finite"),
        (lambda s: s.update(value=[]), "'values'"),
        (lambda s: s.update(granularity="heads"), "'head'"),
    ],
    ids=["a-layer-less", "infinite", "unknown-key", "granularity"],
)
def test_scores_file(change: Callable[[Any], object], named: str, place: Place) -> None:
    data = json.loads(place.scores.read_text())
    change(data)
    place.scores.write_text(json.dumps(data))
    assert named in refused(
        place.root, 2, "plan", place.scores, "--model", place.model, "--out", "p.json"
    )


# --- What does not belong together --------------------------------------------------------------


def test_scores_of_another_model(place: Place) -> None:
    line = refused(place.root, 4, "plan", place.scores, "--model", place.other, "--out", "p.json")
    assert "another model" in line


def test_plan_of_another_model(place: Place) -> None:
    line = refused(place.root, 4, "convert", place.other, "out", "--plan", place.plan)
    assert "num_hidden_layers" in line
    config(model_type="mistral", sliding_window=None)(place.model)
    line = refused(place.root, 4, "convert", place.model, "out", "--plan", place.plan)
    assert "llama" in line and "mistral" in line


@pytest.mark.parametrize("which", ["other", "retrained"])
@pytest.mark.parametrize("command", ["distill", "evaluate", "verify"])
def test_hybrid_of_another_model(command: str, which: str, place: Place, hybrid: Path) -> None:
    source = place.other
    if which == "retrained":  # the same shapes, other weights
        source = place.model
        last_number(struct.pack("<f", 0.5))(source)
    calls = {
        "distill": ["--teacher", source, "--out", "o", "--data", place.text],
        "evaluate": ["--against", source, "--data", place.text],
        "verify": ["--against", source],
    }
    refused(place.root, 4, command, hybrid, *calls[command])


@pytest.mark.parametrize("command", ["distill", "evaluate", "verify"])
def test_folder_that_morph_did_not_write(command: str, place: Place) -> None:
    calls: dict[str, list[object]] = {
        "distill": ["--teacher", place.other, "--out", "o", "--data", place.text],
        "evaluate": ["--against", place.other, "--data", place.text],
        "verify": ["--against", place.other],
    }
    code = 6 if command == "verify" else 4  # any two folders can be compared
    assert "morph" in refused(place.root, code, command, place.model, *calls[command])


def test_hybrid_that_is_scored_again(place: Place) -> None:
    (place.root / "package").mkdir()
    shutil.copytree(place.model, place.root / "package", dirs_exist_ok=True)
    config(model_type="morph_llama", morph={"plan": json.loads(place.plan.read_text())})(
        place.root / "package"
    )
    line = refused(place.root, 3, "score", "package", "--selector", "uniform", "--out", "s.json")
    assert "hybrid" in line


# --- Recipes ------------------------------------------------------------------------------------

RECIPES = {
    "unknown-key": ("model: model\nselect: {selectr: nll}\n", "'selector'"),
    "unknown-section": ("model: model\nmixr: {name: sliding}\n", "'mixer'"),
    "doubled-key": ("model: model\nmodel: other\n", "twice"),
    "doubled-inner-key": ("model: model\nselect:\n  budget: 1\n  budget: 2\n", "twice"),
    "two-budgets": ("model: model\nselect: {budget: [2, 1/4]}\n", "budget"),
    "no-model": ("seed: 1\n", "model"),
    "wrong-type": ("model: model\nseed: one\n", "seed"),
    "no-yaml": ("model: [\n", "line"),
    "empty": ("", "mapping"),
    "code": ("model: !!python/object/apply:os.system [ls]\n", "tag"),
    "anchor": ("model: &a model\nout: *a\n", "anchors"),
    "unknown-selector": ("model: model\nselect: {selector: nil}\n", "'nll'"),
    "unknown-stage": ("model: model\ndistill: [{loss: logit, tokens: 1K}]\n", "'logits'"),
    "hostile": ('model: model\n"\\x1b[31m[/x]": 1\n', "\\x1b[31m[/x]"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", RECIPES)
def test_recipe(case: str, command: str, place: Place) -> None:
    text, named = RECIPES[case]
    (place.root / "r.yaml").write_text(text)
    more = ["--out", "o"] if command == "run" else []
    assert named in refused(place.root, 2, command, "r.yaml", *more)


@pytest.mark.parametrize("name", ["nowhere.yaml", "nowhere", "no/where", "text.txt"])
def test_recipe_that_is_missing(name: str, place: Place) -> None:
    refused(place.root, 2, "check", name)


def test_run_that_goes_nowhere(place: Place) -> None:
    (place.root / "r.yaml").write_text("model: model\ndata: {text: [text.txt]}\n")
    assert "--out" in refused(place.root, 2, "run", "r.yaml")


# --- Outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("out", ["model", "model/out", ".", "missing/out", "text.txt", "a\x1b[2Jb"])
@pytest.mark.parametrize("command", ["convert", "distill"])
def test_output_folder(
    command: str, out: str, force: list[str], place: Place, request: pytest.FixtureRequest
) -> None:
    call: list[object] = ["convert", place.model, out, "--plan", place.plan]
    if command == "distill":
        hybrid = request.getfixturevalue("hybrid")
        call = ["distill", hybrid, "--teacher", place.model, "--out", out, "--data", place.text]
    refused(place.root, 2, *call, *force)


def test_output_folder_that_exists(place: Place, hybrid: Path) -> None:
    line = refused(place.root, 2, "convert", place.model, hybrid, "--plan", place.plan)
    assert "--force" in line
    good("convert", place.model, hybrid, "--plan", place.plan, "--force")


def test_input_inside_the_output(place: Place) -> None:
    shutil.copytree(place.model, place.root / "outer" / "inner")
    (place.root / "outer" / "config.json").write_text("{}")
    line = refused(
        place.root, 2, "convert", "outer/inner", "outer", "--plan", place.plan, "--force"
    )
    assert "holds the input" in line


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("out", ["model/s.json", "missing/s.json", "text.txt", "model"])
def test_output_file(out: str, force: list[str], place: Place) -> None:
    given = ["--selector", "uniform", "--data", place.text, "--out", out, *force]
    refused(place.root, 2, "score", place.model, *given)


def test_output_file_that_exists(place: Place) -> None:
    score = ["score", place.model, "--selector", "uniform", "--out", place.scores]
    assert "--force" in refused(place.root, 2, *score)
    plan = ["plan", place.scores, "--model", place.model, "--out"]
    assert "--force" in refused(place.root, 2, *plan, place.plan)
    assert "input" in refused(place.root, 2, *plan, place.scores, "--force")


@pytest.mark.parametrize("out", ["model", "model/report", "text.txt"])
def test_output_of_evaluate_and_run(out: str, place: Place) -> None:
    refused(place.root, 2, "evaluate", place.model, "--data", place.text, "--out", out)
    (place.root / "r.yaml").write_text("model: model\ndata: {text: [text.txt]}\n")
    for force in ([], ["--force"]):
        refused(place.root, 2, "run", "r.yaml", "--out", out, *force)


@pytest.mark.parametrize("name", ["evaluation.json", "report.html"])
def test_report_that_exists(name: str, place: Place) -> None:
    (place.root / "full").mkdir()
    (place.root / "full" / name).write_text("mine")
    line = refused(place.root, 2, "evaluate", place.model, "--data", place.text, "--out", "full")
    assert "--force" in line


def test_run_into_a_folder_with_other_files(place: Place) -> None:
    (place.root / "full").mkdir()
    (place.root / "full" / "mine.txt").write_text("mine")
    (place.root / "r.yaml").write_text("model: model\ndata: {text: [text.txt]}\n")
    refused(place.root, 2, "run", "r.yaml", "--out", "full")


# --- Text ---------------------------------------------------------------------------------------


def commands_with_text(place: Place, hybrid: Path, *data: object) -> dict[str, list[object]]:
    return {
        "score": ["score", place.model, *WINDOW, *TASK, "--out", "s.json", *data],
        "evaluate": ["evaluate", place.model, "--set", "evaluate.tasks=[single_2]", *data],
        "distill": ["distill", hybrid, "--teacher", place.model, "--out", "o", *data, *SHORT],
    }


@pytest.mark.parametrize("command", ["score", "evaluate", "distill"])
def test_no_text_given(command: str, place: Place, hybrid: Path) -> None:
    assert "--data" in refused(place.root, 2, *commands_with_text(place, hybrid)[command])


TEXTS: dict[str, tuple[str, bytes | None]] = {
    "missing": ("gone.txt", None),
    "empty": ("empty.txt", b" \n"),
    "not-text": ("bad.txt", b"a\xff"),
    "unknown-kind": ("bad.pdf", b"text"),
    "no-json": ("bad.json", b"["),
    "json-without-texts": ("bad.json", b'{"a": 1}'),
    "hostile-name": ("a\x1b[31m[/x].txt", None),
}


@pytest.mark.parametrize("command", ["score", "evaluate", "distill"])
@pytest.mark.parametrize("case", TEXTS)
def test_text_that_cannot_be_read(case: str, command: str, place: Place, hybrid: Path) -> None:
    name, content = TEXTS[case]
    if content is not None:
        (place.root / name).write_bytes(content)
    call = commands_with_text(place, hybrid, "--data", name)[command]
    assert name.replace("\x1b", "\\x1b") in refused(place.root, 3, *call)


@pytest.mark.parametrize("command", ["score", "evaluate", "distill"])
def test_context_longer_than_the_text(command: str, place: Place, hybrid: Path) -> None:
    longer = {
        "score": ["--set", "select.seq_len=100000"],
        "evaluate": ["--set", "evaluate.seq_len=100000", "--set", "evaluate.lengths=[64]"],
        "distill": ["--set", "distill.logits.seq_len=100000"],
    }
    call = commands_with_text(place, hybrid, "--data", place.text)[command]
    call = [x for x in call if not str(x).startswith(("select.seq_len", "distill.logits.seq_len"))]
    flags = [x for i, x in enumerate(call) if x != "--set" or "=" in str(call[i + 1 : i + 2])]
    assert "token" in refused(place.root, 3, *flags, *longer[command])


# --- Disk and Ctrl-C ----------------------------------------------------------------------------


def convert(place: Place) -> list[object]:
    return ["convert", place.model, "out", "--plan", place.plan]


def test_too_little_space(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "1000 bytes free" in refused(place.root, 5, *convert(place))


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync", "rename"])
def test_disk_that_fills_up(
    call: str, place: Place, unverified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        line = refused(place.root, 5, *convert(place), kept=call == "rename")
        assert "No space left" in line
    good(*convert(place))
    assert not list(place.root.glob(".out*"))


def test_disk_that_fills_up_under_a_small_file(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str, **kwargs: object) -> int:
        self.write_bytes(text.encode()[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    line = refused(place.root, 5, "score", place.model, "--selector", "uniform", "--out", "s.json")
    assert "No space left" in line


def test_file_size_limit(place: Place) -> None:
    """The system's own limit, in a process of its own."""
    before = hashes(place.root)
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from morph.cli import main\nmain(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, convert(place))],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert hashes(place.root) == before


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["write_checkpoint", "load_and_compare", "copy_file_range"])
def test_ctrl_c_while_converting(
    at: str, place: Place, unverified: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph import checkpoint
    from morph.pipeline import _verify

    owner: Any = {"write_checkpoint": checkpoint, "load_and_compare": _verify}.get(at, os)
    with monkeypatch.context() as patch:
        patch.setattr(owner, at, interrupt)
        refused(place.root, 7, *convert(place), kept=at == "load_and_compare")
    good(*convert(place))
    assert not list(place.root.glob(".out*"))


def test_ctrl_c_while_scoring(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from morph.selectors import uniform

    monkeypatch.setattr(uniform, "score", interrupt)
    refused(place.root, 7, "score", place.model, "--selector", "uniform", "--out", "s.json")


@contextlib.contextmanager
def stop_at_step_2() -> Iterator[Callable[[Any], None]]:
    def update(event: Any) -> None:
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    yield update


def test_ctrl_c_while_distilling(
    place: Place, hybrid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph import terminal
    from morph.checkpoint import Checkpoint

    def call(out: str) -> list[object]:
        return ["distill", hybrid, "--teacher", place.model, "--out", out, "--data", place.text,
                *SHORT]  # fmt: skip

    before = hashes(place.root)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "training", stop_at_step_2)
        code, out, err = morph(*call("one"))
    assert (code, out) == (7, "")
    assert err.splitlines()[-1].startswith("error: stopped")
    left = hashes(place.root)
    assert {k: v for k, v in left.items() if not k.startswith("one.distill")} == before
    assert "resuming after 2 steps" in good(*call("one"))
    good(*call("two"))
    one, two = (Checkpoint.open(place.root / name) for name in ("one", "two"))
    assert all(one.read_bytes(n) == two.read_bytes(n) for n in two.tensors)
    assert any(one.read_bytes(n) != Checkpoint.open(hybrid).read_bytes(n) for n in one.tensors)


def test_ctrl_c_in_a_run(place: Place, unverified: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from morph import terminal
    from morph.pipeline import _measure

    (place.root / "r.yaml").write_text(
        "model: model\ndata: {text: [text.txt]}\n"
        "select: {selector: uniform, budget: 2}\nmixer: {options: {window: 8}}\n"
        "distill: [{loss: logits, tokens: 1K, seq_len: 64, batch_size: 2}]\n"
        "evaluate: {tasks: [single_2], lengths: [128], examples: 2, depths: 2, seq_len: 64,\n"
        "  perplexity_tokens: 128, speed_length: 16, decode_tokens: 2, baselines: [window]}\n"
    )
    run = ["run", "r.yaml", "--out", "o"]
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "training", stop_at_step_2)
        assert morph(*run)[0] == 7
    assert not (place.root / "o" / "checkpoint").exists()
    with monkeypatch.context() as patch:
        patch.setattr(_measure, "beside", interrupt)
        code, _, err = morph(*run)
        assert code == 7
        assert "resuming after 2 steps" in err
    written = hashes(place.root / "o" / "checkpoint")
    assert written and not list((place.root / "o").rglob("*partial*"))
    err = good(*run)
    assert [line.split(":")[0] for line in err.splitlines() if "unchanged" in line] == [
        *("scores", "plan", "checkpoint")
    ]
    assert hashes(place.root / "o" / "checkpoint") == written
    assert (place.root / "o" / "report.html").is_file()


# --- Hostile names ------------------------------------------------------------------------------


def test_hostile_names_do_not_drive_the_terminal(place: Place) -> None:
    (place.root / "a\x1b[31m[").mkdir()
    folder = place.root / "a\x1b[31m[" / "x]\n[bold]"
    place.model.rename(folder)
    (folder / "\x1b]0;owned\x07[red].txt").write_text("x")
    good_config = (folder / "config.json").read_text()
    config(dtype="\x1b[2J")(folder)
    code, out, err = morph("inspect", folder)
    assert code == 0, err
    assert "\x1b" not in out + err and "\x07" not in out + err
    assert "\\x1b[31m[/x]" in out
    line = refused(place.root, 3, "score", folder, "--selector", "uniform", "--out", "[red].json")
    assert "\\x1b[2J" in line
    (folder / "config.json").write_text(good_config)
    code, out, err = morph(
        "score", folder, "--selector", "uniform", "--set", "mixer.window=8", "--out", "[red].json"
    )
    assert code == 0, err
    assert "\x1b" not in out + err and "[red].json" in err


def test_hostile_model_type_and_tensor_names(place: Place) -> None:
    config(model_type="\x1b[2J[/x]")(place.model)
    line = refused(place.root, 3, "score", place.model, "--selector", "uniform", "--out", "s.json")
    assert "\\x1b[2J" in line
