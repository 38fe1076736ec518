"""Models larger than memory: layers that are read when they run, one at a time."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from morph import registry, surgery
from morph.errors import CheckpointError, PlanError
from morph.pipeline import _source
from morph.pipeline._source import open_source
from morph.selectors import _common, nll
from morph.surgery import CHEAP, FULL, Batch, Soft, _trace
from morph.surgery._streaming import StreamedLayers, refuse_streaming
from morph.surgery._trace import together
from morph.testing import tiny_model

FAMILIES = registry.names("families")
WINDOW = {"window": 6}  # shorter than what is worth sharing: both ways compute the same


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a family's tiny model, in shards, as made once per dtype."""
    made: dict[tuple[str, str], Path] = {}

    def folder(model_type: str, dtype: str = "float32") -> Path:
        if (model_type, dtype) not in made:
            path = tmp_path_factory.mktemp(model_type)
            model = tiny_model(model_type).to(getattr(torch, dtype))
            model.save_pretrained(path, max_shard_size="30KB")
            made[model_type, dtype] = path
        return made[model_type, dtype]

    return folder


def batches_for(model, count=2, rows=2, length=24):
    generator = torch.Generator().manual_seed(2)
    found = []
    for n in range(count):
        shape = (rows, length + n)
        answers = torch.zeros(shape, dtype=torch.bool)
        answers[:, -3:] = True
        ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
        found.append(Batch(ids=ids, answers=answers))
    return found


class Watch:
    """Counts what is read, and sees at every read that no other layer's tensors are here."""

    def __init__(self, model, layers):
        self.model, self.reads, self.load = model, Counter(), layers.load
        layers.load = self

    def __call__(self, name):
        self.reads[name] += 1
        assert self.resident() <= {int(name.split(".")[2])}
        return self.load(name)

    def resident(self):
        found = surgery.base_of(self.model).layers
        return {
            i
            for i, layer in enumerate(found)
            for name, p in layer.named_parameters()
            if not p.is_meta and ".mixers." not in name
        }


@pytest.mark.parametrize("model_type", FAMILIES)
def test_streamed_scores_equal_resident_ones(saved, model_type):
    """Every family: the same scores, each tensor read once per sweep of all batches."""
    source = open_source(str(saved(model_type)))
    whole, (model, layers) = source.model(), source.streamed()
    watch = Watch(model, layers)
    batches = batches_for(whole)
    for mode in ("add", "remove"):
        found = []
        for some, streamed in ((whole, None), (model, layers)):
            watch.reads.clear()
            with surgery.morphable(some, "sliding", WINDOW, streamed=streamed) as probe:
                found.append(nll.score(probe, batches, nll.Options(mode=mode)))
        expected, got = found
        assert len({x for row in expected.values for x in row}) > 1
        for a, b in zip(expected.values, got.values):
            assert b == pytest.approx(a, abs=1e-6)
        assert expected.provenance["base_nll"] == pytest.approx(got.provenance["base_nll"])
        names = [n for n, p in model.named_parameters() if ".layers." in n]
        assert watch.reads == {name: 1 for name in names}
        assert layers.resident is None and watch.resident() == set()


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_is_what_from_pretrained_makes_of_it(
    saved, model_type, stored, dtype, monkeypatch
):
    """Parameters of resident layers, the others, tied ones and buffers, bit for bit."""
    monkeypatch.setattr(_source, "_BLOCK", 256)  # many blocks a tensor
    source = open_source(str(saved(model_type, stored)))
    whole, (model, layers) = source.model(dtype), source.streamed(dtype)
    assert type(model) is type(whole) and not model.training
    assert model.config._attn_implementation == whole.config._attn_implementation
    expected = dict(whole.named_parameters(remove_duplicate=False))
    seen = set()
    for i in range(source.geometry.num_hidden_layers):
        layers.fetch(i)
        here = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
        assert layers.nbytes(i) == sum(here[n].nbytes for n in layers.names(i))
        for name, p in here.items():
            assert p.dtype == expected[name].dtype and torch.equal(p, expected[name]), name
        seen |= set(here)
    assert seen == set(expected)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
    tied = whole.lm_head.weight is whole.get_input_embeddings().weight
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_a_plain_forward_reads_every_layer_once(saved, model_type):
    source = open_source(str(saved(model_type)))
    whole, (model, layers) = source.model(), source.streamed()
    watch = Watch(model, layers)
    batch = batches_for(whole)[0]
    with torch.no_grad():
        assert torch.equal(model(batch.ids).logits, whole(batch.ids).logits)
    assert set(watch.reads.values()) == {1}
    assert watch.resident() == {source.geometry.num_hidden_layers - 1}
    with surgery.morphable(model, "sliding", WINDOW, streamed=layers) as probe:
        assert watch.resident() == set()
        got = probe.run(batch, probe.modes([]), want=("attention",))
    with surgery.morphable(whole, "sliding", WINDOW) as probe:
        expected = probe.run(batch, probe.modes([]), want=("attention",))
    assert torch.equal(got.logits, expected.logits)
    assert all(torch.equal(got.attention[i], x) for i, x in expected.attention.items())
    layers.close()
    assert watch.resident() == set()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("measure", ["nll", "kl", "wrong"])
