"""Where distillation takes its batches from: text, needle tasks, and a share of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from morph.data import TextBatches, needle_examples
from morph.distill._stages import is_needle_step, steps_of
from morph.errors import DataError
from morph.recipes.schema import Stage

IGNORED = -100  # the label of tokens that are not supervised, as in transformers


class Batches(Protocol):
    """Batches of one stage: `batch(step)` is a pure function of the step.

    Plain text gives token ids `[B, T]`; needle batches give (ids, labels), both `[B, T]`, labels
    the ids where the answer is and -100 elsewhere. Rows have no padding on the left.
    """

    def batch(self, step: int) -> Any:
        """Return the batch of one step, of the whole run (processes take their rows of it)."""


Source = Callable[[int, Stage], Batches]  # (index of the stage, stage) -> its batches


def text_batches(ids: torch.Tensor, *, seed: int, bos: int | None = None) -> Source:
    """Return a source of random windows of a text `[N]`, other windows in every stage."""

    def source(index: int, stage: Stage) -> Batches:
        own = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        return TextBatches(ids, stage.batch_size, stage.seq_len, own, bos)

    return source


def needle_batches(
    task: str, tokenizer: Any, ids: torch.Tensor | None, *, seed: int, **options: Any
) -> Source:
    """Return a source of needle tasks hidden in a text `[N]`, the answers supervised.

    Rows are `seq_len` tokens long and depths uniform; `options` go to `data.needle_examples`.
    """

    class Needles:
        def __init__(self, index: int, stage: Stage) -> None:
            self.index, self.stage = index, stage

        def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
            rng = np.random.default_rng([seed, self.index, step])
            examples = needle_examples(
                task,
                tokenizer,
                ids,
                length=self.stage.seq_len,
                depths=rng.random(self.stage.batch_size).tolist(),
                count=self.stage.batch_size,
                seed=int(rng.integers(2**31)),
                **options,
            )
            rows = torch.tensor([e.ids for e in examples])
            labels = torch.full_like(rows, IGNORED)
            for i, e in enumerate(examples):
                labels[i, e.answer_start :] = rows[i, e.answer_start :]
            return rows, labels

    return Needles


class StageBatches:
    """The batches of all stages, checked; `vocab` is the number of token ids there are."""

    def __init__(
        self, stages: Sequence[Stage], text: Source, needles: Source | None, vocab: int
    ) -> None:
        self.stages, self.vocab = stages, vocab
        self.text = [text(i, s) for i, s in enumerate(stages)]
        self.needles = [
            needles(i, s) if needles and s.needles else None for i, s in enumerate(stages)
        ]

    def batch(self, index: int, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ids `[B, T]` and labels (None: plain text) of a step of stage `index`.

        Raises DataError where the batch is not what the stage asks for.
        """
        stage, needles = self.stages[index], self.needles[index]
        labels = None
        if needles is not None and is_needle_step(stage, step):
            ids, labels = needles.batch(step)
        else:
            ids = self.text[index].batch(step)
        where = f"stage {index} ({stage.loss}), step {step}"
        fits = ids.dim() == 2 and ids.shape[0] == stage.batch_size and ids.shape[1] >= 2
        if not fits or (labels is None and ids.shape[1] != stage.seq_len):
            raise DataError(
                f"{where}: the batch is {tuple(ids.shape)}, the stage asks for "
                f"({stage.batch_size}, {stage.seq_len})."
            )
        if labels is not None and labels.shape != ids.shape:
            raise DataError(f"{where}: labels are {tuple(labels.shape)}, ids {tuple(ids.shape)}.")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab:
            raise DataError(
                f"{where}: token {high if high >= self.vocab else low} is outside the vocabulary "
                f"(0-{self.vocab - 1}); was the text encoded with this model's tokenizer?"
            )
        return ids, labels

    def digest(self) -> str:
        """Return a sha256 over the first and last batch of every stage, needles included."""
        digest = hashlib.sha256()
        for index, stage in enumerate(self.stages):
            steps = steps_of(stage)
            chosen = {0, steps - 1}
            if self.needles[index] is not None:
                chosen.add(next((s for s in range(steps) if is_needle_step(stage, s)), 0))
            for step in sorted(chosen):
                for tensor in self.batch(index, step):
                    if tensor is not None:
                        digest.update(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()
