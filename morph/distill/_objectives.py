"""One batch of each stage: forward, loss and backward, with the teacher's part."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from morph.distill._batches import IGNORED, Batch
from morph.distill._losses import Head, check_head, head_cross_entropy, head_kl, relative_mse
from morph.distill._recompute import recomputed
from morph.distill._teacher import Teacher, first_of, starting_from
from morph.distill._trainee import Trainee, candidates
from morph.errors import DataError, MismatchError, TrainingError
from morph.recipes._rules import cross_entropy_share
from morph.recipes.schema import Stage


def align(
    trainee: Trainee, accelerator: Any, teacher: Teacher, stage: Stage, batch: Batch
) -> tuple[float, dict[str, Any]]:
    """Backward every converted layer's regression on the teacher's input and output.

    All layers, and all candidates of a layer, come from one teacher forward, and one graph is alive
    at a time. Padding does not count. Returns the mean of the relative errors, and each of them by
    layer, or by `layer/candidate`; with micro-batches the means of theirs. Raises TrainingError.
    """
    losses: dict[str, float] = {}
    for part in batch.parts(stage.micro_batch):
        share = len(part.ids) / len(batch.ids)
        for key, loss in _regress(trainee, accelerator, teacher, part, share).items():
            losses[key] = losses.get(key, 0.0) + share * loss
        trainee.collect()
    return sum(losses.values()) / len(losses), {"layers": losses}


def _regress(
    trainee: Trainee, accelerator: Any, teacher: Teacher, batch: Batch, share: float
) -> dict[str, float]:
    """Backward `share` of every regression on a micro-batch; return their whole losses."""
    calls = teacher.calls(batch)
    losses: dict[str, float] = {}
    for i, layer in trainee.layers.items():
        args, kwargs, target = calls.pop(i)
        if batch.real is not None:
            target = target[batch.real]
        many = accelerator.num_processes > 1
        squares = _sum(accelerator, target.float().square().sum()) if many else None
        for name, module in candidates(layer).items():
            with accelerator.autocast():
                output = first_of(module(*args, **kwargs))
            output = output if batch.real is None else output[batch.real]
            loss = relative_mse(output, target, squares)
            key = f"{i}/{name}" if name else str(i)
            losses[key] = _sum(accelerator, loss.detach()).item()
            if not math.isfinite(losses[key]):
                raise TrainingError(f"the loss of layer {key} is {losses[key]}")
            if loss.requires_grad:
                accelerator.backward(loss if share == 1 else loss * share)
    return losses


def end_to_end(
    trainee: Trainee, accelerator: Any, teacher: Teacher, stage: Stage, head: Head, batch: Batch
) -> tuple[float, dict[str, Any]]:
    """Backward the stage's share of KL to the teacher and of cross-entropy, over the tokens wanted.

    A mean over the tokens that count, in all processes together: of plain text all, of questions
    the answers, never padding, and for cross-entropy none that starts a document. Returns the
    loss. Raises DataError where nothing counts, and TrainingError.
    """
    count = int(_sum(accelerator, (_wanted(stage, batch) != IGNORED).sum()).item())
    if not count:
        raise DataError(f"a batch of stage {stage.loss!r} has no token to learn from.")
    value = 0.0
    for part in batch.parts(stage.micro_batch):
        value += _learn(trainee, accelerator, teacher, stage, head, part, count)
        trainee.collect()
    return value, {} if batch.labels is None else {"needles": True}


def _wanted(stage: Stage, batch: Batch) -> torch.Tensor:
    # Position t predicts token t + 1; the KL of plain text can use the last position too.
    return batch.wanted(shifted=cross_entropy_share(stage) > 0 or batch.labels is not None)


def _learn(
    trainee: Trainee,
    accelerator: Any,
    teacher: Teacher,
    stage: Stage,
    head: Head,
    batch: Batch,
    count: int,
) -> float:
    """Backward the loss of a micro-batch, as its part of a mean over `count` tokens; return it."""
    share, wanted = cross_entropy_share(stage), _wanted(stage, batch)
    rows = wanted != IGNORED  # [B, T]
    target, lower = teacher.hidden(batch) if share < 1 else (None, None)
    chunk = {"chunk_tokens": stage.chunk_tokens, "count": count}
    with starting_from(trainee, lower), recomputed(trainee.upper_layers(), stage.recompute):
        with accelerator.autocast():
            hidden = trainee.model.base_model(**batch.inputs()).last_hidden_state
        if target is None:
            loss = head_cross_entropy(hidden[rows], wanted[rows], head, **chunk)
        else:
            loss = head_kl(
                hidden[rows],
                target[rows],
                head,
                temperature=stage.temperature,
                direction=stage.kl,
                targets=wanted[rows] if share else None,
                cross_entropy=share,
                **chunk,
            )
        value = _sum(accelerator, loss.detach()).item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value}: {_first_bad(trainee, batch)}")
        if loss.requires_grad:
            accelerator.backward(loss)
    return value


def shared_head(student: Any, teacher: Any, batch: Batch) -> Head:
    """Return the student's head, compared on a few tokens with what the teacher does to logits.

    Raises UnsupportedModel for a head morph does not know, MismatchError where heads differ.
    """
    ids = batch.ids[:1, :8]
    with torch.no_grad():
        hidden = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = teacher(input_ids=ids, use_cache=False).logits
    theirs, head = check_head(teacher, hidden, logits), Head.of(student)
    if not torch.equal(head.weight, theirs.weight):
        raise MismatchError("student and teacher have different output heads.")
    return head


def _first_bad(trainee: Trainee, batch: Batch) -> str:
    """Return words for the first converted layer whose output is not finite on a batch."""
    bad: list[int] = []

    def watch(i: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not bool(torch.isfinite(first_of(output)).all()):
                bad.append(i)

        return after

    handles = [m.register_forward_hook(watch(i)) for i, m in trainee.layers.items()]
    try:
        with torch.no_grad():
            trainee.model.base_model(**batch.inputs())
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"layer {bad[0]} is the first converted layer whose output is not finite"
    return "the outputs of all converted layers are finite"


def _sum(accelerator: Any, tensor: torch.Tensor) -> torch.Tensor:
    return accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor
