"""Token batches for training and evaluation: plain text, haystacks with needles, renamed stories.

Everything is built offline from text the caller passes in, and every function is a pure function
of its arguments: the same seed gives the same tokens on every machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from morph.documents import encode as encode
from morph.documents import read_documents as read_documents
from morph.documents import read_text as read_text
from morph.errors import DataError

NEEDLE_TASKS = {
    "single_1": "one number hidden in a sentence repeated over and over",
    "single_2": "one number hidden in running text",
    "single_3": "one long hexadecimal code hidden in running text",
    "multikey": "several numbers under different keys in running text, one of them asked",
}

# The needle tasks follow the format of RULER (arXiv 2404.06654, section 3.1); the wording is ours.
INTRO = "Some secret codes are hidden in this text. Remember them.\n"
NOISE = " The rain is soft. The road is long. The night is quiet. We walk on. The day returns."
STATEMENT = " The secret code: {key} {value}."
QUESTION = "\nWhat is the secret code of {key}? The secret code: {key}"

KEY_WORDS = (  # noqa: SIM905
    "water fire stone river garden window table letter horse summer winter morning evening house "
    "street church doctor money paper music silver golden black white green yellow picture mirror "
    "candle bridge castle forest mountain island ocean harbour village city market kitchen chair "
    "door floor wall roof tower bell clock watch ring crown sword knife bottle glass apple bread "
    "butter sugar coffee dinner supper coat dress ribbon glove shoe boot hat stick lamp pipe box "
    "bag basket book pen ink map road gate field tree flower rose grass leaf bird dog cat cow "
    "sheep goat wolf bear fox lion fish snow rain wind cloud storm thunder moon star sun light"
).split()

# Names of heroes of children's stories; each tokenizer is asked for those it has as one token.
HERO_NAMES = (  # noqa: SIM905
    "Lily Tim Tom Ben Mia Sam Max Sue Anna Jack Lucy Amy Bob John Mary Jane Sara Sarah Jim Dan "
    "Kate Joe Leo Emma Lisa Mark Nick Peter Billy Bobby Timmy Tommy Jill Sally Jenny Molly Ella "
    "Daisy Susie Bella Benny Sammy Spot Fluffy Jimmy Johnny Polly Ellie Alice Kitty Hugo Ivy Oscar"
).split()

NUM_NAMES = 16


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt with its answer.

    `ids` holds prompt and answer tokens, the answer from `answer_start` on; `length` is
    `len(ids)`. `depth` in [0, 1] is where in the text the asked fact stands, `needle_start` the
    position of its first token. `choices` are the candidate tokens of a single-token answer.
    `spans` are (start, stop) of each answer, where there are several; the first starts the answer.
    """

    ids: tuple[int, ...]
    answer_start: int
    depth: float
    task: str
    length: int
    choices: tuple[int, ...] = ()
    needle_start: int = -1
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def answer(self) -> tuple[int, ...]:
        """The answer tokens."""
        return self.ids[self.answer_start :]


@dataclass(frozen=True, kw_only=True)
class Needle:
    """One fact to hide and to ask for, as tokens; `question` ends right before the answer."""

    key: str
    statement: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


# --- Text ---------------------------------------------------------------------------------------


def token_ids(tokenizer: Any, text: str) -> torch.LongTensor:
    """Encode a text without special tokens: LongTensor `[N]`."""
    return torch.tensor(encode(tokenizer, text), dtype=torch.long)


class TextBatches:
    """Windows of a text, read in epochs; each batch is a pure function of seed and step.

    An epoch cuts the text into windows that do not overlap, from an offset of its own, and takes
    them in an order of its own: every token is read once before any of that epoch comes again.
    The windows of an epoch leave out fewer than two windows of tokens, at the two ends of the
    text, and other ones each time. A run that resumes needs to know its step and nothing else;
    what is held is one epoch's order. With `bos` every row starts with that token. Raises
    DataError where the text is shorter than one row.
    """

    def __init__(
        self, ids: torch.Tensor, batch_size: int, seq_len: int, seed: int, bos: int | None = None
    ) -> None:
        self._take = take = seq_len - (bos is not None)
        if batch_size < 1 or take < 1:
            raise DataError(
                f"batch_size {batch_size} and seq_len {seq_len}: both must be at least"
                " 1 (2 tokens a row with BOS)"
            )
        if len(ids) < take:
            raise DataError(
                f"the text has {len(ids)} tokens, one row of {seq_len} needs {take}; pass a"
                " longer text or a smaller seq_len"
            )
        self.ids, self.batch_size, self.seq_len = ids, batch_size, seq_len
        self.seed, self.bos = seed, bos
        # One window fewer than would fit, so that every offset has as many: steps say the epoch
        self.windows = max(1, (len(ids) - take + 1) // take)
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> torch.LongTensor:
        """The batch of one step: LongTensor `[B, T]`."""
        first = step * self.batch_size
        starts = [self._start(row) for row in range(first, first + self.batch_size)]
        rows = torch.stack([self.ids[start : start + self._take] for start in starts])
        if self.bos is not None:
            rows = torch.cat([rows.new_full((self.batch_size, 1), self.bos), rows], dim=1)
        return rows

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self.windows)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = int(rng.integers(len(self.ids) - self.windows * self._take + 1))
            self._epoch = epoch, offset + self._take * rng.permutation(self.windows)
        return int(self._epoch[1][place])


