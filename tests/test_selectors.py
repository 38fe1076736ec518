"""What single selectors promise: their mathematics, their limits, stopping, resuming, bad input."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from morph import registry, strict, surgery
from morph.errors import PlanError
from morph.plan import Budget, Scores, loads_scores
from morph.plan import dumps as to_json
from morph.selection import choose_units, swap_gain
from morph.selectors import _common, _gates, _single, consa, duo, fisher, flashmorph, nll
from morph.surgery import Batch, Memo, Nudge, Soft
from morph.testing import planted_model, tiny_model

LENGTH = 40


def batch_for(model, rows=4, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, LENGTH), generator=generator)
    answers = torch.zeros(rows, LENGTH, dtype=torch.bool)
    answers[:, -4:] = True
    return Batch(ids=ids, answers=answers)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture
def probe(model):
    with surgery.morphable(model, "sliding", {"window": 8}) as found:
        yield found


# --- the engine under them ----------------------------------------------------------------------


def test_gates_at_one_are_the_source_and_at_zero_the_mixer(model, probe):
    batch = batch_for(model)
    for gate, keep in ((1.0, probe.candidates), (0.0, ())):
        modes = {i: Soft(gate=torch.tensor(gate)) for i in probe.candidates}
        whole = probe.modes([(i, 0) for i in keep])
        torch.testing.assert_close(
            probe.logits(batch, modes), probe.logits(batch, whole), atol=1e-5, rtol=1e-5
        )


def test_gates_may_differ_by_head_row_and_token(model, probe):
    """Gates of 0 and 1 for heads, rows and tokens give what each of them would give alone."""
    batch, heads = batch_for(model), probe.geometry.num_attention_heads
    layer = probe.candidates[1]
    rows = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None].expand(4, heads)
    tokens = rows[:, None].expand(4, LENGTH, heads)
    full = probe.logits(batch, {}).view(4, 4, -1)
    cheap = probe.logits(batch, {layer: "cheap"}).view(4, 4, -1)
    expected = torch.stack([full[0], cheap[1], full[2], cheap[3]])
    for gate in (rows, tokens):
        got = probe.logits(batch, {layer: Soft(gate=gate)}).view(4, 4, -1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    mask = probe.head_mask([0], probe.geometry.units("kv_head"))
    by_head = probe.logits(batch, {layer: Soft(gate=mask.float())})
    kept = probe.modes([(layer, 0), *((i, u) for i in probe.candidates if i != layer
                                      for u in range(probe.geometry.num_key_value_heads))],
                       "kv_head")  # fmt: skip
    torch.testing.assert_close(by_head, probe.logits(batch, kept), atol=1e-5, rtol=1e-5)


def test_only_gates_get_gradients(model, probe):
    gate = torch.ones((), requires_grad=True)
    loss = probe.logits(batch_for(model), {0: Soft(gate=gate)}).square().mean()
    (found,) = probe.gradients(loss, [gate])
    assert float(found) != 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_nudge_has_the_derivative_of_a_gate(model, probe):
    """A nudge away from full has minus a gate's slope at 1, though cheap has no graph."""
    batch, layer = batch_for(model), probe.candidates[0]
    gate, amount = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    towards = torch.randn(16, model.config.vocab_size)
    slopes = []
    for variable, mode in ((gate, Soft(gate=gate)), (amount, Nudge(amount=amount))):
        loss = (probe.logits(batch, {layer: mode}) * towards).sum()
        slopes.append(float(probe.gradients(loss, [variable])[0]))
    assert slopes[0] == pytest.approx(-slopes[1], rel=1e-4)


def test_variants_equal_whole_forwards_whatever_their_order(model, probe):
    """Depth-first reuse gives each set what it gets alone; equal sets are computed once."""
    batch = batch_for(model)
    trace = probe.trace(batch, probe.modes([(1, 0)]))
    sets = [[], [(0, 0)], [(3, 0)], [(1, 0), (2, 0)], [(0, 0), (1, 0), (2, 0)], [(0, 0)], [(1, 0)]]
    found = trace.variants([probe.modes(s) for s in sets], lambda logits: logits)
    for keep, logits in zip(sets, found):
        alone = probe.logits(batch, probe.modes(keep))
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


