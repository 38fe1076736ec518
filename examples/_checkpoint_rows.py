"""What the embedded checkpoint is trained on: its tokenizer, the curriculum and the rows of it.

Used by `train_checkpoint.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from morph import data

NOISE, TEXT, ANSWER, REPEAT = 0, 1, 2, 3  # what a token is to the loss
KINDS = {TEXT: "text", ANSWER: "answer", REPEAT: "repeat"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the curriculum: `steps` steps of `rows` sequences of `length` tokens."""

    steps: int
    rows: int
    length: int
    num_words: int  # how many distinct keys are in use
    num_keys: tuple[int, int]  # needles in one sequence, from and to
    repeat: float = 0.0  # part of the rows that repeat random segments
    text: float = 0.0  # part of the rows that are plain text
    text_part: float = 0.5  # part of the text tokens that enter the loss
    # One of these for each layer that does not see everything, at most a quarter of the row.
    windows: tuple[int, ...] = (64,)
    far: float = 0.7  # part of the steps in which only the far layers see past the window
    rate: float = 1.0  # part of the peak learning rates
    local: float = 0.0  # part of the steps that are plain text, the window in every layer


# Each phase has its own rise and fall of the learning rate: recall forms on short sequences,
# then it is carried to long ones.
PHASES = {
    "qwen3": (
        (
            Stage(
                steps=200,
                rows=16,
                length=64,
                num_words=16,
                num_keys=(1, 1),
                repeat=1.0,
                text_part=0.25,
            ),
            Stage(
                steps=200,
                rows=16,
                length=128,
                num_words=16,
                num_keys=(2, 4),
                repeat=0.25,
                text_part=0.25,
            ),
        ),
        (
            Stage(steps=100, rows=8, length=256, num_words=128, num_keys=(2, 6), text=0.1),
            Stage(
                steps=150, rows=4, length=512, num_words=128, num_keys=(2, 10), text=0.2, local=0.1
            ),
            Stage(
                steps=700, rows=2, length=1024, num_words=128, num_keys=(2, 16), text=0.2, local=0.2
            ),
        ),
    ),
    # Wide windows in a row can pass a segment on without any lookup, narrow ones alone teach
    # "the previous token" in a way that fails as soon as more can be seen: so they are mixed.
    "llama": (
        (
            Stage(
                steps=150,
                rows=32,
                length=48,
                num_words=8,
                num_keys=(1, 1),
                repeat=1.0,
                windows=(2, 4, 8),
                far=1.0,
            ),
            Stage(
                steps=200,
                rows=12,
                length=128,
                num_words=32,
                num_keys=(2, 4),
                repeat=0.2,
                text_part=0.1,
                windows=(2, 4, 8, 16),
                far=0.8,
                rate=0.7,
            ),
        ),
        (
            Stage(
                steps=100,
                rows=8,
                length=192,
                num_words=128,
                num_keys=(2, 5),
                windows=(8, 16, 32),
                text_part=0.25,
                rate=0.4,
            ),
            Stage(
                steps=200,
                rows=4,
                length=384,
                num_words=128,
                num_keys=(2, 8),
                text=0.2,
                local=0.1,
                rate=0.4,
            ),
        ),
        # A second rise: after the first fall 0.64 of the numbers were recalled.
        (
            Stage(
                steps=250,
                rows=4,
                length=256,
                num_words=128,
                num_keys=(3, 8),
                text=0.1,
                far=0.6,
                rate=0.4,
            ),
        ),
    ),
}


