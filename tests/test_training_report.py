"""The report of a training: its picture has what the log has, and no log can break it."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from morph import report
from morph.report import _training
from morph.report._records import read_stages, stage_grid

HOSTILE = "<script>alert(1)</script>[/x]$\\frac{$|`\n\x1b[31m&雪 \ud800"
GROUPS = ("A_log", "dt_bias", "g.weight", HOSTILE)
COLOURS = {"text": (0, 114, 178), "needles": (230, 159, 0), "gates": (0, 158, 115)}


def make_log(stages=(("align", 12), ("logits", 40), ("long", 20)), *, layers=3, groups=GROUPS,
             needles=4, probes=True):  # fmt: skip
    """A log as `distill` writes it: needle batches among text, probes and gates now and then."""
    rng, found, done = np.random.default_rng(0), [], 0
    for index, (name, steps) in enumerate(stages):
        for step in range(steps):
            done, end = done + 1, step + 1 == steps
            record = {"stage": index, "name": name, "step": step, "tokens": 2048 * done}
            record |= {"loss": float(2 * math.exp(-step / 20) * rng.uniform(0.9, 1.1)), "lr": 1e-3}
            if name == "align":
                record["layers"] = {str(2 * i): 0.1 * (i + 1) / done for i in range(layers)}
            elif needles and step % needles == needles - 1:
                record |= {"needles": True, "loss": 8.0 / (step + 1)}
            if probes and (end or (done % 10 == 0 and name != "align")):
                record |= {"recall": min(1.0, done / 60), "perplexity": 300.0 / done}
                record |= {"teacher_recall": 0.98, "teacher_perplexity": 3.9}
            if groups and (end or step == 0 or done % 10 == 0):
                values = [-2, -1, -0.5, done / 50, 0.5, 1, 2.5]
                record["gates"] = dict.fromkeys(groups, values)
            found.append(record)
    return found


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def has(pixels: np.ndarray, colour: str) -> bool:
    return bool((abs(pixels - COLOURS[colour]).max(axis=2) < 12).sum() > 100)


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    return pixels_of(report.training_picture(make_log()))


def test_everything_is_drawn_and_nothing_is_cut_off(whole):
    assert whole.shape[1] == 1200 and whole.shape[0] > 1300
    assert all(has(whole, colour) for colour in ("text", "needles"))
    border = [whole[:2], whole[-2:], whole[:, :2], whole[:, -2:]]
    assert min(part.min() for part in border) > 200


@pytest.mark.parametrize(
    "lacking",
    [{"layers": 0}, {"probes": False}, {"groups": ()}],
    ids=["layers", "probes", "gates"],
)
def test_a_panel_without_data_is_left_out(whole, lacking):
    less = pixels_of(report.training_picture(make_log(**lacking)))
    assert less.shape[0] < whole.shape[0] - 150


def test_needle_batches_have_a_curve_of_their_own():
    """Both kinds in one curve would zigzag: the text's alone falls from step to step."""
    stage = read_stages(make_log())[1]
    assert len(stage.text) == 30 and len(stage.needles) == 10
    assert max(y for _, y in stage.text) < 2.3 and max(y for _, y in stage.needles) == 2.0
    text_only = pixels_of(report.training_picture(make_log(needles=0, groups=())))
    assert not has(text_only, "needles")


def test_panels_say_what_they_show(monkeypatch):
    """The titles, names of stages and lines of the figure, before it becomes pixels."""
    seen = []
    real = _training.canvas

    def canvas(width, height):
        made = real(width, height)
        enter = made.__enter__

        class Kept:
            def __enter__(self):
                figure, png = enter()
                seen.append(figure)
                return figure, png

            def __exit__(self, *args):
                return made.__exit__(*args)

        return Kept()

    monkeypatch.setattr(_training, "canvas", canvas)
    report.training_picture(make_log())
    panels = {a.get_title(loc="left"): a for a in seen[0].axes}
    titles = ["Loss", "Align error of every layer", "Recall", "Perplexity"]
    assert [t for t in panels if t][:4] == titles
    assert {"Gates: A_log", "Gates: dt_bias", "Gates: g.weight"} < panels.keys()
    assert [t.get_text() for t in panels["Loss"].texts] == ["1 align", "2 logits", "3 long"]
    assert [t.get_text() for t in panels["Loss"].get_legend().texts] == ["text", "needle batches"]
    recall = panels["Recall"]
    assert [line.get_label() for line in recall.lines] == ["student", "teacher"]
    assert list(recall.lines[1].get_ydata()) == [0.98, 0.98]
    assert recall.lines[0].get_xydata()[-1].tolist() == [72 * 2048, 1.0]
    rows = panels["Align error of every layer"]
    assert [t.get_text() for t in rows.get_yticklabels()] == ["0", "2", "4"]
    for name in ("Loss", "Recall", "Perplexity"):
        title = panels[name]._left_title.get_window_extent()
        assert not title.overlaps(panels[name].get_legend().get_window_extent())
    assert panels["Loss"].get_yscale() == "log" and recall.get_yscale() == "linear"


def test_a_long_log_and_many_layers_draw_in_bounded_size():
    log = make_log(
        (("align", 300), ("logits", 3000)), layers=64, groups=[f"g{i}" for i in "abcdefgh"]
    )
    png = report.training_picture(log)
    assert len(png) < 250_000 and pixels_of(png).shape[0] < 2300


# --- the table ----------------------------------------------------------------------------------


