"""A patched folder is the source's, byte for byte, but for the spliced ranges."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph.checkpoint import (
    Splice,
    Weights,
    _newfile,
    patch_folder,
    verify,
    verify_manifest,
)
from morph.errors import (
    CheckpointError,
    OutputExists,
    UsageError,
    VerificationFailed,
)

_spec = importlib.util.spec_from_file_location("_folders", Path(__file__).with_name("_folders.py"))
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)
beside, hashes, python, save = folders.beside, folders.hashes, folders.python, folders.save
Pair, attention, tiny_tensors = folders.Pair, folders.attention, folders.tiny_tensors
ONE, TWO, THREE = (f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


# --- what is in the output ------------------------------------------------------------------------


def test_only_the_spliced_ranges_differ(pair: Pair) -> None:
    before, names = hashes(pair.root), attention(pair)
    result = pair.put(pair.swap(*names), texts={"morph.json": b"{}"}, inputs=[pair.pre])
    out = verify(result)
    for name, info in pair.post.tensors.items():
        from_pre = name in names
        assert out.read_bytes(name) == (pair.pre if from_pre else pair.post).read_bytes(name)
        assert (out.tensors[name].start, out.tensors[name].file.name) == (
            info.start,
            info.file.name,
        )
    for shard in pair.post.shards:
        assert out.headers[shard].raw == pair.post.headers[shard].raw
        assert (pair.out / shard).stat().st_size == (pair.post.path / shard).stat().st_size
    found = hashes(pair.out)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert found[name] == before[f"post/{name}"]
    assert result.files == {n: h for n, h in found.items() if n != "MANIFEST.json"}
    spliced = sum(pair.post.tensors[n].nbytes for n in names)
    assert result.spliced_bytes == spliced
    assert result.nbytes == sum((pair.out / n).stat().st_size for n in result.files)
    assert result.copied_bytes == result.nbytes - spliced - len(b"{}")
    assert not any(p.is_symlink() for p in pair.out.iterdir())
    assert {n: h for n, h in hashes(pair.root).items() if not n.startswith("out/")} == before


def test_without_splices_it_is_the_source(pair: Pair) -> None:
    result = pair.put()
    assert result.files == hashes(pair.post.path)
    assert pair.put(hashing=False, force=True).files is None
    assert hashes(pair.out) == hashes(pair.post.path)


def test_the_inverse_patch_gives_the_source_back(pair: Pair) -> None:
    names = attention(pair)
    there = Weights.open(pair.put(pair.swap(*names)))
    back = [
        Splice(i.file.name, i.start, i.stop, pair.post.tensors[n])
        for n, i in sorted(there.tensors.items(), key=lambda e: (e[1].file.name, e[1].start))
        if n in names
    ]
    result = pair.put(back, source=there, out=pair.root / "back", inputs=[pair.post])
    assert result.files == hashes(pair.post.path)


def test_side_files_are_copied_but_never_code_or_pickles(pair: Pair) -> None:
    kept = ["LICENSE", "additional_chat_templates/rag.jinja", "morph.json", "README.md"]
    left = ["modeling_x.py", "optimizer.pt", "other.safetensors", "skip.me"]
    (pair.post.path / "additional_chat_templates").mkdir()
    for name in [*kept, *left, ".gitattributes"]:
        (pair.post.path / name).write_text(name)
    pair.open()
    result = pair.put(texts={"README.md": b"ours", "new.txt": b"new"}, skip_files=["skip.me"])
    assert result.not_copied == tuple(sorted(left))
    assert (pair.out / "README.md").read_text() == "ours"
    assert (pair.out / "README.source.md").read_text() == "README.md"
    for name in kept[:3]:
        assert (pair.out / name).read_text() == name
    assert set(hashes(pair.out)) == {
        *kept, "new.txt", "README.source.md", "MANIFEST.json", *pair.post.shards,
        "config.json", "tokenizer.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert verify_manifest(pair.out) == []


def test_an_index_that_is_not_in_use_is_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", tiny_tensors(), 2)
    folders.save_shard(folder / "model.safetensors", tiny_tensors())
    result = patch_folder(tmp_path / "out", source=Weights.open(folder), splices=(), durable=False)
    assert "model.safetensors.index.json" in result.not_copied
    assert "model-00001-of-00002.safetensors" in result.not_copied
    assert Weights.open(result).shards == ("model.safetensors",)


def test_an_adapter_is_patched_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    tensors = {n: ("F32", (2,), n.encode() * 8) for n in ("a", "b")}
    folders.save_shard(tmp_path / "lora" / "adapter_model.safetensors", tensors)
    source = Weights.open(tmp_path / "lora")
    at = source.tensors["b"]
    splices = [Splice(at.file.name, at.start, at.stop, None)]
    result = patch_folder(tmp_path / "out", source=source, splices=splices, durable=False)
    out = Weights.open(result)
    assert (out.read_bytes("a"), out.read_bytes("b")) == (b"a" * 8, bytes(8))
    assert set(result.files) == {"adapter_config.json", "adapter_model.safetensors"}


def test_permissions_follow_the_umask(pair: Pair) -> None:
    for path in pair.post.path.iterdir():
        path.chmod(0o444)  # those of the source are not taken over
    old = os.umask(0o027)
    try:
        pair.put()
    finally:
        os.umask(old)
    assert pair.out.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in pair.out.iterdir()} == {0o640}


def test_progress_counts_every_byte(pair: Pair) -> None:
    seen: list[tuple[int, int]] = []
    result = pair.put(
        pair.swap(*attention(pair)), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (result.nbytes, result.nbytes)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


# --- what is refused ------------------------------------------------------------------------------


def whole(pair: Pair) -> Splice:
    return pair.swap("lm_head.weight")[0]


def moved(splice: Splice, start: int = 0, stop: int = 0, **changes: Any) -> Splice:
    fields = vars(splice) | {"start": splice.start + start, "stop": splice.stop + stop}
    return Splice(**fields | changes)


BAD: dict[str, tuple[Callable[[Pair], list[Splice]], str]] = {
    "unknown-shard": (lambda p: [moved(whole(p), shard="x.safetensors")], "has no such shard"),
    "other-folder": (lambda p: [moved(whole(p), shard="../pre/" + ONE)], "has no such shard"),
    "in-the-header": (lambda p: [Splice(ONE, 8, 16, None)], "data of the shard are the bytes"),
    "behind-the-end": (
        lambda p: [Splice(ONE, (s := (p.post.path / ONE).stat().st_size) - 1, s + 1, None)],
        "data of the shard are the bytes",
    ),
    "empty": (lambda p: [moved(whole(p), stop=-whole(p).nbytes)], "are the bytes"),
    "backwards": (lambda p: [moved(whole(p), stop=-whole(p).nbytes - 1)], "are the bytes"),
    "overlapping": (
        lambda p: [whole(p), moved(whole(p), start=2, data=None)],
        "overlaps or precedes",
    ),
    "out-of-order": (
        lambda p: [
            moved(whole(p), start=4, data=None),
            moved(whole(p), stop=4 - whole(p).nbytes, data=None),
        ],
        "overlaps or precedes",
    ),
    "shorter-place": (lambda p: [moved(whole(p), start=2)], "takes 94 bytes, the place in .* 96"),
    "shorter-data": (lambda p: [moved(whole(p), data=lambda: b"x")], "takes 96 bytes, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_splices_that_cannot_be_are_refused(pair: Pair, case: str) -> None:
    make, message = BAD[case]
    before = hashes(pair.root)
    with pytest.raises(CheckpointError, match=message):
        pair.put(make(pair))
    assert hashes(pair.root) == before and beside(pair.root) == ["post", "pre"]


@pytest.mark.parametrize("at", ["a brace", "a letter"])
def test_a_header_that_is_written_wrong_is_seen(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """As by a disk that gives back other bytes; a letter of the metadata is as good as another."""
    real = os.copy_file_range
    for shard in pair.post.shards:  # the same tensors, and some metadata
        raw = b'{"__metadata__":{"a":"b"},' + pair.post.headers[shard].raw[1:]
        data = (pair.post.path / shard).read_bytes()[8 + len(pair.post.headers[shard].raw) :]
        (pair.post.path / shard).write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    pair.open()

    def wrong(fd: int, target: int, count: int, *places: int) -> int:
        done = real(fd, target, count, *places)
        if os.readlink(f"/proc/self/fd/{target}").endswith(".safetensors"):
            os.pwrite(target, b"x", 8 if at == "a brace" else 30)
        return done

    monkeypatch.setattr(os, "copy_file_range", wrong)
    monkeypatch.setattr(_newfile, "clone", lambda fd, target: False)
    with pytest.raises(VerificationFailed, match="broken" if at == "a brace" else "read as"):
        pair.put()
    assert beside(pair.root) == ["post", "pre"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "MANIFEST.json", ONE])
def test_texts_have_plain_names_of_their_own(pair: Pair, name: str) -> None:
    with pytest.raises(CheckpointError, match="name"):
        pair.put(texts={name: b""})
    assert beside(pair.root) == ["post", "pre"]


def test_an_unknown_way_of_copying_is_named(pair: Pair) -> None:
    with pytest.raises(UsageError, match="'reflink'; it can be auto, copy or link"):
        pair.put(copy="reflink")


def test_a_source_must_be_complete_but_not_what_ranges_are_taken_from(pair: Pair) -> None:
    splices = pair.swap("lm_head.weight")
    needed = splices[0].data.file.name
    gone = next(n for n in pair.pre.shards if n != needed)
    (pair.pre.path / gone).unlink()
    pre = Weights.open(pair.pre.path, partial=True)
    assert verify(pair.put(splices, inputs=[pre])).read_bytes("lm_head.weight") == pre.read_bytes(
        "lm_head.weight"
    )
    (pair.post.path / ONE).unlink()
    with pytest.raises(CheckpointError, match=f"not complete: {ONE} is missing"):
        pair.put(source=Weights.open(pair.post.path, partial=True), out=pair.root / "more")


@pytest.mark.parametrize("place", ["post", "pre", "post/out", "pre/out", "other", "other/out", "."])
def test_the_output_is_none_of_the_inputs(pair: Pair, place: str) -> None:
    (pair.root / "other").mkdir()
    before = hashes(pair.root)
    with pytest.raises(OutputExists):
        pair.put(
            pair.swap("lm_head.weight"),
            out=pair.root / place,
            inputs=[pair.pre, pair.root / "other"],
            force=True,
        )
    assert hashes(pair.root) == before


def test_a_function_that_fails_stops_the_patch(pair: Pair) -> None:
    with pytest.raises(ZeroDivisionError):
        pair.put([moved(whole(pair), data=lambda: 1 // 0)])
    assert beside(pair.root) == ["post", "pre"]


# --- sources that change --------------------------------------------------------------------------


@pytest.mark.parametrize("copy", ["auto", "copy", "link"])
@pytest.mark.parametrize("change", ["truncated", "touched", "replaced"])
@pytest.mark.parametrize("whose", ["post", "pre"])
@pytest.mark.parametrize("which", [0, -1], ids=["being-read", "later"])
def test_a_source_that_changes_meanwhile_is_noticed(
    pair: Pair, whose: str, which: int, change: str, copy: str
) -> None:
    splices = pair.swap(*attention(pair))
    weights = pair.post if whose == "post" else pair.pre
    victim = weights.path / weights.shards[which]
    first = True

    def meddle(done: int, total: int) -> None:
        nonlocal first
        if first and change == "truncated":
            os.truncate(victim, 100)
        elif first and change == "touched":
            os.utime(victim, ns=(1, 1))
        elif first:
            (weights.path / "new").write_bytes(victim.read_bytes())
            os.replace(weights.path / "new", victim)
        first = False

    expected = pair.put(splices, inputs=[pair.pre], out=pair.root / "good").files
    try:
        result = pair.put(splices, progress=meddle, inputs=[pair.pre], copy=copy)
    except CheckpointError as error:
        assert "change" in str(error)
        assert beside(pair.root) == ["good", "post", "pre"]
    else:  # the file that was opened is whole, and has no name any more
        assert change == "replaced" and which == 0
        assert result.files == expected


@pytest.mark.parametrize("whose", ["post", "pre"])
def test_a_source_that_changed_since_it_was_opened_is_noticed(pair: Pair, whose: str) -> None:
    splices = pair.swap("lm_head.weight")
    weights = pair.post if whose == "post" else pair.pre
    os.utime(weights.path / weights.tensors["lm_head.weight"].file.name, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed since it was opened"):
        pair.put(splices, inputs=[pair.pre])
    assert beside(pair.root) == ["post", "pre"]


# --- in processes of their own --------------------------------------------------------------------

SCRIPT = """
import sys
from morph.checkpoint import Splice, Weights, patch_folder
source = Weights.open(sys.argv[1])
place = source.tensors[sys.argv[3]]
third = place.nbytes // 3
splices = [Splice(place.file.name, place.start, place.start + third, None)]
patch_folder(sys.argv[2], source=source, splices=splices, copy=sys.argv[4], durable=False,
    texts={"morph.json": b"{}"}, identity={"b": 1, "a": {"y", "x"} and 2.5})
