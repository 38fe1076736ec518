"""Selectors that look at heads, patch them, or weigh what one layer costs: by cases worked by hand.

The table at the end says, per selector and planted layout, in how many of ten models plain top-K is
a correct set, and that the swap pass repairs all others. What a selector cannot see stands there.
"""

from __future__ import annotations

import hashlib
from functools import cache

import pytest
import torch

from morph import registry, strict, surgery
from morph.errors import PlanError
from morph.plan import Budget
from morph.selection import choose_units
from morph.selectors import (
    _attention,
    _common,
    _needles,
    _patching,
    halo,
    hydrahead,
    lazy,
    razor,
    retrieval_head,
)
from morph.surgery import Batch, Fixed
from morph.testing import planted_model, tiny_model

NAMES = ("retrieval_head", "razor", "lazy", "halo", "hydrahead")
OPTIONS = {"halo": {"text_tokens": 8}}  # planted prompts are noise: C is the same everywhere
COUNT = {"single": 1, "chain": 2, "redundant": 2}


@cache
def planted(layout: str, seed: int = 0, heads: int = 4, copy: bool = True):
    return planted_model(layout, seed, heads=heads, copy=copy)


def probing(fixture, **options):
    options = {**fixture.options, **options}
    return surgery.morphable(fixture.model, fixture.mixer, options, fixture.family)


def scored(name: str, fixture, granularity="head", mixer=None, **options):
    module = registry.load("selectors", name)
    with probing(fixture, **(mixer or {})) as probe:
        built = strict.build(module.Options, options)
        return module.score(probe, fixture.batches, built, granularity=granularity)


def flat(found) -> dict[tuple[int, int], float]:
    return {(i, u): x for i, row in enumerate(found.values) for u, x in enumerate(row)}


def batch_of(rows, answers) -> Batch:
    """A batch of token lists; `answers` are (row, position) pairs."""
    ids = torch.tensor(rows)
    marks = torch.zeros_like(ids, dtype=torch.bool)
    for row, at in answers:
        marks[row, at] = True
    return Batch(ids=ids, answers=marks)


# Needles


def test_needles_are_found_by_their_tokens():
    rows = [
        [9, 1, 2, 9, 1, 2, 8, 1, 2, 7],  # twice; the answer is no copy of itself
        [9, 1, 3, 9, 2, 2, 2, 2, 2, 7],  # copies may overlap
        [9, 1, 3, 9, 2, 1, 8, 1, 2, 7],  # both tokens, never in this order
    ]
    found = _needles.locate(batch_of(rows, [(r, at) for r in range(3) for at in (7, 8)]))
    assert [(n.row, n.start, n.length, n.copies) for n in found.needles] == [
        (0, 7, 2, (1, 4)),
        (1, 7, 2, (4, 5)),
    ]
    assert found.step.tolist() == [0, 1, 0, 1, -1, -1]
    assert [row.nonzero()[:, 0].tolist() for row in found.inside] == [
        *[[1, 2, 4, 5]] * 2,
        *[[4, 5, 6]] * 2,
        *[[]] * 2,
    ]


def test_answers_of_a_row_are_looked_for_before_the_first_of_them():
    """Queries and answers in turn: an earlier answer is not the needle of a later one."""
    found = _needles.locate(batch_of([[5, 6, 9, 5, 9, 7, 9, 5]], [(0, 3), (0, 5), (0, 7)]))
    assert [(n.start, n.copies) for n in found.needles] == [(3, (0,)), (7, (0,))]
    assert found.step.tolist() == [0, -1, 0]


def test_no_needle_names_the_task():
    text = Batch(ids=torch.arange(12)[None], answers=torch.arange(12)[None] > 0)
    with pytest.raises(PlanError, match="select.task=multikey"):
        _needles.need([text], "retrieval_head")


