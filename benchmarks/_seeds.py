"""Good files to start from: one small folder or text of every kind that morph reads."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from morph import exchange, plan, registry, strict
from morph.plan import Geometry, Scores

Entry = tuple[str, tuple[int, ...], int]  # dtype, shape, bytes
GEOMETRY = Geometry(
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    v_head_dim=2,
    hidden_size=8,
    windows=(None, None),
)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "vocab_size": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of LLAMA."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (6, 8)}
    for i in range(2):
        attention, layer = f"model.layers.{i}.self_attn", f"model.layers.{i}"
        found |= {f"{attention}.{n}_proj.weight": (8, 8) for n in "qo"}
        found |= {f"{attention}.{n}_proj.weight": (4, 8) for n in "kv"}
        found |= {f"{layer}.mlp.{n}_proj.weight": (16, 8) for n in ("gate", "up")}
        found |= {f"{layer}.mlp.down_proj.weight": (8, 16)}
        found |= {f"{layer}.input_layernorm.weight": (8,)}
        found |= {f"{layer}.post_attention_layernorm.weight": (8,)}
    return found | {"model.norm.weight": (8,), "lm_head.weight": (6, 8)}


def laid_out(entries: dict[str, Entry], first: dict[str, Any] | None = None) -> bytes:
    """Return the header of these tensors, one after the other."""
    table, at = dict(first or {}), 0
    for name, (dtype, shape, size) in entries.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return json.dumps(table).encode()


def floats(shapes: dict[str, tuple[int, ...]]) -> dict[str, Entry]:
    """Return float32 entries of these shapes."""
    found = {}
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        found[name] = ("F32", shape, size)
    return found


def data_for(entries: dict[str, Entry]) -> bytes:
    """Return bytes for these tensors that differ everywhere and hold no NaN."""
    return bytes(i * 7 % 113 for i in range(sum(size for _, _, size in entries.values())))


def shards() -> list[tuple[bytes, bytes]]:
    """Return (header, data): a model, every dtype, odd names and empty tensors, no tensor."""
    model = floats(llama_shapes())
    kinds: dict[str, Entry] = {
        "a.bf16": ("BF16", (2, 4), 16),
        "a.f16": ("F16", (8,), 16),
        "a.i64": ("I64", (2,), 16),
        "a.u8": ("U8", (4, 4), 16),
        "a.bool": ("BOOL", (16,), 16),
        "a.f4": ("F4", (4, 8), 16),
        "a.f6": ("F6_E2M3", (4, 4), 12),
        "a.f8": ("F8_E4M3", (4,), 4),
        "a.c64": ("C64", (2,), 16),
        "a.scalar": ("F64", (), 8),
        "a.empty": ("F32", (0, 3), 0),
    }
    odd: dict[str, Entry] = {
        "é": ("F32", (1,), 4),
        "a b": ("F32", (1, 1, 1), 4),
        "0": ("U8", (), 1),
    }
    told = {"__metadata__": {"format": "pt", "é": "\u202e"}}
    return [
        (laid_out(model, {"__metadata__": {"format": "pt"}}), data_for(model)),
        (laid_out(kinds), data_for(kinds)),
        (laid_out(odd, told), data_for(odd)),
        (b"{}", b""),
    ]


def write_model(folder: Path, sharded: bool = False, tuned: bool = False) -> Path:
    """Write the folder of LLAMA, as one file or as two and an index; `tuned` moves its numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    entries = floats(llama_shapes())
    names = list(entries)
    parts = [names[:9], names[9:]] if sharded else [names]
    files = SHARDS if sharded else ("model.safetensors",)
    for file, part in zip(files, parts):
        mine = {n: entries[n] for n in part}
        header = laid_out(mine)
        data = bytearray(data_for(mine))
        for at in range(1, len(data) if tuned else 0, 4):
            data[at] ^= 64
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + data)
    if sharded:
        weight_map = {n: file for file, part in zip(files, parts) for n in part}
        told = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(told))
    return folder


