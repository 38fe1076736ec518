"""A write that was stopped goes on from the files that are finished, and from nothing else."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morph.checkpoint import (
    Checkpoint,
    Staging,
    Weights,
    _claim,
    _newfile,
    _staging,
    patch_folder,
    verify,
    verify_manifest,
    write_checkpoint,
)
from morph.errors import (
    Interrupted,
    MismatchError,
    OutputExists,
    StorageError,
    VerificationFailed,
)

_spec = importlib.util.spec_from_file_location("_folders", Path(__file__).with_name("_folders.py"))
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)
beside, hashes, raising, save = folders.beside, folders.hashes, folders.raising, folders.save
SHARDS = 4


class Patch:
    """A patch of four shards, which can be stopped at any moment."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        folders.many(root, SHARDS)
        self.identity: dict[str, Any] = {"method": "exact"}

    def put(self, **options: Any) -> Any:
        pre, post = Weights.open(self.root / "pre"), Weights.open(self.root / "post")
        given = {"splices": folders.splices_of(pre, post), "texts": {"morph.json": b"{}"}}
        given |= {"inputs": [pre], "identity": self.identity, "durable": False}
        return patch_folder(self.out, source=post, **given | options)

    def stop(self, **options: Any) -> set[str]:
        """Stop a run when all files are finished; return the names of those that are kept."""
        with pytest.raises(Interrupted, match=r"are kept in .*the same command goes on") as caught:
            self.put(verify=raising(KeyboardInterrupt()), **options)
        assert caught.value.exit_code == 7
        return set(self.finished())

    @property
    def journal(self) -> Path:
        (path,) = self.root.glob(".out.partial-*.jsonl")
        return path

    @property
    def folder(self) -> Path:
        return self.journal.with_suffix("")

    def finished(self) -> list[str]:
        """Names in the journal, in order."""
        lines = self.journal.read_text().splitlines()[1:]
        return [json.loads(line)["name"] for line in lines]

    def good(self) -> dict[str, str]:
        """What the output must be."""
        self.put()
        found = hashes(self.out)
        shutil.rmtree(self.out)
        return found


@pytest.fixture
def patch(tmp_path: Path) -> Patch:
    return Patch(tmp_path)


def test_a_stop_at_any_step_changes_nothing_in_the_result(patch: Patch) -> None:
    good, step, taken = patch.good(), 0, 0
    while True:
        step += 1
        seen = 0

        def stop(done: int, total: int, step: int = step) -> None:
            nonlocal seen
            seen += 1
            if seen == step:
                raise KeyboardInterrupt

        try:
            patch.put(progress=stop)
            break
        except (Interrupted, KeyboardInterrupt) as error:
            kept = set(patch.finished()) if isinstance(error, Interrupted) else set()
        again = patch.put()
        assert set(again.resumed) == kept
        assert hashes(patch.out) == good and again.files.items() <= good.items()
        assert beside(patch.root) == ["out", "post", "pre"]
        shutil.rmtree(patch.out)
        taken += len(kept)
    assert step > 20 and taken > 20


def test_everything_that_was_finished_is_taken_over(patch: Patch) -> None:
    good = patch.good()
    kept = patch.stop()
    assert kept == set(good) - {"MANIFEST.json"}
    before = {n: (patch.folder / n).stat().st_ino for n in kept}
    seen: list[tuple[int, int]] = []
    result = patch.put(progress=lambda done, total: seen.append((done, total)))
    assert set(result.resumed) == kept
    assert seen[-1] == (result.nbytes, result.nbytes)
    assert {n: (patch.out / n).stat().st_ino for n in kept} == before
    assert hashes(patch.out) == good
    assert beside(patch.root) == ["out", "post", "pre"]