def schedule(arch: str) -> list[tuple[Stage, float]]:
    """Stage and learning-rate factor of every step.

    Within a phase: 20 steps up, then constant, over the last third down to a twentieth.
    """
    plan = []
    for phase in PHASES[arch]:
        stages = [stage for stage in phase for _ in range(stage.steps)]
        total = len(stages)
        for step, stage in enumerate(stages):
            fall = 0.05 + 0.95 * (total - step) / (total / 3)
            plan.append((stage, stage.rate * min(1.0, (step + 1) / 20, fall)))
    return plan


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits stand alone; the words of the needle tasks are single tokens.

    A digit takes the space before it along (` 4` `8` `2` `1`), so that a number starts right after
    the word before it.
    """
    tokenizer = Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The keys are repeated until merging them pays more than merging any rare word of the novels.
    words = [data.STATEMENT.format(key=key, value=len(key)) for key in data.KEY_WORDS] * 200
    words += [f" {digit}" for digit in range(10)] * 1000
    tokenizer.train_from_iterator([*texts, *words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Rows:
    """Draws training rows of one stage; a pure function of seed and step."""

    def __init__(self, tokenizer, text_ids: torch.Tensor, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.text = text_ids.tolist()
        self.bos = tokenizer.bos_token_id
        self.intro = tokenizer.encode(data.INTRO, add_special_tokens=False)

        def one(text: str) -> int:
            (token,) = tokenizer.encode(text, add_special_tokens=False)
            return token

        digits = [one(f"{space}{digit}") for space in ("", " ") for digit in range(10)]
        self.alphabet = digits + [one(f" {word}") for word in data.KEY_WORDS]
        self.end = tokenizer.encode(".", add_special_tokens=False)

    def batch(self, stage: Stage, step: int):
        """Token ids and their kinds (NOISE, TEXT, REPEAT, ANSWER), both `[B, T]`."""
        rng = random.Random(f"{self.seed}/{step}")
        rows = []
        for _ in range(stage.rows):
            kind = rng.random()
            if kind < stage.repeat:
                rows.append(self.repeated(stage.length, self.alphabet[: stage.num_words + 20], rng))
            elif kind < stage.repeat + stage.text:
                rows.append(self.plain(stage.length, rng))
            else:
                rows.append(self.needles(stage, rng))
        ids, kinds = zip(*rows)
        return torch.tensor(ids), torch.tensor(kinds)

    def cut(self, length: int, rng: random.Random) -> list[int]:
        start = rng.randrange(len(self.text) - length + 1)
        return self.text[start : start + length]

    def plain(self, length: int, rng: random.Random):
        return [self.bos, *self.cut(length - 1, rng)], [TEXT] * length

    def repeated(self, length: int, alphabet: list[int], rng: random.Random):
        """Random tokens said again and again: the second time on, every token can be known."""
        size = rng.randint(length // 8, min(length // 2, len(alphabet)))
        segment = rng.sample(alphabet, size)
        ids = [self.bos, *(segment * (length // size + 1))][:length]
        return ids, [REPEAT if i > size + 1 else NOISE for i in range(length)]

    def needles(self, stage: Stage, rng: random.Random):
        """Facts strewn in text, then a question for each: the sentences of `needle_examples`."""
        words = data.KEY_WORDS[: stage.num_words]
        task = "single_3" if rng.random() < 0.1 else "multikey"
        needles = data.draw_needles(
            task, self.tokenizer, rng.randint(*stage.num_keys), rng, words=words
        )
        asked = rng.sample(needles, len(needles))
        tail: list[int] = []
        kinds: list[int] = []
        for number, needle in enumerate(asked):
            if number:
                tail += self.end
                kinds += [TEXT]
            tail += [*needle.question, *needle.answer]
            kinds += [TEXT] * len(needle.question) + [ANSWER] * len(needle.answer)
        statements = [needle.statement for needle in needles]
        room = stage.length - 1 - len(self.intro) - len(tail) - sum(map(len, statements))
        if room < 0:
            smaller = replace(stage, num_keys=(1, max(1, len(needles) - 1)))
            return self.needles(smaller, rng)
        haystack = self.cut(room, rng) if room else []
        offsets = [rng.randint(0, room) for _ in statements]
        context = data.hide(haystack, statements, offsets)
        ids = [self.bos, *self.intro, *context, *tail]
        return ids, [TEXT] * (len(ids) - len(tail)) + kinds
