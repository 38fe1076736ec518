"""Tests of morph.data: text files, text batches, needles, names in stories."""

import json
from itertools import pairwise

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from morph import data
from morph.errors import DataError

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
NOVEL = " ".join(f"It was the {word} of all days, said the man by the {word}, and left." for word in
                 data.KEY_WORDS * 8)  # fmt: skip


def build_tokenizer(bos: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = " ".join(data.HERO_NAMES)
    tokenizer.train_from_iterator([NOVEL, f"so {names} " * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


@pytest.fixture(scope="module", params=["<s>", None], ids=["bos", "no-bos"])
def tokenizer(request):
    return build_tokenizer(request.param)


@pytest.fixture(scope="module")
def novel(tokenizer):
    return data.token_ids(tokenizer, NOVEL)


def make(task, tokenizer, novel, **changes):
    options = {"length": 400, "depths": DEPTHS, "count": 10, "seed": 3, **changes}
    return data.needle_examples(task, tokenizer, novel, **options)


@pytest.mark.parametrize("task", data.NEEDLE_TASKS)
@pytest.mark.parametrize("length", [255, 400])
def test_needle_examples_have_exactly_the_length(task, length, tokenizer, novel):
    for example in make(task, tokenizer, novel, length=length):
        assert len(example.ids) == example.length == length
        assert example.answer == example.ids[example.answer_start :] != ()
        assert example.task == task and example.choices == ()
        if tokenizer.bos_token_id is not None:
            assert example.ids[0] == tokenizer.bos_token_id
            assert tokenizer.bos_token_id not in example.ids[1:]


@pytest.mark.parametrize("task", data.NEEDLE_TASKS)
def test_the_answer_stands_in_the_asked_needle_and_nowhere_else(task, tokenizer, novel):
    for example in make(task, tokenizer, novel):
        prompt = tokenizer.decode(example.ids[: example.answer_start])
        answer = tokenizer.decode(example.answer).strip()
        assert prompt.count(answer) == 1
        from_needle = tokenizer.decode(example.ids[example.needle_start : example.answer_start])
        key = prompt.rsplit("The secret code: ", 1)[1].strip()
        assert from_needle.startswith(f" The secret code: {key} {answer}.")


def test_multikey_hides_several_needles_under_different_keys(tokenizer, novel):
    for example in make("multikey", tokenizer, novel, num_keys=6):
        text = tokenizer.decode(example.ids[: example.answer_start])
        stated = [part.split(" ")[0] for part in text.split(" The secret code: ")[1:7]]
        assert len(set(stated)) == 6


@pytest.mark.parametrize("task", data.NEEDLE_TASKS)
def test_depth_places_the_asked_needle(task, tokenizer, novel):
    examples = make(task, tokenizer, novel, count=5, num_keys=1)
    first, last = examples[0], examples[-1]
    intro = len(data.token_ids(tokenizer, data.INTRO)) + (tokenizer.bos_token_id is not None)
    assert [example.depth for example in examples] == DEPTHS
    assert first.needle_start == intro
    question = data.QUESTION.split("{key}")[0]
    tail = tokenizer.decode(last.ids[last.needle_start :])
    assert tail.index(question) == tail.index(".") + 1  # nothing between needle and question
    starts = [example.needle_start for example in examples]
    steps = [b - a for a, b in pairwise(starts)]
    assert max(steps) - min(steps) <= 2 + max(len(e.answer) for e in examples)


def test_needle_examples_depend_on_seed_and_index_only(tokenizer, novel):
    examples = make("multikey", tokenizer, novel)
    assert make("multikey", tokenizer, novel, count=4) == examples[:4]
    assert make("multikey", tokenizer, novel, seed=4) != examples
    assert len({example.answer for example in examples}) == len(examples)


def test_noise_haystack_needs_no_text(tokenizer):
    example = make("single_1", tokenizer, None)[2]
    assert tokenizer.decode(example.ids).count("The rain is soft.") > 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"length": 40}, "length is 40"),
        ({"length": 90000}, "length 90000 needs"),
        ({"num_keys": 500}, "500 different keys"),
        ({"num_keys": 0}, "0 needles of 4 digits"),
        ({"num_digits": 0}, "4 needles of 0 digits"),
        ({"depths": []}, "at least one"),
        ({"depths": [1.5]}, "1.5"),
    ],
)
def test_needles_that_cannot_be_built(changes, says, tokenizer, novel):
    with pytest.raises(DataError, match=says):
        make("multikey", tokenizer, novel, **changes)


def test_unknown_task_and_missing_haystack(tokenizer, novel):
    with pytest.raises(DataError, match="multikey"):
        make("multi_key", tokenizer, novel)
    with pytest.raises(DataError, match="text to hide in"):
        make("single_2", tokenizer, None)


def test_hide_keeps_the_haystack_and_the_order_of_equal_offsets():
    out = data.hide([1, 2, 3], [[10], [20], [30]], [3, 1, 1])
    assert out == [1, 20, 30, 2, 3, 10]


