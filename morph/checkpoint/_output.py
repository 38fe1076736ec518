"""Where an output folder may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from morph.checkpoint._folder import MANIFEST
from morph.errors import OutputExists, UsageError, escape


def check_output(out: Path, inputs: Sequence[Path], force: bool) -> Path:
    """Return the absolute path of a folder that may be written; `Staging` says what may not."""
    out = out.expanduser()
    try:
        parent = out.parent.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{escape(out.parent)} does not exist: create it, or write elsewhere."
        ) from error
    if not parent.is_dir() or out.name in ("", "..") or not out.name.isprintable():
        raise UsageError(
            f"{escape(out)} cannot be an output folder: give the name of a new folder."
        )
    found = parent / out.name
    if any(part.startswith("models--") for part in found.parts):
        raise UsageError(f"{escape(found)} lies inside a Hugging Face cache: write elsewhere.")
    for source in inputs:
        real = source.resolve()
        if found == real or (found.exists() and os.path.samefile(found, real)):
            raise OutputExists(f"{escape(found)} is the input. Give another output folder.")
        if real in found.parents:
            raise OutputExists(f"{escape(found)} lies inside the input {escape(real)}.")
        if found in real.parents:
            raise OutputExists(f"{escape(found)} holds the input {escape(real)}.")
    if not os.path.lexists(found):
        return found
    if not force:
        raise OutputExists(f"{escape(found)} exists. Give --force to replace it, or another name.")
    ours = found.is_dir() and not found.is_symlink()
    if not ours or not (
        (found / "config.json").exists() or (found / MANIFEST).exists() or not any(found.iterdir())
    ):
        raise OutputExists(
            f"{escape(found)} exists and is no checkpoint folder; it is not replaced even with "
            "--force."
        )
    return found
