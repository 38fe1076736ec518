"""Causal head patching: how much of the answer is lost when one head is told another needle.

What it measures: a counterfactual prompt has another answer in the needle. A head's output is
replaced by the one it has there, everything downstream frozen; the score is the share of the
answer's logit margin that this takes away (receivers). Heads further up score by what they say to
the receivers alone (senders, by path patching), and so on until no new head appears. With a
windowed mixer only what a head brings from beyond the window counts: the mixer brings the rest too.
Why it works: it intervenes, so a head that looks at the needle and passes nothing on scores 0, and
one head is told apart from its neighbours in the same layer.
Cost: about half a forward per head, with attention frozen (MLPs only); senders about as much again
to 1.5 times, per round. No gradients. Memory: the head outputs of all examples, twice.
Options: decay 0.9 (weight of later answer tokens), threshold 0.01 (the effect from which a head
counts), floor 0.5 (pairs whose margin differs by less, in logits, are dropped), senders true,
max_receivers 16 (listeners added per round, the strongest), max_rounds 3, reach (heads are patched
at tokens at least so far behind the needle; the mixer's window where it has one, else 0).
Known limits: one head at a time, so that heads which back each other up are under-scored. The
counterfactual changes the answer in the needle and nothing else: a head that never sees the answer,
such as the first hop that finds the key of the second, says the same in both and scores 0; chains
and redundant copies are repaired by the verify-and-swap pass. It needs questions whose answer
stands in the prompt, and a model that can answer them. Layers that slide in the source are not
frozen. The score ranks and does not say how many heads are needed.
Reference: HydraHead, arXiv 2606.20097, eq. 9 and 10. Deviations: distractors are the next answer
token in the sorted set of those seen, for every copy of the answer in the prompt (the paper:
same-type, same-length replacements); answers are teacher-forced and the same in both prompts; the
sub-probes of kappa are the examples; there is one capability. `reach` is ours (the paper patches at
all tokens: reach 0), since heads that pass the needle on to its neighbours need no full attention;
where the window covers the text every score is zero. In path patching receivers hear each
other, the sender's own direct effect is left out, and everything that is not selected stays frozen
(the paper's bookkeeping is not public). The constrained screening, at least one full head in every
layer, is part of the budget: `min_full_per_layer: 1`, as `morph plan` says. A KV head or
layer scores the largest of its query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _common, _needles
from morph.selectors._patching import Bench, Listeners, Pair, Unit, far_from
from morph.surgery import Batch, Morphable, answer_tokens

NEEDS = "forward"
NEEDLES = True  # questions whose answer stands in the prompt


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the hydrahead selector; an empty `reach` is the mixer's window, or 0."""

    decay: float = 0.9
    threshold: float = 0.01
    floor: float = 0.5
    senders: bool = True
    max_receivers: int = 16
    max_rounds: int = 3
    reach: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("decay", 0.0, 1.0), ("threshold", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise PlanError(
                    f"selector hydrahead: {name} is {getattr(self, name)}; it lies in [0, 1]."
                )
        if self.floor <= 0:
            raise PlanError(
                f"selector hydrahead: floor is {self.floor}; effects are divided by a margin of at "
                "least this many logits, so give more than 0."
            )
        if self.reach is not None and self.reach < 0:
            raise PlanError(
                f"selector hydrahead: reach is {self.reach}; give 0 (patch everywhere) or more."
            )
        for name in ("max_receivers", "max_rounds"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"selector hydrahead: {name} is {getattr(self, name)}; give 1 or more "
                    "(--set selector.senders=false looks at receivers only)."
                )


def cost(shape: Geometry, options: Options, granularity: Granularity) -> _common.Cost:
    """Both prompts, part of a forward per head, and for senders more in each of the rounds.

    One round of senders, as most runs have; with attention frozen forwards are cheap.
    """
    layers, heads = shape.num_hidden_layers, shape.num_attention_heads
    share = heads * sum(layers - i for i in shape.candidates) / layers
    rounds = min(1, options.max_rounds) if options.senders else 0
    return _common.Cost(forwards=3.0 + share * (1 + 1.5 * rounds))


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return the causal importance of every unit, min-max normalised over all heads.

    Raises PlanError without batches, where no answer stands in its prompt, where all answers are
    one and the same token, and where no counterfactual moves the model's answer.
    """
    _common.need_batches(batches, "hydrahead")
    reach = options.reach
    if reach is None:
        reach = int(morphable.options.get("window") or 0)
    benches = [Bench(morphable, pair, options.decay) for pair in pairs(batches, reach)]
    telling = [bench.before - bench.after >= options.floor for bench in benches]
    if not any(bool(rows.any()) for rows in telling):
        raise _unmoved(benches, options)
    told, accuracy = torch.cat(telling), _accuracy(benches)
    benches = [bench for bench, rows in zip(benches, telling) if bool(rows.any())]
    kept = torch.cat([rows for rows in telling if bool(rows.any())])
    units = _common.units(morphable, "head")
    received = _receive(morphable, benches, units)[:, kept]
    sent, listeners = torch.zeros_like(received), _strongest(units, received.mean(1), options)
    found: dict[str, list[Unit]] = {"receivers": sorted(listeners), "senders": []}
    if options.senders:
        sent, found["senders"] = _send(morphable, benches, units, listeners, kept, options)
    effect = torch.maximum(received, sent)
    kappa = (effect > options.threshold).double().mean(1)
    raw = torch.maximum(received.mean(1), sent.mean(1)) * kappa
    low, high = raw.min(), raw.max()
    table = ((raw - low) / (high - low if high > low else 1.0)).view(len(morphable.candidates), -1)
    values = _common.as_values(
        morphable, _common.group_max(table, morphable.geometry.units(granularity))
    )
    provenance: dict[str, Any] = {
        **{name: [list(unit) for unit in units_] for name, units_ in found.items()},
        "pairs": int(kept.sum()),
        "pairs_dropped": int((~told).sum()),
        "largest_effect": float(raw.max()),
        "accuracy": accuracy,
        "reach": reach,
        "min_full_per_layer": 1,
    }
    unit = "causal importance, normalised"
    return _common.scores(morphable, "hydrahead", granularity, values, unit, provenance)


def pairs(batches: Sequence[Batch], reach: int = 0) -> list[Pair]:
    """Return every batch with its counterfactual: each answer token in the needle is another one.

    Heads are patched at tokens at least `reach` behind the needle. Batches without a needle are
    left out. Raises PlanError where none is left, or where there is no other token to put in.
    """
    located = _needles.need(batches, "hydrahead")
    tokens = sorted(
        {int(t) for b, at in zip(batches, located) for t in answer_tokens(b)[at.step >= 0]}
    )
    if len(tokens) < 2:
        raise PlanError(
            f"selector hydrahead: all answers are the one token {tokens[0]}, so that there is no "
            "other to put in its place. Give more examples (--set select.examples=16)."
        )
    following = dict(zip(tokens, tokens[1:] + tokens[:1]))
    return [_pair(b, at, following, reach) for b, at in zip(batches, located) if at.needles]


def _pair(batch: Batch, located: _needles.Located, following: dict[int, int], reach: int) -> Pair:
    other, right = batch.ids.clone(), answer_tokens(batch)
    for needle in located.needles:
        answer = batch.ids[needle.row, needle.start : needle.start + needle.length].tolist()
        swapped = torch.tensor([following[t] for t in answer]).to(other)
        for copy in needle.copies:
            other[needle.row, copy : copy + needle.length] = swapped
    wrong = torch.tensor([following.get(t, t) for t in right.tolist()]).to(right)
    return Pair(
        batch=batch,
        other=other,
        far=far_from(batch.ids, other, reach),
        right=right,
        wrong=wrong,
        step=located.step,
    )


def _accuracy(benches: Sequence[Bench]) -> float:
    return float(torch.cat([bench.correct for bench in benches]).double().mean())


def _unmoved(benches: Sequence[Bench], options: Options) -> PlanError:
    before, after = (
        float(torch.cat([getattr(bench, name) for bench in benches]).mean())
        for name in ("before", "after")
    )
    return PlanError(
        f"selector 'hydrahead': with another answer in the needle the model's margin for the right "
        f"one goes from {before:.2f} to {after:.2f} logits, in no example by the floor of "
        f"{options.floor}; it gets {_accuracy(benches):.1%} of the answer tokens right. Where "
        "nothing is recalled there is nothing to patch: give an easier task (--set "
        "select.task=single_1), or a selector that needs plain text only (--selector fisher or kl "
        "with --set select.task=text)."
    )


def _strongest(units: Sequence[Unit], mean: torch.Tensor, options: Options) -> set[Unit]:
    """Return the units above the threshold, at most `max_receivers`; ties go to the lower index."""
    above = {u: x for u, x in zip(units, mean.tolist()) if x >= options.threshold}
    return set(_common.kept_units(above, options.max_receivers))


def _receive(morphable: Morphable, benches: Sequence[Bench], units: Sequence[Unit]) -> torch.Tensor:
    """Return IE `[units, E]` of every head by itself."""
    total = len(benches) * len(units)

    def tell(before: int, done: int) -> None:
        morphable.progress(before + done, total)

    return torch.cat(
        [b.receive(units, partial(tell, n * len(units))) for n, b in enumerate(benches)], dim=1
    )


def _send(
    morphable: Morphable,
    benches: Sequence[Bench],
    units: Sequence[Unit],
    listeners: set[Unit],
    kept: torch.Tensor,
    options: Options,
) -> tuple[torch.Tensor, list[Unit]]:
    """Return IE `[units, kept examples]` by path patching, and the heads found in this way.

    The first round asks every head in front of a receiver, the later ones those not selected yet:
    new senders become listeners, beside all before them.
    """
    best = torch.zeros(len(units), int(kept.sum()), dtype=torch.float64)
    new, found, asked = listeners, set[Unit](), list(range(len(units)))
    for _ in range(options.max_rounds):
        last = max((layer for layer, _ in new), default=-1)
        asked = [n for n in asked if units[n][0] < last]
        if not asked:
            break
        done, sent = 0, []
        for bench in benches:
            group, row = Listeners(bench, listeners), []
            for n in asked:
                row.append(bench.send(units[n], group))
                done += 1
                morphable.progress(done, len(asked) * len(benches))
            sent.append(torch.stack(row))
        effect = torch.cat(sent, dim=1)[:, kept]
        best[asked] = torch.maximum(best[asked], effect)
        mean = dict(zip([units[n] for n in asked], effect.mean(1).tolist()))
        found |= {unit for unit, x in mean.items() if x >= options.threshold}
        fresh = [u for u in mean if u not in listeners]
        new = _strongest(fresh, torch.tensor([mean[u] for u in fresh]), options)
        listeners = listeners | new
        asked = [n for n in asked if units[n] not in listeners]
    return best, sorted(found)
