"""Pickled weights become safetensors byte for byte, and nothing that a pickle can do happens.

Most tests read the pickles in this process (`here`), where they are written too; a few go through
the real, closed process, and some put a hostile one in its place.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from morph import _sandbox, _unpickle
from morph.checkpoint import verify_manifest
from morph.errors import (
    CheckpointError,
    Interrupted,
    MorphError,
    OutputExists,
    StorageError,
    UsageError,
    VerificationFailed,
)
from morph.pipeline import _pickle_shards, _torch_files, _unpickling
from morph.pipeline._pickles import convert_pickle_command
from morph.pipeline._verify_files import verify_command

REPO = Path(__file__).resolve().parent.parent
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"model_type": "llama", "tie_word_embeddings": True}


class Here(_unpickling.Reader):
    """A reader without a process of its own: the same code, called."""

    def __init__(self, what: str, files: Any, *, tensors: Any = (), **_: Any) -> None:
        self.what, self.files, self.tensors, self.protections = what, files, tensors, ("none",)

    def close(self) -> None:
        pass

    def lines(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        read = _unpickle.hashes if self.what == "hashes" else _unpickle.layout
        for number, file in enumerate(self.files):
            job = {"fd": file.fd, "zip": file.zip}
            job["tensors"] = self.tensors[number] if self.tensors else ()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # as the process does
                    lines = list(read(_unpickle.Opened(file.fd, file.nbytes), job))
                for line in lines:
                    yield number, json.loads(json.dumps(line))
            except Exception as error:
                raise self._error(_unpickle.told(error), file) from error


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unpickling, "Reader", Here)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(_sandbox, "start", never)
    monkeypatch.setattr(_unpickling, "Reader", never)


def save(value: Any, path: Path, new: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


def weights(new: bool = True) -> dict[str, Any]:
    """Tensors of every kind that a state dict may hold; the old format knows no float8."""
    torch.manual_seed(1)
    shared, square = torch.randn(6, 4), torch.randn(5, 7).to(torch.bfloat16)
    found = {
        EMBEDDING: shared,
        HEAD: shared,
        "layers.0.a": torch.nn.Parameter(square[1:, 2:]),
        "layers.0.b": square.t(),
        "layers.0.c": torch.randn(2, 3, 4).permute(2, 0, 1),
        "layers.0.half": torch.tensor([float("nan"), -0.0, 1.0]).half(),
        "layers.0.double": torch.randn(3, dtype=torch.float64),
        "layers.0.complex": torch.randn(3, dtype=torch.complex64),
        "bools": torch.tensor([True, False]),
        "ints": torch.arange(5, dtype=torch.int32)[1:4],
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(7),
        "nothing": torch.empty(0, 3),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "steps": 12,
        "name": "x",
    }
    if new:
        found["float8"] = torch.randn(9).to(torch.float8_e4m3fn)
    return found


def folder(root: Path, value: Any, new: bool = True, **config: Any) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG | config))
    (root / "tokenizer.json").write_text("{}")
    (root / "modeling_x.py").write_text("raise SystemExit")
    save({"step": 1}, root / "optimizer.pt")
    save(value, root / "pytorch_model.bin", new)
    return root


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_equal(written: Path, wanted: Mapping[str, Any]) -> None:
    """Every tensor of a safetensors folder has the dtype, shape and bytes of the wanted one."""
    have: dict[str, torch.Tensor] = {}
    for file in sorted(written.glob("*.safetensors")):
        have |= load_file(file)
    tensors = {k: v for k, v in wanted.items() if isinstance(v, torch.Tensor)}
    assert have.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (have[name].dtype, have[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(have[name]) == raw(tensor), name


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_all_of_a_folder_through_the_closed_process(new, tmp_path):
    source, out = folder(tmp_path / "in", weights(new), new), tmp_path / "out"
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    found = convert_pickle_command(str(source), out)
    wanted = weights(new)
    del wanted[HEAD]
    check_equal(out, wanted)
    assert verify_manifest(out) == []
    assert (out / "config.json").read_bytes() == before["config.json"]
    names = {"MANIFEST.json", "config.json", "model.safetensors", "morph.json", "tokenizer.json"}
    assert {p.name for p in out.iterdir()} == names
    assert found["left_out"] == ["modeling_x.py", "optimizer.pt"]
    assert found["dropped"] == [
        "steps: an int, no tensor",
        "name: a str, no tensor",
        f"{HEAD}: the same storage as {EMBEDDING}, tied by config.json",
    ]
    record = json.loads((out / "morph.json").read_text())["converted_from_pickle"]
    assert record["tensors"].keys() == {k for k in wanted if k not in ("steps", "name")}
    assert list(record["files"]) == ["pytorch_model.bin"]
    if sys.platform == "linux":
        assert found["protections"] == ["limits", "seccomp", "landlock", "audit"]
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


@pytest.mark.parametrize("tied", [{"tie_word_embeddings": False}, {"tie_word_embeddings": None}])
def test_what_no_config_ties_is_written_twice(tied, here, tmp_path):
    found = convert_pickle_command(str(folder(tmp_path / "in", weights(), **tied)), tmp_path / "o")
    check_equal(tmp_path / "o", weights())
    assert found["notes"] == [
        "pytorch_model.bin: 1 tensors share the bytes of others and are written in full, each."
    ]


def test_a_tie_may_stand_in_the_text_config(here, tmp_path):
    nested = {"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}
    convert_pickle_command(str(folder(tmp_path / "in", weights(), **nested)), tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out/model.safetensors")


def test_an_equal_head_with_a_storage_of_its_own_stays(here, tmp_path):
    value = {EMBEDDING: torch.ones(2, 2), HEAD: torch.ones(2, 2)}
    convert_pickle_command(str(folder(tmp_path / "in", value)), tmp_path / "out")
    check_equal(tmp_path / "out", value)


def sharded(root: Path) -> Path:
    root.mkdir()
    names = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    parts = [{f"p{i}.{j}": torch.randn(4, 3 + i) for j in range(3)} for i in range(3)]
    for name, part in zip(names, parts):
        save(part, root / name, new=name != names[1])
    weight_map = {key: name for name, part in zip(names, parts) for key in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (root / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text("{}")
    return root


def test_shards_stay_shards(here, tmp_path):
    source, out = sharded(tmp_path / "in"), tmp_path / "out"
    found = convert_pickle_command(str(source), out)
    wanted = {k: v for p in source.glob("*.bin") for k, v in torch.load(p).items()}
    check_equal(out, wanted)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["p1.2"] == "model-00002-of-00003.safetensors"
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in wanted.values())}
    assert found["tensors"] == 9


def test_the_same_input_gives_the_same_bytes(here, tmp_path):
    source = folder(tmp_path / "in", weights())
    for name in ("a", "b"):
        convert_pickle_command(str(source), tmp_path / name)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert one == two


def test_an_adapter_becomes_an_adapter(here, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/adapter_config.json").write_text("{}")
    value = {"base_model.model.q_proj.lora_A.weight": torch.randn(2, 3)}
    save(value, tmp_path / "in/adapter_model.bin")
    convert_pickle_command(str(tmp_path / "in"), tmp_path / "out")
    check_equal(tmp_path / "out", value)
    names = {"MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "morph.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names


WRAPPED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"optimizer": {"state": {0: [torch.ones(2)]}}, "model": w},
    "twice": lambda w: {"model": {"module": w}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_training_file_gives_its_weights(kind, here, tmp_path):
    value = {"model": torch.randn(2), "b": torch.randn(3)}  # a tensor may have such a name
    found = convert_pickle_command(
        str(save(WRAPPED[kind](value), tmp_path / "x.ckpt")), tmp_path / "out"
    )
    check_equal(tmp_path / "out", value)
    left = {
        "state_dict": ["x.ckpt: epoch: an int"],
        "model": ["x.ckpt: optimizer: a dict with 1 tensors"],
    }
    assert found["left_out"] == left.get(kind)
    assert "config.json" not in {p.name for p in (tmp_path / "out").iterdir()}
    told = verify_command(tmp_path / "out", str(tmp_path / "x.ckpt"))  # the command that is printed
    assert told["tensors_equal_to_pickle"] == 2 and "no model yet" in told["notes"][0]


def test_a_dry_run_unpickles_and_writes_nothing(no_process, tmp_path):
    source = folder(tmp_path / "in", weights())
    found = convert_pickle_command(str(source), tmp_path / "out", dry_run=True)
    size = (source / "pytorch_model.bin").stat().st_size
    assert found["files"] == [f"pytorch_model.bin: zip, {size} bytes"]
    stored = {t.untyped_storage()._cdata: t for t in weights().values() if hasattr(t, "dtype")}
    assert found["bytes"] == sum(t.untyped_storage().nbytes() for t in stored.values())
    assert found["bytes_free"] > 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", range(40))
def test_scattered_tensors_are_put_in_order(case, tmp_path, monkeypatch):
    """Whatever the strides, and however small the blocks and windows are."""
    rng = np.random.default_rng(case)
    monkeypatch.setattr(_pickle_shards, "BLOCK", int(rng.integers(4, 90)))
    monkeypatch.setattr(_pickle_shards, "WINDOW", int(rng.integers(8, 120)))
    data = rng.integers(0, 255, 4000, dtype=np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    shape = tuple(int(n) for n in rng.integers(1, 6, rng.integers(1, 5)))
    stride = tuple(int(n) for n in rng.integers(0, 30, len(shape)))
    start = int(rng.integers(0, 50))
    dtype, width = [("U8", 1), ("BF16", 2), ("F32", 4)][case % 3]
    tensor = _unpickling.Stored(name="t", dtype=dtype, shape=shape, stride=stride, start=start)
    source = _torch_files.TorchFile(
        path=tmp_path / "f",
        fd=os.open(tmp_path / "f", os.O_RDONLY),
        nbytes=4000,
        zip=True,
        storages={},
        identity=(0, 0, 0, 0),
    )
    got = b"".join(bytes(block) for block in _pickle_shards.in_order(source, tensor))
    os.close(source.fd)
    steps = [width * s for s in stride]
    assert got == np.ndarray(shape, f"V{width}", data.tobytes(), start, steps).tobytes()


OLDER = (".format_version", ".storage_alignment", "byteorder", ".data/serialization_id")


@pytest.mark.parametrize("drop", [OLDER, ()], ids=["older", "packed anew"])
def test_an_archive_that_another_version_or_program_wrote(drop, here, tmp_path):
    """Older versions of torch wrote fewer entries; whoever packs anew may change their order."""
    value = {"a": torch.randn(300), "b": torch.randn(5, 5), "c": torch.arange(3)}
    path = save(value, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as file:
        entries = {n: file.read(n) for n in reversed(file.namelist()) if not n.endswith(drop)}
    archive(path, entries)
    if drop:
        convert_pickle_command(str(path), tmp_path / "out")
        check_equal(tmp_path / "out", value)
    else:  # torch works out where the storages lie, and is wrong
        with pytest.raises(CheckpointError, match="Nothing was written"):
            convert_pickle_command(str(path), tmp_path / "out")


# --- what is refused before anything is unpickled -------------------------------------------------


def archive(path: Path, entries: Mapping[str, bytes], **how: Any) -> None:
    with zipfile.ZipFile(path, "w", **how) as file:
        for name, data in entries.items():
            file.writestr(name, data)


def patched(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def claims(data: bytearray) -> None:
    """Let the table claim that every entry has 2 GB."""
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2
        at = data.find(b"PK\x01\x02", at + 4)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "lfs": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "html": (lambda p: p.write_bytes(b"\n<!DOCTYPE html>"), "is a web page"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + b"x" * 99), "is compressed"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "torch.save did not write"),
    "text": (lambda p: p.write_bytes(b"hello"), "is no file of torch.save"),
    "safetensors": (lambda p: p.write_bytes(b"\x02" + bytes(7) + b"{}"), "rename it"),
    "tar": (lambda p: p.write_bytes(b"pickle".ljust(257, b"\0") + b"ustar"), "a tar archive"),
    "truncated": (cut, "is truncated"),
    "other zip": (lambda p: archive(p, {"a/b": b""}), "not one that torch.save wrote"),
    "compressed": (
        lambda p: archive(p, {"a/data.pkl": b"x" * 999}, compression=zipfile.ZIP_DEFLATED),
        "'a/data.pkl' is compressed",
    ),
    "torchscript": (
        lambda p: archive(p, {"a/data.pkl": b"", "a/constants.pkl": b""}),
        "is a TorchScript archive",
    ),
    "code": (
        lambda p: archive(p, {"a/data.pkl": b"", "a/code/x.py": b""}),
        "is a TorchScript archive",
    ),
    "bomb": (lambda p: patched(p, claims), "lies outside of the data"),
    "big": (
        lambda p: archive(p, {"a/data.pkl": b"", "a/byteorder": b"big"}),
        "was written in big byte order",
    ),
    "table": (
        lambda p: patched(p, lambda d: d.__setitem__(slice(-6, -2), b"\xfe\xff\xff\xff")),
        "does not fit into",
    ),
    "fifo": (lambda p: (p.unlink(), os.mkfifo(p)), "is not a regular file"),
    "link": (lambda p: (p.unlink(), p.symlink_to("/etc/hosts")), "leaves its folder"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_refused_unread(kind, no_process, tmp_path):
    source = folder(tmp_path / "in", {"a": torch.ones(2)})
    change, says = ODD[kind]
    change(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says):
        convert_pickle_command(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_claims_beyond_the_file_are_a_bomb(no_process, tmp_path):
    """Entries that lie over each other, each inside the file, claim more than the file has."""
    path = save({"a": torch.ones(500), "b": torch.ones(500)}, tmp_path / "x.pt")

    def overlap(data: bytearray) -> None:
        places = []
        at = data.find(b"PK\x01\x02")
        while at >= 0:
            places.append(at)
            at = data.find(b"PK\x01\x02", at + 4)
        first = next(p for p in places if b"data/0" in data[p : p + 80])
        for place in places:
            data[place + 20 : place + 28] = data[first + 20 : first + 28]
            data[place + 42 : place + 46] = data[first + 42 : first + 46]

    patched(path, overlap)
    with pytest.raises(CheckpointError, match="claim .* bytes in a file of"):
        convert_pickle_command(str(path), tmp_path / "out")


def test_any_damage_is_a_named_error(no_process, tmp_path):
    """Bytes are changed at random, the table of the archive above all."""
    path = save({"a": torch.ones(20), "b": torch.ones(3)}, tmp_path / "x.pt")
    good, rng = path.read_bytes(), np.random.default_rng(0)
    start = good.find(b"PK\x01\x02")
    refused = 0
    for case in range(600):
        data = bytearray(good)
        low = start if case % 3 else 0
        for place in rng.integers(low, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(0, len(data))] if case % 5 == 0 else data)
        try:
            convert_pickle_command(str(path), tmp_path / "out", dry_run=True)
        except CheckpointError:
            refused += 1
    assert refused > 250


def without_index(root: Path) -> None:
    (root / "pytorch_model.bin.index.json").unlink()


def in_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        path = root / "pytorch_model.bin.index.json"
        data = json.loads(path.read_text())
        change(data["weight_map"])
        path.write_text(json.dumps(data))

    return act


SETS: dict[str, tuple[Callable[[Path], object], type[MorphError], str]] = {
    "no index": (without_index, CheckpointError, "3 files that may hold weights"),
    "missing": (
        lambda r: (r / "pytorch_model-00002-of-00003.bin").unlink(),
        CheckpointError,
        "1 of 3 files are missing",
    ),
    "outside": (
        in_index(lambda m: m.update({"p0.0": "../x.bin"})),
        CheckpointError,
        "is no plain file name",
    ),
    "no pickle": (
        in_index(lambda m: m.update({"p0.0": "x.txt"})),
        CheckpointError,
        "which is no pickle",
    ),
    "wrong place": (
        in_index(lambda m: m.update({"p0.0": m["p1.0"]})),
        CheckpointError,
        "puts tensor 'p0.0' into pytorch_model-00002-of-00003.bin, which does not",
    ),
    "not listed": (in_index(lambda m: m.pop("p0.0")), CheckpointError, "'p0.0', which .* not list"),
    "twice": (
        lambda r: save({"p0.0": torch.ones(1)}, r / "pytorch_model-00003-of-00003.bin"),
        CheckpointError,
        "'p0.0' is in two files",
    ),
    "safetensors": (
        lambda r: (r / "model.safetensors").write_bytes(b""),
        UsageError,
        "has safetensors already .*: there is nothing to convert",
    ),
    "nothing": (
        lambda r: [p.unlink() for p in r.glob("*.bin*")],
        CheckpointError,
        "has no pickled weights",
    ),
    "config": (
        lambda r: (r / "config.json").write_text("[]"),
        CheckpointError,
        "must be a JSON object",
    ),
    "side link": (
        lambda r: (r / "notes.txt").symlink_to("/etc/hosts"),
        CheckpointError,
        "leaves its folder",
    ),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_folder_that_does_not_fit_is_refused(kind, here, tmp_path):
    source = sharded(tmp_path / "in")
    change, error, says = SETS[kind]
    change(source)
    with pytest.raises(error, match=says):
        convert_pickle_command(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_training_state_alone_is_no_model(no_process, tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "scheduler.pt"):
        save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="has no pickled weights"):
        convert_pickle_command(str(tmp_path), tmp_path.parent / "out")


def test_where_an_output_may_be(no_process, tmp_path):
    source = folder(tmp_path / "in", {"a": torch.ones(2)})
    (tmp_path / "out").mkdir()
    for out, error in (
        (source, OutputExists),
        (source / "x", OutputExists),
        (tmp_path / "a/b", UsageError),
    ):
        with pytest.raises(error):
            convert_pickle_command(str(source), out)
    with pytest.raises(OutputExists, match="--force"):
        convert_pickle_command(str(source), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no local folder or file.*hf download"):
        convert_pickle_command("org/model", tmp_path / "o")
    with pytest.raises(UsageError, match=r"end with \.bin"):
        convert_pickle_command(str(source / "config.json"), tmp_path / "o")


# --- what is refused by what the pickle holds -----------------------------------------------------


class Payload:
    """What makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