def rows_of(log) -> list[dict[str, str]]:
    grid = stage_grid(log)
    return [dict(zip(grid.head, row)) for row in grid.rows]


@pytest.mark.parametrize("from_run", [True, False], ids=["counted-from-the-run", "from-the-stage"])
def test_stages_are_listed(tmp_path, from_run):
    log = [
        {"stage": s, "name": n, "loss": 5.0 - k, "tokens": 100 * (k + 1 + 4 * s * from_run),
         "seconds": 2.5}
        for s, n in enumerate(("align", "logits"))
        for k in range(4)
    ]  # fmt: skip
    page = report.report(tmp_path, training=log)[1].read_text()
    assert "| stage | steps | tokens | seconds | loss at start | loss at end |" in page
    assert "| stage 1: align | 4 | 400 | 10 | 5 | 2 |" in page
    assert "| stage 2: logits | 4 | 400 | 10 | 5 | 2 |" in page


def test_recall_before_a_stage_is_that_after_the_one_before():
    first, second, third = rows_of(make_log())
    assert first["recall before"] == "" and first["recall after"] == "0.20"
    assert second["recall before"] == "0.20" and second["recall after"] == "0.87"
    assert third["recall before"] == "0.87" and third["recall after"] == "1.00"
    assert float(second["loss at end"]) < float(second["loss at start"])


def test_columns_without_numbers_are_left_out():
    (row,) = rows_of([{"loss": 3.0}, {"loss": 1.0}])
    assert row == {
        "stage": "stage 1", "steps": "2", "tokens": "2", "loss at start": "3", "loss at end": "1",
    }  # fmt: skip
    assert stage_grid([]) is None


# --- logs from anywhere -------------------------------------------------------------------------

HUGE = 10**5000
ODD = [
    None, "line", 3, [], {}, {"loss": None}, {"loss": math.nan, "tokens": 3}, {"loss": math.inf},
    {"stage": HUGE, "loss": 1.0}, {"stage": -1, "loss": HUGE, "tokens": HUGE, "recall": HUGE},
    {"stage": [1], "name": {}, "loss": "x", "tokens": "?", "seconds": "soon"},
    {"stage": HOSTILE, "name": HOSTILE, "loss": 1e300, "tokens": -5},
    {"stage": 0, "name": HOSTILE, "loss": -1.0, "tokens": 1, "layers": [1], "gates": "no"},
    {"stage": 0, "loss": 2.0, "tokens": 2, "layers": {"x": 1, "-1": 1, "9" * 99: 1, 3: 1}},
    {"stage": 0, "loss": 0.0, "tokens": 3, "layers": {"1": math.nan, "2": "a", "3": 0.0}},
    {"stage": 0, "loss": 1e29, "tokens": 4, "gates": {"a": [1], "b": None, "c": [math.nan] * 7}},
    {"stage": 0, "loss": 1e-29, "tokens": 5, "gates": {HOSTILE: [1e29, -1e29, 0, 0, 0, 0, HUGE]}},
    {"stage": 0, "loss": True, "tokens": 6, "recall": -3, "perplexity": 0, "teacher_recall": "1"},
    {"stage": 0, "loss": 1, "tokens": 6, "gates": {3: [0] * 7, "d": [0] * 7, "e": (1e29,) * 7}},
    {"stage": 0, "loss": 1, "tokens": 2, "needles": "yes", "recall": 0.5, "layers": {"4": 1e-300}},
]  # fmt: skip


def test_no_log_breaks_the_report(tmp_path):
    page, twin, *_ = report.report(tmp_path / "odd", training=ODD)
    assert "<script" not in page.read_text() and "\x1b" not in twin.read_text()
    for n, record in enumerate(ODD):  # each beside good ones, which stay
        log = [record, *make_log((("logits", 3),), groups=(), probes=False)]
        assert any("3" in row.values() for row in rows_of(log)), n
        assert sum(map(len, (s.losses() for s in read_stages(log)))) >= 2


@pytest.mark.parametrize("n", range(len(ODD)))
def test_every_odd_record_is_drawn_or_left_out(n):
    log = [{"stage": 0, "loss": 1.0, "tokens": 0}, {"stage": 0, "loss": 0.5, "tokens": 1}, ODD[n]]
    assert report.training_picture(log) is not None


def test_a_log_of_thousands_of_stages_stays_small():
    log = [{"stage": n, "loss": 1.0, "tokens": n} for n in range(5000)]
    assert len(stage_grid(log).rows) == 40


def test_too_little_is_no_picture():
    assert report.training_picture([]) is None
    assert report.training_picture([{"loss": 1.0}, {"loss": math.nan}]) is None


def test_files_are_read_line_by_line(tmp_path):
    assert report.training_log(tmp_path) == []
    lines = [{"stage": 0, "step": n, "loss": 1.0} for n in range(4)]
    texts = [json.dumps(x) for x in lines]
    texts[1] = '{"stage": 0, "st'  # what a power cut leaves
    texts[3] = '{"loss": NaN, "step": ' + "9" * 5000 + "}"
    (tmp_path / "log.jsonl").write_bytes("\n".join(texts).encode() + b"\n\xff\n" + b"[" * 10**5)
    times = [{"stage": 0, "step": n, "seconds": n / 2} for n in (0, 1, 3)]
    (tmp_path / "seconds.jsonl").write_text("\n".join(map(json.dumps, times)))
    assert report.training_log(tmp_path) == [{**lines[0], "seconds": 0.0}, lines[2]]
