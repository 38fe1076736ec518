"""`morph verify`: manifests, structure, folders that should be equal, and restored ones."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from morph import cli, pipeline, restore
from morph.checkpoint import Weights
from morph.errors import CheckpointError, MismatchError, UsageError, VerificationFailed
from morph.pipeline import _diff, _verify_files

pairs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_pairs.py"))))
CONFIG, HIDDEN = pairs.CONFIG, pairs.HIDDEN
hybrid, moved, save = pairs.hybrid, pairs.moved, pairs.save
verify = pipeline.verify_command
Q = "model.layers.3.self_attn.q_proj.weight"
SIDE = {"tokenizer.json": "{}", "chat_template.jinja": "x", "deep/notes.txt": "n"}


def beside(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def pre(tmp_path: Path) -> Path:
    return beside(save(tmp_path / "pre", hybrid(), CONFIG, 2), SIDE)


@pytest.fixture
def post(tmp_path: Path) -> Path:
    return beside(save(tmp_path / "post", moved(hybrid(), "layers"), CONFIG, 3), SIDE)


def flip(folder: Path, tensor: str, byte: int, bit: int = 1) -> None:
    """Change one bit of a tensor in its file."""
    info = Weights.open(folder).tensors[tensor]
    with info.file.open("r+b") as file:
        file.seek(info.start + byte)
        value = file.read(1)[0]
        file.seek(info.start + byte)
        file.write(bytes([value ^ bit]))


def morph(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(x) for x in arguments])
        except SystemExit as done:
            return int(done.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("main returned")


# --- A folder by itself -------------------------------------------------------------------------


def test_without_a_manifest_only_structure_is_checked_and_that_is_said(pre: Path) -> None:
    told = verify(pre)
    assert not told["bytes_verified"] and told["tensors"] == len(hybrid())
    assert told["layers"] == "6 linear, 2 full (qwen3_next)"
    assert told["side_files"] == len(SIDE)
    code, out, err = morph("verify", pre)
    assert code == 0 and "none: bytes are not verifiable" in out
    assert err.splitlines()[-1] == f"next: morph inspect {pre}"


def test_with_a_manifest_every_byte_counts(pre: Path, post: Path, tmp_path: Path) -> None:
    restore.write(restore.plan(pre, post), tmp_path / "out")
    told = verify(tmp_path / "out")
    assert told["bytes_verified"]
    assert told["restored"] == "q, k of layers 3, 7 from pre (exact)"
    flip(tmp_path / "out", "lm_head.weight", 5)
    with pytest.raises(VerificationFailed, match="expected sha256"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("name", [".out.partial-1a2b3c4d", ".out.partial-77-1a2b3c4d", ".o.old-1f"])
def test_what_a_write_left_is_no_result(pre: Path, tmp_path: Path, name: str) -> None:
    folder = pre.rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="no result"):
        verify(folder)
    with contextlib.chdir(folder), pytest.raises(CheckpointError, match="no result"):
        verify(".")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "1 of 2 shards are missing"),
        (lambda f: (f / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 5})), "rows"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: flip(f, "lm_head.weight", -20), "model-0000"),
    ],
    ids=["no-config", "no-shard", "other-heads", "broken-config", "broken-header"],
)
def test_a_broken_folder(pre: Path, change: Callable[[Path], object], says: str) -> None:
    """The last change hits the header, which ends where the first tensor starts."""
    if says == "model-0000":
        first = min(Weights.open(pre).tensors.items(), key=lambda item: item[1].start)[0]
        flip(pre, first, -20, 0x80)
    else:
        change(pre)
    with pytest.raises(CheckpointError, match=says):
        verify(pre)


def test_an_unknown_architecture_is_no_fault_but_said(tmp_path: Path) -> None:
    config = {"model_type": "novel\x1b[0m"}
    folder = save(tmp_path / "a", hybrid(), config)
    told = verify(folder)
    assert told["layers"] is None
    assert "has no layout here" in told["notes"][0]
    code, out, err = morph("verify", folder)
    assert code == 0 and "\x1b" not in out + err and "not checked" in out


def test_a_known_family_whose_config_disagrees_is_refused(tmp_path: Path) -> None:
    tensors = {n: v for n, v in hybrid().items() if "linear_attn" not in n}
    with pytest.raises(CheckpointError):
        verify(save(tmp_path / "a", tensors, {**CONFIG, "model_type": "qwen3", "head_dim": 7}))


def test_an_adapter(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = save(tmp_path / "a", {name: ("F32", np.ones((2, 3), "<f4"))}, None)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert verify(folder)["layers"] == "a LoRA adapter"


# --- Beside one that should be equal ------------------------------------------------------------


def test_equal_tensors_in_other_shards_pass_and_side_files_are_told(
    pre: Path, tmp_path: Path
) -> None:
    files = {**SIDE, "tokenizer.json": "{ }", "more.txt": "m"}
    del files["deep/notes.txt"]
    copy = beside(save(tmp_path / "copy", hybrid(), CONFIG, 5), files)
    told = verify(copy, str(pre))
    assert told["tensors_byte_equal"] == len(hybrid())
    assert told["side_files_equal"] == 2  # config.json and the template
    assert told["side_files_differ"] == ["tokenizer.json"]
    assert told["side_files_only_here"] == ["more.txt"]
    assert told["side_files_only_there"] == ["deep/notes.txt"]
    code, out, _ = morph("verify", copy, "--against", pre)
    assert code == 0 and "tokenizer.json" in out


def other(**changes: Any) -> dict[str, Any]:
    found = hybrid()
    for name, value in changes.items():
        if value is None:
            del found[name]
        else:
            found[name] = value
    return found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lm_head.weight": None}, "lm_head.weight is only in the other"),
        ({"extra": ("F32", np.ones(1, "<f4"))}, "extra is only in this"),
        ({"lm_head.weight": ("F16", np.zeros((32, HIDDEN), "<f2"))}, "is F16, not BF16"),
        ({"lm_head.weight": ("BF16", np.zeros((3, 8), "<u2"))}, r"shape \[3, 8\], not \[32, 24\]"),
    ],
    ids=["less", "more", "dtype", "shape"],
)
def test_other_headers_are_named(
    pre: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    copy = save(tmp_path / "copy", other(**changes), {**CONFIG, "model_type": "novel"})
    with pytest.raises(VerificationFailed, match=says) as error:
        verify(copy, str(pre))
    assert f"`morph diff {pre} {copy}`" in str(error.value)


@pytest.mark.parametrize("block", [1, 100, _verify_files.BLOCK])
@pytest.mark.parametrize("byte", [0, 99, 2 * 32 * HIDDEN - 1])
def test_one_bit_anywhere_is_found(
    pre: Path, tmp_path: Path, byte: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_verify_files, "BLOCK", block)
    copy = save(tmp_path / "copy", hybrid(), CONFIG)
    flip(copy, "lm_head.weight", byte)
    with pytest.raises(VerificationFailed, match=f"lm_head.weight differs from its byte {byte} on"):
        verify(copy, str(pre))


def test_exit_codes_of_comparisons(pre: Path, post: Path, tmp_path: Path) -> None:
    assert morph("verify", post, "--against", pre)[0] == 6
    assert "(and " in morph("verify", post, "--against", pre)[2]
    assert morph("verify", pre, "--against", pre)[0] == 2
    assert morph("verify", pre, "--against", tmp_path / "nowhere")[0] == 3
    assert morph("verify", pre, "--pre", post)[0] == 2
    with pytest.raises(UsageError, match="tells of no restore"):
        verify(pre, str(post), str(post))


def test_a_copy_of_a_hybrid_is_compared_with_the_hybrid(pre: Path, tmp_path: Path) -> None:
    """Both tell of a plan, so neither is what the other was converted from."""
    (pre / "morph.json").write_text('{"plan": {}}')
    copy = shutil.copytree(pre, tmp_path / "copy")
    assert verify(copy, str(pre))["tensors_byte_equal"] == len(hybrid())
    flip(copy, Q, 0)
    with pytest.raises(VerificationFailed, match="q_proj"):
        verify(copy, str(pre))


def test_progress_of_long_comparisons(
    pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_diff, "TOLD", 0)
    told: list[str] = []
    verify(save(tmp_path / "copy", hybrid(), CONFIG), str(pre), say=told.append)
    assert 2 <= len(told) <= 10


# --- Restored folders ---------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "exact": {},
    "one-layer": {"layers": "7"},
    "gates-and-norms": {"include": ("q", "k", "gate", "v")},
    "ridge": {"method": "ridge", "rho": 0.3},
    "interpolate": {"method": "interpolate", "alpha": 0.25},
}


def restored(pre: Path, post: Path, out: Path, **options: Any) -> Path:
    """Restore without a manifest, so that nothing but the comparison can notice a change."""
    plan = restore.plan(pre, post, restore.Options(**options))
    restore.write(plan, out, hashing=False)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_folder_passes_with_and_without_pre(
    method: str, pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out", **METHODS[method])
    told = verify(out, str(post))
    assert 0 < told["tensors_byte_equal"] < told["tensors"]
    assert told["side_files_equal"] == len(SIDE) + 1
    again = verify(out, str(post), str(pre))
    assert again["restored_bytes_equal"] == again["restored_bytes"] == told["restored_bytes"]
    assert told["restored_bytes"] == restore.plan(pre, post, restore.Options(
        **METHODS[method])).nbytes  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_change_of_a_restored_row_needs_pre_to_be_seen(
    method: str, pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out", **METHODS[method])
    flip(out, "model.layers.7.self_attn.q_proj.weight", 2 * HIDDEN * 5)  # a query row of head 0
    verify(out, str(post))
    with pytest.raises(VerificationFailed, match=r"layers\.7\.self_attn\.q_proj.*row 0|row 5"):
        verify(out, str(post), str(pre))


@pytest.mark.parametrize(
    "tensor",
    ["lm_head.weight", "model.layers.0.linear_attn.A_log", "model.layers.3.self_attn.v_proj.weight",
     "model.layers.7.input_layernorm.weight"],
)  # fmt: skip
def test_a_change_elsewhere_is_found(tensor: str, pre: Path, post: Path, tmp_path: Path) -> None:
    out = restored(pre, post, tmp_path / "out")
    flip(out, tensor, 3)
    with pytest.raises(VerificationFailed, match="should be POST's"):
        verify(out, str(post))


def test_gate_rows_of_a_query_projection_must_be_posts(
    pre: Path, post: Path, tmp_path: Path
) -> None:
    """Rows 6 to 11 of q_proj are the gate of head 0."""
    out = restored(pre, post, tmp_path / "out")
    flip(out, Q, 2 * HIDDEN * 6)
    with pytest.raises(VerificationFailed, match=f"row 6 of {Q} should be POST's"):
        verify(out, str(post))


def test_a_layer_that_the_record_leaves_out_must_be_posts(
    pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out", layers="7")
    flip(out, Q, 0)
    with pytest.raises(VerificationFailed, match="row 0 of .*should be POST's"):
        verify(out, str(post))


def test_files_and_headers_of_a_restored_folder_are_posts(
    pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out")
    (out / "tokenizer.json").write_text("[]")
    with pytest.raises(VerificationFailed, match=r"tokenizer\.json should be POST's"):
        verify(out, str(post))
    (out / "tokenizer.json").write_text("{}")
    file = out / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'{"', b'{ "', 1).replace(b"  ", b" ", 1))
    if Weights.open(out).headers[file.name].raw == Weights.open(post).headers[file.name].raw:
        pytest.fail("the header did not change")
    with pytest.raises(VerificationFailed, match="header of model-00001"):
        verify(out, str(post))


def test_another_post_or_pre_does_not_belong(pre: Path, post: Path, tmp_path: Path) -> None:
    out = restored(pre, post, tmp_path / "out")
    stranger = save(tmp_path / "stranger", moved(hybrid(), "layers", by=0.02), CONFIG, 3)
    with pytest.raises(MismatchError, match="is not the POST that was recorded, post"):
        verify(out, str(stranger))
    with pytest.raises(MismatchError, match="is not the PRE that was recorded, pre"):
        verify(out, str(post), str(stranger))
    with pytest.raises(MismatchError, match="PRE"):
        verify(out, str(post), str(post))


def test_the_last_of_several_restores_counts(pre: Path, post: Path, tmp_path: Path) -> None:
    first = restored(pre, post, tmp_path / "first", layers="3")
    out = restored(pre, first, tmp_path / "out", layers="7")
    assert verify(out, str(first), str(pre))["restored"].startswith("q, k of layer 7 ")
    with pytest.raises(MismatchError):
        verify(out, str(post))


def test_a_pre_of_which_only_some_shards_are_here(pre: Path, post: Path, tmp_path: Path) -> None:
    out = restored(pre, post, tmp_path / "out", layers="3", include=("k",))
    where = Weights.open(pre).tensors["model.layers.3.self_attn.k_proj.weight"].file.name
    for shard in Weights.open(pre).shards:
        if shard != where:
            (pre / shard).unlink()
    assert verify(out, str(post), str(pre))["restored_bytes_equal"] > 0


def test_a_record_that_names_more_than_was_restored_needs_pre_to_be_seen(
    pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out")
    found = json.loads((out / "morph.json").read_text())
    found["restored"][-1]["rows"][Q] = [[0, 48]]  # the gates too
    (out / "morph.json").write_text(json.dumps(found))
    verify(out, str(post))
    with pytest.raises(VerificationFailed, match="could not be made again"):
        verify(out, str(post), str(pre))


def test_a_restored_adapter(pre: Path, tmp_path: Path) -> None:
    draw, tensors = np.random.default_rng(7), {}
    for layer in (3, 7):
        for part, rows in (("q_proj", 48), ("k_proj", 12), ("v_proj", 12)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{at}.lora_A.weight"] = "F32", draw.standard_normal((2, HIDDEN)).astype("<f4")
            tensors[f"{at}.lora_B.weight"] = "F32", draw.standard_normal((rows, 2)).astype("<f4")
    post = save(tmp_path / "post", tensors, None)
    (post / "model.safetensors").rename(post / "adapter_model.safetensors")
    (post / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    out = restored(pre, post, tmp_path / "out")
    told = verify(out, str(post), str(pre))
    assert told["restored_bytes_equal"] == told["restored_bytes"] > 0
    name = "base_model.model.model.layers.3.self_attn.{}_proj.lora_B.weight"
    flip(out, name.format("v"), 0)
    with pytest.raises(VerificationFailed, match="should be POST's"):
        verify(out, str(post))
    flip(out, name.format("v"), 0)
    flip(out, name.format("k"), 0)
    verify(out, str(post))
    with pytest.raises(VerificationFailed, match="k_proj"):
        verify(out, str(post), str(pre))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.clear(),
        lambda r: r.append({}),
        lambda r: r[0].update(rows=[]),
        lambda r: r[0].update(rules=[{}]),
        lambda r: r[0].update(rules=[{"part": "q", "layers": ["3"]}]),
        lambda r: r[0]["rows"].update({"no.such": [[0, 1]]}),
        lambda r: r[0]["rows"].update({Q: [[0, 99]]}),
        lambda r: r[0]["rows"].update({Q: [[0, 6], [3, 9]]}),
        lambda r: r[0]["rows"].update({Q: [[0, "x"]]}),
        lambda r: r[0]["rows"].update({Q: 7}),
    ],
)
def test_a_hostile_record_is_refused(
    change: Callable[[Any], object], pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out")
    found = json.loads((out / "morph.json").read_text())
    change(found["restored"])
    (out / "morph.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"morph\.json"):
        verify(out, str(post))


@pytest.mark.parametrize("claim", [{"rows": {}}, {"rules": []}])
def test_a_record_that_names_less_than_was_restored_is_found(
    claim: dict[str, Any], pre: Path, post: Path, tmp_path: Path
) -> None:
    out = restored(pre, post, tmp_path / "out")
    found = json.loads((out / "morph.json").read_text())
    found["restored"][-1] |= claim
    (out / "morph.json").write_text(json.dumps(found))
    with pytest.raises(VerificationFailed, match="should be POST's"):
        verify(out, str(post))


# --- Folders made of pickles --------------------------------------------------------------------


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """What pickles look like to `verify`, which opens none."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    return folder


