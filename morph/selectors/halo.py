"""HALO's ratio: recall lost per commonsense lost, when one unit alone is made cheap.

What it measures: from the source model, each unit is made cheap by itself; R is the recall (share
of answer tokens right), C the share right among other tokens of the same prompts. A unit whose loss
costs much R and little C scores high.
Why it works: what costs recall alone is needed for recall; what costs everything is needed for
everything, and distillation brings much of that back.
Cost: L+1 forwards for L units, about half of that with the morphable model's reuse; R and C come
from the same ones. No gradients.
Options: mode `safe` (default), `faithful` or `jet` (see `ratios`); measure `accuracy` or `nll`
(R and C are then minus the mean loss in nats, less noisy); damage 0.05 (safe: the loss of C above
which a unit is never ranked as convertible); text_tokens 128 (tokens per prompt that C is measured
on, evenly spaced).
Known limits: units that back each other up look unneeded (repaired by the verify-and-swap pass).
With `accuracy` a model that gets nothing right scores zero everywhere, and C differs by little:
most of it is noise, see `standard_errors` in the provenance. `faithful` ranks the unit with the
largest C first whatever its R, since its denominator is zero.
Reference: HALO, arXiv 2601.22156, by its code. Deviations: the official R is the mean of
RULER-QA-SQuAD, FDA and SWDE and its C that of HellaSwag and ARC, through lm-eval; here both come
from the calibration examples. `safe` is ours; `faithful` is the official formula (its published
picks are reproduced from its logs), `jet` is its mode of the same name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _attention, _common
from morph.surgery import Batch, Morphable, answer_losses, answer_rows, answer_tokens

NEEDS = "forward"
Mode = Literal["safe", "faithful", "jet"]
EPSILON, CAP, DAMAGE = 0.005, 50.0, 0.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the halo selector."""

    mode: Literal["safe", "faithful", "jet"] = "safe"
    measure: Literal["accuracy", "nll"] = "accuracy"
    damage: float = DAMAGE
    text_tokens: int = 128

    def __post_init__(self) -> None:
        if self.damage <= 0:
            raise PlanError(
                f"selector halo: damage is {self.damage}; it is a loss of C above 0, such as 0.05."
            )
        if self.text_tokens < 1:
            raise PlanError(f"selector halo: text_tokens is {self.text_tokens}; give 1 or more.")


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """The source, and one partial forward per unit: from its layer on."""
    layers, width = shape.num_hidden_layers, shape.units(granularity)
    share = sum(layers - i for i in shape.candidates) / layers
    return _common.Cost(forwards=1.0 + width * share)


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return HALO's score of every unit.

    Raises PlanError without batches, and where every token is an answer.
    """
    _common.need_batches(batches, "halo")
    found = _common.units(morphable, granularity)
    sums, counts = _table(morphable, batches, options, granularity)
    means = sums.sum(1) / counts.sum(0)
    errors = paired_errors(sums[0] - sums[1:], counts)
    original = (float(means[0, 0]), float(means[0, 1]))
    values = ratios(
        means[1:, 0].tolist(),
        means[1:, 1].tolist(),
        mode=options.mode,
        original=original,
        damage=options.damage,
        noise=[(2 * r, 2 * c) for r, c in errors.tolist()],
    )
    provenance: dict[str, Any] = {
        "mode": options.mode,
        "measure": options.measure,
        "original": {"retrieval": original[0], "commonsense": original[1]},
        "retrieval": means[1:, 0].tolist(),
        "commonsense": means[1:, 1].tolist(),
        "standard_errors": dict(zip(("retrieval", "commonsense"), errors.T.tolist())),
    }
    if options.measure == "accuracy" and original[0] < 0.05:
        provenance["warning"] = (
            f"the source gets {original[0]:.1%} of the answer tokens right: there is no recall to "
            "lose. Give an easier task, or --set selector.measure=nll."
        )
    unit = "recall lost" if options.mode == "jet" else "recall lost per commonsense lost"
    table = dict(zip(found, values))
    return _common.scores(morphable, "halo", granularity, table, unit, provenance)


def ratios(
    retrieval: Sequence[float],
    commonsense: Sequence[float],
    *,
    mode: Mode,
    original: tuple[float, float] | None = None,
    epsilon: float = EPSILON,
    cap: float = CAP,
    damage: float = DAMAGE,
    noise: Sequence[tuple[float, float]] | None = None,
) -> list[float]:
    """Return HALO's scores from R and C with each unit alone made cheap.

    faithful: (max R - R_i) / (max C - C_i + 1e-10), at most `cap`; both maxima are over the units.
    jet: R_original - R_i.
    safe: (R_original - R_i) / (C_original - C_i + epsilon), a gain in C counted as no loss. Where
    both losses are within the noise the score is the loss of R itself, about 0: no small
    denominator promotes it. Where the loss of C exceeds `damage`, the larger of the two losses over
    epsilon: the ratio would rank such a unit below those that do nothing, and it is the last one
    to convert. `noise` bounds the two losses of each unit; epsilon is the least.
    `original` is (R, C) of the untouched model; only faithful does without. PlanError otherwise.
    """
    if mode == "faithful":
        best_r, best_c = max(retrieval), max(commonsense)
        return [
            min(cap, (best_r - r) / (best_c - c + 1e-10)) for r, c in zip(retrieval, commonsense)
        ]
    if original is None:
        raise PlanError(f"halo: mode {mode} compares with the untouched model; give its R and C.")
    lost = [(original[0] - r, original[1] - c) for r, c in zip(retrieval, commonsense)]
    if mode == "jet":
        return [r for r, _ in lost]
    bounds = noise or [(0.0, 0.0)] * len(lost)
    return [_safe(*pair, *bound, epsilon, damage) for pair, bound in zip(lost, bounds)]


def _safe(
    r: float, c: float, noise_r: float, noise_c: float, epsilon: float, damage: float
) -> float:
    if abs(r) <= max(noise_r, epsilon) and abs(c) <= max(noise_c, epsilon):
        return r
    if c > damage:
        return max(r, c) / epsilon
    return r / (max(c, 0.0) + epsilon)


def paired_errors(lost: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the standard error `[units, 2]` of the mean loss of R and of C per token.

    `lost` `[units, E, 2]` are sums over each example's `counts` `[E, 2]` tokens. Examples are what
    is independent; one alone has no error.
    """
    examples, total = counts.shape[0], counts.sum(0)
    mean = lost.sum(1) / total
    spread = (lost - mean[:, None] * counts).square().sum(1)
    return (spread * examples / max(examples - 1, 1)).sqrt() / total


