"""What training costs, in words: a line for every stage and for every GPU. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from morph.pipeline._cost import GPUS, UTILISATION, Cost
from morph.recipes.schema import Stage

_SHARE = f"at {UTILISATION * 100:.0f} % of its peak (arithmetic, not measured)"


def duration(seconds: float) -> str:
    """Return a length of time for people, with two digits: 45 s, 12 min, 5.1 h, 3.4 days."""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 86_400)} days"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def stage_lines(found: Cost, stages: Sequence[Stage]) -> list[str]:
    """Return a line for every stage: its tokens, steps and FLOPs."""
    return [
        f"{stage.loss}: {stage.tokens:,} tokens in {one.steps:,} "
        f"{'step' if one.steps == 1 else 'steps'} of {stage.batch_size} x {stage.seq_len:,}, "
        f"{one.flops_per_token:.2g} FLOPs a token, about {one.memory_bytes / 1e9:.2g} GB"
        for stage, one in zip(stages, found.stages)
    ]


def gpu_lines(found: Cost) -> list[str]:
    """Return a line for every GPU of the table: hours, or that the memory does not suffice."""
    lines = []
    for name, gpu in GPUS.items():
        if found.memory_bytes > gpu.memory:
            lines.append(f"the {gpu.memory / 1e9:.0f} GB of one {name} do not suffice")
        else:
            lines.append(f"about {duration(found.seconds(name))} on one {name} {_SHARE}")
    return lines


def summary(found: Cost) -> str:
    """Return the sentence that a shipped recipe states of a 1.7B model."""
    return (
        f"{found.tokens:,} tokens, {found.flops:.2g} FLOPs: about "
        f"{duration(found.seconds('H100'))} on one H100 or H200 {_SHARE}, in about "
        f"{found.memory_bytes / 1e9:.0f} GB"
    )
