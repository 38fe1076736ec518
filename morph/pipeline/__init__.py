"""One function per stage, and `run`, which does them all. What the command line calls.

Importing this loads nothing: names load what they need on first use, so that the commands on files
start fast.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Source": "_source",
    "align_command": "_bank",
    "check_distill": "_stages",
    "check_folder": "_choosing",
    "check_result": "_choosing",
    "compare_command": "_choosing",
    "convert": "_stages",
    "convert_command": "_stages",
    "convert_pickle_command": "_pickles",
    "describe": "_choosing",
    "diff_command": "_diff",
    "distill_command": "_stages",
    "distill_dry_run": "_stages",
    "dry_run": "_stages",
    "environment": "_stages",
    "evaluate_command": "_stages",
    "open_source": "_source",
    "plan_command": "_choosing",
    "plan_of_folder": "_stages",
    "record_of": "_stages",
    "restore_command": "_restore",
    "run": "_stages",
    "score_command": "_choosing",
    "score_estimate": "_stages",
    "share_command": "_owners",
    "verify_command": "_verify_files",
    "was_aligned": "_stages",
    "was_distilled": "_stages",
    "with_stages": "_stages",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"morph.pipeline.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'morph.pipeline' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