def _table(
    morphable: Morphable, batches: Sequence[Batch], options: Options, granularity: Granularity
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums `[1 + units, E, 2]` of R and C over tokens, the source first, and counts."""
    chosen = [_with_text(batch, options.text_tokens) for batch in batches]
    sums, counts = [], []
    for n, (batch, both) in enumerate(zip(batches, chosen)):
        tell = partial(_tell, morphable, n, len(batches))
        sums.append(_sums(morphable, batch, both, options.measure, granularity, tell))
        counts.append(
            torch.stack([batch.answers.sum(1), (both.answers & ~batch.answers).sum(1)], dim=1)
        )
    return torch.cat(sums, dim=1), torch.cat(counts).double().cpu()


def _tell(morphable: Morphable, batch: int, batches: int, done: int, total: int) -> None:
    morphable.progress(batch * total + done, batches * total)


def _with_text(batch: Batch, limit: int) -> Batch:
    """Return the batch with up to `limit` prompt tokens of every row marked beside the answers."""
    marks = batch.answers.clone()
    for row, answers in zip(marks, batch.answers):
        other = (~answers).nonzero()[:, 0]
        other = other[other > 0]
        if not len(other):
            raise PlanError(
                "selector 'halo' compares answers with the other tokens of their prompts, and in "
                "an example every token is an answer. Give a question task (--set "
                "select.task=multikey), or --selector kl for plain text."
            )
        count = min(limit, len(other))
        row[other[torch.arange(count, device=other.device) * len(other) // count]] = True
    return Batch(ids=batch.ids, answers=marks)


def _sums(
    morphable: Morphable,
    batch: Batch,
    chosen: Batch,
    measure: str,
    granularity: Granularity,
    tell: Callable[[int, int], None],
) -> torch.Tensor:
    """Return the sums `[1 + units, B, 2]` of R and C over each row's tokens, the source first."""
    units = _common.units(morphable, granularity)
    source = morphable.modes(units, granularity)
    changes: list[dict[int, Any]] = [{}]
    for unit in units:
        rest = morphable.modes([u for u in units if u != unit], granularity)
        changes.append({unit[0]: rest[unit[0]]})
    kind = (~batch.answers)[chosen.answers].long()  # 0: an answer, 1: text
    where = 2 * answer_rows(chosen) + kind
    stem = f"halo {measure} {_digest(chosen, batch)} {granularity} "
    keys = [stem + "source", *(f"{stem}{i}.{u}" for i, u in units)]

    def reduce(logits: torch.Tensor) -> list[float]:
        _attention.need_finite(logits, "halo")
        if measure == "nll":
            good = -answer_losses(logits, chosen)
        else:
            good = logits.argmax(-1) == answer_tokens(chosen)
        total = torch.zeros(2 * len(batch.ids), dtype=torch.float64)
        return total.index_add(0, where.cpu(), good.double().cpu()).tolist()

    missing = [n for n, key in enumerate(keys) if key not in morphable.memo]
    if missing:
        # text tokens start at the second one: there is no prefix to share
        trace = morphable.trace(chosen, source, share_prefix=False)
        measured = trace.each([changes[n] for n in missing], reduce)
        for done, (index, value) in enumerate(measured, len(keys) - len(missing) + 1):
            morphable.memo.put(keys[missing[index]], value)
            tell(done, len(keys))
    table = torch.tensor([morphable.memo.get(key) for key in keys], dtype=torch.float64)
    return table.view(len(keys), -1, 2)


def _digest(*batches: Batch) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(batch.ids.cpu().numpy().tobytes() + batch.answers.cpu().numpy().tobytes())
    return found.hexdigest()[:16]
