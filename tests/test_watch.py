"""Watching a stage: what is measured, what is warned of, when it ends, and that a resume agrees."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from morph.distill._trackers import flat, open_trackers
from morph.distill._watch import QUANTILES, Watch, check, group_of, quantiles
from morph.errors import MismatchError, RecipeError, UsageError
from morph.recipes.schema import Stage, Training

STAGES = (
    Stage(loss="align", tokens=2048 * 100),
    Stage(loss="logits", tokens=2048 * 100),
    Stage(loss="long", tokens=2048 * 100, needles=0.5),
)
NAMES = [f"model.layers.{i}.self_attn.mixers.0.{g}" for i in (0, 3) for g in ("A_log", "dt_bias")]


def make_gates() -> dict[str, torch.nn.Parameter]:
    make = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(6, generator=make)) for n in NAMES}


def make(probe=None, **settings) -> tuple[Watch, list[str]]:
    notes: list[str] = []
    return Watch(Training(**settings), STAGES, probe, notes.append), notes


def recall(*values: float, teacher: float | None = 0.8):
    """A probe that finds these recalls in turn, the last one for ever."""
    left = list(values)

    def probe():
        found = {"recall": left.pop(0) if len(left) > 1 else left[0], "perplexity": 51.23456789}
        return found if teacher is None else {**found, "teacher_recall": teacher}

    return probe


# --- what is measured ---------------------------------------------------------------------------


def test_the_probe_is_asked_now_and_then_and_at_the_end_of_every_stage():
    watch, _ = make(recall(0.5), probe_every=4)
    asked = []
    for index in range(3):
        watch.begin(index, {}, None)
        found = [watch.after(index, step, 10, 1.0, None) for step in range(10)]
        asked.append([step for step, extra in enumerate(found) if "recall" in extra])
    assert asked == [[9], [3, 7, 9], [3, 7, 9]]
    assert found[3] == {"recall": 0.5, "perplexity": 51.2346, "teacher_recall": 0.8}
    assert found[0] == {}


def test_nothing_is_measured_without_being_asked_for():
    watch, _ = make(recall(0.5))
    watch.begin(1, make_gates(), None)
    found = [watch.after(1, step, 10, 1.0, None) for step in range(10)]
    assert [sorted(x) for x in found] == [["gates"], *[[]] * 8, ["gates"]]


def test_a_probe_changes_neither_random_state_nor_graphs():
    def probe():
        assert not torch.is_grad_enabled()
        torch.manual_seed(1)
        return {"recall": float(torch.rand(())), "perplexity": math.inf}

    watch, _ = make(probe, probe_every=1)
    watch.begin(1, {}, None)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    extra = watch.after(1, 0, 10, 1.0, None)
    assert torch.equal(torch.rand(3), expected) and torch.is_grad_enabled()
    assert extra["perplexity"] is None and json.dumps(extra, allow_nan=False)


def test_gates_are_summed_up_by_the_last_part_of_their_name():
    gates = make_gates()
    found = quantiles(gates)
    assert list(found) == ["A_log", "dt_bias"]
    both = torch.cat([gates[n].detach() for n in NAMES if n.endswith("A_log")]).numpy()
    np.testing.assert_allclose(found["A_log"], np.quantile(both, QUANTILES), rtol=1e-5)
    assert found["A_log"] == sorted(found["A_log"]) and len(json.dumps(found["A_log"])) < 90
    assert group_of("model.layers.3.self_attn.mixers.1.g.weight") == "g.weight"
    odd = {"a.x": torch.nn.Parameter(torch.tensor([math.nan, 1.0])), "b": torch.empty(0)}
    assert quantiles(odd) == {"x": [None] * 7}


def test_gates_are_logged_at_both_ends_and_with_every_probe():
    watch, _ = make(probe_every=4)
    gates = make_gates()
    watch.begin(0, gates, None)
    found = [watch.after(0, step, 10, 1.0, {"0": 1.0}) for step in range(10)]
    assert [step for step, extra in enumerate(found) if "gates" in extra] == [0, 3, 7, 9]
    assert found[0]["gates"] == quantiles(gates)


# --- the recall target --------------------------------------------------------------------------


def test_a_stage_ends_where_recall_reaches_its_share_of_the_teachers():
    watch, _ = make(recall(0.7, 0.71, 0.72, 0.9), probe_every=2, recall_target=0.9)
    watch.begin(1, {}, None)
    seen = []
    for step in range(6):
        watch.after(1, step, 100, 1.0, None)
        seen.append(watch.reached())
    assert seen == [False] * 5 + [True]  # 0.72 is 0.9 * 0.8
    watch.begin(2, {}, None)
    assert not watch.reached()


def test_align_never_ends_early():
    watch, _ = make(recall(1.0), probe_every=1, recall_target=0.5)
    watch.begin(0, {}, None)
    extra = watch.after(0, 9, 10, 1.0, {"0": 1.0})
    assert extra["recall"] == 1.0 and not watch.reached()


def test_a_teacher_of_unknown_recall_counts_as_right():
    watch, _ = make(recall(0.85, 0.95, teacher=None), probe_every=1, recall_target=0.9)
    watch.begin(1, {}, None)
    watch.after(1, 0, 10, 1.0, None)
    assert not watch.reached()
    watch.after(1, 1, 10, 1.0, None)
    assert watch.reached()


def test_a_teacher_that_recalls_nothing_ends_no_stage():
    watch, notes = make(recall(0.0, teacher=0.0), probe_every=1, recall_target=0.9)
    watch.begin(1, {}, None)
    for step in range(5):
        watch.after(1, step, 10, 1.0, None)
    assert not watch.reached() and len(notes) == 1
    assert "stage 1 (logits), step 0" in notes[0] and "probe_task" in notes[0]


@pytest.mark.parametrize(
    ("settings", "probe", "words"),
    [
        ({"recall_target": 0.9}, recall(1.0), "training.probe_every"),
        ({"recall_target": 0.9, "probe_every": 5}, None, "no probe was given"),
    ],
)
def test_a_target_that_nothing_measures_is_refused(settings, probe, words):
    with pytest.raises(RecipeError, match=words):
        check(Training(**settings), probe)
    with pytest.raises(RecipeError, match="recall_target: 0.9"):
        make(probe, **settings)
    check(Training(probe_every=5), None)


# --- warnings -----------------------------------------------------------------------------------


def train(watch, gates, index, losses, steps=100, start=0, still=()):
    """Take steps in which every gate moves, except those that stand still."""
    records = []
    for step, loss in enumerate(losses, start):
        with torch.no_grad():
            for name, p in gates.items():
                p.add_(0.0 if name in still else 1e-3)
        layers = loss if isinstance(loss, dict) else None
        records.append(watch.after(index, step, steps, 1.0 if layers else loss, layers))
    return records


def test_a_gate_that_has_not_moved_is_named_once():
    watch, notes = make()
    gates = make_gates()
    watch.begin(1, gates, None)
    still = [n for n in NAMES if n.endswith("dt_bias")]
    train(watch, gates, 1, [1.0] * 19, still=still)
    assert notes == []
    train(watch, gates, 1, [1.0] * 81, start=19, still=still)
    (note,) = notes
    assert note.startswith("stage 1 (logits), step 19: ") and "have not moved" in note
    assert all(name in note for name in still) and "A_log" not in note
    assert "gate_lr (0.01)" in note and "change 0)" in note


def test_a_tiny_move_is_none_and_a_gate_at_zero_may_move():
    watch, notes = make()
    gates = {n: torch.nn.Parameter(torch.full((4,), v)) for n, v in (("a", 2.0), ("b", 0.0))}
    watch.begin(1, gates, None)
    for step in range(30):
        with torch.no_grad():
            gates["a"][1] = 2.0 * (1 + 5e-5)
            gates["b"][3] = 2e-6
        watch.after(1, step, 100, 1.0, None)
    assert len(notes) == 1 and "a has not moved" in notes[0] and "5e-05" in notes[0]


def test_gates_are_not_judged_too_soon_nor_where_none_trains():
    watch, notes = make()
    gates = make_gates()
    watch.begin(1, gates, None)
    train(watch, gates, 1, [1.0] * 19, steps=19, still=NAMES)  # too short a stage to tell
    watch.begin(1, gates, None)
    train(watch, gates, 1, [1.0] * 199, steps=1000, still=NAMES)
    assert notes == []
    train(watch, gates, 1, [1.0], steps=1000, start=199, still=NAMES)
    assert len(notes) == 2  # one for A_log, one for dt_bias
    frozen = Watch(Training(), [Stage(loss="align", tokens=1, gate_lr=0.0)], None, notes.append)
    frozen.begin(0, gates, None)
    train(frozen, gates, 0, [{"0": 1.0}] * 100, still=NAMES)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("errors", "warned"),
    [
        ([0.5, 0.02, 0.19], False),  # less than ten times the best
        ([0.5, 0.02, 0.21], True),
        ([0.5, 0.4, 1.49], False),
        ([0.5, 0.4, 1.51], True),  # three times the first
        ([0.01, 0.001, 0.09], False),  # much worse, and still nothing
    ],
)
def test_a_layer_whose_error_explodes_is_named_once(errors, warned):
    watch, notes = make()
    watch.begin(0, {}, None)
    train(watch, {}, 0, [{"7": x, "8": 0.5} for x in [*errors, errors[-1]]])
    assert len(notes) == warned
    if warned:
        assert "stage 0 (align), step 2" in notes[0] and "layer 7" in notes[0]
        assert f"{errors[-1]:.3g}" in notes[0] and "lower lr (0.001)" in notes[0]


def test_a_loss_that_explodes_is_said_once_a_stage():
    watch, notes = make()
    watch.begin(1, {}, None)
    train(watch, {}, 1, [1.0] * 20 + [2.9])
    assert notes == []
    train(watch, {}, 1, [3.1, 9.0, 30.0], start=21)
    assert len(notes) == 1 and "step 21" in notes[0] and "the loss of text is 3.1" in notes[0]
    watch.begin(1, {}, None)
    train(watch, {}, 1, [1e-6, 1e-5, 1e-4, 9e-3])  # a student that is the teacher: noise
    assert len(notes) == 1


def test_needle_batches_are_compared_with_needle_batches():
    """They alternate with text whose loss is much larger; one wrong answer is no explosion."""
    watch, notes = make()
    watch.begin(2, {}, None)
    losses = [0.1 if step % 2 else 3.0 for step in range(40)]
    train(watch, {}, 2, [*losses, 3.0, 1.0, *losses])
    assert notes == []
    train(watch, {}, 2, [3.0, 2.0] * 3, start=82)
    assert len(notes) == 1 and "needle batches" in notes[0]


# --- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 15, 20, 33, 60])
def test_a_resumed_watch_says_and_logs_the_same(cut):
    def losses(index):
        if index:
            return [1.0] * 30 + [5.0] * 40
        return [{"0": 0.5 / (s + 1) if s < 30 else 0.4, "3": 0.2} for s in range(70)]

    def fresh():
        return make(lambda: {"recall": 0.123456789, "teacher_recall": 0.1}, probe_every=7,
                    recall_target=0.9)  # fmt: skip

    for index in (0, 1):
        gates, still = make_gates(), NAMES[:1]
        watch, notes = fresh()
        watch.begin(index, gates, None)
        expected = train(watch, gates, index, losses(index), steps=70, still=still)
        assert len(notes) == 2  # an explosion and a gate
        first, said = fresh()
        gates = make_gates()
        first.begin(index, gates, None)
        records = train(first, gates, index, losses(index)[:cut], steps=70, still=still)
        saved = json.loads(json.dumps(first.state(), allow_nan=False))
        second, more = fresh()
        second.begin(index, gates, saved)
        assert second.reached() == first.reached()
        records += train(
            second, gates, index, losses(index)[cut:], steps=70, start=cut, still=still
        )
        assert json.dumps(records) == json.dumps(expected)
        assert said + more == notes
        assert second.state() == watch.state()


def test_the_state_of_another_stage_is_not_used_and_a_broken_one_is_refused():
    watch, _ = make()
    watch.begin(0, make_gates(), None)
    train(watch, make_gates(), 0, [{"0": 1.0}])
    saved = watch.state()
    watch.begin(1, {}, saved)
    assert watch.state()["first"] == {} and watch.state()["stage"] == 1
    for broken in ({"stage": 0}, {**saved, "best": {"0": "x"}}, {**saved, "smooth": {"text": [1]}}):
        with pytest.raises(MismatchError, match="stage 0"):
            watch.begin(0, make_gates(), broken)


def test_the_state_stays_small():
    gates = {f"layers.{i}.A": torch.nn.Parameter(torch.randn(5000)) for i in range(28)}
    watch, _ = make()
    watch.begin(0, gates, None)
    assert len(json.dumps(watch.state())) < 28 * 1200
    train(watch, gates, 0, [{"0": 1.0}] * 20)
    assert len(json.dumps(watch.state())) < 400  # the starts have served


# --- trackers -----------------------------------------------------------------------------------

RECORD = {
    "stage": 1, "name": "logits", "step": 3, "loss": 0.5, "tokens": 4096, "needles": True,
    "layers": {"0": 0.25, "3": math.nan}, "recall": None,
    "gates": {"A_log": [0, 1, 2, 3, 4, 5, None]},
}  # fmt: skip


class Told:
    """A tracker as accelerate has them; it may break."""

    def __init__(self, breaks=()):
        self.breaks, self.log_calls, self.finished = breaks, [], 0

    def start(self):
        if "start" in self.breaks:
            raise ConnectionError("no network\nhere.")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        if "log" in self.breaks:
            raise RuntimeError("gone")
        self.log_calls.append((step, values))

    def finish(self):
        self.finished += 1


class Process:
    def __init__(self, main=True):
        self.is_main_process = main


@pytest.fixture
def wandb(monkeypatch):
    """Put a stand-in where accelerate's tracker of wandb is; return it as one that breaks."""

    def put(*breaks):
        told = Told(breaks)
        monkeypatch.setattr("morph.distill._trackers._installed", lambda name: True)
        monkeypatch.setattr("accelerate.tracking.WandBTracker", lambda project, dir: told)
        return told

    return put


