"""Recipes: strict YAML, nearest names, ranges, single values set from outside, canonical text."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import pytest

from morph import registry
from morph.errors import MorphError, PlanError, RecipeError, UnknownName, UsageError
from morph.recipes import schema
from morph.recipes.schema import Recipe, Stage, apply_sets, dumps, load, load_text

PARTS = {
    "selectors/probe.py": '''"""Counts."""
from dataclasses import dataclass
from typing import Literal
@dataclass(frozen=True, kw_only=True)
class Options:
    samples: int = 8
    share: float = 0.5
    label: str | None = None
    order: Literal["first", "last"] = "first"
    sizes: tuple[int, ...] = ()
''',
    "selectors/needy.py": '"""Needs an option."""\nclass Options:\n    path: str\n',
    "selectors/nll.py": '"""The default."""\nclass Options:\n    samples: int = 8\n',
    "mixers/sliding.py": '"""A window."""\nclass Options:\n    window: int = 64\n',
    "families/llama.py": '"""A family."""\n',
    "recipes/quick.yaml": "# A recipe for tests.\nmodel: some/model\nselect: {selector: probe}\n",
}

FULL = """\
model: some/model
select:
  selector: probe
  budget: 1/4
  keep: [0, [3, 1]]
  options:
    samples: 4
mixer:
  name: sliding
  options: {window: 128}
distill:
  - {loss: align, tokens: 64K, lr: 1e-3}
  - loss: logits
    tokens: 2M
"""


@pytest.fixture(autouse=True)
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A registry of parts made for these tests, so that they do not hang on which parts ship."""
    root = tmp_path / "parts"
    for name, text in PARTS.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(registry, "ROOT", root)
    registry.names.cache_clear()
    yield root
    registry.names.cache_clear()


def recipe(**sections: str) -> str:
    """A minimal recipe with flow-style sections."""
    return "model: m\n" + "".join(f"{key}: {value}\n" for key, value in sections.items())


