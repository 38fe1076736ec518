"""What only the kernels with a decay per channel promise: GLA and KDA.

The laws of all kernels are in test_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morph.kernels import _channel, decay, gla, kda
from morph.testing import assert_close, exactly

KERNELS = {"gla": gla, "kda": kda}
each_kernel = pytest.mark.parametrize("name", list(KERNELS))
GATES = ("g", "beta")


def channel_inputs(
    name: str,
    T: int,
    *,
    B: int = 2,
    H: int = 4,
    G: int = 2,
    K: int = 8,
    V: int = 5,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return KERNELS[name].example(B=B, T=T, H=H, G=G, K=K, V=V, dtype=dtype, generator=generator)


def with_state(inputs: dict[str, Any]) -> dict[str, Any]:
    B, _, H, K = inputs["q"].shape
    state = torch.randn(B, H, K, inputs["v"].shape[3], dtype=torch.float64)
    return {**inputs, "initial_state": state}


def learn(run: Any, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output, state and the gradients of both with respect to every input."""
    leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in inputs.items()}
    o, state = run(**leaves, output_final_state=True)
    generator = torch.Generator().manual_seed(2)
    wanted = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (o, state)]
    grads = torch.autograd.grad([o, state], list(leaves.values()), [w.to(dtype) for w in wanted])
    return {"o": o, "state": state, **{f"d{n}": x for n, x in zip(leaves, grads)}}


def matches_the_reference(name: str, inputs: dict[str, Any]) -> None:
    expected = learn(KERNELS[name].reference, inputs, torch.float64)
    got = learn(KERNELS[name].forward, inputs, torch.float32)
    for leaf, x in expected.items():
        assert got[leaf].dtype == torch.float32
        if x.abs().max() < 1e-30:  # nothing is left of it
            assert not got[leaf].abs().max() > 1e-30, leaf
        else:
            assert_close(leaf, x, got[leaf])


