"""Every broken or hostile checkpoint is refused by a named error that says where; none is touched.

One table of cases: what is done to a good folder, the error, and what its message names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morph.checkpoint import Checkpoint, inspect, kept_equal, write_checkpoint
from morph.errors import CheckpointError, InputFileError, MorphError, UnsupportedModel

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
}
SHAPES = {
    "model.embed_tokens.weight": (6, 8),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "input_layernorm": (8,),
        }.items()
    },
    "lm_head.weight": (6, 8),
}
Header = dict[str, Any]


def pack(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of this header and data, however wrong they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def layout(names: list[str]) -> tuple[Header, bytes]:
    """A right header and right data for some of `SHAPES`."""
    header: Header = {}
    at, rng = 0, np.random.default_rng(0)
    for name in names:
        size = int(np.prod(SHAPES[name])) * 4
        header[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": [at, at + size]}
        at += size
    return header, rng.standard_normal(at // 4).astype("<f4").tobytes()


def good(folder: Path, sharded: bool = True) -> Path:
    """A folder that nothing is wrong with."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = list(SHAPES)
    if not sharded:
        (folder / "model.safetensors").write_bytes(pack(*layout(names)))
        return folder
    parts = {ONE: names[:6], TWO: names[6:]}
    for file, part in parts.items():
        (folder / file).write_bytes(pack(*layout(part)))
    weight_map = {n: file for file, part in parts.items() for n in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every regular file, without following links or opening what is none."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_symlink()
    }


# --- ways to break a folder -------------------------------------------------------------------


def header(change: Callable[[Header], object]) -> Callable[[Path], None]:
    """Change the header of the first shard, and leave its data."""

    def act(folder: Path) -> None:
        found, data = layout(list(SHAPES)[:6])
        change(found)
        (folder / ONE).write_bytes(pack(found, data))

    return act


def tensor(**changes: Any) -> Callable[[Path], None]:
    """Change one tensor's entry in the first shard."""
    return header(lambda found: found[Q].update(changes))


def shard(data: bytes, name: str = ONE) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).write_bytes(data)

    return act


def with_data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / ONE).write_bytes(change((folder / ONE).read_bytes()))

    return act


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        change(data)
        (folder / INDEX).write_text(json.dumps(data))

    return act


def points_to(name: str) -> Callable[[Path], None]:
    """Let the index send one tensor to another file name."""
    return index(lambda data: data["weight_map"].update({Q: name}))


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return act


def config(**changes: Any) -> Callable[[Path], None]:
    return text("config.json", json.dumps(CONFIG | changes))


def without(*keys: str) -> Callable[[Path], None]:
    return text("config.json", json.dumps({k: v for k, v in CONFIG.items() if k not in keys}))


def link(name: str, target: str) -> Callable[[Path], None]:
    """Replace a file by a link; `outside` beside the folder holds the real content."""

    def act(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder.parent / "outside").write_bytes(content)
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return act


