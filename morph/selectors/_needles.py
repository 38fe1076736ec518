"""Answers that stand in their own prompt: where the needle is, told from token ids alone.

A batch has ids and a mask of answer tokens, nothing else. A run of neighbouring answer tokens is
one answer; its needle is every place before the row's first answer token where the same tokens
stand in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from morph.errors import PlanError
from morph.surgery import Batch


@dataclass(frozen=True, kw_only=True)
class Needle:
    """An answer of `length` tokens from `start` on in `row`, and where its copies begin."""

    row: int
    start: int
    length: int
    copies: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Located:
    """The needles of one batch, and the same by answer token; N answer tokens, in order.

    `inside` `[N, T]` bool are the tokens of the needle that an answer token is part of; `step`
    `[N]` is its place in the answer. Without a needle: no token, and -1.
    """

    needles: tuple[Needle, ...]
    inside: torch.Tensor
    step: torch.Tensor


def locate(batch: Batch) -> Located:
    """Return where the answers of a batch stand in their prompts."""
    mask, device = batch.answers, batch.ids.device
    number = (mask.flatten().cumsum(0) - 1).view(mask.shape)  # which answer token it is
    total = int(mask.sum())
    inside = torch.zeros(total, mask.shape[1], dtype=torch.bool, device=device)
    step = torch.full((total,), -1, device=device)
    found = []
    for row, start, length in _answers(mask):
        first = int(mask[row].nonzero()[0])
        if first < length:
            continue
        answer = batch.ids[row, start : start + length]
        same = (batch.ids[row, :first].unfold(0, length, 1) == answer).all(dim=1)
        copies = tuple(same.nonzero()[:, 0].tolist())
        if not copies:
            continue
        found.append(Needle(row=row, start=start, length=length, copies=copies))
        own = number[row, start : start + length]
        step[own] = torch.arange(length, device=device)
        for copy in copies:
            inside[own, copy : copy + length] = True
    return Located(needles=tuple(found), inside=inside, step=step)


def _answers(answers: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (row, start, length) of every run of answer tokens."""
    for row, marks in enumerate(answers.tolist()):
        start = None
        for at, mark in enumerate([*marks, False]):
            if mark and start is None:
                start = at
            elif not mark and start is not None:
                yield row, start, at - start
                start = None


def need(batches: Sequence[Batch], selector: str) -> list[Located]:
    """Return the needles of every batch; raise PlanError where no answer stands in its prompt."""
    found = [locate(batch) for batch in batches]
    if not any(each.needles for each in found):
        raise PlanError(
            f"selector {selector!r} looks for the answer in the prompt, and no example has its "
            "answer there. Score on questions whose answer can be copied: --set "
            "select.task=multikey (or single_1, single_2, single_3, name_recall)."
        )
    return found
