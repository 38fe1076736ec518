"""What measuring quality and measuring cost share: modes, devices, random ids, finite numbers."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from morph.errors import VerificationFailed

Model = Any  # a transformers causal language model, or anything that is called like one
Source = nn.Module | Callable[[], Model]


@contextmanager
def inference(model: Model) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the model comes back in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, training in modes:
            module.training = training


def make(source: Source) -> Model:
    """The model itself, or the one its function makes once the last one is really gone."""
    if isinstance(source, nn.Module):
        return source
    gc.collect()  # modules and their hooks refer to each other in cycles
    return source()


def vocab_size(model: Model) -> int:
    return int(model.config.get_text_config().vocab_size)


def random_ids(model: Model, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size(model), (1, length), generator=generator)


def check_finite(values: Sequence[float], what: str) -> None:
    for value in values:
        if not math.isfinite(value):
            raise VerificationFailed(
                f"{what} of the model is {value}: its weights or its dtype overflow. Load it in "
                "float32, or check the checkpoint with `morph verify`."
            )
