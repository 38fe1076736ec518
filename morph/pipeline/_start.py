"""The hybrid as training or writing finds it: its mixers started from the source, where text is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from morph.pipeline._source import Say, quiet
from morph.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from morph.pipeline._data import Corpus

SEQ_LEN = 512


def hybrid_of(
    source: nn.Module,
    plan: Plan,
    corpus: Corpus | None,
    tokens: int,
    *,
    say: Say = quiet,
) -> nn.Module:
    """Return the hybrid of a live source model, calibrated on the first `tokens` of the text.

    Without text, or with `tokens` 0, and where no mixer has anything to calibrate, mixers keep
    their plain starts. Says how near the layers came.
    """
    from morph import modeling, surgery

    made = modeling.hybrid(source, plan)
    layers = surgery.hybrid_layers(made).values()
    mixers = [m for layer in layers for m in layer.mixers]
    asked = {f"mixer {m.asks(m.options)}" for m in mixers if m.asks(m.options)}
    if not any(adapts(layer) for layer in layers):
        return made
    if not tokens:
        _warn(asked, "mixer.calibrate is 0", say)
        return made
    if corpus is None or len(corpus.train) < 2:
        say("mixers keep their plain starts: there is no text to calibrate them on (--data FILE)")
        _warn(asked, "there is no text", say)
        return made
    wanted = [m.calibration_length(m.options) for m in mixers]
    context = int(getattr(source.config, "max_position_embeddings", None) or SEQ_LEN)
    ids = text_ids(corpus, tokens, min(max(wanted), max(context, SEQ_LEN)))
    found = surgery.calibrate(made, source, ids)
    before, after = (sum(getattr(s, n) for s in found.values()) / len(found) for n in _WHEN)
    say(
        f"calibrated on {ids.numel():,} tokens: relative error of the layers' outputs "
        f"{before:.2f} -> {after:.2f}"
    )
    if all(ids.shape[1] <= m.exact_prefix(m.options) for m in mixers if m.asks(m.options)):
        _warn(asked, f"rows of {ids.shape[1]} tokens are read whole", say)
    return made


def _warn(asked: set[str], why: str, say: Say) -> None:
    """Say what was asked of calibration and is not met."""
    for what in sorted(asked):
        say(f"warning: {what} is not met, as {why}; bytes that are told still count with it")


_WHEN = ("before", "after")


def adapts(layer: Any) -> bool:
    """Return whether anything in a converted layer is set by calibration."""
    from morph.mixers._base import MixerBase

    own = (type(m).calibrate is not MixerBase.calibrate for m in layer.mixers)
    return layer.fusion is not None or any(own)


def text_ids(corpus: Corpus, tokens: int, longest: int = SEQ_LEN) -> torch.Tensor:
    """Return about `tokens` ids of the training text as rows `[B, T <= longest]`, in order."""
    length = min(longest, len(corpus.train), tokens)
    rows = max(1, min(tokens, len(corpus.train)) // length)
    return corpus.train[: rows * length].view(rows, length)
