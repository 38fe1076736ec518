"""block_topk: its choices are those of the papers, ties are sure, only what is chosen is read."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from morph import registry, strict
from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import _blocks, _gathered, _pooled, _topk, block_topk
from morph.mixers._base import GroupShape, Inputs
from morph.testing import assert_close, exactly

MIXER = registry.load("mixers", "block_topk")
STYLES: dict[str, dict[str, Any]] = {
    "moba": {"per": "head", "initial": 0, "local": 1},
    "infllm": {"summary": "windows", "initial": 1, "local": 2},
    "nsa": {"summary": "windows", "initial": 1, "local": 1, "compressed": True},
    "fla": {"compressed": True, "initial": 1, "local": 1},
    "max": {"summary": "max", "initial": 0, "local": 1},
}
each_style = pytest.mark.parametrize("style", list(STYLES))


def shape(**changes: Any) -> GroupShape:
    values: dict[str, Any] = {
        "layer_idx": 0,
        "num_hidden_layers": 1,
        "heads": (0, 1, 2, 3),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "v_head_dim": 5,
        "hidden_size": 8,
        "scale": 0.7,
    }
    return GroupShape(**{**values, **changes})


def make(style: str, block: int = 4, k: int = 4, dtype: torch.dtype = torch.float64) -> Any:
    """A mixer whose gates, if it has any, are off their start."""
    mixer = MIXER.Mixer(shape(), MIXER.Options(block=block, k=k, **STYLES[style])).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return mixer


def inputs(tokens: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch, tokens, *size, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(q=random(4, 6), k=random(2, 6), v=random(2, 5), hidden=random(8))


def cut(x: Inputs, start: int, stop: int) -> Inputs:
    parts = {n: getattr(x, n)[:, start:stop] for n in ("q", "k", "v", "hidden")}
    return Inputs(**parts, padding=None if x.padding is None else x.padding[:, :stop])


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 0.7
) -> torch.Tensor:
    """One query [K] over some keys [n, K] and values [n, V]."""
    return torch.softmax(k @ q * scale, dim=0) @ v


def full(x: Inputs) -> torch.Tensor:
    rows = [
        [
            [
                attention(x.q[b, t, h], x.k[b, : t + 1, h // 2], x.v[b, : t + 1, h // 2])
                for h in range(4)
            ]
            for t in range(x.q.shape[1])
        ]
        for b in range(x.q.shape[0])
    ]
    return torch.stack([torch.stack([torch.stack(h) for h in t]) for t in rows])


def oracle(x: Inputs, read: Any) -> torch.Tensor:
    """Attention of row 0 over the blocks of 4 that `read(t, h)` returns."""
    outputs = []
    for t, h in itertools.product(range(x.q.shape[1]), range(4)):
        blocks = read(t, h)
        at = [i for i in range(t + 1) if i // 4 in blocks]
        outputs.append(attention(x.q[0, t, h], x.k[0, at, h // 2], x.v[0, at, h // 2]))
    return torch.stack(outputs).view(1, -1, 4, 5)


def best(candidates: list[int], score: Any, places: int) -> set[int]:
    return set(sorted(candidates, key=lambda c: (-score(c), c))[: max(places, 0)])


def test_moba_gates_are_those_of_the_paper() -> None:
    """Top-k of <q, mean of the block's keys>, per head, the own block in and the future out."""
    x = inputs(37, batch=1)

    def read(t: int, h: int) -> set[int]:
        own = t // 4

        def gate(c: int) -> float:
            return float(x.q[0, t, h] @ x.k[0, 4 * c : 4 * c + 4, h // 2].mean(dim=0))

        return {own} | best(list(range(own)), gate, 3)

    assert_close("o", oracle(x, read), make("moba")(x))


def window_weights(x: Inputs, t: int, h: int) -> dict[int, torch.Tensor]:
    """The softmax of query head h over the means of 2 keys, one every key, that end before t."""
    ends = [w for w in range(t + 1) if w + 2 <= t]
    if not ends:
        return {}
    means = [x.k[0, w : w + 2, h // 2].mean(dim=0) for w in ends]
    return dict(zip(ends, torch.softmax(0.7 * torch.stack(means) @ x.q[0, t, h], dim=0)))


def by_windows(x: Inputs, t: int, h: int, initial: int, local: int) -> set[int]:
    own = t // 4
    heads = [window_weights(x, t, other) for other in range(4) if other // 2 == h // 2]
    forced = {c for c in range(own + 1) if c < initial or c > own - local}

    def score(c: int) -> float:
        near = [w for w in heads[0] if w < 4 * c + 4 and w + 2 > 4 * c]
        return max((float(sum(p[w] for p in heads)) for w in near), default=0.0)

    return forced | best([c for c in range(own + 1) if c not in forced], score, 4 - len(forced))


def test_infllm_choices_are_those_of_the_paper() -> None:
    """Softmax over windows, summed over the group, the best window of a block; sinks, local."""
    x = inputs(30, batch=1)
    expected = oracle(x, lambda t, h: by_windows(x, t, h, 1, 2))
    assert_close("o", expected, make("infllm")(x))


def test_nsa_adds_the_compressed_branch_by_its_gates() -> None:
    x, mixer = inputs(25, batch=1), make("nsa")
    selected = oracle(x, lambda t, h: by_windows(x, t, h, 1, 1))
    outputs = []
    for t, h in itertools.product(range(25), range(4)):
        weights, g = window_weights(x, t, h), h // 2
        values = {w: x.v[0, w : w + 2, g].mean(dim=0) for w in weights}
        small = sum((weights[w] * values[w] for w in weights), torch.zeros(5, dtype=torch.float64))
        select = 2 * torch.sigmoid(mixer.select_weight[h] @ x.hidden[0, t] + mixer.select_bias[h])
        add = torch.tanh(mixer.compress_weight[h] @ x.hidden[0, t] + mixer.compress_bias[h])
        outputs.append(select * selected[0, t, h] + add * small)
    assert_close("o", torch.stack(outputs).view(1, 25, 4, 5), mixer(x))


def test_nsa_of_the_public_code_scores_blocks_by_the_softmax_summed_over_the_group() -> None:
    x = inputs(37, batch=1)
    options = MIXER.Options(block=4, k=3, initial=1, local=1)

    def read(t: int, h: int) -> set[int]:
        own = t // 4
        means = [x.k[0, 4 * c : 4 * c + 4, h // 2].mean(dim=0) for c in range(own)]
        if not means:
            return {0}
        heads = [i for i in range(4) if i // 2 == h // 2]
        p = sum(torch.softmax(0.7 * torch.stack(means) @ x.q[0, t, i], dim=0) for i in heads)
        return {0, own} | best(list(range(1, own)), lambda c: float(p[c]), 1)

    assert_close("o", oracle(x, read), MIXER.Mixer(shape(), options)(x))


def test_maxima_are_taken_element_by_element() -> None:
    x = inputs(29, batch=1)

    def read(t: int, h: int) -> set[int]:
        own = t // 4
        tops = [x.k[0, 4 * c : 4 * c + 4, h // 2].amax(dim=0) for c in range(own)]
        if not tops:
            return {0}
        heads = [i for i in range(4) if i // 2 == h // 2]
        p = sum(torch.softmax(0.7 * torch.stack(tops) @ x.q[0, t, i], dim=0) for i in heads)
        return {own} | best(list(range(own)), lambda c: float(p[c]), 3)

    assert_close("o", oracle(x, read), make("max")(x))


def test_the_compressed_branch_starts_with_no_share_and_learns() -> None:
    x, on = inputs(40), MIXER.Options(block=4, k=3, initial=1, local=1, compressed=True)
    plain = MIXER.Mixer(shape(), MIXER.Options(block=4, k=3, initial=1, local=1))
    mixer = MIXER.Mixer(shape(), on).double()
    exactly("step 0", plain(x), mixer(x).detach())
    mixer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-3 for p in mixer.parameters())


@each_style
@pytest.mark.parametrize("tokens", (1, 3, 4, 37))
def test_more_places_than_blocks_are_full_attention(style: str, tokens: int) -> None:
    """Also for texts shorter than a block, and lengths that blocks do not divide."""
    x, options = inputs(tokens), MIXER.Options(block=4, k=4, **STYLES[style])
    for k in (10, 1000):
        identity = MIXER.Mixer.identity(MIXER.Options(block=4, k=k, **STYLES[style]), tokens)
        assert_close("o", full(x), MIXER.Mixer(shape(), identity)(x))
    exact = MIXER.Mixer.exact_prefix(options)
    assert exact == (0 if options.compressed else 16)
    if exact:
        mixer = MIXER.Mixer(shape(), options)
        assert_close("prefix", full(x)[:, :exact], mixer(x)[:, :exact])


def listed(tokens: int, ask: _topk.Ask, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    rows = _blocks.Rows.of(None, 1, 0, tokens, q.device)
    held = _topk.append(None, k, ask.pool, ask.block, rows, tokens, True)
    return _topk.route(q, held, rows, tokens, ask)


@pytest.mark.parametrize("heads", (False, True), ids=("group", "head"))
@pytest.mark.parametrize("kind", ("mean", "max", "windows"))
def test_of_equal_blocks_the_first_are_read(kind: str, heads: bool) -> None:
    """On equal keys, by prefill and by one token at a time, in both ways to choose."""
    tokens, block = 60, 4
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, tokens, 4, 6, generator=generator)
    one = torch.randn(1, 1, 2, 6, generator=generator)
    k = one.expand(-1, 64, -1, -1).clone()
    pool = _topk.windows(block) if kind == "windows" else _topk.Pool(block, block, kind == "max")
    ask = _topk.Ask(5, block, 1, 2, heads, pool, kind != "windows", 0.7, None)
    index = listed(tokens, ask, q, k)
    held = None
    for t in range(tokens):
        own = t // block
        forced = [c for c in range(own + 1) if c < 1 or c > own - 2]
        rest = [c for c in range(own + 1) if c not in forced]
        expected = sorted(forced + rest[: 5 - len(forced)])
        expected += [-1] * (5 - len(expected))
        assert index[0, t].tolist() == [expected] * index.shape[2], t
        rows = _blocks.Rows.of(None, 1, t, 1, q.device)
        held = _topk.append(held, k, pool, block, rows, t + 1, True)
        step = _topk.route(q[:, t : t + 1], held, rows, t + 1, ask)
        wide = step.shape[3]
        assert step[0, 0].tolist() == [expected[:wide]] * step.shape[2], t
        assert expected[wide:] == [-1] * (5 - wide)


@pytest.mark.parametrize("heads", (False, True), ids=("group", "head"))
def test_scores_with_ties_are_ranked_as_by_a_stable_sort(heads: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    s = torch.randint(0, 4, (3, 50, 2, 20), generator=generator).double()
    s[s == 0] = -math.inf
    own = torch.arange(50)[None] * 2 // 5
    for k, initial, local in ((1, 0, 1), (4, 1, 2), (7, 0, 3), (20, 2, 2)):
        ask = _topk.Ask(k, 1, initial, local, heads, _topk.Pool(1, 1), True, 1.0, None)
        index = _topk.best(s, own, ask)
        exactly("index", _topk.best(s, own, ask, plain=True), index)
        for t in (0, 7, 31, 49):
            o = int(own[0, t])
            forced = {c for c in range(o + 1) if c < initial or c > o - local}
            for row in range(3):
                score = s[row, t, 1].tolist().__getitem__
                rest = [c for c in range(o + 1) if c not in forced]
                want = sorted(forced | best(rest, score, k - len(forced)))
                assert index[row, t, 1].tolist() == want + [-1] * (k - len(want))


@each_style
def test_decoding_reads_the_listed_blocks_and_nothing_else(style: str) -> None:
    """Every other key and value of the state may be poison."""
    x, mixer = inputs(40, batch=1), make(style)
    state, past = State(), 39  # the own block is then full, and no place of it void
    with torch.no_grad():
        mixer(cut(x, 0, past), state)
        clean = mixer(cut(x, past, 40), state.clone())
        options = mixer.options
        kept = state.tensors["summaries"]
        windows = options.summary == "windows"
        top = options.summary == "max"
        pool = _topk.windows(4) if windows else _topk.Pool(4, 4, top)
        heads = options.per == "head"
        ask = _topk.Ask(4, 4, options.initial, options.local, heads, pool, not windows, 0.7, None)
        rows = _blocks.Rows.of(None, 1, past, 1, kept.device)
        index = _topk.route(x.q[:, past:], kept, rows, 40, ask)
        assert index.shape[3] == 4 and (index >= 0).all()
        read = torch.zeros(10, 2, dtype=torch.bool)
        for j in range(index.shape[2]):
            read[index[0, 0, j].long(), j * 2 // index.shape[2]] = True
        assert not read.all()
        for name in ("k", "v"):
            held = state.tensors[name]
            held[0, :40][~read.repeat_interleave(4, dim=0)] = math.nan
        poisoned = mixer(cut(x, past, 40), state)
    assert torch.isfinite(poisoned).all()
    exactly("o", clean, poisoned)


@each_style
@pytest.mark.parametrize("padded", (False, True), ids=("real", "padded"))
def test_summaries_kept_token_by_token_are_those_of_a_prefill(style: str, padded: bool) -> None:
    x, mixer = inputs(50), make(style, block=6)
    if padded:
        x = Inputs(**{n: getattr(x, n) for n in ("q", "k", "v", "hidden")}, padding=left(50, 0, 7))
    whole, steps = State(), State()
    with torch.no_grad():
        expected = mixer(x, whole)
        got = [mixer(cut(x, 0, 20), steps)]
        got += [mixer(cut(x, t, t + 1), steps) for t in range(20, 50)]
    for name, held in whole.tensors.items():
        exactly(name, held, steps.tensors[name])
    assert_close("o", expected, torch.cat(got, dim=1))


def left(tokens: int, *pads: int) -> torch.Tensor:
    return torch.stack([torch.arange(tokens) >= pad for pad in pads])


@each_style
def test_a_row_of_padding_alone_is_zeros_and_harms_nobody(style: str) -> None:
    x, mixer = inputs(30), make(style)
    padded = Inputs(
        **{n: getattr(x, n) for n in ("q", "k", "v", "hidden")}, padding=left(30, 30, 0)
    )
    leaf = padded.k.requires_grad_()
    state = State()
    o = mixer(padded)
    assert not o[0].any()
    assert_close("other row", mixer(x)[1], o[1])
    o.square().sum().backward()
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[0].any()
    with torch.no_grad():
        pieces = [mixer(cut(padded, a, b), state) for a, b in ((0, 17), (17, 18), (18, 30))]
    assert_close("in pieces", o, torch.cat(pieces, dim=1))


@each_style
def test_a_state_without_gradients_is_written_in_place_and_a_clone_is_not(style: str) -> None:
    x, mixer, state = inputs(50), make(style), State()
    with torch.no_grad():
        mixer(cut(x, 0, 40), state)
        held, other = dict(state.tensors), state.clone()
        mixer(cut(x, 40, 41), state)
        assert all(state.tensors[name] is held[name] for name in held)
        before = {name: t.clone() for name, t in other.tensors.items()}
        block_topk.forward(
            *(getattr(x, n)[:, 40:41] for n in "qkv"),
            k_blocks=4,
            block_size=4,
            initial=mixer.options.initial,
            local=mixer.options.local,
            summary=mixer.options.summary,
            compress_gate=torch.ones(2, 1, 4) if mixer.options.compressed else None,
            initial_state=MIXER._load(other, x.v),
        )
    for name, t in other.tensors.items():
        exactly(name, before[name], t)


class _Largest(TorchDispatchMode):
    """The most elements that a tensor made by any operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("style", ("moba", "nsa"))
def test_a_long_prefill_never_holds_all_scores(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the chunks of a long text scaled down to those of a short one."""
    monkeypatch.setattr(_pooled, "_CPU_ELEMENTS", 1 << 16)
    monkeypatch.setattr(_gathered, "_ENTRIES", 1 << 16)
    mixer = make(style, block=2, dtype=torch.float32)
    x = inputs(1024, batch=1, dtype=torch.float32)
    with torch.no_grad(), _Largest() as made:
        mixer(x)
    assert made.numel < 4 * 1024 * 512 / 8  # H T (T / block) is eight times that


def test_compressed_gradients_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (1 << 20, 1 << 10):
        monkeypatch.setattr(_pooled, "_CPU_ELEMENTS", most)
        x, mixer = inputs(45), make("nsa")
        leaves = [getattr(x, n).requires_grad_() for n in ("q", "k", "v", "hidden")]
        o = mixer(x)
        found.append(torch.autograd.grad(o.sin().sum(), [*leaves, *mixer.parameters()]))
    for whole, chunked in zip(*found, strict=True):
        assert_close("gradient", whole, chunked)


def test_what_is_read_is_counted() -> None:
    x = inputs(30)
    x = Inputs(**{n: getattr(x, n) for n in ("q", "k", "v", "hidden")}, padding=left(30, 0, 11))
    for style, lists in (("moba", 4), ("infllm", 2)):
        mixer = make(style)
        read = mixer.blocks_read(x)
        assert read.shape == (2, 30, lists)
        assert read[0, :, 0].tolist() == [min(4, t // 4 + 1) for t in range(30)]
        assert read[1, :, 0].tolist() == [0] * 11 + [min(4, t // 4 + 1) for t in range(19)]


def test_decode_bytes_are_the_blocks_and_the_summaries_looked_at() -> None:
    entry = (6 + 5) * 2

    def per_kv_head(seq_len: int, **options: Any) -> float:
        made = MIXER.Options(block=4, k=4, **options)
        return MIXER.Mixer.decode_bytes(made, shape(), seq_len, 2) / 2

    plain = STYLES["infllm"] | {"summary": "mean"}
    assert per_kv_head(16, **plain) == 16 * entry
    assert per_kv_head(17, **plain) == 13 * entry + 4 * 4 * 6
    assert per_kv_head(100, **plain) == 16 * entry + 4 * 24 * 6
    # 98 windows of two tokens end before the hundredth
    assert per_kv_head(100, **STYLES["infllm"]) == 16 * entry + 4 * 98 * 6
    assert per_kv_head(100, **STYLES["nsa"]) == 16 * entry + 4 * 98 * (6 + 5)
    assert per_kv_head(100, **STYLES["fla"]) == 16 * entry + 4 * (24 * 6 + 98 * (6 + 5))
    # two heads may choose three blocks each
    assert per_kv_head(100, **STYLES["moba"]) == 28 * entry + 4 * 24 * 6


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"block": 0}, "block is 0; give 1 to 65536"),
        ({"block": 65537}, "block is 65537; give 1 to 65536"),
        ({"initial": -1}, "initial is -1; give 0"),
        ({"local": 0}, "local is 0; it counts the query's own block"),
        ({"k": 2}, "k is 2; .* give 3 to"),
        ({"k": 2**31}, "k is 2147483648; .* give 3 to 2147483647"),
        ({"initial": 15}, "k is 16; .* initial 15 and local 2 .* give 17"),
        ({"summary": "median"}, "median"),
        ({"per": "layer"}, "layer"),
    ],
)
def test_options_say_what_is_allowed(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        strict.build(MIXER.Options, bad)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"k_blocks": 2, "initial": 1, "local": 2}, "k_blocks is 2; .* must be 3"),
        ({"local": 0}, "local is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"pool": -1}, "pool is -1"),
        ({"pool_stride": 0}, "pool and pool_stride must be 1"),
        ({"summary": "median"}, "mean, max, windows"),
        ({"per": "layer"}, "head or group"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"compress_gate": torch.ones(2, 9, 3)}, r"compress_gate must be .*\[2, 9, 3\]"),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(bad: dict[str, Any], said: str) -> None:
    x = inputs(9)
    with pytest.raises(ValueError, match=said):
        block_topk.forward(x.q, x.k, x.v, **{"k_blocks": 4, "block_size": 4, **bad})


def test_a_state_of_other_options_is_refused() -> None:
    x = inputs(9)
    _, held = block_topk.forward(x.q, x.k, x.v, k_blocks=4, block_size=4, output_final_state=True)
    for other in (
        {"block_size": 8},
        {"block_size": 4, "summary": "windows"},
        {"block_size": 4, "compress_gate": torch.ones(2, 9, 4)},
    ):
        with pytest.raises(ValueError, match="initial_state"):
            block_topk.forward(x.q, x.k, x.v, k_blocks=4, initial_state=held, **other)


def test_windows_of_any_size_are_found() -> None:
    """Every window that shares a token with a block, whatever divides what."""
    for block, size, stride in ((4, 2, 1), (8, 4, 2), (5, 2, 3), (3, 7, 2), (6, 1, 4)):
        pool = _topk.Pool(size, stride)
        ask = _topk.Ask(1, block, 0, 1, False, pool, False, 1.0, None)
        count = pool.complete(11 * block)
        near = _topk.overlaps(11, count, ask)
        for c in range(11):
            got = sorted(set(near[c].tolist()) - {count})
            touched = range(c * block, c * block + block)
            assert got == [
                w for w in range(count) if set(touched) & set(range(w * stride, w * stride + size))
            ]
