"""Rows of local files: .txt, .json, .jsonl, .parquet."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from morph.documents._rows import check_column, kind
from morph.errors import DataError, UsageError, escape

JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (".txt", *JSON_SUFFIXES, ".parquet")
Rows = Iterator[tuple[str, Any]]  # (where in the file, what the column holds)


def rows_of_file(path: Path, column: str, chat: bool = False) -> Rows:
    """Yield where each row of a file is and what its column holds, not yet checked.

    Raises DataError for a file that is missing, no regular file, or of another layout.
    """
    where = escape(path)
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{where}: cannot read {escape(path.suffix) or 'a file without suffix'!r} as text;"
            f" pass a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
        )
    if chat and path.suffix == ".txt":
        raise DataError(
            f"{where}: data.chat needs lists of messages, which a .txt file does not hold; pass a"
            " .json, .jsonl or .parquet file, or leave data.chat out"
        )
    try:
        with open_regular(path) as file:
            if path.suffix == ".txt":
                yield "the text", _decoded(where, file.read())
            else:
                read = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}[path.suffix]
                yield from read(where, file, column)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe would hang and a device would not end."""
    where = escape(path)
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{where}: no such text file") from None
    except ValueError:  # a NUL in the name
        raise DataError(f"{where}: cannot be read: that is no name of a file") from None
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise DataError(f"{where}: cannot be read: it is {what}, not a file")
    return os.fdopen(number, "rb")


def without_blank_lines(text: str) -> str:
    """Return a text whose blank lines became single newlines."""
    return re.sub(r"\n\s*\n", "\n", text)


def _decoded(where: str, raw: bytes, start: int = 0) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise DataError(f"{where}: byte {at} is not UTF-8; convert it first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parsed(where: str, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {place}not valid JSON: {error}") from None


def _json(where: str, file: BinaryIO, column: str) -> Rows:
    found = _parsed(where, "", _decoded(where, file.read()).removeprefix("\ufeff"))
    if not isinstance(found, list):
        raise DataError(
            f"{where}: top level is {type(found).__name__}, not a list of strings or objects"
        )
    for number, value in enumerate(found, 1):
        place = f"text {number}"
        if isinstance(value, dict):
            check_column(where, place, column, value)
            value = value[column]
        yield place, value


def _json_lines(where: str, file: BinaryIO, column: str) -> Rows:
    number = start = 0
    for raw in file:
        text = _decoded(where, raw, start)
        start += len(raw)
        for line in text.removesuffix("\n").split("\n"):  # several where \r alone ends lines
            number += 1
            if not line.strip():
                continue
            record = _parsed(where, f"line {number} is ", line.removeprefix("\ufeff"))
            if not isinstance(record, dict):
                raise DataError(
                    f"{where}: line {number} is {kind(record)}, not an object with the column "
                    f"{escape(column, 80)!r}"
                )
            check_column(where, f"line {number}", column, record)
            yield f"line {number}", record[column]


def _parquet(where: str, file: BinaryIO, column: str) -> Rows:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(
            f"{where}: reading parquet needs pyarrow, which is not installed; "
            "`pip install 'morph-hybrid[data]'`"
        ) from None

    number = 0
    try:
        table = pq.ParquetFile(file)
        check_column(where, "the table", column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=[column], use_threads=False):
            # A name with a dot also picks columns inside others: this one is found by its name
            for value in batch.column(batch.schema.get_field_index(column)).to_pylist():
                number += 1
                yield f"row {number}", value
    except UnicodeDecodeError:
        raise DataError(f"{where}: a text after row {number} is not UTF-8") from None
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        # pyarrow's messages are long and speak of its insides; the first line says what is wrong
        told = escape(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise DataError(f"{where}: not a parquet file that can be read: {told}") from None
