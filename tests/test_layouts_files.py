"""What layouts say of config.json and headers alone: coverage, prefixes, refusals, hostile input.

That they are right about the models is proven in test_layouts.py.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from morph import layouts, registry
from morph.checkpoint import Checkpoint
from morph.errors import CheckpointError, InputFileError, UnsupportedModel, UsageError

_spec = importlib.util.spec_from_file_location(
    "_tiny_layouts", Path(__file__).with_name("_tiny_layouts.py")
)
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

REFUSED = ("deepseek_v2", "deepseek_v3", "kimi_linear", "zamba", "zamba2")


def read(model_type: str) -> layouts.Reading:
    return layouts.read(tiny.config(model_type), tiny.shapes(model_type))


# --------------------------------------------------------------------------------------------------
# Every architecture, by its file alone


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_every_row_is_covered_once(model_type):
    reading, config = read(model_type), tiny.config(model_type)
    tiny.assert_covered(reading, tiny.shapes(model_type))
    assert reading.model_type == model_type
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers") or len(text["layers_block_type"])  # nemotron_h
    assert len(reading.kinds) == layers
    assert set(reading.kinds) <= {"full", "sliding", "linear"}
    mixers = {rows.layer for rows in reading.rows if rows.role == "mixer"}
    linear = {i for i, kind in enumerate(reading.kinds) if kind == "linear"}
    assert mixers == {"falcon_h1": {0, 1}, "nemotron_h": {0}}.get(model_type, mixers | linear)
    for rows in reading.rows:
        if rows.layer is not None and rows.role in ("q", "k", "v", "o", "gate", "q_norm", "k_norm"):
            assert rows.kind == reading.kinds[rows.layer] != "linear"
        if rows.role == "mixer":
            assert rows.kind == "linear"
        if rows.role == "other" and not reading.refusal:
            assert rows.tensor.endswith("sinks") or ".visual." in rows.tensor
        assert (rows.role == "embedding") == (rows.tensor.endswith(EMBEDDINGS)), rows


EMBEDDINGS = ("embed_tokens.weight", "backbone.embeddings.weight", "embed_in.weight")


def test_every_layout_has_a_tiny_checkpoint_and_a_summary():
    assert {*layouts.model_types(), *tiny.WRAPPED} == set(tiny.MODEL_TYPES)
    assert set(registry.names("layouts")).isdisjoint(registry.names("families"))
    for name in registry.names("layouts"):
        assert layouts.layout(name).model_type == name
        assert registry.summary("layouts", name).endswith(".")
        assert "Trap:" in registry.docstring("layouts", name)


def test_the_page_shows_what_morph_list_shows():
    page = (Path(__file__).parent.parent / "docs" / "layouts.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("| ")][1:]
    names = registry.names("layouts")
    assert table == [f"| {name} | {registry.summary('layouts', name)} |" for name in names]


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_tiny_checkpoints_are_whole(model_type, tmp_path):
    tiny.write(tmp_path / "one", model_type, seed=1)
    tiny.write(tmp_path / "three", model_type, seed=1, shards=3, dtype="F32")
    one, three = (Checkpoint.open(tmp_path / n, strict=False) for n in ("one", "three"))
    assert len(three.shards) == 3
    assert set(one.dtypes) == {"BF16"}
    for opened in (one, three):
        assert {n: i.shape for n, i in opened.tensors.items()} == tiny.shapes(model_type)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_architectures(model_type):
    """Latent and shared attention say why, cover every row, and call nothing q or k."""
    reading = read(model_type)
    word = "latent" if "seek" in model_type or "kimi" in model_type else "share"
    assert word in reading.refusal
    assert not {rows.role for rows in reading.rows} & {"q", "k", "v", "gate"}
    assert "full" in reading.kinds
    with pytest.raises(UsageError, match="layers that do: none"):
        reading.attention(reading.kinds.index("full"))


@pytest.mark.parametrize("model_type", sorted(tiny.ELSEWHERE))
def test_linear_layers_with_softmax_names(model_type):
    """Not run, for transformers has no such model: the published code and configs say it."""
    reading = read(model_type)
    linear = [i for i, kind in enumerate(reading.kinds) if kind == "linear"]
    named = {r.layer for r in reading.rows if r.tensor.endswith("self_attn.q_proj.weight")}
    assert named == set(range(len(reading.kinds))) > set(linear) > set()
    chosen = {r.layer for r in reading.rows if r.role in ("q", "k")}
    assert chosen == named - set(linear)
    softmax = sorted(chosen)[0]
    gates = {r.tensor for r in reading.rows if r.role == "gate"}
    if model_type == "hypenet":
        assert reading.attention(softmax).rotary is None
        assert f"model.layers.{softmax}.self_attn.o_gate.weight" in gates
    else:
        assert reading.attention(softmax).rotary == layouts.Rotary(dim=8)
        assert reading.kinds == ("linear", "full", "sliding", "linear")
    with pytest.raises(UsageError, match=f"layer {linear[0]} has no softmax attention"):
        reading.attention(linear[0])


# --------------------------------------------------------------------------------------------------
# Prefixes, wrappers and what is refused


KNOWN_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "backbone.", "")


def renamed(model_type: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tiny shapes with the decoder under another prefix."""
    found = tiny.shapes(model_type)
    return {
        prefix + n.removeprefix("model.") if n.startswith("model.") else n: s
        for n, s in found.items()
    }


