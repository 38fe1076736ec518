"""Which of several processes this is, as torchrun and `accelerate launch` tell it."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the number of this process; 0 writes, and speaks."""
    return _number("RANK", 0) if world() > 1 else 0  # schedulers set RANK for other ends too


def world() -> int:
    """Return how many processes there are."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
