"""Decoder layers whose weights are read when they run and dropped afterwards, one at a time.

Parameters come and go inside the modules that own them, so that whatever shares those modules (the
switches of the morphable model, both kinds of attention) sees the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from morph.errors import CheckpointError, PlanError
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.surgery._graft import base_of, layers_of

if TYPE_CHECKING:
    from morph.surgery._morphable import Morphable

Slot = tuple[nn.Module, str, str, nn.Parameter]  # owner, name there, full name, what waits there


class StreamedLayers:
    """The layers of a model whose parameters wait on the meta device; at most one is resident.

    Whatever runs a module of layer i first reads the layer's tensors by `load(full name)`, unless
    they are there, and drops those of any other layer. So a plain forward reads every layer once,
    and so does a pass of many variants that go through each layer together. `drop` leaves none.
    Tensors are put on `device`, in the dtype of the parameter that waits there. Parameters that
    are real (a mixer's own) stay. Forwards only: an input that carries gradients into a layer that
    must be read is refused, since the way back would hold every layer at once.
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[str], torch.Tensor],
        family: Family | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        family = family or family_of(model.config.to_dict())
        self.load, self.device = load, torch.device(device)
        self.resident: int | None = None
        names = {module: name for name, module in model.named_modules()}
        self._slots: list[list[Slot]] = []
        self._handles: list[Any] = []
        for i, layer in enumerate(layers_of(base_of(model), family)):
            slots = [
                (module, name, f"{names[module]}.{name}", p)
                for module in layer.modules()
                for name, p in module._parameters.items()
                if p is not None and p.is_meta
            ]
            self._slots.append(slots)
            for module in {slot[0]: None for slot in slots}:
                self._handles.append(module.register_forward_pre_hook(self._before(i)))

    def _before(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.resident == layer:
                return
            if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in args):
                raise PlanError(
                    f"layer {layer} of a streamed model was given an input with gradients; the way "
                    "back needs every layer in memory at once. Load the model whole."
                )
            self.fetch(layer)

        return before

    def names(self, layer: int) -> list[str]:
        """Return the full names of the tensors that are read for a layer."""
        return [name for _, _, name, _ in self._slots[layer]]

    def nbytes(self, layer: int) -> int:
        """Return the bytes that a layer takes while it is resident."""
        return sum(waiting.numel() * waiting.element_size() for *_, waiting in self._slots[layer])

    def fetch(self, layer: int) -> None:
        """Read the tensors of a layer, where they are not there, after dropping any other's.

        Raises CheckpointError where a tensor has another shape; then no layer is resident.
        """
        if self.resident == layer:
            return
        self.drop()
        self.resident = layer
        try:
            for module, name, full, waiting in self._slots[layer]:
                found = self.load(full)
                if found.shape != waiting.shape:
                    raise CheckpointError(
                        f"{full} is {list(found.shape)}, the model needs {list(waiting.shape)}."
                    )
                found = found.to(device=self.device, dtype=waiting.dtype)
                module._parameters[name] = nn.Parameter(found, requires_grad=False)
        except BaseException:
            self.drop()
            raise

    def drop(self, layer: int | None = None) -> None:
        """Let go of a layer's tensors, or of any layer's where none is named."""
        if self.resident is None or layer not in (None, self.resident):
            return
        for module, name, _, waiting in self._slots[self.resident]:
            module._parameters[name] = waiting
        self.resident = None

    def close(self) -> None:
        """Drop what is resident and take the hooks off; the layers cannot run any more."""
        self.drop()
        for handle in self._handles:
            handle.remove()
        self._handles = []


def refuse_streaming(morphable: Morphable, name: str) -> None:
    """Raise PlanError where `name`, which needs gradients, was given a streamed model."""
    if morphable.streaming:
        raise PlanError(
            f"{name} needs gradients, and the way back needs every layer in memory at once; this "
            "model is streamed, one layer at a time. Load it whole, or choose what only runs "
            "forwards, such as the selector nll."
        )
