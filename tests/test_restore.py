"""`morph restore`, exact: what comes from PRE, and that all else is POST's, byte for byte."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from morph import layouts, restore
from morph.errors import CheckpointError, MismatchError, UnsupportedModel, UsageError

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_restoring.py"))))
tiny = kit.tiny


def reading(model_type: str) -> layouts.Reading:
    return layouts.read(tiny.config(model_type), tiny.shapes(model_type))


RESTORABLE = tuple(m for m in tiny.MODEL_TYPES if not reading(m).refusal)
REFUSED = tuple(m for m in tiny.MODEL_TYPES if reading(m).refusal)


@pytest.fixture
def inputs(tmp_path: Path) -> Iterator[list[Path]]:
    """Folders that are inputs; whatever happens in the test, they are as they were."""
    found: list[Path] = []
    before: dict[Path, dict[str, str]] = {}

    class Watched(list):  # type: ignore[type-arg]
        def extend(self, folders: Any) -> None:
            super().extend(folders)
            before.update({f: kit.digests(f) for f in folders})

    found = Watched()
    yield found
    for folder, files in before.items():
        assert kit.digests(folder) == files, f"{folder.name} was changed"


@pytest.mark.parametrize("model_type", RESTORABLE)
def test_chosen_rows_are_pre_and_all_else_is_post(
    model_type: str, tmp_path: Path, inputs: list[Path]
):
    pre, post = kit.pair(tmp_path, model_type)
    inputs.extend([pre, post])
    kinds = ("full",) if "full" in reading(model_type).kinds else ("sliding",)
    layers = "full" if kinds == ("full",) else "all"
    out = kit.restored(pre, post, tmp_path / "out", layers=layers)
    want, have = kit.expected(pre, post, kinds), kit.data(out)
    assert have == want
    assert want != kit.data(post)
    kinds_of = reading(model_type).kinds
    for name in want:  # a second look that does not ask the layout for rows
        layer = next((int(w) for w in name.split(".") if w.isdecimal()), None)
        if layer is not None and layer < len(kinds_of) and kinds_of[layer] == "linear":
            assert have[name] == kit.data(post)[name], name

    # what holds the tensors is POST's too
    for file in sorted(post.glob("*.safetensors")):
        a, b = file.read_bytes(), (out / file.name).read_bytes()
        start = kit.header(a)[1]
        assert a[:start] == b[:start] and len(a) == len(b)
    same = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    for name in same:
        assert (out / name).read_bytes() == (post / name).read_bytes()
    assert (out / "README.source.md").read_bytes() == (post / "README.md").read_bytes()


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_has_no_own_keys_is_refused_with_the_reason(
    model_type: str, tmp_path: Path, inputs: list[Path]
):
    pre, post = kit.pair(tmp_path, model_type)
    inputs.extend([pre, post])
    with pytest.raises(UnsupportedModel, match=r"latent|share") as found:
        restore.plan(pre, post)
    assert model_type in str(found.value)


@pytest.mark.parametrize("model_type", ["qwen3_next", "phi3", "gpt_neox", "jet_nemotron"])
def test_restoring_is_idempotent_and_has_an_inverse(model_type: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, model_type)
    out = kit.restored(pre, post, tmp_path / "out")
    with pytest.raises(MismatchError, match="byte-equal in PRE and POST"):
        kit.restored(pre, out, tmp_path / "no")
    again = kit.restored(pre, out, tmp_path / "again", allow=("unchanged",))
    assert kit.data(again) == kit.data(out)
    back = kit.restored(post, out, tmp_path / "back")
    assert kit.data(back) == kit.data(post)
    with pytest.raises(MismatchError, match="same weights"):
        kit.restored(
            pre,
            kit.save(
                tmp_path / "twin", json.loads((pre / "config.json").read_text()), kit.read(pre)
            ),
            tmp_path / "no",
        )
    records = [len(json.loads((f / "morph.json").read_text())["restored"]) for f in (out, again)]
    assert records == [1, 2]


def test_shards_may_be_cut_anywhere(tmp_path: Path):
    base = kit.pair(tmp_path)
    want = kit.expected(*base)
    config = json.loads((base[0] / "config.json").read_text())
    for seed in range(4):
        draw = random.Random(seed)
        folders = []
        for i, folder in enumerate(base):
            names = list(kit.read(folder).items())
            draw.shuffle(names)
            count = draw.choice([1, 2, 5, 17])
            parts = [dict(names[j::count]) for j in range(count)]
            folders.append(kit.save(tmp_path / f"{seed}-{i}", config, *parts))
        out = kit.restored(*folders, tmp_path / f"out-{seed}")
        assert kit.data(out) == want


def test_the_result_does_not_depend_on_how_it_is_copied(tmp_path: Path):
    pre, post = kit.pair(tmp_path)
    plan = restore.plan(pre, post)
    found = set()
    for how in ("auto", "copy", "link"):
        out = tmp_path / how
        restore.write(plan, out, copy=how, durable=False)
        found.add((out / "MANIFEST.json").read_bytes())
        for file in out.rglob("*"):
            assert not file.is_symlink()
    assert len(found) == 1
    restore.write(plan, tmp_path / "plain", hashing=False, durable=False)
    assert kit.data(tmp_path / "plain") == kit.data(out)


def test_gates_inside_q_proj_stay_post_unless_they_are_named(tmp_path: Path):
    """Qwen3-Next's q_proj holds, per head, `dim` rows of the query and `dim` rows of its gate."""
    pre, post = kit.pair(tmp_path)
    config = tiny.config("qwen3_next")
    heads, dim = config["num_attention_heads"], config["head_dim"]
    name = "model.layers.1.self_attn.q_proj.weight"
    a, b = kit.read(pre)[name], kit.read(post)[name]
    assert a.shape[0] == 2 * heads * dim
    out = kit.restored(pre, post, tmp_path / "out")
    made = kit.read(out)[name]
    for head in range(heads):
        at = 2 * head * dim
        assert made.rows(at, at + dim) == a.rows(at, at + dim)
        assert made.rows(at + dim, at + 2 * dim) == b.rows(at + dim, at + 2 * dim)
    whole = kit.restored(pre, post, tmp_path / "whole", include=("q", "k", "gate"))
    assert kit.read(whole)[name] == a
    rows = json.loads((out / "morph.json").read_text())["restored"][0]["rows"]
    assert rows[name] == [[2 * h * dim, (2 * h + 1) * dim] for h in range(heads)]
    assert name not in json.loads((whole / "morph.json").read_text())["restored"][0]["rows"]


