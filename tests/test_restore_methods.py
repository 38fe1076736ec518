"""Ridge and interpolation, and restored checkpoints as transformers runs them.

The reference is the literal formula in float64, with the d x d inverse that the code avoids.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from morph import layouts, restore
from morph.errors import UsageError, VerificationFailed
from morph.layouts import Rotary

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_restoring.py"))))
tiny = kit.tiny
RHOS = (0.0, 1e-6, 1e-3, 0.03, 0.3, 1.0, 10.0, 1e3, 1e9)


def draw(seed: int, size: int = 6, hidden: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return queries of PRE and POST and keys of PRE, [d_k, D], in float64."""
    rng = np.random.default_rng(seed)
    pre_q, drift, pre_k = rng.standard_normal((3, size, hidden))
    return pre_q, pre_q + 0.4 * drift, pre_k * np.geomspace(0.05, 3, size)[:, None]


def literal(pre_q: np.ndarray, post_q: np.ndarray, pre_k: np.ndarray, rho: float) -> np.ndarray:
    """The formula as it is written, with the routing matrix and a D x D inverse."""
    q_pre, q_post, k_pre = pre_q.T, post_q.T, pre_k.T  # [D, d_k]
    weight = rho * np.trace(k_pre.T @ k_pre) / k_pre.shape[1]
    routing = q_pre @ k_pre.T
    inverse = np.linalg.inv(k_pre @ k_pre.T + weight * np.eye(k_pre.shape[0]))
    found: np.ndarray = (q_post + (routing - q_post @ k_pre.T) @ inverse @ k_pre).T
    return found


def diagonal(
    pre_q: np.ndarray, post_q: np.ndarray, pre_k: np.ndarray, rho: float, rotary: Rotary
) -> np.ndarray:
    """The variant for rotated heads, row by row."""
    size = len(pre_k)
    energy = [float(row @ row) for row in pre_k]
    weight = rho * sum(energy) / size
    half = rotary.dim // 2
    found = post_q.copy()
    for i in range(size):
        mate = i
        if i < rotary.dim:
            mate = i ^ 1 if rotary.interleaved else (i + half) % rotary.dim
        mean = (energy[i] + energy[mate]) / 2
        found[i] += mean / (mean + weight) * (pre_q[i] - post_q[i])
    return found


@pytest.mark.parametrize("rho", RHOS[2:7])
@pytest.mark.parametrize(("size", "hidden"), [(6, 20), (4, 4), (8, 5), (1, 9)])
def test_ridge_is_the_literal_formula(rho: float, size: int, hidden: int):
    given = draw(size, size, hidden)
    want = literal(*given, rho)
    assert np.abs(restore.ridge(*given, rho=rho) - want).max() < 1e-10


@pytest.mark.parametrize("rotary", [None, Rotary(dim=6), Rotary(dim=4, interleaved=True)])
def test_ridge_moves_from_pre_to_post_as_rho_grows(rotary: Rotary | None):
    pre_q, post_q, pre_k = draw(3)
    found = [restore.ridge(pre_q, post_q, pre_k, rho=rho, rotary=rotary) for rho in RHOS]
    assert (found[0] == pre_q).all()
    assert np.abs(found[1] - pre_q).max() < 1e-2
    assert np.abs(found[-1] - post_q).max() < 1e-7
    assert (restore.ridge(pre_q, post_q, pre_k, rho=1e300, rotary=rotary) == post_q).all()
    moved = [np.linalg.norm(q - post_q) for q in found]
    assert all(a >= b for a, b in itertools.pairwise(moved))
    if rotary is None:  # what is minimised is the routing at distance 0
        error = [np.linalg.norm((q - pre_q).T @ pre_k) for q in found]
        assert all(a <= b for a, b in itertools.pairwise(error))


