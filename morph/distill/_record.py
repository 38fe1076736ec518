"""What a run tells while it goes, what it leaves, and where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a progress callback is told.

    `step`: `step` of `steps` of this stage is done. `saved`: the state is on disk. `note`: `text`
    says something in words. `tokens` of `total_tokens` are those of the whole run; rate and
    `eta_seconds` (all remaining stages at this stage's rate) count from where this process began.
    `recall` is that of the last probe, if there was one.
    """

    kind: Literal["step", "saved", "note"]
    text: str = ""
    stage: int = 0
    name: str = ""
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    lr: float = 0.0
    tokens: int = 0
    total_tokens: int = 0
    tokens_per_second: float = 0.0
    eta_seconds: float = math.nan
    recall: float = math.nan


@dataclass(kw_only=True)
class Log:
    """What a run did: one record per step, as in `log.jsonl`, and the notes."""

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of this process
    remarks: tuple[str, ...] = ()  # notes that follow from the run, in however many processes
    tokens: int = 0
    seconds: float = 0.0  # of this process only
    trained: tuple[str, ...] = ()  # parameters that the run has trained, in copies of their own

    def losses(self, stage: int) -> list[float]:
        """Return the losses of one stage, step by step."""
        return [r["loss"] for r in self.records if r["stage"] == stage]


@dataclass(kw_only=True)
class Position:
    """How far a run is: the next step of the next stage."""

    stage: int = 0
    step: int = 0
    ordinal: int = 0  # steps of all stages
    tokens: int = 0
    lines: int = 0  # of the log
    watch: dict[str, Any] = field(default_factory=dict)  # what watching has seen of this stage
    remarks: list[str] = field(default_factory=list)
