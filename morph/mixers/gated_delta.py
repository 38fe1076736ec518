"""Gated DeltaNet: a decaying state that corrects what it holds instead of adding to it.

What it does: per query head S = exp(g) S; S += beta k (v - S^T k)^T; o = S^T q / sqrt(K), with q
and k of unit length. g = -exp(A_log) softplus(a x + dt_bias) and beta = sigmoid(b x) come from the
layer's input x. `conv` is the width of a causal convolution with SiLU over q, k and v (0: none);
its start lets the current token through so small that SiLU is nearly linear. `inputs` says how far
q and k come from the source: `projected`, `raw` (after its q/k norms) or `rotated`. The output is
brought to unit root mean square per head, times a learned weight, times `gate` of a map of x.
Why it works: a key that is written again replaces its old value, so the state holds more.
Cost: K V float32 numbers per query head, and (conv - 1) tokens; time linear in the length.
Options: conv 4, inputs projected, gate silu.
Known limits: no softmax, so there is no setting under which it equals the source; the source's
window and score cap have no meaning here. Only the defaults have a stock architecture (qwen3_5_text
for Qwen3); `conv` 0 with `rotated` inputs starts closer to the source.
Reference: Yang et al., Gated Delta Networks, arXiv 2412.06464; parameters as in Qwen3.5. Deviation:
the output norm's weight is per head (a stock checkpoint carries it in its output projection).
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
from morph.kernels import gated_delta
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

TAP = 3 / 16  # of the current token at the start; see ShortConv.start
_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
_WRITES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`conv` is a width in tokens, 0 for none; `inputs` and `gate` are explained above."""

    conv: int = 4
    inputs: Literal["projected", "raw", "rotated"] = "projected"
    gate: Literal["silu", "sigmoid", "none"] = "silu"

    def __post_init__(self) -> None:
        if self.conv < 0 or self.conv == 1 or self.conv > 16:
            raise RecipeError(
                f"mixer gated_delta: conv is {self.conv}; give 0 for none, or a width of 2 to 16."
            )


class Mixer(MixerBase):
    """Gated delta rule of a head group.

    `a_weight` [H, D], `dt_bias` [H] and `A_log` [H] make the decay, `b_weight` [H, D] the writing
    strength; `z_weight` [H V, D] the gate, `norm_weight` [H, V]; `conv.q` [H, K, W], `conv.k` and
    `conv.v` [G, size, W].
    """

    gates: ClassVar[tuple[str, ...]] = ("dt_bias", "A_log", "norm_weight")

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        heads, size, width = shape.num_heads, shape.v_head_dim, shape.hidden_size
        self.wants = options.inputs
        self.conv = _linear.ShortConv(shape, options.conv) if options.conv else None
        self.a_weight = nn.Parameter(torch.empty(heads, width))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.b_weight = nn.Parameter(torch.empty(heads, width))
        gated = options.gate != "none"
        self.z_weight = nn.Parameter(torch.empty(heads * size, width)) if gated else None
        self.norm_weight = nn.Parameter(torch.empty(heads, size))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]."""
        o = self._normed(inputs, state)
        o = o * self.norm_weight.to(o.dtype)
        return o if self.z_weight is None else o * self._gate(inputs.hidden, o)

    def _gate(self, hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        assert self.z_weight is not None
        z = _linear.project(hidden, self.z_weight).unflatten(-1, like.shape[2:])
        return (F.silu(z) if self.options.gate == "silu" else torch.sigmoid(z)).to(like.dtype)

    def _normed(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        if self.conv is not None:
            q, k, v = self.conv(inputs, state)
        # under autocast norms and rotary positions leave q and k in float32
        q, k = _linear.unit(q).to(v.dtype), _linear.unit(k).to(v.dtype)
        before = None if state is None else state.tensors.get("s")
        o, after = gated_delta.forward(
            q,
            k,
            v,
            g=_linear.log_decay(inputs.hidden, self.a_weight, self.dt_bias, self.A_log),
            beta=torch.sigmoid(_linear.project(inputs.hidden, self.b_weight)),
            padding=inputs.padding,
            initial_state=None if before is None else before.to(q.device),
            output_final_state=state is not None,
        )
        if state is not None:
            state.tensors["s"], state.seen = after, state.seen + q.shape[1]
        return _linear.head_norm(o, self.shape.norm_eps)

    def reset_parameters(self) -> None:
        """Decays as ALiBi's slopes, half-strength writes; the gate random, as nothing is known."""
        shape = self.shape
        with torch.no_grad():
            if self.conv is not None:
                self.conv.start(TAP)
            self.a_weight.zero_()
            self.b_weight.zero_()
            self.A_log.zero_()
            self.dt_bias.copy_(_linear.inverse_softplus(torch.tensor(_linear.slopes(shape))))
            self.norm_weight.fill_(1.0)
            if self.z_weight is not None:
                self.z_weight.copy_(_linear.random_gate(shape))

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Fit taps, decays, writing strengths, the gate and the norm's weight to the teacher.

        Every head takes the decay and the strength of a small grid that bring its output nearest;
        strength and gate have no bias, so they use the direction in which inputs are constant.
        """
        with torch.no_grad():
            if self.conv is not None:
                self.conv.fit(batches, TAP)
            one = _linear.constant_direction(batches)
            grid = [
                {
                    "dt_bias": _linear.inverse_softplus(torch.tensor(decay)),
                    "b_weight": one.to(self.b_weight) * torch.logit(torch.tensor(write)),
                }
                for decay in _DECAYS
                for write in _WRITES
            ]
            if self.z_weight is not None:
                self.z_weight.copy_((2.0 * one).to(self.z_weight).expand_as(self.z_weight))
            parameters = {"dt_bias": self.dt_bias, "b_weight": self.b_weight}
            weight, _ = _linear.best_per_head(self._gated, batches, parameters, grid)
            self.norm_weight.copy_(weight)

    def _gated(self, inputs: Inputs) -> torch.Tensor:
        o = self._normed(inputs)
        return o if self.z_weight is None else o * self._gate(inputs.hidden, o)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """One K x V state per query head, and the convolution's last tokens."""
        return _linear.state_cost(shape, options.conv)
