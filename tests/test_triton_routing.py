"""Routing by Triton kernels: interpreted in float32, or compiled on a GPU, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morph.kernels import _triton
from morph.testing import exactly, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.reason(torch.zeros(1, device=DEVICE))
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"the Triton path cannot run: {REASON}")
if not REASON:
    from morph.kernels import _triton_routing as routing

# (T, at, block size, H, G, K, C): `at` one position, or one for each row; C may hold void blocks
CASES = {
    "from-the-start": (19, 0, 3, 4, 2, 8, 6),
    "no-block": (7, 0, 8, 2, 1, 5, 1),
    "one-block": (12, 0, 8, 2, 1, 5, 1),
    "carried": (5, 201, 8, 6, 2, 40, 31),
    "rows-apart": (9, (3, 77), 3, 3, 1, 16, 40),
    "no-groups": (6, 90, 5, 2, 2, 128, 19),
    "tiles": (11, 60, 2, 8, 1, 8, 40),
    "decoded": (1, 333, 4, 8, 2, 24, 100),
    "decoded-apart": (1, (0, 130), 2, 5, 1, 16, 70),
}
SMALL = ("no-block", "one-block", "no-groups")


def inputs_of(case: str) -> tuple[torch.Tensor, torch.Tensor, Any, int]:
    T, at, block, H, G, K, C = CASES[case]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, T, H, K, generator=generator)
    s = torch.randn(2, C, G, K, generator=generator)
    at = at if isinstance(at, int) else torch.tensor(at)
    return q.to(DEVICE), s.to(DEVICE), at, block


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider pieces for the interpreter, whose steps take the same time whatever their size."""
    if DEVICE == "cpu":
        for kind in ("entmax", "topk", "head"):
            pieces = dict.fromkeys((64, 128, 256), (32, 32, 4, 1))
            monkeypatch.setitem(routing._FULL, kind, pieces)


