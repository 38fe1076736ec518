"""Checkpoints are written byte for byte: every tensor is accounted for, every side file too."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morph import checkpoint
from morph.checkpoint import Checkpoint, kept_equal, verify, verify_manifest, write_checkpoint
from morph.errors import CheckpointError
from morph.families._family import Move

_spec = importlib.util.spec_from_file_location("_folders", Path(__file__).with_name("_folders.py"))
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)
DIM, GROUPS, HEADS, HIDDEN = folders.DIM, folders.GROUPS, folders.HEADS, folders.HIDDEN
SIZES = folders.SIZES
beside, hashes, python, save = folders.beside, folders.hashes, folders.python, folders.save
tiny_tensors = folders.tiny_tensors


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


def test_same_inputs_give_same_bytes_in_any_process(source: Checkpoint, tmp_path: Path) -> None:
    for seed in "12345":
        run = python("-c", SCRIPT, source.path, tmp_path / seed, PYTHONHASHSEED=seed)
        assert run.returncode == 0, run.stderr
        assert hashes(tmp_path / seed) == hashes(tmp_path / "1")
    for file in (tmp_path / "1").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_is_bounded_by_a_buffer(tmp_path: Path) -> None:
    size = 2 * 10**8
    folder = folders.sparse(tmp_path / "in", "model.layers.0.big", size)
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


def test_results_are_plain_data(source: Checkpoint, tmp_path: Path) -> None:
    result = write(source, tmp_path / "out")
    assert os.fspath(result) == str(result) == str(tmp_path / "out")
    assert dataclasses.is_dataclass(result)
