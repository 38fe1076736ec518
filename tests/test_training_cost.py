"""What training costs by arithmetic, and what the shipped recipes say they cost and do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from morph import plan as planning
from morph import registry
from morph.errors import CheckpointError, MorphError
from morph.pipeline import _cost, _cost_words, _select
from morph.recipes import schema
from morph.recipes.schema import Mixer, Recipe, Stage, Training

SOURCE = Path(schema.__file__).resolve().parent
OURS = {"demo", "qk_restore"}  # on the checkpoint of this repository; no published stages
NAMES = sorted({path.stem for path in SOURCE.glob("*.yaml")} - OURS)
# Qwen3-1.7B as its config.json has it
CONFIG = {
    "num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144,
    "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
FAMILY = registry.load("families", "qwen3").FAMILY
SHAPE = FAMILY.geometry(CONFIG)
SIZES = _cost.sizes_of(CONFIG, SHAPE)
A, M, OUT, HEAD = 12_582_912, 37_748_736, 4_194_304, 311_164_928
N = 28 * (A + M)
PAIR = 16 * 2 * (128 + 128)  # FLOPs for a key that a query sees, in a layer


def layers(kept: int = 7, mixer: str = "sliding", **fields: object) -> tuple[_cost.Layer, ...]:
    return _cost.expected_layers(Mixer(name=mixer, **fields), SHAPE, kept, "layer")  # type: ignore[arg-type]


def flops(stage: Stage, made: tuple[_cost.Layer, ...] | None = None, *, cached: bool = False):
    """FLOPs per token of a stage, without mixing: at one token a row it is one key a query."""
    one = replace(stage, seq_len=1, batch_size=1)
    recipe = Recipe(model="m", distill=(one,), dtype="bfloat16")
    made = layers() if made is None else made
    return _cost.cost(recipe, SIZES, made, cached=cached).stages[0].flops_per_token


# --- The arithmetic -----------------------------------------------------------------------------


def test_sizes_are_those_of_the_model():
    assert (SIZES.attention, SIZES.mlp, SIZES.output, SIZES.head) == (A, M, OUT, HEAD)
    assert SIZES.layers == N
    assert 1.71e9 < SIZES.total < 1.73e9  # the model card: 1.7B parameters, 1.4B without embedding


@pytest.mark.parametrize(
    ("fields", "weights", "passes"),
    [
        ({"loss": "logits", "train": "new"}, 6 * N + 6 * HEAD, 4),
        ({"loss": "logits", "train": "attention"}, 6 * N + 2 * 21 * A + 6 * HEAD, 4),
        ({"loss": "logits", "train": "all"}, 8 * N + 6 * HEAD, 4),
        ({"loss": "logits", "train": "all", "recompute": "layer"}, 10 * N + 6 * HEAD, 5),
        ({"loss": "logits", "train": "all", "recompute": "mlp"},
         8 * N + 2 * 28 * M + 6 * HEAD, 4),
        ({"loss": "logits", "train": "all", "cross_entropy": 1.0}, 6 * N + 4 * HEAD, 3),
        ({"loss": "long", "train": "all"}, 6 * N + 4 * HEAD, 3),
        ({"loss": "long", "train": "all", "cross_entropy": 0.5}, 8 * N + 6 * HEAD, 4),
        ({"loss": "align", "train": "attention"}, 2 * N + 21 * (4 * A + 2 * OUT), None),
        ({"loss": "align", "train": "new"}, 2 * N + 21 * (2 * A + 2 * OUT), None),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_flops_of_a_token(fields: dict, weights: int, passes: int | None):
    mixing = 28 * PAIR * passes if passes else (28 + 3 * 21) * PAIR
    assert flops(Stage(tokens=1, **fields)) == weights + mixing


def test_a_teacher_at_hand_costs_its_head():
    stage = Stage(loss="logits", tokens=1, train="all")
    saved = flops(stage) - flops(stage, cached=True)
    assert saved == 2 * N + 28 * PAIR
    align = Stage(loss="align", tokens=1)
    assert flops(align) == flops(align, cached=True)  # it needs every layer, not the final states


def test_lower_layers_that_are_the_teachers_are_computed_once():
    """Ten lower layers without a student: no forward of their own, and no way back."""
    made = layers()
    shifted = (*made[-7:], *made[:-7])
    stage = Stage(loss="logits", tokens=1, train="attention")
    assert flops(stage, made) - flops(stage, shifted) == 7 * (4 * (A + M) + 3 * PAIR)
    whole = replace(stage, train="all")
    assert flops(whole, made) == flops(whole, shifted)


def test_mixing_depends_on_the_length_only_where_something_sees_it():
    def mixing(mixer: str, length: int, **options: object) -> float:
        group = _cost.Group(heads=1, mixer=mixer, options=options)
        return _cost._mixing(group, SIZES, length, None)

    assert mixing("full", 4096) == 512 * 4097 / 2
    seen = sum(min(t + 1, 64) for t in range(4096)) / 4096
    assert mixing("sliding", 4096, window=64) == 512 * seen
    assert mixing("sliding", 4096, window=64) == _cost._softmax(SIZES, 4096, 64)
    assert mixing("decay", 512) == mixing("decay", 65536) == 4 * 128 * 128 + 4 * 64 * 256
    assert mixing("hedgehog", 65536, window=64) > mixing("hedgehog", 65536, window=32)
    for name in registry.names("mixers"):  # whatever its options are called
        assert 0 < mixing(name, 256) <= mixing(name, 8192), name


def test_the_mixers_own_weights_count_where_a_gate_makes_them_many():
    plain, gated = layers(mixer="decay"), layers(mixer="decay", options={"gate": True})
    stage = Stage(loss="align", tokens=1, train="new")
    assert flops(stage, gated) - flops(stage, plain) == 21 * 4 * OUT


def test_memory_counts_a_model_once_and_what_trains_in_full():
    def memory(train: str, dtype: str = "bfloat16", **fields: object) -> float:
        stage = Stage(loss="logits", tokens=1, batch_size=1, seq_len=1, train=train, **fields)  # type: ignore[arg-type]
        recipe = Recipe(model="m", distill=(stage,), dtype=dtype)  # type: ignore[arg-type]
        return _cost.cost(recipe, SIZES, layers()).memory_bytes

    # a copy of its own, a master, two moments and a gradient: 18 bytes at 16 bits, 16 at 32
    assert memory("all") - memory("new") == pytest.approx(18 * N, rel=1e-3)
    assert memory("all", "float32") - memory("new", "float32") == pytest.approx(16 * N, rel=1e-3)
    assert memory("new") == pytest.approx(2 * SIZES.total, rel=2e-3)
    long = {"batch_size": 8, "seq_len": 4096}
    by = {}
    for kept in ("none", "mlp", "layer"):
        stage = Stage(loss="logits", tokens=1, recompute=kept, **long)  # type: ignore[arg-type]
        recipe = Recipe(model="m", distill=(stage,), dtype="bfloat16")
        by[kept] = _cost.cost(recipe, SIZES, layers()).memory_bytes
    assert by["none"] > by["mlp"] > by["layer"]


def test_whole_batches_are_what_is_paid():
    stage = Stage(loss="logits", tokens=1000, batch_size=4, seq_len=512)
    found = _cost.cost(Recipe(model="m", distill=(stage,)), SIZES, layers())
    assert (found.stages[0].steps, found.tokens) == (1, 2048)
    assert found.flops == 2048 * found.stages[0].flops_per_token


@pytest.mark.parametrize("name", ["intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "9", True, 1.5])
def test_a_config_without_sizes_is_refused(name: str, value: object):
    with pytest.raises(CheckpointError, match=name):
        _cost.sizes_of({**CONFIG, name: value}, SHAPE)


def test_sizes_count_the_weights_of_models():
    """The configuration's arithmetic against tensors that transformers makes of it."""
    import torch
    from transformers import AutoModelForCausalLM

    for name in ("llama", "phi3", "gemma2", "smollm3"):  # plain, fused, tied, mixed layers
        family = registry.load("families", name).FAMILY
        config = family.part(family.config_class)(**family.tiny_config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        sizes = _cost.sizes_of(config.to_dict(), family.geometry(config.to_dict()))
        assert sizes.total == matrices, name


# --- In words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (45, "45 s"), (600, "10 min"), (5399, "90 min"), (18_360, "5.1 h"),
     (36_000, "10 h"), (300_000, "3.5 days"), (3e6, "35 days")],
)  # fmt: skip
def test_durations(seconds: float, text: str):
    assert _cost_words.duration(seconds) == text


