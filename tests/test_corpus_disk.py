"""What a disk can do to a write: `morph restore` says so in one line, and can be given again.

After every fault OUT is absent, the inputs are what they were, and the same command, once the fault
is gone, writes the bytes that an undisturbed one writes and leaves nothing hidden behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import runpy
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from morph.errors import CheckpointError, MorphError, OutputExists, StorageError, UsageError

c = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_corpus.py"))))
ONE, TWO, MANIFEST = c.ONE, c.TWO, c.MANIFEST
REPO = Path(__file__).resolve().parent.parent


def fill(root: Path) -> Path:
    """Make the two checkpoints of a place."""
    root.mkdir(exist_ok=True)
    c.good(root / "pre")
    c.good(root / "post", tuned=True)
    return root


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed restore writes: names and hashes. It also imports what is needed."""
    root = fill(tmp_path_factory.mktemp("undisturbed") / "place")
    assert c.morph(*c.restore(root)).code == 0
    return c.state(root / "out")


@pytest.fixture
def place(tmp_path: Path, expected: dict[str, str]) -> Path:
    return fill(tmp_path / "place")


def fails(root: Path, error: type[MorphError], *needles: str, out: Path | None = None) -> str:
    """Assert that a restore ends in this error, that OUT is absent and the inputs as before."""
    before = c.state(root / "pre"), c.state(root / "post")
    call = c.restore(root)
    call[3] = out or call[3]
    found = c.morph(*call)
    line = found.err.splitlines()[-1]
    assert type(found.error) is error, f"{found.code} {line}"
    assert found.code == error.exit_code and found.out == ""
    assert line.startswith("error: ") and line.isprintable() and "Traceback" not in found.err
    assert all(needle in line for needle in needles), line
    assert not os.path.lexists(out or root / "out")
    assert (c.state(root / "pre"), c.state(root / "post")) == before
    return line


def again(root: Path, expected: dict[str, str], out: Path | None = None) -> str:
    """Assert that the command succeeds now, byte for byte, and leaves nothing beside OUT."""
    call = c.restore(root)
    out = call[3] = out or call[3]
    found = c.morph(*call)
    assert found.code == 0, found.err
    assert c.state(out) == expected
    hidden = [n for n in os.listdir(out.parent) if n.startswith(f".{out.name[:100]}")]
    assert hidden == []
    return found.err


@contextlib.contextmanager
def shim(name: str, act: Callable[..., Any]) -> Iterator[None]:
    """Let `act(real, *arguments)` stand for a function of `os`."""
    real = getattr(os, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, lambda *a, **k: act(real, *a, **k))
        yield


def raising(code: int, when: Callable[..., bool] = lambda *a: True) -> Callable[..., Any]:
    """Fail with an error of the system where the arguments say so."""

    def act(real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code), *arguments[:1])
        return real(*arguments, **more)

    return act


def path_of(fd: Any) -> str:
    return os.readlink(f"/proc/self/fd/{fd}") if isinstance(fd, int) else str(fd)


# --- No space -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system in memory of a size; skips where that takes rights we lack."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"cannot mount: {error}")
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("at", [ONE, TWO, "morph.json", MANIFEST])
def test_a_disk_that_fills_up(
    at: str, place: Path, expected: dict[str, str], small_disk: Callable[..., Path]
) -> None:
    """A real one, filled by another program at the moment when a file is made: 0, 50, 99 %."""
    disk = small_disk("size=4m")
    ballast = disk / "ballast"

    def act(real: Callable[..., Any], path: Any, flags: int, *more: Any, **named: Any) -> Any:
        if str(path).endswith(f"/{at}") and flags & os.O_CREAT and not ballast.exists():
            with open(ballast, "wb") as file, contextlib.suppress(OSError):
                for _ in range(1 << 12):
                    file.write(bytes(4096))
                    file.flush()
        return real(path, flags, *more, **named)

    with shim("open", act):
        line = fails(place, StorageError, "No space left", out=disk / "out")
    assert ballast.exists()
    ballast.unlink()
    err = again(place, expected, disk / "out")
    assert ("goes on" in line) == (at != ONE), (line, err)


def test_a_disk_that_is_too_small_is_refused_at_once(
    place: Path, small_disk: Callable[..., Path]
) -> None:
    disk = small_disk("size=64k")
    fails(place, StorageError, "bytes free", "needed", out=disk / "out")
    assert os.listdir(disk) == []


def test_a_disk_without_inodes(
    place: Path, expected: dict[str, str], small_disk: Callable[..., Path]
) -> None:
    disk = small_disk("size=8m", "nr_inodes=7")
    fails(place, StorageError, "No space left", out=disk / "out")
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(disk)], check=True)
    again(place, expected, disk / "out")