def test_records_are_told_flat(tmp_path, wandb):
    told = wandb()
    config = {"distill": [{"lr": 0.1}], "training": {"trackers": ["wandb"], "tokens": None}}
    with open_trackers(("wandb",), tmp_path / "new", Process(), config) as tell:
        tell(RECORD)
        tell({"loss": 1.0})
    points = dict(zip(("min", "p10", "p25", "p50", "p75", "p90"), range(6)))
    values = {"stage": 1, "step": 3, "loss": 0.5, "tokens": 4096, "needles": 1, "layers/0": 0.25}
    values |= {f"gates/A_log/{k}": v for k, v in points.items()}
    assert told.log_calls == [(4096, values), (2, {"loss": 1.0})]
    assert told.config == {
        "distill.0.lr": 0.1, "training.trackers": "['wandb']", "training.tokens": "None",
    }  # fmt: skip
    tell.close()
    assert told.finished == 1
    assert flat({"x": 10**400, "y": "1", "z": [1]}) == {}


def test_a_tracker_that_breaks_is_left_out_with_a_note(tmp_path, wandb):
    told, notes = wandb("log"), []
    with open_trackers(("wandb",), tmp_path, Process(), {}, notes.append) as tell:
        tell(RECORD)
        tell(RECORD)
    assert told.finished == 1 and len(notes) == 1
    assert "wandb is left out" in notes[0] and "gone" in notes[0]