# Attention rows


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "phi3", "gemma3_text"])
def test_rows_are_the_models_own_attention(model_type):
    """Scale, score cap, shared KV heads, norms, positions: as in the model's eager attention."""
    model = tiny_model(model_type)
    ids = torch.randint(3, 50, (2, 19), generator=torch.Generator().manual_seed(1))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -1] = True
    at, seen = torch.tensor([4, 11, 18]), {}
    with surgery.morphable(model, "sliding", {"window": 8}) as probe, torch.no_grad():

        def look(layer, q, k, v):
            shape = _attention.shape_of(probe, layer)
            rows = [_attention.scores(q[b, at], k[b], shape, at).softmax(-1) for b in range(2)]
            seen[layer] = torch.stack(rows)

        probe.run(Batch(ids=ids, answers=answers), {}, probe=look)
        assert set(seen) == set(probe.candidates)
    for layer, got in seen.items():
        torch.testing.assert_close(
            got.transpose(1, 2), expected[layer][:, :, at].float(), atol=2e-5, rtol=1e-4
        )


# Lazy


def shape_like(q, k, softcap=None):
    fixture = planted("single")
    with probing(fixture) as probe:
        shape = _attention.shape_of(probe, 0)
    changed = {"scale": q.shape[-1] ** -0.5, "softcap": softcap, "num_key_value_heads": k.shape[1]}
    return type(shape)(**{**vars(shape), **changed})


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_log_sums_give_the_mass_of_a_whole_softmax(softcap, chunk):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, h, 8, generator=generator) * 2 for n, h in ((6, 4), (23, 2)))
    at, shape = torch.tensor([0, 2, 9, 15, 21, 22]), shape_like(q, k, softcap)
    got = lazy.lazy_ratio(q, k, shape, at, 3, 5, chunk=chunk)
    attention = _attention.scores(q, k, shape, at).softmax(-1)
    keys = torch.arange(23)
    for n, i in enumerate(at.tolist()):
        counted = (keys < 3) | ((keys > i - 5) & (keys <= i))
        expected = attention[n][:, counted].sum(-1)
        torch.testing.assert_close(got[n], expected, atol=1e-6, rtol=1e-5)


def test_attention_that_stays_in_the_window_is_wholly_lazy():
    """Keys far back score far below all near ones; then sinks alone; then what is far alone."""
    q, k = torch.ones(4, 2, 4), torch.zeros(40, 1, 4)
    at, shape = torch.arange(36, 40), shape_like(q, k)
    for near, sinks, expected in ((30, 0, 1.0), (0, 2, 1.0), (0, 0, 0.0)):
        k[:] = -50.0
        k[slice(near, None) if near else slice(0, 2)] = 0.0
        got = lazy.lazy_ratio(q, k, shape, at, sinks, 10)
        torch.testing.assert_close(got, torch.full((4, 2), expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_what_fits_in_the_window_is_no_need_for_more(granularity):
    found = scored("lazy", planted("chain"), granularity, mixer={"window": 52})
    assert set(flat(found).values()) == {0.0}


def test_votes_mark_the_lazier_half_of_every_example():
    ratios = torch.tensor([[0.9, 0.1, 0.5, 0.6], [0.2, 0.2, 0.2, 0.1], [0.0, 1.0, 0.0, 1.0]])
    assert lazy.votes(ratios).tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1]]
    by_votes = flat(scored("lazy", planted("single", heads=1), "layer", mode="votes"))
    by_ratio = flat(scored("lazy", planted("single", heads=1), "layer"))
    assert all(0 <= x <= 1 for x in by_votes.values())
    assert max(by_votes, key=by_votes.get) == max(by_ratio, key=by_ratio.get) == (4, 0)


# Razor


def rows_at(places) -> torch.Tensor:
    """Attention `[1, n, S]` as `[n, 1, S]`: all of query n's on `places[n]`."""
    return torch.nn.functional.one_hot(torch.tensor(places), 12).float()[:, None]