def replaced_by_link(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere"
    elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(elsewhere)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit-flip": flip,
    "truncated": lambda f: os.truncate(f, f.stat().st_size - 1),
    "longer": lambda f: os.truncate(f, f.stat().st_size + 1),
    "missing": lambda f: f.unlink(),
    "a-link": replaced_by_link,
    "a-folder": lambda f: (f.unlink(), f.mkdir()),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_finished_file_that_was_damaged_is_made_anew(patch: Patch, case: str) -> None:
    good, kept = patch.good(), patch.stop()
    name = "model-00002-of-00004.safetensors"
    DAMAGE[case](patch.folder / name)
    assert set(patch.put().resumed) == kept - {name}
    assert hashes(patch.out) == good
    assert not any(p.is_symlink() for p in patch.out.iterdir())
    assert set(beside(patch.root)) - {"elsewhere"} == {"out", "post", "pre"}


def test_links_are_taken_over_only_where_links_are_asked_for(patch: Patch) -> None:
    """Both ways of copying give the same bytes, so they have one key."""
    for copy, links in (("link", 2), ("copy", 1)):
        patch.stop(splices=[], copy="link")
        assert set(patch.put(splices=[], copy=copy).resumed) >= {"config.json"}
        assert {p.stat().st_nlink for p in patch.out.glob("model-*")} == {links}
        shutil.rmtree(patch.out)


def test_a_link_of_the_right_length_and_content_is_not_taken_over(patch: Patch) -> None:
    """The size of a link is that of its target's name; what it leads to may change any time."""
    elsewhere = patch.root / "elsewhere"
    text = b"x" * len(str(elsewhere))
    elsewhere.write_bytes(text)
    patch.stop(texts={"morph.json": text})
    (patch.folder / "morph.json").unlink()
    (patch.folder / "morph.json").symlink_to(elsewhere)
    assert "morph.json" not in patch.put(texts={"morph.json": text}).resumed
    assert not (patch.out / "morph.json").is_symlink()
    assert elsewhere.read_bytes() == text


def test_a_file_that_is_made_anew_is_not_believed_before_it_is_finished(patch: Patch) -> None:
    """Without digests, a file of full length that was killed while it was made anew looks right."""
    patch.put(hashing=False)
    good = hashes(patch.out)
    shutil.rmtree(patch.out)
    patch.stop(hashing=False, durable=True)
    name = "model-00001-of-00004.safetensors"
    os.truncate(patch.folder / name, 100)
    child = os.fork()
    if not child:  # dies after the first bytes of the shard, its whole length being reserved
        patch.put(hashing=False, durable=True, progress=lambda done, total: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (patch.folder / name).stat().st_size == (patch.root / "post" / name).stat().st_size
    assert name not in patch.put(hashing=False).resumed
    assert hashes(patch.out) == good


def test_a_journal_goes_on_after_a_tear(patch: Patch) -> None:
    kept = patch.stop()
    os.truncate(patch.journal, patch.journal.stat().st_size - 20)
    assert patch.stop() == kept
    assert set(patch.put().resumed) == kept


def test_files_that_the_journal_does_not_name_are_dropped(patch: Patch) -> None:
    good, kept = patch.good(), patch.stop()
    lines = patch.journal.read_text().splitlines(keepends=True)
    name = json.loads(lines[2])["name"]
    patch.journal.write_text("".join(lines[:2] + lines[3:]))
    (patch.folder / "deep").mkdir()
    for litter in ("litter.txt", "deep/litter.txt", "MANIFEST.json"):
        (patch.folder / litter).write_text("x")
    (patch.folder / "link").symlink_to(patch.root / "pre" / "config.json")
    assert set(patch.put().resumed) == kept - {name}
    assert hashes(patch.out) == good
    assert (patch.root / "pre" / "config.json").exists()


def test_a_torn_journal_is_believed_up_to_the_tear(patch: Patch) -> None:
    good = patch.good()
    patch.stop()
    raw, key = patch.journal.read_bytes(), patch.folder.name
    lines = raw.split(b"\n")
    ends = [sum(len(line) + 1 for line in lines[: i + 1]) for i in range(len(lines) - 1)]
    shutil.copytree(patch.folder, patch.root / "saved")
    cuts = [0, 1, ends[0] - 1, *ends, *(e + 1 for e in ends[:-1]), *(e - 1 for e in ends[1:])]
    for cut in cuts:
        (patch.root / f"{key}.jsonl").write_bytes(raw[:cut])
        shutil.rmtree(patch.root / key, ignore_errors=True)
        shutil.copytree(patch.root / "saved", patch.root / key)
        whole = max(0, sum(end <= cut for end in ends) - 1)
        assert len(patch.put().resumed) == whole, cut
        assert hashes(patch.out) == good
        assert beside(patch.root) == ["out", "post", "pre", "saved"]
        shutil.rmtree(patch.out)


HOSTILE = {
    "another-folder": {"name": "../pre/config.json", "bytes": 10, "sha256": "0" * 64},
    "absolute": {"name": "/etc/passwd", "bytes": 10, "sha256": "0" * 64},
    "no-digest": {"name": "config.json", "bytes": 10, "sha256": "x"},
    "bytes": {"name": "config.json", "bytes": "10", "sha256": "0" * 64},
    "more": {"name": "config.json", "bytes": 10, "sha256": "0" * 64, "x": 1},
    "list": [1],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_journal_reaches_nothing_else(patch: Patch, case: str) -> None:
    good, inputs = patch.good(), hashes(patch.root)
    kept = patch.stop()
    with open(patch.journal, "a") as file:
        file.write(json.dumps(HOSTILE[case]) + "\n")
    assert set(patch.put().resumed) == kept
    assert hashes(patch.out) == good
    shutil.rmtree(patch.out)
    assert hashes(patch.root) == inputs


# --- other inputs, other options ------------------------------------------------------------------


def touch(patch: Patch) -> None:
    os.utime(patch.root / "post" / "model-00001-of-00004.safetensors", ns=(1, 1))


def donor(patch: Patch) -> None:
    os.utime(patch.root / "pre" / "model-00001-of-00004.safetensors", ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Patch], object], str]] = {
    "an-option": (
        lambda p: p.identity.update(method="ridge", rho=0.1),
        "method was exact, is ridge; rho was not there, is 0.1",
    ),
    "the-source": (touch, r" model-00001-of-00004\.safetensors was changed \(mtime_ns\)"),
    "a-donor": (donor, r" pre/model-00001-of-00004\.safetensors was changed \(mtime_ns\)"),
    "a-side-file": (
        lambda p: (p.root / "post" / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json was changed \(bytes, mtime_ns\)",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_write_of_other_inputs_is_not_gone_on_with(patch: Patch, case: str) -> None:
    patch.stop()
    left = hashes(patch.root)
    act, message = CHANGES[case]
    act(patch)
    changed = hashes(patch.root)
    with pytest.raises(MismatchError, match=message) as caught:
        patch.put()
    assert "--restart" in str(caught.value) and caught.value.exit_code == 4
    assert hashes(patch.root) == changed
    assert {n: h for n, h in changed.items() if n.startswith(".")} == {
        n: h for n, h in left.items() if n.startswith(".")
    }
    assert patch.put(restart=True).resumed == ()
    verify_manifest(patch.out)
    assert beside(patch.root) == ["out", "post", "pre"]


def test_splices_at_other_places_are_another_write(patch: Patch) -> None:
    patch.stop()
    pre, post = Weights.open(patch.root / "pre"), Weights.open(patch.root / "post")
    splices = folders.splices_of(pre, post)
    with pytest.raises(MismatchError, match="splices was"):
        patch.put(splices=splices[:2] + splices[3:])
    with pytest.raises(
        MismatchError, match=r"pre/model-00001-of-00004\.safetensors is not read now"
    ):
        patch.put(splices=())


def test_a_write_that_finished_nothing_is_in_nobody_s_way(patch: Patch) -> None:
    patch.stop()
    first = patch.journal.read_text().splitlines(keepends=True)[0]
    patch.journal.write_text(first)
    patch.identity["method"] = "ridge"
    assert patch.put().resumed == ()
    assert beside(patch.root) == ["out", "post", "pre"]


def test_a_text_that_changed_is_written_anew(patch: Patch) -> None:
    kept = patch.stop()
    assert set(patch.put(texts={"morph.json": b"[]"}).resumed) == kept - {"morph.json"}
    assert (patch.out / "morph.json").read_text() == "[]"
    verify_manifest(patch.out)


def test_an_error_of_the_inputs_or_of_a_check_removes_what_was_finished(patch: Patch) -> None:
    patch.stop()
    with pytest.raises(VerificationFailed):
        patch.put(verify=raising(VerificationFailed("logits differ")))
    assert beside(patch.root) == ["post", "pre"]


def test_without_hashes_size_and_header_are_compared(patch: Patch) -> None:
    good = patch.good()
    kept = patch.stop(hashing=False, durable=True)
    name = "model-00003-of-00004.safetensors"
    with open(patch.folder / name, "r+b") as file:
        file.seek(8)
        file.write(b"!")
    result = patch.put(hashing=False)
    assert result.files is None and set(result.resumed) == kept - {name}
    assert hashes(patch.out) == {n: h for n, h in good.items() if n != "MANIFEST.json"}
    shutil.rmtree(patch.out)
    patch.stop(hashing=False, durable=True)
    assert patch.put().resumed == ()  # there is no digest to compare with
    assert hashes(patch.out) == good


def test_what_neither_disk_nor_digest_vouches_for_is_not_kept(patch: Patch) -> None:
    with pytest.raises(KeyboardInterrupt):
        patch.put(verify=raising(KeyboardInterrupt()), hashing=False)
    assert beside(patch.root) == ["post", "pre"]


def test_files_that_are_kept_need_no_space_again(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch.stop()
    usage = type("usage", (), {"free": 2**20 + 100})  # the margin, and little more
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    patch.put()
    with pytest.raises(StorageError, match="bytes free"):
        patch.put(force=True)
    assert beside(patch.root) == ["out", "post", "pre"]


def test_a_full_disk_counts_what_is_kept(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    total = patch.put().nbytes
    shutil.rmtree(patch.out)
    usage = type("usage", (), {"free": 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    real, calls = _newfile.reserve, 0

    def reserve(fd: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls < SHARDS:
            return real(fd, size)
        while len(patch.finished()) < 2:
            time.sleep(0.01)
        usage.free = 100
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_newfile, "reserve", reserve)
    with pytest.raises(StorageError, match="The disk is full") as caught:
        patch.put()
    count, kept = map(int, re.search(r"\((\d+), (\d+) bytes\)", str(caught.value)).groups())
    assert count == len(patch.finished()) >= 2
    assert kept == sum(p.stat().st_size for p in patch.folder.iterdir())
    assert f"{total - kept - 100} more bytes are needed" in str(caught.value)


# --- tensors in memory ----------------------------------------------------------------------------


def test_tensors_in_memory_are_compared_and_not_believed(tmp_path: Path) -> None:
    source = Checkpoint.open(save(tmp_path / "in", folders.tiny_tensors(), 3))
    name = next(n for n, i in source.tensors.items() if i.file.name == source.shards[0])
    shape = source.tensors[name].shape
    ones, twos = bytes([1, 0]) * 48, bytes([2, 0]) * 48
    assert len(ones) == source.tensors[name].nbytes

    def put(data: bytes, new: bytes = b"abc", **options: Any) -> Any:
        return write_checkpoint(
            tmp_path / "out",
            source=source,
            config=source.config,
            replaced={name: ("BF16", shape, lambda: data)},
            new_tensors={"new": ("U8", (3,), new)},
            durable=False,
            **options,
        )

    def stop() -> None:
        with pytest.raises(Interrupted):
            put(ones, verify=raising(KeyboardInterrupt()))

    first, _, last = source.shards
    for data, new, anew in (
        (ones, b"abc", set()),
        (twos, b"abc", {first}),
        (ones, b"abd", {last}),
        (twos, b"abd", {first, last}),
    ):
        stop()
        result = put(data, new)
        assert set(result.files) - set(result.resumed) == anew
        out = verify(result)
        assert (out.read_bytes(name), out.read_bytes("new")) == (data, new)
        shutil.rmtree(tmp_path / "out")
    stop()
    other = write_checkpoint(tmp_path / "out", source=source, config=source.config, durable=False)
    assert other.resumed == ()  # what another call left is dropped
    assert beside(tmp_path) == ["in", "out"]


# --- signals, and several writers -----------------------------------------------------------------

WAITING = """
import signal, sys, time
from pathlib import Path
from _folders import many, splices_of
from morph.checkpoint import Weights, patch_folder
from morph.errors import MorphError
for number in (signal.SIGINT, signal.SIGTERM):  # as the command line does
    signal.signal(number, signal.default_int_handler)
root = Path(sys.argv[1])
pre, post = Weights.open(root / "pre"), Weights.open(root / "post")

def progress(done, total):
    if done < total:
        return
    while not any(p.read_bytes().count(b"sha256") > 3 for p in root.glob(".out.partial-*.jsonl")):
        time.sleep(0.01)
    print("now", flush=True)
    time.sleep(60 if sys.argv[2] == "stop" else 0.5)

try:
    patch_folder(root / "out", source=post, splices=splices_of(pre, post), inputs=[pre],
        texts={"morph.json": b"{}"}, identity={"method": "exact"}, progress=progress)
except MorphError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(patch: Patch, mode: str) -> subprocess.Popen[str]:
    """Start a writer in a process of its own, and wait until it is in the middle."""
    command = [sys.executable, "-c", WAITING, str(patch.root), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=folders.clean())
    assert process.stdout.readline() == "now\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_middle(patch: Patch, number: signal.Signals) -> None:
    good = patch.good()
    process = start(patch, "stop")
    process.send_signal(number)
    said, _ = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and not said
    else:
        assert process.returncode == 7
        assert said.startswith("stopped. Finished files are kept in") and "same command" in said
    assert not patch.out.exists()
    kept = set(patch.finished())
    assert len(kept) > 2
    assert set(patch.put().resumed) == kept
    assert hashes(patch.out) == good
    assert beside(patch.root) == ["out", "post", "pre"]


def test_two_processes_write_one_output(patch: Patch) -> None:
    good, before = patch.good(), time.time()
    first = start(patch, "go on")
    with pytest.raises(OutputExists) as caught:
        patch.put(force=True)
    said = re.search(r"\(pid (\d+) on (\S+) since (\S+ \S+) UTC\)", str(caught.value))
    assert said and int(said[1]) == first.pid and said[2] == os.uname().nodename
    since = time.mktime(time.strptime(said[3], "%Y-%m-%d %H:%M:%S")) - time.timezone
    assert before - 1 <= since <= time.time() + 1
    assert first.communicate()[0] == "" and first.returncode == 0
    assert hashes(patch.out) == good
    assert beside(patch.root) == ["out", "post", "pre"]


def test_a_second_writer_is_told_who_the_first_is(patch: Patch) -> None:
    def meanwhile(folder: Path) -> None:
        with pytest.raises(OutputExists, match=f"pid {os.getpid()}"):
            patch.put()
        with pytest.raises(OutputExists, match=f"pid {os.getpid()}"), Staging(patch.out):
            raise AssertionError("two writers")

    patch.put(verify=meanwhile)
    assert verify_manifest(patch.out) == []
    assert beside(patch.root) == ["out", "post", "pre"]


def test_what_dead_writers_left_is_cleared(patch: Patch) -> None:
    for name in (".out.partial-1-0123abcd", ".out.old-1-0123abcd", ".out.partial-0123abcd"):
        (patch.root / name).mkdir()
        (patch.root / name / "file").write_text("x")
    (patch.root / ".out.partial-89abcdef.jsonl").write_text("{}\n")
    (patch.root / ".out.lock").write_text("pid 1 on nowhere")
    (patch.root / ".out.partial-mine").mkdir()  # not our pattern: somebody else's
    (patch.root / "out2").mkdir()
    with pytest.raises(OutputExists, match="exists"):  # the old output is back in its place
        patch.put()
    assert (patch.out / "file").exists()
    shutil.rmtree(patch.out)
    patch.put()
    assert beside(patch.root) == [".out.partial-mine", "out", "out2", "post", "pre"]


def test_an_output_that_appears_meanwhile_is_left_alone(patch: Patch) -> None:
    def meanwhile(folder: Path) -> None:
        patch.out.mkdir()
        (patch.out / "theirs").write_text("x")

    with pytest.raises(OutputExists, match="meanwhile"):
        patch.put(verify=meanwhile)
    assert beside(patch.out) == ["theirs"]
    assert beside(patch.root) == ["out", "post", "pre"]


def test_what_was_finished_outlives_a_second_failure(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the next run cannot even begin, it leaves what the first one had finished."""
    kept = patch.stop()
    for module, name in (
        (_claim, "read_journal"),
        (_staging, "Journal"),
        (_staging, "file_digest"),
    ):
        for error in (OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()):
            with monkeypatch.context() as broken:
                broken.setattr(module, name, raising(error))
                with pytest.raises((StorageError, KeyboardInterrupt, Interrupted)):
                    patch.put()
            assert set(patch.finished()) == kept and set(hashes(patch.folder)) == kept
    assert set(patch.put().resumed) == kept
    assert beside(patch.root) == ["out", "post", "pre"]


def test_without_a_key_nothing_is_kept(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), StorageError("full")):
        with pytest.raises(type(error)), Staging(tmp_path / "state") as stage:
            stage.write("a.json", b"{}")
            stage.digests()
            raise error
        assert beside(tmp_path) == []


def test_a_bug_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "x", key={"a": 1}) as stage:
        stage.write("a.json", b"{}")
        stage.digests()
        raise ZeroDivisionError
    assert beside(tmp_path) == []


@pytest.mark.parametrize("thread", ["flushing", "hashing", "taking over"])
def test_an_error_in_another_thread_is_named(
    patch: Patch, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    if thread == "taking over":
        patch.stop()
    error = raising(OSError(errno.EIO, "Input/output error"))
    owner, name = (os, "fsync") if thread == "flushing" else (_newfile, "open")
    monkeypatch.setattr(owner, name, error, raising=False)
    with pytest.raises(StorageError, match="The disk reports a failure"):
        patch.put(durable=True)
