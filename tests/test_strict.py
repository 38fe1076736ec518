"""The strict builder: every declared type, what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from morph import strict
from morph.errors import PlanError, RecipeError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    name: str = "x"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    items: tuple[Inner, ...] = ()
    table: Mapping[str, int] = field(default_factory=dict)
    derived: int = field(init=False, default=7)


OK = [
    (int, 3, 3), (int, 3.0, 3), (int, "2M", 2_000_000), (int, "64K", 64_000), (int, "1.5K", 1500),
    (int, "3G", 3 * 10**9), (int, "3B", 3 * 10**9), (int, -1, -1),
    (float, 3, 3.0), (float, 0.25, 0.25), (float, "1/4", 0.25), (float, "0/3", 0.0),
    (str, "no", "no"), (str, "", ""), (bool, True, True), (bool, False, False),
    (type(None), None, None), (int | None, None, None), (int | None, 4, 4),
    (int | str, 3, 3), (int | str, "2M", "2M"), (str | int, 3, 3),
    (int | tuple[int, int], [3, 1], (3, 1)), (int | tuple[int, int], 3, 3),
    (Literal["a", "b"], "a", "a"), (Literal[1, 2], 2, 2), (Literal[True], True, True),
    (tuple[int, ...], [], ()), (tuple[int, ...], [1, 2], (1, 2)),
    (tuple[int, str], (1, "a"), (1, "a")),
    (tuple[tuple[float, ...], ...], [[1, 2], [3]], ((1.0, 2.0), (3.0,))),
    (dict[str, int], {"a": 1}, {"a": 1}), (Mapping[str, Any], {"a": [1]}, {"a": [1]}),
    (dict, {1: 2}, {1: 2}), (Any, object, object), (Inner, {"size": 1}, Inner(size=1)),
    (Inner, Inner(size=2), Inner(size=2)),
]  # fmt: skip

BAD = [
    (int, True), (int, 1.5), (int, "3"), (int, "2m"), (int, "1.2345K"), (int, "K"), (int, None),
    (int, float("nan")), (int, float("inf")),
    (float, True), (float, "x"), (float, "1/0"), (float, "-1/4"), (float, None),
    (float, float("nan")), (float, float("inf")), (float, "0.5"),
    (str, 1), (str, None), (str, ["a"]), (bool, 1), (bool, "true"), (bool, "no"), (bool, None),
    (type(None), 0), (int | None, "x"), (int | str, None), (int | str, [1]),
    (Literal["a", "b"], "c"), (Literal["a"], None), (Literal[1], True), (Literal[True], 1),
    (tuple[int, ...], "12"), (tuple[int, ...], 5), (tuple[int, ...], {"a": 1}),
    (tuple[int, ...], [1, "x"]),
    (tuple[int, int], [1]), (tuple[int, int], [1, 2, 3]),
    (dict[str, int], []), (dict[str, int], {"a": "x"}), (dict[str, int], {1: 1}), (dict, "x"),
    (Inner, 5), (Inner, []), (Inner, {"size": "x"}), (Inner, {}),
]  # fmt: skip


def case_id(value: object) -> str:
    return repr(value)[:40]


@pytest.mark.parametrize(("hint", "value", "expected"), OK, ids=case_id)
def test_accepted(hint, value, expected):
    got = strict.convert(hint, value, "place")
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(("hint", "value"), BAD, ids=case_id)
def test_refused(hint, value):
    with pytest.raises(RecipeError, match="^place"):
        strict.convert(hint, value, "place")


@pytest.mark.parametrize(
    ("data", "needles"),
    [
        ({"inner": {"sise": 1}}, ("inner.sise: unknown key.", "Did you mean 'size'?", "size")),
        ({"inner": {"name": "a"}}, ("inner: missing size.",)),
        ({}, ("top level: missing inner.",)),
        ({"inner": {"size": 1}, "items": [{"size": 1}, {"size": "?"}]}, ("items[1].size",)),
        ({"inner": {"size": 1}, "table": {"k": None}}, ("table.k", "got nothing")),
        ({"inner": {"size": 1}, "derived": 3}, ("derived: unknown key",)),
        ({"inner": None}, ("inner: expected a mapping of keys, got nothing.",)),
        (None, ("top level: expected a mapping of keys, got nothing.",)),
        ([1], ("top level: expected a mapping of keys", "list")),
        ({"inner": {"size": 1}, 5: 1}, ("5: unknown key",)),
        ({"\x1b[31m": 1}, (r"\x1b[31m: unknown key",)),
        ({"inner": {"size": "\x07" * 300}}, (r"\x07",)),
    ],
    ids=["unknown", "missing", "empty", "item", "entry", "derived", "none", "null", "list",
         "int-key", "escape-key", "escape-value"],
)  # fmt: skip
def test_messages_name_the_place(data: Any, needles: tuple[str, ...]):
    with pytest.raises(RecipeError) as caught:
        strict.build(Outer, data)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    for needle in needles:
        assert needle in message


def test_place_and_error_class_are_the_callers():
    with pytest.raises(PlanError, match=r"^plan\.inner\.sise: unknown key"):
        strict.build(Outer, {"inner": {"sise": 1}}, "plan", PlanError)


def test_plain_is_what_build_reads():
    value = Outer(inner=Inner(size=1), items=(Inner(size=2, name="b"),), table={"a": 1})
    data = json.loads(json.dumps(strict.plain(value)))
    assert data == {
        "inner": {"size": 1, "name": "x"},
        "items": [{"size": 2, "name": "b"}],
        "table": {"a": 1},
    }
    assert strict.build(Outer, data) == value
