"""The command line: parse, call one pipeline function, print. No logic, nothing heavy at import."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" or not __package__:
    sys.exit("run `morph` or `python -m morph`: by path, morph/ would hide the standard library.")

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from morph import _cli_files, terminal
from morph._flags import (
    BudgetOption,
    DryRun,
    DType,
    Export,
    FamilyOption,
    Force,
    GranularityOption,
    Json,
    Keep,
    MixerOption,
    Model,
    NoSwaps,
    Out,
    Replace,
    Seed,
    Selector,
    Sets,
    Target,
    Texts,
    as_exports,
    as_recipe,
    as_units,
    given_once,
    parser,
    refuse_choices,
    refuse_mixer,
)
from morph._processes import world
from morph.errors import Interrupted, MorphError, StorageError, UsageError

app = typer.Typer(
    name="morph",
    help="Turn a pretrained Hugging Face decoder into a hybrid-attention model.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from morph import __version__

        typer.echo(f"morph {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of user errors too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import a module whose parts a checkpoint names."
        ),
    ] = None,
) -> None:
    terminal.DEBUG = debug
    for name in imports or []:
        from morph import registry

        registry.import_module(name)


@app.command("list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="families, kernels, mixers, selectors or recipes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the parts there are, one line each."""
    from morph import registry

    kinds = [registry.check_kind(kind)] if kind else list(registry.KINDS)
    found = {k: {n: registry.summary(k, n) for n in registry.names(k)} for k in kinds}
    terminal.emit(found, as_json, terminal.parts)
    first = next((f"{k}/{n}" for k in reversed(kinds) for n in registry.names(k)), None)
    terminal.next_command(["show", first] if first else ["list"])


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A part, or kind/part.")],
) -> None:
    """Show what one part does: its documentation and options."""
    from morph import registry

    for kind, part in terminal.find_part(name):
        terminal.part(kind, part, registry.docstring(kind, part), registry.options(kind, part))
    terminal.next_command(["check", part] if kind == "recipes" else ["list", kind])


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, devices and which fast paths can run here."""
    from morph import pipeline

    terminal.emit(pipeline.environment(), as_json, terminal.pairs)
    terminal.next_command(["list"])


app.command()(_cli_files.inspect)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file or shipped name.")],
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Check a recipe strictly, without loading weights."""
    from morph.recipes import schema

    found = schema.load(recipe, sets or [])
    if as_json:
        from morph import strict

        terminal.emit(strict.plain(found), True, terminal.pairs)
    else:
        typer.echo(schema.dumps(found), nl=False)
    terminal.say(f"{recipe}: valid")
    more = [] if found.out else ["--out", f"{Path(recipe).stem}-run"]
    terminal.next_command(["run", recipe, *more, *(x for s in sets or () for x in ("--set", s))])


@app.command()
def score(
    model: Model,
    selector: Selector = None,
    granularity: GranularityOption = None,
    mixer: MixerOption = None,
    budget: BudgetOption = None,
    data: Texts = None,
    out: Out = Path("scores.json"),
    export: Export = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Hold one layer in memory at a time: exact sweeps only."),
    ] = False,
    family: FamilyOption = None,
    seed: Seed = 0,
    dtype: DType = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score layers or heads: higher means more need for full attention."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(
        model,
        sets,
        family=family,
        data=data,
        seed=seed,
        dtype=dtype,
        mixer=mixer,
        selector=selector,
        granularity=granularity,
        budget=budget,
    )
    if dry_run:
        return terminal.emit(
            pipeline.score_estimate(recipe, stream=stream), as_json, terminal.pairs
        )
    with terminal.measuring() as progress:
        found = pipeline.score_command(
            recipe,
            out,
            exports=as_exports(export),
            stream=stream,
            force=force,
            say=terminal.say,
            progress=progress,
        )
    terminal.emit(found, as_json, terminal.scores)
    terminal.next_command(_next.after_score(recipe, out, sets))


@app.command()
def plan(
    scores: Annotated[
        Path,
        typer.Argument(metavar="SCORES", help="A scores.json, or a file of another tool."),
    ],
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="The scored model; swaps need --data."),
    ],
    budget: BudgetOption = None,
    mixer: MixerOption = None,
    keep: Keep = None,
    replace: Replace = None,
    data: Texts = None,
    no_swaps: NoSwaps = False,
    out: Out = Path("plan.json"),
    export: Export = None,
    seed: Seed = 0,
    sets: Sets = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn scores and a budget into a plan; with --data the choice is verified by swaps."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(
        model,
        sets,
        data=data,
        seed=seed,
        mixer=mixer,
        budget=budget,
        keep=as_units(keep),
        replace=as_units(replace),
        verify_swaps=None if not no_swaps else False,
    )
    found = pipeline.plan_command(
        recipe, scores, out, exports=as_exports(export), force=force, say=terminal.say
    )
    terminal.emit(found, as_json, terminal.plan)
    terminal.next_command(_next.after_plan(recipe, out))


