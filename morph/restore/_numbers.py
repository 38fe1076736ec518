"""Stored numbers without numpy: whole tensors are scanned as bytes, and small samples decoded.

An exact restore needs no arithmetic, so it should not pay for numpy, in memory or start-up.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt
from operator import mul

# The bytes of one number, counted from its low end: (byte, mask) pairs that are all ones in NaN and
# infinity. Where the first pair is rare in real weights, a scan looks at one byte per number.
_SPECIAL: dict[str, tuple[tuple[int, int], ...]] = {
    "BF16": ((1, 0x7F), (0, 0x80)),
    "F16": ((1, 0x7C),),
    "F32": ((3, 0x7F), (2, 0x80)),
    "F64": ((7, 0x7F), (6, 0xF0)),
    "F8_E5M2": ((0, 0x7C),),
    "F8_E4M3": ((0, 0x7F),),
}
_ONLY_NAN = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}  # one bit pattern each
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # what `decode` understands


def has_nonfinite(dtype: str, block: bytes) -> bool:
    """Return whether a block of whole numbers holds NaN or infinity; other types never do."""
    if dtype in _ONLY_NAN:
        return _ONLY_NAN[dtype] in block
    if dtype not in _SPECIAL:
        return False
    width = WIDTH.get(dtype, 1)
    flags: int | None = None
    for byte, mask in _SPECIAL[dtype]:
        found = block[byte::width].translate(_table(mask))
        if 1 not in found:
            return False
        bits = int.from_bytes(found, "little")
        flags = bits if flags is None else flags & bits
    return bool(flags)


@cache
def _table(mask: int) -> bytes:
    return bytes(int(value & mask == mask) for value in range(256))


def is_zero(block: bytes) -> bool:
    """Return whether every byte is zero, which for the types at hand means the number 0."""
    return not block.strip(b"\0")


def decode(dtype: str, data: bytes) -> Sequence[float] | None:
    """Return a small block as numbers; None for types that are not plain floating point."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return _array("f", wide)
    if dtype == "F16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    return _array({"F32": "f", "F64": "d"}[dtype], data) if dtype in ("F32", "F64") else None


def _array(code: str, data: bytes | bytearray) -> Sequence[float]:
    found = array(code, bytes(data))
    if sys.byteorder == "big":
        found.byteswap()
    return found


def widened(dtype: str, data: bytes) -> bytes:
    """Return bfloat16 or float16 numbers as float32, which holds every one of them."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    import numpy as np

    return np.frombuffer(data, "<f2").astype("<f4").tobytes()


@dataclass
class Sums:
    """Sums over two samples: squares of each, their product, and the squares of the difference."""

    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    change: float = 0.0
    count: int = 0

    def add(self, a: Sequence[float], b: Sequence[float]) -> None:
        """Take in two equally long samples; one that holds NaN or infinity is left out."""
        found = (_dot(a, a), _dot(b, b), _dot(a, b))
        if not all(map(isfinite, found)):
            return
        self.a, self.b, self.product = self.a + found[0], self.b + found[1], self.product + found[2]
        self.change += sum((x - y) ** 2 for x, y in zip(a, b))
        self.count += len(a)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between the two; 0 where one of them is 0."""
        size = sqrt(self.a) * sqrt(self.b)
        return self.product / size if size > 0 else 0.0

    @property
    def drift(self) -> float:
        """The size of the difference over that of the first; 0 where that is 0."""
        return sqrt(self.change / self.a) if self.a > 0 else 0.0


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))