@pytest.mark.parametrize("prefix", KNOWN_PREFIXES)
def test_the_same_under_every_prefix(prefix):
    config, plain = tiny.config("qwen3_next"), read("qwen3_next")
    got = layouts.read(config, renamed("qwen3_next", prefix))
    assert got.kinds == plain.kinds
    back = [
        replace(r, tensor="model." + r.tensor.removeprefix(prefix))
        if r.tensor != "lm_head.weight"
        else r
        for r in got.rows
    ]
    assert sorted(map(repr, back)) == sorted(map(repr, plain.rows))


def test_towers_and_draft_heads_beside_the_decoder_are_not_taken_for_it():
    shapes = renamed("qwen3_next", "model.language_model.")
    tower = {
        "model.visual.blocks.0.attn.qkv.weight": (24, 8),
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "mtp.layers.0.self_attn.q_proj.weight": (64, 32),
        "model.audio_tower.layers.0.self_attn.k_proj.weight": (8, 8),
    }
    reading = layouts.read(tiny.config("qwen3_next"), shapes | tower)
    tiny.assert_covered(reading, shapes | tower)
    for rows in reading.rows:
        if rows.tensor in tower:
            assert (rows.layer, rows.role, rows.kind) == (None, "other", "")


@pytest.mark.parametrize(
    ("one", "other"),
    [("model.", "model.language_model."), ("model.", "backbone."), ("", "language_model.model.")],
)
def test_two_decoders_are_ambiguous(one, other):
    shapes = renamed("llama", one) | renamed("llama", other)
    with pytest.raises(CheckpointError, match="does not say which") as caught:
        layouts.read(tiny.config("llama"), shapes)
    assert f"{one}layers.N" in str(caught.value) and f"{other}layers.N" in str(caught.value)


def test_an_unknown_prefix_is_named():
    with pytest.raises(CheckpointError, match=r"odd\.layers\.N, which no known model uses"):
        layouts.read(tiny.config("llama"), renamed("llama", "odd."))


def test_a_wrapper_is_read_as_its_text_model():
    """The text model's own config lies in text_config, whatever the wrapper is called."""
    config = {"model_type": "some_vlm", "text_config": tiny.config("qwen3")}
    shapes = renamed("qwen3", "language_model.model.")
    reading = layouts.read(config, shapes)
    assert reading.model_type == "some_vlm"
    assert reading.kinds == read("qwen3").kinds
    del config["text_config"]["num_attention_heads"]
    config["text_config"]["num_key_value_heads"] = "two"
    with pytest.raises(CheckpointError, match=r"text_config\.num_key_value_heads is 'two'"):
        layouts.read(config, shapes)


