"""Cloned, linked, copied in the kernel or in blocks: a patch is the same bytes, and only ours."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph.checkpoint import (
    Splice,
    TensorInfo,
    Weights,
    _newfile,
    _staging,
    verify_manifest,
)
from morph.errors import (
    CheckpointError,
    StorageError,
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


# --- every way of copying gives the same bytes ----------------------------------------------------


def shuffled(pair: Pair, seed: int) -> tuple[list[Splice], dict[str, bytearray]]:
    """Random ranges of every kind, across tensors, and the shards as they must come out."""
    rng = random.Random(seed)
    splices, want = [], {}
    for shard in pair.post.shards:
        want[shard] = bytearray((pair.post.path / shard).read_bytes())
        first, last = 8 + len(pair.post.headers[shard].raw), len(want[shard])
        marks = sorted(rng.sample(range(first, last + 1), 2 * rng.randint(0, 6)))
        for start, stop in zip(marks[::2], marks[1::2]):
            count, donor = stop - start, pair.pre.path / rng.choice(pair.pre.shards)
            kind = rng.choice(["place", "zeros", "computed"])
            raw = donor.read_bytes()
            if kind == "place" and count < len(raw):
                at = rng.randrange(len(raw) - count)
                data: Any = TensorInfo("U8", (count,), donor, at, at + count)
                want[shard][start:stop] = raw[at : at + count]
            elif kind == "zeros":
                data, want[shard][start:stop] = None, bytes(count)
            else:
                made = rng.randbytes(count)
                data, want[shard][start:stop] = (lambda made=made: made), made
            splices.append(Splice(shard, start, stop, data))
    return splices, want


def fake_clone(fd: int, target: int) -> bool:
    """What FICLONE does, for file systems that cannot share blocks."""
    os.pwrite(target, os.pread(fd, os.fstat(fd).st_size, 0), 0)
    return True


def refusing(code: int) -> Callable[..., Any]:
    return folders.raising(OSError(code, "no"))


def short(real: Callable[..., int], index: int, most: int) -> Callable[..., int]:
    """The call, but it never does more than a few bytes at once."""

    def call(*args: Any) -> int:
        given = list(args)
        if isinstance(given[index], int):
            given[index] = min(given[index], most)
        elif isinstance(given[index], list):
            given[index] = [given[index][0][:most]]
        else:
            given[index] = memoryview(given[index])[:most]
        return real(*given)

    return call


def ways(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return how to set up every way of copying, each with its options."""

    def set_(owner: Any, name: str, value: Any) -> None:
        monkeypatch.setattr(owner, name, value)

    def cloning() -> dict[str, Any]:
        set_(_newfile, "clone", fake_clone)
        set_(_staging, "clone", fake_clone)
        return {}

    def without(code: int) -> Callable[[], dict[str, Any]]:
        return lambda: (set_(os, "copy_file_range", refusing(code)), {})[1]

    def sized(name: str, size: int, **options: Any) -> Callable[[], dict[str, Any]]:
        return lambda: (set_(_newfile, name, size), options)[1]

    return {
        "auto": dict,
        "clone": cloning,
        "copy": lambda: {"copy": "copy"},
        "link": lambda: {"copy": "link"},
        "unhashed": lambda: {"hashing": False},
        "durable": lambda: {"durable": True},
        "EXDEV": without(errno.EXDEV),
        "EINVAL": without(errno.EINVAL),
        "ENOSYS": without(errno.ENOSYS),
        "EOPNOTSUPP": without(errno.EOPNOTSUPP),
        "no-call": lambda: (monkeypatch.delattr(os, "copy_file_range"), {})[1],
        "no-reserve": lambda: (set_(_newfile, "reserve", lambda fd, size: None), {})[1],
        "small-steps": sized("STEP", 7),
        "small-blocks": sized("MIB", 5, copy="copy"),
        "tiny-hash-blocks": sized("BLOCK", 3),
        "short-writes": lambda: (set_(os, "pwrite", short(os.pwrite, 1, 7)), {"copy": "copy"})[1],
        "short-reads": lambda: (set_(os, "preadv", short(os.preadv, 1, 9)), {"copy": "copy"})[1],
        "short-copies": lambda: (
            set_(os, "copy_file_range", short(os.copy_file_range, 2, 5)), {},
        )[1],
    }  # fmt: skip


WAYS = list(ways(pytest.MonkeyPatch()))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_copying_gives_the_same_bytes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    before = hashes(pair.root)
    for seed in range(3):
        splices, want = shuffled(pair, seed)
        with monkeypatch.context() as patch:
            options = ways(patch)[way]()
            result = pair.put(splices, inputs=[pair.pre], **options)
        for shard, data in want.items():
            assert (result.path / shard).read_bytes() == data, (seed, shard)
        if result.files is not None:
            assert verify_manifest(result) == []
        shutil.rmtree(pair.out)
        assert hashes(pair.root) == before


def test_copy_never_shares_blocks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    never = folders.raising(AssertionError("blocks may be shared"))
    for owner, name in ((os, "copy_file_range"), (os, "link"), (_newfile, "clone")):
        monkeypatch.setattr(owner, name, never)
    monkeypatch.setattr(_staging, "clone", never)
    pair.put(pair.swap(*attention(pair)), copy="copy")
    with pytest.raises(AssertionError):
        pair.put(copy="auto", force=True)


