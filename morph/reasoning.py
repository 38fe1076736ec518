"""Short problems with their solutions written out: what a hybrid is tuned on, to see what it loses.

The text is far shorter than what recall needs, every step follows from what stands close before
it, and the last sentence can be checked. A pure function of its arguments, as everything in `data`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from morph.data import KEY_WORDS, Example, common_prefix, encode
from morph.errors import DataError, nearest

REASONING_TASKS = {
    "sums": "numbers of one digit added one by one, of each sum the last digit",
    "lookups": "where a thing is, from box to box; other boxes stand beside them",
}
HELD_OUT = 5  # one problem in so many is never trained on
TERMS = (3, 5)  # numbers in a sum, from and to
HOPS = 3  # boxes that a thing is followed through
_TRIES = 1000
_IGNORED = -100  # the label of tokens that are not supervised, as in transformers


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question and the only right text after it; `answer` is the last word of `solution`."""

    task: str
    question: str
    solution: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """Problems packed into one row of tokens: lists of one length.

    `labels` are the ids of solutions, -100 elsewhere; `positions` count from 0 in every problem;
    `real` is False for the padding at the end.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    real: list[bool]


def problem(task: str, index: int, *, seed: int, held_out: bool) -> Problem:
    """Return problem `index` of those that are trained on, or of those that are held out.

    The two share no problem: what it is about, not its number, decides where it belongs. Problem i
    depends on seed, task and i only. Raises DataError for an unknown task.
    """
    if task not in REASONING_TASKS:
        raise DataError(
            f"unknown reasoning task {task!r}.{nearest(task, REASONING_TASKS)} "
            f"There are: {', '.join(REASONING_TASKS)}."
        )
    rng = random.Random(f"{seed}/{task}/{'held out' if held_out else 'trained'}/{index}")
    make = _sum if task == "sums" else _lookup
    for _ in range(_TRIES):
        found, about = make(rng)
        if is_held_out(about) == held_out:
            return found
    raise DataError(f"no problem of {task} was found in {_TRIES} draws")


def is_held_out(about: Sequence[str]) -> bool:
    """Return whether a problem about these terms, or this chain of things, is never trained on."""
    digest = hashlib.sha256(" ".join(about).encode()).digest()
    return digest[0] % HELD_OUT == 0


def _sum(rng: random.Random) -> tuple[Problem, list[str]]:
    terms = [rng.randrange(10) for _ in range(rng.randint(*TERMS))]
    total, steps = terms[0], ""
    for term in terms[1:]:
        steps += f" {total} and {term} is {(total + term) % 10}."
        total = (total + term) % 10
    words = [str(term) for term in terms]
    found = Problem(
        task="sums",
        question=f" Add {' and '.join(words)}.",
        solution=f"{steps} The answer is {total}.",
        answer=str(total),
    )
    return found, words


def _lookup(rng: random.Random) -> tuple[Problem, list[str]]:
    words = rng.sample(KEY_WORDS, 2 * HOPS + 2)
    asked, other = words[: HOPS + 1], words[HOPS + 1 :]
    facts = [*pairwise(asked), *pairwise(other)]
    shown = "".join(f" The {a} is in the {b}." for a, b in rng.sample(facts, len(facts)))
    steps = "".join(f" The {a} is in the {b}." for a, b in pairwise(asked))
    found = Problem(
        task="lookups",
        question=f"{shown} Where is the {asked[0]}?",
        solution=f"{steps} The answer is {asked[-1]}.",
        answer=asked[-1],
    )
    return found, asked


def tokens_of(tokenizer: Any, given: Problem) -> tuple[list[int], int]:
    """Return the tokens of a problem, BOS first where there is one, and where its solution starts.

    Where the tokenizer joins the end of the question with what follows, the solution starts there.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    full = encode(tokenizer, given.question + given.solution)
    return bos + full, len(bos) + common_prefix([encode(tokenizer, given.question), full])


def reasoning_examples(tokenizer: Any, task: str, *, count: int, seed: int) -> list[Example]:
    """Return `count` held-out problems as examples whose answer is the whole solution.

    There is one right solution, so all its tokens are first choices, given those before, exactly
    where greedy decoding writes it. Depth is 0. Raises DataError for an unknown task.
    """
    found = []
    for index in range(count):
        ids, start = tokens_of(tokenizer, problem(task, index, seed=seed, held_out=True))
        found.append(
            Example(ids=tuple(ids), answer_start=start, depth=0.0, task=task, length=len(ids))
        )
    return found


def reasoning_row(tokenizer: Any, tasks: Sequence[str], length: int, *, seed: int, row: int) -> Row:
    """Return row `row` of training: whole problems, the tasks in turn, until the next is too long.

    Every row has `length` tokens. Raises DataError where one problem alone is longer.
    """
    ids, labels, positions = list[int](), list[int](), list[int]()
    number = 0
    while True:
        task = tasks[(row + number) % len(tasks)]
        made = problem(task, row * length + number, seed=seed, held_out=False)
        more, start = tokens_of(tokenizer, made)
        if len(ids) + len(more) > length:
            break
        ids += more
        labels += [_IGNORED] * start + more[start:]
        positions += range(len(more))
        number += 1
    if not ids:
        raise DataError(
            f"a problem of {task} has {len(more)} tokens and a row {length}: raise "
            f"finetune.seq_len to at least {len(more)}"
        )
    room = length - len(ids)
    pad = ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return Row(
        ids=ids + [pad] * room,
        labels=labels + [_IGNORED] * room,
        positions=[*positions, *range(room)],
        real=[True] * len(ids) + [False] * room,
    )
