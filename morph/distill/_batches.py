"""Where distillation takes its batches from: text, needle tasks, and a share of each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from morph.data import TextBatches, needle_examples
from morph.distill._packing import Epochs, cut
from morph.distill._stages import is_needle_step, steps_of
from morph.errors import DataError
from morph.recipes.schema import Stage

IGNORED = -100  # the label of tokens that are not supervised, as in transformers


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch: ids `[B, T]`, and what else is known of its tokens.

    labels `[B, T]`: the ids of tokens to be learnt, -100 elsewhere; None: every real token.
    positions `[B, T]` count from 0 in every document of a row; None: a row is one document.
    real `[B, T]` bool is False for padding, which is on the right; None: there is none.
    """

    ids: torch.Tensor
    labels: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    real: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what there is, by name."""
        found = {n: getattr(self, n) for n in ("ids", "labels", "positions", "real")}
        return {n: t for n, t in found.items() if t is not None}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with every tensor changed: rows picked, or moved to a device."""
        return Batch(**{n: change(t) for n, t in self.tensors().items()})

    def parts(self, rows: int | None) -> list[Batch]:
        """Return the batch in pieces of at most so many rows; None: whole."""
        total = self.ids.shape[0]
        step = rows or total
        return [self.map(lambda t, a=a: t[a : a + step]) for a in range(0, total, step)]

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a base model's forward."""
        told = {} if self.positions is None else {"position_ids": self.positions}
        return {"input_ids": self.ids, "use_cache": False, **told}

    def wanted(self, shifted: bool) -> torch.Tensor:
        """Return the token that each position is to predict `[B, T]`, -100 where none counts.

        Not `shifted`: every real position counts, whatever follows, as a divergence has it.
        """
        if self.labels is None and not shifted:
            return self.ids if self.real is None else self.ids.masked_fill(~self.real, IGNORED)
        labels = self.ids if self.labels is None else self.labels
        wanted = torch.full_like(self.ids, IGNORED)
        wanted[:, :-1] = labels[:, 1:]
        if self.positions is not None:  # the first token of a document follows from nothing
            starts = self.positions[:, 1:] != self.positions[:, :-1] + 1
            wanted[:, :-1] = wanted[:, :-1].masked_fill(starts, IGNORED)
        if self.real is not None:
            wanted[:, :-1] = wanted[:, :-1].masked_fill(~self.real[:, 1:], IGNORED)
        return wanted


class Batches(Protocol):
    """Batches of one stage: `batch(step)` is a pure function of the step.

    Returns token ids `[B, T]`, or (ids, labels), or a `Batch`.
    """

    def batch(self, step: int) -> Any:
        """Return the batch of one step, of the whole run (processes take their rows of it)."""


Source = Callable[[int, Stage], Batches]  # (index of the stage, stage) -> its batches


def text_batches(ids: torch.Tensor, *, seed: int, bos: int | None = None) -> Source:
    """Return a source of windows of a text `[N]`, read in epochs, in another order in every stage.

    See `data.TextBatches` for what an epoch is.
    """

    def source(index: int, stage: Stage) -> Batches:
        return TextBatches(ids, stage.batch_size, stage.seq_len, _own(seed, index), bos)

    return source


def document_batches(
    ids: torch.Tensor,
    starts: torch.Tensor,
    *,
    seed: int,
    bos: int | None = None,
    eos: int | None = None,
) -> Source:
    """Return a source of whole documents of a text `[N]`, packed into rows; starts are `[D]`.

    An epoch puts every document into a row, first fit in an order of its own. Documents longer
    than a row are cut into pieces, each a document of its own. Every one begins with `bos` and
    ends with `eos` where these are given and not there already; a piece that goes on has no `eos`.
    Positions restart at every document; padding at the end of a row is a document of its own and
    not real. Raises DataError where there is no text, or starts that do not rise within it.
    """

    def source(index: int, stage: Stage) -> Batches:
        own = _own(seed, index)
        return PackedBatches(ids, starts, stage.batch_size, stage.seq_len, own, bos, eos)

    return source


