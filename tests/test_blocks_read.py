"""What sparse mixers read: measured in a model, in an evaluation's JSON, its page and picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from morph import evaluate, evaluation, modeling, report, surgery
from morph.errors import DataError
from morph.evaluation import BlocksRead, Evaluation, ModelResult
from morph.plan import HeadGroup, LayerPlan, Plan
from morph.recipes.schema import Evaluate
from morph.testing import tiny_model

HOSTILE = "<b>[/x]$\\frac{$\n\x1b[31m雪"
OPTIONS = {"block": 4, "local": 2, "initial": 1, "random": 1}


def hybrid(*layers: LayerPlan):
    """A tiny Llama with these layers, full ones after them."""
    model = tiny_model("llama")
    shape = surgery.geometry_of(model)
    full = LayerPlan(groups=(HeadGroup(mixer="full", heads=tuple(range(heads(model)))),))
    rest = (full,) * (shape.num_hidden_layers - len(layers))
    return modeling.hybrid(model, Plan(model_type="llama", geometry=shape, layers=layers + rest))


def heads(model) -> int:
    return surgery.geometry_of(model).num_attention_heads


def layer(mixer: str, options: dict) -> LayerPlan:
    every = tuple(range(heads(tiny_model("llama"))))
    return LayerPlan(groups=(HeadGroup(mixer=mixer, heads=every, options=options),))


def ids_for(model, rows=2, length=40):
    return torch.randint(3, model.config.vocab_size, (rows, length))


def entry(index=0, mixer="bigbird", **changes) -> BlocksRead:
    at = tuple(range(8, 1024, 16))
    found = BlocksRead(
        layer=index, mixer=mixer, heads=(0, 1, 2, 3), block=16, positions=at,
        causal=tuple(x // 16 + 1.0 for x in at), mean=tuple(min(x // 16 + 1.0, 7.0) for x in at),
        low=tuple(min(x // 16 + 1.0, 5.0) for x in at),
        high=tuple(min(x // 16 + 1.0, 12.0) for x in at), sparsity=0.75,
    )  # fmt: skip
    return replace(found, **changes)


def test_it_counts_what_is_read_and_what_is_not():
    model = hybrid(layer("bigbird", OPTIONS))
    (found,) = evaluate.blocks_read(model, ids_for(model))
    assert (found.layer, found.mixer, found.block) == (0, "bigbird", 4)
    assert found.positions == tuple(range(40))  # 40 tokens have a bin each
    assert found.causal == tuple(t // 4 + 1.0 for t in range(40))
    assert found.mean == found.low == found.high == tuple(min(t // 4 + 1.0, 4) for t in range(40))
    read = sum(min(t // 4, 3) * 4 + t % 4 + 1 for t in range(40))
    assert found.sparsity == pytest.approx(1 - read / (40 * 41 / 2))


def test_bins_of_a_long_text_hold_means():
    model = hybrid(layer("bigbird", {**OPTIONS, "local": 1000}))
    (found,) = evaluate.blocks_read(model, ids_for(model, rows=1, length=200))
    assert len(found.positions) == 64 and found.sparsity == pytest.approx(0)
    assert found.mean == pytest.approx(found.causal)
    assert sum(found.causal) / 64 == pytest.approx(
        sum(t // 4 + 1 for t in range(200)) / 200, rel=0.1
    )


def test_a_mixer_says_what_it_reads_whatever_its_name(monkeypatch):
    """Counts that differ between rows and heads: their mean and their 10 % and 90 % points."""
    model = hybrid(layer("bigbird", OPTIONS))
    (mixer,) = surgery.hybrid_layers(model)[0].mixers
    counts = torch.arange(1, 23).view(2, 1, 11).expand(2, 12, 11)
    monkeypatch.setattr(type(mixer), "blocks_read", lambda self, inputs: counts)
    (found,) = evaluate.blocks_read(model, ids_for(model, length=12))
    assert found.mean[0] == pytest.approx(11.5)
    assert (found.low[0], found.high[0]) == pytest.approx((3.1, 19.9))


def test_models_without_such_mixers_have_nothing():
    model = hybrid(layer("sliding", {"window": 5}))
    assert evaluate.blocks_read(model, ids_for(model)) == ()
    assert evaluate.blocks_read(tiny_model("llama"), ids_for(model)) == ()


def test_a_layer_that_slides_in_the_source_is_not_asked():
    model = hybrid(layer("bigbird", OPTIONS))
    (mixer,) = surgery.hybrid_layers(model)[0].mixers
    mixer.shape = replace(mixer.shape, window=8)
    assert evaluate.blocks_read(model, ids_for(model)) == ()


def test_nothing_stays_behind_in_the_model():
    model = hybrid(layer("bigbird", OPTIONS)).train()
    (mixer,) = surgery.hybrid_layers(model)[0].mixers
    evaluate.blocks_read(model, ids_for(model))
    assert not mixer._forward_hooks and model.training
    ids = ids_for(model) + model.config.vocab_size
    with pytest.raises(IndexError):
        evaluate.blocks_read(model, ids)
    assert not mixer._forward_hooks


@pytest.mark.parametrize(
    ("length", "text", "shape"),
    ((40, 1000, (4, 40)), (40, 90, (2, 40)), (40, 30, (1, 30)), (10**6, 20000, (1, 16384))),
)
def test_the_text_is_read_in_a_few_rows(length, text, shape):
    rows = evaluate.text_rows(torch.arange(text), length, None)
    assert rows.shape == shape and torch.equal(rows.flatten(), torch.arange(shape[0] * shape[1]))
    begun = evaluate.text_rows(torch.arange(text), length, 7)
    assert begun.shape == shape and (begun[:, 0] == 7).all()
    assert torch.equal(begun[:, 1:], rows[:, :-1])


def test_without_text_nothing_is_measured():
    assert evaluate.text_rows(None, 40, None) is None
    assert evaluate.text_rows(torch.arange(1), 40, None) is None


def test_an_evaluation_has_it_and_its_json_comes_back(fake_tokenizer):
    model = hybrid(layer("bigbird", OPTIONS))
    settings = Evaluate(tasks=(), seq_len=40, perplexity_tokens=80, decode_tokens=1, speed_length=4)
    found = evaluate.evaluate(
        {"source": tiny_model("llama"), "hybrid": model},
        settings, fake_tokenizer, ids_for(model, rows=1, length=200)[0],
    )  # fmt: skip
    assert [len(m.blocks) for m in found.models] == [0, 1]
    text = evaluation.dumps(found)
    assert json.loads(text)["models"][1]["blocks"][0]["sparsity"] > 0.3
    assert evaluation.loads(text) == found


def test_a_record_has_the_same_bins_everywhere():
    with pytest.raises(DataError, match="layer 3: .* for 64 positions"):
        entry(3, low=(1.0,))
    with pytest.raises(DataError, match="layer 0"):
        entry(positions=(), causal=(), mean=(), low=(), high=())


@pytest.fixture
def fake_tokenizer():
    class Tokenizer:
        bos_token_id = 1

    return Tokenizer()


def some(*entries: BlocksRead, name="hybrid") -> Evaluation:
    return Evaluation(models=(ModelResult(name="source"), ModelResult(name=name, blocks=entries)))


PICTURES = {
    "one layer": some(entry()),
    "all layers": some(*[entry(i) for i in range(8)]),
    "two mixers": some(*[entry(i, ("dash", "bigbird")[i % 2]) for i in range(5)]),
    "tokens": some(entry(block=1)),
    "many layers": some(*[entry(i) for i in range(80)]),
    "hostile": some(entry(mixer=HOSTILE), name=HOSTILE),
    "one token": some(
        entry(positions=(0,), causal=(1.0,), mean=(1.0,), low=(1.0,), high=(1.0,), sparsity=0.0)
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_shows_something_and_cuts_nothing_off(name):
    png = report.blocks_picture(PICTURES[name])
    assert png == report.blocks_picture(PICTURES[name])
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert len(np.unique(pixels)) > 10
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()


def test_the_picture_is_of_the_numbers():
    """Twice the blocks, and a wider band, are drawn otherwise."""
    first = report.blocks_picture(some(entry()))
    for other in (entry(high=(20.0,) * 64), entry(mean=(3.0,) * 64), entry(sparsity=0.5)):
        assert report.blocks_picture(some(other)) != first


def test_the_page_has_table_and_picture_of_all_models(tmp_path):
    both = Evaluation(
        models=(
            ModelResult(name="source"),
            ModelResult(name="hybrid", blocks=(entry(0), entry(3, sparsity=0.875))),
            ModelResult(name="uniform", blocks=(entry(0, "dash", sparsity=0.5),)),
        )
    )
    paths = {p.name: p for p in report.report(tmp_path, evaluation=both)}
    page = paths["report.md"].read_text()
    assert "| not read | hybrid | uniform |" in page
    assert "| layer 0 | 75.0% bigbird | 50.0% dash |" in page
    assert "| layer 3 | 87.5% bigbird | - |" in page
    assert "| mean | 81.2% | 50.0% |" in page
    assert "(blocks.png)" in page and paths["blocks.png"].read_bytes().startswith(b"\x89PNG")


def test_head_groups_of_a_layer_have_rows_of_their_own(tmp_path):
    found = some(entry(2, heads=(0, 1)), entry(2, "dash", heads=(2, 3), sparsity=0.5))
    page = report.report(tmp_path, evaluation=found)[1].read_text()
    assert "| layer 2, heads 0, 1 | 75.0% bigbird |" in page
    assert "| layer 2, heads 2, 3 | 50.0% dash |" in page


def test_a_page_without_sparse_mixers_has_neither(tmp_path):
    paths = report.report(tmp_path, evaluation=Evaluation(models=(ModelResult(name="source"),)))
    assert "blocks.png" not in [p.name for p in paths]
    assert "not read" not in paths[1].read_text()