@app.command()
def compare(
    model: Model,
    selectors: Annotated[
        str | None,
        typer.Option(
            "--selectors",
            metavar="NAMES",
            help="Which, such as nll,kl:mode=remove,fisher. All by default.",
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="LIMITS", help="Budgets, parted by commas.")
    ] = "1/8,1/4,1/2",
    granularity: GranularityOption = None,
    mixer: MixerOption = None,
    data: Texts = None,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Draws of selectors that draw.")
    ] = 1,
    max_sets: Annotated[
        int,
        typer.Option(
            "--max-sets", metavar="N", help="Try every set of a budget where there are at most N."
        ),
    ] = 4096,
    no_swaps: NoSwaps = False,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="For the table, page and pictures.")
    ] = Path("compare"),
    family: FamilyOption = None,
    seed: Seed = 0,
    dtype: DType = None,
    sets: Sets = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compare selectors at several budgets: the regret table of a model."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(
        model,
        sets,
        family=family,
        data=data,
        seed=seed,
        dtype=dtype,
        mixer=mixer,
        granularity=granularity,
    )
    with terminal.measuring() as progress:
        found = pipeline.compare_command(
            recipe,
            selectors,
            budgets,
            out,
            seeds=seeds,
            max_sets=max_sets,
            with_swaps=not no_swaps,
            force=force,
            say=terminal.say,
            progress=progress,
        )
    terminal.emit(found, as_json, terminal.comparison)
    terminal.next_command(_next.after_compare(recipe, found, sets))


@app.command()
def align(
    model: Model,
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Folder to write.")],
    mixers: Annotated[
        list[str] | None,
        typer.Option(
            "--mixer",
            metavar="NAME",
            help="What to align to; NAME:KEY=VALUE,... with options. Repeatable.",
        ),
    ] = None,
    data: Texts = None,
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="N", help="How much text, for all of them at once.")
    ] = "100K",
    family: FamilyOption = None,
    seed: Seed = 0,
    dtype: DType = None,
    sets: Sets = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Align every layer to several mixers in one pass, for plans to start from."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(model, [], later=sets, family=family, data=data, seed=seed, dtype=dtype)
    recipe = pipeline.with_stages(recipe, f"align={tokens}", sets or [])
    with terminal.training() as progress:
        found = pipeline.align_command(
            recipe, mixers or [], bank, force=force, say=terminal.say, progress=progress
        )
    terminal.emit(found, as_json, terminal.aligned)
    terminal.next_command(_next.after_align(recipe, bank, found["mixers"]))


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="A plan.json; otherwise score and plan first."),
    ] = None,
    aligned: Annotated[
        Path | None,
        typer.Option(
            "--aligned", metavar="BANK", help="Start the layers from what `morph align` wrote."
        ),
    ] = None,
    selector: Selector = None,
    budget: BudgetOption = None,
    mixer: MixerOption = None,
    granularity: GranularityOption = None,
    keep: Keep = None,
    replace: Replace = None,
    data: Texts = None,
    target: Target = "auto",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Add files that load it by remote code.")
    ] = False,
    no_swaps: NoSwaps = False,
    family: FamilyOption = None,
    seed: Seed = 0,
    dtype: DType = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a hybrid checkpoint, loaded back and compared before it appears."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(
        model,
        sets,
        family=family,
        data=data,
        seed=seed,
        dtype=dtype,
        mixer=mixer,
        selector=selector,
        budget=budget,
        granularity=granularity,
        keep=as_units(keep),
        replace=as_units(replace),
        verify_swaps=None if not no_swaps else False,
    )
    if plan_file is not None:
        refuse_choices(selector, budget, mixer, granularity, keep, replace, sets, no_swaps)
    if dry_run:
        return terminal.emit(pipeline.dry_run(recipe, plan_file), as_json, terminal.plan)
    found = pipeline.convert_command(
        recipe,
        out,
        plan_file=plan_file,
        aligned=aligned,
        target=target,
        with_code=with_code,
        force=force,
        say=terminal.say,
    )
    terminal.emit(found, as_json, terminal.written)
    terminal.next_command(_next.after_convert(recipe, out))


