"""Text, stories and questions for selection, distillation and evaluation."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import strict
from morph.errors import DataError, UsageError, escape
from morph.recipes.schema import Data, Select

if TYPE_CHECKING:
    import numpy as np
    import torch

    from morph.data import Example
    from morph.surgery import Batch


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids of the training and held-out parts of the text, and whole stories of each.

    `train_starts` `[D]` are the places in `train` where its documents start.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    train_starts: torch.Tensor
    train_stories: tuple[str, ...]
    held_out_stories: tuple[str, ...]

    @property
    def identity(self) -> str:
        """The digest of the training part's tokens and of where its documents start."""
        digest = hashlib.sha256(self.train.numpy().tobytes())
        digest.update(self.train_starts.numpy().tobytes())
        return digest.hexdigest()

    @property
    def sha256(self) -> str:
        """The digest of the training part's tokens."""
        return hashlib.sha256(self.train.numpy().tobytes()).hexdigest()


def corpus(section: Data, tokenizer: Any, root: Path | None = None, seed: int = 0) -> Corpus:
    """Read and tokenise what a data section names; the last share of each entry is held out.

    Relative paths are tried from `root` (a recipe's folder) and then from the working folder.
    `seed` gives the order of datasets, files keep their own. Raises DataError where an entry is
    missing, empty or not text, UsageError without any entry or for a dataset without a limit.
    """
    import numpy as np
    import torch

    check_files(section, root)
    if not 0 < section.held_out < 1:
        raise DataError(f"data.held_out is {section.held_out}; it is a share between 0 and 1.")
    train, held_out, starts = _Joined(), _Joined(), []
    stories: tuple[list[str], list[str]] = ([], [])
    for name in section.text:
        found = _read(name, section, tokenizer, root, seed)
        first = train.length
        if len(found.texts) > 1:
            cut = max(1, round(len(found.texts) * (1 - section.held_out)))
            parts = [found.encoded(tokenizer, None, cut), found.encoded(tokenizer, cut, None)]
            stories[0].extend(found.texts[:cut])
            stories[1].extend(found.texts[cut:])
            (ids, borders), (rest, _) = parts
            over = 0 if section.limit is None else len(ids) + len(rest) - section.limit
            if over > 0:  # all of it belongs to the last document
                rest, ids = rest[: max(0, len(rest) - over)], ids[: section.limit]
        else:
            ids, borders = found.encoded(tokenizer, None, None)
            ids = ids[: section.limit]
            cut = round(len(ids) * (1 - section.held_out))
            ids, rest, borders = ids[:cut], ids[cut:], borders[:1]
        train.add(ids)
        held_out.add(rest)
        starts.append(borders[borders < len(ids)] + first)
    return Corpus(
        train=torch.from_numpy(train.ids()),
        held_out=torch.from_numpy(held_out.ids()),
        train_starts=torch.from_numpy(np.concatenate(starts)),
        train_stories=tuple(stories[0]),
        held_out_stories=tuple(stories[1]),
    )


class _Joined:
    """Arrays put one behind the other."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.length = 0

    def add(self, part: np.ndarray) -> None:
        self.parts.append(part)
        self.length += len(part)

    def ids(self) -> np.ndarray:
        import numpy as np

        return np.concatenate(self.parts).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The documents of an entry; `ids` where they were encoded one by one, None: as one text."""

    texts: list[str]
    ids: list[np.ndarray] | None

    def encoded(
        self, tokenizer: Any, start: int | None, stop: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and starts of some of the documents."""
        from morph import documents

        if self.ids is not None:
            return documents.concatenated(self.ids[start:stop])
        texts = self.texts[start:stop]
        return documents.joined(tokenizer, texts) if texts else documents.concatenated([])


def _read(name: str, section: Data, tokenizer: Any, root: Path | None, seed: int) -> _Entry:
    from morph import documents

    hub = documents.Hub.parse(name)
    if hub is not None and section.limit is None:
        raise UsageError(
            f"data.limit: {hub} is streamed and may not end; say how many tokens to read, "
            "such as data.limit=10M."
        )
    place = hub or _find(name, root)
    suffix = place.suffix if isinstance(place, Path) else ""
    # Files of these kinds have always been read as one text; chats bring their own newlines
    as_one = not section.chat and suffix in (".txt", ".json", ".jsonl")
    stream = documents.open_documents(
        place,
        column=section.column,
        split=section.split,
        seed=seed,
        chat=tokenizer if section.chat else None,
    )
    with closing(stream):
        if as_one and (section.limit is None or suffix == ".txt"):
            texts = list(stream)
            if section.limit is not None:
                texts = [documents.shortened(tokenizer, texts[0], section.limit)]
            return _Entry(texts=texts, ids=None)
        ending = "" if section.chat else "\n"
        texts, ids = documents.read_until(tokenizer, stream, section.limit, ending)
    return _Entry(texts=texts, ids=None if as_one else ids)


def check_files(section: Data, root: Path | None = None) -> None:
    """Raise UsageError where no text is named, and DataError for a file that is not there."""
    if not section.text:
        raise UsageError(
            "no text was given. Name files with --data FILE (.txt, .json, .jsonl, .parquet), or in "
            "the recipe under data.text."
        )
    for name in section.text:
        if not name.startswith("hub:") and not _find(name, root).exists():
            raise DataError(f"{escape(name)}: no such text file")


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
