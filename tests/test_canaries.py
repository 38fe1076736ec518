"""A model folder is data: whatever code it holds, and wherever that is named, it never runs.

One folder holds a payload in every place where a loader might look for code. Every command that
reads a checkpoint runs on it, in a process that is watched (an audit hook; and the kernel, for that
process and all it starts, kills whoever connects to anything). No canary may appear, nothing of the
folder may be compiled, imported or unpickled, no name may be looked up, and every command ends with
a documented exit code.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils

from morph import pipeline
from morph import plan as planning
from morph.errors import MorphError
from morph.families.llama import FAMILY

REPO = Path(__file__).resolve().parent.parent
HUB = "canary-org/canary-kernel"
TEXT = "The secret code is soft near the river, and the garden is silver. " * 120

# Runs commands one after the other, and tells how each ended and what was seen
DRIVER = r"""
import contextlib, ctypes, io, json, os, struct, sys, traceback

job = json.load(sys.stdin)
sys.path += [job["repo"], job["site"]]
seen, folders = [], [os.path.realpath(f) for f in job["folders"]]

def inside(path):
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    if os.fsdecode(path).startswith("<"):  # no file, but code of the interpreter
        return False
    path = os.path.realpath(os.fsdecode(path))
    return any(path == f or path.startswith(f + os.sep) for f in folders)

def watch(event, arguments):
    told = None
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        told = None if isinstance(arguments[1], (str, bytes)) else arguments[1]  # a local socket
        told = None if event == "socket.bind" and told and told[0] == "::1" else told  # urllib3
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        told = arguments[0]
    elif event in ("os.system", "os.exec", "os.posix_spawn"):
        told = arguments[0]
    elif event == "subprocess.Popen":
        told = [os.fsdecode(a) for a in arguments[1]] if not isinstance(arguments[1], str) else 0
        same = arguments[0] is None or os.fsdecode(arguments[0]) == sys.executable
        if same and told and told[0] == sys.executable and told[1] in ("-I", "-P"):
            told = None
    elif event == "exec":
        told = getattr(arguments[0], "co_filename", "?")
        told = told if inside(told) else None
    elif event == "compile":
        told = arguments[1] if inside(arguments[1]) else None
    elif event == "import":
        told = arguments[1] if inside(arguments[1]) else None
    elif event == "open":
        code = str(arguments[0]).endswith((".py", ".pyc", ".so", ".pth") + job["pickles"])
        told = arguments[0] if code and inside(arguments[0]) else None
    elif event == "pickle.find_class":
        told = arguments[1:]
    if told is not None:
        seen.append([event, str(told)])

def refuse_connections():
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return
    steps = [(0x20, 0, 0, 0)]
    for number in (42, 44, 46):  # connect, sendto, sendmsg
        steps += [(0x15, 0, 1, number), (0x06, 0, 0, 0x80000000)]
    code = b"".join(struct.pack("<HBBI", *s) for s in [*steps, (0x06, 0, 0, 0x7FFF0000)])
    kept = ctypes.create_string_buffer(code, len(code))
    given = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.create_string_buffer(given, len(given)), 0, 0) == 0

job["pickles"] = tuple(job["pickles"])
refuse_connections()
sys.addaudithook(watch)
from morph import cli

exec(job["probe"])
for command in job["commands"]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main(command)
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    seen += [["canary", name] for name in os.listdir(job["canaries"])]
    print(json.dumps({"command": command, "code": code, "out": out.getvalue(), "seen": seen}))
    sys.stdout.flush()
    seen.clear()
