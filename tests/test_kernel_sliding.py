"""What only the sliding-window kernel promises; the laws of all kernels are in test_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from morph.kernels import sliding
from morph.testing import assert_close, exactly


def window_inputs(
    T: int, H: int = 6, G: int = 2, K: int = 8, V: int = 5, **options: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    options = {"window_size": 7, **options}
    return sliding.example(
        B=2, T=T, H=H, G=G, K=K, V=V, dtype=torch.float64, generator=generator, **options
    )


def test_a_wide_window_is_full_attention() -> None:
    inputs = window_inputs(150, H=4, G=4, K=8, V=8)
    del inputs["window_size"]
    q, k, v = (inputs[n].transpose(1, 2) for n in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = expected.transpose(1, 2)
    for window in (150, 1000, None):
        for path in ("banded", "reference"):
            o, _ = sliding.forward(**inputs, window_size=window, path=path)
            torch.testing.assert_close(o, expected, atol=1e-6, rtol=0)
    pad = torch.ones(2, 150, dtype=torch.bool)
    pad[0, 0] = False  # the block path instead of one call to torch
    o, _ = sliding.forward(**inputs, window_size=None, padding=pad)
    torch.testing.assert_close(o[1], expected[1], atol=1e-6, rtol=0)


def test_the_window_counts_the_query_itself() -> None:
    inputs = window_inputs(9, H=2, G=2, K=4, V=4)
    inputs["window_size"] = 1
    exactly("own value", inputs["v"], sliding.forward(**inputs)[0])


@pytest.mark.parametrize("path", ("banded", "reference"))
@pytest.mark.parametrize("window", (3, 70))
def test_sinks_are_each_rows_first_real_tokens(path: str, window: int) -> None:
    """A value seen through uniform weights tells which tokens were visible."""
    T, first = 150, (0, 5)
    v = torch.eye(T).expand(2, T, T).unsqueeze(2)  # [B, T, 1, V = T]: one-hot positions
    q = k = torch.zeros(2, T, 1, 4)
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, :5] = False
    o, _ = sliding.forward(q, k, v, window_size=window, num_sinks=2, padding=real, path=path)
    for row, start in enumerate(first):
        for t in (start, start + 3, 100, 149):
            seen = {start, start + 1} | set(range(max(start, t - window + 1), t + 1))
            seen = {s for s in seen if s <= t}
            assert set(o[row, t, 0].nonzero().flatten().tolist()) == seen
            assert_close("weight", torch.tensor(1 / len(seen)), o[row, t, 0].max())


def test_sink_bias_is_the_sigmoid_of_the_logsumexp() -> None:
    inputs = window_inputs(20, H=2, G=2, K=4, V=4, window_size=None, sink_bias=True)
    bias = inputs.pop("sink_bias")
    plain, _ = sliding.forward(**inputs)
    s = torch.einsum("bthk,bshk->bhts", inputs["q"], inputs["k"]) / 2
    s = s.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    lse = s.logsumexp(dim=-1).transpose(1, 2)[..., None]
    expected = plain * torch.sigmoid(lse - bias[:, None])
    assert_close("o", expected, sliding.forward(**inputs, sink_bias=bias)[0])
    huge, _ = sliding.forward(**inputs, sink_bias=bias + 1000.0)
    assert torch.isfinite(huge).all()


@pytest.mark.parametrize("T", (1, 6, 7, 8, 30))
@pytest.mark.parametrize("num_sinks", (0, 2))
def test_a_state_holds_its_bound_and_nothing_more(T: int, num_sinks: int) -> None:
    inputs = window_inputs(T)
    inputs |= {"window_size": 5, "num_sinks": num_sinks}
    _, state = sliding.forward(**inputs, output_final_state=True)
    for x in (state.k, state.v):
        assert x.shape[1] == min(T, 5 + num_sinks)
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        assert x.data_ptr() not in (inputs["k"].data_ptr(), inputs["v"].data_ptr())


def test_scores_never_make_a_square() -> None:
    """No tensor of the block path has T x T elements, forward or backward."""

    class Largest(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.count = max(self.count, x.untyped_storage().nbytes() // x.element_size())
            return out

    largest = {}
    for T in (512, 1024):
        generator = torch.Generator().manual_seed(0)
        inputs = sliding.example(
            B=1, T=T, H=2, G=1, K=8, V=8, dtype=torch.float32, generator=generator, window_size=64
        )
        with Largest() as seen:
            for leaf in "qkv":
                inputs[leaf].requires_grad_()
            sliding.forward(**inputs)[0].sum().backward()
        largest[T] = seen.count
    assert largest[512] < 512 * 64
    assert largest[1024] <= 2 * largest[512]
