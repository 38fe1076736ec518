"""What a model keeps and what it costs: recall, perplexity, cache bytes and speed, side by side.

Every function is a pure function of a causal language model and token ids. `evaluate` measures
several models on the same tokens, so that differences are paired, and says where the source could
not do a task to begin with: a zero that was there before is not damage.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from morph.cache import held_bytes
from morph.data import NEEDLE_TASKS, Example, name_recall_examples, needle_examples
from morph.errors import (
    DataError,
    PlanError,
    RecipeError,
    VerificationFailed,
    escape,
    nearest,
)
from morph.evaluation import (
    CacheBytes,
    Evaluation,
    Hit,
    Measured,
    ModelResult,
    Speed,
    cannot,
    differences,
    summarise,
)
from morph.plan import Plan, full_plan
from morph.recipes.schema import Evaluate

CACHE_LENGTHS = (1024, 32 * 1024, 128 * 1024)
TASKS = (*NEEDLE_TASKS, "name_recall")
LOGITS_LIMIT = 2**27  # elements of logits alive at once: 512 MiB in float32
TOKENS_LIMIT = 2**15  # tokens of one batch of questions, so that long ones go one by one

Model = Any  # a transformers causal language model, or anything that is called like one
Source = nn.Module | Callable[[], Model]


# --- Quality ------------------------------------------------------------------------------------


def perplexity(
    model: Model,
    ids: torch.Tensor,
    *,
    seq_len: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 4,
    bos: int | None = None,
) -> Measured:
    """Return the mean loss of next-token prediction over non-overlapping contexts of a text.

    ids `[N]`; every context has `seq_len` tokens (`bos` first, where given) of which all but the
    first are predicted. At most `max_tokens` tokens of text are read (always one context). Raises
    DataError where the context is longer than the text, VerificationFailed for a loss that is
    not finite.
    """
    take = seq_len - (bos is not None)
    if take < 1 or seq_len < 2:
        raise DataError(f"seq_len is {seq_len}; a context needs at least 2 tokens.")
    count = len(ids) // take
    if count < 1:
        raise DataError(
            f"the text has {len(ids)} tokens, one context needs {take}; give a longer text or a "
            "smaller seq_len."
        )
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // take))
    rows = ids[: count * take].reshape(count, take)
    if bos is not None:
        rows = torch.cat([rows.new_full((count, 1), bos), rows], dim=1)
    step = max(1, min(batch_size, LOGITS_LIMIT // (seq_len * _vocab_size(model))))
    means: list[float] = []
    with _inference(model) as device:
        for batch in rows.split(step):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            for row, scores in zip(batch, logits):
                loss = cross_entropy(scores[:-1].float(), row[1:], reduction="none")
                means.append(loss.double().mean().item())
    _check_finite(means, "the loss")
    value = statistics.fmean(means)
    return Measured(
        value=value,
        ppl=math.exp(min(value, 700.0)),
        tokens=count * (seq_len - 1),
        stderr=statistics.stdev(means) / math.sqrt(count) if count > 1 else None,
        sequences=tuple(means),
    )


def recall(model: Model, examples: Sequence[Example], batch_size: int = 8) -> list[Hit]:
    """Return one Hit per example, in order: is every answer token the model's first choice?

    Teacher-forced: answer tokens before the one in question are the right ones. An example with
    `choices` is right where its answer scores best among them (ties: the earlier choice). Raises
    DataError for an example with no answer or nothing before it.
    """
    for i, example in enumerate(examples):
        if not 0 < example.answer_start < len(example.ids):
            raise DataError(
                f"example {i}: answer_start is {example.answer_start} of {len(example.ids)} "
                "tokens; an answer needs at least one token, and one before it."
            )
    correct: dict[int, bool] = {}
    with _inference(model) as device:
        for chunk in _batches([len(e.ids) for e in examples], batch_size):
            answers = _answers(model, [examples[i] for i in chunk], device)
            correct.update(zip(chunk, answers))
    return [
        Hit(
            example=i,
            task=e.task,
            length=e.length,
            depth=e.depth,
            correct=correct[i],
            chance=1 / len(e.choices) if e.choices else 0.0,
        )
        for i, e in enumerate(examples)
    ]


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, each within `batch_size` and `TOKENS_LIMIT`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        full = not batches or len(batches[-1]) == batch_size
        if full or (len(batches[-1]) + 1) * lengths[i] > TOKENS_LIMIT:
            batches.append([])
        batches[-1].append(i)
    return batches


def _answers(model: Model, batch: Sequence[Example], device: torch.device) -> list[bool]:
    # Shorter rows are padded on the right: a causal model never looks there, so the answers are
    # those of each row alone, with no mask for a mixer to get wrong.
    width = max(len(e.ids) for e in batch)
    rows = [[*e.ids, *[e.ids[-1]] * (width - len(e.ids))] for e in batch]
    positions = sorted({p - 1 for e in batch for p in range(e.answer_start, len(e.ids))})
    column = {p: n for n, p in enumerate(positions)}
    logits = model(
        input_ids=torch.tensor(rows, device=device),
        logits_to_keep=torch.tensor(positions, device=device),
        use_cache=False,
    ).logits  # [B, positions, vocabulary]
    correct = []
    for e, scores in zip(batch, logits):
        wanted = scores[[column[p - 1] for p in range(e.answer_start, len(e.ids))]].float()
        _check_finite(wanted.abs().max(dim=-1).values.tolist(), "a logit")
        if e.choices:
            best = e.choices[int(wanted[0, list(e.choices)].argmax())]
            correct.append(best == e.answer[0])
        else:
            correct.append(wanted.argmax(dim=-1).tolist() == list(e.answer))
    return correct


# --- Cost ---------------------------------------------------------------------------------------


def cache_bytes_held(model: Model, seq_len: int, seed: int = 0) -> int:
    """Return the bytes of generation state that a prefill of `seq_len` random tokens leaves."""
    with _inference(model) as device:
        ids = _random_ids(model, seq_len, seed).to(device)
        return held_bytes(model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)


def cache_bytes_planned(
    plan: Plan, dtype: str, lengths: Sequence[int] = CACHE_LENGTHS
) -> tuple[CacheBytes, ...]:
    """Return what a plan says it holds at each length, beside the source's full attention."""
    whole = full_plan(plan.model_type, plan.geometry)
    found = [(n, plan.cache_bytes(n, dtype), whole.cache_bytes(n, dtype)) for n in lengths]
    return tuple(CacheBytes(tokens=n, bytes=b, ratio=b / full) for n, b, full in found)


