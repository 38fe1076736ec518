"""Keep fewer activations: layers, or their MLPs, are computed again on the way back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(layers: Sequence[nn.Module], what: str) -> Iterator[None]:
    """Recompute `what` ("none", "mlp", "layer") of decoder layers in the backward pass.

    The values are the same to the bit: nothing is random in a layer here. transformers' own switch
    works in training mode only, where dropout would come with it.
    """
    chosen = [m for layer in layers for m in _parts(layer, what)]
    for module in chosen:
        forward = module.forward
        module.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _parts(layer: nn.Module, what: str) -> list[Any]:
    if what == "none":
        return []
    if what == "layer":
        return [layer]
    return [m for m in layer.children() if "mlp" in type(m).__name__.lower()]