"""


OURS = ("driver", "canaries", "home", "site")  # folders of a zoo that are not hostile


class Done(NamedTuple):
    """How a command ended."""

    command: list[str]
    code: int
    out: str
    seen: list[list[str]]


class Payload:
    """What leaves a canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class Zoo:
    """The hostile folders, and the place where a canary would appear."""

    def __init__(self, root: Path) -> None:
        self.root, self.canaries = root, root / "canaries"
        self.canaries.mkdir(parents=True)
        self.site = root / "site"
        self.site.mkdir()
        (self.site / "canary_parts.py").write_text(self.code("installed part"))
        self.install_kernels()
        (root / "driver").mkdir()
        (root / "driver/driver.py").write_text(DRIVER)

    def install_kernels(self) -> None:
        """A package `kernels`, as transformers asks for it, that only leaves a canary.

        Without it transformers would not even try to follow the name of a kernel.
        """
        version = import_utils.KERNELS_MIN_VERSION
        told = self.site / f"kernels-{version}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
        )
        (told / "top_level.txt").write_text("kernels\n")
        (self.site / "kernels").mkdir()
        (self.site / "kernels/__init__.py").write_text(
            "def same(*a, **k): return lambda given: given\n"
            "use_kernel_forward_from_hub = use_kernelized_func = same\n"
            f"def get_kernel(*a, **k): open({str(self.canary('kernel'))!r}, 'w').close()\n"
            "kernelize = get_kernel\n"
            "class Stub:\n    def __init__(self, *a, **k): pass\n"
            "def __getattr__(name):\n"
            "    if name.startswith('__'): raise AttributeError(name)\n"
            "    return Stub\n"
        )

    def canary(self, name: str) -> Path:
        return self.canaries / name.replace("/", "-").replace(" ", "-")

    def code(self, name: str) -> str:
        """Python that leaves a canary, and what a loader may look for."""
        return (
            f"open({str(self.canary(name))!r}, 'w').close()\n"
            "class CanaryConfig: pass\nclass CanaryModel: pass\nclass CanaryTokenizer: pass\n"
            "class Mixer: pass\ndef generate(*a, **k): pass\ndef score(*a, **k): pass\n"
        )

    def run(
        self,
        commands: list[list[Any]],
        *,
        cwd: Path,
        pickles: tuple[str, ...] = (".bin", ".pt", ".pkl"),
        probe: str = "",
    ) -> list[Done]:
        """Run commands in one watched process that stands in a hostile folder; check them."""
        job = {
            "commands": [[str(word) for word in command] for command in commands],
            "folders": [
                str(p)
                for p in self.root.iterdir()
                if p.name not in ("driver", "canaries", "home", "site")
            ],
            "repo": str(REPO),
            "site": str(self.site),
            "canaries": str(self.canaries),
            "pickles": pickles,
            "probe": probe,
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
        home = {"HOME": str(self.root / "home"), "USER": "nobody", "COLUMNS": "100"}
        done = subprocess.run(
            [sys.executable, str(self.root / "driver/driver.py")],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**kept, **home},
        )
        assert done.returncode == 0, (done.returncode, done.stderr[-3000:], done.stdout[-500:])
        told = [Done(**json.loads(line)) for line in done.stdout.splitlines()]
        assert len(told) == len(commands)
        for one in told:
            assert one.code in (0, 2, 3, 4, 5, 6), one
            assert "Traceback" not in one.out, one.out
            assert one.seen == [], (one.command, one.seen, one.out)
        return told

    def clear(self) -> None:
        """Take away the canaries that did appear, so that the next test is not blamed."""
        for path in self.canaries.iterdir():
            path.unlink()


# --- the payloads ---------------------------------------------------------------------------------

MODULES = [
    *("modeling_canary", "configuration_canary", "tokenization_canary", "generation_canary"),
    *("sitecustomize", "usercustomize", "conftest", "setup", "__init__", "torch", "numpy", "json"),
    *("kernels", "triton", "flash_attn", "fla", "morph", "yaml", "canary_side", "safetensors"),
    *("custom_generate/generate", "custom_generate/__init__", "transformers/__init__"),
]
ESCAPES = [
    "''.__class__.__mro__[1].__subclasses__()",
    "cycler.__init__.__globals__.os.system('touch CANARY')",
    "lipsum.__globals__['os'].system('touch CANARY')",
    "self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY')",
    "''|attr('__class__')",
    "namespace.__init__.__globals__.os.popen('touch CANARY').read()",
]
CONFIG = {
    "auto_map": {
        "AutoConfig": "configuration_canary.CanaryConfig",
        "AutoModelForCausalLM": f"{HUB}--modeling_canary.CanaryModel",
    },
    "trust_remote_code": True,
    "attn_implementation": HUB,
    "_attn_implementation": HUB,
    "_attn_implementation_internal": HUB,
    "experts_implementation": HUB,
    "_experts_implementation": HUB,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": HUB},
    "hub_kernels": [HUB],
    "custom_pipelines": {"x": {"impl": "modeling_canary.CanaryModel"}},
    "custom_generate": HUB,
    "model_file": "modeling_canary.py",
    "transformers_weights": "../pytorch_model.bin",
}


