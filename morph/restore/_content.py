"""What the restored rows hold: health, resemblance, drift. Samples first; all of it on demand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from morph.checkpoint import Checkpoint, TensorInfo
from morph.errors import CheckpointError, MismatchError, escape
from morph.layouts import Reading
from morph.restore._checks import NOTHING
from morph.restore._numbers import WIDTH, Sums, decode, has_nonfinite, is_zero
from morph.restore._options import Options
from morph.restore._pair import Files, Place, rows_of

BLOCK = 1 << 20
SAMPLE = 2048  # bytes read at each place that is looked at
LAYERS = 8  # of which drift is estimated
_WEIGHTS = ("q", "k", "v", "o", "gate")


@dataclass(kw_only=True)
class Content:
    """What samples of PRE and POST tell.

    `drift` maps a role to |POST - PRE| / |PRE| of its samples, `cosines` a layer to the cosine of
    its sampled queries.
    """

    drift: dict[str, float] = field(default_factory=dict)
    cosines: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def look(
    pre: Checkpoint, post: Checkpoint, reading: Reading, places: list[Place], options: Options
) -> Content:
    """Compare samples of PRE and POST.

    Raises CheckpointError for values of PRE that cannot be meant, MismatchError where PRE's
    queries do not resemble POST's, and where there is nothing to restore. Reads a few KiB of each
    tensor, and all of it only where that has to prove that it is zero or equal.
    """
    with Files(pre, post) as files:
        _check_samples(files, places, options)
        found = Content(cosines=_cosines(files, places))
        found.drift = _drift(files, pre, post, reading, places)
        found.notes += _related(found.cosines, options)
        found.notes += _changed(files, pre, post, reading, places, options)
    return found


def scan(pre: Checkpoint, places: Iterable[Place], options: Options) -> None:
    """Read every byte of PRE that is restored; raise CheckpointError for NaN and infinity.

    About 1 GB/s and one block of memory. Where `nonfinite` is allowed nothing is read.
    """
    if options.allows("nonfinite"):
        return
    with Files(pre) as files:
        for place in places:
            for run, _ in place.runs():
                if any(has_nonfinite(run.dtype, b) for b in files.blocks(run, BLOCK)):
                    raise _bad(place, "holds NaN or infinity")


def _may_not_be_zero(place: Place) -> bool:
    return place.part.role in _WEIGHTS and not place.part.bias


def _bad(place: Place, what: str) -> CheckpointError:
    return CheckpointError(
        f"PRE ({escape(place.pre.file.name, 80)}): '{escape(place.source, 120)}' {what}. Download "
        f"or save PRE again, or --allow nonfinite. {NOTHING}"
    )


def _points(run: TensorInfo) -> list[int]:
    """Return the first bytes of the samples of a run: its start, and its middle."""
    middle = run.nbytes // 2 // 8 * 8
    return [0, middle] if middle >= SAMPLE else [0]


def _check_samples(files: Files, places: list[Place], options: Options) -> None:
    if options.allows("nonfinite"):
        return
    for place in places:
        zero = _may_not_be_zero(place)
        for run, _ in _few(place):
            for at in _points(run):
                block = files.read(run, at, SAMPLE)
                if has_nonfinite(run.dtype, block):
                    raise _bad(place, "holds NaN or infinity")
                zero = zero and is_zero(block)
        if zero and all(is_zero(b) for run, _ in place.runs() for b in files.blocks(run, BLOCK)):
            raise _bad(place, "is zero everywhere, as a file that was never written")


def _few(place: Place) -> list[tuple[TensorInfo, TensorInfo]]:
    """Return the first and the middle run of rows of a place."""
    runs = list(place.runs())
    return [runs[0], runs[len(runs) // 2]] if len(runs) > 1 else runs


def _add(sums: Sums, files: Files, a: TensorInfo, b: TensorInfo) -> None:
    """Take in samples of two places of equally many numbers, if they are plain numbers."""
    if a.dtype not in WIDTH or b.dtype not in WIDTH:
        return
    for at in _points(a):
        first = at // WIDTH[a.dtype]
        count = min(SAMPLE, a.nbytes - at) // WIDTH[a.dtype]
        one = decode(a.dtype, files.read(a, at, count * WIDTH[a.dtype]))
        size = WIDTH[b.dtype]
        other = decode(b.dtype, files.read(b, first * size, count * size))
        if one is not None and other is not None:
            sums.add(one, other)


def _cosines(files: Files, places: list[Place]) -> dict[int, float]:
    sums: dict[int, Sums] = {}
    for place in places:
        if place.part.role == "q" and not place.part.bias:
            for a, b in _few(place):
                _add(sums.setdefault(place.part.layer, Sums()), files, a, b)
    return {layer: s.cosine for layer, s in sums.items() if s.count}


def _related(cosines: dict[int, float], options: Options) -> list[str]:
    """Raise MismatchError where the sampled queries of PRE and POST do not resemble each other."""
    if not cosines:
        return []
    mean = sum(cosines.values()) / len(cosines)
    worst = min(cosines, key=lambda layer: (cosines[layer], layer))
    numbers = (
        f"the cosine between sampled q rows of PRE and POST is {mean:.2f} on average, "
        f"{cosines[worst]:.2f} in layer {worst}"
    )
    if mean >= 0.5:
        low = [layer for layer in cosines if cosines[layer] < 0.5]
        return [f"{numbers}: {len(low)} layers have little left of PRE."] if low else []
    if options.allows("unrelated"):
        return [f"{numbers}."]
    raise MismatchError(
        f"{numbers}; a fine-tuned model keeps it near 1. POST does not descend from this PRE, or "
        f"its q was made anew. Give the PRE that was fine-tuned, or --allow unrelated. {NOTHING}"
    )


def _drift(
    files: Files, pre: Checkpoint, post: Checkpoint, reading: Reading, places: list[Place]
) -> dict[str, float]:
    """Return how far the roles of some chosen layers moved, by samples."""
    layers = sorted({p.part.layer for p in places})
    some = set(layers[:: max(1, len(layers) // LAYERS)])
    names = {p.part.tensor: p.source for p in places}
    sums: dict[str, Sums] = {}
    for row in reading.rows:
        if row.layer not in some or row.bias or row.role in ("embedding", "head", "other"):
            continue
        a, b = pre.tensors.get(names.get(row.tensor, row.tensor)), post.tensors[row.tensor]
        if a is None or a.shape != b.shape or not a.shape:
            continue
        spans = row.ranges or ((0, a.shape[0]),)
        if not a.nbytes or not spans:
            continue
        _add(sums.setdefault(row.role, Sums()), files, rows_of(a, spans[0]), rows_of(b, spans[0]))
    return {role: s.drift for role, s in sorted(sums.items()) if s.count}


def _changed(
    files: Files,
    pre: Checkpoint,
    post: Checkpoint,
    reading: Reading,
    places: list[Place],
    options: Options,
) -> list[str]:
    """Raise MismatchError where all restored bytes are POST's already; return notes."""
    if options.alpha == 0 and not options.allows("unchanged"):
        raise MismatchError(
            "--alpha 0 keeps POST as it is: there is nothing to restore. Give a share of PRE, or "
            f"--allow unchanged. {NOTHING}"
        )
    samples = [p for p in places if _sampled_equal(files, p)]
    if len(samples) < len(places):
        same = sum(_may_not_be_zero(p) for p in samples)
        note = f"{same} of {len(places)} tensors are the same in PRE and POST already (in samples)."
        frozen = _frozen_values(files, pre, post, reading, places)
        return [note, *frozen] if same else frozen
    if options.allows("unchanged"):
        return ["PRE and POST hold the same values in samples of everything that is restored."]
    if not all(_equal(files, p) for p in places):
        return []
    other = _others_equal(files, pre, post, {p.part.tensor for p in places})
    if other:
        raise MismatchError(
            "PRE and POST hold the same weights, as far as was looked: there is nothing to "
            "restore. Were the right folders given? --allow unchanged goes on. " + NOTHING
        )
    parts = ", ".join(dict.fromkeys(p.part.role for p in places))
    raise MismatchError(
        f"{parts} of the chosen layers are byte-equal in PRE and POST: the fine-tuning left them "
        "unchanged (LoRA without q and k?), so there is nothing to restore. --allow unchanged "
        f"goes on. {NOTHING}"
    )


