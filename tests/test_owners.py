"""Who keeps an index: chosen greedily by the loss, and written without the others' tensors."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from morph import checkpoint, modeling, pipeline, surgery
from morph.errors import (
    DataError,
    MismatchError,
    OutputExists,
    PlanError,
    UsageError,
    VerificationFailed,
)
from morph.pipeline import _owners, _verify
from morph.plan import HeadGroup, LayerPlan, Plan
from morph.recipes import schema
from morph.surgery import Batch
from morph.testing import assert_close, exactly, tiny_model

REPO = Path(__file__).resolve().parent.parent


def planned(model: Any, *options: dict[str, Any] | None) -> Plan:
    """A plan with one group a layer; None: full attention."""
    geometry = surgery.geometry_of(model)
    heads = tuple(range(geometry.num_attention_heads))
    groups = [
        HeadGroup(mixer="full", heads=heads)
        if given is None
        else HeadGroup(mixer="shared_routing", heads=heads, options=given)
        for given in options
    ]
    layers = tuple(LayerPlan(groups=(group,)) for group in groups)
    return Plan(model_type=model.config.model_type, geometry=geometry, layers=layers)


def hybrid_of(*options: dict[str, Any] | None, seed: int = 0) -> tuple[Any, Plan]:
    model = tiny_model("llama")
    plan = surgery.resolve_costs(planned(model, *options))
    made = modeling.hybrid(model, plan)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in surgery.mixer_parameters(made):
            p.copy_(torch.randn(p.shape, generator=generator))
    return made, plan


def batches_for(model: Any, rows: int = 2, length: int = 40) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
        answers = torch.ones_like(ids, dtype=torch.bool)
        answers[:, 0] = False
        found.append(Batch(ids=ids, answers=answers))
    return found


def blind(model: Any, *layers: int) -> None:
    """Let the index of layers score everything alike: the first tokens are chosen."""
    with torch.no_grad():
        for i in layers:
            surgery.hybrid_layers(model)[i].mixers[0].q_weight.zero_()


def owners_in(plan: Plan) -> list[int | None]:
    return [x.groups[0].options.get("owner") for x in plan.layers]


@pytest.mark.parametrize(
    ("owner", "follower", "said"),
    [
        ({"k": 6}, {"k": 7, "owner": 0}, "has k 6, this 7"),
        ({"k": 6, "block": 2}, {"k": 6, "owner": 0}, "has block 2, this 1"),
        ({"k": 6}, {"k": 6, "owner": 2}, "earlier layer only"),
        (None, {"k": 6, "owner": 0}, "no shared_routing of its own"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused_at_once(
    owner: dict[str, Any] | None, follower: dict[str, Any], said: str
) -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match=f"layer 1: mixer shared_routing follows layer .*{said}"):
        surgery.resolve_costs(planned(model, owner, follower, None, None))


def test_an_index_that_adds_nothing_goes_first_and_one_that_does_stays() -> None:
    """Layers 0, 1 and 3 choose alike, layer 2 does not: only layer 1 can follow for nothing."""
    model, plan = hybrid_of(*[{"k": 6}] * 4)
    blind(model, 0, 1, 3)
    teacher, batches = copy.deepcopy(model), batches_for(model)
    found = surgery.choose_owners(model, plan, batches, 3, teacher=teacher)
    assert (found.loss, found.owners, len(found.drops)) == ("kl", (0, 2, 3), 1)
    drop = found.drops[0]
    assert (drop.layer, drop.owner, sorted(drop.tried)) == (1, 0, [1, 2, 3])
    assert abs(drop.loss) < 1e-6 < min(drop.tried[2], drop.tried[3])
    assert owners_in(found.plan) == [None, 0, None, None]
    blind(model, 2)  # now all are alike: of equals the last goes first
    teacher = copy.deepcopy(model)
    found = surgery.choose_owners(model, plan, batches, 1, teacher=teacher)
    assert [(d.layer, d.owner) for d in found.drops] == [(3, 2), (2, 1), (1, 0)]
    assert owners_in(found.plan) == [None, 0, 0, 0]


def test_losses_are_those_of_the_plans_and_each_step_takes_the_least() -> None:
    model, plan = hybrid_of({"k": 6}, {"k": 6}, None, {"k": 6})
    batches, told = batches_for(model), []

    def loss(owners: list[int | None]) -> float:
        """Of a model made with these owners, every token counted once."""
        options = [None if i == 2 else {"k": 6, "owner": o} for i, o in enumerate(owners)]
        other = modeling.hybrid(tiny_model("llama"), planned(model, *options))
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in surgery.mixer_parameters(other):
                p.copy_(own[name])
            losses = [other(b.ids, labels=b.ids).loss.item() for b in batches]
        return sum(losses) / len(losses)

    before = {n: p.clone() for n, p in model.named_parameters()}
    logits = model(batches[0].ids).logits
    found = surgery.choose_owners(
        model, plan, batches, 1, progress=lambda done, total: told.append((done, total))
    )
    first, second = found.drops
    assert_close("start", torch.tensor(loss([None] * 4)), torch.tensor(found.start), 1e-5)
    tried = {1: loss([None, 0, None, None]), 3: loss([None, None, None, 1])}
    for layer, value in tried.items():
        assert abs(first.tried[layer] - value) < 1e-5
    assert first.layer == min(tried, key=tried.__getitem__)
    assert abs(second.loss - loss([None, 0, None, 0])) < 1e-5
    assert owners_in(found.plan) == [None, 0, None, 0]
    assert found.plan.cache_bytes(1000) < plan.cache_bytes(1000)
    assert told == [(n, 4) for n in range(1, 5)]
    exactly("logits", logits, model(batches[0].ids).logits)
    for name, p in model.named_parameters():
        exactly(name, before[name], p)


def test_what_is_remembered_is_not_measured_again(tmp_path: Path) -> None:
    model, plan = hybrid_of(*[{"k": 6}] * 4)
    batches = batches_for(model)
    first = surgery.choose_owners(
        model, plan, batches, 2, memo=surgery.Memo(tmp_path / "memo", "x")
    )
    memo = surgery.Memo(tmp_path / "memo", "x")
    assert len(memo) == 1 + 3 + 2
    model.forward = None  # any measurement would fail
    assert surgery.choose_owners(model, plan, batches, 2, memo=memo) == first


def test_a_measurement_that_fails_leaves_the_model_as_it_was() -> None:
    model, plan = hybrid_of(*[{"k": 6}] * 4)
    batches, calls = batches_for(model), []
    plain = model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    model.forward = failing
    with pytest.raises(KeyboardInterrupt):
        surgery.choose_owners(model, plan, batches, 1)
    layers = surgery.hybrid_layers(model).values()
    assert [layer.mixers[0].options.owner for layer in layers] == [None] * 4


def test_followers_stay_with_an_owner_that_stays() -> None:
    follows = {"k": 6, "owner": 0}
    model, plan = hybrid_of({"k": 6}, {"k": 6}, follows, {"k": 6})
    assert surgery.sharing(plan) == {0: None, 1: None, 2: 0, 3: None}
    found = surgery.choose_owners(model, plan, batches_for(model), 2)
    assert owners_in(found.plan)[2] == 0
    blind(model, 0, 1)
    found = surgery.choose_owners(model, plan, batches_for(model), 2, teacher=copy.deepcopy(model))
    assert owners_in(found.plan) == [None, 0, 0, None]


def test_a_layer_follows_one_that_chooses_as_much() -> None:
    model, plan = hybrid_of({"k": 6}, {"k": 8}, {"k": 6}, {"k": 8, "block": 2})
    found = surgery.choose_owners(model, plan, batches_for(model), 3)
    assert owners_in(found.plan) == [None, None, 0, None]
    for wanted in (2, 4, 0):
        with pytest.raises(UsageError, match="4 layers have an index.*give 3 to 3"):
            surgery.choose_owners(model, plan, batches_for(model), wanted)
    with pytest.raises(UsageError, match="no index can be spared"):
        surgery.choose_owners(model, found.plan, batches_for(model), 1)
    full, plan = hybrid_of({"k": 6}, None, None, None)
    nothing = planned(full, None, None, None, None)
    with pytest.raises(MismatchError, match="no layer of this plan has shared_routing"):
        surgery.choose_owners(full, nothing, batches_for(full), 1)


def test_counts_are_read_as_layers_and_shares() -> None:
    for text, expected in (("2", 2), ("1/4", 2), ("25%", 2), ("0.5", 4), ("1/100", 1)):
        assert _owners.count_of(text, 8) == expected
    for bad in ("some", "1/0", "4096B", "-1", "0"):
        with pytest.raises(UsageError, match="--owners .* is not understood"):
            _owners.count_of(bad, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and the hybrid with an index in every layer but the first."""
    root = tmp_path_factory.mktemp("owners")
    runpy.run_path(str(REPO / "examples" / "tiny_model.py"))["main"](root)
    source = pipeline.open_source(str(root / "model"))
    plan = planned(source.model(), None, *[{"k": 24, "index_dim": 6}] * 7)
    pipeline.convert(str(root / "model"), root / "hybrid", plan)
    return root


