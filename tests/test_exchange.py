"""Selection files of other projects: round trips, hostile files, and published figures."""

from __future__ import annotations

import json
import os
import random
import statistics
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from morph import exchange, selection
from morph import plan as planning
from morph.errors import PlanError, StorageError
from morph.plan import Budget, Geometry, Scores
from morph.selectors import halo

DATA = Path(__file__).resolve().parent / "data"
PICKS = json.loads((DATA / "published_picks.json").read_text(encoding="utf-8"))
DUO = DATA / "duo_llama31_8b.tsv"
LISTS = ("swaa", "keep_full_attention_layers")


def geometry(layers: int = 6, heads: int = 4, kv_heads: int = 2, **changes) -> Geometry:
    given = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "v_head_dim": 8,
        "hidden_size": 32,
        "windows": (None,) * layers,
    }
    return Geometry(**(given | changes))


def scores(granularity: str, shape: Geometry, seed: int = 0, **changes) -> Scores:
    draw = random.Random(seed)
    width = shape.units(granularity)
    given = {
        "selector": "test",
        "model_type": "llama",
        "granularity": granularity,
        "values": tuple(
            tuple(draw.gauss(0, 1) * 10 ** draw.randint(-12, 12) for _ in range(width))
            for _ in range(shape.num_hidden_layers)
        ),
        "unit": "nats",
    }
    return Scores(**(given | changes))