# --- fisher -------------------------------------------------------------------------------------


def test_fisher_is_the_curvature_of_the_kl(model):
    """For small steps away from the source half z F z is the KL, single units and pairs alike."""
    batch, step = batch_for(model, rows=8), 0.02
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        found = fisher.score(probe, [batch], fisher.Options(samples=150))
        assert found.pairs is not None
        source = torch.log_softmax(probe.logits(batch, {}).double(), -1)
        for kept in ((0,), (1, 3), (0, 1, 2, 3)):
            modes = {i: Soft(gate=torch.tensor(1 - step)) for i in kept}
            hybrid = torch.log_softmax(probe.logits(batch, modes).double(), -1)
            kl = float((source.exp() * (source - hybrid)).sum(-1).mean()) / step**2
            alone = sum(found.values[i][0] for i in kept)
            together = sum(found.pairs[i][j] for i in kept for j in kept if i < j)
            assert alone + together == pytest.approx(kl, rel=0.15)


def test_fisher_of_sampled_labels_has_the_same_expectation(model):
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        batch = batch_for(model, rows=8)
        one, other = (
            fisher.score(probe, [batch], fisher.Options(samples=120, labels=labels))
            for labels in ("gaussian", "sampled")
        )
    for a, b in zip(one.values, other.values):
        assert a == pytest.approx(b, rel=0.25)


def test_fisher_of_layers_is_the_sum_over_their_heads(model):
    """One set of gradients serves every granularity: F of a layer sums F over its heads."""
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        batch, options = batch_for(model), fisher.Options(samples=2)
        spent = probe.backwards
        layer = fisher.score(probe, [batch], options)
        heads = fisher.score(probe, [batch], options, granularity="head")
        assert probe.backwards - spent == 2  # the second granularity came from the memo
    assert heads.pairs is not None
    count = probe.geometry.num_attention_heads
    for i, (value,) in enumerate(layer.values):
        own = range(i * count, (i + 1) * count)
        alone = sum(heads.values[i])
        pairs = sum(heads.pairs[a][b] for a in own for b in own if a < b)
        assert value == pytest.approx(alone + pairs, rel=1e-9, abs=1e-15)


# --- flashmorph, duo ----------------------------------------------------------------------------


@pytest.mark.parametrize("align_on", ["mixer_out", "residual", "final_hidden", "logits_kl"])
def test_flashmorph_at_the_source_has_no_error_and_no_slope(model, align_on):
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        batch, gates = batch_for(model), _gates.unit_gates(probe, "layer", 1.0)
        want = (align_on,) if align_on in ("mixer_out", "residual") else ()
        teacher = probe.run(batch, {}, want)
        mixed = probe.run(batch, _gates.soft(probe, gates), want)
        options = flashmorph.Options(align_on=align_on)
        loss = flashmorph._distance(teacher, mixed, options)
        (slope,) = probe.gradients(loss, [gates])
    # a KL is a difference of two log-softmaxes, each rounded to 6e-8 in float32
    assert float(loss.detach()) < (1e-7 if align_on == "logits_kl" else 1e-9)
    assert float(slope.abs().max()) < 1e-4


@pytest.mark.parametrize(("weight", "end"), [(0.0, 1.0), (100.0, 0.0)])
def test_flashmorph_without_tax_keeps_all_and_with_a_huge_one_nothing(model, weight, end):
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        options = flashmorph.Options(weight=weight, steps=80, lr=0.05)
        found = flashmorph.score(probe, [batch_for(model)], options)
    assert all(value == pytest.approx(end, abs=0.02) for (value,) in found.values)
    assert "warning" in found.provenance  # gates that do not differ rank nothing


