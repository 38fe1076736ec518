"""How far a long command is: a bar for people, lines for a file or a pipe. All of it on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from morph.errors import escape

PAUSE = 30.0  # seconds between two lines


@contextmanager
def training() -> Iterator[Callable[[Any], None]]:
    """Show training progress: loss, recall where it was measured, tokens a second, time left.

    A bar per stage for people; into a file or a pipe a line at the end of every stage and every
    half minute. The time left is that of all remaining stages.
    """
    shown = _Bar() if sys.stderr.isatty() else _Lines()
    try:
        yield lambda event: shown.update(event) if event.kind == "step" else None
    finally:
        shown.stop()


@contextmanager
def copying() -> Iterator[Callable[[int, int], None]]:
    """Show how many bytes are written: a bar for people, a line every half minute elsewhere."""
    began = last = time.monotonic()
    shown: Any = None

    def update(done: int, total: int) -> None:
        nonlocal shown, last
        now = time.monotonic()
        rate = done / max(now - began, 1e-9)
        if not sys.stderr.isatty():
            if now - last > PAUSE and done < total:
                last = now
                _say(
                    f"{done / 1e9:,.1f} of {total / 1e9:,.1f} GB written, {rate / 1e6:,.0f} MB/s, "
                    f"about {(total - done) / max(rate, 1):,.0f} s left"
                )
            return
        if shown is None:
            if now - began < 0.5:  # most are done before anyone could read it
                return
            shown = _copying_bar()
        shown.update(0, completed=done, total=total)

    try:
        yield update
    finally:
        if shown is not None:
            shown.stop()


def _copying_bar() -> Any:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        "written",
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=_console(),
        transient=True,
    )
    bar.add_task("written", total=1)
    bar.start()
    return bar


@contextmanager
def measuring() -> Iterator[Callable[[int, int], None]]:
    """Show how far a selector is: measurements done, and time left.

    A bar for people; into a file or a pipe a line every half minute.
    """
    began = time.monotonic()
    shown: Any = None
    last = [began, -1.0, began]  # when this round began, its count, when a line was printed

    def update(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done < last[1]:  # another round has begun
            last[0] = now
        last[1] = done
        left = (now - last[0]) / max(1, done) * (total - done)
        if not sys.stderr.isatty():
            if now - last[2] > PAUSE and done < total:
                last[2] = now
                _say(f"{done:,} of {total:,} measured, about {left:,.0f} s left in this round")
            return
        if shown is None:
            shown = _measuring_bar()
        shown.update(0, completed=done, total=total)

    try:
        yield update
    finally:
        if shown is not None:
            shown.stop()


def _measuring_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "measured",
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_console(),
        transient=True,
    )
    bar.add_task("measured", total=1)
    bar.start()
    return bar


class _Lines:
    """Progress as lines."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.unsaid: Any = None  # the last event, where no line was printed for it
        self.recall = math.nan

    def update(self, event: Any) -> None:
        if self.unsaid is not None and self.unsaid.stage != event.stage:  # it ended early
            self._print(self.unsaid)
            self.recall = math.nan
        self.recall = _known(event, self.recall)
        if event.step >= event.steps or time.monotonic() - self.last >= PAUSE:
            self._print(event)
        else:
            self.unsaid = event

    def stop(self) -> None:
        if self.unsaid is not None:
            self._print(self.unsaid)

    def _print(self, event: Any) -> None:
        self.last, self.unsaid = time.monotonic(), None
        recall = "" if math.isnan(self.recall) else f"recall {self.recall:.2f}, "
        _say(
            f"{event.stage + 1} {event.name}: step {event.step:,} of {event.steps:,}, "
            f"loss {event.loss:.4g}, {recall}{event.tokens_per_second:,.0f} tokens/s, "
            f"{_clock(event.eta_seconds)} left"
        )
        if event.step >= event.steps:
            self.recall = math.nan


class _Bar:
    """Progress as one bar per stage; those of stages that are done stay."""

    def __init__(self) -> None:
        self.progress: Any = None
        self.stage = -1
        self.recall = math.nan

    def update(self, event: Any) -> None:
        if event.stage != self.stage:
            self.stop()
            self.stage, self.recall = event.stage, math.nan
        if self.progress is None:
            self._start(event)
        self.recall = _known(event, self.recall)
        recall = "" if math.isnan(self.recall) else f"recall {self.recall:.2f}  "
        note = f"loss {event.loss:.4g}  {recall}{event.tokens_per_second:,.0f} tokens/s"
        self.progress.update(
            0, completed=event.step, note=note, left=f"{_clock(event.eta_seconds)} left"
        )
        if event.step == event.steps:
            self.stop()

    def _start(self, event: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        console = _console()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24 if console.width >= 100 else 8),
            TextColumn("{task.fields[note]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        name = f"{event.stage + 1} {escape(event.name, 20)}"
        self.progress.add_task(name, total=event.steps, note="", left="")
        self.progress.start()

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _known(event: Any, before: float) -> float:
    """Return the recall an event tells, or the one known before."""
    recall = getattr(event, "recall", None)
    return before if recall is None or math.isnan(recall) else recall


def _clock(seconds: float) -> str:
    """Return a time as 0:12 or 1:02:03; longer than four days in days."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole >= 100 * 3600:
        return f"{whole / 86400:.1f} days"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _say(text: str) -> None:
    print(escape(text, 2000), file=sys.stderr, flush=True)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False)
