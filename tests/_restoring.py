"""Pairs of tiny checkpoints for the tests of `morph restore`, and what must come out of them.

Test files load it with `runpy`: in pytest's importlib mode a test folder is no package.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import runpy
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from morph import cli, layouts, restore

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_tiny_layouts.py"))))
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1}


class Tensor(NamedTuple):
    """A tensor as stored: dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def rows(self, start: int, stop: int) -> bytes:
        """The bytes of some rows."""
        size = len(self.data) // self.shape[0]
        return self.data[start * size : stop * size]

    @property
    def numbers(self) -> np.ndarray:
        """The values as float64."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return bits.view("<f4").astype(np.float64).reshape(self.shape)
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[self.dtype]
        return np.frombuffer(self.data, kind).astype(np.float64).reshape(self.shape)


def header(raw: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its data begin."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        entries, base = header(raw)
        for name, info in entries.items():
            if name != "__metadata__":
                a, b = (base + at for at in info["data_offsets"])
                found[name] = Tensor(info["dtype"], tuple(info["shape"]), raw[a:b])
    return found


def save(folder: Path, config: Mapping[str, Any] | None, *shards: Mapping[str, Tensor]) -> Path:
    """Write tensors, one file for each mapping, with an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, tensors in zip(names, shards):
        write_file(folder / file, tensors)
    if len(shards) > 1:
        places = {name: file for file, tensors in zip(names, shards) for name in tensors}
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, its tensors in the order given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        place = [at, at + len(tensor.data)]
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        at = place[1]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tuned(tensors: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Return tensors in which every number moved a little, as by a fine-tuning."""
    found, rng = {}, np.random.default_rng(seed)
    for name, tensor in tensors.items():
        width = WIDTH[tensor.dtype]
        bits = np.frombuffer(tensor.data, f"<u{width}")
        spread = {1: 2, 2: 8, 4: 1 << 17, 8: 1 << 46}[width]
        moved = bits ^ rng.integers(1, spread, bits.shape).astype(bits.dtype)
        found[name] = tensor._replace(data=moved.astype(bits.dtype).tobytes())
    return found


def pair(
    root: Path, model_type: str = "qwen3_next", shards: int = 2, dtype: str = "BF16"
) -> tuple[Path, Path]:
    """Write PRE and POST of an architecture, POST with side files, and return their folders."""
    pre = tiny.write(root / "pre", model_type, 0, shards, dtype)
    post = copy_tuned(pre, root / "post")
    (post / "tokenizer.json").write_text("{}\n")
    (post / "README.md").write_text("---\nlicense: mit\n---\n# Tuned\n")
    return pre, post


def copy_tuned(pre: Path, out: Path, seed: int = 1) -> Path:
    """Write a fine-tuned copy of a folder: the same files, other numbers."""
    out.mkdir()
    for file in sorted(pre.iterdir()):
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
            continue
        raw = file.read_bytes()
        _, base = header(raw)
        entries = tuned({n: t for n, t in read_one(file).items()}, seed)
        (out / file.name).write_bytes(raw[:base] + b"".join(t.data for t in entries.values()))
    return out


def read_one(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, in the order of their data."""
    raw = file.read_bytes()
    entries, base = header(raw)
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    found = {}
    for name, info in ordered:
        a, b = (base + at for at in info["data_offsets"])
        found[name] = Tensor(info["dtype"], tuple(info["shape"]), raw[a:b])
    return found


def expected(
    pre: Path,
    post: Path,
    kinds: Iterable[str] = ("full",),
    roles: Iterable[str] = ("q", "k"),
    layers: Iterable[int] | None = None,
    bias: bool = True,
) -> dict[str, bytes]:
    """Return the bytes of each tensor of OUT: POST's, with the named rows of PRE in them."""
    a, b = read(pre), read(post)
    config = json.loads((post / "config.json").read_text())
    reading = layouts.read(config, {name: tensor.shape for name, tensor in b.items()})
    found = {name: bytearray(tensor.data) for name, tensor in b.items()}
    for row in reading.rows:
        chosen = row.role in roles and row.kind in kinds and (bias or not row.bias)
        if not chosen or (layers is not None and row.layer not in layers):
            continue
        tensor = a[row.tensor]
        size = len(tensor.data) // tensor.shape[0]
        for start, stop in row.ranges or ((0, tensor.shape[0]),):
            found[row.tensor][start * size : stop * size] = tensor.rows(start, stop)
    return {name: bytes(data) for name, data in found.items()}


def data(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a folder."""
    return {name: tensor.data for name, tensor in read(folder).items()}


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder, those behind links included."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def restored(pre: Path, post: Path, out: Path, /, **options: Any) -> Path:
    """Restore through the Python API, without waiting for the disk, and return OUT."""
    plan = restore.plan(pre, post, restore.Options(**options))
    restore.write(plan, out, durable=False)
    return out


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def morph(*arguments: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as done:
            return Result(int(done.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main returned")
