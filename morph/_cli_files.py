"""The commands that work on the files of checkpoints; none of them loads a model to do its work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from morph import _terminal_files as words
from morph import terminal
from morph._flags import DryRun, Force, Json, Model

Restart = Annotated[
    bool, typer.Option("--restart", help="Drop what an unfinished write left, and start over.")
]
Copy = Annotated[
    str,
    typer.Option(
        "--copy", metavar="HOW", help="auto (share blocks where the disk can), copy, or link."
    ),
]


def add(app: typer.Typer) -> None:
    """Add the commands of this file to the command line, but for `inspect`, which stands apart."""
    for name, command in (
        ("diff", diff),
        ("restore", restore),
        ("verify", verify),
        ("convert-pickle", convert_pickle),
    ):
        app.command(name)(command)


def inspect(
    model: Model,
    health: Annotated[
        bool, typer.Option("--health", help="Read all weights and look for NaN.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show layers, mixers, heads, dtypes, ties, bytes and health of a checkpoint."""
    from morph import checkpoint

    found = checkpoint.inspect(checkpoint.resolve(model), health=health)
    terminal.emit(found, as_json, words.inspection)
    ours = "morph.json" in found["other_files"] or found["model_type"].startswith("morph_")
    after = ["verify", model] if ours else ["score", model, "--selector", "uniform"]
    terminal.next_command(after)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, such as before tuning.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same shapes.")],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Show every tensor, not only groups.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="For diff.json and the picture diff.png."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor: equal, changed, how far, by role and layer."""
    from morph import pipeline

    found = pipeline.diff_command(a, b, out=out, force=force, say=terminal.say)
    terminal.emit(found, as_json, lambda told: words.difference(told, tensors))
    terminal.next_command(found["next"])


def restore(
    pre: Annotated[
        str, typer.Argument(metavar="PRE", help="The hybrid just before it was fine-tuned.")
    ],
    post: Annotated[
        str, typer.Argument(metavar="POST", help="The fine-tuned one, or its LoRA adapter.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    method: Annotated[
        str,
        typer.Option("--method", metavar="NAME", help="exact, ridge (ours), or interpolate."),
    ] = "exact",
    rho: Annotated[
        float | None,
        typer.Option(
            "--rho", metavar="R", help="For ridge: 0 is exact, more keeps more of POST's queries."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="A", help="For interpolate: the share of PRE, 0 to 1."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            "--layers", metavar="WHICH", help="full, all, numbers (3,7), or a scores.json."
        ),
    ] = "full",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="LIMIT",
            help="With a scores.json, how much of it: 7 (layers), 25%.  [default: 1/4]",
        ),
    ] = None,
    include: Annotated[
        str,
        typer.Option(
            "--include",
            metavar="PARTS",
            help="What is restored: of q,k,v,o,bias,norm,gate.",
        ),
    ] = "q,k,bias",
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="CASE", help="Go on where a check would stop; it is named there."
        ),
    ] = None,
    copy: Copy = "auto",
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Skip sha256 and the manifest: faster, unverifiable.")
    ] = False,
    force: Force = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Put the queries and keys from before a fine-tuning back into a hybrid (QK-Restore)."""
    from morph import pipeline

    with terminal.copying() as progress:
        found = pipeline.restore_command(
            pre,
            post,
            out,
            method=method,
            rho=rho,
            alpha=alpha,
            layers=layers,
            budget=budget,
            include=include,
            allow=allow or [],
            copy=copy,
            hashing=not no_hash,
            force=force,
            restart=restart,
            dry_run=dry_run,
            say=terminal.say,
            progress=progress,
        )
    terminal.emit(found, as_json, words.restored)
    if not dry_run:
        terminal.next_command(found["next"])


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="What it was made of, or should equal; a hybrid's logits are compared too.",
        ),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option(
            "--pre",
            metavar="MODEL",
            help="For a restored one: where its queries and keys are from.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint: manifest, structure, and, with --against, what it was made of."""
    from morph import pipeline

    found = pipeline.verify_command(path, against, pre, say=terminal.say)
    terminal.emit(found, as_json, words.verified)
    if (path.expanduser() / "config.json").exists():  # weights alone and adapters have none
        terminal.next_command(["inspect", str(path)])


def convert_pickle(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder with .bin or .pt weights.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    force: Force = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rewrite pickled weights as safetensors, in a process that can neither run nor send them."""
    from morph import pipeline

    with terminal.copying() as progress:
        found = pipeline.convert_pickle_command(
            model,
            out,
            force=force,
            restart=restart,
            dry_run=dry_run,
            say=terminal.say,
            progress=progress,
        )
    terminal.emit(found, as_json, terminal.pairs)
    if not dry_run:
        terminal.next_command(["verify", str(out), "--against", model])