class Calls:
    """What calls a function when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


HELD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda p: {"a": Payload(p)}, r"asks for posix\.system.*Nothing of it was run"),
    "class": (lambda p: {"a": Calls(zipfile.ZipFile, "x")}, r"asks for zipfile\.ZipFile"),
    "escapes": (lambda p: {"a\x1b[31m": torch.ones(2)}, r"'a\\x1b\[31m': the name"),
    "sparse": (lambda p: {"a": torch.eye(3).to_sparse()}, "'a' is sparse"),
    "quantised": (lambda p: {"a": quantised()}, "quantised by torch"),
    "meta": (lambda p: {"a": torch.ones(3, device="meta")}, "a meta tensor"),
    "flag": (lambda p: {"a": torch.ones(3, dtype=torch.complex64).conj()}, "only by a flag"),
    "wide": (lambda p: {"a": torch.ones(3, dtype=torch.complex128)}, "complex128, which safe"),
    "expanded": (lambda p: {"a": torch.ones(1).expand(2**23)}, "an expanded tensor"),
    "nested": (lambda p: {"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "is no flat state dict"),
    "number": (lambda p: {3: torch.ones(1)}, "entry '3' is no tensor with a name"),
    "list": (lambda p: [torch.ones(1)], "holds a list, no tensors by name"),
    "tensor": (lambda p: torch.ones(1), "holds a Tensor, no tensors by name"),
    "none": (lambda p: {"a": 1}, "hold no tensors"),
    "two": (
        lambda p: {"model": {"a": torch.ones(1)}, "module": {"a": torch.ones(1)}},
        "is no flat state dict",
    ),
    "many": (
        lambda p: {f"a{i}": v for v in [torch.ones(2**12)] for i in range(200)},
        "not plausible",
    ),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", HELD)
def test_what_is_no_weights_is_refused(kind, new, here, tmp_path):
    make, says = HELD[kind]
    path = save(make(tmp_path / "canary"), tmp_path / "x.bin", new)
    with pytest.raises(CheckpointError, match=says):
        convert_pickle_command(str(path), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_names_of_globals_are_escaped(here, tmp_path):
    path = save({"a": torch.ones(2)}, tmp_path / "x.bin", new=False)
    evil = b"\x80\x02c__main__\n\x1b[31mred\n."
    path.write_bytes(path.read_bytes()[:20] + evil)
    with pytest.raises(CheckpointError) as caught:
        convert_pickle_command(str(path), tmp_path / "out")
    assert "\x1b" not in str(caught.value)


def test_a_pickle_that_runs_code_is_refused_by_the_closed_process(tmp_path):
    source = folder(tmp_path / "in", {"a": torch.ones(1), "b": Payload(tmp_path / "canary")})
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: its pickle asks for posix\.sys"):
        convert_pickle_command(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_pickle_that_wants_memory_is_stopped(tmp_path):
    """bytearray(2**36) is a call that weights_only allows."""
    path = save({"a": torch.ones(1), "b": Calls(bytearray, 2**36)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="needs more memory than its size explains"):
        convert_pickle_command(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- a process that lies --------------------------------------------------------------------------

GOOD = {"name": "a", "dtype": "torch.float32", "shape": [2], "stride": [1], "offset": 0, "held": 8}
LIES: dict[str, tuple[str, str]] = {
    "nothing": ("", r"ended its process \(exit code 0\)"),
    "exit": ("sys.exit(3)", r"ended its process \(exit code 3\)"),
    "killed": ("os.kill(os.getpid(), 9)", r"\(SIGKILL\). Was the machine out of memory"),
    "no json": ("print('hello')", "said what it never should"),
    "list": ("print('[1]')", "said what it never should"),
    "nested": ("print('[' * 90000)", "said what it never should"),
    "long": ("print('x' * 3 * 2**20)", "ended its process"),
    "slow": ("time.sleep(60)", "said nothing for 2 s"),
    "file": ("say(file=7)", "said what it never should"),
    "unknown": ("say(hello=1)", "said what it never should"),
    "kind": ("say(**good, place=[1])", "said what it never should"),
    "place": ("say(**good, place=17)", "reaches beyond the data"),
    "before": ("say(**good, place=-8)", "said what it never should"),
    "nowhere": ("say(**good, place=None)", "where its data lie is not known"),
    "huge": ("say(**good | {'shape': [2**40]}, place=place)", "reaches beyond the data"),
    "steps": ("say(**good | {'stride': [2**30]}, place=place)", "reaches beyond the data"),
    "offset": ("say(**good | {'offset': 7}, place=place)", "reaches beyond the data"),
    "held": ("say(**good | {'held': 2**30, 'shape': [2**20]}, place=place)", "reaches beyond"),
    "negative": ("say(**good | {'shape': [-2]}, place=place)", "said what it never should"),
    "ranks": ("say(**good | {'stride': [1, 1]}, place=place)", "said what it never should"),
    "dtype": ("say(**good | {'dtype': 'torch.evil\\x1b'}, place=place)", r"is evil\\x1b, which"),
    "name": ("say(**good | {'name': '../a\\n'}, place=place)", r"'../a\\n': the name"),
    "meta": ("say(**good | {'name': '__metadata__'}, place=place)", "the name is"),
    "twice": ("say(**good, place=place); say(**good, place=place)", "said what it never should"),
    "error": ("say(error='global', text='\\x1b' * 9999)", r"asks for \\x1b"),
}


def fake(path: Path, body: str) -> Path:
    """A script that answers in place of the real one; it knows the place of the one storage."""
    path.write_text(
        "import json, os, sys, time\n"
        "def say(**line): print(json.dumps(line), flush=True)\n"
        f"good = {GOOD!r}\n"
        "job = json.loads(sys.stdin.readline())\n"
        "place = os.pread(job['files'][0]['fd'], 9999, 0).find(b'\\0\\0\\x80?\\0\\0\\x80?')\n"
        "say(ready=[])\n" + body + "\n"
    )
    return path


@pytest.mark.parametrize("kind", LIES)
def test_a_process_that_lies_is_not_believed(kind, tmp_path, monkeypatch):
    source = folder(tmp_path / "in", {"a": torch.ones(2)})
    script, says = LIES[kind]
    monkeypatch.setattr(_unpickling, "SCRIPT", fake(tmp_path / "fake.py", script))
    if kind == "slow":
        monkeypatch.setattr(_unpickling, "CPU_SECONDS", 2)
    with pytest.raises(CheckpointError, match=says):
        convert_pickle_command(str(source), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "fake.py"}


HASHED = {
    "another hash": ("'0' * 64", "a", VerificationFailed, "torch loads 0000"),
    "another name": ("'0'", "b", CheckpointError, "said what it never should"),
    "an escape": ("'\\x1b'", "a", VerificationFailed, r"torch loads \\x1b from"),
}


@pytest.mark.parametrize("kind", [*HASHED, "too few"])
def test_what_was_written_is_compared(kind, tmp_path, monkeypatch):
    source = folder(tmp_path / "in", {"a": torch.ones(2)})
    told, name, error, says = HASHED.get(kind, ("", "", CheckpointError, "what it never should"))
    line = f"say(name={name!r}, dtype='torch.float32', shape=[2], sha256={told})" if told else "0"
    body = f"{line} if job['what'] == 'hashes' else say(**good, place=place)\nsay(done=1)"
    monkeypatch.setattr(_unpickling, "SCRIPT", fake(tmp_path / "fake.py", body))
    with pytest.raises(error, match=says):
        convert_pickle_command(str(source), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "fake.py"}


def test_a_wrong_byte_in_the_output_is_found(here, tmp_path, monkeypatch):
    source, real = folder(tmp_path / "in", weights()), _pickle_shards.write_shard

    def bend(stage: Any, shard: Any, meter: Any) -> None:
        last = len(shard.header) - 1  # the data move by one byte: blanks are no part of JSON
        real(stage, shard, meter)
        with open(stage.path / shard.name, "r+b") as file:
            file.seek(last + 7)
            byte = file.read(1)
            file.seek(last + 7)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr("morph.pipeline._pickles.write_shard", bend)
    with pytest.raises(VerificationFailed, match="was written with sha256"):
        convert_pickle_command(str(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# --- what goes wrong meanwhile --------------------------------------------------------------------


def test_a_file_that_changes_meanwhile_stops_it(here, tmp_path):
    source = folder(tmp_path / "in", weights())

    def say(message: str) -> None:
        if message.startswith("comparing"):
            os.utime(source / "pytorch_model.bin", (1, 1))

    with pytest.raises(CheckpointError, match="was changed meanwhile"):
        convert_pickle_command(str(source), tmp_path / "out", say=say)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_stopped_conversion_goes_on(here, tmp_path):
    source = sharded(tmp_path / "in")
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        time.sleep(0.05)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on"):
        convert_pickle_command(str(source), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    found = convert_pickle_command(str(source), tmp_path / "out")
    assert "model-00001-of-00003.safetensors" in found["resumed"]
    convert_pickle_command(str(source), tmp_path / "again")
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "again")
    )
    assert one == two
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")} == {
        "in",
        "out",
        "again",
    }


def test_a_full_disk_is_told_before(here, tmp_path, monkeypatch):
    source = folder(tmp_path / "in", weights())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(StorageError, match="100 bytes free"):
        convert_pickle_command(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_parent_stays_small_and_loads_no_torch(tmp_path):
    """192 MiB, of which 64 lie scattered, with a peak under 128 MiB."""
    tensors = {f"a{i}": torch.zeros(2**24) for i in range(2)}
    tensors["t"] = torch.arange(2**24, dtype=torch.int32).reshape(4096, 4096).t()
    save(tensors, tmp_path / "x.pt")
    code = (
        "import sys\n"
        "from morph.pipeline._pickles import convert_pickle_command\n"
        f"convert_pickle_command({str(tmp_path / 'x.pt')!r}, {str(tmp_path / 'out')!r})\n"
        "peak = [s for s in open('/proc/self/status') if s.startswith('VmHWM')][0].split()[1]\n"
        "print(peak, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    peak, torch_loaded = done.stdout.split()
    assert int(peak) < 128 * 1024 and torch_loaded == "False"
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["t"], tensors["t"])


# --- the closed process ---------------------------------------------------------------------------

TRIES = """
import importlib.util, mmap, os, signal, socket, subprocess, sys, threading
spec = importlib.util.spec_from_file_location("_sandbox", sys.argv[1])
sandbox = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
path = f"/proc/self/fd/{os.open(sys.argv[2], os.O_RDONLY)}"
hook, opening = sys.argv[3] == "hook", sys.argv[4] == "opening"
if not hook: sys.addaudithook = lambda hook: None
sandbox.close(megabytes=64, seconds=5, readable=[path] if opening else [])
tries = {
    "socket": socket.socket,
    "pair": socket.socketpair,
    "write": lambda: open(sys.argv[2] + ".new", "w"),
    "other": lambda: open("/etc/passwd"),
    "list": lambda: os.listdir("/"),
    "again": lambda: open(path, "r+b"),
    "unlink": lambda: os.unlink(sys.argv[2]),
    "rename": lambda: os.rename(sys.argv[2], sys.argv[2] + ".new"),
    "run": lambda: subprocess.run(["true"]),
    "fork": os.fork,
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "thread": lambda: threading.Thread(target=int).start(),
    "code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "memory": lambda: bytes(2 ** 28),
}
for name, one in tries.items():
    try: one()
    except (OSError, MemoryError, RuntimeError): pass
    else: print(name)
