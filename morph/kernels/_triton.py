"""What every Triton path shares: whether it can run here, and what is compiled ahead of time.

A file `_triton_<op>.py` beside `<op>.py` holds the kernels of one operator and `variants()`, the
kernels in the configurations that are really launched. Kernels are plain pointers and masks, so
that one source serves Triton 3.6 to 3.9; sums, gates and states are float32, products take the
inputs' dtype. Under the interpreter (`TRITON_INTERPRET=1`) only float32 is right: bfloat16 there is
garbage, without a word.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Bytes of shared memory that one block may use; the compiler does not check it
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel in one configuration, so that it can be compiled where there is no GPU.

    `signature` maps every argument in order to `*bf16`, `*fp32`, `i32`, `fp32` or `constexpr`;
    `constexprs` gives the constants' values. Pointers count as aligned to 16 bytes.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


@functools.cache
def interpreted() -> bool:
    """Return whether Triton was told to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str:
    found = importlib.util.find_spec("triton")
    return "" if found else "triton is not installed; `pip install triton` (Linux)."


def reason(q: torch.Tensor) -> str:
    """Return why a Triton kernel cannot take tensors such as q here, or an empty string."""
    if q.dtype not in (torch.float32, *HALVES):
        return f"q is {q.dtype}; Triton kernels take float32, bfloat16 and float16."
    if q.device.type != "cuda" and not interpreted():
        return f"q is on {q.device}; Triton needs a CUDA device."
    if q.device.type != "cuda" and q.dtype != torch.float32:
        return f"the Triton interpreter is right in float32 only; q is {q.dtype}."
    return _missing()


def precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of `tl.dot`: no TF32 where the caller asked for float32."""
    return "ieee" if dtype == torch.float32 else "tf32"
