"""`morph align` and `convert --aligned`: several mixers aligned in one pass, any plan from them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from morph import cli, pipeline, surgery
from morph import plan as planning
from morph.checkpoint import Checkpoint, dump_json, load_json
from morph.errors import (
    CheckpointError,
    Interrupted,
    MismatchError,
    MorphError,
    VerificationFailed,
)
from morph.pipeline import _bank, _data, _next, _select, _verify
from morph.recipes import schema

REPO = Path(__file__).resolve().parent.parent
MIXERS = ("decay", "sliding:window=8", "decay:gate=true", "gla")
SETS = ["mixer.calibrate=512", "distill.align.seq_len=64", "distill.align.save_every=1"]


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def next(self) -> list[str]:
        return shlex.split(self.err.splitlines()[-1])[2:]


def morph(*arguments: object) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as done:
            return Result(int(done.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main returned")


def good(*arguments: object) -> Result:
    found = morph(*arguments)
    assert found.code == 0, found.err
    return found


class Place(NamedTuple):
    """A folder with a tiny random model, a text and a bank; nothing is written into it."""

    root: Path
    told: Result

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def bank(self) -> Path:
        return self.root / "bank"

    def recipe(self, stages: str = "align=1K", **more: object) -> schema.Recipe:
        raw = {"model": str(self.model), "data": {"text": [str(self.root / "text.txt")]}}
        recipe = schema.from_data({**raw, **more})
        return pipeline.with_stages(recipe, stages, SETS if stages.startswith("align") else [])

    def source(self) -> Any:
        return pipeline.open_source(str(self.model))

    def plan(self, mixers: dict[int, str], file: Path | None = None) -> planning.Plan:
        """A plan with a mixer in some layers; the others stay full."""
        source, heads = self.source(), tuple(range(8))
        full = planning.LayerPlan(groups=(planning.HeadGroup(mixer="full", heads=heads),))
        layers = [full] * source.geometry.num_hidden_layers
        for i, text in mixers.items():
            (mixer,) = _bank.parse([text])
            group = planning.HeadGroup(mixer=mixer.name, heads=heads, options=mixer.options)
            layers[i] = planning.LayerPlan(groups=(group,))
        made = planning.Plan(model_type="qwen3", geometry=source.geometry, layers=tuple(layers))
        if file is not None:
            file.write_text(planning.dumps(made))
        return surgery.resolve_costs(made)


def align(place: Path, bank: Path, *more: object, mixers: tuple[str, ...] = MIXERS) -> list[object]:
    named = [x for mixer in mixers for x in ("--mixer", mixer)]
    sets = [x for one in SETS for x in ("--set", one)]
    text = ("--data", place / "text.txt", "--tokens", "1K")
    return ["align", place / "model", bank, *named, *text, *sets, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    spec = importlib.util.spec_from_file_location("tiny", REPO / "examples" / "tiny_model.py")
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("bank")
    text = tiny.NOVEL.read_text(encoding="utf-8")
    (root / "text.txt").write_text(text[:24_000], encoding="utf-8")
    tiny.tokenizer(text[:24_000]).save_pretrained(root / "model")
    tiny.model(num_hidden_layers=3).float().save_pretrained(root / "model")
    return Place(root, good(*align(root, root / "bank", "--json")))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write hybrids without loading them again in another process."""
    monkeypatch.setattr(_verify, "load_and_compare", lambda *a, **k: {"logit_error": 0.0})


def tensors(folder: Path) -> dict[str, bytes]:
    found = Checkpoint.open(folder, strict=False)
    return {name: found.read_bytes(name) for name in found.tensors}


# --- What is written ----------------------------------------------------------------------------


def test_a_bank_holds_every_mixer_of_every_layer(place: Place) -> None:
    bank = _bank.read(place.bank, place.source())
    assert [e.mixer for e in bank.mixers] == ["decay", "sliding", "decay", "gla"]
    assert [e.options.get("gate") for e in bank.mixers if e.mixer == "decay"] == [False, True]
    assert bank.mixers[1].options["window"] == 8 and "num_sinks" in bank.mixers[1].options
    files = {p.name for p in place.bank.glob("*.safetensors")}
    assert files == {f"{n}.safetensors" for n in ("decay", "sliding", "decay-2", "gla")}
    told = json.loads(place.told.out)
    assert [m["mixer"] for m in told["mixers"]] == list(MIXERS)
    for entry, row in zip(bank.mixers, told["mixers"], strict=True):
        assert list(entry.before) == list(entry.after) == ["0", "1", "2"]
        assert entry.after != entry.before and row["after"] == entry.after
    assert bank.stage["tokens"] == 1000 and bank.calibrate == 512


