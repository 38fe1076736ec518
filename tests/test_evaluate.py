"""Recall, perplexity, cache bytes and speed, against models whose right numbers are known."""

from __future__ import annotations

import math
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from morph import evaluate as ev
from morph import evaluation as found
from morph import modeling, surgery
from morph.data import Example
from morph.errors import DataError, RecipeError, VerificationFailed
from morph.pipeline import _measure
from morph.plan import CacheCost, Geometry, HeadGroup, LayerPlan, Plan, full_plan, uniform_plan
from morph.recipes.schema import Evaluate

VOCAB = 61
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512,
}  # fmt: skip
GEOMETRY = Geometry(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, v_head_dim=8,
    hidden_size=32, windows=(None, None),
)  # fmt: skip


def tiny(kind: str = "llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()


class Oracle(nn.Module):
    """A model that knows what follows certain beginnings, and is indifferent elsewhere."""

    def __init__(self, knows: dict[tuple[int, ...], dict[int, float]], vocab: int = VOCAB) -> None:
        super().__init__()
        self.knows, self.config = knows, LlamaConfig(**{**SHAPE, "vocab_size": vocab})
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids, logits_to_keep=None, use_cache=False):
        rows = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in zip(rows, input_ids.tolist()):
            for position in range(len(ids)):
                for token, value in self.knows.get(tuple(ids[: position + 1]), {}).items():
                    row[position, token] = value
        if logits_to_keep is not None:
            rows = rows[:, logits_to_keep]
        self.shapes.append(tuple(rows.shape))
        return SimpleNamespace(logits=rows)


def example(prompt, answer, *, task="multikey", depth=0.5, choices=()) -> Example:
    ids = (*prompt, *answer)
    return Example(
        ids=ids, answer_start=len(prompt), depth=depth, task=task, length=len(ids),
        choices=tuple(choices),
    )  # fmt: skip


# --- Recall -------------------------------------------------------------------------------------


def test_recall_wants_every_answer_token():
    knows = {(1, 2, 3): {7: 5.0}, (1, 2, 3, 7): {8: 5.0}, (4, 5): {9: 5.0}, (4, 5, 9): {2: 5.0}}
    questions = [example((1, 2, 3), (7, 8)), example((4, 5), (9, 1)), example((4, 5), (9,))]
    hits = ev.recall(Oracle(knows), questions)
    assert [h.correct for h in hits] == [True, False, True]
    assert [h.example for h in hits] == [0, 1, 2]
    assert {h.chance for h in hits} == {0.0}


def test_recall_with_choices_compares_only_those():
    knows = {(1, 2): {50: 9.0, 7: 3.0, 8: 2.0}}
    questions = [
        example((1, 2), (7,), choices=(8, 7)),
        example((1, 2), (8,), choices=(8, 7)),
        example((1, 2), (50,), choices=(8, 7, 50, 11)),
    ]
    hits = ev.recall(Oracle(knows), questions)
    assert [h.correct for h in hits] == [True, False, True]
    assert [h.chance for h in hits] == [0.5, 0.5, 0.25]


def test_recall_reads_logits_only_where_answers_are():
    model = Oracle({})
    ev.recall(model, [example(range(1, 40), (3, 4)), example(range(2, 41), (3, 4))])
    assert model.shapes == [(2, 2, VOCAB)]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_recall_of_a_batch_is_that_of_each_row_alone(kind):
    model, rng = tiny(kind), random.Random(0)
    questions = []
    for n in range(24):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30)))
        with torch.no_grad():
            likely = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax().item()
        choices = rng.sample(range(VOCAB), 8) if n % 3 == 0 else ()
        answer = likely if n % 2 else rng.choice(choices or range(VOCAB))
        questions.append(example(prompt, (answer,), choices={answer, *choices} if choices else ()))
    alone = ev.recall(model, questions, batch_size=1)
    assert ev.recall(model, questions, batch_size=7) == alone
    assert 0 < sum(h.correct for h in alone) < len(alone)


def test_recall_splits_batches_of_long_questions(monkeypatch):
    monkeypatch.setattr("morph.evaluate._quality.TOKENS_LIMIT", 64)
    model = Oracle({})
    ev.recall(model, [example(range(30), (1,)) for _ in range(5)], batch_size=8)
    assert [s[0] for s in model.shapes] == [2, 2, 1]


