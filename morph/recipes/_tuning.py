"""The sections of a recipe that measure a repair: what tunes the hybrid, and what is put back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from morph.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A fine-tuning of the finished hybrid on short problems, to see what it does to recall.

    Rows of `seq_len` tokens hold problems of the `tasks`, of which the solutions are learnt; `text`
    is the share of rows that are plain text of the data section instead. All weights train but the
    output head (and an embedding tied to it) and what `freeze` names: projections (q, k, v, o) and
    norms of queries and keys (norm) of the layers that keep full attention, or all but those
    (rest).

    It ends after `tokens`, or, with `stop_below`, once recall falls to that share of what it was
    at the start. Recall is measured every `probe_every` steps (0: never) on `training.probe_task`,
    `probe_length` and `probe_examples`. `problems` held-out ones of each task are asked at the end.
    """

    tokens: int
    tasks: tuple[Literal["sums", "lookups"], ...] = ("lookups",)
    seq_len: int = 128
    batch_size: int = 16
    lr: float = 1e-3
    gate_lr: float = 1e-3
    min_lr_fraction: float = 0.1
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    text: float = 0.0
    freeze: tuple[Literal["q", "k", "v", "o", "norm", "rest"], ...] = ()
    stop_below: float | None = None
    probe_every: int = 0
    problems: int = 200
    save_every: int = 50


@dataclass(frozen=True, kw_only=True)
class Restore:
    """What is put back into the fine-tuned hybrid from the one before; see `morph restore`."""

    method: Literal["exact", "ridge", "interpolate"] = "exact"
    rho: float | None = None
    alpha: float | None = None
    layers: str = "full"
    include: tuple[Literal["q", "k", "v", "o", "bias", "norm", "gate"], ...] = ("q", "k", "bias")


def check(tuned: Finetune | None, restored: Restore | None) -> None:
    """Raise for a fine-tuning, or a restore after it, that could not do what it says."""
    if tuned is None:
        if restored is not None:
            raise RecipeError(
                "restore: nothing is fine-tuned here, so nothing can be put back. Add a section "
                "finetune, or use `morph restore PRE POST OUT`."
            )
        return
    if not tuned.tasks:
        raise RecipeError("finetune.tasks: name one at least, such as [lookups].")
    for key in ("tasks", "freeze"):
        _once(getattr(tuned, key), f"finetune.{key}")
    if {"q", "k", "v", "o", "norm", "rest"} <= set(tuned.freeze):
        raise RecipeError("finetune.freeze: it names everything; nothing would train.")
    if tuned.stop_below is not None and not tuned.probe_every:
        raise RecipeError(
            "finetune.stop_below: recall is never measured; set finetune.probe_every too."
        )
    if restored is None:
        return
    for name, method in (("rho", "ridge"), ("alpha", "interpolate")):
        given = getattr(restored, name) is not None
        if given != (restored.method == method):
            what = "belongs to" if given else "is needed by"
            raise RecipeError(f"restore.{name}: it {what} method {method}; give both or neither.")
    _once(restored.include, "restore.include")
    named = set(restored.include) - {"bias"}
    if not named:
        raise RecipeError("restore.include: name a projection, such as [q, k, bias].")
    if restored.method == "ridge" and not {"q", "k"} <= named:
        raise RecipeError("restore.include: method ridge needs q and k.")
    if restored.layers == "full" and named <= set(tuned.freeze):
        raise RecipeError(
            f"restore.include: finetune.freeze holds {', '.join(sorted(named))} fixed, so they are "
            "the same before and after. Leave restore out, or freeze less."
        )


def words(tuned: Finetune | None, restored: Restore | None) -> dict[str, str]:
    """Return what a recipe tunes and what it puts back, a line each; empty where it does not."""
    told = {}
    if tuned is not None:
        text = f"{tuned.tokens:,} tokens of {', '.join(tuned.tasks)} in rows of {tuned.seq_len}"
        text += f", {tuned.text:.0%} of them plain text" if tuned.text else ""
        parts = [name for name in tuned.freeze if name != "rest"]
        text += f"; {', '.join(parts)} of full layers fixed" if parts else ""
        text += "; all but attention of full layers fixed" if "rest" in tuned.freeze else ""
        if tuned.stop_below is not None:
            text += f"; until recall is below {tuned.stop_below:.0%} of its start"
        told["fine-tuning"] = text
    if restored is not None:
        how = {"ridge": f" (rho {restored.rho:g})" if restored.rho is not None else ""}
        how["interpolate"] = f" (alpha {restored.alpha:g})" if restored.alpha is not None else ""
        shown = f"{restored.method}{how.get(restored.method, '')}"
        told["restore"] = f"{', '.join(restored.include)} of layers {restored.layers}, {shown}"
    return told


def _once(names: Sequence[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{where}: {name} is listed twice.")
