"""Start a hybrid's mixers from what the source computes: one forward, no gradient.

A linear mixer straight after surgery has the source's projections, but its decays, gates and scales
are guesses. `calibrate` shows every mixer its layer's inputs and the heads' outputs of the source's
own attention, layer by layer as the source runs, and lets it choose (`MixerBase.calibrate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morph.families._family import Family
from morph.families._lookup import family_of
from morph.mixers._hybrid import Context, HybridAttention
from morph.surgery._graft import attention_of, base_of, hybrid_layers


@dataclass(frozen=True, kw_only=True)
class Start:
    """How far one layer's attention output is from the source's, as a share of its square.

    `before` and `after` calibration; 0 is equal, 1 is as far as no output at all.
    """

    before: float
    after: float


@torch.no_grad()
def calibrate(hybrid: nn.Module, source: nn.Module, ids: torch.Tensor) -> dict[int, Start]:
    """Let every mixer of `hybrid` start from what `source` computes on ids `[B, T]`, in place.

    Returns how near each converted layer came; one that would come out farther keeps its start. The
    source is run once and left as it was; mixers without a `calibrate` keep their parameters.
    """

    told = Context()

    def watch(layer: HybridAttention, hidden: Any, positions: Any, heads: Any, y: Any) -> Start:
        before = _distance(layer, hidden, positions, y, told)
        settings = {
            f"mixers.{i}.{n}" for i, mixer in enumerate(layer.mixers) for n in mixer.settings
        }
        start = {n: p.detach().clone() for n, p in layer.own_parameters() if n not in settings}
        layer.calibrate([(hidden, positions, heads)])
        after = _distance(layer, hidden, positions, y, told)
        if not after <= before:  # heads are fitted one by one; together they may do worse
            for name, p in layer.own_parameters():
                if name in start:
                    p.copy_(start[name])
            after = _distance(layer, hidden, positions, y, told)
        return Start(before=before, after=after)

    return _visit(hybrid, source, ids, watch)


@torch.no_grad()
def output_errors(hybrid: nn.Module, source: nn.Module, ids: torch.Tensor) -> dict[int, float]:
    """Return how far each converted layer's output is from the source's on the source's inputs.

    Squares of the difference over squares of the source's output, on ids `[B, T]`.
    """

    told = Context()

    def watch(layer: HybridAttention, hidden: Any, positions: Any, heads: Any, y: Any) -> float:
        return _distance(layer, hidden, positions, y, told)

    return _visit(hybrid, source, ids, watch)


def _distance(
    layer: HybridAttention, hidden: Any, positions: Any, y: torch.Tensor, told: Context
) -> float:
    got, _ = layer(hidden, positions, morph_context=told)
    return ((got - y).double().square().sum() / y.double().square().sum()).item()


def _visit(
    hybrid: nn.Module, source: nn.Module, ids: torch.Tensor, watch: Callable[..., Any]
) -> dict[int, Any]:
    """Run `source`; call `watch` at every converted layer with what its attention took and gave."""
    family: Family = family_of(source.config.to_dict())  # type: ignore[operator, union-attr]
    base, layers, found, handles = base_of(source), hybrid_layers(hybrid), {}, []
    training = {module: module.training for module in source.modules()}

    def hook(i: int, layer: HybridAttention) -> None:
        attention, taken = attention_of(base, family, i), {}

        def heads(module: nn.Module, args: Any) -> None:
            taken["heads"] = args[0].unflatten(-1, (layer.geometry.num_attention_heads, -1))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            positions = kwargs.get("position_embeddings")
            found[i] = watch(layer, hidden, positions, taken.pop("heads"), y)

        handles.append(getattr(attention, family.o).register_forward_pre_hook(heads))
        handles.append(attention.register_forward_hook(after, with_kwargs=True))

    try:
        for i, layer in layers.items():
            hook(i, layer)
        base.eval()
        base(input_ids=ids.to(next(base.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    return found
