"""A fine-tuning, what it took, and what restoring brings back: rows, stops, files and intervals."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from morph import checkpoint, cli, repair, report
from morph.errors import DataError, RecipeError
from morph.evaluation import Hit, Measured, paired_interval
from morph.plan import loads_plan
from morph.recipes import schema
from morph.recipes.schema import Finetune

REPO = Path(__file__).resolve().parent.parent

RECIPE = """\
model: model
data: {text: [text.txt], limit: 20K}
select: {selector: uniform, budget: 1/4}
mixer: {name: sliding, options: {window: 16}}
training: {probe_length: 160, probe_examples: 2}
finetune:
  {tokens: 1536, tasks: [sums], seq_len: 128, batch_size: 2, text: 0.25, lr: 1e-3, problems: 5}
restore: {}
evaluate:
  {tasks: [multikey], lengths: [160], examples: 4, depths: 2, perplexity_tokens: 512, seq_len: 128,
   baselines: [], speed_length: 32, decode_tokens: 1}
"""


def morph(*arguments) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as done:
            code = done.code
    return int(code or 0), out.getvalue()


# --- Intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, 50])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(count):
    """Every outcome of n pairs is weighed by its probability: no draws, no luck."""
    intervals = {
        (lost, gained): paired_interval(lost, gained, count)
        for lost in range(count + 1)
        for gained in range(count + 1 - lost)
    }
    covered = []
    for down, up in itertools.product((0.0, 0.02, 0.1, 0.3, 0.45), repeat=2):
        same, total = 1 - down - up, 0.0
        for (lost, gained), (low, high) in intervals.items():
            if low <= up - down <= high:
                ways = math.comb(count, lost) * math.comb(count - lost, gained)
                total += ways * down**lost * up**gained * same ** (count - lost - gained)
        covered.append(total)
    assert min(covered) > 0.93
    assert sum(covered) / len(covered) < 0.99


def hits_of(outcomes: str, task: str = "multikey", length: int = 256) -> list[Hit]:
    return [
        Hit(example=i, task=task, length=length, depth=0.5, correct=letter == "1")
        for i, letter in enumerate(outcomes)
    ]


def test_differences_are_those_of_the_items():
    rng = random.Random(0)
    sides = {n: "".join(rng.choices("01", k=60)) for n in ("pre", "post", "restored", "other")}
    found = repair.compare(
        {n: hits_of(o) for n, o in sides.items()}, dict.fromkeys(sides), tuned=["sums"]
    )
    pairs = {(c.since, c.found.model): c.found for c in found.changes}
    names = list(sides)
    assert set(pairs) == {("pre", n) for n in names[1:]} | {("post", n) for n in names[2:]}
    for (since, name), d in pairs.items():
        steps = [int(b) - int(a) for a, b in zip(sides[since], sides[name])]
        assert d.difference == pytest.approx(sum(steps) / 60)
        assert (d.lost, d.gained) == (steps.count(-1), steps.count(1))
        assert (d.low, d.high) == paired_interval(d.lost, d.gained, 60)
    assert {s.name: s.outcomes["multikey/256"] for s in found.sides} == sides


def test_the_share_that_is_back_against_every_resample_there_is():
    # Few items with steps between their shares so wide that 20,000 draws must find the same ones
    items = [(1, 1, 1), (0, 0, 1), (1, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1)]
    whole, low, high = repair.share_back(items, draws=20_000)
    assert whole == 2.0
    shares = []
    for drawn in itertools.product(items, repeat=len(items)):
        a, b, c = (sum(column) for column in zip(*drawn))
        if a > b:
            shares.append((c - b) / (a - b))
    shares.sort()
    assert low == shares[int(0.025 * len(shares))]
    assert high == shares[int(0.975 * len(shares))]
    assert (whole, low, high) == repair.share_back(items, draws=20_000)  # no luck of the day


def test_a_share_is_told_only_where_something_was_lost():
    sides = {"pre": "1" * 40, "post": "1" * 20 + "0" * 20, "restored": "1" * 30 + "0" * 10}
    both = {n: hits_of(o) + hits_of("1" * 40, length=512) for n, o in sides.items()}
    solved = {"pre": "0" * 9, "post": "1" * 9, "restored": "110" * 3}
    for name, letters in solved.items():  # problems have any length
        hits = hits_of(letters, "sums")
        both[name] += [replace(h, length=30 + h.example % 4) for h in hits]
    found = repair.compare(both, dict.fromkeys(sides), tuned=["sums"])
    shares = {(b.task, b.length): b.share for b in found.back}
    assert shares == {("multikey", 256): 0.5, ("multikey", 512): None}
    assert [r.count for r in found.sides[1].rows if r.task == "sums"] == [9]  # one cell
    again = repair.loads(repair.dumps(found))
    assert repair.dumps(again) == repair.dumps(found)
    assert again.back == found.back


def test_a_repair_needs_pre_and_post_first():
    with pytest.raises(DataError, match="pre and post, in this order"):
        repair.compare({"post": [], "pre": []}, {}, tuned=[])
    with pytest.raises(DataError, match="nothing was lost"):
        repair.share_back([(1, 1, 1)] * 4)


def test_what_pre_cannot_do_has_no_share():
    sides = {"pre": "0" * 30, "post": "0" * 30, "restored": "0" * 30}
    found = repair.compare({n: hits_of(o) for n, o in sides.items()}, {}, tuned=[])
    assert found.back == ()
    assert "pre itself cannot do multikey at 256 tokens" in found.notes[0]


def test_perplexity_is_compared_context_by_context():
    def loss(*means):
        value = sum(means) / len(means)
        return Measured(value=value, ppl=math.exp(value), tokens=9, stderr=0.1, sequences=means)

    hits = {n: hits_of("1100") for n in ("pre", "post", "restored")}
    losses = {"pre": loss(2.0, 3.0), "post": loss(2.5, 3.7), "restored": loss(2.4, 3.6)}
    found = repair.compare(hits, losses, tuned=[])
    told = {(c.since, c.found.model): c.found for c in found.changes if c.found.length == 0}
    assert told["pre", "post"].difference == pytest.approx(0.6)
    assert told["post", "restored"].difference == pytest.approx(-0.1)
    assert abs(told["post", "restored"].high - told["post", "restored"].low) < 1e-9


# --- Recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "needle"),
    [
        ("restore: {}", "restore: nothing is fine-tuned here"),
        ("finetune: {}", "finetune: missing tokens"),
        ("finetune: {tokens: 1K, tasks: []}", "finetune.tasks: name one"),
        ("finetune: {tokens: 1K, tasks: [sum]}", "Did you mean 'sums'"),
        ("finetune: {tokens: 1K, tasks: [sums, sums]}", "finetune.tasks: sums is listed twice"),
        ("finetune: {tokens: 1K, token: 3}", "finetune.token: unknown key"),
        ("finetune: {tokens: 1K, text: 2}", "a share between 0 and 1"),
        ("finetune: {tokens: 1K, problems: 0}", "finetune.problems: 0 is out of range"),
        ("finetune: {tokens: 1K, stop_below: 0.5}", "set finetune.probe_every too"),
        ("finetune: {tokens: 1K, freeze: [q, q]}", "finetune.freeze: q is listed twice"),
        ("finetune: {tokens: 1K, freeze: [gate]}", "finetune.freeze[0]"),
        ("finetune: {tokens: 1K, freeze: [q, k, v, o, norm, rest]}", "nothing would train"),
        ("finetune: {tokens: 1K}\nrestore: {method: ridge}", "restore.rho: it is needed by"),
        ("finetune: {tokens: 1K}\nrestore: {alpha: 0.5}", "restore.alpha: it belongs to"),
        ("finetune: {tokens: 1K}\nrestore: {method: interpolate, alpha: 2}", "restore.alpha: 2"),
        ("finetune: {tokens: 1K}\nrestore: {include: [bias]}", "name a projection"),
        ("finetune: {tokens: 1K}\nrestore: {method: ridge, rho: 1, include: [q]}", "needs q and k"),
        ("finetune: {tokens: 1K, freeze: [q, k]}\nrestore: {}", "holds k, q fixed"),
    ],
)
def test_a_recipe_that_could_not_do_what_it_says(sections, needle):
    with pytest.raises(RecipeError) as caught:
        schema.load_text(f"model: m\n{sections}\n", "r.yaml")
    assert needle in str(caught.value), caught.value
    assert str(caught.value).startswith("r.yaml")
    assert caught.value.exit_code == 2


def test_sections_are_read_set_and_written_back():
    text = "model: m\nfinetune: {tokens: 64K, freeze: [q, k]}\n"
    found = schema.load_text(text)
    assert found.finetune == Finetune(tokens=64_000, freeze=("q", "k"))
    assert found.restore is None
    assert schema.load_text(schema.dumps(found)) == found
    made = schema.apply_sets({"model": "m"}, ["finetune.tokens=1K", "restore.method=exact"])
    assert schema.from_data(made).finetune.tokens == 1000


def test_the_shipped_recipe():
    code, told = morph("check", "qk_restore")
    assert code == 0, told
    assert "qk_restore: valid" in told
    code, told = morph("run", "qk_restore", "--dry-run")
    assert code == 0, told
    assert "fine-tuning" in told


# --- The run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random model and its text, a recipe, and what `morph run` makes of them."""
    root = tmp_path_factory.mktemp("repair")
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(REPO / "examples" / "tiny_model.py"))["main"](root)
    (root / "recipe.yaml").write_text(RECIPE)
    code, told = morph("run", root / "recipe.yaml", "--out", root / "out")
    assert code == 0, told
    (root / "told.txt").write_text(told)
    return root


