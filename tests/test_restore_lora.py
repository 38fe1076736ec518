"""A LoRA adapter as POST: dropping its deltas of q and k is the same as restoring what it makes."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from morph import restore
from morph.errors import CheckpointError, MismatchError, MorphError, UnsupportedModel, UsageError

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("_restoring.py"))))
tiny = kit.tiny
AT = "base_model.model.model.layers.1.self_attn."


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    """A base (qwen2, 6 query heads, biases) and a hand-made adapter of all its projections."""
    return written(tmp_path, "qwen2", ("q_proj", "k_proj", "v_proj", "o_proj"))


def written(
    root: Path, model_type: str, modules: tuple[str, ...], rank: int = 3, **config: Any
) -> tuple[Path, Path]:
    """Write a base and an adapter of these modules, as PEFT names them."""
    base = tiny.write(root / "base", model_type)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in tiny.shapes(model_type).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules and name.endswith(".weight"):
            for factor, sizes in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                values = rng.standard_normal(sizes).astype("<f4").tobytes()
                key = f"base_model.model.{module}.lora_{factor}.weight"
                tensors[key] = kit.Tensor("F32", sizes, values)
    folder = root / "adapter"
    folder.mkdir()
    kit.write_file(folder / "adapter_model.safetensors", tensors)
    found = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": "org/base"}
    found |= {"target_modules": list(modules), "bias": "none", "init_lora_weights": True, **config}
    (folder / "adapter_config.json").write_text(json.dumps(found))
    (folder / "README.md").write_text("---\nbase_model: org/base\n---\n# Adapter\n")
    return base, folder


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = kit.read(folder)
    edit(tensors)
    kit.write_file(folder / "adapter_model.safetensors", tensors)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_of_b_become_zero_and_nothing_else_changes(adapter: tuple[Path, Path], tmp_path: Path):
    base, post = adapter
    before = kit.digests(base), kit.digests(post)
    out = kit.restored(base, post, tmp_path / "out")
    a, made = kit.read(post), kit.read(out)
    assert a.keys() == made.keys()
    for name in a:
        dropped = ".lora_B." in name and (".q_proj." in name or ".k_proj." in name)
        assert made[name].data == (bytes(len(a[name].data)) if dropped else a[name].data)
    for name in ("adapter_config.json",):
        assert (out / name).read_bytes() == (post / name).read_bytes()
    text = (out / "README.md").read_text()
    assert text.startswith("---\nbase_model: org/base\n---\n# adapter, with queries and keys of")
    (record,) = json.loads((out / "morph.json").read_text())["restored"]
    assert [r["rule"] for r in record["rules"]] == ["the delta is dropped (zeros)"] * 2
    assert (kit.digests(base), kit.digests(post)) == before


def test_layers_and_parts_are_chosen_as_in_a_model(adapter: tuple[Path, Path], tmp_path: Path):
    base, post = adapter
    out = kit.restored(base, post, tmp_path / "out", layers="1", include=("q", "o"))
    a, made = kit.read(post), kit.read(out)
    changed = {name for name in a if a[name] != made[name]}
    assert changed == {f"{AT}q_proj.lora_B.weight", f"{AT}o_proj.lora_B.weight"}


def test_row_maps_are_those_of_the_base(tmp_path: Path):
    """Qwen3-Next's gates share q_proj; Phi-3's values share the fused projection."""
    (tmp_path / "gates").mkdir()
    base, post = written(tmp_path / "gates", "qwen3_next", ("q_proj", "k_proj"))
    made = kit.read(kit.restored(base, post, tmp_path / "out"))
    config, name = tiny.config("qwen3_next"), f"{AT}q_proj.lora_B.weight"
    dim = config["head_dim"]
    for head in range(config["num_attention_heads"]):
        at = 2 * head * dim
        assert not any(made[name].rows(at, at + dim))
        assert made[name].rows(at + dim, at + 2 * dim) == kit.read(post)[name].rows(
            at + dim, at + 2 * dim
        )
    (tmp_path / "fused").mkdir()
    base, post = written(tmp_path / "fused", "phi3", ("qkv_proj",))
    made = kit.read(kit.restored(base, post, tmp_path / "out-fused"))
    config, name = tiny.config("phi3"), f"{AT}qkv_proj.lora_B.weight"
    dim = config["hidden_size"] // config["num_attention_heads"]
    keys = (config["num_attention_heads"] + config["num_key_value_heads"]) * dim
    assert not any(made[name].rows(0, keys))
    end = made[name].shape[0]
    assert made[name].rows(keys, end) == kit.read(post)[name].rows(keys, end)


def test_copies_of_whole_modules_come_from_the_base(adapter: tuple[Path, Path], tmp_path: Path):
    base, post = adapter
    weights = kit.read(base)
    copies = {}
    for part in ("q", "v"):
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        copies[f"{AT}{part}_proj.weight"] = kit.tuned({"x": weights[name]})["x"]
        bias = weights[name.replace("weight", "bias")]
        copies[f"{AT}{part}_proj.base_layer.bias"] = kit.tuned({"x": bias})["x"]
    change(post, lambda t: t.update(copies))
    change(post, lambda t: [t.pop(n) for n in list(t) if n.startswith(AT) and "lora" in n])
    made = kit.read(kit.restored(base, post, tmp_path / "out"))
    name = "model.layers.1.self_attn.q_proj"
    assert made[f"{AT}q_proj.weight"].data == weights[f"{name}.weight"].data
    assert made[f"{AT}q_proj.base_layer.bias"].data == weights[f"{name}.bias"].data
    for key in ("v_proj.weight", "v_proj.base_layer.bias"):
        assert made[f"{AT}{key}"] == copies[f"{AT}{key}"]

    def widen(tensors: dict[str, Any]) -> None:
        for key in copies:
            data = tensors[key].numbers.astype("<f4").tobytes()
            tensors[key] = tensors[key]._replace(dtype="F32", data=data)

    change(post, widen)
    with pytest.raises(MismatchError, match="--allow widening"):
        restore.plan(base, post)
    made = kit.read(kit.restored(base, post, tmp_path / "wide", allow=("widening",)))
    want = weights[f"{name}.weight"].numbers
    assert (made[f"{AT}q_proj.weight"].numbers == want).all()


def refuse(base: Path, post: Path, kind: type[MorphError], *words: str, **options: Any) -> None:
    with pytest.raises(kind) as found:
        restore.plan(base, post, restore.Options(**options))
    for word in words:
        assert word in str(found.value), str(found.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, ("DoRA", "merge_and_unload")),
        ({"peft_type": "ADALORA"}, ("peft_type is 'ADALORA'", "merge")),
        ({"peft_type": None}, ("peft_type is None",)),
        ({"init_lora_weights": "pissa"}, ("changes the base's weights",)),
        ({"init_lora_weights": "olora"}, ("'olora'",)),
        ({"layer_replication": [[0, 2], [1, 3]]}, ("repeats layers",)),
        ({"use_qalora": True}, ("QA-LoRA",)),
    ],
)
def test_other_adapters_are_refused(
    config: dict[str, Any], words: tuple[str, ...], adapter: tuple[Path, Path]
):
    configure(adapter[1], **config)
    refuse(*adapter, UnsupportedModel, *words)


def test_adapters_that_do_not_fit_are_refused(adapter: tuple[Path, Path], tmp_path: Path):
    base, post = adapter
    (tmp_path / "other").mkdir()
    other, _ = kit.pair(tmp_path / "other", "qwen3")
    refuse(other, post, MismatchError, "does not fit", "k_proj.lora_B")
    change(post, lambda t: t.update({f"{AT}r_proj.lora_B.weight": t[f"{AT}q_proj.lora_B.weight"]}))
    refuse(base, post, MismatchError, "r_proj", "has no module in PRE", "Did you mean")
    change(post, lambda t: t.pop(f"{AT}r_proj.lora_B.weight"))
    name = AT.replace(".1.", ".9.") + "q_proj.lora_A.weight"
    change(post, lambda t: t.update({name: t[f"{AT}q_proj.lora_A.weight"]}))
    refuse(base, post, MismatchError, "layers.9.", "has no module in PRE")
    change(post, lambda t: t.pop(name))
    odd = f"{AT}q_proj.lora_magnitude_vector"
    change(post, lambda t: t.update({odd: kit.Tensor("F32", (2,), bytes(8))}))
    refuse(base, post, UnsupportedModel, "lora_magnitude_vector", "not known")


def test_an_adapter_goes_second_and_is_restored_exactly(adapter: tuple[Path, Path]):
    base, post = adapter
    refuse(post, base, UsageError, "PRE", "is a LoRA adapter", "second")
    refuse(base, post, UsageError, "Merge it first", method="ridge", rho=1.0)
    refuse(base, post, UsageError, "Merge it first", method="interpolate", alpha=0.5)


def test_adapters_without_a_delta_of_q_and_k(adapter: tuple[Path, Path], tmp_path: Path):
    base, post = adapter
    out = kit.restored(base, post, tmp_path / "out")
    refuse(base, out, MismatchError, "are zero already", "--allow unchanged")
    again = kit.restored(base, out, tmp_path / "again", allow=("unchanged",))
    assert kit.data(again) == kit.data(out)
    change(post, lambda t: [t.pop(n) for n in list(t) if ".q_proj." in n or ".k_proj." in n])
    refuse(base, post, MismatchError, "holds nothing of the chosen layers' q,k,bias")


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ("org/another", "org/another"),
        ("/home/someone/models/another/", "another"),
        ("../models/org/another", "another"),
        ("C:\\models\\another", "another"),
    ],
)
def test_no_path_of_a_machine_is_recorded(
    named: str, shown: str, adapter: tuple[Path, Path], tmp_path: Path
):
    base, post = adapter
    configure(post, base_model_name_or_path=named)
    plan = restore.plan(base, post)
    assert f"the adapter names {shown} as its base; PRE was taken for it." in plan.notes
    restore.write(plan, tmp_path / "out", durable=False)
    told = (tmp_path / "out/morph.json").read_text() + (tmp_path / "out/README.md").read_text()
    assert f"names {shown} as" in told and str(tmp_path) not in told
    for path in ("someone", "models"):
        assert path not in told


def test_adapters_inside_the_folder_are_left_out_and_told(
    adapter: tuple[Path, Path], tmp_path: Path
):
    """PEFT saves further adapters of one model into folders inside the first one's."""
    base, post = adapter
    (post / "second").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (post / "second" / name).write_bytes((post / name).read_bytes())
    (post / "more").mkdir()
    (post / "more" / "notes.txt").write_text("kept")
    plan = restore.plan(base, post)
    assert any(note.endswith("restore each by itself: second.") for note in plan.notes)
    made = restore.write(plan, tmp_path / "out", durable=False)
    assert not (tmp_path / "out/second").exists() and (tmp_path / "out/more/notes.txt").exists()
    assert {"second/adapter_config.json", "second/README.md"} <= set(made.not_copied)
    assert kit.morph("verify", made.path, "--against", post, "--pre", base).code == 0
    assert kit.data(kit.restored(base, post / "second", tmp_path / "two")) == kit.data(made.path)


