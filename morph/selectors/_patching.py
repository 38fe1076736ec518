"""Causal patching of head outputs: what one head carries to the answer, directly or through others.

A pair is a batch and its counterfactual, which differs in the needle only. Head outputs of both are
kept; every measurement then starts from the clean run with all attention frozen, so that a patched
head reaches the answer through the residual stream and the MLPs alone, and only layers from the
patched one on run. Heads are patched at the tokens that lie far enough behind the needle: what a
head brings to nearer ones the cheap mixer brings as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from morph.selectors import _attention
from morph.surgery import Batch, Fixed, Mode, Morphable, Patched

Unit = tuple[int, int]
Heads = dict[int, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A batch and its counterfactual `other` `[B, T]`; what to read at its N answer tokens.

    `right` and `wrong` `[N]` are the answer's tokens and the distractor's, `step` `[N]` the place
    in the answer, from 0 on; -1 leaves a token out. `far` `[B, T]` bool are the tokens at which
    heads are patched.
    """

    batch: Batch
    other: torch.Tensor
    far: torch.Tensor
    right: torch.Tensor
    wrong: torch.Tensor
    step: torch.Tensor

    @property
    def digest(self) -> str:
        """A name for what is measured here."""
        batch = self.batch
        parts = (batch.ids, batch.answers, self.other, self.far, self.wrong, self.step)
        return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in parts)).hexdigest()[:16]


def far_from(ids: torch.Tensor, other: torch.Tensor, reach: int) -> torch.Tensor:
    """Return bool `[B, T]`: tokens at least `reach` behind every changed token before them."""
    place = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(ids != other, place, -reach).cummax(dim=1).values
    return place - last >= reach


def read_out(
    gaps: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, count: int, decay: float
) -> torch.Tensor:
    """Return m `[count]`, eq. 9: the mean of logit gaps `[N]`, weighted by `decay ** step`.

    `rows` `[N]` says which of `count` examples a gap belongs to; an example without any gets 0.
    """
    weight = torch.where(steps >= 0, float(decay) ** steps.clamp(min=0).double(), 0.0)
    total, over = (
        torch.zeros(count, dtype=torch.float64, device=gaps.device).index_add(0, rows, x)
        for x in (weight * gaps.double(), weight)
    )
    return torch.where(over > 0, total / over.clamp(min=1e-300), 0.0)


@torch.no_grad()
def heads_of(morphable: Morphable, batch: Batch) -> tuple[Heads, torch.Tensor]:
    """Return the source's head outputs `[B, T, H, V]` by candidate layer, and answer logits."""
    found: Heads = {}

    def keep(i: int) -> Mode:
        def blend(full: torch.Tensor, cheap: torch.Tensor) -> torch.Tensor:
            found[i] = full
            return full

        return blend

    run = morphable.run(batch, {i: keep(i) for i in morphable.candidates})
    return found, run.logits


