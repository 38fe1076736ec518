"""The indexer of shared routing: scores of past blocks, the choice among them, and its training.

Everything here is in the front order of `Rows` (the real tokens of a row first), counts positions
by real tokens, and works in float32, or in float64 where the inputs are. A block may be one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from morph.kernels import _blocks
from morph.kernels._blocks import Rows
from morph.mixers._linear import wide

# By how much sharper than the scores start the softmax of the indexer may be
FACTORS = tuple(2.0**i for i in range(-5, 3))
_CHUNK = 2**22  # scores held at a time: 16 MiB in float32
_LEAST = 1e-9  # of the largest variance: less is rounding


class Choice(NamedTuple):
    """What is chosen: `most` blocks of `block` tokens, those of the last `local` tokens first."""

    block: int
    most: int
    local: int

    def first_near(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the first of the blocks that a query always has, its own being the last."""
        own = positions.div(self.block, rounding_mode="floor")
        near = (positions - self.local).clamp_min(0).div(self.block, rounding_mode="floor")
        return torch.maximum(near, own - (self.most - 1))


def query_features(q: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the mean query of every KV head's query heads, side by side: [B, T, G K]."""
    return wide(q).unflatten(2, (groups, -1)).mean(dim=3).flatten(2)


def key_features(k: torch.Tensor) -> torch.Tensor:
    """Return the keys of all KV heads side by side: [B, S, G K]."""
    return wide(k).flatten(2)


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [B, T, G K] in the index's own dimensions, [B, T, I]."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ weight.to(x.dtype).T


def sketch(size: int, width: int, device: torch.device) -> torch.Tensor:
    """Return [I, G K]: a projection that keeps scalar products on average, exact where square.

    Every input goes to one output with a sign of its own (a count sketch).
    """
    at = torch.arange(width, device=device)
    bits = at // size
    signs = 1 - 2 * ((bits ^ (bits >> 1) ^ ((bits & 1) * at)) & 1)
    found = torch.zeros(size, width, device=device)
    return found.index_put_((at % size, at), signs.to(found.dtype))


def add_sums(
    sums: torch.Tensor | None, new: torch.Tensor, rows: Rows, total: int, block: int, in_place: bool
) -> torch.Tensor:
    """Return the sums over blocks [B, room / block, I] once index keys new [B, T, I] are added.

    Nothing here has gradients. `sums` is written to where it has the room and `in_place` is true.
    """
    step = _blocks.room_step(block)
    if block == 1:
        return _blocks.append(sums, new, rows, total, step, in_place)
    room, tokens = -(-total // step) * step // block, new.shape[1]
    at = _blocks.starts(rows.at, new.device)
    lines = torch.arange(new.shape[0], device=new.device)[:, None]
    many = -(-(tokens + block - 1) // block)  # blocks that the new tokens can touch
    parts = new.new_zeros(new.shape[0], many * block, new.shape[2])
    parts[lines, (at % block)[:, None] + torch.arange(tokens, device=new.device)] = new
    touched = (at // block)[:, None] + torch.arange(many, device=new.device)
    held = 0 if sums is None else sums.shape[1]
    added = parts.unflatten(1, (many, block)).sum(dim=2)
    if sums is not None and in_place and held >= room:
        grown = sums
    else:
        grown = new.new_zeros(new.shape[0], room, new.shape[2])
        if sums is not None:
            grown[:, :held] = sums
    # the last may be past the room, and is empty there; no place may be written to twice at once
    for part in (slice(0, many - 1), slice(many - 1, many)):
        place = touched[:, part].clamp_max(room - 1)
        grown[lines, place] = grown[lines, place] + added[:, part]
    return grown


def choose(
    queries: torch.Tensor, sums: torch.Tensor, rows: Rows, blocks: int, choice: Choice
) -> torch.Tensor:
    """Return the chosen blocks int32 [B, T, 1, N] of index queries [B, T, I], -1 for none.

    sums [B, C, I] hold index keys, of which the first `blocks` can matter. The blocks of the last
    `local` tokens and the own one are always in; of the earlier ones those with the highest scores,
    the lower number where scores are equal. Ascending; never more than a chunk of scores is held.
    """
    sums = sums[:, :blocks]
    most, found = min(choice.most, blocks), []
    for part, positions in _chunks(queries, rows.positions(), sums.shape[0] * blocks):
        scores = part @ sums.transpose(1, 2)
        at, number = positions[..., None], torch.arange(blocks, device=sums.device)
        near = choice.first_near(at)
        scores = scores.masked_fill(number >= near, math.inf)
        scores = scores.masked_fill(number * choice.block > at, -math.inf)
        found.append(_best(scores, most))
    return torch.cat(found, dim=1)[:, :, None].to(torch.int32)


def _best(scores: torch.Tensor, most: int) -> torch.Tensor:
    """Return the places [..., most] of the highest scores, ascending; -1 first where too few.

    Among equal scores the lower places win, as `topk` does not promise.
    """
    top = scores.topk(most, dim=-1)
    least = top.values[..., -1:]
    index = top.indices.masked_fill(torch.isneginf(top.values), -1)
    tied = ((scores >= least).sum(dim=-1) > most) & ~torch.isneginf(least[..., 0])
    if bool(tied.any()):
        s, v = scores[tied], least[tied]
        above, equal = s > v, s == v
        left = most - above.sum(dim=-1, keepdim=True)
        taken = above | (equal & (equal.cumsum(dim=-1) <= left))
        index[tied] = taken.nonzero()[:, 1].view(-1, most)
    return index.sort(dim=-1).values


class Served(NamedTuple):
    """What a served layer's attention is made of: its q [B, T, H, K] and k [B, S, G, K]."""

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    softcap: float | None


class Index(NamedTuple):
    """What an owner's scores are made of, detached: queries [B, T, I] times sums [B, C, I].

    The weights were applied to q [B, T, G K] and k [B, S, G, K], and the former then multiplied by
    `factor`.
    """

    queries: torch.Tensor
    sums: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    factor: float


def _chunks(
    x: torch.Tensor, positions: torch.Tensor, each: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield x [B, T, ...] and positions [B or 1, T] in pieces of at most a chunk of scores."""
    size = max(1, _CHUNK // max(1, each))
    for start in range(0, x.shape[1], size):
        yield x[:, start : start + size], positions[:, start : start + size]


def _teacher(seen: Served, positions: torch.Tensor, block: int) -> torch.Tensor:
    """Return the mean over heads of a layer's attention to every block, [B, T, C]."""
    q, k = wide(seen.q), wide(seen.k)
    q = q.unflatten(2, (k.shape[2], -1))
    s = torch.einsum("btgrk,bsgk->btgrs", q, k) * seen.scale
    if seen.softcap is not None:
        s = seen.softcap * torch.tanh(s / seen.softcap)
    later = torch.arange(k.shape[1], device=k.device) > positions[..., None]
    p = torch.softmax(s.masked_fill(later[:, :, None, None], -math.inf), dim=-1).mean(dim=(2, 3))
    if block == 1:
        return p
    p = torch.nn.functional.pad(p, (0, -p.shape[2] % block))
    return p.unflatten(2, (-1, block)).sum(dim=3)


def _compared(
    seen: Served, index: Index, rows: Rows, choice: Choice
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (queries, teacher, scores, real ones) of chunks of queries, [B, t, C] each.

    Of the teacher only what lies on blocks that may be chosen or not; scores of others are -inf.
    """
    real, start = rows.held(), 0
    each = seen.q.shape[0] * seen.q.shape[2] * seen.k.shape[1]
    for q, positions in _chunks(seen.q, rows.positions(), each):
        part = slice(start, start + q.shape[1])
        start = part.stop
        teacher = _teacher(seen._replace(q=q), positions, choice.block)
        sums = index.sums[:, : teacher.shape[2]]
        teacher = teacher[..., : sums.shape[1]]
        far = torch.arange(sums.shape[1], device=q.device) < choice.first_near(positions)[..., None]
        far = far & real[:, part, None]
        scores = index.queries[:, part] @ sums.transpose(1, 2)
        yield part, teacher * far, scores.masked_fill(~far, -math.inf), far


def divergence(
    seen: Served, index: Index, rows: Rows, choice: Choice, factors: Sequence[float] = (1.0,)
) -> torch.Tensor:
    """Return the loss of the indexer, once for every factor that its scores could have.

    Per query the Kullback-Leibler divergence of its softmax from the teacher, both over the blocks
    that are chosen from, times the attention that these hold; the mean over real queries.
    """
    found = seen.q.new_zeros(len(factors), dtype=wide(seen.q).dtype)
    for _, teacher, scores, far in _compared(seen, index, rows, choice):
        mass = teacher.sum(dim=-1, keepdim=True)
        entropy = torch.xlogy(teacher, teacher).sum() - torch.xlogy(mass, mass).sum()
        for i, factor in enumerate(factors):
            log = torch.log_softmax((factor * scores).masked_fill(~far, -math.inf), dim=-1)
            found[i] += entropy - (teacher * log.masked_fill(~far, 0.0)).sum()
    return found / _count(rows, seen.q.shape[0])


def _count(rows: Rows, batch: int) -> int:
    """Return how many real tokens a call has."""
    return max(1, int(rows.held().expand(batch, -1).sum()))


class _Supervised(torch.autograd.Function):
    """Passes a layer's output through; on the way back the indexer's weights get their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        o: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        rest: tuple[Any, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.rest, ctx.like = rest, (q_weight.dtype, k_weight.dtype)
        return o.view_as(o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, *parts = ctx.saved_tensors
        scale, softcap, factor, rows, choice, weight = ctx.rest
        seen, index = Served(q, k, scale, softcap), Index(*parts, factor)
        with torch.autocast(q.device.type, enabled=False):
            to_q, to_k = _gradients(seen, index, rows, choice, weight)
        return grad, to_q.to(ctx.like[0]), to_k.to(ctx.like[1]), None, None


def supervised(
    o: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    seen: Served,
    index: Index,
    rows: Rows,
    choice: Choice,
    weight: float,
) -> torch.Tensor:
    """Return o as it is; its backward adds `weight` times the gradient of `divergence`.

    To `weights` of the indexer alone, whatever gradient o itself gets.
    """
    tensors = tuple(x.detach() for x in (seen.q, seen.k, *index[:4]))
    rest = (seen.scale, seen.softcap, index.factor, rows, choice, weight)
    found: torch.Tensor = _Supervised.apply(o, *weights, tensors, rest)  # type: ignore[no-untyped-call]
    return found


def _gradients(
    seen: Served, index: Index, rows: Rows, choice: Choice, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `weight` times the gradients of `divergence` by both weights of the indexer."""
    features = key_features(index.k)
    block = choice.block
    if block > 1:
        features = torch.nn.functional.pad(features, (0, 0, 0, -features.shape[1] % block))
        features = features.unflatten(1, (-1, block)).sum(dim=2)
    to_queries, to_sums = torch.zeros_like(index.queries), torch.zeros_like(index.sums)
    for part, teacher, scores, far in _compared(seen, index, rows, choice):
        mass = teacher.sum(dim=-1, keepdim=True)
        none = ~far.any(dim=-1, keepdim=True)
        p = torch.softmax(scores.masked_fill(none, 0.0), dim=-1)
        g = (mass * p - teacher).masked_fill(~far, 0.0)
        blocks = g.shape[2]
        to_queries[:, part] = g @ index.sums[:, :blocks]
        to_sums[:, :blocks] += g.transpose(1, 2) @ index.queries[:, part]
    share = weight / _count(rows, seen.q.shape[0])
    blocks = min(features.shape[1], to_sums.shape[1])
    to_q = torch.einsum("bti,btd->id", to_queries, index.q) * (share * index.factor)
    to_k = torch.einsum("bci,bcd->id", to_sums[:, :blocks], features[:, :blocks]) * share
    return to_q, to_k


def fitted(
    queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [I, G K] under which the scores are nearest to products of the features.

    Nearest in squares over all pairs of a query and a key, keys less their mean, which a softmax
    does not see: the singular vectors of the product of both covariances' roots.
    """
    a = torch.cat([x.flatten(0, 1) for x in queries]).double()
    b = torch.cat([x.flatten(0, 1) for x in keys]).double()
    b = b - b.mean(dim=0)
    (root_a, back_a), (root_b, back_b) = (_root(x.T @ x / len(x)) for x in (a, b))
    u, s, vt = torch.linalg.svd(root_a @ root_b)
    half = s[:size].sqrt()[:, None]
    return (half * u[:, :size].T) @ back_a, (half * vt[:size]) @ back_b


def _root(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric root of a covariance, and its inverse where there is any variance."""
    values, vectors = torch.linalg.eigh(covariance)
    some = values > values.max() * _LEAST
    roots = values.clamp_min(0).sqrt()
    inverse = torch.where(some, 1 / roots.clamp_min(1e-300), 0.0)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T
