"""Copy score: how often a head looks straight at the token that the model is about to emit.

What it measures: for every query head, the share of answer tokens at which its most attended
position is a token of the needle that equals the token generated there (1 at best).
Why it works: models copy facts out of a long context through a few such retrieval heads, whatever
the text; masking them breaks recall (fewer than 5 % of heads, by the paper).
Cost: one forward, no gradients; no attention matrix, only the rows that predict answers.
Options: none.
Known limits: it observes and does not intervene. A head that looks at the answer and passes nothing
on scores 1 (a bystander). A head that fetches what is needed to find the answer, the first hop of
two, scores 0. It needs questions whose answer stands in the prompt, and a model that can answer
them. The verify-and-swap pass repairs chains and redundant copies.
Reference: Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv
2404.15574. Deviations: answers are teacher-forced and the model's most likely token stands for the
one generated, which is greedy decoding for as long as the model answers right; an example counts
where more than half of its answer tokens are right (official code: ROUGE-1 recall above 50 %); the
needle is the answer's own tokens, found in the prompt by equality, not the sentence around them, so
that a perfect head scores 1 (official: hits per token of the whole sentence); needles and lengths
are those of the examples (official: 3 needles, 20 lengths, 10 depths). A KV head or layer scores
the largest of its query heads: what one of them needs, all keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from morph.errors import PlanError
from morph.plan import Geometry, Granularity, Scores
from morph.selectors import _attention, _common, _needles
from morph.surgery import Batch, Morphable, answer_tokens

NEEDS = "forward"
NEEDLES = True  # questions whose answer stands in the prompt
ENOUGH = 0.5  # share of an example's answer tokens that must be right for it to count


@dataclass(frozen=True, kw_only=True)
class Options:
    """The retrieval_head selector has no options."""


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
    """Return the copy score in [0, 1] of every unit.

    Raises PlanError without batches, where no answer stands in its prompt, and where the model
    answers no example.
    """
    _common.need_batches(batches, "retrieval_head")
    located = _needles.need(batches, "retrieval_head")
    parts = [_of_batch(morphable, *pair) for pair in zip(batches, located)]
    hits = torch.cat([part[0] for part in parts])
    right, counts = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    counted = right > ENOUGH * counts  # an example without a needle has 0 > 0
    accuracy = float(right.sum() / counts.sum())
    if not bool(counted.any()):
        raise PlanError(
            f"selector 'retrieval_head': the model gets {accuracy:.1%} of the answer tokens right "
            "and no example by more than half; where it copies nothing there is no copying to "
            "see. Give an easier task (--set select.task=single_1), or a selector that needs "
            "plain text only (--selector fisher or kl with --set select.task=text)."
        )
    table = (hits[counted] / counts[counted][:, None, None]).mean(0)
    width = morphable.geometry.units(granularity)
    values = _common.as_values(morphable, _common.group_max(table, width))
    provenance: dict[str, Any] = {
        "accuracy": accuracy,
        "examples_counted": int(counted.sum()),
        "needles": sum(len(each.needles) for each in located),
    }
    unit = "share of answer tokens copied"
    return _common.scores(morphable, "retrieval_head", granularity, values, unit, provenance)


def _of_batch(
    morphable: Morphable, batch: Batch, located: _needles.Located
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hits `[B, candidates, H]`, right answer tokens `[B]` and answer tokens `[B]`.

    Answers that do not stand in the prompt are left out of all three.
    """
    looked = attended(morphable, batch)
    seen = torch.stack([looked[1][i] for i in morphable.candidates])  # [L, N, H]
    _attention.need_finite(looked[0], "retrieval_head")
    wanted = answer_tokens(batch)
    has, right = located.step >= 0, looked[0].argmax(-1) == wanted
    rows, at = batch.answers.nonzero().T
    copied = (batch.ids[rows[None, :, None], seen] == wanted[:, None]) & right[:, None]
    copied &= located.inside[torch.arange(len(at), device=at.device)[None, :, None], seen]
    per_row = torch.zeros(len(batch.ids), *copied.shape[::2], dtype=torch.float64)
    per_row.index_add_(0, rows.cpu(), copied.transpose(0, 1).double().cpu())

    def count(mask: torch.Tensor) -> torch.Tensor:
        return torch.bincount(rows[mask].cpu(), minlength=len(batch.ids)).double()

    return per_row, count(has & right), count(has)


@torch.no_grad()
def attended(morphable: Morphable, batch: Batch) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Return the answer logits `[N, vocab]`, and by layer the position `[N, H]` most attended.

    One forward; ties go to the earlier position.
    """
    found: dict[int, torch.Tensor] = {}
    rows, at = batch.answers.nonzero().T

    def probe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        shape = _attention.shape_of(morphable, layer)
        found[layer] = torch.cat(
            [
                _attention.scores(
                    q[row, at[rows == row] - 1], k[row], shape, at[rows == row] - 1
                ).argmax(-1)
                for row in rows.unique().tolist()
            ]
        )

    full = morphable.modes([(i, 0) for i in morphable.candidates])
    return morphable.run(batch, full, probe=probe).logits, found
