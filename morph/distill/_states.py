"""The state of a run on disk: whole or not there, the last two kept, never pickle.

A state is a folder `step-00000050` with `tensors.safetensors` and `state.json` (position, random
state, settings, versions of packages, and the sha256 of the tensors). It is made under another name
and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from morph import __version__
from morph.errors import MismatchError, StorageError, escape

FORMAT = 1


class RunStates:
    """The states of one run under `folder`.

    `settings` say what the run is: a state with other settings is another run's. `note` is told
    in words of whatever was skipped.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        note: Callable[[str], None],
        keep: int = 2,
    ) -> None:
        self.folder, self.keep, self.note = folder, keep, note
        self.settings = json.loads(json.dumps(settings))
        self.last: int | None = None  # ordinal of the newest state known to be good

    def save(
        self, ordinal: int, tensors: Mapping[str, torch.Tensor], position: Mapping[str, Any]
    ) -> None:
        """Write the state after `ordinal` steps; raise StorageError where the disk refuses."""
        if ordinal == self.last:
            return
        target = self.folder / f"step-{ordinal:08d}"
        partial = self.folder / f".partial-{ordinal:08d}"
        with storage(self.folder, "the last state is intact"):
            for left in self.folder.glob(".partial-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                partial.mkdir(parents=True)
                file = partial / "tensors.safetensors"
                save_file({k: t.detach().contiguous() for k, t in tensors.items()}, file)
                content = {
                    "format": FORMAT,
                    "settings": self.settings,
                    "position": position,
                    "position_sha256": _digest(position),
                    "sha256": _sha256(file),
                    "versions": _versions(),
                }
                write_synced(partial / "state.json", json.dumps(content, sort_keys=True).encode())
                for path in (file, partial):
                    _sync(path)
                if target.exists():  # a corrupt one that was skipped
                    shutil.rmtree(target)
                os.rename(partial, target)
                _sync(self.folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        self.last = ordinal
        for old in self._found()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return tensors and position of the newest good state, or None where there is none.

        A damaged state is skipped with a note. Raises MismatchError for a state of another run.
        """
        found = self._found()
        for path in reversed(found):
            try:
                content = json.loads((path / "state.json").read_text(encoding="utf-8"))
                if content["format"] != FORMAT:
                    raise ValueError(f"format {content['format']!r} is not {FORMAT}")
                file = path / "tensors.safetensors"
                if _sha256(file) != content["sha256"]:
                    raise ValueError("the tensors are not those that were written")
                if _digest(content["position"]) != content["position_sha256"]:
                    raise ValueError("the position is not the one that was written")
                self._compare(path, content["settings"])
                tensors, position = load_file(file), content["position"]
            except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as e:
                if isinstance(e, MismatchError):
                    raise
                self.note(f"{path.name} is damaged ({escape(e, 120)}); trying the state before it.")
                continue
            self._tell_versions(path, content.get("versions"))
            self.last = int(path.name.removeprefix("step-"))
            return tensors, position
        if found:
            self.note(f"no state under {self.folder} can be read; starting from the beginning.")
        return None

    def _compare(self, path: Path, theirs: Mapping[str, Any]) -> None:
        # What is made from other settings comes last: its difference would hide theirs
        known = {key: n for n, key in enumerate(("stages", "seed", "probe", "teacher", "text"))}
        keys = sorted({*self.settings, *theirs}, key=lambda k: (known.get(k, 9), k == "data", k))
        for key in keys:
            mine, other = self.settings.get(key), theirs.get(key)
            if mine != other and key == "student":
                raise MismatchError(
                    f"{path} is the state of another run: the student is not as it was when that "
                    "began. Make it again from its plan or folder, give another output folder, or "
                    f"delete {self.folder.parent} to start anew."
                )
            if mine != other:
                raise MismatchError(
                    f"{path} is the state of another run: {escape(key)} differs "
                    f"({escape(_where(mine, other), 160)}). Give the settings it was started "
                    f"with, or another output folder, or delete {self.folder.parent} to start anew."
                )

    def _tell_versions(self, path: Path, theirs: Any) -> None:
        others = theirs if isinstance(theirs, dict) else {}
        changed = [
            f"{name} {escape(others[name], 40)}, now {mine}"
            for name, mine in _versions().items()
            if name in others and others[name] != mine
        ]
        if changed:
            self.note(
                f"{path.name} was saved with {'; '.join(changed)}: the numbers may differ in the "
                "last bits."
            )

    def _found(self) -> list[Path]:
        folders = self.folder.glob("step-*") if self.folder.is_dir() else iter(())
        return sorted(p for p in folders if p.name.removeprefix("step-").isdigit())


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def storage(path: Path, comfort: str) -> Iterator[None]:
    """Turn what the disk refuses under `path` into StorageError, ending with `comfort`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: cannot be written ({escape(reason)}); {comfort}.") from error


def keep_lines(path: Path, count: int) -> int:
    """Cut a file after its first `count` lines, whole or not at all; return how many it has."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines[:count] if line.endswith(b"\n")]
    if kept != lines:
        partial = path.with_name(f".partial-{path.name}")
        write_synced(partial, b"".join(kept))
        os.replace(partial, path)
    return len(kept)


def _versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on."""
    import transformers

    return {
        "morph": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _where(mine: Any, other: Any) -> str:
    """Name the first place where two settings differ."""
    if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
        for i, (a, b) in enumerate(zip(mine, other)):
            if a != b:
                return f"[{i}] {_where(a, b)}"
    if isinstance(mine, dict) and isinstance(other, dict):
        for key in sorted({*mine, *other}):
            if mine.get(key) != other.get(key):
                return f"{key}: {_where(mine.get(key), other.get(key))}"
    if all(isinstance(x, str) and re.fullmatch("[0-9a-f]{64}|", x) for x in (mine, other)):
        return "its content is another"  # two digests say nothing to a reader
    return f"now {mine!r}, then {other!r}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
