"""Fine-tuning a hybrid on short problems: what trains, what stays, when it ends, how it resumes."""

from __future__ import annotations

import contextlib
import io
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from morph import modeling, pipeline
from morph.distill._watch import Watch
from morph.errors import Interrupted, UsageError
from morph.pipeline import _data, _finetune, _probe
from morph.plan import uniform_plan
from morph.recipes.schema import Data, Finetune, Recipe, Stage, Training

REPO = Path(__file__).resolve().parent.parent
TUNED = Finetune(tokens=1536, tasks=("sums",), seq_len=128, batch_size=2, text=0.25, problems=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random model and its text."""
    root = tmp_path_factory.mktemp("finetune")
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(REPO / "examples" / "tiny_model.py"))["main"](root)
    return root


class Made:
    """What `_finetune.tune` needs, fresh each time."""

    def __init__(self, root: Path, **changes) -> None:
        self.recipe = Recipe(
            model=str(root / "model"),
            data=Data(text=("text.txt",), limit=20_000),
            training=Training(probe_length=160, probe_examples=2),
            finetune=replace(TUNED, **changes),
        )
        self.source = pipeline.open_source(self.recipe.model)
        self.corpus = _data.corpus(self.recipe.data, self.source.tokenizer(), root)
        shape, options = self.source.geometry, {"window": 16}
        self.plan = uniform_plan("qwen3", shape, [3, 7], "sliding", options, None)
        self.teacher = self.source.model()
        self.student = modeling.hybrid(self.teacher, self.plan)

    def tune(self, work: Path, **more) -> _finetune.Tuned:
        return _finetune.tune(
            self.recipe, self.student, self.teacher, self.source, self.plan, self.corpus, work,
            **more,
        )  # fmt: skip

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.student.named_parameters()}


def moved(before, after) -> set[str]:
    return {n for n in before if not torch.equal(before[n], after[n])}


def test_all_weights_train_but_the_head(tiny, tmp_path):
    made = Made(tiny)
    before = made.weights()
    tuned = made.tune(tmp_path / "work")
    after = made.weights()
    still = set(before) - moved(before, after)
    assert still == {"model.embed_tokens.weight"}  # it is the head too
    assert (tuned.stopped, tuned.steps, tuned.recall) == ("tokens", 6, ())
    assert set(made.student.morph_trained) == moved(before, after)


def test_what_is_frozen_stays_in_the_full_layers_and_only_there(tiny, tmp_path):
    made = Made(tiny, freeze=("q", "k", "norm"))
    before = made.weights()
    made.tune(tmp_path / "work")
    still = set(before) - moved(before, made.weights()) - {"model.embed_tokens.weight"}
    parts = ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")
    full = made.plan.full_layers
    assert len(full) == 2
    assert still == {f"model.layers.{i}.self_attn.{p}" for i in full for p in parts}


def test_all_but_attention_of_full_layers_can_be_frozen(tiny, tmp_path):
    made = Made(tiny, freeze=("rest", "v"))
    before = made.weights()
    made.tune(tmp_path / "work")
    parts = [f"{n}_proj" for n in "qko"] + ["q_norm", "k_norm"]
    full = made.plan.full_layers
    wanted = {f"model.layers.{i}.self_attn.{p}.weight" for i in full for p in parts}
    assert moved(before, made.weights()) == wanted


def test_an_interrupted_tuning_goes_on_bit_for_bit(tiny, tmp_path):
    whole = Made(tiny, save_every=2)
    whole.tune(tmp_path / "whole")
    parts = Made(tiny, save_every=2)

    def stop(event):
        if event.kind == "step" and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        parts.tune(tmp_path / "parts", progress=stop)
    again = Made(tiny, save_every=2)
    told: list[str] = []
    again.tune(tmp_path / "parts", say=told.append)
    assert any("resuming after" in t for t in told)
    assert not moved(whole.weights(), again.weights())
    logs = [(tmp_path / n / "log.jsonl").read_bytes() for n in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_tuning_ends_where_recall_has_fallen(tiny, tmp_path, monkeypatch):
    seen = iter([0.8, 0.7, 0.41, 0.39, 0.1])
    monkeypatch.setattr(_probe, "probe_of", lambda *a: lambda: {"recall": next(seen)})
    made = Made(tiny, stop_below=0.5, probe_every=1)
    told: list[str] = []
    tuned = made.tune(tmp_path / "work", say=told.append)
    assert (tuned.stopped, tuned.steps) == ("recall", 3)
    assert tuned.recall == (0.8, 0.7, 0.41, 0.39)
    assert "recall before tuning: 0.80 (2 questions of multikey at 160 tokens)" in told
    words = "ends after step 3 of 6: recall fell to 0.39, below 0.5 of the 0.80 it was at the start"
    assert any(words in t for t in told)
    facts = tuned.told(made.recipe.finetune)
    assert (facts["stopped"], facts["tokens_seen"]) == ("recall", 3 * 2 * 128)


def test_a_watch_that_is_told_when_to_end_says_why():
    found = iter([0.9, 0.3])
    watch = Watch(
        Training(probe_every=1),
        [Stage(loss="long", tokens=8192)],
        lambda: {"recall": next(found)},
        print,
        lambda told: "low." if told["recall"] < 0.5 else "",
    )
    watch.begin(0, {}, None)
    watch.after(0, 0, 4, 1.0, None)
    assert not watch.reached()
    watch.after(0, 1, 4, 1.0, None)
    assert watch.reached()
    assert watch.why == "low."


def test_text_has_its_share_of_rows_and_is_learnt_whole(tiny):
    made = Made(tiny, text=0.25, batch_size=4)
    tokenizer = made.source.tokenizer()
    batches = _finetune.rows_of(made.recipe.finetune, made.corpus, tokenizer, 0)
    stage = _finetune.stage_of(made.recipe.finetune)
    rows = [batches(0, stage).batch(step) for step in range(8)]
    labels = torch.cat([b.labels for b in rows])
    whole = (labels == torch.cat([b.ids for b in rows])).all(1)
    assert whole.sum() == 8
    again = batches(0, stage).batch(5)
    assert all(
        torch.equal(a, b) for a, b in zip(again.tensors().values(), rows[5].tensors().values())
    )


def test_nothing_can_be_frozen_that_a_layer_lacks(tiny):
    made = Made(tiny)
    names = _finetune.frozen_names(made.source, made.plan, ["o"], ())
    assert names == {f"model.layers.{i}.self_attn.o_proj.weight" for i in made.plan.full_layers}
    with pytest.raises(UsageError, match="finetune.freeze: norm cannot be held fixed"):
        none = replace(made.plan, layers=made.plan.layers)
        fields = dict(made.source.checkpoint.tensors)
        lacking = {n: i for n, i in fields.items() if "_norm" not in n or "layernorm" in n}
        object.__setattr__(made.source.checkpoint, "tensors", lacking)
        _finetune.frozen_names(made.source, none, ["norm"], ())
