"""What a row must hold, and how a row that holds something else is named."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from morph.errors import DataError, escape, nearest

SHOWN = 12  # names of columns in a message


def check_column(where: str, place: str, column: str, there: Collection[str]) -> None:
    """Raise DataError where `column` is not among the columns that are there."""
    if column in there:
        return
    names = [str(name) for name in there]
    inside = column.partition(".")[0] in names
    nested = " A column inside another cannot be read." if inside else ""
    shown = ", ".join(escape(name, 40) for name in names[:SHOWN]) or "none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    near = escape(nearest(column, names), 80)
    raise DataError(
        f"{where}: {place} has no column {escape(column, 80)!r}.{near}{nested} "
        f"There are: {shown}{more}. Set data.column."
    )


def text_of(where: str, place: str, value: Any) -> str:
    """Return the text of a row. Raises DataError where it is no text."""
    if not isinstance(value, str):
        talk = isinstance(value, list) and value and isinstance(value[0], dict)
        hint = "; for chats set data.chat: true" if talk else ""
        raise DataError(f"{where}: {place} is {kind(value)}, not a string{hint}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {place} has half a character ({value[error.start]!a}) at character "
            f"{error.start}; write it as UTF-8"
        ) from None
    return value


def kind(value: Any) -> str:
    """Return what a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        names = ", ".join(escape(key, 40) for key in list(value)[:SHOWN])
        return f"an object (keys: {names or 'none'})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return type(value).__name__
