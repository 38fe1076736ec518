"""Rows of datasets of the Hub, streamed with `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from morph.documents._rows import check_column
from morph.errors import DataError, MorphError, UsageError, escape

PREFIX = "hub:"
BUFFER = 1000  # rows among which the next one is drawn


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset of the Hub: its name, `owner/name`, and one of its configurations."""

    name: str
    config: str | None = None

    @classmethod
    def parse(cls, text: str) -> Hub | None:
        """Return the dataset that `hub:owner/name[:config]` names; None: it is no such text.

        Raises UsageError where what follows `hub:` is no name.
        """
        if not text.startswith(PREFIX):
            return None
        found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.+-]+))?", text[len(PREFIX) :])
        if found is None or ".." in text:
            raise UsageError(
                f"data.text: {escape(text)!r} is no dataset; write hub:owner/name or"
                " hub:owner/name:config."
            )
        return cls(name=found[1], config=found[2])

    def __str__(self) -> str:
        return PREFIX + self.name + (f":{self.config}" if self.config else "")


def rows_of_hub(hub: Hub, column: str, split: str, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a dataset in an order that follows from `seed`: files, then rows in them.

    Rows are drawn from a buffer of 1000. No code of the dataset is run. Raises UsageError where
    `datasets` is not installed, DataError for whatever else is in the way.
    """
    where = str(hub)
    datasets = _datasets(where)
    with _quiet(datasets), _told(where):
        # datasets 4 and later run no script and know no switch for it
        found = datasets.load_dataset(hub.name, hub.config, split=split, streaming=True)
        names = found.column_names
        if names is None:
            names = list(next(iter(found), {}))
        if names:
            check_column(where, "the dataset", column, names)
            found = found.select_columns([column])  # pictures and sounds are not decoded
        found = found.shuffle(seed=seed, buffer_size=BUFFER)
        for number, row in enumerate(found, 1):
            yield f"row {number} (as read)", row.get(column)


def _datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{where}: datasets of the Hub need the package datasets, which is not installed; "
            "`pip install 'morph-hybrid[data]'`"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise UsageError(
            f"{where}: datasets {datasets.__version__} can run scripts that a dataset brings; "
            "`pip install 'datasets>=4'`"
        )
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except MorphError:
        raise
    except Exception as error:  # the network, the Hub, five formats: any of them raises its own
        lines = str(error).splitlines() or [""]
        raise DataError(
            f"{where}: cannot be read: {type(error).__name__}: {escape(lines[0], 300)} "
            "Check the name, the configuration (hub:owner/name:config), data.split and the network."
        ) from None