@app.command()
def share(
    hybrid: Annotated[
        str, typer.Argument(metavar="HYBRID", help="A hybrid with shared_routing layers.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    owners: Annotated[
        str,
        typer.Option("--owners", metavar="N", help="Layers that keep an index: 2, 1/4, 25%."),
    ] = "1/4",
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="MODEL", help="Choose by the KL to this, not by the next token."
        ),
    ] = None,
    data: Texts = None,
    family: FamilyOption = None,
    seed: Seed = 0,
    sets: Sets = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Let layers with shared routing follow the index of another, the least missed first."""
    from morph import pipeline

    refuse_mixer(sets)
    recipe = as_recipe(hybrid, sets, family=family, data=data, seed=seed)
    with terminal.measuring() as progress:
        found = pipeline.share_command(
            recipe,
            out,
            owners=owners,
            teacher=teacher,
            force=force,
            say=terminal.say,
            progress=progress,
        )
    following = found.pop("next")
    terminal.emit(found, as_json, terminal.written)
    terminal.next_command(following)


@app.command()
def distill(
    hybrid: Annotated[
        str, typer.Argument(metavar="HYBRID", help="A hybrid that `morph convert` wrote.")
    ],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="MODEL", help="The model it was made of.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Where the distilled hybrid goes."),
    ],
    data: Texts = None,
    stages: Annotated[
        str,
        typer.Option(
            "--stages", metavar="STAGES", help="align, logits and long, each with its tokens."
        ),
    ] = "align=100K,logits=1M",
    target: Target = "auto",
    seed: Seed = 0,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Distil a hybrid from its source, stage by stage; the same command resumes."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(teacher, [], later=sets, data=data, seed=seed)
    recipe = pipeline.with_stages(recipe, stages, sets or [])
    pipeline.check_distill(recipe)
    if dry_run:
        told = pipeline.distill_dry_run(recipe, hybrid, out, force=force)
        return terminal.emit(told, as_json, terminal.pairs)
    with terminal.training() as progress:
        found = pipeline.distill_command(
            recipe, hybrid, out, target=target, force=force, say=terminal.say, progress=progress
        )
    if found is not None:  # of several processes, the first writes
        terminal.emit(found, as_json, terminal.written)
        terminal.next_command(_next.after_convert(recipe, out))


@app.command()
def evaluate(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="MODEL", help="Its source; adds the baselines at its budget."
        ),
    ] = None,
    data: Texts = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="For evaluation.json, the report and pictures."
        ),
    ] = None,
    seed: Seed = 0,
    sets: Sets = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure recall by length and depth, perplexity, cache and speed, beside the baselines."""
    from morph import pipeline
    from morph.pipeline import _next

    recipe = as_recipe(against or model, sets, data=data, seed=seed)
    found = pipeline.evaluate_command(
        recipe, model, source=against, out=out, force=force, say=terminal.say
    )
    terminal.emit(found, as_json, terminal.evaluation)
    terminal.next_command(_next.after_evaluate(recipe, model, against))


_cli_files.add(app)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .yaml file or shipped name.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="For everything that the run makes."),
    ] = None,
    sets: Sets = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Do all of a recipe, from scores to report; the same command resumes."""
    from morph import pipeline
    from morph.recipes import schema

    loaded = schema.load(recipe, sets or [])
    root = schema.folder(recipe)
    if dry_run:
        return terminal.emit(pipeline.dry_run(loaded, root=root), as_json, terminal.pairs)
    with terminal.training() as progress:
        found = pipeline.run(
            loaded, out, root=root, force=force, say=terminal.say, progress=progress
        )
    terminal.emit(found, as_json, terminal.run)
    terminal.next_command(["verify", found["checkpoint"], "--against", found["model"]])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; a user's mistake is one line, no traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None:  # a process of our own: a scheduler's stop is a stop like Ctrl-C
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_guarded(lambda: _call(given)))


def _terminate(number: int, frame: Any) -> None:
    """Stop as at Ctrl-C, and hold back where that is held back."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, as in a background job
        raise KeyboardInterrupt
    handler(number, frame)


def _call(arguments: list[str]) -> int:
    command = parser(app)
    try:
        with command.make_context("morph", list(arguments) or ["--help"]) as context:
            name = next((a for a in arguments if a in command.commands), None)
            if name is not None:
                given_once(command.commands[name], arguments)
                _refuse_several(name, arguments)
            command.invoke(context)
    except typer.Exit as done:
        return int(done.exit_code)
    if "--dry-run" in arguments:
        terminal.next_command([a for a in arguments if a != "--dry-run"])
    return 0


def _refuse_several(name: str, arguments: list[str]) -> None:
    """Raise UsageError for a command that several processes would each do whole."""
    if world() > 1 and (name != "distill" or "--dry-run" in arguments):
        raise UsageError(
            f"morph {name} runs in one process; {world()} were started and would do the same in "
            "each. Start several for `morph distill` only."
        )


def _guarded(call: Callable[[], int]) -> int:
    # typer ships its own copy of click in some versions, and uses the installed one in others
    usage = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        return call()
    except usage as error:
        return terminal.usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return terminal.fail(
            Interrupted("stopped; nothing is half-written. Give the same command again.")
        )
    except MorphError as error:
        return terminal.fail(error)
    except BrokenPipeError:
        return terminal.hung_up()
    except (OSError, MemoryError) as error:
        return terminal.fail(StorageError(f"{type(error).__name__}: {error}"))
    except RuntimeError as error:
        if "home directory" in str(error):  # pathlib's words
            return terminal.fail(
                UsageError("~NAME in a path names nobody's home folder here; ./~NAME is a folder.")
            )
        if "out of memory" in str(error) or "can't allocate memory" in str(error):  # torch's words
            return terminal.fail(StorageError(f"out of memory: {error}"))
        raise