def refuse(text: str, *needles: str, error: type[MorphError] = RecipeError) -> str:
    """Assert that `text` is refused with every needle in one line; return the message."""
    with pytest.raises(error) as caught:
        load_text(text, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("r.yaml")
    for needle in needles:
        assert needle in message, message
    assert caught.value.exit_code == 2
    return message


# --- What is read -------------------------------------------------------------------------------


def test_full_recipe():
    got = load_text(FULL)
    assert got.select.selector == "probe"
    assert got.select.keep == (0, (3, 1))
    assert got.select.options == {"samples": 4}
    assert got.mixer.options == {"window": 128}
    assert got.distill[0] == Stage(loss="align", tokens=64_000, lr=1e-3)
    assert got.distill[1].tokens == 2_000_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1e3", 1000.0), ("1E+2", 100.0), (".5", 0.5), ("3.", 3.0), ("-7", -7),
        ("0x1f", 31), ("0o17", 15), ("010", 10), ("true", True), ("False", False), ("~", None),
        ("null", None), ("no", "no"), ("on", "on"), ("yes", "yes"), ("off", "off"), ("y", "y"),
        ("12:30:45", "12:30:45"), ("2026-01-02", "2026-01-02"), ("1_000", "1_000"),
        ("0b11", "0b11"), ("'7'", "7"), ('"true"', "true"), ("!!str 7", "7"), ("! 7", "7"),
        ("!!float 3", 3.0), ("<<", "<<"), ("=", "="), ("${HOME}", "${HOME}"), ("tRUE", "tRUE"),
    ],
    ids=str,
)  # fmt: skip
def test_scalars_are_yaml_1_2(text: str, value: object):
    got = apply_sets({}, [f"x={text}"])["x"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("budget", ["7", "1/4", "0.25", "25%", "4096B"])
def test_budget_needs_no_quotes(budget: str):
    assert load_text(recipe(select=f"{{budget: {budget}}}")).select.budget == budget


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        (recipe(slect="{}"), ("line 2", "slect: unknown key", "Did you mean 'select'?")),
        ("model: m\nselect:\n  selector: probe\n  budgt: 1/4\n",
         ("line 4", "select.budgt: unknown key", "Did you mean 'budget'?")),
        (recipe(distill="[{loss: align, tokns: 4}]"), ("distill[0].tokns", "'tokens'")),
        (recipe(seed="1\nseed: 2"), ("line 3", "'seed' appears twice")),
        (recipe(select="{budget: 1/4, 'budget': 1/2}"), ("'budget' appears twice",)),
        (recipe(seed="no"), ("line 2", "seed: expected an integer, got 'no' (text)")),
        (recipe(select="{verify_swaps: no}"), ("expected true or false, got 'no' (text)",)),
        (recipe(seed="true"), ("expected an integer, got True",)),
        (recipe(seed="1.5"), ("expected an integer, got 1.5",)),
        (recipe(seed="'1'"), ("expected an integer, got '1' (text)",)),
        (recipe(out="7"), ("out: expected text, got 7 (integer)",)),
        (recipe(select="probe"), ("select: expected a mapping of keys",)),
        (recipe(distill="{loss: align, tokens: 4}"), ("distill: expected a list",)),
        (recipe(distill="[{loss: algin, tokens: 4}]"), ("'algin'", "Did you mean 'align'?")),
        (recipe(distill="[{loss: align}]"), ("distill[0]: missing tokens",)),
        (recipe(dtype="float23"), ("Did you mean 'float32'?",)),
        (recipe(select="{keep: [1.5]}"), ("select.keep[0]",)),
        (recipe(data="{held_out: .nan}"), ("data.held_out", "not a finite number")),
        (recipe(data="{held_out: .inf}"), ("not a finite number",)),
        ("seed: 1\n", ("missing model",)),
        ("", ("top level: expected a mapping", "nothing")),
        ("# only a comment\n", ("nothing",)),
        ("- model\n", ("expected a mapping", "list")),
        ("just text", ("expected a mapping", "text")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_keys_and_types(text: str, needles: tuple[str, ...]):
    refuse(text, *needles)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("model: !!python/object/apply:os.system ['touch canary']", "tag"),
        ("model: !!python/name:os.system", "tag"),
        ("!!python/object:os.environ {}", "tag"),
        ("model: !local x", "tag"),
        ("model: !!timestamp 2026-01-02", "tag"),
        ("model: !!binary aGk=", "tag"),
        ("!!set {model}", "tag"),
        ("!!python/name:os.system : 1", "tag"),
        ("model: !!int no", "'no' is no int"),
        ("model: &a m\nout: *a", "anchors and aliases"),
        ("model: m\nselect: &s {selector: probe}", "anchors and aliases"),
        ("&a [*a]", "anchors and aliases"),
        ("*a : 1", "a key must be plain text"),
        ("model: m\n<<: {seed: 1}", "<<: unknown key"),
        ("[model]: m", "a key must be plain text"),
        ("model: m\n---\nmodel: n", "second document"),
        ("model: [1, 2", "not valid YAML"),
        ("model: m\n\tseed: 1", "not valid YAML"),
        ("model: 'm", "not valid YAML"),
        ("model: m\x00", "not valid YAML"),
        ("model: \ud800", "not valid YAML"),
        ("seed: " + "9" * 5000, "too long"),
        ("[" * 900 + "]" * 900, "nested deeper than 32"),
        ("a: " * 1 + "{a: " * 40 + "1" + "}" * 40, "nested deeper than 32"),
        ("#" + "x" * (1 << 20), "larger than 1 MiB"),
    ],
    ids=lambda text: repr(text[:32]),
)
def test_hostile_yaml(text: str, needle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refuse(text, needle)
    assert not Path("canary").exists()


def test_control_characters_are_escaped():
    message = refuse('model: m\n"\\e]0;title\\a\\r": 1\n', "unknown key")
    assert message.isprintable()


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        (recipe(select="{selector: probee}"),
         ("line 2", "select.selector", "'probee' is no selector", "Did you mean 'probe'?")),
        (recipe(mixer="{name: slidng}"), ("mixer.name", "Did you mean 'sliding'?")),
        (recipe(family="lama"), ("family", "Did you mean 'llama'?")),
        (recipe(select="{task: multikeys}"), ("select.task", "'multikey'")),
        (recipe(evaluate="{tasks: [single_9]}"), ("evaluate.tasks", "single_1")),
        (recipe(evaluate="{baselines: [windw]}"), ("evaluate.baselines", "'window'")),
    ],
    ids=["selector", "mixer", "family", "task", "eval-task", "baseline"],
)  # fmt: skip
def test_unknown_names(text: str, needles: tuple[str, ...]):
    refuse(text, *needles, error=UnknownName)


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ("{selector: probe, options: {sampels: 4}}", ("sampels", "Did you mean 'samples'?")),
        ("{selector: probe, options: {samples: no}}", ("select.options.samples", "'no' (text)")),
        ("{selector: probe, options: {share: true}}", ("select.options.share",)),
        ("{selector: probe, options: {label: 7}}", ("select.options.label",)),
        ("{selector: probe, options: {order: lst}}", ("Did you mean 'last'?",)),
        ("{selector: needy}", ("needs path",)),
    ],
    ids=["name", "int", "float", "text", "literal", "required"],
)
def test_options_against_the_source_of_the_part(options: str, needles: tuple[str, ...]):
    refuse(recipe(select=options), *needles)


