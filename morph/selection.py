"""From scores and a budget to a plan: who keeps full attention.

Top-K by score, or, where pairs of units were measured, the set whose replacement costs least. Ties
go to the lower index, pins win over scores. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from morph.errors import PlanError
from morph.plan import (
    Budget,
    CacheCost,
    Geometry,
    Granularity,
    HeadGroup,
    LayerPlan,
    Plan,
    Scores,
    Unit,
    uniform_plan,
)


def choose(
    scores: Scores,
    budget: Budget,
    *,
    geometry: Geometry,
    mixer: str,
    options: Mapping[str, Any] | None = None,
    cache: CacheCost | None = None,
) -> Plan:
    """Return the plan that keeps full attention where the scores say it is needed most.

    Top-K by score, or, where `scores.pairs` exists, the set whose replacement costs least by the
    quadratic model (greedy, then swaps). Ties go to the lower index. Pins win over scores. Raises
    PlanError where budget, pins, scores and geometry contradict each other.
    """
    return plan_of_units(
        scores,
        choose_units(scores, budget, geometry=geometry),
        geometry=geometry,
        mixer=mixer,
        options=options,
        cache=cache,
    )


def plan_of_units(
    scores: Scores,
    keep: Sequence[tuple[int, int]],
    *,
    geometry: Geometry,
    mixer: str,
    options: Mapping[str, Any] | None = None,
    cache: CacheCost | None = None,
) -> Plan:
    """Return the plan in which exactly the (layer, unit) pairs of `keep` stay full."""
    if scores.granularity == "layer":
        plan = uniform_plan(
            scores.model_type, geometry, [i for i, _ in keep], mixer, options or {}, cache
        )
        layers = plan.layers
    else:
        kept = tuple(keep)
        layers = _head_layers(scores.granularity, kept, geometry, mixer, options or {}, cache)
    return Plan(
        model_type=scores.model_type,
        geometry=geometry,
        layers=layers,
        scores_digest=scores.digest,
    )


def choose_units(
    scores: Scores, budget: Budget, *, geometry: Geometry
) -> tuple[tuple[int, int], ...]:
    """Return the (layer, unit) pairs that keep full attention, sorted; see `choose`."""
    width = geometry.units(scores.granularity)
    if (len(scores.values), len(scores.values[0])) != (geometry.num_hidden_layers, width):
        raise PlanError(
            f"the scores have {len(scores.values)} layers x {len(scores.values[0])} units, the "
            f"model {geometry.num_hidden_layers} x {width} ({scores.granularity})."
        )
    candidates = [(i, u) for i in geometry.candidates for u in range(width)]
    count = _count_full(budget, geometry, scores.granularity, len(candidates))
    keep = _pins("keep", budget.keep, candidates, geometry, width)
    drop = _pins("replace", budget.replace, candidates, geometry, width)
    if keep & drop:
        raise PlanError(f"budget: {min(keep & drop)} is both kept and replaced.")
    chosen = set(keep)
    if budget.min_full_per_layer:
        chosen |= _floor(scores, budget.min_full_per_layer, candidates, chosen, drop, width)
    free = [c for c in candidates if c not in chosen and c not in drop]
    if len(chosen) > count:
        raise PlanError(
            f"budget: pins and min_full_per_layer keep {len(chosen)} units, the limit is {count}."
        )
    if len(chosen) + len(free) < count:
        raise PlanError(
            f"budget: {count} units must stay full, but only {len(chosen) + len(free)} are left "
            "after `replace`."
        )
    if scores.pairs is None:
        ranked = sorted(free, key=lambda c: (-scores.values[c[0]][c[1]], c))
        return tuple(sorted(chosen | set(ranked[: count - len(chosen)])))
    return _quadratic(scores, candidates, chosen, set(free), count)


def _count_full(budget: Budget, shape: Geometry, granularity: Granularity, total: int) -> int:
    width = shape.units(granularity)
    if total == 0:
        raise PlanError("no layer of this model attends to everything: nothing can be replaced.")
    if budget.full_layers is not None:
        if budget.full_layers * width > total:
            raise PlanError(
                f"budget.full_layers is {budget.full_layers}, but only {total // width} layers "
                "attend to everything in this model."
            )
        return budget.full_layers * width
    if budget.full_fraction is not None:
        return max(1, int(total * budget.full_fraction + 1e-9))
    assert budget.cache_bytes_per_token is not None
    # a query head on its own holds a whole KV head
    share = 1 if granularity == "head" else shape.num_key_value_heads / width
    per_unit = 2 * shape.entry_elements() * share
    count = min(total, int(budget.cache_bytes_per_token / per_unit))
    if count < 1:
        raise PlanError(
            f"budget.cache_bytes_per_token is {budget.cache_bytes_per_token}; one full "
            f"{granularity} alone costs {per_unit:.0f}."
        )
    return count


def _pins(
    name: str,
    pins: tuple[Unit, ...],
    candidates: list[tuple[int, int]],
    shape: Geometry,
    width: int,
) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for pin in pins:
        layer, unit = pin if isinstance(pin, tuple) else (pin, None)
        if not 0 <= layer < shape.num_hidden_layers:
            raise PlanError(
                f"budget.{name}: layer {layer} does not exist (0-{shape.num_hidden_layers - 1})."
            )
        if unit is not None and not 0 <= unit < width:
            raise PlanError(
                f"budget.{name}: layer {layer} has no unit {unit}; "
                f"there are {width} (0-{width - 1})."
            )
        if (layer, 0) not in candidates:
            raise PlanError(
                f"budget.{name}: layer {layer} already slides in the source and is left as it is."
            )
        found |= {(layer, unit)} if unit is not None else {(layer, u) for u in range(width)}
    return found


def _floor(
    scores: Scores,
    minimum: int,
    candidates: list[tuple[int, int]],
    chosen: set[tuple[int, int]],
    drop: set[tuple[int, int]],
    width: int,
) -> set[tuple[int, int]]:
    if minimum > width:
        raise PlanError(f"budget.min_full_per_layer is {minimum}; a layer has {width} units.")
    extra: set[tuple[int, int]] = set()
    for layer in sorted({i for i, _ in candidates}):
        have = sum((layer, u) in chosen for u in range(width))
        free = [u for u in range(width) if (layer, u) not in chosen | drop]
        if have + len(free) < minimum:
            raise PlanError(f"budget: layer {layer} cannot keep {minimum} units after `replace`.")
        ranked = sorted(free, key=lambda u: (-scores.values[layer][u], u))
        extra |= {(layer, u) for u in ranked[: max(0, minimum - have)]}
    return extra


class _Costs:
    """What replacing a set costs by scores and pairs, kept up to date as units move in and out.

    `link[u]` is the sum of the pairs of u with all other replaced units.
    """

    def __init__(
        self, scores: Scores, candidates: Sequence[tuple[int, int]], kept: set[tuple[int, int]]
    ) -> None:
        width = len(scores.values[0])
        self.value = {(i, u): scores.values[i][u] for i, u in candidates}
        self._row = {(i, u): i * width + u for i, u in candidates}
        self._pairs = scores.pairs
        out = [c for c in candidates if c not in kept]
        self.link = {
            c: math.fsum(self.pair(c, other) for other in out if other != c) for c in candidates
        }

    def pair(self, a: tuple[int, int], b: tuple[int, int]) -> float:
        """Return what replacing both costs beyond each alone."""
        return self._pairs[self._row[a]][self._row[b]] if self._pairs is not None else 0.0

    def keep(self, unit: tuple[int, int]) -> None:
        """Take a unit out of the replaced ones."""
        if self._pairs is not None:
            for other in self.link:
                if other != unit:
                    self.link[other] -= self.pair(unit, other)

    def drop(self, unit: tuple[int, int]) -> None:
        """Put a unit among the replaced ones."""
        if self._pairs is not None:
            for other in self.link:
                if other != unit:
                    self.link[other] += self.pair(unit, other)

    def relief(self, unit: tuple[int, int]) -> float:
        """Return how much cheaper the replaced set gets when `unit` is kept after all."""
        return self.value[unit] + self.link[unit]

    def gain(self, old: tuple[int, int], new: tuple[int, int]) -> float:
        """Return how much cheaper it gets when kept `old` is replaced and replaced `new` kept."""
        return self.relief(new) - self.relief(old) + self.pair(old, new)


def swap_gain(
    scores: Scores, kept: Iterable[tuple[int, int]], geometry: Geometry
) -> Callable[[tuple[int, int], tuple[int, int]], float]:
    """Return gain(out, in): what a single swap promises by the scores; for the swap pass."""
    width = geometry.units(scores.granularity)
    candidates = [(i, u) for i in geometry.candidates for u in range(width)]
    return _Costs(scores, candidates, set(kept)).gain


def _quadratic(
    scores: Scores,
    candidates: list[tuple[int, int]],
    pinned: set[tuple[int, int]],
    free: set[tuple[int, int]],
    count: int,
) -> tuple[tuple[int, int], ...]:
    """Greedy additions to the kept set, then the best single swaps until none helps."""
    kept = set(pinned)
    costs = _Costs(scores, candidates, kept)
    while len(kept) < count:
        best = min(free - kept, key=lambda c: (-costs.relief(c), c))
        kept.add(best)
        costs.keep(best)
    for _ in range(4 * len(candidates)):  # it ends long before; rounding must not make it circle
        swaps = [
            (-costs.gain(a, b), a, b) for a in sorted(kept - pinned) for b in sorted(free - kept)
        ]
        if not swaps or min(swaps)[0] >= -1e-12:
            break
        _, out, new = min(swaps)
        kept = kept - {out} | {new}
        costs.drop(out)
        costs.keep(new)
    return tuple(sorted(kept))


def _head_layers(
    granularity: Granularity,
    keep: tuple[tuple[int, int], ...],
    shape: Geometry,
    mixer: str,
    options: Mapping[str, Any],
    cache: CacheCost | None,
) -> tuple[LayerPlan, ...]:
    span = shape.group_size if granularity == "kv_head" else 1
    layers = []
    for i in range(shape.num_hidden_layers):
        full = {u * span + r for layer, u in keep if layer == i for r in range(span)}
        if shape.windows[i] is not None:
            full = set(range(shape.num_attention_heads))
        rest = tuple(h for h in range(shape.num_attention_heads) if h not in full)
        groups = []
        if full:
            groups.append(HeadGroup(mixer="full", heads=tuple(sorted(full))))
        if rest:
            groups.append(HeadGroup(mixer=mixer, heads=rest, options=dict(options), cache=cache))
        layers.append(LayerPlan(groups=tuple(groups)))
    return tuple(layers)
