"""Who may import whom: a lower floor never imports a higher one, and parts never import parts.

Imports are read from the source with `ast`, wherever they stand: at the top, inside a function, or
under TYPE_CHECKING. What a fresh interpreter really loads is looked at in a second test.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "morph"

FLOORS = {
    "errors": 0, "strict": 0, "_autoload": 0, "_processes": 0, "_sandbox": 0,
    "registry": 1, "plan": 1, "selection": 1, "recipes": 1, "exchange": 1,
    "kernels": 2,
    "families": 3, "layouts": 3, "cache": 3, "documents": 3, "data": 3, "passkeys": 3,
    "evaluation": 3, "comparison": 3, "reasoning": 3, "repair": 3, "_tiny": 3,
    "mixers": 4,
    "selectors": 5, "surgery": 5, "checkpoint": 5, "modeling": 5, "distill": 5, "evaluate": 5,
    "restore": 5, "difference": 5, "report": 5, "testing": 5, "_planted": 5,
    "pipeline": 6, "terminal": 6, "_progress": 6, "_flags": 6, "_terminal_files": 6,
    "cli": 7, "_cli_files": 7,
    "__main__": 7, "_fresh": 7, "_reference": 7, "_unpickle": 7,  # entry points of processes
}  # fmt: skip
PACKAGE = 0  # `from morph import __version__`

SIDEWAYS = {
    ("strict", "errors"), ("plan", "registry"), ("selection", "plan"), ("recipes", "plan"),
    ("recipes", "registry"), ("exchange", "plan"), ("exchange", "recipes"),
    ("layouts", "families"), ("restore", "checkpoint"), ("difference", "checkpoint"),
    ("cli", "_cli_files"),
    ("selectors", "surgery"), ("modeling", "surgery"), ("evaluate", "surgery"),
    ("_planted", "surgery"), ("testing", "_planted"),
    ("passkeys", "data"), ("reasoning", "data"), ("repair", "evaluation"),
    ("data", "documents"), ("terminal", "_progress"),
    ("_terminal_files", "terminal"),
    ("__main__", "cli"), ("_reference", "_fresh"),
}  # fmt: skip

DISCOVERED = {"families", "layouts", "kernels", "mixers", "selectors", "recipes"}

HEAVY = {"torch", "transformers", "triton", "accelerate", "matplotlib", "peft", "fla"}
# What each may import from outside, where that is short enough to list
ONLY = {name: {"yaml"} for name, floor in FLOORS.items() if floor <= 1}
ONLY["kernels"] = {"torch", "triton"}
WITHOUT_HEAVY = {
    "families",
    "layouts",
    "evaluation",
    "comparison",
    "checkpoint",
    "restore",
    "difference",
    "repair",
}


def imports(source: str, module: str) -> list[tuple[int, str]]:
    """The (line, full name) of every import; `from a import b` gives `a.b`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """Return one line for every import that the table forbids; keys are paths below morph/."""
    found = []
    for path, source in sources.items():
        parts = Path(path).with_suffix("").parts
        own = parts[0]
        if own not in FLOORS:
            found.append(f"{path}: has no floor; add {own!r} to FLOORS here and to the design")
            continue
        module = ".".join(("morph", *parts))
        for line, name in imports(source, module):
            if name.split(".")[0] == "morph":
                why = _inside(parts, name.split(".")[1:])
            else:
                why = _outside(own, name.split(".")[0])
            if why:
                found.append(f"{path}:{line}: {why}")
    return found


def _inside(parts: tuple[str, ...], target: list[str]) -> str:
    own, other = parts[0], target[0] if target else ""
    if other == own:
        shared = len(target) < 2 or target[1].startswith("_") or parts[1:] == ("__init__",)
        if own in DISCOVERED and not shared:
            return f"a part imports the part {own}.{target[1]}; share through a `_name.py`"
        return ""
    below, above = FLOORS[own], FLOORS.get(other, PACKAGE)
    if above > below:
        return f"floor {below} ({own}) imports floor {above} ({other})"
    if above == below and (own, other) not in SIDEWAYS and other in FLOORS:
        return f"{own} imports {other} on the same floor {below}"
    return ""