@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
def test_one_pass_for_all_batches_whatever_is_measured(saved, granularity, measure):
    source = open_source(str(saved("qwen3")))
    whole, (model, layers) = source.model(), source.streamed()
    watch = Watch(model, layers)
    batches = batches_for(whole, count=3)
    found = []
    for some, streamed in ((whole, None), (model, layers)):
        told: list[tuple[int, int]] = []
        with surgery.morphable(some, "sliding", WINDOW, streamed=streamed) as probe:
            probe.progress = lambda done, total, told=told: told.append((done, total))
            units = _common.units(probe, granularity)
            sweep = _common.Sweep(probe, batches, units[:2], granularity, measure)
            sets = [units[:2], [], units, *([u] for u in units)]
            found.append(sweep.rows(sets))
            total = len(batches) * len(sets)
            assert told == sorted(told) and told[-1] == (total, total)
            again = watch.reads.total()
            assert torch.equal(sweep.rows(sets[::-1]), found[-1].flip(0))  # from memory
            assert watch.reads.total() == again
            found.append(sweep.rows([units[1:3]]))  # a later pass, with the source known
    assert set(watch.reads.values()) == {2}
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[3], found[1], atol=1e-5, rtol=1e-5)
    if measure == "kl":
        assert float(found[2][2].abs().max()) < 1e-5


def test_swaps_of_a_streamed_model_take_the_same_steps(saved):
    source = open_source(str(saved("llama")))
    whole, (model, layers) = source.model(), source.streamed()
    batches, found = batches_for(whole, rows=3), []
    for some, streamed in ((whole, None), (model, layers)):
        with surgery.morphable(some, "sliding", {"window": 2}, streamed=streamed) as probe:
            start = [(probe.candidates[0], 0)]
            found.append(_common.verify_and_swap(probe, batches, start, "layer"))
    (kept, report), (same, streamed_report) = found
    assert same == kept and streamed_report["sets_tried"] == report["sets_tried"]
    assert streamed_report["nll_after"] == pytest.approx(report["nll_after"], abs=1e-6)


def test_a_resident_model_may_go_layer_by_layer_too():
    """Breadth first is the same as depth first, shared first tokens included."""
    model = tiny_model("qwen3")
    batches = batches_for(model, length=40)
    with surgery.morphable(model, "sliding", {"window": 12}) as probe:
        changes = [{}, *({i: FULL} for i in probe.candidates), {}]
        traces = [probe.trace(b, probe.modes([])) for b in batches]
        assert all(trace.skip for trace in traces)
        assert list(together(traces, [[], []], lambda t, x: x)) == []
        got = {(t, n): x for t, n, x in together(traces, [changes] * 2, lambda t, x: x)}
        for t, batch in enumerate(batches):
            expected = probe.trace(batch, probe.modes([])).variants(changes, lambda x: x)
            for n, logits in enumerate(expected):
                torch.testing.assert_close(got[t, n], logits)
            torch.testing.assert_close(traces[t].logits, expected[0])


def test_what_waits_is_as_little_as_promised(saved, monkeypatch):
    """One hidden state for every variant; layers run once for variants that are alike so far."""
    source = open_source(str(saved("llama")))
    model, layers = source.streamed()
    [batch] = batches_for(model, count=1)
    sizes, step = [], _trace._Underway.step

    def watched(self, i):
        step(self, i)
        sizes.append(self.states.numel())
        assert self.states.untyped_storage().nbytes() == 4 * sizes[-1]

    monkeypatch.setattr(_trace._Underway, "step", watched)
    with surgery.morphable(model, "sliding", WINDOW, streamed=layers) as probe:
        changes = [{}, *({i: FULL} for i in probe.candidates), {}]
        found = probe.trace(batch, probe.modes([])).variants(changes, lambda logits: logits)
        assert probe.layer_evaluations == sum(i + 2 for i in range(len(probe.candidates)))
    assert set(sizes) == {len(changes) * batch.ids.numel() * source.geometry.hidden_size}
    assert torch.equal(found[0], found[-1]) and not torch.equal(found[0], found[1])


def test_gradients_are_refused_before_memory_is_spent(saved):
    source = open_source(str(saved("llama")))
    model, layers = source.streamed()
    [batch] = batches_for(model, count=1)
    with surgery.morphable(model, "sliding", WINDOW, streamed=layers) as probe:
        with pytest.raises(PlanError, match="selector 'fisher' needs gradients.*nll"):
            refuse_streaming(probe, "selector 'fisher'")
        gate = torch.ones((), requires_grad=True)
        with pytest.raises(PlanError, match="layer 1 .*every layer in memory"):
            probe.logits(batch, {**probe.modes([]), 0: Soft(gate=gate)})
        with pytest.raises(PlanError, match="streamed"):
            probe.gradients((gate * 2).sum(), [gate])
        assert probe.logits(batch, probe.modes([])).isfinite().all()  # nothing is broken by it
    whole = source.model()
    with surgery.morphable(whole, "sliding", WINDOW) as probe:
        refuse_streaming(probe, "selector 'fisher'")