def test_echo_and_induction_of_rows_made_by_hand():
    """Four tokens, said three times; queries are the second and third time."""
    at = torch.arange(4, 12)
    for places, expected in (
        (range(0, 8), (1.0, 0.0)),  # the copy before
        ([x % 4 for x in range(4, 12)], (1.0, 0.0)),  # the first copy
        (range(1, 9), (0.0, 1.0)),  # what followed the copy before
        ([x - 1 for x in range(4, 12)], (0.0, 0.0)),  # the token before: neither
        (range(4, 12), (0.0, 0.0)),  # itself
    ):
        got = razor.masses(rows_at(list(places)), at, 4)
        assert tuple(float(x) / 8 for x in got) == expected
    # with a token in front, all places move by one and the token itself is no copy
    shifted = razor.masses(rows_at([0, 1, 2]), torch.tensor([5, 6, 6]), 5, start=1)
    assert tuple(map(float, shifted)) == (1.0, 1.0)


def test_on_text_without_repeats_the_masses_are_what_uniform_attention_has():
    fixture, at = planted("single"), torch.arange(11, 44)
    later = torch.arange(44) > at[:, None]
    uniform = torch.ones(33, 1, 44) / (at + 1)[:, None, None]
    expected = razor.masses(uniform.masked_fill(later[:, None], 0), at, 11)
    with probing(fixture) as probe:  # every token of a context is another one
        rows = [ids[None, :44] for ids in fixture.held_out[0].ids[:32]]
        got = torch.stack([torch.stack(razor._measure(probe, row, 11, 0)) for row in rows])
    for masses, mean in zip(got.mean(0), expected):
        torch.testing.assert_close(
            masses, (mean / 33).double().expand_as(masses), rtol=0.15, atol=0
        )


def test_a_head_that_looks_for_the_same_token_echoes():
    """Query and key read the token's own noise: it, and every earlier copy, get equal shares."""
    fixture = planted_model("single", 1, examples=4, heads=2)
    attention = fixture.model.model.layers[0].self_attn
    with torch.no_grad():
        eye = torch.zeros(16, fixture.model.config.hidden_size)
        eye[:, -16:] = torch.eye(16)
        for project, size in ((attention.q_proj, 60.0), (attention.k_proj, 1.0)):
            project.weight[32:64] = 0
            project.weight[32:48] = size * eye
    found = scored("razor", fixture, seed=3)
    values = flat(found)
    shares = (1 / 2 + 2 / 3 + 3 / 4) / 3
    assert found.provenance["tokens_repeated"] == 13
    assert max(values, key=values.get) == (0, 1)
    assert values[0, 1] == pytest.approx(shares, abs=0.1)
    assert [0, 1] in found.provenance["retrieval_heads"]
    assert scored("razor", fixture, seed=4).values != found.values


def test_the_repeated_row_is_drawn_from_real_tokens():
    model = tiny_model("qwen3", bos_token_id=1, eos_token_id=[2, 40])
    ids = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 5] = 1, 40
    batch = Batch(ids=ids, answers=torch.arange(40).expand(3, -1) > 35)
    with surgery.morphable(model, "sliding", {"window": 8}) as probe:
        start, row, period = razor._repeated(probe, [batch], razor.Options())
        assert (start, period, row.shape) == ([1], 9, (1, 37))
        said = row[0, 1:].view(4, 9)
        assert bool((said == said[0]).all())
        assert len(set(said[0].tolist())) == 9
        assert set(said[0].tolist()) <= set(ids.flatten().tolist()) - {1, 40}
        with pytest.raises(PlanError, match="room for 9 at a time"):
            razor.score(probe, [batch], razor.Options(tokens=10))


# Retrieval heads


@pytest.mark.parametrize(
    ("layout", "copying"),
    [
        ("single", {(4, 2)}),
        ("chain", {(5, 2)}),
        ("redundant", {(3, 2), (5, 2)}),
        ("bystander", {(2, 2), (4, 2)}),
    ],
)
def test_copying_heads_score_one_and_so_do_bystanders(layout, copying):
    """A head that looks on and passes nothing on cannot be told apart; a first hop scores 0."""
    found = scored("retrieval_head", planted(layout))
    values = flat(found)
    assert {unit for unit, x in values.items() if x == 1.0} == copying
    assert max(x for unit, x in values.items() if unit not in copying) < 0.2
    if layout == "chain":
        assert values[2, 2] == 0.0
    assert found.provenance["accuracy"] == 1.0
    assert found.provenance["examples_counted"] == 16