def test_errors_are_those_of_what_is_in_the_bank(place: Place) -> None:
    source, recipe = place.source(), place.recipe()
    ids = _bank._measured_on(_data.corpus(recipe.data, source.tokenizer()))
    bank, model = _bank.read(place.bank, source), source.model("float32")
    for entry, mixer in zip(bank.mixers, MIXERS, strict=True):
        plan = place.plan(dict.fromkeys(range(3), mixer))
        made = _bank.compose(source, model, plan, place.bank, bank)
        found = surgery.output_errors(made, model, ids)
        assert {str(i): e for i, e in found.items()} == pytest.approx(dict(entry.after), rel=1e-5)


def test_a_table_is_printed(place: Place, here: Path) -> None:
    found = good(*align(place.root, here / "b", mixers=("decay", "sliding:window=8")))
    lines = found.out.splitlines()
    assert lines[1].split() == ["layer", "decay", "sliding:window=8"]
    assert [line.split()[0] for line in lines[2:5]] == list("012")
    assert all(line.count("->") == 2 for line in lines[2:5])


# --- Composing ----------------------------------------------------------------------------------


def test_a_plan_from_the_bank_is_that_plan_aligned_alone(
    place: Place, here: Path, unverified: None
) -> None:
    plan = {0: "decay:gate=true", 1: "sliding:window=8", 2: "gla"}
    place.plan(plan, here / "plan.json")
    recipe, how = place.recipe(), {"plan_file": here / "plan.json", "target": "package"}
    pipeline.convert_command(recipe, here / "plain", **how)
    pipeline.distill_command(recipe, str(here / "plain"), here / "alone", target="package")
    pipeline.convert_command(recipe, here / "composed", aligned=place.bank, **how)
    started, alone, composed = (tensors(here / n) for n in ("plain", "alone", "composed"))
    assert [n for n in alone if alone[n] != composed[n]] == []
    assert alone.keys() == composed.keys()
    changed = {n for n in composed if composed[n] != started.get(n)}
    assert {n.split(".")[2] for n in changed} == set("012")
    told = json.loads((here / "composed" / "morph.json").read_text())["provenance"]
    assert told["aligned"]["stage"]["tokens"] == 1000


def test_only_what_was_trained_is_in_a_bank_of_new_parameters(place: Place, here: Path) -> None:
    new = ("--set", "distill.align.train=new")
    good(*align(place.root, here / "b", *new, mixers=("decay:gate=true",)))
    source = place.source()
    bank, model = _bank.read(here / "b", source), source.model("float32")
    plan = place.plan({2: "decay:gate=true"})
    made = _bank.compose(source, model, plan, here / "b", bank)
    names = [
        f"model.layers.2.self_attn.{n}" for n, _ in made.model.layers[2].self_attn.own_parameters()
    ]
    assert list(made.morph_trained) == sorted(names)
    assert (
        made.model.layers[2].self_attn.q_proj.weight
        is model.model.layers[2].self_attn.q_proj.weight
    )


def test_the_next_command_writes_a_hybrid_that_is_loaded_and_compared(
    place: Place, here: Path
) -> None:
    following = place.told.next
    assert following[0] == "convert" and "select.align=0" in following
    blind = ["--selector", "uniform", "--budget", "1"]
    told = json.loads(good(*following, *blind, "--json").out)
    assert told["verification"]["logit_error"] <= told["verification"]["limit"]
    command = ["distill", "model-hybrid", "--teacher", str(place.model)]
    recipe = place.recipe()
    further = _next.after_evaluate(recipe, "model-hybrid", str(place.model))
    assert further[:4] == command and further[further.index("--stages") + 1] == "logits=1M"


def test_a_stock_checkpoint_comes_out_of_a_bank(place: Place, here: Path) -> None:
    place.plan(dict.fromkeys((0, 2), "sliding:window=8"), here / "plan.json")
    told = json.loads(
        good(
            *("convert", place.model, here / "o", "--plan", here / "plan.json"),
            *("--aligned", place.bank, "--target", "stock", "--json"),
        ).out
    )
    assert told["format"] == "qwen3"
    assert told["verification"]["logit_error"] <= told["verification"]["limit"]
    source, now = tensors(place.model), tensors(here / "o")
    changed = {n for n in now if now[n] != source[n]}
    assert {".".join(n.split(".")[2:4]) for n in changed} == {"0.self_attn", "2.self_attn"}