def converted(pickled: Path, out: Path) -> Path:
    """A folder as `morph convert-pickle` leaves it, but for its manifest."""
    save(out, hybrid(), CONFIG, 2)
    weights = Weights.open(out)
    file = (pickled / "pytorch_model.bin").read_bytes()
    told = {
        "files": {
            "pytorch_model.bin": {
                "bytes": len(file),
                "sha256": hashlib.sha256(file).hexdigest(),
                "zip": False,
            }
        },
        "tensors": {name: weights.sha256(name) for name in weights.tensors},
    }
    (out / "morph.json").write_text(json.dumps({"converted_from_pickle": told}))
    return out


def test_pickles_are_compared_by_their_sums(pickled: Path, pre: Path, tmp_path: Path) -> None:
    out = converted(pickled, tmp_path / "out")
    told = verify(out, str(pickled))
    assert (told["tensors_equal_to_pickle"], told["pickles_equal"]) == (len(hybrid()), 1)
    assert verify(out, str(pickled / "pytorch_model.bin"))["pickles_equal"] == 1
    assert verify(out)["tensors_equal_to_pickle"] == len(hybrid())
    assert verify(out, str(pre))["tensors_byte_equal"] == len(hybrid())  # no pickle is there
    flip(out, Q, 1)
    with pytest.raises(VerificationFailed, match="q_proj.* is not what torch loaded"):
        verify(out)