def test_a_clone_only_writes_the_splices(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    real = os.copy_file_range

    def copying(*args: Any) -> int:
        nonlocal written
        written += real(*args)
        return written

    for owner in (_newfile, _staging):
        monkeypatch.setattr(owner, "clone", fake_clone)
    monkeypatch.setattr(os, "copy_file_range", lambda *a: (copying(*a), a[2])[1])
    result = pair.put(pair.swap(*attention(pair)), inputs=[pair.pre])
    side = sum((pair.out / n).stat().st_size for n in result.files if n not in pair.post.shards)
    assert written == result.spliced_bytes + side


def test_space_is_only_asked_for_what_takes_some(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    splices = pair.swap("lm_head.weight")
    side = sum(p.stat().st_size for p in pair.post.path.glob("*.json"))
    spliced = splices[0].nbytes
    shard = (pair.post.path / splices[0].shard).stat().st_size
    usage = type("usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    for way, need in (("clone", spliced + side), ("link", shard + side)):
        with monkeypatch.context() as patch:
            for owner in (_newfile, _staging):
                patch.setattr(owner, "clone", lambda fd, target: False)
            options = ways(patch)[way]()
            usage.free = need + need // 100 + 2**20 - 1
            with pytest.raises(StorageError, match=f"{usage.free + 1} are needed"):
                pair.put(splices, inputs=[pair.pre], force=True, **options)
            usage.free += 1
            pair.put(splices, inputs=[pair.pre], force=True, **options)


# --- links ----------------------------------------------------------------------------------------


def test_shards_without_a_splice_are_linked(pair: Pair) -> None:
    before = hashes(pair.post.path)
    splices = pair.swap("lm_head.weight")
    result = pair.put(splices, copy="link", inputs=[pair.pre])
    alike = [n for n in pair.post.shards if n != splices[0].shard]
    assert result.linked == tuple(alike) and result.notes == ()
    for name in beside(pair.out):
        same = (pair.post.path / name).exists() and os.path.samefile(
            pair.post.path / name, pair.out / name
        )
        assert same == (name in alike)
    assert verify_manifest(result) == []
    pair.put(splices, copy="link", inputs=[pair.pre], force=True)  # the old links are replaced
    shutil.rmtree(pair.out)
    assert hashes(pair.post.path) == before


def hub(root: Path, folder: Path) -> Path:
    """Put a folder into a cache: blobs of weights are named by their sha256."""
    repo = root / "models--a--b"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name, digest in hashes(folder).items():
        blob = digest if name.endswith(".safetensors") else digest[:40]
        shutil.copy(folder / name, repo / "blobs" / blob)
        (repo / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{blob}")
    return repo / "snapshots" / "abc"


LINKLESS = {
    "a-cache": "Hugging Face cache",
    "another-user": "another user",
    "another-disk": "file system cannot",
}


@pytest.mark.parametrize("case", LINKLESS)
def test_where_links_are_not_made_files_are_copied(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    source: Weights = pair.post
    if case == "a-cache":
        source = Weights.open(hub(pair.root, pair.post.path))
    elif case == "another-user":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        monkeypatch.setattr(os, "link", refusing(errno.EXDEV))
    result = pair.put(source=source, copy="link")
    assert result.linked == () and len(result.notes) == 3
    assert all(LINKLESS[case] in note and "copied, not linked" in note for note in result.notes)
    assert hashes(pair.out).items() >= hashes(pair.post.path).items()
    assert {p.stat().st_nlink for p in pair.out.iterdir()} == {1}


def test_a_source_that_is_replaced_before_it_is_linked_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def replacing(original: Path, path: Path, **options: Any) -> None:
        (pair.root / "new").write_bytes(original.read_bytes())
        os.replace(pair.root / "new", original)
        real(original, path, **options)

    monkeypatch.setattr(os, "link", replacing)
    with pytest.raises(CheckpointError, match="replaced meanwhile"):
        pair.put(copy="link")
    assert beside(pair.root) == ["post", "pre"]


# --- what the source says of itself ---------------------------------------------------------------


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("told_by", ["a-cache", "a-manifest"])
def test_a_shard_is_compared_with_what_the_source_says(pair: Pair, told_by: str) -> None:
    if told_by == "a-cache":
        folder = hub(pair.root, pair.post.path)
    else:
        folder = pair.put(out=pair.root / "written").path
    source = Weights.open(folder)
    splices = pair.swap("lm_head.weight")
    hit = splices[0].shard
    other = next(n for n in source.shards if n != hit)
    pair.put(splices, source=source)  # all is well
    damage(folder / hit)
    source = Weights.open(folder)
    pair.put(splices, source=source, force=True)  # what is spliced has no digest to compare with
    damage(folder / other)
    source, before = Weights.open(folder), hashes(pair.out)
    with pytest.raises(VerificationFailed, match=rf"{other} is damaged.*Nothing was written"):
        pair.put(splices, source=source, force=True)
    assert hashes(pair.out) == before
    pair.put(splices, source=source, force=True, hashing=False)


def test_a_manifest_of_somebody_else_is_not_copied(pair: Pair) -> None:
    (pair.post.path / "MANIFEST.json").write_text("{}")
    result = pair.put()
    assert "MANIFEST.json is not understood" in result.notes[0]
    assert verify_manifest(result) == []
