"""`morph restore` stops before it writes: every case has its exit code, and says what to do."""

from __future__ import annotations

import json
import os
import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from morph import restore
from morph.checkpoint import Checkpoint
from morph.errors import MorphError

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_restoring.py"))))
tiny = kit.tiny
Q1 = "model.layers.1.self_attn.q_proj.weight"
K1 = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """PRE and POST of a Qwen3-Next: layers 1 and 3 are softmax, 0 and 2 linear."""
    found: tuple[Path, Path] = kit.pair(tmp_path, shards=1)
    return found


def configure(folder: Path, **changes: Any) -> None:
    """Set keys of a config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the one weight file of a folder after `edit` changed its tensors in place."""
    tensors = kit.read(folder)
    edit(tensors)
    kit.write_file(folder / "model.safetensors", tensors)


def filled(tensors: dict[str, Any], name: str, bits: int, at: int | slice = slice(None)) -> None:
    """Set 16 bit numbers of a tensor to a bit pattern."""
    array = np.frombuffer(tensors[name].data, "<u2").copy()
    array[at] = bits
    tensors[name] = tensors[name]._replace(data=array.tobytes())


def refuse(pre: Path, post: Path, code: int, *words: str, options: tuple[str, ...] = ()) -> str:
    """Restore, which must stop with this exit code, these words, and nothing written."""
    before = {f: kit.digests(f) for f in {pre, post} if f.is_dir()}
    out = post.parent / "refused-out"
    found = kit.morph("restore", pre, post, out, *options)
    assert found.code == code, (found.code, found.err)
    assert not out.exists() and not list(post.parent.glob(".refused-out*"))
    assert "Traceback" not in found.err
    last = [line for line in found.err.splitlines() if line.startswith("error:")]
    assert len(last) == 1
    for word in words:
        assert word in last[0], last[0]
    assert {f: kit.digests(f) for f in before} == before
    return last[0]


def passes(pre: Path, post: Path, *options: str) -> list[str]:
    """Plan the same with options that allow it, and return the notes."""
    found = kit.morph("restore", pre, post, post.parent / "dry", "--dry-run", "--json", *options)
    assert found.code == 0, found.err
    notes: list[str] = json.loads(found.out)["notes"]
    return notes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "exct"), ("'exct'", "Did you mean 'exact'?", "ridge", "interpolate")),
        (("--rho", "0.1"), ("--rho belongs to --method ridge", "exact")),
        (("--alpha", "0.5"), ("--alpha belongs to --method interpolate",)),
        (("--method", "ridge"), ("needs --rho",)),
        (("--method", "ridge", "--rho", "-1"), ("--rho is -1", "at least 0")),
        (("--method", "ridge", "--rho", "nan"), ("--rho is nan",)),
        (("--method", "ridge", "--rho", "inf"), ("--rho is inf",)),
        (("--method", "ridge", "--rho", "1", "--alpha", "1"), ("--alpha belongs to",)),
        (("--method", "ridge", "--rho", "1", "--include", "q"), ("--include must name q and k",)),
        (("--method", "interpolate"), ("needs --alpha", "0 to 1")),
        (("--method", "interpolate", "--alpha", "1.5"), ("--alpha is 1.5", "0 to 1")),
        (("--include", "q,kk"), ("'kk'", "Did you mean 'k'?", "gate")),
        (("--include", "bias"), ("names only bias",)),
        (("--include", ","), ("is empty",)),
        (("--include", "q,q"), ("names q twice",)),
        (("--allow", "geometri"), ("'geometri'", "'geometry'", "widening")),
        (("--budget", "1/2"), ("--budget says how much of a scores.json",)),
        (("--layers", ""), ("--layers is empty",)),
        (("--layers", "some"), ("'some' is no layer", "1, 3")),
        (("--layers", "ful"), ("Did you mean 'full'", "1, 3")),
        (("--layers", "2"), ("layer 2 has no softmax attention", "1, 3")),
        (("--layers", "9"), ("layer 9 does not exist", "1, 3")),
        (("--layers", "gone.json"), ("gone.json cannot be read",)),
        (("--copy", "reflink"), ("--copy", "auto, copy, link")),
    ],
)
def test_options_that_cannot_be_meant(
    options: tuple[str, ...], words: tuple[str, ...], pair: tuple[Path, Path]
):
    refuse(*pair, 2, *words, options=options)