def put(folder: Path, text: str | bytes, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def kept(found: Scores, budget: Budget, shape: Geometry) -> list[int]:
    return [layer for layer, _ in selection.choose_units(found, budget, geometry=shape)]


def refusal(path: Path, shape: Geometry | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        exchange.read(path, shape or geometry(), "llama")
    line = str(caught.value)
    assert line.startswith(str(path))
    assert line.isprintable()
    return line.removeprefix(str(path))


# Round trips


@pytest.mark.parametrize("granularity", ["layer", "kv_head", "head"])
def test_own_scores_come_back_with_their_digest(tmp_path: Path, granularity: str):
    shape = geometry()
    given = scores(granularity, shape, provenance={"seed": 3, "note": "tab\t"})
    exchange.write(given, tmp_path / "s.json", "scores")
    found = exchange.read(tmp_path / "s.json", shape, "other")
    assert found == given
    assert found.digest == given.digest


@pytest.mark.parametrize(
    ("form", "granularity"), [("duo_attention", "kv_head"), ("retrieval_head", "head")]
)
def test_head_scores_come_back_bit_equal(tmp_path: Path, form: str, granularity: str):
    shape = geometry()
    given = scores(granularity, shape)
    path = tmp_path / "anything.txt"
    exchange.write(given, path, form)
    found = exchange.read(path, shape, "llama")
    assert found.values == given.values
    assert (found.granularity, found.selector, found.model_type) == (granularity, form, "llama")
    assert found.provenance["format"] == form
    assert found.provenance["file"] == "anything.txt"
    assert len(found.provenance["sha256"]) == 64
    assert exchange.dumps(found, form) == path.read_text()
    assert planning.loads_scores(planning.dumps(found)) == found


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_layers_come_back(tmp_path: Path, form: str):
    shape = geometry()
    given = scores("layer", shape, provenance={"window": 2000, "keep_first": 10})
    exchange.write(given, tmp_path / "list", form, keep=[4, 1])
    found = exchange.read(tmp_path / "list", shape, "llama")
    assert found.values == ((0.0,), (1.0,), (0.0,), (0.0,), (1.0,), (0.0,))
    assert found.provenance["placed"] == 2
    assert found.provenance["layers"] == [1, 4]
    assert kept(found, Budget(full_layers=2), shape) == [1, 4]
    assert planning.loads_scores(planning.dumps(found)) == found


def test_swaa_keeps_what_the_sliding_mixer_needs(tmp_path: Path):
    config = {
        "sliding_window_size": 2048,
        "keep_first": 10,
        "force_fa_decode": True,
        "non_sliding_layers": [5, 0],
    }
    for text in (json.dumps(config), yaml.safe_dump(config), json.dumps({"swaa_config": config})):
        found = exchange.read(put(tmp_path, text), geometry(), "llama")
        how = found.provenance
        assert (how["window"], how["keep_first"], how["placed"]) == (2048, 10, 2)
        assert how["layers"] == [5, 0]
        assert "converted checkpoint slides" in how["note"]
        assert json.loads(exchange.dumps(found, "swaa", keep=[0, 5])) == config | {
            "non_sliding_layers": [0, 5]
        }


def test_swaa_without_full_decode_has_no_note(tmp_path: Path):
    text = '{"sliding_window_size": 4, "non_sliding_layers": [1]}'
    how = exchange.read(put(tmp_path, text), geometry(), "llama").provenance
    assert (how["keep_first"], how["force_fa_decode"]) == (0, False)
    assert "note" not in how


def test_swaa_takes_the_window_the_scores_were_measured_with():
    how = {"mixer": "sliding", "mixer_options": {"window": 64, "num_sinks": 4}}
    text = exchange.dumps(scores("layer", geometry(), provenance=how), "swaa", keep=[2])
    assert json.loads(text) == {
        "sliding_window_size": 64,
        "keep_first": 4,
        "force_fa_decode": False,
        "non_sliding_layers": [2],
    }


def test_kept_layers_are_found_at_any_depth(tmp_path: Path):
    text = "a:\n- b: 1\n- c:\n    student:\n      keep_full_attention_layers: [3, 0]\n# end\n"
    found = exchange.read(put(tmp_path, text), geometry(), "llama")
    assert found.provenance["layers"] == [3, 0]


def test_missing_heads_are_zero_and_lists_are_averaged(tmp_path: Path):
    found = exchange.read(put(tmp_path, '{"1-3": [0.5, 1, 0], "0-0": [0.25]}'), geometry(), "llama")
    assert found.values[1][3] == 0.5
    assert found.values[0][0] == 0.25
    assert sum(map(sum, found.values)) == 0.75
    assert found.provenance["missing"] == 22


def test_line_ends_and_marks_of_other_systems(tmp_path: Path):
    text = "﻿0\t1\r\n.5\t1e-3\r\n\r\n".encode()
    found = exchange.read(put(tmp_path, text), geometry(2), "llama")
    assert found.values == ((0.0, 1.0), (0.5, 0.001))


def test_one_kv_head_is_one_column(tmp_path: Path):
    found = exchange.read(put(tmp_path, "0.5\n0.25\n"), geometry(2, 4, 1), "llama")
    assert found.values == ((0.5,), (0.25,))


# Aggregation


def test_aggregate_takes_the_group():
    shape = geometry(1, 4, 2)
    given = scores("head", shape, values=((1.0, 3.0, -2.0, -4.0),))
    assert exchange.aggregate(given, shape, "kv_head").values == ((3.0, -2.0),)
    assert exchange.aggregate(given, shape, "kv_head", "mean").values == ((2.0, -3.0),)
    assert exchange.aggregate(given, shape, "layer").values == ((3.0,),)
    assert exchange.aggregate(given, shape, "layer", "mean").values == ((-0.5,),)
    assert exchange.aggregate(given, shape, "head") is given
    found = exchange.aggregate(given, shape, "kv_head")
    assert found.provenance["aggregated"] == "max over head scores"
    layer = exchange.aggregate(found, shape, "layer")
    assert (layer.granularity, layer.values) == ("layer", ((3.0,),))


def test_aggregate_refuses():
    shape = geometry(2, 4, 2)
    kv = scores("kv_head", shape)
    with pytest.raises(PlanError, match="cannot be split into head"):
        exchange.aggregate(kv, shape, "head")
    with pytest.raises(PlanError, match="cannot be split into head"):
        exchange.aggregate(scores("kv_head", geometry(2, 2, 2)), geometry(2, 2, 2), "head")
    with pytest.raises(PlanError, match="2 layers x 2 heads, the model 3 x 2 KV heads"):
        exchange.aggregate(kv, geometry(3), "layer")
    with pytest.raises(PlanError, match="Allowed: max, mean"):
        exchange.aggregate(kv, shape, "layer", "sum")
    paired = scores("kv_head", shape, pairs=((0.0,) * 4,) * 4)
    with pytest.raises(PlanError, match="pairs"):
        exchange.aggregate(paired, shape, "layer")


# Exports that cannot be


@pytest.mark.parametrize(
    ("form", "granularity", "keep", "needle"),
    [
        ("duo_atention", "kv_head", None, "Did you mean 'duo_attention'?"),
        ("duo_attention", "layer", None, "holds kv_head scores; these are per layer"),
        ("retrieval_head", "kv_head", None, "holds head scores; these are per kv_head"),
        ("swaa", "head", [1], "holds layer scores; these are per head"),
        ("swaa", "layer", None, "pass keep"),
        ("swaa", "layer", [1], "names a window"),
        ("keep_full_attention_layers", "layer", [], "at least one"),
        ("keep_full_attention_layers", "layer", [1, 1], "listed twice"),
        ("keep_full_attention_layers", "layer", [6], "there are layers 0-5"),
        ("keep_full_attention_layers", "layer", [-1], "there are layers 0-5"),
        ("keep_full_attention_layers", "layer", [True], "there are layers 0-5"),
    ],
)
def test_exports_that_cannot_be(form, granularity, keep, needle):
    with pytest.raises(PlanError) as caught:
        exchange.dumps(scores(granularity, geometry()), form, keep=keep)
    assert needle in str(caught.value)


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    given = scores("layer", geometry())
    with pytest.raises(StorageError, match="cannot be written"):
        exchange.write(given, tmp_path / "none" / "s.json", "scores")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        exchange.write(given, tmp_path / "folder", "scores")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


# Hostile files

ROW = "0.5\t0.5\n"
SWAA = '{"sliding_window_size": 8, "non_sliding_layers": %s}'
OWN = json.loads(planning.dumps(scores("layer", geometry())))


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        # a table
        (ROW * 3, ["3 layers x 2 heads, the model 6 x 2 KV heads", "this model"]),
        ("0.5\t0.5\t0.5\t0.5\n" * 6, ["6 layers x 4 heads, the model 6 x 2 KV heads"]),
        (ROW * 4 + "0.5\n" + ROW, ["row 5 (layer 4) has 1 columns, row 1 has 2"]),
        (ROW * 4 + "\n" + ROW, ["row 5 (layer 4) has 1 columns"]),
        (ROW * 2 + "0.5\tnan\n" + ROW * 3, ["row 3 (layer 2), column 2 (KV head 1): 'nan'"]),
        (ROW * 5 + "-inf\t1\n", ["row 6 (layer 5), column 1", "'-inf' is not a finite"]),
        (ROW * 5 + "1e999\t1\n", ["'1e999' is not a finite"]),
        (ROW * 5 + "True\t1\n", ["'True' is not a finite"]),
        (ROW * 5 + "1_0\t1\n", ["'1_0' is not a finite"]),
        (ROW * 5 + "٣\t1\n", ["'٣' is not a finite"]),
        (ROW * 5 + "9" * 1_000_000 + "x\t1\n", ["is not a finite"]),
        (ROW * 5 + "\t1\n", ["column 1 (KV head 0): '' is not"]),
        (ROW * 5 + "\x1b[2J\t1\n", [r"'\x1b[2J' is not"]),
        ("x\t0.5\n" + ROW * 5, ["row 1 (layer 0), column 1", "'x' is not"]),
        ("0.5 0.5\n" * 6, ["no known selection", "tab-separated"]),
        # scores of heads
        ('{"0-0": [1], "layer1": [1]}', ["'layer1' is no 'layer-head' such as '16-19'"]),
        ('{"0-0": [1], "-1-0": [1]}', ["'-1-0' is no 'layer-head'"]),
        ('{"6-0": [1]}', ["'6-0'", "6 layers x 4 heads (0-0 to 5-3)"]),
        ('{"0-4": [1]}', ["'0-4'", "6 layers x 4 heads"]),
        ('{"1-1": [1], "01-1": [1]}', ["head 1-1 appears twice"]),
        ('{"1-1": [1], "1-1": [1]}', ["key '1-1' appears twice"]),
        ('{"1-1": []}', ["expected a list of scores, got []"]),
        ('{"1-1": 0.5}', ["expected a list of scores, got 0.5"]),
        ('{"1-1": [0, true]}', ["'1-1'[1]: True is not"]),
        ('{"1-1": [null]}', ["None is not"]),
        ('{"1-1": [NaN]}', ["nan is not a finite"]),
        ('{"1-1": [-Infinity]}', ["-inf is not a finite"]),
        ('{"1-1": ["0.5"]}', ["'0.5' is not a finite"]),
        ('{"1-1": [%s]}' % ("9" * 400), ["is not a finite"]),
        ('{"1-1": [%s]}' % ("9" * 9000), ["not valid JSON"]),
        # lists of layers
        (SWAA % "[6]", ["non_sliding_layers[0] is 6; there are layers 0-5"]),
        (SWAA % "[0, -1]", ["non_sliding_layers[1] is -1"]),
        (SWAA % "[true]", ["non_sliding_layers[0] is True"]),
        (SWAA % "[2.0]", ["non_sliding_layers[0] is 2.0"]),
        (SWAA % '["2"]', ["non_sliding_layers[0] is '2'"]),
        (SWAA % "[1, 2, 1]", ["non_sliding_layers[2]: layer 1 is listed twice"]),
        (SWAA % "[]", ["non_sliding_layers is []; list at least one layer (0-5)"]),
        (SWAA % "[%s]" % ("9" * 400), ["non_sliding_layers[0] is 999", "layers 0-5"]),
        (SWAA % '"1, 2"', ["non_sliding_layers", "expected a list"]),
        (SWAA % "[1], \"keep_frist\": 4", ["keep_frist: unknown key. Did you mean 'keep_first'?"]),
        (SWAA % '[1], "keep_first": -4', ["keep_first is -4; it is 0 to"]),
        (SWAA % '[1], "keep_first": true', ["keep_first: expected an integer"]),
        (SWAA % '[1], "force_fa_decode": [9]', ["force_fa_decode[0] is 9"]),
        (SWAA % '[1], "force_fa_decode": 1', ["force_fa_decode: expected true or false"]),
        ('{"sliding_window_size": 0, "non_sliding_layers": [1]}', ["it is 1 to 2147483647"]),
        ('{"sliding_window_size": null, "non_sliding_layers": [1]}', ["no layer slides"]),
        ('{"sliding_window_size": %s, "non_sliding_layers": [1]}' % ("9" * 99), ["it is 1 to"]),
        (json.dumps([{"swaa_config": json.loads(SWAA % "[1]")}] * 2),
         ["holds 2 selections", "[0].swaa_config swaa", "Leave one"]),
        ("a: {keep_full_attention_layers: [1]}\nb: {keep_full_attention_layers: [2]}",
         ["holds 2 selections", "a keep_full_attention_layers"]),
        ("keep_full_attention_layers: 3", ["keep_full_attention_layers is 3; list at least one"]),
        ("keep_full_attention_layers: []", ["is []; list at least one"]),
        ("x:\n  keep_full_attention_layers: [1, 7]",
         ["x: keep_full_attention_layers[1] is 7; there are layers 0-5"]),
        ("keep_full_attention_layers: [1]\nkeep_full_attention_layers: [2]", ["appears twice"]),
        # YAML and JSON that are not what they seem
        ("a: &a [1]\nkeep_full_attention_layers: *a", ["anchors and aliases"]),
        ("keep_full_attention_layers: !!python/object/apply:os.system ['x']", ["not allowed"]),
        ("a: " + "[" * 90 + "]" * 90, ["nested deeper than 32"]),
        ("a: [1\n", ["not valid YAML"]),
        ("a: " + "x" * (2 << 20), ["larger than 1 MiB"]),
        ("[" * 40 + "]" * 40, ["nested deeper than 32"]),
        ("[" * 100_000, ["nested deeper than 32"]),
        ('{"1-1": ' + "[" * 100_000, ["nested deeper than 32"]),
        ("{", ["not valid JSON"]),
        ('{"1-1": [1]} {}', ["not valid JSON"]),
        # nothing that is known
        ("", ["no known selection", "duo_attention: tab-separated"]),
        ("9" * 1_000_000 + "x", ["no known selection"]),
        (" \n\n", ["no known selection"]),
        ("{}", ["no known selection"]),
        ("null", ["no known selection"]),
        ("- 1\n- 2", ["no known selection (a list of 2)"]),
        ('{"\\u001b[2J": 1}', [r"(\x1b[2J)"]),
        ('{"\\ud800": 1}', [r"(\ud800)"]),
        ('{"keep_full_attention_layer": [1]}', ["Did you mean 'keep_full_attention_layers'?"]),
        # our own, broken
        (json.dumps(OWN | {"values": [[1]] * 4}), ["4 layers x 1 heads, the model 6 x 1"]),
        (json.dumps(OWN | {"values": [[float("nan")]] * 6}), ["not a finite number"]),
        (json.dumps(OWN | {"values": [[10**400]] * 6}), ["not a finite number"]),
        (json.dumps(OWN | {"values": [[True]] * 6}), ["expected a number"]),
        (json.dumps(OWN | {"extra": 1}), ["extra: unknown key"]),
        (json.dumps({k: v for k, v in OWN.items() if k != "unit"}), ["missing unit"]),
        (b"\xff\xfe0\x00", ["byte 0 is not UTF-8"]),
        (b"0.5\t0.5\n\x80", ["byte 8 is not UTF-8"]),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_words(tmp_path: Path, text, needles):
    line = refusal(put(tmp_path, text))
    for needle in needles:
        assert needle in line
    assert len(line) < 900


def test_what_is_no_file_is_refused(tmp_path: Path):
    assert "cannot be read" in refusal(tmp_path / "none")
    assert "is not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(tmp_path / "pipe")
    with pytest.raises(PlanError, match="cannot be read"):
        exchange.read("a\0b", geometry(), "llama")
    with pytest.raises(PlanError) as caught:
        exchange.read(tmp_path / "a\x1b[2Jb", geometry(), "llama")
    assert str(caught.value).isprintable()


def test_size_is_bounded(tmp_path: Path):
    path = tmp_path / "large.tsv"
    with path.open("wb") as file:
        file.truncate(exchange.MAX_BYTES + 1)
    assert "larger than 64 MiB" in refusal(path)


def test_layers_that_slide_in_the_source_cannot_be_kept(tmp_path: Path):
    shape = geometry(3, windows=(None, 16, None))
    path = put(tmp_path, SWAA % "[0, 1]")
    assert "layer 1 already slides in the source" in refusal(path, shape)


def test_damaged_files_never_crash(tmp_path: Path):
    """Bytes changed at random: scores come back, or PlanError, and nothing else."""
    shape, draw = geometry(), random.Random(7)
    how = {"window": 8}
    good = [
        exchange.dumps(scores("kv_head", shape), "duo_attention"),
        exchange.dumps(scores("head", shape), "retrieval_head"),
        exchange.dumps(scores("layer", shape), "scores"),
        *(exchange.dumps(scores("layer", shape, provenance=how), f, keep=[1]) for f in LISTS),
    ]
    refused = 0
    for text in good:
        for _ in range(150):
            data = bytearray(text.encode())
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(len(data))
                data[at : at + draw.randint(0, 2)] = draw.choice(
                    [b"", b"9" * 20, b"\t", b"\n", b"{", b"]", b'"', b"-", b"e9", b"\x00", b"\xc3"]
                )
            try:
                found = exchange.read(put(tmp_path, bytes(data)), shape, "llama")
                assert len(found.values) == 6
            except PlanError as error:
                refused += 1
                assert str(error).isprintable()
    assert refused > 200


# Published figures


def test_published_gates_of_duo_attention():
    shape = geometry(32, 32, 8)
    found = exchange.read(DUO, shape, "llama")
    gates = [gate for row in found.values for gate in row]
    assert len(gates) == 256
    assert round(statistics.mean(gates), 2) == 0.85
    assert round(statistics.median(gates), 2) == 0.95
    assert sum(gate > 0.9 for gate in gates) == 165
    assert sum(gate < 0.1 for gate in gates) == 12
    assert round(statistics.mean(found.values[0]), 2) == 0.41
    units = selection.choose_units(found, Budget(full_fraction=0.5), geometry=shape)
    assert len(units) == 128
    lowest = min(found.values[i][u] for i, u in units)
    assert sum(gate > lowest for gate in gates) < 128 <= sum(gate >= lowest for gate in gates)
    quarter = selection.choose_units(found, Budget(full_fraction=0.25), geometry=shape)
    assert len(quarter) == 64
    assert set(quarter) < set(units)


def test_published_gates_do_not_fit_another_model():
    line = refusal(DUO, geometry(8, 8, 4))
    assert "the file has 32 layers x 8 heads, the model 8 x 4 KV heads" in line


@pytest.mark.parametrize("name", [n for n, m in PICKS["kl_guided"].items() if isinstance(m, dict)])
def test_published_picks_of_kl_guided_selection(tmp_path: Path, name: str):
    model = PICKS["kl_guided"][name]
    shape = geometry(model["num_hidden_layers"])
    quarter, order = model["quarter"], model.get("order", model["quarter"])
    assert order[: len(quarter)] == quarter
    lists = {"quarter": quarter, "order": order, **model.get("baselines", {})}
    for layers in lists.values():
        config = {"student_model": {"name": "gdn_v4", "keep_full_attention_layers": layers}}
        text = yaml.safe_dump(config) + "train:\n  lr: 7.0e-06\n  target_tokens: 600_000_000\n"
        found = exchange.read(put(tmp_path, text), shape, "llama")
        assert found.provenance["layers"] == layers
        assert found.provenance["placed"] == len(set(layers)) == len(layers)
        assert kept(found, Budget(full_layers=len(layers)), shape) == sorted(layers)
    share = Fraction(len(quarter), model["num_hidden_layers"])
    assert share == Fraction(1, 4)


def test_published_pick_of_nll_guided_selection(tmp_path: Path):
    given = PICKS["nll_guided"]
    shape = geometry(given["num_hidden_layers"], 32, 8)
    config = {
        "sliding_window_size": given["sliding_window_size"],
        "keep_first": given["keep_first"],
        "force_fa_decode": True,
        "non_sliding_layers": given["layers"],
    }
    found = exchange.read(put(tmp_path, json.dumps(config)), shape, "qwen3")
    assert kept(found, Budget(full_fraction=1 / 4), shape) == given["layers"]
    assert found.provenance["placed"] == 9
    assert (found.provenance["window"], found.provenance["keep_first"]) == (2048, 10)
    assert found.provenance["note"]


def test_published_retrieval_heads(tmp_path: Path):
    given = PICKS["retrieval_heads"]
    shape = geometry(given["num_hidden_layers"], given["num_attention_heads"], 8)
    lists = {head: [score - 0.1, score + 0.1] for head, score in given["top"].items()}
    found = exchange.read(put(tmp_path, json.dumps(lists)), shape, "llama")
    top = sorted(
        ((value, i, h) for i, row in enumerate(found.values) for h, value in enumerate(row)),
        reverse=True,
    )
    assert [(i, h, round(value, 2)) for value, i, h in top[:3]] == [
        (16, 19, 0.94),
        (11, 15, 0.92),
        (8, 26, 0.8),
    ]
    groups = exchange.aggregate(found, shape, "kv_head")
    assert round(groups.values[16][19 // 4], 2) == 0.94
    assert kept(exchange.aggregate(found, shape, "layer"), Budget(full_layers=3), shape) == [
        8,
        11,
        16,
    ]


def test_published_sweep_of_halo_gives_the_shipped_layers():
    """HALO's ratio and the retrieval drop, from the logged accuracies."""
    sweep = json.loads((DATA / "halo_scores.json").read_text(encoding="utf-8"))

    def means(tasks):
        return [statistics.fmean(row) for row in zip(*tasks.values(), strict=True)]

    recall, common = means(sweep["retrieval"]), means(sweep["commonsense"])
    assert len(recall) == len(common) == sweep["num_hidden_layers"]
    original = tuple(
        statistics.fmean(sweep["original"][name].values()) for name in ("retrieval", "commonsense")
    )
    shape, budget = geometry(28), Budget(full_layers=sweep["keep"])

    def pick(mode):
        values = halo.ratios(recall, common, mode=mode, original=original)
        return kept(scores("layer", shape, values=tuple((v,) for v in values)), budget, shape)

    assert pick("faithful") == sweep["top"] == PICKS["halo"]["2b"]["layers"]
    assert pick("jet") == sweep["top_by_retrieval_drop"]
    assert (common.index(max(common)), recall.index(max(recall))) == (3, 5)
    assert round(max(common), 4) == 0.5839
