"""Turn a pretrained Hugging Face decoder into a hybrid-attention model.

`import morph` costs no torch. It teaches transformers, whenever that is imported, to load the
`morph_<model_type>` checkpoints written here. Public names load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from morph import _autoload

__version__ = "0.1.0"

_PUBLIC = {
    "Budget": "morph.plan",
    "Geometry": "morph.plan",
    "HeadGroup": "morph.plan",
    "LayerPlan": "morph.plan",
    "Plan": "morph.plan",
    "Scores": "morph.plan",
    "choose": "morph.selection",
    "hybrid": "morph.modeling",
    "graft": "morph.surgery",
    "convert": "morph.pipeline",
    "run": "morph.pipeline",
    "MorphError": "morph.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'morph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


_autoload.install()
