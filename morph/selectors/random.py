"""A seeded random ranking: the control that shows what choosing is worth.

What it measures: nothing. Every unit gets a distinct random rank.
Why it works: it does not; a selector that cannot beat five seeds of this has found nothing.
Cost: no forward.
Options: seed.
Known limits: use several seeds, never one.
Reference: asked for by reviewers of KL-guided selection; HydraHead reports its own random control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from morph.plan import Granularity, Scores
from morph.selectors import _common
from morph.surgery import Batch, Morphable

NEEDS = "weights"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the random selector."""

    seed: int = 0


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return a random permutation of 1..N as the scores of the N units."""
    found = _common.units(morphable, granularity)
    ranks = np.random.default_rng(options.seed).permutation(len(found)) + 1
    values = {unit: float(rank) for unit, rank in zip(found, ranks)}
    return _common.scores(morphable, "random", granularity, values, "rank", {"seed": options.seed})
