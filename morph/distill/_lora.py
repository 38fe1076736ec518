"""Low-rank updates of the projections of converted layers, by peft, merged exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from morph.errors import UnsupportedModel, UsageError, escape
from morph.families._lookup import family_of

ADAPTER = "default"  # peft's own word; it is part of the parameters' names


class Lora:
    """Low-rank updates of the source's projections inside converted layers, for one stage.

    `paths` are the converted attention modules inside `student`. A projection `[out, in]` computes
    with weight + alpha / rank * B @ A, where A `[rank, in]` is drawn from `seed` alone and
    B `[out, rank]` is zero at first; both are float32, or float64 like the weight. The weights
    themselves are frozen and stay the same objects, whoever else holds them; nothing else in the
    student is touched. `names` are A and B of every projection as `student.named_parameters()`
    has them until `merge` or `remove`; `wrapped` tells what the rest is called meanwhile.

    Raises UsageError where peft is missing, UnsupportedModel for a projection that is not a plain
    `nn.Linear`.
    """

    def __init__(
        self, student: nn.Module, paths: Sequence[str], *, rank: int, alpha: float, seed: int
    ) -> None:
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for path in paths:
            attention = student.get_submodule(path)
            for leaf in _projections(attention, student):
                self._places[f"{path}.{leaf}"] = attention, leaf
        self._linears = {n: a.get_submodule(leaf) for n, (a, leaf) in self._places.items()}
        for name, linear in self._linears.items():
            _check(name, linear)
        self._frozen = [
            (p, p.requires_grad) for linear in self._linears.values() for p in linear.parameters()
        ]
        self._layers = _wrap(self._linears, rank, alpha)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, layer in self._layers.items():
            _start(layer, self._linears[name], generator)
            attention, leaf = self._places[name]
            attention.add_module(leaf, layer)
        self.names = [
            f"{place}.{name}"
            for place, layer in self._layers.items()
            for name, p in layer.named_parameters()
            if p.requires_grad
        ]

    def wrapped(self, name: str) -> str:
        """Return the name that a parameter of the plain student has while the updates are in."""
        stem, _, leaf = name.rpartition(".")
        return f"{stem}.base_layer.{leaf}" if stem in self._layers else name

    @torch.no_grad()
    def merge(self) -> dict[str, torch.Tensor]:
        """Take the updates out and return the new weight `[out, in]` of every projection by name.

        Computed in float64 on the CPU and rounded once to the weight's dtype, so that no device
        makes a difference. An element that its update leaves alone keeps its bits. The student
        itself has the old weights again, untouched.
        """
        new = {f"{name}.weight": _merged(layer) for name, layer in self._layers.items()}
        self.remove()
        return new

    def remove(self) -> None:
        """Put the original modules back without merging; does nothing the second time."""
        for name in self._layers:
            attention, leaf = self._places[name]
            attention.add_module(leaf, self._linears[name])
        for p, flag in self._frozen:
            p.requires_grad_(flag)
        self._layers, self._frozen, self.names = {}, [], []


def _projections(attention: nn.Module, student: Any) -> list[str]:
    """Return the names of the projections that a converted layer has from its source."""
    family: Any = getattr(attention, "family", None) or family_of(student.config.to_dict())
    inner = [family.qkv] if family.qkv else [family.q, family.k, family.v]
    return [*inner, family.o]


def _check(name: str, module: nn.Module) -> None:
    # A subclass may keep its weight packed or do more than multiply; neither could be merged.
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise UnsupportedModel(
            f"{escape(name)} is a {type(module).__name__}; `train: lora` needs a plain "
            "torch.nn.Linear with floating-point weights. Load the model unquantised, or use "
            "`train: new`."
        )


def _wrap(linears: dict[str, nn.Module], rank: int, alpha: float) -> dict[str, Any]:
    """Return peft's layer around every module; torch's random state is left as it was."""
    if not linears:
        return {}
    # peft never sees the student: it would freeze all of it and leave its marks on it.
    holder = nn.ModuleDict({str(i): m for i, m in enumerate(linears.values())})
    gpus = {p.device for p in holder.parameters() if p.device.type == "cuda"}
    try:
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=sorted(gpus, key=str)):
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                target_modules=r"\d+",
                lora_dropout=0.0,
                bias="none",
            )
            inject_adapter_in_model(config, holder, adapter_name=ADAPTER)
    except ImportError as error:
        raise UsageError(
            f"`train: lora` needs peft, which cannot be loaded ({escape(str(error))}): "
            "`pip install 'morph-hybrid[peft]'`."
        ) from None
    return dict(zip(linears, holder.values(), strict=True))


def _start(layer: Any, linear: Any, generator: torch.Generator) -> None:
    """Set A to its random start and B to zero, in float32 or better."""
    down, up, weight = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], linear.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    for part in (down, up):
        part.to(device=weight.device, dtype=exact)
    bound = 1 / math.sqrt(down.in_features)  # the start that peft and nn.Linear have
    drawn = torch.empty(down.weight.shape, dtype=torch.float32, device="cpu")
    drawn.uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        down.weight.copy_(drawn)
        up.weight.zero_()
    layer.train(linear.training)


def _merged(layer: Any) -> torch.Tensor:
    weight, scale = layer.get_base_layer().weight, layer.scaling[ADAPTER]
    down, up = (x[ADAPTER].weight.to("cpu", torch.float64) for x in (layer.lora_A, layer.lora_B))
    old = weight.detach().cpu()
    update = scale * (up @ down)
    # Adding zero would turn -0.0 into 0.0.
    new = torch.where(update == 0, old, _rounded(old.double() + update, old.dtype))
    return new.to(weight.device)


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a float64 tensor rounded once to `dtype`, to nearest, ties to even.

    Torch goes to 16 bits by way of float32 and so rounds twice. Rounded to odd instead, float32
    keeps on which side of a tie the value lies.
    """
    if dtype.itemsize > 2:
        return exact.to(dtype)
    near = exact.float()
    back = near.double()
    even = (near.view(torch.int32) & 1) == 0
    side = torch.where(exact > back, math.inf, -math.inf).float()
    odd = torch.where((back != exact) & even, torch.nextafter(near, side), near)
    return odd.to(dtype)
