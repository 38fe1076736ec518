"""Softmax attention over a window, with its keys and values in a `State`: for full and sliding."""

from __future__ import annotations

import torch

from morph.cache import State
from morph.kernels import sliding
from morph.mixers._base import GroupShape, Inputs


def attend(
    inputs: Inputs,
    state: State | None,
    shape: GroupShape,
    window: int | None,
    num_sinks: int = 0,
    sink_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the heads' outputs [B, T, H, V] and, where there is a state, move it on in place.

    The state's tensors are `k` [B, N, G, K] and `v` [B, N, G, V], N at most window + num_sinks.
    """
    v = inputs.v
    # under autocast norms and rotary positions leave q and k in float32, v is what autocast wants
    q, k = inputs.q.to(v.dtype), inputs.k.to(v.dtype)
    before = None
    if state is not None and state.tensors:
        held = {name: x.to(device=q.device, dtype=v.dtype) for name, x in state.tensors.items()}
        before = sliding.SlidingState(held["k"], held["v"], state.seen)
    o, after = sliding.forward(
        q,
        k,
        v,
        window_size=window,
        num_sinks=num_sinks,
        sink_bias=sink_bias,
        softcap=shape.softcap,
        scale=shape.scale,
        padding=inputs.padding,
        initial_state=before,
        output_final_state=state is not None,
    )
    if state is not None:
        assert after is not None
        state.tensors, state.seen = {"k": after.k, "v": after.v}, after.seen
    return o
