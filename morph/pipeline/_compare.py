"""Selectors beside each other on one model: what each chose, what that costs, and the regret.

Every selector scores the same examples; what it chose at a budget is judged by the answer loss of
the hybrid, beside the best set: found by trying every set of that size where there are few enough,
else the best that any selector or the swaps on it found.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import comparison as comparing
from morph import registry, selection
from morph.comparison import Best, Comparison, Entry
from morph.errors import MorphError, PlanError, StorageError
from morph.pipeline import _align, _data, _score, _select
from morph.pipeline._judge import Candidate, Judge, Set, Unit
from morph.pipeline._source import Say, Source, quiet, refuse_hybrid, refuse_nonfinite
from morph.plan import Granularity, Scores
from morph.recipes.schema import Recipe, Select

if TYPE_CHECKING:
    from torch import nn

    from morph.surgery import Batch, Morphable

# (section, corpus, tokenizer, seed, held out) -> batches
Questions = Callable[[Select, _data.Corpus, Any, int, bool], "list[Batch]"]
SEEDS = {"random": 5}  # the control needs several


@dataclass(kw_only=True)
class Comparing:
    """One comparison on its way: the parts, and where its partial results are kept."""

    recipe: Recipe
    source: Source
    corpus: _data.Corpus
    budgets: tuple[str, ...]
    max_sets: int
    seeds: tuple[int, ...]
    out: Path | None
    say: Say
    progress: Callable[[int, int], None]
    swaps: Callable[[str], bool]
    notes: list[str] = field(default_factory=list)
    memos: list[Any] = field(default_factory=list)
    began: float = 0.0  # when the CPU clock of the current bill stood at zero

    @property
    def spent(self) -> float:
        """CPU seconds on the current bill."""
        return time.process_time() - self.began

    @property
    def granularity(self) -> Granularity:
        return self.recipe.select.granularity

    @contextmanager
    def remembering(self, probe: Morphable, name: str, facts: Any) -> Iterator[None]:
        """Keep what is measured in a file of its own, and what it cost, if this is stopped."""
        from morph.surgery import Memo

        path = None
        if self.out is not None:
            key = hashlib.sha256(name.encode()).hexdigest()[:8]
            path = self.out / f".memo-{key}.jsonl"
        before = probe.memo, probe.tokens, probe.backward_tokens
        probe.memo = memo = Memo(path, _score.digest(facts))
        self.memos.append(memo)
        probe.tokens, probe.backward_tokens, cpu = memo.get("bill") or [0.0, 0.0, 0.0]
        self.began = time.process_time() - cpu
        try:
            yield
        finally:
            memo.put("bill", [probe.tokens, probe.backward_tokens, self.spent])
            probe.memo, probe.tokens, probe.backward_tokens = before

    def kept(self, scores: Scores, section: Select) -> Set:
        """Return the units that scores keep under the section's budget."""
        budget = _select.budget_of(section)
        return selection.choose_units(scores, budget, geometry=self.source.geometry)


