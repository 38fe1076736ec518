"""Write what a plan says: one pass over POST, with PRE's rows in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from morph.checkpoint import Patched, patch_folder
from morph.checkpoint._copying import CARD, PROVENANCE
from morph.checkpoint._patch import Copy
from morph.errors import escape
from morph.restore import _content, _record
from morph.restore._adapter import others_inside
from morph.restore._open import index_text
from morph.restore._plan import Plan
from morph.restore._select import ranges


def write(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    copy: Copy = "auto",
    hashing: bool = True,
    force: bool = False,
    restart: bool = False,
    durable: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Patched:
    """Write the restored checkpoint `out`; it appears complete, or not at all.

    Everything that is not restored is POST's, byte for byte: headers, shards, index, config and
    side files. morph.json says what was done. First every restored byte of PRE is looked at once,
    as `plan` did with samples. The other arguments are those of `checkpoint.patch_folder`; a run
    that was killed goes on where it was, unless an input or an option changed. Raises what
    `patch_folder` raises, and CheckpointError for values of PRE that cannot be meant.
    """
    _content.scan(plan.pre, plan.places, plan.options)
    record = plan.record()
    texts = {
        **index_text(plan.post),
        PROVENANCE: _record.merged(plan.post, record),
        CARD: _record.card(plan.post, _card(plan, record)),
    }
    return patch_folder(
        out,
        source=plan.post,
        splices=plan.splices(),
        inputs=[plan.pre],
        texts=texts,
        skip_files=others_inside(plan.post)[1],
        identity={"options": record["options"], "PRE": _record.state(plan.pre)},
        copy=copy,
        hashing=hashing,
        force=force,
        restart=restart,
        durable=durable,
        progress=progress,
    )


def _card(plan: Plan, record: dict[str, Any]) -> str:
    pre, post = (escape(record[k]["name"], 120) for k in ("pre", "post"))
    rows = "\n".join(
        f"| {r['part']} | {ranges(r['layers'])} | {r['rule']} | {r['tensors']} | {r['bytes']:,} |"
        for r in record["rules"]
    )
    notes = "".join(f"- {escape(n, 600)}\n" for n in record["notes"])
    settings = ", ".join(f"{k} {v}" for k, v in record["options"].items() if k in ("rho", "alpha"))
    return (
        f"# {post}, with queries and keys of {pre}\n\n"
        f"Made by morph: `{post}` with rows of `{pre}` put back (QK-Restore, method "
        f"`{plan.options.method}`{', ' + settings if settings else ''}). All else is `{post}`, "
        "byte for byte.\n\n"
        "| part | layers | rule | tensors | bytes |\n|---|---|---|---|---|\n"
        f"{rows}\n\n{notes}"
        "\nRecovery of long-range recall is partial, and a restore can do harm: evaluate both.\n"
    )
