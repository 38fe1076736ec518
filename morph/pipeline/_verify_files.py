"""`morph verify`: is a folder what it was when it was written, and what its source makes it?

Everything here reads files and loads no torch, except where the logits of a converted hybrid are
compared with its source's (see `_verify`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from morph import checkpoint, layouts
from morph.checkpoint import Checkpoint, TensorInfo, Weights
from morph.checkpoint._folder import MANIFEST, find_folder, known_family
from morph.checkpoint._format import MAX_JSON, MIB, natural, open_regular, read_at, read_small
from morph.difference import Reader
from morph.errors import (
    CheckpointError,
    UnsupportedModel,
    UsageError,
    VerificationFailed,
    escape,
)
from morph.pipeline._diff import Meter
from morph.pipeline._source import Say, quiet
from morph.restore._record import read_record

BLOCK = 4 * MIB
_LEFTOVER = re.compile(r"\.(.+)\.(partial|old)-[0-9a-f-]+")
# written by morph beside what it copied
OWN_FILES = ("morph.json", "README.md", "README.source.md", MANIFEST)


def verify_command(
    path: str | os.PathLike[str],
    against: str | None = None,
    pre: str | None = None,
    *,
    say: Say = quiet,
) -> dict[str, Any]:
    """Check the manifest and the structure of a folder; with `against`, what it was made of.

    `against` is what a hybrid was converted from (both are loaded in fresh processes, and logits
    compared), POST of a restored folder (then `pre` may be its PRE), the pickles that a folder was
    made of (none is opened), or any folder that should hold the same tensors. Raises
    VerificationFailed where something is not as it should be, MismatchError where the folders do
    not belong together, CheckpointError and UsageError.
    """
    path = Path(path)
    _refuse_leftover(path)
    if pre is not None and against is None:
        raise UsageError("--pre goes with --against: give the fine-tuned checkpoint there.")
    opened, told = _structure(path)
    record = read_record(opened)
    if "restored" in record:
        from morph.pipeline import _verify_restored

        told["restored"] = _verify_restored.summary(opened)
    if "converted_from_pickle" in record and (against is not None or not told["bytes_verified"]):
        from morph.pipeline import _verify_pickled

        told |= _verify_pickled.check_tensors(opened, record, say=say)
    if against is None:
        return told
    other = checkpoint.resolve(against)
    if other.exists() and os.path.samefile(opened.path, other):
        raise UsageError(f"--against is {escape(path)} itself; give what it was made of.")
    if "restored" in record:
        from morph.pipeline import _verify_restored

        origin = None if pre is None else checkpoint.resolve(pre)
        return told | _verify_restored.against(opened, other, origin, say=say)
    if pre is not None:
        raise UsageError(
            f"--pre is for a checkpoint that `morph restore` wrote; morph.json of {escape(path)} "
            "tells of no restore."
        )
    if "converted_from_pickle" in record:
        from morph.pipeline import _verify_pickled

        folder = other.parent if other.is_file() else other
        if _verify_pickled.holds_pickles(opened, record, folder):
            return told | _verify_pickled.check_files(opened, record, folder)
    if "plan" in record and not _is_hybrid(other):
        from morph.pipeline import _verify, open_source, plan_of_folder

        source = open_source(str(other))
        return told | _verify.against(source, path, plan_of_folder(path, source))
    return told | _against_equal(opened, other, against, say)


# --- The folder by itself -----------------------------------------------------------------------


def _refuse_leftover(path: Path) -> None:
    """Raise CheckpointError for the hidden folder of a write that was not finished."""
    name = Path(os.path.abspath(path)).name
    if match := _LEFTOVER.fullmatch(name):
        what = {
            "partial": "what an unfinished write left, or one that runs now",
            "old": "what a --force was about to replace",
        }
        raise CheckpointError(
            f"{escape(path)} is {what[match[2]]}, and no result. The command that writes "
            f"{escape(match[1])} goes on from it, or clears it away."
        )


def _structure(path: Path) -> tuple[Weights, dict[str, Any]]:
    """Open a folder and compare it with its manifest, its config, and what its layout expects."""
    folder = find_folder(path)
    hashed = os.path.lexists(folder / MANIFEST)
    if hashed and (problems := checkpoint.verify_manifest(path)):
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise VerificationFailed(f"{escape(path)}: {' '.join(problems[:10])}{more}")
    bare = not os.path.lexists(folder / "config.json")
    opened: Weights
    layers: str | None
    if bare and os.path.lexists(folder / "adapter_config.json"):
        opened = Weights.open(path)
        layers, notes = "a LoRA adapter", list[str]()
    elif bare and _from_pickles(folder):
        opened = Weights.open(path)
        layers, notes = None, ["there is no config.json: these are weights, and no model yet."]
    else:
        opened = model = Checkpoint.open(path, strict=False, quantised=True)
        layers, notes = _check_config(model)
    manifest = "every file is as it was written"
    if not hashed:
        manifest = "none: bytes are not verifiable, only structure was checked"
    return opened, {
        "manifest": manifest,
        "bytes_verified": hashed,
        "layers": layers,
        "shards": len(opened.shards),
        "tensors": len(opened.tensors),
        "bytes": opened.nbytes,
        "side_files": len(opened.other_files),
        "never_loaded": list(opened.ignored_files),
        "notes": [*opened.notes, *notes],
    }


def _check_config(opened: Checkpoint) -> tuple[str | None, list[str]]:
    """Return the layers in words, and notes; raise CheckpointError where the config is wrong."""
    model_type, where = str(opened.config["model_type"]), escape(opened.path)
    problems = checkpoint.disagreements(opened.config, opened.tensors)
    if problems and known_family(model_type) is not None:
        raise CheckpointError(f"{where}: {' '.join(problems)}")
    layers, notes = None, list[str]()
    try:
        shapes = {name: info.shape for name, info in opened.tensors.items()}
        kinds = layouts.read(opened.config, shapes).kinds
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        layers = f"{', '.join(counts)} ({escape(model_type, 60)})"
    except UnsupportedModel:
        notes.append(
            f"model_type {escape(model_type, 60)} has no layout here: which layers are softmax "
            "attention was not checked."
        )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if opened.quantised:
        notes.append(f"the weights are quantised ({opened.quantised}).")
    return layers, [*notes, *problems]


def _from_pickles(folder: Path) -> bool:
    """Return whether morph.json of a folder tells of pickles."""
    if not os.path.lexists(folder / "morph.json"):
        return False
    raw = read_small(folder, "morph.json", MAX_JSON["manifest"])
    found = checkpoint.load_json(raw, escape(folder / "morph.json"))
    return isinstance(found, dict) and "converted_from_pickle" in found


def _is_hybrid(folder: Path) -> bool:
    """Return whether morph.json of a folder tells of a conversion."""
    from morph.pipeline import record_of

    return "plan" in record_of(folder)


# --- Beside another that should be equal --------------------------------------------------------


def _against_equal(opened: Weights, other: Path, against: str, say: Say) -> dict[str, Any]:
    """Compare names, dtypes, shapes and bytes with another folder; report its side files."""
    there = Weights.open(other)
    wrong = _headers_differ(opened, there)
    if not wrong:
        wrong = _bytes_differ(opened, there, say)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise VerificationFailed(
            f"{escape(opened.path)} does not hold the tensors of {escape(against)}: "
            f"{'; '.join(wrong[:3])}{more}. `morph diff {escape(against)} {escape(opened.path)}` "
            "tells how far they are apart."
        )
    return {
        "against": against,
        "tensors_byte_equal": len(opened.tensors),
        **compare_side_files(opened, there),
    }


def _headers_differ(opened: Weights, there: Weights) -> list[str]:
    wrong = []
    for name in sorted(opened.tensors.keys() | there.tensors.keys(), key=natural):
        one, other = opened.tensors.get(name), there.tensors.get(name)
        shown = escape(name, 100)
        if one is None or other is None:
            wrong.append(f"{shown} is only in {'the other' if one is None else 'this'}")
        elif one.dtype != other.dtype:
            wrong.append(f"{shown} is {one.dtype}, not {other.dtype}")
        elif one.shape != other.shape:
            wrong.append(f"{shown} has shape {list(one.shape)}, not {list(other.shape)}")
    return wrong


def _bytes_differ(opened: Weights, there: Weights, say: Say) -> list[str]:
    meter = Meter(opened.nbytes + there.nbytes, say)
    wrong = []
    with Reader(opened) as here, Reader(there) as beside:
        places = {n: (info.file.name, info.start, n) for n, info in opened.tensors.items()}
        for name in sorted(places, key=places.__getitem__):
            one, other = opened.tensors[name], there.tensors[name]
            at = first_difference(here, one, beside, other)
            if at is not None:
                wrong.append(f"{escape(name, 100)} differs from its byte {at} on")
            meter.add(one.nbytes + other.nbytes)
    return wrong


def first_difference(
    a: Reader,
    one: TensorInfo,
    b: Reader,
    other: TensorInfo,
    start: int = 0,
    stop: int | None = None,
) -> int | None:
    """Return the first byte in which two tensors differ, from `start` to `stop`, or None."""
    stop = one.nbytes if stop is None else stop
    for at in range(start, stop, BLOCK):
        count = min(BLOCK, stop - at)
        left, right = a.read(one, at, count), b.read(other, at, count)
        if left != right:
            return at + next(i for i, (x, y) in enumerate(zip(left, right)) if x != y)
    return None


def compare_side_files(opened: Weights, there: Weights) -> dict[str, Any]:
    """Return how many side files are equal in two folders, and which are not or in one alone."""
    names = [{"config.json", *w.other_files} - {"morph.json", MANIFEST} for w in (opened, there)]
    names = [{n for n in found if os.path.lexists(w.path / n)}
             for found, w in zip(names, (opened, there))]  # fmt: skip
    shared = sorted(names[0] & names[1])
    differ = [name for name in shared if not same_file(opened.path, there.path, name)]
    return {
        "side_files_equal": len(shared) - len(differ),
        "side_files_differ": differ,
        "side_files_only_here": sorted(names[0] - names[1]),
        "side_files_only_there": sorted(names[1] - names[0]),
    }


def same_file(one: Path, other: Path, name: str) -> bool:
    """Return whether a file of two folders holds the same bytes."""
    fds = []
    try:
        fds = [open_regular(one, name)]
        fds.append(open_regular(other, name))
        sizes = [os.fstat(fd).st_size for fd in fds]
        if sizes[0] != sizes[1]:
            return False
        for at in range(0, sizes[0], BLOCK):
            count = min(BLOCK, sizes[0] - at)
            if read_at(fds[0], at, count, one / name) != read_at(fds[1], at, count, other / name):
                return False
        return True
    finally:
        for fd in fds:
            os.close(fd)