# --- Stopping and going on ----------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bytes(place: Place, here: Path) -> None:
    def stop(event: Any) -> None:
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    two = MIXERS[:2]
    with pytest.raises(Interrupted):
        pipeline.align_command(place.recipe(), two, here / "bank", progress=stop)
    assert [p.name for p in here.iterdir()] == ["bank.distill"]
    steps: list[int] = []
    pipeline.align_command(
        place.recipe(),
        two,
        here / "bank",
        progress=lambda e: steps.append(e.step) if e.kind == "step" else None,
    )
    assert steps == [3, 4]
    assert sorted(p.name for p in here.iterdir()) == ["bank", "bank.distill"]
    for name in ("decay", "sliding"):  # and what was aligned beside them makes no difference
        file = f"{name}.safetensors"
        assert (place.bank / file).read_bytes() == (here / "bank" / file).read_bytes()
    told = [json.loads((p / "bank.json").read_text()) for p in (place.bank, here / "bank")]
    told[0]["mixers"] = told[0]["mixers"][:2]
    assert told[0] == told[1]


def test_a_state_of_other_mixers_is_refused(place: Place, here: Path) -> None:
    good(*align(place.root, here / "b", mixers=("decay", "sliding:window=8")))
    shutil.rmtree(here / "b")
    found = morph(*align(place.root, here / "b", mixers=("decay", "sliding:window=9")))
    assert found.code == 4 and "b.distill" in found.err


# --- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixers", "code", "words"),
    [
        (["deca"], 2, "'decay'"),
        (["sliding:windw=8"], 2, "'window'"),
        (["sliding:window=wide"], 2, "window"),
        (["sliding:8"], 2, "key=value"),
        (["sliding:window=8,window=9"], 2, "given twice"),
        (["decay", "decay"], 2, "named twice"),
        (["decay", "decay:gate=false"], 2, "named twice"),
        (["full"], 2, "source's own attention"),
        (["no.such.module:part"], 2, "no.such.module"),
        ([], 2, "--mixer NAME"),
    ],
    ids=str,
)
def test_mixers_that_cannot_be_aligned(
    mixers: list[str], code: int, words: str, place: Place, here: Path
) -> None:
    found = morph(*align(place.root, here / "b", mixers=tuple(mixers)))
    assert (found.code, found.out) == (code, ""), found.err
    assert words in found.err and "Traceback" not in found.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--set", "mixer.window=8"], 2, "behind the name"),
        (["--set", "distill.align.train=new"], 2, "sliding has no parameters"),
        (["--set", "distill.align.train=lora"], 2, "lora"),
        (["--set", "distill.align.loss=logits"], 2, "one stage, align"),
        (["--set", "data.epochs=0.01"], 3, "data.epochs"),
        (["--tokens", "many"], 2, "many"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_settings_that_cannot_be(
    more: list[str], code: int, words: str, place: Place, here: Path
) -> None:
    asked = align(place.root, here / "b", mixers=("sliding:window=8",))
    if more[0] == "--tokens":
        del asked[asked.index("--tokens") : asked.index("--tokens") + 2]
    found = morph(*asked, *more)
    assert (found.code, found.out) == (code, ""), found.err
    assert words in found.err and "Traceback" not in found.err
    assert not (here / "b").exists()


def test_texts_that_cannot_be(place: Place, here: Path) -> None:
    asked = ["align", place.model, here / "b", "--mixer", "decay"]
    assert morph(*asked).code == 2
    (here / "empty.txt").write_text("")
    found = morph(*asked, "--data", "empty.txt")
    assert found.code == 3 and "empty.txt" in found.err
    assert [p.name for p in here.iterdir()] == ["empty.txt"]


def test_a_bank_that_exists_is_kept(place: Place, here: Path) -> None:
    shutil.copytree(place.bank, here / "b")
    asked = align(place.root, here / "b", mixers=("decay",))
    found = morph(*asked)
    assert found.code == 2 and "--force" in found.err
    assert len(list((here / "b").iterdir())) == 6
    good(*asked, "--force")
    assert len(list((here / "b").iterdir())) == 3


@pytest.fixture
def copied(place: Place, here: Path) -> Path:
    shutil.copytree(place.bank, here / "bank")
    return here / "bank"


def composed(place: Place, bank: Path, mixers: dict[int, str]) -> None:
    source = place.source()
    _bank.student(source, place.plan(mixers), bank, _bank.read(bank, source))


def rewritten(folder: Path, change: Any) -> None:
    """Change bank.json and let the manifest agree, as someone who means harm would."""
    import hashlib

    data = load_json((folder / "bank.json").read_bytes(), "bank")
    change(data)
    (folder / "bank.json").write_bytes(dump_json(data))
    manifest = load_json((folder / "MANIFEST.json").read_bytes(), "manifest")
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "MANIFEST.json").write_bytes(dump_json(manifest))


def test_a_damaged_bank_is_refused(place: Place, copied: Path) -> None:
    file = copied / "decay.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationFailed, match=r"decay\.safetensors"):
        composed(place, copied, {0: "decay"})
    file.unlink()
    with pytest.raises(VerificationFailed, match="missing"):
        composed(place, copied, {0: "decay"})