def plant(zoo: Zoo, folder: Path) -> Path:
    """Put a payload into every place of a good model folder."""
    for name in MODULES:
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(zoo.code(f"module {name}"))
    (folder / "canary.pth").write_text(f"import os; os.system('touch {zoo.canary('pth')}')\n")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"weight": Payload(zoo.canary(f"pickle {name}"))}, folder / name)
    (folder / "model.pkl").write_bytes(pickle.dumps(Payload(zoo.canary("pickle"))))
    change(folder / "config.json", lambda c: c | CONFIG | {"deeper": [{"still": dict(CONFIG)}]})
    escapes = " }}{{ ".join(ESCAPES).replace("CANARY", str(zoo.canary("template")))
    template = f"{{{{ {escapes} }}}}"
    change(
        folder / "tokenizer_config.json",
        lambda c: (
            c
            | {"auto_map": {"AutoTokenizer": ["tokenization_canary.CanaryTokenizer", None]}}
            | {"trust_remote_code": True, "chat_template": template}
        ),
    )
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text(template)
    change(
        folder / "generation_config.json",
        lambda c: (
            c | {"trust_remote_code": True, "custom_generate": HUB, "_from_model_config": True}
        ),
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"auto_map": {"AutoProcessor": "modeling_canary.CanaryModel"}})
    )
    code = {"format": "pt", "auto_map": "modeling_canary.CanaryModel", "code": zoo.code("metadata")}
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata=code)
    return folder


def change(path: Path, how: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(how(found)))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root = tmp_path_factory.mktemp("zoo")
    made = Zoo(root)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(root / "clean")
    tokenizer = runpy.run_path(str(REPO / "examples/tiny_model.py"))["tokenizer"]
    tokenizer(TEXT).save_pretrained(root / "clean")
    (root / "text.txt").write_text(TEXT)
    plant(made, shutil.copytree(root / "clean", root / "model"))
    return made


PROBES = {
    "lookup": ("import socket; socket.getaddrinfo('localhost', 1)", "socket.getad|-31 == 0"),
    "process": ("import os; os.system('true')", "os.system"),
    "open": ("open('modeling_canary.py')", "modeling_canary.py"),
    "code": ("compile('1', os.path.abspath('x.py'), 'exec')", "x.py"),
    "import": ("sys.path.insert(0, os.getcwd()); import canary_side", "canary_side"),
    "pickle": ("import pickle; pickle.load(open('model.pkl', 'rb'))", "'pickle'"),
    "part": ("import canary_parts", "installed-part"),
    "connection": (
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "socket.connect|assert -31 == 0|returncode=-31|\\(-31",
    ),
}


@pytest.mark.parametrize("kind", PROBES)
def test_the_watch_sees_what_it_should(kind, zoo):
    """Each thing that must not happen is noticed where it does."""
    code, sees = PROBES[kind]
    with pytest.raises(AssertionError, match=sees):
        zoo.run([["--version"]], cwd=zoo.root / "model", probe=code)
    zoo.clear()


# --- the commands ---------------------------------------------------------------------------------


SETTINGS = {
    **{"select.task": "single_2", "select.examples": "2", "select.seq_len": "96"},
    **{"evaluate.tasks": "[single_2]", "evaluate.lengths": "[96]", "evaluate.examples": "2"},
    **{"evaluate.depths": "1", "evaluate.perplexity_tokens": "128", "evaluate.seq_len": "64"},
    **{"evaluate.speed_length": "16", "evaluate.decode_tokens": "2"},
}


def sets(*prefixes: str) -> list[str]:
    found = [f"{k}={v}" for k, v in SETTINGS.items() if k.startswith(prefixes)]
    return [word for one in found for word in ("--set", one)]


def copied(zoo: Zoo, name: str, of: str = "model") -> Path:
    """A copy of a folder, under another name; it is made anew for every test."""
    shutil.rmtree(zoo.root / name, ignore_errors=True)
    return shutil.copytree(zoo.root / of, zoo.root / name)


def hybrid(zoo: Zoo) -> Path:
    """A hybrid whose plan, config and record name a mixer from elsewhere, which can be imported."""
    folder = copied(zoo, "hybrid")
    config = json.loads((zoo.root / "clean/config.json").read_text())
    made = planning.full_plan("llama", FAMILY.geometry(config))
    text = planning.dumps(made).replace('"full"', '"canary_parts:Mixer"')
    assert "canary_parts:Mixer" in text
    (zoo.root / "evil-plan.json").write_text(text)
    plan = json.loads(text)
    change(
        folder / "config.json", lambda c: c | {"model_type": "morph_llama", "morph": {"plan": plan}}
    )
    record = {
        "plan": plan,
        "source": {"name": "canary_parts:Mixer"},
        "selector": "canary_parts:score",
    }
    (folder / "morph.json").write_text(json.dumps(record))
    entry = {"bytes": 1, "sha256": "0" * 64}
    files = {"../canary": entry, "canary_parts.py": entry}
    manifest = {"format": 1, "morph": "canary_parts", "files": files}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def no_code(folder: Path) -> None:
    """Nothing in a folder that morph wrote is code, a pickle, a link, or a key that names some."""
    for path in folder.rglob("*"):
        assert path.suffix not in (".py", ".pth", ".bin", ".pt", ".pkl"), path
        assert not path.is_symlink(), path


