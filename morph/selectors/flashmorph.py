"""Joint soft gates on every layer, trained to match the source on answers while gates are taxed.

What it measures: each unit mixes full and cheap outputs by a gate that starts at 1. A tax on the
sum of gates pushes them down; units that the answers need hold theirs up. The gate is the score.
Why it works: all units are judged together, in one run, on the tokens that need far recall.
Cost: `steps` times a source forward, a mixed forward and the way back through it, on `batch_size`
examples each: 200 x 4 examples by default, about 160 passes over 16 examples.
Options: align_on (logits_kl; final_hidden, residual, mixer_out), scale (relative; sum), weight of
the tax (0.1), steps (200), lr (0.02, falling to a tenth), batch_size (4).
Known limits: soft gates are amplitudes, not importances: two layers that back each other up share
the load and a sharp reader downstream makes do with a quarter of its input, so follow it with the
verify-and-swap pass. On `residual` and `mixer_out` layers that do nothing for the answer look as
needed as those that do. Warns where the gates hardly differ.
Reference: FlashMorph, arXiv 2606.30562, eq. 9-13, known here from notes on it. Deviations: the
default compares logits by KL (the paper compares hidden states, `residual`); errors are relative
to the source's energy in each layer (`scale=sum` is the paper's sum); gates are clamped to [0, 1]
after every step; Adam and the length of the run are ours. The paper's data is
`select.task=passkeys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common, _gates
from morph.surgery import Batch, Morphable, Run

NEEDS = "backward"
EXAMPLE = {"steps": 6}  # options under which the laws of the tests run it
FLAT = 0.05  # gates that differ by less than this rank nothing


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the flashmorph selector."""

    align_on: Literal["mixer_out", "residual", "final_hidden", "logits_kl"] = "logits_kl"
    scale: Literal["relative", "sum"] = "relative"
    weight: float = 0.1
    steps: int = 200
    lr: float = 0.02
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"selector flashmorph: {name} is {getattr(self, name)}; give 1 or more."
                )
        if self.weight < 0 or not self.lr > 0:
            raise PlanError(
                f"selector flashmorph: weight is {self.weight} and lr {self.lr}; the weight is at "
                "least 0, the lr above it."
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
    granularity: Granularity = "layer",
) -> Scores:
    """Return the trained gate of every unit, in [0, 1].

    Raises PlanError without batches, and where the first step is not finite.
    """
    _common.need_batches(batches, "flashmorph")
    gates = _gates.unit_gates(morphable, granularity, 1.0)
    want = {"mixer_out": ("mixer_out",), "residual": ("residual",)}.get(options.align_on, ())

    def loss_at(step: int, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            teacher = morphable.run(batch, {}, want)
        mixed = morphable.run(batch, _gates.soft(morphable, gates), want)
        return _distance(teacher, mixed, options) + options.weight * gates.sum() / gates.shape[1]

    run = _gates.train(
        morphable,
        f"flashmorph {options} {granularity}",
        [_gates.Group(parameters=[gates], lr=options.lr)],
        _gates.rows(batches, options.batch_size),
        loss_at,
        steps=options.steps,
        clamp=lambda: _clamp(gates),
    )
    told = {"align_on": options.align_on, **_gates.told(run, gates)}
    if told["gate_spread"] < FLAT:
        told["warning"] = (
            f"the gates differ by only {told['gate_spread']:.3f}: their order means little. Change "
            f"--set selector.weight (now {options.weight}) by a factor of ten, down where all "
            "gates fell to 0 and up where all stayed at 1."
        )
    values = _common.as_values(morphable, gates)
    return _common.scores(morphable, "flashmorph", granularity, values, "gate", told)


def _clamp(gates: torch.Tensor) -> None:
    with torch.no_grad():
        gates.clamp_(0.0, 1.0)


def _distance(teacher: Run, mixed: Run, options: Options) -> torch.Tensor:
    """Return how far the mixed model is from the source at the answer tokens; mean over layers."""
    if options.align_on == "logits_kl":
        p = torch.log_softmax(teacher.logits.float(), dim=-1)
        q = torch.log_softmax(mixed.logits.float(), dim=-1)
        return (p.exp() * (p - q)).sum(-1).mean()
    if options.align_on == "final_hidden":
        pairs = [(teacher.final_hidden, mixed.final_hidden)]
    else:
        full, soft = getattr(teacher, options.align_on), getattr(mixed, options.align_on)
        pairs = [(full[i], soft[i]) for i in sorted(full)]
    return torch.stack([_error(a.float(), b.float(), options.scale) for a, b in pairs]).mean()


def _error(full: torch.Tensor, mixed: torch.Tensor, scale: str) -> torch.Tensor:
    error = (mixed - full).square().sum(-1).mean()
    if scale == "sum":
        return error
    return error / full.square().sum(-1).mean().clamp(min=1e-12)
