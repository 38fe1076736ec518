"""What every kernel checks once at its public entry, and how it picks a path."""

from __future__ import annotations

import functools
import logging

import torch

from morph.errors import KernelUnavailable, UnknownName, nearest
from morph.kernels import _triton

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger("morph.kernels")


def check_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None,
    past: int | None,
) -> None:
    """Raise ValueError, with the sizes, unless q, k, v and padding belong together.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], padding [B, P + T] bool with `past` = P tokens
    seen before (None: any P will do).
    """
    sizes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [B, T, heads, size]; got {sizes}.")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k and v must agree in batch and tokens; got {sizes}.")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"no size may be 0; got {sizes}.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same head size; got {sizes}.")
    if k.shape[2] != v.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k and v must have the same heads, and q a multiple of them; got {sizes}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v must share a floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if padding is None:
        return
    tokens, got = q.shape[1], list(padding.shape)
    if padding.dtype != torch.bool:
        raise ValueError(f"padding must be bool, True for real tokens; got {padding.dtype}.")
    if padding.ndim != 2 or got[0] != q.shape[0] or got[1] < tokens:
        raise ValueError(f"padding must be [B, P + T] for {sizes}; got {got}.")
    if past is not None and got[1] != past + tokens:
        raise ValueError(
            f"padding must cover the {past} tokens already seen and the {tokens} new ones, "
            f"[{q.shape[0]}, {past + tokens}]; got {got}."
        )


def check_heads(name: str, tensor: torch.Tensor | None, heads: int) -> None:
    """Raise ValueError unless `tensor` is None or has one value per query head, [H]."""
    if tensor is not None and list(tensor.shape) != [heads]:
        raise ValueError(f"{name} must be [{heads}], one per head; got {list(tensor.shape)}.")


def pick(op: str, path: str | None, paths: dict[str, str]) -> str:
    """Return the path to take: the one demanded, or the first whose reason is empty.

    `paths` maps each fast path to why it cannot run (empty: it can); `reference` always can. Triton
    under its interpreter is slow and meant for tests, so there it must be demanded.
    Raises KernelUnavailable where a demanded path cannot run, UnknownName where there is no such.
    """
    if path is None:
        for name, reason in paths.items():
            if not reason and not (name == "triton" and _triton.interpreted()):
                return name
            if reason:
                say_once(f"{op}: not taking the {name} path: {reason}")
        return "reference"
    if path != "reference" and path not in paths:
        allowed = ["reference", *paths]
        raise UnknownName(
            f"{op} has no path {path!r}.{nearest(path, allowed)} There are: {', '.join(allowed)}."
        )
    if path != "reference" and paths[path]:
        raise KernelUnavailable(f"{op}: the {path} path cannot run here: {paths[path]}")
    return path


@functools.cache
def say_once(message: str) -> None:
    """Log a message the first time it is said."""
    log.info(message)


def float_reason(q: torch.Tensor) -> str:
    """Return why a path made of plain torch cannot take q, or an empty string."""
    if q.dtype in FLOATS:
        return ""
    return f"q is {q.dtype}; it takes {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}."


def some_padding(padding: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return `padding` on `device`, or None where it is known to mark no token as padding.

    Asking a GPU would stop it, so there any given padding counts.
    """
    if padding is None or (padding.device.type == "cpu" and bool(padding.all())):
        return None
    return padding.to(device)