# --- Needles ------------------------------------------------------------------------------------


def draw_needles(
    task: str,
    tokenizer: Any,
    count: int,
    rng: random.Random,
    *,
    num_digits: int = 4,
    code_groups: Sequence[int] = (4, 4),
    words: Sequence[str] = KEY_WORDS,
) -> list[Needle]:
    """Draw facts with different keys and fresh values.

    Values are numbers of `num_digits` digits; for `single_3` codes such as `3f9a-07bc`, one
    hexadecimal group per entry of `code_groups`. Raises DataError with fewer words than needles.
    """
    if count < 1 or num_digits < 1 or min(code_groups, default=0) < 1:
        raise DataError(
            f"{count} needles of {num_digits} digits (groups {list(code_groups)}):"
            " each must be at least 1"
        )
    if count > len(words):
        raise DataError(f"{count} needles need {count} different keys, there are {len(words)}")
    needles = []
    for key in rng.sample(list(words), count):
        if task == "single_3":
            value = "-".join("".join(rng.choices("0123456789abcdef", k=n)) for n in code_groups)
        else:
            value = "".join(rng.choices("0123456789", k=num_digits))
        needles.append(_needle(tokenizer, key, value))
    return needles


def _needle(tokenizer: Any, key: str, value: str) -> Needle:
    question = QUESTION.format(key=key)
    # Some tokenizers give the space before the value its own token, others merge the two: the
    # answer is what the value adds to the question, so the common prefix decides.
    head = encode(tokenizer, question + " ")
    full = encode(tokenizer, f"{question} {value}")
    start = common_prefix([head, full])
    return Needle(
        key=key,
        statement=tuple(encode(tokenizer, STATEMENT.format(key=key, value=value))),
        question=tuple(full[:start]),
        answer=tuple(full[start:]),
    )


def hide(haystack: Sequence[int], pieces: Sequence[Sequence[int]], offsets: Sequence[int]) -> list:
    """Insert each piece before the haystack token at its offset; pieces keep the order given."""
    out: list[int] = []
    done = 0
    for offset, piece in sorted(zip(offsets, pieces), key=lambda pair: pair[0]):
        out += haystack[done:offset]
        out += piece
        done = offset
    return out + list(haystack[done:])


