"""Kimi delta attention: the gated delta rule with a decay of its own for every channel.

What it does: per query head S = Diag(exp(g)) S; S += beta k (v - S^T k)^T; o = S^T q / sqrt(K),
with q and k of unit length. g = -exp(A_log) softplus(W2 W1 x + dt_bias) per channel and beta =
sigmoid(b x) come from the layer's input x; `rank` is the width between W1 and W2. `conv` is the
width of a causal convolution with SiLU over q, k and v (0: none); `inputs` says how far q and k
come from the source. The output is brought to unit root mean square per head, times a learned
weight, times a sigmoid of a map of x where `gate` is set.
Why it works: it forgets channel by channel and corrects what it holds.
Cost: K V float32 numbers per query head, and (conv - 1) tokens; time linear in the length.
Options: conv 0, rank 16, inputs rotated, gate false.
Known limits: no softmax, so there is no setting under which it equals the source; the source's
window and score cap have no meaning here; no stock architecture.
Reference: Kimi Linear, arXiv 2510.26692; without the convolution and the gate that its own layers
have, which put a converted layer far from its source, unless they are asked for. Deviations: rank
16 where the paper takes the head size; the norm's weight is per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from morph.cache import State
from morph.errors import RecipeError
from morph.kernels import kda
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

TAP = 3 / 16  # of the current token at the start; see ShortConv.start
_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
_WRITES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`conv` is a width in tokens, 0 for none; `rank` that of the decay's low-rank map."""

    conv: int = 0
    rank: int = 16
    inputs: Literal["rotated", "raw", "projected"] = "rotated"
    gate: bool = False

    def __post_init__(self) -> None:
        if self.conv < 0 or self.conv == 1 or self.conv > 16:
            raise RecipeError(
                f"mixer kda: conv is {self.conv}; give 0 for none, or a width of 2 to 16."
            )
        # a checkpoint's configuration must not be able to ask for all memory
        if not 1 <= self.rank <= 1024:
            raise RecipeError(f"mixer kda: rank is {self.rank}; give 1 to 1024, usually 16.")


class Mixer(MixerBase):
    """Kimi delta attention of a head group.

    `f_down` [R, D], `f_up` [H K, R], `dt_bias` [H, K] and `A_log` [H] make the decays, `b_weight`
    [H, D] and `b_bias` [H] the writing strength; `z_weight` [H V, D] and `z_bias` [H V] the gate,
    or None; `norm_weight` [H, V]; `conv.q` [H, K, W], `conv.k` and `conv.v` [G, size, W].
    """

    gates: ClassVar[tuple[str, ...]] = ("dt_bias", "A_log", "b_bias", "z_bias", "norm_weight")

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        heads, size, width = shape.num_heads, shape.v_head_dim, shape.hidden_size
        self.wants = options.inputs
        self.conv = _linear.ShortConv(shape, options.conv) if options.conv else None
        self.f_down = nn.Parameter(torch.empty(options.rank, width))
        self.f_up = nn.Parameter(torch.empty(heads * shape.head_dim, options.rank))
        self.dt_bias = nn.Parameter(torch.empty(heads, shape.head_dim))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.b_weight = nn.Parameter(torch.empty(heads, width))
        self.b_bias = nn.Parameter(torch.empty(heads))
        self.z_weight = nn.Parameter(torch.empty(heads * size, width)) if options.gate else None
        self.z_bias = nn.Parameter(torch.empty(heads * size)) if options.gate else None
        self.norm_weight = nn.Parameter(torch.empty(heads, size))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]."""
        o = self._gated(inputs, state)
        return o * self.norm_weight.to(o.dtype)

    def _gated(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        if self.conv is not None:
            q, k, v = self.conv(inputs, state)
        q, k = _linear.unit(q).to(v.dtype), _linear.unit(k).to(v.dtype)
        low = _linear.project(inputs.hidden, self.f_down)
        f = _linear.project(low, self.f_up).unflatten(-1, self.dt_bias.shape)
        step = torch.nn.functional.softplus(f + _linear.wide(self.dt_bias))
        before = None if state is None else state.tensors.get("s")
        o, after = kda.forward(
            q,
            k,
            v,
            g=-_linear.wide(self.A_log).exp()[:, None] * step,
            beta=torch.sigmoid(_linear.project(inputs.hidden, self.b_weight, self.b_bias)),
            padding=inputs.padding,
            initial_state=None if before is None else before.to(v.device),
            output_final_state=state is not None,
        )
        if state is not None:
            state.tensors["s"], state.seen = after, state.seen + v.shape[1]
        o = _linear.head_norm(o, self.shape.norm_eps)
        if self.z_weight is None:
            return o
        z = _linear.project(inputs.hidden, self.z_weight, self.z_bias).unflatten(-1, o.shape[2:])
        return o * torch.sigmoid(z).to(o.dtype)

    def reset_parameters(self) -> None:
        """The decays of ALiBi in every channel, half-strength writes, an open gate."""
        shape = self.shape
        with torch.no_grad():
            if self.conv is not None:
                self.conv.start(TAP)
            random = _linear.scatter(shape, *self.f_down.shape)
            self.f_down.copy_(random * shape.hidden_size**-0.5)
            self.f_up.copy_(_linear.scatter(shape, *self.f_up.shape) * 2.0**-7)
            self.A_log.zero_()
            start = _linear.inverse_softplus(torch.tensor(_linear.slopes(shape)))
            self.dt_bias.copy_(start[:, None].expand_as(self.dt_bias))
            self.b_weight.zero_()
            self.b_bias.zero_()
            self.norm_weight.fill_(1.0)
            if self.z_weight is not None and self.z_bias is not None:
                self.z_weight.zero_()
                self.z_bias.fill_(2.0)

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Fit taps, decays, writing strengths and the norm's weight to the teacher."""
        with torch.no_grad():
            if self.conv is not None:
                self.conv.fit(batches, TAP)
            grid = [
                {
                    "dt_bias": _linear.inverse_softplus(torch.tensor(decay)),
                    "b_bias": torch.logit(torch.tensor(write)),
                }
                for decay in _DECAYS
                for write in _WRITES
            ]
            parameters = {"dt_bias": self.dt_bias, "b_bias": self.b_bias}
            weight, _ = _linear.best_per_head(self._gated, batches, parameters, grid)
            self.norm_weight.copy_(weight)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """One K x V state per query head, and the convolution's last tokens."""
        return _linear.state_cost(shape, options.conv)
