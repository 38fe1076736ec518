"""The kinds and shapes of layers as many architectures say them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from morph.layouts._settings import Settings
from morph.layouts._shapes import Heads

# the words of `layer_types`, today's and older ones
HYBRID: Mapping[str, str] = {
    "full_attention": "full",
    "attention": "full",
    "linear_attention": "linear",
    "mamba": "linear",
}
WINDOWED: Mapping[str, str] = {"full_attention": "full", "sliding_attention": "sliding"}

Kinds = Callable[[Settings], tuple[str, ...]]


def full(settings: Settings) -> tuple[str, ...]:
    """Return full attention in every layer."""
    return ("full",) * settings.layers


def none(settings: Settings) -> tuple[str, ...]:
    """Return layers without any softmax attention."""
    return ("linear",) * settings.layers


def one_window(settings: Settings) -> tuple[str, ...]:
    """Return the same kind for every layer: sliding where `sliding_window` is set."""
    window = settings.get("sliding_window")
    if window is None:
        return full(settings)
    settings.size("sliding_window")
    return ("sliding",) * settings.layers


def listed(words: Mapping[str, str], otherwise: Kinds, *keys: str) -> Kinds:
    """Return a function that reads the first of `keys` that is there, else asks `otherwise`.

    Without `keys` it reads `layer_types`.
    """

    def kinds(settings: Settings) -> tuple[str, ...]:
        for key in keys or ("layer_types",):
            if settings.get(key) is not None:
                return settings.words(key, words)
        return otherwise(settings)

    return kinds


def every(kind: str, other: str, step: int | str) -> Kinds:
    """Return a function that makes each `step`-th layer `kind` and the rest `other`.

    `step` may be the name of the key that holds it.
    """

    def kinds(settings: Settings) -> tuple[str, ...]:
        n = settings.size(step) if isinstance(step, str) else step
        return tuple(other if (i + 1) % n else kind for i in range(settings.layers))

    return kinds


def plain(
    *,
    rotary: bool = True,
    share: float | None = None,
    interleaved: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
) -> Callable[[Settings, int, str], Heads]:
    """Return a function that reads the shape of a layer's attention from its usual keys.

    `share` is the default share of each head that turns (None: all of it, whatever the config
    says), `head_dim` the default where that is not the hidden size over the heads.
    """

    def heads(settings: Settings, layer: int, kind: str) -> Heads:
        return settings.heads(
            rotary=rotary,
            share=1.0 if share is None else settings.share(share),
            interleaved=interleaved,
            qk_norm=qk_norm,
            head_dim=head_dim,
        )

    return heads
