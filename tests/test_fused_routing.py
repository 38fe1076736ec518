"""The kernels that choose blocks give the same with Triton's routing as with torch's.

On a GPU they take it by themselves; here it is forced, and interpreted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morph import registry
from morph.kernels import _dash_routing, _topk, _triton
from morph.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.reason(torch.zeros(1, device=DEVICE))
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"Triton cannot run: {REASON}")

CASES = [("dash", e) for e in registry.load("kernels", "dash").EXAMPLES]
CASES += [("block_topk", e) for e in ("moba", "nsa", "max")]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Force the fused routing, and remember that it was taken."""
    from morph.kernels import _triton_routing

    taken: list[str] = []
    for name in ("entmax_route", "topk_route"):
        real = getattr(_triton_routing, name)

        def told(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            taken.append(name)
            return real(*args, **options)

        monkeypatch.setattr(_triton_routing, name, told)
    monkeypatch.setattr(_dash_routing, "_fused", lambda q, summaries, ask: True)
    monkeypatch.setattr(_topk, "_by_triton", lambda q, summaries: True)
    return taken


def example(name: str, which: str, T: int) -> dict[str, Any]:
    module = registry.load("kernels", name)
    return module.example(
        B=2,
        T=T,
        H=4,
        G=2,
        K=8,
        V=5,
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(4),
        **module.EXAMPLES[which],
    )


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    floats = {n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return {n: x.double() if n in floats else x for n, x in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize(("name", "which"), CASES, ids=["-".join(c) for c in CASES])
def test_fused_routing_gives_the_reference(name: str, which: str, fused: list[str]) -> None:
    module = registry.load("kernels", name)
    inputs = example(name, which, T=60)
    expected, _ = module.reference(**wide(inputs))
    got, _ = module.forward(**inputs)
    assert_close("o", expected, got)
    chooses_by_windows = inputs.get("compressed") is not None or which == "nsa"
    assert fused or chooses_by_windows, "the fused routing was not taken"


@torch.no_grad()
@pytest.mark.parametrize(("name", "which"), [("dash", "plain"), ("block_topk", "moba")])
def test_fused_routing_goes_on_from_a_state_and_knows_padding(
    name: str, which: str, fused: list[str]
) -> None:
    module = registry.load("kernels", name)
    inputs = example(name, which, T=60)
    inputs["padding"] = torch.ones(2, 60, dtype=torch.bool)
    inputs["padding"][0, :7] = False
    expected, _ = module.reference(**wide(inputs))
    state, outputs = None, []
    for start, stop in ((0, 40), (40, 41), (41, 60)):
        part = {
            n: x[:, start:stop] if isinstance(x, torch.Tensor) and x.ndim > 2 else x
            for n, x in inputs.items()
        }
        part["padding"] = inputs["padding"][:, :stop]
        o, state = module.forward(**part, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert_close("o", expected, torch.cat(outputs, dim=1))
    assert fused
