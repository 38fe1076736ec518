"""`morph compare` end to end on a tiny model: the table, what is written, Ctrl-C, and refusals."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from morph import cli, surgery
from morph import comparison as compared
from morph.comparison import Comparison
from morph.errors import PlanError, StorageError
from morph.pipeline import _compare, _data, _judge, _next, _score, _select
from morph.pipeline._source import Source, open_source
from morph.recipes import schema
from morph.surgery import Memo, Morphable

REPO = Path(__file__).resolve().parent.parent
LAYERS, KV_HEADS = 4, 4
SETTINGS = {"mixer.window": "16", "select.task": "single_2", "select.examples": "4"}
SETTINGS |= {"select.seq_len": "128"}
SETS = [x for key, value in SETTINGS.items() for x in ("--set", f"{key}={value}")]
WRITTEN = {"compare.json", "compare.html", "compare.md", "budget.png", "agreement.png"}


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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and a text; nothing is ever written into it."""
    spec = importlib.util.spec_from_file_location("tiny", REPO / "examples" / "tiny_model.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("compare")
    text = tiny.NOVEL.read_text(encoding="utf-8")[:16_000]
    (root / "text.txt").write_text(text, encoding="utf-8")
    tiny.tokenizer(text).save_pretrained(root / "model")
    tiny.model(num_hidden_layers=LAYERS).save_pretrained(root / "model")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(place: Path, *more: object) -> list[object]:
    return ["compare", place / "model", "--data", place / "text.txt", *SETS, *more]


def recipe(place: Path, **sets: str) -> schema.Recipe:
    """The recipe of `call`; keywords are dotted names, with _ for the first dot."""
    raw = {"model": str(place / "model"), "data": {"text": [str(place / "text.txt")]}}
    changed = SETTINGS | {name.replace("_", ".", 1): value for name, value in sets.items()}
    if changed.get("mixer.name") == "decay":
        changed.pop("mixer.window")
    return schema.from_data(schema.apply_sets(raw, [f"{k}={v}" for k, v in changed.items()]))


def table(
    place: Path,
    selectors: str,
    budgets: str = "1/4",
    sets: dict[str, str] | None = None,
    **how: Any,
) -> Comparison:
    """Compare without writing anything."""
    found = _judge.candidates(selectors)
    return _compare.compare(recipe(place, **(sets or {})), found, budgets.split(","), **how)


# --- What a run leaves behind -------------------------------------------------------------------


class Run(NamedTuple):
    """One command, its folder and what it read back."""

    result: Result
    out: Path
    found: Comparison


@pytest.fixture(scope="module")
def made(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("made") / "some new" / "table"
    names = "nll,kl:mode=remove:bootstrap=0,fisher,consa:scope=layer,random,uniform"
    given = ("--selectors", names, "--budgets", "1/4,1/2", "--seeds", 2, "--out", out, "--json")
    result = morph(*call(place, *given))
    assert result.code == 0, result.err
    return Run(result, out, compared.loads((out / "compare.json").read_text()))


def test_the_json_is_what_loads_reads(made: Run) -> None:
    text = (made.out / "compare.json").read_text()
    assert compared.dumps(made.found) == text
    assert json.loads(made.result.out) == json.loads(text)
    assert made.found.budgets == ("1/4", "1/2")
    assert (made.found.task, made.found.examples, made.found.seq_len) == ("single_2", 4, 128)
    assert made.found.mixer_options["window"] == 16
    assert made.found.default == "nll + swaps"


def test_page_and_pictures_and_nothing_else(made: Run) -> None:
    assert {p.name for p in made.out.iterdir()} == WRITTEN
    assert "compare.html" in made.result.err and "compare.md" in made.result.err
    for name in ("budget.png", "agreement.png"):
        assert (made.out / name).read_bytes().startswith(b"\x89PNG")
    twin = (made.out / "compare.md").read_text()
    assert "kl mode=remove bootstrap=0" in twin and "- consa scope=layer" in twin


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(
    made: Run, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from morph import terminal

    monkeypatch.setenv("COLUMNS", str(columns))
    terminal.comparison(made.found)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= columns and line == line.rstrip() for line in lines)
    assert lines[0].split() == ["1/4", "1/2", "passes", "CPU", "s"]
    assert lines[1].startswith("best set")
    names = [line.split("  ")[0] for line in lines]
    assert "nll + swaps *" in names and "random (baseline)" in names and "fisher" in names


def test_regret_is_never_negative_and_zero_for_the_best_set(made: Run) -> None:
    for best in made.found.best:
        count = len(best.kept)
        assert best.exhaustive and best.sets_tried == math.comb(LAYERS, count)
        at = [e for e in made.found.entries if e.budget == best.budget]
        assert all(e.regret is not None and e.regret >= 0 for e in at)
        assert all(e.regret == pytest.approx(e.loss - best.loss, abs=1e-6) for e in at)
        assert all(e.regret == 0 for e in at if e.kept == best.kept)
        assert all(e.held_out_regret is not None and e.held_out_regret >= 0 for e in at)
        assert len({len(e.kept) for e in at} | {count}) == 1
    assert any(e.regret for e in made.found.entries)


def test_swaps_never_make_it_worse(made: Run) -> None:
    plain = {(e.label, e.budget): e for e in made.found.entries if e.swaps is None}
    swapped = [e for e in made.found.entries if e.swaps is not None]
    assert {e.selector for e in swapped} == {"nll", "kl", "fisher"}
    for entry in swapped:
        before = plain[entry.label.replace(" + swaps", ""), entry.budget]
        assert entry.loss <= before.loss + 1e-6
        assert entry.forwards > before.forwards
        assert (entry.kept != before.kept) == bool(entry.swaps)


def test_the_best_set_is_that_of_a_slow_search(made: Run, place: Path) -> None:
    """Every pair of layers by plain forwards, nothing shared or reused."""
    asked = recipe(place)
    source = open_source(asked.model)
    corpus = _data.corpus(asked.data, source.tokenizer())
    batches = _data.calibration(asked.select, corpus, source.tokenizer(), 0)
    with surgery.morphable(source.model(), "sliding", {"window": 16}) as probe:
        pairs = list(itertools.combinations([(i, 0) for i in range(LAYERS)], 2))
        losses = {pair: probe.nll(batches, pair) for pair in pairs}
        ends = probe.nll(batches, [(i, 0) for i in range(LAYERS)]), probe.nll(batches, [])
    best = made.found.best_at("1/2")
    assert best is not None
    assert best.kept == min(losses, key=losses.__getitem__)
    assert best.loss == pytest.approx(min(losses.values()), rel=1e-5)
    assert (made.found.source_loss, made.found.cheap_loss) == pytest.approx(ends, rel=1e-5)


def test_a_selector_draws_as_often_as_it_should(made: Run) -> None:
    rows = compared.rows(made.found)
    labels = {name: [e.label for e in rows[name] if e.budget == "1/4"] for name in rows}
    assert labels["fisher"] == ["fisher (seed 0)", "fisher (seed 1)"]
    assert labels["fisher + swaps"] == ["fisher + swaps (seed 0)", "fisher + swaps (seed 1)"]
    assert labels["random"] == [f"random (seed {n})" for n in range(5)]
    assert labels["nll"] == ["nll"] and labels["uniform"] == ["uniform"]
    assert made.found.seeds == (0, 1)


def test_options_are_in_the_name_and_in_the_scores(made: Run) -> None:
    rows = compared.rows(made.found)
    assert "kl mode=remove bootstrap=0" in rows and "kl mode=remove bootstrap=0 + swaps" in rows
    agreement = made.found.agreement
    assert set(agreement) == {"nll", "kl mode=remove bootstrap=0", "fisher", "random", "uniform"}
    assert all(agreement[a][a] == pytest.approx(1) for a in agreement)


def test_what_cannot_run_is_left_out_with_a_note(made: Run) -> None:
    """consa with scope=layer keeps the same number of units in every layer, which have one each."""
    assert not any(e.selector == "consa" for e in made.found.entries)
    notes = [note for note in made.found.notes if note.startswith("consa scope=layer")]
    assert len(notes) == 1 and "selector.scope=global" in notes[0]
    left = [line for line in made.result.err.splitlines() if "left out: " in line]
    assert len(left) == 1 and left[0].startswith("consa scope=layer")


def test_a_model_that_recalls_nothing_is_told_before_the_work(made: Run) -> None:
    lines = made.result.err.splitlines()
    warned = next(n for n, line in enumerate(lines) if "no recall that a selector" in line)
    assert lines[warned].startswith("warning: ") and warned < lines.index("nll ...")
    assert any("no recall" in note for note in made.found.notes)


def test_the_next_command_scores_by_the_best_row(made: Run, here: Path) -> None:
    command = shlex.split(made.result.err.splitlines()[-1])
    assert command[:3] == ["next:", "morph", "score"]
    rows: dict[str, list[float]] = {}
    for entry in made.found.entries:
        rows.setdefault(entry.selector, []).append(entry.regret or 0.0)
    assert command[command.index("--selector") + 1] == min(
        rows, key=lambda name: sum(rows[name]) / len(rows[name])
    )
    result = morph(*command[2:])
    assert result.code == 0, result.err


def test_the_next_command_carries_options_and_seed(place: Path, here: Path) -> None:
    asked = recipe(place, seed="3", dtype="bfloat16")
    found = table(place, "kl:mode=remove:bootstrap=0", with_swaps=False)
    command = _next.after_compare(asked, found, SETS[1::2])
    for pair in ("--selector kl", "--set selector.mode=remove", "--seed 3", "--dtype bfloat16"):
        assert f" {pair}" in " ".join(command)
    assert morph(*command, "--dry-run").code == 0


# --- Searches, units, mixers --------------------------------------------------------------------


def test_not_every_set_is_tried_where_there_are_too_many(place: Path, made: Run) -> None:
    found = table(place, "uniform,random", "1/4,1/2", max_sets=1)
    for best in found.best:
        full = made.found.best_at(best.budget)
        assert full is not None and not best.exhaustive
        at = [e for e in found.entries if e.budget == best.budget]
        assert full.loss - 1e-6 <= best.loss <= min(e.loss for e in at)
        assert all(e.regret is not None and e.regret >= 0 for e in at)
        assert best.sets_tried > len({e.kept for e in at})  # the swaps on the best of them
    assert {b.exhaustive for b in table(place, "uniform", "1/4,1/2", max_sets=4).best} == {
        True,
        False,
    }


def test_kv_heads_are_chosen_one_by_one(place: Path) -> None:
    sets = {"select_granularity": "kv_head"}
    found = table(place, "nll,uniform", "1/8,1/4", sets, max_sets=150, with_swaps=False)
    assert found.granularity == "kv_head"
    assert [(len(b.kept), b.exhaustive) for b in found.best] == [(2, True), (4, False)]
    for entry in found.entries:
        assert all(0 <= i < LAYERS and 0 <= u < KV_HEADS for i, u in entry.kept)
        assert len(set(entry.kept)) == len(entry.kept) == {"1/8": 2, "1/4": 4}[entry.budget]
        assert entry.regret is not None and entry.regret >= 0
    assert found.best[0].sets_tried == math.comb(LAYERS * KV_HEADS, 2)


def test_budgets_of_every_kind(place: Path) -> None:
    found = table(place, "uniform", "1,25%,0.5,512B")
    assert [len(b.kept) for b in found.best] == [1, 1, 2, 2]


def test_the_same_twice_but_for_the_clock(place: Path) -> None:
    one, two = (
        json.loads(compared.dumps(table(place, "fisher", with_swaps=False))) for _ in range(2)
    )
    for told in (one, two):
        for entry in told["entries"]:
            entry.pop("cpu_seconds")
    assert one == two


def test_mixers_are_aligned_once_for_all(place: Path, here: Path) -> None:
    said: list[str] = []
    asked = recipe(place, mixer_name="decay", select_align="512")
    found = _judge.candidates("nll,kl:bootstrap=0")
    one = _compare.compare(asked, found, ["1/4"], out=here / "o", say=said.append)
    assert sum(line.startswith("aligning decay") for line in said) == 1
    assert [p.name[:6] for p in (here / "o").iterdir()] == ["align-"]
    two = _compare.compare(asked, found, ["1/4"], out=here / "o", say=said.append)
    assert sum(line.startswith("aligned mixers are at hand") for line in said) == 1
    assert [e.loss for e in one.entries] == [e.loss for e in two.entries]


# --- Ctrl-C -------------------------------------------------------------------------------------


class Stop:
    """Progress that stops the run at its n-th event."""

    def __init__(self, at: int) -> None:
        self.at, self.events = at, 0

    def __call__(self, done: int, total: int) -> None:
        self.events += 1
        if self.events == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], float]]:
    """What was computed since the last question, in layers over whole batches."""
    total = 0.0
    count = Morphable.count

    def counting(self: Morphable, layers: float, batch: Any) -> None:
        nonlocal total
        total += layers
        count(self, layers, batch)

    def since() -> float:
        nonlocal total
        found, total = total, 0.0
        return found

    monkeypatch.setattr(Morphable, "count", counting)
    yield since


