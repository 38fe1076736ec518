"""What only the decay kernel promises; the laws of all kernels are in test_kernels.py."""

from __future__ import annotations

from typing import Any

import torch

from morph.kernels import decay
from morph.testing import assert_close


def decay_inputs(
    T: int, H: int = 6, G: int = 2, K: int = 8, V: int = 5, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return decay.example(B=2, T=T, H=H, G=G, K=K, V=V, dtype=dtype, generator=generator)


def test_no_decay_is_a_running_sum_and_infinite_decay_the_token_alone() -> None:
    inputs = decay_inputs(100, H=2, G=2, K=4, V=4)
    q, k, v = (inputs[n] for n in "qkv")
    s = torch.einsum("bthk,bshk->bhts", q, k) / 2
    for g, mask in ((0.0, torch.ones(100, 100).tril()), (float("-inf"), torch.eye(100))):
        expected = torch.einsum("bhts,bshv->bthv", s * mask, v)
        for path in ("chunked", "reference"):
            o, _ = decay.forward(q, k, v, g=torch.full((2,), g).double(), path=path)
            assert_close(f"{path} g={g}", expected, o)


def test_the_state_is_float32_whatever_the_inputs() -> None:
    for path in ("chunked", "reference"):
        for T in (1, 70):
            inputs = decay_inputs(T, dtype=torch.bfloat16)
            _, state = decay.forward(**inputs, output_final_state=True, path=path)
            assert state.dtype == torch.float32