def test_only_examples_that_are_answered_count():
    """Wrong answers forbidden by the head's bias: of two rows the one half answered drops out."""
    fixture = planted_model("single", 0, examples=2, copy=True)
    batch = fixture.batches[0]
    with torch.no_grad():
        others = set(batch.ids[0][batch.answers[0]].tolist())
        lost = [t for t in batch.ids[1][batch.answers[1]].tolist() if t not in others]
        fixture.model.lm_head.bias[lost[:2]] = -1e4
    found = scored("retrieval_head", fixture)
    assert found.provenance["examples_counted"] == 1
    assert found.provenance["accuracy"] == 0.75
    assert found.values[4] == (1.0,)


@pytest.mark.parametrize(
    ("name", "needle"),
    [("retrieval_head", "gets 0.0% of the answer tokens"), ("hydrahead", "nothing is recalled")],
)
def test_a_model_that_cannot_answer_is_told_so(name, needle):
    fixture = planted_model("single", 0, examples=4, copy=True)
    with torch.no_grad():
        fixture.model.model.layers[4].self_attn.o_proj.weight.zero_()
        fixture.model.lm_head.bias[fixture.batches[0].ids[fixture.batches[0].answers]] = -100.0
    with pytest.raises(PlanError, match=needle) as caught:
        scored(name, fixture)
    assert "select.task=text" in str(caught.value)


# HALO


def test_faithful_promotes_the_unit_with_the_best_commonsense_and_safe_does_not():
    retrieval, commonsense = [0.79, 0.30, 0.80], [0.60, 0.58, 0.59]
    faithful = halo.ratios(retrieval, commonsense, mode="faithful")
    assert faithful == [50.0, pytest.approx(25.0), 0.0]
    safe = halo.ratios(retrieval, commonsense, mode="safe", original=(0.80, 0.60))
    assert safe[1] > 5 * max(safe[0], safe[2])
    jet = halo.ratios(retrieval, commonsense, mode="jet", original=(0.80, 0.60))
    assert jet == pytest.approx([0.01, 0.5, 0.0])


def test_safe_scores_noise_as_nothing_and_damage_as_need():
    original = (0.80, 0.60)
    retrieval, commonsense = [0.80, 0.797, 0.804, 0.70, 0.80], [0.60, 0.603, 0.597, 0.60, 0.30]
    nothing, dip, rise, recall, damage = halo.ratios(
        retrieval, commonsense, mode="safe", original=original
    )
    assert nothing == 0.0
    assert max(abs(dip), abs(rise)) <= 0.005
    assert recall == pytest.approx(0.1 / 0.005)
    assert damage == pytest.approx(0.3 / 0.005)
    # told that such losses are noise, 0.1 is no need either
    noisy = halo.ratios(
        retrieval, commonsense, mode="safe", original=original, noise=[(0.12, 0.01)] * 5
    )
    assert noisy[3] == pytest.approx(0.1)
    assert halo.ratios([0.5] * 3, [0.5] * 3, mode="safe", original=(0.5, 0.5)) == [0.0] * 3
    assert halo.ratios([0.5] * 3, [0.5] * 3, mode="faithful") == [0.0] * 3
    with pytest.raises(PlanError, match="untouched model"):
        halo.ratios(retrieval, commonsense, mode="safe")


