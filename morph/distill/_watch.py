"""What is looked at while a stage trains: recall, gates, layers that go wrong, and when to stop.

Whatever is said or logged follows from the losses, the gates, and what `state` returned, so a
resumed run writes the lines and gives the warnings of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from morph.distill._stages import is_needle_step
from morph.errors import MismatchError, RecipeError, escape
from morph.recipes.schema import Stage, Training

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
Probe = Callable[[], Mapping[str, float]]
Until = Callable[[Mapping[str, float]], str]

_MOVED = 1e-4  # the smallest relative change of a gate that counts as one
_SMALL = 0.01  # a gate this near to zero is compared with this instead of with itself
_SAMPLE = 64  # elements of a gate that are remembered
_WORSE_THAN_BEST, _WORSE_THAN_FIRST, _LAYER_FLOOR = 10.0, 3.0, 0.1
_WORSE, _FLOOR, _KEPT = 3.0, 0.01, 0.9  # of the end-to-end loss; `_KEPT` smooths it


def check(settings: Training, probe: Probe | None) -> None:
    """Raise RecipeError where a recall target is set and nothing measures recall."""
    if settings.recall_target is None:
        return
    if not settings.probe_every:
        raise RecipeError(
            f"training.recall_target: {settings.recall_target} is never compared with anything; "
            "set training.probe_every, the steps between two measurements, such as 100."
        )
    if probe is None:
        raise RecipeError(
            f"training.recall_target: {settings.recall_target}, but no probe was given that "
            "measures recall. Pass one, or leave recall_target out."
        )


class Watch:
    """Looks at a run after every optimizer step; remarks go to `note`.

    `probe` measures the student as it is and returns numbers by name: `recall`, `perplexity`, and
    the `teacher_recall` that the target is a share of (1 where it is not told). `until` is told
    what the probe found and returns why the stage ends there, or "". Raises RecipeError as `check`
    does.
    """

    def __init__(
        self,
        settings: Training,
        stages: Sequence[Stage],
        probe: Probe | None,
        note: Callable[[str], None],
        until: Until | None = None,
    ) -> None:
        check(settings, probe)
        self.settings, self.stages, self.probe, self.note = settings, stages, probe, note
        self.until, self.why = until, ""
        self._gates: dict[str, torch.nn.Parameter] = {}
        self._forget(0)

    def _forget(self, index: int) -> None:
        self._index = index
        self._starts: dict[str, list[float]] = {}  # of the gates, until they were compared
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._smooth: dict[str, list[float]] = {}  # [now, best] of text and of needle batches
        self._warned: list[str] = []
        self._reached = False

    def begin(
        self, index: int, gates: Mapping[str, torch.nn.Parameter], state: Mapping[str, Any] | None
    ) -> None:
        """Begin or resume stage `index`, which trains `gates`.

        `state` is what `state()` returned within the same stage; None, or one of another stage,
        begins anew. Raises MismatchError for a state that cannot be read.
        """
        self._gates = dict(gates)
        self._forget(index)
        if state is not None and state.get("stage") == index:
            self._restore(state)
        elif self.stages[index].gate_lr > 0:
            self._starts = {name: _sample(p) for name, p in self._gates.items()}

    def after(
        self, index: int, step: int, steps: int, loss: float, layers: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return what else the record of a step holds: `gates`, and what the probe measured.

        `step` counts from 0. Every number has 6 significant digits, or is None where not finite.
        """
        done, every, stage = step + 1, self.settings.probe_every, self.stages[index]
        due = every > 0 and done % every == 0
        where = f"stage {index} ({stage.loss}), step {step}"
        if layers is not None:
            self._layers(where, layers)
        else:
            self._whole(where, stage, step, loss)
        if self._starts and done == max(20, math.ceil(0.2 * steps)):
            self._moved(where, stage)
        extra: dict[str, Any] = {}
        if self._gates and (due or step == 0 or done == steps):
            extra["gates"] = quantiles(self._gates)
        if every and (done == steps or (due and stage.loss != "align")):
            extra |= self._measure(where, stage)
        return extra

    def reached(self) -> bool:
        """Return whether what the last probe of this stage found ends it; `why` says why."""
        return self._reached

    def state(self) -> dict[str, Any]:
        """Return what `begin` needs to go on, as plain JSON."""
        return {
            "stage": self._index,
            "starts": {name: list(values) for name, values in self._starts.items()},
            "first": dict(self._first),
            "best": dict(self._best),
            "smooth": {kind: list(pair) for kind, pair in self._smooth.items()},
            "warned": list(self._warned),
            "reached": self._reached,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            for name, values in state["starts"].items():
                if name in self._gates:
                    self._starts[name] = [float(x) for x in values]
            self._first = {str(i): float(x) for i, x in state["first"].items()}
            self._best = {str(i): float(x) for i, x in state["best"].items()}
            self._smooth = {k: [float(now), float(b)] for k, (now, b) in state["smooth"].items()}
            self._warned = [str(key) for key in state["warned"]]
            self._reached = bool(state["reached"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MismatchError(
                f"the saved state of stage {self._index} says nothing readable of its warnings "
                f"({escape(error, 80)}). Start again in another output folder."
            ) from error

    # --- what goes wrong ------------------------------------------------------------------------

    def _layers(self, where: str, layers: Mapping[str, float]) -> None:
        for layer, loss in layers.items():
            first = self._first.setdefault(layer, loss)
            best = self._best.setdefault(layer, loss)
            self._best[layer] = min(best, loss)
            worse = loss > _WORSE_THAN_BEST * best or loss > _WORSE_THAN_FIRST * first
            if worse and loss > _LAYER_FLOOR:
                self._warn(
                    f"layer {layer}",
                    f"{where}: the align error of layer {layer} is {loss:.3g}; it was {first:.3g} "
                    f"at first and {best:.3g} at best. {self._lower()}",
                )

    def _whole(self, where: str, stage: Stage, step: int, loss: float) -> None:
        # The two kinds of batches have losses of their own. Answers are a few tokens, so one
        # wrong one makes a needle batch many times worse: there the smoothed loss is compared.
        kind = "needle batches" if is_needle_step(stage, step) else "text"
        now, best = self._smooth.get(kind, [loss, loss])
        now = _KEPT * now + (1 - _KEPT) * loss
        self._smooth[kind] = [now, min(best, now)]
        seen = now if kind == "needle batches" else loss
        if seen > _WORSE * best and seen > _FLOOR:
            self._warn(
                "loss",
                f"{where}: the loss of {kind} is {seen:.3g}; its best smoothed value was "
                f"{best:.3g}. {self._lower()}",
            )

    def _lower(self) -> str:
        stage = self.stages[self._index]
        return (
            f"If it does not come back, lower lr ({stage.lr:g}) or gate_lr ({stage.gate_lr:g}) or "
            f"raise warmup_fraction ({stage.warmup_fraction:g})."
        )

    def _moved(self, where: str, stage: Stage) -> None:
        """Warn of gates that are where they began, in one remark per group; forget the starts."""
        still: dict[str, list[tuple[str, float]]] = {}
        for name, before in self._starts.items():
            pairs = zip(_sample(self._gates[name]), before)
            change = max((abs(b - a) / max(abs(a), _SMALL) for b, a in pairs), default=math.inf)
            if change < _MOVED:
                still.setdefault(group_of(name), []).append((name, change))
        self._starts = {}
        for group, found in still.items():
            shown = ", ".join(escape(name, 120) for name, _ in found[:4])
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            self._warn(
                f"gates {group}",
                f"{where}: {shown}{more} {'has' if len(found) == 1 else 'have'} not moved since "
                f"the stage began (largest relative change {max(c for _, c in found):.2g}). Is "
                f"gate_lr ({stage.gate_lr:g}) too small, or does nothing depend on it?",
            )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.append(key)
            self.note(text)

    # --- what is measured -----------------------------------------------------------------------

    def _measure(self, where: str, stage: Stage) -> dict[str, Any]:
        if self.probe is None:
            return {}
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            found = dict(self.probe())
        target, recall = self.settings.recall_target, found.get("recall")
        if target is not None and recall is not None and stage.loss != "align":
            whole = found.get("teacher_recall", 1.0)
            if whole > 0:
                self._reached = recall >= target * whole - 1e-9  # 0.72 is 0.9 * 0.8
                self.why = f"the recall that training.recall_target ({target}) asks for is reached."
            else:
                self._warn(
                    "target",
                    f"{where}: the teacher itself has a recall of {whole:g} on the probe, so "
                    f"recall_target ({target:g}) cannot end the stage. Choose an easier "
                    "training.probe_task, or a shorter training.probe_length.",
                )
        if self.until is not None and (why := self.until(found)):
            self._reached, self.why = True, why
        return {name: _rounded(value) for name, value in found.items()}


def quantiles(gates: Mapping[str, torch.nn.Parameter]) -> dict[str, list[float | None]]:
    """Return the `QUANTILES` of each group of gates, over all layers, to 6 significant digits."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, p in gates.items():
        groups.setdefault(group_of(name), []).append(_values(p))
    found = {}
    for group in sorted(groups):
        values = np.concatenate(groups[group])
        if values.size:
            with np.errstate(invalid="ignore"):  # between two infinities lies None
                found[group] = [_rounded(x) for x in np.quantile(values, QUANTILES).tolist()]
    return found


def group_of(name: str) -> str:
    """Return the group of a gate: the last part of its name, with its owner where that is `weight`.

    `model.layers.3.self_attn.mixers.0.A_log` is `A_log`, `...mixers.0.g.weight` is `g.weight`.
    """
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]


@torch.no_grad()
def _values(p: torch.Tensor) -> np.ndarray:
    # A sharded gate is gathered, by every process at the same step.
    whole = p.full_tensor() if hasattr(p, "full_tensor") else p
    return whole.detach().reshape(-1).float().cpu().numpy()


def _sample(p: torch.Tensor) -> list[float]:
    """Return up to `_SAMPLE` evenly spread elements, rounded as they are saved."""
    values = _values(p)
    chosen = values[:: max(1, -(-values.size // _SAMPLE))]
    return [float(f"{x:.8g}") for x in chosen.tolist()]


def _rounded(value: float) -> float | None:
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None
