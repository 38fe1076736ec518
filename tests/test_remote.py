"""Checkpoints that bring their own code: equal to the package's, and loaded where morph is not."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import morph
from morph import checkpoint, modeling, registry, strict, surgery
from morph._tiny import tiny_model
from morph.errors import CheckpointError, UsageError, VerificationFailed
from morph.pipeline import _flatten, _remote, _verify
from morph.pipeline._source import open_source
from morph.plan import Geometry, HeadGroup, LayerPlan, Plan

FAMILIES = registry.names("families")
MIXERS = registry.names("mixers")
GENERATE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 10}
SINKS = {"window": 6, "num_sinks": 2}

# Runs without morph: loads every folder of the job, and says what it found.
SCRIPT = """
import json, sys
sys.modules["morph"] = None  # importing it is an error from here on
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
job = json.load(sys.stdin)

def refusal(**options):
    try:
        AutoModelForCausalLM.from_pretrained(job["folders"][0], **options)
    except ValueError as error:
        return str(error)

def look(folder):
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    base = AutoModel.from_pretrained(folder, **trust)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    want = torch.load(folder + "/expected.pt", weights_only=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=want["ids"]).logits
        hidden = base.eval()(input_ids=want["ids"]).last_hidden_state
    cached, plain = (
        model.generate(want["ids"], use_cache=c, **job["generate"]) for c in (True, False)
    )
    return {
        "names": [type(x).__name__ for x in (config, base, model)],
        "modules": sorted({type(x).__module__.split(".")[0] for x in (config, base, model)}),
        "info": [sorted(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "attention": [type(x.self_attn).__name__ for x in model.model.layers],
        "logits": torch.equal(logits, want["logits"]),
        "hidden": torch.equal(hidden, want["hidden"]),
        "generated": torch.equal(cached, want["generated"]),
        "cached": torch.equal(cached, plain),
    }, model

found = {"refused": refusal(), "refused_off": refusal(trust_remote_code=False), "seen": []}
for folder in job["folders"]:
    seen, model = look(folder)
    found["seen"].append(seen)
again = folder + "-again"
model.save_pretrained(again)
import shutil
shutil.copy(folder + "/expected.pt", again)
found["seen"].append(look(again)[0])
found["loaded"] = [m for m, x in sys.modules.items() if m.split(".")[0] == "morph" and x]
print()  # after the question that was asked
print(json.dumps(found))
"""


def plan_of(model_type, groups):
    """Return a plan of a tiny model: head groups per layer, in the layers that are full."""
    family = registry.load("families", model_type).FAMILY
    shape = family.geometry(family.tiny_config)
    heads = tuple(range(shape.num_attention_heads))
    layers = [LayerPlan(groups=(HeadGroup(mixer="full", heads=heads),))] * shape.num_hidden_layers
    last = shape.candidates[-len(groups) :] or range(shape.num_hidden_layers)
    for i, layer in zip(last, groups, strict=False):
        layers[i] = LayerPlan(groups=layer)
    return surgery.resolve_costs(Plan(model_type=model_type, geometry=shape, layers=tuple(layers)))


def sinks(heads=range(6)):
    return (HeadGroup(mixer="sliding", heads=tuple(heads), options=SINKS),)


def decay(heads=range(6)):
    return (HeadGroup(mixer="decay", heads=tuple(heads)),)


def mixed():
    return (HeadGroup(mixer="full", heads=(0, 3)), *sinks((1, 2)), *decay((4, 5)))


# (folder, family, head groups of the last full layers)
CASES = [
    ("llama-sinks", "llama", [sinks()]),
    ("llama-decay", "llama", [decay()]),
    ("llama-heads", "llama", [mixed()]),
    ("qwen3-all", "qwen3", [sinks(), decay(), mixed()]),
    ("gemma3-all", "gemma3_text", [sinks(), decay(), mixed()]),
    ("phi3-all", "phi3", [sinks(), decay(), mixed()]),
]


def remote_files(model_type, plan):
    family = registry.load("families", model_type).FAMILY
    return _remote.files(family, {"morph": {"plan": strict.plain(plan)}})


@torch.no_grad()
def expect(folder):
    """Load a folder with morph and write down what it computes."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__ == "morph.modeling"  # the package wins over the files
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (2, 20), generator=generator)
    found = {
        "ids": ids,
        "logits": model(input_ids=ids).logits,
        "hidden": model.base_model(input_ids=ids).last_hidden_state,
        "generated": model.generate(ids, **GENERATE),
    }
    torch.save(found, folder / "expected.pt")
    return type(model).__name__


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every case as a checkpoint with code, not compared; that is what the tests here do."""
    root = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_verify, "load_and_compare", lambda *_: {})
        for name, model_type, groups in CASES:
            source = root / f"source-{name}"
            tiny_model(model_type).save_pretrained(source)
            plan = plan_of(model_type, groups)
            morph.convert(source, root / name, plan, target="package", with_code=True)
    return [root / name for name, _, _ in CASES]


@pytest.fixture(scope="module")
def seen(folders, tmp_path_factory):
    """What one process without morph saw of all folders, and of the last one saved again."""
    for folder in folders:
        expect(folder)
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT],
        input=json.dumps({"folders": [str(f) for f in folders], "generate": GENERATE}),
        env={**os.environ, "HF_MODULES_CACHE": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_trust_it_is_refused(seen):
    for text in (seen["refused"], seen["refused_off"]):
        assert text is not None
        assert "trust_remote_code=True" in text


@pytest.mark.parametrize("case", range(len(CASES) + 1), ids=[*(c[0] for c in CASES), "saved-again"])
def test_plain_transformers_loads_the_same_model(seen, case):
    found = seen["seen"][case]
    _, model_type, groups = CASES[min(case, len(CASES) - 1)]
    names = _remote.auto_map(registry.load("families", model_type).FAMILY).values()
    assert found["names"] == [n.split(".")[1] for n in names]
    assert found["modules"] == ["transformers_modules"]
    assert found["info"] == [[], [], []]
    replaced = plan_of(model_type, groups).replaced_layers
    assert [i for i, a in enumerate(found["attention"]) if a == "HybridAttention"] == [*replaced]
    assert found["logits"] and found["hidden"]
    assert found["generated"] and found["cached"]
    assert seen["loaded"] == []


def test_folder_says_how_to_load_it(folders):
    folder = folders[1]
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_morph.MorphLlamaConfig",
        "AutoModel": "modeling_morph.MorphLlamaModel",
        "AutoModelForCausalLM": "modeling_morph.MorphLlamaForCausalLM",
    }
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "import morph" not in card
    manifest = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert {p.name for p in folder.glob("*.py")} <= set(manifest)


def test_only_what_the_plan_needs_is_written(folders):
    names = {p.name for p in folders[1].glob("*.py")}
    assert {"morph_mixers_decay.py", "morph_kernels_decay.py", "morph_families_llama.py"} <= names
    assert not [n for n in names if "sliding" in n or "stock" in n or "selectors" in n]
    assert "def choose" not in (folders[1] / "morph_plan.py").read_text()


def flat_package(files, root, name):
    """Write remote code as a package of its own and import its entry."""
    folder = root / name
    folder.mkdir()
    for file, data in {**files, "__init__.py": b""}.items():
        (folder / file).write_bytes(data)
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module(f"{name}.modeling_morph")
    finally:
        sys.path.remove(str(root))


@torch.no_grad()
def same_logits(module, hybrid):
    names = _remote.auto_map(surgery.family_of(hybrid.config.to_dict()))
    own = getattr(module, names["AutoModelForCausalLM"].split(".")[1])
    assert own.__module__ == module.__name__
    config = own.config_class.from_dict(hybrid.config.to_dict())
    made = own(config).eval()
    made.load_state_dict(hybrid.state_dict())
    ids = torch.arange(3, 23)[None]
    return torch.equal(made(input_ids=ids).logits, hybrid.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_code_of_every_family_computes_the_same(model_type, tmp_path):
    plan = plan_of(model_type, [sinks(), decay()])
    module = flat_package(remote_files(model_type, plan), tmp_path, f"flat_{model_type}")
    assert same_logits(module, modeling.hybrid(tiny_model(model_type), plan))


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "full"])
def test_code_of_every_mixer_computes_the_same(mixer, tmp_path):
    options = {"window": 6} if mixer == "sliding" else {}
    group = HeadGroup(mixer=mixer, heads=tuple(range(6)), options=options)
    plan = plan_of("llama", [(group,), (group,)])
    module = flat_package(remote_files("llama", plan), tmp_path, f"flat_mixer_{mixer}")
    assert same_logits(module, modeling.hybrid(tiny_model("llama"), plan))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_files_stand_alone(model_type):
    """No import of morph, every relative import is a file there, and the same bytes each time."""
    shape = Geometry(
        num_hidden_layers=1, num_attention_heads=len(MIXERS), num_key_value_heads=1, head_dim=8,
        v_head_dim=8, hidden_size=8, windows=(None,),
    )  # fmt: skip
    groups = tuple(HeadGroup(mixer=m, heads=(i,)) for i, m in enumerate(MIXERS))
    plan = Plan(model_type=model_type, geometry=shape, layers=(LayerPlan(groups=groups),))
    files = remote_files(model_type, plan)
    assert files == remote_files(model_type, plan)
    for name, data in files.items():
        text = data.decode()
        assert text.startswith(f"# Generated by morph {morph.__version__} from its own source")
        assert "Apache-2.0" in text.splitlines()[1]
        for module, level in imports(text):
            if level:
                assert f"{module}.py" in files, f"{name}: {module}"
            else:
                assert module.split(".")[0] != "morph", f"{name}: {module}"


def imports(text):
    """Yield (module, level) of every import; `from . import a` gives a."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((a.name, 0) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or a.name, node.level) for a in node.names)


def test_transformers_would_copy_every_file(folders):
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    for folder in folders:
        copied = {Path(p).name for p in get_relative_import_files(folder / "modeling_morph.py")}
        assert copied | {"modeling_morph.py"} == {p.name for p in folder.glob("*.py")}
        needed = {top for p in folder.glob("*.py") for top in get_imports(p)}
        assert needed - set(sys.stdlib_module_names) <= {"torch", "transformers"}


def test_foreign_code_and_other_auto_maps_stay_out(tmp_path, monkeypatch):
    monkeypatch.setattr(_verify, "load_and_compare", lambda *_: {})
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_morph.Evil", "AutoTokenizer": "evil.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_morph.py").write_text("raise SystemExit('ran')")
    (source / "evil.py").write_text("raise SystemExit('ran')")
    plan = plan_of("llama", [sinks()])
    morph.convert(source, tmp_path / "with", plan, target="package", with_code=True)
    morph.convert(source, tmp_path / "without", plan, target="package")
    written = json.loads((tmp_path / "with" / "config.json").read_text())
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert not (tmp_path / "with" / "evil.py").exists()
    assert "SystemExit" not in (tmp_path / "with" / "modeling_morph.py").read_text()
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))


