"""Pictures, tables and pages: right numbers, no markup from names, the same bytes every time."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from morph import report
from morph.errors import StorageError
from morph.evaluation import (
    CacheBytes,
    Evaluation,
    Hit,
    Measured,
    ModelResult,
    Speed,
    cannot,
    differences,
    summarise,
)
from morph.plan import Budget, CacheCost, Geometry, Scores, full_plan
from morph.recipes.schema import Mixer, Recipe, Stage
from morph.selection import choose

HOSTILE = "<script>alert(1)</script>[/x]$\\frac{$|`\n\x1b[31m&雪 http://evil.example"
LAYERS = 8
GEOMETRY = Geometry(
    num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    v_head_dim=8, hidden_size=32, windows=(None,) * 7 + (64,),
)  # fmt: skip


def make_scores(granularity="layer", selector="fisher", unit="nats"):
    width = GEOMETRY.units(granularity)
    values = tuple(tuple((3 * i + 5 * u) % 7 - 1.0 for u in range(width)) for i in range(LAYERS))
    return Scores(
        selector=selector, model_type="qwen3", granularity=granularity, values=values, unit=unit,
        provenance={"seconds": 12.3, "tokens": 65536},
    )  # fmt: skip


def make_plan(granularity="layer", mixer="sliding"):
    return choose(
        make_scores(granularity), Budget.parse("1/4"), geometry=GEOMETRY, mixer=mixer,
        cache=CacheCost(tokens=128),
    )  # fmt: skip


def make_evaluation(names=("source", "hybrid", "window"), able=True, task="multikey"):
    hits, losses = {}, {}
    for n, name in enumerate(names):
        hits[name] = [
            Hit(
                example=i, task=task, length=length, depth=(i % 3) / 2,
                correct=able and length == 512 and i % (5 - n) != 0,
            )
            for i, length in enumerate([512] * 30 + [4096] * 30)
        ]  # fmt: skip
        losses[name] = Measured(
            value=2.0 + n / 10,
            ppl=7.389 + n,
            tokens=2048,
            stderr=0.1,
            sequences=(2.0 + n / 10, 2.1),
        )
    unable = cannot(summarise(hits[names[0]]), names[0])
    models = tuple(
        ModelResult(
            name=name,
            pattern="F" * 8 if n == 0 else "SSFFSSSo",
            recall=summarise(hits[name]),
            perplexity=losses[name],
            cache=(
                CacheBytes(tokens=1024, bytes=1 << 20 >> n, ratio=1 / 2**n),
                CacheBytes(tokens=32768, bytes=1 << 25 >> n, ratio=1 / 2**n),
            ),
            held=CacheBytes(tokens=1024, bytes=1 << 20 >> n, ratio=1 / 2**n),
            speed=Speed(
                length=1024,
                decode_tokens=8,
                rounds=3,
                prefill_tokens_per_second=12345.6,
                decode_tokens_per_second=33.3 * (n + 1),
                prefill_cpu_seconds=0.1,
                decode_cpu_seconds=0.2,
                prefill_ratio=1.0,
                decode_ratio=n + 1.0,
            ),
        )
        for n, name in enumerate(names)
    )
    return Evaluation(
        models=models,
        differences=differences(hits, losses, unable=unable),
        notes=tuple(unable.values()),
    )


def everything(name="Qwen/Qwen3-1.7B"):
    return {
        "recipe": Recipe(
            model=name, mixer=Mixer(options={"window": 128}),
            distill=(Stage(loss="align", tokens=65536),),
        ),
        "scores": make_scores(selector=name, unit=name),
        "plan": make_plan(),
        "evaluation": make_evaluation((f"{name} source", f"{name} hybrid"), task=name),
        "provenance": {"model": {"path": name, name: "ab" * 32}, "tokens": 3, "files": [name]},
        "commands": {f"Load {name}": f"import morph\n```\n{name}", "Next": "morph verify out"},
        "training": [
            {"stage": name, "step": k, "loss": 3 / k, "tokens": k * 1000, "seconds": 2.0 * k}
            for k in range(1, 12)
        ],
    }  # fmt: skip


PICTURES = {
    "scores": lambda: report.scores_picture(make_scores(), make_plan()),
    "scores-without-plan": lambda: report.scores_picture(make_scores()),
    "scores-of-kv-heads": lambda: report.scores_picture(
        make_scores("kv_head"), make_plan("kv_head")
    ),
    "scores-of-heads": lambda: report.scores_picture(make_scores("head"), make_plan("head")),
    "scores-hostile": lambda: report.scores_picture(make_scores(selector=HOSTILE, unit=HOSTILE)),
    "plan": lambda: report.plan_picture(make_plan()),
    "plan-of-heads": lambda: report.plan_picture(make_plan("head", "gated_delta")),
    "plan-unknown-mixer": lambda: report.plan_picture(make_plan("head", HOSTILE)),
    "recall": lambda: report.recall_picture(make_evaluation()),
    "recall-hostile": lambda: report.recall_picture(make_evaluation((HOSTILE, "b"), task=HOSTILE)),
    "recall-of-one-model": lambda: report.recall_picture(make_evaluation(("source",))),
    "depth": lambda: report.depth_picture(make_evaluation()),
    "depth-hostile": lambda: report.depth_picture(make_evaluation((HOSTILE, "b"), task=HOSTILE)),
    "cache": lambda: report.cache_picture(
        {"source": full_plan("qwen3", GEOMETRY), HOSTILE: make_plan()}, "bfloat16"
    ),
    "training": lambda: report.training_picture(everything(HOSTILE)["training"]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_something_and_cuts_nothing_off(name):
    image = Image.open(io.BytesIO(PICTURES[name]()))
    assert image.format == "PNG" and image.size[0] == 1200 and image.size[1] >= 250
    assert image.info.keys() <= {"transparency", "gamma", "dpi"}  # no software, no time
    pixels = np.asarray(image.convert("RGB"))
    assert 0.02 < (pixels.min(axis=2) < 250).mean() < 0.98  # neither blank nor one block
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert min(part.min() for part in border) > 200


def test_user_settings_of_matplotlib_change_nothing():
    import matplotlib

    before = report.plan_picture(make_plan())
    with matplotlib.rc_context({"font.size": 30, "xtick.labelsize": 30}):
        assert report.plan_picture(make_plan()) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_a_mixer_keeps_its_colour():
    from morph.report._pictures import mixer_colours

    alone = mixer_colours(["gated_delta"])["gated_delta"]
    assert mixer_colours(["full", "gated_delta", "sliding"])["gated_delta"] == alone
    many = mixer_colours(["full", "sliding", *"abcdef"])
    assert len(set(many.values())) == 8


def test_the_table_has_the_numbers():
    head, rows = report.numbers(make_evaluation())
    cells = {row[0]: row[1:] for row in rows}
    assert head == ["", "source", "hybrid", "window"]
    assert cells["layers as in source"] == ["8 of 8", "3 of 8", "3 of 8"]
    assert cells["multikey 512, n=30"] == ["0.80", "0.73", "0.67"]
    assert cells["perplexity"] == ["7.389", "8.389 ×1.14", "9.389 ×1.27"]
    assert cells["cache at 32K"] == ["32MiB", "16MiB ×0.5", "8MiB ×0.25"]
    assert cells["decode, tokens/s"] == ["33.3", "66.6 ×2.00", "99.9 ×3.00"]
    assert cells["prefill, tokens/s"][0] == "12,346"


def test_zero_before_is_not_damage():
    """Where the source has nothing right there is no difference to read, but a note."""
    evaluation = make_evaluation()
    _, rows = report.numbers(evaluation)
    names = [row[0] for row in rows]
    at = names.index("multikey 4K, n=30")
    assert rows[at][1:] == ["0.00, cannot", "(0.00)", "(0.00)"]
    assert not names[at + 1].startswith("  ")
    assert "says nothing about damage" in report.markdown(evaluation)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width):
    evaluation = make_evaluation(("source", "hybrid", "uniform", "window"))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(report.table(evaluation))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = out.getvalue()
    _, rows = report.numbers(evaluation)
    for row in rows:
        for cell in row:
            assert cell.strip() in text, f"{cell!r} was wrapped or cut"


def test_names_are_shown_and_never_run_in_the_terminal():
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system=None).print(
        report.table(make_evaluation((HOSTILE, "[bold]b")))
    )
    assert "[bold]b" in out.getvalue()
    assert "[/x]" in out.getvalue()
    assert "\x1b[31m" not in out.getvalue()


class Page(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_is_one_page_and_its_twin(tmp_path):
    paths = report.report(tmp_path / "out", **everything())
    pngs = ["plan", "scores", "recall", "depth", "cache", "training"]
    assert [p.name for p in paths] == ["report.html", "report.md", *(f"{n}.png" for n in pngs)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    page, twin = paths[0].read_text(), paths[1].read_text()
    titles = ["What was done", "What it kept", "Training", "What it cost", "Pictures"]
    for title in [*titles, "How to use it", "Provenance"]:
        assert f"<h2>{title}</h2>" in page
        assert f"## {title}" in twin
    assert [n for n in pngs if f"]({n}.png)" in twin] == pngs
    for words in ("2 of 8", "65,536", "morph verify out", "ab" * 32, "align: 65,536 tokens"):
        assert words in page
    assert paths[0].stat().st_size < 500_000


def test_a_report_loads_nothing_and_holds_no_foreign_markup(tmp_path):
    page = Page((report.report(tmp_path, **everything(HOSTILE))[0]).read_text())
    assert page.open == []
    assert "script" not in page.tags and "a" not in page.tags and "link" not in page.tags
    assert page.tags.count("img") == 6
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


def test_markdown_holds_no_foreign_markup(tmp_path):
    text = report.report(tmp_path, **everything(HOSTILE))[1].read_text()
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1\n", "", text)
    assert "````\nimport morph\n```\n" in text  # code cannot end its own block
    assert "<" not in outside
    assert not re.search(r"(?<!\\)`", outside)
    assert "http:" not in outside
    assert "\x1b" not in text
    widths = {line.count(" | ") for line in outside.splitlines() if line.startswith("| source")}
    assert len(widths) == 1  # a `|` in a name adds no column


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    first = report.report(tmp_path / "a", **everything())
    again = report.report(tmp_path / "b", **everything())
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]


@pytest.mark.parametrize("part", sorted(everything()))
def test_every_part_may_be_missing_or_alone(tmp_path, part):
    given = everything()
    alone = {part: given.pop(part)}
    given.pop("evaluation", None)  # the slow pictures; with the rest of them in other tests
    for n, parts in enumerate((alone, given)):
        paths = report.report(tmp_path / str(n), **parts)
        assert Page(paths[0].read_text()).open == []
        assert paths[1].read_text().startswith("# morph")


def test_costs_are_listed(tmp_path):
    costs = {"plan seconds": 3.25, "evaluation seconds": 1234.5, "model": "m"}
    page = report.report(tmp_path, provenance=costs)[1].read_text()
    assert "| plan | 3.2 |" in page and "| evaluation | 1,234 |" in page
    assert page.count("seconds") == 1  # the head of the table, no row of the provenance


def test_a_report_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out"):
        report.report(tmp_path / "file" / "out", plan=make_plan())


def test_a_report_needs_no_torch():
    code = (
        "import sys; from morph import report; from morph.plan import *\n"
        "g = Geometry(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,"
        " head_dim=8, v_head_dim=8, hidden_size=16, windows=(None, None))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report.plan_picture(full_plan('llama', g))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