def test_a_read_only_disk(
    place: Path, expected: dict[str, str], small_disk: Callable[..., Path]
) -> None:
    disk = small_disk("size=8m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    fails(place, StorageError, "Read-only file system", "write elsewhere", out=disk / "out")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    again(place, expected, disk / "out")


@pytest.mark.parametrize("share", [0, 50, 99])
def test_a_limit_on_the_size_of_files(share: int, place: Path, expected: dict[str, str]) -> None:
    """The system's own limit, in a process of its own, at a share of the largest file."""
    largest = max(p.stat().st_size for p in (place / "post").iterdir())
    limit = largest * share // 100
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from morph.cli import main\nmain(sys.argv[1:])"
    )
    before = c.state(place / "pre"), c.state(place / "post")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, c.restore(place))],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "out").exists()
    assert (c.state(place / "pre"), c.state(place / "post")) == before
    again(place, expected)


# --- Disks that fail, and disks that give little at a time --------------------------------------


@pytest.mark.parametrize("which", ["pre", "post"])
def test_a_read_that_fails_names_the_shard(
    which: str, place: Path, expected: dict[str, str]
) -> None:
    shard = f"/{which}/{ONE}"
    fault = raising(errno.EIO, lambda fd, *a: path_of(fd).endswith(shard))
    with shim("pread", fault), shim("preadv", fault), shim("copy_file_range", fault):
        fails(place, CheckpointError, ONE, "Input/output error")
    again(place, expected)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync", "rename", "mkdir"])
def test_a_write_that_fails(call: str, code: int, place: Path, expected: dict[str, str]) -> None:
    with shim(call, raising(code)):
        fails(place, StorageError, os.strerror(code))
    again(place, expected)


@pytest.mark.parametrize("name", ["pre/config.json", f"pre/{TWO}", "post/tokenizer.json"])
def test_an_input_that_may_not_be_read(name: str, place: Path, expected: dict[str, str]) -> None:
    """By a shim: root may read everything."""
    fault = raising(errno.EACCES, lambda path, *a: str(path).endswith(name))
    with shim("open", fault):
        fails(place, CheckpointError, Path(name).name, "Permission denied")
    again(place, expected)


def test_a_folder_that_may_not_be_written(place: Path, expected: dict[str, str]) -> None:
    fault = raising(errno.EACCES, lambda path, flags, *a: bool(flags & os.O_CREAT))
    with shim("open", fault):
        fails(place, StorageError, "Permission denied", "folder of yours")
    again(place, expected)


@pytest.mark.parametrize("call", ["pread", "preadv", "pwrite", "copy_file_range", "write"])
def test_a_disk_that_takes_little_at_a_time(
    call: str, place: Path, expected: dict[str, str]
) -> None:
    def little(real: Callable[..., Any], *a: Any) -> Any:
        if call == "pread":
            return real(a[0], min(a[1], 7), a[2])
        if call == "copy_file_range":
            return real(a[0], a[1], min(a[2], 100), *a[3:])
        if call == "preadv":
            return real(a[0], [a[1][0][:7]], a[2])
        return real(a[0], a[1][:100], *a[2:])

    with contextlib.ExitStack() as stack:
        if call == "preadv":
            stack.enter_context(shim("copy_file_range", raising(errno.ENOSYS)))
        stack.enter_context(shim(call, little))
        again(place, expected)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_kernel_that_cannot_copy(code: int, place: Path, expected: dict[str, str]) -> None:
    with shim("copy_file_range", raising(code)):
        again(place, expected)


