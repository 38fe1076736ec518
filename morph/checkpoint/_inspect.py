"""What a checkpoint is, told from its headers: layers, heads, bytes, cache, health. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import prod
from typing import Any

from morph import registry, strict
from morph.checkpoint._folder import LAYER, disagreements, known_family, text_config
from morph.checkpoint._read import Checkpoint
from morph.errors import MorphError, PlanError
from morph.plan import Geometry, Plan, full_plan

LENGTHS = {"1K": 1024, "32K": 32768, "128K": 131072}
_ROLES = (
    ("norm", re.compile(r"(^|\.|_)(layer)?norm|(^|\.)ln_|layernorm")),
    ("attention", re.compile(r"(^|\.)(self_attn|attn|attention|linear_attn|mamba|mixer)\.")),
    ("mlp", re.compile(r"(^|\.)(mlp|feed_forward|ffn|block_sparse_moe|shared_mlp|experts)\.")),
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def inspect(path: str | os.PathLike[str], *, health: bool = False) -> dict[str, Any]:
    """Return a JSON-ready description of a checkpoint folder.

    `problems` says where config and tensors disagree. `health=True` reads every weight once and
    adds the names of tensors that hold NaN or infinity, and what tied embeddings contradict.
    Raises CheckpointError and UnsupportedModel as `Checkpoint.open` does.
    """
    source = Checkpoint.open(path, strict=False)
    text = text_config(source.config)
    model_type = str(source.config["model_type"])
    family = known_family(model_type)
    problems = disagreements(source.config, source.tensors)
    found: dict[str, Any] = {
        "path": str(source.path),
        "model_type": model_type,
        "family": family,
        "num_hidden_layers": text.get("num_hidden_layers"),
        "num_attention_heads": text.get("num_attention_heads"),
        "num_key_value_heads": text.get("num_key_value_heads") or text.get("num_attention_heads"),
        "head_dim": text.get("head_dim"),
        "hidden_size": text.get("hidden_size"),
        "dtypes": source.dtypes,
        "num_tensors": len(source.tensors),
        "num_parameters": sum(prod(i.shape) for i in source.tensors.values()),
        "bytes": source.nbytes,
        "shards": {s: source.headers[s].identity[0] for s in source.shards},
        "tie_word_embeddings": source.config.get("tie_word_embeddings"),  # None: not said
        "lm_head_stored": any(n.endswith("lm_head.weight") for n in source.tensors),
        "layers": _roles(source),
        "hybrid": None,
        "cache_bytes": None,
        "other_files": list(source.other_files),
        "ignored_files": list(source.ignored_files),
        "dropped_keys": list(source.dropped_keys),
        "notes": list(source.notes),
        "problems": problems,
        "nonfinite": None,
        "tie_conflict": None,
    }
    if not problems:
        found |= _attention(source, family, problems)
    if health:
        found |= {"nonfinite": source.nonfinite(), "tie_conflict": source.tie_conflict()}
    return found


def _roles(source: Checkpoint) -> list[dict[str, int]]:
    """Bytes per role and layer, in order of layers."""
    layers: dict[int, dict[str, int]] = {}
    for name, info in source.tensors.items():
        match = LAYER.match(name)
        if not match:
            continue
        rest = name[match.end() :]
        role = next((r for r, pattern in _ROLES if pattern.search(rest)), "other")
        row = layers.setdefault(int(match[1]), {"attention": 0, "mlp": 0, "norm": 0, "other": 0})
        row[role] += info.nbytes
    return [layers[i] for i in sorted(layers)]


def _attention(source: Checkpoint, family: str | None, problems: list[str]) -> dict[str, Any]:
    """Geometry, pattern and cache bytes: from a stored plan, the family, or the config's words."""
    text = text_config(source.config)
    try:
        plan, kind = _plan(source.config, text, family)
        if plan is None:
            return {"hybrid": {"kind": kind, "layer_types": list(text["layer_types"])}}
        dtype = _DTYPES.get(source.main_dtype, "bfloat16")
        found: dict[str, Any] = {
            "head_dim": plan.geometry.head_dim,
            "cache_bytes": {k: plan.cache_bytes(n, dtype) for k, n in LENGTHS.items()},
        }
        if kind != "full":
            found["hybrid"] = {
                "kind": kind,
                "pattern": plan.pattern,
                "mixers": list(plan.mixers),
                "layer_types": list(plan.layer_types),
            }
        return found
    except (MorphError, KeyError, TypeError, ValueError) as error:
        problems.append(f"config.json: the attention layers are not understood ({error}).")
        return {}


def _plan(
    config: Mapping[str, Any], text: Mapping[str, Any], family: str | None
) -> tuple[Plan | None, str]:
    """Return the plan and `morph`, `stock` or `full`; no plan where layers keep other state."""
    stored = config.get("morph")
    if isinstance(stored, Mapping) and "plan" in stored:
        return strict.build(Plan, stored["plan"], "config.morph.plan", PlanError), "morph"
    types = text.get("layer_types")
    plain = {"full_attention", "sliding_attention"}
    if isinstance(types, list) and set(map(str, types)) - plain:
        return None, "stock"
    if family is not None:
        geometry = registry.load("families", family).FAMILY.geometry(text)
    else:
        geometry = _geometry(text)
    kind = "stock" if any(w is not None for w in geometry.windows) else "full"
    return full_plan(str(config["model_type"]), geometry), kind


def _geometry(text: Mapping[str, Any]) -> Geometry:
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    types = text.get("layer_types") or ["full_attention"] * layers
    window = text.get("sliding_window")
    return Geometry(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        v_head_dim=text.get("v_head_dim") or head_dim,
        hidden_size=text["hidden_size"],
        windows=tuple(window if t == "sliding_attention" else None for t in types),
    )