heavy = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"} & set(sys.modules)
assert not heavy, heavy
print(open("/proc/self/status").read())
"""


def test_same_inputs_give_same_bytes_in_any_process(pair: Pair) -> None:
    found = []
    for seed in range(5):
        out = pair.root / f"out-{seed}"
        run = python(
            *("-c", SCRIPT, pair.post.path, out, "lm_head.weight", "auto"),
            PYTHONHASHSEED=str(seed),
        )
        assert run.returncode == 0, run.stderr
        found.append(hashes(out))
        assert str(pair.root).encode() not in b"".join(p.read_bytes() for p in out.iterdir())
    assert all(f == found[0] for f in found)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("copy", ["auto", "copy"])
def test_memory_is_bounded_by_a_buffer(tmp_path: Path, copy: str) -> None:
    folder = folders.sparse(tmp_path / "in", "model.layers.0.big", 150_000_000)
    run = python("-c", SCRIPT, folder, tmp_path / "out", "model.layers.0.big", copy)
    assert run.returncode == 0, run.stderr
    shutil.rmtree(tmp_path / "out")
    assert int(run.stdout.split("VmHWM:")[1].split()[0]) < 64 * 1024


def test_a_manifest_is_sorted_and_has_no_times(pair: Pair) -> None:
    pair.put()
    data = json.loads((pair.out / "MANIFEST.json").read_text())
    assert set(data) == {"format", "morph", "files"}
    assert list(data["files"]) == sorted(data["files"])
    assert all(set(entry) == {"bytes", "sha256"} for entry in data["files"].values())
