"""Every broken or hostile input is refused: one clear line, its exit code, nothing written or lost.

One table of cases. Each says what is done to a good place, which error that is and what its message
names; every command that can meet it runs on it, and all files are as they were afterwards.
"""

from __future__ import annotations

import json
import os
import re
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from morph.checkpoint import Checkpoint, kept_equal
from morph.errors import (
    CheckpointError,
    MismatchError,
    MorphError,
    PlanError,
    RecipeError,
    UnknownName,
    UnsupportedModel,
    UsageError,
    VerificationFailed,
    escape,
)

c = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_corpus.py"))))
ONE, TWO, INDEX, Q, CONFIG, SHAPES = c.ONE, c.TWO, c.INDEX, c.Q, c.CONFIG, c.SHAPES
FIRST, MANIFEST = c.FIRST, c.MANIFEST
COMMANDS, EVERY, OPENING, WHOLE, STRICT = c.COMMANDS, c.EVERY, c.OPENING, c.WHOLE, c.STRICT
good, layout, pack, shapes_of = c.good, c.layout, c.pack, c.shapes_of
morph, refused, state = c.morph, c.refused, c.state
Act = Callable[[Path], object]
Header = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Import what the commands import, so that it counts for no case."""
    import huggingface_hub  # noqa: F401

    from morph import pipeline, restore, surgery  # noqa: F401
    from morph.pipeline import _diff, _restore, _source, _verify_files  # noqa: F401


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, the same fine-tuned, a plan; it is also the working folder."""
    root = tmp_path / "place"
    root.mkdir()
    good(root / "pre")
    good(root / "post", tuned=True)
    (root / "plan.json").write_text(c.plan_text())
    monkeypatch.chdir(root)
    return root


# --- Ways to break a folder ---------------------------------------------------------------------


def header(change: Callable[[Header], object]) -> Act:
    """Change the header of the first shard, and leave its data."""

    def act(folder: Path) -> None:
        found, data = layout()
        change(found)
        (folder / ONE).write_bytes(pack(found, data))

    return act


def tensor(**changes: Any) -> Act:
    """Change one tensor's entry in the first shard."""
    return header(lambda found: found[Q].update(changes))


def renamed(name: str) -> Act:
    return header(lambda found: found.update({name: found.pop(Q)}))


def shard(data: bytes, name: str = ONE) -> Act:
    return lambda folder: (folder / name).write_bytes(data)


def with_data(change: Callable[[bytes], bytes]) -> Act:
    return lambda folder: (folder / ONE).write_bytes(change((folder / ONE).read_bytes()))


def with_number(bits: bytes, tensor: str = Q) -> Act:
    """Change the first number of a tensor in the first shard."""

    def act(folder: Path) -> None:
        found, data = layout()
        at = found[tensor]["data_offsets"][0]
        (folder / ONE).write_bytes(pack(found, data[:at] + bits + data[at + len(bits) :]))

    return act


