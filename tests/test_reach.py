"""What a mixer's file states of how far it sees: read without importing it, true for all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from morph import plan as planning
from morph import registry
from morph.pipeline import _reach

MIXERS = registry.names("mixers")


@pytest.mark.parametrize("name", MIXERS)
def test_what_is_stated_is_what_the_options_are(name: str) -> None:
    options = registry.load("mixers", name).Options()
    stated = _reach.options_of(name, {})
    assert {n: v for n, v in vars(options).items() if n in stated} == stated
    sees, (softmax, linear) = _reach.sees(name, {}), _reach.parts(name)
    assert sees is None or sees > 0
    assert softmax or linear
    assert softmax or sees is None


@pytest.mark.parametrize("name", [n for n in MIXERS if not _reach.parts(n)[1]])
def test_a_mixer_without_a_linear_part_keeps_no_state(name: str) -> None:
    from morph.mixers._hybrid import group_shape
    from morph.plan import Geometry, HeadGroup

    geometry = Geometry(
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        v_head_dim=8,
        hidden_size=32,
        windows=(None,),
    )
    shape = group_shape(HeadGroup(mixer=name, heads=(0, 1, 2, 3)), geometry, 0)
    module = registry.load("mixers", name)
    cost = module.Mixer.cache_cost(module.Options(), shape)
    assert cost.state_elements == 0


def test_options_given_win_and_sums_and_products_are_computed() -> None:
    assert _reach.sees("sliding", {"window": 7}) == 7
    assert _reach.sees("hola", {"cache": 5, "block": 6}) == 11
    assert _reach.sees("parallel", {}) is None, "window 0 is everything"
    assert _reach.sees("package.module:mixer", {"window": 3}) is None
    assert _reach.parts("package.module:mixer") == (False, True)
    assert _reach.parts("decay") == (False, True)
    assert _reach.parts("hedgehog") == (True, True)
    assert _reach.parts("sliding") == (True, False)


def test_no_mixer_is_imported() -> None:
    program = (
        "import sys; from morph.pipeline import _reach;"
        "_reach.sees('sliding', {}); _reach.parts('hola');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_layer_types_tell_what_a_layer_keeps() -> None:
    """Window, everything with nothing beside, everything and a part read, a state."""
    geometry = planning.Geometry(
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        v_head_dim=4,
        hidden_size=8,
        windows=(None,) * 4,
    )
    costs = (
        ("sliding", planning.CacheCost(tokens=4)),
        ("nope", planning.CacheCost()),
        ("some_sparse", planning.CacheCost(step=256)),
        ("decay", planning.CacheCost(tokens=0, state_elements=16)),
    )
    groups = [planning.HeadGroup(mixer=m, heads=(0, 1), cache=c) for m, c in costs]
    layers = tuple(planning.LayerPlan(groups=(g,)) for g in groups)
    plan = planning.Plan(model_type="llama", geometry=geometry, layers=layers)
    assert plan.layer_types == (
        "sliding_attention",
        "full_attention",
        "sparse_attention",
        "linear_attention",
    )
