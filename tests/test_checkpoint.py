"""Checkpoints are read as they are, from hostile folders too; `inspect` tells what they hold."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morph import checkpoint
from morph.checkpoint import Checkpoint, Weights, kept_equal, verify, write_checkpoint
from morph.errors import CheckpointError, UnsupportedModel, UsageError

_spec = importlib.util.spec_from_file_location("_folders", Path(__file__).with_name("_folders.py"))
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)
CONFIG, DIM, GROUPS, HEADS = folders.CONFIG, folders.DIM, folders.GROUPS, folders.HEADS
HIDDEN, LAYERS, SIZES = folders.HIDDEN, folders.LAYERS, folders.SIZES
beside, python, save, save_shard = folders.beside, folders.python, folders.save, folders.save_shard
tiny_tensors = folders.tiny_tensors
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(params=[1, 2, 3], ids=["one-file", "two-shards", "three-shards"])
def any_source(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint.open(save(tmp_path / "in", tiny_tensors(), request.param))


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(save(tmp_path / "in", tiny_tensors(), 2))


def write(source: Checkpoint, out: Path, **options: Any) -> checkpoint.Written:
    """Write without waiting for the disk, except where a test asks for it."""
    options = {"durable": False} | options
    return write_checkpoint(out, source=source, config=source.config, **options)


# --- reading --------------------------------------------------------------------------------------


def test_open_tells_what_is_stored(any_source: Checkpoint) -> None:
    stored = tiny_tensors()
    assert set(any_source.tensors) == set(stored)
    assert list(any_source.tensors) == sorted(stored)
    for name, (dtype, shape, data) in stored.items():
        info = any_source.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, len(data))
        assert any_source.read_bytes(name) == data
        assert any_source.sha256(name) == hashlib.sha256(data).hexdigest()
        assert any_source.read(name).shape == shape
    assert any_source.nbytes == sum(len(d) for _, _, d in stored.values())
    assert any_source.dtypes["F32"] == 4 * HIDDEN
    assert any_source.main_dtype == "BF16"
    assert any_source.other_files == ("tokenizer.json",)


def test_bfloat16_is_decoded(source: Checkpoint) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    bits = np.frombuffer(tiny_tensors()[name][2], np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32).reshape(HEADS * DIM, HIDDEN)
    assert source.read(name).dtype == np.uint16
    np.testing.assert_array_equal(source.read_float(name), expected)


def test_missing_tensor_names_the_nearest(source: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        source.read("model.norn.weight")


def test_empty_and_zero_rank_tensors_are_accepted(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {"empty": ("F32", (0, 3), b""), "scalar": ("F32", (), b"\0\0\0\0")}
    found = Checkpoint.open(save(tmp_path / "in", tensors))
    assert found.read("empty").shape == (0, 3)
    assert found.read("scalar").shape == ()
    write(found, tmp_path / "out")
    assert verify(tmp_path / "out").read("scalar").shape == ()


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("BF16", np.array([0x7F80], "<u2")),
        ("BF16", np.array([0x7FC1], "<u2")),
        ("BF16", np.array([0xFF80], "<u2")),
        ("F16", np.array([np.nan], "<f2")),
        ("F32", np.array([-np.inf], "<f4")),
        ("F32", np.array([np.nan], "<f4")),
        ("F64", np.array([np.inf], "<f8")),
    ],
    ids=[
        "bf16-inf",
        "bf16-nan",
        "bf16-minus-inf",
        "fp16-nan",
        "fp32-minus-inf",
        "fp32-nan",
        "fp64",
    ],
)
def test_nonfinite_values_are_found(tmp_path: Path, dtype: str, bits: np.ndarray) -> None:
    tensors = tiny_tensors()
    count = 3 * 2**20  # so that the bad value lies in a later block
    good = np.full(count, 0x3F, "u1").tobytes()[: count // SIZES[dtype] * SIZES[dtype]]
    data = good[: len(good) - bits.nbytes] + bits.tobytes()
    tensors["model.layers.1.bad"] = (dtype, (len(data) // SIZES[dtype],), data)
    tensors["model.layers.1.good"] = (dtype, (len(good) // SIZES[dtype],), good)
    assert Checkpoint.open(save(tmp_path / "in", tensors)).nonfinite() == ["model.layers.1.bad"]


def test_hostile_keys_are_dropped_at_any_depth(tmp_path: Path) -> None:
    config = CONFIG | {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation": "org/repo",
        "_attn_implementation_internal": "org/repo",
        "trust_remote_code": True,
        "transformers_weights": "other.safetensors",
        "nested": [{"model_file": "x.py", "kept": 1}],
    }
    found = Checkpoint.open(save(tmp_path / "in", tiny_tensors(), config=config))
    assert found.config == CONFIG | {"nested": [{"kept": 1}]}
    assert found.raw_config == config
    assert set(found.dropped_keys) == set(config) - set(CONFIG) - {"nested"} | {
        "nested[0].model_file"
    }
    assert "auto_map" in found.notes[0]
    write_checkpoint(tmp_path / "out", source=found, config=config)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == found.config


def test_single_file_wins_over_an_index_and_it_is_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", tiny_tensors(), 2)
    save_shard(folder / "model.safetensors", tiny_tensors())
    found = Checkpoint.open(folder)
    assert found.shards == ("model.safetensors",)
    assert "the single file is used" in found.notes[0]
    assert "model-00001-of-00002.safetensors" in found.ignored_files


def test_blob_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    real = save(tmp_path / "real", tiny_tensors(), 2)
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in real.iterdir():
        file.rename(repo / "blobs" / file.name.upper())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name.upper()}")
    found = Checkpoint.open(snapshot)
    assert set(found.tensors) == set(tiny_tensors())
    write(found, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    with pytest.raises(UsageError, match="cache"):
        write(found, repo / "snapshots" / "mine")


def test_fingerprint_tells_weights_and_configs_apart(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    first = Checkpoint.open(save(tmp_path / "a", tensors)).fingerprint
    assert Checkpoint.open(save(tmp_path / "b", tensors)).fingerprint == first
    name = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    other = tensors | {name: (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))}
    assert Checkpoint.open(save(tmp_path / "c", other)).fingerprint != first
    config = CONFIG | {"rope_theta": 5.0}
    assert Checkpoint.open(save(tmp_path / "d", tensors, config=config)).fingerprint != first


# --- weights without a config, adapters, partial downloads ----------------------------------------


def test_weights_need_no_config(any_source: Checkpoint) -> None:
    (any_source.path / "config.json").unlink()
    found = Weights.open(any_source.path)
    assert found.shards == any_source.shards and found.tensors == any_source.tensors
    assert found.other_files == ("tokenizer.json",)
    assert found.index == ("model.safetensors.index.json" if len(found.shards) > 1 else "")
    assert all(found.read_bytes(n) == data for n, (_, _, data) in tiny_tensors().items())
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(any_source.path)


def test_weights_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    save_shard(tmp_path / "lora" / "adapter_model.safetensors", {"a": ("F32", (1,), b"1234")})
    found = Weights.open(tmp_path / "lora")
    assert found.is_adapter and found.read_bytes("a") == b"1234"
    assert found.other_files == ("adapter_config.json",)
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        Checkpoint.open(tmp_path / "lora")


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickles": (
        lambda f: (
            [p.rename(p.with_suffix(".bin")) for p in f.glob("*.safetensors")]
            + [(f / "model.safetensors.index.json").unlink()]
        ),
        "only pickle weights.*Convert them first: `morph convert-pickle .*in OUT`",
    ),
    "missing-shard": (lambda f: (f / ONE).unlink(), f"1 of 2 shards are missing, such as {ONE}"),
    "truncated": (lambda f: os.truncate(f / ONE, (f / ONE).stat().st_size - 1), "is truncated"),
    "no-header": (lambda f: (f / ONE).write_bytes(b"\0"), "at least 8"),
    "pointer": (lambda f: (f / ONE).write_bytes(b"version https://git-lfs.github.com/"), "git lfs"),
    "in-two-files": (lambda f: shutil.copy(f / TWO, f / ONE), "is in two files"),
    "empty": (lambda f: shutil.rmtree(f) or f.mkdir(), "has no weights"),
}


@pytest.mark.parametrize("opened", [Weights, Checkpoint])
@pytest.mark.parametrize("case", DEFECTS)
def test_weights_refuse_what_checkpoints_refuse(
    source: Checkpoint, case: str, opened: type[Weights]
) -> None:
    act, message = DEFECTS[case]
    act(source.path)
    if opened is Checkpoint and case == "empty":
        message = "config.json is missing"
    with pytest.raises(CheckpointError, match=message):
        opened.open(source.path)


@pytest.mark.parametrize("opened", [Weights, Checkpoint])
@pytest.mark.parametrize("left", ["nothing", "broken-link"])
def test_a_partial_download_tells_what_is_not_here(
    source: Checkpoint, opened: type[Weights], left: str
) -> None:
    gone = [n for n, info in source.tensors.items() if info.file.name == ONE]
    (source.path / ONE).unlink()
    if left == "broken-link":
        (source.path / ONE).symlink_to("../../blobs/never-came")
    with pytest.raises(CheckpointError, match="missing|broken link"):
        opened.open(source.path)
    found = opened.open(source.path, partial=True)
    assert found.shards == (TWO,)
    assert found.absent == dict.fromkeys(gone, ONE)
    assert set(found.tensors) == set(source.tensors) - set(gone)
    with pytest.raises(CheckpointError, match=rf"'{gone[0]}' is in {ONE}, which is not here"):
        found.read_bytes(gone[0])
    (source.path / TWO).unlink()
    with pytest.raises(CheckpointError, match="2 of 2 shards are missing"):
        opened.open(source.path, partial=True)


def test_a_partial_download_is_compared_with_the_index(source: Checkpoint) -> None:
    """What is here may not be what the index says, and the config still has to fit."""
    (source.path / ONE).unlink()
    config = json.loads((source.path / "config.json").read_text())
    (source.path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 7"):
        Checkpoint.open(source.path, partial=True)
    save_shard(source.path / TWO, {"other": ("F32", (1,), b"1234")})
    with pytest.raises(CheckpointError, match="does not hold it"):
        Weights.open(source.path, partial=True)


def test_quantised_weights_are_opened_where_asked(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    folder = save(tmp_path / "in", tiny_tensors(), config=config)
    with pytest.raises(UnsupportedModel, match=r"is quantised \(config.json: quantization_config"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, quantised=True).quantised == "config.json: quantization_config"
    assert Checkpoint.open(save(tmp_path / "plain", tiny_tensors())).quantised == ""


# --- resolving names --------------------------------------------------------------------------


def test_resolve_returns_a_local_folder(source: Checkpoint) -> None:
    assert checkpoint.resolve(str(source.path)) == source.path


@pytest.mark.parametrize("name", ["./nothing/here/at/all", "../x", "a/b/c", "", "a b", "\x1b[1m"])
def test_resolve_refuses_what_is_neither_folder_nor_hub_id(name: str) -> None:
    if name == "":  # the current folder, which is no checkpoint
        with pytest.raises(CheckpointError):
            Checkpoint.open(checkpoint.resolve(name))
        return
    with pytest.raises(CheckpointError, match="neither") as caught:
        checkpoint.resolve(name)
    assert "\x1b" not in str(caught.value)


def test_resolve_downloads_weights_but_no_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    def fake(model: str, **options: Any) -> str:
        seen.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert checkpoint.resolve("org/model", "main") == tmp_path
    assert (seen["model"], seen["revision"]) == ("org/model", "main")
    assert {"*.json", "*.safetensors"} <= set(seen["allow_patterns"])
    assert {"*.py", "*.bin"} <= set(seen["ignore_patterns"])


def test_resolve_offline_is_one_clear_line() -> None:
    with pytest.raises(CheckpointError, match="no local folder") as caught:
        checkpoint.resolve("nobody/no-such-model-anywhere")
    assert "\n" not in str(caught.value)


# --- inspect ----------------------------------------------------------------------------------


def test_inspect_tells_what_a_checkpoint_is(any_source: Checkpoint) -> None:
    found = checkpoint.inspect(any_source.path, health=True)
    json.dumps(found)
    assert found["model_type"] == "qwen3"
    assert (found["num_attention_heads"], found["num_key_value_heads"]) == (HEADS, GROUPS)
    assert found["bytes"] == any_source.nbytes
    assert found["num_parameters"] == sum(
        int(np.prod(i.shape)) for i in any_source.tensors.values()
    )
    assert found["lm_head_stored"] and not found["tie_word_embeddings"]
    attention = 2 * HIDDEN * DIM * 2 * (HEADS + GROUPS)
    assert (
        found["layers"]
        == [{"attention": attention, "mlp": 5 * HIDDEN * 2, "norm": HIDDEN * 2, "other": 0}]
        * LAYERS
    )
    assert found["cache_bytes"]["1K"] == 1024 * LAYERS * GROUPS * 2 * DIM * 2
    assert found["problems"] == [] and found["nonfinite"] == [] and found["tie_conflict"] == ""
    assert found["hybrid"] is None


def test_inspect_reads_a_stock_hybrid(tmp_path: Path) -> None:
    config = CONFIG | {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16,
        "use_sliding_window": True,
        "max_window_layers": 0,
    }
    found = checkpoint.inspect(save(tmp_path / "in", tiny_tensors(), config=config))
    assert found["hybrid"]["kind"] == "stock"
    assert found["hybrid"]["pattern"] == "Fo"
    per_token = GROUPS * 2 * DIM * 2
    assert found["cache_bytes"]["1K"] == (1024 + 16) * per_token


def test_inspect_reads_the_plan_of_a_morph_hybrid(tmp_path: Path) -> None:
    from morph import strict
    from morph.plan import CacheCost, Geometry, uniform_plan

    geometry = Geometry(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        v_head_dim=DIM,
        hidden_size=HIDDEN,
        windows=(None,) * LAYERS,
    )
    plan = uniform_plan("qwen3", geometry, [0], "sliding", {"window": 8}, CacheCost(tokens=8))
    config = CONFIG | {"model_type": "morph_qwen3", "morph": {"plan": strict.plain(plan)}}
    found = checkpoint.inspect(save(tmp_path / "in", tiny_tensors(), config=config))
    assert found["problems"] == []
    assert found["hybrid"] == {
        "kind": "morph",
        "pattern": "FS",
        "mixers": ["sliding"],
        "layer_types": ["full_attention", "sliding_attention"],
    }
    assert found["cache_bytes"]["1K"] == plan.cache_bytes(1024)


def test_inspect_reports_a_broken_stored_plan(tmp_path: Path) -> None:
    config = CONFIG | {"morph": {"plan": {"layers": 3}}}
    found = checkpoint.inspect(save(tmp_path / "in", tiny_tensors(), config=config))
    assert "not understood" in found["problems"][0]


def test_inspect_lists_disagreements_instead_of_stopping(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 7}
    found = checkpoint.inspect(save(tmp_path / "in", tiny_tensors(), config=config))
    assert "num_hidden_layers is 7" in found["problems"][0]


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_stored_twice(tmp_path: Path, equal: bool) -> None:
    tensors = tiny_tensors()
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    config = CONFIG | {"tie_word_embeddings": True}
    folder = save(tmp_path / "in", tensors, config=config)
    found = Checkpoint.open(folder)
    if equal:
        assert checkpoint.inspect(folder, health=True)["tie_conflict"] == ""
        write(found, tmp_path / "out")
        assert set(verify(tmp_path / "out").tensors) == set(tensors)  # neither added nor lost
        return
    assert "lm_head.weight" in checkpoint.inspect(folder, health=True)["tie_conflict"]
    with pytest.raises(CheckpointError, match="ties the embeddings"):
        write(found, tmp_path / "out")
    assert beside(tmp_path) == ["in"]


def test_everything_here_runs_without_torch(source: Checkpoint) -> None:
    script = (
        "import sys; from morph import checkpoint as c; c.inspect(sys.argv[1], health=True)\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(len(heavy))"
    )
    run = python("-c", script, source.path)
    assert run.returncode == 0, run.stderr


def test_real_checkpoints(shared_models: Path, tmp_path: Path) -> None:
    for folder in sorted(p for p in shared_models.iterdir() if p.is_dir()):
        found = Checkpoint.open(folder)
        assert checkpoint.inspect(folder)["problems"] == []
        assert found.nonfinite() == []
        write(found, tmp_path / folder.name)
        assert kept_equal(found, verify(tmp_path / folder.name))[1:] == ([], [])


@pytest.mark.parametrize("closed", ["in", "in/more"])
def test_folders_that_may_not_be_read_are_named(
    closed: str, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so that the system's answer is made up here."""
    (source.path / "more").mkdir()
    Checkpoint.open(source.path)
    refused = str(source.path.parent / closed)
    scan, access = os.scandir, os.access

    def scandir(path: str | Path) -> Any:
        if str(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda p, mode: str(p) != refused and access(p, mode))
    with pytest.raises(CheckpointError, match=f"{closed} cannot be read: [Pp]ermission"):
        Checkpoint.open(source.path)
