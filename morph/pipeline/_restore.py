"""`morph restore`: resolve the inputs, plan, write, and say what was done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from morph import checkpoint, restore
from morph.errors import UsageError, escape, nearest

Copy = Literal["auto", "copy", "link"]


def restore_command(
    pre: str,
    post: str,
    out: Path,
    *,
    method: str = "exact",
    rho: float | None = None,
    alpha: float | None = None,
    layers: str = "full",
    budget: str | None = None,
    include: str = "q,k,bias",
    allow: Sequence[str] = (),
    copy: str = "auto",
    hashing: bool = True,
    force: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None],
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Restore PRE's queries and keys in POST, and return what was planned and written.

    `include` and `allow` hold names, which may be separated by commas. `dry_run` writes nothing.
    Raises what `restore.plan` and `restore.write` raise.
    """
    options = restore.Options(
        method=method,
        rho=rho,
        alpha=alpha,
        layers=layers,
        budget=budget,
        include=_names(include),
        allow=tuple(name for text in allow for name in _names(text)),
    )
    if copy not in get_args(Copy):
        raise UsageError(
            f"--copy: {escape(copy, 40)!r} is not known.{nearest(copy, get_args(Copy))} Allowed: "
            f"{', '.join(get_args(Copy))}."
        )
    before, after = checkpoint.resolve(pre), checkpoint.resolve(post)
    target = checkpoint.check_output(out, [before, after], force)
    plan = restore.plan(before, after, options)
    for note in plan.notes:
        say(f"note: {note}")
    found = plan.summary() | {
        "out": str(out),
        "copy": copy,
        "free_bytes": shutil.disk_usage(target.parent).free,
        "dry_run": dry_run,
        "next": ["verify", str(out), "--against", post, "--pre", pre],
    }
    if dry_run:
        return found
    one = "" if len(plan.layers) == 1 else "s"
    say(f"writing {escape(out)}: {len(plan.tensors)} tensors of {len(plan.layers)} layer{one}")
    written = restore.write(
        plan,
        out,
        copy=copy,  # type: ignore[arg-type]
        hashing=hashing,
        force=force,
        restart=restart,
        progress=progress,
    )
    for text in written.notes:
        say(f"note: {text}")
    if any(name.endswith(".py") for name in written.not_copied):
        say(
            "note: code is not copied, though POST's config.json, which is, may name it: copy the "
            ".py files yourself if you trust them."
        )
    return found | {
        "resumed": list(written.resumed),
        # the card lives on, in or beside the new one
        "not_copied": [name for name in written.not_copied if name != "README.md"],
        "copied_bytes": written.copied_bytes,
        "hashed": written.files is not None,
    }


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for word in text.split(",") if (name := word.strip()))
