"""Who is compared, and who judges: selectors by name with options, and measured sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from morph import registry
from morph.comparison import BASELINES
from morph.errors import UsageError, escape
from morph.plan import Granularity
from morph.recipes import _yaml

if TYPE_CHECKING:
    from morph.surgery import Batch, Morphable

Unit = tuple[int, int]
Set = tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One selector with its options, as it is named in the table."""

    selector: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name and the options that differ from the defaults."""
        told = " ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.selector} {told}".strip()


def candidates(text: str | None) -> list[Candidate]:
    """Return the selectors that `nll,kl:mode=remove:bootstrap=0` names; None: all there are.

    A selector from outside is `package.module:object`. Raises UsageError, RecipeError and
    UnknownName.
    """
    if text is None:
        return [Candidate(selector=name) for name in registry.names("selectors")]
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, *settings = part.split(":")
        where, options = f"--selectors {escape(part)}", {}
        if "." in name and settings and "=" not in settings[0]:
            name = f"{name}:{settings.pop(0)}"
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise UsageError(f"{where}: options are key=value, parted by colons.")
            if key in options:
                raise UsageError(f"{where}: {escape(key)} is given twice.")
            options[key] = _yaml.read(value, where)[0]
        if "." not in name:
            registry.path("selectors", name)
        made = Candidate(selector=name, options=options)
        if made in found:
            raise UsageError(f"{where}: named twice; name it once.")
        found.append(made)
    if not found:
        raise UsageError("--selectors names none; give some, such as nll,fisher,uniform.")
    return found


def with_baselines(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates with those that look at nothing behind them: no table lacks these."""
    named = {c.selector for c in found}
    return [*found, *(Candidate(selector=n) for n in BASELINES if n not in named)]


@dataclass(kw_only=True)
class Judge:
    """Measures sets on the selection examples and on held-out ones, once each."""

    probe: Morphable
    granularity: Granularity
    chosen_on: Sequence[Batch]
    held_out: Sequence[Batch]
    known: dict[str, dict[Set, float]] = field(default_factory=dict)

    def losses(self, sets: Sequence[Set], measure: str = "nll", held_out: bool = False) -> list:
        """Return the mean over answer tokens for every set."""
        from morph.selectors._sweep import Sweep

        known = self.known.setdefault(f"{measure} {held_out}", {})
        new = sorted({s for s in sets if s not in known})
        if new:
            batches = self.held_out if held_out else self.chosen_on
            sweep = Sweep(self.probe, batches, [], self.granularity, measure)
            known.update(zip(new, sweep.means(new)))
        return [known[s] for s in sets]

    def row(self, kept: Set) -> dict[str, float]:
        """Return loss, held-out loss and recall of one set."""
        return {
            "loss": self.losses([kept])[0],
            "held_out_loss": self.losses([kept], held_out=True)[0],
            "recall": 1 - self.losses([kept], "wrong", held_out=True)[0],
        }
