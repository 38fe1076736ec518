"""BigBird: which blocks its seed draws, for ever, and that nothing else is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from morph import strict
from morph.cache import State
from morph.errors import RecipeError
from morph.mixers import _random_blocks, bigbird
from morph.mixers._base import GroupShape, Inputs
from morph.testing import assert_close, exactly

B, H, G, K, V, D = 2, 4, 2, 6, 5, 12
SMALL = bigbird.Options(block=4, local=2, initial=1, random=2)


def make(options: bigbird.Options = SMALL, **changes: Any) -> bigbird.Mixer:
    values: dict[str, Any] = {
        "layer_idx": 1, "num_hidden_layers": 4, "heads": (0, 1, 6, 7), "num_attention_heads": 8,
        "num_key_value_heads": G, "head_dim": K, "v_head_dim": V, "hidden_size": D, "scale": 0.3,
    }  # fmt: skip
    return bigbird.Mixer(GroupShape(**{**values, **changes}), options)


def inputs(tokens: int, batch: int = B) -> Inputs:
    generator = torch.Generator().manual_seed(4)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch, tokens, *size, generator=generator, dtype=torch.float64)

    return Inputs(q=random(H, K), k=random(G, K), v=random(G, V), hidden=random(D))


def cut(x: Inputs, start: int, stop: int) -> Inputs:
    parts = {n: getattr(x, n)[:, start:stop] for n in ("q", "k", "v", "hidden")}
    return Inputs(**parts, padding=None if x.padding is None else x.padding[:, :stop])


def lists(count: int, options: bigbird.Options, layer: int = 1, heads: Any = (0, 6)) -> list[Any]:
    """The block lists of every query block and head, as lists of what is there."""
    made = _random_blocks.block_lists(
        range(count),
        window=options.local,
        initial=options.initial,
        random=options.random,
        seed=options.seed,
        layer=layer,
        heads=heads,
    )
    return [[[x for x in row if x >= 0] for row in block] for block in made.tolist()]


def drawn(place: tuple[int, ...], low: int, high: int, count: int) -> set[int]:
    """Floyd's algorithm over MurmurHash3's last step, written out in Python's own integers."""

    def hashed(state: int, value: int) -> int:
        x = ((state ^ value) + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    state = 0
    for value in place:  # seed, layer, head, query block
        state = hashed(state, value)
    found: set[int] = set()
    for i, last in enumerate(range(high - low - count, high - low)):
        one = hashed(state, i) * (last + 1) >> 32
        found.add(last if one in found else one)
    return {low + x for x in found}


def expected(x: Inputs, mixer: bigbird.Mixer) -> torch.Tensor:
    """Attention over exactly the listed blocks: float64, a dense mask."""
    tokens, options = x.q.shape[1], mixer.options
    heads = mixer.shape.heads[:: H // G] if options.per == "kv_head" else (0,)
    listed = lists(-(-tokens // options.block), options, mixer.shape.layer_idx, heads)
    seen = torch.zeros(len(heads), tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        for j, blocks in enumerate(listed[t // options.block]):
            for block in blocks:
                seen[j, t, block * options.block : min((block + 1) * options.block, t + 1)] = True
    k, v = (y.repeat_interleave(H // G, dim=2) for y in (x.k, x.v))
    s = torch.einsum("bthk,bshk->bhts", x.q, k) * mixer.shape.scale
    if mixer.shape.softcap:
        s = mixer.shape.softcap * torch.tanh(s / mixer.shape.softcap)
    s = s.masked_fill(~seen.repeat_interleave(H // len(heads), dim=0), -math.inf)
    return torch.einsum("bhts,bshv->bthv", torch.softmax(s, dim=-1), v)


def test_the_draws_of_a_seed_never_change() -> None:
    """Written checkpoints hold a seed only: another hash would give them other blocks."""
    made = {
        (seed, layer, block): lists(block + 1, bigbird.Options(seed=seed), layer, (0, 2))[block]
        for seed, layer, block in GOLDEN
    }
    assert made == GOLDEN


# By (seed, layer, query block): the lists of heads 0 and 2 with the default options
GOLDEN = {
    (0, 0, 0): [[0], [0]],
    (0, 0, 6): [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]],
    (0, 0, 7): [[0, 1, 2, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6, 7]],
    (0, 0, 100): [[0, 45, 65, 92, 98, 99, 100], [0, 1, 26, 63, 98, 99, 100]],
    (0, 1, 100): [[0, 38, 74, 93, 98, 99, 100], [0, 21, 69, 82, 98, 99, 100]],
    (1, 0, 100): [[0, 79, 80, 84, 98, 99, 100], [0, 23, 25, 94, 98, 99, 100]],
    (2**32 - 1, 31, 2047): [
        [0, 515, 796, 1730, 2045, 2046, 2047],
        [0, 485, 655, 1250, 2045, 2046, 2047],
    ],
}


@pytest.mark.parametrize("seed", (0, 1, 2**32 - 1))
def test_the_draws_are_those_of_whole_numbers(seed: int) -> None:
    for count in (1, 3, 9):
        options = bigbird.Options(local=2, initial=2, random=count, seed=seed)
        made = lists(40, options, 7, (0, 3, 31))
        for block in range(count + 4, 40):
            for row, head in zip(made[block], (0, 3, 31), strict=True):
                found = drawn((seed, 7, head, block), 2, block - 1, count)
                assert row == [0, 1, *sorted(found), block - 1, block]


@pytest.mark.parametrize("random", (0, 1, 3, 50))
@pytest.mark.parametrize("initial", (0, 2))
@pytest.mark.parametrize("window", (1, 3, 90))
def test_lists_are_past_blocks_once_each(window: int, initial: int, random: int) -> None:
    options = bigbird.Options(local=window, initial=initial, random=random)
    for block, rows in enumerate(lists(60, options)):
        for row in rows:
            assert row == sorted(set(row)) and row[-1] == block
            assert len(row) == min(block + 1, window + initial + random)
            assert set(range(min(initial, block + 1))) <= set(row)
            assert set(range(max(0, block - window + 1), block + 1)) <= set(row)


def test_lists_do_not_depend_on_where_a_call_begins() -> None:
    how = {"window": 2, "initial": 1, "random": 3, "seed": 5, "layer": 0, "heads": (0, 4)}
    whole = _random_blocks.block_lists(range(50), **how)
    for start, stop in ((0, 1), (9, 12), (49, 50)):
        part = _random_blocks.block_lists(range(start, stop), **how)
        for mine, all_ in zip(part, whole[start:stop], strict=True):
            for a, b in zip(mine.tolist(), all_.tolist(), strict=True):
                assert [x for x in a if x >= 0] == [x for x in b if x >= 0]


def test_draws_are_uniform_and_independent() -> None:
    """Chi-square of single blocks, and of pairs, among the ten between the first and the window."""
    room, count, seeds, heads = 10, 3, 2000, range(4)
    single, pairs = torch.zeros(room), torch.zeros(room, room)
    for seed in range(seeds):
        found = _random_blocks.random_blocks(torch.tensor([12]), 2, 1, count, seed, 3, heads)
        for row in (found[0] - 1).tolist():
            single[row] += 1
            for a, b in itertools.combinations(row, 2):
                pairs[a, b] += 1
    fair = seeds * len(heads) * count / room
    assert float(((single - fair) ** 2 / fair).sum()) < 25  # 9 degrees of freedom: 99.7 %
    upper = pairs[torch.triu_indices(room, room, 1).unbind()]
    fair = seeds * len(heads) * count / len(upper)
    assert float(((upper - fair) ** 2 / fair).sum()) < 85  # 44 degrees of freedom: 99.98 %


def test_draws_of_all_blocks_together_are_uniform() -> None:
    blocks = torch.arange(12, 412)
    room = (blocks - 2)[:, None, None]
    for layer in range(5):
        found = _random_blocks.random_blocks(blocks, 2, 1, 3, 0, layer, range(4)) - 1
        assert (found >= 0).all() and (found < room).all() and (found.diff(dim=-1) > 0).all()
        middle = (found.double() + 0.5) / room
        assert abs(float(middle.mean()) - 0.5) < 0.02  # of 4,800 draws: 5 standard errors


def test_layers_heads_blocks_and_seeds_draw_apart() -> None:
    """Of two lists drawn alike from 200 blocks, next to none has two of three blocks in common."""
    first = bigbird.Options(seed=3)
    other = bigbird.Options(seed=4)
    a, b = lists(205, first, 2, (0, 2)), lists(205, first, 3, (0, 2))
    c = lists(205, other, 2, (0, 2))
    for x, y in (
        (a[-1][0], a[-1][1]),
        (a[-1][0], a[-2][0]),
        (a[-1][0], b[-1][0]),
        (a[-1][0], c[-1][0]),
    ):
        assert len(set(x[1:4]) & set(y[1:4])) < 2


@pytest.mark.parametrize("per", ("kv_head", "layer"))
@pytest.mark.parametrize("softcap", (None, 2.0))
def test_it_is_attention_over_the_listed_blocks(per: Any, softcap: float | None) -> None:
    mixer, x = make(dataclasses.replace(SMALL, per=per), softcap=softcap), inputs(43)
    assert_close("o", expected(x, mixer), mixer(x))


def test_per_layer_all_heads_read_the_same() -> None:
    x = inputs(60)
    once = make(dataclasses.replace(SMALL, per="layer"))
    assert once.blocks_read(x).shape == (B, 60, 1)
    assert make().blocks_read(x).shape == (B, 60, G)
    # whichever heads a group has
    other = make(dataclasses.replace(SMALL, per="layer"), heads=(2, 3, 4, 5))
    exactly("o", once(x), other(x))
    assert not torch.equal(make()(x), make(heads=(2, 3, 4, 5))(x))


def test_decoding_is_prefill_whatever_is_padded() -> None:
    mixer, x = make(), inputs(70)
    real = torch.ones(B, 70, dtype=torch.bool)
    real[0, :13] = False
    for padding in (None, real):
        x = dataclasses.replace(x, padding=padding)
        state = State()
        parts = [mixer(cut(x, 0, 30), state)]
        parts += [make()(cut(x, t, t + 1), state) for t in range(30, 70)]  # resumed by a new one
        assert_close("o", mixer(x), torch.cat(parts, dim=1))


def test_a_padded_row_is_the_row_alone_and_counts_alike() -> None:
    mixer, x = make(), inputs(50)
    real = torch.arange(50)[None] >= torch.tensor([[0], [11]])
    padded = dataclasses.replace(x, padding=real)
    alone = Inputs(**{n: getattr(x, n)[1:, 11:] for n in ("q", "k", "v", "hidden")})
    assert_close("row", mixer(alone)[0], mixer(padded)[1, 11:])
    read = mixer.blocks_read(padded)
    exactly("blocks", mixer.blocks_read(alone)[0], read[1, 11:])
    assert not read[1, :11].any()


def test_blocks_read_is_what_the_lists_say() -> None:
    read = make().blocks_read(inputs(50))
    for t in range(50):
        assert (read[:, t] == min(t // 4 + 1, 5)).all()
    window = make(window=6).blocks_read(inputs(50))  # the source's own window, in blocks of 4
    assert window[0, :9, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_blocks_that_are_not_listed_are_not_read() -> None:
    mixer, x = make(dataclasses.replace(SMALL, per="layer")), inputs(60)
    state = State()
    with torch.no_grad():
        mixer(cut(x, 0, 59), state)
        clean = mixer(cut(x, 59, 60), state.clone())
        listed = lists(15, mixer.options, heads=(0,))[14][0]
        for block in set(range(15)) - set(listed):
            for name in ("k", "v"):
                state.tensors[name][:, 4 * block : 4 * block + 4] = math.nan
        state.tensors["v"][:, 60:] = math.nan  # room that is not used yet
        exactly("o", clean, mixer(cut(x, 59, 60), state))


@pytest.mark.parametrize("tokens", (1, 4, 5, 20))
def test_a_text_of_no_more_blocks_than_a_list_is_read_whole(tokens: int) -> None:
    mixer, x = make(), inputs(tokens)
    everything = make(dataclasses.replace(SMALL, local=1000))
    exactly("o", everything(x), mixer(x))
    assert mixer.exact_prefix(mixer.options) == 20
    assert not torch.equal(everything(inputs(24)), mixer(inputs(24)))


def test_decode_bytes_are_those_of_the_tokens_that_are_read() -> None:
    mixer = make()
    entry = G * (K + V) * 2
    state, x = State(), inputs(60)
    for tokens in range(1, 60):
        mixer(cut(x, tokens - 1, tokens), state)
        listed = lists(15, mixer.options)[(tokens - 1) // 4]
        for row in listed:
            read = sum(min(4 * b + 4, tokens) - 4 * b for b in row)
            assert mixer.decode_bytes(mixer.options, mixer.shape, tokens, 2) == read * entry


def test_gradients_come_with_lists_made_without() -> None:
    mixer, x = make(), inputs(40)
    with torch.inference_mode():
        mixer(x)
    x.q.requires_grad_()
    mixer(x).sum().backward()
    assert x.q.grad is not None and torch.isfinite(x.q.grad).all()


@pytest.mark.parametrize(
    ("bad", "said"),
    (
        ({"block": 0}, "block is 0; give 1 to 65536 tokens, usually 64"),
        ({"block": 2**40}, "block is 1099511627776; give 1 to 65536"),
        ({"local": 0}, "local is 0; it counts the query's own block"),
        ({"initial": -1}, "initial is -1; give 0"),
        ({"random": -2}, "random is -2; give 0"),
        ({"seed": -1}, "seed is -1; give a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; give"),
        ({"per": "head"}, "per"),
    ),
)
def test_options_say_what_is_allowed(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        strict.build(bigbird.Options, bad)


def test_options_of_any_size_cost_nothing() -> None:
    """A plan may ask for anything: lists are never longer than the text has blocks."""
    huge = bigbird.Options(block=4, local=10**12, initial=10**12, random=10**12)
    x = inputs(40)
    everything = make(dataclasses.replace(SMALL, random=10**9))
    exactly("o", everything(x), make(huge)(x))