@pytest.mark.parametrize(
    ("include", "roles", "bias"),
    [
        ("q", ("q",), False),
        ("k,bias", ("k",), True),
        ("v,o,bias", ("v", "o"), True),
        ("q,k,norm", ("q", "k", "q_norm", "k_norm"), False),
        ("gate,q", ("q", "gate"), False),
        ("q,k,v,o,bias,norm,gate", ("q", "k", "v", "o", "gate", "q_norm", "k_norm"), True),
    ],
)
def test_include_names_what_comes_back(
    include: str, roles: tuple[str, ...], bias: bool, tmp_path: Path
):
    pre, post = kit.pair(tmp_path)
    out = kit.restored(pre, post, tmp_path / "out", include=tuple(include.split(",")))
    assert kit.data(out) == kit.expected(pre, post, roles=roles, bias=bias)


@pytest.mark.parametrize(
    ("layers", "numbers", "kinds"),
    [
        ("all", None, ("full", "sliding")),
        ("full", None, ("full",)),
        ("2", {2}, ("full", "sliding")),
        ("2, 1", {1, 2}, ("full", "sliding")),
    ],
)
def test_layers_name_what_comes_back(
    layers: str, numbers: set[int] | None, kinds: tuple[str, ...], tmp_path: Path
):
    pre, post = kit.pair(tmp_path, "jet_nemotron")
    out = kit.restored(pre, post, tmp_path / "out", layers=layers)
    assert kit.data(out) == kit.expected(pre, post, kinds, layers=numbers)
    notes = " ".join(restore.plan(pre, post, restore.Options(layers=layers)).notes)
    assert ("attend to a window" in notes) == (layers != "full")