def test_paired_errors_are_those_of_examples():
    """Two examples of four tokens that differ by 1 and 3: mean 0.5, standard error 0.25."""
    lost = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)
    counts = torch.tensor([[4.0, 9.0], [4.0, 9.0]], dtype=torch.float64)
    assert halo.paired_errors(lost, counts).tolist() == [[0.25, 0.0]]
    assert halo.paired_errors(lost[:, :1], counts[:1]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("measure", ["accuracy", "nll"])
def test_halo_measures_both_sides_in_one_forward_per_layer(measure):
    """R and C of every layer, against whole forwards of the hybrid."""
    model = tiny_model("qwen3")
    ids = torch.randint(3, 50, (3, 30), generator=torch.Generator().manual_seed(5))
    batch = Batch(ids=ids, answers=torch.arange(30).expand(3, -1) > 25)
    rest = Batch(ids=ids, answers=(torch.arange(30).expand(3, -1) <= 25) & (torch.arange(30) > 0))
    with surgery.morphable(model, "sliding", {"window": 4}) as probe:
        found = halo.score(probe, [batch], halo.Options(measure=measure))
        units = _common.units(probe, "layer")
        layers = len(units)
        assert (
            found.provenance["forwards"]
            <= halo.cost(probe.geometry, halo.Options(), "layer").forwards + 1e-3
        )
        name = {"accuracy": "wrong", "nll": "nll"}[measure]
        for side, part in (("retrieval", batch), ("commonsense", rest)):
            sweep = _common.Sweep(probe, [part], units, "layer", name)
            lost = [sweep.nll_with([u for u in units if u != (i, 0)]) for i in range(layers)]
            expected = [1 - x if measure == "accuracy" else -x for x in lost]
            assert found.provenance[side] == pytest.approx(expected, abs=1e-5)
        done = probe.forwards
        again = halo.score(probe, [batch], halo.Options(measure=measure))
        assert probe.forwards == done  # all of it was remembered
        assert again.values == found.values


def test_halo_needs_prompts_and_says_when_nothing_is_recalled():
    model = tiny_model("qwen3")
    ids = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(5))
    with surgery.morphable(model, "sliding", {"window": 4}) as probe:
        text = Batch(ids=ids, answers=torch.arange(20).expand(2, -1) > 0)
        with pytest.raises(PlanError, match="every token is an answer"):
            halo.score(probe, [text], halo.Options())
        found = halo.score(
            probe, [Batch(ids=ids, answers=torch.arange(20).expand(2, -1) > 17)], halo.Options()
        )
    assert "selector.measure=nll" in found.provenance["warning"]


# HydraHead


def test_read_out_is_a_weighted_mean_of_logit_gaps():
    gaps = torch.tensor([2.0, 4.0, -1.0])
    rows, steps = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    assert _patching.read_out(gaps, rows, steps, 3, 0.5).tolist() == [
        pytest.approx((2 + 0.5 * 4) / 1.5),
        -1.0,
        0.0,
    ]
    assert _patching.read_out(gaps, rows, steps, 2, 0.0).tolist() == [2.0, -1.0]
    none = torch.full((3,), -1)
    assert _patching.read_out(gaps, rows, none, 2, 0.9).tolist() == [0.0, 0.0]


