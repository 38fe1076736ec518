"""Low-rank updates: what trains, what stays, and that merging is exact."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from morph import modeling, registry, surgery
from morph.distill._lora import Lora
from morph.errors import UnsupportedModel, UsageError
from morph.plan import uniform_plan
from morph.testing import error_ratio, exactly, tiny_model

MODELS = ("llama", "qwen3", "phi3", "qwen2")  # plain; q/k norms; one fused projection; biases
RANK, ALPHA = 3, 5.0
IDS = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))


def pair(model_type: str, dtype: torch.dtype = torch.float32, mixer: str = "gated_delta"):
    """A source, its hybrid, and the paths of the converted attention modules."""
    source = tiny_model(model_type).to(dtype)
    plan = uniform_plan(model_type, surgery.geometry_of(source), [1], mixer, {}, None)
    student = modeling.hybrid(source, plan)
    for p in student.parameters():
        p.requires_grad_(False)
    converted = {id(m) for m in surgery.hybrid_layers(student).values()}
    assert converted
    return source, student, [n for n, m in student.named_modules() if id(m) in converted]


def lora(student: nn.Module, paths: list[str], seed: int = 7) -> Lora:
    return Lora(student, paths, rank=RANK, alpha=ALPHA, seed=seed)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def train(student: nn.Module, lora: Lora, steps: int = 3) -> None:
    """Move A and B, far enough that every weight is another one afterwards."""
    parameters = [student.get_parameter(n) for n in lora.names]
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    for _ in range(steps):
        student(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    after = state_of(model)
    assert {n: i for n, (i, _) in after.items()} == {n: i for n, (i, _) in before.items()}
    for name, (_, tensor) in before.items():
        exactly(name, bits(tensor), bits(after[name][1]))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def oracle(student: nn.Module, lora: Lora) -> dict[str, np.ndarray]:
    """The merged weights in float64, from the parameters by name."""
    found = {n: student.get_parameter(n).detach() for n in lora.names}
    out = {}
    for name in [n for n in found if ".lora_A." in n]:
        stem = name.partition(".lora_A.")[0]
        down, up = found[name], found[name.replace(".lora_A.", ".lora_B.")]
        weight = student.get_parameter(f"{stem}.base_layer.weight").detach().double().numpy()
        update = np.einsum("or,ri->oi", up.double().numpy(), down.double().numpy())
        out[f"{stem}.weight"] = weight + ALPHA / RANK * update
    return out


def nearest(exact: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to a 16-bit dtype by trying neighbours; ties to even."""
    first = torch.from_numpy(exact).to(dtype)
    tries = torch.stack([(first.view(torch.int16) + d).view(dtype) for d in (-1, 0, 1)])
    gaps = (tries.double() - torch.from_numpy(exact)).abs()
    odd = (tries.view(torch.int16) & 1).double()
    best = torch.where(gaps == gaps.min(dim=0).values, odd, 2.0).argmin(dim=0)
    return tries.gather(0, best[None])[0]


# --- while it trains ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_nothing_changes_at_the_start(model_type):
    _, student, paths = pair(model_type)
    before = logits(student)
    lora(student, paths)
    exactly("logits", before, logits(student))


@pytest.mark.parametrize("model_type", MODELS)
def test_targets_are_the_projections_of_converted_layers(model_type):
    _, student, paths = pair(model_type)
    low = lora(student, paths)
    inner = ["qkv_proj"] if model_type == "phi3" else ["q_proj", "k_proj", "v_proj"]
    wanted = [
        f"{path}.{leaf}.lora_{ab}.default.weight"
        for path in paths
        for leaf in (*inner, "o_proj")
        for ab in "AB"
    ]
    assert sorted(low.names) == sorted(wanted)
    assert sorted(n for n, p in student.named_parameters() if p.requires_grad) == sorted(wanted)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_parameter_is_found_under_its_name_of_the_moment(model_type):
    _, student, paths = pair(model_type)
    before = dict(student.named_parameters())
    low = lora(student, paths)
    during = dict(student.named_parameters())
    assert all(during[low.wrapped(n)] is p for n, p in before.items())
    assert during.keys() == {low.wrapped(n) for n in before} | {*low.names}
    low.remove()
    assert all(low.wrapped(n) == n for n in before)


def test_only_low_rank_parameters_get_gradients():
    source, student, paths = pair("qwen2")
    low = lora(student, paths)
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    assert sorted(n for n, p in student.named_parameters() if p.grad is not None) == sorted(
        low.names
    )
    assert all(p.grad is None for p in source.parameters())


def test_own_parameters_of_mixers_can_train_beside_it():
    _, student, paths = pair("llama")
    low = lora(student, paths)
    own = dict(surgery.mixer_parameters(student))
    assert own
    for p in own.values():
        p.requires_grad_(True)
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    assert {n for n, p in student.named_parameters() if p.grad is not None} == {*own, *low.names}