def _outside(own: str, name: str) -> str:
    if name in sys.stdlib_module_names:
        return ""
    if own in ONLY and name not in ONLY[own]:
        return f"{own} imports {name}; it may use the standard library and {sorted(ONLY[own])}"
    if own in WITHOUT_HEAVY and name in HEAVY:
        return f"{own} imports {name}; it must work without"
    return ""


def read_package() -> dict[str, str]:
    files = [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in files}


def test_imports_follow_the_floors():
    assert violations(read_package()) == []


@pytest.mark.parametrize(
    ("path", "source", "needle"),
    [
        ("plan.py", "import torch", "plan imports torch"),
        ("plan.py", "def f():\n    from morph.surgery import graft", "plan.py:2: floor 1"),
        ("plan.py", "from morph import pipeline", "floor 6 (pipeline)"),
        ("plan.py", "import numpy.linalg", "plan imports numpy"),
        ("strict.py", "from morph.registry import names", "floor 1 (registry)"),
        ("recipes/schema.py", "import morph.cli", "floor 7 (cli)"),
        ("recipes/_yaml.py", "import transformers", "recipes imports transformers"),
        ("kernels/x.py", "from transformers import AutoModel", "kernels imports transformers"),
        ("kernels/x.py", "from morph.kernels.decay import forward", "the part kernels.decay"),
        ("kernels/x.py", "from . import decay", "the part kernels.decay"),
        ("kernels/x.py", "from .decay import forward", "the part kernels.decay"),
        ("kernels/deep/fast.py", "from ...cache import State", "floor 3 (cache)"),
        ("mixers/x.py", "from morph.mixers import sliding", "the part mixers.sliding"),
        ("mixers/_x.py", "from morph.mixers.sliding import Mixer", "the part mixers.sliding"),
        ("mixers/x.py", "from morph.surgery import graft", "floor 5 (surgery)"),
        ("selectors/x.py", "from morph.evaluate import recall", "same floor 5"),
        ("surgery/_x.py", "from morph.modeling import hybrid", "same floor 5"),
        ("data.py", "from morph.cache import State", "same floor 3"),
        ("checkpoint/_x.py", "import torch.nn", "checkpoint imports torch"),
        (
            "restore.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
            "restore imports torch",
        ),
        ("novel.py", "import os", "has no floor"),
    ],
)
def test_planted_violations_are_found(path: str, source: str, needle: str):
    found = violations({path: source})
    assert len(found) == 1
    assert needle in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("plan.py", "import json\nfrom morph import strict\nfrom morph.errors import PlanError"),
        ("kernels/x.py", "import torch, triton\nfrom morph.kernels._checks import check"),
        ("mixers/x.py", "from morph.kernels import decay\nfrom morph.cache import State"),
        (
            "selectors/x.py",
            "from morph.surgery import Morphable\nfrom morph.selectors import _common",
        ),
        ("selectors/x.py", "from . import _common"),
        ("modeling.py", "from morph import surgery, __version__\nimport transformers"),
        ("pipeline/_x.py", "from morph.pipeline._source import open_source"),
        ("recipes/schema.py", "import yaml\nfrom morph.recipes import _yaml"),
    ],
)
def test_allowed_imports_pass(path: str, source: str):
    assert violations({path: source}) == []


def test_package_and_torch_free_modules_load_no_torch():
    """One interpreter imports them in turn and names the first that brings something heavy."""
    light = {name for name, floor in FLOORS.items() if floor <= 1} | WITHOUT_HEAVY | {"cli"}
    paths = sorted(p for p in read_package() if Path(p).with_suffix("").parts[0] in light)
    modules = ["morph"]
    for path in paths:
        parts = [part for part in Path(path).with_suffix("").parts if part != "__init__"]
        modules.append(".".join(["morph", *parts]))
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {sorted(heavy)}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
