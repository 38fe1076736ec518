"""Calibration: mixers start from what the source computes, and the source is left alone."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from morph import modeling, registry, surgery
from morph.mixers._base import MixerBase
from morph.mixers._hybrid import Fusion
from morph.plan import HeadGroup, LayerPlan, Plan, full_plan, uniform_plan
from morph.testing import assert_close, exactly, tiny_model

CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoint"
ADAPT = [
    name
    for name in registry.names("mixers")
    if registry.load("mixers", name).Mixer.calibrate is not MixerBase.calibrate
]


# Else nothing is left out of 128 tokens
SMALLER = {
    "hola": {"cache": 0, "block": 1},
    "dash": {"block": 8, "sparsity": 0.5},
    "shared_routing": {"k": 24, "index_dim": 32},
}


@cache
def source():
    """The small trained checkpoint and some of its text, [4, 128]."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    text = (CHECKPOINT.parent / "data" / "sherlock_holmes.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)(text[:6000])["input_ids"]
    return model, torch.tensor(ids[: 4 * 128]).view(4, 128)


def plan_for(model, groups, fusion="none"):
    """The groups in layers 2 and 3 of the checkpoint."""
    whole = full_plan("qwen3", surgery.geometry_of(model))
    layer = LayerPlan(groups=groups, fusion=fusion)
    layers = tuple(layer if i in (2, 3) else x for i, x in enumerate(whole.layers))
    return surgery.resolve_costs(Plan(model_type="qwen3", geometry=whole.geometry, layers=layers))


@pytest.mark.parametrize("name", ADAPT)
def test_calibrated_layers_come_nearer_to_the_source(name: str) -> None:
    model, ids = source()
    options = SMALLER.get(name, {})
    group = HeadGroup(mixer=name, heads=tuple(range(8)), options=options)
    hybrid = modeling.hybrid(model, plan_for(model, (group,)))
    before = surgery.output_errors(hybrid, model, ids)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = surgery.calibrate(hybrid, model, ids)
    after = surgery.output_errors(hybrid, model, ids)
    assert set(found) == {2, 3}
    for i in found:
        assert found[i].before == pytest.approx(before[i])
        assert found[i].after == pytest.approx(after[i])
        if registry.load("mixers", name).Mixer.settings:  # what an option asks for, near or not
            assert after[i] != before[i]
            continue
        assert after[i] <= before[i]
        if name != "parallel":  # attention is there already, and the branch is silent
            assert after[i] < 0.8 * before[i]
    for n, p in model.named_parameters():
        exactly(n, kept[n], p)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for _, p in surgery.mixer_parameters(hybrid):
        assert torch.isfinite(p).all()


@pytest.mark.parametrize("name", ADAPT)
def test_calibration_is_the_same_every_time_and_per_group(name: str) -> None:
    model, ids = source()
    groups = (
        HeadGroup(mixer=name, heads=(0, 1, 5)),
        HeadGroup(mixer="full", heads=(2, 3, 4, 6, 7)),
    )
    states = []
    for _ in range(2):
        hybrid = modeling.hybrid(model, plan_for(model, groups))
        surgery.calibrate(hybrid, model, ids[:2])
        states.append(dict(surgery.mixer_parameters(hybrid)))
    for key, value in states[0].items():
        exactly(key, value, states[1][key])


def test_fusion_gains_start_at_the_heads_mean_size() -> None:
    fusion = Fusion(3, 1e-6)
    sizes = torch.tensor([0.5, 1.0, 4.0])
    x = torch.randn(2, 5, 3, 8)
    heads = x / x.square().mean(-1, keepdim=True).sqrt() * sizes[:, None]
    fusion.calibrate([heads])
    assert_close("gain", sizes, fusion.gain)
    # where a head's size does not change from token to token, fusing changes nothing
    assert_close("fused", heads, fusion(heads), ratio=1e-4)


def test_fused_full_heads_stay_near_the_source() -> None:
    """HydraHead's norm forgets how large a head was at each token, and nothing else."""
    model, ids = source()
    groups = (
        HeadGroup(mixer="sliding", heads=(0, 1, 2, 3), options={"window": 128}),
        HeadGroup(mixer="full", heads=(4, 5, 6, 7)),
    )
    plain = modeling.hybrid(model, plan_for(model, groups))
    assert max(surgery.output_errors(plain, model, ids).values()) < 1e-9
    fused = modeling.hybrid(model, plan_for(model, groups, fusion="scale"))
    found = surgery.calibrate(fused, model, ids)
    for start in found.values():
        assert start.after < 0.2 and start.after < start.before
    names = [n for n, _ in surgery.mixer_parameters(fused)]
    assert [n for n in names if n.endswith("fusion.gain")]
    assert sorted(names) == sorted(
        surgery.own_parameter_names(
            surgery.family_of(model.config.to_dict()), modeling.plan_of(fused.config)
        )
    )


def test_a_plan_of_full_heads_is_the_source_whatever_its_fusion() -> None:
    model, ids = source()
    group = HeadGroup(mixer="full", heads=tuple(range(8)))
    hybrid = modeling.hybrid(model, plan_for(model, (group,), fusion="scale"))
    with torch.no_grad():
        exactly("logits", model(ids).logits, hybrid(ids).logits)


def test_bfloat16_and_fused_projections_calibrate_too() -> None:
    for family in ("phi3", "olmo2"):
        model = tiny_model(family).to(torch.bfloat16)
        shape = surgery.geometry_of(model)
        plan = surgery.resolve_costs(uniform_plan(family, shape, [0], "gated_delta", {}, None))
        hybrid = modeling.hybrid(model, plan)
        before = copy.deepcopy(dict(surgery.mixer_parameters(hybrid)))
        surgery.calibrate(hybrid, model, torch.randint(3, 60, (2, 40)))
        moved = [n for n, p in surgery.mixer_parameters(hybrid) if not torch.equal(p, before[n])]
        assert any("norm_weight" in n for n in moved)
        assert all(torch.isfinite(p).all() for _, p in surgery.mixer_parameters(hybrid))