@pytest.mark.parametrize("layers", ["0", "3,0", "4", "x", "1,,2", "-1", "1-2"])
def test_layers_that_cannot_be_meant_are_named_with_those_that_can(layers: str, tmp_path: Path):
    pre, post = kit.pair(tmp_path, "jet_nemotron")
    with pytest.raises(UsageError, match="1-2"):
        restore.plan(pre, post, restore.Options(layers=layers))


def hybrid(root: Path, groups: list[tuple[str, list[int]]]) -> tuple[Path, Path]:
    """Write PRE and POST of a morph hybrid of qwen3 whose layer 1 has these groups of heads."""
    shape = tiny.config("qwen3")
    heads = shape["num_attention_heads"]
    whole = [{"mixer": "full", "heads": list(range(heads))}]
    mixed = [{"mixer": mixer, "heads": found} for mixer, found in groups]
    plan = {
        "model_type": "qwen3",
        "geometry": {
            "num_hidden_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": shape["num_key_value_heads"],
            "head_dim": shape["head_dim"],
            "v_head_dim": shape["head_dim"],
            "hidden_size": shape["hidden_size"],
            "windows": [None] * 4,
        },
        "layers": [{"groups": mixed if i == 1 else whole} for i in range(4)],
    }
    config = {**shape, "model_type": "morph_qwen3", "morph": {"plan": plan}}
    shapes = tiny.shapes("qwen3")
    pre = tiny.write_tensors(root / "pre", config, shapes)
    (pre / "morph.json").write_text(json.dumps({"plan": plan, "source": {"name": "dense"}}))
    return pre, kit.copy_tuned(pre, root / "post")


def test_of_mixed_layers_only_full_heads_come_back(tmp_path: Path):
    pre, post = hybrid(tmp_path, [("full", [0, 1, 2]), ("sliding", [3, 4, 5])])
    out = kit.restored(pre, post, tmp_path / "out")
    a, b, made = (kit.read(f) for f in (pre, post, out))
    dim = tiny.config("qwen3")["head_dim"]
    for part, rows in (("q", 3 * dim), ("k", dim)):
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        assert made[name].rows(0, rows) == a[name].rows(0, rows)
        assert made[name].rows(rows, 2 * rows) == b[name].rows(rows, 2 * rows)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert made[name] == a[name]
    assert kit.data(out) == kit.expected(pre, post)
    config = json.loads((pre / "config.json").read_text())
    needed = {n: t for n, t in a.items() if ".self_attn." in n}
    rest = {n: t for n, t in a.items() if n not in needed}
    part = kit.save(tmp_path / "part", config, needed, rest)
    (part / "model-00002-of-00002.safetensors").unlink()
    assert kit.data(kit.restored(part, post, tmp_path / "again")) == kit.data(out)
    (tmp_path / "other").mkdir()
    other, _ = hybrid(tmp_path / "other", [("full", [3, 4, 5]), ("sliding", [0, 1, 2])])
    with pytest.raises(MismatchError, match=r"layer 1 has mixed .*its heads differ"):
        restore.plan(other, post)


