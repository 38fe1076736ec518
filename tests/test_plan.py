"""Scores, budgets and plans: the choice, pins, bytes, names, round trips and refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest

from morph import plan as planning
from morph.errors import PlanError
from morph.plan import (
    Budget,
    CacheCost,
    Geometry,
    HeadGroup,
    LayerPlan,
    Plan,
    Scores,
    full_plan,
    uniform_plan,
)
from morph.selection import choose, choose_units

WINDOW = CacheCost(tokens=16)
STATE = CacheCost(tokens=0, state_elements=64)


def geometry(layers: int = 6, heads: int = 4, kv_heads: int = 2, **changes) -> Geometry:
    given = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "v_head_dim": 8,
        "hidden_size": 32,
        "windows": (None,) * layers,
    }
    return Geometry(**(given | changes))


def scores(values, granularity="layer", pairs=None) -> Scores:
    rows = tuple(tuple(row) if isinstance(row, (list, tuple)) else (row,) for row in values)
    return Scores(
        selector="test",
        model_type="llama",
        granularity=granularity,
        values=rows,
        unit="nats",
        pairs=pairs,
    )


def kept_layers(values, budget: Budget, shape: Geometry | None = None, pairs=None):
    shape = shape or geometry(len(values))
    units = choose_units(scores(values, pairs=pairs), budget, geometry=shape)
    return tuple(layer for layer, _ in units)


# --- The choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_top_scores_stay_full(count: int):
    values = [0.3, -1.0, 5.0, 0.0, 2.0, 0.1]
    best = sorted(range(6), key=lambda i: -values[i])[:count]
    assert kept_layers(values, Budget(full_layers=count)) == tuple(sorted(best))


def test_ties_go_to_the_lower_index():
    assert kept_layers([1, 1, 1, 1], Budget(full_layers=2)) == (0, 1)
    assert kept_layers([0, 2, 1, 1, 1], Budget(full_layers=2)) == (1, 2)


def test_shifting_and_scaling_scores_changes_nothing():
    values = [random.Random(0).random() for _ in range(8)]
    moved = [3 * v - 7 for v in values]
    for count in range(1, 9):
        budget = Budget(full_layers=count)
        assert kept_layers(values, budget) == kept_layers(moved, budget)


def test_a_larger_budget_keeps_what_a_smaller_one_kept():
    values = [random.Random(1).random() for _ in range(8)]
    kept = [set(kept_layers(values, Budget(full_layers=n))) for n in range(1, 9)]
    assert all(a < b for a, b in itertools.pairwise(kept))


@pytest.mark.parametrize(
    ("fraction", "layers"), [(0.25, 2), (1 / 3, 2), (0.01, 1), (1.0, 8), (0.374, 2), (0.375, 3)]
)
def test_fractions_round_down_but_keep_one(fraction: float, layers: int):
    assert len(kept_layers(range(8), Budget(full_fraction=fraction))) == layers


@pytest.mark.parametrize(("per_token", "layers"), [(64, 1), (127, 1), (128, 2), (10**9, 6)])
def test_cache_bytes_per_token_bound_the_growth(per_token: int, layers: int):
    # one layer: (8 + 8) elements x 2 KV heads x 2 bytes = 64 bytes a token
    assert len(kept_layers(range(6), Budget(cache_bytes_per_token=per_token))) == layers


def test_pins_win_over_scores():
    values = [5, 4, 3, 2, 1, 0]
    assert kept_layers(values, Budget(full_layers=2, keep=(5,))) == (0, 5)
    assert kept_layers(values, Budget(full_layers=2, replace=(0, 1))) == (2, 3)
    assert kept_layers(values, Budget(full_layers=2, keep=(5, 4), replace=(0,))) == (4, 5)


def test_layers_that_slide_in_the_source_are_left_alone():
    shape = geometry(6, windows=(4, None, 4, None, 4, None))
    plan = choose(
        scores([9, 1, 9, 2, 9, 3]),
        Budget(full_layers=1),
        geometry=shape,
        mixer="sliding",
        cache=WINDOW,
    )
    assert plan.pattern == "oSoSoF"
    assert plan.layer_types[0] == "sliding_attention"
    assert plan.replaced_layers == (1, 3)
    half = choose(
        scores([0] * 6), Budget(full_fraction=0.5), geometry=shape, mixer="sliding", cache=WINDOW
    )
    assert half.pattern == "oFoSoS"  # half of the 3 that can be replaced, rounded down


# --- Pairs: the quadratic choice ----------------------------------------------------------------


def cost(values, pairs, kept) -> float:
    out = [i for i in range(len(values)) if i not in kept]
    return sum(values[i] for i in out) + sum(pairs[a][b] for a, b in itertools.combinations(out, 2))


def random_pairs(rng: random.Random, size: int):
    pairs = [[0.0] * size for _ in range(size)]
    for a, b in itertools.combinations(range(size), 2):
        pairs[a][b] = pairs[b][a] = rng.gauss(0, 0.5)
    return tuple(map(tuple, pairs))


def test_quadratic_choice_against_all_subsets():
    """Greedy with swaps is a local optimum always, and the best of all subsets nearly always."""
    rng, best_found, cases = random.Random(0), 0, 60
    for _ in range(cases):
        size = rng.randint(4, 8)
        values, pairs = [rng.random() for _ in range(size)], random_pairs(rng, size)
        count = rng.randint(1, size - 1)
        kept = kept_layers(values, Budget(full_layers=count), pairs=pairs)
        assert len(kept) == count
        got = cost(values, pairs, kept)
        swaps = [
            cost(values, pairs, set(kept) - {a} | {b})
            for a in kept
            for b in set(range(size)) - set(kept)
        ]
        assert got <= min(swaps, default=got) + 1e-9
        best = min(cost(values, pairs, s) for s in itertools.combinations(range(size), count))
        best_found += got <= best + 1e-9
    assert best_found >= 0.9 * cases


def test_pairs_change_the_choice():
    """Layers 0 and 1 stand in for each other: alone each is harmless, both gone is a disaster."""
    pairs = ((0, 9, 0), (9, 0, 0), (0, 0, 0))
    assert kept_layers([0.0, 0.1, 1.0], Budget(full_layers=1)) == (2,)
    assert kept_layers([0.0, 0.1, 1.0], Budget(full_layers=1), pairs=pairs) == (1,)


def test_zero_pairs_are_plain_top_k():
    values = [random.Random(2).random() for _ in range(7)]
    pairs = ((0.0,) * 7,) * 7
    for count in range(1, 8):
        budget = Budget(full_layers=count)
        assert kept_layers(values, budget, pairs=pairs) == kept_layers(values, budget)


def test_pins_hold_in_the_quadratic_choice():
    rng = random.Random(3)
    values, pairs = [rng.random() for _ in range(6)], random_pairs(rng, 6)
    for keep, replace in itertools.permutations(range(6), 2):
        budget = Budget(full_layers=2, keep=(keep,), replace=(replace,))
        kept = kept_layers(values, budget, pairs=pairs)
        assert keep in kept
        assert replace not in kept


# --- Heads --------------------------------------------------------------------------------------


def test_kv_heads_take_their_query_heads_along():
    plan = choose(
        scores([[1, 0], [0, 0], [0, 2]], "kv_head"),
        Budget(full_layers=1),  # one layer's worth: 2 KV heads
        geometry=geometry(3),
        mixer="sliding",
        options={"window": 16},
        cache=WINDOW,
    )
    assert plan.pattern == "*S*"
    assert plan.layer_types == ("hybrid", "sliding_attention", "hybrid")
    groups = [[(g.mixer, g.heads) for g in layer.groups] for layer in plan.layers]
    assert groups[0] == [("full", (0, 1)), ("sliding", (2, 3))]
    assert groups[2] == [("full", (2, 3)), ("sliding", (0, 1))]
    assert plan.layers[1].groups[0].options == {"window": 16}


def test_min_full_per_layer():
    values = [[9, 8, 7, 6], [0, 1, 0, 0], [0, 0, 0, 0]]
    budget = Budget(full_layers=1, min_full_per_layer=1)
    units = choose_units(scores(values, "head"), budget, geometry=geometry(3))
    assert units == ((0, 0), (0, 1), (1, 1), (2, 0))  # ties to the lower index, the rest by score


def test_head_pins_name_a_layer_or_one_head():
    values = [[1, 2, 3, 4]] * 3
    budget = Budget(full_layers=1, keep=((2, 0),), replace=(0, (1, 3)))
    units = choose_units(scores(values, "head"), budget, geometry=geometry(3))
    assert units == ((1, 2), (2, 0), (2, 2), (2, 3))


# --- Bytes and names ----------------------------------------------------------------------------


def test_full_plan_holds_keys_and_values_of_every_layer():
    plan = full_plan("llama", geometry())
    assert plan.pattern == "FFFFFF"
    assert plan.mixers == ()
    assert plan.cache_bytes(100) == 6 * 100 * 2 * (8 + 8) * 2
    assert plan.cache_bytes(100, "float32") == 2 * plan.cache_bytes(100)
    assert plan.cache_bytes(0) == 0


def test_windows_and_states_bound_the_bytes():
    shape = geometry(3, windows=(None, 10, None), v_head_dim=4)
    plan = uniform_plan("llama", shape, [0], "sliding", {}, WINDOW)
    entry = (8 + 4) * 2 * 2  # key and value, 2 KV heads, bfloat16
    assert plan.pattern == "FoS"
    assert plan.cache_bytes(100) == (100 + 10 + 16) * entry
    assert plan.cache_bytes(5) == 3 * 5 * entry
    linear = uniform_plan("llama", shape, [0], "decay", {}, STATE)
    assert linear.layer_types[2] == "linear_attention"
    assert linear.cache_bytes(100) == (100 + 10) * entry + 64 * 4 * 4  # 64 float32 x 4 heads
    assert linear.cache_bytes(100, "float32") == (100 + 10) * 2 * entry + 64 * 4 * 4


def test_a_window_of_the_source_bounds_its_mixer_too():
    groups = (HeadGroup(mixer="sliding", heads=(0, 1, 2, 3), cache=CacheCost(tokens=50)),)
    shape = geometry(1, windows=(10,))
    plan = Plan(model_type="llama", geometry=shape, layers=(LayerPlan(groups=groups),))
    assert plan.cache_bytes(100) == 10 * 64


def test_a_kv_head_split_over_two_groups_is_held_twice():
    groups = (
        HeadGroup(mixer="full", heads=(0, 2)),
        HeadGroup(mixer="sliding", heads=(1, 3), cache=WINDOW),
    )
    plan = Plan(model_type="llama", geometry=geometry(1), layers=(LayerPlan(groups=groups),))
    assert plan.cache_bytes(100) == (100 + 16) * 2 * 16 * 2
    whole = (
        HeadGroup(mixer="full", heads=(0, 1)),
        HeadGroup(mixer="sliding", heads=(2, 3), cache=WINDOW),
    )
    plan = Plan(model_type="llama", geometry=geometry(1), layers=(LayerPlan(groups=whole),))
    assert plan.cache_bytes(100) == (100 + 16) * 16 * 2


def test_bytes_need_a_known_dtype_and_cost():
    with pytest.raises(PlanError, match="dtype 'int3' is unknown"):
        full_plan("llama", geometry()).cache_bytes(1, "int3")
    plan = uniform_plan("llama", geometry(), [0], "novel", {}, None)
    with pytest.raises(PlanError, match="layer 1: no cache cost is recorded for 'novel'"):
        plan.cache_bytes(1)


# --- Round trips --------------------------------------------------------------------------------


def mixed_plan() -> Plan:
    return choose(
        scores([[1, 0], [0, 0], [0, 2]], "kv_head"),
        Budget(full_layers=1),
        geometry=geometry(3, windows=(None, 7, None)),
        mixer="sliding",
        options={"window": 16, "sinks": 4},
        cache=WINDOW,
    )


@pytest.mark.parametrize(
    ("value", "loads"),
    [
        (full_plan("llama", geometry()), planning.loads_plan),
        (mixed_plan(), planning.loads_plan),
        (scores([1.5, -2, 0]), planning.loads_scores),
        (scores([[1, 2], [3, 4]], "kv_head", ((0.5,) * 4,) * 4), planning.loads_scores),
    ],
    ids=["full", "mixed", "scores", "pairs"],
)
def test_json_round_trip(value, loads):
    text = planning.dumps(value)
    assert loads(text) == value
    assert planning.dumps(loads(text)) == text
    shuffled = json.dumps(dict(reversed(json.loads(text).items())))
    assert planning.dumps(loads(shuffled)) == text


def test_scores_have_a_digest_and_the_plan_records_it():
    one, two = scores([1, 2]), scores([1, 3])
    assert one.digest == scores([1, 2]).digest != two.digest
    plan = choose(one, Budget(full_layers=1), geometry=geometry(2), mixer="sliding")
    assert plan.scores_digest == one.digest


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("", "plan: not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "plan: expected a mapping"),
        ("{}", "missing model_type, geometry, layers"),
        ('{"model_type": "a", "model_type": "b"}', "'model_type' appears twice"),
        ('{"modeltype": "a"}', "Did you mean 'model_type'?"),
        ('{"model_type": 5}', "plan.model_type: expected text"),
    ],
    ids=["empty", "deep", "list", "missing", "doubled", "unknown", "type"],
)
def test_bad_plan_files(text: str, needle: str):
    with pytest.raises(PlanError) as caught:
        planning.loads_plan(text)
    assert needle in str(caught.value)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999", "null", '"1"', "true"])
def test_scores_files_hold_finite_numbers(literal: str):
    text = planning.dumps(scores([1.25, 2])).replace("1.25", literal)
    with pytest.raises(PlanError, match=r"values\[0\]\[0\]"):
        planning.loads_scores(text)


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "needle"),
    [
        ({}, "exactly one of"),
        ({"full_layers": 1, "full_fraction": 0.5}, "full_layers=1 and full_fraction=0.5"),
        ({"full_layers": 0}, "keep at least 1"),
        ({"full_layers": -3}, "keep at least 1"),
        ({"full_fraction": 0.0}, "(0, 1]"),
        ({"full_fraction": 1.01}, "(0, 1]"),
        ({"full_fraction": float("nan")}, "(0, 1]"),
        ({"cache_bytes_per_token": 0}, "at least 1"),
        ({"full_layers": 1, "min_full_per_layer": -1}, "below 0"),
    ],
    ids=str,
)
def test_bad_budgets(given: dict, needle: str):
    with pytest.raises(PlanError) as caught:
        Budget(**given)
    assert needle in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", Budget(full_layers=7)), ("1/4", Budget(full_fraction=0.25)),
        ("0.25", Budget(full_fraction=0.25)), ("25%", Budget(full_fraction=0.25)),
        ("4096B", Budget(cache_bytes_per_token=4096)), (" 7 ", Budget(full_layers=7)),
        ("4096b", Budget(cache_bytes_per_token=4096)), ("1.0", Budget(full_fraction=1.0)),
    ],
)  # fmt: skip
def test_budget_text(text: str, expected: Budget):
    assert Budget.parse(text) == expected


def test_budget_text_takes_pins():
    assert Budget.parse("1/2", keep=(3,)) == Budget(full_fraction=0.5, keep=(3,))


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1", "1/0", "1/", "/2", "0/4", "5/4", "1/2/3", "0.0", "1.5", "nan%",
             "0%", "101%", "B", "0B", "-4B", "1.5B", "inf%", "1e2"]
)  # fmt: skip
def test_bad_budget_text(text: str):
    with pytest.raises(PlanError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("budget", "needle"),
    [
        (Budget(full_layers=7), "full_layers is 7, but only 6 layers"),
        (Budget(full_layers=1, keep=(6,)), "keep: layer 6 does not exist (0-5)"),
        (Budget(full_layers=1, keep=(-1,)), "layer -1 does not exist"),
        (Budget(full_layers=1, replace=(9,)), "replace: layer 9 does not exist"),
        (Budget(full_layers=1, keep=((0, 1),)), "layer 0 has no unit 1"),
        (Budget(full_layers=1, keep=(0, 1)), "keep 2 units, the limit is 1"),
        (Budget(full_layers=2, keep=(0,), replace=(0,)), "both kept and replaced"),
        (Budget(full_layers=2, replace=(0, 1, 2, 3, 4)), "only 1 are left"),
        (Budget(full_layers=1, min_full_per_layer=2), "a layer has 1 units"),
        (Budget(full_layers=1, min_full_per_layer=1), "the limit is 1"),
        (Budget(cache_bytes_per_token=63), "one full layer alone costs 64"),
    ],
    ids=lambda value: "" if isinstance(value, Budget) else value,
)
def test_budgets_that_contradict_the_model(budget: Budget, needle: str):
    with pytest.raises(PlanError) as caught:
        choose_units(scores(range(6)), budget, geometry=geometry())
    assert needle in str(caught.value)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(PlanError, match="5 layers x 1 units, the model 6 x 1"):
        choose(scores(range(5)), Budget(full_layers=1), geometry=geometry(), mixer="sliding")
    with pytest.raises(PlanError, match="6 layers x 1 units, the model 6 x 2"):
        values = scores(range(6), "kv_head")
        choose(values, Budget(full_layers=1), geometry=geometry(), mixer="sliding")


def test_a_model_without_full_layers_has_nothing_to_replace():
    with pytest.raises(PlanError, match="nothing can be replaced"):
        shape = geometry(2, windows=(8, 8))
        choose(scores([1, 2]), Budget(full_fraction=0.5), geometry=shape, mixer="sliding")
    with pytest.raises(PlanError, match="already slides in the source"):
        shape = geometry(2, windows=(8, None))
        budget = Budget(full_layers=1, keep=(0,))
        choose(scores([1, 2]), budget, geometry=shape, mixer="sliding")


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"num_hidden_layers": 0, "windows": ()}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ({"windows": (None,)}, "1 entries for 6 layers"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"v_head_dim": 0}, "v_head_dim is 0"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"windows": (None,) * 5 + (0,)}, "windows[5] is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_geometry(changes: dict, needle: str):
    with pytest.raises(PlanError) as caught:
        geometry(**changes)
    assert needle in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "needle"),
    [
        ([(0, 1, 2)], "every one of the 4 heads"),
        ([(0, 1, 2, 3), (3,)], "exactly one group"),
        ([(0, 1, 2, 3, 4)], "head 4 does not exist; this model has 4 query heads (0-3)"),
        ([], "every one of the 4 heads"),
    ],
    ids=["missing", "twice", "out-of-range", "none"],
)
def test_heads_must_be_partitioned(groups: list, needle: str):
    layer = LayerPlan(groups=tuple(HeadGroup(mixer="full", heads=h) for h in groups))
    with pytest.raises(PlanError) as caught:
        Plan(model_type="llama", geometry=geometry(1), layers=(layer,))
    assert needle in str(caught.value)


@pytest.mark.parametrize("heads", [(), (1, 0), (0, 0)])
def test_head_groups_list_heads_once_in_order(heads: tuple[int, ...]):
    with pytest.raises(PlanError):
        HeadGroup(mixer="full", heads=heads)


def test_plans_must_have_the_models_layers():
    plan = full_plan("llama", geometry())
    with pytest.raises(PlanError, match="the plan has 5 layers, the model 6"):
        dataclasses.replace(plan, layers=plan.layers[:5])
    with pytest.raises(PlanError, match="layer 6 does not exist"):
        uniform_plan("llama", geometry(), [6], "sliding", {}, WINDOW)


@pytest.mark.parametrize(
    ("values", "pairs", "needle"),
    [
        ((), None, "empty"),
        (((),), None, "empty"),
        (((1.0,), (1.0, 2.0)), None, "values[1] has 2 units"),
        (((float("nan"),),), None, "values[0][0] is nan"),
        (((1.0,), (float("inf"),)), None, "values[1][0] is inf"),
        (((1.0,), (2.0,)), ((0.0,),), "pairs must be 2 x 2"),
        (((1.0,), (2.0,)), ((0.0, 0.0), (0.0,)), "pairs must be 2 x 2"),
        (((1.0,), (2.0,)), ((0.0, float("nan")), (float("nan"), 0.0)), "pairs[0][1] is nan"),
        (((1.0,), (2.0,)), ((0.0, 1.0), (2.0, 0.0)), "symmetric"),
    ],
    ids=["empty", "empty-row", "ragged", "nan", "inf", "pairs-shape", "pairs-ragged", "pairs-nan",
         "pairs-asymmetric"],
)  # fmt: skip
def test_bad_scores(values, pairs, needle: str):
    with pytest.raises(PlanError) as caught:
        scores(values, pairs=pairs)
    assert needle in str(caught.value)


def test_mixers_of_one_initial_have_letters_of_their_own() -> None:
    def layer(mixer: str) -> LayerPlan:
        return LayerPlan(groups=(HeadGroup(mixer=mixer, heads=(0, 1, 2, 3)),))

    names = ("full", "gla", "gated_delta", "hola", "hedgehog", "pkg.fancy:Mixer", "gla")
    layers = tuple(layer(name) for name in names)
    plan = Plan(model_type="llama", geometry=geometry(7), layers=layers)
    assert plan.letters["gated_delta"] == "G" and plan.letters["hedgehog"] == "H"
    assert plan.pattern == "FLGOHML"


@pytest.mark.parametrize("granularity", ["layer", "kv_head", "head"])
@pytest.mark.parametrize("seed", range(4))
def test_bytes_bound_what_a_plan_grows_by(granularity: str, seed: int) -> None:
    shape = geometry(6, heads=8, kv_heads=4)
    drawn = random.Random(seed)
    width = shape.units(granularity)  # type: ignore[arg-type]
    values = [[drawn.random() for _ in range(width)] for _ in range(6)]
    limit = 2 * 4 * shape.entry_elements()  # one full layer, at 16 bits
    plan = choose(
        scores(values, granularity),
        Budget(cache_bytes_per_token=limit),
        geometry=shape,
        mixer="sliding",
        cache=CacheCost(tokens=4),
    )
    grown = (plan.cache_bytes(2000) - plan.cache_bytes(1000)) / 1000
    assert 0 < grown <= limit
