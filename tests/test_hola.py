"""HOLA: its limits, which tokens its cache keeps, and its start as a conversion of attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from morph import strict
from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import gated_delta, hola, sliding
from morph.mixers import hola as mixer_file
from morph.mixers._base import GroupShape, Inputs
from morph.testing import assert_close, error_ratio, exactly

B, T, H, G, K, V = 2, 90, 6, 2, 8, 5


def given(tokens: int = T, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"B": B, "T": tokens, "H": H, "G": G, "K": K, "V": V}
    options = {"cache_size": 6, "block_size": 8, **options}
    return hola.example(**sizes, dtype=torch.float64, generator=generator, **options)


def alone(inputs: dict[str, Any]) -> dict[str, Any]:
    """The cache path alone, its gain 1."""
    return {**inputs, "mix_state": None, "mix_cache": torch.ones(H)}


def cut(inputs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    out = {
        n: x[:, start:stop] if n in ("q", "k", "v", "g", "beta") else x for n, x in inputs.items()
    }
    return {**out, "padding": inputs["padding"][:, :stop]} if "padding" in inputs else out


def scores(inputs: dict[str, Any]) -> torch.Tensor:
    """What every token writes over the query heads of a KV head [B, T, G], token by token."""
    ratio = H // G
    k = inputs["k"] * torch.rsqrt(inputs["k"].square().sum(-1, keepdim=True) + 1e-6)
    k, v = k.repeat_interleave(ratio, dim=2), inputs["v"].repeat_interleave(ratio, dim=2)
    state, out = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(k.shape[1]):
        state = state * inputs["g"][:, t].exp()[..., None, None]
        error = v[:, t] - (state * k[:, t, :, :, None]).sum(dim=2)
        write = k[:, t, :, :, None] * (inputs["beta"][:, t, :, None] * error)[:, :, None]
        state = state + write
        out.append(write.flatten(2).unflatten(1, (G, ratio)).flatten(2).norm(dim=-1))
    return torch.stack(out, dim=1)


def kept(state: hola.HolaState, b: int, j: int) -> list[int]:
    return [int(x) for x in state.at[b, :, j] if x >= 0]


@pytest.mark.parametrize("block", (1, 7, 64, 256))
def test_a_cache_of_everything_is_full_causal_attention(block: int) -> None:
    inputs = alone(given(cache_size=T, block_size=block, softcap=3.0))
    expected, _ = sliding.reference(*(inputs[n] for n in "qkv"), softcap=3.0)
    assert_close("o", expected, hola.forward(**inputs)[0])
    inputs["sink"] = torch.randn(H, dtype=torch.float64)
    bias = {"softcap": 3.0, "sink_bias": inputs["sink"]}
    expected, _ = sliding.reference(*(inputs[n] for n in "qkv"), **bias)
    assert_close("o", expected, hola.forward(**inputs)[0])


@pytest.mark.parametrize("window", (1, 5, 8, 30))
def test_a_cache_of_a_window_is_the_window(window: int) -> None:
    inputs = alone(given(cache_size=window, block_size=8, window_size=window))
    expected, _ = sliding.reference(*(inputs[n] for n in "qkv"), window_size=window)
    assert_close("o", expected, hola.forward(**inputs)[0])


def test_without_a_cache_a_token_sees_its_block() -> None:
    inputs = alone(given(cache_size=0, block_size=30))
    expected = [
        sliding.reference(*(inputs[n][:, a : a + 30] for n in "qkv"))[0] for a in (0, 30, 60)
    ]
    assert_close("o", torch.cat(expected, dim=1), hola.forward(**inputs)[0])


def test_without_a_share_of_the_cache_it_is_the_gated_delta_rule() -> None:
    inputs = given()
    inputs["mix_cache"], inputs["mix_state"] = torch.zeros(H), torch.ones(H)
    q, k = (F.normalize(inputs[n], dim=-1) for n in "qk")
    gates = {"g": inputs["g"], "beta": inputs["beta"], "scale": 1.0}
    expected, state = gated_delta.forward(q, k, inputs["v"], **gates, output_final_state=True)
    got, final = hola.forward(**inputs, output_final_state=True)
    assert_close("o", expected, got, ratio=1e-6)  # unit length but for an epsilon
    assert_close("state", state, final.s, ratio=1e-6)


@pytest.mark.parametrize("run", (hola.forward, hola.reference), ids=("forward", "reference"))
def test_what_is_kept_is_the_best_of_the_prefix_and_the_block(run: Any) -> None:
    inputs = given()
    m = scores(inputs)
    for stop in (1, 5, 8, 9, 40, 47, T):
        _, state = run(**cut(inputs, 0, stop), output_final_state=True)
        start = stop // 8 * 8
        for b, j in itertools.product(range(B), range(G)):
            best = sorted(range(start), key=lambda t: (-m[b, t, j].item(), t))[:6]
            assert kept(state, b, j) == sorted(best) + list(range(start, stop)), (stop, b, j)
            right = m[b, kept(state, b, j), j]
            # keys are of length 1 but for an epsilon
            got = state.score[b, state.at[b, :, j] >= 0, j]
            assert_close("scores", right, got, ratio=1e-6)


def test_keys_and_values_kept_are_those_of_their_positions() -> None:
    inputs = given()
    _, state = hola.forward(**inputs, output_final_state=True)
    for b, j in itertools.product(range(B), range(G)):
        real = state.at[b, :, j] >= 0
        for name in "kv":
            exactly(name, inputs[name][b, kept(state, b, j), j], getattr(state, name)[b, real, j])


@pytest.mark.parametrize("stop", (24, 29))
def test_of_equal_scores_the_earliest_stay(stop: int) -> None:
    inputs = cut(given(), 0, stop)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    want = [*range(6), *range(24, stop)]
    for run in (hola.forward, hola.reference):
        _, state = run(**inputs, output_final_state=True)
        assert all(kept(state, b, j) == want for b in range(B) for j in range(G))
        real = state.score[state.at >= 0]
        assert not real.any()
    state = None
    for t in range(stop):
        _, state = hola.forward(
            **cut(inputs, t, t + 1), initial_state=state, output_final_state=True
        )
    assert all(kept(state, b, j) == want for b in range(B) for j in range(G))


@pytest.mark.parametrize("padded", (False, True), ids=("real", "padded"))
@pytest.mark.parametrize("window", (None, 9))
def test_pieces_of_any_size_keep_the_same_tokens(padded: bool, window: int | None) -> None:
    inputs = given(window_size=window)
    if padded:
        inputs["padding"] = torch.ones(B, T, dtype=torch.bool)
        inputs["padding"][0, :13] = False
    _, whole = hola.forward(**inputs, output_final_state=True)
    for cuts in ((3,), (8, 16), (11, 12, 50), tuple(range(1, T))):
        state = None
        for start, stop in itertools.pairwise((0, *cuts, T)):
            piece = cut(inputs, start, stop)
            _, state = hola.forward(**piece, initial_state=state, output_final_state=True)
        exactly("at", whole.at, state.at)
        exactly("k", whole.k, state.k)


def test_where_scores_rise_the_cache_is_a_window_up_to_the_block() -> None:
    inputs = alone(given())
    inputs["g"] = torch.full_like(inputs["g"], -100.0)  # nothing is remembered, so e = v
    inputs["beta"] = torch.ones_like(inputs["beta"])
    rise = torch.arange(1.0, T + 1, dtype=torch.float64)[:, None, None]
    inputs["v"] = rise * F.normalize(inputs["v"], dim=-1)
    t, s = torch.arange(T)[:, None], torch.arange(T)
    visible = (s <= t) & (s >= t // 8 * 8 - 6)
    q, k, v = (x.transpose(1, 2) for x in (inputs["q"], inputs["k"], inputs["v"]))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    assert_close("o", expected.transpose(1, 2), hola.forward(**inputs)[0])


def test_choosing_has_no_gradient_and_the_cache_alone_needs_no_gates() -> None:
    inputs = alone(given())
    gates = [inputs[n].requires_grad_() for n in ("g", "beta")]
    k = inputs["k"].requires_grad_()
    hola.forward(**inputs)[0].sum().backward()
    assert k.grad is not None and all(x.grad is None for x in gates)


def test_a_state_of_another_size_is_refused() -> None:
    inputs = given()
    _, state = hola.forward(**cut(inputs, 0, 20), output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state.k must be \[2, 14, 2, 8\]"):
        hola.forward(**cut(inputs, 20, T), initial_state=state._replace(k=state.k[:, 1:]))
    for name, value in (("cache_size", -1), ("block_size", 0), ("window_size", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            hola.forward(**{**inputs, name: value})


def shape() -> GroupShape:
    return GroupShape(
        layer_idx=1,
        num_hidden_layers=4,
        heads=tuple(range(H)),
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        v_head_dim=V,
        hidden_size=12,
        scale=0.3,
    )


def layer_inputs() -> Inputs:
    x = given()
    hidden = torch.randn(B, T, 12, dtype=torch.float64) + 2.0
    return Inputs(q=x["q"], k=x["k"], v=x["v"], hidden=hidden)


def test_parameter_names_are_those_of_written_checkpoints() -> None:
    mixer = mixer_file.Mixer(shape(), mixer_file.Options())
    assert {n for n, _ in mixer.named_parameters()} == {
        "mix_cache",
        "sinks",
        "mix_state",
        "norm_weight",
        "a_weight",
        "dt_bias",
        "A_log",
        "b_weight",
    }
    bare = mixer_file.Mixer(shape(), mixer_file.Options(state=False, sink=False))
    assert {n for n, _ in bare.named_parameters()} == {"mix_cache"}


def test_a_conversion_starts_next_to_attention_over_what_is_kept() -> None:
    x = layer_inputs()
    expected, _ = sliding.reference(x.q, x.k, x.v, scale=0.3)
    mixer = mixer_file.Mixer(shape(), mixer_file.Options(cache=T)).double()
    assert error_ratio(expected, mixer(x)) < 0.1
    options = mixer_file.Options(cache=10, block=20, state=False, sink=False)
    assert mixer_file.Mixer.exact_prefix(options) == 20
    got = mixer_file.Mixer(shape(), options).double()(x)
    assert_close("prefix", expected[:, :20], got[:, :20])
    assert error_ratio(expected, got) > 0.05


def test_calibration_brings_the_heads_nearer_to_the_teacher() -> None:
    x = layer_inputs()
    target, _ = sliding.reference(x.q, x.k, x.v, scale=0.3)
    mixer = mixer_file.Mixer(shape(), mixer_file.Options(cache=4, block=8)).double()
    before = error_ratio(target, mixer(x))
    mixer.calibrate([(x, target)])
    assert error_ratio(target, mixer(x)) < before
    assert all(torch.isfinite(p).all() for p in mixer.parameters())


@pytest.mark.parametrize("kept", ((0, 1, 2, 3, 4, 5), (0, 1, 2)), ids=("all", "some"))
def test_heads_whose_cache_leaves_nothing_out_stay_as_they_start(kept: tuple[int, ...]) -> None:
    """A state fitted to rounding would be switched off, and then learn nothing."""
    x = layer_inputs()
    target, _ = sliding.reference(x.q, x.k, x.v, scale=0.3)
    mixer = mixer_file.Mixer(shape(), mixer_file.Options(cache=T)).double()
    target[:, :, [h for h in range(H) if h not in kept]] += 0.1 * torch.randn(V).double()
    start = {n: p.detach().clone() for n, p in mixer.named_parameters()}
    mixer.calibrate([(x, target)])
    for name, p in mixer.named_parameters():
        exactly(name, start[name][list(kept)], p[list(kept)])
    others = [h for h in range(H) if h not in kept]
    assert (mixer.mix_state[others] == 1.0).all()
    assert (mixer.norm_weight[others] != 1.0).all()


def test_what_is_kept_does_not_grow() -> None:
    x, state = layer_inputs(), State()
    mixer = mixer_file.Mixer(shape(), mixer_file.Options(cache=4, block=8)).double()
    sizes = []
    for t in range(T):
        parts = {n: getattr(x, n)[:, t : t + 1] for n in ("q", "k", "v", "hidden")}
        mixer(Inputs(**parts), state)
        sizes.append(state.nbytes())
    assert sizes == sorted(sizes) and len(set(sizes[11:])) == 1


def test_options_say_what_is_allowed() -> None:
    for bad, said in (
        ({"cache": -1}, "cache is -1; give 0 to 1048575 tokens"),
        ({"cache": 2**20}, "cache is 1048576; give 0 to 1048575 tokens"),
        ({"cache": 10**12}, "cache is 1000000000000; give 0 to"),
        ({"block": 0}, "block is 0; .*give 1 to 1048512"),
        ({"block": 10**12}, "block is 1000000000000; .*give 1 to 1048512"),
        ({"cache": 2**20 - 5, "block": 6}, "block is 6; .*give 1 to 5"),
    ):
        with pytest.raises(RecipeError, match=f"mixer hola: {said}"):
            strict.build(mixer_file.Options, bad)
    strict.build(mixer_file.Options, {"cache": 2**20 - 5, "block": 5})