def test_gpus_that_are_too_small_have_no_hours():
    stage = Stage(loss="logits", tokens=10**9, train="all", batch_size=96, recompute="layer")
    found = _cost.cost(Recipe(model="m", dtype="bfloat16", distill=(stage,)), SIZES, layers())
    told = {name: next(x for x in _cost_words.gpu_lines(found) if name in x) for name in _cost.GPUS}
    assert "do not suffice" in told["RTX 4090"]
    hours = found.flops / (989.5e12 * 0.4) / 3600
    assert f"about {hours:.0f} h on one H100 at 40 % of its peak" in told["H100"]
    assert "arithmetic, not measured" in told["H100"]


def test_float32_has_no_hours_for_a_table_in_bfloat16():
    recipe = Recipe(model="m")
    assert not _cost.computes_in_16_bits(recipe)
    assert _cost.computes_in_16_bits(replace(recipe, training=Training(mixed_precision="bf16")))


# --- The shipped recipes ------------------------------------------------------------------------

# Millions of tokens of every stage as the sources have them, and the length of its rows
PUBLISHED = {
    "halo": [("align", 327.68, 512), ("logits", 983.04, 512), ("long", 1048.576, 16384)],
    "flashmorph": [("align", 320, 512), ("logits", 1000, 512), ("long", 1000, 16384)],
    "hydrahead": [("align", 327.68, 512), ("logits", 983.04, 512), ("long", 1048.576, 16384)],
    "radlads": [("align", 100, 512), ("logits", 500, 512), ("long", 100, 16384)],
    "lolcats": [("align", 20, 1024), ("long", 20, 1024)],
    "kl_guided": [("align", 100, 512), ("logits", 600, 4096)],
}
# Peak and last learning rate of every stage
RATES = {
    "halo": [(1e-3, 1e-5), (1e-4, 1e-5), (1e-5, 1e-5)],
    "flashmorph": [(1e-3, 1e-5), (1e-4, 1e-5), (1e-5, 1e-5)],
    "hydrahead": [(1e-3, 1e-5), (1e-4, 1e-5), (1e-5, 1e-5)],
    "radlads": [(1e-3, 1e-5), (1e-5, 1e-5), (1e-5, 1e-5)],
    "lolcats": [(1e-2, 1e-3), (1e-4, 1e-5)],
    "kl_guided": [(1e-3, 1e-5), (1e-4, 1e-4)],
}


