"""What scoring will cost, before it runs: passes, tokens, and minutes by a short probe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from morph import registry
from morph.pipeline import _data, _score, _select
from morph.pipeline._source import Source, refuse_nonfinite
from morph.recipes.schema import Recipe

if TYPE_CHECKING:
    from morph.surgery import Batch, Morphable


def estimate(recipe: Recipe, source: Source, corpus: _data.Corpus | None) -> dict[str, Any]:
    """Return forwards and backwards in passes over all examples, tokens, and expected minutes.

    With text the model is loaded and one batch is timed, there and back; without, passes only.
    A selector from outside may not say what it costs; it then has no forwards here.
    """
    section = _select.with_length(recipe.select, recipe.mixer, source)
    module = registry.load("selectors", section.selector)
    options = _score.options_of(module, section, source)
    told: dict[str, Any] = {"forwards": None, "backwards": None, "expected_minutes": None}
    if module.NEEDS == "weights":
        return {"forwards": 0, "backwards": 0, "tokens": 0, "expected_minutes": 0.0}
    if not hasattr(module, "cost"):
        return told
    cost = module.cost(source.geometry, options, section.granularity)
    share = min(1.0, cost.rows / section.examples) if cost.rows is not None else 1.0
    forwards, backwards = cost.forwards * share + cost.whole, cost.backwards * share
    length = section.seq_len or 0
    told = {
        "forwards": round(forwards, 1),
        "backwards": round(backwards, 1),
        "tokens": round((forwards + backwards) * section.examples * length),
        "expected_minutes": None,
    }
    if corpus is None:
        return told
    refuse_nonfinite(source)
    model = source.model(recipe.dtype)
    batches = _score.examples(module, section, source, corpus, recipe.seed)
    from morph import surgery

    with surgery.morphable(model, recipe.mixer.name, recipe.mixer.options, source.family) as probe:
        ahead, back = _timed(probe, batches[0], bool(backwards))
    seconds = (forwards * ahead + backwards * back) * len(batches)
    return {**told, "expected_minutes": round(seconds / 60, 3)}


def _timed(probe: Morphable, batch: Batch, backwards: bool) -> tuple[float, float]:
    """Return wall seconds of one forward, half of it cheap, and of one way back; best of two."""
    import torch

    from morph.surgery import CHEAP, Nudge

    half = {i: CHEAP for n, i in enumerate(probe.candidates) if n % 2}
    ahead, back = [], []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            probe.logits(batch, half)
        ahead.append(time.perf_counter() - start)
        if backwards:
            heads = probe.geometry.num_attention_heads
            amounts = [torch.zeros(heads, requires_grad=True) for _ in probe.candidates]
            modes = {i: Nudge(amount=a) for i, a in zip(probe.candidates, amounts)}
            start = time.perf_counter()
            loss = probe.logits(batch, modes).float().square().mean()
            middle = time.perf_counter()
            probe.gradients(loss, amounts)
            back.append(time.perf_counter() - middle + max(0.0, middle - start - ahead[-1]))
    return min(ahead), min(back, default=0.0)
