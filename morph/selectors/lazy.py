"""LightTransfer's lazy ratio: how little of a layer's attention goes beyond sinks and the window.

What it measures: the attention mass that the last queries put on the first `w_sink` tokens and on
the `w_recent` ones before them, averaged over queries, heads and examples. The score is 1 minus it.
Why it works: a layer whose attention stays on sinks and recent tokens loses little when it can see
no others.
Cost: one forward, no gradients; the mass comes from two log-sum-exps over the keys of the last
queries, so that there is no attention matrix.
Options: w_sink (4 tokens), w_recent (the mixer's window where it has one, else 1024), w_last (32:
at most so many queries of an example, the last that predict an answer token), mode: `ratio`
averages the ratio; `votes` marks the lazier half of the units in every example, and the share of
examples that mark a unit is its laziness.
Known limits: it observes and does not intervene: what is attended may not matter, layers that look
everywhere at random look busy, and so do all redundant ones. SWAA found the ranking unstable across
model families. Where everything fits in sinks and window, every score is zero.
Reference: LightTransfer, arXiv 2410.13846, by the code of SWAA, arXiv 2512.10411 (500 examples,
w_sink 4, w_recent 1024, w_last 32, votes). Deviations: the queries are those that predict answer
tokens (official: the last of the sequence whatever they are; on plain text both are the same); in
short questions the other tokens drown the answer's. `recent` are the tokens before each query; the
official code takes the last w_recent keys of the sequence for all queries and leaves later keys in
the numerator, which inflates the ratio of the earlier queries of the block a little. w_recent
follows the mixer, so that the mass counted as lost is what the mixer will lose. Equal votes are
ordered by the ratio (official: by layer). A KV head or layer takes the mean over its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from morph.errors import PlanError
from morph.mixers._base import GroupShape
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _attention, _common
from morph.surgery import Batch, Morphable

NEEDS = "forward"
RECENT = 1024  # for mixers without a window
CHUNK = 4096  # keys at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the lazy selector; sizes in tokens. An empty `w_recent` is the mixer's window."""

    w_sink: int = 4
    w_recent: int | None = None
    w_last: int = 32
    mode: Literal["ratio", "votes"] = "ratio"

    def __post_init__(self) -> None:
        for name, least in (("w_sink", 0), ("w_recent", 1), ("w_last", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise PlanError(f"selector lazy: {name} is {value}; give {least} or more.")


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """One look at every example."""
    return _common.Cost(forwards=1.0)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return 1 - lazy ratio, or 1 - the share of votes, of every unit.

    Raises PlanError without batches.
    """
    _common.need_batches(batches, "lazy")
    recent = options.w_recent or int(morphable.options.get("window") or RECENT)
    width = morphable.geometry.units(granularity)
    heads = torch.cat([_of_batch(morphable, b, options, recent) for b in batches])  # [E, L, H]
    ratios = heads.unflatten(-1, (width, -1)).mean(-1)  # [E, L, units]
    lazy = ratios.mean(0)
    if options.mode == "votes":
        lazy = (votes(ratios.flatten(1)).view_as(ratios).sum(0) + lazy) / (len(ratios) + 1)
    values = _common.as_values(morphable, 1.0 - lazy)
    provenance = {
        "mode": options.mode,
        "w_recent": recent,
        "mean_ratio": float(ratios.mean()),
        "spread": _common.spread(values.values()),
    }
    unit = "share of attention" if options.mode == "ratio" else "share of examples"
    return _common.scores(morphable, "lazy", granularity, values, unit, provenance)


def votes(ratios: torch.Tensor) -> torch.Tensor:
    """Return 1 `[E, units]` for the lazier half of the units of every example, else 0."""
    count = ratios.shape[1] // 2
    order = ratios.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(ratios).scatter(1, order, 1.0)


@torch.no_grad()
def _of_batch(morphable: Morphable, batch: Batch, options: Options, recent: int) -> torch.Tensor:
    """Return the lazy ratio `[B, candidates, H]` of the examples with answers; one forward."""
    found: dict[int, torch.Tensor] = {}
    marks = [(n, row.nonzero()[-options.w_last :, 0] - 1) for n, row in enumerate(batch.answers)]
    asking = [(n, at) for n, at in marks if len(at)]

    def probe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        shape = _attention.shape_of(morphable, layer)
        found[layer] = torch.stack(
            [
                lazy_ratio(q[row, at], k[row], shape, at, options.w_sink, recent).double().mean(0)
                for row, at in asking
            ]
        )

    full = morphable.modes([(i, 0) for i in morphable.candidates])
    morphable.run(batch, full, probe=probe)
    table = torch.stack([found[i] for i in morphable.candidates], dim=1).cpu()
    _attention.need_finite(table, "lazy")
    return table


def lazy_ratio(
    q: torch.Tensor,
    k: torch.Tensor,
    shape: GroupShape,
    at: torch.Tensor,
    sinks: int,
    recent: int,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Return the attention mass `[n, H]` on sinks and recent keys of queries `[n, H, K]` at `at`.

    `k` `[S, G, K]` are all keys of the sequence; `chunk` of them are looked at together.
    """
    near = everything = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for first in range(0, k.shape[0], chunk):
        s = _attention.scores(q, k[first : first + chunk], shape, at, first)
        keys = torch.arange(first, first + s.shape[-1], device=at.device)
        counted = (keys < sinks) | (keys > at[:, None] - recent)
        everything = torch.logaddexp(everything, s.logsumexp(-1))
        near = torch.logaddexp(near, s.masked_fill(~counted[:, None], -torch.inf).logsumexp(-1))
    return (near - everything).exp()