def test_text_batches_are_a_pure_function_of_seed_and_step():
    ids = torch.arange(100)
    batches = data.TextBatches(ids, batch_size=4, seq_len=16, seed=5)
    late = data.TextBatches(ids, batch_size=4, seq_len=16, seed=5).batch(7)
    for step in range(7):
        batches.batch(step)
    assert torch.equal(batches.batch(7), late)
    assert late.shape == (4, 16) and late.dtype == torch.long
    assert torch.equal(late, late[:, :1] + torch.arange(16))
    assert not torch.equal(batches.batch(8), late)
    assert not torch.equal(data.TextBatches(ids, 4, 16, seed=6).batch(7), late)


def test_text_batches_reach_both_ends_and_start_with_bos():
    rows = data.TextBatches(torch.arange(1, 9), batch_size=200, seq_len=8, seed=0, bos=0).batch(0)
    assert rows[:, 0].eq(0).all()
    assert {1, 2} == set(rows[:, 1].tolist()) and rows.max() == 8


def test_an_epoch_reads_every_token_once_but_for_the_ends():
    take, batch_size = 7, 3
    batches = data.TextBatches(torch.arange(200), batch_size, take, seed=4)
    windows = batches.windows
    rows = torch.cat([batches.batch(step) for step in range(windows)])  # `batch_size` epochs
    offsets, orders = set(), set()
    for epoch in range(batch_size):
        starts = rows[epoch * windows : (epoch + 1) * windows, 0]
        first, last = int(starts.min()), int(starts.max())
        assert torch.equal(starts.sort()[0], torch.arange(first, last + 1, take))
        assert len(starts) == windows and first + 200 - (last + take) < 2 * take
        offsets.add(first)
        orders.add(tuple(((starts - first) // take).tolist()))
    assert len(offsets) > 1 and len(orders) == batch_size


def test_a_text_of_one_row_is_read_whole_again_and_again():
    batches = data.TextBatches(torch.arange(8), batch_size=3, seq_len=8, seed=0)
    assert torch.equal(batches.batch(5), torch.arange(8).expand(3, 8))


def test_text_batches_refuse_short_text_and_empty_rows():
    with pytest.raises(DataError, match=r"10 tokens.*16"):
        data.TextBatches(torch.arange(10), batch_size=1, seq_len=16, seed=0)
    with pytest.raises(DataError, match="batch_size 0"):
        data.TextBatches(torch.arange(10), batch_size=0, seq_len=4, seed=0)
    with pytest.raises(DataError, match="seq_len 1"):
        data.TextBatches(torch.arange(10), batch_size=1, seq_len=1, seed=0, bos=0)


def test_read_text_formats(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(["One.\n\nTwo.", "Three."]))
    (tmp_path / "c.jsonl").write_text('{"text": "One."}\n\n{"text": "Two."}\n')
    assert data.read_text(tmp_path / "a.txt") == "One.\n\nTwo."
    assert data.read_documents(tmp_path / "b.json") == ["One.\nTwo.", "Three."]
    assert data.read_text(tmp_path / "b.json") == "One.\nTwo.\n\nThree."
    assert data.read_text(str(tmp_path / "c.jsonl")) == "One.\n\nTwo."


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n", "no text"),
        ("a.txt", b"abc\xff", "byte 3"),
        ("a.bin", b"abc", r"\.bin"),
        ("a.json", b"[]", "no text"),
        ("a.json", b'{"a": 1}', "dict"),
        ("a.json", b'["a", 3]', "text 2 is int"),
        ("a.json", b"[", "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2"),
        ("a.jsonl", b'{"text": 5}', "line 1 is int"),
    ],
)
def test_read_text_refuses(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        data.read_text(tmp_path / name)
    assert name in str(caught.value)


def test_read_text_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such text file"):
        data.read_text(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        data.read_text(tmp_path / "folder.txt")


def story(name: str, gap: int) -> str:
    rain = "It rained. " * gap
    return f"Once there was a child. So {name} went out and met Mia. {rain}Then {name} ran."


def test_name_recall_cuts_before_the_last_mention(tokenizer):
    stories = [story("Lily", 40), story("Tom", 1)]
    examples = data.name_recall_examples(stories, tokenizer, count=5, seed=0)
    names = data.hero_tokens(tokenizer)
    assert len(names) == 16 and len(set(names.values())) == 16
    for example in examples:
        assert example.choices == tuple(names.values()) and len(example.answer) == 1
        assert example.answer[0] == example.ids[example.needle_start] in example.choices
        assert example.answer_start == example.length - 1 == len(example.ids) - 1
        assert example.answer_start - example.needle_start >= 48
        text = tokenizer.decode(example.ids)
        assert "Lily" not in text or names["Lily"] == example.answer[0]
    assert len({example.answer for example in examples}) > 1
    assert examples[:2] == data.name_recall_examples(stories, tokenizer, count=2, seed=0)


def test_name_recall_says_what_is_missing(tokenizer):
    with pytest.raises(DataError, match="0 name questions"):
        data.name_recall_examples([story("Tom", 1)], tokenizer, count=2, seed=0)
    with pytest.raises(DataError, match="5 were asked"):
        data.name_recall_examples([story("Tom", 40)], tokenizer, count=5, seed=0, max_length=20)
