"""P4: a trained model whose one long-range layer is known by construction, ten seeds of it.

`examples/train_planted.py` trains it with mask dropout: only the planted layer always sees
everything. One seed is in the fast suite, the others in the slow one.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

from morph import registry, strict, surgery
from morph.plan import Budget
from morph.selection import choose_units
from morph.selectors import _common
from morph.surgery import Batch

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_planted.py"
SEEDS = [pytest.param(s, marks=[pytest.mark.slow] * (s > 0)) for s in range(10)]
CASES = {
    "nll": {},
    "nll add": {"mode": "add"},
    "nll greedy": {"mode": "greedy", "count": 1},
    "kl": {},
    "fisher": {},
    "beam": {"count": 1},
    "halo": {},
    "lazy": {},
    "consa": {"count": 1, "steps": 60, "lr": 0.3},
    "flashmorph": {"steps": 60, "lr": 0.06},
    "duo": {"steps": 60, "lr": 0.06},
}


@cache
def trained(seed: int):
    spec = importlib.util.spec_from_file_location("train_planted", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    planted = 1 + seed % 3
    model, ids, answers = module.train(seed, planted)
    rows = slice(0, 8)
    return model, planted, Batch(ids=ids[rows], answers=answers[rows])


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_planted_layer_carries_recall(seed):
    model, planted, batch = trained(seed)
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        nll = {i: probe.nll([batch], [(i, 0)]) for i in probe.candidates}
        assert probe.nll([batch], [(i, 0) for i in probe.candidates]) < 0.1
        assert nll.pop(planted) < 0.2
        assert min(nll.values()) > 2 and probe.nll([batch], []) > 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_selectors_find_it_or_are_repaired(seed, name):
    torch.manual_seed(0)
    model, planted, batch = trained(seed)
    module = registry.load("selectors", name.split()[0])
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        options = strict.build(module.Options, CASES[name])
        found = module.score(probe, [batch], options, granularity="layer")
        kept = choose_units(found, Budget(full_layers=1), geometry=probe.geometry)
        if name not in ("lazy", "duo"):  # one looks at attention, one at hidden states, only
            assert kept == ((planted, 0),)
        swapped, report = _common.verify_and_swap(probe, [batch], kept, "layer")
    assert swapped == ((planted, 0),)
    assert len(report["swaps"]) == (kept != ((planted, 0),))
