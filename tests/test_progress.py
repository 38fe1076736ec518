"""How training is shown: every number on one line, at 80 columns and at 120, and in a pipe."""

from __future__ import annotations

import io
import math
import re
import sys
from types import SimpleNamespace

import pytest

from morph import _progress, terminal

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(stage=0, step=1, steps=4, **changes):
    told = {
        "kind": "step", "text": "", "name": "align", "loss": 0.0123, "lr": 1e-3, "tokens": 10,
        "total_tokens": 100, "tokens_per_second": 2340.0, "eta_seconds": 3723.0,
        "recall": math.nan,
    }  # fmt: skip
    return SimpleNamespace(stage=stage, step=step, steps=steps, **{**told, **changes})


STAGES = [
    *[event(step=n) for n in (1, 2, 3, 4)],
    *[event(stage=1, step=n, name="logits", recall=0.951 if n == 2 else math.nan) for n in (1, 2)],
    *[event(stage=2, step=n, name="long", eta_seconds=12.4 * (4 - n)) for n in (1, 2, 3, 4)],
]


def shown(monkeypatch, events, *, tty: bool, columns: int = 80) -> list[str]:
    """What stands on stderr, the frames of a bar as lines, without colours."""
    out = Terminal() if tty else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with terminal.training() as update:
        for one in events:
            update(one)
    return [x.rstrip() for x in re.split(r"[\r\n]+", ESCAPES.sub("", out.getvalue())) if x.strip()]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_per_stage_says_everything_on_one_line(monkeypatch, columns):
    lines = shown(monkeypatch, STAGES, tty=True, columns=columns)
    assert max(map(len, lines)) <= columns
    assert {line[:2] for line in lines} == {"1 ", "2 ", "3 "}  # no line was wrapped
    first, second, third = ([x for x in lines if x.startswith(n)][-1] for n in "123")
    assert first.startswith("1 align ") and first.endswith(
        "loss 0.0123  2,340 tokens/s 1:02:03 left"
    )
    assert second.startswith("2 logits ") and "loss 0.0123  recall 0.95  2,340 tokens/s" in second
    assert "recall" not in third and third.endswith("0:00 left")
    assert first.count("━") == (24 if columns == 120 else 8)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_longest_bar_fits(monkeypatch, columns):
    wide = event(
        stage=98, name="logits", loss=1.234567e-05, recall=0.5, tokens_per_second=1234567.8,
        eta_seconds=359999,
    )  # fmt: skip
    last = shown(monkeypatch, [wide], tty=True, columns=columns)[-1]
    assert last.startswith("99 logits ") and last.endswith(
        "loss 1.235e-05  recall 0.50  1,234,568 tokens/s 99:59:59 left"
    )


def test_lines_in_a_pipe_say_how_every_stage_ended(monkeypatch):
    """The second stage ends before its last step, as one does that reaches its recall target."""
    lines = shown(monkeypatch, STAGES, tty=False)
    assert lines == [
        "1 align: step 4 of 4, loss 0.0123, 2,340 tokens/s, 1:02:03 left",
        "2 logits: step 2 of 4, loss 0.0123, recall 0.95, 2,340 tokens/s, 1:02:03 left",
        "3 long: step 4 of 4, loss 0.0123, 2,340 tokens/s, 0:00 left",
    ]


def test_a_line_every_half_minute(monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    lines = shown(monkeypatch, [event(step=n, steps=99) for n in range(1, 9)], tty=False)
    assert 2 < len(lines) < 8 and lines[-1].startswith("1 align: step 8 of 99")


@pytest.mark.parametrize("tty", [True, False])
def test_names_and_numbers_cannot_drive_a_terminal(monkeypatch, tty):
    odd = event(name="[red]x\x1b[31m\n\x07y", eta_seconds=math.inf, loss=math.nan, recall=None)
    text = "\n".join(shown(monkeypatch, [odd], tty=tty))
    assert "[red]x" in text and "\x07" not in text and "\\x1b" in text
    assert "loss nan" in text and "? left" in text


def test_other_events_show_nothing(monkeypatch):
    quiet = [event(kind="note", text="hello"), event(kind="saved")]
    assert shown(monkeypatch, quiet, tty=False) == []
    assert shown(monkeypatch, quiet, tty=True) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (1e6, "11.6 days"),
     (-3, "0:00"), (math.nan, "?")],
)  # fmt: skip
def test_times(seconds, text):
    assert _progress._clock(seconds) == text