def test_valid_options_pass():
    text = "{selector: probe, options: {label: null, order: last, sizes: [1, 2], share: 1/2}}"
    assert load_text(recipe(select=text)).select.options["order"] == "last"


def test_parts_from_outside_are_not_imported():
    got = load_text(recipe(select="{selector: 'no_such_package.mod:thing', options: {a: 1}}"))
    assert got.select.selector == "no_such_package.mod:thing"


@pytest.mark.parametrize(
    "budget", ["0", "-1", "2.5", "0.0", "0%", "150%", "1/0", "3/2", "half", "''", "0B", "1/2/3"]
)
def test_bad_budget(budget: str):
    refuse(recipe(select=f"{{budget: {budget}}}"), "select.budget", "line 2", error=PlanError)


@pytest.mark.parametrize(
    ("section", "needle"),
    [
        ("select={keep: [-1]}", "negative"),
        ("select={keep: [[0, -2]]}", "negative"),
        ("select={keep: [2, 2]}", "listed twice"),
        ("select={keep: [2], replace: [2]}", "both kept and replaced"),
        ("select={examples: 0}", "select.examples: 0"),
        ("data={held_out: 1.5}", "data.held_out: 1.5"),
        ("seed=-1", "seed: -1"),
        ("distill=[{loss: align, tokens: 0}]", "distill[0].tokens: 0"),
        ("distill=[{loss: align, tokens: 4, lr: 0}]", "distill[0].lr: 0"),
        ("distill=[{loss: align, tokens: 4, needles: 2}]", "distill[0].needles: 2"),
        ("evaluate={lengths: [512, 0]}", "evaluate.lengths: 0"),
        ("evaluate={depths: -5}", "evaluate.depths: -5"),
    ],
)
def test_ranges(section: str, needle: str):
    key, _, value = section.partition("=")
    refuse(recipe(**{key: value}), needle)


# --- Shares of a whole --------------------------------------------------------------------------

SHARED = """\
model: m
training: {tokens: 700M}
distill:
  - {loss: align, share: 1/7}
  - {loss: logits, share: 6/7}
"""


