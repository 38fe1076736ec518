"""Softmax attention over the last tokens only, with optional sinks: the baseline of all mixers.

What it does: each token sees the last `window` tokens, its own included. `num_sinks` keeps the
first real tokens of a sequence in sight for ever, at their own positions; `sink_bias` learns a
logit per head that takes weight and gives nothing, as in GPT-OSS. A window wider than the source's
own is cut to it, and so are sinks, since the source's layer would have dropped them too.
Why it works: most heads read nearby tokens, and softmax needs somewhere to put unused weight.
Cost: `window + num_sinks` keys and values, whatever the length; time linear in the length.
Options: window 512 tokens, num_sinks 0 tokens, sink_bias false.
Known limits: nothing before the window is reachable in this layer.
Reference: Xiao et al., StreamingLLM, arXiv 2309.17453. Deviation: keys keep their absolute
positions; the official code rotates them by their place in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from morph.cache import State
from morph.errors import RecipeError
from morph.mixers._base import GroupShape, Inputs, MixerBase
from morph.mixers._softmax import attend
from morph.plan import CacheCost

SEES = "window"
LINEAR = False
# exp(-8) beside a softmax sum of about 1 or more: step 0 moves by at most 3e-4 of an output, while
# the gradient, of the same order, is still alive. Below about -17 both vanish in float32.
_SINK_START = -8.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """`window` tokens in sight, the query's own included; `num_sinks` first tokens kept beside.

    `sink_bias` adds a learned logit per head to the softmax's denominator.
    """

    window: int = 512
    num_sinks: int = 0
    sink_bias: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise RecipeError(
                f"mixer sliding: window is {self.window}; it counts the token itself, so give 1 or "
                "more. The default is 512."
            )
        if self.num_sinks < 0:
            raise RecipeError(
                f"mixer sliding: num_sinks is {self.num_sinks}; give 0 (none) or more, usually 4."
            )


class Mixer(MixerBase):
    """Sliding-window attention of a head group; `sinks` [H] are the learned logits, if any."""

    gates: ClassVar[tuple[str, ...]] = ("sinks",)

    def __init__(self, shape: GroupShape, options: Options) -> None:
        super().__init__(shape, options)
        self.sinks = nn.Parameter(torch.empty(shape.num_heads)) if options.sink_bias else None
        self.reset_parameters()

    def forward(self, inputs: Inputs, state: State | None = None) -> torch.Tensor:
        """Return the heads' outputs [B, T, H, V]; rows of padding are zeros."""
        window, num_sinks = _reach(self.options, self.shape)
        return attend(inputs, state, self.shape, window, num_sinks, self.sinks)

    def reset_parameters(self) -> None:
        """Start the sink logits so low that outputs are the plain window's, within 3e-4."""
        if self.sinks is not None:
            nn.init.constant_(self.sinks, _SINK_START)

    @classmethod
    def cache_cost(cls, options: Options, shape: GroupShape) -> CacheCost:
        """The window and the sinks, never more than the source's own window."""
        return CacheCost(tokens=sum(_reach(options, shape)))

    @classmethod
    def identity(cls, options: Options, seq_len: int) -> Options:
        """Return the window that covers `seq_len` tokens, without a sink bias."""
        return Options(window=max(seq_len, 1))

    @classmethod
    def exact_prefix(cls, options: Options) -> int:
        """The tokens that still see all before them; none where a sink bias takes weight."""
        return 0 if options.sink_bias else options.window + options.num_sinks


def _reach(options: Options, shape: GroupShape) -> tuple[int, int]:
    """Return (window, sinks) in tokens, together no more than the source's own window."""
    if shape.window is None:
        return options.window, options.num_sinks
    window = min(options.window, shape.window)
    return window, min(options.num_sinks, shape.window - window)
