"""Linear attention with a constant decay per head: a fixed-size state instead of a cache.

What it does: keeps S = exp(g) S + k v^T per query head and reads it with q. `inputs` says how far
queries and keys come from the source: `rotated`, or `raw`, without positions. `decay` sets where
the log decays g start: `alibi` 2^(-8 (h + 1) / H), the same in every layer, as in HypeNet;
`lightning` (8 / H) (1 - layer / layers) h, so that the first head never forgets. h counts the heads
of the whole layer, so a group keeps its heads' decays. g is learned and stored. `qk_norm` brings q
and k of every head to unit root mean square, times learned weights. `norm` scales every head's
output to unit root mean square, times a learned weight; `gate` multiplies it by a sigmoid of the
layer's input (1/2 at the start).
Why it works: old tokens fade instead of being cut off, and heads fade at different speeds.
Cost: K V float32 numbers per query head, whatever the length; time linear in the length.
Options: decay alibi, inputs rotated, qk_norm false, norm true, gate false.
Known limits: no softmax, so there is no setting under which it equals the source, and it must be
distilled; the source's window and score cap have no meaning here.
Reference: HypeNet (the lightning layer of the official HALO code); Qin et al., Lightning
Attention-2, arXiv 2401.04658. HyPE, HypeNet's use of positions, is this mixer on rotated inputs
beside `nope` in the layers that stay full. Deviations: the output norm is per head, not over the
layer's whole width, so that a head's output does not depend on which other heads were replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from morph.cache import State
from morph.kernels import decay
from morph.mixers import _linear
from morph.mixers._base import GroupShape, Inputs, MixerBase, Seen
from morph.plan import CacheCost

_EPS = 1e-6
_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001, 0.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`decay` names the start of the log decays; `norm` and `gate` shape the output."""

    decay: Literal["alibi", "lightning"] = "alibi"
    inputs: Literal["rotated", "raw"] = "rotated"
    qk_norm: bool = False
    norm: bool = True
    gate: bool = False


class Mixer(MixerBase):
    """Decay attention of a head group.

    `g` [H] log decays, used as min(g, 0); `norm_weight` [H, V], `gate_weight` [H V, D], `q_weight`
    [H, K] and `k_weight` [G, K], or None.
    """

    gates: ClassVar[tuple[str, ...]] = ("g",)

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        heads, size = shape.num_heads, shape.v_head_dim
        self.wants = options.inputs
        self.g = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(heads, size)) if options.norm else None
        gate = (heads * size, shape.hidden_size)
        self.gate_weight = nn.Parameter(torch.empty(gate)) if options.gate else None
        self.q_weight = self.k_weight = None
        if options.qk_norm:
            self.q_weight = nn.Parameter(torch.empty(heads, shape.head_dim))
            self.k_weight = nn.Parameter(torch.empty(shape.num_key_value_heads, shape.head_dim))
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros."""
        o = self._normed(inputs, state)
        if self.norm_weight is not None:
            o = o * self.norm_weight.to(o.dtype)
        if self.gate_weight is not None:
            z = _linear.project(inputs.hidden, self.gate_weight).unflatten(-1, o.shape[2:])
            o = o * torch.sigmoid(z).to(o.dtype)
        return o

    def _normed(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        v = inputs.v
        # under autocast norms and rotary positions leave q and k in float32
        q, k = inputs.q.to(v.dtype), inputs.k.to(v.dtype)
        if self.q_weight is not None and self.k_weight is not None:
            q = _linear.head_norm(q, _EPS) * self.q_weight.to(q.dtype)
            k = _linear.head_norm(k, _EPS) * self.k_weight.to(k.dtype)
        before = state.tensors.get("s") if state is not None else None
        g = _linear.wide(self.g)
        # the value is min(g, 0); the gradient of g, so that a decay pushed to 0 can come back
        g = g + (g.clamp(max=0.0) - g).detach()
        o, after = decay.forward(
            q,
            k,
            v,
            g=g,
            scale=self.shape.scale,
            padding=inputs.padding,
            initial_state=None if before is None else before.to(q.device),
            output_final_state=state is not None,
        )
        if state is not None:
            assert after is not None
            state.tensors, state.seen = {"s": after}, state.seen + q.shape[1]
        return o if self.norm_weight is None else _linear.head_norm(o, _EPS)

    def reset_parameters(self) -> None:
        """Set the log decays of `options.decay`, the norm's weight to 1 and the gate's to 0."""
        with torch.no_grad():
            self.g.copy_(torch.tensor(self._start(), dtype=self.g.dtype))
            if self.norm_weight is not None:
                self.norm_weight.fill_(1.0)
            if self.gate_weight is not None:
                self.gate_weight.zero_()
            if self.q_weight is not None and self.k_weight is not None:
                self.q_weight.fill_(1.0)
                self.k_weight.fill_(1.0)

    def calibrate(self, batches: Sequence[Seen]) -> None:
        """Give every head the decay and the norm's weight that bring its output nearest."""
        if self.norm_weight is None:
            return
        start = torch.tensor(self._start())
        grid = [{"g": start}] + [{"g": torch.tensor(-decay)} for decay in _DECAYS]
        weight, _ = _linear.best_per_head(self._normed, batches, {"g": self.g}, grid)
        with torch.no_grad():
            open_gate = 2.0 if self.gate_weight is not None else 1.0  # a closed map gives 1/2
            self.norm_weight.copy_(open_gate * weight)

    def _start(self) -> list[float]:
        shape, total = self.shape, self.shape.num_attention_heads
        if self.options.decay == "alibi":
            return [-(2.0 ** (-8.0 * (h + 1) / total)) for h in shape.heads]
        fade = 8.0 / total * (1.0 - shape.layer_idx / shape.num_hidden_layers)
        return [-fade * h for h in shape.heads]

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """One K x V state per query head, and no keys or values."""
        return CacheCost(tokens=0, state_elements=shape.head_dim * shape.v_head_dim)
