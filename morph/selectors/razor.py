"""Echo and induction heads, seen on random tokens that are repeated: RazorAttention's test.

What it measures: on one row of `tokens` random tokens, said `repeats` times, how much attention a
head puts on the earlier copies of the current token (echo) and on the tokens right after these
(induction), averaged over all positions from the first repeat on. The score is the larger of the
two, a share of the attention in [0, 1].
Why it works: random tokens carry no meaning, so only heads that look things up by content do this,
and heads that do are the ones that retrieve.
Cost: one forward of a single row, no gradients; attention rows are taken in blocks of queries.
Options: tokens (512, or fewer where repeats x tokens do not fit into the examples' length or the
examples have fewer different tokens), repeats 4, echo_share 0.01 and induction_share 0.14 (which
heads the provenance lists as RazorAttention's retrieval heads), seed 0.
Known limits: it observes and does not intervene, and it looks at behaviour on repeats, not at
questions: heads that look up by meaning are missed, heads that copy but are not needed are kept.
The examples only give the length and the tokens to draw from.
Reference: Tang et al., RazorAttention, arXiv 2407.15891 (about 2500 tokens said 4 times; the top
1 % of heads by echo and 14 % by induction keep a full cache; these numbers are second-hand).
Deviations: heads are ranked by the larger of echo and induction, both masses of the same attention
and so comparable as they are; the union of the two shares is listed in the provenance as
`retrieval_heads`. Tokens are drawn without replacement among those that occur in the examples, the
configured special tokens left out; where all rows start with the same token (a BOS), so does this
one. The compensation token is no part of selection. A KV head or layer scores the largest of its
query heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _attention, _common
from morph.surgery import Batch, Morphable

NEEDS = "forward"
TOKENS = 512  # by default, where they fit
BLOCK = 256  # queries at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the razor selector; an empty `tokens` is what fits, 512 at most."""

    tokens: int | None = None
    repeats: int = 4
    echo_share: float = 0.01
    induction_share: float = 0.14
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise PlanError(f"selector razor: {name} is {value}; give 2 or more.")
        for name in ("echo_share", "induction_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(
                    f"selector razor: {name} is {getattr(self, name)}; it is a share from 0 to 1."
                )


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """One row, at most as long as an example."""
    return _common.Cost(forwards=1.0, rows=1)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return the larger of echo and induction mass for every unit.

    Raises PlanError without batches, and where they are too short or have too few different tokens.
    """
    _common.need_batches(batches, "razor")
    start, row, period = _repeated(morphable, batches, options)
    echo, induction = _measure(morphable, row, period, len(start))
    width = morphable.geometry.units(granularity)
    table = torch.maximum(echo, induction)
    values = _common.as_values(morphable, _common.group_max(table, width))
    provenance: dict[str, Any] = {
        "tokens_repeated": period,
        "repeats": options.repeats,
        "seed": options.seed,
        "largest_echo": float(echo.max()),
        "largest_induction": float(induction.max()),
        "retrieval_heads": [
            list(unit)
            for unit in sorted(
                _top(morphable, echo, options.echo_share)
                | _top(morphable, induction, options.induction_share)
            )
        ],
    }
    unit = "share of attention"
    return _common.scores(morphable, "razor", granularity, values, unit, provenance)


def _top(morphable: Morphable, table: torch.Tensor, share: float) -> set[_common.Unit]:
    values = _common.as_values(morphable, table)
    return set(_common.kept_units(values, math.ceil(share * len(values))))


def _repeated(
    morphable: Morphable, batches: Sequence[Batch], options: Options
) -> tuple[list[int], torch.Tensor, int]:
    """Return (what comes first, the row `[1, T]`, tokens per repeat)."""
    firsts = {int(x) for batch in batches for x in batch.ids[:, 0]}
    rows = sum(len(batch.ids) for batch in batches)
    start = sorted(firsts) if len(firsts) == 1 and rows > 1 else []
    pool = torch.cat([batch.ids.flatten() for batch in batches]).unique().cpu()
    barred = torch.tensor(sorted(_special(morphable.base.config) | set(start)), dtype=pool.dtype)
    pool = pool[~torch.isin(pool, barred)]
    room = (max(batch.ids.shape[1] for batch in batches) - len(start)) // options.repeats
    period = options.tokens or min(TOKENS, room, len(pool))
    if period > min(room, len(pool)) or period < 2:
        raise PlanError(
            f"selector razor: {options.tokens or 2} different tokens {options.repeats} times were "
            f"asked for; the examples have {len(pool)} different ones and room for "
            f"{max(room, 0)} at a time. Give fewer (--set selector.tokens=...), or more and "
            "longer examples (--set select.examples=..., --set select.seq_len=...)."
        )
    generator = torch.Generator().manual_seed(options.seed)
    drawn = pool[torch.randperm(len(pool), generator=generator)[:period]]
    row = torch.cat([torch.tensor(start, dtype=drawn.dtype), drawn.repeat(options.repeats)])
    return start, row[None].to(batches[0].ids.device), period


def _special(config: Any) -> set[int]:
    """Return the ids of a config's special tokens; some models have several for one purpose."""
    found: set[int] = set()
    for name in ("bos", "eos", "pad", "unk"):
        value = getattr(config, f"{name}_token_id", None)
        found |= set(value) if isinstance(value, (list, tuple)) else {value} - {None}
    return found


@torch.no_grad()
def _measure(
    morphable: Morphable, ids: torch.Tensor, period: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return echo and induction mass `[candidates, H]`; one forward."""
    found: dict[int, torch.Tensor] = {}
    at = torch.arange(start + period, ids.shape[1], device=ids.device)

    def probe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        shape = _attention.shape_of(morphable, layer)
        total = torch.zeros(2, shape.num_attention_heads, dtype=torch.float64)
        for block in at.split(BLOCK):
            weights = _attention.scores(q[0, block], k[0], shape, block).softmax(-1)
            total += torch.stack(masses(weights, block, period, start)).double().cpu()
        found[layer] = total / len(at)

    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -1] = True  # one logit; nobody reads it
    full = morphable.modes([(i, 0) for i in morphable.candidates])
    run = morphable.run(Batch(ids=ids, answers=answers), full, probe=probe)
    _attention.need_finite(run.final_hidden, "razor")
    echo, induction = torch.stack([found[i] for i in morphable.candidates], dim=1)
    return echo, induction


def masses(
    attention: torch.Tensor, at: torch.Tensor, period: int, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (echo, induction) `[H]`, summed over queries, of attention `[n, H, S]`.

    Query n stands at `at[n]`; what stands there stood `period` tokens earlier, and so on back to
    `start`. Echo is the mass on these places, induction that on the ones right after them.
    """
    copies = attention.shape[-1] // period
    back = period * torch.arange(1, copies + 1, device=at.device)
    place = at[:, None] - back  # [n, copies]
    there = (place >= start)[:, None].to(attention.dtype)
    index = place.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)
    echo = (attention.gather(2, index) * there).sum(dim=(0, 2))
    induction = (attention.gather(2, index + 1) * there).sum(dim=(0, 2))
    return echo, induction
