"""Tiny checkpoint folders, what is in a folder, and faults at the n-th call that changes a disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
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


def tiny_tensors(seed: int = 7) -> Tensors:
    """A two-layer decoder in bfloat16 whose last norm is float32 (mixed types are common)."""
    rng = np.random.default_rng(seed)
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


def sparse(folder: Path, name: str, size: int) -> Path:
    """Write a checkpoint whose U8 tensor `name` is a hole of `size` bytes: it takes no space."""
    save(folder, tiny_tensors())
    header, at = {}, 0
    for key, (dtype, shape, _) in (tiny_tensors() | {name: ("U8", (size,), b"")}).items():
        nbytes = int(np.prod(shape)) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file under a folder."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def beside(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden ones included."""
    return sorted(os.listdir(folder))


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script on this package in a fresh process."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=clean(**environment))


def clean(**environment: str) -> dict[str, str]:
    """Return an environment in which a script finds this package and these helpers."""
    path = os.pathsep.join((str(REPO), str(REPO / "tests")))
    return dict(os.environ) | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"} | environment


def raising(error: BaseException) -> Callable[..., None]:
    """Return a function that raises `error`, whatever it is given."""

    def act(*args: Any, **kwargs: Any) -> None:
        raise error

    return act


# --- patches --------------------------------------------------------------------------------------


def many(root: Path, shards: int = 16) -> tuple[Path, Path]:
    """Write two checkpoints, `pre` and `post`, of many small shards, and return their folders."""
    made = []
    for seed, name in enumerate(("pre", "post")):
        rng = np.random.default_rng(seed)
        tensors = {
            f"model.layers.{i}.{part}.weight": ("U8", (40 + i,), rng.bytes(40 + i))
            for part in ("q", "k", "v", "o")
            for i in range(shards)
        }
        made.append(save(root / name, tensors, shards))
        (made[-1] / "chat_template.jinja").write_text(name)
    return made[0], made[1]


def splices_of(pre: Any, post: Any) -> list[Any]:
    """In every shard: one tensor of `pre`, half of one that is computed, one of zeros."""
    from morph.checkpoint import Splice

    found = []
    for shard in post.shards:
        mine = {n.split(".")[3]: (n, i) for n, i in post.tensors.items() if i.file.name == shard}
        (q, at), (_, k), (_, v) = mine["q"], mine["k"], mine["v"]
        computed = bytes(range(k.nbytes // 2))
        found += [
            Splice(shard, at.start, at.stop, pre.tensors[q]),
            Splice(shard, k.start, k.start + len(computed), lambda data=computed: data),
            Splice(shard, v.start, v.stop, None),
        ]
    return found


class Pair:
    """A checkpoint of three shards, and another of two that ranges are taken from."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        save(root / "post", tiny_tensors(1), 3)
        save(root / "pre", tiny_tensors(2), 2)
        self.open()

    def open(self) -> None:
        """Open both as they are now."""
        from morph.checkpoint import Checkpoint

        self.post, self.pre = (Checkpoint.open(self.root / n) for n in ("post", "pre"))

    def swap(self, *names: str) -> list[Any]:
        """Whole tensors of `pre` in the place of those of `post`, in order."""
        from morph.checkpoint import Splice

        places = [(self.post.tensors[n], self.pre.tensors[n]) for n in names]
        found = [Splice(at.file.name, at.start, at.stop, place) for at, place in places]
        return sorted(found, key=lambda s: (s.shard, s.start))

    def put(self, splices: Sequence[Any] = (), **options: Any) -> Any:
        """Patch `post`, without waiting for the disk."""
        from morph.checkpoint import patch_folder

        given = {"source": self.post, "splices": splices, "durable": False}
        return patch_folder(options.pop("out", self.out), **given | options)


def attention(pair: Pair) -> list[str]:
    """Names of the tensors that decide where a model looks."""
    return [n for n in pair.post.tensors if "q_proj" in n or "k_proj" in n]


# --- faults ---------------------------------------------------------------------------------------

CALLS = (
    *("mkdir", "rmdir", "open", "write", "pwrite", "copy_file_range", "ftruncate", "fsync"),
    *("rename", "link", "unlink"),
)


class Fault:
    """Calls `act` in place of the n-th call that changes the disk; fsync does nothing else."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.number, self.act, self.count = number, act, 0
        self.calls: list[tuple[str, Any]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch `os` and the two calls that Python has no name for."""
        from morph.checkpoint import _newfile, _staging

        places = [(os, name) for name in CALLS]
        places += [(_newfile, "reserve"), (_newfile, "clone"), (_staging, "exchange")]
        old = [(owner, name, getattr(owner, name)) for owner, name in places]
        try:
            for owner, name, real in old:
                setattr(owner, name, self.wrap(name, real))
            yield
        finally:
            for owner, name, real in old:
                setattr(owner, name, real)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            self.count += 1
            self.calls.append((name, args[0]))
            if self.count == self.number:
                self.act()
            # a process that dies leaves the page cache as it is
            return None if name == "fsync" else real(*args, **kwargs)

        return call
