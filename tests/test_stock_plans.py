"""Which plans find a stock target, which are refused with a reason, and what the config says."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import AutoConfig

from morph import registry
from morph.errors import CheckpointError
from morph.families import _stock
from morph.plan import HeadGroup, LayerPlan, Plan

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 8
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def family(name):
    return registry.load("families", name).FAMILY


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def sliding(name, raw, layers, window=WINDOW, **options):
    """The plan that slides over `layers` and leaves the others as they are."""
    shape = family(name).geometry(raw)
    heads = tuple(range(shape.num_attention_heads))
    kept = LayerPlan(groups=(HeadGroup(mixer="full", heads=heads),))
    group = HeadGroup(mixer="sliding", heads=heads, options={"window": window, **options})
    swapped = LayerPlan(groups=(group,))
    return Plan(
        model_type=name,
        geometry=shape,
        layers=tuple(swapped if i in layers else kept for i in range(shape.num_hidden_layers)),
    )


def test_a_native_vllm_class_that_would_ignore_the_windows_is_made_to_refuse():
    for name in ("qwen2", "qwen3"):
        raw = family(name).tiny_config
        plan = sliding(name, raw, [1, 3])
        target, _ = _stock.pick(family(name), raw, plan)
        config = target.config(raw, plan)
        assert config["use_sliding_window"] is True
        assert config["max_window_layers"] == 1 < config["num_hidden_layers"]
        assert "--model-impl transformers" in target.serve


def heads_mixed(raw, name):
    plan = sliding(name, raw, [1])
    heads = plan.layers[1].groups[0].heads
    mixed = LayerPlan(
        groups=(
            HeadGroup(mixer="full", heads=heads[:2]),
            HeadGroup(mixer="sliding", heads=heads[2:], options={"window": WINDOW}),
        )
    )
    return dataclasses.replace(plan, layers=(plan.layers[0], mixed, *plan.layers[2:]))


def two_windows(raw, name):
    plan, other = sliding(name, raw, [1]), sliding(name, raw, [2], 16)
    return dataclasses.replace(plan, layers=(*plan.layers[:2], *other.layers[2:]))


def other_mixer(raw, name):
    plan = sliding(name, raw, [1])
    group = HeadGroup(mixer="decay", heads=plan.layers[1].groups[0].heads)
    layers = (plan.layers[0], LayerPlan(groups=(group,)), *plan.layers[2:])
    return dataclasses.replace(plan, layers=layers)


REFUSED = {
    "heads": ("llama", {}, heads_mixed, "layer 1 mixes heads"),
    "windows": ("llama", {}, two_windows, "layer 1 has a window of 8 tokens and layer 2 one of 16"),
    "mixer": ("llama", {}, other_mixer, "layer 1 is 'decay'"),
    "sink-tokens": (
        "llama",
        {},
        lambda raw, n: sliding(n, raw, [2], num_sinks=4),
        "layer 2 slides with num_sinks=4",
    ),
    "unknown-option": (
        "qwen3",
        {},
        lambda raw, n: sliding(n, raw, [2], stride=2),
        "layer 2 slides with stride=2",
    ),
    "learned-sinks": (
        "qwen3",
        {},
        lambda raw, n: sliding(n, raw, [2], sink_bias=True),
        "layer 2 has learned sinks",
    ),
    "own-window": (
        "gemma2",
        {},
        lambda raw, n: sliding(n, raw, [1], 5),
        "layer 0 has a window of 8 tokens and layer 1 one of 5",
    ),
    "own-window-changed": (
        "gemma2",
        {},
        lambda raw, n: sliding(n, raw, [0], 5),
        "layer 0 has a window of 5 tokens and layer 2 one of 8",
    ),
    "two-ropes": ("gemma3_text", {}, lambda raw, n: sliding(n, raw, [2]), "rotate with base"),
    "two-scalings": (
        "olmo3",
        {"rope_scaling": YARN},
        lambda raw, n: sliding(n, raw, [2]),
        "otherwise scaled",
    ),
    "longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        lambda raw, n: sliding(n, raw, [2]),
        "'longrope'",
    ),
    "partial-rotary": (
        "phi3",
        {"partial_rotary_factor": 0.5},
        lambda raw, n: sliding(n, raw, [2]),
        "share of 0.5",
    ),
    "old-gelu": ("gemma", {"hidden_act": "gelu"}, lambda raw, n: sliding(n, raw, [2]), "'gelu'"),
    "per-layer-config": (
        "llama",
        {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
        lambda raw, n: sliding(n, raw, [2]),
        "per_layer_config",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plans_without_a_stock_home_are_refused_with_a_sentence(name):
    model_type, changes, make, words = REFUSED[name]
    raw = {**family(model_type).tiny_config, **changes}
    target, reasons = _stock.pick(family(model_type), raw, make(raw, model_type))
    assert target is None
    assert len(reasons) == len(family(model_type).stock)
    assert any(words in reason for reason in reasons), reasons
    assert all(reason.endswith(".") and ": " in reason for reason in reasons)


def test_a_plan_may_narrow_every_window_of_the_source_alike():
    raw = family("gemma2").tiny_config
    plan = sliding("gemma2", raw, [0, 1, 2], 5)
    config = _stock.pick(family("gemma2"), raw, plan)[0].config(raw, plan)
    assert config["sliding_window"] == 5
    assert config["layer_types"] == [SLIDING, SLIDING, SLIDING, FULL]


def test_a_wider_window_than_the_source_has_is_the_source_s_own():
    raw = family("gemma2").tiny_config
    plan = sliding("gemma2", raw, [0], 100)
    assert _stock.pick(family("gemma2"), raw, plan)[0].config(raw, plan)["sliding_window"] == 8


def test_pick_says_why_better_targets_were_passed_over():
    raw = {**family("llama").tiny_config, "mlp_bias": True}
    target, reasons = _stock.pick(family("llama"), raw, sliding("llama", raw, [1]))
    assert target.model_type == "smollm3"
    assert reasons == ["ministral: the source has biases (mlp_bias), which it has no place for."]


def test_stray_fields_of_the_target_do_not_slip_through():
    stray = {
        "layer_types": [SLIDING] * 4,
        "sliding_window": 3,
        "no_rope_layers": [0] * 4,
        "attention_multiplier": 9.0,
        "layer_rope_theta": [0, 0, 0, 0],
        "auto_map": {"AutoModelForCausalLM": "evil.py"},
    }
    raw = {**family("llama").tiny_config, **stray, "attention_bias": True}
    plan = sliding("llama", raw, [1])
    config = _stock.pick(family("llama"), raw, plan)[0].config(raw, plan)
    assert config["layer_types"] == [FULL, SLIDING, FULL, FULL]
    assert (config["sliding_window"], config["no_rope_layers"]) == (WINDOW, [1] * 4)
    assert "auto_map" not in config
    plan = sliding("llama", raw, [1], sink_bias=True)
    config = _stock.pick(family("llama"), raw, plan)[0].config(raw, plan)
    assert config["attention_multiplier"] == 10**-0.5
    assert config["layer_rope_theta"] == [5000.0] * 4


# Config files as their publishers spell them: older names, fields left out, remote code beside
PUBLISHED = {
    "llama-3.1": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
            "rope_theta": 500000.0,
            "eos_token_id": [128001, 128008, 128009],
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0",
        },
        "ministral",
        {"rms_norm_eps": 1e-05, "head_dim": 128, "num_key_value_heads": 8},
    ),
    "qwen2.5": (
        {
            "model_type": "qwen2",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_window_layers": 28,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        "qwen2",
        {"tie_word_embeddings": True, "max_position_embeddings": 32768},
    ),
    "phi-3-mini-128k": (
        {
            "model_type": "phi3",
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        },
        None,
        {},
    ),
    "gemma-2": (
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "head_dim": 256,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 10000.0,
        },
        "gemma2",
        {"sliding_window": 4096, "head_dim": 256},
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "head_dim": 256,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        None,
        {},
    ),
    "mistral-v0.3": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            "vocab_size": 32768,
        },
        "ministral",
        {"num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False},
    ),
    "smollm3": (
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "layer_types": [FULL] * 36,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [int(bool((i + 1) % 4)) for i in range(36)],
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        "smollm3",
        {"no_rope_layers": [int(bool((i + 1) % 4)) for i in range(36)], "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_find_their_target(name, tmp_path):
    raw, expected, fields = PUBLISHED[name]
    model_type = raw["model_type"]
    part = family(model_type)
    free = part.geometry(raw).candidates
    own = next((w for w in part.geometry(raw).windows if w), 1024)
    plan = sliding(model_type, raw, free[1:3], own)
    target, reasons = _stock.pick(part, raw, plan)
    if expected is None:
        assert target is None and reasons
        return
    assert target.model_type == expected
    (tmp_path / "config.json").write_text(json.dumps(target.config(raw, plan)))
    written = AutoConfig.from_pretrained(tmp_path)
    for key, value in fields.items():
        assert getattr(written, key) == value, key
    source = part.part(part.config_class)(**_copy(raw))
    rope = {k: v for k, v in source.rope_parameters.items() if k != "type"}
    assert {k: v for k, v in written.rope_parameters.items() if k != "type"} == rope
    assert written.dtype == source.dtype
    assert written.layer_types.count(SLIDING) == 2 + sum(
        w is not None for w in plan.geometry.windows
    )


def test_rotary_settings_that_are_no_mapping_are_named():
    raw = {**family("llama").tiny_config, "rope_scaling": 3}
    plan = sliding("llama", raw, [1])
    with pytest.raises(CheckpointError, match="rope_scaling is 3"):
        _stock.pick(family("llama"), raw, plan)[0].config(raw, plan)
