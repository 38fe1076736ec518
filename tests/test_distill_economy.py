"""What distillation does not compute twice, and what it keeps: results are the same to the bit."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch
from torch.nn import functional as F

from morph import modeling, registry, surgery
from morph.distill import (
    Batch,
    Candidates,
    Head,
    distill,
    head_cross_entropy,
    head_kl,
    text_batches,
)
from morph.errors import (
    Interrupted,
    MismatchError,
    StorageError,
    TrainingError,
    UnsupportedModel,
    UsageError,
    VerificationFailed,
)
from morph.plan import uniform_plan
from morph.recipes.schema import Stage, Training
from morph.testing import tiny_model

FAMILIES = registry.names("families")
TEXT = torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(3))


def stage(**changes) -> Stage:
    base = {"tokens": 4 * 48, "seq_len": 24, "batch_size": 2, "save_every": 4, "chunk_tokens": 7}
    return Stage(**{"loss": "logits", "lr": 3e-3, **base, **changes})


def pair(family="llama", layers=4, keep=(0, 1), mixer="decay", options=None, **config):
    """A teacher, and its student that keeps the layers `keep`."""
    teacher = tiny_model(family, num_hidden_layers=layers, **config).eval()
    known = surgery.family_of(teacher.config.to_dict())
    geometry = surgery.geometry_of(teacher)
    kept = [i for i in keep if i in geometry.candidates]
    plan = uniform_plan(known.model_type, geometry, kept, mixer, options or {}, None)
    return teacher, modeling.hybrid(teacher, plan)


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trained(out, stages, made=None, **changes):
    teacher, student = made or pair()
    options = {"out": out, "seed": 1, **changes}
    source = options.pop("batches", text_batches(TEXT, seed=5))
    log = distill(student, teacher, stages, source, **options)
    return student, log


def count_forwards(modules):
    calls = [0] * len(modules)

    def counter(i):
        def after(*_):
            calls[i] += 1

        return after

    for i, module in enumerate(modules):
        module.register_forward_hook(counter(i))
    return calls


# --- layers below the first that differs --------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_lower_layers_change_nothing(family, tmp_path, monkeypatch):
    from morph.distill import _trainee

    made = pair(family, keep=(0, 1))
    shared, log = trained(tmp_path / "a", [stage()], made)
    monkeypatch.setattr(_trainee.Trainee, "_depth", lambda self: 0)
    plain, other = trained(tmp_path / "b", [stage()], pair(family, keep=(0, 1)))
    assert [r["loss"] for r in log.records] == [r["loss"] for r in other.records]
    assert log.losses(0)[0] > 0
    a, b = weights(shared), weights(plain)
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_shared_lower_layers_are_computed_once(tmp_path):
    teacher, student = pair(keep=(0, 1))
    mine = count_forwards(student.model.layers)
    theirs = count_forwards(teacher.model.layers)
    trained(tmp_path, [stage()], (teacher, student))
    assert mine == [0, 0, 4, 4]
    assert theirs == [6, 6, 6, 6]  # 4 steps, and the head compared twice


def test_nothing_is_shared_where_everything_trains(tmp_path):
    teacher, student = pair(keep=(0, 1))
    mine = count_forwards(student.model.layers)
    trained(tmp_path, [stage(train="all", lr=1e-4)], (teacher, student))
    assert mine == [4, 4, 4, 4]


def test_align_computes_nothing_above_the_last_converted_layer(tmp_path):
    teacher, student = pair(layers=5, keep=(0, 3, 4))
    theirs = count_forwards(teacher.model.layers)
    trained(tmp_path, [stage(loss="align")], (teacher, student))
    assert theirs == [4, 4, 0, 0, 0]  # of layer 2 the attention only


# --- recomputing activations ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["mlp", "layer"])
def test_recomputing_gives_the_same_bits(what, tmp_path):
    stages = [stage(), stage(loss="long")]
    plain, log = trained(tmp_path / "a", stages)
    saved, other = trained(tmp_path / "b", [dataclasses.replace(s, recompute=what) for s in stages])
    assert log.losses(0) == other.losses(0) and log.losses(1) == other.losses(1)
    a, b = weights(plain), weights(saved)
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_recomputing_runs_the_layers_again(tmp_path):
    teacher, student = pair(keep=(0, 1))
    mine = [0] * 4
    for i, layer in enumerate(student.model.layers):
        inner = layer.mlp.forward

        def counted(x, i=i, inner=inner):
            mine[i] += 1
            return inner(x)

        layer.mlp.forward = counted
    trained(tmp_path, [stage(recompute="layer")], (teacher, student))
    assert mine == [0, 0, 8, 8]


@pytest.mark.parametrize("loss", ["logits", "long"])
def test_micro_batches_give_the_same_step(loss, tmp_path):
    whole, log = trained(tmp_path / "a", [stage(loss=loss, batch_size=4, tokens=3 * 96)])
    parts, other = trained(
        tmp_path / "b", [stage(loss=loss, batch_size=4, tokens=3 * 96, micro_batch=3)]
    )
    assert log.losses(0) == pytest.approx(other.losses(0), rel=1e-5)
    a, b = weights(whole), weights(parts)
    assert max((a[n] - b[n]).abs().max().item() for n in a) < 1e-4


def test_micro_batches_of_align_are_regressions_of_their_own(tmp_path):
    one = stage(loss="align", batch_size=2, tokens=48, lr=0.0, gate_lr=0.0)
    ids = TEXT[:48].view(2, 24)
    _, log = trained(
        tmp_path / "a", [dataclasses.replace(one, micro_batch=1)], batches=lambda i, s: Given(ids)
    )
    single = dataclasses.replace(one, batch_size=1, tokens=24)
    alone = [
        trained(tmp_path / str(i), [single], batches=lambda _, s, i=i: Given(ids[i : i + 1]))[1]
        for i in range(2)
    ]
    assert log.losses(0)[0] == pytest.approx(sum(x.losses(0)[0] for x in alone) / 2, rel=1e-6)


# --- the teacher on disk -------------------------------------------------------------------------


def test_a_cached_teacher_is_exact_and_is_not_run(tmp_path):
    kept = Training(teacher_cache=str(tmp_path / "cache"))
    plain, log = trained(tmp_path / "a", [stage()])
    first, _ = trained(tmp_path / "b", [stage()], training=kept)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 4
    teacher, student = pair()
    theirs = count_forwards(teacher.model.layers)
    again, other = trained(tmp_path / "c", [stage()], (teacher, student), training=kept)
    assert max(theirs) == 2  # the head is compared, no batch is computed
    assert log.losses(0) == other.losses(0)
    for model in (first, again):
        a, b = weights(plain), weights(model)
        assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_a_damaged_cache_file_is_made_again(tmp_path):
    kept = Training(teacher_cache=str(tmp_path / "cache"))
    _, log = trained(tmp_path / "a", [stage()], training=kept)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    data = bytearray(files[0].read_bytes())
    data[-3] ^= 1
    files[0].write_bytes(data)
    files[1].write_bytes(b"no safetensors")
    _, other = trained(tmp_path / "b", [stage()], training=kept)
    assert log.losses(0) == other.losses(0)
    assert sum("is damaged" in note for note in other.notes) == 2
    _, third = trained(tmp_path / "c", [stage()], training=kept)
    assert third.notes == []


def test_another_teacher_finds_nothing_in_the_cache(tmp_path):
    kept = Training(teacher_cache=str(tmp_path / "cache"))
    trained(tmp_path / "a", [stage()], training=kept)
    teacher, _ = pair()
    with torch.no_grad():
        teacher.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-6  # one value of one tensor
    geometry = surgery.geometry_of(teacher)
    student = modeling.hybrid(teacher, uniform_plan("llama", geometry, [0, 1], "decay", {}, None))
    trained(tmp_path / "b", [stage()], (teacher, student), training=kept)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 8


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "cache").write_text("a file")
    kept = Training(teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(StorageError, match="teacher_cache"):
        trained(tmp_path / "a", [stage()], training=kept)


# --- several candidates for a layer --------------------------------------------------------------


def bank():
    """A teacher, and a student that has two candidates in every layer."""
    teacher, student = pair(keep=(), mixer="decay")
    _, other = pair(keep=(), mixer="gla")
    other = modeling.hybrid(
        teacher, uniform_plan("llama", surgery.geometry_of(teacher), [], "gla", {}, None)
    )
    layers = {}
    for i, layer in enumerate(student.model.layers):
        made = {"@decay": layer.self_attn, "@gla": other.model.layers[i].self_attn}
        layer.self_attn = layers[i] = Candidates(made)
    return teacher, student, layers


def test_candidates_aligned_together_are_those_aligned_alone(tmp_path):
    teacher, student, layers = bank()
    one = stage(loss="align", train="attention", tokens=6 * 48)
    log = distill(
        student, teacher, [one], text_batches(TEXT, seed=5), out=tmp_path / "a", seed=1,
        layers=layers,
    )  # fmt: skip
    assert set(log.records[0]["layers"]) == {f"{i}/{m}" for i in range(4) for m in ("decay", "gla")}
    for mixer in ("decay", "gla"):
        alone, single = trained(tmp_path / mixer, [one], pair(keep=(), mixer=mixer))
        for i in range(4):
            got = weights(layers[i][f"@{mixer}"])
            want = weights(alone.model.layers[i].self_attn)
            assert got.keys() == want.keys()
            assert [n for n in got if not torch.equal(got[n], want[n])] == []
        assert [r["layers"]["2"] for r in single.records] == [
            r["layers"][f"2/{mixer}"] for r in log.records
        ]


def test_candidates_resume_where_they_were(tmp_path):
    class Stop(Exception):
        pass

    def stop(event):
        if event.kind == "step" and event.step == 5:
            raise Stop

    one = stage(loss="align", tokens=8 * 48, save_every=2)
    results = []
    for name, progress in (("whole", None), ("cut", stop)):
        teacher, student, layers = bank()
        options = {"out": tmp_path / name, "seed": 1, "layers": layers}
        try:
            distill(
                student, teacher, [one], text_batches(TEXT, seed=5), progress=progress, **options
            )
        except Stop:
            teacher, student, layers = bank()
            options["layers"] = layers
            distill(student, teacher, [one], text_batches(TEXT, seed=5), **options)
        results.append(weights(student))
    a, b = results
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    assert (tmp_path / "whole/log.jsonl").read_bytes() == (tmp_path / "cut/log.jsonl").read_bytes()


def test_candidates_cannot_be_trained_end_to_end(tmp_path):
    teacher, student, layers = bank()
    with pytest.raises(UsageError, match="only be aligned"):
        distill(
            student, teacher, [stage()], text_batches(TEXT, seed=5), out=tmp_path, seed=1,
            layers=layers,
        )  # fmt: skip


# --- losses: direction, and a share of cross-entropy ---------------------------------------------


def rows(gap=0.5, dtype=torch.float64, softcap=None, scale=1.0, n=23):
    make = torch.Generator().manual_seed(7)
    weight = torch.randn(97, 16, generator=make, dtype=torch.float64).to(dtype)
    teacher = torch.randn(n, 16, generator=make, dtype=torch.float64)
    student = teacher + gap * torch.randn(n, 16, generator=make, dtype=torch.float64)
    targets = torch.randint(0, 97, (n,), generator=make)
    head = Head(weight=weight, scale=scale, softcap=softcap)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), targets, head


def error(got, want) -> float:
    return (torch.linalg.norm(got.double() - want) / torch.linalg.norm(want)).item()


def plain(student, teacher, targets, head, temperature=1.0, direction="forward", share=0.0):
    p = F.log_softmax(head.logits(teacher) / temperature, -1)
    q = F.log_softmax(head.logits(student) / temperature, -1)
    first, second = (p, q) if direction == "forward" else (q, p)
    kl = (first.exp() * (first - second)).sum(-1).mean() * temperature**2
    if not share:
        return kl
    return (1 - share) * kl + share * F.cross_entropy(head.logits(student), targets)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("gap", [1e-3, 0.5, 60.0])
def test_the_loss_equals_the_plain_way(gap, direction, temperature, share, softcap):
    student, teacher, targets, head = rows(gap, softcap=softcap, scale=0.7)
    want = plain(student, teacher, targets, head, temperature, direction, share)
    (slope,) = torch.autograd.grad(want, student)
    got = head_kl(
        student, teacher, head, temperature=temperature, direction=direction, targets=targets,
        cross_entropy=share, chunk_tokens=7,
    )  # fmt: skip
    (mine,) = torch.autograd.grad(got, student)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert error(mine, slope) <= 1e-8


@pytest.mark.parametrize("gap", [1e-3, 0.1, 0.5, 2.0])
def test_reverse_kl_in_float32_is_exact_to_1e_6(gap):
    student, teacher, _, head = rows(gap, dtype=torch.float32)
    wide = student.detach().double().requires_grad_()
    exact = Head(weight=head.weight.double())
    p = F.log_softmax(exact.logits(teacher.double()), -1)
    q = F.log_softmax(exact.logits(wide), -1)
    want = (q.exp() * (q - p)).sum(-1).mean()
    (slope,) = torch.autograd.grad(want, wide)
    (other,) = torch.autograd.grad(
        plain(student, teacher, None, head, direction="reverse"), student
    )
    got = head_kl(student, teacher, head, direction="reverse", chunk_tokens=7)
    (mine,) = torch.autograd.grad(got, student)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    # Far from the teacher the logits themselves are rounded by more than that, in any form
    bound = max(1e-6, 2 * error(other, slope)) if gap > 1 else 1e-6
    assert error(mine, slope) <= bound


def test_a_share_of_one_is_cross_entropy():
    student, teacher, targets, head = rows()
    got = head_kl(student, teacher, head, targets=targets, cross_entropy=1.0, chunk_tokens=5)
    assert got.item() == head_cross_entropy(student, targets, head, chunk_tokens=5).item()


@pytest.mark.parametrize("changes", [{"kl": "reverse"}, {"cross_entropy": 0.25}], ids=str)
def test_stages_take_their_loss_from_the_recipe(changes, tmp_path):
    teacher, student = pair()
    chosen = stage(tokens=48, **changes)
    ids = text_batches(TEXT, seed=5)(0, chosen).batch(0)
    with torch.no_grad():
        mine, theirs = student(input_ids=ids).logits, teacher(input_ids=ids).logits
    p, q = F.log_softmax(theirs, -1), F.log_softmax(mine, -1)
    if "kl" in changes:
        want = (q.exp() * (q - p)).sum(-1).mean()
    else:  # where cross-entropy counts, the last position has nothing to predict
        kl = (p.exp() * (p - q))[:, :-1].sum(-1).mean()
        want = 0.75 * kl + 0.25 * F.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    _, log = trained(tmp_path, [chosen], (teacher, student))
    assert log.losses(0)[0] == pytest.approx(want.item(), rel=1e-5)


# --- packed documents and padding ----------------------------------------------------------------


class Given:
    """One batch, whatever the step."""

    def __init__(self, found):
        self.found = found

    def batch(self, step):
        return self.found


class Packed(Given):
    """Two documents in the first row; one, and padding, in the second."""

    def __init__(self, ids):
        positions = torch.stack([torch.cat([torch.arange(9), torch.arange(15)])] * 2)
        real = torch.ones(2, 24, dtype=torch.bool)
        real[1, 9:] = False
        super().__init__(Batch(ids=ids, positions=positions, real=real))


def squares_of(teacher, document, layers) -> list[float]:
    """The sum of squares of what the teacher's attention gives in some layers."""
    found = []
    handles = [
        teacher.model.layers[i].self_attn.register_forward_hook(
            lambda m, args, output: found.append(output[0].square().sum().item())
        )
        for i in layers
    ]
    with torch.no_grad():
        teacher(input_ids=document[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("loss", ["align", "logits", "long"])
def test_packed_documents_count_as_if_each_stood_alone(loss, tmp_path):
    ids = TEXT[:48].view(2, 24)
    chosen = stage(loss=loss, tokens=48, lr=0.0, gate_lr=0.0)
    _, log = trained(tmp_path / "a", [chosen], batches=lambda i, s: Packed(ids))
    total = weight = torch.zeros(2, dtype=torch.float64)
    for n, document in enumerate((ids[0, :9], ids[0, 9:], ids[1, :9])):
        count = len(document)
        one = dataclasses.replace(chosen, tokens=count, seq_len=count, batch_size=1)
        given = Given(document[None])
        _, alone = trained(tmp_path / f"{n}", [one], batches=lambda i, s, a=given: a)
        if loss == "align":  # relative errors have the sizes of their targets for weights
            own = torch.tensor(squares_of(pair()[0], document, (2, 3)), dtype=torch.float64)
            found = torch.tensor([alone.records[0]["layers"][i] for i in "23"])
        else:
            own = torch.full((2,), float(count - (loss == "long")), dtype=torch.float64)
            found = torch.tensor([alone.losses(0)[0]] * 2)
        total, weight = total + found * own, weight + own
    assert log.losses(0)[0] == pytest.approx((total / weight).mean().item(), rel=1e-5)


def test_what_stands_in_the_padding_does_not_matter(tmp_path):
    ids = TEXT[:48].view(2, 24)
    other = ids.clone()
    other[1, 9:] = 7
    stages = [stage(loss=loss, tokens=48) for loss in ("align", "logits", "long")]
    runs = []
    for name, used in (("a", ids), ("b", other)):
        student, log = trained(tmp_path / name, stages, batches=lambda i, s, u=used: Packed(u))
        runs.append((weights(student), [r["loss"] for r in log.records]))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


# --- what a resumed or a watched run must not lose -----------------------------------------------


def test_a_text_that_changed_in_the_middle_is_refused(tmp_path):
    one = stage(tokens=20 * 48, save_every=2)
    made = {"seed": 1, "out": tmp_path}
    teacher, student = pair()

    class Stop(Exception):
        pass

    def stop(event):
        if event.kind == "step" and event.step == 3:
            raise Stop

    source = text_batches(TEXT, seed=5)
    with pytest.raises(Stop):
        distill(student, teacher, [one], source, text="as it was", progress=stop, **made)
    teacher, student = pair()
    with pytest.raises(MismatchError, match="text differs"):
        distill(student, teacher, [one], source, text="changed", **made)


def test_a_student_that_was_trained_already_is_not_resumed(tmp_path):
    teacher, student = pair()
    distill(student, teacher, [stage()], text_batches(TEXT, seed=5), out=tmp_path, seed=1)
    with pytest.raises(MismatchError, match="not as it was when that began"):
        distill(student, teacher, [stage()], text_batches(TEXT, seed=5), out=tmp_path, seed=1)


def test_a_rotation_that_remembers_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    made = pair(rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match="dynamic"):
        trained(tmp_path, [stage()], made)


def test_a_bad_gradient_is_named(tmp_path):
    teacher, student = pair()

    def spoil(p):
        p.grad[0] = float("nan")

    own = dict(student.named_parameters())
    name = next(n for n in own if "layers.3" in n and n.endswith("norm_weight"))
    handles = []

    def hook(event):  # after the first step the parameter is the student's own
        if event.kind == "step" and not handles:
            handles.append(student.get_parameter(name).register_post_accumulate_grad_hook(spoil))

    with pytest.raises(TrainingError, match=name.replace(".", r"\.")):
        trained(tmp_path, [stage(train="attention")], (teacher, student), progress=hook)


def test_ctrl_c_in_the_probe_that_ends_a_stage_loses_nothing(tmp_path):
    settings = Training(probe_every=2, recall_target=0.5)
    results = []
    for name in ("whole", "cut"):
        calls = []

        def probe(calls=calls, name=name):
            calls.append(1)
            if name == "cut" and len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return {"recall": 0.2 * len(calls), "teacher_recall": 0.8}

        stages = [stage(tokens=10 * 48), stage(loss="long")]
        options = {"training": settings, "probe": probe}
        try:
            student, log = trained(tmp_path / name, stages, **options)
        except Interrupted:
            student, log = trained(tmp_path / name, stages, **options)
        results.append((weights(student), log.remarks, log.path.read_bytes()))
    assert len(results[0][1]) == 2 and "ends after step 4 of 10" in results[0][1][0]
    assert results[0][1:] == results[1][1:]
    a, b = results[0][0], results[1][0]
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_a_probe_that_is_not_finite_ends_the_run_with_advice(tmp_path):
    def probe():
        raise VerificationFailed("the loss is nan")

    with pytest.raises(TrainingError, match=r"stage 0 \(logits\).*Lower lr"):
        trained(tmp_path, [stage()], training=Training(probe_every=2), probe=probe)


def test_the_cache_knows_a_teacher_by_its_weights_not_by_its_folder(tmp_path):
    kept = Training(teacher_cache=str(tmp_path / "cache"))
    for name in ("here", "there"):
        made = pair()
        made[0].config._name_or_path = name
        trained(tmp_path / name, [stage()], made, training=kept)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


def test_micro_batches_are_added_in_float32(tmp_path):
    """Sixteen gradients added in bfloat16 would differ by about a percent."""
    norms = []
    for name, rows in (("a", None), ("b", 1)):
        teacher, _ = pair()
        teacher.to(torch.bfloat16)
        plan = uniform_plan("llama", surgery.geometry_of(teacher), [0, 1], "decay", {}, None)
        one = stage(batch_size=16, micro_batch=rows, tokens=16 * 24)
        made = teacher, modeling.hybrid(teacher, plan)
        norms.append(trained(tmp_path / name, [one], made)[1].records[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)


def test_the_state_holds_no_teacher(tmp_path):
    student, _ = trained(tmp_path, [stage()])
    (state,) = sorted((tmp_path / "states").iterdir())
    told = json.loads((state / "state.json").read_text())
    assert told["settings"]["processes"] == 1
    size = (state / "tensors.safetensors").stat().st_size
    assert size < sum(p.nbytes for p in student.parameters())