def test_unknown_architectures_name_what_may_be_attention():
    config = {"model_type": "qwen3_nex", "num_hidden_layers": 2}
    shapes = {
        "model.layers.0.mamba.in_proj.weight": (8, 8),
        "model.layers.1.attn.qkv_proj.weight": (24, 8),
        "model.layers.10.attn.c_attn.weight": (24, 8),
    }
    with pytest.raises(UnsupportedModel) as caught:
        layouts.read(config, shapes)
    for part in (
        "'qwen3_nex'",
        "'qwen3_next'",
        "1 (model.layers.1.attn.qkv_proj",
        "10 (",
        "2 layers may",
    ):
        assert part in str(caught.value)
    with pytest.raises(UnsupportedModel, match="No tensor is named like attention"):
        layouts.read({"model_type": "morph_bert"}, {"x": (1,)})
    with pytest.raises(CheckpointError, match="no model_type"):
        layouts.read({"model_type": 3}, {"x": (1,)})


def test_layers_that_predict_further_tokens_are_left_alone():
    shapes = tiny.shapes("glm4_moe") | {"model.layers.2.self_attn.q_proj.weight": (48, 32)}
    config = tiny.config("glm4_moe")
    (extra,) = (
        r for r in layouts.read(config, shapes).rows if r.tensor.startswith("model.layers.2")
    )
    assert (extra.layer, extra.role, extra.kind) == (None, "other", "")
    config.pop("num_nextn_predict_layers", None)
    config["num_mtp_layers"] = 0
    shapes["model.layers.3.self_attn.q_proj.weight"] = (48, 32)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2, the weights hold 4 layers"):
        layouts.read(config, shapes)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"model.layers.2.self_attn.q_proj.weight": None}, "have no self_attn.q_proj"),
        ("llama", {"model.layers.2.self_attn.q_proj.weight": (58, 36)}, "it has 60 rows"),
        ("llama", {"model.layers.2.self_attn.k_proj.weight": (20,)}, "has shape [20]"),
        ("qwen2", {"model.layers.0.self_attn.q_proj.bias": (36, 1)}, "q_proj.bias has shape"),
        ("qwen3_next", {"model.layers.1.self_attn.q_proj.weight": (32, 32)}, "it has 64 rows"),
        ("gpt_neox", {"gpt_neox.layers.1.attention.query_key_value.weight": (80, 40)}, "120 rows"),
    ],
)
def test_tensors_that_contradict_the_config(model_type, change, message):
    shapes = tiny.shapes(model_type) | change
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError) as caught:
        layouts.read(tiny.config(model_type), shapes)
    assert message in str(caught.value)
    assert next(iter(change)).removesuffix(".weight").split(".", 3)[-1] in str(caught.value)


def test_the_wrong_config_of_a_hybrid_is_noticed():
    """Softmax rows must lie where the list of layers says, and nowhere else."""
    config = tiny.config("qwen3_next")
    config["layer_types"] = config["layer_types"][::-1]
    with pytest.raises(CheckpointError, match="layer 0 is full attention by config.json, but"):
        layouts.read(config, tiny.shapes("qwen3_next"))
    for model_type, change in (
        ("bamba", {"attn_layer_indices": []}),
        ("jamba", {"attn_layer_offset": 2}),
        ("lfm2", {"layer_types": ["conv"] * 3}),
        ("qwen3_5", {"layer_types": ["linear_attention"] * 4}),
    ):
        config = tiny.config(model_type)
        config.get("text_config", config).update(change)
        with pytest.raises(CheckpointError, match=r"layer \d is full.*have no|has no softmax.*but"):
            layouts.read(config, tiny.shapes(model_type))


def test_what_a_row_map_says_nothing_about_is_refused():
    """Scales and other companions of a projection go with it only where they go as a whole."""
    name = "model.layers.1.self_attn.q_proj.weight_scale_inv"
    for model_type, role in (("llama", "q"), ("qwen3_next", "other")):
        shapes = tiny.shapes(model_type) | {name: (1, 1)}
        reading = layouts.read(tiny.config(model_type), shapes)
        assert (name in reading.refusal) == (role == "other")
        tiny.assert_covered(reading, shapes)
        (rows,) = (r for r in reading.rows if r.tensor == name)
        assert (rows.role, rows.ranges) == (role, None)


