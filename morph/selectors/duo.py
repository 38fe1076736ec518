"""DuoAttention: a soft gate per KV head, trained so that the last hidden state stays the source's.

What it measures: every KV head mixes full attention and the cheap mixer by a gate that starts at 1;
the squared distance of the final hidden state at answer tokens, plus a tax on the mean gate, is
minimised. The gate is the score.
Why it works: retrieval heads move the final state when they lose the past, streaming heads do not.
Cost: `steps` times a source forward, a mixed forward and its way back, on `batch_size` examples.
Options: reg (0.05 times the mean gate), steps (200; the paper takes 2000 of one example), lr (0.02,
up over the first fifth of the steps and down over the last), batch_size (4).
Known limits: gates are amplitudes, so heads that back each other up share the load; published gates
are not bimodal, so never cut them at 0.5: a budget takes the highest, whatever their size.
Reference: DuoAttention, arXiv 2410.10819, and its code. The full branch is the source's own stream,
computed once without gradient, as there. Deviations: the cheap side is the mixer that was chosen
(the paper's is `--mixer sliding --set mixer.num_sinks=128 --set mixer.window=256`); no random
noise breaks ties; layers and query heads may be gated too. The paper's data is
`select.task=passkeys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common, _gates
from morph.surgery import Batch, Morphable

NEEDS = "backward"
EXAMPLE = {"steps": 6}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the duo selector."""

    reg: float = 0.05
    steps: int = 200
    lr: float = 0.02
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.reg < 0 or not self.lr > 0:
            raise PlanError(
                f"selector duo: steps {self.steps}, batch_size {self.batch_size}, reg {self.reg}, "
                f"lr {self.lr}: steps and batch_size are at least 1, reg at least 0, lr above 0."
            )


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """Two forwards and a way back on a part of the examples, every step."""
    return _common.Cost(
        forwards=2 * options.steps, backwards=options.steps, rows=options.batch_size
    )


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "kv_head",
) -> Scores:
    """Return the trained gate of every unit, in [0, 1].

    Raises PlanError without batches, and where the first step is not finite.
    """
    _common.need_batches(batches, "duo")
    gates = _gates.unit_gates(morphable, granularity, 1.0)

    def loss_at(step: int, batch: Batch) -> torch.Tensor:
        full, source = morphable.teacher(batch)
        mixed = morphable.run(batch, _gates.soft(morphable, gates, full))
        distance = (mixed.final_hidden.float() - source.final_hidden.float()).square().mean()
        return distance + options.reg * gates.abs().mean()

    def clamp() -> None:
        with torch.no_grad():
            gates.clamp_(0.0, 1.0)

    run = _gates.train(
        morphable,
        f"duo {options} {granularity}",
        [_gates.Group(parameters=[gates], lr=options.lr)],
        _gates.rows(batches, options.batch_size),
        loss_at,
        steps=options.steps,
        factor=_gates.trapezoid,
        clamp=clamp,
    )
    values = _common.as_values(morphable, gates)
    told = _gates.told(run, gates)
    return _common.scores(morphable, "duo", granularity, values, "gate", told)
