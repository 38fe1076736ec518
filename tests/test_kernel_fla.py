"""flash-linear-attention is taken where it is there, agrees and is faster; a stand-in plays it."""

from __future__ import annotations

import logging
import sys
import types
from typing import Any

import pytest
import torch

from morph import registry
from morph.kernels import _checks, _fla

OPS = list(_fla._FUNCTIONS)


class Library:
    """Answers as the real library does: by keyword, heads repeated, by our own float32 path."""

    def __init__(self, op: str, error: float = 0.0) -> None:
        self.op, self.error, self.calls = op, error, 0

    def __call__(self, *, q: Any, k: Any, v: Any, scale: float, **gates: Any) -> Any:
        assert k.shape[2] == v.shape[2] == q.shape[2]
        self.calls += 1
        state, final = gates.pop("initial_state"), gates.pop("output_final_state")
        gates["g"] = gates.get("g", gates.pop("g_gamma", gates.pop("gk", None)))
        o, after = registry.load("kernels", self.op).forward(
            q,
            k,
            v,
            **gates,
            scale=scale,
            initial_state=state,
            output_final_state=final,
            path="chunked",
        )
        return o * (1 + self.error), after


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    """Install the stand-in for an operator; CPU tensors count as fit for it."""

    def install(op: str, error: float = 0.0, milliseconds: tuple[float, float] = (1.0, 2.0)):
        made = Library(op, error)
        module, many, one = _fla._FUNCTIONS[op]
        found = types.ModuleType(module)
        setattr(found, many, made)
        setattr(found, one, made)
        monkeypatch.setitem(sys.modules, module, found)
        monkeypatch.setattr(_fla, "reason", lambda q: "")
        times = iter(milliseconds)  # theirs, then ours
        monkeypatch.setattr(_fla, "_milliseconds", lambda run: next(times))
        monkeypatch.setattr(_fla, "_winners", {})
        return made

    _checks.say_once.cache_clear()
    return install


def inputs(op: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    module = registry.load("kernels", op)
    return module.example(B=2, T=70, H=4, G=2, K=8, V=5, dtype=torch.float32, generator=generator)


@pytest.mark.parametrize("op", OPS)
def test_the_faster_library_is_taken_where_it_agrees(op: str, library: Any) -> None:
    made, module, given = library(op), registry.load("kernels", op), inputs(op)
    expected, state = module.forward(**given, path="chunked", output_final_state=True)
    for _ in range(2):
        o, after = module.forward(**given, output_final_state=True)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(after, state)
    assert made.calls == 3, "once in the race, then for every call"


@pytest.mark.parametrize("op", OPS)
def test_a_library_that_answers_otherwise_is_refused_and_says_so(
    op: str, library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="morph.kernels")
    made, module, given = library(op, error=0.05), registry.load("kernels", op), inputs(op)
    expected, _ = module.forward(**given, path="chunked")
    for _ in range(2):
        torch.testing.assert_close(module.forward(**given)[0], expected, rtol=0, atol=0)
    assert made.calls == 1
    assert f"{op}: not taking the fla path: it differs from ours by 5.0e-02" in caplog.messages


def test_a_slower_library_is_refused_with_both_times(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="morph.kernels")
    library("gla", milliseconds=(3.0, 2.0))
    registry.load("kernels", "gla").forward(**inputs("gla"))
    assert "gla: not taking the fla path: 3.000 ms beside 2.000 ms of chunked" in caplog.messages


def test_a_library_that_fails_is_refused_and_ours_answers(
    library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="morph.kernels")
    library("kda")
    monkeypatch.setattr(Library, "__call__", lambda *a, **k: 1 / 0)
    module, given = registry.load("kernels", "kda"), inputs("kda")
    o, _ = module.forward(**given)
    torch.testing.assert_close(o, module.forward(**given, path="chunked")[0])
    assert "kda: not taking the fla path: it failed: division by zero" in caplog.messages


def test_without_it_the_reason_is_told() -> None:
    q = torch.zeros(1, 2, 2, 8)
    assert "needs a GPU" in _fla.reason(q)
    assert isinstance(_fla.missing(), str)