def recipe_for(root: Path, **select: Any) -> Any:
    section = {"examples": 2, "seq_len": 64, **select}
    data = {"text": [str(root / "text.txt")]}
    raw = {"model": str(root / "hybrid"), "data": data, "select": section}
    return schema.from_data(raw, "test")


def test_a_shared_checkpoint_is_the_hybrid_without_some_indexes(
    folder: Path, tmp_path: Path
) -> None:
    out, said, steps = tmp_path / "out", [], []
    found = pipeline.share_command(
        recipe_for(folder),
        out,
        owners="2",
        teacher=str(folder / "model"),
        say=said.append,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert found["owners"][0] == 1 and len(found["owners"]) == 2
    assert steps[-1] == (1 + 6 + 5 + 4 + 3 + 2, 21)
    before, after = (checkpoint.Checkpoint.open(p) for p in (folder / "hybrid", out))
    equal, changed, new = checkpoint.kept_equal(before, after)
    assert not changed and not new and equal == sorted(after.tensors)
    gone = sorted(before.tensors.keys() - after.tensors.keys())
    dropped = [i for i in range(2, 8) if i not in found["owners"]]
    stem = "model.layers.{}.self_attn.mixers.0.{}_weight"
    assert gone == [stem.format(i, n) for i in dropped for n in ("k", "q")]
    plan = pipeline.plan_of_folder(out, pipeline.open_source(str(folder / "model")))
    assert [i for i, o in surgery.sharing(plan).items() if o is None] == found["owners"]
    told = pipeline.record_of(out)
    story = told["provenance"]["owners"]
    assert story["loss"] == "kl" and [d["layer"] for d in story["drops"]] != sorted(dropped)[:1]
    assert told["source"] == pipeline.record_of(folder / "hybrid")["source"]
    assert "Who has an index" in (out / "README.md").read_text()
    assert found["verification"]["tensors_byte_equal"] == len(after.tensors)

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    live = pipeline.open_source(str(folder / "hybrid")).model()
    surgery.follow(live, plan)
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exactly("logits", live(ids).logits, loaded(ids).logits)
    assert not list(tmp_path.glob("out.partial"))


def test_what_cannot_be_shared_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", recipe_for(folder)

    def refused(error: type[Exception], said: str, given: Any = recipe, **options: Any) -> None:
        with pytest.raises(error, match=said):
            pipeline.share_command(given, options.pop("out", out), **options)
        assert not list(tmp_path.iterdir())

    refused(UsageError, "--owners 'few' is not understood", owners="few")
    refused(UsageError, "7 layers have an index.*give 1 to 6", owners="7")
    refused(OutputExists, "is the input", out=folder / "hybrid")
    refused(DataError, "the text has .* tokens; one example", recipe_for(folder, seq_len=10**7))
    whole = "texts of 24 tokens are read whole.*Set select.seq_len above 24"
    refused(UsageError, whole, recipe_for(folder, seq_len=24))
    refused(MismatchError, "was made of another model", teacher=str(folder / "hybrid"))
    plain = dataclasses.replace(recipe, model=str(folder / "model"))
    refused(MismatchError, "is no hybrid with shared routing", plain)
    refused(UsageError, "no text was given", dataclasses.replace(recipe, data=schema.Data()))


def test_what_does_not_verify_is_not_kept_and_goes_on_from_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain, said = tmp_path / "out", _verify.load_and_compare, []

    def spoiled(source: Any, plan: Any, staged: Any, *rest: Any, **more: Any) -> Any:
        with torch.no_grad():
            next(surgery.mixer_parameters(rest[3]))[1].neg_()  # what is in memory is another
        return plain(source, plan, staged, *rest, **more)

    monkeypatch.setattr(_verify, "load_and_compare", spoiled)
    with pytest.raises(VerificationFailed, match="differ from the hybrid in memory"):
        pipeline.share_command(recipe_for(folder), out, owners="6", say=said.append)
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    monkeypatch.undo()
    found = pipeline.share_command(recipe_for(folder), out, owners="6", say=said.append)
    assert any("7 measurements are at hand" in line for line in said)
    assert len(found["owners"]) == 6 and [p.name for p in tmp_path.iterdir()] == ["out"]