SLOW = "nll,halo,fisher,flashmorph:steps=22:batch_size=2"


def command(place: Path, out: Path, at: int = 0, selectors: str = SLOW, **sets: str) -> Comparison:
    """Compare, keeping what was measured in `out`; stop at event `at`."""
    return table(place, selectors, "1/4", sets, out=out, progress=Stop(at))


def memos(out: Path) -> list[Path]:
    return sorted(out.glob(".memo-*"))


def test_after_ctrl_c_the_same_command_goes_on(
    place: Path, tmp_path: Path, spent: Callable[[], float]
) -> None:
    whole = command(place, tmp_path / "whole")
    full, parts = spent(), []
    out = tmp_path / "stopped"
    for at in (3, 12, 50):  # in a sweep, in the one after it, in what trains
        with pytest.raises(KeyboardInterrupt):
            command(place, out, at)
        assert memos(out)
        parts.append(spent())
    found = command(place, out)
    rest = spent()
    assert rest < full / 2
    assert sum(parts) + rest < 1.7 * full
    assert not list(out.iterdir())
    for one, two in zip(whole.entries, found.entries):
        assert (one.label, one.kept, one.loss, one.regret) == (
            *(two.label, two.kept, two.loss, two.regret),
        )
        # what the stopped runs spent is still on the bill
        assert two.forwards >= one.forwards - 1e-9 and two.backwards >= one.backwards - 1e-9
    assert [b.kept for b in whole.best] == [b.kept for b in found.best]


