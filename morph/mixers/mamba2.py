"""Mamba-2 in place of attention: x takes the values, B the keys, C the queries.

What it does: per query head S = exp(-exp(A_log) dt) S + dt k v^T and o = S^T q + D v, with
dt = softplus(dt_weight x + dt_bias) of the layer's input x, on the source's projections before its
q/k norms and without rotary positions. A causal convolution `conv` tokens wide with SiLU goes
before; the output times SiLU of a map of x is brought to unit root mean square per head, times a
learned weight.
Why it works: it is linear attention whose decay and writing strength depend on the token, and the
source's projections are its projections; servers have kernels for it.
Cost: K V float32 numbers per query head, and (conv - 1) tokens; time linear in the length.
Options: conv 4.
Known limits: no softmax, so there is no setting under which it equals the source; positions are
only felt through the decay; the source's window and score cap have no meaning here.
Reference: Dao and Gu, Transformers are SSMs, arXiv 2405.21060; Wang et al., The Mamba in the Llama,
arXiv 2408.15237, for the mapping. Deviations: the convolution, the gate and D start so that step 0
is decay attention (the official code starts them at random); x and B are convolved once per KV head
and then repeated; the norm is per head, as stock architectures do with one group per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import decay
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

TAP = 3 / 16  # of the current token at the start; see ShortConv.start
_DT = 8.0  # so that what SiLU and small taps shrink is well above the norm's eps
_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`conv` is the convolution's width in tokens."""

    conv: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.conv <= 16:
            raise RecipeError(f"mixer mamba2: conv is {self.conv}; give a width of 2 to 16 tokens.")


class Mixer(MixerBase):
    """Mamba-2 of a head group.

    `dt_weight` [H, D], `dt_bias`, `A_log` and `D` [H]; `z_weight` [H V, D] and `z_bias` [H V];
    `norm_weight` [H, V]; `conv.q` [H, K, W], `conv.k` and `conv.v` [G, size, W].
    """

    wants = "projected"
    gates: ClassVar[tuple[str, ...]] = ("dt_bias", "A_log", "D", "z_bias", "norm_weight")

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        heads, size, width = shape.num_heads, shape.v_head_dim, shape.hidden_size
        self.conv = _linear.ShortConv(shape, options.conv)
        self.dt_weight = nn.Parameter(torch.empty(heads, width))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.z_weight = nn.Parameter(torch.empty(heads * size, width))
        self.z_bias = nn.Parameter(torch.empty(heads * size))
        self.norm_weight = nn.Parameter(torch.empty(heads, size))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]."""
        o = self._normed(inputs, state)
        return o * self.norm_weight.to(o.dtype)

    def _normed(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        q, k, v = self.conv(inputs, state)
        dt = F.softplus(_linear.project(inputs.hidden, self.dt_weight, self.dt_bias))  # [B, T, H]
        ratio = self.shape.num_heads // self.shape.num_key_value_heads
        v = v.repeat_interleave(ratio, dim=2)
        k = k.repeat_interleave(ratio, dim=2)
        before = None if state is None else state.tensors.get("s")
        o, after = decay.forward(
            q.to(v.dtype),
            k.to(v.dtype),
            (v * dt[..., None]).to(v.dtype),
            g=-_linear.wide(self.A_log).exp() * dt,
            scale=1.0,
            padding=inputs.padding,
            initial_state=None if before is None else before.to(q.device),
            output_final_state=state is not None,
        )
        if state is not None:
            state.tensors["s"], state.seen = after, state.seen + q.shape[1]
        y = _linear.wide(o) + _linear.wide(self.D)[:, None] * v
        z = _linear.project(inputs.hidden, self.z_weight, self.z_bias).unflatten(-1, y.shape[2:])
        return _linear.head_norm(y * F.silu(z), self.shape.norm_eps).to(v.dtype)

    def reset_parameters(self) -> None:
        """Decays as ALiBi's slopes, a constant gate, and nothing past the state."""
        with torch.no_grad():
            self.conv.start(TAP)
            self.dt_weight.zero_()
            self.dt_bias.fill_(_DT)
            self.D.zero_()
            self.z_weight.zero_()
            self.z_bias.fill_(1.0)
            self.norm_weight.fill_(1.0)
            step = F.softplus(torch.tensor(_DT))
            self.A_log.copy_((torch.tensor(_linear.slopes(self.shape)) / step).log())

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Fit taps, decays, the size of steps and the norm's weight to the teacher.

        Every head takes the decay of a small grid that brings its output nearest.
        """
        with torch.no_grad():
            self.conv.fit(batches, TAP)
            step = F.softplus(torch.tensor(_DT))
            grid = [{"A_log": (torch.tensor(decay) / step).log()} for decay in _DECAYS]
            weight, _ = _linear.best_per_head(self._normed, batches, {"A_log": self.A_log}, grid)
            self.norm_weight.copy_(weight)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """One K x V state per query head, and the convolution's last tokens."""
        return _linear.state_cost(shape, options.conv)
