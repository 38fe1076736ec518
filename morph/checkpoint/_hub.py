"""Turn what a user calls a model into a local folder."""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from pathlib import Path

from morph.errors import CheckpointError, escape

WANTED = [
    *("*.json", "*.safetensors", "tokenizer.*", "*.model", "*.txt", "*.jinja", "*.md"),
    *("LICENSE*", "NOTICE*"),
]
UNWANTED = [
    *("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.gguf", "*.h5"),
    *("original/*", "onnx/*", "consolidated*"),
]
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w-][\w.-]{0,95})?")


def name_of(folder: Path) -> str:
    """Return what people call a model's folder: its name; in a Hub cache, the Hub id."""
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def resolve(model: str, revision: str | None = None) -> Path:
    """Return the folder of a local path, or download a Hub id (weights and side files, no code).

    Raises CheckpointError where it is neither, or cannot be had.
    """
    # a name too long, of nobody's home, or in a folder that may not be looked into, is none either
    with suppress(OSError, ValueError, RuntimeError):
        local = Path(model).expanduser()
        if model and local.exists():
            return local.resolve()
    if not _ID.fullmatch(model) or ".." in model:
        raise CheckpointError(
            f"'{escape(model)}' is neither a local folder nor a Hub id such as Qwen/Qwen3-0.6B."
        )
    from huggingface_hub import snapshot_download

    failures: tuple[type[Exception], ...] = (OSError, ValueError)
    for library in ("httpx2", "httpx"):  # which one depends on the version of huggingface_hub
        with suppress(ImportError):
            failures += (importlib.import_module(library).HTTPError,)
    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"'{escape(model)}' is no local folder, and could not be had from the Hugging Face "
            f"Hub: {escape(reason, 600)} Check the name and the connection, or give a folder."
        ) from error
    return Path(folder)
