"""Attention and a recurrent mixer side by side on the same heads, as in Falcon-H1.

What it does: o = gain_full * attention + gain_branch * branch, per head, where attention is the
source's own and `branch` is any other mixer, made with `branch_options`. The gains are learned;
they start at 1 and `start`, small: step 0 is all but the source, and the branch still learns.
Why it works: the branch is trained beside attention that still answers, and what it takes over can
be read off its gain.
Cost: what attention costs, plus the branch: this mixer saves no cache by itself.
Options: branch mamba2, branch_options {}, window 0 tokens (0: as the source), start 1/64.
Known limits: with `window` the attention branch slides, and is the source only within it.
Reference: Zuo et al., Falcon-H1, arXiv 2507.22448. Deviation: outputs are added per head before one
output projection; its own layers project both branches apart (which is what a falcon_h1 checkpoint
gets).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from morph import registry, strict
from morph.cache import State
from morph.errors import RecipeError, escape, nearest
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.mixers._softmax import attend
from morph.plan import CacheCost

SEES = "window"
_OWN = "branch."  # what the branch remembers lies under this in the state


@dataclass(frozen=True, kw_only=True)
class Options:
    """`branch` names the other mixer, `start` is its gain at first, `window` attention's tokens."""

    branch: str = "mamba2"
    branch_options: Mapping[str, Any] = field(default_factory=dict)
    window: int = 0
    start: float = 1 / 64

    def __post_init__(self) -> None:
        # morph's own only: a checkpoint's options may not choose what is imported
        allowed = [m for m in registry.names("mixers") if m not in ("parallel", "full")]
        if self.branch not in allowed:
            raise RecipeError(
                f"mixer parallel: branch is {escape(self.branch)!r}; it takes one of "
                f"{', '.join(allowed)}.{nearest(self.branch, allowed)}"
            )
        if self.window < 0:
            raise RecipeError(f"mixer parallel: window is {self.window}; give 0 (none) or more.")


class Mixer(MixerBase):
    """Attention and another mixer on one head group; `gain_full` and `gain_branch` [H]."""

    gates = ("gain_full", "gain_branch")

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        module, parsed = _branch(options)
        self.branch: MixerBase = module.Mixer(shape, parsed)
        self.wants = "rotated"
        self.gain_full = nn.Parameter(torch.empty(shape.num_heads))
        self.gain_branch = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]."""
        mine, theirs = (None, None) if state is None else _split(state)
        full = attend(inputs, mine, self.shape, _window(self.options, self.shape))
        other = self.branch(self._theirs(inputs), theirs)
        if state is not None and mine is not None and theirs is not None:
            own = {_OWN + name: x for name, x in theirs.tensors.items()}
            state.tensors, state.seen = {**mine.tensors, **own}, mine.seen
        gains = (g.to(full.dtype)[:, None] for g in (self.gain_full, self.gain_branch))
        return full * next(gains) + other * next(gains)

    def _theirs(self, inputs: Inputs) -> Inputs:
        if self.branch.wants == "rotated" or inputs.earlier is None:
            return inputs
        q, k = inputs.earlier[self.branch.wants]
        return dataclasses.replace(inputs, q=q, k=k)

    def reset_parameters(self) -> None:
        """Attention whole, the branch with the share that `start` gives it."""
        self.branch.reset_parameters()
        with torch.no_grad():
            self.gain_full.fill_(1.0)
            self.gain_branch.fill_(self.options.start)

    def inherit(self, source: nn.Module) -> None:
        """Start the branch from the source attention module."""
        self.branch.inherit(source)

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Fit the branch to the teacher, as if it stood alone."""
        self.branch.calibrate([(self._theirs(inputs), target) for inputs, target in batches])

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """Attention's keys and values, and the branch's state.

        Raises RecipeError for a branch that keeps keys and values of its own.
        """
        module, parsed = _branch(options)
        cost = module.Mixer.cache_cost(parsed, shape)
        if cost.tokens != 0:
            raise RecipeError(
                f"mixer parallel: branch {options.branch!r} keeps keys and values itself; give a "
                "recurrent mixer, such as mamba2, gated_delta or decay."
            )
        return dataclasses.replace(cost, tokens=_window(options, shape))

    @classmethod
    def uses(cls, options: Options) -> tuple[str, ...]:
        """Return the branch."""
        return (options.branch,)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return attention over everything beside a silent branch."""
        return dataclasses.replace(options, window=0, start=0.0)

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """As far as attention sees, where the branch is silent at the start."""
        if options.start:
            return 0
        return options.window or sys.maxsize


def _branch(options: Options) -> tuple[Any, Any]:
    module = registry.load("mixers", options.branch)
    return module, strict.build(module.Options, options.branch_options, f"mixer {options.branch}")


def _window(options: Options, shape: GroupShape) -> int | None:
    own = options.window or None
    if shape.window is None or own is None:
        return own or shape.window
    return min(own, shape.window)


def _split(state: State) -> tuple[State, State]:
    """Return the state as two: attention's, and the branch's under its own names."""
    mine, theirs = State(), State()
    mine.seen = theirs.seen = state.seen
    for name, x in state.tensors.items():
        if name.startswith(_OWN):
            theirs.tensors[name.removeprefix(_OWN)] = x
        else:
            mine.tensors[name] = x
    return mine, theirs