def test_a_system_without_a_copy_in_the_kernel(
    place: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("copy_file_range", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    again(place, expected)


def test_an_output_on_another_disk(place: Path, expected: dict[str, str]) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == place.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    folder = memory / f"morph-corpus-{os.getpid()}"
    folder.mkdir()
    try:
        again(place, expected, folder / "out")
    finally:
        shutil.rmtree(folder)


# --- Inputs that change, and others that write --------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False], ids=["in-kernel", "by-blocks"])
@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize("how", ["truncated", "touched", "replaced"])
def test_an_input_that_changes_meanwhile(
    how: str, which: str, kernel: bool, place: Path, expected: dict[str, str]
) -> None:
    """At the first byte that is copied of it; a file that ends early is an error, not SIGBUS."""
    shard, done = place / which / ONE, []

    def change() -> None:
        done.append(1)
        if how == "truncated":
            os.truncate(shard, shard.stat().st_size // 2)
        elif how == "touched":
            os.utime(shard, ns=(1, 1))
        else:
            (place / "new").write_bytes(b"other")
            os.replace(place / "new", shard)

    def act(real: Callable[..., Any], fd: Any, *more: Any) -> Any:
        if not done and writing(place) and path_of(fd) == str(shard):
            change()
        return real(fd, *more)

    with shim("preadv", act), shim("copy_file_range", act if kernel else raising(errno.ENOSYS)):
        found = c.morph(*c.restore(place))
    assert done, "nothing was read of it"
    if how == "replaced":  # the file that was opened is still the whole old one
        assert c.state(place / "out") == expected
        return
    assert type(found.error) is CheckpointError and found.code == 3, found.err
    assert ONE in found.err.splitlines()[-1]
    assert not (place / "out").exists()


def writing(root: Path) -> bool:
    """Whether a write has begun: its hidden folder is there."""
    return any(n.startswith(".out.partial") for n in os.listdir(root))


def test_two_writers_of_one_output(place: Path, expected: dict[str, str]) -> None:
    """The second is refused with the first one's process; the first finishes."""
    second: list[Any] = []

    def act(real: Callable[..., Any], *arguments: Any) -> Any:
        if not second:
            second.append(None)
            second[0] = c.morph(*c.restore(place))
        return real(*arguments)

    with shim("copy_file_range", act):
        again(place, expected)
    assert type(second[0].error) is OutputExists
    assert f"pid {os.getpid()} " in second[0].err and "being written" in second[0].err


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_places_that_may_not_be_written(force: list[str], place: Path) -> None:
    (place / "linked").symlink_to("pre")
    (place / "photos").mkdir()
    (place / "photos" / "one.jpg").write_bytes(b"mine")
    (place / "file").write_text("mine")
    deep = place / "models--x--y" / "snapshots"
    deep.mkdir(parents=True)
    for out in ("pre", "post", "pre/out", ".", "linked", "photos", "file", "no/where", str(deep)):
        before = c.state(place)
        found = c.morph("restore", place / "pre", place / "post", place / out, *force)
        assert type(found.error) in (OutputExists, UsageError), (out, found.err)
        assert found.code == 2 and found.out == ""
        assert c.state(place) == before, out


@pytest.mark.parametrize("pre", ["post", "linked", "hard"])
def test_one_folder_given_twice(pre: str, place: Path) -> None:
    (place / "linked").symlink_to("post")
    (place / "hard").mkdir()
    for file in (place / "post").iterdir():
        os.link(file, place / "hard" / file.name)
    found = c.morph("restore", place / pre, place / "post", place / "out")
    assert found.code in (2, 4) and not (place / "out").exists(), found.err
    assert "same" in found.err


def test_an_output_that_exists(place: Path, expected: dict[str, str]) -> None:
    again(place, expected)
    (place / "out" / "mine.txt").write_text("mine")
    kept = c.state(place / "out")
    found = c.morph(*c.restore(place))
    assert type(found.error) is OutputExists and "--force" in found.err
    assert c.state(place / "out") == kept
    assert c.morph(*c.restore(place, "--force")).code == 0
    assert c.state(place / "out") == expected


# --- What is left behind, names, clocks, permissions --------------------------------------------


def test_a_stale_lock_and_stale_folders_are_cleared(place: Path, expected: dict[str, str]) -> None:
    (place / ".out.lock").write_text("pid 1 on elsewhere")
    for name in (".out.partial-1-0123abcd", ".out.partial-0123abcd", ".out.old-1-0123abcd"):
        (place / name).mkdir()
        (place / name / ONE).write_bytes(b"half")
    (place / ".out.partial-0123abcd.jsonl").write_text("{}\n{")
    (place / ".out.old-1-0123abcd").rename(place / ".other.partial-1-0123abcd")  # not ours
    again(place, expected)
    assert (place / ".other.partial-1-0123abcd").is_dir()


@pytest.mark.parametrize("length", [181, 255])
def test_a_long_name(length: int, place: Path, expected: dict[str, str]) -> None:
    again(place, expected, place / ("o" * length))
    assert sorted(os.listdir(place)) == sorted(["pre", "post", "o" * length])


def test_a_name_that_is_too_long(place: Path) -> None:
    before = c.state(place)
    found = c.morph("restore", place / "pre", place / "post", place / ("o" * 256))
    assert found.error is not None and found.code in (2, 5), found.err
    assert c.state(place) == before


def test_a_clock_that_goes_backwards(
    place: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted write left seems to be of the future; it is gone on with all the same."""
    with shim("rename", raising(errno.EIO)):
        line = fails(place, StorageError, "Input/output error")
    assert "goes on from there" in line
    for path in [p for n in place.glob(".out*") for p in (n, *n.rglob("*"))]:
        os.utime(path, (2**32, 2**32))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    again(place, expected)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_follow_the_umask(mask: int, place: Path, expected: dict[str, str]) -> None:
    before = os.umask(mask)
    try:
        again(place, expected)
    finally:
        os.umask(before)
    for path in [place / "out", *(place / "out").iterdir()]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path
