"""Queries between those of before and after a fine-tuning, given the keys of before.

`ridge` is morph's own operator. QK-Pro of the paper behind QK-Restore (arXiv 2606.11052) is
described as a ridge problem too, but its shapes are not published, so nothing here claims to be it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from morph.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from morph.layouts import Rotary

COLUMNS = 4096  # of the keys that are widened to float64 at a time


def ridge(
    pre_q: np.ndarray,
    post_q: np.ndarray,
    pre_k: np.ndarray,
    *,
    rho: float,
    rotary: Rotary | None = None,
) -> np.ndarray:
    """Return the queries nearest to POST's that keep PRE's routing, for one query head.

    `pre_q` and `post_q` [d_k, D] are the head's rows of q_proj, `pre_k` [d_k, D] those of the KV
    head it reads, as stored (outputs x inputs). In the mathematician's orientation Q = pre_q^T it
    minimises |Q - Q_post|^2 + |Q K_pre^T - Q_pre K_pre^T|^2 / lambda with lambda = rho trace(G) /
    d_k and G = K_pre^T K_pre, in closed form Q_post (I - P) + Q_pre P with P = (G + lambda I)^-1 G.
    Where `rotary` positions turn the heads, G is replaced by its diagonal, averaged over each
    rotary pair: then P commutes with every rotation, and the blend means the same at all
    distances. rho = 0 gives `pre_q`; rho -> infinity gives `post_q`. Computed in float64, whose
    last bits, which depend on the processor and its threads, hardly reach what is stored. Raises
    UsageError for shapes that do not fit and rho < 0.
    """

    if not pre_q.shape == post_q.shape == pre_k.shape or pre_q.ndim != 2:
        raise UsageError(
            f"ridge: shapes {list(pre_q.shape)}, {list(post_q.shape)} and {list(pre_k.shape)} "
            "should be three times [d_k, D]."
        )
    if not rho >= 0:
        raise UsageError(f"ridge: rho is {rho:g}; it must be at least 0.")
    if rho == 0:
        return pre_q.copy()
    return blended(pre_q, post_q, projector(pre_k, rho, rotary))


def blended(pre_q: np.ndarray, post_q: np.ndarray, blend: np.ndarray) -> np.ndarray:
    """Return Q_post (I - P) + Q_pre P in float64, for P from `projector`."""
    import numpy as np

    new = post_q.astype(np.float64)
    made: np.ndarray = new + blend @ (pre_q.astype(np.float64) - new)
    return made


def projector(keys: np.ndarray, rho: float, rotary: Rotary | None = None) -> np.ndarray:
    """Return P = (G + lambda I)^-1 G [d_k, d_k] in float64, for rho > 0; see `ridge`.

    Its eigenvalues lie in [0, 1): directions that PRE's keys use much come back, others stay
    POST's. Keys that are all zero route nothing, and give 0.
    """
    import numpy as np

    size = keys.shape[0]
    gram = np.zeros((size, size) if rotary is None else size)
    for at in range(0, keys.shape[1], COLUMNS):
        block = keys[:, at : at + COLUMNS].astype(np.float64)
        gram += block @ block.T if rotary is None else (block * block).sum(1)
    weight = rho * float(np.trace(gram) if rotary is None else gram.sum()) / size
    if weight == 0 or not math.isfinite(weight):
        return np.zeros((size, size))
    if rotary is not None:
        energy = paired(gram, rotary)
        return np.diag(energy / (energy + weight))
    # by directions: G + lambda I cannot be solved for where lambda is lost in rounding
    energy, axes = np.linalg.eigh(gram)
    energy = np.maximum(energy, 0.0)
    made: np.ndarray = (axes * (energy / (energy + weight))) @ axes.T
    return made


def paired(energy: np.ndarray, rotary: Rotary) -> np.ndarray:
    """Return the energies [d_k] with both of each rotary pair at their mean."""
    found, half = energy.copy(), rotary.dim // 2
    if rotary.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    found[first] = found[second] = (energy[first] + energy[second]) / 2
    return found


def interpolate(pre: np.ndarray, post: np.ndarray, alpha: float) -> np.ndarray:
    """Return (1 - alpha) POST + alpha PRE in float64.

    Values that are equal in both stay as they are, and alpha = 0 is POST to the bit.
    """
    import numpy as np

    if alpha == 0:
        return post
    old, new = pre.astype(np.float64), post.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity on both sides, where that is allowed
        return np.where(old == new, new, (1 - alpha) * new + alpha * old)
