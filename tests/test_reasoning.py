"""Problems to tune on: right solutions, none on both sides, and what greedy decoding writes."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from morph import data, evaluate
from morph.errors import DataError
from morph.reasoning import (
    REASONING_TASKS,
    is_held_out,
    problem,
    reasoning_examples,
    reasoning_row,
    tokens_of,
)

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "checkpoint"
TASKS = list(REASONING_TASKS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def about(found) -> tuple[str, ...]:
    """What a problem is about, read from its text alone."""
    if found.task == "sums":
        return tuple(re.findall(r"\d", found.question))
    boxes = dict(re.findall(r"The (\w+) is in the (\w+)\.", found.question))
    chain = [re.search(r"Where is the (\w+)\?", found.question)[1]]
    while chain[-1] in boxes:
        chain.append(boxes[chain[-1]])
    return tuple(chain)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_solution_follows_from_the_question(task, held_out):
    for index in range(200):
        found = problem(task, index, seed=3, held_out=held_out)
        steps, said = found.solution.split(" The answer is ")
        things = about(found)
        if task == "sums":
            total, shown = int(things[0]), []
            for term in things[1:]:
                shown.append(f" {total} and {term} is {(total + int(term)) % 10}.")
                total = (total + int(term)) % 10
            assert steps == "".join(shown)
            answer = str(sum(map(int, things)) % 10)
        else:
            assert re.findall(r"\w+(?=\.)", steps) == list(things[1:])
            answer = things[-1]
        assert said == f"{answer}."
        assert found.answer == answer


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_both_trained_on_and_held_out(task):
    trained = {about(problem(task, i, seed=s, held_out=False)) for s in (0, 1) for i in range(1500)}
    held = {about(problem(task, i, seed=s, held_out=True)) for s in (0, 1) for i in range(1500)}
    assert trained.isdisjoint(held)
    assert len(held) > 500
    assert all(is_held_out(x) for x in held)
    assert not any(is_held_out(x) for x in trained)


def test_a_problem_depends_on_its_numbers_only():
    first = [problem("lookups", i, seed=0, held_out=True) for i in range(5)]
    assert first == [problem("lookups", i, seed=0, held_out=True) for i in range(5)]
    assert first != [problem("lookups", i, seed=1, held_out=True) for i in range(5)]
    assert len({p.question for p in first}) == 5


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(DataError, match=r"'sum'. Did you mean sums\?|sums"):
        problem("sum", 0, seed=0, held_out=True)


@pytest.mark.parametrize("tasks", [["sums"], ["lookups"], ["sums", "lookups"]])
def test_rows_hold_whole_problems_and_label_their_solutions(tokenizer, tasks):
    for number in range(20):
        row = reasoning_row(tokenizer, tasks, 128, seed=0, row=number)
        columns = row.ids, row.labels, row.positions, row.real
        assert {len(c) for c in columns} == {128}
        starts = [i for i, p in enumerate(row.positions) if p == 0 and row.real[i]]
        ends = [*starts[1:], row.real.index(False) if False in row.real else 128]
        for first, last in zip(starts, ends):
            ids = row.ids[first:last]
            assert row.positions[first:last] == list(range(last - first))
            assert ids[0] == tokenizer.bos_token_id
            text = tokenizer.decode(ids[1:])
            learnt = [t for t, label in zip(ids, row.labels[first:last]) if label != -100]
            assert learnt == [x for x in row.labels[first:last] if x != -100]
            solution = text.split("?", 1)[1] if "?" in text else text.split(".", 1)[1]
            assert solution.endswith(".")
            assert tokenizer.decode(learnt) == solution
        assert not any(row.real[ends[-1] :])
        assert set(row.labels[ends[-1] :]) <= {-100}


def test_no_problem_is_longer_than_a_row_of_128(tokenizer):
    for task in TASKS:
        made = [problem(task, i, seed=0, held_out=True) for i in range(300)]
        assert max(len(tokens_of(tokenizer, p)[0]) for p in made) <= 128


def test_rows_differ_and_are_made_alone(tokenizer):
    rows = [reasoning_row(tokenizer, TASKS, 128, seed=0, row=n).ids for n in range(10)]
    assert len({tuple(r) for r in rows}) == 10
    assert reasoning_row(tokenizer, TASKS, 128, seed=0, row=7).ids == rows[7]


def test_a_row_that_holds_no_problem_says_how_long_it_must_be(tokenizer):
    with pytest.raises(DataError, match=r"a row 20: raise finetune.seq_len to at least \d\d"):
        reasoning_row(tokenizer, ["lookups"], 20, seed=0, row=0)


class Remembers(torch.nn.Module):
    """A model that goes on as the texts it was given do, and says 0 elsewhere."""

    def __init__(self, texts, vocab):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.next = {tuple(t[:n]): t[n] for t in texts for n in range(1, len(t))}
        self.vocab = vocab
        self.config = types.SimpleNamespace(get_text_config=lambda: None)

    def forward(self, input_ids, logits_to_keep=None, use_cache=False):
        rows = input_ids.tolist()
        keep = range(len(rows[0])) if logits_to_keep is None else logits_to_keep.tolist()
        logits = torch.zeros(len(rows), len(keep), self.vocab)
        for r, row in enumerate(rows):
            for c, at in enumerate(keep):
                logits[r, c, self.next.get(tuple(row[: at + 1]), 0)] = 1.0
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("task", TASKS)
def test_right_means_that_greedy_decoding_writes_the_solution(tokenizer, task):
    examples = reasoning_examples(tokenizer, task, count=12, seed=0)
    texts = []
    for i, example in enumerate(examples):
        ids = list(example.ids)
        if i % 3:  # wrong at a place of its own, first, last or between
            at = example.answer_start + (i * 7) % len(example.answer)
            ids[at] = (ids[at] + 1) % len(tokenizer)
        texts.append(ids)
    model = Remembers(texts, len(tokenizer))
    for example, hit in zip(examples, evaluate.recall(model, examples)):
        written = list(example.ids[: example.answer_start])
        while len(written) < len(example.ids):
            written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
        assert hit.correct == (tuple(written) == example.ids)
        text = tokenizer.decode(example.answer)
        assert text.endswith(f" {problem(task, hit.example, seed=0, held_out=True).answer}.")
        assert data.encode(tokenizer, text.strip())
