"""Hard-concrete L0 gates under a sparsity constraint: which units a random mask must not drop.

What it measures: every unit has a log alpha; in each step a mask is drawn (mostly exact zeros and
ones), masked units run full, the others cheap, and the loss on answers is minimised while an
augmented Lagrangian drives the expected share of cheap units to the budget. Log alpha is the score.
Why it works: a unit is either there or not, so none can hide behind a small amplitude, and units
that back each other up are told apart by the draws in which one is missing.
Cost: `steps` times a mixed forward and its way back on `batch_size` examples.
Options: count (units to keep; filled in from the budget), scope (global, or layer: every layer
keeps the same share of its heads), objective (nll, or kl to the source, which needs a second
forward), steps (200), lr (0.1), warmup (share of the steps over which the target rises: 0.8),
start (5.0), batch_size (4), train (masks, or weights: the model's weights learn beside the masks at
weight_lr and are put back bit for bit), weight_lr (1e-5), seed.
Known limits: only trustworthy where the constraint was met and the masks are polarised; it warns
where not (more steps or a larger lr help). The order within the kept, and the dropped, is weak.
Reference: ConSA, arXiv 2606.18056, whose mathematics are those of PruLong (MIT code, read);
hard concrete after Louizos et al., arXiv 1712.01312. Deviations: the loss is that of the answers
and weights stay as they are by default (the paper trains both on plain text for a billion tokens);
the budget's exact count is taken by rank, where the paper cuts log alpha at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common, _gates
from morph.surgery import Batch, Morphable, answer_losses

NEEDS = "backward"
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature and stretch of the hard concrete
EXAMPLE = {"steps": 6}
SHIFT = -BETA * math.log(-LOW / HIGH)  # 1.5986: P(z != 0) = sigmoid(log_alpha + SHIFT)
MISSED, GREY = 0.05, 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the consa selector."""

    count: int | None = None
    scope: Literal["global", "layer"] = "global"
    objective: Literal["nll", "kl"] = "nll"
    steps: int = 200
    lr: float = 0.1
    warmup: float = 0.8
    start: float = 5.0
    batch_size: int = 4
    train: Literal["masks", "weights"] = "masks"
    weight_lr: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0 or not 0 <= self.warmup <= 1:
            raise PlanError(
                f"selector consa: steps {self.steps}, batch_size {self.batch_size}, lr {self.lr}, "
                f"warmup {self.warmup}: steps and batch_size are at least 1, lr above 0, warmup a "
                "share between 0 and 1."
            )


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """A mixed forward (and a source forward for kl) and a way back, every step."""
    forwards = options.steps * (2 if options.objective == "kl" else 1)
    return _common.Cost(forwards=forwards, backwards=options.steps, rows=options.batch_size)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return the log alpha of every unit; with scope `layer` its rank in its layer first.

    Raises PlanError without batches, without a count, and where the first step is not finite.
    """
    _common.need_batches(batches, "consa")
    log_alpha = _gates.unit_gates(morphable, granularity, options.start)
    target = 1 - _kept_share(options, granularity, log_alpha)
    multipliers = torch.zeros(2, log_alpha.shape[0] if options.scope == "layer" else 1)
    multipliers = multipliers.to(log_alpha.device).requires_grad_(True)
    groups = [
        _gates.Group(parameters=[log_alpha], lr=options.lr),
        _gates.Group(parameters=[multipliers], lr=options.lr, ascent=True),
    ]
    weights = list(morphable.model.parameters()) if options.train == "weights" else []
    if weights:
        groups.append(_gates.Group(parameters=list(weights), lr=options.weight_lr))

    def loss_at(step: int, batch: Batch) -> torch.Tensor:
        z = draw(log_alpha, torch.Generator().manual_seed(options.seed * 1_000_003 + step))
        mixed = morphable.logits(batch, _gates.soft(morphable, z))
        aim = target * _rise(step, options)
        return _loss(morphable, batch, mixed, options) + lagrangian(log_alpha, multipliers, aim)

    with _gates.learning(weights) if weights else nullcontext():
        run = _gates.train(
            morphable,
            f"consa {options} {granularity}",
            groups,
            _gates.rows(batches, options.batch_size),
            loss_at,
            steps=options.steps,
        )
    told = {**_gates.told(run, log_alpha), **_trust(log_alpha.detach(), target)}
    values = log_alpha.detach()
    if options.scope == "layer":
        values = by_rank(values)
    found = _common.as_values(morphable, values)
    return _common.scores(morphable, "consa", granularity, found, "log alpha", told)


def draw(log_alpha: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a mask of log_alpha's shape in [0, 1], one draw of the hard concrete."""
    u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    noise = (u.log() - (1 - u).log()).to(log_alpha.device)
    s = torch.sigmoid((noise + log_alpha) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def sparsity(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return the expected share of cheap units `[layers]`: 1 - mean P(z != 0)."""
    return 1 - torch.sigmoid(log_alpha + SHIFT).mean(dim=-1)


def lagrangian(
    log_alpha: torch.Tensor, multipliers: torch.Tensor, target: float | torch.Tensor
) -> torch.Tensor:
    """Return lambda (s - t) + phi (s - t)^2, over layers where `multipliers` `[2, L]` has them.

    The multipliers are trained to make it larger, so that missing the target gets ever dearer.
    """
    found = sparsity(log_alpha)
    if multipliers.shape[1] == 1:
        found = found.mean(dim=0, keepdim=True)
    gap = found - target
    return (multipliers[0] * gap + multipliers[1] * gap.square()).sum()


def by_rank(log_alpha: torch.Tensor) -> torch.Tensor:
    """Return scores whose global top K takes the same number from every layer.

    The best unit of each layer comes before the second best of any; within a place, log alpha
    decides.
    """
    place = log_alpha.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.sigmoid(log_alpha) - place


def _kept_share(options: Options, granularity: Granularity, log_alpha: torch.Tensor) -> float:
    total = log_alpha.numel()
    if options.count is None:
        raise PlanError("selector consa: give selector.count, the units to keep, or a --budget.")
    if not 1 <= options.count <= total:
        raise PlanError(f"selector consa: count is {options.count}; it lies in 1-{total}.")
    if options.scope == "layer" and (log_alpha.shape[1] < 2 or options.count % log_alpha.shape[0]):
        raise PlanError(
            f"selector consa: scope=layer keeps the same number of heads in each of the "
            f"{log_alpha.shape[0]} layers, and {options.count} {granularity} units do not divide "
            "so. Change the budget, or --set selector.scope=global."
        )
    return options.count / total


def _rise(step: int, options: Options) -> float:
    return min(1.0, (step + 1) / max(1.0, options.warmup * options.steps))


def _loss(
    morphable: Morphable, batch: Batch, mixed: torch.Tensor, options: Options
) -> torch.Tensor:
    if options.objective == "nll":
        return answer_losses(mixed, batch).mean()
    with torch.no_grad():
        p = torch.log_softmax(morphable.logits(batch, {}).float(), dim=-1)
    return (p.exp() * (p - torch.log_softmax(mixed.float(), dim=-1))).sum(-1).mean()


def _trust(log_alpha: torch.Tensor, target: float) -> dict[str, Any]:
    """Return how far the constraint was missed, how many masks are undecided, and a warning."""
    gap = float(sparsity(log_alpha).mean()) - target
    open_ = torch.sigmoid(log_alpha + SHIFT)
    grey = float(((open_ > 0.1) & (open_ < 0.9)).float().mean())
    told: dict[str, Any] = {
        "target_sparsity": round(target, 4),
        "expected_sparsity": round(target + gap, 4),
        "undecided": round(grey, 4),
    }
    wrong = []
    if abs(gap) > MISSED:
        wrong.append(f"the expected sparsity is {target + gap:.2f}, the target {target:.2f}")
    if grey > GREY:
        wrong.append(f"{grey:.0%} of the masks are neither open nor shut")
    if wrong:
        told["warning"] = f"{' and '.join(wrong)}: give more selector.steps, or a larger lr."
    return told
