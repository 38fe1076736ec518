"""`morph score` and `plan` around the selectors: resuming, cost, alignment, warnings, exchange.

Every selector runs once on the embedded checkpoint; what is not about recall runs on a smaller
model that knows nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from morph import cli, pipeline, registry
from morph import plan as planning
from morph.errors import PlanError
from morph.exchange import FORMATS
from morph.pipeline._source import Source
from morph.plan import Scores
from morph.recipes import schema

REPO = Path(__file__).resolve().parent.parent
CHECKPOINT = REPO / "examples" / "checkpoint"
SELECTORS = registry.names("selectors")
TINY = {"mixer.window": "16", "select.task": "single_2", "select.examples": "4"}
TINY |= {"select.seq_len": "128"}
SMALL = {"mixer.window": "64", "select.examples": "2", "select.seq_len": "160"}


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


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
    found = morph(*arguments)
    assert found.code == 0, found.err
    return found


def refused(*arguments: object, code: int = 2) -> str:
    """Assert that a command fails as it should in a working folder it leaves alone."""
    before = sorted(Path().rglob("*"))
    found = morph(*arguments)
    lines = found.err.splitlines()
    assert (found.code, found.out) == (code, ""), found.err
    assert lines[-1].startswith("error: ") and "Traceback" not in found.err
    assert sorted(Path().rglob("*")) == before
    return lines[-1]


class Place(NamedTuple):
    """A folder with a tiny random model and texts; nothing is written into it."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    def recipe(self, sets: Mapping[str, str], model: Path | None = None) -> schema.Recipe:
        """A recipe from `--set`-like pairs; {"x": ""} takes x out."""
        raw = {"model": str(model or self.model), "data": {"text": [str(self.text)]}}
        given = [f"{key}={value}" for key, value in sets.items() if value]
        return schema.from_data(schema.apply_sets(raw, given))

    def score(self, *more: object, sets: Mapping[str, str] = TINY) -> list[object]:
        """The command line of a score on the tiny model."""
        pairs = [x for key, value in sets.items() for x in ("--set", f"{key}={value}")]
        return ["score", self.model, "--data", self.text, *pairs, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    spec = importlib.util.spec_from_file_location("tiny", REPO / "examples" / "tiny_model.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    found = Place(tmp_path_factory.mktemp("scoring"))
    text = tiny.NOVEL.read_text(encoding="utf-8")
    found.text.write_text(text[:16_000], encoding="utf-8")
    (found.root / "other.txt").write_text(text[16_000:32_000], encoding="utf-8")
    tiny.tokenizer(text[:16_000]).save_pretrained(found.model)
    tiny.model(num_hidden_layers=4).save_pretrained(found.model)
    return found


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Every selector -----------------------------------------------------------------------------

# Selectors whose forwards are not predicted within a factor of 2 at these settings, and why
OFF: dict[str, str] = {}


def fast(selector: str) -> dict[str, str]:
    """Settings under which a selector needs about a second on the embedded checkpoint."""
    options = {name for name, _, _ in registry.options("selectors", selector)}
    steps = {"selector.steps": "3"} if "steps" in options else {}
    return {**SMALL, "select.selector": selector, **steps}


class Scored(NamedTuple):
    """A selector's dry run, its scores as they were written and read, and what was said."""

    estimate: dict[str, Any]
    found: Scores
    read: Scores
    said: list[str]


SCORED: dict[str, Scored] = {}


@pytest.fixture
def scored(request: pytest.FixtureRequest, place: Place, here: Path) -> Scored:
    """The selector that the test is parametrized with, run once in this process."""
    name = request.getfixturevalue("selector")
    if name not in SCORED:
        recipe = place.recipe(fast(name), CHECKPOINT)
        said: list[str] = []
        estimate = pipeline.score_estimate(recipe)
        found = pipeline.score_command(recipe, here / "s.json", say=said.append)
        read = planning.loads_scores((here / "s.json").read_text())
        assert sorted(p.name for p in here.iterdir()) == ["s.json"]
        SCORED[name] = Scored(estimate, found, read, said)
    return SCORED[name]


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_scores_and_is_read_back(selector: str, scored: Scored) -> None:
    found = scored.read
    assert found == scored.found and found.digest == scored.found.digest
    assert (found.selector, found.granularity, found.model_type) == (selector, "layer", "qwen3")
    assert [len(row) for row in found.values] == [1] * 8
    assert len({row[0] for row in found.values}) > 1
    assert not any("gets only" in line for line in scored.said)  # it can do the task


@pytest.mark.parametrize("selector", SELECTORS)
def test_provenance_says_how_the_numbers_came_about(selector: str, scored: Scored) -> None:
    how = scored.read.provenance
    looks = registry.load("selectors", selector).NEEDS != "weights"
    assert set(how["selector_options"]) == {n for n, *_ in registry.options("selectors", selector)}
    assert how["mixer"] == "sliding" and how["mixer_options"]["window"] == 64
    assert (how["task"], how["examples"], how["seq_len"], how["seed"]) == ("multikey", 2, 160, 0)
    for name in ("model_sha256", "data_sha256"):
        assert len(how[name]) == 64
    assert how["model"] == "checkpoint" and how["morph"]
    assert how["seconds"] >= 0 and how["cpu_seconds"] >= 0
    assert (how["tokens"] > 0) == (how["forwards"] > 0) == looks
    assert (how["backward_tokens"] > 0) == (how["backwards"] > 0)
    assert "measurements_reused" not in how


def predicted(selector: str) -> Any:
    why = OFF.get(selector)
    return pytest.param(selector, marks=[pytest.mark.xfail(reason=why)] if why else [])


@pytest.mark.parametrize("selector", [predicted(name) for name in SELECTORS])
def test_a_dry_run_predicts_the_passes(selector: str, scored: Scored) -> None:
    how, told = scored.read.provenance, scored.estimate
    examples = 2 * 160
    for kind, tokens in (("forwards", "tokens"), ("backwards", "backward_tokens")):
        spent = how[tokens] / examples
        assert spent / 2 <= told[kind] <= spent * 2, kind
    assert told["tokens"] == pytest.approx(
        (told["forwards"] + told["backwards"]) * examples, abs=0.1 * examples
    )
    assert told["expected_minutes"] >= 0


def test_a_dry_run_writes_nothing_and_loads_what_it_must(
    place: Place, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads(good(*place.score("--dry-run", "--json")).out)
    assert told["forwards"] > 1 and told["expected_minutes"] >= 0 and told["kept_full"] == 1
    assert not any(name.startswith("distillation") for name in told)
    assert not list(here.iterdir())
    result = good(*place.score("--dry-run"))
    assert "expected minutes" in result.out
    assert "--dry-run" not in result.err.splitlines()[-1]

    def loaded(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Source, "model", loaded)
    for more in (["--stream"], ["--selector", "uniform"]):
        assert good(*place.score("--dry-run", *more)).out
    told = json.loads(good("score", place.model, "--dry-run", "--json").out)  # no text
    assert told["forwards"] > 1 and told["expected_minutes"] is None


# --- Stopped and resumed ------------------------------------------------------------------------


class Stop:
    """Progress that stops the run at its n-th event."""

    def __init__(self, at: int) -> None:
        self.at, self.events = at, 0

    def __call__(self, done: int, total: int) -> None:
        self.events += 1
        if self.events == self.at:
            raise KeyboardInterrupt


def run(place: Place, out: str, sets: Mapping[str, str], at: int = 0) -> tuple[Scores, list[str]]:
    said: list[str] = []
    recipe = place.recipe(sets)
    return pipeline.score_command(recipe, Path(out), say=said.append, progress=Stop(at)), said


STOPPED = {  # settings, and the event at which the first run is stopped
    "nll": ({"select.granularity": "kv_head"}, 9),
    "kl": ({"selector.mode": "remove"}, 3),
    "beam": ({"select.budget": "2"}, 7),
    "halo": ({}, 3),
    "flashmorph": ({"selector.steps": "22", "select.examples": "2"}, 21),
    "fisher": ({"select.examples": "12", "select.task": "single_1"}, 1),
}


@pytest.mark.parametrize("selector", STOPPED)
def test_a_stopped_score_goes_on(selector: str, place: Place, here: Path) -> None:
    more, at = STOPPED[selector]
    sets = {**TINY, "select.selector": selector, **more}
    whole, _ = run(place, "whole.json", sets)
    with pytest.raises(KeyboardInterrupt):
        run(place, "s.json", sets, at)
    assert sorted(p.name for p in here.iterdir()) == ["s.json.partial", "whole.json"]
    found, said = run(place, "s.json", sets)
    assert sorted(p.name for p in here.iterdir()) == ["s.json", "whole.json"]
    assert found.values == whole.values and found.pairs == whole.pairs
    assert any(line.startswith("going on from s.json.partial: ") for line in said)
    assert found.provenance["measurements_reused"] >= 1
    assert found.provenance["tokens"] < whole.provenance["tokens"]


CHANGED = {
    "seed": {"seed": "1"},
    "text": {"data.text": "[other.txt]"},
    "window": {"mixer.window": "32"},
    "mixer": {"mixer.name": "decay", "mixer.window": "", "select.align": "0"},
    "dtype": {"dtype": "bfloat16"},
    "option": {"selector.mode": "greedy"},
    "granularity": {"select.granularity": "kv_head"},
    "selector": {"select.selector": "kl"},
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_inputs_start_over(
    change: str, place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("text.txt", "other.txt"):
        (tmp_path / name).write_bytes((place.root / name).read_bytes())
    with pytest.raises(KeyboardInterrupt):
        run(place, "s.json", TINY, 3)
    assert Path("s.json.partial").is_file()
    found, said = run(place, "s.json", {**TINY, **CHANGED[change]})
    assert "measurements_reused" not in found.provenance
    assert not any(line.startswith("going on") for line in said)
    fresh, _ = run(place, "fresh.json", {**TINY, **CHANGED[change]})
    assert found.values == fresh.values
    assert not Path("s.json.partial").exists()


def test_other_weights_start_over(place: Place, here: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(place, "s.json", SMALL, 3)
    recipe = place.recipe(SMALL, CHECKPOINT)
    found = pipeline.score_command(recipe, Path("s.json"))
    assert "measurements_reused" not in found.provenance
    assert not Path("s.json.partial").exists()


def test_a_line_that_a_crash_cut_off_is_measured_again(place: Place) -> None:
    whole, _ = run(place, "whole.json", TINY)
    with pytest.raises(KeyboardInterrupt):
        run(place, "s.json", TINY, 3)
    partial = Path("s.json.partial")
    partial.write_text(partial.read_text()[:-9])
    found, _ = run(place, "s.json", TINY)
    assert found.values == whole.values
    assert found.provenance["measurements_reused"] == 2


# --- Aligned mixers -----------------------------------------------------------------------------


def decay(*more: object, align: int = 2048, model: Path = CHECKPOINT) -> list[object]:
    """A score of the embedded checkpoint with the mixer decay; the text is in the folder."""
    sets = ["select.examples=2", "select.seq_len=160", f"select.align={align}"]
    pairs = [x for one in sets for x in ("--set", one)]
    return ["score", model, "--mixer", "decay", "--data", "text.txt", *pairs, *more]


def aligned(here: Path) -> list[str]:
    return sorted(p.name for p in here.glob("align-*"))


@pytest.fixture
def text(place: Place, here: Path) -> Path:
    """The text in the working folder."""
    (here / "text.txt").write_bytes(place.text.read_bytes())
    return here / "text.txt"


def test_mixers_are_aligned_once(text: Path, here: Path) -> None:
    first = good(*decay("--selector", "nll", "--out", "nll.json"))
    assert "aligning decay in every layer (2,048 tokens, once)" in first.err
    assert "aligned: relative error" in first.err
    files = aligned(here)
    assert len(files) == 1 and files[0].endswith(".safetensors")
    second = good(*decay("--selector", "kl", "--out", "kl.json"))
    assert f"aligned mixers are at hand: {files[0]}" in second.err
    assert "aligning" not in second.err and aligned(here) == files
    how = json.loads((here / "kl.json").read_text())["provenance"]
    assert how["align_tokens"] == 2048
    (here / files[0]).write_bytes(b"broken")
    third = good(*decay("--selector", "kl", "--out", "again.json"))
    assert "cannot be read" in third.err and aligned(here) == files
    values = [json.loads((here / name).read_text())["values"] for name in ("kl.json", "again.json")]
    assert values[0] == values[1]


def test_the_swap_pass_takes_the_same_mixers(text: Path, here: Path) -> None:
    scored = good(*decay("--selector", "lazy", "--budget", "2"))
    planned = good(*shlex.split(scored.err.splitlines()[-1])[2:])
    assert "aligned mixers are at hand" in planned.err and len(aligned(here)) == 1
    assert "D" in planned.out


def test_no_alignment_where_none_is_wanted_or_needed(place: Place, text: Path, here: Path) -> None:
    zero = good(*decay("--selector", "lazy", align=0, model=place.model))
    blind = good(*decay("--selector", "uniform", "--out", "u.json", model=place.model))
    window = good(*place.score("--selector", "lazy", "--out", "w.json"))
    assert not aligned(here)
    assert not any("align" in result.err.replace("select.align", "") for result in (zero, blind))
    assert "align" not in window.err


def test_another_seed_aligns_anew(place: Place, text: Path, here: Path) -> None:
    for seed in (0, 1):
        good(*decay("--selector", "lazy", "--seed", seed, "--force", align=512, model=place.model))
    assert len(aligned(here)) == 2


# --- Warnings -----------------------------------------------------------------------------------


def test_a_model_that_cannot_do_the_task(place: Place, here: Path) -> None:
    result = good(*place.score("--selector", "lazy", "--out", "s.json"))
    warned = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "single_2" in warned[0] and "select.task=text" in warned[0]
    share = warned[0].partition("gets only ")[2].partition("%")[0]
    assert 0 <= int(share) < 10
    how = json.loads((here / "s.json").read_text())["provenance"]
    assert how["warning"] == warned[0].removeprefix("warning: ")
    plain = {**TINY, "select.task": "text"}
    result = good(*place.score("--selector", "kl", "--out", "t.json", sets=plain))
    assert "warning" not in result.err


def test_a_window_that_covers_every_example(place: Place, here: Path) -> None:
    wide = {**TINY, "mixer.window": "512", "select.task": "text"}
    result = good(*place.score("--out", "s.json", sets=wide))
    assert "warning: every example (128 tokens) fits in what sliding sees exactly" in result.err
    found = planning.loads_scores((here / "s.json").read_text())
    assert all(abs(row[0]) < 1e-5 for row in found.values)
    assert "all scores are zero" in found.provenance["warning"]


# --- Passkeys -----------------------------------------------------------------------------------

PASSKEYS = {**TINY, "select.task": "passkeys", "select.seq_len": "400"}


@pytest.mark.parametrize("span", ["answer", "tail"])
def test_the_passkey_task(span: str, place: Place, here: Path) -> None:
    tiny = {"keys": "2", "words": "1", "label_span": span, "intervals": "2"}
    sets = PASSKEYS | {f"select.task_options.{key}": value for key, value in tiny.items()}
    result = good(*place.score("--out", "s.json", sets=sets))
    assert "scoring with nll (2 batches)" in result.err  # one a length
    how = json.loads((here / "s.json").read_text())["provenance"]
    assert how["task"] == "passkeys" and how["examples"] == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("{key: 2}", "'keys'"),
        ("{keys: two}", "task_options.keys"),
        ("{keys: 11}", "keys lie in 1-10"),
        ("{words: 0}", "words 0"),
        ("{label_span: all}", "label_span"),
        ("{}", "select.task_options.keys or .words"),
        ("{keys: 9, intervals: 1}", "9 passkeys of 32 words"),
    ],
)
def test_passkeys_that_cannot_be_made(options: str, named: str, place: Place) -> None:
    sets = {**PASSKEYS, "select.task_options": options}
    assert named in refused(*place.score(sets=sets), code=3)


def test_task_options_belong_to_passkeys(place: Place) -> None:
    line = refused(*place.score(sets={**TINY, "select.task_options": "{keys: 2}"}))
    assert "single_2" in line and "passkeys" in line


# --- Other tools' files -------------------------------------------------------------------------

# The granularity at which a format can be written
HELD = {
    "scores": "layer",
    "duo_attention": "kv_head",
    "retrieval_head": "head",
    "swaa": "layer",
    "keep_full_attention_layers": "layer",
}


def kept(file: str) -> list[tuple[int, int]]:
    """The (layer, head) pairs that stay full in a plan.json."""
    found = planning.loads_plan(Path(file).read_text())
    groups = [(i, g) for i, layer in enumerate(found.layers) for g in layer.groups]
    return [(i, h) for i, g in groups if g.mixer == "full" for h in g.heads]


def plan_of(place: Place, file: str, out: str, *more: object) -> Result:
    """Plan half of the tiny model's units without swaps."""
    window = ["--set", "mixer.window=16", "--budget", "1/2"]
    return good("plan", file, "--model", place.model, *window, "--out", out, *more)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_plans_the_same(format: str, place: Place, here: Path) -> None:
    named = ["--granularity", HELD[format], "--selector", "lazy", "--budget", "1/2"]
    result = good(*place.score(*named, "--out", "s.json", "--export", f"{format}=exported"))
    assert f"wrote exported ({format})" in result.err
    plan_of(place, "s.json", "ours.json")
    found = plan_of(place, "exported", "theirs.json")
    assert kept("ours.json") == kept("theirs.json") and len(kept("ours.json")) == 16
    assert "warning" not in found.err
    plan_of(place, "s.json", "again.json", "--export", f"{format}=planned")
    assert (here / "planned").read_bytes() == (here / "exported").read_bytes()


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "scores"])
def test_a_format_that_cannot_hold_the_scores_is_refused_at_once(
    format: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "layer" if HELD[format] != "layer" else "kv_head"
    good("score", place.model, "--selector", "uniform", "--granularity", wrong, "--out", "s.json")

    def loaded(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Source, "model", loaded)
    named = ["--granularity", wrong, "--export", f"{format}=exported"]
    assert f"--granularity {HELD[format]}" in refused(*place.score(*named, "--out", "t.json"))
    plan = ["plan", "s.json", "--model", place.model, "--out", "p.json"]
    assert HELD[format] in refused(*plan, "--export", f"{format}=exported")


def test_a_window_is_needed_to_name_one(place: Place) -> None:
    line = refused(*decay("--export", "swaa=x", model=place.model)[:4], "--export", "swaa=x")
    assert "sliding" in line


EXPORTS = {
    "unknown": (["--export", "swa=x"], "Did you mean 'swaa'"),
    "hostile": (["--export", "\x1b[2J=x"], "\\x1b[2J"),
    "no-file": (["--export", "swaa"], "FORMAT=FILE"),
    "twice": (["--export", "swaa=x", "--export", "swaa=y"], "given twice"),
    "one-file": (["--export", "swaa=x", "--export", "scores=./x"], "its own"),
    "the-output": (["--export", "swaa=s.json"], "its own"),
    "no-folder": (["--export", "swaa=gone/x"], "gone"),
    "there": (["--export", "swaa=there"], "--force"),
    "the-text": (["--export", "swaa={text}", "--force"], "is the input"),
    "the-model": (["--export", "swaa={model}/x"], "inside the input"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_bad_exports(case: str, place: Place, here: Path) -> None:
    (here / "there").write_text("mine")
    given, named = EXPORTS[case]
    words = [word.format(text=place.text, model=place.model) for word in given]
    assert named in refused(*place.score("--out", "s.json", *words))


FOREIGN = {  # of a model with 6 layers, 2 KV heads and 4 heads; the tiny one has 4, 4 and 8
    "duo_attention": "0.5\t0.25\n" * 6,
    "retrieval_head": json.dumps({f"{i}-{h}": [0.5] for i in range(6) for h in range(4)}),
    "swaa": json.dumps({"sliding_window_size": 16, "non_sliding_layers": [1, 5]}),
    "keep_full_attention_layers": "keep_full_attention_layers: [1, 5]\n",
    "none": "just words\n",
    "other-keys": '{"keep": [1, 2]}',
}


@pytest.mark.parametrize("format", FOREIGN)
def test_a_foreign_file_for_another_model(format: str, place: Place, here: Path) -> None:
    (here / "file").write_text(FOREIGN[format])
    line = refused("plan", "file", "--model", place.model, "--budget", "2", "--out", "p.json")
    assert "file" in line
    assert any(word in line for word in ("4 layers", "the model 4", "layers 0-3", "Give one of"))


def test_our_own_scores_of_another_model(place: Place, here: Path) -> None:
    good("score", CHECKPOINT, "--selector", "uniform", "--out", "s.json")
    line = refused("plan", "s.json", "--model", place.model, "--out", "p.json", code=4)
    assert "another model" in line


def swaa(window: int = 16, **more: Any) -> str:
    return json.dumps({"sliding_window_size": window, "non_sliding_layers": [1, 3], **more})


def test_a_foreign_file_and_what_the_plan_makes_of_it(place: Place, here: Path) -> None:
    (here / "f.json").write_text(swaa())
    assert kept_layers(plan_of(place, "f.json", "p.json")) == "1, 3"
    three = good("plan", "f.json", "--model", place.model, "--budget", 3, "--set",
                 "mixer.window=16", "--out", "q.json")  # fmt: skip
    assert "warning: swaa placed 2 units, the budget keeps 3" in three.err
    (here / "wide.json").write_text(swaa(window=64))
    wide = plan_of(place, "wide.json", "r.json")
    assert "the file is for a window of 64, the plan has 16" in wide.err
    assert "--set mixer.window=64" in wide.err
    (here / "decode.json").write_text(swaa(force_fa_decode=True))
    assert "note: force_fa_decode" in plan_of(place, "decode.json", "d.json").err


def kept_layers(result: Result) -> str:
    rows = dict(line.split("  ", 1) for line in result.out.splitlines() if "  " in line)
    return rows["full layers"].strip()


def test_scores_and_plan_of_different_windows(place: Place) -> None:
    good(*place.score("--selector", "lazy", "--out", "s.json"))
    same = plan_of(place, "s.json", "same.json")
    assert "warning" not in same.err
    other = good("plan", "s.json", "--model", place.model, "--out", "p.json")
    assert "measured with window=16, the plan has window=512" in other.err


PINS = {
    "both": (["--keep", "1", "--replace", "1"], "1 is both kept and replaced"),
    "overlapping": (["--keep", "1,2", "--replace", "3,2"], "2 is both kept and replaced"),
    "too-many-kept": (["--keep", "0,1,2"], "keep 3 units, the limit is 2"),
    "too-many-replaced": (["--replace", "0,1,2"], "only 1 are left"),
    "no-such-layer": (["--keep", "4"], "layer 4 does not exist (0-3)"),
    "no-such-unit": (["--keep", "1.1"], "layer 1 has no unit 1"),
}


@pytest.mark.parametrize("case", PINS)
def test_pins_that_contradict(case: str, place: Place, here: Path) -> None:
    (here / "f.json").write_text(swaa())
    given, named = PINS[case]
    line = refused("plan", "f.json", "--model", place.model, "--budget", 2, *given, "--out", "p")
    assert named in line


def test_pins_win_over_a_foreign_file(place: Place, here: Path) -> None:
    (here / "f.json").write_text(swaa())
    assert kept_layers(plan_of(place, "f.json", "p.json", "--keep", "0")) == "0, 1"
    assert kept_layers(plan_of(place, "f.json", "q.json", "--replace", "3")) == "0, 1"


# --- One layer in memory at a time --------------------------------------------------------------


@pytest.mark.parametrize("selector", ["nll", "kl"])
def test_a_streamed_score_is_the_same(selector: str, place: Place, here: Path) -> None:
    named = ["--selector", selector, "--json"]
    whole = json.loads(good(*place.score(*named, "--out", "w.json")).out)
    streamed = json.loads(good(*place.score(*named, "--out", "s.json", "--stream")).out)
    assert [x for row in streamed["values"] for x in row] == pytest.approx(
        [x for row in whole["values"] for x in row], abs=1e-6
    )
    assert sorted(p.name for p in here.iterdir()) == ["s.json", "w.json"]


@pytest.mark.parametrize("selector", ["fisher", "flashmorph", "consa", "duo"])
def test_gradients_are_not_streamed(
    selector: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Source, "streamed", loaded)
    line = refused(*place.score("--selector", selector, "--stream", "--budget", "2"))
    assert selector in line and "nll" in line


def test_mixers_are_not_aligned_while_streaming(place: Place, text: Path, here: Path) -> None:
    result = good(*decay("--stream", "--selector", "nll", model=place.model))
    assert "warning: decay is neither calibrated nor aligned" in result.err
    assert not aligned(here)


def test_the_pipeline_refuses_before_it_reads_weights(place: Place, here: Path) -> None:
    recipe = place.recipe({**TINY, "select.selector": "fisher"})
    with pytest.raises(PlanError, match="without --stream"):
        pipeline.score_command(recipe, here / "s.json", stream=True)
    assert not list(here.iterdir())


def test_a_training_that_stopped_early_says_so(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that turns to NaN ends the run with the last good state, and a warning where."""
    duo = registry.load("selectors", "duo")
    plain, seen = duo._gates.soft, []

    def poisoned(morphable, gates, full=None):
        seen.append(1)
        return plain(morphable, gates * math.nan if len(seen) == 4 else gates, full)

    monkeypatch.setattr(duo._gates, "soft", poisoned)
    settings = [x for k, v in TINY.items() for x in ("--set", f"{k}={v}")]
    found = good(
        *("score", place.model, "--selector", "duo", "--data", place.text),
        *(*settings, "--set", "selector.steps=9", "--out", tmp_path / "s.json"),
    )
    assert "warning: the loss is nan at step 3 of 9" in found.err
    assert json.loads((tmp_path / "s.json").read_text())["provenance"]["stopped"]


def test_a_plan_says_what_floor_the_method_keeps(place: Place, tmp_path: Path) -> None:
    """HydraHead keeps a full head in every layer; the budget has to ask for it."""
    file = tmp_path / "s.json"
    uniform = ("score", place.model, "--selector", "uniform", "--granularity", "head")
    good(*uniform, "--out", file)
    told = json.loads(file.read_text())
    told["provenance"]["min_full_per_layer"] = 1
    file.write_text(json.dumps(told))
    plan = ("plan", file, "--model", place.model, "--budget", "1/2", "--force")
    asked = good(*plan, "--out", tmp_path / "p.json")
    assert "--set select.min_full_per_layer=1" in asked.err
    floor = ("--set", "select.min_full_per_layer=1")
    kept = good(*plan, *floor, "--out", tmp_path / "p.json")
    assert "at least 1 full" not in kept.err
    made = planning.loads_plan((tmp_path / "p.json").read_text())
    assert all(any(g.mixer == "full" for g in layer.groups) for layer in made.layers)
