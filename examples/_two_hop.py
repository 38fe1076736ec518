"""The two-hop task: who has which treasure, where is which treasure, and where is a person's?

Two facts must be joined to answer: ` The treasure: Lily ring.` and ` The place: ring harbour.` give
`Where is the treasure of Lily? The place: Lily harbour`. The treasure itself is never said in the
question or the answer. Used by `train_two_hop.py`; `two_hop_examples` is what the rest needs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from morph import data
from morph.data import Example
from morph.errors import DataError

TASK = "two_hop"
INTRO = "Some treasures are hidden in this text. Remember them.\n"
OWNER = " The treasure: {name} {thing}."
PLACE = " The place: {thing} {place}."
ASK_OWNER = "\nWhat does {name} own? The treasure: {name}"
ASK_PLACE = "\nWhere is the {thing}? The place: {thing}"
ASK_BOTH = "\nWhere is the treasure of {name}? The place: {name}"

USED = 8  # names, treasures and places that examples draw from: the first ones of each list
NAMES = data.HERO_NAMES[:48]
THINGS = (  # noqa: SIM905
    "ring crown sword knife bottle glass mirror candle clock watch bell lamp pipe box bag basket "
    "book pen map hat stick coat dress ribbon glove shoe letter money picture wheel sugar apple"
).split()
PLACES = (  # noqa: SIM905
    "river garden window table house street church paper bridge castle forest mountain island "
    "ocean harbour village city market kitchen chair door floor wall roof tower road gate field "
    "tree stone fire water"
).split()


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A person, a treasure and a place, with the two facts that join them, as tokens."""

    name: int
    thing: int
    place: int
    owner_fact: tuple[int, ...]
    place_fact: tuple[int, ...]


class Wording:
    """The sentences of the task as tokens; raises DataError where a word is not one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.intro = self._encode(INTRO)
        self.names, self.things, self.places = (
            [self._token(word) for word in words] for words in (NAMES, THINGS, PLACES)
        )
        self._words = {
            self._token(word): word for words in (NAMES, THINGS, PLACES) for word in words
        }
        self._cache: dict[tuple[str, ...], tuple[int, ...]] = {}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _token(self, word: str) -> int:
        ids = self._encode(f" {word}")
        if len(ids) != 1:
            raise DataError(f"the two-hop task needs {word!r} as one token, here it is {len(ids)}")
        return ids[0]

    def say(self, template: str, **words: int) -> tuple[int, ...]:
        """The tokens of a sentence with its words, given as tokens, filled in."""
        key = (template, *map(str, words.values()))
        if key not in self._cache:
            text = template.format(**{field: self._words[token] for field, token in words.items()})
            self._cache[key] = tuple(self._encode(text))
        return self._cache[key]

    def draw(self, count: int, rng: random.Random, words: int = USED) -> list[Chain]:
        """Chains with different names, treasures and places, each from the first `words` words."""
        drawn = [
            rng.sample(tokens[:words], count) for tokens in (self.names, self.things, self.places)
        ]
        return [
            Chain(
                name=name,
                thing=thing,
                place=place,
                owner_fact=self.say(OWNER, name=name, thing=thing),
                place_fact=self.say(PLACE, thing=thing, place=place),
            )
            for name, thing, place in zip(*drawn)
        ]


def two_hop_examples(
    tokenizer: Any,
    haystack_ids: torch.Tensor,
    *,
    length: int,
    depths: Sequence[float],
    count: int,
    seed: int,
    num_chains: int = 4,
) -> list[Example]:
    """Build `count` examples of exactly `length` tokens whose answer takes two lookups.

    `depths` (taken in turn) say where the fact with the answer stands; all other facts stand
    anywhere. Example i depends on seed and i only. Raises DataError where the facts or the text
    do not fit the length.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise DataError(f"depths {list(depths)}: give at least one number in [0, 1]")
    wording = Wording(tokenizer)
    haystack = haystack_ids.tolist()
    return [
        _example(
            wording,
            haystack,
            length,
            float(depths[index % len(depths)]),
            num_chains,
            random.Random(f"{seed}/{TASK}/{index}"),
        )
        for index in range(count)
    ]


def _example(
    wording: Wording,
    haystack: list[int],
    length: int,
    depth: float,
    num_chains: int,
    rng: random.Random,
) -> Example:
    chains = wording.draw(num_chains, rng)
    asked = chains[0]
    facts = [asked.place_fact, asked.owner_fact]
    facts += [fact for chain in chains[1:] for fact in (chain.owner_fact, chain.place_fact)]
    head = [*wording.bos, *wording.intro]
    tail = [*wording.say(ASK_BOTH, name=asked.name), asked.place]
    room = length - len(head) - len(tail) - sum(map(len, facts))
    if room < 0:
        raise DataError(f"the facts and the question need {length - room} tokens, not {length}")
    if len(haystack) < room:
        raise DataError(f"the haystack has {len(haystack)} tokens, length {length} needs {room}")
    start = rng.randrange(len(haystack) - room + 1)
    place = round(depth * room)
    offsets = [place] + [rng.randint(0, room) for _ in facts[1:]]
    before = sum(len(fact) for fact, offset in zip(facts, offsets) if offset < place)
    ids = [*head, *data.hide(haystack[start : start + room], facts, offsets), *tail]
    return Example(
        ids=tuple(ids),
        answer_start=length - 1,
        depth=depth,
        task=TASK,
        length=length,
        choices=tuple(wording.places[:USED]),
        needle_start=len(head) + place + before,
    )
