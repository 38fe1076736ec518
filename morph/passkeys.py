"""Passkeys strewn in a text, all asked for at the end: the task of FlashMorph and DuoAttention.

A pure function of its arguments, as everything in `data`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch

from morph.data import Example, common_prefix, encode, hide
from morph.errors import DataError

PASSKEY = "\n\nRemember the {nth} passkey: {words}.\n\n"
ASK_PASSKEY = "\n\nWhich is the {nth} passkey? The {nth} passkey:"
NTH = "first second third fourth fifth sixth seventh eighth ninth tenth".split()  # noqa: SIM905
RADIO = (  # noqa: SIM905
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()


@dataclass(frozen=True, kw_only=True)
class Passkeys:
    """How the passkey task is made: `keys` facts of `words` radio words each, all asked at the end.

    `label_span` `answer` scores the passkeys alone, `tail` the questions between them too. Lengths
    are `intervals` equally spaced ones, from half the longest on.
    """

    keys: int = 10
    words: int = 32
    label_span: Literal["answer", "tail"] = "answer"
    intervals: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.keys <= len(NTH) or self.words < 1 or self.intervals < 1:
            raise DataError(
                f"passkeys: keys is {self.keys}, words {self.words}, intervals {self.intervals}; "
                f"keys lie in 1-{len(NTH)}, the others are at least 1."
            )


def passkey_examples(
    tokenizer: Any,
    haystack_ids: torch.Tensor,
    *,
    length: int,
    count: int,
    seed: int,
    options: Passkeys | None = None,
) -> list[Example]:
    """Build examples of at most `length` tokens: passkeys strewn in a text, all asked for later.

    The recipe of DuoAttention's training data (arXiv 2410.10819, section 3.1 and its code), which
    FlashMorph describes too; the wording is ours. Depths are distinct, of 1000 between 0.05 and
    0.95. Example i depends on seed and i only. Raises DataError where it does not fit the length.
    """
    asked = options or Passkeys()
    haystack = haystack_ids.tolist()
    found = []
    for index in range(count):
        rng = random.Random(f"{seed}/passkeys/{index}")
        step = index % asked.intervals
        share = 1.0 if asked.intervals == 1 else 0.5 + 0.5 * step / (asked.intervals - 1)
        found.append(_passkey_example(tokenizer, haystack, round(length * share), asked, rng))
    return found


def _passkey_example(
    tokenizer: Any, haystack: list[int], length: int, asked: Passkeys, rng: random.Random
) -> Example:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    facts, tail, spans = [], list[int](), []
    for nth in NTH[: asked.keys]:
        words = " ".join(rng.choices(RADIO, k=asked.words))
        facts.append(encode(tokenizer, PASSKEY.format(nth=nth, words=words)))
        question = ASK_PASSKEY.format(nth=nth)
        full = encode(tokenizer, f"{question} {words}")
        start = common_prefix([encode(tokenizer, question + " "), full])
        spans.append((len(tail) + start, len(tail) + len(full)))
        tail += full
    room = length - len(bos) - len(tail) - sum(map(len, facts))
    if room < 0 or len(haystack) < room:
        need = length - room
        raise DataError(
            f"{asked.keys} passkeys of {asked.words} words and their questions need {need} tokens, "
            f"the shortest example has {length} and the text {len(haystack)}: raise select.seq_len "
            f"to at least {need * min(2, asked.intervals)}, or lower select.task_options.keys or "
            ".words."
        )
    depths = sorted(rng.sample(range(1000), asked.keys))
    start = rng.randrange(len(haystack) - room + 1)
    offsets = [round((0.05 + 0.9 * d / 999) * room) for d in depths]
    ids = bos + hide(haystack[start : start + room], facts, offsets)
    at = len(ids)
    placed = tuple((at + a, at + b) for a, b in spans)
    if asked.label_span == "tail":
        placed = ((placed[0][0], at + len(tail)),)
    return Example(
        ids=tuple(ids + tail),
        answer_start=placed[0][0],
        depth=0.05 + 0.9 * depths[0] / 999,
        task="passkeys",
        length=at + len(tail),
        needle_start=len(bos) + offsets[0],
        spans=placed,
    )