@pytest.mark.parametrize("place", ["elsewhere.Model", "user/repo--modeling_morph.Model"])
def test_auto_map_must_name_a_written_file(place, tmp_path):
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    found = open_source(str(source)).checkpoint
    with pytest.raises(CheckpointError, match="in no file that is written"):
        checkpoint.write_checkpoint(
            tmp_path / "out",
            source=found,
            config=found.config,
            extra_files={"modeling_morph.py": b""},
            auto_map={"AutoModel": place},
        )
    assert not (tmp_path / "out").exists()


def test_mixers_from_outside_cannot_be_added(monkeypatch):
    plan = plan_of("llama", [sinks()])
    heads = tuple(range(6))
    group = HeadGroup(mixer="my_package.mixers", heads=heads)
    layers = (*plan.layers[:-1], LayerPlan(groups=(group,)))
    plan = Plan(model_type="llama", geometry=plan.geometry, layers=layers)
    with pytest.raises(UsageError, match="my_package.mixers.*Leave --with-code away"):
        remote_files("llama", plan)


def test_stock_checkpoints_need_no_code(tmp_path):
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    group = HeadGroup(mixer="sliding", heads=tuple(range(6)), options={"window": 6})
    with pytest.raises(UsageError, match="needs no code"):
        morph.convert(source, tmp_path / "out", plan_of("llama", [(group,)]), with_code=True)


