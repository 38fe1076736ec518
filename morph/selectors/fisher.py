"""Fisher information of gates on every unit: what replacing it, and any pair, costs in KL.

What it measures: put a gate on each unit that moves its output from full (0) to cheap (1). To
second order the KL from the source to the hybrid in which a set C is cheap is half the sum of F
over C x C, where F is the Fisher information of the gates. So F_uu / 2 is what replacing u alone
costs, and F_uv what replacing u and v together costs beyond that: layers in a chain share their
cost, redundant ones amplify each other. The budget then takes the set of least quadratic cost.
Why it works: the gradient of the model's own predictions sees how each unit reaches the answer,
through everything downstream, for all layers, KV heads and heads at once; no label is needed.
Cost: one forward and S backwards over the examples, whatever the granularity. For S = 4 about 7
forwards of time.
Options: samples (S, 4), labels (gaussian: random vectors with the covariance of a label's score;
sampled: labels drawn from the model, which has the same expectation and more noise where the model
is sure), seed.
Known limits: a derivative at the source. It is blind to what only shows after a large step, and
where the model is sure of its answers costs come out much too small, though in the right order:
follow it with the verify-and-swap pass. Backward needs the activations of one batch in memory.
Reference: ours. The quadratic form is the classical second-order expansion of KL; gates as in
Molchanov et al. (arXiv 1906.10771), who use the loss gradient and no interactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common
from morph.surgery import Batch, Morphable, Nudge

NEEDS = "backward"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the fisher selector."""

    samples: int = 4
    labels: Literal["gaussian", "sampled"] = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise PlanError(f"selector fisher: samples is {self.samples}; draw at least 1.")


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """One forward, and a way back for every sample."""
    return _common.Cost(forwards=1, backwards=options.samples)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return 1/2 F_uu in nats per answer token, and F_uv as `pairs`.

    Raises PlanError without batches, and where gradients are not finite.
    """
    _common.need_batches(batches, "fisher")
    found = _common.units(morphable, granularity)
    rows = [_rows(morphable, batch, options) for batch in _common.canonical(batches)]
    table = torch.cat(rows, dim=0)  # [R S, layers, H]
    width = morphable.geometry.units(granularity)
    gradients = _common.to_units(table, width).flatten(1)
    answers = sum(int(batch.answers.sum()) for batch in batches)
    fisher = gradients.T @ gradients / (answers * options.samples)
    values = {u: float(fisher[n, n]) / 2 for n, u in enumerate(found)}
    pairs = {
        (a, b): float(fisher[n, m])
        for n, a in enumerate(found)
        for m, b in enumerate(found)
        if n < m
    }
    provenance = {"samples": options.samples, "labels": options.labels}
    unit = "nats per answer token"
    return _common.scores(morphable, "fisher", granularity, values, unit, provenance, pairs)


def _rows(morphable: Morphable, batch: Batch, options: Options) -> torch.Tensor:
    """Return gradients `[S B, layers, H]` of a label's log-likelihood, row by row, by gate.

    Rows are independent, so one way back through the batch gives the gradient of every row.
    """
    heads, width = batch.ids.shape[0], morphable.geometry.num_attention_heads
    key = f"fisher {_common.digest(batch)} {options}"
    remembered = morphable.memo.get(key)
    shape = (options.samples * heads, len(morphable.candidates), width)
    if remembered is not None:
        return torch.tensor(remembered, dtype=torch.float64).view(shape)
    device = batch.ids.device
    amounts = [torch.zeros(heads, width, device=device) for _ in morphable.candidates]
    for amount in amounts:
        amount.requires_grad_(True)
    modes = {i: Nudge(amount=a) for i, a in zip(morphable.candidates, amounts)}
    logits = morphable.logits(batch, modes).float()
    generator = torch.Generator().manual_seed(options.seed)
    found = []
    for n in range(options.samples):
        loss = (_label_score(logits.detach(), options.labels, generator) * logits).sum()
        again = n + 1 < options.samples
        found.append(torch.stack(morphable.gradients(loss, amounts, again=again), dim=1))
    table = torch.cat(found).double().cpu()
    if not bool(torch.isfinite(table).all()):
        raise PlanError(
            "selector fisher: gradients are not finite on these examples. Give --dtype float32, "
            "or other text."
        )
    morphable.memo.put(key, table.flatten().tolist())
    return table


def _label_score(logits: torch.Tensor, labels: str, generator: torch.Generator) -> torch.Tensor:
    """Return d log p(y) / d logits `[N, vocab]` for a label y drawn from the model, or its like.

    Its covariance is diag(p) - p p^T. `gaussian` draws a normal vector of that covariance.
    """
    p = torch.softmax(logits, dim=-1)
    if labels == "sampled":
        drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        return torch.zeros_like(p).scatter(-1, drawn, 1.0) - p
    noise = torch.randn(p.shape, generator=generator).to(p.device)
    scaled = p.sqrt() * noise
    return scaled - p * scaled.sum(-1, keepdim=True)
