"""The Triton path of attention over listed blocks: interpreted in float32, or compiled on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from morph.kernels import _blocks, _triton
from morph.testing import assert_close, error_ratio, exactly, poison_empty

REPO = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.reason(torch.zeros(1, device=DEVICE))
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"the Triton path cannot run: {REASON}")

# Small and short wherever it can be, since the interpreter is slow
SMALL: dict[str, Any] = {"B": 1, "T": 19, "H": 2, "G": 1, "K": 8, "V": 5, "J": 1, "N": 2, "size": 8}
SMALL |= {"at": 0, "room": 3, "query_block": 1, "bias": True, "softcap": None}
TENSORS = ("q", "k", "v", "bias")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiles of 16-bit inputs: most are, and the interpreter takes fewer steps."""
    from morph.kernels import _triton_blocks

    if _triton.interpreted():
        monkeypatch.setattr(_triton_blocks, "_FULL", _triton_blocks._HALF)


def given(**changed: Any) -> dict[str, Any]:
    """Inputs in float64, and random lists: some places void, some blocks after the query.

    `J` 1, "G" or "H". `lists` rows of lists (default B), `at`, `room` keys behind the last token,
    `query_block`, `bias`, `softcap`.
    """
    sizes = {
        **SMALL,
        "at": 0,
        "room": 3,
        "query_block": 1,
        "bias": True,
        "softcap": None,
        **changed,
    }
    B, T, H, G, N = (sizes[n] for n in "BTHGN")
    at, size, J = sizes["at"], sizes["size"], {"G": G, "H": H}.get(sizes["J"], 1)
    rows = sizes.get("lists", B)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    end = torch.as_tensor(at).max().item() + T
    S = end + sizes["room"]
    alike = (torch.as_tensor(at).view(-1, 1) + torch.arange(T)) // sizes["query_block"]
    alike = alike[:rows].expand(rows, T)
    number, blocks = int(alike.max()) + 1, -(-S // size)
    table = random(rows, number, J, max(N, blocks)).argsort(dim=-1)[..., :N]
    table = table.masked_fill((table >= blocks) | (random(*table.shape) < -1), -1)
    here, biases = torch.arange(rows)[:, None], random(*table.shape)
    return {
        "q": random(B, T, H, sizes["K"]),
        "k": random(B, S, G, sizes["K"]),
        "v": random(B, S, G, sizes["V"]),
        "index": table[here, alike].int(),
        "bias": biases[here, alike] if sizes["bias"] else None,
        "block_size": size,
        "at": at,
        "query_block": sizes["query_block"],
        "scale": 0.6,
        "softcap": sizes["softcap"],
    }


def moved(inputs: dict[str, Any], dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
    found = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            x = x.to(device, dtype if name in TENSORS else None)
        found[name] = x
    return found


def triton(**inputs: Any) -> torch.Tensor:
    from morph.kernels import _triton_blocks

    return _triton_blocks.triton_attend(**inputs)


def reference(**inputs: Any) -> torch.Tensor:
    return _blocks.attend(**inputs, path="reference")


def learn(
    run: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> dict[str, torch.Tensor]:
    """The output and the gradients of q, k, v and the bias, on the CPU."""
    inputs = moved(inputs, dtype, device)
    leaves = [n for n in TENSORS if inputs[n] is not None]
    inputs |= {n: inputs[n].detach().clone().requires_grad_() for n in leaves}
    o = run(**inputs)
    generator = torch.Generator().manual_seed(2)
    do = torch.randn(o.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad(o, [inputs[n] for n in leaves], do.to(o))
    return {"o": o.detach().cpu(), **{f"d{n}": g.cpu() for n, g in zip(leaves, grads)}}


def check(inputs: dict[str, Any]) -> None:
    expected = learn(reference, inputs, torch.float64, "cpu")
    for name, got in learn(triton, inputs).items():
        if expected[name].abs().max() < 1e-3:  # such as dq where one key takes nearly all weight
            assert (got - expected[name]).abs().max() < 1e-5, name
        else:
            # that of a bias can be a small difference of large numbers
            assert_close(name, expected[name], got, 1e-4 if name == "dbias" else None)


@pytest.mark.parametrize(
    ("T", "J"),
    ((1, 1), (1, "H"), (15, "G"), (17, 1), (17, "H"), (65, 1), (65, "H"), (130, "G")),
)
def test_forward_and_gradients_match_the_float64_reference(T: int, J: int | str) -> None:
    check(given(T=T, J=J, H=4 if T < 65 else 2, G=2 if T < 65 else 1, size=8 if T < 65 else 32))


@pytest.mark.parametrize(
    "sizes",
    (
        {"H": 3, "J": "G", "K": 20, "V": 36},
        {"H": 3, "J": "H"},
        {"H": 2, "G": 2, "J": "G"},
        {"H": 17, "J": "H", "T": 5},
        {"K": 130, "V": 70, "T": 5},
    ),
    ids=lambda sizes: "-".join(f"{n}{x}" for n, x in sizes.items()),
)
def test_odd_head_sizes_and_shared_heads(sizes: dict[str, Any]) -> None:
    check(given(**sizes))


def test_the_tiles_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps to one block, in the gradients of keys too."""
    monkeypatch.undo()
    check(given(T=5, at=70, size=64, N=2, J="H"))
    check(given(T=17, size=4, N=3))


@pytest.mark.parametrize(("size", "N"), ((1, 7), (3, 5), (8, 2), (40, 2), (64, 1)))
def test_any_block_size(size: int, N: int) -> None:
    """Several blocks to a step, one, and several steps to a block; with and without a rest."""
    check(given(T=max(19, size + 9), size=size, N=N, room=1))


@pytest.mark.parametrize(
    ("at", "query_block"),
    ((0, 16), (21, 1), (21, 12), (torch.tensor([3, 26]), 1), (torch.tensor([3, 26]), 16)),
    ids=("first-16", "later-1", "later-12", "each-1", "each-16"),
)
def test_after_a_past_with_lists_of_queries_or_of_query_blocks(at: Any, query_block: int) -> None:
    check(given(B=2, T=18, J="G", at=at, query_block=query_block, size=8))


@pytest.mark.parametrize("J", (1, "H"))
def test_one_set_of_lists_for_the_whole_batch(J: int | str) -> None:
    inputs = given(B=2, T=5, H=4, G=2, lists=1, J=J, room=5)
    check(inputs)
    check({**inputs, "at": torch.tensor([0, 3])})
    inputs["index"] = torch.cat([inputs["index"], inputs["index"].flip(1)])
    check(inputs)


@pytest.mark.parametrize("size", (2, 16))
def test_a_cap_bends_small_and_large_scores(size: int) -> None:
    inputs = given(T=20, N=6, softcap=2.0, size=size)
    inputs["q"] = inputs["q"] * torch.logspace(-2, 1.5, 20)[:, None, None]
    check(inputs)


def test_a_query_that_lists_nothing_gets_zeros() -> None:
    inputs = given(B=2, bias=True)
    inputs["index"][0, 3:9] = -1
    inputs["index"][1] = -1
    inputs["bias"][0, 11] = -torch.inf
    check(inputs)
    found = learn(triton, inputs)
    for name, x in found.items():
        assert not x[1].any(), name
    assert not found["o"][0, 3:9].any() and not found["o"][0, 11].any()
    nothing = {**inputs, "index": inputs["index"][..., :0], "bias": None}
    for name, x in learn(triton, nothing).items():
        assert not x.any(), name


def test_a_bias_that_hides_a_block_is_a_list_without_it() -> None:
    inputs = given(N=3)
    gone = torch.rand(inputs["index"].shape, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden = {**inputs, "bias": inputs["bias"].masked_fill(gone, -torch.inf)}
    listed = {**inputs, "index": inputs["index"].masked_fill(gone, -1)}
    expected = learn(triton, listed)
    assert expected["o"].any() and gone.any()
    for name, x in learn(triton, hidden).items():
        assert_close(name, expected[name], x, 1e-6)


def test_all_blocks_listed_is_full_attention() -> None:
    inputs = moved(given(B=2, T=37, H=4, G=2, K=16, V=16, room=0, bias=False), torch.float32)
    inputs["index"] = torch.arange(10, device=DEVICE).expand(1, 37, 1, 10)
    q, k, v = (inputs[n].transpose(1, 2) for n in "qkv")
    options: dict[str, Any] = {"is_causal": True, "scale": 0.6, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    assert_close("o", expected, triton(**inputs))


def test_the_order_of_a_list_and_the_promise_of_query_blocks_change_nothing_but_speed() -> None:
    inputs = given(T=18, N=4, query_block=16, size=4)
    expected = learn(triton, inputs)
    for name, x in learn(triton, {**inputs, "query_block": 1}).items():
        assert_close(name, expected[name], x)
    turned = {**inputs, **{n: inputs[n].flip(-1) for n in ("index", "bias")}}
    for name, x in learn(triton, turned).items():
        assert_close(name, expected[name], x.flip(-1) if name == "dbias" else x)


@pytest.mark.parametrize("J", (1, "H"))
def test_tables_made_for_one_tile_at_a_time(J: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    from morph.kernels import _blocks_lists, _triton_blocks

    monkeypatch.setattr(_blocks_lists, "_TABLE", 1)
    monkeypatch.setattr(_triton_blocks, "_FREE", 8)
    if J == 1:
        check(given(B=2, T=9, J=J, at=torch.tensor([3, 9]), size=8))
    else:
        check(given(T=37, J=J, at=9, query_block=16, size=16, N=2))


def test_causality_is_bit_exact_and_void_keys_are_never_read() -> None:
    inputs = moved(given(T=34, N=9, at=5, room=30), torch.float32)
    before = triton(**inputs)
    for t in (1, 15, 32):
        changed = {n: x.clone() if n in TENSORS else x for n, x in inputs.items()}
        changed["q"][:, t] += 3.0
        for leaf in "kv":
            changed[leaf][:, 5 + t] += 3.0
            changed[leaf][:, 5 + 34 :] = torch.nan
        after = triton(**changed)
        exactly("outputs before the change", before[:, :t], after[:, :t])
        assert torch.isfinite(after).all() and not torch.equal(before, after)


@pytest.mark.parametrize(("size", "query_block"), ((6, 1), (16, 16)))
def test_two_runs_are_equal_and_nothing_reads_unwritten_memory(size: int, query_block: int) -> None:
    inputs = given(T=18, J="H", query_block=query_block, softcap=2.0, size=size)
    first = learn(triton, inputs)
    with poison_empty():
        second = learn(triton, inputs)
    for name, x in first.items():
        exactly(name, x, second[name])


def test_strided_inputs() -> None:
    inputs = moved(given(T=34, H=4, G=2, K=16, V=16, J="G"), torch.float32)
    expected = triton(**inputs)
    for leaf in "qkv":
        inputs[leaf] = inputs[leaf].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["index"] = inputs["index"].long().transpose(1, 2).contiguous().transpose(1, 2)
    exactly("heads first", expected, triton(**inputs))


def decoded(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from morph.kernels import _triton_blocks

    inputs = moved(inputs, dtype)
    inputs.pop("query_block")
    with torch.no_grad(), poison_empty():
        return _triton_blocks.triton_decode(**inputs).cpu()


@pytest.mark.parametrize(
    ("each", "sizes"),
    (
        (16, {"J": 1, "N": 5, "size": 16}),
        (1000, {"J": 1, "N": 5, "size": 16, "lists": 1}),
        (10, {"J": "G", "N": 9, "size": 5, "softcap": 2.0, "at": torch.tensor([7, 60])}),
        (8, {"J": "H", "N": 30, "size": 1}),
        (60, {"J": 1, "N": 3, "size": 80, "at": 200, "bias": False}),
        (16, {"J": 1, "N": 4, "size": 8, "H": 34, "G": 2}),
    ),
    ids=("splits", "one", "padded", "tokens", "wide", "many"),
)
def test_a_decoded_token(each: int, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists have voids and blocks behind the token; splits are more than some lists fill."""
    from morph.kernels import _triton_blocks

    monkeypatch.setattr(_triton_blocks, "_EACH", each)
    inputs = given(**{"B": 2, "T": 1, "H": 4, "G": 2, "at": 70, "room": 50, **sizes})
    expected = moved(inputs, torch.float64, "cpu")
    assert_close("o", reference(**expected), decoded(inputs))


def test_a_decoded_token_that_lists_nothing_gets_zeros() -> None:
    inputs = given(B=2, T=1, at=20)
    inputs["index"] = inputs["index"].long()
    inputs["index"][0] = -1
    found = decoded(inputs)
    assert not found[0].any() and found[1].any()
    assert not decoded({**inputs, "index": inputs["index"][..., :0], "bias": None}).any()


def test_what_is_not_taken_is_said() -> None:
    from morph.kernels import _triton_blocks

    def why(size: int = 4, dtype: torch.dtype = torch.float32, **sizes: int) -> str:
        x = moved(given(T=1, **sizes), dtype)
        return _triton_blocks.unsupported(x["q"], x["k"], x["v"], x["index"], size)

    assert why() == ""
    assert "264" in why(K=264) and "257" in why(V=257)
    assert "65 query heads" in why(H=65)
    assert "float64" in why(dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "options",
    (
        {"J": "G", "size": 64, "N": 6},
        {"J": "H", "size": 16, "N": 20, "softcap": 20.0},
        {"J": 1, "size": 64, "N": 6, "query_block": 64, "bias": False},
        {"J": 1, "size": 1, "N": 300},
    ),
    ids=("kv", "head", "together", "tokens"),
)
@pytest.mark.parametrize("head", (64, 128))
def test_halves_are_at_most_twice_as_wrong_as_plain_torch(
    dtype: torch.dtype, options: dict[str, Any], head: int
) -> None:
    inputs = given(**{"B": 2, "T": 1000, "H": 8, "G": 2, "K": head, "V": head, **options})
    inputs = {**moved(inputs, dtype, "cpu"), "scale": head**-0.5}
    expected = learn(reference, inputs, torch.float64, "cpu")
    plain = learn(reference, inputs, dtype)
    first = learn(triton, inputs, dtype)
    for name, got in first.items():
        bound = 2 * error_ratio(expected[name], plain[name])
        assert error_ratio(expected[name], got) <= bound, name
    for _ in range(20):
        for name, got in learn(triton, inputs, dtype).items():
            exactly(name, first[name], got)


def test_the_benchmark_runs_dry(tmp_path: Path) -> None:
    """Its gate, its rivals with the same blocks, and its rows; no speed is claimed."""
    script, told = REPO / "benchmarks" / "bench_gpu_sparse.py", tmp_path / "told.json"
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script), "--dry", "--json", str(told)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goal:" not in done.stdout
    found = json.loads(told.read_text())
    assert found["dry"] and not found["goals"]
    decode, prefill = found["rows"]
    assert {"decode ours", "decode sdpa", "bandwidth"} <= set(decode)
    assert {"forward ours", "both ours", "forward sdpa", "both sdpa", "forward flex"} <= set(
        prefill
    )
    assert not [n for n in (*decode, *prefill) if n.startswith(("refused", "failed"))]
