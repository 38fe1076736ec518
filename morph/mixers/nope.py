"""Full attention without rotary positions, for the layers that stay full beside linear ones (HyPE).

What it does: causal softmax attention over everything (or the source's own window) on the source's
queries and keys before their rotary positions. `log_scale` a multiplies the query at position t by
ln(t + a) / ln(a), which is 1 at the first token and grows slowly; 0 leaves it out. `gate`
multiplies every output by a sigmoid of a map of the layer's input, open at the start.
Why it works: positions come from the recurrent layers around it, so nothing in this layer was
trained for distances, and it goes on working beyond the trained length.
Cost: what full attention costs, for these heads alone; every key and value is kept.
Options: log_scale 500 tokens, gate false.
Known limits: leaving out the positions is a jump that distillation must heal; there is no setting
under which it equals a source that has rotary positions.
Reference: HypeNet (the official HALO code: a = 500 for 2B). Deviation: the factor applies in
training too; the code applies it at inference only, where its 512 tokens make it at most 1.11.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from morph.cache import State
from morph.errors import RecipeError
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._softmax import attend
from morph.plan import CacheCost

LINEAR = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """`log_scale` is a in ln(t + a) / ln(a), 0 for none; `gate` adds the output gate."""

    log_scale: int = 500
    gate: bool = False

    def __post_init__(self) -> None:
        if self.log_scale < 0 or self.log_scale == 1:
            raise RecipeError(
                f"mixer nope: log_scale is {self.log_scale}; give 0 for none, or 2 or more tokens."
            )


class Mixer(MixerBase):
    """Attention without positions; `z_weight` [H V, D] and `z_bias` [H V] are the gate, if any."""

    wants = "raw"
    gates = ("z_bias",)
    dense = True

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        width = shape.num_heads * shape.v_head_dim
        gated = options.gate
        self.z_weight = nn.Parameter(torch.empty(width, shape.hidden_size)) if gated else None
        self.z_bias = nn.Parameter(torch.empty(width)) if gated else None
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros."""
        if self.options.log_scale:
            factor = self._factor(inputs, 0 if state is None else state.seen)
            inputs = dataclasses.replace(inputs, q=inputs.q * factor.to(inputs.q))
        o = attend(inputs, state, self.shape, self.shape.window)
        if self.z_weight is None:
            return o
        z = _linear.project(inputs.hidden, self.z_weight, self.z_bias).unflatten(-1, o.shape[2:])
        return o * torch.sigmoid(z).to(o.dtype)

    def _factor(self, inputs: Inputs, seen: int) -> torch.Tensor:
        """Return ln(t + a) / ln(a) [B or 1, T, 1, 1] at the row's own positions."""
        base = self.options.log_scale
        if inputs.padding is None:
            at = torch.arange(seen, seen + inputs.q.shape[1], device=inputs.q.device)[None]
        else:
            at = (inputs.padding.cumsum(dim=1) - 1).clamp_min(0)[:, seen:].to(inputs.q.device)
        factor = torch.log(at.double() + base) / math.log(base)
        return _linear.wide(factor)[:, :, None, None]

    def reset_parameters(self) -> None:
        """Open the gate: a sigmoid of 4 is 0.98."""
        if self.z_weight is not None and self.z_bias is not None:
            with torch.no_grad():
                self.z_weight.zero_()
                self.z_bias.fill_(4.0)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """Every token, or the source's own window of them."""
        return CacheCost(tokens=shape.window)