@pytest.mark.parametrize("content", [b"cos\nsystem\n(S'exit 2'\ntR.", b"other"])
def test_other_pickles_do_not_belong(pickled: Path, tmp_path: Path, content: bytes) -> None:
    out = converted(pickled, tmp_path / "out")
    (pickled / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(MismatchError, match=r"pytorch_model\.bin has "):
        verify(out, str(pickled))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.clear(),
        lambda r: r.update(files={}),
        lambda r: r.update(files={"../x": {"sha256": "0" * 64}}),
        lambda r: r.update(tensors=[]),
        lambda r: r["tensors"].update({Q: "0"}),
    ],
)
def test_a_hostile_record_of_pickles_is_refused(
    change: Callable[[Any], object], pickled: Path, tmp_path: Path
) -> None:
    out = converted(pickled, tmp_path / "out")
    found = json.loads((out / "morph.json").read_text())
    change(found["converted_from_pickle"])
    (out / "morph.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"morph\.json"):
        verify(out, str(pickled))


def test_a_tensor_that_the_record_does_not_know(pickled: Path, tmp_path: Path) -> None:
    out = converted(pickled, tmp_path / "out")
    found = json.loads((out / "morph.json").read_text())
    del found["converted_from_pickle"]["tensors"][Q]
    (out / "morph.json").write_text(json.dumps(found))
    with pytest.raises(VerificationFailed, match="not in the record"):
        verify(out)


def test_it_loads_no_torch(pre: Path, post: Path, tmp_path: Path) -> None:
    out = restored(pre, post, tmp_path / "out", method="ridge", rho=0.1)
    code = (
        "import sys\nfrom morph.cli import main\ntry:\n main(sys.argv[1:])\n"
        "except SystemExit as e:\n code = e.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    command = ["verify", str(out), "--against", str(post), "--pre", str(pre)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "made again from PRE" in done.stdout