def needle_examples(
    task: str,
    tokenizer: Any,
    haystack_ids: torch.Tensor | None,
    *,
    length: int,
    depths: Sequence[float],
    count: int,
    seed: int,
    num_keys: int = 4,
    num_digits: int = 4,
    code_groups: Sequence[int] = (4, 4),
    words: Sequence[str] = KEY_WORDS,
) -> list[Example]:
    """Build `count` examples of exactly `length` tokens, the depths taken in turn.

    `task` is a name of NEEDLE_TASKS. `haystack_ids` `[N]` is the text to hide in (not used by
    `single_1`). Example i depends on seed, task and i only, never on `count`. `num_keys` is the
    number of needles of `multikey`. Raises DataError where needles or text do not fit the length.
    """
    if task not in NEEDLE_TASKS:
        raise DataError(f"unknown needle task {task!r}; there are {', '.join(NEEDLE_TASKS)}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise DataError(f"depths {list(depths)}: give at least one number in [0, 1]")
    if task == "single_1":
        noise = encode(tokenizer, NOISE)
        haystack = noise * (length // len(noise) + 2)
    elif haystack_ids is None:
        raise DataError(f"needle task {task!r} needs a text to hide in")
    else:
        haystack = haystack_ids.tolist()
    draw = {"num_digits": num_digits, "code_groups": code_groups, "words": words}
    examples = []
    for index in range(count):
        rng = random.Random(f"{seed}/{task}/{index}")
        needles = draw_needles(task, tokenizer, num_keys if task == "multikey" else 1, rng, **draw)
        depth = float(depths[index % len(depths)])
        examples.append(_needle_example(task, tokenizer, haystack, needles, length, depth, rng))
    return examples


def _needle_example(
    task: str,
    tokenizer: Any,
    haystack: list[int],
    needles: list[Needle],
    length: int,
    depth: float,
    rng: random.Random,
) -> Example:
    asked, others = needles[0], needles[1:]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    intro = bos + encode(tokenizer, INTRO)
    tail = [*asked.question, *asked.answer]
    room = length - len(intro) - len(tail) - sum(len(needle.statement) for needle in needles)
    if room < 0:
        raise DataError(
            f"{len(needles)} needle(s) and the question need {length - room} tokens,"
            f" length is {length}; set select.seq_len, evaluate.lengths, training.probe_length or"
            f" the seq_len of the stage to at least {length - room}"
        )
    if len(haystack) < room:
        raise DataError(
            f"the haystack has {len(haystack)} tokens, length {length} needs {room};"
            " pass a longer text or a smaller length"
        )
    # The repeated sentence starts at its beginning, running text anywhere.
    start = 0 if task == "single_1" else rng.randrange(len(haystack) - room + 1)
    place = round(depth * room)
    offsets = [place] + [rng.randint(0, room) for _ in others]
    order = [asked, *others]
    context = hide(haystack[start : start + room], [needle.statement for needle in order], offsets)
    # Needles at the same offset keep their order, so only strictly earlier ones stand before.
    before = sum(len(n.statement) for n, offset in zip(others, offsets[1:]) if offset < place)
    ids = intro + context + tail
    return Example(
        ids=tuple(ids),
        answer_start=len(ids) - len(asked.answer),
        depth=depth,
        task=task,
        length=len(ids),
        needle_start=len(intro) + place + before,
    )


# --- Names in stories ---------------------------------------------------------------------------


def hero_tokens(tokenizer: Any, candidates: Sequence[str] = HERO_NAMES) -> dict[str, int]:
    """Up to 16 hero names, each with its first token; all tokens differ.

    Names that are one token win. A tokenizer with fewer than 16 of those is given, in addition,
    names of several tokens whose first token tells them from all others.
    """
    found: dict[str, int] = {}
    before = encode(tokenizer, "and ")
    first = {}
    for name in candidates:
        ids = encode(tokenizer, f"and {name} went")
        first[name] = ids[common_prefix([ids, before])]
    for single in (True, False):
        for name, token in first.items():
            text = tokenizer.decode([token]).strip()
            # A token that holds more than the name, or none of it, cannot stand for the name.
            fits = text == name if single else text and name.startswith(text)
            if fits and token not in found.values() and len(found) < NUM_NAMES:
                found[name] = token
    return found


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix."""
    shared = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def name_recall_examples(
    stories: Sequence[str],
    tokenizer: Any,
    *,
    count: int,
    seed: int,
    min_distance: int = 48,
    max_length: int = 512,
) -> list[Example]:
    """Stories cut before the last mention of their renamed hero: which of 16 names comes next?

    The hero gets a name drawn from `hero_tokens`, whose tokens are the `choices`; the answer is
    one of them. Kept are stories whose previous mention stands at least `min_distance` tokens
    back, all within `max_length` tokens. Raises DataError where names or stories do not suffice.
    """
    names = hero_tokens(tokenizer)
    if len(names) < NUM_NAMES // 2:
        raise DataError(
            f"name recall needs {NUM_NAMES // 2} names that differ in their first"
            f" token, this tokenizer has {len(names)}"
        )
    examples: list[Example] = []
    order = list(range(len(stories)))
    random.Random(f"{seed}/stories").shuffle(order)
    # A story may come again under another name once all have been used.
    for turn in range(NUM_NAMES):
        before = len(examples)
        for index in order:
            if len(examples) == count:
                return examples
            rng = random.Random(f"{seed}/{index}/{turn}")
            example = _name_example(stories[index], tokenizer, names, rng, min_distance, max_length)
            if example is not None:
                examples.append(example)
        if len(examples) == before:
            break
    if len(examples) < count:
        raise DataError(
            f"{len(stories)} stories gave {len(examples)} name questions with the name"
            f" {min_distance} or more tokens back, {count} were asked for; give more whole stories"
            " (a .json list or .jsonl: a .txt file is one document), or ask for fewer examples"
        )
    return examples


def _name_example(
    story: str,
    tokenizer: Any,
    names: dict[str, int],
    rng: random.Random,
    min_distance: int,
    max_length: int,
) -> Example | None:
    words = re.findall(r"[A-Za-z]+", story)
    hero = max(HERO_NAMES, key=words.count)
    free = [name for name in names if name == hero or name not in words]
    if words.count(hero) < 2 or not free:
        return None
    name = rng.choice(free)
    renamed = re.sub(rf"\b{hero}\b", name, story)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    full = encode(tokenizer, renamed)
    # Where a mention starts in tokens: what the text before it and the whole have in common.
    mentions = [
        len(bos) + common_prefix([full, encode(tokenizer, renamed[: match.start()])])
        for match in re.finditer(rf"\b{name}\b", renamed)
    ]
    ids = bos + full
    mentions = [position for position in mentions if position < min(max_length, len(ids))]
    if len(mentions) < 2 or mentions[-1] - mentions[-2] < min_distance:
        return None
    last = mentions[-1]
    if ids[last] != names[name]:
        return None
    return Example(
        ids=tuple(ids[: last + 1]),
        answer_start=last,
        depth=mentions[-2] / last,
        task="name_recall",
        length=last + 1,
        choices=tuple(names.values()),
        needle_start=mentions[-2],
    )
