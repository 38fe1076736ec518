"""The morphable model and the selectors that probe through it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from morph import data, registry, strict, surgery
from morph.errors import PlanError
from morph.pipeline._data import batches_of
from morph.pipeline._source import open_source
from morph.plan import Budget
from morph.selection import choose
from morph.selectors import _common
from morph.surgery import CHEAP, FULL, Batch
from morph.testing import planted_model, tiny_model

SELECTORS = registry.names("selectors")
MIXERS = [name for name in registry.names("mixers") if name != "full"]
LENGTH, ANSWERS = 40, 4


def batch_for(model, rows=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, LENGTH), generator=generator)
    answers = torch.zeros(rows, LENGTH, dtype=torch.bool)
    answers[:, -ANSWERS:] = True
    return Batch(ids=ids, answers=answers)


def fingerprint(model):
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(name.encode() + p.detach().numpy().tobytes())
        found.update(bytes([p.requires_grad, p.grad is not None]))
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found.update(f"{name} {type(module).__name__} {module.training} {hooks}".encode())
    return found.hexdigest()


def options_of(module, count=1):
    """Return the options under which the laws run a selector, counts filled in by the budget."""
    options = strict.build(module.Options, getattr(module, "EXAMPLE", {}))
    if getattr(options, "count", 0) is None:
        options = replace(options, count=count)
    return options


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


OPTIONS = {"sliding": {"window": 12}}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("base", ["full", "cheap"])
def test_reuse_changes_nothing(model, mixer, base):
    batch = batch_for(model)
    with surgery.morphable(model, mixer, OPTIONS.get(mixer)) as probe:
        keep = [(i, 0) for i in probe.candidates] if base == "full" else []
        modes = probe.modes(keep)
        fast, slow = probe.trace(batch, modes), probe.trace(batch, modes, reuse=False)
        torch.testing.assert_close(fast.logits, slow.logits, atol=1e-5, rtol=1e-5)
        for layer in probe.candidates:
            change = {layer: CHEAP if base == "full" else FULL}
            whole = probe.logits(batch, {**modes, **change})
            torch.testing.assert_close(slow.variant(change), whole, atol=0, rtol=0)
            torch.testing.assert_close(fast.variant(change), whole, atol=1e-5, rtol=1e-5)


def test_reuse_computes_less(model):
    batch = batch_for(model)
    spent = {}
    for window in (12, 20):  # the second: half of the tokens are shared
        for reuse in (True, False):
            with surgery.morphable(model, "sliding", {"window": window}) as probe:
                trace = probe.trace(batch, probe.modes([]), reuse=reuse)
                for layer in probe.candidates:
                    trace.variant({layer: FULL})
                spent[window, reuse] = probe.layer_evaluations
    layers = model.config.num_hidden_layers
    assert spent[12, False] == layers * (layers + 1)
    assert spent[20, True] < spent[12, True] < spent[12, False] / 1.5


@pytest.mark.parametrize("granularity", ["layer", "kv_head", "head"])
def test_head_units_blend_exactly(model, granularity):
    """All units kept is the source; none is the mixer everywhere; single units differ from both."""
    batch = batch_for(model)
    with surgery.morphable(model, "sliding", {"window": 12}) as probe:
        units = _common.units(probe, granularity)
        full = probe.nll([batch], units, granularity)
        assert full == probe.nll([batch], [(i, 0) for i in probe.candidates])
        assert probe.nll([batch], [], granularity) == probe.nll([batch], [])
        sweep = _common.Sweep(probe, [batch], units, granularity)
        for unit in units:
            rest = [u for u in units if u != unit]
            assert sweep.nll_with(rest) == pytest.approx(
                probe.nll([batch], rest, granularity), abs=1e-5
            )


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
def test_selector_laws(model, selector, granularity):
    """Right shape, deterministic, higher is kept, and the model comes back bit-identical."""
    module = registry.load("selectors", selector)
    batches = [] if module.NEEDS == "weights" else [batch_for(model), batch_for(model, seed=3)]
    family = None
    if getattr(module, "NEEDLES", False):  # random tokens answer no question
        fixture = planted_model("chain", 0, examples=6, heads=4, copy=True)
        model, family = fixture.model, fixture.family
        (whole,) = fixture.batches
        batches = [
            Batch(ids=whole.ids[part], answers=whole.answers[part])
            for part in (slice(0, 3), slice(3, 6))
        ]
    before = fingerprint(model)
    found = []
    for order in (batches, batches[::-1]):
        with surgery.morphable(model, "sliding", {"window": 12}, family) as probe:
            options = options_of(module)
            found.append(module.score(probe, order, options, granularity=granularity))
    assert fingerprint(model) == before
    shape = surgery.geometry_of(model, family)
    assert len(found[0].values) == shape.num_hidden_layers
    assert {len(row) for row in found[0].values} == {shape.units(granularity)}
    for a, b in zip(found[0].values, found[1].values):
        assert a == pytest.approx(b, abs=1e-6)
    plan = choose(found[0], Budget(full_layers=1), geometry=shape, mixer="sliding")
    kept = sum(len(g.heads) for x in plan.layers for g in x.groups if g.mixer == "full")
    assert kept == shape.num_attention_heads


def test_restores_after_an_error(model):
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="boom"), surgery.morphable(model, "sliding"):
        raise RuntimeError("boom")
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", ["add", "remove"])
def test_a_window_as_long_as_the_text_scores_zero(model, mode):
    module = registry.load("selectors", "nll")
    with surgery.morphable(model, "sliding", {"window": LENGTH}) as probe:
        found = module.score(probe, [batch_for(model)], module.Options(mode=mode))
    assert max(abs(x) for row in found.values for x in row) < 1e-5


def test_swaps_find_what_a_wrong_ranking_missed(model):
    """Started from the worst pair, the swap pass ends no worse than any single swap away."""
    batches = [batch_for(model, rows=8)]
    with surgery.morphable(model, "sliding", {"window": 4}) as probe:
        pairs = [((a, 0), (b, 0)) for a in range(4) for b in range(a + 1, 4)]
        nll = {pair: probe.nll(batches, pair) for pair in pairs}
        worst = max(nll, key=nll.__getitem__)
        kept, report = _common.verify_and_swap(probe, batches, worst, "layer")
        assert report["nll_before"] == pytest.approx(nll[worst], abs=1e-5)
        assert report["nll_after"] == pytest.approx(nll[kept], abs=1e-5)
        near = [p for p in pairs if len(set(p) & set(kept)) == 1]
        assert nll[kept] <= min(nll[p] for p in near) + 1e-5
        pinned, _ = _common.verify_and_swap(probe, batches, worst, "layer", pinned=worst)
        assert pinned == worst


def test_batches_without_answers_are_refused():
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(PlanError, match="answer"):
        Batch(ids=ids, answers=torch.zeros(1, 4, dtype=torch.bool))


def test_uniform_conventions():
    module = registry.load("selectors", "uniform")
    assert module.positions(8, 2, "last") == {3, 7}
    assert module.positions(8, 2, "first") == {0, 4}
    assert module.positions(8, 2, "centre") == {1, 5}
    assert module.positions(8, 2, "first", offset=1) == {1, 5}
    assert sorted(module.nested_order(9)) == list(range(9))
    with pytest.raises(PlanError, match="1-8"):
        module.positions(8, 0, "last")


def test_random_seeds_differ(model):
    module = registry.load("selectors", "random")
    with surgery.morphable(model, "sliding") as probe:
        found = {module.score(probe, [], module.Options(seed=s)).values for s in range(5)}
    assert len(found) > 1


EMBEDDED = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def planted():
    """The embedded checkpoint, whose recall is planted in layer 5, and questions that need it."""
    source = open_source(str(EMBEDDED / "checkpoint"))
    tokenizer = source.tokenizer()
    text = data.read_text(EMBEDDED / "data" / "sherlock_holmes.txt")[-50_000:]
    examples = data.needle_examples(
        "multikey",
        tokenizer,
        data.token_ids(tokenizer, text),
        length=256,
        depths=[0.0, 0.3, 0.6],
        count=6,
        seed=0,
    )
    return source.model(), batches_of(examples, 256, 6)


def takes_long(name):
    """Whether a selector trains, or patches head by head: a minute on the embedded checkpoint."""
    options = {option for option, _, _ in registry.options("selectors", name)}
    return "steps" in options or name == "hydrahead"


@pytest.mark.parametrize(
    "selector",
    [pytest.param(s, marks=[pytest.mark.slow] * takes_long(s)) for s in SELECTORS],
)
def test_selectors_that_look_find_the_planted_layer(planted, selector):
    model, batches = planted
    module = registry.load("selectors", selector)
    if module.NEEDS == "weights":
        pytest.skip("looks at no data: it is a baseline, and finds nothing")
    with surgery.morphable(model, "sliding", {"window": 64}) as probe:
        options = strict.build(module.Options, {})
        if getattr(options, "count", 0) is None:
            options = replace(options, count=1)
        found = module.score(probe, batches, options)
    values = [row[0] for row in found.values]
    assert max(range(8), key=values.__getitem__) == 5


@pytest.mark.parametrize("mode", ["add", "remove", "greedy"])
def test_every_mode_of_nll_finds_the_planted_layer(planted, mode):
    model, batches = planted
    module = registry.load("selectors", "nll")
    with surgery.morphable(model, "sliding", {"window": 64}) as probe:
        found = module.score(probe, batches, module.Options(mode=mode, count=1))
    values = [row[0] for row in found.values]
    assert max(range(8), key=values.__getitem__) == 5


def test_swaps_repair_a_set_without_the_planted_layer(planted):
    model, batches = planted
    with surgery.morphable(model, "sliding", {"window": 64}) as probe:
        kept, report = _common.verify_and_swap(probe, batches, [(0, 0), (4, 0)], "layer")
    assert (5, 0) in kept
    assert report["nll_after"] < report["nll_before"] / 2
