"""Laws of converted models, over every family: identity, caches, padding, beams, save and load."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import morph
from morph import modeling, registry, surgery
from morph.cache import held_bytes
from morph.errors import CheckpointError, MismatchError, PlanError, UnknownName
from morph.plan import HeadGroup, LayerPlan, Plan, full_plan, uniform_plan
from morph.testing import tiny_model

FAMILIES = registry.names("families")
WINDOW = 6
GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": 12}


def plan_for(model, kind):
    """A plan over the candidate layers: sliding, sinks, decay, or mixed heads, one layer full."""
    family = surgery.family_of(model.config.to_dict())
    shape = surgery.geometry_of(model, family)
    heads = tuple(range(shape.num_attention_heads))
    full = LayerPlan(groups=(HeadGroup(mixer="full", heads=heads),))
    half = heads[: len(heads) // 2], heads[len(heads) // 2 :]
    window = {"window": WINDOW}
    choices = {
        "sliding": (HeadGroup(mixer="sliding", heads=heads, options=window),),
        "sinks": (HeadGroup(mixer="sliding", heads=heads, options={**window, "num_sinks": 2}),),
        "bias": (HeadGroup(mixer="sliding", heads=heads, options={**window, "sink_bias": True}),),
        "decay": (HeadGroup(mixer="decay", heads=heads),),
        "heads": (
            HeadGroup(mixer="full", heads=half[1]),
            HeadGroup(mixer="sliding", heads=half[0], options=window),
        ),
    }
    swapped = LayerPlan(groups=choices[kind])
    layers = [full] * shape.num_hidden_layers
    for i in shape.candidates[1:] or shape.candidates:
        layers[i] = swapped
    return surgery.resolve_costs(
        Plan(model_type=family.model_type, geometry=shape, layers=tuple(layers))
    )


def ids_for(model, rows=2, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(request.param)


@torch.no_grad()
def test_identity_plan_leaves_logits_equal(model):
    ids = ids_for(model)
    plan = full_plan(
        surgery.family_of(model.config.to_dict()).model_type, surgery.geometry_of(model)
    )
    assert torch.equal(modeling.hybrid(model, plan)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_window_as_long_as_the_text_equals_the_source(model):
    ids = ids_for(model)
    family = surgery.family_of(model.config.to_dict())
    plan = uniform_plan(
        family.model_type, surgery.geometry_of(model), [], "sliding", {"window": 24}, None
    )
    torch.testing.assert_close(
        modeling.hybrid(model, plan)(ids).logits, model(ids).logits, atol=2e-5, rtol=2e-5
    )


@torch.no_grad()
def test_a_hybrid_shares_the_source_and_leaves_it_alone(model):
    ids = ids_for(model)
    before = model(ids).logits
    hybrid = modeling.hybrid(model, plan_for(model, "sliding"))
    mine = dict(hybrid.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert mine[name] is parameter, name
    assert not torch.equal(hybrid(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_graft_and_undo_leave_the_model_as_it_was(model):
    ids = ids_for(model)
    family = surgery.family_of(model.config.to_dict())
    plan = plan_for(model, "heads")
    before, modules = model(ids).logits, list(model.modules())
    done = surgery.graft(model, family, plan)
    assert set(surgery.hybrid_layers(model)) == set(plan.replaced_layers)
    grafted = model(ids).logits
    done.undo()
    torch.testing.assert_close(grafted, modeling.hybrid(model, plan)(ids).logits)
    assert torch.equal(model(ids).logits, before)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert not surgery.base_of(model)._forward_pre_hooks


@pytest.mark.parametrize("kind", ["sliding", "sinks", "bias", "decay", "heads"])
@torch.no_grad()
def test_generation_with_cache_equals_without(model, kind):
    hybrid = modeling.hybrid(model, plan_for(model, kind))
    ids = ids_for(model, length=15)
    cached = hybrid.generate(ids, max_new_tokens=12, use_cache=True, **GENERATE)
    plain = hybrid.generate(ids, max_new_tokens=12, use_cache=False, **GENERATE)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", ["sinks", "decay", "heads"])
@torch.no_grad()
def test_left_padded_batch_equals_each_row_alone(model, kind):
    hybrid = modeling.hybrid(model, plan_for(model, kind))
    rows = [ids_for(model, 1, n, seed=n) for n in (9, 14)]
    padded = torch.zeros(2, 14, dtype=torch.long)
    mask = torch.zeros(2, 14, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 14 - row.shape[1] :] = row
        mask[i, 14 - row.shape[1] :] = 1
    batch = hybrid.generate(padded, attention_mask=mask, max_new_tokens=12, **GENERATE)
    for i, row in enumerate(rows):
        alone = hybrid.generate(row, max_new_tokens=12, **GENERATE)
        assert torch.equal(batch[i, 14 - row.shape[1] :], alone[0])


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_static_cache_requests_give_the_same_tokens(model, padded):
    hybrid = modeling.hybrid(model, plan_for(model, "heads"))
    ids = ids_for(model, length=15)
    mask = torch.ones_like(ids)
    mask[0, : 5 * padded] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, **GENERATE}
    static = hybrid.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, hybrid.generate(ids, **options))


@torch.no_grad()
def test_masks_that_mixers_cannot_honour_are_refused(model):
    hybrid = modeling.hybrid(model, plan_for(model, "heads"))
    ids = ids_for(model, 1, 8)
    causal = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(
        hybrid(ids, attention_mask=causal, use_cache=False).logits,
        hybrid(ids, use_cache=False).logits,
    )
    causal[:, :, 5, 2] = False
    with pytest.raises(MismatchError, match="not causal"):
        hybrid(ids, attention_mask=causal, use_cache=False)


@pytest.mark.parametrize("kind", ["heads", "decay"])
@torch.no_grad()
def test_beams_and_sampling_with_cache_equal_without(model, kind):
    hybrid = modeling.hybrid(model, plan_for(model, kind))
    ids = ids_for(model, length=12)
    beams = {"num_beams": 3, "max_new_tokens": 12, **GENERATE}
    assert torch.equal(
        hybrid.generate(ids, use_cache=True, **beams),
        hybrid.generate(ids, use_cache=False, **beams),
    )
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        sampled.append(
            hybrid.generate(
                ids, use_cache=use_cache, max_new_tokens=12, **{**GENERATE, "do_sample": True}
            )
        )
    assert torch.equal(*sampled)


@pytest.mark.parametrize("kind", ["sliding", "sinks", "decay", "heads"])
@torch.no_grad()
def test_chunked_prefill_and_held_bytes(model, kind):
    hybrid = modeling.hybrid(model, plan_for(model, kind))
    ids = ids_for(model, length=23)
    whole = hybrid(ids, use_cache=True)
    first = hybrid(ids[:, :9], use_cache=True)
    rest = hybrid(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole.logits[:, 9:], atol=3e-5, rtol=3e-5)
    plan = modeling.plan_of(hybrid.config)
    held = held_bytes(whole.past_key_values)
    # transformers' own sliding layers keep one token less than the window
    spare = (
        sum(
            2 * min(w, 23) - 2 * min(w - 1, 23)
            for w, layer in zip(plan.geometry.windows, plan.layers)
            if w is not None and layer.is_full
        )
        * plan.geometry.entry_elements()
        * plan.geometry.num_key_value_heads
        * 4
    )
    assert held == 2 * plan.cache_bytes(23, "float32") - spare
    assert held == held_bytes(rest.past_key_values)


@torch.no_grad()
def test_save_and_load_with_auto_classes(model, tmp_path):
    hybrid = modeling.hybrid(model, plan_for(model, "decay"))
    ids = ids_for(model)
    hybrid.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(hybrid)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(ids).logits, hybrid(ids).logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert set(surgery.hybrid_layers(base)) == set(surgery.hybrid_layers(hybrid))


@torch.no_grad()
def test_parameters_missing_from_a_checkpoint_get_their_start_values(model, tmp_path):
    """The loader hands out uninitialised memory for missing tensors; mixers must fill theirs."""
    hybrid = modeling.hybrid(model, plan_for(model, "decay"))
    model.save_pretrained(tmp_path)
    loaded = type(hybrid).from_pretrained(tmp_path, config=copy.deepcopy(hybrid.config))
    mine = dict(surgery.mixer_parameters(hybrid))
    found = dict(surgery.mixer_parameters(loaded))
    assert found.keys() == mine.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, mine[name]), name


@torch.no_grad()
def test_gradients_reach_every_projection(model):
    hybrid = modeling.hybrid(model, plan_for(model, "heads"))
    with torch.enable_grad():
        hybrid(ids_for(model), use_cache=False).logits.square().mean().backward()
    for layer in surgery.hybrid_layers(hybrid).values():
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    model.zero_grad()


def test_stock_transformers_refuses_a_package_checkpoint_by_name(tmp_path):
    import subprocess
    import sys

    hybrid = modeling.hybrid(tiny_model("llama"), plan_for(tiny_model("llama"), "decay"))
    hybrid.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        "assert 'morph' not in sys.modules\n"
        f"A.from_pretrained({str(tmp_path)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "morph_llama" in done.stderr


def test_a_config_without_a_plan_is_refused():
    config = modeling.classes("llama")[0](num_hidden_layers=1, hidden_size=8)
    with pytest.raises(CheckpointError, match=r"morph\.plan"):
        modeling.classes("llama")[2](config)


@pytest.mark.parametrize(
    ("groups", "error", "says"),
    [
        ([{"mixer": "slidng", "heads": range(6)}], UnknownName, "sliding"),
        (
            [{"mixer": "sliding", "heads": range(6), "options": {"windw": 3}}],
            PlanError,
            "window",
        ),
        ([{"mixer": "sliding", "heads": range(7)}], PlanError, "head 6 does not exist"),
        ([{"mixer": "sliding", "heads": range(5)}], PlanError, "exactly one group"),
    ],
)
def test_wrong_plans_are_refused_by_name(groups, error, says):
    model = tiny_model("llama")
    shape = surgery.geometry_of(model)
    with pytest.raises(error, match=says):
        layer = LayerPlan(
            groups=tuple(HeadGroup(**{**g, "heads": tuple(g["heads"])}) for g in groups)
        )
        plan = Plan(model_type="llama", geometry=shape, layers=(layer,) * shape.num_hidden_layers)
        modeling.hybrid(model, plan)


def test_a_plan_for_another_shape_is_refused():
    small = tiny_model("llama")
    other = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(MismatchError, match="plan was made for"):
        surgery.graft(other, surgery.family_of(other.config.to_dict()), plan_for(small, "sliding"))


def test_importing_morph_registers_by_name():
    assert morph.__version__
    config_class = modeling.classes("qwen3")[0]
    assert config_class.model_type == "morph_qwen3"
    assert modeling.MorphQwen3ForCausalLM is modeling.classes("qwen3")[2]
