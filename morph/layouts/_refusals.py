"""Why q and k of an architecture cannot be restored, in the words a user reads."""

from __future__ import annotations

from morph.layouts._settings import Settings


def latent(settings: Settings) -> str:
    """Return why latent attention is refused."""
    return (
        "its attention is latent (MLA): no tensor is the key projection alone, because the latent "
        "that makes the keys makes the values too. Restoring it would change the values."
    )


def shared(settings: Settings) -> str:
    """Return why attention blocks that layers share are refused."""
    return (
        "many of its layers share one attention block: one tensor changes them all, and copies in "
        "the file would have to stay equal."
    )