try: print("read", open(path, "rb").read())
except OSError: print("not read")
print(len(bytes(2 ** 20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel offers less")
@pytest.mark.parametrize("opening", ["opening", "closed"])
@pytest.mark.parametrize("hook", ["hook", "kernel"])
def test_what_a_closed_process_can_do(hook, opening, tmp_path):
    """Nothing but compute, and read again what it is given; with the hook gone just the same."""
    (tmp_path / "file").write_bytes(b"x")
    script = [sys.executable, "-c", TRIES, _sandbox.__file__, str(tmp_path / "file"), hook, opening]
    done = subprocess.run(script, capture_output=True, text=True)
    told = "read b'x'" if opening == "opening" else "not read"
    assert done.stdout.splitlines() == [told, str(2**20)], done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_closed_process_has_little_time(tmp_path):
    path = tmp_path / "spin.py"
    path.write_text(
        f"import runpy\nclose = runpy.run_path({_sandbox.__file__!r})['close']\n"
        "close(megabytes=9, seconds=1)\nwhile True: pass\n"
    )
    process = _sandbox.start(path)
    assert process.stdout.read() == b""
    assert _sandbox.ending(process, 1) == "took more than 1 s of CPU time and was stopped"
    process.communicate()


def test_no_token_reaches_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = tmp_path / "env.py"
    path.write_text("import os; print(sorted(os.environ), os.getcwd())")
    process = _sandbox.start(path)
    told, _ = process.communicate()
    assert b"HF_TOKEN" not in told and told.rstrip().endswith(b" /")
