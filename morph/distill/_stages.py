"""What the stages of distillation cost and how their learning rate runs; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from morph.errors import RecipeError
from morph.recipes._rules import cross_entropy_share
from morph.recipes.schema import Stage


def estimate(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Return the tokens each stage will spend: whole batches, so at least what it asks for."""
    return tuple(steps_of(s) * s.batch_size * s.seq_len for s in stages)


def steps_of(stage: Stage) -> int:
    """Return the number of optimizer steps of a stage."""
    return math.ceil(stage.tokens / (stage.batch_size * stage.seq_len))


def learning_rate_factor(stage: Stage, step: int) -> float:
    """Return the share of the peak learning rate at `step`: warm-up, then cosine to the minimum."""
    steps = steps_of(stage)
    warm = int(stage.warmup_fraction * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - 1 - warm)
    low = stage.min_lr_fraction
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def is_needle_step(stage: Stage, step: int) -> bool:
    """Return whether `step` takes a needle batch: evenly spread, `needles` of all steps."""
    return math.floor((step + 1) * stage.needles) > math.floor(step * stage.needles)


def check(stages: Sequence[Stage]) -> None:
    """Raise RecipeError naming the first setting that no run could have."""
    for i, s in enumerate(stages):
        rules = {
            "tokens": (s.tokens >= 1, "at least 1"),
            "seq_len": (s.seq_len >= 2, "at least 2"),
            "batch_size": (s.batch_size >= 1, "at least 1"),
            "micro_batch": (s.micro_batch is None or s.micro_batch >= 1, "at least 1"),
            "chunk_tokens": (s.chunk_tokens >= 1, "at least 1"),
            "save_every": (s.save_every >= 1, "at least 1"),
            "lr": (s.lr >= 0, "0 or more"),
            "gate_lr": (s.gate_lr >= 0, "0 or more"),
            "weight_decay": (s.weight_decay >= 0, "0 or more"),
            "clip": (s.clip > 0, "above 0"),
            "temperature": (s.temperature > 0, "above 0"),
            "min_lr_fraction": (0 <= s.min_lr_fraction <= 1, "in [0, 1]"),
            "warmup_fraction": (0 <= s.warmup_fraction <= 1, "in [0, 1]"),
            "needles": (0 <= s.needles <= 1, "in [0, 1]"),
            "cross_entropy": (0 <= cross_entropy_share(s) <= 1, "in [0, 1]"),
            "lora_rank": (s.lora_rank >= 1, "at least 1"),
            "lora_alpha": (s.lora_alpha > 0, "above 0"),
        }
        for key, (good, allowed) in rules.items():
            if not good:
                raise RecipeError(
                    f"distill[{i}].{key}: {getattr(s, key)} cannot be; it must be {allowed}."
                )
