"""Documents: files, datasets and chats as text, where documents start, and rows packed of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from morph import documents
from morph.distill import check_epochs, document_batches, epochs_of, text_batches
from morph.distill._batches import StageBatches
from morph.documents import Hub, Limits, open_documents, read_documents
from morph.errors import DataError, UsageError
from morph.pipeline import _data
from morph.recipes.schema import Data, Stage

REPO = Path(__file__).resolve().parent.parent
STORIES = [f"Lily had {n} red balls.\n\nShe gave {n} of them to Tom." for n in range(20)]
TALKS = [
    [{"role": "user", "content": f"Why {n}?"}, {"role": "assistant", "content": "So.\n\nYes é."}]
    for n in range(12)
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m['content'] | trim }}\n"
    "{% if loop.first %}{{ strftime_now('%Y') }} {{ [1, 2, 3, 4] | random }}{% continue %}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(REPO / "examples" / "checkpoint")


def with_template(template: str):
    tokenizer = AutoTokenizer.from_pretrained(REPO / "examples" / "checkpoint")
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_a_column_of_every_kind_of_file(name, tmp_path):
    path = write(tmp_path, name, [{"n": 1, "story": text} for text in [*STORIES, " \n"]])
    wanted = STORIES if name == "a.parquet" else [s.replace("\n\n", "\n") for s in STORIES]
    assert read_documents(path, "story") == wanted
    assert read_documents(path, "story", limit=len(STORIES[0]) + 1) == wanted[:2]


BAD = {
    "column.jsonl": ([{"tekst": "a"}], "line 1 has no column 'text'.*'tekst'.*There are: tekst"),
    "column.json": ([{"text": "a"}, {"x": 1}], "text 2 has no column 'text'.*There are: x"),
    "column.parquet": ([{"texts": "a"}], "the table has no column 'text'.*mean 'texts'"),
    "number.jsonl": ([{"text": "a"}, {"text": 5}], "line 2 is int, not a string"),
    "number.parquet": ([{"text": 5}], "row 1 is int"),
    "null.parquet": ([{"text": "a"}, {"text": None}], "row 2 is null"),
    "nested.jsonl": ([{"text": {"body": "a"}}], r"line 1 is an object \(keys: body\)"),
    "nested.parquet": ([{"text": {"body": "a"}}], r"row 1 is an object \(keys: body\)"),
    "chat.jsonl": ([{"text": TALKS[0]}], "line 1 is a list of 2.*set data.chat: true"),
    "half.jsonl": ([{"text": "a\ud800b"}], r"line 1 has half a character .* at character 1"),
    "empty.parquet": ([{"text": ""}], "holds no text"),
    "array.jsonl": ([["a"]], "line 1 is a list of 1, not an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_no_text_are_named(name, tmp_path):
    rows, says = BAD[name]
    with pytest.raises(DataError, match=says) as caught:
        read_documents(write(tmp_path, name, rows))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_inside_another_is_not_read(name, tmp_path):
    path = write(tmp_path, name, [{"meta": {"text": "a"}}])
    with pytest.raises(DataError, match="A column inside another cannot be read. There are: meta"):
        read_documents(path, "meta.text")


@pytest.mark.parametrize("size", [0, 8, 500])
def test_a_parquet_file_that_is_none(size, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * (size // 4))
    with pytest.raises(DataError, match="not a parquet file that can be read"):
        read_documents(tmp_path / "a.parquet")


def test_pipes_devices_and_odd_names_do_not_hang(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="a pipe or device, not a file"):
            read_documents(tmp_path / name)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a pipe or device"):
        read_documents(tmp_path / "zero.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(DataError, match="cannot be read: Too many levels"):
        read_documents(tmp_path / "loop.txt")
    with pytest.raises(DataError, match=r"\\x00.*no name of a file"):
        read_documents("a\x00.txt")
    with pytest.raises(DataError, match=r"cannot read '\.csv' as text"):
        read_documents(tmp_path / "a.csv")


def test_lines_end_as_they_do_in_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\nTwo.\rThree.")
    assert read_documents(tmp_path / "a.txt") == ["One.\nTwo.\nThree."]
    lines = '{"text": "a\u2028b"}\r\n{"text": "c"}\r{"text": "d"}\n'
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8", newline="")
    assert read_documents(tmp_path / "a.jsonl") == ["a\u2028b", "c", "d"]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="byte 24 is not UTF-8"):
        read_documents(tmp_path / "b.jsonl")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"needs pyarrow.*pip install 'morph-hybrid\[data\]'"):
        read_documents(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"package datasets.*pip install 'morph-hybrid\[data\]'"):
        list(open_documents(Hub(name="owner/name")))


# --- datasets -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of three files stands for the dataset owner/name."""
    datasets = pytest.importorskip("datasets")
    load, folder = datasets.load_dataset, tmp_path / "owner"
    folder.mkdir()
    for part in range(3):
        rows = [{"text": f"Story {part} of {n}. The end.", "n": n} for n in range(40)]
        write(folder, f"part{part}.jsonl", rows)

    def local(name, *given, **options):
        assert "trust_remote_code" not in options and options["streaming"] is True
        return load(str(folder) if name == "owner/name" else name, *given, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return Hub(name="owner/name")


def test_a_dataset_is_read_in_the_order_of_the_seed(hub):
    first, again, other = (list(open_documents(hub, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) and len(first) == 120
    assert first != sorted(first)


def test_a_dataset_is_read_up_to_its_limit(hub, tokenizer):
    section = Data(text=(str(hub),), limit=100)
    made, same, other = (_data.corpus(section, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert len(made.train) + len(made.held_out) == 100
    assert made.sha256 == same.sha256 != other.sha256
    assert len(made.train_starts) == len(made.train_stories)
    check_starts(made, tokenizer)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"column": "texts"}, "the dataset has no column 'texts'.*mean 'text'.*text, n"),
        ({"column": "n"}, r"row 1 \(as read\) is int"),
        ({"split": "test"}, "test.*Check the name.*data.split"),
    ],
)
def test_a_dataset_without_what_is_asked_for(changes, says, hub):
    with pytest.raises(DataError, match=f"hub:owner/name: .*{says}"):
        list(open_documents(hub, **changes))


def test_a_dataset_that_cannot_be_reached(hub, tokenizer):
    with pytest.raises(DataError, match="hub:nobody/nothing: cannot be read: .*the network"):
        list(open_documents(Hub(name="nobody/nothing")))
    with pytest.raises(UsageError, match="data.limit: hub:owner/name is streamed"):
        _data.corpus(Data(text=("hub:owner/name",)), tokenizer)


def test_names_of_datasets():
    assert Hub.parse("book.txt") is None
    assert Hub.parse("hub:a/b:c") == Hub(name="a/b", config="c")
    for text in (
        "hub:",
        "hub:a",
        "hub:../b",
        "hub:/etc/passwd",
        "hub:a/b/c",
        "hub:a/b:",
        "hub:a/.",
    ):
        with pytest.raises(UsageError, match="write hub:owner/name"):
            Hub.parse(text)


# --- chats --------------------------------------------------------------------------------------


def test_chats_are_what_the_tokenizer_makes_of_them(tmp_path):
    tokenizer = with_template(TEMPLATE)
    path = write(tmp_path, "a.jsonl", [{"talk": talk, "id": 1} for talk in TALKS])
    texts, again = (list(open_documents(path, column="talk", chat=tokenizer)) for _ in range(2))
    assert texts == again  # whatever day it is, and whatever is drawn
    plain = with_template(
        TEMPLATE.replace("{{ strftime_now('%Y') }} {{ [1, 2, 3, 4] | random }}", "")
    )
    wanted = [plain.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    drawn = texts[0].split("<|assistant|>")[0][-6:]
    assert drawn[:5] == "2025 " and [text.replace(drawn, "") for text in texts] == wanted
    section = Data(text=(str(path),), column="talk", chat=True)
    made = _data.corpus(section, tokenizer)
    assert tokenizer.decode(made.train).startswith(texts[0])  # blank lines are kept
    assert len(made.train_starts) == 11
    check_starts(made, tokenizer, ending="")


HOSTILE = {
    "hangs": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "took more than 1 s of CPU time and was stopped",
    ),
    "memory": ("{{ 'x' * 10 ** 10 }}", "needs more than 64 MB of memory"),
    "length": ("{{ 'x' * 10 ** 6 }}", "gives 1000000 characters, at most"),
    "raises": ("{{ raise_exception('no\n\x1b[31msystem') }}", r"TemplateError: no\\n\\x1b"),
    "escapes": ("{{ ''.__class__.__mro__ }}", "raised SecurityError"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_stopped(kind, tmp_path):
    template, says = HOSTILE[kind]
    path = write(tmp_path, "a.jsonl", [{"text": talk} for talk in TALKS])
    limits = Limits(seconds=1, megabytes=64)
    with pytest.raises(DataError, match=f"line 1: the chat template .*{says}"):
        list(open_documents(path, chat=with_template(template), limits=limits))


def test_a_template_that_only_waits_is_stopped(tmp_path, monkeypatch):
    """The clock stops what the limit on CPU time does not see."""
    script = tmp_path / "_render.py"
    script.write_text('import sys, time; print(\'{"text": ""}\', flush=True); time.sleep(60)')
    monkeypatch.setattr(documents._chat, "__file__", str(tmp_path / "_chat.py"))
    says = pytest.raises(DataError, match=r"row 3: .* ran for more than 0.2 s and was stopped")
    limits = Limits(wall_seconds=0.2)
    with documents.Renderer("f", with_template("a"), limits) as renderer, says:
        renderer.render("row 3", TALKS[0])


@pytest.mark.parametrize("hook", [True, False], ids=["hook", "kernel"])
def test_what_renders_can_open_nothing(hook, tmp_path):
    """With the hook gone, as for code that does not run in Python, the system still refuses."""
    code = (
        "import sys, os, socket, subprocess\n"
        f"sys.path.insert(0, {str(Path(documents.__file__).parent)!r})\n"
        "import _render\n"
        f"if not {hook}: sys.addaudithook = lambda hook: None\n"
        "_render.give_up(64)\n"
        f"tries = [socket.socket, lambda: open({str(tmp_path / 'x')!r}, 'w'),\n"
        "  lambda: open('/etc/passwd'), lambda: subprocess.run(['true']), lambda: bytes(2 ** 28)]\n"
        "for one in tries:\n"
        "    try: one()\n"
        "    except OSError: print('refused')\n"
        "    except MemoryError: print('no memory')\n"
        "    else: print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["refused"] * 4 + ["no memory"], done.stderr
    assert not (tmp_path / "x").exists()


def test_a_template_is_not_run_unless_asked_for(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", never)
    path = write(tmp_path, "a.jsonl", [{"text": text} for text in STORIES])
    tokenizer = with_template("{{ raise_exception('run') }}")
    assert len(_data.corpus(Data(text=(str(path),)), tokenizer).train) > 100


MALFORMED = {
    "text": ("hello", "line 2 is str; with data.chat it must be a list of messages"),
    "empty": ([], "line 2 is an empty list"),
    "string": (["hello"], "line 2, message 1 is str, not an object"),
    "keys": ([{"from": "user", "value": "a"}], "message 1 has no column 'role'.*from, value"),
    "null": ([{"role": "user", "content": None}], "content of line 2, message 1 is null"),
    "parts": ([TALKS[0][0], {"role": "user", "content": [{}]}], "message 2 is a list of 1"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_messages_that_are_none_are_named(kind):
    value, says = MALFORMED[kind]
    with pytest.raises(DataError, match=says):
        documents.messages_of("f", "line 2", value)


def test_chats_need_a_template_and_a_table(tokenizer, tmp_path):
    path = write(tmp_path, "a.jsonl", [{"text": talk} for talk in TALKS])
    with pytest.raises(
        DataError, match="needs a chat template, and the model's tokenizer has none"
    ):
        list(open_documents(path, chat=tokenizer))
    with pytest.raises(DataError, match=r"which a \.txt file does not hold"):
        list(open_documents(tmp_path / "a.txt", chat=with_template("a")))


# --- where documents start ----------------------------------------------------------------------


def pieces(made) -> list[torch.Tensor]:
    return list(made.train.tensor_split(made.train_starts[1:]))


def check_starts(made, tokenizer, ending="\n"):
    assert made.train_starts[0] == 0 and made.train_starts.dtype == torch.int64
    for piece, story in zip(pieces(made), made.train_stories[:-1]):  # the last may be cut short
        assert tokenizer.decode(piece) == story + ending


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_documents_start_where_the_corpus_says(name, tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("A book of its own.")
    rows = [{"text": text} for text in STORIES]
    paths = (str(write(tmp_path, name, rows)), str(tmp_path / "b.txt"))
    made = _data.corpus(Data(text=paths), tokenizer)
    assert len(made.train_starts) == 19 and len(made.train_stories) == 18
    check_starts(made, tokenizer)
    assert "A book of its own.".startswith(tokenizer.decode(pieces(made)[-1]))
    if name != "a.parquet":  # the tokens of these have always been those of one text
        text = "\n".join(made.train_stories)
        one = tokenizer.encode(text, add_special_tokens=False)
        assert made.train[: len(one)].tolist() == one


def test_starts_without_offsets(tokenizer):
    """A tokenizer that tells no offsets, and one whose documents are not to be told apart."""

    class Slow:
        def __init__(self, merges: bool) -> None:
            self.merges = merges

        def encode(self, text, **_):
            return [0 if self.merges and c == "\n" and n else ord(c) for n, c in enumerate(text)]

    told = documents.joined(Slow(False), ["ab", "c", "d"])
    assert [x.tolist() for x in told] == [[97, 98, 10, 99, 10, 100], [0, 3, 5]]

    class Odd(Slow):
        def encode(self, text, **_):
            return [len(text)]

    assert documents.joined(Odd(True), ["ab", "c"])[1].tolist() == [0]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.parquet"])
@pytest.mark.parametrize("limit", [1, 50, 10**6])
def test_no_more_tokens_are_read_than_the_limit(name, limit, tokenizer, tmp_path):
    rows = [{"text": text} for text in STORIES]
    if name == "a.txt":
        (tmp_path / name).write_text("\n".join(STORIES))
    else:
        write(tmp_path, name, rows)
    whole, made = (
        _data.corpus(Data(text=(str(tmp_path / name),), limit=most), tokenizer)
        for most in (None, limit)
    )
    total = len(whole.train) + len(whole.held_out)
    assert len(made.train) + len(made.held_out) == min(limit, total)
    both = torch.cat([made.train, made.held_out])
    if name == "a.txt":
        assert torch.equal(both, torch.cat([whole.train, whole.held_out])[:limit])
    assert int(made.train_starts.max()) <= len(made.train)


def test_few_documents_leave_an_empty_held_out_part(tokenizer, tmp_path):
    path = write(tmp_path, "a.json", [{"text": text} for text in STORIES[:2]])
    made = _data.corpus(Data(text=(str(path),)), tokenizer)
    assert len(made.held_out) == 0 and len(made.train_starts) == 2


# --- rows of documents --------------------------------------------------------------------------

BOS, EOS = 90, 91
LENGTHS = [3, 11, 1, 40, 7, 16, 15, 14, 2, 2, 2, 33]
IDS = torch.arange(sum(LENGTHS)) % 80
STARTS = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
STAGE = Stage(loss="logits", tokens=10**4, seq_len=16, batch_size=4)


def packed(ids=IDS, starts=STARTS, stage=STAGE, index=0, seed=1, bos=BOS, eos=EOS):
    return document_batches(ids, starts, seed=seed, bos=bos, eos=eos)(index, stage)


def documents_in(batch) -> list[list[int]]:
    found = []
    for ids, positions, real in zip(batch.ids, batch.positions, batch.real):
        size = int(real.sum())
        assert real[:size].all()  # padding is at the end
        assert torch.equal(positions[size:], torch.arange(len(ids) - size))
        starts = [*(positions[:size] == 0).nonzero().flatten().tolist(), size]
        for a, b in pairwise(starts):
            assert torch.equal(positions[a:b], torch.arange(b - a))
            found.append(ids[a:b].tolist())
    return found


def plain_pieces(bos, eos, row=16) -> list[list[int]]:
    found = []
    head = [] if bos is None else [bos]
    for document in IDS.tensor_split(STARTS[1:]):
        rest = document.tolist() + ([] if eos is None else [eos])
        while rest and rest != [eos]:
            found.append((head + rest)[:row])
            rest = (head + rest)[row:]
    return found


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("eos", [EOS, None])
def test_an_epoch_packs_every_document_once(bos, eos):
    one = dataclasses.replace(STAGE, batch_size=1)
    batches = packed(stage=one, bos=bos, eos=eos)
    wanted = sorted(plain_pieces(bos, eos))
    together, row = set(), 0
    for _ in range(3):
        rows = []
        while sum(map(len, rows)) < len(wanted):
            rows.append(sorted(documents_in(batches.batch(row))))
            row += 1
        assert sorted(chain.from_iterable(rows)) == wanted
        together.add(str(sorted(rows)))
    assert len(together) == 3  # other documents share a row in every epoch
    assert batches.epochs.ends[0] * 16 < 1.25 * sum(map(len, wanted))  # little padding


def test_bos_and_eos_that_are_there_are_not_doubled():
    ids = torch.tensor([BOS, 1, 2, EOS, 3, 4])
    found = documents_in(packed(ids, torch.tensor([0, 4])).batch(0))
    assert {tuple(f) for f in found} == {(BOS, 1, 2, EOS), (BOS, 3, 4, EOS)}


def test_packed_batches_are_a_pure_function_of_seed_stage_and_step():
    late = packed().batch(9)
    batches = packed()
    for step in (0, 30, 3, 9):  # forwards over epochs and back
        again = batches.batch(step)
    same = [torch.equal(late.tensors()[n], t) for n, t in again.tensors().items()]
    assert same == [True] * 3 and set(again.tensors()) == {"ids", "positions", "real"}
    for other in (packed(seed=2), packed(index=1)):
        assert not torch.equal(other.batch(9).ids, late.ids)
    assert len(batches.epochs.held) <= 2


def test_a_document_predicts_nothing_of_the_next():
    batch = packed().batch(0)
    wanted = batch.wanted(shifted=True)
    first = torch.zeros_like(batch.real)
    first[:, :-1] = (batch.positions[:, 1:] == 0) | ~batch.real[:, 1:]
    assert (wanted[first] == -100).all() and (wanted[~batch.real] == -100).all()
    assert (wanted[:, :-1][~first[:, :-1]] >= 0).all()


@pytest.mark.parametrize("rows", ["windows", "documents"])
def test_two_processes_share_the_batch_of_one(rows):
    text = text_batches(IDS, seed=1, bos=BOS) if rows == "windows" else None
    source = text or document_batches(IDS, STARTS, seed=1, bos=BOS, eos=EOS)
    one, *both = (StageBatches([STAGE], source, None, 100) for _ in range(3))
    for step in (0, 7, 40):
        whole = one.batch(0, step)
        parts = [made.batch(0, step).map(lambda t, r=r: t[r::2]) for r, made in enumerate(both)]
        for name, tensor in whole.tensors().items():
            shared = torch.stack([part.tensors()[name] for part in parts], dim=1)
            assert torch.equal(shared.flatten(0, 1), tensor)
    assert len({made.digest() for made in (one, *both)}) == 1


@pytest.mark.parametrize("starts", [[], [0, 0], [3, 1], [-1], [0, 10]])
def test_starts_that_are_none_are_refused(starts):
    with pytest.raises(DataError, match="their starts must rise within it"):
        packed(torch.arange(10), torch.tensor(starts, dtype=torch.long))


def test_rows_without_room_are_refused():
    with pytest.raises(DataError, match="seq_len 1"):
        packed(stage=dataclasses.replace(STAGE, seq_len=1))
    with pytest.raises(DataError, match="0 documents in a text of 0 tokens"):
        packed(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))


# --- how often the text is read -----------------------------------------------------------------


def test_a_text_that_would_be_read_too_often_is_refused():
    stages = [
        Stage(loss="align", tokens=1000, seq_len=10, batch_size=10),
        Stage(loss="long", tokens=4000, seq_len=10, batch_size=10, needles=0.25),
    ]
    assert epochs_of(stages, 1000) == 4.0
    check_epochs(stages, 1000, 4.0)
    check_epochs(stages, 1000, None)
    with pytest.raises(DataError) as caught:
        check_epochs(stages, 1000, 2.5)
    for part in ("1,000 tokens to train on", "4,000", "4.0 times", "allows 2.5", "at most 2,302"):
        assert part in str(caught.value)
    fewer = [dataclasses.replace(stages[0], tokens=2302)]
    check_epochs(fewer, 1000, 2.5)
    with pytest.raises(DataError, match="has 0 tokens.*more text, or set data.epochs"):
        check_epochs(stages, 0, 4)


def test_counted_epochs_are_those_that_are_read():
    """The windows of as many rows as the count allows hold no token more often than it says."""
    stage = Stage(loss="align", tokens=4000, seq_len=10, batch_size=10)
    source = text_batches(torch.arange(2000), seed=1)(0, stage)
    seen = np.zeros(2000, dtype=int)
    for step in range(40):
        np.add.at(seen, source.batch(step).flatten().numpy(), 1)
    assert epochs_of([stage], 2000) == 2.0 and seen.max() <= 3 and (seen >= 1).mean() > 0.97