def test_shares_become_tokens():
    got = load_text(SHARED)
    assert [stage.tokens for stage in got.distill] == [100_000_000, 600_000_000]
    again = load_text(dumps(got))
    assert again == got
    assert "share" not in dumps(got)


def test_a_whole_that_is_set_rescales_every_stage(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(SHARED)
    assert [s.tokens for s in load(file, ["training.tokens=64M"]).distill] == [9142857, 54857143]
    sets = ["distill.align.share=null", "distill.align.tokens=5M"]
    assert [s.tokens for s in load(file, sets).distill] == [5_000_000, 600_000_000]
    with pytest.raises(RecipeError, match="--set: distill.0..share: the stage has tokens too"):
        load(file, ["distill.align.tokens=5M", "distill.align.share=1/2"])
    file.write_text(dumps(load(file)))  # shares are gone from the canonical text
    with pytest.raises(RecipeError, match="--set: training.tokens: no stage has a share"):
        load(file, ["training.tokens=64M"])


def test_stages_with_tokens_stand_beside_stages_with_shares():
    text = SHARED + "  - {loss: long, tokens: 3M}\n"
    assert load_text(text).distill[2].tokens == 3_000_000


@pytest.mark.parametrize(
    ("old", "new", "needles"),
    [
        ("share: 1/7", "share: 1/7, tokens: 1M",
         ("line 4", "distill[0].share", "tokens too", "give one")),
        ("training: {tokens: 700M}", "seed: 1", ("line 4", "distill[0].share", "training.tokens")),
        ("share: 6/7", "share: 0.9", ("line 3", "distill: the shares", "sum to 1.04286")),
        ("share: 1/7", "share: half", ("line 4", "expected a number, got 'half'")),
        ("share: 1/7", "share: true", ("line 4", "expected a number, got True")),
        ("share: 1/7", "share: .nan", ("line 4", "not a finite number")),
        ("share: 1/7", "share: 0", ("line 4", "distill[0].share: 0.0 is out of range", "above 0")),
        ("share: 1/7", "share: -0.1", ("line 4", "out of range")),
        ("share: 6/7", "share: 2", ("line 5", "at most 1")),
        ("700M", "3", ("line 2", "training.tokens: 3 is too small", "distill[0]", "0.1429")),
        ("700M", "-5", ("line 2", "training.tokens: -5")),
        ("700M", "many", ("line 2", "training.tokens: expected an integer")),
        ("share: 1/7", "share: null", ("line 4", "distill[0]: missing tokens")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_shares(old: str, new: str, needles: tuple[str, ...]):
    assert old in SHARED
    refuse(SHARED.replace(old, new), *needles)


@pytest.mark.parametrize(
    ("sections", "needles"),
    [
        ({"training": "{recall_target: 0.9}"}, ("line 2", "recall_target", "probe_every")),
        ({"data": "{text: [a.txt, 'hub:o/n']}"}, ("line 2", "data.text: hub:o/n", "data.limit")),
        ({"distill": "[{loss: long, tokens: 4, kl: reverse}]"}, ("distill[0].kl", "has no KL")),
        ({"distill": "[{loss: logits, tokens: 4, kl: reverse, cross_entropy: 1}]"},
         ("distill[0].kl",)),
        ({"distill": "[{loss: align, tokens: 4, kl: reverse}]"}, ("distill[0].kl", "align")),
        ({"distill": "[{loss: align, tokens: 4, cross_entropy: 0.5}]"},
         ("distill[0].cross_entropy",)),
        ({"distill": "[{loss: logits, tokens: 4, lora_rank: 16}]"},
         ("distill[0].lora_rank", "train: lora", "attention")),
        ({"distill": "[{loss: logits, tokens: 4, lora_alpha: 8}]"}, ("distill[0].lora_alpha",)),
        ({"distill": "[{loss: logits, tokens: 4, cross_entropy: 1.5}]"}, ("cross_entropy: 1.5",)),
        ({"distill": "[{loss: logits, tokens: 4, train: lora, lora_rank: 0}]"}, ("lora_rank: 0",)),
        ({"training": "{keep_states: 0}"}, ("training.keep_states: 0",)),
        ({"training": "{probe_every: -1}"}, ("training.probe_every: -1",)),
        ({"training": "{tokens: 0}"}, ("training.tokens: 0",)),
        ({"data": "{limit: 0}"}, ("data.limit: 0",)),
        ({"data": "{epochs: 0}"}, ("data.epochs: 0",)),
    ],
)  # fmt: skip
def test_what_means_nothing_together(sections: dict[str, str], needles: tuple[str, ...]):
    refuse(recipe(**sections), *needles)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": "{recall_target: 0.9, probe_every: 50}"},
        {"data": "{text: ['hub:o/n'], limit: 1M}"},
        {"distill": "[{loss: long, tokens: 4, kl: reverse, cross_entropy: 0.5}]"},
        {"distill": "[{loss: logits, tokens: 4, train: lora, lora_rank: 16, lora_alpha: 8}]"},
    ],
)
def test_what_belongs_together_loads(sections: dict[str, str]):
    got = load_text(recipe(**sections))
    assert load_text(dumps(got)) == got


# --- Files and names ----------------------------------------------------------------------------


def test_load_by_name_and_by_path(tmp_path: Path):
    assert load("quick").model == "some/model"
    file = tmp_path / "own.yaml"
    file.write_text(FULL, encoding="utf-8-sig")  # a byte order mark does not matter
    assert load(file) == load(str(file)) == load_text(FULL)
    assert schema.folder(file) == tmp_path
    assert schema.folder("quick") == registry.ROOT.parent


@pytest.mark.parametrize(
    ("name", "content", "error", "needle"),
    [
        ("quik", None, UnknownName, "Did you mean 'quick'?"),
        ("missing.yaml", None, RecipeError, "no such recipe file"),
        ("folder/quick", None, RecipeError, "ends in .yaml"),
        ("../quick", None, RecipeError, "ends in .yaml"),
        ("bytes.yaml", b"model: \xff", RecipeError, "byte 7 is not UTF-8"),
        ("utf16.yaml", "model: m".encode("utf-16"), RecipeError, "not UTF-8"),
        ("big.yaml", b"# " * (1 << 20), RecipeError, "larger than 1 MiB"),
        ("empty.yaml", b"", RecipeError, "nothing"),
        ("folder.yaml", "folder", RecipeError, "no such recipe file"),
        ("pipe.yaml", "pipe", RecipeError, "no such recipe file"),
    ],
)
def test_bad_files(name, content, error, needle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path(name).mkdir()
    elif content == "pipe":
        os.mkfifo(name)
    elif content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(error, match=needle.replace("?", r"\?")):
        load(name)


# --- Values set from outside --------------------------------------------------------------------


def test_sets_reach_options_fields_and_stages(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(FULL)
    sets = ["mixer.window=512", "selector.samples=16", "select.budget=2", "seed=3", "dtype=float16"]
    sets += ["distill.align.tokens=1M", "distill.1.lr=1/1000", "evaluate.lengths=[64, 128]"]
    got = load(file, sets)
    assert got.mixer.options == {"window": 512}
    assert got.select.options == {"samples": 16}
    assert (got.select.budget, got.seed, got.dtype) == ("2", 3, "float16")
    assert (got.distill[0].tokens, got.distill[1].lr) == (1_000_000, 1e-3)
    assert got.evaluate.lengths == (64, 128)


def test_sets_leave_the_given_data_alone():
    data = {"mixer": {"name": "sliding"}, "distill": [{"loss": "align"}]}
    changed = apply_sets(data, ["mixer.window=1", "distill.align.tokens=2"])
    assert data == {"mixer": {"name": "sliding"}, "distill": [{"loss": "align"}]}
    assert changed["distill"] == [{"loss": "align", "tokens": 2}]
    assert apply_sets({}, ["mixer.name=decay", "mixer.window=1"]) == {
        "mixer": {"name": "decay", "options": {"window": 1}}
    }


@pytest.mark.parametrize(
    ("sets", "error", "needle"),
    [
        (["mixer.window"], UsageError, "give key=value"),
        (["=5"], UsageError, "give key=value"),
        (["mixer..window=5"], UsageError, "give key=value"),
        (["seed=1", "seed=2"], UsageError, "set twice"),
        (["distill.align.lr=1", "distill.0.lr=2"], UsageError, "set twice"),
        (["distill.algin.lr=1"], UsageError, "Did you mean 'align'"),
        (["distill.7.lr=1"], UsageError, "is no entry"),
        (["model.x=1"], UsageError, "has no keys of its own"),
        (["mixer.windw=5"], RecipeError, "Did you mean 'window'"),
        (["mixer.window=no"], RecipeError, "--set: mixer.options.window: expected an integer"),
        (["seed=[1"], RecipeError, "--set seed"),
        (["slect.budget=1"], RecipeError, "Did you mean 'select'"),
        (["seed=&a 1"], RecipeError, "anchors"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_sets(sets: list[str], error: type[MorphError], needle: str, tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(FULL)
    with pytest.raises(error) as caught:
        load(file, sets)
    assert needle in str(caught.value)


# --- Canonical text -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [FULL, recipe()], ids=["full", "minimal"])
def test_canonical_text_round_trips(text: str):
    got = load_text(text)
    again = load_text(dumps(got))
    assert again == got
    assert dumps(again) == dumps(got)
    assert schema.recipe_digest(again) == schema.recipe_digest(got)
    assert schema.recipe_digest(got) != schema.recipe_digest(load_text(recipe(seed="1")))


@pytest.mark.parametrize(
    "text",
    ["no", "1e5", "1e-4", "~", "", "true", "0x1", "12:30", "a: b", "- a", "#", "é 😀", "a\nb\n"]
    + [
        " lead",
        "tab\t",
        "quote'\"",
        "\x85 \u2028",
        "\x1b[0m",
        "!tag",
        "&a",
        "*a",
        "%",
        ".inf",
        "?",
    ],
    ids=repr,
)
def test_any_text_round_trips(text: str):
    got = Recipe(model=text, out=text)
    assert load_text(dumps(got)) == got


def test_key_order_and_comments_do_not_change_the_digest():
    lines = "seed: 1\nmodel: m\n"
    other = "# a note\nmodel: 'm'\nseed:   0x1\n"
    assert schema.recipe_digest(load_text(lines)) == schema.recipe_digest(load_text(other))


def test_mutated_recipes_are_read_or_refused():
    """Whatever bytes come, the answer is a recipe or one of our errors."""
    rng = random.Random(0)
    alphabet = "{}[]:,#&*!|>'\"%@`-? \n\t~<=0123456789abc\x00\x1b\u2028é"
    for _ in range(600):
        text = list(FULL)
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choices(alphabet, k=rng.randint(0, 3))
        try:
            load_text("".join(text))
        except MorphError as error:
            assert error.exit_code == 2
            assert "\n" not in str(error)


# --- What ships ---------------------------------------------------------------------------------

SOURCE = Path(schema.__file__).resolve().parent
SHIPPED = sorted(path.stem for path in SOURCE.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "ROOT", SOURCE.parent)
    registry.names.cache_clear()
    got = load(name)
    assert load_text(dumps(got)) == got
    assert registry.summary("recipes", name)


def test_tasks_are_those_that_data_builds():
    tree = ast.parse((SOURCE.parent / "data.py").read_text(encoding="utf-8"))
    built = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NEEDLE_TASKS"
    )
    assert set(schema.TASKS) == {*built, "name_recall"}