def compare(
    recipe: Recipe,
    found: Sequence[Candidate],
    budgets: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    max_sets: int = 4096,
    with_swaps: bool | Sequence[str] = True,
    out: Path | None = None,
    questions: Questions | None = None,
    model: nn.Module | None = None,
    source: Source | None = None,
    say: Say = quiet,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Return the regret table of a model; see the module.

    `seeds` go to selectors that draw (random always gets five); `max_sets` bounds the exhaustive
    search of one budget. `with_swaps` also judges each choice after the swap pass: all, none, or
    those of the labels given. `out` is the folder in which partial results and aligned mixers wait.
    `questions` makes the examples in place of the recipe's task.
    Raises PlanError where a budget cannot be met, and DataError where the text does not suffice.
    """
    from morph.pipeline._source import open_source

    source = source or open_source(recipe.model, recipe.family)
    refuse_hybrid(source, "compare")
    section = _select.with_length(recipe.select, recipe.mixer, source)
    recipe = replace(recipe, select=section)
    _refuse(source, section, found, budgets)
    tokenizer = source.tokenizer()
    corpus = _data.corpus(recipe.data, tokenizer, seed=recipe.seed)
    ask = questions or _questions
    batches, held_out = (
        ask(section, corpus, tokenizer, *which)
        for which in ((recipe.seed, False), (recipe.seed + 1, True))
    )
    if model is None:
        refuse_nonfinite(source)
        model = source.model(recipe.dtype)
    run = Comparing(
        recipe=recipe,
        source=source,
        corpus=corpus,
        budgets=tuple(budgets),
        max_sets=max_sets,
        seeds=tuple(seeds),
        out=out,
        say=say,
        progress=progress or (lambda done, total: None),
        swaps=lambda label: with_swaps if isinstance(with_swaps, bool) else label in with_swaps,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with _align.probing(
        source, model, recipe.mixer, section, corpus, seed=recipe.seed, work=out, say=say
    ) as probe:
        probe.progress = run.progress
        batches, held_out = ([b.on(probe.device) for b in x] for x in (batches, held_out))
        made = _compare(run, probe, found, batches, held_out)
    for memo in run.memos:
        memo.clear()
    for left in out.glob(".memo-*.jsonl") if out is not None else ():
        left.unlink(missing_ok=True)  # of a comparison that was stopped and given up
    return made


def _refuse(
    source: Source, section: Select, found: Sequence[Candidate], budgets: Sequence[str]
) -> None:
    """Raise PlanError for a budget that cannot be met, and options that a selector lacks."""
    for budget in budgets:
        _select.kept_count(source, replace(section, budget=budget))
        for each in found:
            given = replace(
                section, budget=budget, selector=each.selector, options=dict(each.options)
            )
            _score.options_of(registry.load("selectors", each.selector), given, source)


def _questions(
    section: Select, corpus: _data.Corpus, tokenizer: Any, seed: int, held_out: bool
) -> list[Batch]:
    return _data.calibration(section, corpus, tokenizer, seed, held_out=held_out)


def _compare(
    run: Comparing,
    probe: Morphable,
    found: Sequence[Candidate],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
) -> Comparison:
    recipe, section = run.recipe, run.recipe.select
    judge = Judge(probe=probe, granularity=run.granularity, chosen_on=batches, held_out=held_out)
    facts = [run.source.checkpoint.fingerprint, _score.data_digest(batches), recipe.mixer]
    facts += [run.granularity, _score.data_digest(held_out), section.align, recipe.dtype]
    facts += [run.source.family.model_type, run.corpus.sha256, recipe.seed]
    with run.remembering(probe, "warnings", facts):
        run.notes += _score.warnings_of(probe, batches, section)
    for warning in run.notes:
        run.say(f"warning: {warning}")
    entries: list[Entry] = []
    values: dict[str, list[float]] = {}
    for candidate in found:
        entries += _candidate(run, probe, judge, candidate, batches, facts, values)
    if not entries:
        raise PlanError(f"no selector could run. {' '.join(run.notes)}")
    best = []
    for budget in run.budgets:
        with run.remembering(probe, f"best {budget}", facts):
            best.append(_best(run, judge, budget, entries))
    with run.remembering(probe, "judged", facts):
        ends = [judge.row(tuple((i, u) for i, u in s)) for s in (_all(probe, run.granularity), ())]
        entries = [_judged(e, best, entries, judge) for e in entries]
    names = ("loss", "held_out_loss", "recall")
    told = {f"source_{n}": ends[0][n] for n in names} | {f"cheap_{n}": ends[1][n] for n in names}
    return Comparison(
        model=run.source.path.name,
        model_sha256=run.source.checkpoint.fingerprint,
        mixer=recipe.mixer.name,
        mixer_options=dict(probe.options),
        granularity=run.granularity,
        budgets=run.budgets,
        task=section.task,
        examples=section.examples,
        seq_len=section.seq_len or 0,
        seeds=run.seeds,
        best=tuple(best),
        entries=tuple(entries),
        agreement={
            a: {b: comparing.spearman(values[a], values[b]) for b in values} for a in values
        },
        default=_default(entries),
        notes=tuple(run.notes),
        versions=_versions(),
        **told,
    )


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from morph import __version__

    return {
        "morph": __version__, "torch": torch.__version__, "transformers": transformers.__version__
    }  # fmt: skip


def _default(entries: Iterable[Entry]) -> str | None:
    name = Select().selector
    labels = {e.label for e in entries}
    return next((x for x in (f"{name} + swaps", name) if x in labels), None)


def _looks_at_count(options: Any) -> bool:
    """Whether a selector must run anew for every budget: its count matters in its mode."""
    return hasattr(options, "count") and getattr(options, "mode", "greedy") == "greedy"


def _all(probe: Morphable, granularity: Granularity) -> list[Unit]:
    from morph.selectors import _common

    return _common.units(probe, granularity)


def _candidate(
    run: Comparing,
    probe: Morphable,
    judge: Judge,
    candidate: Candidate,
    batches: Sequence[Batch],
    facts: list[Any],
    values: dict[str, list[float]],
) -> list[Entry]:
    """Return the entries of one selector at every budget and seed, with and without swaps."""
    module = registry.load("selectors", candidate.selector)
    section = replace(
        run.recipe.select, selector=candidate.selector, options=dict(candidate.options)
    )
    draws = "seed" in module.Options.__dataclass_fields__ and "seed" not in candidate.options
    seeds: Sequence[int | None] = (None,)
    if draws:
        seeds = range(SEEDS[candidate.selector]) if candidate.selector in SEEDS else run.seeds
    entries: list[Entry] = []
    run.say(f"{candidate.label} ...")
    for seed in seeds:
        label = candidate.label + (f" (seed {seed})" if seed is not None and len(seeds) > 1 else "")
        once: tuple[Scores, dict[str, float]] | None = None
        for budget in run.budgets:
            given = replace(section, budget=budget)
            if seed is not None:
                given = replace(given, options={**given.options, "seed": seed})
            try:
                options = _score.options_of(module, given, run.source)
                counts = _looks_at_count(options)
                if once is None or counts:
                    used = batches if module.NEEDS != "weights" else []
                    with run.remembering(probe, f"{label} {budget}", [*facts, options]):
                        once = _scored(run, probe, module, used, options)
            except StorageError:
                raise
            except MorphError as error:
                run.notes.append(f"{label}: {error}")
                run.say(f"{label}: left out: {error}")
                return entries
            scores, bill = once
            if budget == run.budgets[0] and seed in (None, seeds[0]):
                flat = [scores.values[i][u] for i, u in _all(probe, run.granularity)]
                values[candidate.label] = flat
            kept = run.kept(scores, given)
            warning = " ".join(
                str(scores.provenance[k]) for k in ("warning", "stopped") if k in scores.provenance
            )
            entry = Entry(
                selector=candidate.selector, label=label, budget=budget, kept=kept, loss=0.0,
                note=warning, **bill,
            )  # fmt: skip
            entries.append(entry)
            if run.swaps(candidate.label) and module.NEEDS != "weights":
                with run.remembering(probe, f"{label} {budget} swaps", facts):
                    entries.append(_swapped(run, probe, entry, scores, batches, label))
    return entries


def _scored(
    run: Comparing,
    probe: Morphable,
    module: Any,
    batches: Sequence[Batch],
    options: Any,
) -> tuple[Scores, dict[str, float]]:
    tokens = sum(b.ids.numel() for b in batches) or 1
    scores = module.score(probe, batches, options, granularity=run.granularity)
    return scores, {
        "forwards": probe.tokens / tokens,
        "backwards": probe.backward_tokens / tokens,
        "cpu_seconds": run.spent,
    }


def _swapped(
    run: Comparing,
    probe: Morphable,
    entry: Entry,
    scores: Scores,
    batches: Sequence[Batch],
    label: str,
) -> Entry:
    """Return the entry after the swap pass, which is charged to it."""
    from morph.selectors import _common

    kept, report = _common.verify_and_swap(
        probe,
        batches,
        entry.kept,
        run.granularity,
        promise=lambda kept: selection.swap_gain(scores, kept, run.source.geometry),
        tries=run.recipe.select.swap_tries,
    )
    name, paren, rest = label.partition(" (seed")
    return replace(
        entry,
        label=f"{name} + swaps{paren}{rest}",
        kept=kept,
        swaps=len(report["swaps"]),
        forwards=entry.forwards + probe.tokens / sum(b.ids.numel() for b in batches),
        cpu_seconds=entry.cpu_seconds + run.spent,
    )


def _best(run: Comparing, judge: Judge, budget: str, entries: Sequence[Entry]) -> Best:
    """Return the set of lowest loss of a budget's size: of all, or of those that were found."""
    from morph.selectors import _common

    probe = judge.probe
    units = _all(probe, run.granularity)
    count = _select.kept_count(run.source, replace(run.recipe.select, budget=budget))
    found = sorted({e.kept for e in entries if e.budget == budget})
    total = math.comb(len(units), count)
    if total <= run.max_sets:
        run.say(f"budget {budget}: trying all {total:,} sets of {count}")
        sets = list(itertools.combinations(units, count))
    else:
        if not found:
            raise PlanError(f"budget {budget}: no selector chose a set to compare.")
        losses = judge.losses(found)
        start = min(zip(losses, found))[1]
        run.say(f"budget {budget}: improving the best of {len(found)} sets found by swaps")
        better, report = _common.verify_and_swap(
            probe, judge.chosen_on, start, run.granularity, tries=run.recipe.select.swap_tries * 4
        )
        sets = [*found, better]
    kept = min(zip(judge.losses(sets), sets))[1]
    spent = probe.tokens
    return Best(
        budget=budget,
        kept=kept,
        sets_tried=len(sets) if total <= run.max_sets else len(found) + report["sets_tried"] - 1,
        exhaustive=total <= run.max_sets,
        forwards=spent / sum(b.ids.numel() for b in judge.chosen_on),
        **judge.row(kept),
    )


def _judged(entry: Entry, best: Sequence[Best], entries: Sequence[Entry], judge: Judge) -> Entry:
    """Return the entry with losses, recall and regrets filled in.

    Held-out regret is against the best held-out loss of any set that was chosen at that budget.
    """
    at = next(b for b in best if b.budget == entry.budget)
    near = [at.kept, *(e.kept for e in entries if e.budget == entry.budget)]
    floor = min(judge.losses(near, held_out=True))
    row = judge.row(entry.kept)
    return replace(
        entry,
        regret=max(0.0, row["loss"] - at.loss),
        held_out_regret=row["held_out_loss"] - floor,
        **row,
    )
