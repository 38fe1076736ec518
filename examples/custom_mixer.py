"""A mixer in a module of one's own: a sliding window whose heads learn how sharply they look.

    python examples/custom_mixer.py MODEL

What it does: softmax attention over the last `window` tokens; the scores of head h are multiplied
by exp(sharpness[h]), which starts at 0 and is learned by `morph distill`.
Why it works: a head that loses its far tokens spreads its weight over the near ones; sharpening
puts it back where it was.
Cost: that of a sliding window, and one number per head.
Options: window 256 tokens.
Known limits: nothing before the window is reachable.
Reference: none; an example.

A part from outside is named by its module: `--mixer my_package.custom_mixer`, or `mixer: {name:
my_package.custom_mixer}` in a recipe. Install the package, so that fresh processes find it too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morph.cache import State
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._softmax import attend
from morph.plan import CacheCost


@dataclass(frozen=True, kw_only=True)
class Options:
    """`window` tokens in sight, the query's own included."""

    window: int = 256


class Mixer(MixerBase):
    """Sliding-window attention of a head group; `sharpness` [H] scales its scores."""

    gates = ("sharpness",)  # its own learning rate, no weight decay

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        self.sharpness = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain window."""
        nn.init.zeros_(self.sharpness)

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]."""
        scale = self.sharpness.exp().to(inputs.q.dtype)
        sharper = replace(inputs, q=inputs.q * scale[:, None])
        return attend(sharper, state, self.shape, self.options.window)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """The window."""
        return CacheCost(tokens=options.window)

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return the window that covers `seq_len` tokens."""
        return Options(window=max(1, seq_len))

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The tokens that still see all before them, as long as nothing is learned."""
        return options.window


def main(model: str) -> None:
    """Make a hybrid in memory that uses this very module, and generate with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import morph
    from morph.plan import uniform_plan
    from morph.surgery import geometry_of

    name = Path(__file__).stem  # this file again, under the name by which a plan finds it
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    source: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = geometry_of(source)
    last = shape.num_hidden_layers - 1
    plan = uniform_plan(source.config.model_type, shape, [last], f"{name}:", {"window": 32}, None)
    hybrid = morph.hybrid(source, plan)
    prompt = tokenizer(
        "It was a cold evening, and", return_tensors="pt", return_token_type_ids=False
    )
    out = hybrid.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(f"{plan.pattern}: {tokenizer.decode(out[0])!r}")
    learnable = sum(p.numel() for n, p in hybrid.named_parameters() if n.endswith("sharpness"))
    print(f"{learnable} numbers to learn in {len(plan.replaced_layers)} layers")


if __name__ == "__main__":
    main(sys.argv[1])
