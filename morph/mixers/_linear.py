"""What linear mixers share: short convolutions, norms, gates, and starts fitted to a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from morph.cache import State
from morph.mixers._base import GroupShape, Inputs, Seen
from morph.plan import CacheCost

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ShortConv(nn.Module):
    """Depthwise causal convolutions over q, k and v, each followed by SiLU.

    Weights q [H, K, W], k [G, K, W], v [G, V, W], the last tap being the current token; no bias,
    as in the stock architectures. The state holds the last W - 1 tokens in float32.
    """

    def __init__(self, shape: GroupShape, width: int) -> None:
        super().__init__()
        heads, groups = shape.num_heads, shape.num_key_value_heads
        self.width = width
        self.q = nn.Parameter(torch.empty(heads, shape.head_dim, width))
        self.k = nn.Parameter(torch.empty(groups, shape.head_dim, width))
        self.v = nn.Parameter(torch.empty(groups, shape.v_head_dim, width))

    def forward(self, x: Inputs, state: State | None) -> QKV:
        """Return q, k and v [B, T, heads, size] after convolution and SiLU."""
        real = None if x.padding is None else x.padding[:, -x.q.shape[1] :]
        q, k, v = (self._one(n, t, real, state) for n, t in zip("qkv", (x.q, x.k, x.v)))
        return q, k, v

    def _one(
        self, name: str, x: torch.Tensor, real: torch.Tensor | None, state: State | None
    ) -> torch.Tensor:
        weight, tokens = getattr(self, name), x.shape[1]
        if real is not None:  # what a padding token would have put in is nothing
            x = x.masked_fill(~real.to(x.device)[..., None, None], 0.0)
        shape = (x.shape[0], self.width - 1, *x.shape[2:])
        before = None if state is None else state.tensors.get(f"conv_{name}")
        past = x.new_zeros(shape) if before is None else before.to(x)
        x = torch.cat([past, x], dim=1)
        if state is not None:
            state.tensors[f"conv_{name}"] = wide(_last_real(x, real, self.width - 1)).clone()
        weight = weight.to(x.dtype)
        taps = (x[:, i : i + tokens] * weight[..., i] for i in range(self.width))
        return F.silu(_sum(taps))

    def start(self, tap: float) -> None:
        """Let only the current token through, times `tap`: SiLU is nearly linear where it is small.

        silu(x) = x / 2 + x^2 / 4 - ..., so a small tap halves its input and bends it little.
        """
        with torch.no_grad():
            for weight in (self.q, self.k, self.v):
                weight.zero_()
                weight[..., -1] = tap

    def fit(self, batches: Sequence[Seen], size: float) -> None:
        """Set every head's tap so that what enters SiLU has root mean square `size`."""
        with torch.no_grad():
            for name in "qkv":
                weight = getattr(self, name)
                given = [getattr(inputs, name).double() for inputs, _ in batches]
                seen = [x.square().mean(dim=(0, 1, 3)) for x in given]
                rms = torch.stack(seen).mean(0).sqrt().clamp_min(1e-6)
                weight.zero_()
                weight[..., -1] = (size / rms).to(weight)[:, None]


def state_cost(shape: GroupShape, conv: int) -> CacheCost:
    """Return the cost of one K x V state per query head and a convolution `conv` tokens wide."""
    past = max(conv - 1, 0)
    return CacheCost(
        tokens=0,
        state_elements=shape.head_dim * shape.v_head_dim + past * shape.head_dim,
        kv_state_elements=past * (shape.head_dim + shape.v_head_dim),
    )


def _last_real(x: torch.Tensor, real: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return the last `count` tokens of x [B, count + T, ...], padding on the right left out."""
    if real is None:
        return x[:, -count:]
    tokens = real.shape[1]
    at = torch.arange(1, tokens + 1, device=x.device)
    end = (real.to(x.device) * at).amax(dim=1)  # one past the last real token; 0: all padding
    index = end[:, None] + torch.arange(count, device=x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _sum(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return x with unit length in its last dimension, as the delta rule's hosts normalise."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(dim=-1, keepdim=True) + eps)).to(x.dtype)


def head_norm(o: torch.Tensor, eps: float) -> torch.Tensor:
    """Return every head's output [B, T, H, V] with unit root mean square."""
    x = wide(o)
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)).to(o.dtype)


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """Return a linear map of the layer's input in float32 at least: gates want the bits."""
    with torch.autocast(x.device.type, enabled=False):
        y = wide(F.linear(x.to(weight.dtype), weight))
        return y if bias is None else y + wide(bias)


