"""One batch of each stage: forward, loss and backward, with the teacher's part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from morph.distill._batches import IGNORED
from morph.distill._losses import Head, check_head, head_cross_entropy, head_kl, relative_mse
from morph.distill._trainee import Trainee
from morph.errors import DataError, MismatchError, TrainingError
from morph.recipes.schema import Stage


def align(
    trainee: Trainee, accelerator: Any, ids: torch.Tensor
) -> tuple[float, dict[str, dict[str, float]]]:
    """Backward every converted layer's regression on the teacher's input and output.

    All layers come from one teacher forward over ids `[B, T]`, and one layer's graph is alive at a
    time. Returns the mean of the layers' relative errors, and each of them. Raises TrainingError.
    """
    calls = _teacher_calls(trainee, accelerator, ids)
    losses: dict[str, float] = {}
    for i, module in trainee.layers.items():
        args, kwargs, target = calls.pop(i)
        with accelerator.autocast():
            output = _tensor(module(*args, **kwargs))
        many = accelerator.num_processes > 1
        squares = _sum(accelerator, target.float().square().sum()) if many else None
        loss = relative_mse(output, target, squares)
        losses[str(i)] = _sum(accelerator, loss.detach()).item()
        if not math.isfinite(losses[str(i)]):
            raise TrainingError(f"the loss of layer {i} is {losses[str(i)]}")
        if loss.requires_grad:
            accelerator.backward(loss)
    return sum(losses.values()) / len(losses), {"layers": losses}


def end_to_end(
    trainee: Trainee,
    accelerator: Any,
    stage: Stage,
    head: Head,
    ids: torch.Tensor,
    labels: torch.Tensor | None,
) -> tuple[float, dict[str, bool]]:
    """Backward the KL to the teacher, or the cross-entropy, over the supervised tokens.

    ids `[B, T]`; labels `[B, T]` or None for plain text, where every token counts. Returns the mean
    loss. Raises DataError where nothing is supervised, and TrainingError.
    """
    with accelerator.autocast():
        hidden = trainee.student.base_model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = ids
    # Position t predicts token t + 1; the KL of plain text can use the last position too.
    if labels is not None or stage.loss == "long":
        wanted = torch.full_like(ids, IGNORED)
        wanted[:, :-1] = (ids if labels is None else labels)[:, 1:]
    rows = wanted != IGNORED  # [B, T]
    count = int(_sum(accelerator, rows.sum()).item())
    if not count:
        raise DataError(f"a batch of stage {stage.loss!r} has no token to learn from.")
    chunk = {"chunk_tokens": stage.chunk_tokens, "count": count}
    if stage.loss == "long":
        loss = head_cross_entropy(hidden[rows], wanted[rows], head, **chunk)
    else:
        with torch.no_grad(), accelerator.autocast():
            target = trainee.teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        loss = head_kl(hidden[rows], target[rows], head, temperature=stage.temperature, **chunk)
    value = _sum(accelerator, loss.detach()).item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value}: {_first_bad(trainee, ids)}")
    if loss.requires_grad:
        accelerator.backward(loss)
    return value, {} if labels is None else {"needles": True}


def shared_head(student: Any, teacher: Any, ids: torch.Tensor) -> Head:
    """Return the student's head, compared on ids `[B, T]` with what the teacher does to logits.

    Raises UnsupportedModel for a head morph does not know, MismatchError where heads differ.
    """
    ids = ids[:1, :8]
    with torch.no_grad():
        hidden = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = teacher(input_ids=ids, use_cache=False).logits
    theirs, head = check_head(teacher, hidden, logits), Head.of(student)
    if not torch.equal(head.weight, theirs.weight):
        raise MismatchError("student and teacher have different output heads.")
    return head


def _teacher_calls(
    trainee: Trainee, accelerator: Any, ids: torch.Tensor
) -> dict[int, tuple[Any, Mapping[str, Any], torch.Tensor]]:
    """Return (args, kwargs, output) of the teacher's attention in every converted layer."""
    calls: dict[int, tuple[Any, Mapping[str, Any], torch.Tensor]] = {}

    def watch(i: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[i] = (args, kwargs, _tensor(output))

        return after

    layers = trainee.teacher_layers.items()
    handles = [m.register_forward_hook(watch(i), with_kwargs=True) for i, m in layers]
    try:
        with torch.no_grad(), accelerator.autocast():
            trainee.teacher.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_bad(trainee: Trainee, ids: torch.Tensor) -> str:
    """Return words for the first converted layer whose output is not finite on `ids` [B, T]."""
    bad: list[int] = []

    def watch(i: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not bool(torch.isfinite(_tensor(output)).all()):
                bad.append(i)

        return after

    handles = [m.register_forward_hook(watch(i)) for i, m in trainee.layers.items()]
    try:
        with torch.no_grad():
            trainee.student.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"layer {bad[0]} is the first converted layer whose output is not finite"
    return "the outputs of all converted layers are finite"


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _sum(accelerator: Any, tensor: torch.Tensor) -> torch.Tensor:
    return accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor
