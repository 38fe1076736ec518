"""What only the gated delta rule promises; the laws of all kernels are in test_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from morph.errors import KernelUnavailable
from morph.kernels import _delta, gated_delta
from morph.testing import assert_close, exactly, poison_empty

each_path = pytest.mark.parametrize("path", ("chunked", "reference"))
# Below the chunk of a CPU and of other devices, at it, above it, and some of them with a rest
LENGTHS = (1, 31, 32, 33, 63, 65, 150)
SIZES = {
    "G2-K8-V5": {"H": 4, "G": 2, "K": 8, "V": 5},
    "G1-K60-V60": {"H": 2, "G": 1, "K": 60, "V": 60},
    "G4-K16-V32": {"H": 4, "G": 4, "K": 16, "V": 32},
}
NAMES = ("q", "k", "v", "g", "beta", "state")


def delta_inputs(
    T: int, B: int = 2, H: int = 4, G: int = 2, K: int = 8, V: int = 5, **options: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"B": B, "T": T, "H": H, "G": G, "K": K, "V": V}
    return gated_delta.example(**sizes, dtype=torch.float64, generator=generator, **options)


def orthonormal_keys(T: int, K: int) -> torch.Tensor:
    keys, _ = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64))
    return keys[:T].reshape(1, T, 1, K)


def ones(T: int) -> torch.Tensor:
    return torch.ones(1, T, 1, dtype=torch.float64)


def assert_all_match(inputs: dict[str, torch.Tensor], state: torch.Tensor) -> None:
    """Outputs, state, writes and every gradient of the chunks, against float64 token by token.

    Both see the same float32 numbers, so that only the arithmetic differs.
    """
    given = [inputs[n].float() for n in NAMES[:5]] + [state.float()]
    low = [x.clone().requires_grad_() for x in given]
    high = [x.double().requires_grad_() for x in given]
    scale = given[0].shape[-1] ** -0.5
    expected = _delta.sequential(*high[:5], scale, high[5], writes=True)
    got = _delta.chunked(*low[:5], scale, low[5], writes=True)
    for name, right, x in zip(("o", "state", "writes"), expected, got, strict=True):
        assert_close(name, right, x)
    asked = [torch.randn_like(x) for x in expected]
    right = torch.autograd.grad(expected, high, asked)
    for name, one, x in zip(
        NAMES, right, torch.autograd.grad(got, low, [x.float() for x in asked]), strict=True
    ):
        assert_close(f"d{name}", one, x)


@each_path
def test_orthonormal_keys_are_retrieved_exactly(path: str) -> None:
    k, v = orthonormal_keys(48, 64), torch.randn(1, 48, 1, 5, dtype=torch.float64)
    _, state = gated_delta.forward(
        k, k, v, g=0 * ones(48), beta=ones(48), output_final_state=True, path=path
    )
    assert state is not None
    assert_close("values", v[0, :, 0], k[0, :, 0] @ state[0, 0])


@each_path
def test_beta_zero_writes_nothing(path: str) -> None:
    inputs = {**delta_inputs(70), "beta": torch.zeros(2, 70, 4, dtype=torch.float64)}
    o, state = gated_delta.forward(**inputs, output_final_state=True, path=path)
    assert state is not None
    assert not o.any() and not state.any()


@each_path
def test_a_repeated_key_is_overwritten(path: str) -> None:
    k = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 70, 1, 8)
    v = torch.randn(1, 70, 1, 5, dtype=torch.float64)
    o, _ = gated_delta.forward(k, k, v, g=0 * ones(70), beta=ones(70), scale=1.0, path=path)
    assert_close("the last value", v, o)


@each_path
def test_orthonormal_keys_without_decay_are_plain_linear_attention(path: str) -> None:
    k, v = orthonormal_keys(64, 64), torch.randn(1, 64, 1, 5, dtype=torch.float64)
    q, beta = torch.randn(1, 64, 1, 64, dtype=torch.float64), torch.rand(1, 64, 1).double()
    o, _ = gated_delta.forward(q, k, v, g=0 * beta, beta=beta, path=path)
    s = torch.einsum("bthk,bshk->bhts", q, k).tril() / 8
    assert_close("o", torch.einsum("bhts,bshv->bthv", s, beta[..., None] * v), o)


@pytest.mark.parametrize("run", (_delta.sequential, _delta.chunked, _delta.step))
def test_an_empty_state_gets_everything_wrong(run: Any) -> None:
    inputs = delta_inputs(1, H=2, G=2)
    state = torch.zeros(2, 2, 8, 5, dtype=torch.float64)
    _, _, writes = run(*inputs.values(), 1.0, state, writes=True)
    assert_close("writes", inputs["beta"][..., None] * inputs["v"], writes)


@each_path
def test_forgetting_everything_is_starting_anew(path: str) -> None:
    inputs = delta_inputs(100)
    inputs["g"][:, 37] = -torch.inf
    late = {n: x[:, 37:] for n, x in inputs.items()}
    state = torch.randn(2, 4, 8, 5, dtype=torch.float64)
    o, end = gated_delta.forward(**inputs, initial_state=state, output_final_state=True, path=path)
    alone, own = gated_delta.forward(**late, output_final_state=True, path=path)
    assert end is not None and own is not None
    assert_close("o", alone, o[:, 37:])
    assert_close("state", own, end)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunks_match_the_reference_with_a_state(T: int, sizes: dict[str, int]) -> None:
    inputs = delta_inputs(T, **sizes)
    state = torch.randn(2, sizes["H"], sizes["K"], sizes["V"])
    assert_all_match(inputs, state)


def test_a_thousand_tokens_match_the_reference() -> None:
    assert_all_match(delta_inputs(1000), torch.randn(2, 4, 8, 5))


@pytest.mark.parametrize("T", (64, 150))
def test_chunks_of_other_devices_match_the_reference(
    T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_delta, "_CPU_CHUNK", _delta.CHUNK)
    assert_all_match(delta_inputs(T), torch.randn(2, 4, 8, 5))


@pytest.mark.parametrize(("beta", "decay"), ((1.0, 0.0), (0.999, 0.01)))
def test_nearly_equal_keys_lose_no_digits(beta: float, decay: float) -> None:
    inputs = delta_inputs(1000, B=1, H=2, G=1, K=16, V=8, decay=decay)
    inputs["k"] = F.normalize(inputs["k"] + 20 * inputs["k"][:, :1], dim=-1)
    inputs["beta"].fill_(beta)
    assert (inputs["k"][:, 1] @ inputs["k"][:, 2].mT).item() > 0.99
    assert_all_match(inputs, torch.randn(1, 2, 16, 8))


@pytest.mark.parametrize("depth", (20.0, 1e4, torch.inf))
def test_strong_and_infinite_decays_stay_exact(depth: float) -> None:
    inputs = delta_inputs(300)
    gone = torch.rand(inputs["g"].shape) < 0.1
    inputs["g"] = inputs["g"].masked_fill(gone, -depth)
    assert_all_match(inputs, torch.randn(2, 4, 8, 5))


def test_the_reference_passes_a_gradient_check() -> None:
    inputs = delta_inputs(4, B=1, H=2, G=1, K=3, V=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(*given: torch.Tensor) -> Any:
        return _delta.sequential(*given[:5], 0.5, given[5], writes=True)

    assert torch.autograd.gradcheck(run, (*leaves, state))


def test_chunks_pass_a_gradient_check() -> None:
    inputs = delta_inputs(35, B=1, H=2, G=1, K=3, V=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(*given: torch.Tensor) -> Any:
        return _delta.chunked(*given[:5], 0.5, given[5], writes=True)

    assert torch.autograd.gradcheck(run, (*leaves, state), fast_mode=True)


@pytest.mark.parametrize("run", (_delta.sequential, _delta.chunked, _delta.step))
def test_writes_are_what_the_state_gains(run: Any) -> None:
    inputs, state = delta_inputs(1, G=4), torch.randn(2, 4, 8, 5, dtype=torch.float64)
    _, after, writes = run(*inputs.values(), 1.0, state, writes=True)
    kept = inputs["g"][:, 0, :, None, None].exp() * state
    error = inputs["v"] - torch.einsum("bthk,bhkv->bthv", inputs["k"], kept)
    assert_close("writes", inputs["beta"][..., None] * error, writes)
    gain = torch.einsum("bthk,bthv->bhkv", inputs["k"], writes)
    assert_close("state", kept + gain, after)


def test_one_hundred_runs_agree_bit_for_bit() -> None:
    inputs = {n: x.float().requires_grad_() for n, x in delta_inputs(130).items()}

    def run() -> list[torch.Tensor]:
        o, state = gated_delta.forward(**inputs, output_final_state=True)
        assert state is not None
        grads = torch.autograd.grad(o.square().sum() + state.sum(), list(inputs.values()))
        return [o.detach(), state.detach(), *grads]

    first = run()
    for _ in range(99):
        for x, again in zip(first, run(), strict=True):
            exactly("another run", x, again)


def test_outputs_nobody_asked_the_gradient_of_count_as_zero() -> None:
    inputs = {n: x.requires_grad_() for n, x in delta_inputs(40).items()}
    state = torch.randn(2, 4, 8, 5, dtype=torch.float64)
    for index in range(3):
        found = []
        for run in (_delta.sequential, _delta.chunked):
            output = run(*inputs.values(), 1.0, state, writes=True)[index]
            wanted = [x for n, x in inputs.items() if n != "q" or index == 0]
            with poison_empty():
                found.append(torch.autograd.grad(output.square().sum(), wanted))
        for right, got in zip(*found, strict=True):
            assert_close(f"gradient of output {index}", right, got)


@each_path
@pytest.mark.parametrize("T", (1, 70))
def test_states_are_float32_and_gates_take_any_float(T: int, path: str) -> None:
    inputs = delta_inputs(T)
    for gates in (torch.bfloat16, torch.float32, torch.float64):
        given = {
            n: x.to(gates if n in ("g", "beta") else torch.bfloat16) for n, x in inputs.items()
        }
        leaves = {n: x.requires_grad_() for n, x in given.items()}
        o, state = gated_delta.forward(**leaves, output_final_state=True, path=path)
        assert state is not None
        assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
        grads = torch.autograd.grad(o.sum(), list(leaves.values()))
        assert [x.dtype for x in grads] == [x.dtype for x in leaves.values()]


def test_gates_and_states_of_the_wrong_shape_are_refused() -> None:
    inputs = delta_inputs(6)
    for name in ("g", "beta"):
        with pytest.raises(ValueError, match=rf"{name} must be .*\[2, 6, 4\].*\[4\]"):
            gated_delta.forward(**{**inputs, name: inputs[name][0, 0]})
    with pytest.raises(ValueError, match=r"initial_state must be \[2, 4, 8, 5\]"):
        gated_delta.forward(**inputs, initial_state=torch.zeros(2, 4, 5, 8))


def test_triton_refuses_large_heads() -> None:
    inputs = delta_inputs(2, H=1, G=1, K=8, V=300)
    with pytest.raises(KernelUnavailable, match="300"):
        gated_delta.forward(**{n: x.float() for n, x in inputs.items()}, path="triton")
