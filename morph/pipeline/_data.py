"""Text, stories and questions for selection, distillation and evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import strict
from morph.errors import DataError, UsageError
from morph.recipes.schema import Data, Select

if TYPE_CHECKING:
    import torch

    from morph.data import Example
    from morph.surgery import Batch


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of the training and held-out parts of the text, and whole stories of each."""

    train: torch.Tensor
    held_out: torch.Tensor
    train_stories: tuple[str, ...]
    held_out_stories: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The digest of the training part's tokens."""
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()


def corpus(section: Data, tokenizer: Any, root: Path | None = None) -> Corpus:
    """Read and tokenise the files of a data section; the last share of each file is held out.

    Relative paths are tried from `root` (a recipe's folder) and then from the working folder.
    Raises DataError where a file is missing, empty or not text, UsageError without any file.
    """
    import torch

    from morph import data

    if not section.text:
        raise UsageError(
            "no text was given. Name files with --data FILE (.txt, .json, .jsonl), or in the "
            "recipe under data.text."
        )
    if not 0 < section.held_out < 1:
        raise DataError(f"data.held_out is {section.held_out}; it is a share between 0 and 1.")
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    stories: tuple[list[str], list[str]] = ([], [])
    for name in section.text:
        documents = data.read_documents(_find(name, root))
        if len(documents) > 1:
            cut = max(1, round(len(documents) * (1 - section.held_out)))
            halves = documents[:cut], documents[cut:]
            for side, half in enumerate(halves):
                stories[side].extend(half)
                if half:
                    parts[side].append(data.token_ids(tokenizer, "\n".join(half)))
            continue
        ids = data.token_ids(tokenizer, documents[0])
        cut = round(len(ids) * (1 - section.held_out))
        parts[0].append(ids[:cut])
        parts[1].append(ids[cut:])
    return Corpus(
        train=torch.cat(parts[0]),
        held_out=torch.cat(parts[1]),
        train_stories=tuple(stories[0]),
        held_out_stories=tuple(stories[1]),
    )


def _find(name: str, root: Path | None) -> Path:
    path = Path(name).expanduser()
    if root is not None and not path.is_absolute() and (root / path).exists():
        return root / path
    return path


def calibration(
    section: Select,
    found: Corpus,
    tokenizer: Any,
    seed: int,
    batch_size: int = 8,
    *,
    held_out: bool = False,
) -> list[Batch]:
    """Return the batches a selector scores on: questions with answers, or plain text.

    `section.task` is a needle task, `passkeys`, `name_recall`, or `text` (every token counts).
    Questions come from the training part of the text, or from the one that is held out. Raises
    DataError where the text or task does not suffice.
    """
    import torch

    from morph import data
    from morph.surgery import Batch

    if section.task == "text":
        texts = data.TextBatches(
            found.held_out if held_out else found.train,
            batch_size,
            section.seq_len,
            seed,
            tokenizer.bos_token_id,
        )
        answers = torch.ones(batch_size, section.seq_len, dtype=torch.bool)
        answers[:, 0] = False
        left = [
            min(batch_size, section.examples - i) for i in range(0, section.examples, batch_size)
        ]
        return [Batch(ids=texts.batch(i)[:n], answers=answers[:n]) for i, n in enumerate(left)]
    made = _examples(section, found, tokenizer, seed, held_out)
    return batches_of(made, section.seq_len, batch_size)


def _examples(
    section: Select, found: Corpus, tokenizer: Any, seed: int, held_out: bool
) -> list[Example]:
    from morph import data, passkeys
    from morph.errors import nearest

    if section.task == "name_recall":
        return data.name_recall_examples(
            found.held_out_stories if held_out else found.train_stories,
            tokenizer,
            count=section.examples,
            seed=seed,
            max_length=section.seq_len,
        )
    if section.task == "passkeys":
        return passkeys.passkey_examples(
            tokenizer,
            found.held_out if held_out else found.train,
            length=section.seq_len,
            count=section.examples,
            seed=seed,
            options=strict.build(
                passkeys.Passkeys, section.task_options, "select.task_options", DataError
            ),
        )
    if section.task not in data.NEEDLE_TASKS:
        allowed = [*data.NEEDLE_TASKS, "passkeys", "name_recall", "text"]
        raise DataError(
            f"select.task {section.task!r} is unknown.{nearest(section.task, allowed)} "
            f"There are: {', '.join(allowed)}."
        )
    return data.needle_examples(
        section.task,
        tokenizer,
        found.held_out if held_out else found.train,
        length=section.seq_len,
        depths=[i / 7 for i in range(8)],
        count=section.examples,
        seed=seed,
    )


def batches_of(examples: list[Example], seq_len: int, batch_size: int) -> list[Batch]:
    """Return examples as batches of equal length: longer ones lose their beginning.

    Examples shorter than `seq_len` form batches of their own length.
    """
    import torch

    from morph.surgery import Batch

    by_length: dict[int, list[tuple[list[int], list[tuple[int, int]]]]] = {}
    for example in examples:
        ids = list(example.ids)[-seq_len:]
        cut = len(example.ids) - len(ids)
        spans = example.spans or ((example.answer_start, len(example.ids)),)
        shown = [(max(1, a - cut), b - cut) for a, b in spans if b - cut > 1]
        by_length.setdefault(len(ids), []).append((ids, shown))
    found = []
    for length in sorted(by_length):
        rows = by_length[length]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            answers = torch.zeros(len(part), length, dtype=torch.bool)
            for row, (_, shown) in enumerate(part):
                for first, last in shown:
                    answers[row, first:last] = True
            found.append(Batch(ids=torch.tensor([ids for ids, _ in part]), answers=answers))
    return found