def test_an_adapter_beside_a_model_is_refused_on_both_sides(
    adapter: tuple[Path, Path], tmp_path: Path
):
    """transformers would load the adapter's base and the adapter, and not the model's weights."""
    base, post = adapter
    both = kit.copy_tuned(base, tmp_path / "both")
    kit.restored(base, both, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (both / name).write_bytes((post / name).read_bytes())
    for pair in ((base, both), (both, base)):
        refuse(*pair, CheckpointError, "holds a model and an adapter")


@pytest.mark.parametrize("model_type", ["nemotron_h", "phi3", "gpt_neox", "recurrent_gemma"])
def test_a_restored_adapter_passes_verify_whatever_its_modules_are_called(
    model_type: str, tmp_path: Path
):
    """Without the base's config nothing says that `mixer.q_proj` is softmax attention."""
    modules = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
    base, post = written(tmp_path, model_type, modules)
    kit.restored(base, post, tmp_path / "out", layers="all")
    for more in ((), ("--pre", base)):
        found = kit.morph("verify", tmp_path / "out", "--against", post, *more)
        assert found.code == 0, found.err


def test_the_command_says_what_an_adapter_is(adapter: tuple[Path, Path], tmp_path: Path):
    base, post = adapter
    found = kit.morph("restore", base, post, tmp_path / "out")
    assert found.code == 0, found.err
    assert "a LoRA adapter" in found.out and "the delta is dropped" in found.out
    assert "all other weights are the base model's" in found.err
    configure(post, base_model_name_or_path="org/another")
    found = kit.morph("restore", base, post, tmp_path / "no", "--dry-run", "--json")
    assert any("org/another" in note for note in json.loads(found.out)["notes"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT doubts its own biases
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"], "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True, "use_rslora": True}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj"]}),
        ("qwen3", {"target_modules": ["v_proj", "k_proj"], "modules_to_save": ["q_proj"]}),
        ("qwen3_next", {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
    ],
)
def test_dropping_then_merging_is_merging_then_restoring(
    model_type: str, settings: dict[str, Any], tmp_path: Path
):
    """With PEFT itself: train (random factors), save, restore, load, merge."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    base = tiny.tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_B" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    include = ("q", "k", "bias")
    out = kit.restored(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", include=include)

    def merged(adapter: Path, name: str) -> Path:
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        made = peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload()
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    first = kit.data(merged(out, "dropped"))
    whole = merged(tmp_path / "adapter", "merged")
    then = kit.data(kit.restored(tmp_path / "base", whole, tmp_path / "then", include=include))
    assert first == then
    assert then == kit.expected(tmp_path / "base", whole)
    assert then != kit.data(whole)