def fifo(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return act


def a_folder(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return act


def remove(*names: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def only(**files: str) -> Callable[[Path], None]:
    """Leave nothing but these files; `__` in a key stands for a dot."""

    def act(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return act


def extra_tensor(
    name: str, dtype: str, shape: tuple[int, ...], nbytes: int
) -> Callable[[Path], None]:
    """Add one tensor, listed properly everywhere."""

    def act(folder: Path) -> None:
        found, data = layout(list(SHAPES)[:6])
        found[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + nbytes],
        }
        (folder / ONE).write_bytes(pack(found, data + bytes(nbytes)))
        index(lambda d: d["weight_map"].update({name: ONE}))(folder)

    return act


def doubled(folder: Path) -> None:
    found, data = layout(list(SHAPES)[:6])
    raw = json.dumps(found)
    entry = json.dumps({Q: found[Q]})[1:-1]
    (folder / ONE).write_bytes(pack((raw[:-1] + ", " + entry + "}").encode(), data))


def in_two_shards(folder: Path) -> None:
    found, data = layout([*list(SHAPES)[6:], Q])
    (folder / TWO).write_bytes(pack(found, data))


def renamed(name: str) -> Callable[[Path], None]:
    return header(lambda found: found.update({name: found.pop(Q)}))


def overlap(found: Header) -> None:
    names = list(found)
    size = found[names[1]]["data_offsets"][1] - found[names[1]]["data_offsets"][0]
    found[names[1]]["data_offsets"] = [0, size]


def hole(found: Header) -> None:
    last = list(found)[-1]
    first, end = found[last]["data_offsets"]
    found[last]["data_offsets"] = [first + 4, end + 4]


def too_many_tensors(folder: Path) -> None:
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(b'"t%d":' % i + entry for i in range(300_000)) + b"}"
    (folder / ONE).write_bytes(pack(raw, b""))


E, U = CheckpointError, UnsupportedModel
CASES: dict[str, tuple[Callable[[Path], None], type[MorphError], str]] = {
    # the file as a whole
    "shard-empty": (shard(b""), E, f"{ONE}.*0 bytes"),
    "shard-2-bytes": (shard(b"{}"), E, f"{ONE}.*2 bytes"),
    "shard-7-bytes": (shard(b"1234567"), E, f"{ONE}.*7 bytes"),
    "header-length-0": (shard(pack(b"", b"", 0)), E, f"{ONE}.*claims 0 bytes"),
    "header-longer-than-file": (shard(pack(b"{}", b"", 99)), E, "claims 99 bytes"),
    "header-length-2-to-63": (shard(pack(b"{}", b"", 2**63)), E, "truncated"),
    "header-length-all-ones": (shard(b"\xff" * 100), E, "truncated"),
    "header-over-16-mib": (shard(pack(b"{" + b" " * (17 << 20) + b"}", b"")), E, "exceeds"),
    "header-with-300k-empty-tensors": (too_many_tensors, E, f"{ONE}|{INDEX}"),
    "header-leading-space": (shard(pack(b" {}", b"")), E, "does not start"),
    "header-not-utf8": (shard(pack(b'{"\xff":1}', b"")), E, f"{ONE}.*UTF-8"),
    "header-not-json": (shard(pack(b"{1: 2}", b"")), E, f"{ONE}.*not valid JSON"),
    "header-too-deep": (shard(pack(b'{"a":' + b"[" * 200_000, b"")), E, f"{ONE}.*(deep|JSON)"),
    "header-is-a-list": (shard(pack(b"[]", b"")), E, "does not start"),
    "header-nan": (shard(pack(b'{"a": NaN}', b"")), E, "NaN"),
    "git-lfs-pointer": (
        shard(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"),
        E,
        "git-lfs pointer",
    ),
    "html-page": (shard(b"\n<!DOCTYPE html><html>not found</html>"), E, "HTML page"),
    "data-one-byte-short": (with_data(lambda d: d[:-1]), E, f"{ONE} is truncated.*expected \\d+"),
    "data-one-byte-long": (with_data(lambda d: d + b"x"), E, f"{ONE} has bytes after"),
    "data-half": (with_data(lambda d: d[: len(d) // 2]), E, f"{ONE}.*truncated"),
    "shard-without-tensors": (shard(pack(b"{}", b"")), E, INDEX),
    # one tensor
    "tensor-twice-same-offsets": (doubled, E, f"{Q}' appears twice"),
    "metadata-twice": (
        shard(pack(b'{"__metadata__":{},"__metadata__":{}}', b"")),
        E,
        "__metadata__' appears twice",
    ),
    "metadata-not-text": (header(lambda h: h.update(__metadata__={"a": 1})), E, "map text to text"),
    "metadata-list": (header(lambda h: h.update(__metadata__=[])), E, "map text to text"),
    "tensor-extra-field": (tensor(code="x"), E, f"{Q}.*exactly dtype"),
    "tensor-missing-field": (header(lambda h: h[Q].pop("shape")), E, f"{Q}.*exactly dtype"),
    "tensor-is-a-number": (header(lambda h: h.update({Q: 3})), E, f"{Q}.*exactly dtype"),
    "dtype-unknown": (tensor(dtype="F128"), E, f"{Q}.*unknown dtype 'F128'"),
    "dtype-number": (tensor(dtype=3), E, f"{Q}.*unknown dtype"),
    "dtype-list": (tensor(dtype=["F32"]), E, f"{Q}.*unknown dtype"),
    "dtype-of-another-size": (tensor(dtype="F64"), E, f"{Q}.*takes 512 bytes"),
    "shape-mismatch": (tensor(shape=[8, 9]), E, f"{Q}.*takes 288 bytes"),
    "shape-negative": (tensor(shape=[-8, -8]), E, f"{Q}.*no list of sizes"),
    "shape-float": (tensor(shape=[8.0, 8]), E, f"{Q}.*no list of sizes"),
    "shape-bool": (tensor(shape=[True, 64]), E, f"{Q}.*no list of sizes"),
    "shape-text": (tensor(shape="88"), E, f"{Q}.*no list of sizes"),
    "shape-overflow": (tensor(shape=[2**60, 2**60]), E, f"{Q}.*takes"),
    "shape-wraps-to-the-right-size": (tensor(shape=[2**62 + 16, 4]), E, f"{Q}.*takes"),
    "shape-beyond-64-bits": (tensor(shape=[2**70]), E, f"{Q}.*no list of sizes"),
    "shape-of-1000-ones": (tensor(shape=[1] * 1000), E, f"{Q}.*no list of sizes"),
    "offsets-reversed": (tensor(data_offsets=[448, 192]), E, f"{Q}.*span -256"),
    "offsets-negative": (tensor(data_offsets=[-256, 0]), E, f"{Q}.*no two positions"),
    "offsets-float": (tensor(data_offsets=[192.0, 448]), E, f"{Q}.*no two positions"),
    "offsets-one": (tensor(data_offsets=[192]), E, f"{Q}.*no two positions"),
    "offsets-beyond-the-file": (
        tensor(data_offsets=[10**6, 10**6 + 256]),
        E,
        f"{ONE}.*k_proj.*follows a hole",
    ),
    "tensors-overlap": (header(overlap), E, f"{ONE}.*overlaps|hole"),
    "data-with-a-hole": (header(hole), E, f"{ONE}.*follows a hole"),
    "name-with-escape": (renamed("a\x1b[2Jb"), E, r"a\\x1b\[2Jb.*control characters"),
    "name-with-newline": (renamed("a\nb"), E, r"a\\nb.*control characters"),
    "name-with-nul": (renamed("a\0b"), E, "control characters"),
    "name-right-to-left": (renamed("a\u202eb"), E, r"a\\u202eb.*control characters"),
    "name-of-10-kb": (renamed("n" * 10_000), E, "too long"),
    "name-empty": (renamed(""), E, "empty"),
    # the index
    "index-dotdot": (points_to("../outside.safetensors"), E, "no plain file name"),
    "index-absolute": (points_to("/etc/x.safetensors"), E, "no plain file name"),
    "index-backslash": (points_to("..\\x.safetensors"), E, "no plain file name"),
    "index-drive": (points_to("C:x.safetensors"), E, "no plain file name"),
    "index-share": (points_to("\\\\host\\x.safetensors"), E, "no plain file name"),
    "index-folder": (points_to("a/x.safetensors"), E, "no plain file name"),
    "index-tricky-folder": (points_to("a/../../x.safetensors"), E, "no plain file name"),
    "index-dot": (points_to("."), E, "no plain file name"),
    "index-empty-name": (points_to(""), E, "no plain file name"),
    "index-nul": (points_to("x\0.safetensors"), E, "no plain file name"),
    "index-escape": (points_to("\x1b[2J.safetensors"), E, r"\\x1b\[2J"),
    "index-long-name": (points_to("n" * 300 + ".safetensors"), E, "no plain file name"),
    "index-bin": (points_to("pytorch_model.bin"), E, "pytorch_model.bin' is no .safetensors"),
    "index-missing-shard": (points_to("model-9.safetensors"), E, "missing.*model-9.safetensors"),
    "index-wrong-shard": (points_to(TWO), E, f"{Q}.*{TWO}, which does not hold it"),
    "index-key-nowhere": (
        index(lambda d: d["weight_map"].update(ghost=ONE)),
        E,
        f"'ghost'.*{ONE}, which does not",
    ),
    "index-key-left-out": (
        index(lambda d: d["weight_map"].pop(Q)),
        E,
        f"{ONE} holds tensor '{Q}'.*not list",
    ),
    "index-key-in-two-shards": (in_two_shards, E, f"{Q}' is in two files.*{ONE}.*{TWO}"),
    "index-list": (text(INDEX, "[]"), E, f"{INDEX}.*weight_map"),
    "index-map-list": (index(lambda d: d.update(weight_map=[])), E, f"{INDEX}.*weight_map"),
    "index-map-null": (index(lambda d: d.update(weight_map=None)), E, f"{INDEX}.*weight_map"),
    "index-map-empty": (index(lambda d: d.update(weight_map={})), E, f"{INDEX}.*weight_map"),
    "index-map-numbers": (index(lambda d: d["weight_map"].update({Q: 1})), E, f"{Q}.*not a file"),
    "index-doubled-key": (
        text(INDEX, f'{{"weight_map": {{"{Q}": "{ONE}", "{Q}": "{ONE}"}}}}'),
        E,
        f"{Q}' appears",
    ),
    "index-too-big": (text(INDEX, b" " * (65 << 20)), E, f"{INDEX} has \\d+ bytes"),
    "index-too-deep": (text(INDEX, "[" * 200_000), E, f"{INDEX}.*(deep|JSON)"),
    "index-not-utf8": (text(INDEX, b"\xff\xfe{}"), E, f"{INDEX}.*UTF-8"),
    # kinds of files
    "shard-missing": (remove(TWO), E, f"1 of 2 shards are missing.*{TWO}"),
    "shard-link-outside": (link(ONE, "../outside"), E, f"{ONE} is a link that leaves"),
    "shard-link-absolute": (link(ONE, "/etc/passwd"), E, f"{ONE} is a link that leaves"),
    "shard-link-broken": (link(ONE, "nothing"), E, f"{ONE} is a broken link"),
    "shard-link-loop": (link(ONE, ONE), E, f"{ONE} is a broken link"),
    "shard-link-to-a-device": (link(ONE, "/dev/zero"), E, f"{ONE} is a link that leaves"),
    "shard-link-to-blobs-of-nobody": (link(ONE, "../../blobs/x"), E, f"{ONE} is a broken link"),
    "shard-fifo": (fifo(ONE), E, f"{ONE} is not a regular file"),
    "shard-folder": (a_folder(ONE), E, f"{ONE} is not a regular file"),
    "config-link-outside": (link("config.json", "../outside"), E, "config.json is a link"),
    "config-fifo": (fifo("config.json"), E, "config.json is not a regular file"),
    "index-fifo": (fifo(INDEX), E, f"{INDEX} is not a regular file"),
    "side-file-link-outside": (
        lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"),
        E,
        "tokenizer.json is a link",
    ),
    # folders that are no checkpoint
    "empty-folder": (only(), E, "config.json is missing. It is empty"),
    "no-config": (remove("config.json"), E, "config.json is missing"),
    "no-weights": (remove(ONE, TWO, INDEX), E, "no weights"),
    "pickle-only": (
        only(config__json=json.dumps(CONFIG), pytorch_model__bin="x"),
        E,
        "only pickle weights.*pytorch_model.bin.*Convert",
    ),
    "adapter": (
        only(adapter_config__json="{}", adapter_model__safetensors="x"),
        E,
        "LoRA adapter",
    ),
    # the config
    "config-list": (text("config.json", "[]"), E, "config.json must be a JSON object"),
    "config-not-json": (text("config.json", "{model_type: llama}"), E, "config.json: not valid"),
    "config-nan": (text("config.json", '{"model_type": "x", "a": NaN}'), E, "config.json: NaN"),
    "config-infinity": (text("config.json", '{"model_type": "x", "a": -Infinity}'), E, "Infinity"),
    "config-overflow": (text("config.json", '{"model_type": "x", "a": 1e999}'), E, "1e999"),
    "config-doubled-key": (
        text("config.json", '{"model_type": "x", "a": {"b": 1, "b": 2}}'),
        E,
        "'b' appears twice",
    ),
    "config-too-deep": (text("config.json", "[" * 200_000), E, "config.json.*(deep|JSON)"),
    "config-too-big": (text("config.json", b" " * (9 << 20)), E, "config.json has \\d+ bytes"),
    "config-huge-integer": (text("config.json", '{"a": ' + "9" * 9999 + "}"), E, "config.json"),
    "config-without-model-type": (without("model_type"), E, "no model_type"),
    "config-without-layers": (without("num_hidden_layers"), E, "num_hidden_layers is None"),
    "config-layers-text": (config(num_hidden_layers="2"), E, "num_hidden_layers is 2, not a size"),
    "config-layers-true": (config(num_hidden_layers=True), E, "num_hidden_layers is True"),
    "config-layers-zero": (config(num_hidden_layers=0), E, "num_hidden_layers is 0"),
    "config-a-billion-layers": (config(num_hidden_layers=10**9), E, "is 1000000000.*hold 2 layers"),
    "config-too-few-layers": (config(num_hidden_layers=1), E, "is 1, the weights hold 2 layers"),
    "config-kv-heads-do-not-divide": (config(num_key_value_heads=3), E, "3, which does not divide"),
    "config-kv-heads-zero": (config(num_key_value_heads=0), E, "0, which does not divide"),
    "config-head-dim-text": (config(head_dim="2"), E, "head_dim is 2, not a size"),
    "config-head-dim-negative": (config(head_dim=-2), E, "head_dim is -2, not a size"),
    "config-extra-layers-text": (
        config(num_hidden_layers=1, num_nextn_predict_layers="1"),
        E,
        "weights hold 2 layers",
    ),
    "config-other-heads": (config(head_dim=4), E, "has 4 rows; config.json says 8"),
    "config-layer-types-too-short": (
        config(layer_types=["full_attention"]),
        E,
        "layer_types has 1 entries for 2 layers",
    ),
    # quantised weights
    "quantised-by-config": (
        config(quantization_config={"quant_method": "fp8"}),
        U,
        "quantised.*quantization_config",
    ),
    "quantised-nested": (
        text(
            "config.json",
            json.dumps({"model_type": "x", "text_config": CONFIG | {"quantization_config": {}}}),
        ),
        U,
        "quantised.*quantization_config",
    ),
    "quantised-fp8": (
        extra_tensor("model.layers.0.x.weight", "F8_E4M3", (2, 2), 4),
        U,
        "x.weight is F8_E4M3",
    ),
    "quantised-int8": (
        extra_tensor("model.layers.0.x.weight", "I8", (2, 2), 4),
        U,
        "x.weight is I8",
    ),
    "quantised-gptq": (
        extra_tensor("model.layers.0.x.qweight", "I32", (1, 1), 4),
        U,
        "x.qweight is I32",
    ),
    "quantised-scales": (
        extra_tensor("model.layers.0.x.weight_scale_inv", "F32", (1,), 4),
        U,
        "weight_scale_inv",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_refused(tmp_path: Path, case: str) -> None:
    folder = good(tmp_path / "in")
    damage, error, message = CASES[case]
    damage(folder)
    before = hashes(tmp_path)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        Checkpoint.open(folder)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 2000
    assert isinstance(caught.value, InputFileError) and caught.value.exit_code == 3
    assert hashes(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == sorted({"in"} | set(os.listdir(tmp_path)) & {"outside"})


def test_the_untouched_folder_is_accepted(tmp_path: Path) -> None:
    for sharded in (True, False):
        assert Checkpoint.open(good(tmp_path / str(sharded), sharded)).notes == ()


@pytest.mark.parametrize(
    "path", ["missing", "in/config.json", "Qwen/Qwen3-0.6B", "a\0b", "\x1b[2J", "n" * 5000]
)
def test_paths_that_are_no_folder(tmp_path: Path, path: str) -> None:
    good(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        Checkpoint.open(tmp_path / path)
    assert str(caught.value).isprintable()


def test_inspect_refuses_the_same_files(tmp_path: Path) -> None:
    folder = good(tmp_path / "in")
    with_data(lambda d: d[:-1])(folder)
    with pytest.raises(CheckpointError, match=ONE):
        inspect(folder)


def test_a_side_file_that_is_a_pipe_or_a_linked_folder_is_left_out(tmp_path: Path) -> None:
    folder = good(tmp_path / "in")
    os.mkfifo(folder / "pipe.txt")
    (folder / "linked").symlink_to("/usr")
    found = Checkpoint.open(folder)
    assert found.other_files == ()
    assert set(found.ignored_files) == {"linked", "pipe.txt"}


def test_permission_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good(tmp_path / "in")
    real = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(TWO):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{TWO} cannot be read: Permission denied"):
        Checkpoint.open(folder)


def test_a_failing_disk_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good(tmp_path / "in")
    found = Checkpoint.open(folder)

    def fail(*args: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(CheckpointError, match=f"{ONE} cannot be read: Input/output error"):
        found.read(Q)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    folder = good(tmp_path / "in")
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')"
    (folder / "modeling_x.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(
        b"cbuiltins\nexec\n(S" + repr(code).encode() + b"\ntR."
    )
    (folder / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_file="modeling_x.py")(folder)
    found = Checkpoint.open(folder)
    write_checkpoint(tmp_path / "out", source=found, config=found.config, durable=False)
    assert not canary.exists()
    copied = set(os.listdir(tmp_path / "out"))
    assert "chat_template.jinja" in copied
    assert not copied & {"modeling_x.py", "pytorch_model.bin"}
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def mutants(count: int) -> list[bytes]:
    """Good shards with a few bytes of length or header changed."""
    rng = np.random.default_rng(1)
    base = bytearray(pack(*layout(list(SHAPES))))
    length = int.from_bytes(base[:8], "little")
    letters = b'{}[]",:0123456789-.eFUBI816324 \x00\xff\\null'
    found = []
    for _ in range(count):
        data = bytearray(base)
        for _ in range(rng.integers(1, 4)):
            data[int(rng.integers(0, 8 + length))] = letters[int(rng.integers(0, len(letters)))]
        found.append(bytes(data))
    return found


def test_what_we_accept_the_safetensors_library_accepts(tmp_path: Path) -> None:
    from safetensors import SafetensorError, deserialize

    folder = good(tmp_path / "in", sharded=False)
    accepted = refused = 0
    for data in mutants(800):
        (folder / "model.safetensors").write_bytes(data)
        try:
            Checkpoint.open(folder, strict=False)
        except InputFileError as error:
            refused += 1
            assert str(error).isprintable()
            continue
        accepted += 1
        try:
            deserialize(data)
        except SafetensorError as error:
            pytest.fail(f"accepted what safetensors refuses: {error}: {data[:600]!r}")
    assert refused > 500 and accepted > 10


def test_a_mutated_index_or_config_never_surprises(tmp_path: Path) -> None:
    folder = good(tmp_path / "in")
    rng = np.random.default_rng(2)
    for name in (INDEX, "config.json"):
        base = (folder / name).read_bytes()
        for _ in range(150):
            data = bytearray(base)
            for _ in range(3):
                data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
            (folder / name).write_bytes(bytes(data))
            try:
                Checkpoint.open(folder)
            except InputFileError as error:
                assert str(error).isprintable()
        (folder / name).write_bytes(base)
    assert Checkpoint.open(folder).notes == ()


def test_kept_equal_sees_a_single_changed_bit(tmp_path: Path) -> None:
    one, two = good(tmp_path / "one"), good(tmp_path / "two")
    data = bytearray((two / TWO).read_bytes())
    data[-1] ^= 1
    (two / TWO).write_bytes(bytes(data))
    equal, changed, new = kept_equal(Checkpoint.open(one), Checkpoint.open(two))
    assert changed == ["lm_head.weight"] and len(equal) == len(SHAPES) - 1 and new == []