def speed(
    model: Source, length: int, decode_tokens: int, *, rounds: int = 3, seed: int = 0
) -> Speed:
    """Return the speed of one model; see `speeds`."""
    return speeds({"model": model}, length, decode_tokens, rounds=rounds, seed=seed)["model"]


def speeds(
    models: Mapping[str, Source], length: int, decode_tokens: int, *, rounds: int = 3, seed: int = 0
) -> dict[str, Speed]:
    """Return prefill and decode speed of each model, one sequence of `length` random tokens.

    Models take turns, A B C A B C, so that a machine that slows down slows all of them. A model
    given as a function is made anew for every turn and dropped after it.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in models}
    for turn in range(rounds):
        for name, source in models.items():
            times[name].append(_turn(source, length, decode_tokens, seed + turn))
    base = next(iter(times.values()), [])
    found = {}
    for name, rows in times.items():
        wall_prefill, wall_decode, cpu_prefill, cpu_decode = map(statistics.median, zip(*rows))
        found[name] = Speed(
            length=length,
            decode_tokens=decode_tokens,
            rounds=rounds,
            prefill_tokens_per_second=length / wall_prefill,
            decode_tokens_per_second=decode_tokens / wall_decode,
            prefill_cpu_seconds=cpu_prefill,
            decode_cpu_seconds=cpu_decode,
            prefill_ratio=statistics.median(b[0] / r[0] for b, r in zip(base, rows)),
            decode_ratio=statistics.median(b[1] / r[1] for b, r in zip(base, rows)),
        )
    return found


def _turn(source: Source, length: int, decode_tokens: int, seed: int) -> tuple[float, ...]:
    model = _make(source)
    _once(model, min(length, 16), 1, seed)  # first calls compile and allocate
    return _once(model, length, decode_tokens, seed)


def _once(model: Model, length: int, decode_tokens: int, seed: int) -> tuple[float, ...]:
    """Wall seconds of prefill and of decode, then the same in CPU seconds."""
    with _inference(model) as device:
        ids = _random_ids(model, length + decode_tokens, seed).to(device)
        marks = [_clock(device)]
        out = model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1)
        marks.append(_clock(device))
        for i in range(length, length + decode_tokens):
            out = model(
                input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True
            )
        marks.append(_clock(device))
    (a, x), (b, y), (c, z) = marks
    tiny = 1e-9  # a clock may stand still over a very short run
    return b - a + tiny, c - b + tiny, y - x, z - y


def _clock(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


# --- Everything, side by side -------------------------------------------------------------------


def evaluate(
    models: Mapping[str, Source],
    settings: Evaluate,
    tokenizer: Any,
    text_ids: torch.Tensor | None,
    *,
    stories: Sequence[str] | None = None,
    seed: int = 0,
    plans: Mapping[str, Plan | None] | None = None,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure every model on the same questions, text and lengths; the first one is the source.

    A model is given itself, or as a function that makes it when its turn comes (it is dropped
    before the next one is made). text_ids `[N]` is held-out text for perplexity and haystacks;
    without it perplexity is left out. `stories` serve the task name_recall. A plan of None means
    the source's own attention. Raises DataError where a task lacks its text, and as `data` does.
    """
    if not models:
        raise DataError("there is no model to evaluate; give at least the source.")
    _check_settings(settings)
    tell = progress or (lambda message: None)
    examples = build_examples(settings, tokenizer, text_ids, stories=stories, seed=seed)
    hits: dict[str, list[Hit]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, source in models.items():
        tell(f"{escape(name)}: {len(examples)} questions, perplexity, cache")
        hits[name], found[name] = _quality(
            _make(source), examples, settings, tokenizer, text_ids, seed, batch_size
        )
    tell(f"speed of {len(models)} models at {settings.speed_length} tokens")
    fast = speeds(models, settings.speed_length, settings.decode_tokens, seed=seed)
    first = next(iter(models))
    unable = cannot(found[first]["recall"], first)
    notes = list(unable.values())
    whole = found[first]["held"]
    results = []
    for name, plan in _complete(models, plans or {}).items():
        held, dtype = found[name].pop("held"), found[name].pop("dtype")
        results.append(
            ModelResult(
                name=name,
                pattern=plan.pattern if plan else None,
                cache=_planned(plan, dtype, name, notes, settings.speed_length, held),
                held=CacheBytes(
                    tokens=settings.speed_length, bytes=held, ratio=held / max(1, whole)
                ),
                speed=fast[name],
                **found[name],
            )
        )
    return Evaluation(
        models=tuple(results),
        differences=differences(
            hits,
            {result.name: result.perplexity for result in results},
            unable=unable,
        ),
        notes=tuple(notes),
        settings=settings,
        seed=seed,
    )


def build_examples(
    settings: Evaluate,
    tokenizer: Any,
    text_ids: torch.Tensor | None,
    *,
    stories: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Example]:
    """Return the questions of an evaluation: `settings.examples` per task and length.

    name_recall has stories of any length up to the longest, and so `settings.examples` in all.
    """
    found: list[Example] = []
    for task in settings.tasks:
        if task not in TASKS:
            raise DataError(
                f"task {escape(task)!r} is unknown.{nearest(task, TASKS)} "
                f"There are: {', '.join(TASKS)}."
            )
        if task == "name_recall":
            if not stories:
                raise DataError("the task name_recall needs stories; give a .json file of texts.")
            found += name_recall_examples(
                stories,
                tokenizer,
                seed=seed,
                count=settings.examples,
                max_length=max(settings.lengths),
            )
            continue
        for length in settings.lengths:
            found += needle_examples(
                task,
                tokenizer,
                text_ids,
                seed=seed,
                length=length,
                depths=_depths(settings.depths),
                count=settings.examples,
            )
    return found


def _depths(count: int) -> tuple[float, ...]:
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)


