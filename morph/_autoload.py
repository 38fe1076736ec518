"""Teach transformers our model types without importing it.

When (or if) transformers' auto-config module is imported, its table of extra configs is replaced
by one that builds `morph_<model_type>` classes on first request. Standard library only.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TARGET = "transformers.models.auto.configuration_auto"
PREFIX = "morph_"


class _Extra(dict[str, Any]):
    """Extra configs of transformers that also knows `morph_*`, made when they are asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _model_type(key) is not None

    def __missing__(self, key: str) -> Any:
        model_type = _model_type(key)
        if model_type is None:
            raise KeyError(key)
        modeling = importlib.import_module("morph.modeling")
        return modeling.classes(model_type)[0]


def _model_type(key: object) -> str | None:
    if not isinstance(key, str) or not key.startswith(PREFIX):
        return None
    registry = importlib.import_module("morph.registry")
    stem = key.removeprefix(PREFIX).replace("-", "_")
    return stem if stem in registry.names("families") else None


def _extend(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Extra):
        mapping._extra_content = _Extra(mapping._extra_content)


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then extends the table."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _extend(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only the auto-config module, and only to wrap its loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Extend transformers' table now if it is loaded, or as soon as it is."""
    loaded = sys.modules.get(TARGET)
    if loaded is not None:
        _extend(loaded)
    elif not any(type(f).__name__ == _Finder.__name__ for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
