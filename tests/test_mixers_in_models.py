"""Laws of every mixer inside a whole model: a new file in morph/mixers is tested by existing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from morph import modeling, registry, strict, surgery
from morph.cache import held_bytes
from morph.errors import MorphError
from morph.plan import HeadGroup, LayerPlan, Plan
from morph.testing import assert_close, tiny_model

GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": 10}
# Settings small enough to bind within 40 tokens, where the defaults would not
SMALL = {"window": 6, "conv": 3, "cache": 6, "block": 5, "k": 6, "compressed": True}


def options_of(mixer: str) -> dict[str, object]:
    """The mixer's options, with windows and widths that bind in a short text."""
    known = {name for name, _, _ in registry.options("mixers", mixer)}
    options = {name: value for name, value in SMALL.items() if name in known}
    try:
        strict.build(registry.load("mixers", mixer).Options, options)
    except MorphError:
        return {}
    return options


def uniform(mixer: str, heads: int) -> tuple[HeadGroup, ...]:
    return (HeadGroup(mixer=mixer, heads=tuple(range(heads)), options=options_of(mixer)),)


def mixture(mixer: str, heads: int) -> tuple[HeadGroup, ...]:
    """The mixer on heads that cut through a KV group, windows and full attention on the others."""
    cut = tuple(range(1, heads, 2))
    rest = tuple(h for h in range(heads) if h not in cut)
    return (
        HeadGroup(mixer=mixer, heads=cut, options=options_of(mixer)),
        HeadGroup(mixer="sliding", heads=rest[:1], options={"window": 5}),
        HeadGroup(mixer="full", heads=rest[1:]),
    )


CASES = [(m, kind) for m in registry.names("mixers") if m != "full" for kind in ("all", "some")]
CASES.append(("gated_delta", "fused"))


@pytest.fixture(scope="module", params=CASES, ids=["-".join(c) for c in CASES])
def hybrid(request):
    """A tiny Llama with the mixer in its second and third layer, parameters off their starts."""
    mixer, kind = request.param
    model = tiny_model("llama")
    shape = surgery.geometry_of(model)
    heads = shape.num_attention_heads
    groups = uniform(mixer, heads) if kind == "all" else mixture(mixer, heads)
    swapped = LayerPlan(groups=groups, fusion="scale" if kind == "fused" else "none")
    full = LayerPlan(groups=(HeadGroup(mixer="full", heads=tuple(range(heads))),))
    plan = Plan(model_type="llama", geometry=shape, layers=(full, swapped, swapped, full))
    made = modeling.hybrid(model, plan)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in surgery.mixer_parameters(made):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made


def ids_for(model, rows=2, length=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def test_generation_with_cache_equals_without(hybrid):
    ids = ids_for(hybrid, length=15)
    for beams in (1, 3):
        how = {**GENERATE, "max_new_tokens": 10, "num_beams": beams}
        cached = hybrid.generate(ids, use_cache=True, **how)
        assert torch.equal(cached, hybrid.generate(ids, use_cache=False, **how)), beams


@torch.no_grad()
def test_a_left_padded_batch_equals_each_row_alone(hybrid):
    ids, pads = ids_for(hybrid, rows=3, length=16), (0, 3, 9)
    mask = torch.stack([(torch.arange(16) >= pad).long() for pad in pads])
    both = hybrid.generate(ids, attention_mask=mask, max_new_tokens=10, **GENERATE)
    for row, pad in enumerate(pads):
        alone = hybrid.generate(ids[row : row + 1, pad:], max_new_tokens=10, **GENERATE)
        assert torch.equal(both[row, 16:], alone[0, 16 - pad :]), pad


@torch.no_grad()
def test_prefill_in_pieces_and_decoding_equal_one_pass(hybrid):
    ids = ids_for(hybrid, length=40)
    whole = hybrid(ids).logits
    cache, parts = None, []
    for start, stop in itertools.pairwise((0, 11, 12, 30, *range(31, 41))):
        out = hybrid(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_close("logits", whole, torch.cat(parts, dim=1), ratio=2e-5)
    plan = modeling.plan_of(hybrid.config)
    assert held_bytes(cache) == 2 * plan.cache_bytes(40, "float32")


@torch.no_grad()
def test_packed_documents_are_each_alone(hybrid):
    ids, borders = ids_for(hybrid, length=30), ((0, 7, 8, 30), (0, 19, 30, 30))
    positions = torch.zeros_like(ids)
    for row, cuts in enumerate(borders):
        for start, stop in itertools.pairwise(cuts):
            positions[row, start:stop] = torch.arange(stop - start)
    packed = hybrid(ids, position_ids=positions).logits
    for row, cuts in enumerate(borders):
        for start, stop in itertools.pairwise(cuts):
            if start < stop:
                alone = hybrid(ids[row : row + 1, start:stop]).logits[0]
                assert_close(f"{row}: {start}", alone, packed[row, start:stop], ratio=2e-5)


def test_packed_documents_train_alone(hybrid):
    """What one document loses does not reach the mixers through another."""
    ids = ids_for(hybrid, rows=1, length=20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    embeds = hybrid.get_input_embeddings()(ids).detach().requires_grad_()
    hybrid(inputs_embeds=embeds, position_ids=positions).logits[:, 12:].square().sum().backward()
    assert not embeds.grad[:, :12].any()
    assert embeds.grad[:, 12:].any()


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(hybrid, tmp_path):
    ids = ids_for(hybrid)
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "MorphLlamaForCausalLM"
    assert torch.equal(hybrid(ids).logits, loaded(ids).logits)


def test_one_step_of_training_moves_every_parameter_of_its_own(hybrid):
    model = copy.deepcopy(hybrid)
    ids = ids_for(model)
    model(ids, labels=ids).loss.backward()
    for name, p in surgery.mixer_parameters(model):
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


@torch.no_grad()
def test_a_right_padded_prompt_is_gone_on_from_where_nothing_is_bounded(hybrid):
    """Recurrent states and convolutions end at the last real token; windows count the padding."""
    plan = modeling.plan_of(hybrid.config)
    groups = [g for i in plan.replaced_layers for g in plan.layers[i].groups]
    if any(g.cache.tokens for g in groups):
        pytest.skip("a window counts padding on the right as tokens")
    ids, pad = ids_for(hybrid, length=14), 4
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, -pad:] = 0
    cache = hybrid(ids, attention_mask=mask, use_cache=True).past_key_values
    step = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    at = (step.cumsum(dim=1) - 1)[:, -1:]
    got = hybrid(
        ids[:, :1], attention_mask=step, position_ids=at, past_key_values=cache, use_cache=True
    ).logits
    alone = hybrid(torch.cat([ids[:1, :-pad], ids[:1, :1]], dim=1)).logits[:, -1:]
    assert_close("row", alone, got[:1], ratio=2e-5)


def test_positions_given_once_pack_every_row(hybrid):
    ids = ids_for(hybrid, length=12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        once = hybrid(ids, position_ids=positions).logits
        assert torch.equal(once, hybrid(ids, position_ids=positions.expand(2, -1)).logits)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_it_computes_and_generates_the_same(hybrid):
    ids = ids_for(hybrid, length=40)
    there = copy.deepcopy(hybrid).cuda()
    assert_close("logits", hybrid(ids).logits, there(ids.cuda()).logits.cpu(), ratio=1e-4)
    how = {**GENERATE, "max_new_tokens": 10}
    cached = there.generate(ids[:, :15].cuda(), use_cache=True, **how)
    plain = there.generate(ids[:, :15].cuda(), use_cache=False, **how)
    assert torch.equal(cached, plain)