# --------------------------------------------------------------------------------------------------
# Configs that mean harm

VALUES = (-1, 0, 10**9, 2**70, 1.5, float("nan"), True, "x", [], {}, [None], [10**9], "\x1b[31m")


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_no_value_of_any_key_is_a_traceback(model_type):
    """Each key in turn is missing, null or nonsense: a whole reading comes out, or an error."""
    shapes, nested = tiny.shapes(model_type), "text_config" in tiny.config(model_type)
    place = lambda config: config["text_config"] if nested else config
    refused = 0
    for n, key in enumerate(sorted(place(tiny.config(model_type)))):
        config = tiny.config(model_type)
        del place(config)[key]
        changed = [config]
        # two of the values for each key, all of them over the keys: the product would take a minute
        for value in (None, VALUES[n % len(VALUES)], VALUES[(n + 5) % len(VALUES)]):
            config = tiny.config(model_type)
            place(config)[key] = value
            changed.append(config)
        for config in changed:
            try:
                tiny.assert_covered(layouts.read(config, shapes), shapes)
            except InputFileError as error:
                refused += 1
                assert str(error).isprintable()
    assert refused


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        *((m, "num_hidden_layers") for m in ("llama", "qwen3_next", "jamba", "hypenet", "zamba")),
        *((m, "num_attention_heads") for m in ("qwen2", "gpt_neox", "nemotron_h", "cohere2")),
        *((m, "num_key_value_heads") for m in ("qwen3", "lfm2", "falcon_h1")),
        ("qwen3_5_text", "head_dim"),
        *((m, "layer_types") for m in ("qwen3_next", "lfm2", "gpt_oss", "olmo3", "jet_nemotron")),
        ("nemotron_h", "layers_block_type"),
        ("zamba2", "layers_block_type"),
        ("hypenet", "mixer_types"),
        ("recurrent_gemma", "block_types"),
        ("jamba", "attn_layer_period"),
        ("bamba", "attn_layer_indices"),
        ("minimax", "sliding_window"),
        ("glm4_moe", "use_qk_norm"),
    ],
)
def test_wrong_values_are_named_with_their_key(model_type, key):
    given = tiny.config(model_type).get(key)
    if isinstance(given, list):
        wrong = ["x", {}, [7] * len(given), [None] * len(given), ["odd"] * len(given), given * 3]
        if key in ("block_types", "layers_block_type", "attn_layer_indices"):
            wrong.pop()  # any number of entries is a list of some model
        else:
            wrong.append(given[:-1])
    else:
        wrong = ["x", 10**9, -1, 1.5, [1]]
        wrong = [*wrong, 0] if key != "use_qk_norm" else wrong
    if key == "num_key_value_heads":
        wrong.append(5)  # divides neither 4 nor 6
    if key in ("sliding_window", "attn_layer_period"):
        wrong.remove(10**9)
    for value in wrong:
        if value == given:
            continue
        config = {**tiny.config(model_type), key: value}
        with pytest.raises(CheckpointError) as caught:
            layouts.read(config, tiny.shapes(model_type))
        assert key in str(caught.value), (value, str(caught.value))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"full_attn_layers": [2], "kda_layers": [1, 3]}, ""),
        ({"full_attn_layers": [2], "kda_layers": [1]}, "3 is in none"),
        ({"full_attn_layers": [2], "kda_layers": [1, 2, 3]}, "once each"),
        ({"full_attn_layers": [0], "kda_layers": [1, 2, 3]}, "at least 1"),
        ({"full_attn_layers": [4], "kda_layers": [1, 2, 3]}, "from 1 to 3"),
        ({"full_attn_layers": "2", "kda_layers": [1, 2, 3]}, "full_attn_layers is '2'"),
        ([], "linear_attn_config is []"),
    ],
)
def test_kimi_counts_its_layers_from_one(lists, message):
    config = {**tiny.config("kimi_linear"), "linear_attn_config": lists}
    del config["layer_types"]
    if not message:
        assert layouts.read(config, tiny.shapes("kimi_linear")) == read("kimi_linear")
        return
    with pytest.raises(CheckpointError) as caught:
        layouts.read(config, tiny.shapes("kimi_linear"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "drop", "add", "same"),
    [
        ("nemotron_h", "layers_block_type", {"hybrid_override_pattern": "M*-E"}, True),
        ("nemotron_h", "layers_block_type", {"hybrid_override_pattern": "M*-X"}, False),
        (
            "granitemoehybrid",
            "layer_types",
            {"layers_block_type": ["mamba", "attention", "mamba"]},
            True,
        ),
        ("lfm2", "layer_types", {"full_attn_idxs": [1]}, True),
        ("lfm2", "layer_types", {"full_attn_idxs": [1, True]}, False),
        ("qwen3_next", "layer_types", {"full_attention_interval": 2}, True),
        ("cohere2", "layer_types", {"sliding_window_pattern": 2}, True),
        ("cohere2", "layer_types", {"sliding_window_pattern": 0}, False),
        ("gpt_neox", "rope_parameters", {"rotary_pct": 0.4}, True),
        ("gpt_neox", "rope_parameters", {"rotary_pct": 4}, False),
        ("minimax_m2", "rope_parameters", {"rotary_dim": 4}, True),
        ("minimax_m2", "rope_parameters", {"rotary_dim": 40}, False),
        ("glm4", "rope_parameters", {"partial_rotary_factor": 0.5}, True),
        (
            "hypenet",
            "mixer_types",
            {"mixer_types": ["lightning_attn", "attn", "gdn", "attn"]},
            True,
        ),
    ],
)
def test_older_spellings(model_type, drop, add, same):
    config = {k: v for k, v in tiny.config(model_type).items() if k != drop} | add
    if same:
        assert layouts.read(config, tiny.shapes(model_type)) == read(model_type)
    else:
        with pytest.raises(CheckpointError, match=next(iter(add))):
            layouts.read(config, tiny.shapes(model_type))