def test_a_folder_that_is_no_bank(place: Place, here: Path) -> None:
    for path in (here, here / "none", place.model):
        with pytest.raises(CheckpointError, match="no bank"):
            composed(place, path, {0: "decay"})


HOSTILE = {
    "format": (lambda d: d.update(format=2), "format 2"),
    "key": (lambda d: d.update(more=1), "unknown key"),
    "list": (lambda d: d.update(mixers={}), "mixers"),
    "path": (lambda d: d["mixers"][0].update(file="../x.safetensors"), "plain file name"),
    "other": (lambda d: d["mixers"][0].update(file="gla.safetensors"), "unknown|missing"),
    "text": (lambda d: d["mixers"][0].update(file="bank.json"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bank_that_says_what_is_not(name: str, place: Place, copied: Path) -> None:
    change, words = HOSTILE[name]
    rewritten(copied, change)
    with pytest.raises(MorphError, match=words):
        composed(place, copied, {0: "decay"})


@pytest.mark.parametrize("what", ["shape", "nan", "lacking"])
def test_tensors_that_do_not_fit(what: str, place: Place, copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = load_file(copied / "gla.safetensors")
    name = next(n for n in sorted(found) if ".2.self_attn.mixers." in n)
    if what == "lacking":
        del found[name]
    else:
        found[name] = torch.zeros(3) if what == "shape" else found[name] * torch.nan
    save_file(found, copied / "gla.safetensors")
    rewritten(copied, lambda data: None)
    composed(place, copied, {0: "gla"})
    with pytest.raises(CheckpointError, match=r"2\.self_attn\.mixers"):
        composed(place, copied, {2: "gla"})


def test_a_bank_of_another_model_is_refused(place: Place, here: Path) -> None:
    shutil.copytree(place.model, here / "other")
    file = here / "other" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    place.plan({0: "decay"}, here / "plan.json")
    found = morph("convert", "other", "o", "--plan", "plan.json", "--aligned", place.bank)
    assert found.code == 4 and "another model (model)" in found.err
    assert not (here / "o").exists()


@pytest.mark.parametrize(
    ("mixers", "words"),
    [
        ({1: "hedgehog"}, "layer 1: the bank has no 'hedgehog'. There are: decay, sliding, gla."),
        ({0: "decay", 2: "kda"}, "layer 2: the bank has no 'kda'"),
        ({0: "sliding:window=16"}, "plan has sliding:window=16, the bank has sliding:window=8"),
        ({2: "decay:gate=true,qk_norm=true"}, "qk_norm=true, the bank has decay:qk_norm=false"),
    ],
    ids=str,
)
def test_mixers_that_are_not_in_the_bank(
    mixers: dict[int, str], words: str, place: Place, here: Path
) -> None:
    place.plan(mixers, here / "plan.json")
    found = morph("convert", place.model, "o", "--plan", "plan.json", "--aligned", place.bank)
    assert found.code == 4 and words in found.err and not (here / "o").exists()


def test_layers_that_are_not_in_the_bank(place: Place, copied: Path) -> None:
    bank = _bank.read(copied, place.source())
    first = dataclasses.replace(bank.mixers[0], after={"0": 0.5, "2": 0.5})
    bank = dataclasses.replace(bank, mixers=(first,))
    _bank.chosen(bank, place.plan({0: "decay", 2: "decay"}))
    with pytest.raises(MismatchError, match="layer 1: the bank has decay for the layers 0, 2"):
        _bank.chosen(bank, place.plan({1: "decay"}))


def test_heads_of_several_kinds_are_refused(place: Place, here: Path) -> None:
    source, bank = place.source(), _bank.read(place.bank, place.source())
    whole = place.plan({1: "decay"})
    groups = whole.layers[1].groups
    halves = [
        dataclasses.replace(groups[0], heads=tuple(heads)) for heads in (range(4), range(4, 8))
    ]
    halves[1] = dataclasses.replace(halves[1], mixer="full", options={})
    mixed = planning.LayerPlan(groups=tuple(halves))
    fused = dataclasses.replace(whole.layers[1], fusion="scale")
    for layer in (mixed, fused):
        layers = (whole.layers[0], layer, *whole.layers[2:])
        with pytest.raises(MismatchError, match="layer 1: its heads"):
            _bank.chosen(bank, dataclasses.replace(whole, layers=layers))
    recipe = place.recipe("align=1K", select={"granularity": "head"})
    with pytest.raises(MismatchError, match="granularity is head"):
        _bank.check(bank, recipe, source)
    assert _select.baseline(source, recipe.mixer, 0, "window").mixers == ("sliding",)
    with pytest.raises(MismatchError, match="sliding:window="):
        _bank.check(bank, place.recipe(), source)