def test_what_morph_json_said_stays_and_the_parent_is_named(tmp_path: Path):
    pre, post = hybrid(tmp_path, [("full", [0, 1, 2]), ("sliding", [3, 4, 5])])
    before = json.loads((post / "morph.json").read_text())
    kit.restored(pre, post, tmp_path / "out", include=("k", "q"))
    text = (tmp_path / "out" / "morph.json").read_text()
    found = json.loads(text)
    assert {k: found[k] for k in before} == before
    assert found["parent"]["name"] == "post"
    (record,) = found["restored"]
    assert record["pre"]["name"] == "pre" and record["post"]["name"] == "post"
    assert record["options"] == {
        "method": "exact",
        "layers": "full",
        "include": ["q", "k"],
        "allow": [],
    }
    by_part = {r["part"]: r for r in record["rules"]}
    assert by_part["q"]["layers"] == [0, 1, 2, 3] and by_part["q"]["rule"] == "bytes of PRE"
    config = tiny.config("qwen3")
    rows = 3.5 * config["num_attention_heads"] * config["head_dim"]
    assert by_part["q"]["rows"] == rows
    assert by_part["q"]["bytes"] == rows * config["hidden_size"] * 2
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert [
        r["post"]["name"]
        for r in restore.restored_records(
            restore.plan(pre, tmp_path / "out", restore.Options(allow=("unchanged",))).post
        )
    ] == ["post"]


def test_the_same_restore_gives_the_same_bytes_wherever(tmp_path: Path):
    found = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        pre, post = kit.pair(tmp_path / place)
        out = kit.restored(pre, post, tmp_path / place / "out")
        found.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert found[0] == found[1]


def test_cards_keep_front_matter_and_grow_no_second_record(tmp_path: Path):
    pre, post = kit.pair(tmp_path)
    out = kit.restored(pre, post, tmp_path / "out")
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n# post, with queries and keys of pre\n")
    assert "bytes of PRE" in text and "README.source.md" in text and "# Tuned" not in text
    third = kit.copy_tuned(out, tmp_path / "third", seed=3)
    again = (kit.restored(pre, third, tmp_path / "again") / "README.md").read_text()
    assert again.count("with queries and keys of") == 1
    assert again.startswith("---\nlicense: mit\n---\n# third,")
    assert (tmp_path / "again" / "README.source.md").read_text().endswith("# Tuned\n")
    third.joinpath("README.md").write_text("# Ours\n")  # both cards belong to POST
    both = (kit.restored(pre, third, tmp_path / "both") / "README.md").read_text()
    assert both.startswith("# third,") and both.endswith("# Ours\n")


def test_names_under_another_prefix_are_found(tmp_path: Path):
    """A wrapper around a text model keeps the decoder elsewhere; PRE may be saved with it."""
    pre, post = kit.pair(tmp_path, "qwen3")
    wrapped = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in kit.read(pre).items()
    }
    config = tiny.config("qwen3")
    other = kit.save(tmp_path / "wrapped", config, wrapped)
    plan = restore.plan(other, post)
    assert any("other names in PRE" in note for note in plan.notes)
    restore.write(plan, tmp_path / "out", durable=False)
    assert kit.data(tmp_path / "out") == kit.expected(pre, post)


def test_pre_may_lack_shards_without_a_needed_tensor(tmp_path: Path, inputs: list[Path]):
    pre, post = kit.pair(tmp_path)
    tensors = kit.read(pre)
    needed = {n: t for n, t in tensors.items() if ".self_attn." in n}
    rest = {n: t for n, t in tensors.items() if n not in needed}
    config = json.loads((pre / "config.json").read_text())
    part = kit.save(tmp_path / "part", config, needed, rest)
    (part / "model-00002-of-00002.safetensors").unlink()
    inputs.extend([part, post])
    out = kit.restored(part, post, tmp_path / "out")
    assert kit.data(out) == kit.expected(pre, post)
    (part / "model-00001-of-00002.safetensors").rename(tmp_path / "away")
    kit.write_file(part / "model-00002-of-00002.safetensors", rest)
    try:
        with pytest.raises(CheckpointError, match=r"in model-00001-of-00002.* not here"):
            restore.plan(part, post)
    finally:
        (tmp_path / "away").rename(part / "model-00001-of-00002.safetensors")
        (part / "model-00002-of-00002.safetensors").unlink()