def floats(folder: Path) -> dict[str, bytes]:
    found = checkpoint.Checkpoint.open(folder, strict=False)
    return {n: found.read_float(n).tobytes() for n in found.tensors}


def test_the_restored_folder_is_post_but_for_q_and_k_of_full_layers(tiny):
    pre, post, out = (floats(tiny / "out" / n) for n in ("checkpoint", "tuned", "restored"))
    plan = loads_plan((tiny / "out" / "plan.json").read_text())
    parts = [f"layers.{i}.self_attn.{p}_proj.weight" for i in plan.full_layers for p in "qk"]
    names = {f"model.{p}" for p in parts}
    assert {n for n in out if out[n] != post[n]} == names
    assert all(out[n] == pre[n] for n in names)
    assert {n for n in post if post[n] == pre[n]} == {"model.embed_tokens.weight"}


def test_a_run_tells_all_three(tiny):
    out = tiny / "out"
    found = repair.loads((out / "repair.json").read_text())
    assert [s.name for s in found.sides] == ["pre", "post", "restored"]
    assert {k: len(v) for k, v in found.sides[0].outcomes.items()} == {"multikey/160": 4, "sums": 5}
    assert found.tuning["stopped"] == "tokens"
    assert found.tuning["tokens_seen"] == 1536
    assert found.restoring["tensors"] == 4
    roles = {d.role for d in found.drift}
    assert {"q", "k", "v", "o", "mlp"} <= roles
    assert all(d.drift > 0 for d in found.drift)
    page = (out / "repair.html").read_text()
    assert "The fine-tuning lowered recall in 0 of 1 cells" in page
    assert "data:image/png" in page
    assert "sums solved, n=5" in (out / "repair.md").read_text()
    assert (out / "repair.png").read_bytes()[:4] == b"\x89PNG"
    told = (tiny / "told.txt").read_text()
    assert "pre" in told
    assert "since post, 95 %" in told
    assert "repair report" in told
    record = json.loads((out / "tuned" / "morph.json").read_text())["provenance"]
    assert record["pre"]["sha256"] == checkpoint.Checkpoint.open(out / "checkpoint").fingerprint


