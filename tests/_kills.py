"""Kill a writer before each of its calls that change the disk, one after the other, and rerun it.

`python _kills.py KIND ROOT`: KIND is `new`, `force` or `aside` (force where two folders cannot be
exchanged in one step) for a written checkpoint, `patch` or `link` for a patched one. After every
kill the output must be absent or complete, and the next run must take over exactly what the journal
names, give the same bytes, and leave nothing beside. Prints how many calls there were.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _folders import Fault, beside, hashes, many, save, splices_of, tiny_tensors

from morph.checkpoint import Checkpoint, Weights, _newfile, _staging, patch_folder, write_checkpoint
from morph.errors import OutputExists


def writer(root: Path, out: Path) -> Callable[..., Any]:
    """Return a function that writes a checkpoint with tensors from files and from memory."""
    source = Checkpoint.open(save(root / "in", tiny_tensors(), 2))

    def put(**options: Any) -> Any:
        new = {"new": ("U8", (3,), lambda: b"abc")}
        return write_checkpoint(
            out, source=source, config=source.config, new_tensors=new, **options
        )

    return put


def patcher(root: Path, out: Path, copy: str) -> Callable[..., Any]:
    """Return a function that patches a checkpoint of many shards."""
    pre, post = map(Weights.open, many(root, 14 if copy == "auto" else 5))
    # where blocks can be shared there are fewer calls
    _newfile.clone = _staging.clone = lambda fd, target: False
    splices = splices_of(pre, post)
    if copy == "link":
        splices = splices[: len(splices) // 2]

    def put(**options: Any) -> Any:
        extra = options.pop("extra_files", {})
        return patch_folder(
            *(out,),
            source=post,
            splices=splices,
            inputs=[pre],
            texts={"morph.json": b"{}"} | extra,
            copy=copy,
            **options,
        )

    return put


def journalled(root: Path) -> set[str]:
    """Return the files that a journal in a folder says are finished."""
    found: set[str] = set()
    for path in root.glob(".out.partial-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True)[1:]:
            if line.endswith("\n") and path.with_suffix("").is_dir():
                found.add(json.loads(line)["name"])
    return found


def main(kind: str, root: Path) -> None:
    """Kill at every call; print the number of calls."""
    out, force = root / "out", kind in ("force", "aside")
    put = (
        patcher(root, out, "link" if kind == "link" else "auto")
        if kind in ("patch", "link")
        else writer(root, out)
    )
    inputs = beside(root)
    put(durable=False)
    good, old, inputs_before = hashes(out), {}, {n: hashes(root / n) for n in inputs}
    if kind == "aside":
        _staging.exchange = lambda one, other: False
    for number in range(1, 10_000):
        shutil.rmtree(out, ignore_errors=True)
        if force:
            put(extra_files={"old.txt": b"old"}, durable=False)
            old = hashes(out)
        child = os.fork()
        if not child:
            with Fault(number, lambda: os._exit(9)).installed():
                put(force=force)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), (number, code)
        finished = journalled(root)
        found = hashes(out) if out.exists() else None
        assert found in (good, old if force else None) or (kind == "aside" and found is None), (
            number
        )
        if force and found is None:  # killed between the two renames
            aside = [p for p in root.iterdir() if p.name.startswith(".out.old-")]
            assert len(aside) == 1 and hashes(aside[0]) == old, number
        else:
            assert found in (good, old if force else None), number
        if code == 0:
            break
        if found == good and not force:
            try:
                put(durable=False)
            except OutputExists:
                finished = set()
            else:
                raise AssertionError(number)
        again = put(force=force or out.exists(), durable=False)
        assert hashes(out) == good, number
        assert found == good or set(again.resumed) == finished, (number, finished, again.resumed)
        assert beside(root) == sorted([*inputs, "out"]), (number, beside(root))
    assert {n: hashes(root / n) for n in inputs} == inputs_before
    print(number - 1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
