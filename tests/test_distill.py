"""Distillation: losses against the plain way, what trains and what is shared, resume, trouble."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from morph import modeling, registry, surgery
from morph.distill import (
    Head,
    distill,
    estimate,
    head_cross_entropy,
    head_kl,
    learning_rate_factor,
    relative_mse,
    text_batches,
)
from morph.distill._trainee import Trainee
from morph.errors import (
    DataError,
    Interrupted,
    MismatchError,
    RecipeError,
    StorageError,
    TrainingError,
    UnsupportedModel,
    UsageError,
)
from morph.plan import uniform_plan
from morph.recipes.schema import Stage

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONVERTED = (0, 2)


class Gate(nn.Module):
    """One gain per head: the mixer's only parameter of its own, and a matrix beside it."""

    gates = ("gain",)

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((heads,), 0.8))
        self.map = nn.Parameter(torch.eye(width))


class Windowed(nn.Module):
    """A stand-in for HybridAttention: a window of 4, a gain per head, the source's projections."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, getattr(source, name))
        self.head_dim, self.scaling = source.head_dim, source.scaling
        self.mixers = nn.ModuleList([Gate(4, self.head_dim)])

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        b, t, _ = hidden_states.shape
        q, k, v = (
            getattr(self, f"{n}_proj")(hidden_states).view(b, t, -1, self.head_dim).transpose(1, 2)
            for n in "qkv"
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        gap = torch.arange(t)[:, None] - torch.arange(t)
        mask = (gap >= 0) & (gap < 4)
        heads = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scaling, enable_gqa=True
        )
        heads = heads.transpose(1, 2) @ self.mixers[0].map * self.mixers[0].gain[:, None]
        return self.o_proj(heads.flatten(2)), None


def make_teacher(config=None, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SHAPE))
    return model.to(dtype).eval()


def make_student(teacher: nn.Module, swap=Windowed, layers=CONVERTED):
    """A copy of the teacher that holds the teacher's own parameters, some layers swapped."""
    memo = {id(p): p for p in teacher.parameters()}
    student = copy.deepcopy(teacher, memo)
    found = {}
    for i in layers:
        layer = student.model.layers[i]
        layer.self_attn = found[i] = swap(layer.self_attn)
        found[i].mixers.to(next(teacher.parameters()).dtype) if swap is Windowed else None
    return student, found


def stage(**changes) -> Stage:
    base = {"tokens": 6 * 24, "seq_len": 12, "batch_size": 2, "save_every": 4, "chunk_tokens": 7}
    return Stage(**{"loss": "align", "lr": 3e-3, **base, **changes})


ALL_STAGES = (
    stage(loss="align", train="new"),
    stage(loss="logits", train="attention", weight_decay=0.1),
    stage(loss="long", train="all", lr=1e-3),
)
TEXT = torch.randint(0, 61, (400,), generator=torch.Generator().manual_seed(3))
REPEATED = TEXT[:13].repeat(20)  # short enough a text to be learnt by heart


def run(out, stages=ALL_STAGES, teacher=None, **changes):
    teacher = teacher or make_teacher()
    student, layers = make_student(teacher)
    options = {"out": out, "seed": 1, "layers": layers, **changes}
    source = options.pop("batches", text_batches(TEXT, seed=5))
    log = distill(student, teacher, stages, source, **options)
    return student, log


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


# --- losses -------------------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 3.0},
    "capped-scaled": {"softcap": 3.0, "scale": 2.0},
    "bias": {"bias": True},
}


def make_rows(kind: dict, rows: int = 23, dtype=torch.float64, gap: float = 0.5):
    make = torch.Generator().manual_seed(7)
    weight = torch.randn(97, 16, generator=make, dtype=dtype)
    options = {k: v for k, v in kind.items() if k != "bias"}
    bias = torch.randn(97, generator=make, dtype=dtype) if "bias" in kind else None
    teacher = torch.randn(rows, 16, generator=make, dtype=dtype)
    student = teacher + gap * torch.randn(rows, 16, generator=make, dtype=dtype)
    return student.requires_grad_(), teacher, Head(weight=weight, bias=bias, **options)


