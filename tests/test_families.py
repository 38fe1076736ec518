"""Every family file tells the truth about its transformers model; unknown models are refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from morph import registry
from morph.errors import CheckpointError, UnknownName, UnsupportedModel
from morph.families import _rope
from morph.families._lookup import family_of

FAMILIES = registry.names("families")
FULL, SLIDING = "full_attention", "sliding_attention"

# What a config.json may say, or leave out, about windows
VARIANTS = [
    *[(name, {}) for name in FAMILIES],
    ("mistral", {"sliding_window": 7}),
    ("phi3", {"sliding_window": 7}),
    ("ministral", {"layer_types": None}),
    ("ministral", {"layer_types": None, "sliding_window": 9}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {"sliding_window": 6, "max_window_layers": 1}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": [FULL, SLIDING, FULL, SLIDING],
        },
    ),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 6}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": None}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING, FULL]}),
    ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2}),
    ("gemma3_text", {"layer_types": None, "num_hidden_layers": 7}),
    ("olmo3", {"layer_types": None}),
]


def family(name):
    return registry.load("families", name).FAMILY


def build(name, **changes):
    """A tiny random model of the family, in eager attention, and the config.json it came from."""
    part = family(name)
    raw = {**part.tiny_config, **changes}
    torch.manual_seed(0)
    config = part.part(part.config_class)(**raw)
    model = part.part(part.causal_class)._from_config(config, attn_implementation="eager")
    return raw, model.eval()


def attention_modules(name, model):
    part = family(name)
    base = model.base_model
    for step in part.layers.split("."):
        base = getattr(base, step)
    return [getattr(layer, part.attention) for layer in base]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_named_after_its_model_type_and_its_classes_exist(name):
    part = family(name)
    assert part.model_type == name
    assert part.part(part.config_class).model_type == name
    for cls in (part.base_class, part.causal_class, part.attention_class):
        assert issubclass(part.part(cls), torch.nn.Module)
    assert callable(part.part("apply_rotary_pos_emb"))
    assert registry.summary("families", name)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_config_class(name):
    part = family(name)
    cls = part.part(part.config_class)
    base = {f.name for f in dataclasses.fields(cls.__mro__[1])}
    declared = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in base}
    older = {"rope_theta": cls.default_theta}
    if isinstance(cls.default_theta, dict):
        older = {
            "rope_theta": cls.default_theta["global"],
            "rope_local_base_freq": cls.default_theta["local"],
            "sliding_window_pattern": 6,
        }
    assert dict(part.defaults) == {**declared, **older}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_module_is_where_the_family_says(name):
    part = family(name)
    _, model = build(name)
    assert isinstance(model.base_model, part.part(part.base_class))
    assert 1000 < sum(p.numel() for p in model.parameters()) < 60_000
    modules = attention_modules(name, model)
    found = [m for m in model.modules() if isinstance(m, part.part(part.attention_class))]
    assert len(modules) == model.config.num_hidden_layers == 4
    assert all(a is b for a, b in zip(modules, found, strict=True))
    named = {part.o, *([part.qkv] if part.qkv else [part.q, part.k, part.v])}
    named |= {n for n in (part.q_norm, part.k_norm) if n}
    for module in modules:
        assert {n for n, _ in module.named_children()} == named
        assert isinstance(module.scaling, float)
        for attribute in (part.rotary_switch, part.softcap):
            assert attribute is None or hasattr(module, attribute)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("written", ["as-saved", "as-given"])
def test_geometry_is_that_of_the_modules(name, written):
    part = family(name)
    raw, model = build(name)
    shape = part.geometry(model.config.to_dict() if written == "as-saved" else raw)
    assert shape.num_key_value_heads < shape.num_attention_heads
    heads = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    modules = attention_modules(name, model)
    assert shape.num_hidden_layers == len(modules)
    for module in modules:
        assert module.head_dim == shape.head_dim == shape.v_head_dim
        if part.qkv:
            rows = {part.qkv: heads + 2 * kv}
        else:
            rows = {part.q: heads, part.k: kv, part.v: kv}
        for projection, count in rows.items():
            assert getattr(module, projection).weight.shape == (count, shape.hidden_size)
        assert getattr(module, part.o).weight.shape == (shape.hidden_size, heads)
        if part.q_norm:
            widths = (heads, kv) if part.norm_scope == "projection" else (shape.head_dim,) * 2
            assert getattr(module, part.q_norm).weight.shape == (widths[0],)
            assert getattr(module, part.k_norm).weight.shape == (widths[1],)


@pytest.mark.parametrize(
    "name, changes", VARIANTS, ids=[f"{n}-{'-'.join(c) or 'tiny'}" for n, c in VARIANTS]
)
def test_windows_are_those_the_model_runs_with(name, changes):
    raw, model = build(name, **changes)
    seen = {}

    def note(module, args, kwargs):
        mask = kwargs["attention_mask"][0, 0]
        seen[module.layer_idx] = int((mask[-1] == 0).sum()), int((mask == 0).sum())

    for module in attention_modules(name, model):
        module.register_forward_pre_hook(note, with_kwargs=True)
    tokens = 40
    with torch.no_grad():
        model(torch.arange(tokens)[None] % model.config.vocab_size)
    for config in (raw, model.config.to_dict()):
        windows = family(name).geometry(config).windows
        expected = {}
        for i, window in enumerate(windows):
            reach = min(window or tokens, tokens)
            expected[i] = reach, sum(min(t + 1, reach) for t in range(tokens))
        assert seen == expected


@pytest.mark.parametrize(
    "name, config",
    [
        ("llama", {"rope_theta": 3000.0}),
        ("llama", {}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 3000.0}),
        (
            "llama",
            {
                "rope_theta": 3000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
        ),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 3000.0}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 900.0}}),
        ("smollm3", {"rope_theta": None}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotary_settings_are_read_as_transformers_reads_them(name, config):
    part = family(name)
    raw = {**part.tiny_config, **config}
    if config.get("rope_theta", 0) is None or not config:
        del raw["rope_theta"]
    read = part.part(part.config_class)(**{k: _copy(v) for k, v in raw.items()}).rope_parameters
    read = {k: v for k, v in read.items() if k != "type"}
    ours = _rope.flat({**part.defaults, **raw})
    assert {"partial_rotary_factor": 1.0, **ours} == {"partial_rotary_factor": 1.0, **read}


@pytest.mark.parametrize(
    "name, config",
    [
        ("gemma3_text", {}),
        ("gemma3_text", {"rope_theta": 3000.0, "rope_local_base_freq": 200.0}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 7.0}}}),
        ("olmo3", {}),
        ("olmo3", {"rope_theta": 3000.0}),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}),
    ],
)
def test_rotary_settings_per_layer_type_are_read_as_transformers_reads_them(name, config):
    part = family(name)
    raw = {**part.tiny_config, **config}
    cls = part.part(part.config_class)
    assert registry.load("families", name).rope(raw) == cls(**_copy(raw)).rope_parameters


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_family_files_cost_no_torch():
    code = (
        "import sys\n"
        "from morph import registry\n"
        "from morph.families._lookup import family_of\n"
        "for name in registry.names('families'):\n"
        "    part = registry.load('families', name).FAMILY\n"
        "    part.geometry(part.tiny_config)\n"
        "    assert family_of({'model_type': name}) is part\n"
        "bad = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_lookup_by_model_type_by_converted_type_and_by_override(name):
    assert family_of({"model_type": name}) is family(name)
    assert family_of({"model_type": f"morph_{name}"}) is family(name)
    assert family_of({"model_type": name.replace("_", "-")}) is family(name)
    assert family_of({"model_type": "unheard-of"}, override=name) is family(name)


def test_an_unknown_model_type_is_refused_with_the_list_and_the_way_out():
    with pytest.raises(UnsupportedModel) as caught:
        family_of({"model_type": "qwen4"})
    message = str(caught.value)
    assert "'qwen4'" in message and "--family" in message and "Did you mean 'qwen" in message
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize(
    "config, error, words",
    [
        ({}, CheckpointError, "model_type"),
        ({"model_type": 3}, CheckpointError, "model_type"),
        ({"model_type": "evil\x1b[2J"}, UnsupportedModel, r"\\x1b"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            UnsupportedModel,
            "several parts",
        ),
    ],
)
def test_configs_without_a_family(config, error, words):
    with pytest.raises(error, match=words):
        family_of(config)


def test_an_override_that_does_not_exist_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'llama'"):
        family_of({"model_type": "llama"}, override="lama")


@pytest.mark.parametrize(
    "name, changes, error, words",
    [
        ("llama", {"num_attention_heads": "6"}, CheckpointError, "num_attention_heads is '6'"),
        ("llama", {"num_hidden_layers": 10**12}, CheckpointError, "no decoder"),
        ("llama", {"hidden_size": 0}, CheckpointError, "hidden_size is 0"),
        ("llama", {"head_dim": True}, CheckpointError, "head_dim is True"),
        ("mistral", {"sliding_window": -1}, CheckpointError, "sliding_window is -1"),
        ("qwen3", {"layer_types": [FULL]}, CheckpointError, "list of 4"),
        ("qwen3", {"layer_types": [FULL, FULL, SLIDING, FULL]}, CheckpointError, "layer 2 slide"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, UnsupportedModel, "layer 0"),
        ("gemma", {"use_bidirectional_attention": True}, UnsupportedModel, "causal"),
        ("gemma3_text", {"use_bidirectional_attention": True}, UnsupportedModel, "causal"),
    ],
)
def test_broken_sizes_and_windows_are_named(name, changes, error, words):
    part = family(name)
    with pytest.raises(error, match=words):
        part.geometry({**part.tiny_config, **changes})