def _sampled_equal(files: Files, place: Place) -> bool:
    return all(
        a.dtype == b.dtype and files.read(a, at, SAMPLE) == files.read(b, at, SAMPLE)
        for a, b in _few(place)
        for at in _points(a)
    )


def _equal(files: Files, place: Place) -> bool:
    for a, b in place.runs():
        pairs = zip(files.blocks(a, BLOCK), files.blocks(b, BLOCK))
        if a.dtype != b.dtype or not all(x == y for x, y in pairs):
            return False
    return True


def _others_equal(files: Files, pre: Checkpoint, post: Checkpoint, taken: set[str]) -> bool:
    """Whether samples of all other tensors that both have are equal."""
    for name, b in post.tensors.items():
        a = pre.tensors.get(name)
        if name in taken or a is None:
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        if files.read(a, 0, SAMPLE) != files.read(b, 0, SAMPLE):
            return False
    return True


def _frozen_values(
    files: Files, pre: Checkpoint, post: Checkpoint, reading: Reading, places: list[Place]
) -> list[str]:
    """Return a note where v is the same in both although q or k moved."""
    layers = {p.part.layer for p in places}
    if "v" in {p.part.role for p in places}:
        return []
    seen = False
    for row in reading.rows:
        a, b = pre.tensors.get(row.tensor), post.tensors[row.tensor]
        if row.role != "v" or row.layer not in layers or row.bias or a is None:
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return []
        for span in (row.ranges or ((0, a.shape[0]),))[:1]:
            one, other = rows_of(a, span), rows_of(b, span)
            for at in _points(one):
                if files.read(one, at, SAMPLE) != files.read(other, at, SAMPLE):
                    return []
                seen = True
    note = (
        "v of the chosen layers is the same in PRE and POST (in samples) although q and k differ: "
        "is the order PRE POST right, was v frozen, or was POST restored before?"
    )
    return [note] if seen else []
