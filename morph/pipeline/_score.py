"""Run a selector: its options and examples, what it will cost, and what it found."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import __version__, registry, strict
from morph.errors import PlanError
from morph.pipeline import _align, _data, _select
from morph.pipeline._source import Say, Source, quiet, refuse_hybrid, refuse_nonfinite
from morph.plan import Scores
from morph.recipes.schema import Mixer, Select

if TYPE_CHECKING:
    from torch import nn

    from morph.surgery import Batch, Morphable

# A source that gets fewer answer tokens right than this, and whose answers lose less than so many
# nats when everything is replaced, has no recall to keep
UNABLE, WORTHLESS = 0.1, 0.1


def score(
    source: Source,
    section: Select,
    mixer: Mixer,
    corpus: _data.Corpus | None,
    *,
    seed: int = 0,
    model: nn.Module | None = None,
    dtype: str = "float32",
    memo: Path | None = None,
    work: Path | None = None,
    stream: bool = False,
    say: Say = quiet,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Run a selector on a source model and return its Scores with provenance.

    `corpus` may be None for selectors that look at no text. `memo` is the file in which what was
    measured waits for a stopped run to go on, `work` the folder that keeps aligned mixers. With
    `stream` one layer's weights are in memory at a time. Raises UnknownName and PlanError for names
    and options that do not exist, DataError where the text does not suffice.
    """
    from morph.surgery import Memo

    refuse_hybrid(source, "score")
    section = _select.with_length(section, mixer, source)
    _select.kept_count(source, section)  # a limit that cannot be met is refused before all else
    module = registry.load("selectors", section.selector)
    options = options_of(module, section, source)
    batches = examples(module, section, source, corpus, seed)
    if stream and not getattr(module, "STREAMS", module.NEEDS == "weights"):
        raise PlanError(
            f"selector {section.selector!r} needs the whole model in memory; without --stream, or "
            "with one that does not: nll, kl, beam."
        )
    streamed = None
    if model is None:
        refuse_nonfinite(source)
        model, streamed = source.streamed(dtype) if stream else (source.model(dtype), None)
    start, cpu = time.perf_counter(), time.process_time()
    facts = _facts(source, section, mixer, options, batches, seed)
    if module.NEEDS == "weights":
        corpus = None  # it runs no mixer, so none is aligned for it
    with _align.probing(
        source, model, mixer, section, corpus, seed=seed, work=work, streamed=streamed, say=say
    ) as probe:
        text = corpus.sha256 if corpus is not None else None  # mixers were aligned on it
        probe.memo = Memo(memo, digest([facts, mixer, source.family.model_type, dtype, text]))
        if len(probe.memo):
            say(f"going on from {memo}: {len(probe.memo)} measurements are at hand")
        if progress is not None:
            probe.progress = progress
        count = f"{len(batches)} batch{'es' * (len(batches) != 1)}"
        say(f"scoring with {section.selector} ({count})")
        batches = [batch.on(probe.device) for batch in batches]
        found = module.score(probe, batches, options, granularity=section.granularity)
        warnings = warnings_of(probe, batches, section) if module.NEEDS != "weights" else []
        reused = probe.memo.loaded
    warnings += [str(found.provenance[k]) for k in ("warning", "stopped") if k in found.provenance]
    for warning in warnings:
        say(f"warning: {warning}")
    provenance: dict[str, Any] = {
        **found.provenance,
        **facts,
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        **({"measurements_reused": reused} if reused else {}),
        **({"warning": " ".join(warnings)} if warnings else {}),
    }
    return replace(found, provenance=provenance)


def options_of(module: Any, section: Select, source: Source) -> Any:
    """Return the selector's Options; an empty `count` is what the budget keeps."""
    options = strict.build(
        module.Options, section.options, f"selector {section.selector}", PlanError
    )
    if getattr(options, "count", 0) is None:
        options = replace(options, count=_select.kept_count(source, section))
    return options


def examples(
    module: Any, section: Select, source: Source, corpus: _data.Corpus | None, seed: int
) -> list[Batch]:
    """Return the batches a selector scores on; none for those that look at no text."""
    if module.NEEDS == "weights":
        return []
    if corpus is None:
        raise PlanError(f"selector {section.selector!r} reads text; give --data FILE.")
    return _data.calibration(section, corpus, source.tokenizer(), seed)


def _facts(
    source: Source,
    section: Select,
    mixer: Mixer,
    options: Any,
    batches: Sequence[Batch],
    seed: int,
) -> dict[str, Any]:
    """Return what the numbers depend on: what provenance tells, and a memo is valid for."""
    return {
        "morph": __version__,
        "model": source.path.name,
        "model_sha256": source.checkpoint.fingerprint,
        "mixer": mixer.name,
        "selector": section.selector,
        "selector_options": strict.plain(options),
        "granularity": section.granularity,
        "task": section.task,
        "examples": section.examples,
        "seq_len": section.seq_len,
        "align_tokens": section.align,
        "data_sha256": data_digest(batches),
        "seed": seed,
    }


def digest(facts: Any) -> str:
    """Return the sha256 of plain facts."""
    return hashlib.sha256(json.dumps(strict.plain(facts), sort_keys=True).encode()).hexdigest()


def data_digest(batches: Sequence[Batch]) -> str:
    """Return the sha256 of the tokens and answers of all batches."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(batch.ids.cpu().numpy().tobytes())
        found.update(batch.answers.cpu().numpy().tobytes())
    return found.hexdigest()


def warnings_of(probe: Morphable, batches: Sequence[Batch], section: Select) -> list[str]:
    """Return what makes scores meaningless: examples the mixer sees whole, a model that is lost."""
    from morph.selectors._sweep import Sweep

    found = []
    longest = max((b.ids.shape[1] for b in batches), default=0)
    if batches and probe.prefix >= longest:
        found.append(
            f"every example ({longest} tokens) fits in what {probe.mixer} sees exactly "
            f"({probe.prefix} tokens): all scores are zero. Score on longer examples."
        )
    if section.task == "text" or not batches:
        return found
    everything = [(i, 0) for i in probe.candidates]
    right = 1 - Sweep(probe, batches, everything, "layer", "wrong").base
    if right >= UNABLE:
        return found
    full, cheap = Sweep(probe, batches, everything, "layer").means([everything, []])
    if cheap - full < WORTHLESS:
        found.append(
            f"the source itself gets only {right:.0%} of the answer tokens of {section.task} "
            "right: it has no recall that a selector could keep. Score on plain text instead: "
            "--set select.task=text with --selector kl or fisher."
        )
    return found
