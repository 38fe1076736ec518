"""`morph diff`: two checkpoints beside each other, and what that means for `morph restore`."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import runpy
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from morph import _terminal_files as words
from morph import cli, difference, restore
from morph.checkpoint import Weights
from morph.errors import CheckpointError, MismatchError, OutputExists
from morph.pipeline import _diff

pairs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_pairs.py"))))
LAYERS, HIDDEN, HEADS, GROUPS, DIM = (
    getattr(pairs, name) for name in ("LAYERS", "HIDDEN", "HEADS", "GROUPS", "DIM")
)
CONFIG, FULL = pairs.CONFIG, pairs.FULL
bf16, hybrid, moved, save, widened = (
    getattr(pairs, name) for name in ("bf16", "hybrid", "moved", "save", "widened")
)
Tensors = dict[str, tuple[str, np.ndarray]]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return save(tmp_path / "a", hybrid(), CONFIG)


def diff(a: Path, b: Path, **more: Any) -> dict[str, Any]:
    """Compare, and check that the result is plain JSON."""
    found = _diff.diff_command(str(a), str(b), **more)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def part(found: Mapping[str, Any], tensor: str, role: str | None = None) -> dict[str, Any]:
    row = next(row for row in found["tensors"] if row["tensor"] == tensor)
    (only,) = [p for p in row["parts"] if role in (None, p["role"])]
    return only


def group(found: Mapping[str, Any], role: str, kind: str) -> dict[str, Any]:
    return next(g for g in found["groups"] if (g["role"], g["kind"]) == (role, kind))


def status(found: Mapping[str, Any], tensor: str) -> str:
    return next(row["status"] for row in found["tensors"] if row["tensor"] == tensor)


# --- Laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_equal_whatever_the_sharding(a: Path, tmp_path: Path, shards: int) -> None:
    names = sorted(hybrid(), reverse=True)
    b = save(tmp_path / "b", {name: hybrid()[name] for name in names}, CONFIG, shards)
    found = diff(a, b)
    assert found["counts"]["equal"] == len(names) == sum(found["counts"].values())
    assert all(p["drift"] == 0.0 and not p["entries_changed"]
               for row in found["tensors"] for p in row["parts"])  # fmt: skip
    assert found["next"] == ["inspect", str(b)]
    assert found["conclusion"] == [f"A and B hold the same {len(names)} tensors, byte for byte."]
    assert found["config_differs"] == []


def test_numbers_are_those_of_an_oracle_in_float64(a: Path, tmp_path: Path) -> None:
    before, after = hybrid(), moved(hybrid(), "layers", by=0.02)
    found = diff(a, save(tmp_path / "b", after, CONFIG, 3))
    for name, (dtype, stored) in before.items():
        x, y = widened(dtype, stored), widened(dtype, after[name][1])
        rows = {None: slice(None)}
        if name.endswith("q_proj.weight"):
            heads = np.arange(2 * HEADS * DIM).reshape(HEADS, 2, DIM)
            rows = {"q": heads[:, 0].ravel(), "gate": heads[:, 1].ravel()}
        for role, which in rows.items():
            told, p, q = part(found, name, role), x[which], y[which]
            change = float(np.linalg.norm(q - p))
            assert told["entries"] == p.size
            changed = stored[which] != after[name][1][which]
            assert told["entries_changed"] == int(changed.sum())
            assert told["drift"] == pytest.approx(change / np.linalg.norm(p), rel=1e-12)
            dot = float((p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q))
            assert told["cosine"] == pytest.approx(dot, rel=1e-12)
            assert told["max_abs_change"] == float(np.abs(q - p).max())
            assert told["norm_a"] == pytest.approx(np.linalg.norm(p), rel=1e-12)


@pytest.mark.parametrize("entries", [1, 7, 64, 1 << 16])
def test_blocks_do_not_matter(
    a: Path, tmp_path: Path, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = save(tmp_path / "b", moved(hybrid(), "self_attn", "up_proj"), CONFIG)
    want = diff(a, b)
    monkeypatch.setattr(difference, "ENTRIES", entries)
    got = diff(a, b)
    for one, other in zip(want["tensors"], got["tensors"]):
        for p, q in zip(one["parts"], other["parts"]):
            for key, value in p.items():
                close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                assert q[key] == close, (one["tensor"], key)


def test_one_flipped_bit_is_found(a: Path, tmp_path: Path) -> None:
    after = hybrid()
    name = "model.layers.5.mlp.up_proj.weight"
    stored = after[name][1].copy()
    stored[39, 23] ^= 1  # the last entry, its least bit
    after[name] = "BF16", stored
    found = diff(a, save(tmp_path / "b", after, CONFIG, 2))
    assert found["counts"]["changed"] == 1 and status(found, name) == "changed"
    told = part(found, name)
    assert told["entries_changed"] == 1 and 0 < told["drift"] < 1e-2
    assert told["max_abs_change"] > 0


def test_minus_zero_is_a_change_without_drift(a: Path, tmp_path: Path) -> None:
    before, after = hybrid(), hybrid()
    name = "model.layers.0.linear_attn.A_log"
    before[name] = "F32", np.array([0.0, 1, 2, 3], "<f4")
    after[name] = "F32", np.array([-0.0, 1, 2, 3], "<f4")
    one, other = save(tmp_path / "one", before, CONFIG), save(tmp_path / "b", after, CONFIG)
    found = diff(one, other)
    assert status(found, name) == "changed"
    assert part(found, name)["entries_changed"] == 1 and part(found, name)["drift"] == 0.0


def test_one_scaled_head_moves_its_rows_alone(a: Path, tmp_path: Path) -> None:
    """Rows 0-5 of q_proj are the query of head 0, rows 6-11 its gate."""
    after = hybrid()
    name = "model.layers.3.self_attn.q_proj.weight"
    stored = after[name][1].copy()
    stored[:DIM] = bf16(2 * widened("BF16", stored[:DIM]))
    after[name] = "BF16", stored
    found = diff(a, save(tmp_path / "b", after, CONFIG))
    assert part(found, name, "gate")["entries_changed"] == 0
    told = part(found, name, "q")
    assert told["entries_changed"] == DIM * HIDDEN
    x = widened("BF16", hybrid()[name][1])[np.arange(48).reshape(HEADS, 2, DIM)[:, 0].ravel()]
    share = np.linalg.norm(x[:DIM]) / np.linalg.norm(x)
    assert told["drift"] == pytest.approx(share, rel=1e-12)
    assert [g["tensors_changed"] for g in found["groups"] if g["kind"] == "full"] == [1, 0, 0, 0, 0]
    assert found["restore"]["layers_changed"] == [3]


def test_another_dtype_is_compared_by_value(a: Path, tmp_path: Path) -> None:
    after = {n: ("F32", widened(d, v).astype("<f4")) for n, (d, v) in hybrid().items()}
    name = "model.layers.3.self_attn.k_proj.weight"
    after[name][1][0, 0] += 1
    found = diff(a, save(tmp_path / "b", after, CONFIG))
    assert found["counts"] == {
        **dict.fromkeys(_diff.STATUSES, 0),
        "dtype differs": len(after) - 6,
        "equal": 6,  # A_log is float32 in both
    }
    assert part(found, name)["entries_changed"] == 1
    assert part(found, "lm_head.weight")["entries_changed"] == 0
    assert part(found, "lm_head.weight")["drift"] == 0.0
    assert any("dtype differs" in note and "BF16" in note for note in found["notes"])


@pytest.mark.parametrize("dtype", ["F64", "F16", "F32", "BF16", "I64", "I8", "U8", "BOOL", "C64"])
def test_every_plain_dtype(tmp_path: Path, dtype: str) -> None:
    kinds = {"F64": "<f8", "F16": "<f2", "F32": "<f4", "I64": "<i8", "I8": "i1", "U8": "u1"}
    kinds |= {"BOOL": "?", "C64": "<c8"}
    before, after = np.arange(12).reshape(3, 4) % 5, np.arange(12).reshape(3, 4) % 4
    stored = [bf16(v) if dtype == "BF16" else v.astype(kinds[dtype]) for v in (before, after)]
    a, b = (
        save(tmp_path / n, {"x": (dtype, v), "e": ("F8_E4M3", np.zeros(3, "u1"))}, None)
        for n, v in zip("ab", stored)
    )
    found = diff(a, b)
    x, y = (v.astype(bool).astype(float) if dtype == "BOOL" else v.astype(float)
            for v in (before, after))  # fmt: skip
    assert part(found, "x")["entries_changed"] == int((x != y).sum())
    assert part(found, "x")["drift"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert part(found, "e")["drift"] is None and status(found, "e") == "equal"


@pytest.mark.parametrize(("dtype", "wide"), [("F8_E4M3", 1), ("F4", 0.5), ("F8_E8M0", 1)])
def test_packed_dtypes_are_compared_by_their_bytes(tmp_path: Path, dtype: str, wide: float) -> None:
    packed = np.arange(16, dtype="u1").reshape(2, 8)
    other = packed.copy()
    other[1, 7] ^= 0x10

    def saved(name: str, values: np.ndarray) -> Path:
        folder = save(tmp_path / name, {"x": ("U8", values)}, None)
        file = folder / "model.safetensors"
        shape = [2, int(8 / wide)]
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, 16]}}
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        return folder

    a, b, same = saved("a", packed), saved("b", other), saved("same", packed)
    told = part(diff(a, b), "x")
    assert told["drift"] is told["cosine"] is told["max_abs_change"] is None
    assert 1 <= told["entries_changed"] <= 2
    assert diff(a, same)["counts"]["equal"] == 1


def test_nan_and_infinity_have_no_part_in_sums(tmp_path: Path) -> None:
    before, after = hybrid(), moved(hybrid(), "up_proj")
    name = "model.layers.0.mlp.up_proj.weight"
    stored = after[name][1].copy()
    stored[0, 0], stored[0, 1] = 0x7FC0, 0x7F80
    after[name] = "BF16", stored
    found = diff(save(tmp_path / "a", before, CONFIG), save(tmp_path / "b", after, CONFIG))
    told = part(found, name)
    x, y = (widened("BF16", t[name][1]) for t in (before, after))
    fine = np.isfinite(y)
    want = np.linalg.norm((y - x)[fine]) / np.linalg.norm(x[fine])
    assert told["drift"] == pytest.approx(want, rel=1e-12)
    assert (told["nonfinite_a"], told["nonfinite_b"]) == (0, 2)
    assert any(note.startswith("NaN or infinity in B: " + name) for note in found["notes"])
    both = diff(tmp_path / "b", tmp_path / "b")
    assert part(both, name)["nonfinite_a"] == 2 and both["counts"]["changed"] == 0


def test_float64_that_cannot_be_squared_gives_no_number(tmp_path: Path) -> None:
    a, b = (
        save(tmp_path / n, {"x": ("F64", np.array([1e300, v]))}, None)
        for n, v in (("a", 1.0), ("b", 1e299))
    )
    told = part(diff(a, b), "x")
    assert told["entries_changed"] == 1 and told["nonfinite_a"] == 0
    assert told["drift"] is None or math.isfinite(told["drift"])


def test_drift_from_zero_is_no_number(tmp_path: Path) -> None:
    a = save(tmp_path / "a", {"x": ("F32", np.zeros(4, "<f4"))}, None)
    b = save(tmp_path / "b", {"x": ("F32", np.ones(4, "<f4"))}, None)
    told = part(diff(a, b), "x")
    assert told["drift"] is told["cosine"] is None and told["entries_changed"] == 4
    assert part(diff(a, a), "x")["drift"] == 0.0


# --- The top direction --------------------------------------------------------------------------


def test_top_direction_of_a_change_of_rank_one_is_all_of_it(tmp_path: Path) -> None:
    before, draw = hybrid(), np.random.default_rng(3)
    name = "model.layers.7.self_attn.k_proj.weight"
    before[name] = "F32", np.zeros((GROUPS * DIM, HIDDEN), "<f4")
    after = dict(before)
    change = np.outer(draw.standard_normal(GROUPS * DIM), draw.standard_normal(HIDDEN))
    after[name] = "F32", (1e-20 * change).astype("<f4")
    a, b = save(tmp_path / "a", before, CONFIG), save(tmp_path / "b", after, CONFIG)
    assert part(diff(a, b), name)["top_direction"] == pytest.approx(1.0, abs=1e-5)


def test_top_direction_comes_close_to_the_true_share_from_below(a: Path, tmp_path: Path) -> None:
    after = moved(hybrid(), "q_proj", "k_proj", "v_proj")
    found = diff(a, save(tmp_path / "b", after, CONFIG))
    for name in (n for n in after if "q_proj" in n or "k_proj" in n):
        x, y = (widened("BF16", t[name][1]) for t in (hybrid(), after))
        role = "q" if "q_proj" in name else "k"
        rows = np.arange(48).reshape(HEADS, 2, DIM)[:, 0].ravel() if role == "q" else slice(None)
        energy = np.linalg.svd((y - x)[rows], compute_uv=False) ** 2
        share = energy[0] / energy.sum()
        assert 0.85 * share <= part(found, name, role)["top_direction"] <= share * (1 + 1e-5)
    # asked of q and k of full layers alone
    told = [p for r in found["tensors"] for p in r["parts"] if p["top_direction"] is not None]
    assert {(p["role"], p["kind"]) for p in told} == {("q", "full"), ("k", "full")}


# --- What is in one and not in the other --------------------------------------------------------


def test_tensors_that_are_in_one_alone_or_have_other_shapes(a: Path, tmp_path: Path) -> None:
    after = hybrid()
    del after["lm_head.weight"]
    after["model.extra"] = "F32", np.zeros(3, "<f4")
    after["model.embed_tokens.weight"] = "BF16", bf16(np.zeros((33, HIDDEN), np.float32))
    found = diff(a, save(tmp_path / "b", after, {**CONFIG, "vocab_size": 33}))
    assert status(found, "lm_head.weight") == "only in A"
    assert status(found, "model.extra") == "only in B"
    assert status(found, "model.embed_tokens.weight") == "shape differs"
    assert found["config_differs"] == ["vocab_size"]
    (note,) = [n for n in found["notes"] if n.startswith("shape differs")]
    assert "[32, 24] and [33, 24]" in note


def test_names_that_differ_in_their_prefix_are_matched(a: Path, tmp_path: Path) -> None:
    after = {n.replace("model.", "model.language_model."): v for n, v in hybrid().items()}
    found = diff(a, save(tmp_path / "b", after, CONFIG))
    assert found["counts"]["equal"] == len(after)
    assert any("lm_head" not in n and "other names in A" in n for n in found["notes"])


def test_a_missing_shard_is_named_and_the_rest_compared(a: Path, tmp_path: Path) -> None:
    before = save(tmp_path / "part", hybrid(), CONFIG, 3)
    (before / "model-00002-of-00003.safetensors").unlink()
    found = diff(before, save(tmp_path / "b", hybrid(), CONFIG))
    count = len(list(hybrid())[1::3])
    assert found["counts"]["shard missing"] == count
    assert found["counts"]["equal"] == len(hybrid()) - count
    assert "same" not in found["conclusion"][0]
    assert any(note.startswith("shard missing") for note in found["notes"])
    turned = diff(tmp_path / "b", before)
    assert turned["counts"] == found["counts"]
    shown = ("role", "kind", "tensors", "bytes")
    groups = [[[g[key] for key in shown] for g in told["groups"]] for told in (found, turned)]
    assert turned["roles_known"] and groups[0] == groups[1]


def test_nothing_in_common_is_a_mismatch(a: Path, tmp_path: Path) -> None:
    b = save(tmp_path / "b", {"w": ("F32", np.zeros(3, "<f4"))}, CONFIG)
    with pytest.raises(MismatchError, match=r"No tensor of .* is in "):
        diff(a, b)
    other = {n: (d, v[..., :-1]) for n, (d, v) in hybrid().items()}
    with pytest.raises(MismatchError, match="every shape differs"):
        diff(a, save(tmp_path / "c", other, CONFIG))


def adapter(folder: Path, by: float) -> Path:
    draw = np.random.default_rng(4)
    tensors: Tensors = {}
    for i in range(2):
        for name in ("q_proj", "v_proj"):
            at = f"base_model.model.model.layers.{i}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = "F32", draw.standard_normal((2, 8)).astype("<f4")
            moves = by if name == "q_proj" else 0
            stored = draw.standard_normal((8, 2)) + moves
            tensors[f"{at}.lora_B.weight"] = "F32", stored.astype("<f4")
    save(folder, tensors, None)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_adapters_are_compared_with_each_other_and_not_with_models(a: Path, tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 0), adapter(tmp_path / "other", 0.5)
    found = diff(one, other)
    assert found["counts"]["changed"] == 2 and not found["roles_known"]
    assert group(found, "q", "")["tensors_changed"] == 2
    assert group(found, "v", "")["tensors_changed"] == 0
    assert found["next"] == ["verify", str(other)]
    assert found["conclusion"][0].startswith("By their names: factors of the deltas of q ")
    with pytest.raises(MismatchError, match="LoRA adapter"):
        diff(a, one)


def test_an_architecture_that_is_not_known_falls_back_to_names_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**CONFIG, "model_type": "novel"}
    after = moved(hybrid(), "k_proj")
    found = diff(save(tmp_path / "a", hybrid(), config), save(tmp_path / "b", after, config))
    assert not found["roles_known"] and found["kinds"] == []
    assert group(found, "k", "")["tensors_changed"] == 2
    assert group(found, "q", "")["tensors_changed"] == 0
    assert group(found, "mixer", "")["tensors"] == 12
    assert "novel" in " ".join(found["notes"]) and "names" in " ".join(found["notes"])
    assert found["next"] == ["inspect", str(tmp_path / "b")]
    assert found["conclusion"][0].startswith("By their names: q equal, k 0.0")
    assert "drift by layer" in printed(found, False, 80, monkeypatch)


# --- What it means ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "says", "command"),
    [
        (("q_proj", "k_proj", "v_proj", "mlp"), "q and k of the 2 full layers moved", "restore"),
        (("v_proj", "o_proj", "mlp"), "are equal: nothing to restore", "inspect"),
        (("layers.3.self_attn.k_proj", "v_proj"), "q and k of 1 of the 2 full layers", "restore"),
        (("q_proj",), "v of the 2 full layers is equal while q and k are not", "restore"),
        (("linear_attn",), "are equal: nothing to restore", "inspect"),
    ],
    ids=["all", "values-only", "one-layer", "queries-only", "mixers-only"],
)
def test_the_conclusion_and_the_next_command(
    a: Path, tmp_path: Path, wanted: tuple[str, ...], says: str, command: str
) -> None:
    b = save(tmp_path / "b", moved(hybrid(), *wanted), CONFIG)
    found = diff(a, b)
    assert any(says in sentence for sentence in found["conclusion"]), found["conclusion"]
    more = [str(a), str(b), "b-restored"] if command == "restore" else [str(b)]
    assert found["next"] == [command, *more]


def test_biases_alone_are_something_to_restore(tmp_path: Path) -> None:
    """As after a tuning of biases alone; `restore` puts them back by default."""
    kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_restoring.py"))))
    a, b = kit.pair(tmp_path, "qwen2", shards=1)
    before, after = kit.read(a), kit.read(b)
    mixed = {n: (after if n.endswith("q_proj.bias") else before)[n] for n in after}
    kit.write_file(b / "model.safetensors", mixed)
    found = diff(a, b)
    assert found["next"][0] == "restore"
    assert "q bias 0.0" in found["conclusion"][0], found["conclusion"]
    assert "k bias" not in found["conclusion"][0]
    assert restore.plan(a, b).nbytes > 0


def test_the_output_that_is_proposed_can_be_written(a: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--tuned" / "snapshots"
    for folder, name in (
        (tmp_path / "b\x1b[31m", "b[31m-restored"),
        (cache / "abc", "tuned-restored"),
    ):
        folder.parent.mkdir(parents=True, exist_ok=True)
        b = save(folder, moved(hybrid(), "_proj"), CONFIG)
        assert diff(a, b)["next"] == ["restore", str(a), str(b), name]


def test_the_bytes_that_restore_would_replace(a: Path, tmp_path: Path) -> None:
    b = save(tmp_path / "b", moved(hybrid(), "q_proj", "layers.3.self_attn.k_proj", "v_"), CONFIG)
    found = diff(a, b)
    ours = 2 * (2 * HEADS * DIM * HIDDEN) + 2 * GROUPS * DIM * HIDDEN  # gates stay POST's
    total = Weights.open(b).nbytes
    assert found["restore"]["bytes"] == ours
    assert found["restore"]["share"] == ours / total
    assert f"replace {100 * ours / total:.1f} % of the bytes" in found["conclusion"][0]


def test_a_stranger_is_not_taken_for_a_parent(tmp_path: Path) -> None:
    after, draw = hybrid(), np.random.default_rng(9)
    for name in after:
        if "q_proj" in name:
            after[name] = "BF16", bf16(draw.standard_normal(after[name][1].shape))
    found = diff(save(tmp_path / "a", hybrid(), CONFIG), save(tmp_path / "b", after, CONFIG))
    assert found["next"] == ["inspect", str(tmp_path / "a")]
    assert "does not look trained from A" in " ".join(found["conclusion"])


def test_sliding_layers_are_told_apart(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "hidden_size": HIDDEN,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "use_sliding_window": True,
        "max_window_layers": 0,
    }
    draw, before = np.random.default_rng(5), {}
    for i in range(2):
        for name, rows in (("q", HEADS * DIM), ("k", GROUPS * DIM), ("v", GROUPS * DIM)):
            stored = draw.standard_normal((rows, HIDDEN)).astype("<f4")
            before[f"model.layers.{i}.self_attn.{name}_proj.weight"] = "F32", stored
        stored = draw.standard_normal((HIDDEN, HEADS * DIM)).astype("<f4")
        before[f"model.layers.{i}.self_attn.o_proj.weight"] = "F32", stored
    a, b = (
        save(tmp_path / n, t, config)
        for n, t in (("a", before), ("b", moved(before, "layers.0.self_attn.k")))
    )
    found = diff(a, b)
    assert found["kinds"] == ["sliding", "full"]
    assert found["next"][0] == "inspect"
    assert "In 1 sliding layer q and k moved" in " ".join(found["conclusion"])


# --- Output -------------------------------------------------------------------------------------


def printed(found: Mapping[str, Any], tensors: bool, width: int, patch: Any) -> list[str]:
    patch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        words.difference(found, tensors)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("tensors", [False, True])
def test_no_line_is_wider_than_the_terminal(
    a: Path, tmp_path: Path, width: int, tensors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = moved(hybrid(), "layers")
    after[f"model.layers.2.{'very_long_' * 12}weight"] = "F32", np.zeros(2, "<f4")
    found = diff(a, save(tmp_path / "b", after, CONFIG))
    lines = printed(found, tensors, width, monkeypatch)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for heading in ("drift ||B-A||/||A|| by role", "drift by softmax layer", "least cosine"):
        assert heading in text
    assert ("every tensor" in text) == tensors
    assert (text.count("self_attn.q_proj.weight") == 4) == tensors  # q and gate of two layers


def test_softmax_layers_that_are_equal_share_a_row(a: Path, monkeypatch: Any) -> None:
    lines = printed(diff(a, a), False, 80, monkeypatch)
    at = next(i for i, line in enumerate(lines) if line.startswith("drift by softmax layer"))
    assert [line.split() for line in lines[at + 2 : at + 4]] == [
        ["3", "full", "equal", "equal", "equal", "equal"],
        ["7", "full", "equal", "equal", "equal", "equal"],
    ]


def morph(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(x) for x in arguments])
        except SystemExit as done:
            return int(done.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("main returned")


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    """Names of tensors may not hold control characters; values of config.json may."""
    config = {**CONFIG, "model_type": "n\x1b[31m", "\x1b]0;x\x07": 1}
    a = save(tmp_path / "a", {**hybrid(), "[red]x[/red]": ("F32", np.ones(1, "<f4"))}, CONFIG)
    b = save(tmp_path / "b", hybrid(), config)
    code, out, err = morph("diff", a, b, "--tensors")
    assert code == 0 and "[red]x[/red]" in out
    assert "\x1b" not in out + err and "\x07" not in out + err
    assert "\\x1b" in out


def test_the_command_says_it_in_json_too(a: Path, tmp_path: Path) -> None:
    b = save(tmp_path / "b", moved(hybrid(), "self_attn"), CONFIG)
    code, out, err = morph("diff", a, b, "--json")
    assert code == 0 and json.loads(out)["restore"]["layers_changed"] == list(FULL)
    assert err.splitlines()[-1] == f"next: morph restore {a} {b} b-restored"


@pytest.mark.parametrize(
    ("left", "right", "code", "named"),
    [("nowhere", "b", 3, "nowhere"), ("a", "empty", 3, "empty"), ("a", "other", 4, "No tensor")],
)
def test_exit_codes(a: Path, tmp_path: Path, left: str, right: str, code: int, named: str) -> None:
    save(tmp_path / "b", hybrid(), CONFIG)
    save(tmp_path / "other", {"w": ("F32", np.zeros(3, "<f4"))}, CONFIG)
    (tmp_path / "empty").mkdir()
    with contextlib.chdir(tmp_path):
        got, out, err = morph("diff", left, right)
    assert (got, out) == (code, "") and named in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_changes_meanwhile_is_noticed(a: Path, when: str) -> None:
    weights = Weights.open(a)
    info = weights.tensors["lm_head.weight"]
    if when == "before":
        os.utime(a / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed"), difference.Reader(weights) as reader:
        assert len(reader.read(info, 0, 8)) == 8 and when == "after"
        os.utime(a / "model.safetensors", ns=(1, 1))


# --- Files --------------------------------------------------------------------------------------


def test_out_gets_the_json_and_the_picture(a: Path, tmp_path: Path) -> None:
    b = save(tmp_path / "b", moved(hybrid(), "self_attn"), CONFIG)
    out, told = tmp_path / "deep" / "out", []
    found = diff(a, b, out=out, say=told.append)
    assert json.loads((out / "diff.json").read_bytes()) == found
    picture = (out / "diff.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert sorted(p.name for p in out.iterdir()) == ["diff.json", "diff.png"]
    assert any(str(out / "diff.png") in line for line in told)
    with pytest.raises(OutputExists, match="--force"):
        diff(a, b, out=out)
    diff(a, b, out=out, force=True)
    assert (out / "diff.png").read_bytes() == picture
    with pytest.raises(OutputExists, match="lies inside"):
        diff(a, b, out=a / "out")


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def layer(number: int, kind: str, **drifts: float | None) -> dict[str, Any]:
    roles = {
        role: {"drift": d, "cosine": 1.0, "entries": 9, "entries_changed": int(d != 0)}
        for role, d in drifts.items()
    }
    return {"layer": number, "kind": kind, "roles": roles}


@pytest.mark.parametrize("count", [1, 8, 80])
def test_the_picture_has_a_colour_for_every_drift(count: int) -> None:
    from morph import report

    def drawn(top: float) -> np.ndarray:
        layers = [
            layer(i, "full" if i % 4 == 3 or count == 1 else "linear", q=1e-3, mlp=0.0)
            for i in range(count)
        ]
        layers[-1]["roles"]["k"] = {"drift": top, "entries_changed": 1}
        return pixels(report.difference_picture({"a": "a", "b": "b", "layers": layers}))

    one, other = drawn(0.5), drawn(0.002)
    assert one.shape[2] == 3 and one.shape != () and not (
        one.shape == other.shape and (one == other).all()
    )  # fmt: skip
    blue = (np.abs(one.astype(int) - [0x00, 0x72, 0xB2]).max(-1) < 12).sum()
    assert blue > 100  # the strip says which layers are full


@pytest.mark.parametrize(
    "layers",
    [[], [layer(0, "", q=0.0)], [layer(5, "full", q=None, x=0.1), layer(9, "sliding", q=1e-9)]],
    ids=["none", "equal", "odd"],
)
def test_the_picture_of_little(layers: list[dict[str, Any]]) -> None:
    from morph import report

    told = {"a": "x" * 99, "b": "\x1b$b$", "layers": layers}
    assert report.difference_picture(told).startswith(b"\x89PNG")


def test_a_picture_that_fails_leaves_nothing(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morph import report

    def fails(found: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(report, "difference_picture", fails)
    with pytest.raises(ZeroDivisionError):
        diff(a, a, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Cost ---------------------------------------------------------------------------------------


def test_memory_is_bounded_by_a_block_not_by_a_tensor(tmp_path: Path) -> None:
    """One tensor of 64 MiB, compared and searched for its top direction, in less than 8 MiB."""
    rows, columns = 8192, 4096
    folders = []
    for name, value in (("a", b"\x80\x3f"), ("b", b"\x81\x3f")):
        folder = save(tmp_path / name, {}, {**CONFIG, "model_type": "novel"})
        header = {
            "model.layers.0.self_attn.q_proj.weight": {
                "dtype": "BF16",
                "shape": [rows, columns],
                "data_offsets": [0, 2 * rows * columns],
            }
        }
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _ in range(rows):
                file.write(value * columns)
        folders.append(folder)
    diff(folders[0], folders[0])  # what is imported does not count
    tracemalloc.start()
    try:
        found = diff(*folders)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    told = part(found, "model.layers.0.self_attn.q_proj.weight")
    assert told["drift"] == pytest.approx(2**-7) and told["entries_changed"] == rows * columns
    assert told["top_direction"] == pytest.approx(1.0, abs=1e-4)
    assert peak < 8 * 2**20


def test_it_loads_no_torch(a: Path, tmp_path: Path) -> None:
    b = save(tmp_path / "b", moved(hybrid(), "self_attn"), CONFIG)
    code = (
        "import sys\nfrom morph.cli import main\ntry:\n main(sys.argv[1:])\n"
        "except SystemExit as e:\n code = e.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "diff", str(a), str(b)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "by role" in done.stdout


def test_progress_is_told_of_long_comparisons(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    diff(a, a, say=told.append)
    assert told == []
    monkeypatch.setattr(_diff, "TOLD", 0)
    diff(a, a, say=told.append)
    assert 2 <= len(told) <= 10 and all(line.startswith("compared ") for line in told)
