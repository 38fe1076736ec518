"""Gated linear attention: a state whose every channel decays at its own, token-dependent rate.

What it does: per query head S = Diag(a) S + k v^T and o = S^T q / sqrt(K), with a = sigmoid(W2 W1
x + bias)^(1/16) per channel from the layer's input x; `rank` is the width between W1 and W2. q and
k are the source's, as far as `inputs` says. The output is brought to unit root mean square per
head, times a learned weight, times SiLU of a map of x where `gate` is set.
Why it works: channels that hold what is needed later forget slowly, the others quickly.
Cost: K V float32 numbers per query head, whatever the length; time linear in the length.
Options: rank 16, inputs rotated, gate false.
Known limits: no softmax, so there is no setting under which it equals the source; the source's
window and score cap have no meaning here.
Reference: Yang et al., Gated Linear Attention, arXiv 2312.06635. Deviations: the gate's bias starts
at the decays of ALiBi and its weights close to zero; the norm's weight is per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import gla
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

_TAU = 16.0  # the root that keeps decays near 1
_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`rank` is the width of the decay's low-rank map; `inputs` and `gate` are explained above."""

    rank: int = 16
    inputs: Literal["rotated", "raw", "projected"] = "rotated"
    gate: bool = False

    def __post_init__(self) -> None:
        # a checkpoint's configuration must not be able to ask for all memory
        if not 1 <= self.rank <= 1024:
            raise RecipeError(f"mixer gla: rank is {self.rank}; give 1 to 1024, usually 16.")


class Mixer(MixerBase):
    """Gated linear attention of a head group.

    `f_down` [R, D], `f_up` [H K, R] and `f_bias` [H, K] make the decays; `z_weight` [H V, D] the
    gate, or None; `norm_weight` [H, V].
    """

    gates: ClassVar[tuple[str, ...]] = ("f_bias", "norm_weight")

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        heads, size, width = shape.num_heads, shape.v_head_dim, shape.hidden_size
        self.wants = options.inputs
        self.f_down = nn.Parameter(torch.empty(options.rank, width))
        self.f_up = nn.Parameter(torch.empty(heads * shape.head_dim, options.rank))
        self.f_bias = nn.Parameter(torch.empty(heads, shape.head_dim))
        self.z_weight = nn.Parameter(torch.empty(heads * size, width)) if options.gate else None
        self.norm_weight = nn.Parameter(torch.empty(heads, size))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]."""
        o = self._gated(inputs, state)
        return o * self.norm_weight.to(o.dtype)

    def _gated(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        v = inputs.v
        low = _linear.project(inputs.hidden, self.f_down)
        f = _linear.project(low, self.f_up).unflatten(-1, self.f_bias.shape)
        before = None if state is None else state.tensors.get("s")
        o, after = gla.forward(
            inputs.q.to(v.dtype),
            inputs.k.to(v.dtype),
            v,
            g=F.logsigmoid(f + _linear.wide(self.f_bias)) / _TAU,
            scale=self.shape.scale,
            padding=inputs.padding,
            initial_state=None if before is None else before.to(v.device),
            output_final_state=state is not None,
        )
        if state is not None:
            state.tensors["s"], state.seen = after, state.seen + v.shape[1]
        o = _linear.head_norm(o, self.shape.norm_eps)
        if self.z_weight is None:
            return o
        z = _linear.project(inputs.hidden, self.z_weight).unflatten(-1, o.shape[2:])
        return o * F.silu(z).to(o.dtype)

    def reset_parameters(self) -> None:
        """The decays of ALiBi in every channel; the gate random, as nothing is known."""
        shape = self.shape
        with torch.no_grad():
            random = _linear.scatter(shape, *self.f_down.shape)
            self.f_down.copy_(random * shape.hidden_size**-0.5)
            self.f_up.copy_(_linear.scatter(shape, *self.f_up.shape) * 2.0**-7)
            start = _bias(torch.tensor(_linear.slopes(shape)))
            self.f_bias.copy_(start[:, None].expand_as(self.f_bias))
            self.norm_weight.fill_(1.0)
            if self.z_weight is not None:
                self.z_weight.copy_(_linear.random_gate(shape))

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Fit decays, the gate and the norm's weight to the teacher."""
        with torch.no_grad():
            if self.z_weight is not None:
                one = 2.0 * _linear.constant_direction(batches)
                self.z_weight.copy_(one.to(self.z_weight).expand_as(self.z_weight))
            grid = [{"f_bias": _bias(torch.tensor(decay))} for decay in _DECAYS]
            weight, _ = _linear.best_per_head(self._gated, batches, {"f_bias": self.f_bias}, grid)
            self.norm_weight.copy_(weight)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """One K x V state per query head, and no keys or values."""
        return CacheCost(tokens=0, state_elements=shape.head_dim * shape.v_head_dim)


def _bias(decay: torch.Tensor) -> torch.Tensor:
    """Return b with logsigmoid(b) / 16 = -decay."""
    wanted = (-_TAU * decay.double()).exp()
    return (torch.log(wanted) - torch.log1p(-wanted)).float()