class PackedBatches:
    """Rows of whole documents, each batch a pure function of seed and step; `document_batches`."""

    def __init__(
        self,
        ids: torch.Tensor,
        starts: torch.Tensor,
        batch_size: int,
        seq_len: int,
        seed: int,
        bos: int | None = None,
        eos: int | None = None,
    ) -> None:
        if batch_size < 1 or seq_len < 1 + (bos is not None):
            raise DataError(
                f"batch_size {batch_size} and seq_len {seq_len}: both must be at least 1 "
                "(2 tokens a row with BOS)"
            )
        places = starts.numpy().astype(np.int64)
        rising = bool(len(places)) and bool(np.all(np.diff(places) > 0))
        if not rising or places[0] < 0 or places[-1] >= len(ids):
            raise DataError(
                f"{len(places)} documents in a text of {len(ids)} tokens: their starts must rise "
                "within it, and there must be one"
            )
        self.ids, self.batch_size, self.seq_len = ids, batch_size, seq_len
        self.bos = 0 if bos is None else bos  # no row of the table asks for what is None
        self.eos = self.bos if eos is None else eos
        last = np.append(places[1:], len(ids)) - 1
        lacking_bos = None if bos is None else (ids[places] != bos).numpy()
        lacking_eos = None if eos is None else (ids[last] != eos).numpy()
        self.table = cut(places, len(ids), seq_len, lacking_bos, lacking_eos)
        self.epochs = Epochs(self.table[:, 1:].sum(1), seq_len, seed)

    def batch(self, step: int) -> Batch:
        """Return the batch of one step: ids, positions and real tokens, all `[B, T]`."""
        shape = (self.batch_size, self.seq_len)
        ids = self.ids.new_full(shape, self.eos)
        positions = torch.zeros(shape, dtype=torch.long)
        real = torch.zeros(shape, dtype=torch.bool)
        for row in range(self.batch_size):
            at = 0
            for piece in self.epochs.pieces(step * self.batch_size + row):
                start, count, head, tail = self.table[piece].tolist()
                end = at + head + count + tail
                positions[row, at:end] = torch.arange(end - at)
                if head:
                    ids[row, at] = self.bos
                ids[row, at + head : at + head + count] = self.ids[start : start + count]
                if tail:
                    ids[row, end - 1] = self.eos
                at = end
            real[row, :at] = True
            positions[row, at:] = torch.arange(self.seq_len - at)
        return Batch(ids=ids, positions=positions, real=real)


def _own(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def epochs_of(stages: Sequence[Stage], tokens_of_text: int) -> float:
    """Return how often the stages together read a text of so many tokens; needles do not count."""
    return _asked(stages) / max(1, tokens_of_text)


def check_epochs(stages: Sequence[Stage], tokens_of_text: int, epochs: float | None) -> None:
    """Raise DataError where the stages would read the text more often than `epochs` times.

    None allows any number. Padding and tokens put in front of rows count as text.
    """
    read = epochs_of(stages, tokens_of_text)
    if epochs is None or read <= epochs:
        return
    # Every stage may round up to a whole batch
    most = math.floor(tokens_of_text * epochs) - sum(s.batch_size * s.seq_len - 1 for s in stages)
    fewer = f"ask for at most {most:,} tokens, " if most > 0 else ""
    raise DataError(
        f"the text has {tokens_of_text:,} tokens to train on and the stages ask for "
        f"{_asked(stages):,}: it would be read {read:.1f} times, data.epochs allows {epochs:g}. "
        f"Give more text, {fewer}or set data.epochs to {math.ceil(read)}."
    )


def _asked(stages: Sequence[Stage]) -> int:
    asked = 0
    for stage in stages:
        steps = steps_of(stage)
        plain = steps - math.floor(steps * stage.needles)  # see `is_needle_step`
        asked += plain * stage.batch_size * stage.seq_len
    return asked


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

    def batch(self, index: int, step: int) -> Batch:
        """Return the batch of a step of stage `index`.

        Raises DataError where the batch is not what the stage asks for.
        """
        stage, needles = self.stages[index], self.needles[index]
        if needles is not None and is_needle_step(stage, step):
            found = _as_batch(needles.batch(step))
        else:
            found = _as_batch(self.text[index].batch(step))
        ids, labels = found.ids, found.labels
        where = f"stage {index} ({stage.loss}), step {step}"
        fits = ids.dim() == 2 and ids.shape[0] == stage.batch_size and ids.shape[1] >= 2
        if not fits or (labels is None and ids.shape[1] != stage.seq_len):
            raise DataError(
                f"{where}: the batch is {tuple(ids.shape)}, the stage asks for "
                f"({stage.batch_size}, {stage.seq_len})."
            )
        for name, tensor in found.tensors().items():
            if tensor.shape != ids.shape:
                raise DataError(
                    f"{where}: {name} are {tuple(tensor.shape)}, ids {tuple(ids.shape)}."
                )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab:
            raise DataError(
                f"{where}: token {high if high >= self.vocab else low} is outside the vocabulary "
                f"(0-{self.vocab - 1}); was the text encoded with this model's tokenizer?"
            )
        return found

    def digest(self) -> str:
        """Return a sha256 over the first and last batch of every stage, needles included."""
        digest = hashlib.sha256()
        for index, stage in enumerate(self.stages):
            steps = steps_of(stage)
            chosen = {0, steps - 1}
            if self.needles[index] is not None:
                chosen.add(next((s for s in range(steps) if is_needle_step(stage, s)), 0))
            for step in sorted(chosen):
                for tensor in self.batch(index, step).tensors().values():
                    digest.update(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()


def _as_batch(found: Any) -> Batch:
    if isinstance(found, Batch):
        return found
    ids, labels = found if isinstance(found, tuple) else (found, None)
    return Batch(ids=ids, labels=labels)
