"""What is restored, and how: the options, checked before any file is opened."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from morph.errors import UsageError, escape, nearest

METHODS = ("exact", "ridge", "interpolate")
PROJECTIONS = ("q", "k", "v", "o", "gate")
PARTS = ("q", "k", "v", "o", "bias", "norm", "gate")
# what a check would stop, and what going on means
ALLOWANCES = {
    "geometry": "PRE and POST place or scale their heads differently",
    "index": "the index of shards is wrong: headers are believed instead",
    "nonfinite": "PRE's tensors hold NaN or infinity, or nothing but zeros",
    "ties": "tied embeddings are stored with different values",
    "unchanged": "PRE and POST hold the same values where something would be restored",
    "unrelated": "PRE's queries do not resemble POST's",
    "widening": "POST stores a wider type: PRE's values are converted, which is exact",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `plan` restores and how.

    `method` is `exact` (bytes of PRE), `ridge` (needs `rho` >= 0) or `interpolate` (needs `alpha`
    in [0, 1], the share of PRE). `layers` is `full`, `all` (sliding ones too), numbers such as
    `3,7`, or the path of a scores.json, of which `budget` (default 1/4) says how much. `include`
    names parts, each of q, k, v, o, bias, norm, gate; `bias` means those of the projections that
    are named too. `allow` names checks that are not to stop it (`ALLOWANCES`). Raises UsageError.
    """

    method: str = "exact"
    rho: float | None = None
    alpha: float | None = None
    layers: str = "full"
    budget: str | None = None
    include: tuple[str, ...] = ("q", "k", "bias")
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _unknown("--method", self.method, METHODS)
        self._check_number("rho", "ridge", math.inf, "0 is the same as exact")
        self._check_number("alpha", "interpolate", 1.0, "the share of PRE")
        self._check_include()
        for name in self.allow:
            if name not in ALLOWANCES:
                raise _unknown("--allow", name, ALLOWANCES)
        if not self.layers.strip():
            raise UsageError("--layers is empty. Give full, all, numbers (3,7), or a scores.json.")
        if self.budget is not None and not self.by_scores:
            raise UsageError(
                "--budget says how much of a scores.json is taken; --layers is "
                f"{escape(self.layers, 60)!r}. Give --layers scores.json, or leave --budget out."
            )

    def _check_number(self, name: str, method: str, most: float, hint: str) -> None:
        value = getattr(self, name)
        if self.method != method:
            if value is not None:
                raise UsageError(
                    f"--{name} belongs to --method {method}; the method is {self.method}. Leave "
                    f"--{name} out, or give --method {method}."
                )
            return
        allowed = f"a number from 0 to {most:g}" if most < math.inf else "a number of at least 0"
        if value is None:
            raise UsageError(f"--method {method} needs --{name}: {allowed} ({hint}).")
        if not (math.isfinite(value) and 0 <= value <= most):
            raise UsageError(f"--{name} is {value:g}; it must be {allowed} ({hint}).")

    def _check_include(self) -> None:
        for name in self.include:
            if name not in PARTS:
                raise _unknown("--include", name, PARTS)
        doubled = [n for i, n in enumerate(self.include) if n in self.include[:i]]
        if doubled:
            raise UsageError(f"--include names {doubled[0]} twice.")
        if set(self.include) <= {"bias"}:
            what = "names only bias" if self.include else "is empty"
            raise UsageError(
                f"--include {what}: name a projection too, such as q,k,bias. "
                f"There are: {', '.join(PARTS)}."
            )
        if self.method == "ridge" and not {"q", "k"} <= set(self.include):
            raise UsageError(
                "--method ridge blends PRE's queries in against PRE's keys, so --include must name "
                f"q and k; it is {','.join(self.include)}."
            )

    @property
    def by_scores(self) -> bool:
        """Whether `layers` names a file of scores."""
        return self.layers.strip().endswith(".json")

    @property
    def is_exact(self) -> bool:
        """Whether the result is PRE's bytes, which both other methods have as their end."""
        return self.method == "exact" or self.rho == 0 or self.alpha == 1

    def allows(self, name: str) -> bool:
        """Whether a check was told not to stop."""
        assert name in ALLOWANCES, name
        return name in self.allow

    def plain(self) -> dict[str, Any]:
        """Return the options as JSON holds them; `layers` keeps the name of a file, no path."""
        found: dict[str, Any] = {"method": self.method}
        found |= {n: v for n in ("rho", "alpha", "budget") if (v := getattr(self, n)) is not None}
        layers = self.layers.strip()
        found["layers"] = layers.replace("\\", "/").rsplit("/", 1)[-1] if self.by_scores else layers
        found["include"] = [p for p in PARTS if p in self.include]
        found["allow"] = sorted(set(self.allow))
        return found


def _unknown(flag: str, name: str, allowed: Iterable[str]) -> UsageError:
    names = list(allowed)
    return UsageError(
        f"{flag}: {escape(name, 60)!r} is not known.{nearest(name, names)} "
        f"Allowed: {', '.join(names)}."
    )