def plain_kl(student, teacher, head, temperature=1.0):
    p = F.log_softmax(head.logits(teacher) / temperature, -1)
    q = F.log_softmax(head.logits(student) / temperature, -1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("chunk", [1, 7, 23, 64])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", HEADS)
def test_kl_equals_the_plain_way(kind, temperature, chunk):
    student, teacher, head = make_rows(HEADS[kind])
    plain = plain_kl(student, teacher, head, temperature)
    (expected,) = torch.autograd.grad(plain, student)
    got = head_kl(student, teacher, head, temperature=temperature, chunk_tokens=chunk)
    (2 * got).backward()  # an upstream gradient that is not one
    torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(student.grad, 2 * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
def test_cross_entropy_equals_the_plain_way(kind):
    student, _, head = make_rows(HEADS[kind])
    targets = torch.arange(23) * 4
    plain = F.cross_entropy(head.logits(student), targets)
    (expected,) = torch.autograd.grad(plain, student)
    got = head_cross_entropy(student, targets, head, chunk_tokens=7)
    got.backward()
    torch.testing.assert_close(got, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(student.grad, expected, rtol=1e-9, atol=1e-12)


def test_kl_gradient_passes_gradcheck():
    student, teacher, head = make_rows({}, rows=3)
    torch.autograd.gradcheck(lambda h: head_kl(h, teacher, head, chunk_tokens=2), student)


@pytest.mark.parametrize("gap", [1e-3, 0.1, 0.5, 2.0, 40.0])
def test_kl_in_float32_is_exact_to_1e_6(gap):
    """Also where the student is near its teacher, and where exp of the difference overflows."""
    student, teacher, head = make_rows({}, gap=gap)
    single = student.detach().float().requires_grad_()
    got = head_kl(single, teacher.float(), Head(weight=head.weight.float()), chunk_tokens=8)
    got.backward()
    # The referee sees the rounded inputs too: their rounding is not the loss's own
    twice = single.detach().double().requires_grad_()
    exact = plain_kl(twice, teacher.float().double(), Head(weight=head.weight.float().double()))
    (expected,) = torch.autograd.grad(exact, twice)
    # A loss of second order is a difference of numbers of first order: hence the absolute part
    assert abs(got.item() - exact.item()) <= 1e-6 * exact.item() + 1e-10
    assert (single.grad.double() - expected).norm() <= 1e-6 * expected.norm()


def test_kl_in_bfloat16_keeps_a_gradient_near_the_teacher():
    """Two softmaxes in bfloat16 would differ by rounding only; the difference is taken first."""
    student, teacher, head = make_rows({}, gap=0.02)
    low = teacher.bfloat16()
    near = (low.double() + 0.02 * (student.detach() - teacher)).bfloat16().requires_grad_()
    weight = head.weight.bfloat16()
    exact_student = near.detach().double().requires_grad_()
    exact = plain_kl(exact_student, low.double(), Head(weight=weight.double()))
    (expected,) = torch.autograd.grad(exact, exact_student)
    head_kl(near, low, Head(weight=weight)).backward()
    assert (near.grad.double() - expected).norm() <= 0.02 * expected.norm()


def test_losses_of_a_copy_are_zero():
    student, teacher, head = make_rows({}, gap=0.0)
    loss = head_kl(student, teacher, head)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0
    assert relative_mse(teacher, teacher) == 0
    assert relative_mse(torch.zeros(3, 4), torch.ones(3, 4)) == 1


def test_a_trainable_head_is_refused_by_assertion():
    student, teacher, head = make_rows({})
    head.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="frozen"):
        head_kl(student, teacher, head)


GEMMA2 = {**SHAPE, "final_logit_softcapping": 0.5, "layer_types": ["full_attention"] * 3}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "granite": GraniteConfig(**SHAPE, logits_scaling=6.0),
    "gemma2": Gemma2Config(**GEMMA2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_head_of_a_model_gives_its_logits(name):
    model = make_teacher(CONFIGS[name], torch.float64)
    ids = TEXT[None, :9]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(Head.of(model).logits(hidden), model(input_ids=ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_stage_is_the_kl_of_the_models_own_logits(name, tmp_path):
    teacher = make_teacher(CONFIGS[name], torch.float64)  # the plain way needs it, see above
    student, layers = make_student(teacher, Off)
    ids = text_batches(TEXT, seed=5)(0, stage()).batch(0)
    with torch.no_grad():
        p, q = (F.log_softmax(m(input_ids=ids).logits.double(), -1) for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    one = stage(loss="logits", tokens=24)
    source = text_batches(TEXT, seed=5)
    log = distill(student, teacher, [one], source, out=tmp_path, seed=1, layers=layers)
    assert log.records[0]["loss"] == pytest.approx(expected, rel=1e-9)


class Off(nn.Module):
    """The source's attention with its output scaled down, whatever the family."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.__dict__["source"] = source
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, getattr(source, name))

    def forward(self, *args, **kwargs):
        output, weights = self.source(*args, **kwargs)
        return 0.3 * output, weights


def test_unknown_head_is_refused(tmp_path):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    teacher = make_teacher()
    teacher.lm_head.__class__ = Shifted
    with pytest.raises(UnsupportedModel, match="does not know"):
        run(tmp_path, [stage(loss="logits")], teacher)
    run(tmp_path / "align", [stage(loss="align")], teacher)


# --- what trains --------------------------------------------------------------------------------


def is_new(name: str) -> bool:
    return ".mixers." in name


def is_attention(name: str) -> bool:
    return any(f"layers.{i}.self_attn." in name for i in CONVERTED)


TRAINS = {
    "new": is_new,
    "attention": is_attention,
    "all": lambda name: name != "lm_head.weight",
}


@pytest.mark.parametrize("loss", ["logits", "long"])
@pytest.mark.parametrize("train", TRAINS)
def test_only_what_the_stage_trains_changes(train, loss, tmp_path):
    teacher = make_teacher()
    before = weights(teacher)
    fresh = weights(make_student(teacher)[0])
    student, log = run(tmp_path, [stage(loss=loss, train=train)], teacher)
    after = weights(student)
    changed = {n for n in after if not torch.equal(after[n], fresh[n])}
    # the embedding's rows move only where their tokens occurred, but some occurred
    assert changed == {n for n in after if TRAINS[train](n)} == set(log.trained)
    assert_same(weights(teacher), before)
    theirs = {n: p.data_ptr() for n, p in teacher.named_parameters()}
    shared = {n for n, p in student.named_parameters() if theirs.get(n) == p.data_ptr()}
    assert shared == set(after) - changed


def test_align_trains_converted_layers_only_and_lowers_every_layer(tmp_path):
    stages = [stage(train="all", tokens=24 * 40, lr=1e-2)]
    student, log = run(tmp_path, stages, batches=text_batches(REPEATED, seed=5))
    fresh = weights(make_student(make_teacher())[0])
    changed = {n for n, p in weights(student).items() if not torch.equal(p, fresh[n])}
    assert changed == {n for n in fresh if is_attention(n)}
    for i in CONVERTED:
        losses = [r["layers"][str(i)] for r in log.records]
        # What tokens outside the window of 4 contribute cannot be learnt, so not nearly to 0
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(log.records[0]["layers"]) == {"0", "2"}


@pytest.mark.parametrize("loss", ["logits", "long"])
def test_end_to_end_losses_fall(loss, tmp_path):
    stages = [stage(loss=loss, train="all", tokens=24 * 40, lr=1e-2)]
    _, log = run(tmp_path, stages, batches=text_batches(REPEATED, seed=5))
    losses = log.losses(0)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_align_of_a_copy_is_zero(tmp_path):
    teacher = make_teacher()
    student, layers = make_student(teacher, swap=lambda source: source)
    stages = [stage(tokens=48)]
    source = text_batches(TEXT, seed=5)
    log = distill(student, teacher, stages, source, out=tmp_path, seed=1, layers=layers)
    assert log.losses(0) == [0.0, 0.0]


def test_tied_embedding_stays_with_the_frozen_head(tmp_path):
    teacher = make_teacher(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    student, _ = run(tmp_path, [stage(loss="long", train="all")], teacher)
    assert student.model.embed_tokens.weight is teacher.model.embed_tokens.weight
    assert student.lm_head.weight is teacher.lm_head.weight


def test_equal_tensors_of_a_loaded_student_become_shared(tmp_path):
    teacher = make_teacher()
    student, layers = make_student(teacher)
    loaded = copy.deepcopy(student)
    layers = {i: loaded.model.layers[i].self_attn for i in layers}
    source = text_batches(TEXT, seed=5)
    distill(loaded, teacher, [stage()], source, out=tmp_path, seed=1, layers=layers)
    assert loaded.model.layers[1].mlp.up_proj.weight is teacher.model.layers[1].mlp.up_proj.weight
    assert_same(weights(loaded), weights(run(tmp_path / "b", [stage()])[0]))


def test_gates_have_their_own_rate_and_no_decay():
    from accelerate import Accelerator

    teacher = make_teacher()
    student, layers = make_student(teacher)
    trainee = Trainee(student, teacher, layers)
    chosen = stage(loss="logits", train="all", lr=1e-3, gate_lr=5e-2, weight_decay=0.1)
    trainee.begin(chosen, trainee.names(chosen), Accelerator())
    groups = {g["kind"]: g for g in trainee.optimizer.param_groups}
    assert {n.rpartition(".")[2] for n in groups["gates"]["names"]} == {"gain"}
    assert all("norm" in n for n in groups["vectors"]["names"])
    rates = {k: (g["peak_lr"], g["weight_decay"]) for k, g in groups.items()}
    assert rates == {"gates": (5e-2, 0.0), "vectors": (1e-3, 0.0), "matrices": (1e-3, 0.1)}
    assert "model.layers.0.self_attn.mixers.0.map" in groups["matrices"]["names"]


def test_flags_and_modes_come_back(tmp_path):
    teacher = make_teacher()
    teacher.model.norm.weight.requires_grad_(False)
    student, layers = make_student(teacher)
    student.train()
    source = text_batches(TEXT, seed=5)
    distill(student, teacher, [stage()], source, out=tmp_path, seed=1, layers=layers)
    assert all(m.training for m in student.modules())
    assert not any(m.training for m in teacher.modules())
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["model.norm.weight"]
    assert all(p.grad is None for p in student.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_a_stage_with_nothing_to_train_is_skipped(tmp_path):
    teacher = make_teacher()
    student, layers = make_student(teacher, Off)  # no parameters of its own
    stages = [stage(train="new"), stage(loss="logits")]
    source = text_batches(TEXT, seed=5)
    events = []
    log = distill(
        student,
        teacher,
        stages,
        source,
        out=tmp_path,
        seed=1,
        layers=layers,
        progress=events.append,
    )
    assert "stage 0 (align) is skipped" in log.notes[0]
    assert {r["stage"] for r in log.records} == {1}
    assert [e for e in events if e.kind == "step"][-1].eta_seconds == 0


def test_a_plan_without_converted_layers_is_skipped(tmp_path):
    teacher = make_teacher()
    student, _ = make_student(teacher, layers=())
    source = text_batches(TEXT, seed=5)
    log = distill(student, teacher, ALL_STAGES, source, out=tmp_path, seed=1, layers={})
    assert len(log.notes) == 3
    assert log.records == []


def test_bfloat16_steps_through_float32_copies(tmp_path):
    """Steps far below bfloat16's resolution add up."""
    teacher = make_teacher(dtype=torch.bfloat16)
    fresh = weights(make_student(teacher)[0])
    small = stage(loss="logits", tokens=24 * 16, lr=2e-5, gate_lr=1e-3)
    student, _ = run(tmp_path / "a", [small], teacher)
    name = "model.layers.0.self_attn.mixers.0.gain"
    assert not torch.equal(weights(student)[name], fresh[name])
    again, _ = resumed(tmp_path / "b", [small], make_teacher(dtype=torch.bfloat16), at=[9])
    assert_same(weights(again), weights(student))


MIXERS = [name for name in registry.names("mixers") if name != "full"]
# Windows smaller than the 12 tokens of a row: else these are the source itself
SMALLER = {m: {"window": 4} for m in ("sliding", "hedgehog")}
SMALLER |= {"dash": {"block": 2, "gamma": 8.0}, "shared_routing": {"k": 3}}
SMALLER |= {"block_topk": {"block": 2, "k": 2, "initial": 0, "local": 1}}
SMALLER |= {"bigbird": {"block": 2, "local": 1, "initial": 0, "random": 1}}


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_distils_and_resumes(mixer, tmp_path):
    teacher = make_teacher()
    before = weights(teacher)
    stages = [stage(train="new"), stage(loss="logits", train="attention")]
    stages.append(stage(loss="long", train="lora"))

    def once(out, stop=None):
        plan = uniform_plan(
            "llama", surgery.geometry_of(teacher), [1], mixer, SMALLER.get(mixer, {}), None
        )
        student = modeling.hybrid(teacher, plan)
        names = {n for n, _ in surgery.mixer_parameters(student)}

        def progress(event):
            if event.kind == "step" and event.tokens == stop:
                raise Stop

        source = text_batches(TEXT, seed=5)
        log = distill(student, teacher, stages, source, out=out, seed=1, progress=progress)
        return student, log, names

    student, log, names = once(tmp_path / "whole")
    assert {r["stage"] for r in log.records} == ({0, 1, 2} if names else {1, 2})
    assert all(set(r["layers"]) == {"0", "2"} for r in log.records if r["stage"] == 0)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before.get(n, p))}
    assert changed <= {n for n in before if is_attention(n)}
    assert changed or not any(log.losses(1))
    assert_same(weights(teacher), before)
    for stop in (24 * 5, 24 * (17 if names else 11)):  # the second is inside the stage of lora
        with pytest.raises(Stop):
            once(tmp_path / "again", stop=stop)
    again, _, _ = once(tmp_path / "again")
    assert_same(weights(again), weights(student))


def test_mixers_are_told_how_far_the_training_is(tmp_path, monkeypatch):
    """A share before every step, 1 after the last; a run that goes on is told what it would be."""
    told = []
    mixer = registry.load("mixers", "decay").Mixer
    monkeypatch.setattr(mixer, "progress", lambda self, share: told.append(share))
    teacher = make_teacher()
    plan = uniform_plan("llama", surgery.geometry_of(teacher), [1, 2], "decay", {}, None)

    def once(out, stop=None):
        def progress(event):
            if event.kind == "step" and event.tokens == stop:
                raise Stop

        told.clear()
        stages = [stage(), stage(loss="logits")]
        source = text_batches(TEXT, seed=5)
        student = modeling.hybrid(teacher, plan)
        distill(student, teacher, stages, source, out=out, seed=1, progress=progress)
        return list(told)

    whole = once(tmp_path / "whole")
    shares = [i / 12 for i in range(6)] + [1.0] + [i / 12 for i in range(6, 12)] + [1.0]
    assert whole == pytest.approx(shares)
    with pytest.raises(Stop):
        once(tmp_path / "again", stop=24 * 8)
    assert once(tmp_path / "again")[-1] == 1.0
    assert told[0] == pytest.approx(6 / 12), "saved states are those after steps 4 and 6"


# --- stages, log, progress ----------------------------------------------------------------------


def test_estimate_counts_whole_batches():
    assert estimate([stage(tokens=1), stage(tokens=25), stage(tokens=48)]) == (24, 48, 48)


def test_learning_rate_warms_up_and_falls():
    chosen = stage(tokens=24 * 20, warmup_fraction=0.2, min_lr_fraction=0.1)
    factors = [learning_rate_factor(chosen, i) for i in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)


def test_log_and_events_tell_of_every_step(tmp_path):
    events = []
    _, log = run(tmp_path, progress=events.append)
    lines = [json.loads(x) for x in log.path.read_text().splitlines()]
    assert lines == log.records
    assert [r["tokens"] for r in lines] == [24 * (i + 1) for i in range(18)]
    assert all(set(r) >= {"stage", "name", "step", "loss", "lr", "grad_norm"} for r in lines)
    steps = [e for e in events if e.kind == "step"]
    assert [(e.stage, e.step, e.steps) for e in steps][-1] == (2, 6, 6)
    assert all(e.tokens_per_second > 0 and e.eta_seconds >= 0 for e in steps)
    assert len((tmp_path / "seconds.jsonl").read_text().splitlines()) == 18


class Needles:
    """Rows whose last two tokens are supervised."""

    def __init__(self, index, stage):
        self.stage = stage

    def batch(self, step):
        ids = torch.full((self.stage.batch_size, 9), 7)
        ids[:, -2:] = torch.tensor([11, 13])
        labels = torch.full_like(ids, -100)
        labels[:, -2:] = ids[:, -2:]
        return ids, labels


@pytest.mark.parametrize("loss", ["logits", "long"])
def test_needles_take_their_share_and_supervise_answers(loss, tmp_path):
    stages = [stage(loss=loss, train="attention", tokens=24 * 8, needles=0.25)]
    student, log = run(tmp_path, stages, needles=Needles)
    assert [r["step"] for r in log.records if r.get("needles")] == [3, 7]
    if loss == "long":
        teacher = make_teacher()
        student, _ = make_student(teacher)
        ids, labels = Needles(0, stages[0]).batch(0)
        with torch.no_grad():
            expected = student(input_ids=ids, labels=labels).loss.item()
        stages = [dataclasses.replace(stages[0], needles=1.0, tokens=24)]
        _, log = run(tmp_path / "one", stages, teacher, needles=Needles)
        assert log.losses(0) == pytest.approx([expected], rel=1e-5)


# --- same again, and going on -------------------------------------------------------------------


class Stop(RuntimeError):
    pass


def resumed(out, stages=ALL_STAGES, teacher=None, at=(), error=Stop, before_resume=None):
    """Run, killed after each of the total steps `at`, until it is through."""
    for kill in [*at, None]:

        def progress(event, kill=kill):
            if event.kind == "step" and event.tokens == kill * 24:
                raise error

        try:
            return run(out, stages, teacher, progress=None if kill is None else progress)
        except (Stop, Interrupted):
            if before_resume:
                before_resume()
    raise AssertionError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: final weights, loss log, folder."""
    out = tmp_path_factory.mktemp("whole")
    student, log = run(out)
    return weights(student), log.path.read_bytes(), out


def test_one_seed_gives_one_result(whole, tmp_path):
    torch.manual_seed(99)  # what came before must not matter
    student, log = run(tmp_path)
    assert_same(weights(student), whole[0])
    assert log.path.read_bytes() == whole[1]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt], ids=["killed", "ctrl-c"])
@pytest.mark.parametrize("at", [[1], [3, 5], [6], [7, 8, 13], [12, 17]], ids=str)
def test_resumed_run_equals_the_uninterrupted_one(at, error, whole, tmp_path):
    student, log = resumed(tmp_path, at=at, error=error)
    assert_same(weights(student), whole[0])
    assert log.path.read_bytes() == whole[1]
    assert log.records == [json.loads(x) for x in whole[1].splitlines()]


def test_a_finished_run_is_not_run_again(whole):
    student, log = run(whole[2], batches=text_batches(TEXT, seed=5))
    assert_same(weights(student), whole[0])
    assert log.path.read_bytes() == whole[1]
    assert len(log.records) == 18


def test_ctrl_c_by_signal_waits_for_the_step(whole, tmp_path):
    def progress(event):
        if event.kind == "step" and event.tokens == 5 * 24:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="after 5 steps"):
        run(tmp_path, progress=progress)
    student, _ = run(tmp_path)
    assert_same(weights(student), whole[0])


def test_two_states_are_kept_without_pickle(whole):
    states = sorted(p.name for p in (whole[2] / "states").iterdir())
    assert states == ["step-00000016", "step-00000018"]
    files = {p.name for p in whole[2].rglob("*") if p.is_file()}
    assert files == {"log.jsonl", "seconds.jsonl", "tensors.safetensors", "state.json"}


def corrupt_bytes(folder):
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def rewrite(file, **position):
    content = json.loads(file.read_text())
    content["position"] |= position
    file.write_text(json.dumps(content))


DAMAGE = {
    "flipped-bit": corrupt_bytes,
    "truncated": lambda f: (f / "tensors.safetensors").write_bytes(b"\x08"),
    "no-tensors": lambda f: (f / "tensors.safetensors").unlink(),
    "no-json": lambda f: (f / "state.json").unlink(),
    "bad-json": lambda f: (f / "state.json").write_text("{"),
    "other-json": lambda f: (f / "state.json").write_text("[]"),
    "other-step": lambda f: rewrite(f / "state.json", step=1),
    "odd-step": lambda f: rewrite(f / "state.json", step="a"),
    "odd-key": lambda f: rewrite(f / "state.json", elsewhere=1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_state_falls_back_to_the_one_before(kind, whole, tmp_path):
    def damage():
        DAMAGE[kind](max((tmp_path / "states").glob("step-*")))

    student, log = resumed(tmp_path, at=[11], before_resume=damage)
    assert "step-00000010 is damaged" in log.notes[0]
    assert "resuming after 6 steps" in log.notes[1]
    assert_same(weights(student), whole[0])
    assert log.path.read_bytes() == whole[1]


def test_all_states_damaged_starts_over(whole, tmp_path):
    def damage():
        for folder in (tmp_path / "states").glob("step-*"):
            corrupt_bytes(folder)

    student, log = resumed(tmp_path, at=[11], before_resume=damage)
    assert any("starting from the beginning" in n for n in log.notes)
    assert_same(weights(student), whole[0])
    assert log.path.read_bytes() == whole[1]


def test_a_half_written_state_is_ignored(whole, tmp_path):
    def leave():
        folder = tmp_path / "states" / ".partial-00000012"
        folder.mkdir()
        (folder / "tensors.safetensors").write_bytes(b"half")

    student, _ = resumed(tmp_path, at=[11], before_resume=leave)
    assert_same(weights(student), whole[0])


CHANGES = {
    "stages": {"stages": [dataclasses.replace(ALL_STAGES[0], lr=1.0), *ALL_STAGES[1:]]},
    "seed": {"seed": 2},
    "data": {"batches": text_batches(TEXT.flip(0), seed=5)},
    "teacher": {"teacher": make_teacher(LlamaConfig(**{**SHAPE, "initializer_range": 0.3}))},
}


@pytest.mark.parametrize("key", CHANGES)
def test_state_of_another_run_is_refused(key, whole):
    with pytest.raises(MismatchError, match=f"state of another run: {key} differs"):
        run(whole[2], **CHANGES[key])
    assert (whole[2] / "log.jsonl").read_bytes() == whole[1]


def test_state_of_another_start_is_refused(tmp_path):
    """As when the same plan was converted again, calibrated this time."""
    teacher = make_teacher()
    plan = uniform_plan("llama", surgery.geometry_of(teacher), [1], "decay", {}, None)
    for start in (0.0, 0.5):
        student = modeling.hybrid(teacher, plan)
        with torch.no_grad():
            for _, p in surgery.mixer_parameters(student):
                p.sub_(start)
        how = {"out": tmp_path, "seed": 1}
        if not start:
            distill(student, teacher, [stage()], text_batches(TEXT, seed=5), **how)
            continue
        with pytest.raises(MismatchError, match="the student is not as it was when that began"):
            distill(student, teacher, [stage()], text_batches(TEXT, seed=5), **how)


# --- trouble ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["align", "logits", "long"])
def test_nan_stops_with_stage_step_layer_and_keeps_the_state(loss, tmp_path):
    teacher = make_teacher()
    student, layers = make_student(teacher)

    def poison(event):
        if event.kind == "step" and event.step == 5:
            layers[2].mixers[0].gain.data.fill_(float("nan"))

    source = text_batches(TEXT, seed=5)
    stages = [stage(loss=loss, tokens=24 * 9)]
    with pytest.raises(TrainingError, match=rf"stage 0 \({loss}\), step 5: .*layer 2.* step 4 is"):
        distill(
            student,
            teacher,
            stages,
            source,
            out=tmp_path,
            seed=1,
            layers=layers,
            progress=poison,
        )
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["step-00000004"]
    _, log = run(tmp_path, stages)
    assert len(log.records) == 9


def test_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    import morph.distill._states as states

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fill(event):
        if event.kind == "step" and event.tokens == 24 * 5:
            monkeypatch.setattr(states, "save_file", full)

    with pytest.raises(StorageError, match="No space left on device.*intact"):
        run(tmp_path, progress=fill)
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["step-00000004"]


WRONG = {
    "tokens": 0,
    "seq_len": 1,
    "batch_size": 0,
    "chunk_tokens": 0,
    "temperature": 0.0,
    "needles": 1.5,
    "warmup_fraction": -0.1,
    "clip": 0.0,
    "save_every": 0,
    "lr": float("nan"),
}


@pytest.mark.parametrize("key", WRONG)
def test_impossible_settings_name_their_place(key, tmp_path):
    with pytest.raises(RecipeError, match=rf"distill\[1\]\.{key}: "):
        run(tmp_path, [stage(), stage(**{key: WRONG[key]})])
    assert list(tmp_path.iterdir()) == []


def feed(ids):
    class One:
        def batch(self, step):
            return ids

    return lambda index, chosen: One()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.full((2, 12), 61), "token 61 is outside the vocabulary"),
        (torch.full((2, 12), -1), "token -1 is outside"),
        (torch.zeros(2, 11, dtype=torch.long), "the stage asks for"),
        (torch.zeros(12, dtype=torch.long), "the stage asks for"),
    ],
    ids=["vocabulary", "negative", "short", "flat"],
)
def test_wrong_batches_are_refused_before_anything_is_written(ids, says, tmp_path):
    with pytest.raises(DataError, match=says):
        run(tmp_path, batches=feed(ids))
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    teacher = make_teacher()
    student, layers = make_student(teacher)
    other = make_teacher(LlamaConfig(**{**SHAPE, "vocab_size": 60}))
    source, rest = text_batches(TEXT, seed=5), {"out": tmp_path, "seed": 1, "layers": layers}
    with pytest.raises(MismatchError, match="vocab_size is 61 in the student and 60"):
        distill(student, other, ALL_STAGES, source, **rest)
    with pytest.raises(UsageError, match="one object"):
        distill(teacher, teacher, ALL_STAGES, source, **rest)
    wide = make_teacher(LlamaConfig(**{**SHAPE, "intermediate_size": 50}))
    with pytest.raises(MismatchError, match="gate_proj.*in the teacher"):
        distill(student, wide, ALL_STAGES, source, **rest)


def test_float16_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="float16"):
        run(tmp_path, teacher=make_teacher(dtype=torch.float16))


def test_needles_without_a_source_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"distill\[0\]\.needles"):
        run(tmp_path, [stage(loss="long", needles=0.5)])
