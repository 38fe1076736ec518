"""What selectors share: the shape of a score file, sweeps over single units, and the swap pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from morph.errors import PlanError
from morph.plan import Granularity, Scores
from morph.surgery import Batch, Morphable, Trace, answer_losses

Unit = tuple[int, int]


def units(morphable: Morphable, granularity: Granularity) -> list[Unit]:
    """Return every (layer, unit) that can be replaced, in order."""
    width = morphable.geometry.units(granularity)
    return [(i, u) for i in morphable.candidates for u in range(width)]


def scores(
    morphable: Morphable,
    selector: str,
    granularity: Granularity,
    values: dict[Unit, float],
    unit: str,
    provenance: dict[str, Any],
) -> Scores:
    """Return Scores from a value per unit; layers that cannot be replaced get 0."""
    shape = morphable.geometry
    width = shape.units(granularity)
    return Scores(
        selector=selector,
        model_type=morphable.family.model_type,
        granularity=granularity,
        values=tuple(
            tuple(float(values.get((i, u), 0.0)) for u in range(width))
            for i in range(shape.num_hidden_layers)
        ),
        unit=unit,
        provenance={
            "mixer": morphable.mixer,
            "mixer_options": dict(morphable.options),
            "forwards": round(morphable.forwards, 3),
            "tokens": morphable.tokens,
            **provenance,
        },
    )


def need_batches(batches: Sequence[Batch], selector: str) -> None:
    """Raise PlanError when a selector that runs the model was given nothing to run it on."""
    if not batches:
        raise PlanError(f"selector {selector!r} needs examples; give --data or a text file.")


class Sweep:
    """The same batches under one base assignment, and the mean answer NLL of its variants."""

    def __init__(
        self,
        morphable: Morphable,
        batches: Sequence[Batch],
        keep: Iterable[Unit],
        granularity: Granularity,
    ) -> None:
        self.morphable, self.granularity = morphable, granularity
        self.keep = frozenset(keep)
        self.modes = morphable.modes(self.keep, granularity)
        self.batches = batches
        blends = granularity != "layer"
        self.traces: list[Trace] = [
            morphable.trace(b, self.modes, share_prefix=not blends) for b in batches
        ]

    @property
    def nll(self) -> float:
        """Mean NLL of the base assignment, nats per answer token."""
        return _mean([t.logits for t in self.traces], self.batches)

    def nll_with(self, keep: Iterable[Unit]) -> float:
        """Mean NLL when exactly `keep` stays full; only layers from the first change on run."""
        modes = self.morphable.modes(keep, self.granularity)
        changed = self.keep.symmetric_difference(keep)
        layers = {i for i, _ in changed}
        return _mean([t.variant({i: modes[i] for i in layers}) for t in self.traces], self.batches)


def _mean(logits: list[torch.Tensor], batches: Sequence[Batch]) -> float:
    losses = torch.cat([answer_losses(x, b) for x, b in zip(logits, batches)])
    return float(losses.double().mean())


def verify_and_swap(
    morphable: Morphable,
    batches: Sequence[Batch],
    keep: Sequence[Unit],
    granularity: Granularity,
    *,
    pinned: Iterable[Unit] = (),
    barred: Iterable[Unit] = (),
    min_full_per_layer: int = 0,
    max_rounds: int = 8,
    progress: Callable[[str], None] | None = None,
) -> tuple[tuple[Unit, ...], dict[str, Any]]:
    """Improve a kept set by single swaps until none lowers the answer NLL; forward passes only.

    Every round tries each kept unit against each replaced one and takes the best swap. `pinned`
    units stay kept, `barred` ones stay replaced, and no layer falls below `min_full_per_layer`
    kept units. Returns the set and what it took: NLL before and
    after, swaps taken, sets tried. It repairs rankings that miss chains and redundant layers.
    """
    start = time.perf_counter()
    kept, fixed, out = set(keep), set(pinned), set(barred)
    pool = [u for u in units(morphable, granularity) if u not in out]
    taken: list[dict[str, Any]] = []

    def bound(old: Unit) -> bool:
        """Whether the layer of `old` would fall below its minimum without it."""
        return sum(layer == old[0] for layer, _ in kept) <= min_full_per_layer

    sweep = Sweep(morphable, batches, kept, granularity)
    first = best = sweep.nll
    tried = 1
    for _ in range(max_rounds):
        found: tuple[float, Unit, Unit] | None = None
        for old in sorted(kept - fixed):
            for new in pool:
                if new in kept or (bound(old) and new[0] != old[0]):
                    continue
                value = sweep.nll_with(kept - {old} | {new})
                tried += 1
                if value < best - 1e-6 and (found is None or value < found[0]):
                    found = (value, old, new)
        if found is None:
            break
        best, old, new = found
        kept = kept - {old} | {new}
        taken.append({"out": list(old), "in": list(new), "nll": best})
        if progress:
            progress(f"swap: {_name(old)} out, {_name(new)} in; answer NLL {best:.4f}")
        sweep = Sweep(morphable, batches, kept, granularity)
    return tuple(sorted(kept)), {
        "nll_before": first,
        "nll_after": best,
        "swaps": taken,
        "sets_tried": tried,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _name(unit: Unit) -> str:
    return f"layer {unit[0]}" if unit[1] == 0 else f"layer {unit[0]} unit {unit[1]}"