def index(change: Callable[[dict[str, Any]], object]) -> Act:
    def act(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        change(data)
        (folder / INDEX).write_text(json.dumps(data))

    return act


def points_to(name: str) -> Act:
    """Let the index send one tensor to another file name."""
    return index(lambda data: data["weight_map"].update({Q: name}))


def text(name: str, content: str | bytes) -> Act:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def hollow(name: str, size: int, start: bytes = b"{") -> Act:
    """A file of this size that is mostly a hole."""

    def act(folder: Path) -> None:
        (folder / name).write_bytes(start)
        os.truncate(folder / name, size)

    return act


def config(**changes: Any) -> Act:
    return text("config.json", json.dumps(CONFIG | changes))


def without(*keys: str) -> Act:
    return text("config.json", json.dumps({k: v for k, v in CONFIG.items() if k not in keys}))


def link(name: str, target: str) -> Act:
    """Replace a file by a link; `outside` beside the folder holds the real content."""

    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(target)

    return act


def fifo(name: str) -> Act:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return act


def a_folder(name: str) -> Act:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return act


def remove(*names: str) -> Act:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def only(**files: str) -> Act:
    """Leave nothing but these files; `__` in a key stands for a dot."""

    def act(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return act


def add_tensor(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Act:
    """Add one tensor, listed properly everywhere."""

    def act(folder: Path) -> None:
        found, before = layout()
        offsets = [len(before), len(before) + len(data)]
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        (folder / ONE).write_bytes(pack(found, before + data))
        index(lambda d: d["weight_map"].update({name: ONE}))(folder)

    return act


def doubled(*offsets: int) -> Act:
    """List one tensor twice, the second time at these offsets."""

    def act(folder: Path) -> None:
        found, data = layout()
        again = found[Q] | ({"data_offsets": offsets} if offsets else {})
        raw = json.dumps(found)[:-1] + ", " + json.dumps({Q: again})[1:]
        (folder / ONE).write_bytes(pack(raw.encode(), data))

    return act


def in_two_shards(folder: Path) -> None:
    (folder / TWO).write_bytes(pack(*layout([*list(SHAPES)[FIRST:], Q])))


def overlap(found: Header) -> None:
    names = list(found)
    size = found[names[1]]["data_offsets"][1] - found[names[1]]["data_offsets"][0]
    found[names[1]]["data_offsets"] = [0, size]


def hole(found: Header) -> None:
    last = list(found)[-1]
    first, end = found[last]["data_offsets"]
    found[last]["data_offsets"] = [first + 4, end + 4]


def many_tensors(count: int) -> Act:
    def act(folder: Path) -> None:
        entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        raw = b",".join(b'"t%d":' % i + entry for i in range(count))
        (folder / ONE).write_bytes(pack(b"{" + raw + b"}", b""))

    return act


def many_lists(name: str, before: bytes, mebibytes: int) -> Act:
    """A file of empty lists, which take twenty times its size when they are read."""

    def act(folder: Path) -> None:
        raw = before + b"[" + b"[]," * ((mebibytes << 20) // 3) + b"1]}"
        (folder / name).write_bytes(pack(raw, b"") if name == ONE else raw)

    return act


def manifest(files: Any) -> Act:
    return text(MANIFEST, json.dumps({"format": 1, "files": files}))


def padded(spaces: int) -> Act:
    """Let the data of the first shard start at an odd byte."""
    return lambda folder: (folder / ONE).write_bytes(
        pack(json.dumps(layout()[0]).encode() + b" " * spaces, layout()[1])
    )


def both(folder: Path) -> None:
    """Put one file with all tensors beside the shards and their index."""
    (folder / "model.safetensors").write_bytes(pack(*layout(SHAPES)))


HOSTILE: dict[str, Any] = {
    "auto_map": {"AutoModel": "x.y"},
    "model_file": "x.py",
    "deep": [{"attn_implementation": "org/repo", "trust_remote_code": True}],
    "_attn_implementation_internal": "org/repo",
    "custom_pipelines": {},
}


# --- The corpus ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is done, the error that it is, what the message names, and which commands meet it.

    `other` has the commands that say it otherwise.
    """

    act: Act
    error: type[MorphError]
    message: str
    commands: tuple[str, ...] = EVERY
    other: Mapping[str, tuple[type[MorphError], str]] = {}


ENTRY = {"bytes": 1, "sha256": "0" * 64}
VERIFY = ("verify",)
E, U, M = CheckpointError, UnsupportedModel, MismatchError
CASES: dict[str, Case] = {
    # the file as a whole
    "shard-empty": Case(shard(b""), E, f"{ONE}.*0 bytes"),
    "shard-2-bytes": Case(shard(b"{}"), E, f"{ONE}.*2 bytes"),
    "shard-7-bytes": Case(shard(b"1234567"), E, f"{ONE}.*7 bytes"),
    "header-length-0": Case(shard(pack(b"", b"", 0)), E, f"{ONE}.*claims 0 bytes"),
    "header-longer-than-file": Case(shard(pack(b"{}", b"", 99)), E, f"{ONE}.*claims 99 bytes"),
    "header-length-2-to-63": Case(shard(pack(b"{}", b"", 2**63)), E, f"{ONE}.*truncated"),
    "header-length-all-ones": Case(shard(b"\xff" * 100), E, f"{ONE}.*truncated"),
    "header-over-16-mib": Case(
        hollow(ONE, 17 << 20, ((17 << 20) - 8).to_bytes(8, "little") + b"{"), E, f"{ONE}.*exceeds"
    ),
    "header-100-mb-and-1": Case(
        hollow(ONE, 100_000_009, (100_000_001).to_bytes(8, "little") + b"{"),
        E,
        f"{ONE}.*100000001 bytes exceeds",
        OPENING,
    ),
    "header-of-300k-empty-tensors": Case(many_tensors(300_000), E, ONE),
    "header-of-280k-empty-tensors": Case(many_tensors(280_000), E, ONE),
    "header-of-5-million-lists": Case(many_lists(ONE, b'{"a":', 15), E, ONE),
    "header-leading-space": Case(shard(pack(b" {}", b"")), E, f"{ONE}.*does not start"),
    "header-not-utf8": Case(shard(pack(b'{"\xff":1}', b"")), E, f"{ONE}.*UTF-8"),
    "header-not-json": Case(shard(pack(b"{1: 2}", b"")), E, f"{ONE}.*not valid JSON"),
    "header-too-deep": Case(shard(pack(b'{"a":' + b"[" * 200_000, b"")), E, f"{ONE}.*(deep|JSON)"),
    "header-is-a-list": Case(shard(pack(b"[]", b"")), E, f"{ONE}.*does not start"),
    "header-nan": Case(shard(pack(b'{"a": NaN}', b"")), E, f"{ONE}.*NaN"),
    "git-lfs-pointer": Case(
        shard(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"),
        E,
        f"{ONE}.*git-lfs pointer",
    ),
    "html-page": Case(shard(b"\n<!DOCTYPE html><html>not found</html>"), E, f"{ONE}.*an HTML page"),
    "data-one-byte-short": Case(with_data(lambda d: d[:-1]), E, f"{ONE} is truncated.*\\d+"),
    "data-one-byte-long": Case(with_data(lambda d: d + b"x"), E, f"{ONE} has bytes after"),
    "data-half": Case(with_data(lambda d: d[: len(d) // 2]), E, f"{ONE}.*truncated"),
    "shard-without-tensors": Case(shard(pack(b"{}", b"")), E, INDEX),
    # one tensor
    "tensor-twice-same-offsets": Case(doubled(), E, f"{ONE}.*{Q}' appears twice"),
    "tensor-twice-other-offsets": Case(doubled(0, 256), E, f"{ONE}.*{Q}' appears twice"),
    "metadata-twice": Case(
        shard(pack(b'{"__metadata__":{},"__metadata__":{}}', b"")),
        E,
        f"{ONE}.*__metadata__' appears twice",
    ),
    "metadata-not-text": Case(
        header(lambda h: h.update(__metadata__={"a": 1})), E, f"{ONE}.*map text to text"
    ),
    "metadata-list": Case(header(lambda h: h.update(__metadata__=[])), E, f"{ONE}.*map text"),
    "tensor-extra-field": Case(tensor(code="x"), E, f"{ONE}.*{Q}.*exactly dtype"),
    "tensor-missing-field": Case(header(lambda h: h[Q].pop("shape")), E, f"{Q}.*exactly dtype"),
    "tensor-is-a-number": Case(header(lambda h: h.update({Q: 3})), E, f"{Q}.*exactly dtype"),
    "dtype-unknown": Case(tensor(dtype="F128"), E, f"{ONE}.*{Q}.*unknown dtype 'F128'"),
    "dtype-number": Case(tensor(dtype=3), E, f"{Q}.*unknown dtype"),
    "dtype-list": Case(tensor(dtype=["F32"]), E, f"{Q}.*unknown dtype"),
    "dtype-of-another-size": Case(tensor(dtype="F64"), E, f"{Q}.*takes 512 bytes"),
    "shape-mismatch": Case(tensor(shape=[8, 9]), E, f"{ONE}.*{Q}.*takes 288 bytes"),
    "shape-negative": Case(tensor(shape=[-8, -8]), E, f"{Q}.*no list of sizes"),
    "shape-float": Case(tensor(shape=[8.0, 8]), E, f"{Q}.*no list of sizes"),
    "shape-bool": Case(tensor(shape=[True, 64]), E, f"{Q}.*no list of sizes"),
    "shape-text": Case(tensor(shape="88"), E, f"{Q}.*no list of sizes"),
    "shape-overflow": Case(tensor(shape=[2**60, 2**60]), E, f"{Q}.*takes"),
    "shape-wraps-to-the-right-size": Case(tensor(shape=[2**62 + 16, 4]), E, f"{Q}.*takes"),
    "shape-beyond-64-bits": Case(tensor(shape=[2**70]), E, f"{Q}.*no list of sizes"),
    "shape-of-1000-ones": Case(tensor(shape=[1] * 1000), E, f"{Q}.*no list of sizes"),
    "offsets-reversed": Case(tensor(data_offsets=[448, 192]), E, f"{Q}.*span -256"),
    "offsets-negative": Case(tensor(data_offsets=[-256, 0]), E, f"{Q}.*no two positions"),
    "offsets-float": Case(tensor(data_offsets=[192.0, 448]), E, f"{Q}.*no two positions"),
    "offsets-one": Case(tensor(data_offsets=[192]), E, f"{Q}.*no two positions"),
    "offsets-beyond-the-file": Case(
        tensor(data_offsets=[10**6, 10**6 + 256]), E, f"{ONE}.*proj.*follows a hole"
    ),
    "tensors-overlap": Case(header(overlap), E, f"{ONE}.*overlaps|hole"),
    "data-with-a-hole": Case(header(hole), E, f"{ONE}.*follows a hole"),
    "name-with-escape": Case(renamed("a\x1b[2Jb"), E, r"a\\x1b\[2Jb.*control characters"),
    "name-with-newline": Case(renamed("a\nb"), E, r"a\\nb.*control characters"),
    "name-with-nul": Case(renamed("a\0b"), E, r"a\\x00b.*control characters"),
    "name-right-to-left": Case(renamed("a\u202eb"), E, r"a\\u202eb.*control characters"),
    "name-of-10-kb": Case(renamed("n" * 10_000), E, f"{ONE}.*too long"),
    "name-empty": Case(renamed(""), E, f"{ONE}.*empty"),
    "weights-nan": Case(
        with_number(b"\0\0\xc0\x7f"), E, f"(NaN.*)?{Q}(.*NaN)?", ("convert", "restore-pre")
    ),
    "weights-infinity": Case(
        with_number(b"\0\0\x80\xff"),
        E,
        f"(NaN or inf.*)?{Q}(.*NaN or inf)?",
        ("convert", "restore-pre"),
    ),
    "weights-zero": Case(with_number(bytes(256)), E, f"{Q}.*zero everywhere", ("restore-pre",)),
    # the index
    "index-dotdot": Case(points_to("../outside.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-absolute": Case(points_to("/etc/x.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-backslash": Case(points_to("..\\x.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-drive": Case(points_to("C:\\x.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-share": Case(points_to("\\\\host\\x.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-folder": Case(points_to("a/x.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-tricky-folder": Case(points_to("a/../../x.safetensors"), E, "no plain file name"),
    "index-dot": Case(points_to("."), E, f"{INDEX}.*no plain file name"),
    "index-empty-name": Case(points_to(""), E, f"{INDEX}.*no plain file name"),
    "index-nul": Case(points_to("x\0.safetensors"), E, f"{INDEX}.*no plain file name"),
    "index-escape": Case(points_to("\x1b[2J.safetensors"), E, r"\\x1b\[2J"),
    "index-long-name": Case(points_to("n" * 300 + ".safetensors"), E, "no plain file name"),
    "index-bin": Case(
        points_to("pytorch_model.bin"), E, f"{INDEX}.*pytorch_model.bin' is no .safetensors"
    ),
    "index-missing-shard": Case(points_to("model-9.safetensors"), E, "model-9.safetensors", WHOLE),
    "index-wrong-shard": Case(points_to(TWO), E, f"{Q}.*{TWO}, which does not hold it"),
    "index-key-nowhere": Case(
        index(lambda d: d["weight_map"].update(ghost=ONE)), E, f"'ghost'.*{ONE}, which does not"
    ),
    "index-key-left-out": Case(
        index(lambda d: d["weight_map"].pop(Q)), E, f"{ONE} holds tensor '{Q}'.*not list"
    ),
    "index-key-in-two-shards": Case(in_two_shards, E, f"{Q}' is in two files.*{ONE}.*{TWO}"),
    "index-list": Case(text(INDEX, "[]"), E, f"{INDEX}.*weight_map"),
    "index-map-list": Case(index(lambda d: d.update(weight_map=[])), E, f"{INDEX}.*weight_map"),
    "index-map-null": Case(index(lambda d: d.update(weight_map=None)), E, f"{INDEX}.*weight_map"),
    "index-map-empty": Case(index(lambda d: d.update(weight_map={})), E, f"{INDEX}.*weight_map"),
    "index-map-numbers": Case(
        index(lambda d: d["weight_map"].update({Q: 1})), E, f"{INDEX}.*{Q}.*not a file"
    ),
    "index-doubled-key": Case(
        text(INDEX, f'{{"weight_map": {{"{Q}": "{ONE}", "{Q}": "{ONE}"}}}}'),
        E,
        f"{INDEX}.*{Q}' appears twice",
    ),
    "index-of-200-mb": Case(hollow(INDEX, 200 << 20), E, f"{INDEX} has \\d+ bytes", OPENING),
    "index-of-5-million-lists": Case(many_lists(INDEX, b'{"weight_map":{},"a":', 15), E, INDEX),
    "index-too-deep": Case(text(INDEX, "[" * 200_000), E, f"{INDEX}.*(deep|JSON)"),
    "index-not-utf8": Case(text(INDEX, b"\xff\xfe{}"), E, f"{INDEX}.*UTF-8"),
    # kinds of files
    "shard-missing": Case(remove(TWO), E, TWO, WHOLE),
    "shard-link-outside": Case(link(ONE, "../outside"), E, f"{ONE} is a link that leaves", OPENING),
    "shard-link-absolute": Case(
        link(ONE, "/etc/passwd"), E, f"{ONE} is a link that leaves", OPENING
    ),
    "shard-link-broken": Case(
        link(ONE, "nothing"), E, f"{ONE}( is a broken|, which is not here)", WHOLE
    ),
    "shard-link-loop": Case(link(ONE, ONE), E, f"{ONE}( is a broken|, which is not here)", WHOLE),
    "shard-link-to-a-device": Case(
        link(ONE, "/dev/zero"), E, f"{ONE} is a link that leaves", OPENING
    ),
    "shard-link-to-blobs-of-nobody": Case(
        link(ONE, "../../blobs/x"), E, f"{ONE}( is a broken|, which is not here)", WHOLE
    ),
    "shard-fifo": Case(fifo(ONE), E, f"{ONE} is not a regular file", OPENING),
    "shard-folder": Case(a_folder(ONE), E, f"{ONE} is not a regular file", OPENING),
    "config-link-outside": Case(
        link("config.json", "../outside"), E, "config.json is a link", WHOLE
    ),
    "config-fifo": Case(fifo("config.json"), E, "config.json is not a regular file", WHOLE),
    "index-fifo": Case(fifo(INDEX), E, f"{INDEX} is not a regular file", OPENING),
    "side-file-link-outside": Case(
        lambda f: (f / "merges.txt").symlink_to("/etc/passwd"),
        E,
        "merges.txt is a link",
        WHOLE,
    ),
    # folders that are no checkpoint
    "empty-folder": Case(only(), E, "bad (is|has) no", OPENING),
    "no-config": Case(
        remove("config.json"), E, "config.json is missing", ("inspect", "verify", *STRICT)
    ),
    "no-weights": Case(remove(ONE, TWO, INDEX), E, "no weights"),
    "pickle-only": Case(
        only(config__json=json.dumps(CONFIG), pytorch_model__bin="x"),
        E,
        "only pickle weights.*pytorch_model.bin.*onvert",
    ),
    "adapter": Case(
        only(adapter_config__json="{}", adapter_model__safetensors="x"),
        E,
        "LoRA adapter",
        ("inspect", "convert", "restore-pre"),
        {"restore-pre": (UsageError, "PRE .*bad. is a LoRA adapter; give its base model")},
    ),
    "adapter-that-is-none": Case(
        only(adapter_config__json='{"peft_type": "LORA"}', adapter_model__safetensors="x"),
        E,
        "adapter_model.safetensors has 1 bytes",
        ("restore-post", "diff-b"),
    ),
    "adapter-of-another-kind": Case(
        only(adapter_config__json='{"peft_type": "IA3"}', adapter_model__safetensors="x"),
        U,
        "adapter_config.json: its peft_type is 'IA3'",
        ("restore-post",),
    ),
    # what morph writes beside the weights
    "manifest-dotdot": Case(manifest({"../x": ENTRY}), E, r"MANIFEST.*'\.\./x'", VERIFY),
    "manifest-absolute": Case(manifest({"/etc/passwd": ENTRY}), E, "MANIFEST.*/etc/passwd", VERIFY),
    "manifest-drive": Case(manifest({"C:x": ENTRY}), E, "MANIFEST.*C:x", VERIFY),
    "manifest-escape": Case(manifest({"\x1b[2J": ENTRY}), E, r"\\x1b\[2J", VERIFY),
    "manifest-entry-list": Case(manifest({"x": []}), E, "MANIFEST.*'x' needs", VERIFY),
    "manifest-files-list": Case(manifest([]), E, f"{MANIFEST}: expected format 1", VERIFY),
    "manifest-not-json": Case(text(MANIFEST, "{"), E, f"{MANIFEST}: not valid", VERIFY),
    "manifest-doubled-key": Case(
        text(MANIFEST, '{"format": 1, "files": {}, "files": {}}'), E, "'files' appears", VERIFY
    ),
    "manifest-of-100-mb": Case(hollow(MANIFEST, 100 << 20), E, f"{MANIFEST} has", VERIFY),
    "manifest-of-5-million-lists": Case(
        many_lists(MANIFEST, b'{"format":1,"files":{},"a":', 15), E, MANIFEST, VERIFY
    ),
    "manifest-fifo": Case(lambda f: os.mkfifo(f / MANIFEST), E, f"{MANIFEST} is not", VERIFY),
    "record-list": Case(text("morph.json", "[]"), E, "morph.json", ("verify", "restore-post")),
    "record-not-json": Case(text("morph.json", "{"), E, "morph.json", ("verify", "restore-post")),
    "record-of-restores-list": Case(
        text("morph.json", '{"restored": [1]}'), E, "morph.json.*restored", ("restore-post",)
    ),
    # the config
    "config-list": Case(text("config.json", "[]"), E, "config.json must be a JSON object", WHOLE),
    "config-not-json": Case(
        text("config.json", "{model_type: llama}"),
        E,
        "config.json: not valid JSON",
        WHOLE,
    ),
    "config-nan": Case(
        text("config.json", '{"model_type": "x", "a": NaN}'),
        E,
        "config.json: NaN",
        WHOLE,
    ),
    "config-infinity": Case(
        text("config.json", '{"model_type": "x", "a": -Infinity}'),
        E,
        "config.json: -Infinity",
        WHOLE,
    ),
    "config-overflow": Case(
        text("config.json", '{"model_type": "x", "a": 1e999}'),
        E,
        "config.json: 1e999",
        WHOLE,
    ),
    "config-doubled-key": Case(
        text("config.json", '{"model_type": "x", "a": {"b": 1, "b": 2}}'),
        E,
        "config.json: key 'b' appears twice",
        WHOLE,
    ),
    "config-too-deep": Case(
        text("config.json", "[" * 200_000), E, "config.json.*(deep|JSON)", WHOLE
    ),
    "config-too-big": Case(hollow("config.json", 9 << 20), E, "config.json has \\d+ bytes", WHOLE),
    "config-of-2-million-lists": Case(
        many_lists("config.json", json.dumps(CONFIG)[:-1].encode() + b',"a":', 7),
        E,
        "config.json",
        WHOLE,
    ),
    "config-huge-integer": Case(
        text("config.json", '{"a": ' + "9" * 9999 + "}"), E, "config.json", WHOLE
    ),
    "config-not-utf8": Case(
        text("config.json", b'{"a": "\xff"}'), E, "config.json: not UTF-8", WHOLE
    ),
    "config-without-model-type": Case(
        without("model_type"), E, "config.json has no model_type", WHOLE
    ),
    "config-unknown-model-type": Case(
        config(model_type="mamba9\x1b[2J"), U, r"mamba9\\x1b\[2J", ("convert", "restore-post")
    ),
    "config-without-layers": Case(
        without("num_hidden_layers"), E, "num_hidden_layers is (None|32)", STRICT
    ),
    "config-layers-text": Case(
        config(num_hidden_layers="2"), E, "num_hidden_layers is '?2", STRICT
    ),
    "config-layers-true": Case(
        config(num_hidden_layers=True), E, "num_hidden_layers is True", STRICT
    ),
    "config-layers-zero": Case(config(num_hidden_layers=0), E, "num_hidden_layers is 0", STRICT),
    "config-a-billion-layers": Case(
        config(num_hidden_layers=10**9), E, "num_hidden_layers is 1000000000", STRICT
    ),
    "config-too-few-layers": Case(
        config(num_hidden_layers=1), E, "is 1, the weights hold 2 layers", STRICT
    ),
    "config-kv-heads-do-not-divide": Case(
        config(num_key_value_heads=3), E, "num_key_value_heads is 3", STRICT
    ),
    "config-kv-heads-zero": Case(
        config(num_key_value_heads=0), E, "num_key_value_heads is 0", STRICT
    ),
    "config-head-dim-text": Case(config(head_dim="2"), E, "head_dim is '?2", STRICT),
    "config-head-dim-negative": Case(config(head_dim=-2), E, "head_dim is -2", STRICT),
    "config-extra-layers-text": Case(
        config(num_hidden_layers=1, num_nextn_predict_layers="1"),
        E,
        "weights hold 2 layers",
        STRICT,
    ),
    "config-other-heads": Case(
        config(head_dim=4), E, "k_proj.weight has (4 rows|shape .4, 8.)", STRICT
    ),
    "config-layer-types-too-short": Case(
        config(layer_types=["full_attention"]), E, "layer_types has 1 entries for 2", STRICT
    ),
    "config-ties-that-differ": Case(
        config(tie_word_embeddings=True),
        E,
        "lm_head.weight.*embed_tokens",
        ("convert", "restore-post"),
    ),
    # quantised weights
    "quantised-by-config": Case(
        config(quantization_config={"quant_method": "fp8"}),
        U,
        "quantised.*quantization_config",
        WHOLE,
        {c: (M, "quantised.*quantization_config") for c in ("restore-pre", "restore-post")},
    ),
    "quantised-nested": Case(
        text(
            "config.json",
            json.dumps({"model_type": "x", "text_config": CONFIG | {"quantization_config": {}}}),
        ),
        U,
        "quantised.*quantization_config",
        ("inspect", "convert"),
    ),
    "quantised-fp8": Case(
        add_tensor("model.layers.0.x.weight", "F8_E4M3", (2, 2), bytes(4)),
        U,
        "x.weight is F8_E4M3",
        ("inspect", "convert"),
    ),
    "quantised-int8": Case(
        add_tensor("model.layers.0.x.weight", "I8", (2, 2), bytes(4)),
        U,
        "x.weight is I8",
        ("inspect", "convert"),
    ),
    "quantised-gptq": Case(
        add_tensor("model.layers.0.x.qweight", "I32", (1, 1), bytes(4)),
        U,
        "x.qweight is I32",
        ("inspect", "convert"),
    ),
    "quantised-scales": Case(
        add_tensor("model.layers.0.x.weight_scale_inv", "F32", (1,), bytes(4)),
        U,
        "weight_scale_inv",
        ("inspect", "convert"),
    ),
}


# what is told rather than refused, or is no fault at all: what inspect says of it
ACCEPTED: dict[str, tuple[Act, str]] = {
    "untouched": (lambda folder: None, "tensors +21"),
    "side-file-pipe": (lambda f: os.mkfifo(f / "x.txt"), "ignored files +x.txt"),
    "side-file-linked-folder": (lambda f: (f / "x").symlink_to("/usr"), "ignored files +x"),
    "tensor-empty": (add_tensor("x.empty", "F32", (0, 3), b""), "tensors +22"),
    "tensor-of-rank-0": (add_tensor("x.scalar", "F32", (), bytes(4)), "tensors +22"),
    "tensor-name-with-markup": (add_tensor("[/x][red]", "F32", (1,), bytes(4)), "tensors +22"),
    "data-misaligned": (padded(5), "tensors +21"),
    "both-file-and-index": (both, "the single file is used"),
    "index-total-size-wrong": (index(lambda d: d["metadata"].update(total_size=1)), "total_size"),
    "config-hostile-keys": (config(**HOSTILE), r"ignored auto_map.*deep\[0\].attn_impl"),
    "config-too-many-heads": (config(num_attention_heads=8), "k_proj.weight has 4 rows"),
}
# two good folders that do not belong together: PRE, and what differs in POST
TYPES = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
QWEN: dict[str, Any] = {"model_type": "qwen3", "head_dim": 2, "use_sliding_window": True}
NORMS = shapes_of(norms=True)
WIDE = {"shapes": shapes_of(hidden=16), "hidden_size": 16}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pair-shape": (
        WIDE,
        {},
        r"q_proj.weight.*\[16, 16\] in PRE and \[8, 8\] in POST.*hidden_size 16",
    ),
    "pair-heads": (
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {},
        "num_attention_heads is 2 in PRE and 4 in POST",
    ),
    "pair-dtype-wider": ({"code": "F16"}, {}, "q_proj.*F16 in PRE and F32 in POST.*widening"),
    "pair-dtype-narrower": ({}, {"code": "BF16"}, "q_proj.*F32 in PRE and BF16 in POST"),
    "pair-rope-theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {},
        "rope_theta is 500000.0 in PRE and 10000.0 in POST",
    ),
    "pair-rope-beyond-floats": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}},
        {},
        "rope_theta is 10+… in PRE and 10000.0 in POST",
    ),
    "pair-rope-scaling": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {},
        "rope_type is yarn in PRE and default in POST",
    ),
    "pair-qk-norm-in-post": ({}, {**QWEN, "shapes": NORMS}, "norm of . in POST and none in PRE"),
    "pair-qk-norm-in-pre": ({**QWEN, "shapes": NORMS}, {}, "norm of . in PRE and none in POST"),
    "pair-layer-order": (
        {**QWEN, **TYPES, "shapes": NORMS},
        {**QWEN, **TYPES, "shapes": NORMS, "layer_types": TYPES["layer_types"][::-1]},
        "layer 0 has full attention in PRE and sliding in POST",
    ),
    "pair-dense-teacher": (
        {**QWEN, "shapes": NORMS},
        {**QWEN, **TYPES, "shapes": NORMS},
        "layer 1 has full attention in PRE and sliding in POST",
    ),
    "pair-strangers": ({"seed": 9}, {}, "cosine between sampled q rows.*does not descend"),
    "pair-equal": ({}, {"tuned": False}, "nothing to restore"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_checkpoint_is_refused(name: str, place: Path) -> None:
    case = CASES[name]
    # as PRE it must differ from POST, as POST from PRE
    case.act(good(place / "bad", tuned="restore-pre" not in case.commands))
    if "verify" in case.commands and not (place / "bad" / MANIFEST).exists():
        c.with_manifest(place / "bad")
    for command in case.commands:
        error, message = case.other.get(command, (case.error, case.message))
        line = refused(place, error, f"(?s){message}", *COMMANDS[command]("bad"))
        told = ("bad", "PRE (", "POST (", "model_type")
        assert any(word in line for word in told), f"{command}: which folder? {line}"


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_no_fault_is_told(name: str, place: Path) -> None:
    act, message = ACCEPTED[name]
    act(good(place / "bad", tuned=True))
    before = state(place)
    found = morph("inspect", "bad")
    assert found.code == 0, found.err
    assert re.search(message, found.out + found.err), found.out + found.err
    assert "\x1b" not in found.out + found.err
    assert state(place) == before


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_that_does_not_belong_together_is_refused(name: str, tmp_path: Path) -> None:
    pre, post, message = PAIRS[name]
    good(tmp_path / "pre", **pre)
    good(tmp_path / "post", **{"tuned": True, **post})
    line = refused(tmp_path, MismatchError, message, *c.restore(tmp_path))
    assert "Nothing was written." in line


def test_another_vocabulary_is_told(tmp_path: Path) -> None:
    good(tmp_path / "pre", shapes=shapes_of(vocab=7), vocab_size=7)
    good(tmp_path / "post", tuned=True)
    found = morph(*c.restore(tmp_path))
    assert found.code == 0 and "vocab_size is 7 in PRE and 6 in POST" in found.err


PATHS = {
    "path-missing": "nowhere",
    "path-of-a-file": "pre/config.json",
    "path-hub-id": "Qwen/Qwen3-0.6B",
    "path-escape": "\x1b[2J[/x]",
    "path-of-5000-bytes": "n" * 5000,
    "path-loop": "loop",
    "path-pipe": "pipe",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_no_folder_is_refused(name: str, place: Path) -> None:
    (place / "loop").symlink_to("loop")
    os.mkfifo(place / "pipe")
    for command, call in COMMANDS.items():
        line = refused(place, CheckpointError, "", *call(PATHS[name]))
        assert escape(PATHS[name])[:99] in line, command


def test_a_bit_that_flipped_is_found_by_the_manifest(place: Path) -> None:
    c.with_manifest(place / "post")
    data = bytearray((place / "post" / TWO).read_bytes())
    data[-1] ^= 1
    (place / "post" / TWO).write_bytes(bytes(data))
    refused(place, VerificationFailed, f"{TWO}: expected sha256", "verify", "post")


def in_plan(old: str, new: str) -> Callable[[], str]:
    """The good plan with one thing changed."""
    return lambda: c.plan_text().replace(old, new, 1)


SELECTIONS: dict[str, tuple[Callable[[], str], str]] = {
    "plan-900-deep": (in_plan("{}", '{"a":' + "[" * 900 + "]" * 900 + "}"), "nested deeper than"),
    "plan-of-a-million-lists": (
        in_plan("{}", '{"a":[' + "[]," * 10**6 + "1]}"),
        "more than 200000",
    ),
    "plan-of-a-million-numbers": (in_plan("[\n", "[" + "1," * 10**6 + "\n"), "more than 200000"),
    "plan-of-100000-keys": (
        in_plan("{}", "{" + ",".join(f'"k{i}":1' for i in range(10**5)) + "}"),
        "k0.*(unknown key|no such option)",
    ),
    "plan-of-a-billion-heads": (
        in_plan('"num_attention_heads": 4', '"num_attention_heads": 1000000000'),
        "every one of the 1000000000 heads",
    ),
    "plan-number-beyond-floats": (
        in_plan('"cache": null', '"cache": {"per_token": ' + "9" * 400 + "}"),
        "per_token.*not a finite number",
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_file_of_a_selection_takes_no_time(name: str, place: Path) -> None:
    made, message = SELECTIONS[name]
    (place / "bad.json").write_text(made())
    before = state(place)
    for call in (
        ["convert", "pre", "out", "--plan", "bad.json"],
        ["plan", "bad.json", "--model", "pre", "--budget", "1", "--out", "p.json"],
    ):
        found = morph(*call)
        assert found.code == 2 and re.search("bad.json|layer 0", found.err), found.err
        if call[0] == "convert":
            assert re.search(message, found.err), found.err
    assert state(place) == before


@pytest.mark.parametrize("command", ["restore", "plan", "convert", "check"])
def test_a_pipe_in_place_of_a_file_does_not_block(command: str, place: Path) -> None:
    for name in ("pipe.json", "pipe.yaml"):
        os.mkfifo(place / name)
    calls = {
        "restore": ["pre", "post", "out", "--layers", "pipe.json"],
        "plan": ["pipe.json", "--model", "pre", "--budget", "1", "--out", "p.json"],
        "convert": ["pre", "out", "--plan", "pipe.json"],
        "check": ["pipe.yaml"],
    }
    before = state(place)
    found = morph(command, *calls[command])
    assert found.code == 2 and found.err.startswith("error: "), found.err
    assert state(place) == before


def test_nothing_in_a_checkpoint_is_run(place: Path) -> None:
    canary = place / "canary"
    code = f"open({str(canary)!r}, 'w')"
    bad = good(place / "bad", tuned=True, **HOSTILE)
    (bad / "x.py").write_text(code)
    pickled = b"cbuiltins\nexec\n(S" + repr(code).encode() + b"\ntR."
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (bad / name).write_bytes(pickled)
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**9) %}{% endfor %}"
    )
    (bad / "chat_template.jinja").write_text(template)
    (bad / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **HOSTILE}))
    for call in (["inspect", "bad"], ["diff", "pre", "bad"], ["restore", "pre", "bad", "out"]):
        assert morph(*call).code == 0, call
    assert not canary.exists()
    copied = set(os.listdir(place / "out"))
    assert "chat_template.jinja" in copied
    assert not [n for n in copied if n.endswith((".py", ".bin", ".pt", ".pth"))]


# --- Recipes ------------------------------------------------------------------------------------

LONG = "model: pre\ndistill:\n" + "  - {loss: align, tokens: 4}\n" * 10_000
R = RecipeError
RECIPES: dict[str, tuple[str | bytes, type[MorphError], str]] = {
    "yaml-python-tag": ("model: !!python/object/apply:os.system [ls]", R, "line 1.*tag"),
    "yaml-python-name": ("!!python/name:os.system : 1", R, "line 1.*tag"),
    "yaml-local-tag": ("model: !local x", R, "line 1.*tag"),
    "yaml-timestamp-tag": ("model: !!timestamp 2026-01-02", R, "line 1.*tag"),
    "yaml-doubled-key": ("model: pre\nseed: 1\nseed: 2", R, "line 3.*'seed' appears twice"),
    "yaml-doubled-inner-key": ("model: pre\ndata: {limit: 1, limit: 2}", R, "line 2.*twice"),
    "yaml-number-as-text": ("model: pre\nseed: '1'", R, "line 2.*seed.*'1' .text."),
    "yaml-no-is-text": ("model: pre\nseed: no", R, "line 2.*seed.*'no' .text."),
    "yaml-sexagesimal": ("model: pre\nseed: 12:30:45", R, "line 2.*seed.*'12:30:45' .text."),
    "yaml-date": ("model: pre\nseed: 2026-01-02", R, "line 2.*seed.*'2026-01-02' .text."),
    "yaml-alias-of-itself": ("&a [*a]", R, "line 1.*anchors and aliases"),
    "yaml-alias": ("model: &a pre\nout: *a", R, "line 1.*anchors and aliases"),
    "yaml-alias-bomb": ("a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]", R, "line 1.*anchors"),
    "yaml-merge-key": ("model: pre\n<<: {seed: 1}", R, "line 2.*<<: unknown key"),
    "yaml-900-brackets": ("[" * 900 + "]" * 900, R, "line 1.*nested deeper than 32"),
    "yaml-half-a-million-brackets": ("[" * 500_000, R, "nested deeper than 32"),
    "yaml-two-documents": ("model: pre\n---\nmodel: x", R, "line 2.*second document"),
    "yaml-over-1-mib": ("#" + "x" * (1 << 20), R, "larger than 1 MiB"),
    "yaml-not-utf8": (b"model: \xff", R, "byte 7 is not UTF-8"),
    "yaml-nul": ("model: pre\0", R, "not valid YAML"),
    "yaml-open-bracket": ("model: [", R, "line 2.*not valid YAML"),
    "yaml-tab": ("model: pre\n\tseed: 1", R, "line 2.*not valid YAML"),
    "yaml-empty": ("", R, "expected a mapping"),
    "yaml-huge-number": ("model: pre\nseed: " + "9" * 5000, R, "line 2.*too long"),
    "yaml-infinity": ("model: pre\ndata: {held_out: .inf}", R, "line 2.*held_out.*finite"),
    "yaml-nan": ("model: pre\ndata: {held_out: .nan}", R, "line 2.*held_out.*finite"),
    "recipe-unknown-key": ("model: pre\nslect: {}", R, "line 2.*slect.*Did you mean 'select'"),
    "recipe-unknown-inner-key": (
        "model: pre\nselect: {budgt: 1}",
        R,
        "line 2.*select.budgt.*Did you mean 'budget'",
    ),
    "recipe-include": ("model: pre\ninclude: other.yaml", R, "line 2.*include: unknown key"),
    "recipe-include-outside": ("model: pre\ninclude: ../../etc/passwd", R, "include: unknown"),
    "recipe-wrong-type": ("model: pre\nselect: nll", R, "line 2.*select.*mapping of keys"),
    "recipe-layer-negative": ("model: pre\nselect: {keep: [-1]}", R, "select.keep.*-1"),
    "recipe-layer-twice": ("model: pre\nselect: {keep: [1, 1]}", R, "select.keep.*1.*twice"),
    "recipe-layer-kept-and-replaced": (
        "model: pre\nselect: {keep: [1], replace: [1]}",
        R,
        "select.keep.*both kept and replaced",
    ),
    "recipe-ratio-0": ("model: pre\nselect: {budget: 0.0}", PlanError, "budget.*0.0"),
    "recipe-ratio-over-1": ("model: pre\nselect: {budget: 3/2}", PlanError, "budget.*1.5"),
    "recipe-ratio-nan": ("model: pre\nselect: {budget: nan%}", PlanError, "budget.*nan"),
    "recipe-ratio-overflow": (
        f"model: pre\nselect: {{budget: {'9' * 400}/1}}",
        PlanError,
        "budget.*not understood",
    ),
    "recipe-selector-typo": (
        "model: pre\nselect: {selector: nil}",
        UnknownName,
        "line 2.*select.selector.*'nil'.*Did you mean 'nll'",
    ),
    "recipe-mixer-typo": (
        "model: pre\nmixer: {name: slidng}",
        UnknownName,
        "line 2.*mixer.name.*Did you mean 'sliding'",
    ),
    "recipe-hostile-key": ('model: pre\n"\\x1b[31m[/x]": 1', R, r"\\x1b\[31m\[/x\]"),
    "recipe-of-10000-steps": (LONG, R, "line 2.*10000 stages; 100 is the most"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_refused(name: str, place: Path) -> None:
    content, error, message = RECIPES[name]
    data = content.encode() if isinstance(content, str) else content
    (place / "bad.yaml").write_bytes(data)
    for call in (["check", "bad.yaml"], ["run", "bad.yaml", "--out", "out"]):
        assert "bad.yaml" in refused(place, error, f"(?s){message}", *call)


def test_the_environment_is_not_read(place: Path) -> None:
    (place / "r.yaml").write_text("model: ${HOME}/x$(id)\nout: '`id`'\n")
    found = morph("check", "r.yaml", "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert (told["model"], told["out"]) == ("${HOME}/x$(id)", "`id`")


def test_kept_equal_sees_a_single_changed_bit(tmp_path: Path) -> None:
    one, two = good(tmp_path / "one"), good(tmp_path / "two")
    data = bytearray((two / TWO).read_bytes())
    data[-1] ^= 1
    (two / TWO).write_bytes(bytes(data))
    equal, changed, new = kept_equal(Checkpoint.open(one), Checkpoint.open(two))
    assert changed == ["lm_head.weight"] and len(equal) == len(SHAPES) - 1 and new == []


# --- Nothing is left out ------------------------------------------------------------------------

# every kind of fault that was listed before anything was built, and the cases or tests that hold it
TICKS = {
    "file of 0, 2, 7 bytes": "shard-empty shard-2-bytes shard-7-bytes",
    "header length 0, > file, 2^63, 100 MB + 1": (
        "header-length-0 header-longer-than-file header-length-2-to-63 "
        "header-length-all-ones header-100-mb-and-1"
    ),
    "header with a leading space, invalid UTF-8, no JSON, depth 200k": (
        "header-leading-space header-not-utf8 header-not-json header-too-deep"
    ),
    "duplicate tensor": "tensor-twice-same-offsets tensor-twice-other-offsets",
    "duplicate and non-text metadata": "metadata-twice metadata-not-text metadata-list",
    "extra field, unknown dtype": "tensor-extra-field dtype-unknown dtype-number dtype-list",
    "negative, float, bool, 2^60 sizes; overflow": (
        "shape-negative shape-float shape-bool shape-overflow shape-wraps-to-the-right-size "
        "shape-beyond-64-bits"
    ),
    "overlap, hole, offsets reversed": "tensors-overlap data-with-a-hole offsets-reversed",
    "data longer or shorter by a byte": "data-one-byte-long data-one-byte-short",
    "misaligned start, empty and rank-0 tensors": "data-misaligned tensor-empty tensor-of-rank-0",
    "too many empty tensors": "header-of-300k-empty-tensors header-over-16-mib",
    "NaN and infinity in a weight": "weights-nan weights-infinity ::test_pre_holds_no_number",
    "bit flip": "::test_damage_is_named_by_file",
    "names with NUL, ESC, newline, RTL mark, 10 KB, [/x]": (
        "name-with-nul name-with-escape name-with-newline name-right-to-left name-of-10-kb "
        "tensor-name-with-markup"
    ),
    "index leads outside": (
        "index-dotdot index-absolute index-drive index-share index-tricky-folder "
        "shard-link-outside shard-link-absolute shard-link-loop shard-fifo "
        "shard-link-to-a-device shard-folder"
    ),
    "index against shards": (
        "index-bin index-missing-shard shard-missing index-wrong-shard "
        "index-key-in-two-shards index-key-left-out index-key-nowhere "
        "index-total-size-wrong"
    ),
    "index of another form": (
        "index-map-list index-map-null index-map-numbers index-of-200-mb index-doubled-key "
        "both-file-and-index"
    ),
    "config against tensors": (
        "config-too-few-layers config-other-heads config-too-many-heads "
        "config-kv-heads-do-not-divide config-without-layers config-a-billion-layers "
        "config-nan"
    ),
    "config that chooses code": (
        "config-hostile-keys ::test_hostile_keys_are_dropped_at_any_depth "
        "::test_nothing_in_a_checkpoint_is_run"
    ),
    "ties that differ, quantised inputs": (
        "config-ties-that-differ quantised-by-config quantised-nested quantised-fp8 "
        "quantised-int8 quantised-gptq quantised-scales"
    ),
    "donor of another kind": (
        "pair-shape pair-heads pair-dtype-wider pair-dtype-narrower pair-rope-theta "
        "pair-rope-scaling pair-qk-norm-in-post pair-qk-norm-in-pre pair-layer-order "
        "pair-dense-teacher ::test_another_vocabulary_is_told"
    ),
    "YAML": (
        "yaml-python-tag yaml-doubled-key yaml-number-as-text yaml-no-is-text yaml-date "
        "yaml-sexagesimal yaml-alias-of-itself yaml-900-brackets yaml-alias-bomb"
    ),
    "recipe keys, types, layers, ratios, names": (
        "recipe-unknown-key recipe-wrong-type recipe-layer-negative recipe-layer-twice "
        "recipe-ratio-0 recipe-ratio-over-1 recipe-selector-typo ::test_pins"
    ),
    "includes, environment, 10k steps": (
        "recipe-include recipe-include-outside recipe-of-10000-steps "
        "::test_the_environment_is_not_read"
    ),
    "recipe of a run before, changed inputs": (
        "::test_ctrl_c_in_a_run ::test_state_of_another_run_is_refused"
    ),
    "ENOSPC, inodes, EIO, EACCES, read-only": (
        "::test_a_disk_that_fills_up ::test_a_limit_on_the_size_of_files "
        "::test_a_disk_without_inodes ::test_a_read_that_fails_names_the_shard "
        "::test_a_write_that_fails ::test_an_input_that_may_not_be_read "
        "::test_a_read_only_disk"
    ),
    "short reads and writes, no kernel copy, another disk": (
        "::test_a_disk_that_takes_little_at_a_time ::test_a_kernel_that_cannot_copy "
        "::test_an_output_on_another_disk"
    ),
    "output that may not be": (
        "::test_places_that_may_not_be_written ::test_an_output_that_exists "
        "::test_force_without_an_atomic_exchange"
    ),
    "inputs that change, two writers, stale locks": (
        "::test_an_input_that_changes_meanwhile ::test_two_writers_of_one_output "
        "::test_a_stale_lock_and_stale_folders_are_cleared"
    ),
    "signals and kills": (
        "::test_a_signal_in_the_middle "
        "::test_a_stop_at_any_step_changes_nothing_in_the_result "
        "::test_a_kill_at_any_call_leaves_the_output_absent_or_complete"
    ),
    "umask, long names, clock": (
        "::test_permissions_follow_the_umask ::test_a_long_name ::test_a_clock_that_goes_backwards"
    ),
    "run time": (
        "::test_exit_code_of_the_systems_errors "
        "::test_nan_stops_with_stage_step_layer_and_keeps_the_state "
        "::test_damaged_state_falls_back_to_the_one_before ::test_other_versions_are_noted "
        "::test_a_text_that_changed_in_the_middle_is_refused "
        "::test_fast_paths_say_whether_they_can_run "
        "::test_resolve_offline_is_one_clear_line"
    ),
}


@pytest.mark.parametrize("item", TICKS)
def test_every_listed_fault_has_a_case(item: str) -> None:
    texts = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py")]
    tests = set(re.findall(r"(?m)^def (test_\w+)\(", "\n".join(texts)))
    known = {*CASES, *ACCEPTED, *PAIRS, *RECIPES, *(f"::{name}" for name in tests)}
    assert set(TICKS[item].split()) <= known