def test_counterfactuals_change_every_answer_token_in_the_needle_alone():
    rows = [[50, 7, 3, 60, 7, 3, 61, 7, 3], [50, 9, 7, 60, 8, 8, 61, 9, 7]]
    batch = batch_of(rows, [(r, at) for r in range(2) for at in (7, 8)])
    (pair,) = hydrahead.pairs([batch], reach=2)
    assert pair.other.tolist() == [
        [50, 9, 7, 60, 9, 7, 61, 7, 3],
        [50, 3, 9, 60, 8, 8, 61, 9, 7],
    ]
    assert pair.wrong.tolist() == [9, 7, 3, 9]  # the next of 3, 7, 9, in a circle
    far = [[int(x) for x in row] for row in pair.far]
    assert far == [[1, 0, 0, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert bool(hydrahead.pairs([batch])[0].far.all())
    with pytest.raises(PlanError, match="the one token 3"):
        hydrahead.pairs([batch_of([[3, 5, 3]], [(0, 2)])])


def bench_of(probe, fixture, **changes) -> _patching.Bench:
    (pair,) = hydrahead.pairs(fixture.batches, reach=fixture.window)
    return _patching.Bench(probe, _patching.Pair(**{**vars(pair), **changes}), 0.9)


def test_own_output_changes_nothing_and_all_outputs_change_everything():
    fixture = planted("single")
    with probing(fixture) as probe:
        bench = bench_of(probe, fixture)
        assert float((bench.before - bench.after).min()) > 0.5
        for layer in (0, 4):
            own = _patching.Patched(
                mask=bench.mask([2]), heads=bench.clean[layer], full=bench.clean[layer]
            )
            assert bench.patched({layer: own}).tolist() == [0.0] * 16
        both = bench.patched({i: Fixed(heads=x) for i, x in bench.corrupt.items()})
        torch.testing.assert_close(both, torch.ones(16, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["single", "bystander"])
def test_the_head_that_passes_the_answer_on_is_the_one(layout):
    """One head of 32 has all of the effect; one that looks at the same fact has none."""
    found = scored("hydrahead", planted(layout))
    values = flat(found)
    assert values[4, 2] == 1.0
    assert found.provenance["largest_effect"] > 0.95
    assert max(x for unit, x in values.items() if unit != (4, 2)) < 0.01
    assert found.provenance["receivers"] == [[4, 2]]
    assert found.provenance["min_full_per_layer"] == 1


def first_hop_pair(fixture, batch):
    """The counterfactual in which the A-fact of each asked key leads elsewhere, the needle stays.

    It is made of A-facts of other examples, with the same key and another of the row's mids.
    """
    from morph._planted import BLOCKS, VALUES

    table = fixture.model.model.embed_tokens.weight

    def said(ids, block):
        part = table[ids][..., BLOCKS[block]]
        return torch.where(part.sum(-1) > 0, part.argmax(-1), -1)

    every = torch.arange(len(table))
    facts = {
        (int(k), int(m)): int(t) for t, k, m in zip(every, said(every, "kA"), said(every, "vA"))
    }
    other, wrong, kept = batch.ids.clone(), [], []
    for row, answers in zip(other, batch.answers):
        stored = {int(t) // VALUES: int(t) for t in row[:44] if t < VALUES * VALUES}
        for at in answers.nonzero()[:, 0].tolist():
            key, right = int(said(row[at - 1], "qk")), int(row[at])
            place = int((said(row, "kA") == key).nonzero()[0])
            choices = [m for m in stored if m != right // VALUES and (key, m) in facts]
            kept.append(bool(choices))
            wrong.append(stored[choices[0]] if choices else right)
            if choices:
                row[place] = facts[key, choices[0]]
    return other, torch.tensor(wrong), torch.where(torch.tensor(kept), 0, -1)


def test_path_patching_finds_the_first_hop():
    """Frozen downstream, the first hop reaches nothing; what it tells the second is everything."""
    fixture = planted("chain")
    other, wrong, step = first_hop_pair(fixture, fixture.batches[0])
    with probing(fixture) as probe:
        far = _patching.far_from(fixture.batches[0].ids, other, fixture.window)
        bench = bench_of(probe, fixture, other=other, wrong=wrong, step=step, far=far)
        units = _common.units(probe, "head")
        received = dict(zip(units, bench.receive(units, lambda done: None).mean(1).tolist()))
        assert received[5, 2] > 0.95
        assert max(x for unit, x in received.items() if unit != (5, 2)) < 0.01
        kept, options = torch.ones(16, dtype=torch.bool), hydrahead.Options()
        sent, senders = hydrahead._send(probe, [bench], units, {(5, 2)}, kept, options)
        sent = dict(zip(units, sent.mean(1).tolist()))
    assert senders == [(2, 2)]
    assert sent[2, 2] > 0.95
    assert max(x for unit, x in sent.items() if unit != (2, 2)) < 0.01


def test_the_answers_counterfactual_cannot_see_a_first_hop():
    """Documented: its output is the same in both prompts; the swap pass repairs it below."""
    values = flat(scored("hydrahead", planted("chain")))
    assert values[5, 2] == 1.0
    assert max(x for unit, x in values.items() if unit != (5, 2)) < 0.01


def test_near_the_needle_heads_are_left_alone():
    """Where the window covers the text nothing is far, and no head needs full attention."""
    found = scored("hydrahead", planted("single"), mixer={"window": 52})
    assert set(flat(found).values()) == {0.0}
    everywhere = scored("hydrahead", planted("single"), mixer={"window": 52}, reach=0)
    assert flat(everywhere)[4, 2] == 1.0


def test_a_stopped_sweep_goes_on_where_it_was():
    """What is remembered is not measured again: both prompts and the frozen run are all."""
    fixture = planted("single")
    with probing(fixture) as probe:
        first = hydrahead.score(probe, fixture.batches, hydrahead.Options())
        spent = probe.forwards
        again = hydrahead.score(probe, fixture.batches, hydrahead.Options())
        assert probe.forwards == pytest.approx(spent + 3)
        fewer = hydrahead.score(probe, fixture.batches, hydrahead.Options(senders=False))
    assert again.values == first.values == fewer.values


# Laws that hold for all of them


def fingerprint(model) -> str:
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(name.encode() + p.detach().numpy().tobytes() + bytes([p.requires_grad]))
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found.update(f"{name} {type(module).__name__} {module.training} {hooks}".encode())
    return found.hexdigest()


@pytest.mark.parametrize("granularity", ["layer", "kv_head", "head"])
@pytest.mark.parametrize("name", NAMES)
def test_laws_on_questions_that_can_be_answered(name, granularity):
    """Same scores whatever the order of examples, the model as it was, and no dearer than told."""
    fixture = planted("single")
    module, before = registry.load("selectors", name), fingerprint(fixture.model)
    options = module.Options(**OPTIONS.get(name, {}))
    whole = fixture.batches[0]
    halves = [Batch(ids=whole.ids[i], answers=whole.answers[i]) for i in (slice(8), slice(8, 16))]
    found = []
    for batches in (halves, halves[::-1]):
        with probing(fixture) as probe:
            found.append(module.score(probe, batches, options, granularity=granularity))
            shape = probe.geometry
    assert fingerprint(fixture.model) == before
    assert {len(row) for row in found[0].values} == {shape.units(granularity)}
    for a, b in zip(found[0].values, found[1].values):
        assert a == pytest.approx(b, abs=1e-6)
    told = module.cost(shape, options, granularity)
    if name != "razor":  # one row, counted by the engine as a whole batch
        assert found[0].provenance["forwards"] <= 2 * told.forwards + 1e-3  # two batches
    values = flat(found[0])
    # random tokens say nothing here, and of four heads' mean three are noise
    if name != "razor" and (name, granularity) != ("lazy", "layer"):
        unit = {"layer": (4, 0)}.get(granularity, (4, 2))
        assert values[unit] == max(values.values()) > 0


@pytest.mark.parametrize("name", ["razor", "lazy", "halo"])
def test_layers_that_slide_in_the_source_are_no_candidates(name):
    model = tiny_model("gemma3_text")
    ids = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(5))
    batch = Batch(ids=ids, answers=torch.arange(40).expand(2, -1) > 36)
    module = registry.load("selectors", name)
    with surgery.morphable(model, "sliding", {"window": 4}) as probe:
        found = module.score(probe, [batch], module.Options(), granularity="kv_head")
        assert 0 < len(probe.candidates) < len(found.values)
        others = set(range(len(found.values))) - set(probe.candidates)
    assert {x for i in others for x in found.values[i]} == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_refused_with_advice(name):
    fixture = planted_model("single", 0, examples=2, copy=True)
    with torch.no_grad():
        fixture.model.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(PlanError, match="--dtype float32"):
        scored(name, fixture, "layer")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_look_at_is_refused(name):
    module = registry.load("selectors", name)
    with probing(planted("single")) as probe, pytest.raises(PlanError, match="needs examples"):
        module.score(probe, [], module.Options())


@pytest.mark.parametrize(
    ("name", "options", "needle"),
    [
        ("lazy", {"w_last": 0}, "w_last is 0; give 1"),
        ("lazy", {"w_recent": 0}, "w_recent is 0"),
        ("lazy", {"w_sink": -1}, "w_sink is -1"),
        ("razor", {"tokens": 1}, "tokens is 1; give 2"),
        ("razor", {"repeats": 1}, "repeats is 1"),
        ("razor", {"echo_share": 1.5}, "echo_share is 1.5"),
        ("halo", {"damage": 0.0}, "damage is 0.0"),
        ("halo", {"text_tokens": 0}, "text_tokens is 0"),
        ("hydrahead", {"decay": 1.5}, "decay is 1.5"),
        ("hydrahead", {"threshold": -0.1}, "threshold is -0.1"),
        ("hydrahead", {"floor": 0.0}, "floor is 0.0"),
        ("hydrahead", {"max_receivers": 0}, "max_receivers is 0"),
        ("hydrahead", {"max_rounds": 0}, "max_rounds is 0"),
        ("hydrahead", {"reach": -1}, "reach is -1"),
    ],
)
def test_options_out_of_range_are_refused(name, options, needle):
    module = registry.load("selectors", name)
    with pytest.raises(PlanError, match=needle):
        strict.build(module.Options, options)


# What each finds of the planted layers

EXPECTED = {
    # The hops look far at the answer; two copies look as far as each other, and the first hop's
    # rank among them is luck
    ("lazy", ""): {"single": 10, "chain": 10, "redundant": 5},
    # A first hop never looks at the answer, and both copies of a second do
    ("retrieval_head", ""): {"single": 10, "chain": 0, "redundant": 0},
    # One copy answers for the other: no token is lost, and the tie goes to the lower layer
    ("halo", ""): {"single": 10, "chain": 10, "redundant": 0},
    ("halo", "nll"): {"single": 10, "chain": 10, "redundant": 10},
    # The counterfactual changes the second fact, and the first hop does not see that
    ("hydrahead", ""): {"single": 10, "chain": 0, "redundant": 0},
}


@pytest.mark.parametrize("layout", COUNT)
@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: " ".join(case).strip())
def test_selectors_find_what_they_can(case, layout):
    """Top-K is right for as many models as the table says; swaps repair all others."""
    name, measure = case
    copy, right = name in ("retrieval_head", "hydrahead"), 0
    for seed in range(10):
        fixture = planted(layout, seed, 1, copy)
        options = OPTIONS.get(name, {}) | ({"measure": measure} if measure else {})
        found = scored(name, fixture, "layer", **options)
        with probing(fixture) as probe:
            kept = choose_units(found, Budget(full_layers=COUNT[layout]), geometry=probe.geometry)
            if frozenset(i for i, _ in kept) in fixture.correct:
                right += 1
                continue
            kept, report = _common.verify_and_swap(probe, fixture.batches, kept, "layer")
            assert frozenset(i for i, _ in kept) in fixture.correct, f"seed {seed}: {report}"
            assert len(report["swaps"]) == 1
    assert right == EXPECTED[case][layout]


def test_an_unlucky_ranking_is_repaired_too():
    """Razor's random tokens say nothing about planted layers: swaps alone find them."""
    fixture = planted("chain", 0, 1, False)
    found = scored("razor", fixture, "layer")
    with probing(fixture) as probe:
        kept = choose_units(found, Budget(full_layers=2), geometry=probe.geometry)
        kept, _ = _common.verify_and_swap(probe, fixture.batches, kept, "layer")
    assert frozenset(i for i, _ in kept) in fixture.correct


def test_looking_is_the_retrieval_heads_own_most_attended_token():
    fixture = planted("single")
    batch = fixture.batches[0]
    with probing(fixture) as probe:
        logits, looked = retrieval_head.attended(probe, batch)
    assert bool((logits.argmax(-1) == batch.ids[batch.answers]).all())
    rows = batch.answers.nonzero()[:, 0]
    assert bool((batch.ids[rows, looked[4][:, 2]] == batch.ids[batch.answers]).all())