@pytest.mark.parametrize(
    "question", [example((), (1, 2)), example((1, 2), ())], ids=["no-prompt", "no-answer"]
)
def test_recall_refuses_questions_that_are_none(question):
    with pytest.raises(DataError, match="example 0"):
        ev.recall(Oracle({}), [question])


# --- Perplexity ---------------------------------------------------------------------------------


def test_perplexity_of_indifference_is_the_vocabulary():
    measured = ev.perplexity(Oracle({}), torch.arange(60), seq_len=20)
    assert measured.value == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert measured.ppl == pytest.approx(VOCAB, rel=1e-6)
    assert measured.stderr == pytest.approx(0, abs=1e-6)
    assert (measured.tokens, len(measured.sequences)) == (57, 3)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("bos", [None, 1], ids=["plain", "bos"])
def test_perplexity_is_cross_entropy(kind, bos):
    model, ids = tiny(kind), torch.randint(VOCAB, (103,))
    measured = ev.perplexity(model, ids, seq_len=16, batch_size=3, bos=bos)
    take = 16 if bos is None else 15
    losses = []
    for n in range(len(ids) // take):
        row = ids[n * take : (n + 1) * take]
        row = row if bos is None else torch.cat([torch.tensor([bos]), row])
        with torch.no_grad():
            losses.append(model(input_ids=row[None], labels=row[None]).loss.item())
    assert measured.sequences == pytest.approx(losses, rel=1e-5)
    assert measured.value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    spread = torch.tensor(losses).std() / math.sqrt(len(losses))
    assert measured.stderr == pytest.approx(spread.item(), rel=1e-3)


def test_perplexity_reads_no_more_than_it_may():
    ids = torch.randint(VOCAB, (200,))
    model = tiny()
    assert ev.perplexity(model, ids, seq_len=16, max_tokens=50).tokens == 3 * 15
    assert ev.perplexity(model, ids, seq_len=16, max_tokens=1).stderr is None


def test_perplexity_refuses_a_context_longer_than_the_text():
    with pytest.raises(DataError, match="30 tokens, one context needs 31"):
        ev.perplexity(tiny(), torch.zeros(30, dtype=torch.long), seq_len=31)
    with pytest.raises(DataError, match="seq_len is 1"):
        ev.perplexity(tiny(), torch.zeros(30, dtype=torch.long), seq_len=1)


def test_a_model_that_gives_nan_is_no_result():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(VerificationFailed, match="nan"):
        ev.perplexity(model, torch.arange(32), seq_len=16)
    with pytest.raises(VerificationFailed, match="nan"):
        ev.recall(model, [example((1, 2), (3,))])


def test_the_model_comes_back_as_it_was():
    model = tiny().train()
    model.model.layers[1].eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    ev.perplexity(model, torch.arange(32), seq_len=16)
    ev.recall(model, [example((1, 2), (3,))])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- Statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "correct,count,low,high",
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_interval(correct, count, low, high):
    # 81 of 263 is the example of Newcombe (1998), table I, method 3.
    assert found.wilson(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_mcnemar_is_the_exact_binomial():
    assert found.mcnemar(0, 0) == 1.0
    assert found.mcnemar(1, 9) == found.mcnemar(9, 1) == 0.021484375
    assert found.mcnemar(3, 3) == 1.0


def test_paired_interval_keeps_a_width_without_any_change():
    low, high = found.paired_interval(0, 0, 20)
    assert (low, high) == pytest.approx((-0.12599, 0.12599), abs=1e-5)
    low, high = found.paired_interval(9, 1, 40)
    assert low < -0.2 < high < 0.0


def test_summarise_counts_cells_and_wholes():
    hits = [
        found.Hit(example=i, task="name_recall", length=n, depth=d, correct=ok, chance=0.25)
        for i, (n, d, ok) in enumerate(
            [(128, 0.1, True), (128, 0.9, False), (512, 0.6, True), (512, 0.5, True)]
        )
    ]
    rows = found.summarise(hits, depths=(0.0, 1.0))
    assert [(r.length, r.depth, r.correct, r.count) for r in rows] == [
        (128, None, 1, 2), (128, 0.0, 1, 1), (128, 1.0, 0, 1),
        (512, None, 2, 2), (512, 0.0, 1, 1), (512, 1.0, 1, 1),
    ]  # fmt: skip
    assert all(r.chance == 0.25 for r in rows)
    assert {r.depth for r in found.summarise(hits)} == {None, 0.1, 0.5, 0.6, 0.9}


@pytest.mark.parametrize(
    "correct,chance,able",
    [(0, 0.0, False), (3, 0.0, False), (4, 0.0, True), (6, 0.25, False), (15, 0.25, True)],
)
def test_what_the_source_cannot_do_is_said(correct, chance, able):
    hits = [
        found.Hit(example=i, task="t", length=64, depth=0.5, correct=i < correct, chance=chance)
        for i in range(20)
    ]
    unable = found.cannot(found.summarise(hits), "source")
    assert (("t", 64) in unable) is not able
    nothing = [
        found.Hit(example=i, task="t", length=64, depth=0.5, correct=False) for i in range(20)
    ]
    (change,) = found.differences({"a": hits, "b": nothing}, {}, unable=unable)
    assert change.source_can is able
    assert (change.lost, change.gained, change.difference) == (correct, 0, -correct / 20)


# --- Cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_cache_held_is_what_the_plan_says(kind):
    held = ev.cache_bytes_held(tiny(kind), 40)
    assert held == full_plan(kind, GEOMETRY).cache_bytes(40, "float32") == 2 * 2 * 2 * 8 * 40 * 4


def test_planned_cache_has_its_share_of_the_source():
    plan = uniform_plan("llama", GEOMETRY, [0], "sliding", {}, CacheCost(tokens=1024))
    rows = ev.cache_bytes_planned(plan, "bfloat16")
    assert [r.tokens for r in rows] == [1024, 32768, 131072]
    assert [r.ratio for r in rows] == pytest.approx([1.0, (1 + 1 / 32) / 2, (1 + 1 / 128) / 2])


def test_models_take_turns():
    made = []

    def maker(name):
        def make():
            made.append(name)
            return tiny(seed=len(name))

        return make

    rows = ev.speeds({"a": maker("a"), "b": maker("b")}, 24, 3, rounds=3)
    assert made == ["a", "b"] * 3
    assert rows["a"].prefill_ratio == rows["a"].decode_ratio == 1.0
    for row in rows.values():
        assert row.prefill_tokens_per_second > 0 and row.decode_tokens_per_second > 0
        assert (row.length, row.decode_tokens, row.rounds) == (24, 3, 3)


def test_speed_of_one_model():
    assert ev.speed(tiny(), 24, 3, rounds=1).decode_ratio == 1.0


# --- All of it ----------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single characters."""

    bos_token_id = 0

    def encode(self, text, add_special_tokens=False, verbose=True):
        return [1 + ord(c) % (VOCAB - 1) for c in text]


SMALL = Evaluate(
    tasks=("single_1", "multikey"), lengths=(320,), depths=2, examples=4, perplexity_tokens=128,
    seq_len=32, decode_tokens=2, speed_length=16,
)  # fmt: skip


def run(models, settings=SMALL, **kwargs):
    text = torch.randint(VOCAB, (600,), generator=torch.Generator().manual_seed(1))
    return ev.evaluate(models, settings, Letters(), text, seed=3, **kwargs)


def test_evaluation_puts_models_side_by_side():
    plan = uniform_plan("llama", GEOMETRY, [0], "sliding", {}, CacheCost(tokens=8))
    source = tiny()
    told = []
    result = run(
        {"source": source, "other": tiny(seed=1)}, plans={"other": plan}, progress=told.append
    )
    assert [m.name for m in result.models] == ["source", "other"]
    assert [m.pattern for m in result.models] == ["FF", "FS"]
    first, other = result.models
    text = torch.randint(VOCAB, (600,), generator=torch.Generator().manual_seed(1))
    assert first.perplexity == ev.perplexity(source, text, seq_len=32, max_tokens=128, bos=0)
    assert [c.ratio for c in first.cache] == [1.0, 1.0, 1.0] and other.cache[2].ratio < 0.51
    assert first.held.bytes == 2 * 2 * 2 * 8 * 16 * 4
    # The plan was not applied to this model, and that is noticed.
    assert any("other really holds" in note for note in result.notes)
    assert {d.model for d in result.differences} == {"other"}
    assert {d.task for d in result.differences} == {"single_1", "multikey", "perplexity"}
    assert not any(d.source_can for d in result.differences if d.task != "perplexity")
    assert sum("itself cannot do" in note for note in result.notes) == 2
    assert len(told) == 3


def test_evaluation_survives_json():
    plan = full_plan("llama", GEOMETRY)
    result = run({"source": tiny(), "same": tiny()}, plans={"same": plan})
    text = found.dumps(result)
    assert found.loads(text) == result
    assert found.dumps(found.loads(text)) == text
    (loss,) = [d for d in result.differences if d.task == "perplexity"]
    assert (loss.low, loss.difference, loss.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"models": []}', '{"models": [], "modells": 1}', '{"models": [{"name": 3}]}'],
)
def test_broken_json_is_refused(text):
    with pytest.raises(DataError):
        found.loads(text)


def test_models_that_are_made_on_demand_live_one_at_a_time():
    alive: weakref.WeakSet = weakref.WeakSet()
    most = []

    def make():
        model = tiny()
        model.owner = SimpleNamespace(model=model)  # a cycle, as hooks make them
        alive.add(model)
        most.append(len(alive))
        return model

    result = run({"source": make, "hybrid": make, "window": make})
    assert len(result.models) == 3
    assert max(most) == 1


def test_evaluation_without_text_leaves_perplexity_out():
    settings = Evaluate(
        tasks=("single_1",), lengths=(320,), examples=2, decode_tokens=1, speed_length=8
    )
    result = ev.evaluate({"source": tiny()}, settings, Letters(), None)
    assert result.models[0].perplexity is None
    assert [c.ratio for c in result.models[0].cache] == [1.0, 1.0, 1.0]


def test_a_hybrid_holds_what_its_own_plan_says():
    source = tiny("qwen3")
    plan = uniform_plan("qwen3", GEOMETRY, [1], "sliding", {"window": 4, "num_sinks": 1}, None)
    result = run({"source": source, "hybrid": lambda: modeling.hybrid(source, plan)})
    whole, hybrid = result.models
    assert (whole.pattern, hybrid.pattern) == ("FF", "SF")
    assert (whole.held.bytes, hybrid.held.bytes) == (2 * 16 * 128, (16 + 5) * 128)
    assert not any("really holds" in note for note in result.notes)
    (loss,) = [d for d in result.differences if d.task == "perplexity"]
    assert loss.difference != 0


def test_a_model_of_no_known_family_has_no_plan():
    config = GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k not in ("head_dim",)})
    result = run({"source": GPTNeoXForCausalLM(config).eval()})
    assert (result.models[0].pattern, result.models[0].cache) == (None, ())
    assert result.models[0].held.bytes > 0


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"tasks": ("multykey",)}, DataError, "Did you mean 'multikey'"),
        ({"tasks": ("name_recall",)}, DataError, "stories"),
        ({"lengths": ()}, RecipeError, "evaluate.lengths"),
        ({"decode_tokens": 0}, RecipeError, "evaluate.decode_tokens is 0"),
    ],
    ids=["task", "stories", "lengths", "decode"],
)
def test_settings_that_cannot_be(change, error, words):
    with pytest.raises(error, match=words):
        run({"source": tiny()}, Evaluate(**change))


def test_no_model_is_refused():
    with pytest.raises(DataError, match="no model"):
        run({})


def test_the_baseline_of_a_hype_plan_keeps_what_the_plan_keeps():
    """Layers on `nope` are what the budget kept; the baseline spreads as many, of the same kind."""
    shape = Geometry(
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        v_head_dim=8, hidden_size=32, windows=(None,) * 8,
    )  # fmt: skip

    def layer(mixer):
        return LayerPlan(groups=(HeadGroup(mixer=mixer, heads=(0, 1, 2, 3)),))

    layers = tuple(layer(m) for m in ("nope", "nope", *["decay"] * 6))
    plan = surgery.resolve_costs(Plan(model_type="llama", geometry=shape, layers=layers))
    mixer, kept = _measure.layout_of(plan)
    assert (mixer.name, mixer.kept, kept) == ("decay", "nope", 2)
