"""A selector in a module of one's own: how much a unit can write into the residual stream.

    python examples/custom_selector.py MODEL

What it measures: the Frobenius norm of (output projection x value projection), summed over the
query heads of a unit: the most that the unit's attention can move the stream.
Why it works: it hardly does (a loud layer need not be one that looks far back); it shows what a
selector that reads weights looks like, and makes a baseline.
Cost: one small matrix product per head; no forward, no text.
Options: per_head (bool, default true): divide by the number of query heads.
Known limits: blind to where heads look.
Reference: none; an example.

A part from outside is named by its module: `--selector my_package.custom_selector`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from morph.plan import Granularity, Scores
from morph.selectors import _common
from morph.surgery import Batch, Morphable

NEEDS = "weights"  # or "forward", or "backward"


@dataclass(frozen=True, kw_only=True)
class Options:
    """`per_head` averages over the query heads of a unit instead of adding them up."""

    per_head: bool = True


def score(
    morphable: Morphable,
    batches: Sequence[Batch],
    options: Options,
    *,
    granularity: Granularity = "layer",
) -> Scores:
    """Return the norm of what each unit can write; higher means louder."""
    shape = morphable.geometry
    width = shape.num_attention_heads // shape.units(granularity)  # query heads in a unit
    norms = {i: head_norms(morphable, i) for i in morphable.candidates}
    values = {}
    for layer, unit in _common.units(morphable, granularity):
        part = norms[layer][unit * width : (unit + 1) * width]
        values[layer, unit] = float(part.mean() if options.per_head else part.sum())
    return _common.scores(morphable, "custom_selector", granularity, values, "norm", {})


@torch.no_grad()
def head_norms(morphable: Morphable, layer: int) -> torch.Tensor:
    """Return the norms `[H]` of output x value projection, one per query head of a layer."""
    family, shape = morphable.family, morphable.geometry
    attention = morphable.switches[layer].source
    if family.qkv:  # one projection for q, k and v, in this order
        rows = shape.num_key_value_heads * shape.v_head_dim
        value = getattr(attention, family.qkv).weight[-rows:]
    else:
        value = getattr(attention, family.v).weight
    value = value.float().view(shape.num_key_value_heads, shape.v_head_dim, -1)
    value = value.repeat_interleave(shape.group_size, dim=0)  # [H, V, D]
    output = getattr(attention, family.o).weight.float()
    output = output.view(-1, shape.num_attention_heads, shape.v_head_dim).transpose(0, 1)
    return (output @ value).flatten(1).norm(dim=1)


def main(model: str) -> None:
    """Score a model by layer, and plan a quarter of it."""
    from transformers import AutoModelForCausalLM

    import morph
    from morph.surgery import morphable

    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with morphable(source, "sliding", {"window": 64}) as probe:
        scores = score(probe, [], Options())
        shape = probe.geometry
    for layer, row in enumerate(scores.values):
        print(f"layer {layer}: {row[0]:.4f}")
    plan = morph.choose(scores, morph.Budget.parse("1/4"), geometry=shape, mixer="sliding")
    print(plan.pattern)


if __name__ == "__main__":
    main(sys.argv[1])
