"""An output appears whole or not at all, whatever fails, and a write that was stopped goes on."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph import checkpoint
from morph.checkpoint import (
    Checkpoint,
    Staging,
    Weights,
    _newfile,
    _staging,
    patch_folder,
    verify,
    verify_manifest,
    write_checkpoint,
)
from morph.errors import (
    CheckpointError,
    Interrupted,
    MorphError,
    OutputExists,
    StorageError,
    UsageError,
    VerificationFailed,
)

_spec = importlib.util.spec_from_file_location("_folders", Path(__file__).with_name("_folders.py"))
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)
Fault, beside, hashes, python = folders.Fault, folders.beside, folders.hashes, folders.python
raising, save, tiny_tensors = folders.raising, folders.save, folders.tiny_tensors


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(save(tmp_path / "in", tiny_tensors(), 2))


def write(source: Checkpoint, out: Path, **options: Any) -> checkpoint.Written:
    """Write without waiting for the disk, except where a test asks for it."""
    options = {"durable": False} | options
    return write_checkpoint(out, source=source, config=source.config, **options)


# --- where it is written ----------------------------------------------------------------------


def test_an_existing_output_is_only_replaced_by_force(source: Checkpoint, tmp_path: Path) -> None:
    write(source, tmp_path / "out", extra_files={"old.txt": b"1"})
    before = hashes(tmp_path / "out")
    with pytest.raises(OutputExists, match="--force"):
        write(source, tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    write(source, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert beside(tmp_path) == ["in", "out"]


def test_force_without_an_atomic_exchange(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_staging, "exchange", lambda one, other: False)
    write(source, tmp_path / "out", extra_files={"old.txt": b"1"})
    write(source, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert beside(tmp_path) == ["in", "out"]


def place_file(root: Path) -> Path:
    (root / "taken").write_text("x")
    return root / "taken"


def place_photos(root: Path) -> Path:
    (root / "photos").mkdir()
    (root / "photos" / "cat.jpg").write_text("x")
    return root / "photos"


def place_link(root: Path) -> Path:
    (root / "elsewhere").mkdir()
    (root / "link").symlink_to("elsewhere")
    return root / "link"


def place_input_by_link(root: Path) -> Path:
    (root / "same").symlink_to("in")
    return root / "same"


PLACES: dict[str, tuple[Callable[[Path], Path], type[MorphError]]] = {
    "the-input": (lambda r: r / "in", OutputExists),
    "the-input-spelled-otherwise": (lambda r: r / "in" / ".." / "in", OutputExists),
    "the-input-by-link": (place_input_by_link, OutputExists),
    "inside-the-input": (lambda r: r / "in" / "out", OutputExists),
    "around-the-input": (lambda r: r, OutputExists),
    "a-file": (place_file, OutputExists),
    "a-folder-of-something-else": (place_photos, OutputExists),
    "a-link": (place_link, OutputExists),
    "no-parent": (lambda r: r / "missing" / "out", UsageError),
    "parent-is-a-file": (lambda r: place_file(r) / "out", UsageError),
    "control-character": (lambda r: r / "a\x1bb", UsageError),
}


@pytest.mark.parametrize("force", [False, True], ids=["plain", "force"])
@pytest.mark.parametrize("case", PLACES)
def test_bad_places_are_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path, case: str, force: bool
) -> None:
    place, error = PLACES[case]
    out = place(tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(error) as caught:
        write(source, out, force=force)
    assert hashes(tmp_path) == before
    assert not any(n.startswith(".") for n in beside(tmp_path))
    assert "\x1b" not in str(caught.value)


def test_a_name_of_255_bytes(source: Checkpoint, tmp_path: Path) -> None:
    write(source, tmp_path / ("n" * 255))
    assert len(beside(tmp_path)) == 2


def test_too_little_space_is_said_with_both_numbers(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    usage = type("usage", (), {"free": 1234, "total": real.f_blocks, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"1234 bytes free, \d+ are needed") as caught:
        write(source, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert beside(tmp_path) == ["in"]


# --- faults -----------------------------------------------------------------------------------

Put = Callable[..., Any]


def writer(root: Path) -> Put:
    """Write tensors of a file and one from memory."""
    source = Checkpoint.open(save(root / "in", tiny_tensors()))
    new = {"new": ("U8", (3,), b"abc")}
    return lambda **options: write(source, root / "out", new_tensors=new, **options)


def patcher(root: Path) -> Put:
    """Patch a shard with splices of every kind."""
    pre, post = map(Weights.open, folders.many(root, 1))
    splices = folders.splices_of(pre, post)

    def put(extra_files: dict[str, bytes] | None = None, **options: Any) -> Any:
        texts = {"morph.json": b"{}"} | (extra_files or {})
        given = {"source": post, "splices": splices, "texts": texts, "inputs": [pre]}
        return patch_folder(root / "out", **given, **{"durable": False} | options)

    return put


WRITERS = {"write": writer, "patch": patcher}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "ENOSPC": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "EIO": lambda: OSError(errno.EIO, "Input/output error"),
    "EDQUOT": lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "EROFS": lambda: OSError(errno.EROFS, "Read-only file system"),
    "ctrl-c": KeyboardInterrupt,
}


CASES = [(kind, False) for kind in ERRORS] + [("ENOSPC", True), ("ctrl-c", True)]


@pytest.mark.parametrize(("kind", "force"), CASES, ids=[f"{k}{'-force' * f}" for k, f in CASES])
@pytest.mark.parametrize("command", WRITERS)
def test_an_error_at_any_call_leaves_nothing_half_done(
    tmp_path: Path, command: str, kind: str, force: bool
) -> None:
    out, put = tmp_path / "out", WRITERS[command](tmp_path)
    inputs = {n: hashes(tmp_path / n) for n in beside(tmp_path)}
    put()
    good, old, count, number = hashes(out), {}, 0, 0
    while count >= number:
        number += 1
        shutil.rmtree(out, ignore_errors=True)
        if force:
            put(extra_files={"old.txt": b"old"})
            old = hashes(out)
        fault, error = Fault(number, raising(ERRORS[kind]())), None
        with fault.installed():
            try:
                put(force=force, durable=True)
            except (MorphError, KeyboardInterrupt) as caught:
                error = caught
        count, call = fault.count, fault.calls[min(number, fault.count) - 1]
        stopped = (KeyboardInterrupt, Interrupted) if kind == "ctrl-c" else StorageError
        assert error is None or isinstance(error, stopped), (call, error)
        found = hashes(out) if out.exists() else {}
        assert found in (good, old), call
        hidden = set(beside(tmp_path)) - set(inputs) - {"out"}
        if error is not None and "are kept in" in str(error):
            assert found == old
            assert {re.sub("[0-9a-f]{8}", "KEY", n) for n in hidden} >= {
                ".out.partial-KEY", ".out.partial-KEY.jsonl"
            }  # fmt: skip
        elif call[0] not in ("unlink", "rmdir"):  # what cannot be removed is left to the next
            assert not hidden, call
        put(force=force or out.exists())
        assert hashes(out) == good, call
        assert set(beside(tmp_path)) == {*inputs, "out"}, call
    assert number > 30
    assert {n: hashes(tmp_path / n) for n in inputs} == inputs


def test_a_full_disk_says_how_many_bytes_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, out = patcher(tmp_path), tmp_path / "out"
    total = put().nbytes
    shutil.rmtree(out)
    usage = type("usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    def full(*args: Any) -> None:
        usage.free = 100
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_newfile, "reserve", full)
        with pytest.raises(StorageError, match="The disk is full") as caught:
            put()
    assert f"{total - 100} more bytes are needed" in str(caught.value)
    assert beside(tmp_path) == ["post", "pre"]


def test_space_is_taken_before_it_is_filled(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that does not fit is refused at its first byte, not at its last."""
    taken: dict[str, int] = {}
    real = _newfile.reserve

    def reserve(fd: int, size: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        assert os.fstat(fd).st_size == 0
        real(fd, size)
        taken[name] = size

    monkeypatch.setattr(_newfile, "reserve", reserve)
    write(source, tmp_path / "out")
    for shard in source.shards:
        assert taken[shard] == (tmp_path / "out" / shard).stat().st_size


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_kernel_cannot_copy_blocks_are_read_and_written(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write(source, tmp_path / "one")

    def refuse(*args: Any) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    write(source, tmp_path / "two")
    monkeypatch.delattr(os, "copy_file_range")
    write(source, tmp_path / "three")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "three")


def test_short_reads_and_writes_are_continued(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, tmp_path / "one")
    real_copy, real_write, real_read = os.copy_file_range, os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:7], at))
    monkeypatch.setattr(os, "pread", lambda fd, count, at: real_read(fd, min(count, 64), at))
    monkeypatch.setattr(
        os, "copy_file_range", lambda a, b, count, x, y: real_copy(a, b, min(count, 5), x, y)
    )
    write(source, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.parametrize("kernel", [True, False], ids=["in-kernel", "by-blocks"])
@pytest.mark.parametrize("change", ["truncated", "touched", "replaced"])
def test_a_source_that_changes_meanwhile_is_noticed(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    victim = source.path / source.shards[-1]

    def meddle(done: int, total: int) -> None:
        if change == "truncated":
            os.truncate(victim, 100)
        elif change == "touched":
            os.utime(victim, ns=(1, 1))
        else:
            (source.path / "new").write_bytes(victim.read_bytes())
            os.replace(source.path / "new", victim)

    with pytest.raises(CheckpointError, match="change"):
        write(source, tmp_path / "out", progress=meddle)
    assert beside(tmp_path) == ["in"]


def test_a_changed_source_is_noticed_when_read(source: Checkpoint) -> None:
    os.utime(source.path / source.shards[0], ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed"):
        source.nonfinite()


# --- checks before and after ------------------------------------------------------------------


def test_the_check_sees_the_complete_folder_before_it_appears(
    source: Checkpoint, tmp_path: Path
) -> None:
    seen: list[str] = []

    def look(folder: Path) -> None:
        assert not (tmp_path / "out").exists()
        assert verify_manifest(folder) == []
        seen.extend(beside(folder))

    write(source, tmp_path / "out", verify=look)
    assert seen == beside(tmp_path / "out")


def test_a_check_that_fails_stops_the_write(source: Checkpoint, tmp_path: Path) -> None:
    error = VerificationFailed("logits differ")
    with pytest.raises(VerificationFailed, match="logits"):
        write(source, tmp_path / "out", verify=lambda folder: raising(error)())
    assert beside(tmp_path) == ["in"]


def test_a_check_may_not_change_what_it_checks(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match=r"litter\.txt"):
        write(source, tmp_path / "out", verify=lambda f: (f / "litter.txt").write_text("x"))
    assert beside(tmp_path) == ["in"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-flip": (lambda f: flip(f / "model-00002-of-00002.safetensors"), "expected sha256"),
    "truncated": (lambda f: os.truncate(f / "tokenizer.json", 3), "expected 8 bytes, found 3"),
    "missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "added": (lambda f: (f / "more.txt").write_text("x"), "more.txt: not in the manifest"),
    "config": (lambda f: flip(f / "config.json"), "config.json: expected sha256"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_by_file(source: Checkpoint, tmp_path: Path, case: str) -> None:
    write(source, tmp_path / "out")
    damage, message = DAMAGE[case]
    damage(tmp_path / "out")
    assert len(verify_manifest(tmp_path / "out")) == 1
    with pytest.raises(VerificationFailed, match=message):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"x": 1}}',
        '{"format": 1, "format": 1, "files": {}}',
    ],
    ids=["list", "format", "traversal", "absolute", "entry", "doubled-key"],
)
def test_a_hostile_manifest_is_refused(source: Checkpoint, manifest: str) -> None:
    (source.path / "MANIFEST.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        verify(source.path)


def test_a_folder_without_manifest_was_not_written_by_morph(source: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json"):
        verify(source.path)


def test_staging_serves_any_folder(tmp_path: Path) -> None:
    with Staging(tmp_path / "state") as stage:
        stage.write("a.json", b"{}")
        stage.write("deep/b.bin", bytes(100))
        stage.publish()
    assert verify_manifest(tmp_path / "state") == []
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "other") as stage:
        stage.write("a.json", b"{}")
        raise ZeroDivisionError
    assert beside(tmp_path) == ["state"]