def test_start_depends_on_the_seed_alone():
    starts = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        _, student, paths = pair("llama")
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        low = lora(student, paths, seed)
        exactly("random state", state, torch.get_rng_state())
        starts.append([student.get_parameter(n).detach().clone() for n in low.names])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    downs = starts[0][::2]
    assert len({tuple(a.flatten().tolist()) for a in downs}) == len(downs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_updates_are_float32_or_better(dtype):
    _, student, paths = pair("llama", dtype)
    low = lora(student, paths)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {student.get_parameter(n).dtype for n in low.names} == {wanted}
    train(student, low)
    assert logits(student).dtype == dtype


def test_eval_mode_is_kept():
    _, student, paths = pair("llama")
    lora(student, paths)
    assert not any(m.training for m in student.modules())


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_merged_model_computes_the_same(model_type):
    source, student, paths = pair(model_type)
    before, teacher = logits(student), state_of(source)
    low = lora(student, paths)
    train(student, low)
    trained, exact = logits(student), oracle(student, low)
    merged = low.merge()
    assert merged.keys() == exact.keys()
    for name, weight in merged.items():
        exactly(name, torch.from_numpy(exact[name]).float(), weight)
        assert not weight.requires_grad
        assert not torch.equal(weight, student.get_parameter(name))
    exactly("logits without the updates", before, logits(student))
    for name, weight in merged.items():
        path, _, leaf = name.rpartition(".")
        student.get_submodule(path)._parameters[leaf] = nn.Parameter(weight)
    assert error_ratio(trained, logits(student)) < 1e-5
    assert error_ratio(trained, before) > 1e-2  # the updates did something
    assert_untouched(source, teacher)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_merging_bfloat16_rounds_once(model_type):
    source, student, paths = pair(model_type, torch.bfloat16)
    teacher = state_of(source)
    low = lora(student, paths)
    train(student, low)
    exact = oracle(student, low)
    for name, weight in low.merge().items():
        exactly(name, nearest(exact[name], torch.bfloat16), weight)
    assert_untouched(source, teacher)


def test_merging_just_above_a_tie_rounds_up():
    """The sum is within half a float32 step of a bfloat16 tie: rounded twice it falls down."""
    _, student, paths = pair("llama", torch.bfloat16)
    stem = f"{paths[0]}.q_proj"
    with torch.no_grad():
        student.get_parameter(f"{stem}.weight").fill_(1.0)
        low = Lora(student, paths, rank=2, alpha=2.0, seed=0)
        down, up = (student.get_parameter(f"{stem}.lora_{x}.default.weight") for x in "AB")
        down[0], down[1] = 2.0**-8, 2.0**-20
        up[:, 0], up[:, 1] = 1.0, 2.0**-20
        up[0, 1] = -(2.0**-20)
        up[1, 1] = 0.0
    rows = low.merge()[f"{stem}.weight"][:, 0].tolist()
    assert rows == [1.0, 1.0, *[1.0 + 2.0**-7] * (len(rows) - 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_updates_merge_to_the_same_bits(dtype):
    _, student, paths = pair("llama", dtype)
    name = f"{paths[0]}.q_proj.weight"
    with torch.no_grad():
        student.get_parameter(name)[0] = -0.0
    before = {n: p.clone() for n, p in student.named_parameters()}
    for n, weight in lora(student, paths).merge().items():
        exactly(n, bits(before[n]), bits(weight))


@pytest.mark.parametrize("end", ["merge", "remove"])
def test_nothing_of_peft_is_left(end):
    source, student, paths = pair("qwen2")
    modules, tensors = dict(student.named_modules()), state_of(student)
    keys, teacher = list(student.state_dict()), state_of(source)
    attributes = {n: set(vars(m)) for n, m in modules.items()}
    flags = {
        n: p.requires_grad_("o_proj" in n).requires_grad for n, p in student.named_parameters()
    }
    low = lora(student, paths)
    assert [n for n, p in student.named_parameters() if p.requires_grad and "lora_" not in n] == [
        n for n, on in flags.items() if on and not n.startswith(tuple(paths))
    ]
    train(student, low)
    getattr(low, end)()
    low.remove()
    after = dict(student.named_modules())
    assert list(after) == list(modules)
    assert all(after[n] is m for n, m in modules.items())
    assert {n: set(vars(m)) for n, m in after.items()} == attributes
    assert {n: p.requires_grad for n, p in student.named_parameters()} == flags
    assert list(student.state_dict()) == keys
    assert_untouched(student, tensors)
    assert_untouched(source, teacher)


def test_a_second_stage_starts_afresh():
    _, student, paths = pair("llama")
    before = logits(student)
    first = lora(student, paths)
    start = [student.get_parameter(n).detach().clone() for n in first.names]
    train(student, first)
    first.remove()
    second = lora(student, paths)
    for name, value in zip(second.names, start, strict=True):
        exactly(name, value, student.get_parameter(name).detach())
    exactly("logits", before, logits(student))


# --- what there is to do, and what cannot be done -----------------------------------------------


@pytest.mark.parametrize("model_type", registry.names("families"))
def test_every_family_has_its_projections(model_type):
    _, student, paths = pair(model_type, mixer="sliding")
    low = lora(student, paths)
    family = registry.load("families", model_type).FAMILY
    assert len(low.names) == len(paths) * (4 if family.qkv else 8)
    assert low.merge().keys() <= student.state_dict().keys()


def test_source_attention_works_too():
    source = tiny_model("phi3")
    names = lora(source, ["model.layers.0.self_attn"]).names
    assert [n.split(".")[4] for n in names] == ["qkv_proj", "qkv_proj", "o_proj", "o_proj"]


def test_no_layers_is_nothing_to_do():
    _, student, _ = pair("llama")
    low = lora(student, [])
    assert low.names == [] and low.merge() == {}


def test_without_peft_it_says_how_to_install(monkeypatch):
    _, student, paths = pair("llama")
    before = dict(student.named_modules())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'morph-hybrid\[peft\]'"):
        lora(student, paths)
    assert all(m is before[n] for n, m in student.named_modules())


def test_a_projection_that_does_more_than_multiply_is_refused():
    class Packed(nn.Linear):
        pass

    _, student, paths = pair("llama")
    attention = student.get_submodule(paths[-1])
    attention.v_proj = Packed(attention.v_proj.in_features, attention.v_proj.out_features)
    before = dict(student.named_modules())
    with pytest.raises(UnsupportedModel, match=r"v_proj is a Packed.*train: new"):
        lora(student, paths)
    assert all(m is before[n] for n, m in student.named_modules())