def gated_delta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """S_t = exp(g_t) (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, one row and head a time."""
    B, T, H, K = q.shape
    ratio = H // k.shape[2]
    o = torch.zeros(B, T, H, v.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(K, v.shape[3], dtype=torch.float64)
            for t in range(T):
                key, value, step = k[b, t, h // ratio], v[b, t, h // ratio], beta[b, t, h]
                erase = torch.eye(K, dtype=torch.float64) - step * torch.outer(key, key)
                S = g[b, t, h].exp() * erase @ S + step * torch.outer(key, value)
                o[b, t, h] = K**-0.5 * S.T @ q[b, t, h]
    return o


@pytest.mark.parametrize("path", ("chunked", "reference"))
def test_gla_with_equal_decay_in_all_channels_is_the_decay_kernel(path: str) -> None:
    inputs = channel_inputs("gla", 150)
    g = inputs.pop("g")[..., 0]
    expected, state = decay.reference(**inputs, g=g, output_final_state=True)
    o, got = gla.forward(
        **inputs, g=g[..., None].expand(-1, -1, -1, 8), output_final_state=True, path=path
    )
    assert_close("o", expected, o)
    assert_close("state", state, got)


@pytest.mark.parametrize("path", ("chunked", "reference"))
def test_kda_with_equal_decay_in_all_channels_is_the_gated_delta_rule(path: str) -> None:
    inputs = channel_inputs("kda", 100)
    g = inputs.pop("g")[..., 0]
    expected = gated_delta(**inputs, g=g)
    o, _ = kda.forward(**inputs, g=g[..., None].expand(-1, -1, -1, 8), path=path)
    assert_close("o", expected, o)


@pytest.mark.parametrize("path", ("chunked", "reference"))
def test_kda_writes_over_what_a_key_held(path: str) -> None:
    """With beta = 1, no decay and orthogonal unit keys, the state is a table of the last values."""
    T, K = 100, 16
    slots = torch.randint(K, (1, T, 1), generator=torch.Generator().manual_seed(1))
    k = torch.eye(K, dtype=torch.float64)[slots]
    v = torch.randn(1, T, 1, 5, dtype=torch.float64)
    ones = torch.ones(1, T, 1, dtype=torch.float64)
    o, state = kda.forward(
        *(k, k, v),
        g=torch.zeros_like(k),
        beta=ones,
        scale=1.0,
        output_final_state=True,
        path=path,
    )
    assert_close("o", v, o)
    last = {int(slot): t for t, slot in enumerate(slots.flatten())}
    table = torch.stack([v[0, last[n], 0] if n in last else torch.zeros(5) for n in range(K)])
    assert_close("state", table, state[0, 0])


# Decays of a token; from 100 on, nothing of the token before is left in float32
HUGE = {
    "20": lambda x: -20 * torch.ones_like(x),
    "up-to-20": lambda x: 20 * x,
    "20-here-0-there": lambda x: torch.where(x < -0.5, -20.0, 0.0).double(),
    "2000-here-little-there": lambda x: torch.where(x < -0.9, -2000.0, 1e-3 * x).double(),
    "a-few-channels-at-100": lambda x: torch.where(torch.arange(8) < 3, -100.0, x).double(),
    "none": torch.zeros_like,
}


@each_kernel
@pytest.mark.parametrize("g", list(HUGE.values()), ids=list(HUGE))
def test_huge_decays_are_as_exact_as_small_ones(name: str, g: Any) -> None:
    inputs = with_state(channel_inputs(name, 150))
    matches_the_reference(name, {**inputs, "g": g(inputs["g"])})


@each_kernel
@pytest.mark.parametrize("path", ("chunked", "reference"))
def test_infinite_decay_leaves_the_token_alone(name: str, path: str) -> None:
    inputs = with_state(channel_inputs(name, 70, H=2))
    inputs["g"] = torch.full_like(inputs["g"], float("-inf"))
    grads = learn(lambda **x: KERNELS[name].forward(**x, path=path), inputs, torch.float64)
    own = 8**-0.5 * (inputs["q"] * inputs["k"]).sum(dim=-1, keepdim=True) * inputs["v"]
    assert_close("o", own * inputs["beta"][..., None] if name == "kda" else own, grads["o"])
    assert all(torch.isfinite(x).all() for x in grads.values())
    assert not grads["dg"].any() and not grads["dinitial_state"].any()


@each_kernel
@pytest.mark.parametrize("T", (1, 3, 63, 64, 65, 150, 1000))
def test_state_and_all_gradients_match_the_reference(name: str, T: int) -> None:
    matches_the_reference(name, with_state(channel_inputs(name, T, B=1, H=2, G=1)))


@each_kernel
def test_head_sizes_that_are_no_power_of_two(name: str) -> None:
    matches_the_reference(name, with_state(channel_inputs(name, 130, B=1, H=2, G=1, K=60, V=36)))


@each_kernel
@pytest.mark.parametrize("T", (1, 7))
def test_gradients_are_those_of_finite_differences(name: str, T: int) -> None:
    inputs = with_state(channel_inputs(name, T, B=1, H=2, G=1, K=3, V=2))
    names = list(inputs)

    def run(*given: torch.Tensor) -> Any:
        return KERNELS[name].forward(**dict(zip(names, given)), output_final_state=True)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("path", ("chunked", "reference"))
@pytest.mark.parametrize("T", (1, 70))
def test_beta_of_zero_writes_nothing(path: str, T: int) -> None:
    inputs = with_state(channel_inputs("kda", T))
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    o, state = kda.forward(**inputs, output_final_state=True, path=path)
    faded = inputs["g"].cumsum(dim=1).exp()
    expected = torch.einsum("bthk,bhkv->bthv", inputs["q"] * faded, inputs["initial_state"])
    assert_close("o", 8**-0.5 * expected, o)
    assert_close("state", faded[:, -1, :, :, None] * inputs["initial_state"], state)
    o, state = kda.forward(**{**inputs, "initial_state": None}, output_final_state=True, path=path)
    assert not o.any() and not state.any()


@each_kernel
@pytest.mark.parametrize("path", ("chunked", "reference"))
@pytest.mark.parametrize("T", (1, 70))
def test_the_state_is_float32_whatever_the_inputs(name: str, path: str, T: int) -> None:
    inputs = channel_inputs(name, T, dtype=torch.bfloat16)
    assert all(inputs[gate].dtype == torch.float32 for gate in GATES if gate in inputs)
    o, state = KERNELS[name].forward(**inputs, output_final_state=True, path=path)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32


@each_kernel
def test_twenty_runs_are_equal(name: str) -> None:
    inputs = with_state(channel_inputs(name, 200))
    first = learn(KERNELS[name].forward, inputs, torch.float32)
    for _ in range(19):
        for leaf, x in learn(KERNELS[name].forward, inputs, torch.float32).items():
            exactly(leaf, first[leaf], x)


@each_kernel
def test_autocast_changes_nothing(name: str) -> None:
    inputs = {n: x.float() for n, x in with_state(channel_inputs(name, 100)).items()}
    expected, _ = KERNELS[name].forward(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = KERNELS[name].forward(**inputs)
    exactly("o", expected, got)


@each_kernel
def test_gates_and_states_of_other_sizes_are_refused(name: str) -> None:
    inputs = with_state(channel_inputs(name, 6))
    for leaf, x in inputs.items():
        if leaf in (*GATES, "initial_state"):
            with pytest.raises(ValueError, match=f"{leaf} must be"):
                KERNELS[name].forward(**{**inputs, leaf: x[:1]})


def test_the_pairs_keep_only_their_inputs_for_the_gradients() -> None:
    inputs = channel_inputs("gla", 64, B=1, H=1, G=1, dtype=torch.float32)
    q, k, g = (inputs[n].transpose(1, 2)[:, :, None].requires_grad_() for n in ("q", "k", "g"))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        _channel.pairs(g, k, q)
    assert kept == [g.data_ptr(), k.data_ptr(), q.data_ptr()]