def test_a_tracker_that_does_not_start_says_why(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb("start")
    with pytest.raises(UsageError, match="does not start: no network here. WANDB_MODE=offline"):
        open_trackers(("wandb",), tmp_path, Process(), {})


def test_a_tracker_that_is_not_installed_is_refused_on_every_process(tmp_path, monkeypatch):
    (tmp_path / "old_runs").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("old_runs", "no_such_tracker"):
        for main in (True, False):
            with pytest.raises(UsageError, match=f"pip install {name}"):
                open_trackers((name,), tmp_path, Process(main), {})


def test_other_processes_tell_nothing(tmp_path, wandb):
    told = wandb()
    with open_trackers(("wandb",), tmp_path, Process(main=False), {}) as tell:
        tell(RECORD)
    assert told.log_calls == [] and told.finished == 0


def test_tensorboard_gets_files_of_its_own(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"seed": 1, "training": {"recall_target": None}}
    with open_trackers(("tensorboard",), tmp_path, Accelerator(cpu=True), config) as tell:
        tell(RECORD)
        tell({**RECORD, "loss": 0.25, "tokens": 8192})
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert {"loss", "layers/0", "gates/A_log/p50"} <= set(read.Tags()["scalars"])
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(4096, 0.5), (8192, 0.25)]
    assert [p.name for p in tmp_path.iterdir()] == ["tensorboard"]