def write_adapter(folder: Path) -> Path:
    """Write a LoRA adapter of LLAMA."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(adapters()[0])
    entries: dict[str, Entry] = {}
    for name, rows in (("q_proj", 8), ("k_proj", 4), ("o_proj", 8)):
        for i in range(2):
            module = f"base_model.model.model.layers.{i}.self_attn.{name}"
            entries[f"{module}.lora_A.weight"] = ("F32", (2, 8), 64)
            entries[f"{module}.lora_B.weight"] = ("F32", (rows, 2), rows * 8)
    header = laid_out(entries)
    data = len(header).to_bytes(8, "little") + header + data_for(entries)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def adapters() -> list[bytes]:
    """Return configs of LoRA adapters as PEFT writes them, and of a kind that is refused."""
    lora = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/model",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_dora": False,
        "layer_replication": None,
        "rank_pattern": {},
    }
    return [json.dumps(c).encode() for c in (lora, lora, lora | {"use_dora": True})]


def trap(folder: Path) -> None:
    """Put what an index must not lead to beside and into a folder of two shards."""
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes((folder / SHARDS[0]).read_bytes())
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "inner.safetensors").symlink_to(SHARDS[0])
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")


def indexes() -> list[bytes]:
    """Return indexes of the two shards: a right one, and some that lead astray."""
    names = list(llama_shapes())
    good = dict.fromkeys(names[:9], SHARDS[0]) | dict.fromkeys(names[9:], SHARDS[1])
    wrong = ["../outside.safetensors", "link.safetensors", "pipe.safetensors", "inner.safetensors"]
    wrong += [
        "folder.safetensors",
        "/tmp/outside.safetensors",
        "a/../../outside.safetensors",
        "loop.safetensors",
    ]
    wrong += ["..\\outside.safetensors", "pytorch_model.bin"]
    found = [json.dumps({"metadata": {"total_size": 0}, "weight_map": good}, indent=2)] * 10
    for name in wrong:
        moved = {k: name if v == SHARDS[0] else v for k, v in good.items()}
        found.append(json.dumps({"weight_map": moved}))
    return [text.encode() for text in found]


def configs() -> list[bytes]:
    """Return configs that fit the weights of LLAMA, of several kinds, and some that nearly do."""
    hybrid = plan.uniform_plan("llama", GEOMETRY, [1], "sliding", {"window": 4}, None)
    types = ["full_attention", "sliding_attention"]
    qwen = {"model_type": "qwen3", "head_dim": 2, "layer_types": types, "sliding_window": 4}
    code = {"auto_map": {"AutoModel": "x.y"}, "_attn_implementation": "org/repo"}
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    linear = {"layer_types": ["full_attention", "linear_attention"], "model_type": "qwen3_next"}
    found = [
        LLAMA,
        LLAMA | qwen,
        LLAMA | {"rope_parameters": rope, "head_dim": None, "max_position_embeddings": 64},
        LLAMA | {"model_type": "morph_llama", "morph": {"plan": strict.plain(hybrid)}},
        LLAMA | {"text_config": dict(LLAMA) | code, "trust_remote_code": True} | code,
        {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}},
        LLAMA | linear,
        LLAMA | {"quantization_config": {"quant_method": "fp8"}},
    ]
    return [json.dumps(config, indent=1).encode() for config in found]


def manifest(folder: Path, name: str) -> bytes:
    """Return the manifest that fits a folder, and give it `name`."""
    files = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != name
    }
    return json.dumps({"format": 1, "morph": "0", "files": files}, indent=1).encode()


def recipes() -> list[bytes]:
    """Return the recipes that ship, and one as JSON, which is YAML too."""
    texts = [registry.path("recipes", n).read_bytes() for n in registry.names("recipes")]
    stage = {"loss": "align", "tokens": "64K", "lr": 1e-3}
    data = {"model": "m", "select": {"selector": "nll", "keep": [0, [1, 2]]}, "distill": [stage]}
    return [*texts, json.dumps(data).encode(), b"model: m\nseed: 1\n"]


def plans() -> list[bytes]:
    """Return plans of whole layers and of heads."""
    layers = plan.uniform_plan("llama", GEOMETRY, [0], "sliding", {"window": 4}, "0" * 64)
    heads = strict.plain(layers)
    whole = heads["layers"][1]["groups"][0]
    split = [whole | {"heads": [0, 1]}, whole | {"heads": [2, 3], "mixer": "full", "options": {}}]
    heads["layers"][1]["groups"] = split
    both = [plan.dumps(layers), plan.dumps(plan.full_plan("llama", GEOMETRY)), json.dumps(heads)]
    return [text.encode() for text in both]


def scores() -> list[bytes]:
    """Return scores of every granularity, with pairs, and the files of other tools."""

    def own(granularity: Any, width: int, **more: Any) -> Scores:
        rows = tuple(tuple(0.1 * i + j for j in range(width)) for i in range(2))
        return Scores(
            selector="nll",
            model_type="llama",
            granularity=granularity,
            values=rows,
            unit="nats",
            **more,
        )

    pairs = ((0.0, 0.5), (0.5, 0.0))
    layers, heads = own("layer", 1, pairs=pairs), own("head", 4)
    listed = own("layer", 1, provenance={"window": 4})
    texts = [plan.dumps(layers), plan.dumps(heads), plan.dumps(own("kv_head", 2))]
    texts += [exchange.dumps(own("kv_head", 2), "duo_attention")]
    texts += [exchange.dumps(heads, "retrieval_head")]
    texts += [exchange.dumps(listed, "swaa", keep=[1])]
    texts += [exchange.dumps(layers, "keep_full_attention_layers", keep=[0])]
    return [text.encode() for text in texts]
