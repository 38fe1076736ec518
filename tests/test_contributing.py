"""The parts that CONTRIBUTING.md shows are written to files, named from outside, and used."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from morph import registry
from morph.plan import uniform_plan
from morph.surgery import geometry_of, graft, morphable

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# morph/(\w+/\w+)\.py\n(.*?)```", TEXT, flags=re.DOTALL))
FOLDER = "contributed_parts"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory):
    """A package outside morph that holds the parts."""
    root = tmp_path_factory.mktemp("outside")
    folder = root / FOLDER
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in BLOCKS.items():
        (folder / f"{name.split('/')[1]}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(root))
    for name in [m for m in sys.modules if m.split(".")[0] == FOLDER]:
        del sys.modules[name]


def tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**registry.load("families", "llama").FAMILY.tiny_config)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_all_blocks_are_found():
    assert sorted(BLOCKS) == ["families/llama_like", "mixers/average", "selectors/depth"]


def test_selector():
    part = registry.load("selectors", f"{FOLDER}.depth")
    with morphable(tiny_llama(), f"{FOLDER}.average") as probe:
        got = part.score(probe, [], part.Options())
        flipped = part.score(probe, [], part.Options(reverse=True), granularity="kv_head")
    assert got.values == ((0.0,), (1.0,), (2.0,), (3.0,))
    assert flipped.values[3] == (-3.0, -3.0)


def test_mixer_decodes_what_it_prefills():
    model, family = tiny_llama(), registry.load("families", "llama").FAMILY
    plan = uniform_plan("llama", geometry_of(model, family), [0], f"{FOLDER}.average", {}, None)
    graft(model, family, plan)
    ids = torch.randint(1, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
        rest = model(ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values).logits
        alone = model(ids[:1, 5:]).logits
    assert torch.allclose(whole[:, 7:], rest, atol=1e-5)
    assert torch.allclose(whole[0, 5:], alone[0], atol=1e-5)


def test_family_finds_every_attention_module():
    family = registry.load("families", f"{FOLDER}.llama_like").FAMILY
    config = family.part(family.config_class)(**family.tiny_config)
    base = family.part(family.base_class)(config)
    layers = getattr(base, family.layers)
    found = [type(getattr(layer, family.attention)).__name__ for layer in layers]
    assert found == [family.attention_class] * 4
    assert family.geometry(family.tiny_config).group_size == 3