def test_a_part_that_the_model_does_not_have_is_named(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama")
    for part in ("gate", "norm"):
        refuse(pre, post, 2, f"--include {part}", "q, k", options=("--include", f"q,k,{part}"))


def test_paths_that_are_no_two_checkpoints(pair: tuple[Path, Path], tmp_path: Path):
    _, post = pair
    refuse(tmp_path / "absent", post, 3, "absent", "neither a local folder nor a Hub id")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", post, 3, "config.json is missing")
    refuse(post / "tokenizer.json", post, 3, "is a file")
    refuse(post, post, 2, "same folder")
    (tmp_path / "link").symlink_to(post)
    refuse(tmp_path / "link", post, 2, "same folder", "before its fine-tuning")


def test_out_is_never_an_input_or_in_one(pair: tuple[Path, Path], tmp_path: Path):
    pre, post = pair
    (tmp_path / "link").symlink_to(post)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "notes.txt").write_text("mine")
    for out in (pre, post, post / "out", tmp_path, tmp_path / "link", tmp_path / "busy"):
        for force in ((), ("--force",)):
            found = kit.morph("restore", pre, post, out, *force)
            assert found.code == 2, (out, found.err)
    assert kit.morph("restore", pre, post, tmp_path / "no" / "out").code == 2
    cache = tmp_path / "models--a--b"
    cache.mkdir()
    assert kit.morph("restore", pre, post, cache / "out").code == 2
    assert (tmp_path / "busy" / "notes.txt").read_text() == "mine"


def test_force_replaces_an_earlier_result_whole(pair: tuple[Path, Path], tmp_path: Path):
    pre, post = pair
    out = kit.restored(pre, post, tmp_path / "out", include=("q",))
    (out / "stale.txt").write_text("old")
    assert kit.morph("restore", pre, post, out).code == 2
    assert kit.morph("restore", pre, post, out, "--force").code == 0
    assert kit.data(out) == kit.expected(pre, post)
    assert not (out / "stale.txt").exists()


def broken(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    if how == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "html":
        file.write_text("<!DOCTYPE html><html>not found</html>")
    elif how == "short":
        file.write_bytes(raw[:-2])
    elif how == "long":
        file.write_bytes(raw + b"\0")
    elif how == "header":
        file.write_bytes(struct.pack("<Q", 1 << 40) + raw[8:])
    elif how == "twice":
        name = json.dumps(K1)
        file.write_bytes(raw.replace(json.dumps(Q1).encode(), name.encode()))
    elif how == "dtype":
        file.write_bytes(raw.replace(b'"BF16"', b'"BF17"', 1))
    elif how == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif how == "config":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("lfs", "git-lfs pointer"),
        ("html", "HTML page"),
        ("short", "truncated"),
        ("long", "after the last tensor"),
        ("header", "truncated"),
        ("twice", "twice"),
        ("dtype", "BF17"),
        ("pickle", "pickle"),
        ("config", "not valid JSON"),
    ],
)
def test_broken_files(how: str, word: str, which: str, pair: tuple[Path, Path]):
    broken(pair[which == "post"], how)
    refuse(*pair, 3, word)


def test_a_wrong_index_can_be_set_aside(tmp_path: Path):
    pre, post = kit.pair(tmp_path, shards=2)
    path = post / "model.safetensors.index.json"
    right = json.loads(path.read_text())
    index = json.loads(path.read_text())
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[1]]
    path.write_text(json.dumps(index))
    refuse(pre, post, 3, names[0], "--allow index")
    out = tmp_path / "out"
    assert kit.morph("restore", pre, post, out, "--allow", "index").code == 0
    assert kit.data(out) == kit.expected(pre, post)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == right["weight_map"]
    path.write_text(json.dumps(right))
    (post / "model-00002-of-00002.safetensors").unlink()
    error = refuse(pre, post, 3, "1 of 2 shards are missing", "download complete?")
    assert "--allow" not in error


def test_pre_lacks_a_tensor(pair: tuple[Path, Path]):
    pre, post = pair
    change(pre, lambda t: t.update({"model.layers.1.self_attn.q_prj.weight": t.pop(Q1)}))
    refuse(pre, post, 4, f"has no tensor '{Q1}'", "Did you mean 'model.layers.1.self_attn.q_prj")


