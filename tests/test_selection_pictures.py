"""Comparisons of selectors and their pictures: right numbers, nothing cut, no markup from names."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from morph import comparison as compared
from morph import report
from morph.comparison import Best, Comparison, Entry, spearman
from morph.errors import DataError, PlanError, StorageError
from morph.plan import Budget, Geometry, Scores
from morph.selection import choose

HOSTILE = "[/x][bold]<script>alert(1)</script>$\\frac{$|`\n\x1b[31m&雪 http://evil.example"
NAMES = (
    "nll", "nll + swaps", "nll_greedy", "fisher", "kl_ablation", "duo", "gate_kl",
    "gate_kl + swaps", "hard_concrete", "lazy_ratio", "retrieval_head", "halo",
)  # fmt: skip
BUDGETS = ("1/8", "1/4", "1/2")


def make_scores(layers, units=1, *, pairs=False, ranks=False, selector="fisher"):
    rng = random.Random(layers * 100 + units)
    values = tuple(tuple(rng.gauss(0, 1) ** 2 for _ in range(units)) for _ in range(layers))
    count = layers * units
    table = [[0.0] * count for _ in range(count)]
    for i in range(count * pairs):
        for j in range(i):
            table[i][j] = table[j][i] = rng.gauss(0, 0.1)
    order = compared.ranks([-row[0] for row in values])
    intervals = {
        "low": [[max(1, r - rng.randint(0, 3))] for r in order],
        "high": [[min(layers, r + rng.randint(0, 3))] for r in order],
    }
    return Scores(
        selector=selector, model_type="qwen3", values=values, unit="nats per answer token",
        granularity="layer" if units == 1 else "head",
        pairs=tuple(map(tuple, table)) if pairs else None,
        provenance={"ranks": intervals} if ranks else {},
    )  # fmt: skip


def make_plan(scores, budget="1/4"):
    layers, units = len(scores.values), len(scores.values[0])
    geometry = Geometry(
        num_hidden_layers=layers, num_attention_heads=max(units, 2), num_key_value_heads=1,
        head_dim=8, v_head_dim=8, hidden_size=32, windows=(None,) * layers,
    )  # fmt: skip
    return choose(scores, Budget.parse(budget), geometry=geometry, mixer="sliding")


def make_comparison(names=NAMES, budgets=BUDGETS, seeds=(0, 1, 2), mark="", **changes):
    """Twelve selectors at three budgets with three seeds, the first two of them perfect."""
    rng = random.Random(0)
    kept = {b: tuple((i, 0) for i in range(2 << n)) for n, b in enumerate(budgets)}
    lowest = {b: 0.35 * 0.4**n for n, b in enumerate(budgets)}
    entries, order = [], {}
    for k, name in enumerate((*names, "uniform", "random")):
        for seed in {"uniform": (0,), "random": (0, 1, 2, 3, 4)}.get(name, seeds):
            label = f"{name}{mark}" + f" (seed {seed})" * (name != "uniform")
            order[label] = [i + 2 * k * rng.random() for i in range(16)]
            for budget in budgets:
                regret = 0.0 if k < 2 else abs(rng.gauss(0.06 * k, 0.03))
                entries.append(
                    Entry(
                        selector=name.split(" ")[0], label=label, budget=budget, kept=kept[budget],
                        loss=lowest[budget] + regret, held_out_loss=lowest[budget] + regret + 0.01,
                        regret=regret, held_out_regret=regret + rng.gauss(0, 0.01),
                        recall=math.exp(-lowest[budget] - regret), forwards=1200.0 * (k % 2) + 17,
                        backwards=64.0, cpu_seconds=12.3, note=mark,
                    )
                )  # fmt: skip
    best = [
        Best(
            budget=b, kept=kept[b], loss=lowest[b], held_out_loss=lowest[b] + 0.01, recall=0.9,
            sets_tried=1820, exhaustive=n < 2, forwards=240.0,
        )
        for n, b in enumerate(budgets)
    ]  # fmt: skip
    first = {a: order[a] for a in order if a.endswith("(seed 0)") or "seed" not in a}
    given = {
        "model": f"two-hop-16L{mark}", "model_sha256": "ab" * 32, "mixer": f"sliding{mark}",
        "mixer_options": {"window": 128}, "budgets": budgets, "task": f"multikey{mark}",
        "examples": 32, "seq_len": 512, "seeds": seeds, "source_loss": 0.02, "source_recall": 0.99,
        "source_held_out_loss": 0.02, "cheap_loss": 2.31, "cheap_held_out_loss": 2.4,
        "cheap_recall": 0.08, "best": tuple(best), "entries": tuple(entries),
        "agreement": {a: {b: spearman(first[a], first[b]) for b in first} for a in first},
        "default": f"nll + swaps{mark}", "notes": (f"a note{mark}",), "versions": {"torch": "2.13"},
    }  # fmt: skip
    return Comparison(**(given | changes))


EMPTY = {"entries": (), "best": (), "agreement": {}, "notes": (), "default": None, "versions": {}}
COMPARISONS = {
    "full": lambda: make_comparison(),
    "one-budget": lambda: make_comparison(names=NAMES[:4], budgets=("1/4",)),
    "six-budgets": lambda: make_comparison(budgets=tuple(f"{n}/8" for n in range(1, 7))),
    "one-selector": lambda: make_comparison(names=("nll",), seeds=(0,)),
    "forty-selectors": lambda: make_comparison(names=[f"selector_{n}" for n in range(38)]),
    "hostile": lambda: make_comparison(names=NAMES[:4], mark=HOSTILE),
    "nothing-measured": lambda: make_comparison(**EMPTY),
    "no-budgets": lambda: make_comparison(names=("nll",), budgets=()),
    "no-best-set": lambda: bare(make_comparison(names=NAMES[:4])),
}


def bare(comparison):
    """The same without a best set, so without regrets, and without held-out examples."""
    nothing = dict.fromkeys(("held_out_loss", "regret", "held_out_regret", "recall"))
    entries = tuple(dataclasses.replace(e, **nothing) for e in comparison.entries)
    return dataclasses.replace(comparison, entries=entries, best=(), source_recall=None)


def printed(comparison, width):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(report.comparison_table(comparison))
    return out.getvalue()


# --- The records --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_survives_json(name):
    made = COMPARISONS[name]()
    text = compared.dumps(made)
    again = compared.loads(text)
    assert again == made
    assert compared.dumps(again) == text
    assert json.loads(text)["model"] == made.model


def test_integers_are_written_as_they_will_be_read():
    made = make_comparison(source_loss=0)
    assert compared.dumps(compared.loads(compared.dumps(made))) == compared.dumps(made)


def test_what_cannot_be_read_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"comparison.entries\[0\].loss: nan .* not a finite"):
        broken = dataclasses.replace(make_comparison().entries[0], loss=math.nan)
        compared.dumps(make_comparison(entries=(broken,)))
    data = json.loads(compared.dumps(make_comparison()))
    data["entries"][3]["los"] = 1.0
    with pytest.raises(DataError, match=r"f.json.entries\[3\].los: unknown key. .*'loss'"):
        compared.loads(json.dumps(data), "f.json")
    with pytest.raises(DataError, match="not valid JSON"):
        compared.loads("{")


def test_budgets_must_be_those_of_the_comparison():
    made = make_comparison()
    with pytest.raises(DataError, match=r"entries\[0\].budget is '1/8', which is not in budgets"):
        make_comparison(budgets=("1/4", "1/2"), entries=made.entries, best=())
    with pytest.raises(DataError, match="comparison.best names '1/8' twice"):
        make_comparison(best=(*made.best, made.best[0]))
    with pytest.raises(DataError, match="comparison.budgets names '1/8' twice"):
        make_comparison(budgets=("1/8", "1/8"))


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # ties at their mean rank
        ([7, 7, 7], [1, 2, 3], 0.0),
        ([1.0], [2.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_spearman(a, b, wanted):
    assert spearman(a, b) == pytest.approx(wanted, abs=1e-12)
    assert spearman(b, a) == spearman(a, b)


def test_spearman_is_the_correlation_of_ranks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 9, 30).tolist(), rng.integers(0, 9, 30).tolist()
        wanted = np.corrcoef(compared.ranks(a), compared.ranks(b))[0, 1]
        assert spearman(a, b) == pytest.approx(wanted, abs=1e-12)
        assert spearman([math.exp(x) for x in a], b) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(DataError, match="3 values cannot be compared with 2"):
        spearman([1, 2, 3], [1, 2])


def test_rows_join_seeds_and_put_the_lowest_regret_first():
    found = compared.rows(make_comparison())
    assert list(found)[:2] == ["nll", "nll + swaps"]  # equal regret: by loss, then by name
    assert {len(entries) for entries in found.values()} == {3, 9, 15}
    means = [sum(e.regret for e in entries) / len(entries) for entries in found.values()]
    assert means == sorted(means)
    partly = [e for e in make_comparison().entries if (e.row, e.budget) != ("nll", "1/8")]
    assert list(compared.rows(make_comparison(entries=tuple(partly))))[-1] == "nll"


def test_rows_without_regrets_go_by_loss():
    whole = make_comparison()
    assert list(compared.rows(bare(whole))) == list(compared.rows(whole))


# --- The table ----------------------------------------------------------------------------------


def entry(label, budget, regret, **more):
    return Entry(
        selector=label.split(" ")[0], label=label, budget=budget, kept=((0, 0),), loss=1 + regret,
        regret=regret, **more,
    )  # fmt: skip


def test_the_regret_table_has_the_numbers():
    made = make_comparison(
        budgets=("1/8", "1/4"),
        entries=(
            entry("fisher", "1/8", 0.0124, held_out_regret=0.0151, forwards=10, backwards=4),
            entry("fisher", "1/4", 2.314, held_out_regret=-0.004, forwards=10, cpu_seconds=3.25),
            entry("nll (seed 0)", "1/8", 0.0, forwards=1234.0),
            entry("nll (seed 1)", "1/8", 0.0002, forwards=1234.0),
            entry("nll (seed 0)", "1/4", 0.1),
            entry("nll (seed 1)", "1/4", 0.3),
            entry("random (seed 0)", "1/4", 123.4),
        ),
        best=(
            Best(
                budget="1/8", kept=((3, 0),), loss=0.5124, held_out_loss=0.53, sets_tried=70,
                exhaustive=True, forwards=10.5,
            ),
        ),
        default="nll",
    )  # fmt: skip
    head, rows = report.regret_table(made)
    assert head == ["", "1/8", "1/4", "passes", "CPU s"]
    assert rows == [
        ["best set: its loss", "0.512 (0.530)", "-", "10", "-"],
        ["  sets tried", "all 70", "", "", ""],
        ["nll *", "<.001", "0.200", "617", "0"],
        ["  range, 2 seeds", "0…<.001", "0.100…0.300", "", ""],
        ["fisher", "0.012 (0.015)", "2.31 (-0.004)", "12", "1.6"],
        ["random (baseline)", "-", "123", "0", "0"],
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMPARISONS)
def test_no_cell_is_cut_in_a_terminal(name, width):
    made = COMPARISONS[name]()
    text = printed(made, width)
    assert max(len(line) for line in text.splitlines() or [""]) <= width
    head, rows = report.regret_table(made)
    for row in [head, *rows] if rows else []:
        for cell in row:
            assert cell.strip() in text, f"{cell!r} was wrapped or cut"


def test_three_budgets_need_one_block_and_six_go_on_below():
    assert printed(make_comparison(), 80).count("halo") == 1
    wide = printed(COMPARISONS["six-budgets"](), 80)
    assert wide.count("halo") == 2
    assert sum("passes  CPU s" in line for line in wide.splitlines()) == 1


def test_the_table_says_what_its_numbers_are():
    text = " ".join(printed(make_comparison(), 80).split())
    assert "on the 32 examples that the choice was made on" in text
    assert "In parentheses: on held-out examples" in text
    assert "all 1,820" in text and "1,820, not all" in text
    assert "the true regret may be larger" in text
    assert "uniform (baseline)" in text and "nll + swaps *" in text
    honest = " ".join(printed(COMPARISONS["no-best-set"](), 80).split())
    assert "parentheses" not in honest and "larger" not in honest


def test_names_are_shown_and_never_run_in_the_terminal():
    text = printed(make_comparison(names=("[bold]b",), mark="[/x]\x1b[31m"), 200)
    assert "[bold]b[/x]\\x1b[31m" in text
    assert "\x1b[31m" not in text


# --- The pictures -------------------------------------------------------------------------------

PICTURES = {
    **{f"budget-{n}": lambda f=f: report.budget_picture(f()) for n, f in COMPARISONS.items()},
    **{
        f"agreement-{n}": lambda f=f: report.agreement_picture(f())
        for n, f in COMPARISONS.items()
        if n in ("full", "one-selector", "forty-selectors", "hostile")
    },
    "agreement-with-gaps": lambda: report.agreement_picture(
        make_comparison(agreement={"a": {"b": 0.5}, "b": {}, "c": {"a": -1.0}})
    ),
    "pairs-8": lambda: report.pairs_picture(make_scores(8, pairs=True)),
    "pairs-48": lambda: report.pairs_picture(make_scores(48, pairs=True)),
    "pairs-24x12": lambda: report.pairs_picture(make_scores(24, 12, pairs=True)),
    "pairs-hostile": lambda: report.pairs_picture(make_scores(3, pairs=True, selector=HOSTILE)),
    "scores-1": lambda: report.scores_picture(make_scores(1, ranks=True)),
    "scores-64-ranks": lambda: report.scores_picture(
        make_scores(64, ranks=True), make_plan(make_scores(64))
    ),
    "scores-64x32": lambda: report.scores_picture(
        make_scores(64, 32), make_plan(make_scores(64, 32))
    ),
    "scores-1x2": lambda: report.scores_picture(make_scores(1, 2), make_plan(make_scores(1, 2))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_something_and_cuts_nothing_off(name):
    image = Image.open(io.BytesIO(PICTURES[name]()))
    assert image.format == "PNG" and image.size[0] == 1200 and 250 <= image.size[1] <= 1800
    assert image.info.keys() <= {"transparency", "gamma", "dpi"}  # no software, no time
    pixels = np.asarray(image.convert("RGB"))
    assert 0.01 < (pixels.min(axis=2) < 250).mean() < 0.98  # neither blank nor one block
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert min(part.min() for part in border) > 200


@pytest.mark.parametrize(
    "name", ["budget-one-selector", "budget-one-budget", "pairs-8", "scores-1x2"]
)
def test_the_same_inputs_give_the_same_bytes(name):
    assert PICTURES[name]() == PICTURES[name]()


def test_one_unit_has_no_pair():
    assert report.pairs_picture(make_scores(1, pairs=True)).startswith(b"\x89PNG")


def test_what_was_not_measured_cannot_be_drawn():
    with pytest.raises(PlanError, match="scores.pairs is missing"):
        report.pairs_picture(make_scores(8))
    with pytest.raises(DataError, match="comparison.agreement is empty"):
        report.agreement_picture(make_comparison(**EMPTY))


@pytest.mark.parametrize(
    "odd", [None, 3, {}, {"low": [[1]]}, {"low": [[1]], "high": [[2]]}, {"low": 1, "high": "x"}]
)
def test_ranks_of_another_shape_are_left_out(odd):
    plain = make_scores(8)
    told = dataclasses.replace(plain, provenance={"ranks": odd})
    assert report.scores_picture(told) == report.scores_picture(plain)


def test_ranks_may_be_missing_for_some_layers():
    told = make_scores(8, ranks=True)
    told.provenance["ranks"]["low"][2] = [None]
    without = report.scores_picture(make_scores(8))
    assert report.scores_picture(told) != without
    told.provenance["ranks"]["low"][:] = [[None]] * 8
    assert report.scores_picture(told) == without


def test_selectors_that_agree_stand_together():
    from morph.report._selection import _alike

    near = [["a", "d"], ["b", "e"], ["c", "f"]]
    known = {
        x: {y: 1.0 if x == y else 0.9 if {x, y} in map(set, near) else 0.1 for y in "abcdef"}
        for x in "abcdef"
    }
    order = _alike(known)
    assert sorted(order) == list("abcdef")
    assert all(abs(order.index(x) - order.index(y)) == 1 for x, y in near)


def test_pairs_are_part_of_a_report(tmp_path):
    paths = report.report(tmp_path, scores=make_scores(6, pairs=True))
    assert [p.name for p in paths] == ["report.html", "report.md", "scores.png", "pairs.png"]
    assert "](pairs.png)" in paths[1].read_text()


# --- The page -----------------------------------------------------------------------------------


def test_a_comparison_is_one_page_its_twin_and_two_pictures(tmp_path):
    made = make_comparison(names=NAMES[:4])
    paths = report.comparison_report(tmp_path / "out", made)
    names = ["compare.html", "compare.md", "budget.png", "agreement.png"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    page, twin = paths[0].read_text(), paths[1].read_text()
    for title in ("Regret", "Recall", "The best sets", "Pictures", "Notes", "Versions"):
        assert f"<h2>{title}</h2>" in page and f"## {title}" in twin
    for words in ("two-hop-16L", "ab" * 32, "32 examples of 512 tokens", "window=128", "a note"):
        assert words in page and words in twin
    assert "| 1/8 | 0, 1 | all 1,820 |" in twin
    again = report.comparison_report(tmp_path / "again", made)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


@pytest.mark.parametrize("name", ["nothing-measured", "no-budgets", "no-best-set", "one-budget"])
def test_a_page_leaves_out_what_is_not_known(tmp_path, name):
    made = COMPARISONS[name]()
    paths = report.comparison_report(tmp_path, made)
    drawn = ["budget.png"] * bool(made.entries) + ["agreement.png"] * bool(made.agreement)
    assert [p.name for p in paths[2:]] == drawn
    twin = paths[1].read_text()
    assert ("## Recall" in twin) == any(e.recall is not None for e in made.entries)
    assert ("## The best sets" in twin) == bool(made.best)


def test_a_page_holds_no_foreign_markup(tmp_path):
    paths = report.comparison_report(tmp_path, make_comparison(names=("halo", "nll"), mark=HOSTILE))
    page, twin = paths[0].read_text(), paths[1].read_text()
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!data:image/png)', page)
    assert "<" not in twin and "http:" not in twin
    assert "\x1b" not in page + twin
    rows = [line for line in twin.splitlines() if line.startswith("| halo")]
    assert len(rows) == 2 and [len(re.findall(r"(?<!\\)\|", r)) for r in rows] == [7, 5]


def test_a_page_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out"):
        report.comparison_report(tmp_path / "file" / "out", make_comparison(**EMPTY))


def test_a_comparison_needs_no_torch():
    code = (
        "import sys; from morph import comparison, report\n"
        "c = comparison.Comparison(model='m', model_sha256='', mixer='sliding', budgets=('1/4',),"
        " task='t', examples=1, seq_len=8, source_loss=0.0, cheap_loss=1.0)\n"
        "report.regret_table(c); report.comparison_table(c); comparison.dumps(c)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.budget_picture(c)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