def no_keys(folder: Path) -> None:
    """The config names no code, no kernel and no file."""
    harmless = {"use_kernels"}  # nobody reads it from there; the names of kernels are what counts
    assert not (CONFIG.keys() - harmless) & json.loads((folder / "config.json").read_text()).keys()


def check_codes(
    zoo: Zoo, commands: Mapping[str, tuple[list[Any], int]], **how: Any
) -> dict[str, str]:
    """Run commands in one process that stands in the hostile folder; compare the exit codes.

    Returns what each printed.
    """
    told = zoo.run([words for words, _ in commands.values()], cwd=zoo.root / "model", **how)
    for (name, (_, code)), one in zip(commands.items(), told, strict=True):
        assert one.code == code, (name, one.code, one.out[-800:])
    return {name: one.out for name, one in zip(commands, told)}


def lora_of(zoo: Zoo, name: str) -> Path:
    """An adapter that names a model of the Hub, and a module to import."""
    folder = copied(zoo, name)
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    parts = {"base_model_class": "X", "parent_library": "canary_parts"}
    lora = {"peft_type": "LORA", "base_model_name_or_path": HUB, "auto_mapping": parts}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    return folder


def test_commands_on_files(zoo):
    model, clean, out = zoo.root / "model", zoo.root / "clean", zoo.root / "files"
    out.mkdir()
    evil, linked, adapter = hybrid(zoo), copied(zoo, "linked"), lora_of(zoo, "adapter")
    nested, quantised = copied(zoo, "nested"), copied(zoo, "quantised")
    change(nested / "config.json", lambda c: c | {"text_config": CONFIG, "vision_config": CONFIG})
    code = {"quant_method": "canary_parts.Mixer", "__reduce__": "os.system", **CONFIG}
    change(quantised / "config.json", lambda c: c | {"quantization_config": code})
    (zoo.root / "secret").write_text("canary")
    (linked / "notes.txt").symlink_to(zoo.root / "secret")
    values = tuple((float(i),) for i in range(4))
    for name in ("uniform", "canary_parts:score"):
        scores = planning.Scores(
            selector=name, model_type="llama", granularity="layer", values=values, unit="x"
        )
        (out / f"{name[:6]}.json").write_text(planning.dumps(scores))
    budget = ["--model", model, "--budget", "1/2", "--out", out / "plan.json", "--force"]
    check_codes(
        zoo,
        {
            "inspect": (["inspect", model], 0),
            "inspect health": (["inspect", model, "--health", "--json"], 0),
            "inspect nested": (["inspect", nested], 0),
            "inspect quantised": (["inspect", quantised], 3),
            "inspect hybrid": (["inspect", evil, "--health"], 0),
            "inspect linked": (["inspect", linked], 3),
            "inspect adapter": (["inspect", adapter], 3),
            "diff": (["diff", clean, model, "--tensors"], 0),
            "diff hybrid": (["diff", evil, model, "--json"], 0),
            "diff linked": (["diff", linked, model], 3),
            "verify": (["verify", model], 0),
            "verify against": (["verify", model, "--against", clean], 0),
            "verify hybrid": (["verify", evil], 3),
            "verify linked": (["verify", linked], 3),
            "restore nothing": (["restore", clean, model, out / "r0", "--dry-run"], 4),
            "restore": (["restore", clean, model, out / "restored", "--allow", "unchanged"], 0),
            "restore hybrid": (["restore", clean, evil, out / "r1"], 4),
            "restore linked": (["restore", clean, linked, out / "r2"], 3),
            "restore adapter": (["restore", clean, adapter, out / "r3"], 3),
            "plan": (["plan", out / "unifor.json", *budget], 0),
            "plan of outside scores": (["plan", out / "canary.json", *budget], 0),
            "convert-pickle": (["convert-pickle", model, out / "pickle"], 2),
        },
    )
    no_code(out / "restored")


TAGS = [
    "model: !!python/object/apply:os.system ['touch CANARY']",
    "model: !!python/object/new:os.system ['touch CANARY']",
    "model: !!python/name:canary_parts.Mixer ''",
    "model: !!python/module:canary_parts ''",
    "select: {options: !!python/object:canary_parts.Mixer {}}",
    "? !!python/object/apply:os.system ['touch CANARY']\n: 1",
    "model: !canary_parts.Mixer {}",
    "model: &a [*a]",
]


