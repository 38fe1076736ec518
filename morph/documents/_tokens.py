"""Documents as token ids, with the place where each of them starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

CHUNK = 256  # documents encoded at a time


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text without special tokens."""
    # verbose=False: a novel is longer than any context, and that warning would be noise.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def joined(tokenizer: Any, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents as one text, a newline between them: ids `[N]`, starts `[D]`.

    A document starts with the token that holds its first character. A tokenizer that does not
    say which characters a token holds gives starts only where documents encoded one by one have
    the same ids; else the whole is taken for one document.
    """
    text = "\n".join(documents)
    if not getattr(tokenizer, "is_fast", False):
        ids = np.asarray(encode(tokenizer, text), dtype=np.int64)
        ended = [document + "\n" for document in documents[:-1]] + [documents[-1]]
        alone, starts = concatenated([np.asarray(encode(tokenizer, d)) for d in ended])
        return ids, starts if np.array_equal(ids, alone) else np.zeros(1, dtype=np.int64)
    found = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    ends = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
    lengths = np.asarray([len(document) + 1 for document in documents], dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    # Bytes of one character share its offsets, and a token may have none: hence the maximum
    starts = np.searchsorted(np.maximum.accumulate(ends), first, side="right")
    starts[0] = 0
    return ids, np.unique(starts[starts < len(ids)])


def concatenated(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return encoded documents one behind the other: ids `[N]`, starts `[D]`; empty ones drop."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    lengths = np.asarray([len(part) for part in parts], dtype=np.int64)
    return np.concatenate(parts).astype(np.int64), np.cumsum(lengths) - lengths


def read_until(
    tokenizer: Any, documents: Iterable[str], limit: int | None, ending: str = "\n"
) -> tuple[list[str], list[np.ndarray]]:
    """Encode documents one by one, each with `ending`, until they have `limit` tokens or end.

    Returns the documents and their ids; the last document is whole.
    """
    texts: list[str] = []
    parts: list[np.ndarray] = []
    total, source = 0, iter(documents)
    while chunk := list(islice(source, CHUNK)):
        ended = [text + ending for text in chunk]
        if getattr(tokenizer, "is_fast", False):
            told = tokenizer(ended, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            told = [encode(tokenizer, text) for text in ended]
        for text, ids in zip(chunk, told):
            texts.append(text)
            parts.append(np.asarray(ids, dtype=np.int32))
            total += len(ids)
            if limit is not None and total >= limit:
                return texts, parts
    return texts, parts


def shortened(tokenizer: Any, text: str, limit: int) -> str:
    """Return a beginning of a text that has at least `limit` tokens, or the whole text."""
    characters = 8 * limit
    while characters < len(text):
        if len(encode(tokenizer, text[:characters])) > limit:
            return text[:characters]
        characters *= 2
    return text