def test_links_into_a_hub_cache_are_read_and_never_written(tmp_path: Path):
    pre, post = kit.pair(tmp_path)
    cache = tmp_path / "models--org--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    files = kit.digests(pre)
    for name, digest in files.items():
        (blobs / digest).write_bytes((pre / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    before = kit.digests(blobs)
    out = kit.restored(snapshot, post, tmp_path / "out")
    assert kit.data(out) == kit.expected(pre, post)
    assert kit.digests(blobs) == before
    told = json.loads((out / "morph.json").read_text())["restored"][0]["pre"]
    assert told["name"] == "org/name"
    shards = told["shards"]
    assert {n: s["sha256"] for n, s in shards.items()} == {n: files[n] for n in shards}


def test_files_have_the_mode_of_the_umask(tmp_path: Path):
    pre, post = kit.pair(tmp_path)
    old = os.umask(0o027)
    try:
        out = kit.restored(pre, post, tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(f.stat().st_mode) for f in out.iterdir()} == {0o640}
    assert all(f.is_file() and not f.is_symlink() for f in out.iterdir())


def write_scores(path: Path, granularity: str, values: list[list[float]], **changes: Any) -> Path:
    found = {
        "selector": "uniform",
        "model_type": "qwen3",
        "granularity": granularity,
        "values": values,
        "unit": "none",
        "pairs": None,
        "provenance": {},
        **changes,
    }
    path.write_text(json.dumps(found))
    return path


def test_scores_choose_layers(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3")
    scores = write_scores(tmp_path / "scores.json", "layer", [[0.1], [0.9], [0.2], [0.8]])
    options = {"layers": str(scores)}
    one = kit.restored(pre, post, tmp_path / "one", **options)  # a quarter of four
    assert kit.data(one) == kit.expected(pre, post, layers={1})
    two = kit.restored(pre, post, tmp_path / "two", **options, budget="50%")
    assert kit.data(two) == kit.expected(pre, post, layers={1, 3})
    record = json.loads((two / "morph.json").read_text())["restored"][0]
    assert record["options"]["layers"] == "scores.json"


def test_scores_choose_heads_and_the_keys_they_read(tmp_path: Path):
    """qwen3 here has 6 query heads that share 2 KV heads; head 5 of layer 2 reads KV head 1."""
    pre, post = kit.pair(tmp_path, "qwen3")
    dim = tiny.config("qwen3")["head_dim"]
    a, b = kit.read(pre), kit.read(post)

    def check(granularity: str, values: list[list[float]], q: range) -> restore.Plan:
        scores = write_scores(tmp_path / f"{granularity}.json", granularity, values)
        units = len(values) * len(values[0])
        options = restore.Options(layers=str(scores), budget=f"1/{units}")
        plan = restore.plan(pre, post, options)
        restore.write(plan, tmp_path / granularity, durable=False)
        made = kit.read(tmp_path / granularity)
        rows = {"q": (q.start * dim, q.stop * dim), "k": (dim, 2 * dim)}
        for name, tensor in made.items():
            part = name.split(".")[-2][0]
            if (
                name.startswith("model.layers.2.self_attn.")
                and name.endswith("_proj.weight")
                and (part in rows)
            ):
                start, stop = rows[part]
                end = tensor.shape[0]
                assert tensor.rows(start, stop) == a[name].rows(start, stop)
                assert tensor.rows(0, start) == b[name].rows(0, start)
                assert tensor.rows(stop, end) == b[name].rows(stop, end)
            else:
                assert tensor == b[name]
        return plan

    plan = check("head", [[0.0] * 6, [0.0] * 6, [0, 0, 0, 0, 0, 9.0], [0.0] * 6], range(5, 6))
    assert any(note.startswith("2 query heads that were not chosen") for note in plan.notes)
    check("kv_head", [[0.0] * 2, [0.0] * 2, [0, 9.0], [0.0] * 2], range(3, 6))


def test_scores_must_be_of_this_model_and_of_pure_softmax_models(tmp_path: Path):
    pre, post = kit.pair(tmp_path, "qwen3")
    values = [[0.1], [0.9], [0.2], [0.8]]
    other = write_scores(tmp_path / "other.json", "layer", values, model_type="llama")
    with pytest.raises(MismatchError, match="llama"):
        restore.plan(pre, post, restore.Options(layers=str(other)))
    heads = write_scores(tmp_path / "heads.json", "head", [[1.0] * 6] * 4)
    options = restore.Options(layers=str(heads), include=("q", "k", "norm"))
    with pytest.raises(UsageError, match="all heads of a layer share it"):
        restore.plan(pre, post, options)
    (tmp_path / "linear").mkdir()
    folders = kit.pair(tmp_path / "linear", "qwen3_next")
    scores = write_scores(tmp_path / "next.json", "layer", values, model_type="qwen3_next")
    with pytest.raises(UsageError, match="layer 0 of this one is linear"):
        restore.plan(*folders, restore.Options(layers=str(scores)))
    with pytest.raises(UsageError, match="cannot be read"):
        restore.plan(pre, post, restore.Options(layers="absent.json"))


def test_widening_is_exact_and_asked_for(tmp_path: Path):
    pre, _ = kit.pair(tmp_path, "qwen2")
    config = json.loads((pre / "config.json").read_text())
    for dtype in ("BF16", "F16"):
        narrow, wide = {}, {}
        for name, tensor in kit.read(pre).items():
            kind = kit.Tensor("F32", tensor.shape, tensor.numbers.astype("<f4").tobytes())
            wide[name] = kind
            half = tensor.numbers.astype("<f2").tobytes()
            narrow[name] = tensor if dtype == "BF16" else tensor._replace(dtype="F16", data=half)
        a = kit.save(tmp_path / f"{dtype}-pre", config, narrow)
        b = kit.save(tmp_path / f"{dtype}-post", config, kit.tuned(wide))
        with pytest.raises(MismatchError, match="--allow widening"):
            restore.plan(a, b)
        made = kit.read(kit.restored(a, b, tmp_path / f"{dtype}-out", allow=("widening",)))
        for name, values in made.items():
            source = narrow if ".q_proj." in name or ".k_proj." in name else kit.read(b)
            assert values.dtype == "F32"
            assert (values.numbers == source[name].numbers).all()
        with pytest.raises(MismatchError, match="would change values"):
            restore.plan(b, a, restore.Options(allow=("widening",)))


KILLED = """
import os, signal, sys, time
from pathlib import Path
from morph import restore
calls = 0
def finished():  # another thread says that a file is on the disk
    found = Path(sys.argv[3]).parent.glob(".out.*.jsonl")
    return any(journal.read_bytes().count(b"\\n") > 1 for journal in found)
def progress(done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        while "wait" in sys.argv and not finished():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
restore.write(restore.plan(*sys.argv[1:3]), sys.argv[3], progress=progress)
"""


@pytest.mark.parametrize("point", [1, 9, 24, 40])
def test_a_killed_run_leaves_nothing_and_resumes_to_the_same_bytes(point: int, tmp_path: Path):
    pre, post = kit.pair(tmp_path, shards=3)
    whole = kit.restored(pre, post, tmp_path / "whole")
    arguments = [str(pre), str(post), str(tmp_path / "out"), str(point)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    found = kit.morph("restore", pre, post, tmp_path / "out", "--json")
    assert found.code == 0, found.err
    assert kit.digests(tmp_path / "out") == kit.digests(whole)
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_run_goes_on_with_its_own_inputs_and_options_only(tmp_path: Path):
    pre, post = kit.pair(tmp_path, shards=3)
    arguments = [str(pre), str(post), str(tmp_path / "out"), "24", "wait"]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    other = kit.morph("restore", pre, post, tmp_path / "out", "--include", "q")
    assert other.code == 4 and "--restart" in other.err and "include" in other.err
    same = kit.morph("restore", pre, post, tmp_path / "out", "--json")
    assert same.code == 0 and json.loads(same.out)["resumed"]


SPARSE = """
import json, re, sys
from pathlib import Path
root, size = Path(sys.argv[1]), int(sys.argv[2])
from morph import restore
def rchar():
    return int(Path("/proc/self/io").read_text().split()[1])
before = rchar()
options = restore.Options(allow=tuple(sys.argv[3].split(",")))
plan = restore.plan(root / "pre", root / "post", options)
read = rchar() - before
if size:
    restore.write(plan, root / "out", hashing=False, durable=False)
status = Path("/proc/self/status").read_text()  # getrusage also counts what forked us
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024
loaded = sorted({"torch", "numpy", "transformers"} & set(sys.modules))
print(json.dumps({"peak": peak, "loaded": loaded, "read": read, "layers": len(plan.layers)}))
"""


def sparse(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], shards: int):
    """Write a checkpoint whose data are holes, of any size."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(shapes)
    places = {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        entries: dict[str, Any] = {}
        at = 0
        for name in names[i::shards]:
            size = 2
            for n in shapes[name]:
                size *= n
            entries[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [at, at + size],
            }
            at += size
            places[name] = file
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + at)
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def llama(layers: int, hidden: int, inner: int, heads: int, groups: int, vocab: int):
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    q, k = heads * 128, groups * 128
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    shapes |= {n: (vocab, hidden) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (q if p == "q" else k, hidden) for p in "qkv"}
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        shapes |= {f"{at}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return config, shapes


ALLOW_ZEROS = "nonfinite,unrelated,unchanged"


def fresh(root: Path, size: int, allow: str = ALLOW_ZEROS) -> dict[str, Any]:
    arguments = [sys.executable, "-c", SPARSE, str(root), str(size), allow]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("inner", "size"),
    [(256, 3e8), pytest.param(24576, 2e9, marks=pytest.mark.slow)],  # slow: the disk
)
def test_any_size_takes_little_memory_and_no_torch(inner: int, size: float, tmp_path: Path):
    config, shapes = llama(2, 4096, inner, 32, 8, 16 * 1024 if inner < 4096 else 65536)
    for name in ("pre", "post"):
        sparse(tmp_path / name, config, shapes, 1)
    length = (tmp_path / "post" / "model.safetensors").stat().st_size
    assert length > size
    found = fresh(tmp_path, 1)
    assert found["loaded"] == []
    assert found["peak"] < 64
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == length


def test_planning_a_large_model_reads_headers_and_samples(tmp_path: Path):
    config, shapes = llama(80, 8192, 28672, 64, 8, 128256)
    for name in ("pre", "post"):
        sparse(tmp_path / name, config, shapes, 30)
    found = fresh(tmp_path, 0)
    assert found["layers"] == 80
    assert found["read"] < 32 << 20
    assert found["peak"] < 64


def test_the_command_says_what_it_does_and_what_comes_next(tmp_path: Path):
    pre, post = kit.pair(tmp_path)
    out = tmp_path / "out"
    dry = kit.morph("restore", pre, post, out, "--dry-run", "--json")
    assert dry.code == 0 and not out.exists()
    found = json.loads(dry.out)
    want = sum(
        sum(x != y for x, y in zip(a, b))
        for a, b in zip(kit.expected(pre, post).values(), kit.data(post).values())
    )
    assert want <= found["bytes"] == sum(p["bytes"] for p in found["parts"])
    assert found["layers"] == [1, 3] and found["tensors"] == 8
    assert found["total_bytes"] == sum(map(len, kit.data(post).values()))
    assert found["share"] == pytest.approx(found["bytes"] / found["total_bytes"])
    assert {"q", "k", "v", "o", "mlp"} <= found["drift"].keys()
    assert all(0 < x < 0.1 for x in found["drift"].values())
    assert found["cosine_of_q"] > 0.99
    done = kit.morph("restore", pre, post, out)
    assert done.code == 0
    assert done.err.splitlines()[-1] == f"next: morph verify {out} --against {post} --pre {pre}"
    assert "the paper does not settle" in done.err and "evaluate both" in done.err
    for text in ("2 of 4: 1, 3", "8 tensors", "bytes of PRE"):
        assert text in done.out
    assert kit.morph("verify", out).code == 0