def test_a_change_of_the_restore_redoes_nothing_else(tiny, tmp_path):
    out = tiny / "out"
    sizes = {p: p.stat().st_mtime_ns for p in (out / "tuned").iterdir()}
    code, told = morph(
        "run", tiny / "recipe.yaml", "--out", out, "--set", "restore.include=[q]",
    )  # fmt: skip
    assert code == 0, told
    kept = "".join(told.split())
    assert f"finetune:unchanged,kept{out}/tuned" in kept
    assert {p: p.stat().st_mtime_ns for p in (out / "tuned").iterdir()} == sizes
    assert repair.loads((out / "repair.json").read_text()).restoring["tensors"] == 2
    code, told = morph("run", tiny / "recipe.yaml", "--out", out, "--set", "restore.include=[q]")
    assert code == 0, told
    assert f"repair:unchanged,kept{out}/repair.json" in "".join(told.split())


def test_what_cannot_be_restored_is_not_tuned_first(tiny):
    sets = ["--set", "restore.layers=99", "--set", "finetune.tokens=4K"]
    before = sorted(p.name for p in (tiny / "out").iterdir())
    code, told = morph("run", tiny / "recipe.yaml", "--out", tiny / "out", *sets)
    assert code == 2, told
    assert "99" in told
    assert sorted(p.name for p in (tiny / "out").iterdir()) == before


def test_a_page_of_a_tuning_alone():
    sides = {"pre": "0" * 9, "post": "1" * 9}
    hits = {n: hits_of(o, "sums", 30) for n, o in sides.items()}
    found = repair.compare(hits, {}, tuned=["sums"])
    assert report.repair_picture(found)[:4] == b"\x89PNG"
    head, rows = report.repair_numbers(found)
    assert head == ["", "pre", "post"]
    assert rows[0] == ["sums solved, n=9", "0.000", "1.000"]
    assert report.repair_conclusion(found) == "No recall was asked for."