def _quality(
    model: Model,
    examples: Sequence[Example],
    settings: Evaluate,
    tokenizer: Any,
    text_ids: torch.Tensor | None,
    seed: int,
    batch_size: int,
) -> tuple[list[Hit], dict[str, Any]]:
    """Everything that does not depend on the clock; the model is let go on return."""
    # Stories have any length: they are one cell, under the length they were cut to.
    longest = max(settings.lengths, default=0)
    hits = [
        replace(hit, length=longest) if hit.task == "name_recall" else hit
        for hit in recall(model, examples, batch_size)
    ]
    loss = None
    if text_ids is not None and settings.perplexity_tokens:
        loss = perplexity(
            model,
            text_ids,
            seq_len=settings.seq_len,
            max_tokens=settings.perplexity_tokens,
            batch_size=batch_size,
            bos=tokenizer.bos_token_id,
        )
    return hits, {
        "recall": summarise(hits, depths=_depths(settings.depths)),
        "perplexity": loss,
        "held": cache_bytes_held(model, settings.speed_length, seed),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _complete(
    models: Mapping[str, Source], plans: Mapping[str, Plan | None]
) -> dict[str, Plan | None]:
    """Give models without a plan the identity plan, where any plan tells the geometry."""
    known = next((p for p in plans.values() if p is not None), None)
    identity = full_plan(known.model_type, known.geometry) if known else None
    return {name: plans.get(name) or identity for name in models}


def _planned(
    plan: Plan | None, dtype: str, name: str, notes: list[str], tokens: int, held: int
) -> tuple[CacheBytes, ...]:
    if plan is None:
        return ()
    try:
        said = plan.cache_bytes(tokens, dtype)
        found = cache_bytes_planned(plan, dtype)
    except PlanError as error:  # an evaluation of hours is worth more than one of its columns
        notes.append(f"{escape(name)}: cache bytes are not known: {escape(error)}")
        return ()
    if abs(held - said) > 0.05 * said:
        notes.append(
            f"{escape(name)} really holds {held:,} bytes after {tokens} tokens; its plan says "
            f"{said:,}."
        )
    return found


def _check_settings(settings: Evaluate) -> None:
    for name in ("depths", "examples", "seq_len", "decode_tokens", "speed_length"):
        if getattr(settings, name) < 1:
            raise RecipeError(f"evaluate.{name} is {getattr(settings, name)}; give at least 1.")
    if settings.tasks and (not settings.lengths or min(settings.lengths) < 1):
        raise RecipeError(
            f"evaluate.lengths is {list(settings.lengths)}; give one or more lengths in tokens."
        )


# --- Helpers ------------------------------------------------------------------------------------


@contextmanager
def _inference(model: Model) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the model comes back in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        for module, training in modes:
            module.training = training


def _make(source: Source) -> Model:
    """The model itself, or the one its function makes once the last one is really gone."""
    if isinstance(source, nn.Module):
        return source
    gc.collect()  # modules and their hooks refer to each other in cycles
    return source()


def _vocab_size(model: Model) -> int:
    return int(model.config.get_text_config().vocab_size)


def _random_ids(model: Model, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_vocab_size(model), (1, length), generator=generator)


def _check_finite(values: Sequence[float], what: str) -> None:
    for value in values:
        if not math.isfinite(value):
            raise VerificationFailed(
                f"{what} of the model is {value}: its weights or its dtype overflow. Load it in "
                "float32, or check the checkpoint with `morph verify`."
            )