@pytest.mark.slow
def test_convert_compares_the_remote_code_too(tmp_path, monkeypatch):
    """Both ways of loading are compared; wrong code is found out; the user's caches stay empty."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    source = tmp_path / "source"
    model = tiny_model("llama")
    model.save_pretrained(source)
    plan = plan_of("llama", [decay(), mixed()])
    options = {"target": "package", "with_code": True, "student": modeling.hybrid(model, plan)}
    written = morph.convert(source, tmp_path / "out", plan, **options)
    assert written.verification["logit_error"] <= 1e-6
    assert written.verification["remote_code_error"] <= 1e-6
    assert "trust_remote_code=True" in written.load

    real = _remote.files

    def wrong(family, config):
        files = real(family, config)
        data = files["morph_mixers_decay.py"]
        assert b"scale=self.shape.scale" in data
        changed = data.replace(b"scale=self.shape.scale", b"scale=-self.shape.scale")
        return {**files, "morph_mixers_decay.py": changed}

    monkeypatch.setattr(_remote, "files", wrong)
    with pytest.raises(VerificationFailed, match="^bad by its own code: logits .* differ"):
        morph.convert(source, tmp_path / "bad", plan, **options)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("bad")]
    assert not (tmp_path / "home" / "modules").exists()


def test_imports_of_absent_libraries_are_guarded(tmp_path, monkeypatch):
    """A library that transformers does not bring is imported in a `try`, wherever it stands."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "fast.py").write_text(
        '"""A toy."""\nimport triton\nimport torch\nfrom toy import slow as other\n\n\n'
        "# kept with its comment\ndef run(x):\n    from toy.slow import reference, unused\n"
        "    return reference(triton, torch, other.extra(x))\n\n\ndef dropped():\n    pass\n"
    )
    (package / "slow.py").write_text(
        "def reference(*x):\n    return x\n\n\ndef unused():\n    pass\n\n\n"
        "def extra(x):\n    return x\n\n\ndef dropped():\n    pass\n"
    )
    monkeypatch.setattr(_flatten, "ROOT", tmp_path)
    found = _flatten.flatten({"toy.fast": ("run",)}, package="toy")
    assert found["toy_fast"] == (
        '"""A toy."""\ntry:\n    import triton\nexcept ImportError:\n    raise\nimport torch\n'
        "from . import toy_slow as other\n\n\n# kept with its comment\ndef run(x):\n"
        "    from .toy_slow import reference, unused\n"
        "    return reference(triton, torch, other.extra(x))\n"
    )
    assert "def extra" in found["toy_slow"]
    assert "dropped" not in found["toy_slow"]


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("import toy\n\n\ndef run():\n    return toy\n", "from toy import"),
        ("from toy import slow\n\n\ndef run():\n    return slow\n", "used as a value"),
        ("from toy.slow import nothing\n\n\ndef run():\n    return nothing\n", "'nothing'"),
        ("", "'run'"),
    ],
)
def test_what_cannot_be_followed_is_an_error(text, needle, tmp_path, monkeypatch):
    package = tmp_path / "toy"
    package.mkdir()
    (package / "fast.py").write_text(text)
    (package / "slow.py").write_text("")
    monkeypatch.setattr(_flatten, "ROOT", tmp_path)
    with pytest.raises(LookupError, match=needle):
        _flatten.flatten({"toy.fast": ("run",)}, package="toy")