class Bench:
    """One pair with everything frozen at its clean values, and what patches do to the read-out.

    `before` and `after` `[B]` are m of the batch and of its counterfactual.
    """

    def __init__(self, morphable: Morphable, pair: Pair, decay: float) -> None:
        self.morphable, self.pair, self.decay = morphable, pair, decay
        self._rows = pair.batch.answers.nonzero()[:, 0]
        other = Batch(ids=pair.other, answers=pair.batch.answers)
        self.clean, logits = heads_of(morphable, pair.batch)
        corrupt, others = heads_of(morphable, other)
        far = pair.far[..., None, None]
        self.corrupt = {i: torch.where(far, x, self.clean[i]) for i, x in corrupt.items()}
        for x in (logits, others):
            _attention.need_finite(x, "hydrahead")
        self.correct = (logits.argmax(-1) == pair.right)[pair.step >= 0]
        frozen = {i: Fixed(heads=heads) for i, heads in self.clean.items()}
        self.trace = morphable.trace(pair.batch, frozen, share_prefix=False)
        self.before, self.after = self.read(self.trace.logits), self.read(others)

    def read(self, logits: torch.Tensor) -> torch.Tensor:
        """Return m `[B]` of answer logits `[N, vocab]`."""
        at = torch.arange(len(logits), device=logits.device)
        gaps = logits[at, self.pair.right] - logits[at, self.pair.wrong]
        count = len(self.pair.batch.ids)
        return read_out(gaps, self._rows, self.pair.step, count, self.decay).cpu()

    def effect(self, m: torch.Tensor) -> torch.Tensor:
        """Return IE `[B]`, eq. 10, in [0, 1]; examples whose pair makes no difference get 0."""
        gap = self.before - self.after
        found = torch.where(gap > 0, (self.before - m) / gap.clamp(min=1e-12), 0.0)
        return found.clamp(0.0, 1.0)

    def mask(self, heads: Sequence[int]) -> torch.Tensor:
        """Return bool `[H]`, True for these heads."""
        width = self.morphable.geometry.num_attention_heads
        device = self.pair.batch.ids.device
        return self.morphable.head_mask(heads, width).to(device)

    def corrupted(self, unit: Unit) -> Mode:
        """Return the mode that gives one head its counterfactual output, the others their clean."""
        layer, head = unit
        return Patched(mask=self.mask([head]), heads=self.corrupt[layer], full=self.clean[layer])

    def patched(self, changes: Mapping[int, Mode]) -> torch.Tensor:
        """Return IE `[B]` with the modes of some layers changed."""
        return self.effect(self.read(self.trace.variant(changes)))

    def receive(self, units: Sequence[Unit], tell: Callable[[int], None]) -> torch.Tensor:
        """Return IE `[units, B]` of what each head gives to the residual stream by itself."""
        memo, stem = self.morphable.memo, f"hydrahead receive {self.pair.digest} {self.decay}"
        keys = [f"{stem} {layer}.{head}" for layer, head in units]
        missing = [n for n, key in enumerate(keys) if key not in memo]
        if missing:
            changes = [{units[n][0]: self.corrupted(units[n])} for n in missing]
            measured = self.trace.each(changes, self.read)
            for done, (index, m) in enumerate(measured, len(keys) - len(missing) + 1):
                memo.put(keys[missing[index]], self.effect(m).tolist())
                tell(done)
        return torch.tensor([memo.get(key) for key in keys], dtype=torch.float64)

    def send(self, unit: Unit, listeners: Listeners) -> torch.Tensor:
        """Return IE `[B]` of what a head says to the listeners alone, by path patching.

        First they hear the head's counterfactual output while all others stay frozen; then the
        clean run is patched with what they made of it, without the head's own output.
        """
        later = sorted(i for i in listeners.heads if i > unit[0])
        if not later:
            return torch.zeros(len(self.before), dtype=torch.float64)
        names = " ".join(f"{i}.{','.join(map(str, listeners.heads[i]))}" for i in later)
        stem = f"hydrahead send {self.pair.digest} {self.decay}"

        def measure() -> list[float]:
            hearing = {i: listeners.live[i] for i in later}
            self.trace.variant({unit[0]: self.corrupted(unit), **hearing})
            for i in later:
                listeners.room[i].copy_(listeners.heard[i])
            return self.patched({i: listeners.said[i] for i in later}).tolist()

        key = f"{stem} {unit[0]}.{unit[1]} to {names}"
        return torch.tensor(self.morphable.memo.of(key, measure), dtype=torch.float64)


class Listeners:
    """Selected heads of a bench that react to what they are sent, while all others stay frozen.

    `live` lets them react and keeps what came out in `heard`; `said` repeats what is in `room`.
    """

    def __init__(self, bench: Bench, units: Iterable[Unit]) -> None:
        self.heads: dict[int, list[int]] = {}
        for layer, head in sorted(units):
            self.heads.setdefault(layer, []).append(head)
        self.heard: Heads = {}
        self.room = {i: torch.empty_like(bench.clean[i]) for i in self.heads}
        self.live = {i: self._live(i, bench) for i in self.heads}
        self.said: dict[int, Mode] = {
            # one object per layer, filled anew: the engine numbers modes and keeps them
            i: Patched(mask=bench.mask(heads), heads=self.room[i], full=bench.clean[i])
            for i, heads in self.heads.items()
        }

    def _live(self, layer: int, bench: Bench) -> Mode:
        mask, clean = bench.mask(self.heads[layer])[:, None], bench.clean[layer]

        def blend(full: torch.Tensor, cheap: torch.Tensor) -> torch.Tensor:
            self.heard[layer] = full
            return torch.where(mask, full, clean)

        return blend
