"""Tiny checkpoint folders of every architecture that has a layout, made without torch.

Configs and tensor shapes lie in data/tiny_layouts.json, as transformers writes them to disk;
`PYTHONPATH=. python tests/_tiny_layouts.py` makes that file anew (this needs torch), and
test_layouts.py compares it with what transformers builds. Architectures that transformers does not
have are written down here.
"""

from __future__ import annotations

import json
import math
import random
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tiny_layouts.json"


def _decoder(mixers: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a small decoder with a `self_attn` of these tensors in each layer."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (67, 32)}
    for i, mixer in enumerate(mixers):
        layer = f"model.layers.{i}."
        for name in ("gate_proj", "up_proj"):
            found[f"{layer}mlp.{name}.weight"] = (24, 32)
        found[f"{layer}mlp.down_proj.weight"] = (32, 24)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = (32,)
        found |= {f"{layer}self_attn.{name}": shape for name, shape in mixer.items()}
    return {**found, "model.norm.weight": (32,)}


def _jet_nemotron() -> dict[str, Any]:
    """Jet-Nemotron as published: softmax like Qwen2, and JetBlocks of 2 heads of 8 and 12."""
    softmax = {"o_proj.weight": (32, 32)}
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        softmax |= {f"{name}_proj.weight": (rows, 32), f"{name}_proj.bias": (rows,)}
    jet = {
        "q_proj.weight": (16, 32),
        "k_proj.weight": (16, 32),
        "v_proj.weight": (24, 32),
        "g_proj.weight": (24, 32),
        "a_proj.weight": (2, 32),
        "b_proj.weight": (2, 32),
        "A_log": (2,),
        "dt_bias": (2,),
        "dynamic_conv1d.kernel_generator.w1.weight": (3, 32),
        "dynamic_conv1d.kernel_generator.w2.weight": (96, 3),
        "dynamic_conv1d.kernel_generator.w2.bias": (96,),
        "o_norm.weight": (12,),
        "o_proj.weight": (32, 24),
    }
    jet_config = {"num_heads": 2, "head_dim": 8, "expand_v": 1.5, "dconv_generator_reduction": 8}
    config = {
        "architectures": ["JetNemotronForCausalLM"],
        "model_type": "jet_nemotron",
        "efficient_attention_config": {"jet": jet_config, "swa": {"window_size": 4}},
        "layer_types": ["jet", "attn", "swa", "jet"],
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 67,
    }
    return {"config": config, "shapes": _decoder([jet, softmax, softmax, jet])}


def _hypenet() -> dict[str, Any]:
    """HypeNet as published: softmax like Qwen3 with a gate, and lightning attention."""
    softmax = {
        "q_proj.weight": (40, 32),
        "k_proj.weight": (20, 32),
        "v_proj.weight": (20, 32),
        "o_proj.weight": (32, 40),
        "o_gate.weight": (40, 32),
        "q_norm.weight": (10,),
        "k_norm.weight": (10,),
    }
    lightning = {name: shape for name, shape in softmax.items() if name != "o_gate.weight"}
    lightning |= {"z_proj.weight": (40, 32), "o_norm.weight": (40,)}
    config = {
        "architectures": ["HypeNetForCausalLM"],
        "model_type": "hypenet",
        "mixer_types": ["lightning-attn", "attn", "lightning-attn", "attn"],
        "attn_use_output_gate": True,
        "attn_use_rope": False,
        "head_dim": 10,
        "hidden_size": 32,
        "intermediate_size": 24,
        "lightning_head_dim": 10,
        "lightning_nh": 4,
        "lightning_nkv": 2,
        "lightning_use_output_gate": True,
        "lightning_use_output_norm": True,
        "lightning_use_qk_norm": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "vocab_size": 67,
    }
    return {"config": config, "shapes": _decoder([lightning, softmax, lightning, softmax])}


ELSEWHERE = {"hypenet": _hypenet(), "jet_nemotron": _jet_nemotron()}  # not in transformers
WRAPPED = {"qwen3_5": "qwen3_5_text"}  # a text model beside a vision tower
_KNOWN: dict[str, Any] = {**(json.loads(DATA.read_text()) if DATA.exists() else {}), **ELSEWHERE}
MODEL_TYPES = tuple(sorted(_KNOWN))


def config(model_type: str) -> dict[str, Any]:
    """Return the config.json of a tiny checkpoint."""
    return json.loads(json.dumps(_KNOWN[model_type]["config"]))


def shapes(model_type: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a tiny checkpoint, as named on disk, and their shapes."""
    return {name: tuple(shape) for name, shape in _KNOWN[model_type]["shapes"].items()}


def write(
    folder: Path, model_type: str, seed: int = 0, shards: int = 1, dtype: str = "BF16"
) -> Path:
    """Write a tiny checkpoint of random numbers between -1 and 1, and return its folder.

    Tensors go to shards round by round, in order of names; more than one shard gets an index.
    """
    return write_tensors(folder, config(model_type), shapes(model_type), seed, shards, dtype)


def write_tensors(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    seed: int = 0,
    shards: int = 1,
    dtype: str = "BF16",
) -> Path:
    """Write a folder with this config.json and random tensors of these shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    names, total = sorted(shapes), 0
    parts = [names[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, part in zip(files, parts):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = bytearray()
        for name in part:
            start = len(data)
            data += _numbers(f"{seed}:{name}", math.prod(shapes[name]), dtype)
            offsets = [start, len(data)]
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
        total += len(data)
    if shards > 1:
        places = {name: file for file, part in zip(files, parts) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _numbers(seed: str, count: int, dtype: str) -> bytes:
    """Return random numbers as the file stores them; those of BF16 are the upper halves of F32."""
    import numpy as np

    draw = np.random.default_rng(random.Random(seed).getrandbits(64))
    numbers = draw.uniform(-1, 1, count)
    if dtype == "BF16":
        return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return numbers.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def assert_covered(reading: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor is there and every row of it once; roles, kinds and layers are known words."""
    from morph.layouts import ROLES

    rows: dict[str, list[tuple[int, int]]] = {}
    for entry in reading.rows:
        assert entry.role in ROLES
        assert entry.kind in ("full", "sliding", "linear", "")
        assert entry.layer is None or 0 <= entry.layer < len(reading.kinds)
        assert not entry.bias or entry.role in ("q", "k", "v", "o", "gate")
        whole = ((0, (*shapes[entry.tensor], 1)[0]),)
        rows.setdefault(entry.tensor, []).extend(entry.ranges or whole)
    assert list(rows) == sorted(shapes)
    for tensor, ranges in rows.items():
        at = 0
        for start, stop in sorted(ranges):
            assert start == at < stop
            at = stop
        assert at == (*shapes[tensor], 1)[0]


def tiny_model(model_type: str) -> Any:
    """Return a random model of an architecture that transformers has."""
    import transformers

    from morph import layouts

    text = dict(layouts.layout(WRAPPED.get(model_type, model_type)).tiny_config)
    if model_type in WRAPPED:
        vision = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
        vision |= {"out_hidden_size": 32, "patch_size": 2, "num_position_embeddings": 4}
        text = {"text_config": text, "vision_config": vision}
    auto = transformers.AutoModelForImageTextToText if model_type in WRAPPED else None
    auto = auto or transformers.AutoModelForCausalLM
    made = transformers.AutoConfig.for_model(model_type, **text)
    return auto.from_config(made, attn_implementation="eager")


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found = json.loads(stream.read(length))
    return {k: tuple(v["shape"]) for k, v in found.items() if k != "__metadata__"}


def described(model: Any) -> dict[str, Any]:
    """Return the config.json and the shapes of what a model's `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
        stored = header(Path(folder) / "model.safetensors")
    written.pop("transformers_version", None)
    return {"config": written, "shapes": {k: list(v) for k, v in sorted(stored.items())}}


def main() -> None:
    """Write data/tiny_layouts.json: a line for each architecture."""
    from morph import layouts

    lines = [
        f"{json.dumps(name)}: {json.dumps(described(tiny_model(name)), sort_keys=True)}"
        for name in sorted({*layouts.model_types(), *WRAPPED} - set(ELSEWHERE))
    ]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
