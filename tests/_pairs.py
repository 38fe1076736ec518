"""Small checkpoints before and after a training, written by hand, for `diff` and `verify`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, HIDDEN, HEADS, GROUPS, DIM = 8, 24, 4, 2, 6
Tensors = dict[str, tuple[str, np.ndarray]]


def bf16(values: np.ndarray) -> np.ndarray:
    """Return float32 as the bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def widened(dtype: str, stored: np.ndarray) -> np.ndarray:
    """Return stored numbers as float64: the oracle's reader."""
    if dtype == "BF16":
        return (stored.astype("<u4") << 16).view("<f4").astype(np.float64)
    return stored.astype(np.float64)


def save(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None, shards: int = 1) -> Path:
    """Write safetensors by hand, tensors dealt out over shards."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names, placed = list(tensors), {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        header, at, data = {}, 0, []
        for name in names[n::shards]:
            dtype, values = tensors[name]
            raw = np.ascontiguousarray(values).tobytes()
            header[name] = {"dtype": dtype, "shape": list(values.shape)}
            header[name]["data_offsets"] = [at, at + len(raw)]
            at += len(raw)
            data.append(raw)
            placed[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    if shards > 1:
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CONFIG = {
    "model_type": "qwen3_next",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "hidden_size": HIDDEN,
    "vocab_size": 32,
    "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(LAYERS)],
}
FULL = (3, 7)


def hybrid() -> Tensors:
    """A Qwen3-Next-like hybrid: layers 3 and 7 are full, and q_proj holds queries and gates."""
    draw = np.random.default_rng(1)

    def made(*shape: int) -> tuple[str, np.ndarray]:
        return "BF16", bf16(draw.standard_normal(shape).astype(np.float32))

    found: Tensors = {
        "model.embed_tokens.weight": made(32, HIDDEN),
        "lm_head.weight": made(32, HIDDEN),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        if i in FULL:
            found[f"{at}self_attn.q_proj.weight"] = made(2 * HEADS * DIM, HIDDEN)
            found[f"{at}self_attn.k_proj.weight"] = made(GROUPS * DIM, HIDDEN)
            found[f"{at}self_attn.v_proj.weight"] = made(GROUPS * DIM, HIDDEN)
            found[f"{at}self_attn.o_proj.weight"] = made(HIDDEN, HEADS * DIM)
        else:
            found[f"{at}linear_attn.in_proj_qkvz.weight"] = made(30, HIDDEN)
            found[f"{at}linear_attn.A_log"] = "F32", draw.standard_normal(4).astype("<f4")
        found[f"{at}mlp.up_proj.weight"] = made(40, HIDDEN)
        found[f"{at}input_layernorm.weight"] = made(HIDDEN)
    return found


def moved(tensors: Tensors, *wanted: str, by: float = 0.01) -> Tensors:
    """Return copies in which the tensors whose names hold any of `wanted` were trained a little."""
    draw, found = np.random.default_rng(2), dict(tensors)
    for name, (dtype, stored) in tensors.items():
        if any(part in name for part in wanted):
            values = widened(dtype, stored)
            values = values + by * draw.standard_normal(values.shape)
            found[name] = dtype, bf16(values) if dtype == "BF16" else values.astype(stored.dtype)
    return found