def test_separable_gates_end_where_the_formula_says():
    """With both branches on the source's inputs alpha is clip(1 - lambda L / (2 d), 0, 1)."""
    weight, errors = 0.1, [0.05, 0.3, 1.2]
    gates = torch.ones(3, requires_grad=True)
    d = torch.tensor(errors)

    class Count:
        memo = Memo()
        progress = staticmethod(lambda done, total: None)

        def gradients(self, loss, inputs):
            return torch.autograd.grad(loss, inputs)

    _gates.train(
        Count(),
        "separable",
        [_gates.Group(parameters=[gates], lr=0.02)],
        [Batch(ids=torch.ones(1, 2, dtype=torch.long), answers=torch.tensor([[False, True]]))],
        lambda step, batch: ((1 - gates) ** 2 * d).mean() + weight * gates.sum(),
        steps=600,
        clamp=lambda: flashmorph._clamp(gates),
    )
    wanted = [min(1.0, max(0.0, 1 - weight * 3 / (2 * x))) for x in errors]
    assert gates.tolist() == pytest.approx(wanted, abs=1e-2)


def test_duo_at_the_source_is_the_source(model):
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        batch, gates = batch_for(model), _gates.unit_gates(probe, "kv_head", 1.0)
        full, source = probe.teacher(batch)
        mixed = probe.run(batch, _gates.soft(probe, gates, full))
    torch.testing.assert_close(mixed.final_hidden, source.final_hidden, atol=1e-5, rtol=1e-5)


# --- consa --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_alpha", "open_"), [(5.0, 0.9986), (0.0, 0.8318)])
def test_hard_concrete_opens_as_often_as_the_formula_says(log_alpha, open_):
    a = torch.full((100_000,), log_alpha)
    z = consa.draw(a, torch.Generator().manual_seed(0))
    assert float((z > 0).float().mean()) == pytest.approx(open_, abs=0.004)
    assert float(1 - consa.sparsity(a)) == pytest.approx(open_, abs=1e-4)
    assert 0 <= float(z.min()) <= float(z.max()) <= 1


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("scopes", [1, 4])
def test_the_constraint_alone_is_met(target, scopes):
    """Without a loss of the model the expected sparsity goes to its target, in either scope."""
    log_alpha = torch.full((4, 8), 5.0, requires_grad=True)
    multipliers = torch.zeros(2, scopes, requires_grad=True)

    class Plain:
        memo = Memo()
        progress = staticmethod(lambda done, total: None)

        def gradients(self, loss, inputs):
            return torch.autograd.grad(loss, inputs)

    _gates.train(
        Plain(),
        "constraint",
        [
            _gates.Group(parameters=[log_alpha], lr=0.1),
            _gates.Group(parameters=[multipliers], lr=0.1, ascent=True),
        ],
        [Batch(ids=torch.ones(1, 2, dtype=torch.long), answers=torch.tensor([[False, True]]))],
        lambda step, batch: consa.lagrangian(log_alpha, multipliers, target),
        steps=600,
    )
    found = consa.sparsity(log_alpha)
    assert found.mean().item() == pytest.approx(target, abs=0.05)


def test_multipliers_climb():
    """Below the target lambda falls, so that sparsity is rewarded; phi only grows."""
    log_alpha = torch.full((2, 4), 5.0)  # nearly nothing is cheap
    multipliers = torch.zeros(2, 1, requires_grad=True)
    gap = consa.sparsity(log_alpha).mean() - 0.5
    (slope,) = torch.autograd.grad(consa.lagrangian(log_alpha, multipliers, 0.5), [multipliers])
    assert float(slope[0]) == pytest.approx(float(gap)) and float(gap) < 0
    assert float(slope[1]) == pytest.approx(float(gap) ** 2)


def test_single_layer_scope_keeps_the_same_share_of_every_layer(model):
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        shape = probe.geometry
        each = shape.num_key_value_heads // 2
        count = each * len(probe.candidates)
        options = consa.Options(count=count, scope="layer", steps=4)
        found = consa.score(probe, [batch_for(model)], options, granularity="kv_head")
        share = count / (len(probe.candidates) * shape.num_key_value_heads)
        kept = choose_units(found, Budget(full_fraction=share), geometry=shape)
        assert {sum(i == layer for i, _ in kept) for layer in probe.candidates} == {each}
        with pytest.raises(PlanError, match="do not divide"):
            odd = replace(options, count=count + 1)
            consa.score(probe, [batch_for(model)], odd, granularity="kv_head")


