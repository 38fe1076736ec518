"""The registry: a folder's files are the names; nothing is imported to list or describe them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from morph import registry
from morph.errors import UnknownName

PARTS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
MODULES = [(kind, name) for kind, name in PARTS if kind != "recipes"]


def ids(value: object) -> str:
    return str(value)


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=ids)
def test_every_part_describes_itself(kind: str, name: str):
    summary = registry.summary(kind, name)
    assert summary, f"{registry.path(kind, name)} has no docstring or leading comment"
    assert len(summary) <= 100
    assert registry.docstring(kind, name).startswith(summary)


@pytest.mark.parametrize(("kind", "name"), PARTS, ids=ids)
def test_names_are_plain(kind: str, name: str):
    """A name is typed in shells, YAML and configs, so it is a lower-case identifier."""
    assert name.isidentifier()
    assert name == name.lower()
    assert registry.path(kind, name).is_file()


@pytest.mark.parametrize(("kind", "name"), MODULES, ids=ids)
def test_options_are_readable_without_import(kind: str, name: str):
    """Each option has a name, a type, and a default that stands in the source."""
    for option, hint, default in registry.options(kind, name):
        assert option.isidentifier()
        ast.parse(hint, mode="eval")
        assert default == "required" or ast.parse(default, mode="eval")


def test_expected_parts_are_there():
    assert {"uniform", "random", "nll"} <= set(registry.names("selectors"))
    assert {"sliding", "decay"} <= set(registry.names("mixers"))
    assert {"sliding", "decay"} <= set(registry.names("kernels"))
    assert {"llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "gemma3_text"} <= set(
        registry.names("families")
    )
    assert "demo" in registry.names("recipes")


def test_names_are_sorted_and_leave_out_shared_files():
    for kind in registry.KINDS:
        names = registry.names(kind)
        assert list(names) == sorted(set(names))
        assert not [n for n in names if n.startswith("_") or n == "schema"]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("selector", "selectors"),
        ("family", "families"),
        ("recipes", "recipes"),
        ("mixer", "mixers"),
    ],
)
def test_kinds_have_a_singular(given: str, kind: str):
    assert registry.check_kind(given) == kind


@pytest.mark.parametrize("kind", ["selectrs", "", "x\x1b[0m", "../mixers"])
def test_unknown_kind(kind: str):
    with pytest.raises(UnknownName) as caught:
        registry.names(kind)
    assert "Kinds: families" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "call", [registry.path, registry.load, registry.docstring, registry.options]
)
@pytest.mark.parametrize("name", ["unifrm", "_common", "__init__", "", "../plan", "a\x1bb"])
def test_unknown_name_lists_what_there_is(call, name: str):
    with pytest.raises(UnknownName) as caught:
        call("selectors", name)
    message = str(caught.value)
    assert message.isprintable()
    if name == "unifrm":
        assert "'unifrm' is no selector. Did you mean 'uniform'? There are: " in message


def test_schema_is_no_recipe():
    with pytest.raises(UnknownName):
        registry.path("recipes", "schema")


def test_objects_from_outside():
    assert registry.load("selectors", "collections.abc").__name__ == "collections.abc"
    assert registry.load("mixers", "fractions:Fraction.limit_denominator")


@pytest.mark.parametrize(
    "name", ["no_such_package.mod", "fractions:Nothing", "fractions:", ":Fraction", "a..b:c", ".x"]
)
def test_objects_from_outside_that_are_not_there(name: str):
    if name == "fractions:":  # an empty attribute means the module itself
        assert registry.load("selectors", name).__name__ == "fractions"
        return
    with pytest.raises(UnknownName, match="package.module:object"):
        registry.load("selectors", name)


def test_listing_imports_nothing():
    code = (
        "import sys; from morph import registry\n"
        "for kind in registry.KINDS:\n"
        "    for name in registry.names(kind):\n"
        "        registry.summary(kind, name), registry.options(kind, name)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'triton'} & set(sys.modules)\n"
        "parts = [m for m in sys.modules if m.startswith('morph.') and m.count('.') > 1]\n"
        "sys.exit(f'{heavy} {parts}' if heavy or parts else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