def header(name: str) -> str:
    return " ".join(registry.docstring("recipes", name).split())


def test_every_shipped_recipe_has_its_published_proportions():
    assert sorted(PUBLISHED) == sorted(RATES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_the_published_ones(name: str):
    recipe = schema.load(name)
    assert [
        (s.loss, s.tokens / 1e6, s.seq_len) for s in recipe.distill
    ] == PUBLISHED[name]  # fmt: skip
    whole = recipe.training.tokens
    assert whole is not None
    assert sum(s.tokens for s in recipe.distill) / whole == pytest.approx(1.0, abs=1e-6)
    for stage, (peak, last) in zip(recipe.distill, RATES[name]):
        assert stage.lr == peak
        assert stage.lr * stage.min_lr_fraction == pytest.approx(last)


@pytest.mark.parametrize("name", NAMES)
def test_proportions_hold_at_any_size(name: str):
    total = sum(millions for _, millions, _ in PUBLISHED[name])
    for whole in (10**5, 64 * 10**6):
        recipe = schema.load(name, [f"training.tokens={whole}"])
        for stage, (_, millions, _) in zip(recipe.distill, PUBLISHED[name]):
            assert stage.tokens == pytest.approx(whole * millions / total, abs=1)
        again = schema.load_text(schema.dumps(recipe))
        assert again == recipe
        assert "share" not in schema.dumps(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_headers_state_source_and_what_a_1_7b_costs(name: str):
    recipe, text = schema.load(name), header(name)
    assert re.search(r"Source: .*arXiv \d{4}\.\d{5}", text)
    assert "Deviations:" in text
    assert "In miniature:" in text
    source = SimpleNamespace(geometry=SHAPE, family=FAMILY)
    kept = _select.kept_count(source, recipe.select)
    made = _cost.expected_layers(recipe.mixer, SHAPE, kept, recipe.select.granularity)
    found = _cost.cost(recipe, SIZES, made)
    assert f"On a 1.7B model (Qwen3-1.7B): {_cost_words.summary(found)}." in text
    assert found.memory_bytes < _cost.GPUS["H100"].memory  # it is said to run on one


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_shipped_recipes_exist_and_are_the_papers(name: str):
    recipe = schema.load(name)
    assert recipe.select.selector in registry.names("selectors")
    for mixer in (recipe.mixer.name, recipe.mixer.kept):
        assert mixer in registry.names("mixers")
    expected = {
        "halo": ("halo", "layer", "decay", "nope", "none"),
        "flashmorph": ("flashmorph", "layer", "decay", "full", "none"),
        "hydrahead": ("hydrahead", "head", "gated_delta", "nope", "scale"),
        "radlads": ("uniform", "layer", "kda", "full", "none"),
        "lolcats": ("uniform", "layer", "hedgehog", "full", "none"),
        "kl_guided": ("kl", "layer", "gated_delta", "full", "none"),
    }
    select, mixer = recipe.select, recipe.mixer
    found = (select.selector, select.granularity, mixer.name, mixer.kept, mixer.fusion)
    assert found == expected[name]


# --- On the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder model/ and the file text.txt of the documentation."""
    import runpy

    folder = tmp_path_factory.mktemp("tiny")
    repo = Path(__file__).resolve().parent.parent
    runpy.run_path(str(repo / "examples" / "tiny_model.py"))["main"](folder)
    return folder


def miniature(folder: Path) -> list[str]:
    """What a model with a short context and one processor needs besides its name."""
    return [
        f"model={folder / 'model'}", f"data.text=[{folder / 'text.txt'}]", "data.held_out=0.1",
        "training.tokens=3K", "dtype=float32", "select.align=256", "select.seq_len=160",
        "select.examples=4",
    ]  # fmt: skip


def run(*arguments: object) -> None:
    from morph import cli

    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in arguments])
    assert done.value.code in (0, None)