def own_of(q: torch.Tensor, at: Any, block: int) -> torch.Tensor:
    """The block of every query, [B, T]."""
    start = torch.as_tensor(at).reshape(-1, 1)
    return ((start + torch.arange(q.shape[1])) // block).expand(len(q), -1)


def scores_of(q: torch.Tensor, s: torch.Tensor, scale: float) -> torch.Tensor:
    """The scores in float64, [B, T, H, C]."""
    q, s = q.cpu().double(), s.cpu().double()
    return torch.einsum("bthk,bchk->bthc", q, s.repeat_interleave(q.shape[2] // s.shape[2], 2)) * (
        scale
    )


def exact(x: torch.Tensor, power: float) -> torch.Tensor:
    """entmax of float64 scores x = (alpha - 1) z [..., C], -inf for unseen; 200 halvings."""
    top = x.amax(dim=-1, keepdim=True)
    x = x - torch.where(top.isinf(), 0.0, top)
    low, high = torch.full_like(top, -1.0), torch.zeros_like(top)
    for _ in range(200):
        mid = (low + high) / 2
        more = (x - mid).clamp(min=0).pow(power).sum(dim=-1, keepdim=True) >= 1
        low, high = torch.where(more, mid, low), torch.where(more, high, mid)
    return (x - low).clamp(min=0).pow(power)


def sorted_entmax(x: torch.Tensor) -> torch.Tensor:
    """entmax-1.5 of x = z / 2 by sorting, with the support found exactly."""
    order = x.sort(dim=-1, descending=True).values
    n = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    mean = order.cumsum(-1) / n
    spread = (order.square().cumsum(-1) / n - mean.square()) * n
    tau = mean - ((1 - spread) / n).clamp(min=0).sqrt()
    size = (tau <= order).sum(dim=-1, keepdim=True)
    return (x - tau.gather(-1, size - 1)).clamp(min=0).square()


def law_entmax(
    q: torch.Tensor, s: torch.Tensor, gamma: torch.Tensor, alpha: float, at: Any, block: int
) -> torch.Tensor:
    """The mean weights of a group in float64, [B, T, G, C]."""
    z = scores_of(q, s, q.shape[3] ** -0.5) * gamma.cpu().double()[:, None] * (alpha - 1)
    unseen = torch.arange(s.shape[1]) >= own_of(q, at, block)[..., None]
    p = exact(z.masked_fill(unseen[:, :, None], -torch.inf), 1 / (alpha - 1))
    return p.unflatten(2, (s.shape[2], -1)).mean(dim=3)


def dense_of(index: torch.Tensor, prior: torch.Tensor, blocks: int) -> torch.Tensor:
    """Lists as a tensor over blocks, after checks of their form."""
    index, prior = index.cpu().long(), prior.cpu().double()
    there = index >= 0
    assert (there[..., :-1] | ~there[..., 1:]).all(), "lists are filled from the front"
    rising = index[..., 1:] > index[..., :-1]
    assert (rising | ~there[..., 1:]).all(), "lists ascend, and name no block twice"
    assert (prior[~there] == 0).all() and (prior[there] > 0).all()
    wide = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.float64)
    return wide.scatter(-1, torch.where(there, index, blocks), prior)[..., :blocks]


def check_entmax(
    q: torch.Tensor, s: torch.Tensor, gamma: torch.Tensor, alpha: float, at: Any, block: int
) -> torch.Tensor:
    scale, blocks = q.shape[3] ** -0.5, s.shape[1]
    index, prior, count = routing.entmax_route(
        q, s, gamma=gamma, alpha=alpha, at=at, block_size=block, scale=scale, most=blocks
    )
    expected, found = law_entmax(q, s, gamma, alpha, at, block), dense_of(index, prior, blocks)
    assert (expected - found).abs().max() < 1e-5
    differ = (expected > 0) != (found > 0)
    edge = (1e-6 / min(1.0, alpha - 1)) ** (1 / (alpha - 1))  # of scores within 1e-6 of tau
    assert (torch.maximum(expected, found)[differ] < max(edge, 1e-30)).all()
    assert torch.equal(count.cpu(), (found > 0).sum(dim=-1).int())
    some = own_of(q, at, block) > 0
    assert ((found.sum(dim=-1)[some] - 1).abs() < 1e-5).all()
    assert not found[~some].any()
    return count.cpu()


@pytest.mark.parametrize(
    ("case", "alpha"),
    [*((case, 1.5) for case in CASES), *(("carried", 1.25), ("decoded", 1.25))]
    + [("from-the-start", 2.0), ("decoded-apart", 2.0), ("no-groups", 1.75)],
)
def test_entmax_is_that_of_float64(case: str, alpha: float) -> None:
    q, s, at, block = inputs_of(case)
    gamma = torch.linspace(0.5, 3.0, q.shape[2], device=DEVICE)
    count = check_entmax(q, s, gamma, alpha, at, block)
    seen = own_of(q, at, block)[..., None].expand_as(count)
    assert alpha < 1.5 or case in SMALL or (count < seen).any(), "no query leaves a block out"


def test_the_law_itself_is_the_packages() -> None:
    entmax = pytest.importorskip("entmax")
    z = torch.randn(5, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(exact(z / 2, 2.0), entmax.entmax15(z, dim=-1))
    torch.testing.assert_close(exact(z / 2, 2.0), sorted_entmax(z / 2))
    ours = exact(z * 0.75, 1 / 0.75)
    torch.testing.assert_close(ours, entmax.entmax_bisect(z, alpha=1.75, dim=-1, n_iter=100))


@pytest.mark.parametrize("alpha", (1.5, 1.2))
def test_long_flat_rows_have_their_exact_support(alpha: float) -> None:
    """1536 blocks of standard normal scores and gamma 0.16, where few steps are not enough."""
    blocks = 1536
    q = torch.eye(4, device=DEVICE).view(1, 2, 2, 4) * 2  # scale 1/2: scores are coordinates
    generator = torch.Generator().manual_seed(4)
    s = torch.randn(1, blocks, 1, 4, generator=generator).to(DEVICE)
    gamma = torch.full((2,), 0.16, device=DEVICE)
    count = check_entmax(q, s, gamma, alpha, torch.tensor([blocks * 2]), 2)
    assert (count > 100).all()


@pytest.mark.parametrize("alpha", (1.5, 1.1, 2.0))
def test_gamma_0_weighs_all_earlier_blocks_the_same(alpha: float) -> None:
    q, s, at, block = inputs_of("carried")
    gamma = torch.zeros(q.shape[2], device=DEVICE)
    index, prior, count = routing.entmax_route(
        q, s, gamma=gamma, alpha=alpha, at=at, block_size=block, scale=0.1, most=31
    )
    seen = own_of(q, at, block)[..., None].expand_as(count)
    assert torch.equal(count.cpu().long(), seen)
    wide = dense_of(index, prior, 31)
    expected = (torch.arange(31) < seen[..., None]) / seen[..., None]
    assert (wide - expected).abs().max() < 1e-7


@pytest.mark.parametrize("case", ("carried", "decoded"))
def test_a_list_that_is_too_short_keeps_its_front_and_says_so(case: str) -> None:
    q, s, at, block = inputs_of(case)
    options = {"gamma": torch.ones(q.shape[2], device=DEVICE), "alpha": 1.5, "scale": 0.1}
    options |= {"at": at, "block_size": block}
    index, prior, count = routing.entmax_route(q, s, **options, most=s.shape[1])
    short, part, again = routing.entmax_route(q, s, **options, most=3)
    assert (count > 3).any()
    exactly("index", index[..., :3], short)
    exactly("prior", prior[..., :3], part)
    exactly("count", count, again)


def test_too_few_passes_leave_weights_that_sum_to_1_and_too_wide_a_support() -> None:
    q, s, at, block = inputs_of("carried")
    options = {"gamma": torch.ones(q.shape[2], device=DEVICE) * 3, "alpha": 1.5, "scale": 0.1}
    options |= {"at": at, "block_size": block, "most": s.shape[1]}
    _, prior, few = routing.entmax_route(q, s, **options, iterations=1)
    _, _, enough = routing.entmax_route(q, s, **options)
    assert (few >= enough).all() and (few > enough).any()
    assert (prior.sum(dim=-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("size", (1e3, 1e6))
def test_scores_beyond_float32_end_in_weights_that_sum_to_1(size: float) -> None:
    q, s, at, block = inputs_of("carried")
    gamma = torch.full((q.shape[2],), size, device=DEVICE)
    _, prior, count = routing.entmax_route(
        q, s, gamma=gamma, alpha=1.5, at=at, block_size=block, scale=1.0, most=31
    )
    assert (prior.sum(dim=-1) - 1).abs().max() < 1e-5
    assert (count >= 1).all() and (count <= 6).all()


def law_topk(
    q: torch.Tensor, s: torch.Tensor, at: Any, block: int, k: int, initial: int, local: int,
    score: str,
) -> list[list[int]]:  # fmt: skip
    """The lists, one for every (b, t, j), by a stable sort of float64 scores."""
    z, own = scores_of(q, s, 0.3), own_of(q, at, block)
    groups = s.shape[2]
    lists = []
    for b in range(z.shape[0]):
        for t in range(z.shape[1]):
            mine, row = int(own[b, t]), z[b, t]
            if score == "group_softmax":
                row = row[:, :mine].softmax(dim=-1)
            if score != "head":
                row = row.unflatten(0, (groups, -1)).sum(dim=1)
            forced = {c for c in range(mine + 1) if c < initial or c > mine - local}
            for values in row.tolist():
                rest = [c for c in range(mine) if c not in forced]
                rest.sort(key=lambda c: (-values[c], c))
                best = sorted(forced | set(rest[: k - len(forced)]))
                lists.append(best + [-1] * (k - len(best)))
    return lists


def check_topk(q: torch.Tensor, s: torch.Tensor, at: Any, block: int, *rest: Any) -> torch.Tensor:
    k, initial, local, score = rest
    index = routing.topk_route(
        q, s, scale=0.3, at=at, block_size=block, k=k, initial=initial, local=local, score=score
    )
    lists = q.shape[2] if score == "head" else s.shape[2]
    assert index.shape == (*q.shape[:2], lists, k) and index.dtype == torch.int32
    assert index.cpu().flatten(0, 2).tolist() == law_topk(q, s, at, block, *rest)
    return index


@pytest.mark.parametrize(
    ("case", "score"),
    [(case, "group_softmax") for case in CASES]
    + [(case, score) for case in ("carried", "decoded") for score in ("group_sum", "head")]
    + [("tiles", "head"), ("no-groups", "head"), ("rows-apart", "group_sum")],
)
def test_topk_is_that_of_a_stable_sort(case: str, score: str) -> None:
    check_topk(*inputs_of(case), 7, 1, 2, score)


@pytest.mark.parametrize("rest", ((1, 0, 1), (3, 2, 1), (5, 0, 0), (4, 0, 4), (60, 1, 1)))
def test_places_for_forced_blocks_for_none_and_for_all(rest: tuple[int, int, int]) -> None:
    check_topk(*inputs_of("rows-apart"), *rest, "group_sum")


@pytest.mark.parametrize("score", ("group_softmax", "group_sum", "head"))
def test_equal_scores_go_to_the_earlier_block(score: str) -> None:
    q, s, at, block = inputs_of("carried")
    q, s = q[:1, :2, :, :16], s[:1, torch.arange(s.shape[1]) % 3, :, :16]  # every third is the same
    check_topk(q, s, at, block, 12, 0, 2, score)


def test_both_zeros_are_one() -> None:
    q = torch.ones(1, 1, 1, 1, device=DEVICE)
    tiny = torch.tensor([-1e-45, 1e-45]).repeat(4).view(1, -1, 1, 1).to(DEVICE)
    index = routing.topk_route(  # the scale brings them to -0 and 0
        q, tiny, scale=0.3, at=8, block_size=1, k=3, initial=0, local=0, score="head"
    )
    assert index.flatten().tolist() == [0, 1, 2]


def test_near_scores_and_large_ones_are_told_apart() -> None:
    """The bracket of the k-th score has to close to one step of float32, over all its range."""
    q = torch.ones(1, 1, 1, 1, device=DEVICE)
    near = 1 + torch.arange(64).flip(0) * 2.0**-23
    far = torch.tensor([-3e38, -1e-38, 1e-38, 3e38]).repeat(5)
    values = torch.cat([near, far, -near])
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(5))]
    for k in (7, 40, 100):
        index = routing.topk_route(
            q, values.view(1, -1, 1, 1).to(DEVICE), scale=1.0, at=len(values), block_size=1,
            k=k, initial=0, local=0, score="head",
        )  # fmt: skip
        best = values.sort(descending=True, stable=True).indices[:k].sort().values
        assert index.flatten().tolist() == best.tolist()


@pytest.mark.parametrize("case", ("carried", "decoded"))
def test_two_runs_are_equal_and_nothing_reads_unwritten_memory(case: str) -> None:
    q, s, at, block = inputs_of(case)
    q, s, at = q[:, -3:], s[..., :16], at + q.shape[1] - 3 if q.shape[1] > 3 else at
    q = q[..., :16].contiguous()

    def run() -> list[torch.Tensor]:
        gamma = torch.ones(q.shape[2], device=DEVICE)
        shared = {"at": at, "block_size": block, "scale": 0.2}
        found = list(routing.entmax_route(q, s, gamma=gamma, alpha=1.5, most=9, **shared))
        for score in ("group_softmax", "head"):
            rest = {"k": 9, "initial": 1, "local": 1, "score": score}
            found.append(routing.topk_route(q, s, **shared, **rest))
        return found

    first = run()
    with poison_empty():
        for x, y in zip(first, run()):
            exactly(case, x, y)


def test_a_row_routes_alone_as_in_its_batch_and_strides_do_not_matter() -> None:
    q, s, at, block = inputs_of("carried")
    options = {"k": 6, "initial": 1, "local": 1, "scale": 0.2, "at": at, "block_size": block}
    whole = routing.topk_route(q, s, **options)
    for t in (0, 4):  # one token: its scores are kept, not computed again
        one = routing.topk_route(q[:, t : t + 1], s, **{**options, "at": at + t})
        exactly("a token", whole[:, t : t + 1], one)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    other = torch.stack([s, s], dim=-1)[..., 0]
    exactly("strides", whole, routing.topk_route(turned, other, **options))


def test_halves_meet_summaries_in_float32() -> None:
    """float16, which the interpreter can do: products keep all that the summaries say."""
    q, s, at, block = inputs_of("carried")
    gamma = torch.ones(q.shape[2], device=DEVICE)
    s = s + 8.0 * s.mean(dim=1, keepdim=True)
    check_entmax(q.half(), s, gamma, 1.5, at, block)


def test_what_cannot_run_says_why() -> None:
    q, s = torch.zeros(1, 1, 2, 8, device=DEVICE), torch.zeros(1, 1, 1, 8, device=DEVICE)
    assert routing.unsupported(q, s) == "" and routing.unsupported(q, s, 1.5) == ""
    assert "float64" in routing.unsupported(q.double(), s)
    assert "alpha is 1.0" in routing.unsupported(q, s, 1.0)
    assert "264" in routing.unsupported(q.new_zeros(1, 1, 1, 264), s)
    assert "64 query heads" in routing.unsupported(q.new_zeros(1, 1, 64, 8), s)
    assert "float16" in routing.unsupported(q, s.half())
    with pytest.raises(ValueError, match="initial 2, local 1"):
        routing.topk_route(q, s, scale=1.0, at=0, block_size=1, k=2, initial=2, local=1)
    with pytest.raises(ValueError, match="'best'"):
        routing.topk_route(
            q, s, scale=1.0, at=0, block_size=1, k=2, initial=0, local=1, score="best"
        )
    with pytest.raises(ValueError, match="got 0 and 32"):
        routing.entmax_route(
            q, s, gamma=torch.ones(2), alpha=1.5, at=0, block_size=1, scale=1.0, most=0
        )
