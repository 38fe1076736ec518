"""Flags that commands share, what they say as a recipe, and the parser with its help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from morph.errors import UsageError, escape

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local checkpoint folder or Hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one value by dotted name, such as mixer.window=512. Repeatable.",
    ),
]
FamilyOption = Annotated[
    str | None,
    typer.Option(
        "--family", metavar="NAME", help="Read the model as this family; see `morph list families`."
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="FILE", help="Text: .txt, .jsonl, .parquet, hub:NAME. Repeatable."
    ),
]
Selector = Annotated[
    str | None,
    typer.Option("--selector", metavar="NAME", help="Who chooses; see `morph list selectors`."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="LIMIT",
        help="Full attention to keep: 7 (layers), 1/4, 25%, or 4096B (cache a token).",
    ),
]
MixerOption = Annotated[
    str | None,
    typer.Option(
        "--mixer", metavar="NAME", help="What replaces attention; see `morph list mixers`."
    ),
]
GranularityOption = Annotated[
    str | None,
    typer.Option("--granularity", metavar="UNIT", help="What is chosen: layer, kv_head or head."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", metavar="UNITS", help="Layers (3) or units (3.1) that stay full. Repeatable."
    ),
]
Replace = Annotated[
    list[str] | None,
    typer.Option(
        "--replace", metavar="UNITS", help="Layers (3) or units (3.1) to replace. Repeatable."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.")]
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="TYPE", help="Compute in float32 (default), bfloat16 or float16."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write.")]
Target = Annotated[
    str, typer.Option("--target", metavar="FORM", help="What to write: auto, stock or package.")
]
Export = Annotated[
    list[str] | None,
    typer.Option(
        "--export",
        metavar="FORMAT=FILE",
        help="Also write for another tool: duo_attention, retrieval_head, swaa, "
        "keep_full_attention_layers. Repeatable.",
    ),
]
NoSwaps = Annotated[bool, typer.Option("--no-swaps", help="Skip the verify-and-swap pass.")]


def parser(app: typer.Typer) -> Any:
    """Return the parser, its help worded so that no `literal` or flag is broken over two lines."""
    group: Any = typer.main.get_command(app)
    for command in [group, *group.commands.values()]:
        command.help = command.short_help = _unbroken(command.help or "")
        for parameter in command.params:
            parameter.help = _unbroken(getattr(parameter, "help", None) or "")
            if parameter.param_type_name == "argument":  # typer's own words vary with its version
                row = (parameter.metavar, parameter.help)
                parameter.get_help_record = lambda context, row=row: row
                parameter.get_usage_pieces = lambda context, row=row: [row[0]]
        command.get_help = lambda context, plain=command.get_help: _broken(plain(context))
    return group


_JOINTS = str.maketrans(" -", "\u00a0\u2011")


def _unbroken(text: str) -> str:
    return re.sub(r"`[^`]+`|\S*-\S*", lambda found: found[0].translate(_JOINTS), text)


def _broken(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2011", "-")


def given_once(command: Any, arguments: Sequence[str]) -> None:
    """Refuse an option that is given twice, of which all but the last would be ignored."""
    given = [a.partition("=")[0] for a in arguments]
    for parameter in command.params:
        for flag in parameter.opts:
            if flag.startswith("--") and not parameter.multiple and given.count(flag) > 1:
                raise UsageError(f"{flag} is given {given.count(flag)} times; give it once.")


def as_recipe(
    model: str,
    sets: list[str] | None,
    *,
    family: str | None = None,
    data: list[str] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    mixer: str | None = None,
    later: list[str] | None = None,
    **select: Any,
) -> Any:
    """Return the Recipe that flags describe, `--set` applied last.

    `later` are those that the command applies itself; they may not contradict a flag either.
    """
    from morph.recipes import schema

    raw: dict[str, Any] = {"model": model, "seed": seed, "select": {}, "mixer": {}}
    raw |= {k: v for k, v in {"family": family, "dtype": dtype}.items() if v is not None}
    if data:
        raw["data"] = {"text": list(data)}
    if mixer:
        raw["mixer"]["name"] = mixer
    raw["select"] = {k: v for k, v in select.items() if v is not None}
    _said_once(raw, [*(sets or []), *(later or [])])
    now = [text for text in later or () if not text.strip().startswith("distill")]
    return schema.from_data(schema.apply_sets(raw, [*(sets or []), *now]), "command line")


def _said_once(raw: dict[str, Any], sets: list[str]) -> None:
    """Refuse a `--set` of what a flag says already: two limits at once are a contradiction."""
    for text in sets:
        section, _, key = text.partition("=")[0].strip().rpartition(".")
        said = raw.get(section) if section else raw
        if key != "seed" and isinstance(said, dict) and key in said:
            raise UsageError(f"--set {text}: a flag says this already; give one of the two.")


def as_units(pins: list[str] | None) -> list[Any] | None:
    """Return `3` and `3.1,4` as layers and (layer, unit) pairs for the recipe to check."""
    if not pins:
        return None
    try:
        parts = [[int(x) for x in p.split(".")] for text in pins for p in text.split(",")]
    except ValueError as error:
        raise UsageError(f"a layer (3) or layer.unit (3.1) was expected: {error}.") from error
    return [p[0] if len(p) == 1 else p for p in parts]


def as_exports(given: list[str] | None) -> dict[str, Path]:
    """Return `format=file` texts as paths by format."""
    from morph.errors import UnknownName, nearest
    from morph.exchange import FORMATS

    found: dict[str, Path] = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UsageError(f"--export {escape(text)!r}: give FORMAT=FILE.")
        if name not in FORMATS:
            raise UnknownName(
                f"--export: {escape(name)!r} is no format.{nearest(name, FORMATS)} "
                f"There are: {', '.join(FORMATS)}."
            )
        if name in found:
            raise UsageError(f"--export: {name} is given twice.")
        found[name] = Path(path)
    return found


def refuse_mixer(sets: list[str] | None) -> None:
    """Refuse settings of a mixer, where the model has its mixers already."""
    for one in sets or ():
        name = one.partition("=")[0].strip()
        if name.split(".")[0] == "mixer":
            raise UsageError(
                f"--set {escape(name, 60)}: the hybrid's mixers are what they are. Leave it out, "
                "or convert again to change one."
            )


def refuse_choices(*given: Any) -> None:
    """Refuse flags that choose, where a plan has chosen."""
    if any(given):
        raise UsageError(
            "--plan says which layers are replaced, and by what: leave out --selector, --budget, "
            "--mixer, --granularity, --keep, --replace, --no-swaps and --set, or leave out --plan."
        )