def test_consa_says_when_the_constraint_is_missed(model):
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        found = consa.score(probe, [batch_for(model)], consa.Options(count=1, steps=3))
    assert "expected sparsity" in found.provenance["warning"]


def test_weights_that_learn_beside_the_masks_come_back(model):
    before = copy.deepcopy(model.state_dict())
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        moved = consa.Options(count=1, steps=3, train="weights", weight_lr=1e-2)
        still = consa.Options(count=1, steps=3)
        batch = batch_for(model)
        trained, frozen = (consa.score(probe, [batch], o) for o in (moved, still))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses = [x.provenance["last_loss"] for x in (trained, frozen)]
    assert losses[0] != losses[1]  # they did learn


# --- intervals of ranks -------------------------------------------------------------------------


def test_rank_intervals_cover_what_examples_disagree_on():
    """Two units that every example ranks alike are certain; two that swap places are not."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 24, generator=generator)
    gain = torch.stack([torch.full((24,), 9.0), noise[0], noise[1], torch.full((24,), -9.0)])
    low, high = _single.rank_intervals(gain.double(), torch.ones(24).double(), 400)
    assert (low[0], high[0]) == (1, 1) and (low[3], high[3]) == (4, 4)
    assert (low[1], high[1]) == (2, 3) and (low[2], high[2]) == (2, 3)
    shuffled = _single.rank_intervals(
        gain[:, torch.randperm(24)].double(), torch.ones(24).double(), 400
    )
    assert shuffled == (low, high)


def test_nll_tells_the_intervals(model, probe):
    found = nll.score(probe, [batch_for(model, rows=8)], nll.Options())
    ranks = found.provenance["ranks"]
    for (low,), (high,) in zip(ranks["low"], ranks["high"]):
        assert 1 <= low <= high <= len(probe.candidates)
    assert loads_scores(to_json(found)) == found


# --- choosing with pairs ------------------------------------------------------------------------


def random_scores(layers: int, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(layers, 3, generator=generator).double()
    form = root @ root.T
    return Scores(
        selector="x",
        model_type="m",
        granularity="layer",
        values=tuple((float(form[i, i]) / 2,) for i in range(layers)),
        pairs=tuple(
            tuple(0.0 if i == j else float(form[min(i, j), max(i, j)]) for j in range(layers))
            for i in range(layers)
        ),
        unit="nats",
    )


def test_swap_gain_is_the_change_of_the_quadratic_cost(model):
    shape = replace(surgery.geometry_of(model), num_hidden_layers=7, windows=(None,) * 7)
    scores = random_scores(7, 0)

    def cost(kept):
        out = [i for i in range(7) if i not in kept]
        pairs = sum(scores.pairs[a][b] for n, a in enumerate(out) for b in out[n + 1 :])
        return sum(scores.values[i][0] for i in out) + pairs

    gain = swap_gain(scores, [(1, 0), (4, 0)], shape)
    for old in (1, 4):
        for new in (0, 2, 3, 5, 6):
            after = {1, 4} - {old} | {new}
            assert gain((old, 0), (new, 0)) == pytest.approx(cost({1, 4}) - cost(after))
    kept = {i for i, _ in choose_units(scores, Budget(full_layers=3), geometry=shape)}
    near = [kept - {a} | {b} for a in kept for b in range(7) if b not in kept]
    assert all(cost(kept) <= cost(other) + 1e-9 for other in near)


# --- stopping, resuming, breaking ---------------------------------------------------------------

STOPPABLE = {
    "nll": {},
    "kl": {"mode": "remove"},
    "beam": {"count": 2},
    "fisher": {"samples": 2},
    "flashmorph": {"steps": 50},
    "consa": {"steps": 50, "count": 2},
    "duo": {"steps": 50},
}


@pytest.mark.parametrize("name", STOPPABLE)
def test_a_stopped_selector_goes_on_to_the_same_scores(model, name, tmp_path):
    """Ctrl-C somewhere in the middle; the same command reuses the rest, bit for bit."""
    module = registry.load("selectors", name)
    options = strict.build(module.Options, STOPPABLE[name])
    batches = [batch_for(model, rows=2), batch_for(model, rows=2, seed=5)]

    def score(memo, progress=None):
        with surgery.morphable(model, "sliding", {"window": 8}) as probe:
            probe.memo = memo
            if progress is not None:
                probe.progress = progress
            return module.score(probe, batches, options), probe.tokens

    whole, cost = score(Memo())
    file = tmp_path / "memo.jsonl"
    seen = 0

    def interrupt(done, total):
        nonlocal seen
        seen += 1
        if seen == (30 if "steps" in STOPPABLE[name] else 5):
            raise KeyboardInterrupt

    if name == "fisher":  # one batch is its smallest piece
        memo = Memo(file, "x")
        with surgery.morphable(model, "sliding", {"window": 8}) as probe:
            probe.memo = memo
            fisher._rows(probe, _common.canonical(batches)[0], options)
    else:
        with pytest.raises(KeyboardInterrupt):
            score(Memo(file, "x"), interrupt)
    resumed, rest = score(Memo(file, "x"))
    assert resumed.values == whole.values and resumed.pairs == whole.pairs
    assert rest < cost
    with file.open("a") as cut:
        cut.write('{"key": "half a li')
    again, _ = score(Memo(file, "x"))
    assert again.values == whole.values
    assert len(Memo(file, "another digest")) == 0


@pytest.mark.parametrize("where", ["loss", "gradient", "explosion"])
def test_training_stops_with_the_last_good_state(where):
    gate = torch.ones(3, requires_grad=True)
    states = []

    class Broken:
        memo = Memo()
        progress = staticmethod(lambda done, total: None)

        def gradients(self, loss, inputs):
            found = torch.autograd.grad(loss, inputs)
            return tuple(g * math.nan for g in found) if self.bad and where == "gradient" else found

    probe = Broken()

    def loss_at(step, batch):
        probe.bad = step == 5
        states.append(gate.detach().clone())
        loss = (gate**2).sum()
        return loss * math.nan if probe.bad and where == "loss" else loss

    def clamp():
        if probe.bad and where == "explosion":
            with torch.no_grad():
                gate.fill_(1e9)

    batch = Batch(ids=torch.ones(1, 2, dtype=torch.long), answers=torch.tensor([[False, True]]))
    run = _gates.train(
        probe,
        "x",
        [_gates.Group(parameters=[gate], lr=0.1)],
        [batch],
        loss_at,
        steps=20,
        clamp=clamp,
    )
    assert "step 5 of 20" in run.stopped
    torch.testing.assert_close(gate.detach(), states[5], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["nll", "kl", "fisher", "flashmorph", "consa", "duo"])
def test_a_model_that_overflows_is_an_error_in_words(name):
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(math.nan)
    module = registry.load("selectors", name)
    options = strict.build(module.Options, {"count": 1} if name == "consa" else {})
    with (
        surgery.morphable(model, "sliding", {"window": 8}) as probe,
        pytest.raises(PlanError, match="dtype float32"),
    ):
        module.score(probe, [batch_for(model)], options)


# --- bad input ----------------------------------------------------------------------------------

BAD = {
    "consa": [{"steps": 0}, {"lr": 0.0}, {"warmup": 2.0}, {"batch_size": 0}],
    "flashmorph": [{"steps": 0}, {"weight": -1.0}, {"lr": 0.0}],
    "duo": [{"steps": 0}, {"reg": -0.1}],
    "fisher": [{"samples": 0}],
    "beam": [{"width": 0}, {"swaps": -1}],
    "kl": [{"distill": -1}, {"distill": 5, "mode": "remove"}],
    "nll": [{"bootstrap": -1}],
}


@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name, many in BAD.items() for given in many]
)
def test_options_out_of_range_are_refused_by_name(name, given):
    module = registry.load("selectors", name)
    with pytest.raises(PlanError, match=name):
        strict.build(module.Options, given)


def test_what_cannot_be_counted_is_refused(model, probe):
    batches = [batch_for(model)]
    for module in (registry.load("selectors", "beam"), consa):
        with pytest.raises(PlanError, match="count"):
            module.score(probe, batches, module.Options())
        with pytest.raises(PlanError, match="lies in 1-4"):
            module.score(probe, batches, module.Options(count=9))


@pytest.mark.parametrize("name", [n for n in registry.names("selectors")])
def test_selectors_that_look_need_examples(model, probe, name):
    module = registry.load("selectors", name)
    if module.NEEDS == "weights":
        pytest.skip("looks at no data: it is a baseline")
    options = strict.build(module.Options, {})
    with pytest.raises(PlanError, match=r"needs examples; give --data"):
        module.score(probe, [], options)


def test_a_mixer_without_parameters_cannot_be_distilled(model, probe):
    kl = registry.load("selectors", "kl")
    with pytest.raises(PlanError, match="no parameters to distil"):
        kl.score(probe, [batch_for(model)], kl.Options(distill=3))


def test_distilling_for_every_layer_leaves_the_mixers_as_they_were(model):
    kl = registry.load("selectors", "kl")
    with surgery.morphable(model, "decay") as probe:
        before = [p.detach().clone() for p in probe.cheap_parameters()]
        batch = batch_for(model)
        short, none = (kl.score(probe, [batch], kl.Options(distill=n, lr=1e-2)) for n in (8, 1))
        assert all(torch.equal(a, b) for a, b in zip(before, probe.cheap_parameters()))
    assert sum(x for (x,) in short.values) > sum(x for (x,) in none.values)  # it learns


def test_duo_of_layers_and_heads_has_the_right_shape(model, probe):
    for granularity in ("layer", "kv_head", "head"):
        options = duo.Options(steps=2)
        found = duo.score(probe, [batch_for(model)], options, granularity=granularity)
        assert len(found.values[0]) == probe.geometry.units(granularity)


@pytest.mark.parametrize("layout", ["chain"])
def test_a_documented_failure_is_repaired(layout):
    """Local derivatives do not see the first hop of a chain; the swap pass finds it."""
    fixture = planted_model(layout, 0)
    with surgery.morphable(fixture.model, fixture.mixer, fixture.options, fixture.family) as probe:
        found = fisher.score(probe, fixture.batches, fisher.Options())
        kept = choose_units(found, Budget(full_layers=2), geometry=probe.geometry)
        assert frozenset(i for i, _ in kept) not in fixture.correct
        promise = lambda kept: swap_gain(found, kept, probe.geometry)
        swapped, _ = _common.verify_and_swap(
            probe, fixture.batches, kept, "layer", promise=promise, tries=64
        )
    assert frozenset(i for i, _ in swapped) in fixture.correct


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@pytest.mark.parametrize("name", registry.names("selectors"))
def test_scores_on_a_gpu_are_those_of_the_cpu(name, granularity):
    module = registry.load("selectors", name)
    if module.NEEDS == "weights":
        pytest.skip("looks at no data: it is a baseline")
    options = strict.build(module.Options, getattr(module, "EXAMPLE", {}))
    if getattr(options, "count", 0) is None:
        options = replace(options, count=2)
    fixture = planted_model("chain", 0, examples=6, heads=4, copy=True)
    found = []
    for device in ("cpu", "cuda"):
        model = fixture.model.to(device)
        batches = [batch.on(device) for batch in fixture.batches]
        with surgery.morphable(model, "sliding", {"window": 12}, fixture.family) as probe:
            found.append(module.score(probe, batches, options, granularity=granularity))
    one, other = (torch.tensor(f.values) for f in found)
    scale = float(one.abs().max().clamp(min=1e-3))
    torch.testing.assert_close(other, one, atol=2e-3 * scale, rtol=2e-2)
