"""Weights split over processes with FSDP2: copies to compute with, and whole tensors back.

The model that a copy is made of stays whole where it is, with the parameters it had. Source:
torch's `fully_shard` (torch.distributed.fsdp).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from morph.errors import UnsupportedModel, escape


def shard(model: nn.Module, container: str, device: torch.device) -> nn.Module:
    """Return a copy of `model` whose weights are split over all processes, layer by layer.

    `container` names the list of decoder layers. One layer at a time is whole on `device`. The
    head is the model's own, whole and where it was: the copy is called without it. Where a layer
    trains parameters of several dtypes, all but those of the commonest are whole everywhere.

    Raises UnsupportedModel where two layers share a parameter.
    """
    from torch.distributed.device_mesh import init_device_mesh

    layers = list(model.get_submodule(container).children())
    _refuse_ties(model, layers)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shell: Any = _same_tensors(model)
    done: set[int] = set()
    for layer in shell.get_submodule(container).children():
        _own(layer, device, done)
        _split(layer, list(layer.parameters()), mesh)
        done |= {id(p) for p in layer.parameters()}
    base = shell.base_model  # the root, because it is what is called
    _own(base, device, done)
    _split(base, [p for p in base.parameters() if id(p) not in done], mesh)
    return shell


def with_copies(model: nn.Module, paths: Iterable[str], device: torch.device) -> nn.Module:
    """Return a copy of `model` in which the modules at `paths` have whole copies on `device`.

    All other parameters are the model's own, where they are.
    """
    shell = _same_tensors(model)
    for path in paths:
        _own(shell.get_submodule(path), device, set())
    return shell


def is_split(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is split over processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be split; every process must ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole tensors; those that were split are on the CPU, and in the first process only.

    Every process must ask, for the same names in the same order.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if not is_split(tensor):
            found[name] = full
        elif torch.distributed.get_rank() == 0:
            found[name] = full.cpu()  # one at a time is whole on a device
    return found


def split_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor split as `like` is; every process must ask."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split: Any = like
    return distribute_tensor(tensor.to(like.device), split.device_mesh, split.placements)


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the common norm of the gradients of `parameters`, split over processes or whole."""
    norms = [
        whole(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]))
        for part in _by_kind(parameters)
    ]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, norm: torch.Tensor) -> None:
    """Scale gradients whose common norm is `norm` to one of at most `most`."""
    for part in _by_kind(parameters):
        torch.nn.utils.clip_grads_with_norm_(part, most, norm)


def _by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return those that are split and those that are whole, apart: no function takes both."""
    parts = [[p for p in parameters if is_split(p) == kind] for kind in (True, False)]
    return [part for part in parts if part]


def _split(module: nn.Module, parameters: list[nn.Parameter], mesh: Any) -> None:
    """Split the parameters that a module has besides those of modules inside that are split."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP sums the gradients of a group in one buffer, which has one dtype.
    sizes: Counter[torch.dtype] = Counter()
    for p in parameters:
        sizes[p.dtype] += p.numel() if p.requires_grad else 0
    (common, _), *_ = sizes.most_common(1) or [(torch.float32, 0)]
    rare = {p for p in parameters if p.requires_grad and p.dtype != common}
    summed = torch.float32 if common.itemsize == 2 else None
    # FSDP keeps a root whole after its forward, for a way back that a teacher does not have.
    trains = any(p.requires_grad for p in module.parameters())
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=None if trains else True,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=summed),
        ignored_params=rare,
    )


def _same_tensors(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules that holds the model's own parameters and buffers."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in held})


def _refuse_ties(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters():
            if owner.setdefault(id(p), i) != i:
                raise UnsupportedModel(
                    f"layers {owner[id(p)]} and {i} of this {type(model).__name__} share "
                    f"{escape(name)}, which cannot be split; train it without training.shard."
                )


def _own(module: nn.Module, device: torch.device, done: set[int]) -> None:
    """Give a module copies of its parameters and buffers on `device`, tied ones once.

    Parameters whose ids are in `done` are left alone.
    """
    made: dict[int, Any] = {}
    for owner in module.modules():
        for leaf, p in owner._parameters.items():
            if p is None or id(p) in done:
                continue
            if id(p) not in made:
                copied = p.detach().to(device, copy=True)
                made[id(p)] = nn.Parameter(copied, requires_grad=p.requires_grad)
            owner._parameters[leaf] = made[id(p)]
        for leaf, b in owner._buffers.items():
            owner._buffers[leaf] = None if b is None else b.to(device, copy=True)