def test_pre_names_a_tensor_in_another_way(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama", shards=1)
    change(pre, lambda t: [t.update({n.replace("model.", "net.", 1): t.pop(n)}) for n in list(t)])
    refuse(pre, post, 3, "net.")
    wide = {n.replace("net.", "language_model.model.", 1): t for n, t in kit.read(pre).items()}
    both = {**wide, **{n.replace("language_model.", "", 1): t for n, t in wide.items()}}
    kit.write_file(pre / "model.safetensors", both)
    refuse(pre, post, 3, "language_model.model.")


def test_shapes_differ(tmp_path: Path):
    _, post = kit.pair(tmp_path, "llama", shards=1)
    config = tiny.config("llama")
    config["num_attention_heads"] *= 2
    shapes = tiny.shapes("llama")
    heads = {n: (2 * s[0], *s[1:]) for n, s in shapes.items() if ".q_proj." in n}
    wide = tiny.write_tensors(tmp_path / "wide", config, {**shapes, **heads})
    refuse(wide, post, 4, ".self_attn.q_proj.weight", "num_attention_heads", "in POST")


def test_types_differ(pair: tuple[Path, Path]):
    _, post = pair
    half = tiny.write(post.parent / "half", "qwen3_next", 0, 1, "F16")
    refuse(half, post, 4, "F16 in PRE and BF16 in POST", "neither")
    error = refuse(half, post, 4, options=("--allow", "widening"))
    assert "--allow" not in error


def test_the_dense_teacher_is_told_by_its_layers(pair: tuple[Path, Path], tmp_path: Path):
    pre, post = pair
    dense = {
        **json.loads((post / "config.json").read_text()),
        "layer_types": ["full_attention"] * 4,
    }
    tensors = kit.read(pre)
    for name in [n for n in tensors if ".linear_attn." in n]:
        tensors.pop(name)
    for name in [n for n in tensors if n.startswith("model.layers.1.self_attn.")]:
        for layer in "02":
            tensors[name.replace(".1.", f".{layer}.", 1)] = tensors[name]
    teacher = kit.save(tmp_path / "teacher", dense, tensors)
    refuse(teacher, post, 4, "layer 0 has full attention in PRE and linear in POST", "dense")
    source = {"name": "x", "sha256": Checkpoint.open(teacher, strict=False).fingerprint}
    (post / "morph.json").write_text(json.dumps({"source": source}))
    refuse(teacher, post, 4, "the model that POST was converted from", "morph.json")


def test_the_recorded_teacher_is_refused_where_its_layers_look_alike(pair: tuple[Path, Path]):
    """Attention beside a linear mixer is softmax attention too; only the record tells."""
    pre, post = pair
    record = {"source": {"name": "pre", "sha256": Checkpoint.open(pre, strict=False).fingerprint}}
    (post / "morph.json").write_text(json.dumps(record))
    refuse(pre, post, 4, "is the model that POST was converted from", "--allow unrelated")
    assert any("converted from" in n for n in passes(pre, post, "--allow", "unrelated"))


def test_another_parent_than_the_recorded_one_is_told(pair: tuple[Path, Path]):
    pre, post = pair
    ours = Checkpoint.open(pre, strict=False).fingerprint
    for parent, told in ((ours, False), ("0" * 64, True)):
        (post / "morph.json").write_text(json.dumps({"pre": {"sha256": parent}}))
        assert told == any("names another checkpoint" in note for note in passes(pre, post))


def test_layers_differ_in_number_or_kind(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "gemma3_text", shards=1)
    config = tiny.config("gemma3_text")
    types = list(config["layer_types"])
    types[1] = "sliding_attention"
    configure(pre, layer_types=types)
    refuse(pre, post, 4, "layer 1 has sliding attention in PRE and full in POST")
    shallow = {n: t for n, t in kit.read(pre).items() if ".layers.3." not in n}
    less = {**config, "num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    short = kit.save(tmp_path / "short", less, shallow)
    refuse(short, post, 4, "PRE has 3 layers, POST 4")


@pytest.mark.parametrize(
    ("model_type", "before", "after", "word"),
    [
        (
            "llama",
            {"rope_theta": 1e4, "rope_parameters": None},
            {"rope_theta": 5e5, "rope_parameters": None},
            "rope_theta is 10000.0 in PRE and 500000.0 in POST",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            {
                "rope_parameters": None,
                "rope_theta": 1e4,
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            "rope_type is default in PRE and",
        ),
        ("gemma2", {}, {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ("gemma2", {}, {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping"),
        ("gemma2", {}, {"sliding_window": 5}, "sliding_window"),
    ],
)
def test_geometry_differs(
    model_type: str, before: dict[str, Any], after: dict[str, Any], word: str, tmp_path: Path
):
    pre, post = kit.pair(tmp_path, model_type, shards=1)
    configure(pre, **before)
    configure(post, **after)
    refuse(pre, post, 4, word, "--allow geometry")
    assert any(word in note for note in passes(pre, post, "--allow", "geometry"))


def test_spellings_of_one_geometry_are_equal(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama", shards=1)
    rope = {"rope_type": "linear", "factor": 2.0}
    configure(pre, rope_parameters={**rope, "rope_theta": 10000})
    scaling = {"type": "linear", "factor": 2}
    configure(post, rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    passes(pre, post)


UNUSED = {"sliding_window": 9, "use_sliding_window": False}


@pytest.mark.parametrize(
    ("model_type", "before", "after"),
    [
        ("qwen2", UNUSED, UNUSED | {"sliding_window": None}),
        ("qwen3_moe", UNUSED, UNUSED | {"sliding_window": None}),
        ("llama", {"head_dim": None, "hidden_size": 60}, {"hidden_size": 60}),
        ("smollm3", {"no_rope_layers": None}, {"no_rope_layers": [1, 1, 1, 0]}),
        ("glm4", {"rope_parameters": None, "rope_theta": 100, "partial_rotary_factor": 0.5}, {}),
    ],
)
def test_a_config_that_transformers_saved_anew_is_the_same_geometry(
    model_type: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path
):
    """Saving writes what null meant, and null for a window that is not in use."""
    pre, post = kit.pair(tmp_path, model_type, shards=1)
    saved = json.loads((post / "config.json").read_text())
    for folder, changes in ((pre, before), (post, after)):
        (folder / "config.json").write_text(json.dumps(saved | changes))  # null stays null
    passes(pre, post)


def test_positions_on_another_share_of_each_head(tmp_path: Path):
    """Neither spelling stands in both configs."""
    pre, post = kit.pair(tmp_path, "glm4", shards=1)
    configure(pre, rope_parameters=None, rope_theta=100, partial_rotary_factor=0.25)
    refuse(pre, post, 4, "rotary positions on 3 of them", "on 6 of them", "--allow geometry")
    assert any("on 6 of them" in note for note in passes(pre, post, "--allow", "geometry"))


def test_heads_of_another_size_in_the_same_shape(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen2", shards=1)
    config = tiny.config("qwen2")
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = {"num_attention_heads": config["num_attention_heads"] // 2, "head_dim": 2 * dim}
    kv = config["num_key_value_heads"] // 2
    configure(pre, **heads, num_key_value_heads=kv)
    refuse(pre, post, 4, "num_attention_heads is", "--allow geometry")


@pytest.mark.parametrize("without", ["pre", "post"])
def test_norms_in_one_of_the_two(without: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3", shards=1)
    folder = tmp_path / without

    def strip(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(("q_norm.weight", "k_norm.weight"))]:
            del tensors[name]

    change(folder, strip)
    refuse(pre, post, 4, "layer", "norm of k", "--allow geometry")
    assert any("another function" in n for n in passes(pre, post, "--allow", "geometry"))


def test_another_vocabulary_is_told(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3", shards=1)
    assert not any("vocab_size" in note for note in passes(pre, post))
    configure(pre, vocab_size=12345)
    assert any("vocab_size is 12345 in PRE" in note for note in passes(pre, post))


@pytest.mark.parametrize("which", ["pre", "post"])
def test_layer_types_that_do_not_cover_the_layers(which: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama", shards=1)
    configure(tmp_path / which, layer_types=["full_attention"])
    refuse(pre, post, 3, f"/{which}", "layer_types has 1 entries")


@pytest.mark.parametrize("which", ["pre", "post"])
def test_a_wrong_config_is_named_by_its_folder(which: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama", shards=1)
    configure(tmp_path / which, num_key_value_heads=4)
    refuse(pre, post, 3, f"/{which}", "num_key_value_heads")


def test_queries_that_do_not_resemble_each_other(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3", shards=1)
    other = tiny.write(tmp_path / "other", "qwen3", 77, 1)
    refuse(other, post, 4, "the cosine between sampled q rows", "--allow unrelated")
    passes(other, post, "--allow", "unrelated")

    def reset(tensors: dict[str, Any]) -> None:
        tensors[Q1] = kit.read(other)[Q1]

    change(post, reset)  # one layer alone is told, not refused
    assert any("1 layers have little left" in note for note in passes(pre, post))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_the_cosine_is_that_of_the_numbers(dtype: str, tmp_path: Path):
    pre, _ = kit.pair(tmp_path, "qwen2", 1, dtype)
    tensors = kit.read(pre)
    width = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}[dtype]

    def scaled(factor: float) -> Path:
        made = {}
        for name, tensor in tensors.items():
            values = tensor.numbers * factor
            if dtype == "BF16":
                data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
            else:
                data = values.astype(f"<f{width}").tobytes()
            made[name] = tensor._replace(data=data)
        return kit.save(tmp_path / f"x{factor}", tiny.config("qwen2"), made)

    plan = restore.plan(pre, scaled(2.0))
    assert min(plan.cosines.values()) == pytest.approx(1)
    assert plan.drift["q"] == pytest.approx(1)
    plan = restore.plan(pre, scaled(-2.0), restore.Options(allow=("unrelated",)))
    assert max(plan.cosines.values()) == pytest.approx(-1)
    assert plan.drift["k"] == pytest.approx(3)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_pre_holds_no_number(bits: int, at: int, pair: tuple[Path, Path]):
    pre, post = pair
    change(pre, lambda t: filled(t, K1, bits, at))
    refuse(pre, post, 3, K1, "holds NaN or infinity", "--allow nonfinite")
    out = kit.restored(pre, post, post.parent / "out", allow=("nonfinite", "unrelated"))
    assert kit.data(out) == kit.expected(pre, post)


def test_numbers_of_every_type_are_told_from_what_is_none():
    from morph.restore._numbers import has_nonfinite

    for dtype, kind in (("F16", "<f2"), ("F32", "<f4"), ("F64", "<f8")):
        most = np.array([np.finfo(kind).max, -np.finfo(kind).max, 0.0, -0.0, 1e-3] * 7, kind)
        assert not has_nonfinite(dtype, most.tobytes())
        for bad in (np.nan, np.inf, -np.inf):
            for at in (0, 13, 34):
                wrong = most.copy()
                wrong[at] = bad
                assert has_nonfinite(dtype, wrong.tobytes())
    large = np.full(9, 0x7F7F, "<u2")  # the largest bfloat16, and an odd byte of it elsewhere
    assert not has_nonfinite("BF16", large.tobytes())
    assert not has_nonfinite("BF16", np.array([0x7F00, 0x0080], "<u2").tobytes())
    assert not has_nonfinite("I8", b"\xff" * 9)
    assert has_nonfinite("F8_E4M3", b"\x00\x7f") and not has_nonfinite("F8_E4M3", b"\x7e")
    assert has_nonfinite("F8_E5M2", b"\x7c") and has_nonfinite("F8_E4M3FNUZ", b"\x80")


def wide(folder: Path) -> Path:
    """Write a llama of one layer whose projections are larger than what samples see."""
    config = {**tiny.config("llama"), "hidden_size": 512, "intermediate_size": 8, "vocab_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8}
    at = "model.layers.0."
    shapes = {f"{at}self_attn.{p}_proj.weight": (512, 512) for p in "qkvo"}
    shapes |= {f"{at}mlp.{p}_proj.weight": (8, 512) for p in ("gate", "up")}
    shapes |= {f"{at}mlp.down_proj.weight": (512, 8), "model.norm.weight": (512,)}
    shapes["model.embed_tokens.weight"] = (8, 512)
    found: Path = tiny.write_tensors(folder, {**config, "head_dim": 64}, shapes)
    return found


def test_what_samples_miss_is_found_before_anything_is_written(tmp_path: Path):
    pre = wide(tmp_path / "pre")
    post = kit.copy_tuned(pre, tmp_path / "post")
    name = "model.layers.0.self_attn.k_proj.weight"
    change(pre, lambda t: filled(t, name, 0x7FC0, 77_777))
    plan = restore.plan(pre, post)
    with pytest.raises(MorphError, match="holds NaN or infinity"):
        restore.write(plan, tmp_path / "out")
    refuse(pre, post, 3, name, "holds NaN")


def test_pre_was_never_written(pair: tuple[Path, Path]):
    pre, post = pair
    change(pre, lambda t: filled(t, K1, 0))
    refuse(pre, post, 3, K1, "zero everywhere", "never written")
    change(pre, lambda t: filled(t, K1, 0x3F80, -1))  # one number is enough
    passes(pre, post)
    bias = "model.layers.1.self_attn.k_proj.bias"  # a bias may be zero
    change(pre, lambda t: filled(t, bias, 0))
    passes(pre, post)


def test_nothing_to_restore(pair: tuple[Path, Path], tmp_path: Path):
    pre, post = pair
    config = json.loads((pre / "config.json").read_text())
    twin = kit.save(tmp_path / "twin", config, kit.read(pre))
    refuse(pre, twin, 4, "the same weights", "--allow unchanged")
    passes(pre, twin, "--allow", "unchanged")
    same = {n: kit.read(pre)[n] for n in kit.read(pre) if ".q_proj." in n or ".k_proj." in n}
    change(post, lambda t: t.update(same))
    refuse(pre, post, 4, "q, k of the chosen layers are byte-equal", "LoRA without q and k?")
    passes(pre, post, "--allow", "unchanged")


def test_one_changed_number_that_samples_miss_is_enough(tmp_path: Path):
    """Equality is proved, byte by byte, before it stops a restore."""
    pre = wide(tmp_path / "pre")
    tensors = kit.read(pre)
    filled(tensors, "model.layers.0.self_attn.k_proj.weight", 0x3F80, 77_777)
    config = json.loads((pre / "config.json").read_text())
    post = kit.save(tmp_path / "one", config, tensors)
    out = kit.restored(pre, post, tmp_path / "out")
    assert kit.data(out) == kit.data(pre) != kit.data(post)


def test_equal_values_are_told(pair: tuple[Path, Path]):
    pre, post = pair
    same = {n: t for n, t in kit.read(pre).items() if ".v_proj." in n}
    change(post, lambda t: t.update(same))
    assert any("v of the chosen layers is the same" in note for note in passes(pre, post))
    change(post, lambda t: t.update({Q1: kit.read(pre)[Q1]}))
    assert any(note.startswith("1 of 8 tensors are the same") for note in passes(pre, post))


def test_tied_embeddings_that_differ(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3", shards=1)
    configure(post, tie_word_embeddings=True)
    refuse(pre, post, 3, "lm_head.weight", "tie_word_embeddings", "--allow ties")
    passes(pre, post, "--allow", "ties")
    change(post, lambda t: t.pop("lm_head.weight"))
    passes(pre, post)


def quantise(folder: Path, out: Path, scheme: dict[str, Any], scale: float) -> Path:
    """Write a folder whose projections are float8 with a scale each, without any arithmetic."""
    config = json.loads((folder / "config.json").read_text())
    made = {}
    for name, tensor in kit.read(folder).items():
        if name.endswith("_proj.weight"):
            data = bytes(b & 0x77 for b in tensor.data[::2])
            made[name] = kit.Tensor("F8_E4M3", tensor.shape, data)
            one = np.full(1, scale, "<f4").tobytes()
            made[f"{name}_scale"] = kit.Tensor("F32", (1,), one)
        else:
            made[name] = tensor
    found: Path = kit.save(out, {**config, "quantization_config": scheme}, made)
    return found


def test_quantised_weights_go_with_their_scales_or_not_at_all(tmp_path: Path):
    plain, tuned = kit.pair(tmp_path, "qwen3", shards=1)
    scheme = {"quant_method": "fp8", "weight_block_size": None}
    pre = quantise(plain, tmp_path / "a", scheme, 1.0)
    post = quantise(tuned, tmp_path / "b", scheme, 2.0)
    out = kit.restored(pre, post, tmp_path / "out")
    a, b, made = (kit.read(f) for f in (pre, post, out))
    for name in made:
        source = a if ".q_proj." in name or ".k_proj." in name else b
        assert made[name] == source[name]
    advice = "Restore before quantising"
    refuse(pre, tuned, 4, "PRE (a) is quantised", advice)
    refuse(plain, post, 4, "POST (b) is quantised", advice)
    other = quantise(tuned, tmp_path / "c", {"quant_method": "fp8", "x": 1}, 2.0)
    refuse(pre, other, 4, "quantization_config differs", advice)
    ridge = ("--method", "ridge", "--rho", "1")
    refuse(pre, post, 4, "needs numbers", advice, options=ridge)
    (tmp_path / "gates").mkdir()
    folders = kit.pair(tmp_path / "gates", "qwen3_next", shards=1)
    halves = [quantise(f, tmp_path / f"g{i}", scheme, 1.0) for i, f in enumerate(folders)]
    refuse(*halves, 4, "only some rows", advice)


def test_packed_weights_without_known_rows_are_exchanged_whole(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama", shards=1)
    module = "model.layers.0.self_attn.q_proj"

    def pack(tensors: dict[str, Any]) -> None:
        found = tensors.pop(f"{module}.weight")
        tensors[f"{module}.qweight"] = kit.Tensor("I32", (len(found.data) // 4,), found.data)
        tensors[f"{module}.g_idx"] = kit.Tensor("I32", (4,), bytes(range(16)))

    for folder in (pre, post):
        configure(folder, quantization_config={"quant_method": "gptq"})
        change(folder, pack)
    out = kit.restored(pre, post, tmp_path / "out")
    assert kit.read(out)[f"{module}.qweight"] == kit.read(pre)[f"{module}.qweight"]
    change(post, lambda t: t.update({f"{module}.g_idx": kit.Tensor("I32", (2,), bytes(8))}))
    refuse(pre, post, 4, "g_idx", "Restore before quantising")
    scores = {"selector": "x", "model_type": "llama", "granularity": "head", "unit": "x"}
    scores["values"] = [[1.0] * 6] * 4
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    options = ("--layers", str(tmp_path / "scores.json"))
    refuse(pre, post, 4, "only some rows", options=options)
    (tmp_path / "fused").mkdir()
    folders = kit.pair(tmp_path / "fused", "phi3", shards=1)
    module = "model.layers.0.self_attn.qkv_proj"
    for folder in folders:
        configure(folder, quantization_config={"quant_method": "gptq"})
        change(folder, pack)
    refuse(*folders, 3, "cannot be told apart")


def test_architectures_that_nobody_knows_list_candidates(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "llama", shards=1)
    for folder in (pre, post):
        configure(folder, model_type="lama3")
    refuse(pre, post, 3, "'lama3' has no layout", "model.layers.0", "llama")


def test_a_fresh_hybrid_as_post_is_asked_about(pair: tuple[Path, Path]):
    pre, post = pair
    question = "is the order PRE POST right?"
    (post / "morph.json").write_text('{"plan": {}}')
    assert question in " ".join(restore.plan(pre, post).notes)
    (pre / "morph.json").write_text('{"plan": {}}')
    assert question not in " ".join(restore.plan(pre, post).notes)


def test_morph_json_that_is_none(pair: tuple[Path, Path]):
    pre, post = pair
    (post / "morph.json").write_text("[]")
    refuse(pre, post, 3, "morph.json must be a JSON object")
    (post / "morph.json").write_text('{"restored": 3}')
    refuse(pre, post, 3, "'restored' must be a list")


def test_pre_that_changes_meanwhile_is_noticed(pair: tuple[Path, Path]):
    pre, post = pair
    for method in ({}, {"method": "interpolate", "alpha": 0.5}):
        plan = restore.plan(pre, post, restore.Options(allow=("nonfinite",), **method))
        os.utime(pre / "model.safetensors", ns=(1, 1 + len(method)))
        with pytest.raises(MorphError, match="was changed"):
            restore.write(plan, post.parent / "out", durable=False)
        for splice in plan.splices():
            if callable(splice.data):
                with pytest.raises(MorphError, match="was changed"):
                    splice.data()
        assert not (post.parent / "out").exists()


def test_no_space(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = kit.morph("restore", *pair, pair[1].parent / "out")
    assert found.code == 5 and "1000 bytes free" in found.err, found.err
