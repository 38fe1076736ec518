"""A good place of two checkpoints, and a command run in it as a user would, but in this process.

For test_corpus.py and test_corpus_disk.py, which take it with `runpy.run_path`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from morph import cli, plan, terminal
from morph.errors import MorphError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, MANIFEST = "model.safetensors.index.json", "MANIFEST.json"
Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
Shapes = dict[str, tuple[int, ...]]
Header = dict[str, Any]
Act = Callable[[Path], object]


def shapes_of(hidden: int = 8, vocab: int = 6, norms: bool = False) -> Shapes:
    """The tensors of CONFIG, or of one that is wider, has more words, or norms of q and k."""
    wide = {"q_proj": hidden, "o_proj": hidden, "k_proj": hidden // 2, "v_proj": hidden // 2}
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(2):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.self_attn.{n}.weight": (rows, hidden) for n, rows in wide.items()}
        if norms:
            found |= {f"{layer}.self_attn.{n}_norm.weight": (hidden // 4,) for n in "qk"}
        found |= {f"{layer}.mlp.{n}_proj.weight": (16, hidden) for n in ("gate", "up")}
        found |= {f"{layer}.mlp.down_proj.weight": (hidden, 16)}
        found |= {f"{layer}.input_layernorm.weight": (hidden,)}
        found |= {f"{layer}.post_attention_layernorm.weight": (hidden,)}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


SHAPES = shapes_of()
FIRST = 10  # tensors in the first of two shards


# --- A good place -------------------------------------------------------------------------------


def pack(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of this header and data, however wrong they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def values(name: str, shape: tuple[int, ...], tuned: bool, code: str, seed: int = 0) -> bytes:
    """The numbers of a tensor; fine-tuning moves each of them a little."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") + seed
    rng = np.random.default_rng(draw)
    found = rng.standard_normal(shape)
    found = (found + tuned * 0.1 * rng.standard_normal(shape)).astype("<f4")
    if code == "BF16":
        return (found.view("<u4") >> 16).astype("<u2").tobytes()
    return found.astype({"F32": "<f4", "F16": "<f2"}[code]).tobytes()


def layout(
    names: Iterable[str] = list(SHAPES)[:FIRST],
    tuned: bool = False,
    shapes: Shapes = SHAPES,
    code: str = "F32",
    seed: int = 0,
) -> tuple[Header, bytes]:
    """A right header and right data for some tensors; those of the first shard by default."""
    found: Header = {}
    at, data = 0, b""
    for name in names:
        data += values(name, shapes[name], tuned, code, seed)
        found[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [at, len(data)]}
        at = len(data)
    return found, data


def good(
    folder: Path,
    tuned: bool = False,
    shapes: Shapes = SHAPES,
    code: str = "F32",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A folder of two shards that nothing is wrong with; `changes` are of its config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "tokenizer.json").write_text("{}")
    names, size = list(shapes), 0
    parts = {ONE: names[:FIRST], TWO: names[FIRST:]}
    for file, part in parts.items():
        head, data = layout(part, tuned, shapes, code, seed)
        (folder / file).write_bytes(pack(head, data))
        size += len(data)
    weight_map = {n: file for file, part in parts.items() for n in part}
    told = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(told))
    return folder


def with_manifest(folder: Path) -> None:
    """Write the manifest that fits what is there."""
    entries = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.stat().st_size < 1 << 26
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "morph": "0", "files": entries}))


def plan_text() -> str:
    """A plan for the good model: its second layer slides."""
    geometry = plan.Geometry(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        v_head_dim=2,
        hidden_size=8,
        windows=(None, None),
    )
    return plan.dumps(plan.uniform_plan("llama", geometry, [0], "sliding", {"window": 4}, None))


# --- Running a command --------------------------------------------------------------------------


class Said(NamedTuple):
    """What came of a command: exit code, both outputs, the error that was raised."""

    code: int
    out: str
    err: str
    error: MorphError | None


PARSER = functools.cache(cli.parser)  # to build it takes longer than most commands


def morph(*arguments: object) -> Said:
    """Run a command in this process; it may take 20 seconds and 100 MiB of memory."""
    out, err = io.StringIO(), io.StringIO()
    raised: list[MorphError] = []
    fail = terminal.fail

    def noting(error: MorphError) -> int:
        raised.append(error)
        return fail(error)

    code = None
    with pytest.MonkeyPatch.context() as patch, in_time(), in_memory():
        patch.setattr(terminal, "fail", noting)
        patch.setattr(cli, "parser", PARSER)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([str(a) for a in arguments])
            except SystemExit as done:
                code = int(done.code or 0)
    assert code is not None
    return Said(code, out.getvalue(), err.getvalue(), raised[0] if raised else None)


@contextlib.contextmanager
def in_time(seconds: float = 20) -> Iterator[None]:
    """Fail a test that hangs, for example on a pipe."""

    def ring(number: int, frame: object) -> None:
        pytest.fail(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def in_memory(mebibytes: int = 100) -> Iterator[None]:
    """Fail a test that takes too much memory, where the system can tell."""

    def resident(field: str) -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.partition(f"{field}:")[2].split()[0]) >> 10

    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        yield
        return
    peak.write_text("5", encoding="ascii")
    before = resident("VmRSS")
    yield
    grown = resident("VmHWM") - before
    assert grown < mebibytes, f"{grown} MiB more than before"


def state(root: Path) -> dict[str, str]:
    """Everything below `root`: links with their target, files with their hash, without opening
    what is none."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif not path.is_file():
            found[name] = f"mode {path.lstat().st_mode:o}"
        elif path.stat().st_size < 1 << 20:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:  # its time tells
            found[name] = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    return found


def refused(root: Path, error: type[MorphError], message: str, *arguments: object) -> str:
    """Assert that a command fails as it should and touches nothing; return its error line."""
    before = state(root)
    found = morph(*arguments)
    call = f"morph {' '.join(map(str, arguments))}"
    assert found.error is not None, f"{call}: exit {found.code}, {found.err}{found.out}"
    assert type(found.error) is error, f"{call}: {found.error!r}"
    assert found.code == error.exit_code
    line = found.err.splitlines()[-1]
    assert line.startswith("error: ") and found.err.count("error: ") == 1, found.err
    assert re.search(message, line), f"{call}: {line}"
    assert line.isprintable() and len(line) < 2000, line
    assert "Traceback" not in found.err and found.out == ""
    assert state(root) == before, call
    return line


def restore(root: Path, *more: object) -> list[object]:
    """The command that restores the two checkpoints of a place."""
    return ["restore", root / "pre", root / "post", root / "out", *more]


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "inspect": lambda bad: ["inspect", bad],
    "verify": lambda bad: ["verify", bad],
    "convert": lambda bad: ["convert", bad, "out", "--plan", "plan.json"],
    "restore-pre": lambda bad: ["restore", bad, "post", "out"],
    "restore-post": lambda bad: ["restore", "pre", bad, "out"],
    "diff-a": lambda bad: ["diff", bad, "post"],
    "diff-b": lambda bad: ["diff", "pre", bad],
}
EVERY = tuple(COMMANDS)
OPENING = tuple(c for c in EVERY if c != "verify")  # of what a manifest cannot list
WHOLE = ("inspect", "convert", "restore-pre", "restore-post")  # that need every shard
STRICT = ("convert", "restore-pre", "restore-post")  # that compare config and tensors
