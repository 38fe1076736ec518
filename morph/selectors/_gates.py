"""The loop that trains gates: shared by flashmorph, consa and duo, resumable, stops at NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from morph.errors import PlanError
from morph.plan import Granularity
from morph.selectors import _common
from morph.surgery import Batch, Morphable, Soft

SAVE_EVERY = 20
EXPLODED = 1e3  # no gate, log alpha or multiplier gets here on its way to an answer


@dataclass(kw_only=True)
class Group:
    """Parameters that learn alike: peak `lr`, up instead of down where `ascent`."""

    parameters: list[torch.Tensor]
    lr: float
    ascent: bool = False


@dataclass(kw_only=True)
class Trained:
    """What a run of the loop did: losses by step, and why it stopped early (empty: it did not)."""

    losses: list[float] = field(default_factory=list)
    stopped: str = ""


def rows(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Return the examples as batches of at most `size` rows, in an order of their own."""
    found = []
    for batch in _common.canonical(batches):
        for start in range(0, len(batch.ids), size):
            part = slice(start, start + size)
            found.append(Batch(ids=batch.ids[part], answers=batch.answers[part]))
    return found


def cosine(step: int, steps: int, low: float = 0.1) -> float:
    """Return the share of the peak learning rate at `step`: from 1 down to `low`."""
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def trapezoid(step: int, steps: int, low: float = 0.1) -> float:
    """Return the share of the peak: up over the first fifth, down to `low` over the last."""
    edge = max(1.0, steps / 5)
    up, down = (step + 1) / edge, (steps - step) / edge
    return max(low, min(1.0, up, down))


def train(
    morphable: Morphable,
    name: str,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    loss_at: Callable[[int, Batch], torch.Tensor],
    *,
    steps: int,
    factor: Callable[[int, int], float] = cosine,
    clamp: Callable[[], None] | None = None,
) -> Trained:
    """Train in place with Adam; batches are taken in turn.

    `loss_at(step, batch)` is minimised by descent groups and maximised by ascent groups. A loss,
    gradient or parameter that is not finite, or explodes, ends the run with the last good state.
    The state is remembered every few steps, so that a stopped run goes on bit-equal. Raises
    PlanError where the very first step fails.
    """
    parameters = [p for g in groups for p in g.parameters]
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in parameters]
    run = Trained()
    key = f"{name} state {steps} " + " ".join(_common.digest(b) for b in batches)
    first = _resume(morphable, key, parameters, moments, run)
    for step in range(first, steps):
        before = [p.detach().clone() for p in parameters]
        loss = loss_at(step, batches[step % len(batches)])
        bad = "" if bool(torch.isfinite(loss)) else f"the loss is {float(loss.detach())}"
        gradients: Sequence[torch.Tensor] = ()
        if not bad:
            gradients = morphable.gradients(loss, parameters)
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                bad = "a gradient is not finite"
        if not bad:
            _step(groups, gradients, moments, step + 1, factor(step, steps))
            if clamp is not None:
                clamp()
            worst = max(float(p.detach().abs().max()) for p in parameters)
            if not worst < EXPLODED:
                bad = f"a gate or multiplier reached {worst:.3g}"
                with torch.no_grad():
                    for p, old in zip(parameters, before):
                        p.copy_(old)
        if bad:
            if step == 0:
                raise PlanError(
                    f"selector {name.split()[0]}: {bad} at the first step. Give --dtype float32, "
                    "other text, or a smaller --set selector.lr."
                )
            run.stopped = f"{bad} at step {step} of {steps}; the state before it was used"
            break
        run.losses.append(float(loss.detach()))
        morphable.progress(step + 1, steps)
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            _save(morphable, key, parameters, moments, run)
    return run


def _step(
    groups: Sequence[Group],
    gradients: Sequence[torch.Tensor],
    moments: list[list[torch.Tensor]],
    step: int,
    factor: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """One step of Adam, written out: its state must be plain numbers to be remembered exactly."""
    at = 0
    with torch.no_grad():
        for group in groups:
            for p in group.parameters:
                g = -gradients[at] if group.ascent else gradients[at]
                m, v = moments[at]
                m.lerp_(g, 1 - betas[0])
                v.lerp_(g * g, 1 - betas[1])
                size = (v / (1 - betas[1] ** step)).sqrt() + 1e-8
                p.sub_(group.lr * factor * (m / (1 - betas[0] ** step)) / size)
                at += 1


def _save(
    morphable: Morphable,
    key: str,
    parameters: list[torch.Tensor],
    moments: list[list[torch.Tensor]],
    run: Trained,
) -> None:
    state = [float(len(run.losses)), *run.losses]
    for p, (m, v) in zip(parameters, moments):
        for tensor in (p, m, v):
            state += tensor.detach().double().flatten().tolist()
    if sum(p.numel() for p in parameters) < 100_000:  # gates; weights are trained from the start
        morphable.memo.put(key, state)


def _resume(
    morphable: Morphable,
    key: str,
    parameters: list[torch.Tensor],
    moments: list[list[torch.Tensor]],
    run: Trained,
) -> int:
    state = morphable.memo.get(key)
    if state is None:
        return 0
    step = int(state[0])
    run.losses, at = state[1 : step + 1], step + 1
    with torch.no_grad():
        for p, (m, v) in zip(parameters, moments):
            for tensor in (p, m, v):
                part = torch.tensor(state[at : at + p.numel()], dtype=torch.float64)
                tensor.copy_(part.view(p.shape))
                at += p.numel()
    return step


def unit_gates(morphable: Morphable, granularity: Granularity, start: float) -> torch.Tensor:
    """Return gates `[number of candidates, units]` in float32 that ask for gradients."""
    shape = (len(morphable.candidates), morphable.geometry.units(granularity))
    device = next(morphable.model.parameters()).device
    return torch.full(shape, start, device=device, requires_grad=True)


def soft(
    morphable: Morphable, gates: torch.Tensor, full: dict[int, torch.Tensor] | None = None
) -> dict[int, Any]:
    """Return the modes in which every unit is mixed by its gate.

    `full` are the heads' outputs of the teacher's stream, where these stand in for the student's.
    """
    repeat = morphable.geometry.num_attention_heads // gates.shape[1]
    return {
        i: Soft(gate=gate.repeat_interleave(repeat), full=None if full is None else full[i])
        for i, gate in zip(morphable.candidates, gates)
    }


def told(run: Trained, gates: torch.Tensor) -> dict[str, Any]:
    """Return what a score file says of a run: the gates' spread, losses, and any warning."""
    found = [x for row in gates.detach().tolist() for x in row]
    gap = _common.spread(found)
    told_: dict[str, Any] = {"steps": len(run.losses), "gate_spread": round(gap, 4)}
    if run.losses:
        told_ |= {"first_loss": run.losses[0], "last_loss": run.losses[-1]}
    if run.stopped:
        told_["stopped"] = run.stopped
    return told_


@contextmanager
def learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let weights learn for the length of a `with` block, and put them back bit for bit."""
    before = [(p, p.detach().clone(), p.requires_grad) for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for p, value, flag in before:
                p.copy_(value)
                p.requires_grad_(flag)
