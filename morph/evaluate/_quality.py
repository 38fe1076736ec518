"""Perplexity and recall of one causal language model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from morph.data import Example
from morph.errors import DataError
from morph.evaluate._common import Model, check_finite, inference, vocab_size
from morph.evaluation import Hit, Measured

LOGITS_LIMIT = 2**27  # elements of logits alive at once: 512 MiB in float32
TOKENS_LIMIT = 2**15  # tokens of one batch of questions, so that long ones go one by one


def perplexity(
    model: Model,
    ids: torch.Tensor,
    *,
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 4,
    bos: int | None = None,
) -> Measured:
    """Return the mean loss of next-token prediction over non-overlapping contexts of a text.

    ids `[N]`; every context has `seq_len` tokens (`bos` first, where given) of which all but the
    first are predicted. At most `max_tokens` tokens of text are read (always one context). Raises
    DataError where the context is longer than the text, VerificationFailed for a loss that is
    not finite.
    """
    take = seq_len - (bos is not None)
    if take < 1 or seq_len < 2:
        raise DataError(f"seq_len is {seq_len}; a context needs at least 2 tokens.")
    count = len(ids) // take
    if count < 1:
        raise DataError(
            f"the text has {len(ids)} tokens, one context needs {take}; give a longer text or a "
            "smaller seq_len."
        )
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // take))
    rows = ids[: count * take].reshape(count, take)
    if bos is not None:
        rows = torch.cat([rows.new_full((count, 1), bos), rows], dim=1)
    step = max(1, min(batch_size, LOGITS_LIMIT // (seq_len * vocab_size(model))))
    means: list[float] = []
    with inference(model) as device:
        for batch in rows.split(step):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, scores in zip(batch, logits):
                loss = cross_entropy(scores[:-1].float(), row[1:], reduction="none")
                means.append(loss.double().mean().item())
    check_finite(means, "the loss")
    value = statistics.fmean(means)
    return Measured(
        value=value,
        ppl=math.exp(min(value, 700.0)),
        tokens=count * (seq_len - 1),
        stderr=statistics.stdev(means) / math.sqrt(count) if count > 1 else None,
        sequences=tuple(means),
    )


def recall(model: Model, examples: Sequence[Example], batch_size: int = 8) -> list[Hit]:
    """Return one Hit per example, in order: is every answer token the model's first choice?

    Teacher-forced: answer tokens before the one in question are the right ones. An example with
    `choices` is right where its answer scores best among them (ties: the earlier choice). Raises
    DataError for an example with no answer or nothing before it.
    """
    for i, example in enumerate(examples):
        if not 0 < example.answer_start < len(example.ids):
            raise DataError(
                f"example {i}: answer_start is {example.answer_start} of {len(example.ids)} "
                "tokens; an answer needs at least one token, and one before it."
            )
    correct: dict[int, bool] = {}
    with inference(model) as device:
        for chunk in _batches([len(e.ids) for e in examples], batch_size):
            answers = _answers(model, [examples[i] for i in chunk], device)
            correct.update(zip(chunk, answers))
    return [
        Hit(
            example=i,
            task=e.task,
            length=e.length,
            depth=e.depth,
            correct=correct[i],
            chance=1 / len(e.choices) if e.choices else 0.0,
        )
        for i, e in enumerate(examples)
    ]


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, each within `batch_size` and `TOKENS_LIMIT`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        full = not batches or len(batches[-1]) == batch_size
        if full or (len(batches[-1]) + 1) * lengths[i] > TOKENS_LIMIT:
            batches.append([])
        batches[-1].append(i)
    return batches


def _answers(model: Model, batch: Sequence[Example], device: torch.device) -> list[bool]:
    # Shorter rows are padded on the right: a causal model never looks there, so the answers are
    # those of each row alone, with no mask for a mixer to get wrong.
    width = max(len(e.ids) for e in batch)
    rows = [[*e.ids, *[e.ids[-1]] * (width - len(e.ids))] for e in batch]
    positions = sorted({p - 1 for e in batch for p in range(e.answer_start, len(e.ids))})
    column = {p: n for n, p in enumerate(positions)}
    logits = model(
        input_ids=torch.tensor(rows, device=device),
        logits_to_keep=torch.tensor(positions, device=device),
        use_cache=False,
    ).logits  # [B, positions, vocabulary]
    correct = []
    for e, scores in zip(batch, logits):
        wanted = scores[[column[p - 1] for p in range(e.answer_start, len(e.ids))]].float()
        check_finite(wanted.abs().max(dim=-1).values.tolist(), "a logit")
        if e.choices:
            best = e.choices[int(wanted[0, list(e.choices)].argmax())]
            correct.append(best == e.answer[0])
        else:
            correct.append(wanted.argmax(dim=-1).tolist() == list(e.answer))
    return correct
