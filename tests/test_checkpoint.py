"""Checkpoints are read as they are, written byte for byte, and appear whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morph import checkpoint
from morph.checkpoint import (
    Checkpoint,
    Staging,
    kept_equal,
    verify,
    verify_manifest,
    write_checkpoint,
)
from morph.errors import (
    CheckpointError,
    MorphError,
    OutputExists,
    StorageError,
    UsageError,
    VerificationFailed,
)
from morph.families._family import Move

LAYERS, HEADS, GROUPS, DIM, HIDDEN, VOCAB = 2, 4, 2, 2, 8, 6
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "hidden_size": HIDDEN,
    "tie_word_embeddings": False,
}
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def tiny_tensors() -> Tensors:
    """A two-layer decoder in bfloat16 whose last norm is float32 (mixed types are common)."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (GROUPS * DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (GROUPS * DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
            f"{at}.mlp.up_proj.weight": (5, HIDDEN),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    found: Tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "model.norm.weight":
            found[name] = ("F32", shape, values.tobytes())
        else:
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            found[name] = ("BF16", shape, bits.tobytes())
    return found


def save_shard(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write a safetensors file in the order given."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def save(folder: Path, tensors: Tensors, shards: int = 1, config: Any = CONFIG) -> Path:
    """Write a whole checkpoint folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    names = list(tensors)
    if shards == 1:
        save_shard(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        part = {n: tensors[n] for n in names[i::shards]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_shard(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


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


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def beside(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden ones included."""
    return sorted(os.listdir(folder))


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


# --- what is written --------------------------------------------------------------------------


def test_an_identity_write_keeps_every_byte(any_source: Checkpoint, tmp_path: Path) -> None:
    before = hashes(any_source.path)
    result = write(any_source, tmp_path / "out", provenance={"b": 1, "a": float("inf")})
    out = verify(result)
    for name, (dtype, shape, data) in tiny_tensors().items():
        assert (out.tensors[name].dtype, out.tensors[name].shape) == (dtype, shape)
        assert out.read_bytes(name) == data
    assert kept_equal(any_source, out) == (sorted(tiny_tensors()), [], [])
    assert result.kept == tuple(sorted(tiny_tensors()))
    assert len(out.shards) == len(any_source.shards)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(out.shards) > 1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"a": 1}'
    assert hashes(any_source.path) == before
    assert beside(tmp_path) == ["in", "out"]
    files = hashes(tmp_path / "out")
    assert result.files == {n: h for n, h in files.items() if n != "MANIFEST.json"}


