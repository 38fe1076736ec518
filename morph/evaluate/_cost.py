"""Cache bytes, held and planned, and speed, with several models in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from morph import surgery
from morph.cache import held_bytes
from morph.evaluate._common import Model, Source, inference, make, random_ids
from morph.evaluation import CacheBytes, Speed
from morph.plan import Plan, full_plan

CACHE_LENGTHS = (1024, 32 * 1024, 128 * 1024)


def cache_bytes_held(model: Model, seq_len: int, seed: int = 0) -> int:
    """Return the bytes of generation state that a prefill of `seq_len` random tokens leaves."""
    with inference(model) as device:
        ids = random_ids(model, seq_len, seed).to(device)
        return held_bytes(model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)


def cache_bytes_planned(
    plan: Plan, dtype: str, lengths: Sequence[int] = CACHE_LENGTHS
) -> tuple[CacheBytes, ...]:
    """Return what a plan says it holds at each length, beside the source's full attention."""
    whole = full_plan(plan.model_type, plan.geometry)
    found = [(n, plan.cache_bytes(n, dtype), whole.cache_bytes(n, dtype)) for n in lengths]
    return tuple(
        CacheBytes(tokens=n, bytes=b, ratio=b / full, read=surgery.decode_bytes(plan, n, dtype))
        for n, b, full in found
    )


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
    medians = {name: tuple(map(statistics.median, zip(*rows))) for name, rows in times.items()}
    first = next(iter(medians.values()), ())
    return {
        name: Speed(
            length=length,
            decode_tokens=decode_tokens,
            rounds=rounds,
            prefill_tokens_per_second=length / prefill,
            decode_tokens_per_second=decode_tokens / decode,
            prefill_cpu_seconds=prefill_cpu,
            decode_cpu_seconds=decode_cpu,
            prefill_ratio=first[0] / prefill,
            decode_ratio=first[1] / decode,
        )
        for name, (prefill, decode, prefill_cpu, decode_cpu) in medians.items()
    }


def _turn(source: Source, length: int, decode_tokens: int, seed: int) -> tuple[float, ...]:
    model = make(source)
    _once(model, min(length, 16), 1, seed)  # first calls compile and allocate
    return _once(model, length, decode_tokens, seed)


def _once(model: Model, length: int, decode_tokens: int, seed: int) -> tuple[float, ...]:
    """Wall seconds of prefill and of decode, then the same in CPU seconds."""
    with inference(model) as device:
        ids = random_ids(model, length + decode_tokens, seed).to(device)
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