def test_recipes_with_tags(zoo):
    """YAML that makes objects, in every command that takes a recipe."""
    commands: dict[str, tuple[list[Any], int]] = {}
    for i, tag in enumerate(TAGS):
        path = zoo.root / f"recipe{i}.yaml"
        path.write_text(tag.replace("CANARY", str(zoo.canary("yaml"))) + "\n")
        commands[f"check {i}"] = (["check", path], 2)
        commands[f"run {i}"] = (["run", path, "--dry-run"], 2)
    check_codes(zoo, commands)


def test_pickles_are_converted_and_refused(zoo):
    """In one folder the weights are good, in the others payloads; all side files are hostile."""
    good, out = copied(zoo, "pickled"), zoo.root / "converted"
    (good / "model.safetensors").unlink()
    bad, adapter = copied(zoo, "bad", of="pickled"), lora_of(zoo, "adapter")
    torch.save(load_file(zoo.root / "clean/model.safetensors"), good / "pytorch_model.bin")
    told = check_codes(
        zoo,
        {
            "inspect": (["inspect", good], 3),
            "dry run": (["convert-pickle", bad, out, "--dry-run"], 0),
            "bad": (["convert-pickle", bad, out], 3),
            "adapter": (["convert-pickle", adapter, out], 3),
            "good": (["convert-pickle", good, out], 0),
            "inspect it": (["inspect", out], 0),
        },
        pickles=("model.pkl", "optimizer.pt", "training_args.bin"),
    )
    for name in ("bad", "adapter"):  # refused before it was tried, not stopped when it was
        assert "its pickle asks for posix.system" in told[name]
    no_code(out)
    no_keys(out)


def test_commands_that_load_the_model(zoo):
    model, out = zoo.root / "model", zoo.root / "made"
    out.mkdir()
    scores, plan, made = out / "scores.json", out / "plan.json", out / "hybrid"
    evil, nested = hybrid(zoo), copied(zoo, "nested")
    change(nested / "config.json", lambda c: c | {"text_config": CONFIG, "vision_config": CONFIG})
    data = ["--data", zoo.root / "text.txt"]
    fisher = ["--selector", "fisher", *data, *sets("select")]
    half = ["--budget", "1/2", "--mixer", "decay"]
    tuned = ["--out", out / "tuned", "--dry-run", *data]
    measured = [*data, *sets("evaluate")]
    check_codes(
        zoo,
        {
            "score": (["score", model, *fisher, "--out", scores], 0),
            "plan": (
                ["plan", scores, "--model", model, *half, "--out", plan],
                0,
            ),
            "convert": (["convert", model, made, "--plan", plan], 0),
            "distill": (["distill", made, "--teacher", model, *tuned], 0),
            "evaluate": (["evaluate", made, "--against", model, *measured], 0),
            "score a hybrid": (["score", evil, *fisher], 3),
            "evaluate a hybrid": (["evaluate", evil, *measured], 3),
            "evaluate it against": (["evaluate", evil, "--against", model, *measured], 3),
            "distill a hybrid": (["distill", evil, "--teacher", model, *tuned], 3),
            "score nested": (["score", nested, *fisher], 3),
        },
    )
    no_code(made)
    no_keys(made)


def test_a_conversion_that_starts_in_the_folder(zoo):
    """A stock hybrid is compared with its source in processes of their own, started from there."""
    out, how = zoo.root / "stock", ["--selector", "uniform", "--budget", "1/2"]
    window = ["--mixer", "sliding", "--set", "mixer.window=8"]
    command = ["convert", zoo.root / "model", out, *how, *window]
    try:
        check_codes(zoo, {"convert": (command, 0)})
    finally:
        zoo.clear()
    no_code(out)
    no_keys(out)


def test_a_plan_file_chooses_no_import(zoo):
    hybrid(zoo)
    command = ["convert", zoo.root / "model", zoo.root / "x", "--plan", zoo.root / "evil-plan.json"]
    try:
        check_codes(zoo, {"convert": (command, 3)})
    finally:
        zoo.clear()


def test_an_adapter_beside_the_model_is_not_loaded(zoo):
    folder = copied(zoo, "adapted", of="clean")
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(lora | {"base_model_name_or_path": HUB}))
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (32, 2)}
    pairs = {stem.format(i, x): torch.ones(n) for i in range(4) for x, n in shapes.items()}
    save_file(pairs, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MorphError, match="adapter"):
        pipeline.open_source(str(folder)).model()