def test_ridge_is_the_minimum_of_its_objective():
    pre_q, post_q, pre_k = draw(5)
    rho = 0.2
    weight = rho * np.trace(pre_k @ pre_k.T) / len(pre_k)

    def cost(q: np.ndarray) -> float:
        return float(np.sum((q - post_q) ** 2) + np.sum(((q - pre_q).T @ pre_k) ** 2) / weight)

    best = restore.ridge(pre_q, post_q, pre_k, rho=rho)
    for seed in range(20):
        step = np.random.default_rng(seed).standard_normal(best.shape)
        assert cost(best) < cost(best + 1e-3 * step)


def turn(x: np.ndarray, angles: np.ndarray, rotary: Rotary) -> np.ndarray:
    """Rotate each rotary pair of the rows of x [d_k, D] by its angle."""
    found, half = x.copy(), rotary.dim // 2
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + half)
        found[a] = np.cos(angle) * x[a] - np.sin(angle) * x[b]
        found[b] = np.sin(angle) * x[a] + np.cos(angle) * x[b]
    return found


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_the_rotary_variant_commutes_with_rotations(interleaved: bool, dim: int):
    rotary = Rotary(dim=dim, interleaved=interleaved)
    pre_q, post_q, pre_k = draw(11, 8)
    rng = np.random.default_rng(0)
    blend = restore.projector(pre_k, 0.3, rotary)
    plain = restore.projector(pre_k, 0.3)
    worst = 0.0
    for _ in range(5):
        angles = rng.uniform(0, 7, dim // 2)
        whole = turn(np.eye(8), angles, rotary)
        assert np.abs(blend @ whole - whole @ blend).max() < 1e-12
        worst = max(worst, np.abs(plain @ whole - whole @ plain).max())
        given = [turn(x, angles, rotary) for x in (pre_q, post_q, pre_k)]
        made = restore.ridge(*given, rho=0.3, rotary=rotary)
        want = turn(restore.ridge(pre_q, post_q, pre_k, rho=0.3, rotary=rotary), angles, rotary)
        assert np.abs(made - want).max() < 1e-12
    assert worst > 1e-3  # and the plain one does not
    want = diagonal(pre_q, post_q, pre_k, 0.3, rotary)
    assert np.abs(restore.ridge(pre_q, post_q, pre_k, rho=0.3, rotary=rotary) - want).max() < 1e-12


def test_keys_that_are_zero_route_nothing():
    pre_q, post_q, pre_k = draw(2)
    assert (restore.ridge(pre_q, post_q, 0 * pre_k, rho=0.1) == post_q).all()


def test_ridge_refuses_what_does_not_fit():
    pre_q, post_q, pre_k = draw(2)
    with pytest.raises(UsageError, match=r"\[5, 20\]"):
        restore.ridge(pre_q, post_q, pre_k[:5], rho=1)
    with pytest.raises(UsageError, match="rho is -1"):
        restore.ridge(pre_q, post_q, pre_k, rho=-1)


def parts(folder: Path, role: str) -> dict[int, np.ndarray]:
    """Return q or k of every full layer as float64 [heads, d_k, D]."""
    config = json.loads((folder / "config.json").read_text())
    stored = kit.read(folder)
    reading = layouts.read(config, {name: tensor.shape for name, tensor in stored.items()})
    found: dict[int, np.ndarray] = {}
    for row in reading.rows:
        if row.role != role or row.bias or row.kind != "full":
            continue
        values = stored[row.tensor].numbers
        spans = row.ranges or ((0, len(values)),)
        rows = np.concatenate([values[a:b] for a, b in spans])
        found[row.layer] = rows.reshape(-1, reading.attention(row.layer).head_dim, rows.shape[1])
    return found


def rotary_of(folder: Path, layer: int) -> Rotary | None:
    config = json.loads((folder / "config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in kit.read(folder).items()}
    return layouts.read(config, shapes).attention(layer).rotary


CASES = ("jamba", "qwen2", "qwen3_next", "phi3", "gpt_neox", "smollm3", "cohere2", "hypenet")


@pytest.mark.parametrize("model_type", CASES)
def test_ridge_on_files_is_the_formula_for_every_head(model_type: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, model_type, dtype="F64")
    out = kit.restored(pre, post, tmp_path / "out", method="ridge", rho=0.2)
    q_pre, q_post, q_out = (parts(f, "q") for f in (pre, post, out))
    k_pre = parts(pre, "k")
    assert q_out
    for layer, heads in q_out.items():
        step = len(heads) // len(k_pre[layer])
        rotary = rotary_of(pre, layer)
        for h, made in enumerate(heads):
            given = (q_pre[layer][h], q_post[layer][h], k_pre[layer][h // step], 0.2)
            want = literal(*given) if rotary is None else diagonal(*given, rotary)
            assert np.abs(made - want).max() < 1e-10
            assert np.abs(made - given[0]).max() > 0 < np.abs(made - given[1]).max()
    # keys and biases are PRE's outright; everything else is POST's
    others = kit.expected(pre, post)
    for name, tensor in kit.read(out).items():
        made = np.frombuffer(tensor.data, "u1").reshape(tensor.shape[0], -1)
        want = np.frombuffer(others[name], "u1").reshape(tensor.shape[0], -1)
        wrong = np.flatnonzero((made != want).any(axis=1))
        assert not wrong.size or name.endswith(
            ("q_proj.weight", "qkv_proj.weight", "_value.weight")
        )


@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba"])
def test_the_ends_of_rho(model_type: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, model_type)
    zero = kit.restored(pre, post, tmp_path / "zero", method="ridge", rho=0.0)
    assert kit.data(zero) == kit.expected(pre, post)
    huge = kit.restored(pre, post, tmp_path / "huge", method="ridge", rho=1e12, include=("q", "k"))
    assert kit.data(huge) == kit.expected(pre, post, roles=("k",), bias=False)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(
    "how", [{"method": "ridge", "rho": 0.5}, {"method": "interpolate", "alpha": 0.3}]
)
def test_results_are_rounded_once(dtype: str, how: dict[str, Any], tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3", dtype=dtype)
    out = kit.restored(pre, post, tmp_path / "out", **how)
    q_pre, q_post, q_out = (parts(f, "q") for f in (pre, post, out))
    k_pre = parts(pre, "k")
    for layer, heads in q_out.items():
        for h, made in enumerate(heads):
            a, b = q_pre[layer][h], q_post[layer][h]
            if how["method"] == "ridge":
                rotary = rotary_of(pre, layer)
                want = diagonal(a, b, k_pre[layer][h // 3], 0.5, rotary)
            else:
                want = (1 - 0.3) * b + 0.3 * a
            if dtype == "F64":
                assert np.abs(made - want).max() < 1e-15
            else:
                assert (made == nearest(want, dtype)).all()


def nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of a type to float64, ties to even; bfloat16 without its subnormals."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view("<u8")
        kept = (bits + (2**44 - 1) + (bits >> 45 & 1)) >> 45 << 45
        return kept.view("<f8")
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float64)


@pytest.mark.parametrize(
    ("post", "pre", "alpha", "want"),
    [
        (0x3F80, 0x3F81, 0.5 + 2**-33, 0x3F81),  # just above the middle; its even side is below
        (0x3F81, 0x3F82, 0.5 - 2**-33, 0x3F81),  # just below the middle; its even side is above
        (0x3F80, 0x3F81, 0.5, 0x3F80),
        (0x3F81, 0x3F82, 0.5, 0x3F82),
        (0x3F80, 0x7FC0, 0.5, 0x7FC0),  # NaN stays NaN
    ],
)
def test_no_tie_is_made_on_the_way(post: int, pre: int, alpha: float, want: int, tmp_path: Path):
    """Rounded to float32 first, the first two would lie in the middle, and go to the other side."""
    folders = kit.pair(tmp_path, "llama", shards=1)
    for folder, bits in zip(folders, (pre, post)):
        tensors = kit.read(folder)
        for name in [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight"))]:
            data = bits.to_bytes(2, "little") * (len(tensors[name].data) // 2)
            tensors[name] = tensors[name]._replace(data=data)
        kit.write_file(folder / "model.safetensors", tensors)
    options = {"method": "interpolate", "alpha": alpha, "allow": ("nonfinite", "unrelated")}
    out = kit.read(kit.restored(*folders, tmp_path / "out", **options))
    made = {out[n].data for n in out if n.endswith("q_proj.weight")}
    assert {bytes(set(data[0::2])) + bytes(set(data[1::2])) for data in made} == {
        want.to_bytes(2, "little")
    }


def test_keys_that_repeat_themselves_and_a_vanishing_rho():
    """The matrix of the formula is singular where rounding loses lambda."""
    pre_q, post_q, pre_k = draw(13, 8)
    pre_k[3] = pre_k[5]
    for rho in (1e-3, 1e-16, 1e-18, 1e-300):
        blend = restore.projector(pre_k, rho)
        values = np.linalg.eigvalsh(blend)
        assert np.abs(blend - blend.T).max() < 1e-12
        assert values.min() > -1e-12 and values.max() < 1 + 1e-12
        made = restore.ridge(pre_q, post_q, pre_k, rho=rho)
        assert np.abs((made - pre_q).T @ pre_k).max() < 100 * rho + 1e-9


def test_query_heads_of_a_group_may_be_permuted_before_or_after(tmp_path: Path):
    """qwen3 here has two groups of three query heads, which are one projection's rows."""
    pre, post = kit.pair(tmp_path, "qwen3", shards=1)
    dim = tiny.config("qwen3")["head_dim"]
    order = [2, 0, 1, 4, 5, 3]

    def permuted(folder: Path, name: str) -> Path:
        tensors = kit.read(folder)
        for key, tensor in tensors.items():
            if key.endswith(".q_proj.weight"):
                blocks = [tensor.rows(h * dim, (h + 1) * dim) for h in order]
                tensors[key] = tensor._replace(data=b"".join(blocks))
        return kit.save(tmp_path / name, tiny.config("qwen3"), tensors)

    options = {"method": "ridge", "rho": 0.1}
    out = kit.restored(pre, post, tmp_path / "out", **options)
    first = permuted(pre, "pre-p"), permuted(post, "post-p")
    other = kit.restored(*first, tmp_path / "out-p", **options)
    assert kit.data(other) == kit.data(permuted(out, "after"))


def test_interpolation_takes_all_that_is_named(tmp_path: Path):
    pre, post = kit.pair(tmp_path, dtype="F32")
    include = ("q", "k", "v", "o", "bias", "norm", "gate")
    out = kit.restored(
        pre, post, tmp_path / "out", method="interpolate", alpha=0.25, include=include
    )
    whole = kit.expected(pre, post, roles=("q", "k", "v", "o", "gate", "q_norm", "k_norm"))
    a, b = kit.read(pre), kit.read(post)
    for name, tensor in kit.read(out).items():
        if whole[name] == b[name].data:
            assert tensor == b[name]
            continue
        new, old = (t.numbers.reshape(-1) for t in (b[name], a[name]))
        want = 0.75 * new + 0.25 * old
        assert tensor.data == np.where(new == old, new, want).astype("<f4").tobytes()


def test_the_ends_of_alpha(tmp_path: Path):
    pre, post = kit.pair(tmp_path)
    one = kit.restored(pre, post, tmp_path / "one", method="interpolate", alpha=1.0)
    assert kit.data(one) == kit.expected(pre, post)
    none = ("--method", "interpolate", "--alpha", "0")
    found = kit.morph("restore", pre, post, tmp_path / "none", *none)
    assert found.code == 4 and "--alpha 0 keeps POST" in found.err
    found = kit.morph("restore", pre, post, tmp_path / "none", *none, "--allow", "unchanged")
    assert found.code == 0
    assert kit.data(tmp_path / "none") == kit.data(post)


def test_values_that_are_equal_stay_as_they_are(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen2", shards=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = kit.read(post)
    odd = bytearray(kit.read(pre)[name].data)
    odd[:4] = bytes.fromhex("00800000")  # -0.0 and 0.0
    for folder in (pre, post):
        found = kit.read(folder)
        found[name] = tensors[name]._replace(data=bytes(odd))
        kit.write_file(folder / "model.safetensors", found)
    out = kit.restored(pre, post, tmp_path / "out", method="interpolate", alpha=0.5)
    assert kit.read(out)[name].data == bytes(odd)


def test_float16_that_overflows_is_not_written(tmp_path: Path):
    """Parallel keys mix rows: one stays at 60000, and the way of the others is added to it."""
    pre, post = kit.pair(tmp_path, "jamba", shards=1, dtype="F16")
    for folder in (pre, post):
        tensors = kit.read(folder)
        for name, tensor in tensors.items():
            values = tensor.numbers.astype("<f2").copy()
            if name.endswith("layers.1.self_attn.q_proj.weight"):
                values[:] = 60000
                values[1:] *= 1 if folder == pre else -1
            elif name.endswith("layers.1.self_attn.k_proj.weight"):
                values[:] = values[:1] + 0.01 * values
            tensors[name] = tensor._replace(data=values.tobytes())
        kit.write_file(folder / "model.safetensors", tensors)
    options = restore.Options(method="ridge", rho=1e-3, allow=("unrelated",))
    plan = restore.plan(pre, post, options)
    with pytest.raises(VerificationFailed, match="exceeds float16"):
        restore.write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written_says_whose_method_it_is(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3")
    out = tmp_path / "out"
    found = kit.morph("restore", pre, post, out, "--method", "ridge", "--rho", "0.1")
    assert found.code == 0
    record = json.loads((out / "morph.json").read_text())["restored"][0]
    texts = [found.err, (out / "README.md").read_text(), " ".join(record["notes"])]
    for text in texts:
        assert "morph's own, not the paper's QK-Pro" in text
        assert "commutes with rotations" in text and "heuristic" in text
    assert record["options"]["rho"] == 0.1
    assert {r["part"]: r["rule"] for r in record["rules"]} == {
        "q": "morph's own ridge",
        "k": "bytes of PRE",
    }


RIDGE = """
import re, sys
from pathlib import Path
from morph import restore
root = Path(sys.argv[1])
options = restore.Options(method="ridge", rho=0.1, allow=("nonfinite", "unrelated", "unchanged"))
plan = restore.plan(root / "pre", root / "post", options)
restore.write(plan, root / "out", hashing=False, durable=False)
assert "torch" not in sys.modules
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_ridge_holds_a_few_heads_in_memory(tmp_path: Path):
    """q_proj has 34 MB here, 134 MB in float64."""
    hidden, dim = 4096, 128
    config = {**tiny.config("llama"), "hidden_size": hidden, "head_dim": dim}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1}
    at = "model.layers.0."
    rows = {"q": 32 * dim, "k": 8 * dim, "v": 8 * dim}
    shapes = {f"{at}self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()}
    shapes |= {f"{at}self_attn.o_proj.weight": (hidden, 32 * dim)}
    shapes |= {"model.embed_tokens.weight": (4, hidden), "model.norm.weight": (hidden,)}
    for name in ("pre", "post"):
        folder = tiny.write_tensors(tmp_path / name, config, {"x": (1, 1)})
        zeros = {n: kit.Tensor("BF16", s, bytes(2 * int(np.prod(s)))) for n, s in shapes.items()}
        kit.write_file(folder / "model.safetensors", zeros)
    done = subprocess.run(
        [sys.executable, "-c", RIDGE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 110 << 10


def load(folder: Path) -> Any:
    import transformers

    import morph  # noqa: F401 - its own classes

    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="float32"
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not told[key], (key, told[key])
    return model.eval()


def whole_rows(module: Any, part: str) -> list[tuple[str, slice]]:
    return [(f"{part}_proj", slice(None))]


def gated_rows(module: Any, part: str) -> list[tuple[str, slice]]:
    if part == "k":
        return [("k_proj", slice(None))]
    dim = module.head_dim
    heads = module.q_proj.weight.shape[0] // (2 * dim)
    return [("q_proj", slice(2 * h * dim, (2 * h + 1) * dim)) for h in range(heads)]


def fused_rows(module: Any, part: str) -> list[tuple[str, slice]]:
    q = module.config.num_attention_heads * module.head_dim
    k = module.config.num_key_value_heads * module.head_dim
    return [("qkv_proj", slice(0, q) if part == "q" else slice(q, q + k))]


@pytest.mark.parametrize(
    ("model_type", "layers", "rows"),
    [
        ("qwen3_next", (1, 3), gated_rows),
        ("phi3", (0, 1, 2, 3), fused_rows),
        ("gemma3_text", (1, 2, 3), whole_rows),
        ("jamba", (1,), whole_rows),
    ],
)
def test_a_restored_model_computes_what_a_patched_one_does(
    model_type: str, layers: tuple[int, ...], rows: Callable[..., Any], tmp_path: Path
):
    import torch

    torch.manual_seed(0)
    model = tiny.tiny_model(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "pre")
    kit.copy_tuned(tmp_path / "pre", tmp_path / "post")
    out = kit.restored(tmp_path / "pre", tmp_path / "post", tmp_path / "out", include=("q", "k"))
    before, patched, made = (load(f) for f in (tmp_path / "pre", tmp_path / "post", out))
    tokens = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        untouched = patched(tokens).logits
        for layer in layers:
            a, b = (m.model.layers[layer].self_attn for m in (before, patched))
            for part in "qk":
                for name, span in rows(b, part):
                    getattr(b, name).weight[span] = getattr(a, name).weight[span]
        want, found = patched(tokens).logits, made(tokens).logits
    assert torch.equal(found, want)
    assert not torch.equal(found, untouched)
    assert kit.data(out).keys() == kit.data(tmp_path / "post").keys()


@pytest.mark.slow
def test_a_restored_hybrid_of_morph_loads_as_one(tmp_path: Path):
    import torch

    torch.manual_seed(0)
    tiny.tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    done = kit.morph(
        "convert", tmp_path / "dense", tmp_path / "pre", "--selector", "uniform", "--budget", "1/2",
        "--mixer", "decay",
    )  # fmt: skip
    assert done.code == 0, done.err
    post = kit.copy_tuned(tmp_path / "pre", tmp_path / "post")
    found = kit.morph("restore", tmp_path / "dense", post, tmp_path / "no")
    assert found.code == 4 and "the model that POST was converted from" in found.err
    out = kit.restored(tmp_path / "pre", post, tmp_path / "out")
    plan = json.loads((tmp_path / "pre" / "morph.json").read_text())["plan"]
    assert json.loads((out / "morph.json").read_text())["plan"] == plan
    before, patched, made = (load(f) for f in (tmp_path / "pre", post, out))
    tokens = torch.randint(3, 60, (1, 20))
    full = [i for i, x in enumerate(plan["layers"]) if x["groups"][0]["mixer"] == "full"]
    assert 0 < len(full) < 4
    with torch.no_grad():
        for layer in full:
            a, b = (m.model.layers[layer].self_attn for m in (before, patched))
            b.q_proj.weight.copy_(a.q_proj.weight)
            b.k_proj.weight.copy_(a.k_proj.weight)
        assert torch.equal(made(tokens).logits, patched(tokens).logits)
