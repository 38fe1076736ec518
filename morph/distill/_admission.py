"""What cannot run is refused before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from morph.distill._batches import Source
from morph.distill._trainee import Candidates
from morph.errors import MismatchError, RecipeError, UnsupportedModel, UsageError
from morph.recipes.schema import Stage


def accelerator_for(precision: str | None) -> Any:
    """Return an Accelerator; raise UsageError where this process has one of another precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    # There is one state a process, and its precision stays; an earlier run's own may go.
    if is_initialized() and getattr(AcceleratorState(), "morph", False):
        AcceleratorState._reset_state()
    theirs = is_initialized()
    try:
        made = Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise UsageError(
            f"this process uses accelerate in another way than with mixed_precision={precision}: "
            "pass distill that `accelerator`, or use another process."
        ) from error
    made.state.morph = not theirs
    return made


def refuse(
    student: Any,
    teacher: Any,
    stages: Sequence[Stage],
    accelerator: Any,
    needles: Source | None,
    layers: Mapping[int, nn.Module],
) -> None:
    """Raise for what cannot run before anything is touched."""
    several = any(isinstance(layer, Candidates) for layer in layers.values())
    if several and any(stage.loss != "align" or stage.train == "lora" for stage in stages):
        raise UsageError(
            "several candidates for a layer can only be aligned (without lora); choose one of them "
            "for the other stages."
        )
    if student is teacher:
        raise UsageError("student and teacher are one object; make the student with a plan.")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = getattr(student.config, key, None), getattr(teacher.config, key, None)
        if mine != theirs:
            raise MismatchError(f"{key} is {mine} in the student and {theirs} in the teacher.")
    if "dynamic" in _rope_types(getattr(student.config, "rope_parameters", None)):
        raise UnsupportedModel(
            "rope_type 'dynamic' turns with the longest row seen before, which a saved state does "
            "not hold; choose another type (yarn, linear) in the config to train."
        )
    half = accelerator.mixed_precision == "fp16"
    if half or any(p.dtype == torch.float16 for p in student.parameters()):
        raise UnsupportedModel(
            "gradients underflow in float16; load the model in float32 or bfloat16 to train it."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UsageError("gradient accumulation is not supported; use micro_batch.")
    for i, stage in enumerate(stages):
        if stage.batch_size % accelerator.num_processes:
            raise RecipeError(
                f"distill[{i}].batch_size: {stage.batch_size} rows cannot be shared by "
                f"{accelerator.num_processes} processes; give a multiple."
            )
        if stage.needles and needles is None:
            raise RecipeError(
                f"distill[{i}].needles: {stage.needles}, but no needle batches were given."
            )


def _rope_types(parameters: Any) -> set[Any]:
    """Return every rope_type in a config's rope parameters, which may differ by kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    found = {parameters.get("rope_type")}
    return found.union(*(_rope_types(inner) for inner in parameters.values()))