@pytest.mark.parametrize("name", NAMES)
def test_check_and_dry_run(name: str, tiny: Path, capsys: pytest.CaptureFixture[str]):
    sets = [x for one in miniature(tiny) for x in ("--set", one)]
    run("check", name, *sets)
    capsys.readouterr()
    half = [s.replace("dtype=float32", "dtype=bfloat16") for s in sets]
    run("run", name, "--dry-run", "--json", *half)
    told = json.loads(capsys.readouterr().out)
    assert told["distillation_tokens"] == pytest.approx(3000, abs=2)
    assert len(told["distillation_stages"]) == len(PUBLISHED[name])
    assert any("on one H100 at 40 %" in line for line in told["distillation_estimate"])


def test_dry_run_for_people(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    recipe = tiny / "r.yaml"
    recipe.write_text(
        "model: model\ndistill: [{loss: logits, tokens: 4K}, {loss: long, tokens: 1}]"
    )
    run("run", recipe, "--dry-run")
    out = capsys.readouterr().out
    assert re.search(r"distillation stages +logits: 4,000 tokens in 2 steps of 4 x 512", out)
    assert re.search(r"^ +long: 1 tokens in 1 step of 4 x 512", out, re.MULTILINE)
    assert "none in float32" in out


def test_distill_dry_run_knows_the_plan(tiny: Path, tmp_path: Path, capsys, monkeypatch):
    """Two lower layers stay: less to do than where the first is converted."""
    monkeypatch.chdir(tmp_path)
    from morph.pipeline import open_source

    shape = open_source(str(tiny / "model")).geometry
    told = {}
    for kept in ([0, 1], [6, 7]):
        plan = planning.uniform_plan("qwen3", shape, kept, "sliding", {"window": 64}, None)
        folder = tmp_path / f"kept{kept[0]}"
        folder.mkdir()
        (folder / "morph.json").write_text(f'{{"plan": {planning.dumps(plan)}}}')
        run("distill", folder, "--teacher", tiny / "model", "--out", "x", "--dry-run", "--json",
            "--stages", "logits=64K", "--data", tiny / "text.txt")  # fmt: skip
        told[kept[0]] = json.loads(capsys.readouterr().out)
    assert told[0]["distillation_flops"] < told[6]["distillation_flops"]
    assert told[0]["distillation_tokens"] == 64_000


def test_stages_of_the_command_line_are_no_shares():
    from morph import pipeline

    recipe = Recipe(model="m")
    assert (
        pipeline.with_stages(recipe, "logits=1M", ["distill.logits.lr=1e-4"]).distill[0].lr == 1e-4
    )
    with pytest.raises(MorphError, match="no stage has a share"):
        pipeline.with_stages(recipe, "logits=1M", ["training.tokens=2M"])


@pytest.mark.slow
def test_a_recipe_runs_in_miniature(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """HALO from end to end: align, select, NoPE in what stays, three stages, a checkpoint."""
    sets = miniature(tiny)
    sets += ["tasks=[]", "lengths=[160]", "seq_len=128", "perplexity_tokens=256", "examples=1",
             "depths=1", "speed_length=64", "decode_tokens=2", "baselines=[]"]  # fmt: skip
    sets = [one if one in miniature(tiny) else f"evaluate.{one}" for one in sets]
    for stage, length in (("align", 128), ("logits", 128), ("long", 256)):
        sets += [f"distill.{stage}.seq_len={length}", f"distill.{stage}.batch_size=2"]
    out = tmp_path / "out"
    run("run", "halo", "--out", out, *(x for one in sets for x in ("--set", one)))
    made = schema.load(out / "recipe.yaml")
    assert [s.tokens for s in made.distill] == [417, 1250, 1333]
    plan = json.loads((out / "plan.json").read_text())
    mixers = [layer["groups"][0]["mixer"] for layer in plan["layers"]]
    assert sorted(mixers) == ["decay"] * 6 + ["nope"] * 2
    log = [json.loads(line) for line in (out / "distill" / "log.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in log} == {0, 1, 2}
    assert (out / "checkpoint" / "model.safetensors").is_file()
