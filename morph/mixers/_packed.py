"""Documents packed into one row, each mixed on its own: at a border every mixer starts anew.

Documents of about one length become the rows of one batch, padded on the right, so that a mixer
needs to know nothing of borders and at most half of what it computes is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from morph.mixers._base import Inputs


class Documents:
    """Where the documents of a batch `[B, T]` lie: (row, first token, one past the last) each."""

    def __init__(self, borders: Sequence[tuple[int, int, int]], tokens: int) -> None:
        self.tokens = tokens
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        ordered = sorted(borders, key=lambda b: b[1] - b[2])
        while ordered:
            longest = ordered[0][2] - ordered[0][1]
            many = sum(2 * (stop - start) > longest for _, start, stop in ordered)
            self.batches.append(self._batch(ordered[:many], longest))
            ordered = ordered[many:]

    @classmethod
    def of(cls, positions: torch.Tensor) -> Documents | None:
        """Return the documents of position ids `[B, T]` that start again; None: one per row."""
        steps = positions.diff(dim=-1) != 1
        if not bool(steps.any()):
            return None
        tokens, borders = positions.shape[1], []
        for row, step in enumerate(steps.cpu()):
            cuts = [0, *(step.nonzero()[:, 0] + 1).tolist(), tokens]
            borders += [(row, a, b) for a, b in itertools.pairwise(cuts)]
        return cls(borders, tokens)

    def _batch(
        self, borders: Sequence[tuple[int, int, int]], longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places [N, longest] of documents in the flat batch, and which are real."""
        at = torch.arange(longest)
        starts = torch.tensor([row * self.tokens + start for row, start, _ in borders])
        sizes = torch.tensor([stop - start for _, start, stop in borders])
        real = at[None] < sizes[:, None]
        return (starts[:, None] + at).where(real, starts[:, None]), real

    def each(self, mixer: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V] of `mixer` run on every document alone."""
        batch, tokens = inputs.q.shape[:2]
        places, outputs = [], []
        for number, (index, real) in enumerate(self.batches):
            index, real = index.to(inputs.q.device), real.to(inputs.q.device)

            def take(x: torch.Tensor, index: torch.Tensor = index) -> torch.Tensor:
                return x.flatten(0, 1)[index]

            earlier = inputs.earlier
            if earlier is not None:
                earlier = {n: (take(q), take(k)) for n, (q, k) in earlier.items()}
            parts = {n: take(getattr(inputs, n)) for n in ("q", "k", "v", "hidden")}
            padding = None if bool(real.all()) else real
            shared = inputs.shared
            if shared is not None:  # what is left for later layers belongs to these documents
                shared = shared.setdefault(("documents", number), {})
            o = mixer(replace(inputs, **parts, padding=padding, earlier=earlier, shared=shared))
            places.append(index[real])
            outputs.append(o[real])
        back = torch.cat(places).argsort()
        return torch.cat(outputs)[back].unflatten(0, (batch, tokens))