def test_the_safetensors_library_reads_what_was_written(
    any_source: Checkpoint, tmp_path: Path
) -> None:
    from safetensors import safe_open

    write(any_source, tmp_path / "out")
    seen = set()
    for shard in Checkpoint.open(tmp_path / "out").shards:
        with safe_open(tmp_path / "out" / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            seen |= set(file.keys())
            if "model.norm.weight" in file.keys():  # noqa: SIM118
                stored = np.frombuffer(tiny_tensors()["model.norm.weight"][2], np.float32)
                np.testing.assert_array_equal(file.get_tensor("model.norm.weight"), stored)
    assert seen == set(tiny_tensors())


def test_headers_are_sorted_and_data_is_aligned(tmp_path: Path) -> None:
    odd = {"a.u8": ("U8", (3,), b"abc"), "b.f64": ("F64", (1,), b"8" * 8)}
    source = Checkpoint.open(save(tmp_path / "in", odd | tiny_tensors()))
    write(source, tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert list(header) == sorted(header)
    for info in verify(tmp_path / "out").tensors.values():
        assert info.start % SIZES[info.dtype] == 0


SCRIPT = """
import sys
from morph.checkpoint import Checkpoint, write_checkpoint
source = Checkpoint.open(sys.argv[1])
write_checkpoint(sys.argv[2], source=source, config=source.config, provenance={"x": [1, 2.5]},
    new_tensors={"b": ("F32", (1,), b"1234"), "a": ("F32", (1,), b"4321")})
assert not {"torch", "transformers", "safetensors", "huggingface_hub"} & set(sys.modules)
"""


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script on this package in a fresh process."""
    root = str(Path(checkpoint.__file__).parents[2])
    environment = dict(os.environ) | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_same_inputs_give_same_bytes_in_any_process(source: Checkpoint, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        run = python("-c", SCRIPT, source.path, tmp_path / seed, PYTHONHASHSEED=seed)
        assert run.returncode == 0, run.stderr
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    for file in (tmp_path / "1").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_is_bounded_by_a_buffer(tmp_path: Path) -> None:
    size = 2 * 10**8
    folder = save(tmp_path / "in", tiny_tensors())
    big = tiny_tensors() | {"model.layers.0.big": ("U8", (size,), b"")}
    header, at = {}, 0
    for name, (dtype, shape, _) in big.items():
        nbytes = int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:  # sparse: takes no space
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    script = SCRIPT.replace("provenance=", "durable=False, provenance=")
    run = python("-c", script + "print(open('/proc/self/status').read())", folder, tmp_path / "out")
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split("VmHWM:")[1].split()[0]) * 1024
    assert peak < size / 2
    (tmp_path / "out" / "model.safetensors").unlink()


# --- moves ------------------------------------------------------------------------------------


def moves_for(source: Checkpoint, **changes: Sequence[Move]) -> list[Move]:
    """All names unchanged but for `changes`, keyed by the source tensor's last words."""
    found: list[Move] = []
    for name in source.tensors:
        key = next((k for k in changes if name.endswith(k)), None)
        found += changes[key] if key else [Move(target=name, source=name)]
    return found


def test_moves_rename_split_reshape_and_add(source: Checkpoint, tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj.weight"
    moves = [m for m in moves_for(source) if m.source != q]
    moves += [
        Move(target="first", source=q, rows=(0, 3)),
        Move(target="rest", source=q, rows=(3, HEADS * DIM)),
        Move(target="twice", source=q, rows=(2, 5)),
        Move(target="flat", source=q, shape=(HEADS * DIM * HIDDEN,)),
        Move(target="ones", shape=(2, 3), fill=1.0),
        Move(target="third", shape=(1,), fill=1 / 3),
    ]
    write(source, tmp_path / "out", moves=moves)
    out = verify(tmp_path / "out")
    assert q not in out.tensors
    full = source.read(q)
    np.testing.assert_array_equal(out.read("first"), full[:3])
    np.testing.assert_array_equal(out.read("rest"), full[3:])
    np.testing.assert_array_equal(out.read("twice"), full[2:5])
    np.testing.assert_array_equal(out.read("flat"), full.reshape(-1))
    np.testing.assert_array_equal(out.read_float("ones"), np.ones((2, 3), np.float32))
    assert out.tensors["ones"].dtype == "BF16"
    assert out.read("third")[0] == 0x3EAB  # 1/3 rounded to nearest, not cut off
    equal, changed, new = kept_equal(source, out, moves)
    assert set(new) == {"ones", "third"} and not changed and "first" in equal


def test_dropped_tensors_need_a_name_and_a_reason(source: Checkpoint, tmp_path: Path) -> None:
    gone = {"lm_head.weight": "tied to the embeddings"}
    result = write(source, tmp_path / "out", dropped=gone)
    assert result.dropped == gone
    assert set(verify(result).tensors) == set(tiny_tensors()) - set(gone)
    assert kept_equal(source, verify(result), dropped=gone)[1:] == ([], [])


Q = "model.layers.0.self_attn.q_proj.weight"
BAD_PLANS: dict[str, tuple[Callable[[Checkpoint], dict[str, Any]], str]] = {
    "unaccounted": (
        lambda s: {"moves": [m for m in moves_for(s) if m.source != Q]},
        "neither copied, replaced nor dropped.*layers.0.self_attn.q_proj",
    ),
    "rows-left-out": (
        lambda s: {
            "moves": moves_for(
                s, **{"0.self_attn.q_proj.weight": [Move(target="t", source=Q, rows=(0, 3))]}
            )
        },
        "row 3",
    ),
    "rows-outside": (
        lambda s: {"moves": [*moves_for(s), Move(target="t", source=Q, rows=(0, 99))]},
        r"rows 0:99",
    ),
    "unknown-source": (
        lambda s: {"moves": [*moves_for(s), Move(target="t", source=Q + "s")]},
        "Did you mean",
    ),
    "two-moves-one-target": (
        lambda s: {"moves": [*moves_for(s), Move(target=Q, source=Q)]},
        "two moves",
    ),
    "moved-and-dropped": (
        lambda s: {"moves": moves_for(s), "dropped": {Q: "no need"}},
        "both moved and dropped",
    ),
    "dropped-without-reason": (lambda s: {"dropped": {Q: ""}}, "without a reason"),
    "dropped-unknown": (lambda s: {"dropped": {"nothing": "x"}}, "no tensor 'nothing'"),
    "constant-without-shape": (
        lambda s: {"moves": [*moves_for(s), Move(target="t")]},
        "needs a shape",
    ),
    "reshape-of-another-size": (
        lambda s: {"moves": [*moves_for(s), Move(target="t", source=Q, shape=(3,))]},
        "cannot have",
    ),
    "replaced-unknown": (
        lambda s: {"replaced": {"t": ("F32", (1,), b"1234")}},
        "to be replaced",
    ),
    "replaced-other-shape": (
        lambda s: {"replaced": {Q: ("F32", (1,), b"1234")}},
        "replaced by shape",
    ),
    "new-exists": (lambda s: {"new_tensors": {Q: ("F32", (1,), b"1234")}}, "exists already"),
    "new-wrong-size": (lambda s: {"new_tensors": {"t": ("F32", (2,), b"1234")}}, "8 bytes, got 4"),
    "new-lazy-wrong-size": (
        lambda s: {"new_tensors": {"t": ("F32", (2,), lambda: b"1234")}},
        "8 bytes, got 4",
    ),
    "new-wrong-array": (
        lambda s: {"new_tensors": {"t": ("BF16", (1,), np.zeros(1, np.float16))}},
        "float16 is no BF16",
    ),
    "new-unknown-dtype": (lambda s: {"new_tensors": {"t": ("F128", (1,), b"")}}, "F128"),
    "new-control-character": (
        lambda s: {"new_tensors": {"a\x1b": ("U8", (1,), b"1")}},
        "no tensor name",
    ),
    "extra-file-elsewhere": (lambda s: {"extra_files": {"../x": b""}}, "no plain file name"),
    "extra-file-is-ours": (lambda s: {"extra_files": {"config.json": b""}}, "morph writes"),
    "nothing-left": (lambda s: {"dropped": dict.fromkeys(s.tensors, "all")}, "no tensors"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_contradicts_itself_is_refused(
    source: Checkpoint, tmp_path: Path, case: str
) -> None:
    options, message = BAD_PLANS[case]
    with pytest.raises(CheckpointError, match=message):
        write(source, tmp_path / "out", **options(source))
    assert beside(tmp_path) == ["in"]


def test_new_and_replaced_tensors_take_every_kind_of_data(
    source: Checkpoint, tmp_path: Path
) -> None:
    donor = Checkpoint.open(save(tmp_path / "donor", tiny_tensors()))
    k, v = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")
    ones = np.full((GROUPS * DIM, HIDDEN), 0x3F80, "<u2")
    result = write(
        source,
        tmp_path / "out",
        replaced={
            Q: ("BF16", source.tensors[Q].shape, donor.tensors[Q.replace(".0.", ".1.")]),
            k: ("bfloat16", ones.shape, ones),
            v: ("torch.bfloat16", ones.shape, lambda: ones.T.T),
        },
        new_tensors={"gate": ("F32", (2,), np.array([1, 2], "<f4")), "raw": ("U8", (2,), b"ab")},
    )
    out = verify(result)
    assert result.made == ("gate", *sorted((k, Q, v)), "raw")
    np.testing.assert_array_equal(out.read(Q), donor.read(Q.replace(".0.", ".1.")))
    np.testing.assert_array_equal(out.read(k), ones)
    np.testing.assert_array_equal(out.read("gate"), [1, 2])
    assert out.read_bytes("raw") == b"ab"
    equal, changed, new = kept_equal(source, out)
    assert changed == sorted((k, Q, v)) and new == ["gate", "raw"]
    assert len(equal) == len(tiny_tensors()) - 3
    # the new tensors went to the last of the source's shards
    assert out.tensors["gate"].file.name == "model-00002-of-00002.safetensors"


def test_a_full_last_shard_is_followed_by_another(source: Checkpoint, tmp_path: Path) -> None:
    new = {f"new.{i}": ("U8", (100,), bytes(100)) for i in range(3)}
    write(source, tmp_path / "out", new_tensors=new, max_shard_bytes=200)
    out = verify(tmp_path / "out")
    assert out.shards == tuple(f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5))
    assert [out.tensors[n].file.name[6:11] for n in new] == ["00003", "00003", "00004"]


# --- side files -------------------------------------------------------------------------------


def test_side_files_are_copied_but_never_code_or_pickles(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", tiny_tensors())
    (folder / "additional_chat_templates").mkdir()
    kept = ["LICENSE", "chat_template.jinja", "additional_chat_templates/rag.jinja", "vocab.txt"]
    left = [
        "modeling_x.py",
        "pytorch_model.bin",
        "optimizer.pt",
        "a.PTH",
        "consolidated.safetensors",
    ]
    for name in (
        kept + left + [".gitattributes", "README.md", "morph.json", "MANIFEST.json", "skip.me"]
    ):
        (folder / name).write_text(name)
    result = write(
        Checkpoint.open(folder),
        tmp_path / "out",
        extra_files={"README.md": b"ours"},
        skip_files=["skip.me"],
        provenance={},
    )
    out = tmp_path / "out"
    for name in kept:
        assert (out / name).read_text() == name
    assert (out / "README.md").read_text() == "ours"
    assert (out / "README.source.md").read_text() == "README.md"
    assert json.loads((out / "morph.json").read_text()) == {}
    assert result.not_copied == tuple(sorted([*left, "skip.me"]))
    assert not (out / ".gitattributes").exists()
    assert verify_manifest(out) == []
    # a second generation keeps the card of the first
    again = write(Checkpoint.open(out), tmp_path / "again", extra_files={"README.md": b"newer"})
    assert (tmp_path / "again" / "README.source.md").read_text() == "README.md"
    assert "README.md" in again.not_copied
    assert not (tmp_path / "again" / "morph.json").exists()


def test_the_card_stays_where_no_new_one_is_given(source: Checkpoint, tmp_path: Path) -> None:
    (source.path / "README.md").write_text("theirs")
    write(Checkpoint.open(source.path), tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "theirs"


def test_infinity_in_a_config_is_written_as_transformers_reads_it(
    source: Checkpoint, tmp_path: Path
) -> None:
    config = {**source.config, "limit": [0.0, float("inf")]}
    write_checkpoint(tmp_path / "out", source=source, config=config)
    read = Checkpoint.open(tmp_path / "out").config
    assert read["limit"] == [0.0, {"__float__": "Infinity"}]


def test_only_an_auto_map_to_our_own_files_is_written(source: Checkpoint, tmp_path: Path) -> None:
    hostile = {**source.config, "auto_map": {"AutoConfig": "evil.Config"}}
    ours = {"AutoModelForCausalLM": "modeling_ours.Model"}
    with pytest.raises(CheckpointError, match=r"modeling_ours\.Model.*no file that is written"):
        write(source, tmp_path / "out", auto_map=ours)
    write_checkpoint(
        tmp_path / "out",
        source=source,
        config=hostile,
        auto_map=ours,
        extra_files={"modeling_ours.py": b"class Model: ..."},
        durable=False,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == ours
    again = Checkpoint.open(tmp_path / "out")  # as a source, even our own code is left behind
    assert again.dropped_keys == ("auto_map",)
    assert again.ignored_files == ("modeling_ours.py",)


def test_permissions_follow_the_umask(source: Checkpoint, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(source, tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}


def test_progress_counts_every_byte(source: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = write(
        source, tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (result.nbytes, result.nbytes)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


# --- where it is written ----------------------------------------------------------------------


def test_an_existing_output_is_only_replaced_by_force(source: Checkpoint, tmp_path: Path) -> None:
    write(source, tmp_path / "out", extra_files={"old.txt": b"1"})
    before = hashes(tmp_path / "out")
    with pytest.raises(OutputExists, match="--force"):
        write(source, tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    write(source, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert beside(tmp_path) == ["in", "out"]


def test_force_without_an_atomic_exchange(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("morph.checkpoint._staging.exchange", lambda one, other: False)
    write(source, tmp_path / "out", extra_files={"old.txt": b"1"})
    write(source, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert beside(tmp_path) == ["in", "out"]


def place_file(root: Path) -> Path:
    (root / "taken").write_text("x")
    return root / "taken"


def place_photos(root: Path) -> Path:
    (root / "photos").mkdir()
    (root / "photos" / "cat.jpg").write_text("x")
    return root / "photos"


def place_link(root: Path) -> Path:
    (root / "elsewhere").mkdir()
    (root / "link").symlink_to("elsewhere")
    return root / "link"


def place_input_by_link(root: Path) -> Path:
    (root / "same").symlink_to("in")
    return root / "same"


PLACES: dict[str, tuple[Callable[[Path], Path], type[MorphError]]] = {
    "the-input": (lambda r: r / "in", OutputExists),
    "the-input-spelled-otherwise": (lambda r: r / "in" / ".." / "in", OutputExists),
    "the-input-by-link": (place_input_by_link, OutputExists),
    "inside-the-input": (lambda r: r / "in" / "out", OutputExists),
    "around-the-input": (lambda r: r, OutputExists),
    "a-file": (place_file, OutputExists),
    "a-folder-of-something-else": (place_photos, OutputExists),
    "a-link": (place_link, OutputExists),
    "no-parent": (lambda r: r / "missing" / "out", UsageError),
    "parent-is-a-file": (lambda r: place_file(r) / "out", UsageError),
    "control-character": (lambda r: r / "a\x1bb", UsageError),
}


@pytest.mark.parametrize("force", [False, True], ids=["plain", "force"])
@pytest.mark.parametrize("case", PLACES)
def test_bad_places_are_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path, case: str, force: bool
) -> None:
    place, error = PLACES[case]
    out = place(tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(error) as caught:
        write(source, out, force=force)
    assert hashes(tmp_path) == before
    assert not any(n.startswith(".") for n in beside(tmp_path))
    assert "\x1b" not in str(caught.value)


def test_a_name_of_255_bytes(source: Checkpoint, tmp_path: Path) -> None:
    write(source, tmp_path / ("n" * 255))
    assert len(beside(tmp_path)) == 2


def test_too_little_space_is_said_with_both_numbers(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    usage = type("usage", (), {"free": 1234, "total": real.f_blocks, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"1234 bytes free, \d+ are needed") as caught:
        write(source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert beside(tmp_path) == ["in"]


# --- faults -----------------------------------------------------------------------------------

SYSCALLS = ("mkdir", "open", "pwrite", "copy_file_range", "fsync", "rename", "ftruncate")


class Fault:
    """Calls `act` in place of the n-th call that changes the disk."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.number, self.act, self.count = number, act, 0
        self.calls: list[tuple[str, Any]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in SYSCALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.count += 1
            self.calls.append((name, args[0]))
            if self.count == self.number:
                self.act()
            return real(*args, **kwargs)

        return call


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


ERRORS: dict[str, Callable[[], BaseException]] = {
    "full-disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "failing-disk": lambda: OSError(errno.EIO, "Input/output error"),
    "permission": lambda: OSError(errno.EACCES, "Permission denied"),
    "ctrl-c": KeyboardInterrupt,
}


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_at_any_call_leaves_nothing_half_done(
    source: Checkpoint, tmp_path: Path, kind: str, force: bool
) -> None:
    out = tmp_path / "out"
    inputs = hashes(source.path)
    old: dict[str, str] = {}
    for number in range(1, 1000):
        if force:
            write(source, out, force=True, extra_files={"old.txt": b"old"})
            old = hashes(out)
        fault = Fault(number, raising(ERRORS[kind]()))
        with pytest.MonkeyPatch.context() as patch:
            fault.install(patch)
            try:
                write(source, out, force=force, durable=True)
                caught: BaseException | None = None
            except (MorphError, KeyboardInterrupt) as error:
                caught = error
        if caught is not None:
            assert isinstance(caught, KeyboardInterrupt if kind == "ctrl-c" else StorageError)
        if out.exists():
            if not force or hashes(out) != old:
                verify(out)
                assert not (out / "old.txt").exists()
        else:
            assert not force
        assert set(beside(tmp_path)) <= {"in", "out"}, f"call {number}: {fault.calls[-1]}"
        if fault.count < number:
            break
        if not force and out.exists():  # only the last flush of the parent comes after the rename
            assert fault.calls[-1][0] == "fsync"
            verify(out)
            subprocess.run(["rm", "-r", str(out)], check=True)
    assert number > 20
    verify(out)
    assert hashes(source.path) == inputs


KILL = """
import os, sys, shutil
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from morph.checkpoint import Checkpoint, verify, write_checkpoint, _staging
source, root, force = Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "force"
out = root / "out"
if sys.argv[3] == "aside":
    force, _staging.exchange = True, lambda one, other: False

def put(**options):
    return write_checkpoint(out, source=source, config=source.config, **options)

def dying(number):
    count = 0
    def wrap(name, real):
        def call(*args, **kwargs):
            nonlocal count
            if name != "open" or args[1] & os.O_CREAT:
                count += 1
                if count == number:
                    os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in ("mkdir", "open", "pwrite", "copy_file_range", "fsync", "rename", "ftruncate"):
        setattr(os, name, wrap(name, getattr(os, name)))

for number in range(1, 1000):
    shutil.rmtree(out, ignore_errors=True)
    if force:
        put(extra_files={"old.txt": b"old"}, durable=False)
    child = os.fork()
    if not child:
        dying(number)
        put(force=force)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if out.exists():
        verify(out)
    elif force:
        aside = [p for p in root.iterdir() if p.name.startswith(".out.old-")]
        assert sys.argv[3] == "aside" and len(aside) == 1, number
        verify(aside[0])
    if code == 0:
        break
    try:
        put(force=out.exists() or force, durable=False)
    except FileNotFoundError as error:
        sys.exit(f"{number}: {error}")
    verify(out)
    left = sorted(p.name for p in root.iterdir())
    assert left == ["in", "out"], (number, left)
print(number)
"""


@pytest.mark.parametrize("mode", ["new", "force", "aside"])
def test_a_kill_at_any_call_leaves_the_output_absent_or_complete(
    source: Checkpoint, tmp_path: Path, mode: str
) -> None:
    root = Path(checkpoint.__file__).parents[2]
    run = python("-c", KILL, source.path, tmp_path, mode, root)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20


def test_data_reaches_the_disk_before_the_rename(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[int, str] = {}
    real_open = os.open

    def opening(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real_open(path, *args, **kwargs)
        names[fd] = os.path.basename(path)
        return fd

    monkeypatch.setattr(os, "open", opening)
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(names[fd]), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("RENAME"), real_rename(a, b))[1])
    write(source, tmp_path / "out", provenance={}, durable=True)
    files = set(beside(tmp_path / "out"))
    at = order.index("RENAME")
    assert order[at - 1].startswith(".out.partial-")  # the folder itself
    assert order[at - 2] == "MANIFEST.json"
    assert set(order[: at - 1]) == files
    assert order[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_kernel_cannot_copy_blocks_are_read_and_written(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write(source, tmp_path / "one")

    def refuse(*args: Any) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write(source, tmp_path / "two")
    monkeypatch.delattr(os, "copy_file_range")
    write(source, tmp_path / "three")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "three")


def test_short_reads_and_writes_are_continued(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, tmp_path / "one")
    real_copy, real_write, real_read = os.copy_file_range, os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:7], at))
    monkeypatch.setattr(os, "pread", lambda fd, count, at: real_read(fd, min(count, 64), at))
    monkeypatch.setattr(
        os, "copy_file_range", lambda a, b, count, x, y: real_copy(a, b, min(count, 5), x, y)
    )
    write(source, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.parametrize("kernel", [True, False], ids=["in-kernel", "by-blocks"])
@pytest.mark.parametrize("change", ["truncated", "touched", "replaced"])
def test_a_source_that_changes_meanwhile_is_noticed(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    victim = source.path / source.shards[-1]

    def meddle(done: int, total: int) -> None:
        if change == "truncated":
            os.truncate(victim, 100)
        elif change == "touched":
            os.utime(victim, ns=(1, 1))
        else:
            (source.path / "new").write_bytes(victim.read_bytes())
            os.replace(source.path / "new", victim)

    with pytest.raises(CheckpointError, match="change"):
        write(source, tmp_path / "out", progress=meddle)
    assert beside(tmp_path) == ["in"]


def test_a_changed_source_is_noticed_when_read(source: Checkpoint) -> None:
    os.utime(source.path / source.shards[0], ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed"):
        source.nonfinite()


# --- two writers, dead writers ----------------------------------------------------------------


def test_a_second_writer_is_told_who_the_first_is(source: Checkpoint, tmp_path: Path) -> None:
    def meanwhile(folder: Path) -> None:
        with pytest.raises(OutputExists, match=f"pid {os.getpid()}"):
            write(source, tmp_path / "out")

    write(source, tmp_path / "out", verify=meanwhile)
    verify(tmp_path / "out")
    assert beside(tmp_path) == ["in", "out"]


def test_what_dead_writers_left_is_cleared(source: Checkpoint, tmp_path: Path) -> None:
    for name in (".out.partial-1-0123abcd", ".out.old-1-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".out.lock").write_text("pid 1 on nowhere")
    (tmp_path / ".out.partial-mine").mkdir()  # not our pattern: somebody else's
    (tmp_path / "out2").mkdir()
    with pytest.raises(OutputExists, match="exists"):  # the old output is back in its place
        write(source, tmp_path / "out")
    assert (tmp_path / "out" / "file").exists()
    subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
    write(source, tmp_path / "out")
    assert beside(tmp_path) == [".out.partial-mine", "in", "out", "out2"]


def test_an_output_that_appears_meanwhile_is_left_alone(source: Checkpoint, tmp_path: Path) -> None:
    def meanwhile(folder: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(OutputExists, match="meanwhile"):
        write(source, tmp_path / "out", verify=meanwhile)
    assert beside(tmp_path / "out") == ["theirs"]
    assert beside(tmp_path) == ["in", "out"]


# --- checks before and after ------------------------------------------------------------------


def test_the_check_sees_the_complete_folder_before_it_appears(
    source: Checkpoint, tmp_path: Path
) -> None:
    seen: list[str] = []

    def look(folder: Path) -> None:
        assert not (tmp_path / "out").exists()
        assert verify_manifest(folder) == []
        seen.extend(beside(folder))

    write(source, tmp_path / "out", verify=look)
    assert seen == beside(tmp_path / "out")


@pytest.mark.parametrize("error", [VerificationFailed("logits differ"), KeyboardInterrupt()])
def test_a_check_that_fails_stops_the_write(
    source: Checkpoint, tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        write(source, tmp_path / "out", verify=lambda folder: raising(error)())
    assert beside(tmp_path) == ["in"]


def test_a_check_may_not_change_what_it_checks(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match=r"litter\.txt"):
        write(source, tmp_path / "out", verify=lambda f: (f / "litter.txt").write_text("x"))
    assert beside(tmp_path) == ["in"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-flip": (lambda f: flip(f / "model-00002-of-00002.safetensors"), "expected sha256"),
    "truncated": (lambda f: os.truncate(f / "tokenizer.json", 3), "expected 8 bytes, found 3"),
    "missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "added": (lambda f: (f / "more.txt").write_text("x"), "more.txt: not in the manifest"),
    "config": (lambda f: flip(f / "config.json"), "config.json: expected sha256"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_by_file(source: Checkpoint, tmp_path: Path, case: str) -> None:
    write(source, tmp_path / "out")
    damage, message = DAMAGE[case]
    damage(tmp_path / "out")
    assert len(verify_manifest(tmp_path / "out")) == 1
    with pytest.raises(VerificationFailed, match=message):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"x": 1}}',
        '{"format": 1, "format": 1, "files": {}}',
    ],
    ids=["list", "format", "traversal", "absolute", "entry", "doubled-key"],
)
def test_a_hostile_manifest_is_refused(source: Checkpoint, manifest: str) -> None:
    (source.path / "MANIFEST.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        verify(source.path)


def test_a_folder_without_manifest_was_not_written_by_morph(source: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json"):
        verify(source.path)


def test_staging_serves_any_folder(tmp_path: Path) -> None:
    with Staging(tmp_path / "state") as stage:
        stage.write("a.json", b"{}")
        stage.write("deep/b.bin", bytes(100))
        stage.publish()
    assert verify_manifest(tmp_path / "state") == []
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "other") as stage:
        stage.write("a.json", b"{}")
        raise ZeroDivisionError
    assert beside(tmp_path) == ["state"]


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


def test_results_are_plain_data(source: Checkpoint, tmp_path: Path) -> None:
    result = write(source, tmp_path / "out")
    assert os.fspath(result) == str(result) == str(tmp_path / "out")
    assert dataclasses.is_dataclass(result)
