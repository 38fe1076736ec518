"""Shared routing: what is chosen, who follows whom, and how the indexer learns."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from morph import modeling, strict, surgery
from morph.cache import State, held_bytes
from morph.errors import MismatchError, PlanError, RecipeError
from morph.kernels._blocks import Rows
from morph.mixers import _indexer, shared_routing
from morph.mixers._base import GroupShape, Inputs
from morph.plan import HeadGroup, LayerPlan, Plan
from morph.testing import assert_close, exactly, tiny_model

B, T, H, G, K, V, D = 3, 37, 4, 2, 6, 5, 8
GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "min_new_tokens": 10}


def shape(layer: int, **changes: Any) -> GroupShape:
    values = {
        "layer_idx": layer,
        "num_hidden_layers": 4,
        "heads": tuple(range(H)),
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": K,
        "v_head_dim": V,
        "hidden_size": D,
        "scale": 0.7,
        "softcap": 3.0,
    }
    return GroupShape(**{**values, **changes})


def mixer(layer: int = 1, seed: int = 0, changes: Any = None, **options: Any) -> Any:
    """A mixer in float64, its index off its start."""
    made = shared_routing.Mixer(
        shape(layer, **(changes or {})), shared_routing.Options(**{"index_dim": 5, **options})
    ).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def inputs(seed: int = 0, tokens: int = T, padding: Any = None, shared: Any = None) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (H, K), "k": (G, K), "v": (G, V), "hidden": (D,)}
    made = {
        n: torch.randn(B, tokens, *size, generator=generator, dtype=torch.float64)
        for n, size in sizes.items()
    }
    return Inputs(**made, padding=padding, shared=shared)


def leave_out(x: Inputs, row: int, pads: int) -> Inputs:
    """One row alone, without its padding on the left."""
    parts = {n: getattr(x, n)[row : row + 1, pads:] for n in ("q", "k", "v", "hidden")}
    return dataclasses.replace(x, **parts, padding=None)


def scores_of(x: Inputs, owner: Any, block: int) -> torch.Tensor:
    """The index by its definition: [B, T, C], of whole blocks."""
    a = x.q.unflatten(2, (G, H // G)).mean(dim=3).flatten(2) @ owner.q_weight.T
    b = x.k.flatten(2)
    b = torch.stack([b[:, i : i + block].mean(dim=1) for i in range(0, b.shape[1], block)], dim=1)
    return a @ (b @ owner.k_weight.T).transpose(1, 2) * owner.shape.scale / G


def always(tokens: int, options: Any) -> torch.Tensor:
    """Which blocks a query has whatever their scores, [T, C]."""
    own = torch.arange(tokens) // options.block
    most = -(-options.k // options.block)
    near = (torch.arange(tokens) - options.local).clamp_min(0) // options.block
    first = torch.maximum(near, own - most + 1)
    number = torch.arange(-(-tokens // options.block))
    return (number >= first[:, None]) & (number <= own[:, None])


def listed(x: Inputs, owner: Any) -> torch.Tensor:
    """Which blocks are chosen, [B, T, C], by a stable sort."""
    options, tokens = owner.options, x.q.shape[1]
    scores = scores_of(x, owner, options.block).detach()
    near = always(tokens, options)
    number = torch.arange(scores.shape[2])
    later = number > (torch.arange(tokens) // options.block)[:, None]
    scores = scores.masked_fill(near, math.inf).masked_fill(later, -math.inf)
    best = scores.argsort(dim=-1, descending=True, stable=True)
    best = best[..., : -(-options.k // options.block)]
    chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & ~later


def probabilities(x: Inputs, seen: torch.Tensor, of: GroupShape) -> torch.Tensor:
    """Softmax over the keys seen [B, T, S], [B, H, T, S]."""
    s = torch.einsum("bthk,bshk->bhts", x.q, x.k.repeat_interleave(H // G, dim=2)) * of.scale
    s = of.softcap * torch.tanh(s / of.softcap)
    return torch.softmax(s.masked_fill(~seen[:, None], -math.inf), dim=-1)


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(1, tokens, tokens, dtype=torch.bool).tril()


def attended(x: Inputs, chosen: torch.Tensor, of: GroupShape, block: int) -> torch.Tensor:
    """Attention over the chosen blocks by a dense mask, [B, T, H, V]."""
    tokens = x.q.shape[1]
    seen = chosen[..., torch.arange(tokens) // block] & causal(tokens)
    v = x.v.repeat_interleave(H // G, dim=2)
    return torch.einsum("bhts,bshv->bthv", probabilities(x, seen, of), v)


SETTINGS = (
    {"k": 7},
    {"k": 7, "local": 3},
    {"k": 1},
    {"k": 12, "block": 4},
    {"k": 13, "block": 5, "local": 6},
    {"k": 3, "local": 50},
)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


@each_setting
def test_owner_and_follower_are_dense_attention_under_the_owners_choice(setting: Any) -> None:
    owner, follower = mixer(1, **setting), mixer(3, owner=1, **setting)
    x, y, shared = inputs(), inputs(5), {}
    first = owner(dataclasses.replace(x, shared=shared))
    second = follower(dataclasses.replace(y, shared=shared))
    chosen, block = listed(x, owner), owner.options.block
    assert_close("owner", attended(x, chosen, owner.shape, block), first)
    assert_close("follower", attended(y, chosen, follower.shape, block), second)
    reads = owner.blocks_read(x)
    exactly("blocks", chosen.sum(dim=-1)[..., None].expand(B, -1, -1), reads.expand(B, -1, -1))
    assert not list(follower.parameters())


@each_setting
def test_padded_pieces_of_both_are_the_rows_alone(setting: Any) -> None:
    pads = (0, 5, 30)
    real = torch.stack([torch.arange(T) >= pad for pad in pads])
    owner, follower = mixer(1, **setting), mixer(3, owner=1, **setting)
    x, y, states, parts = inputs(), inputs(5), (State(), State()), []
    for start, stop in itertools.pairwise((0, 6, 7, 8, 21, *range(30, T + 1))):
        shared: dict[Any, Any] = {}
        for module, whole, state in zip((owner, follower), (x, y), states):
            cut = {n: getattr(whole, n)[:, start:stop] for n in ("q", "k", "v", "hidden")}
            o = module(Inputs(**cut, padding=real[:, :stop], shared=shared), state)
        parts.append(o)
    together = torch.cat(parts, dim=1)
    for row, pad in enumerate(pads):
        shared = {}
        owner(dataclasses.replace(leave_out(x, row, pad), shared=shared))
        alone = follower(dataclasses.replace(leave_out(y, row, pad), shared=shared))
        assert_close(f"row {row}", alone[0], together[row, pad:])


def test_equal_scores_are_taken_from_the_front_at_once_and_token_by_token() -> None:
    module = mixer(k=4)
    x = inputs()
    x = dataclasses.replace(x, k=x.k[:, :1].expand(-1, T, -1, -1).contiguous())
    number = torch.arange(T)
    expected = (number < 3) | (number == number[:, None])  # three of those before, and its own
    expected = (expected | (number[:, None] < 4)) & (number <= number[:, None])
    exactly("oracle", expected.expand(B, -1, -1), listed(x, module))
    assert_close("at once", attended(x, listed(x, module), module.shape, 1), module(x))
    state, parts = State(), []
    for t in range(T):
        cut = {n: getattr(x, n)[:, t : t + 1] for n in ("q", "k", "v", "hidden")}
        parts.append(module(Inputs(**cut), state))
    assert_close("token by token", module(x), torch.cat(parts, dim=1))


def test_ties_choose_the_lower_place_whatever_topk_does() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 5, 200), generator=generator).double()
    scores[:, :, 150:] = -math.inf
    scores[:, 0, 3:] = -math.inf  # fewer than are asked for
    for most in (1, 6, 60, 160):
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :most]
        best = best.masked_fill(torch.isneginf(scores.gather(-1, best)), -1).sort(dim=-1).values
        exactly("places", best, _indexer._best(scores, most))


def loss_of(
    teachers: list[tuple[Inputs, GroupShape]], x: Inputs, owner: Any, rows: list[tuple[int, int]]
) -> torch.Tensor:
    """The indexer's loss by its definition, summed over the layers served; rows: (pads, row)."""
    total, options, tokens = 0.0, owner.options, sum(T - pads for pads, _ in rows)
    for pads, row in rows:
        mine = leave_out(x, row, pads)
        count = T - pads
        own = torch.arange(count) // options.block
        number = torch.arange(-(-count // options.block))
        far = ~always(count, options) & (number <= own[:, None])
        log = torch.log_softmax(
            scores_of(mine, owner, options.block)[0].masked_fill(~far, -math.inf), dim=-1
        )
        for y, of in teachers:
            p = probabilities(leave_out(y, row, pads), causal(count), of)[0].mean(dim=0).detach()
            p = torch.nn.functional.pad(p, (0, -count % options.block))
            p = p.unflatten(1, (-1, options.block)).sum(dim=2) * far
            mass = p.sum(dim=-1, keepdim=True)
            q = p / mass.clamp_min(1e-300)
            kl = torch.xlogy(q, q) - q * log.masked_fill(~far, 0.0)
            total = total + (mass * kl).sum()
    return total / tokens


@each_setting
@pytest.mark.parametrize("padded", (False, True), ids=("real", "padded"))
def test_the_indexer_gets_the_gradient_of_its_loss(setting: Any, padded: bool) -> None:
    pads = (0, 5, 30) if padded else (0, 0, 0)
    real = torch.stack([torch.arange(T) >= pad for pad in pads])
    owner, follower = mixer(1, **setting), mixer(3, owner=1, kl=0.5, **setting)
    x, y = (inputs(seed, padding=real) for seed in (0, 5))
    rows = [(pad, row) for row, pad in enumerate(pads)]
    wanted = [owner.q_weight, owner.k_weight]
    alone, both = (
        torch.autograd.grad(loss_of(teachers, x, owner, rows), wanted)
        for teachers in ([(x, owner.shape)], [(x, owner.shape), (y, follower.shape)])
    )
    shared: dict[Any, Any] = {}
    first = owner(dataclasses.replace(x, shared=shared))
    second = follower(dataclasses.replace(y, shared=shared))
    # each layer on its own, as where layers are aligned one by one, whatever its output is worth
    for o, expected in ((first, alone), (second, [0.5 * (b - a) for a, b in zip(alone, both)])):
        owner.zero_grad()
        (1e3 * o).sum().backward()
        for name, e, got in zip(("q", "k"), expected, (w.grad for w in wanted)):
            assert_close(name, e, got)


def test_the_loss_that_is_told_is_the_one_that_is_learned() -> None:
    for setting in SETTINGS:
        owner, x = mixer(**setting), inputs()
        rows = Rows.of(None, B, 0, T, x.q.device)
        left = owner._own(x.q, x.k, x.k, x.v, rows, None)
        served = _indexer.Served(x.q, x.k, owner.shape.scale, owner.shape.softcap)
        told = _indexer.divergence(served, left.index, rows, owner.choice)
        every = [(0, row) for row in range(B)]
        assert_close("loss", loss_of([(x, owner.shape)], x, owner, every).detach()[None], told)


def test_the_index_leaves_every_other_gradient_alone() -> None:
    found = []
    for kl in (0.0, 1.0):
        x = inputs()
        leaves = [getattr(x, n).requires_grad_() for n in ("q", "k", "v", "hidden")]
        module = mixer(k=7, kl=kl)
        o = module(x)
        o.backward(torch.ones_like(o))
        found.append([leaf.grad for leaf in leaves])
        assert (module.q_weight.grad is None) == (kl == 0)
    for name, without, with_it in zip(("q", "k", "v"), *found):
        exactly(name, without, with_it)
    assert found[1][3] is None


@pytest.mark.parametrize("block", (1, 4))
def test_training_lowers_the_loss_of_the_indexer(block: int) -> None:
    owner, follower = mixer(1, k=8, block=block), mixer(3, k=8, block=block, owner=1)
    x, y = inputs(), inputs(5)
    x = dataclasses.replace(x, q=2 * x.k.repeat_interleave(H // G, dim=2) + 0.1 * x.q)
    y = dataclasses.replace(y, q=x.q, k=x.k)
    every = [(0, row) for row in range(B)]
    teachers = [(x, owner.shape), (y, follower.shape)]
    before = loss_of(teachers, x, owner, every).item()
    optimizer = torch.optim.Adam(owner.parameters(), lr=2e-2)
    for _ in range(200):
        shared: dict[Any, Any] = {}
        optimizer.zero_grad()
        first = owner(dataclasses.replace(x, shared=shared))
        second = follower(dataclasses.replace(y, shared=shared))
        (first.sum() + second.sum()).backward()
        optimizer.step()
    after = loss_of(teachers, x, owner, every).item()
    assert after < 0.3 * before, (before, after)


def test_calibration_finds_the_scores_of_the_layer() -> None:
    """Queries and keys that lie in few dimensions are found whole; how sharp, by the loss."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(4, G * K, generator=generator, dtype=torch.float64)
    x = inputs(tokens=120)
    q = torch.randn(B, 120, 4, generator=generator, dtype=torch.float64) @ planted
    k = torch.randn(B, 120, 4, generator=generator, dtype=torch.float64) @ planted
    q = q.unflatten(2, (G, 1, K)).expand(-1, -1, -1, H // G, -1).flatten(2, 3)
    x = dataclasses.replace(x, q=q.contiguous(), k=k.unflatten(2, (G, K)))
    module = mixer(k=16, index_dim=4)
    module.reset_parameters()

    def held(m: Any) -> float:
        """The share of the attention that the chosen tokens hold."""
        p = probabilities(x, causal(120), m.shape).mean(dim=1)
        return (p * listed(x, m)).sum(dim=-1)[:, 60:].mean().item()

    before = held(module)
    module.calibrate([(x, torch.zeros(0))])
    whole = mixer(k=16, index_dim=64)
    whole.reset_parameters()
    assert whole.q_weight.shape == (G * K, G * K)
    exactly("identity", torch.eye(G * K, dtype=torch.float64), whole.k_weight)
    exactly("choice", listed(x, whole), listed(x, module))
    assert held(module) > before + 0.05


def test_no_more_than_a_chunk_of_scores_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(made, torch.Tensor):
                    self.numel = max(self.numel, made.numel())
            return out

    monkeypatch.setattr(_indexer, "_CHUNK", 2**14)
    tokens = 600
    owner, x = mixer(k=16), inputs(tokens=tokens)
    rows = Rows.of(None, B, 0, tokens, x.q.device)
    served = _indexer.Served(x.q, x.k, 1.0, None)
    with Largest() as seen, torch.no_grad():
        left = owner._own(x.q, x.k, x.k, x.v, rows, None)
        _indexer.divergence(served, left.index, rows, owner.choice)
        _indexer._gradients(served, left.index, rows, owner.choice, 1.0)
    assert seen.numel < 2**16 < B * tokens * tokens


def test_a_follower_says_what_it_lacks() -> None:
    x, owner = inputs(), mixer(1, k=7)
    with pytest.raises(MismatchError, match="layer 3: mixer shared_routing follows layer 1, whose"):
        mixer(3, owner=1, k=7)(x)
    with pytest.raises(MismatchError, match="owner null"):
        mixer(3, owner=1, k=7)(dataclasses.replace(x, shared={}))
    for other in ({"k": 8}, {"k": 7, "block": 2}, {"k": 7, "local": 1}):
        shared: dict[Any, Any] = {}
        owner(dataclasses.replace(x, shared=shared))
        with pytest.raises(MismatchError, match="Give both the same (k|block|local)"):
            mixer(3, owner=1, **other)(dataclasses.replace(x, shared=shared))
    others = {"heads": (4, 5, 6, 7), "num_attention_heads": 8}
    with pytest.raises(MismatchError, match="share_kv"):
        mixer(3, owner=1, k=7, share_kv=True, changes=others)(dataclasses.replace(x, shared=shared))
    sliding = mixer(1, k=7, changes={"window": 6})
    shared = {}
    sliding(dataclasses.replace(x, shared=shared))
    with pytest.raises(MismatchError, match="slides in the source"):
        mixer(3, owner=1, k=7)(dataclasses.replace(x, shared=shared))
    with pytest.raises(MismatchError, match="layer 1 slides"):
        sliding.blocks_read(x)


def test_followers_of_a_mixture_read_the_group_of_their_heads() -> None:
    low, high = (0, 1, 2, 3), (4, 5, 6, 7)
    owners = [
        mixer(1, seed, {"heads": heads, "num_attention_heads": 8}, k=7)
        for seed, heads in ((1, low), (2, high))
    ]
    shared: dict[Any, Any] = {}
    x, y = inputs(), inputs(5)
    for owner in owners:
        owner(dataclasses.replace(x, shared=shared))
    for heads, owner in ((low, owners[0]), (high, owners[1]), ((1, 2, 4, 6), owners[0])):
        follower = mixer(3, 0, {"heads": heads, "num_attention_heads": 8}, k=7, owner=1)
        got = follower(dataclasses.replace(y, shared=shared))
        assert_close(str(heads), attended(y, listed(x, owner), follower.shape, 1), got)


def test_options_say_what_is_allowed() -> None:
    for bad, said in (
        ({"k": 0}, "k is 0; give 1"),
        ({"block": 0}, "block is 0"),
        ({"block": 65537}, "block is 65537; give 1 to 65536 tokens"),
        ({"local": -1}, "local is -1; give 0"),
        ({"index_dim": 0}, "index_dim is 0; give 1 to 4096"),
        ({"owner": -2}, "owner is -2"),
        ({"share_kv": True}, "share_kv is for layers that follow"),
        ({"kl": -1.0}, "kl is -1.0"),
        ({"kl": math.nan}, "kl: nan"),
    ):
        with pytest.raises(RecipeError, match=said):
            strict.build(shared_routing.Options, bad)


def test_a_decoded_token_reads_what_is_listed_and_the_index() -> None:
    of, entry = shape(1, softcap=None), (K + V) * 2 * G
    options = shared_routing.Options(k=96, block=32, index_dim=5)
    for seq_len, blocks in ((10, 1), (64, 2), (1000, 32)):
        read = min(seq_len, 96) * entry
        assert shared_routing.Mixer.decode_bytes(options, of, seq_len, 2) == read + 4 * 5 * blocks
        for more in ({}, {"share_kv": True}):
            follower = dataclasses.replace(options, owner=0, **more)
            assert shared_routing.Mixer.decode_bytes(follower, of, seq_len, 2) == read
    sharing = dataclasses.replace(options, owner=0, share_kv=True)
    assert shared_routing.Mixer.cache_cost(sharing, of).room(0) == 0


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


FOLLOWS = {
    "tokens": ({"k": 6}, None, {"k": 6, "owner": 0}, {"k": 6, "owner": 0}),
    "blocks": (
        {"k": 9, "block": 3, "local": 2, "index_dim": 7},
        {"k": 9, "block": 3, "local": 2, "owner": 0},
        {"k": 6},
        {"k": 6, "owner": 2},
    ),
    "kv": (None, {"k": 6}, {"k": 6, "owner": 1, "share_kv": True}, {"k": 6, "owner": 1}),
}
each_plan = pytest.mark.parametrize("kind", FOLLOWS)


def hybrid_of(kind: str) -> Any:
    model = tiny_model("llama")
    made = modeling.hybrid(model, planned(model, *FOLLOWS[kind]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in surgery.mixer_parameters(made):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return made


def ids_for(model: Any, rows: int = 2, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


@each_plan
@torch.no_grad()
def test_in_a_model_a_cache_changes_nothing(kind: str) -> None:
    model = hybrid_of(kind)
    ids, pads = ids_for(model, rows=3, length=16), (0, 3, 9)
    for beams in (1, 3):
        how = {**GENERATE, "max_new_tokens": 10, "num_beams": beams}
        cached = model.generate(ids, use_cache=True, **how)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **how)), beams
    mask = torch.stack([(torch.arange(16) >= pad).long() for pad in pads])
    both = model.generate(ids, attention_mask=mask, max_new_tokens=10, **GENERATE)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], max_new_tokens=10, **GENERATE)
        assert torch.equal(both[row, 16:], alone[0, 16 - pad :]), pad
    ids = ids_for(model, length=40)
    whole, cache, parts = model(ids).logits, None, []
    for start, stop in itertools.pairwise((0, 11, 12, 30, *range(31, 41))):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_close("logits", whole, torch.cat(parts, dim=1), ratio=2e-5)
    assert held_bytes(cache) == 2 * modeling.plan_of(model.config).cache_bytes(40, "float32")


@each_plan
def test_packed_documents_are_each_alone(kind: str) -> None:
    model = hybrid_of(kind)
    ids = ids_for(model, rows=1, length=33)
    positions = torch.cat([torch.arange(21), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions).logits[0]
    for start, stop in ((0, 21), (21, 33)):
        assert_close("logits", model(ids[:, start:stop]).logits[0], packed[start:stop], ratio=2e-5)


def test_long_enough_every_layer_is_full_attention() -> None:
    model = tiny_model("llama")
    ids = ids_for(model, length=40)
    follows = {"k": 40, "owner": 0}
    made = modeling.hybrid(model, planned(model, {"k": 40}, follows, {"k": 40, "block": 8}, None))
    assert_close("logits", model(ids).logits, made(ids).logits, ratio=1e-5)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@each_plan
def test_recomputed_layers_train_alike(kind: str) -> None:
    from morph.distill._recompute import recomputed

    model = hybrid_of(kind)
    ids = ids_for(model)
    plain = gradients(model, ids)
    with recomputed(
        list(surgery.layers_of(surgery.base_of(model), surgery.family_of(model.config.to_dict()))),
        "layer",
    ):
        again = gradients(model, ids)
    own = {n for n, _ in surgery.mixer_parameters(model)}
    assert own <= plain.keys() == again.keys()
    for name, value in plain.items():
        assert value.any() or name not in own, name
        assert_close(name, value, again[name], ratio=1e-5)


@each_plan
def test_layers_are_trained_one_by_one_in_one_context(kind: str) -> None:
    """As `align` does: every layer has a loss and a graph of its own, all weights learn."""
    model = hybrid_of(kind)
    context = surgery.context({"input_ids": ids_for(model)}, 0)
    base = surgery.base_of(model)
    hidden = base.embed_tokens(ids_for(model)).detach()
    at = base.rotary_emb(hidden, torch.arange(24)[None])
    for layer in surgery.hybrid_layers(model).values():
        output, _ = layer(hidden, at, morph_context=context)
        output.square().sum().backward()
    for name, p in surgery.mixer_parameters(model):
        assert p.grad is not None and p.grad.any(), name


def test_what_cannot_be_followed_is_refused() -> None:
    model = tiny_model("llama")
    for options, said in (
        ((None, None, {"owner": 1}, None), "layer 2.*follows layer 1, which has no shared_routing"),
        (({}, {"owner": 0}, {"owner": 1}, None), "follows layer 1, which has no shared_routing"),
        ((None, {"owner": 2}, {}, None), "can follow an earlier layer only"),
        ((None, {"owner": 1}, {}, None), "can follow an earlier layer only"),
    ):
        with pytest.raises(PlanError, match=said):
            surgery.resolve_costs(planned(model, *options))
