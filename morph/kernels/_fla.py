"""flash-linear-attention, where it is installed beside a GPU: another way to the same operators.

Its functions are called by keyword only, since their argument order is not ours. It is never taken
on its word: the first call of every shape runs it and our own path on the inputs at hand, and it is
taken where both give the same answer and it is faster. What is refused says why, once.
Reference: github.com/fla-org/flash-linear-attention, versions 0.4 to 0.6.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from morph.kernels import _checks

Pair = tuple[torch.Tensor, torch.Tensor | None]
# Our operator -> its module, its function for many tokens, the one for a single token
_FUNCTIONS = {
    "decay": ("fla.ops.simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla"),
    "gated_delta": (
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
    ),
    "gla": ("fla.ops.gla", "chunk_gla", "fused_recurrent_gla"),
    "kda": ("fla.ops.kda", "chunk_kda", "fused_recurrent_kda"),
}
# Largest RMS(difference) / RMS(ours) in 16 bits at which the two count as the same answer
SAME = 1e-2
_winners: dict[tuple[Any, ...], str] = {}


@functools.cache
def missing() -> str:
    """Return why flash-linear-attention cannot be imported, or an empty string."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed; `pip install 'morph-hybrid[fla]'`."
    try:
        importlib.import_module("fla.ops.simple_gla")
    except Exception as error:  # whatever it raises on a stack that it does not know
        return f"flash-linear-attention cannot be imported: {error}."
    return ""


def reason(q: torch.Tensor) -> str:
    """Return why flash-linear-attention cannot take tensors such as q, or an empty string."""
    if q.device.type != "cuda":
        return f"q is on {q.device}; flash-linear-attention needs a GPU."
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; flash-linear-attention is taken in bfloat16 and float16 only."
    return missing()


def run(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    final: bool = True,
) -> Pair:
    """Return (o, final state) of `op`; shapes as in our operator, k and v repeated to H heads."""
    module, many, one = _FUNCTIONS[op]
    found = importlib.import_module(module)
    tokens, ratio = q.shape[1], q.shape[2] // k.shape[2]
    if ratio > 1:
        k, v = (x.repeat_interleave(ratio, dim=2) for x in (k, v))
    single = tokens == 1 and not torch.is_grad_enabled()
    gates: dict[str, Any] = {"g": g}
    if op == "decay" and g.ndim == 1:
        # its constant decay has no gradient
        learns = torch.is_grad_enabled() and g.requires_grad
        gates = {"g": g.expand(*q.shape[:3])} if learns else {"g_gamma": g}
    elif op == "gla" and single:
        gates = {"gk": g}
    if beta is not None:
        gates["beta"] = beta
    o, after = getattr(found, one if single else many)(
        q=q,
        k=k,
        v=v,
        **gates,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        initial_state=state,
        output_final_state=final,
    )
    return o, after


def settle(
    op: str,
    path: str | None,
    paths: Mapping[str, str],
    q: torch.Tensor,
    tried: Callable[[str], Pair],
) -> str:
    """Return the path to take, as `_checks.pick` does, with `fla` in `paths` only after a race.

    `tried(path)` runs the operator on the inputs at hand by a path.
    """
    own = {name: why for name, why in paths.items() if name != "fla"}
    if path is not None or paths["fla"] or torch.compiler.is_compiling():
        return _checks.pick(op, path, dict(paths) if path is not None or paths["fla"] else own)
    first = _checks.pick(op, None, own)
    tokens = 1 << (q.shape[1] - 1).bit_length()
    key = (op, q.device, q.dtype, q.shape[0], tokens, *q.shape[2:])
    if key not in _winners:
        _winners[key] = _race(op, first, tried)
    return _winners[key]


def _race(op: str, ours: str, tried: Callable[[str], Pair]) -> str:
    """Return `fla` where it gives our answer sooner, else `ours`."""
    with torch.no_grad():
        expected, _ = tried(ours)
        try:
            got, _ = tried("fla")
        except Exception as error:  # a foreign library may raise anything; ours still runs
            _checks.say_once(f"{op}: not taking the fla path: it failed: {error}")
            return ours
        size = expected.float().square().mean().sqrt()
        differ = ((got.float() - expected.float()).square().mean().sqrt() / size).item()
        if not differ <= SAME:
            _checks.say_once(f"{op}: not taking the fla path: it differs from ours by {differ:.1e}")
            return ours
        theirs, own = (_milliseconds(functools.partial(tried, p)) for p in ("fla", ours))
    if theirs < own:
        return "fla"
    _checks.say_once(
        f"{op}: not taking the fla path: {theirs:.3f} ms beside {own:.3f} ms of {ours}"
    )
    return ours


def _milliseconds(run: Callable[[], Any]) -> float:
    taken = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken[1:])
