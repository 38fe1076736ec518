"""Text from files and datasets, one document after the other.

Local files are .txt (one document), .json, .jsonl and .parquet; `hub:owner/name` is a dataset of
the Hub, streamed. Chats become text by the tokenizer's own template, in a process without files or
network, and only when that is asked for. Nothing that is read here is ever run otherwise.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from morph.documents._chat import Limits, Renderer, messages_of, rendered
from morph.documents._files import JSON_SUFFIXES, rows_of_file, without_blank_lines
from morph.documents._hub import Hub, rows_of_hub
from morph.documents._rows import text_of
from morph.documents._tokens import (
    concatenated,
    encode,
    joined,
    read_until,
    shortened,
)
from morph.errors import DataError, escape

__all__ = [
    "Hub",
    "Limits",
    "Renderer",
    "concatenated",
    "encode",
    "joined",
    "open_documents",
    "read_documents",
    "read_text",
    "read_until",
    "shortened",
]


def read_documents(path: str | Path, column: str = "text", limit: int | None = None) -> list[str]:
    """Read the texts of a .txt, .json, .jsonl or .parquet file.

    A text file is one document; `column` holds the text of the others (a .json file may also be a
    list of strings). Blank lines inside JSON documents become single newlines, the form in which
    TinyStories models were trained. Reading ends with the document that brings the characters to
    `limit`; None: the whole file. Raises DataError, UsageError where pyarrow is missing.
    """
    found, characters = [], 0
    with closing(open_documents(path, column=column)) as documents:
        for document in documents:
            found.append(document)
            characters += len(document)
            if limit is not None and characters >= limit:
                break
    return found


def read_text(path: str | Path, column: str = "text") -> str:
    """Read a text file as one string; documents of other files are parted by a blank line.

    Raises DataError where the file is missing, empty, not UTF-8 or of another layout.
    """
    return "\n\n".join(read_documents(path, column))


def open_documents(
    name: str | Path | Hub,
    *,
    column: str = "text",
    split: str = "train",
    seed: int = 0,
    chat: Any = None,
    limits: Limits | None = None,
) -> Generator[str, None, None]:
    """Yield the documents of a file or dataset, in the order of the file or of `seed`.

    `split` and `seed` are those of a dataset. With `chat`, a tokenizer, the column holds lists of
    messages, which its chat template turns into text within `limits`. Documents of blanks are left
    out. Raises DataError where nothing is left, UsageError where a package is missing.
    """
    where = escape(name)
    if isinstance(name, Hub):
        rows = rows_of_hub(name, column, split, seed)
        collapse = False
    else:
        rows = rows_of_file(Path(name), column, chat is not None)
        # A template's blank lines are part of what the model was trained on
        collapse = Path(name).suffix in JSON_SUFFIXES and chat is None
    texts: Iterator[str]
    if chat is None:
        texts = (text_of(where, place, value) for place, value in rows)
    else:
        talks = ((place, messages_of(where, place, value)) for place, value in rows)
        texts = rendered(where, talks, chat, limits or Limits())
    empty = True
    for text in texts:
        text = without_blank_lines(text) if collapse else text
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f"{where}: holds no text")
