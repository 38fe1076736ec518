"""KL from the source when one unit is restored or removed; with a short distillation on request.

What it measures: the KL divergence between the source's and the hybrid's predictions at the answer
tokens when one unit is restored and all others are cheap (`add`, as in KL-guided selection), or
when it alone is made cheap (`remove`). `greedy` re-scores after every pick.
Why it works: it asks what a unit adds to the whole distribution, not to one token, and needs no
labels: any text will do (`select.task=text`).
Cost: as nll; `distill` adds that many training steps for every unit of an `add` sweep.
Options: mode (add, remove, greedy), count (rounds of greedy; filled in from the budget), bootstrap
(200), distill (0: none; steps of training the cheap mixers' own parameters towards the source with
that unit restored), lr (1e-3), batch_size (4).
Known limits: as nll: `add` is blind to chains and `remove` to units that back each other up.
Without `distill` it judges the mixers as they stand; mixers without parameters cannot be distilled
here.
Reference: KL-guided layer selection, arXiv 2512.20569 (GA-S2 is `add` with `distill`). Deviations:
zero-shot by default; the short distillation trains the mixers' own parameters only, and starts for
every unit from the same aligned mixers; the paper trains the whole student for 200M tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common, _gates, _single
from morph.selectors._sweep import kl
from morph.surgery import Batch, Morphable, answer_rows, refuse_streaming

NEEDS = "forward"
STREAMS = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the kl selector."""

    mode: Literal["add", "remove", "greedy"] = "add"
    count: int | None = None
    bootstrap: int = 200
    distill: int = 0
    lr: float = 1e-3
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.bootstrap < 0 or self.distill < 0 or not self.lr > 0 or self.batch_size < 1:
            raise PlanError(
                f"selector kl: bootstrap {self.bootstrap}, distill {self.distill}, lr {self.lr}, "
                f"batch_size {self.batch_size}: the first two are at least 0, lr above 0, "
                "batch_size at least 1."
            )
        if self.distill and self.mode != "add":
            raise PlanError(
                f"selector kl: distill goes with mode=add, which restores one unit; mode is "
                f"{self.mode}."
            )


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """As nll and one forward of the source; with distill two forwards and a way back a step."""
    if not options.distill:
        plain = _single.cost(shape, granularity, options.mode, options.count)
        return _common.Cost(forwards=plain.forwards + 1)
    units = len(shape.candidates) * shape.units(granularity)
    steps = options.distill * units
    return _common.Cost(
        forwards=2 * steps, backwards=steps, rows=options.batch_size, whole=2 * units
    )


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return, per unit, the nats of KL per answer token that full attention there is worth.

    Greedy scores are ranks. Raises PlanError without batches, and for `distill` where the mixer has
    no parameters of its own.
    """
    _common.need_batches(batches, "kl")
    unit = "nats of KL per answer token"
    if options.mode == "greedy":
        values, told = _single.greedy(morphable, batches, granularity, "kl", options.count)
        unit = "rank"
    elif options.distill:
        values, told = _distilled(morphable, batches, options, granularity)
    else:
        values, told = _single.one_by_one(
            morphable, batches, granularity, "kl", options.mode, options.bootstrap
        )
        told["base_kl"] = told.pop("base")
    return _common.scores(morphable, "kl", granularity, values, unit, told)


def _distilled(
    morphable: Morphable, batches: Sequence[Batch], options: Options, granularity: Granularity
) -> tuple[_common.Values, dict[str, Any]]:
    """Return minus the KL that is left when the mixers have adapted to one restored unit."""
    refuse_streaming(morphable, "selector 'kl' with distill")
    parameters = morphable.cheap_parameters()
    if not parameters:
        raise PlanError(
            f"selector kl: {morphable.mixer} with these options has no parameters to distil; leave "
            "out selector.distill, or give it some (for sliding: mixer.sink_bias=true)."
        )
    parts = _gates.rows(batches, options.batch_size)
    values: _common.Values = {}
    for unit in _common.units(morphable, granularity):
        key = f"kl distilled {options} {granularity} {unit} " + " ".join(map(_common.digest, parts))
        found = morphable.memo.get(key)
        if found is None:
            modes = morphable.modes([unit], granularity)

            def loss_at(step: int, batch: Batch, modes: Any = modes) -> torch.Tensor:
                with torch.no_grad():
                    source = morphable.logits(batch, {})
                return kl(morphable.logits(batch, modes), batch, source).mean()

            with _gates.learning(parameters):
                _gates.train(
                    morphable,
                    f"kl {unit}",
                    [_gates.Group(parameters=list(parameters), lr=options.lr)],
                    parts,
                    loss_at,
                    steps=options.distill,
                )
                with torch.no_grad():
                    left = [float(loss_at(0, b)) * len(answer_rows(b)) for b in parts]
            found = [sum(left) / sum(len(answer_rows(b)) for b in parts)]
            morphable.memo.put(key, found)
        values[unit] = -found[0]
    return values, {"mode": "add", "distilled_steps": options.distill}