@pytest.mark.parametrize(
    ("model_type", "change", "kinds"),
    [
        ("mixtral", {"sliding_window": 4}, {"sliding"}),
        ("mixtral", {"sliding_window": None}, {"full"}),
        ("minimax", {"sliding_window": 4}, {"sliding", "linear"}),
        ("qwen3_moe", {"sliding_window": 4}, {"full"}),
        ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True}, {"sliding"}),
        ("qwen3_moe", {"sliding_window": None, "use_sliding_window": True}, {"full"}),
    ],
)
def test_one_window_for_all_softmax_layers(model_type, change, kinds):
    config = {**tiny.config(model_type), **change}
    assert set(layouts.read(config, tiny.shapes(model_type)).kinds) == kinds
    if change.get("use_sliding_window") and change["sliding_window"]:
        del config["sliding_window"]  # the config class has one
        assert set(layouts.read(config, tiny.shapes(model_type)).kinds) == kinds


def test_null_is_not_the_default():
    """Null heads mean no grouping and null head_dim the hidden size over the heads, as there."""
    config = tiny.config("gpt_oss") | {"num_key_value_heads": None, "head_dim": None}
    with pytest.raises(CheckpointError, match="4 query heads, 4 KV heads, head_dim 8"):
        layouts.read(config, tiny.shapes("gpt_oss"))
    del config["head_dim"]
    with pytest.raises(CheckpointError, match="4 query heads, 4 KV heads, head_dim 64"):
        layouts.read(config, tiny.shapes("gpt_oss"))


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("olmo_hybrid", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
        ("granitemoehybrid", {"position_embedding_type": None}),
    ],
)
def test_positions_can_be_left_out(model_type, change):
    reading = layouts.read({**tiny.config(model_type), **change}, tiny.shapes(model_type))
    assert reading.attention(1).rotary is None
    assert read(model_type).attention(1).rotary is not None
