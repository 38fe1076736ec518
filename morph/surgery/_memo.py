"""What a selector has measured so far, on disk: a stopped sweep goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from morph.errors import OutputExists, StorageError

Measured = list[float]


class Memo:
    """Lists of numbers by name; with a `path`, a file of JSON lines that only grows.

    The first line of the file is the `digest` of everything the numbers depend on; a file of
    another digest is started over. Numbers come back bit-equal. A last line that was cut off by a
    crash is ignored. `loaded` counts what came from the file.
    """

    def __init__(self, path: Path | None = None, digest: str = "") -> None:
        self.path, self.digest = path, digest
        self._found: dict[str, Measured] = {}
        self._cut = False
        if path is not None and path.is_file():
            self._read(path)
        self.loaded = len(self._found)

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}.") from error
        lines = text.split("\n")
        first = self._parsed(lines[0])
        if text and not text.startswith('{"digest"'):
            raise OutputExists(
                f"{path} is in the way and holds no partial scores. Move it, or give another --out."
            )
        if first.get("digest") != self.digest:
            path.unlink(missing_ok=True)
            return
        self._cut = bool(lines[-1])
        for line in lines[1:]:
            entry = self._parsed(line)
            value = entry.get("value")
            if isinstance(value, list) and all(isinstance(x, (int, float)) for x in value):
                self._found[str(entry.get("key"))] = [float(x) for x in value]

    @staticmethod
    def _parsed(line: str) -> dict[str, Any]:
        try:
            found = json.loads(line) if line else {}
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def get(self, key: str) -> Measured | None:
        """Return what was measured under `key`, or None."""
        return self._found.get(key)

    def put(self, key: str, value: Measured) -> None:
        """Remember a list of numbers, on disk at once where there is a path."""
        self._found[key] = value
        if self.path is None:
            return
        first = "" if self.path.exists() else json.dumps({"digest": self.digest}) + "\n"
        line = json.dumps({"key": key, "value": value}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._cut else "") + first + line)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}.") from error
        self._cut = False

    def of(self, key: str, measure: Callable[[], Measured]) -> Measured:
        """Return what is remembered under `key`, measuring it first where it is not."""
        found = self.get(key)
        if found is None:
            found = measure()
            self.put(key, found)
        return found

    def clear(self) -> None:
        """Forget everything, on disk too: the result has been written."""
        self._found = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Throttle:
    """Tells at most every `seconds` seconds, and at the end, so that progress costs nothing."""

    def __init__(self, tell: Callable[[int, int], None], seconds: float = 0.2) -> None:
        self.tell, self.seconds, self.last = tell, seconds, 0.0

    def __call__(self, done: int, total: int) -> None:
        """Pass on `done` of `total` where it is time."""
        now = time.monotonic()
        if done >= total or now - self.last >= self.seconds:
            self.last = now
            self.tell(done, total)
