"""What attention over listed blocks needs beside the laws of every kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from morph.kernels import _blocks, _gathered, sparse
from morph.testing import assert_close, exactly

B, H, G, K, V = 2, 6, 2, 8, 5
Leaves = tuple[torch.Tensor, ...]


def inputs(T: int, seed: int = 0, **sizes: int) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    n = {"B": B, "H": H, "G": G, "K": K, "V": V} | sizes
    shapes = ((n["H"], n["K"]), (n["G"], n["K"]), (n["G"], n["V"]))
    return tuple(
        torch.randn(n["B"], T, *s, generator=generator, dtype=torch.float64) for s in shapes
    )


def chosen(T: int, block: int, lists: int, keep: float = 0.5, seed: int = 1) -> torch.Tensor:
    """Block lists [B, T, lists, N] in no order, holes between them, future blocks among them."""
    generator = torch.Generator().manual_seed(seed)
    total = -(-T // block)
    order = torch.rand(B, T, lists, total, generator=generator).sort(dim=-1).indices
    gone = torch.rand(order.shape, generator=generator) > keep
    return order.masked_fill(gone, -1)


def visible(blocks: torch.Tensor, block: int) -> torch.Tensor:
    """The dense mask [B, H, T, T] that the lists mean, told without the kernel's own code."""
    T = blocks.shape[1]
    own = torch.arange(T) // block
    seen = (blocks[..., None] == own).any(dim=3)  # [B, T, J, T]
    seen = seen & (torch.arange(T) <= torch.arange(T)[:, None])[:, None]
    return seen.transpose(1, 2).repeat_interleave(H // blocks.shape[2], dim=1)


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def learn(run: Any, leaves: Leaves, do: torch.Tensor) -> Leaves:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    return torch.autograd.grad(run(*leaves), leaves, do)


@pytest.mark.parametrize("path", ("reference", "gathered"))
@pytest.mark.parametrize("lists", (1, G, H))
@pytest.mark.parametrize("block", (1, 7, 16, 64, 100))
def test_it_equals_torch_attention_under_the_dense_mask(path: str, lists: int, block: int) -> None:
    T = 75
    q, k, v = inputs(T)
    blocks = chosen(T, block, lists)
    mask = visible(blocks, block)
    some = mask.any(dim=-1)[..., None]
    expected = scaled_dot_product_attention(
        *heads_first(q, k, v), attn_mask=mask | ~some, enable_gqa=True
    )
    expected = (expected * some).transpose(1, 2)
    got, _ = sparse.forward(q, k, v, blocks=blocks, block_size=block, path=path)
    assert_close("o", expected, got)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_it_equals_flex_attention_with_a_block_mask() -> None:
    """The second oracle; run without compiling, as that is slow on a CPU."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    T, block = 48, 8
    q, k, v = (x.float() for x in inputs(T, G=H, V=K))
    blocks = chosen(T, block, H, keep=0.6)
    table = (blocks[..., None] == torch.arange(T // block)).any(dim=3).transpose(1, 2)

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & table[b, h, i, j // block]

    mask = flex.create_block_mask(sees, B, H, T, T, device="cpu", BLOCK_SIZE=block)
    expected = flex.flex_attention(*heads_first(q, k, v), block_mask=mask).transpose(1, 2)
    got, _ = sparse.forward(q, k, v, blocks=blocks, block_size=block)
    some = visible(blocks, block).any(dim=-1).transpose(1, 2)
    assert bool(some.any()) and not bool(some.all())
    assert_close("o", expected.masked_fill(~some[..., None], 0.0), got)


@pytest.mark.parametrize("block", (1, 16, 50, 200))
def test_all_blocks_are_full_causal_attention(block: int) -> None:
    T = 90
    leaves = inputs(T)
    total = -(-T // block)
    blocks = torch.arange(total).expand(1, T, 1, total)

    def ours(*x: torch.Tensor) -> torch.Tensor:
        return sparse.forward(*x, blocks=blocks, block_size=block)[0]

    def full(*x: torch.Tensor) -> torch.Tensor:
        o = scaled_dot_product_attention(*heads_first(*x), is_causal=True, enable_gqa=True)
        return o.transpose(1, 2)

    do = torch.randn(B, T, H, V, dtype=torch.float64)
    assert_close("o", full(*leaves), ours(*leaves))
    for name, one, other in zip("qkv", learn(full, leaves, do), learn(ours, leaves, do)):
        assert_close(f"d{name}", one, other)


@pytest.mark.parametrize("lists", (1, G, H))
@pytest.mark.parametrize("block", (1, 8))
def test_gradients_are_those_of_finite_differences(lists: int, block: int) -> None:
    """With a cap, a bias and -inf in it, in float64 through the fast path."""
    T = 11
    leaves = inputs(T, B=1)
    blocks = chosen(T, block, lists, keep=0.8)[:1]
    bias = torch.randn(blocks.shape, dtype=torch.float64)
    gone = torch.zeros_like(bias).bernoulli_(0.2) > 0

    def run(*x: torch.Tensor) -> torch.Tensor:
        hidden = x[3].masked_fill(gone, -torch.inf)
        options = {"blocks": blocks, "bias": hidden, "block_size": block, "softcap": 1.5}
        return sparse.forward(*x[:3], path="gathered", **options)[0]

    leaves = tuple(x.requires_grad_() for x in (*leaves, bias))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_a_bias_shared_by_the_rows_gets_the_sum_of_their_gradients() -> None:
    T, block = 40, 6
    leaves, blocks = inputs(T), chosen(T, block, G)[:1]
    bias = torch.randn(blocks.shape, dtype=torch.float64)
    do = torch.randn(B, T, H, V, dtype=torch.float64)
    got = {
        path: learn(
            lambda *x, path=path: sparse.forward(
                *x[:3], blocks=blocks, bias=x[3], block_size=block, path=path
            )[0],
            (*leaves, bias),
            do,
        )
        for path in ("reference", "gathered")
    }
    assert got["gathered"][3].shape == bias.shape and got["reference"][3].any()
    for one, other in zip(got["reference"], got["gathered"]):
        assert_close("gradient", one, other)


@pytest.mark.parametrize("path", ("reference", "gathered"))
@pytest.mark.parametrize("how", ("empty", "none", "future", "hidden"))
def test_nothing_seen_gives_zeros_and_no_gradient(path: str, how: str) -> None:
    T, block = 20, 4
    leaves = inputs(T)
    blocks = torch.full((B, T, 1, 0 if how == "empty" else 2), -1)
    bias = None
    if how == "future":
        blocks[..., 0] = torch.arange(T)[:, None] // block + 1
    if how == "hidden":
        blocks[..., 0], bias = 0, torch.full(blocks.shape, -torch.inf)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return sparse.forward(*x, blocks=blocks, bias=bias, block_size=block, path=path)[0]

    assert not run(*leaves).any()
    for grad in learn(run, leaves, torch.ones(B, T, H, V, dtype=torch.float64)):
        assert not grad.any()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """Scores of several hundred, whose largest comes late: the reference moves along."""
    T, block = 64, 8
    q, k, v = (x.float() for x in inputs(T))
    k = k * torch.linspace(1, 200, T)[:, None, None].flip(0)
    blocks = torch.arange(8).expand(B, T, 1, 8)
    expected, _ = sparse.reference(q.double(), k.double(), v.double(), blocks=blocks, block_size=8)
    got, _ = sparse.forward(q, k, v, blocks=blocks, block_size=block, path="gathered")
    assert torch.isfinite(got).all()
    assert_close("o", expected, got, 1e-4)  # scores of 1000 are rounded to 1e-4 themselves


def test_padding_anywhere_is_the_row_alone_also_in_pieces() -> None:
    """Padding on the left, in the middle, on the right and everywhere; lists in row coordinates."""
    T, block = 60, 4
    q, k, v = inputs(T, B=4)
    real = torch.ones(4, T, dtype=torch.bool)
    real[0, :13], real[1, 20:37], real[2, 50:], real[3] = False, False, False, False
    counts = real.cumsum(dim=1) - 1
    blocks = torch.stack([counts // block, (counts // block - 2).clamp(min=-1)], dim=-1)[:, :, None]
    options: dict[str, Any] = {"block_size": block}
    whole, end = sparse.forward(
        q, k, v, blocks=blocks, padding=real, output_final_state=True, **options
    )
    assert not whole[3].any() and not whole[~real].any()
    for row in range(3):
        at = real[row]
        alone, _ = sparse.forward(
            *(x[row : row + 1, at] for x in (q, k, v)), blocks=blocks[row : row + 1, at], **options
        )
        assert_close(f"row {row}", alone[0], whole[row, at])
    state, parts = None, []
    for start, stop in ((0, 5), (5, 30), (30, 31), (31, 60)):
        now = slice(start, stop)
        o, state = sparse.forward(
            *(x[:, now] for x in (q, k, v)),
            blocks=blocks[:, now],
            padding=real[:, :stop],
            initial_state=state,
            output_final_state=True,
            **options,
        )
        parts.append(o)
    assert_close("in pieces", whole, torch.cat(parts, dim=1))
    assert end is not None and state is not None and state.seen == T
    for name in ("k", "v"):
        exactly(name, getattr(end, name), getattr(state, name))
    assert state.k.shape[1] == 256 and not state.k[3].any() and not state.k[0, 47:].any()


def test_a_buffer_is_written_in_place_only_where_nothing_records_gradients() -> None:
    step = _blocks.room_step(96)
    assert step == 288 and _blocks.room_step(1) == _blocks.room_step(64) == 256
    _, k, _ = inputs(10)
    rows = _blocks.Rows.of(None, B, 0, 10, k.device)
    buffer = _blocks.append(None, k, rows, 10, step, True)
    next_rows = _blocks.Rows.of(None, B, 10, 10, k.device)
    with torch.no_grad():
        assert _blocks.append(buffer, k, next_rows, 20, step, True) is buffer
        assert _blocks.append(buffer, k, next_rows, 20, step, False) is not buffer
    exactly("second", k, buffer[:, 10:20])
    assert not buffer[:, 20:].any()
    learned = k.clone().requires_grad_()
    longer = _blocks.append(buffer, learned, next_rows, 20, step, True)
    assert longer is not buffer
    longer.square().sum().backward()
    assert_close("gradient", 2 * k, learned.grad)
    with torch.inference_mode():
        made = _blocks.append(None, k, rows, 10, step, True)
    with torch.no_grad():  # torch refuses to write to such a tensor here
        assert _blocks.append(made, k, next_rows, 20, step, True) is not made


def test_a_decoded_token_is_the_row_of_the_prefill_and_reads_only_its_blocks() -> None:
    T, block = 130, 16
    q, k, v = inputs(T)
    blocks = chosen(T, block, 1, keep=0.3)
    whole, _ = sparse.forward(q, k, v, blocks=blocks, block_size=block)
    mask = visible(blocks, block)[:, 0, -1]
    k, v = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (k, v))
    last = _blocks.attend(
        q[:, -1:], k, v, blocks[:, -1:], block_size=block, at=T - 1, scale=K**-0.5, path="gathered"
    )
    assert_close("the last token", whole[:, -1:], last)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else [out]
        own = [
            x.untyped_storage().size() // x.element_size()
            for x in found
            if isinstance(x, torch.Tensor)
        ]
        self.elements = max(self.elements, *own, 0)
        return out


@pytest.mark.parametrize("block", (4, 32))
def test_no_tensor_of_the_size_of_all_pairs_is_ever_made(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small tiles, so that what is made per tile does not hide what would grow."""
    monkeypatch.setattr(_gathered, "_CPU_ELEMENTS", 1 << 13)
    monkeypatch.setattr(_gathered, "_ENTRIES", 1 << 12)
    largest = {}
    for T in (512, 1024):
        leaves = tuple(x.float() for x in inputs(T, B=1, H=1, G=1))
        own = torch.arange(T)[None, :, None] // block
        blocks = torch.stack([own, own - 1, own - 3], dim=-1).clamp(min=-1)
        blocks[..., 1:] = blocks[..., 1:].masked_fill(blocks[..., 1:] < 0, -1)
        bias = torch.zeros(blocks.shape)
        with Largest() as seen:
            learn(
                lambda *x, blocks=blocks: sparse.forward(
                    *x[:3], blocks=blocks, bias=x[3], block_size=block, path="gathered"
                )[0],
                (*leaves, bias),
                torch.ones(1, T, 1, V),
            )
        largest[T] = seen.elements
    assert largest[1024] < 1024 * 1024 // 8
    assert largest[1024] <= 2 * largest[512]


def test_lists_that_do_not_fit_are_refused() -> None:
    T = 6
    q, k, v = inputs(T)
    good = torch.zeros(B, T, 1, 1, dtype=torch.int64)
    wrong = {
        r"\[2, 6, 3, 1\]": {"blocks": good.expand(B, T, 3, 1)},
        r"\[2, 5, 1, 1\]": {"blocks": good[:, 1:]},
        r"\[2, 6, 1\]": {"blocks": good[..., 0]},
        r"torch\.float32": {"blocks": good.float()},
        r"torch\.bool": {"blocks": good.bool()},
        r"lists block 0 twice for token 0 of row 0": {"blocks": good.expand(B, T, 1, 2)},
        r"bias .*\[2, 6, 1, 2\]": {"blocks": good, "bias": torch.zeros(B, T, 1, 2)},
        r"bias .*torch\.int64": {"blocks": good, "bias": good},
        r"block_size is 0": {"blocks": good, "block_size": 0},
        r"query_block is 0": {"blocks": good, "query_block": 0},
        r"softcap is -1": {"blocks": good, "softcap": -1.0},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            sparse.forward(q, k, v, **{"block_size": 4, **options})
    _, state = sparse.forward(q, k, v, blocks=good, block_size=4, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state\.k must be \[2, 300, 2, 8\] after 6"):
        sparse.forward(q, k, v, blocks=good, block_size=300, initial_state=state)


def test_a_block_listed_twice_in_a_long_list_is_found_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse, "_FEW", 0)
    q, k, v = inputs(90)
    blocks = torch.zeros(B, 90, 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="twice"):
        sparse.forward(q, k, v, blocks=blocks, block_size=16, path="gathered")