def log_decay(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, a_log: Any) -> torch.Tensor:
    """Return -exp(A_log) softplus(W x + dt_bias) [B, T, H], the log decay of every head."""
    return -wide(a_log).exp() * F.softplus(project(hidden, weight, bias))


def slopes(shape: GroupShape) -> list[float]:
    """Return ALiBi's slopes 2^(-8 (h + 1) / H) of the group's heads in their layer."""
    return [2.0 ** (-8.0 * (h + 1) / shape.num_attention_heads) for h in shape.heads]


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    """Return y with softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))


def scatter(shape: GroupShape, *size: int) -> torch.Tensor:
    """Return fixed normal numbers, the same on every device and in every process of a layer."""
    generator = torch.Generator().manual_seed(1000 + shape.layer_idx)
    return torch.randn(*size, generator=generator)


def random_gate(shape: GroupShape) -> torch.Tensor:
    """Return fixed random weights [H V, D] of a gate; a group keeps those of its heads."""
    every = scatter(shape, shape.num_attention_heads, shape.v_head_dim, shape.hidden_size)
    return every[list(shape.heads)].flatten(0, 1) * shape.hidden_size**-0.5


def constant_direction(batches: Sequence[Seen]) -> torch.Tensor:
    """Return w [D] with w x close to 1 for every input x of the layer: a bias where there is none.

    Ridge regression on the batches' `hidden`; inputs of a decoder share a large common part.
    """
    x = torch.cat([inputs.hidden.double().flatten(0, 1) for inputs, _ in batches])
    moment = x.T @ x
    ridge = 1e-4 * moment.diagonal().mean()
    moment += ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(moment, x.sum(dim=0))


def fit_weight(outputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights [H, V] that bring outputs [N, H, V] nearest to target, and the error [H].

    The error is what is left of the squares, as a share of the target's.
    """
    o, y = outputs.double(), target.double()
    both, own = (o * y).sum(dim=0), o.square().sum(dim=0).clamp_min(1e-30)
    size = y.square().sum(dim=0)
    weight = both / own
    left = (size - both * weight).sum(dim=-1)
    return weight, left / size.sum(dim=-1).clamp_min(1e-30)


def best_per_head(
    run: Callable[[Inputs], torch.Tensor],
    batches: Sequence[Seen],
    parameters: Mapping[str, torch.Tensor],
    candidates: Sequence[Mapping[str, Any]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every head the candidate under which its output comes nearest to the teacher's.

    `candidates` map a name of `parameters`, tensors [H, ...], to a value for every head. `run`
    returns the outputs [B, T, H, V] before the last weight. Returns that weight [H, V] and the
    relative squared error [H] of every head.
    """
    kept: dict[str, torch.Tensor] = {}
    best = weight = None
    target = torch.cat([y.flatten(0, 1) for _, y in batches])
    with torch.no_grad():
        for candidate in candidates:
            for name, value in candidate.items():
                parameters[name].copy_(torch.as_tensor(value).expand_as(parameters[name]))
            outputs = torch.cat([run(inputs).flatten(0, 1) for inputs, _ in batches])
            own, error = fit_weight(outputs, target)
            error = error.nan_to_num(math.inf)
            now = {n: parameters[n].clone() for n in candidate}
            if best is None or weight is None:
                best, weight, kept = error, own, now
                continue
            wins = error < best
            best = torch.where(wins, error, best)
            weight = torch.where(wins[:, None], own, weight)
            for name, value in now.items():
                mask = wins.view(-1, *[1] * (value.ndim - 1))
                kept[name] = torch.where(mask.to(value.device), value, kept[name])
        for name, value in kept.items():
            parameters[name].copy_(value)
    assert best is not None and weight is not None
    return weight, best
