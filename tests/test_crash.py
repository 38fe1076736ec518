"""A kill at any moment leaves the output absent or complete; a power cut finds all in order."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("_folders", Path(__file__).with_name("_folders.py"))
folders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(folders)
beside, python, save, tiny_tensors = (
    folders.beside, folders.python, folders.save, folders.tiny_tensors
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "calls"), [("new", 40), ("force", 40), ("aside", 40), ("patch", 200), ("link", 60)]
)
def test_a_kill_at_any_call_leaves_the_output_absent_or_complete(
    tmp_path: Path, kind: str, calls: int
) -> None:
    """And the next run goes on from what the journal names, and gives the same bytes."""
    run = python(Path(__file__).with_name("_kills.py"), kind, tmp_path)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= calls


TRACED = """
import sys
from pathlib import Path
from _folders import many, splices_of
from morph.checkpoint import Checkpoint, Weights, patch_folder, write_checkpoint
root, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "write":
    source = Checkpoint.open(root / "in")
    write_checkpoint(root / "out", source=source, config=source.config, provenance={})
else:
    pre, post = Weights.open(root / "pre"), Weights.open(root / "post")
    patch_folder(root / "out", source=post, splices=splices_of(pre, post), hashing=kind == "patch")
"""
CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*)")


def trace(folder: Path, *arguments: object) -> list[tuple[str, str, int, int]]:
    """Return (call, path, when it began, when it ended) of a script's calls, in order."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: the order of system calls cannot be seen")
    log = folder / "trace.log"
    calls = "trace=write,pwrite64,copy_file_range,fsync,fdatasync,rename,renameat,renameat2"
    command = ["strace", "-f", "-qq", "-y", "-e", "signal=none", "-e", calls, "-o", log]
    run = subprocess.run(
        [*command, sys.executable, "-c", *map(str, arguments)],
        **{"capture_output": True, "text": True, "env": folders.clean()},
    )
    if "ptrace" in run.stderr:
        pytest.skip(f"strace may not trace here: {run.stderr.splitlines()[0]}")
    assert run.returncode == 0, run.stderr
    found: list[tuple[str, str, int, int]] = []
    begun: dict[str, int] = {}
    for at, line in enumerate(log.read_text().splitlines()):
        match = CALL.match(line)
        if not match:
            continue
        pid, call, rest = match.groups()
        if "resumed>" in line:
            index = begun.pop(pid)
            found[index] = *found[index][:3], at
            continue
        if "<unfinished ...>" in rest:
            begun[pid] = len(found)
        quoted = r'"([^"]*)"' if call.startswith("rename") else r"<([^>]*)>"
        paths = re.findall(quoted, rest.replace("<unfinished ...>", ""))
        path = paths[-1] if call == "copy_file_range" else paths[0]
        found.append((call, path, at, at))
    log.unlink()
    return found


@pytest.mark.parametrize("kind", ["write", "patch", "unhashed"])
def test_the_disk_has_everything_in_order(tmp_path: Path, kind: str) -> None:
    """A file before its line in the journal, all files and the folder before the rename."""
    save(tmp_path / "in", tiny_tensors(), 2)
    folders.many(tmp_path, 3)
    before = beside(tmp_path)
    calls = trace(tmp_path, TRACED, tmp_path, kind)
    assert beside(tmp_path) == sorted([*before, "out"])
    renames = [c for c in calls if c[0].startswith("rename")]
    assert len(renames) == 1
    staged, published = renames[0][1], renames[0][2]
    assert staged.startswith(str(tmp_path / ".out.partial-"))
    syncs: dict[str, list[tuple[int, int]]] = {}
    for call, path, start, end in calls:
        if call in ("fsync", "fdatasync"):
            syncs.setdefault(path, []).append((start, end))
    written = [c for c in calls if c[0] in ("write", "pwrite64", "copy_file_range")]
    journal = f"{staged}.jsonl"
    lines = [c for c in written if c[1] == journal]
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert len(lines) == 1 + len(files - {"MANIFEST.json"})
    for name in files:  # written, then flushed, and not written again
        last = max(end for _, path, _, end in written if path == f"{staged}/{name}")
        (sync,) = syncs[f"{staged}/{name}"]
        assert last < sync[0] and sync[1] < published, name
    ends = sorted(syncs[f"{staged}/{n}"][0][1] for n in files - {"MANIFEST.json"})
    for line, end in zip(lines[1:], ends, strict=True):  # the k-th line has k flushed files before
        assert end < line[2]
    flushed = [start for start, _ in syncs[journal]]
    assert len(flushed) == len(lines)
    assert all(line[3] < sync for line, sync in zip(lines, flushed, strict=True))
    (folder,) = syncs[staged]
    assert max(ends) < folder[0] and folder[1] < published
    assert max(syncs[str(tmp_path)])[0] > renames[0][3]