@pytest.mark.parametrize("changed", [{"mixer_window": "32"}, {"dtype": "bfloat16"}])
def test_what_was_measured_for_other_inputs_is_not_used(
    changed: dict[str, str], place: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        command(place, tmp_path / "o", 4, "nll")
    found = command(place, tmp_path / "o", 0, "nll", **changed)
    fresh = command(place, tmp_path / "fresh", 0, "nll", **changed)
    keys = [(e.label, e.kept, e.loss, e.forwards) for e in found.entries]
    assert keys == [(e.label, e.kept, e.loss, e.forwards) for e in fresh.entries]


def test_what_a_given_up_selector_left_is_removed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        command(place, tmp_path / "o", 4, "nll")
    assert memos(tmp_path / "o")
    command(place, tmp_path / "o", 0, "uniform")
    assert not list((tmp_path / "o").iterdir())


def test_ctrl_c_at_the_command_line(
    place: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph import terminal

    with monkeypatch.context() as patch:
        patch.setattr(terminal, "measuring", lambda: contextlib.nullcontext(Stop(3)))
        result = morph(*call(place, "--selectors", "nll", "--budgets", "1/4"))
    assert (result.code, result.out) == (7, "")
    assert result.err.splitlines()[-1].startswith("error: stopped")
    again = morph(*call(place, "--selectors", "nll", "--budgets", "1/4"))
    assert again.code == 0, again.err
    assert {p.name for p in (here / "compare").iterdir()} == WRITTEN


def test_a_full_disk_is_no_selector_that_cannot_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Memo, key: str, value: list[float]) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(Memo, "put", full)
    with pytest.raises(StorageError):
        command(place, tmp_path / "o", 0, "nll")


# --- Outputs ------------------------------------------------------------------------------------


def refused(root: Path, *arguments: object, code: int = 2) -> str:
    """Assert that a command fails as it should and writes nothing; return its error line."""
    before = sorted(root.rglob("*"))
    result = morph(*arguments)
    lines = result.err.splitlines()
    assert (result.code, result.out) == (code, ""), result.err
    assert "Traceback" not in result.err and lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert sorted(root.rglob("*")) == before
    return lines[-1]


def test_an_output_that_exists_needs_force(place: Path, here: Path) -> None:
    quick = call(place, "--selectors", "uniform", "--budgets", "1/4", "--out", "o")
    (here / "o").mkdir()
    (here / "o" / "mine.txt").write_text("mine")
    for name in ("compare.json", "compare.html", "compare.md"):
        (here / "o" / name).write_text("old")
        assert "--force" in refused(here, *quick)
        (here / "o" / name).unlink()
    (here / "o" / "compare.md").write_text("old")
    result = morph(*quick, "--force")
    assert result.code == 0, result.err
    assert (here / "o" / "compare.md").read_text() != "old"
    assert (here / "o" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("out", ["model", "model/table", "text.txt"])
def test_no_output_into_the_inputs(out: str, force: list[str], place: Path) -> None:
    line = refused(place, *call(place, "--selectors", "uniform", "--out", place / out, *force))
    assert out.split("/")[0] in line


# --- Refusals -----------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], str]] = {
    "selector": (["--selectors", "nll,nil"], "Did you mean 'nll'"),
    "selector-none": (["--selectors", ","], "--selectors names none"),
    "selector-twice": (["--selectors", "nll,kl,nll"], "twice"),
    "selector-outside": (["--selectors", "no_such.package:thing"], "no_such.package:thing"),
    "selector-hostile": (["--selectors", "\x1b[2J"], "\\x1b[2J"),
    "option": (["--selectors", "nll,kl:mod=add"], "Did you mean 'mode'"),
    "option-value": (["--selectors", "nll,kl:mode=remov"], "Did you mean 'remove'"),
    "option-range": (["--selectors", "kl:bootstrap=-1"], "bootstrap"),
    "option-without-value": (["--selectors", "kl:mode"], "key=value"),
    "option-twice": (["--selectors", "kl:mode=add:mode=add"], "twice"),
    "option-yaml": (["--selectors", "kl:mode=["], "YAML"),
    "option-code": (["--selectors", "kl:mode=!!python/name:os.system"], "tag"),
    "budgets-none": (["--budgets", ","], "--budgets names none"),
    "budgets-twice": (["--budgets", "1/4,1/2,1/4"], "1/4 twice"),
    "budgets-word": (["--budgets", "1/4,lots"], "lots"),
    "budgets-too-many": (["--budgets", "1/4,5"], "4 layers"),
    "budgets-zero": (["--budgets", "1/4,0"], "budget"),
    "budgets-bytes": (["--budgets", "1/4,1B"], "256"),
    "seeds-0": (["--seeds", "0"], "--seeds"),
    "seeds-word": (["--seeds", "two"], "--seeds"),
    "seed": (["--seed", "-1"], "seed"),
    "max-sets": (["--max-sets", "many"], "--max-sets"),
    "granularity": (["--granularity", "kv_heads"], "Did you mean 'kv_head'"),
    "mixer": (["--mixer", "slidng"], "Did you mean 'sliding'"),
    "mixer-option": (["--set", "mixer.sinks=3"], "sinks"),
    "task": (["--set", "select.task_options.keys=2"], "passkeys"),
    "flag": (["--selector", "nll"], "--selectors"),
    "pinned": (["--set", "select.keep=[1]"], "select.keep"),
    "a-budget": (["--set", "select.budget=1/2"], "select.budget"),
    "a-selector": (["--set", "select.selector=fisher"], "select.selector"),
    "an-option": (["--set", "selector.mode=remove"], "select.options"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_before_anything_is_measured(
    case: str, place: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Source, "model", loaded)
    given, named = BAD[case]
    line = refused(here, *call(place), *given)
    assert named in line and "\x1b" not in line


def test_text_is_needed_and_must_suffice(place: Path, here: Path) -> None:
    bare = ["compare", place / "model", "--selectors", "uniform"]
    assert "--data" in refused(here, *bare)
    assert "gone.txt" in refused(here, *bare, "--data", "gone.txt", code=3)
    assert "tokens" in refused(here, *call(place, "--set", "select.examples=3")[:-4],
                               "--set", "select.seq_len=100000", code=3)  # fmt: skip


def test_the_pipeline_refuses_what_the_command_line_does(place: Path) -> None:
    with pytest.raises(PlanError, match="4 layers"):
        table(place, "uniform", "1/4,9")
    with pytest.raises(PlanError, match="'mode'"):
        table(place, "nll:mod=add")


def test_a_part_from_outside_is_named_with_its_options() -> None:
    found = _judge.candidates("nll, some.package:thing:width=3:deep=true")
    assert [c.label for c in found] == ["nll", "some.package:thing width=3 deep=True"]
    assert found[1].selector == "some.package:thing"
    assert found[1].options == {"width": 3, "deep": True}


def test_scores_of_a_row_are_those_of_the_score_command(place: Path) -> None:
    """A table judges what `morph score` and `morph plan` would choose."""
    asked = recipe(place, select_selector="fisher", select_budget="1/2")
    source = open_source(asked.model)
    corpus = _data.corpus(asked.data, source.tokenizer())
    scores = _score.score(source, asked.select, asked.mixer, corpus)
    plan, _ = _select.make_plan(scores, asked.select, asked.mixer, source)
    entry = next(e for e in table(place, "fisher", "1/2").entries if e.swaps is None)
    assert tuple(i for i, _ in entry.kept) == plan.full_layers
    assert entry.forwards == scores.provenance["forwards"]
    assert entry.backwards == scores.provenance["backwards"]
