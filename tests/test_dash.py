"""DashAttention: its limits, its written-out formula, its state, its knob and its calibration."""

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
from morph.kernels import _dash_routing, _pooled, dash, sliding
from morph.kernels._entmax import entmax
from morph.mixers import dash as mixer_file
from morph.mixers._base import GroupShape, Inputs
from morph.testing import assert_close, exactly

B, T, H, G, K, V = 2, 90, 6, 2, 8, 5


def given(tokens: int = T, batch: int = B, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"B": batch, "T": tokens, "H": H, "G": G, "K": K, "V": V}
    options = {"block_size": 8, "gamma": 6.0, "sigma": 2.0, **options}
    return dash.example(**sizes, dtype=torch.float64, generator=generator, **options)


def full(inputs: dict[str, Any]) -> torch.Tensor:
    names = ("softcap", "padding")
    return sliding.reference(
        *(inputs[n] for n in "qkv"),
        window_size=None,
        **{n: inputs[n] for n in names if n in inputs},
    )[0]


def written_out(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, one query and head at a time; also which blocks every KV head reads."""
    q, k, v = (inputs[n] for n in "qkv")
    block, sigma, cap = inputs["block_size"], inputs["sigma"], inputs.get("softcap")
    scale, ratio, (batch, tokens) = K**-0.5, H // G, q.shape[:2]
    outputs = torch.zeros(batch, tokens, H, V, dtype=q.dtype)
    reads = torch.zeros(batch, tokens, G, -(-tokens // block), dtype=torch.bool)
    for b, t, g in itertools.product(range(batch), range(tokens), range(G)):
        own = t // block
        heads = range(g * ratio, (g + 1) * ratio)
        keys = [k[b, c * block : (c + 1) * block, g] for c in range(own)]
        sums = [torch.softmax(x @ inputs["summary_query"][g] * scale, 0) @ x for x in keys]
        z = [
            torch.stack([inputs["gamma"][h] * scale * (q[b, t, h] @ s) for s in sums])
            for h in heads
            if sums
        ]
        mean = sum(entmax(x, alpha=inputs.get("alpha", 1.5), exact=True) for x in z) / ratio
        bias = torch.full((own + 1,), -math.inf, dtype=q.dtype)
        bias[own] = 0.0
        if sums:
            inside = mean > 0
            log = mean[inside].log()
            bias[:own][inside] = (log - log.mean()) / sigma
        reads[b, t, g, : own + 1] = bias > -math.inf
        for h in heads:
            s = k[b, : t + 1, g] @ q[b, t, h] * scale
            s = s if cap is None else cap * torch.tanh(s / cap)
            s = s + bias.repeat_interleave(block)[: t + 1]
            outputs[b, t, h] = torch.softmax(s, 0) @ v[b, : t + 1, g]
    return outputs, reads


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"softcap": 2.0, "sigma": 0.7},
        {"alpha": 1.25, "block_size": 11, "gamma": 20.0},
        {"alpha": 2.0, "gamma": 3.0},
        {"alpha": 1.0},
        {"sigma": math.inf},
        {"gamma": -4.0},
    ),
)
@pytest.mark.parametrize("run", (dash.forward, dash.reference), ids=("forward", "reference"))
def test_it_is_the_formula_written_out(options: dict[str, Any], run: Any) -> None:
    inputs = given(45, **options)
    expected, reads = written_out(inputs)
    assert_close("o", expected, run(**inputs)[0])
    asked = {n: inputs[n] for n in ("q", "k", "summary_query", "gamma", "block_size")}
    got = dash.blocks_read(**asked, alpha=inputs.get("alpha", 1.5))
    assert torch.equal(reads.sum(dim=-1), got)
    if options.get("alpha") != 1.0:
        assert (got[:, -1] < 45 // inputs["block_size"] + 1).any(), "nothing was left out"


@pytest.mark.parametrize("sigma", (0.01, 1.0, 1e6, math.inf))
def test_gamma_zero_is_full_attention(sigma: float) -> None:
    inputs = {**given(), "gamma": 0.0, "sigma": sigma}
    assert_close("o", full(inputs), dash.forward(**inputs)[0])


@pytest.mark.parametrize("block", (45, 64, 90, 200))
def test_two_blocks_are_full_attention(block: int) -> None:
    inputs = given(block_size=block)
    assert_close("o", full(inputs), dash.forward(**inputs)[0])


def test_infinite_sigma_is_softmax_under_a_mask_of_blocks() -> None:
    inputs = given(sigma=math.inf)
    _, reads = written_out(inputs)
    seen = reads.repeat_interleave(8, dim=-1)[..., :T].repeat_interleave(H // G, dim=2)
    seen = seen.transpose(1, 2) & torch.ones(T, T, dtype=torch.bool).tril()
    q, k, v = (inputs[n].transpose(1, 2) for n in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True
    ).transpose(1, 2)
    assert_close("o", expected, dash.forward(**inputs)[0])
    near = dash.forward(**{**inputs, "sigma": 1e9})[0]
    assert_close("large sigma", expected, near, ratio=1e-7)


def test_a_zero_query_sums_up_to_means_and_others_do_not() -> None:
    inputs = {**given(), "summary_query": torch.zeros(G, K, dtype=torch.float64)}
    _, state = dash.forward(**inputs, output_final_state=True)
    assert state is not None
    means = inputs["k"][:, :88].unflatten(1, (11, 8)).mean(dim=2)
    assert_close("means", means, state.summaries[:, :11])
    assert not state.summaries[:, 11:].any()
    _, other = dash.forward(**given(), output_final_state=True)
    assert other is not None and not torch.allclose(means, other.summaries[:, :11])


def test_the_support_of_a_group_is_the_union_of_its_heads() -> None:
    inputs = given(alpha=2.0)
    asked = {n: inputs[n] for n in ("summary_query", "block_size", "alpha")}
    _, reads = written_out(inputs)
    for g in range(G):
        alone = torch.zeros_like(reads[:, :, g])
        for h in range(g * H // G, (g + 1) * H // G):
            one = {**inputs, "summary_query": inputs["summary_query"][g : g + 1]}
            one |= {n: inputs[n][:, :, g : g + 1] for n in "kv"}
            one |= {"q": inputs["q"][:, :, h : h + 1], "gamma": inputs["gamma"][h : h + 1]}
            p = _weights(one)
            alone[..., : p.shape[-1]] |= p[:, :, 0] > 0
        own = torch.arange(T) // 8
        alone[:, torch.arange(T), own] = True
        assert torch.equal(alone, reads[:, :, g])
    asked |= {"q": inputs["q"], "k": inputs["k"], "gamma": inputs["gamma"]}
    assert torch.equal(reads.sum(dim=-1), dash.blocks_read(**asked))


def _weights(inputs: dict[str, Any]) -> torch.Tensor:
    k, block = inputs["k"], inputs["block_size"]
    ask = dash.Ask(
        inputs["summary_query"], inputs["gamma"], inputs["alpha"], 1.0, block, K**-0.5, None
    )
    whole = k[:, : T // block * block].unflatten(1, (-1, block))
    own = (torch.arange(T) // block)[None]
    return _dash_routing.weights(
        inputs["q"], _dash_routing.summarise(whole, ask), own, ask, exact=True
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("cuts", (tuple(range(1, T)), (3, 40, 41, 47, 48, 49)))
def test_summaries_have_the_same_bits_however_the_tokens_came(
    cuts: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = given(batch=3)
    floats = {n: x.to(dtype) for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    inputs = {**inputs, **floats}
    with torch.no_grad():
        _, whole = dash.forward(**inputs, output_final_state=True)
        state = None
        for start, stop in itertools.pairwise((0, *cuts, T)):
            part = {n: inputs[n][:, start:stop] for n in "qkv"}
            _, state = dash.forward(
                **{**inputs, **part}, initial_state=state, output_final_state=True, in_place=True
            )
    assert whole is not None and state is not None
    exactly("summaries", whole.summaries, state.summaries)
    exactly("k", whole.k, state.k)
    assert whole.summaries.dtype == torch.float32


def test_a_decoded_token_reads_what_it_chose_and_nothing_else() -> None:
    """NaN in the blocks that it did not choose, and in void room, must not reach the output."""
    inputs = given(T + 1, batch=1)
    _, reads = written_out(inputs)
    last = {n: inputs[n][:, -1:] for n in "qkv"}
    before = {n: inputs[n][:, :-1] for n in "qkv"}
    with torch.no_grad():
        _, state = dash.forward(**{**inputs, **before}, output_final_state=True)
        whole, _ = dash.forward(**inputs)
        assert state is not None
        for g in range(G):
            for c in range(T // 8):
                if not reads[0, -1, g, c]:
                    state.k[0, c * 8 : (c + 1) * 8, g] = math.nan
                    state.v[0, c * 8 : (c + 1) * 8, g] = math.nan
        assert state.k.isnan().any()
        got, _ = dash.forward(**{**inputs, **last}, initial_state=state)
    assert_close("o", whole[:, -1:], got)


def test_padded_rows_are_alone_and_an_empty_one_is_zeros() -> None:
    inputs = given(batch=3)
    padding = torch.ones(3, T, dtype=torch.bool)
    padding[0, :13], padding[1] = False, False
    padding[2, 5:9], padding[2, 80:] = False, False
    o, state = dash.forward(**inputs, padding=padding, output_final_state=True)
    assert not o[~padding].any()
    for row in (0, 2):
        alone = {n: inputs[n][row : row + 1, padding[row]] for n in "qkv"}
        assert_close(f"row {row}", dash.forward(**{**inputs, **alone})[0][0], o[row, padding[row]])
    assert state is not None and torch.isfinite(state.summaries).all()
    nobody, _ = dash.forward(**inputs, padding=torch.zeros(3, T, dtype=torch.bool))
    assert not nobody.any()


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_gradients_are_those_of_finite_differences(alpha: float) -> None:
    generator, sizes = torch.Generator().manual_seed(6), {"B": 1, "H": 2, "G": 1, "K": 3, "V": 2}
    options = {"block_size": 2, "alpha": alpha, "gamma": 3.0, "sigma": 1.5}
    inputs = dash.example(T=8, **sizes, dtype=torch.float64, generator=generator, **options)
    names = ("q", "k", "v", "summary_query", "gamma")
    leaves = [inputs[n].requires_grad_() for n in names]
    for run in (dash.forward, dash.reference):

        def call(*given: torch.Tensor, run: Any = run) -> torch.Tensor:
            return run(**{**inputs, **dict(zip(names, given))})[0]

        assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-5)


def test_long_calls_in_chunks_have_the_same_outputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = given()
    names = ("q", "k", "v", "summary_query", "gamma")
    leaves = [inputs[n].requires_grad_() for n in names]
    found = []
    for size in (1 << 20, 700):
        monkeypatch.setattr(_pooled, "_CPU_ELEMENTS", size)
        o, _ = dash.forward(**inputs)
        grads = torch.autograd.grad(o.square().sum(), leaves)
        with torch.no_grad():
            found.append((o, dash.forward(**inputs)[0], *grads))
    assert len(_dash_routing.chunks(inputs["q"], T, 8)) > 10
    for name, one, other in zip(("o", "o without", *names), *found, strict=True):
        assert_close(name, one, other)


@pytest.mark.parametrize(
    ("bad", "said"),
    (
        ({"block_size": 0}, "block_size is 0"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"sigma": 0.0}, "sigma is 0"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"gamma": torch.ones(H + 1)}, r"gamma must be \[6\]"),
        ({"summary_query": torch.ones(G, K + 1)}, r"summary_query must be floating, \[2, 8\]"),
    ),
)
def test_what_does_not_fit_is_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dash.forward(**{**given(9), **bad})


def test_a_state_of_other_blocks_is_refused() -> None:
    inputs = given(9)
    _, state = dash.forward(**inputs, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state.summaries must be \[2, 64, 2, 8\]"):
        dash.forward(**{**inputs, "block_size": 4}, initial_state=state)


def shape(**changes: Any) -> GroupShape:
    values: dict[str, Any] = {
        "layer_idx": 0,
        "num_hidden_layers": 1,
        "heads": tuple(range(H)),
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": K,
        "v_head_dim": V,
        "hidden_size": 12,
        "scale": K**-0.5,
    }
    return GroupShape(**{**values, **changes})


def seen(tokens: int, batch: int = 2, padding: torch.Tensor | None = None) -> Inputs:
    generator = torch.Generator().manual_seed(4)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch, tokens, *size, generator=generator)

    return Inputs(
        q=random(H, K), k=random(G, K), v=random(G, V), hidden=random(12), padding=padding
    )


def unread(mixer: Any, inputs: Inputs) -> torch.Tensor:
    """The share of complete blocks before the queries' own that every KV head leaves, [G]."""
    block, (batch, tokens) = mixer.options.block, inputs.q.shape[:2]
    past = batch * (torch.arange(tokens) // block).sum()
    return 1 - (mixer.blocks_read(inputs) - 1).sum(dim=(0, 1)) / past


@pytest.mark.parametrize("target", (0.0, 0.5, 0.75, 0.9))
@pytest.mark.parametrize("alpha", (1.5, 2.0))
def test_calibration_finds_the_gamma_of_a_sparsity(target: float, alpha: float) -> None:
    """Within half a percent for every KV head, and the same on text that it has not seen to 3."""
    options = mixer_file.Options(block=8, sparsity=target, alpha=alpha)
    mixer, inputs = mixer_file.Mixer(shape(), options), seen(512)
    mixer.calibrate([(inputs, inputs.v)])
    assert (unread(mixer, inputs) - target).abs().max() < 0.005
    other = dataclasses.replace(inputs, q=inputs.q.flip(1), k=inputs.k.flip(1))
    assert (unread(mixer, other) - target).abs().max() < 0.03
    assert mixer.gamma is not None
    each = mixer.gamma.view(G, -1)
    assert (each == each[:, :1]).all() and (each > 0).all()


def test_a_sparsity_out_of_reach_ends_at_the_nearest_there_is() -> None:
    """One past block is always read: of at most 7, more than a seventh."""
    options = mixer_file.Options(block=8, sparsity=0.999)
    mixer, inputs = mixer_file.Mixer(shape(), options), seen(64)
    mixer.calibrate([(inputs, inputs.v)])
    read = mixer.blocks_read(inputs)
    assert read[:, -1].float().mean() < 3.5 and (read[:, 8:] >= 2).all()
    short = mixer_file.Mixer(shape(), options)
    short.calibrate([(seen(8), seen(8).v)])
    assert short.gamma is not None and (short.gamma == 1.0).all()
    plain = mixer_file.Mixer(shape(), mixer_file.Options(block=8, gamma=2.5))
    plain.calibrate([(inputs, inputs.v)])
    assert plain.gamma is not None and (plain.gamma == 2.5).all()


def test_padding_does_not_count_in_calibration() -> None:
    real = torch.ones(2, 256, dtype=torch.bool)
    real[0, :100] = False
    options, padded = mixer_file.Options(block=8, sparsity=0.6), seen(256, padding=real)
    mixer = mixer_file.Mixer(shape(), options)
    mixer.calibrate([(padded, padded.v)])
    read, past = mixer.blocks_read(padded), torch.tensor([156, 256])
    assert not read[0, :100].any()
    whole = sum(int((torch.arange(n) // 8).sum()) for n in past)
    left = 1 - (read - 1).clamp(min=0).sum(dim=(0, 1)) / whole
    assert (left - 0.6).abs().max() < 0.005


def test_a_larger_gamma_reads_less() -> None:
    inputs, found = seen(256), []
    for gamma in (0.0, 0.5, 2.0, 8.0, 64.0):
        options = mixer_file.Options(block=8, gamma=gamma)
        found.append(mixer_file.Mixer(shape(), options).blocks_read(inputs))
    assert all((more >= less).all() for more, less in itertools.pairwise(found))
    assert torch.equal(found[0][..., 0], (torch.arange(256) // 8 + 1).expand(2, -1))
    assert found[-1].double().mean() < found[1].double().mean() / 2


def test_alpha_rises_over_the_ramp_and_is_whole_outside_of_training() -> None:
    inputs, options = seen(64), mixer_file.Options(block=4, alpha=2.0, ramp=0.5, gamma=4.0)
    mixer = mixer_file.Mixer(shape(), options)
    whole = mixer(inputs)
    reads = []
    for share in (0.0, 0.2, 0.4, 0.5, 0.8, 1.0):
        mixer.progress(share)
        reads.append(int(mixer.blocks_read(inputs).sum()))
    assert reads[0] > reads[1] > reads[2] > reads[3] == reads[4] == reads[5]
    exactly("heads", whole, mixer(inputs))
    mixer.progress(0.0)
    at_start = mixer_file.Mixer(shape(), dataclasses.replace(options, alpha=1.25))
    exactly("heads", at_start(inputs), mixer(inputs))
    plain = mixer_file.Mixer(shape(), dataclasses.replace(options, ramp=0.0))
    plain.progress(0.0)
    exactly("heads", whole, plain(inputs))
    low = mixer_file.Mixer(shape(), dataclasses.replace(options, alpha=1.1))
    low.progress(0.0)
    exactly("heads", low(inputs), low(inputs))


@pytest.mark.parametrize(
    ("bad", "said"),
    (
        ({"block": 0}, "block is 0; give 1 to 1048576"),
        ({"alpha": 0.9}, "alpha is 0.9; give 1"),
        ({"alpha": 2.5}, "alpha is 2.5"),
        ({"gamma": -1.0}, "gamma is -1.0; give 0"),
        ({"gamma": 2e6}, "gamma is 2000000.0; give 0"),
        ({"sigma": 0.0}, "sigma is 0"),
        ({"sigma": -1.0}, "sigma is -1"),
        ({"sparsity": 1.0}, "sparsity is 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"ramp": 1.5}, "ramp is 1.5"),
    ),
)
def test_options_are_bounded(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"mixer dash: {said}"):
        strict.build(mixer_file.Options, bad)


def test_a_layer_that_slides_is_the_sources_window_without_parameters() -> None:
    inputs, state = seen(40), State()
    mixer = mixer_file.Mixer(shape(window=6), mixer_file.Options(block=4))
    assert not list(mixer.parameters())
    expected, _ = sliding.reference(inputs.q, inputs.k, inputs.v, window_size=6)
    assert_close("heads", expected, mixer(inputs, state))
    read = mixer.blocks_read(inputs)[0, :, 0].tolist()
    assert read[:7] == [1, 1, 1, 1, 2, 2, 2] and max(read) == 3
    assert mixer.cache_cost(mixer.options, mixer.shape).tokens == 6
    mixer.calibrate([(inputs, inputs.v)])


def test_bytes_of_a_decoded_token_follow_the_sparsity() -> None:
    shaped, whole = shape(), mixer_file.Options(block=64)
    entry, summary = (K + V) * 2 * G, K * 4 * G
    count = mixer_file.Mixer.decode_bytes
    assert count(whole, shaped, 64 * 100, 2) == 6400 * entry + 99 * summary
    sparse = dataclasses.replace(whole, sparsity=0.75)
    assert count(sparse, shaped, 64 * 101, 2) == 26 * 64 * entry + 100 * summary
    assert count(sparse, shaped, 1, 2) == entry
    assert count(dataclasses.replace(whole, sparsity=0.999), shaped, 129, 2) == 65 * entry + (
        2 * summary
    )