INHERITING = """
from dataclasses import dataclass
import torch
from morph.mixers import sliding
Options = sliding.Options
class Mixer(sliding.Mixer):
    def __init__(self, shape, options):
        super().__init__(shape, options)
        self.mean = torch.nn.Parameter(torch.zeros(()))
    def inherit(self, source):
        with torch.no_grad():
            self.mean.copy_(source.v_proj.weight.mean())
    def forward(self, inputs, state=None):
        return super().forward(inputs, state) * (1 + self.mean)
"""


def test_mixers_inherit_from_layers_that_are_read_for_it(saved, tmp_path, monkeypatch):
    (tmp_path / "streaming_parts").mkdir()
    (tmp_path / "streaming_parts" / "inheriting.py").write_text(INHERITING)
    monkeypatch.syspath_prepend(tmp_path)
    source, name = open_source(str(saved("llama"))), "streaming_parts.inheriting"
    whole, (model, layers) = source.model(), source.streamed()
    watch, batches, found = Watch(model, layers), batches_for(whole), []
    for some, streamed in ((whole, None), (model, layers)):
        with surgery.morphable(some, name, WINDOW, streamed=streamed) as probe:
            means = [float(p) for p in probe.cheap_parameters()]
            sweep = _common.Sweep(probe, batches, [], "layer")
            found.append((means, sweep.means([[], [(1, 0)]])))
    assert all(found[0][0]) and found[1][0] == found[0][0]
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-6)
    assert set(watch.reads.values()) == {2}  # to inherit, and to run
    for part in ("streaming_parts", name):
        sys.modules.pop(part, None)


def test_mixers_that_inherit_nothing_read_nothing(saved):
    source = open_source(str(saved("llama")))
    model, layers = source.streamed()
    watch = Watch(model, layers)
    with surgery.morphable(model, "decay", streamed=layers) as probe:
        assert not watch.reads
        assert all(not p.is_meta for p in probe.cheap_parameters())
        probe.trace(batches_for(model)[0], probe.modes([])).variant({0: FULL, 1: CHEAP})
    assert set(watch.reads.values()) == {1}


def test_a_read_that_fails_leaves_nothing_resident(saved):
    source = open_source(str(saved("llama")))
    model, layers = source.streamed()
    watch, load = Watch(model, layers), layers.load
    layers.load = lambda name: load(name) if "down_proj" not in name else 1 / 0
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    assert layers.resident is None and watch.resident() == set()
    layers.load = lambda name: load(name) if "down_proj" not in name else load(name).mT
    with pytest.raises(CheckpointError, match="down_proj.weight is .* the model needs"):
        model(ids)
    layers.load = load
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source.model()(ids).logits)


def test_a_loader_of_ones_own(saved):
    """`StreamedLayers` takes any model whose layers wait on the meta device, and any `load`."""
    whole = tiny_model("llama")
    model = tiny_model("llama")
    tensors = {n: p.detach() for n, p in whole.named_parameters()}
    model.model.layers.to("meta")
    layers = StreamedLayers(model, lambda name: tensors[name].double())
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    layers.drop(0)
    assert layers.resident == 3
    layers.drop(3)
    assert layers.resident is None


def edited(folder, target, change, config=()):
    """Copy a checkpoint as one file, its tensors and config changed."""
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(change(tensors), target / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text()) | dict(config)
    (target / "config.json").write_text(json.dumps(data))
    return open_source(str(target))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("missing keys", lambda t: {k: v for k, v in t.items() if k != NORM}),
        ("unexpected keys", lambda t: t | {"model.layers.0.mlp.more": torch.ones(2)}),
        ("mismatched keys", lambda t: t | {NORM: torch.ones(3)}),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_read(saved, tmp_path, kind, change):
    source = edited(saved("llama"), tmp_path, change)
    with pytest.raises(CheckpointError):
        source.model()
    with pytest.raises(CheckpointError, match=f"{kind} for LlamaForCausalLM: model."):
        source.streamed()


def test_spellings_that_from_pretrained_takes_are_taken(saved, tmp_path):
    """A tied model stored without its head's prefix, with its head too, or by its head alone."""
    changes = {
        "base": lambda t: {k.removeprefix("model."): v for k, v in t.items()},
        "both": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
        "apart": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2},
        "old": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
    }
    ids = torch.ones(1, 4, dtype=torch.long)
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        source = edited(saved("gemma"), tmp_path / name, change)
        model, _ = source.streamed("auto")
        with torch.no_grad():
            assert torch.equal(model(ids).logits, source.model("auto")(ids).logits), name
