"""From a source checkpoint and a plan to a written, re-loaded and compared hybrid."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from morph import checkpoint, strict
from morph import plan as planning
from morph.errors import UsageError, escape
from morph.families import _stock
from morph.families._family import Move, StockTarget
from morph.pipeline import _verify
from morph.pipeline._select import check_plan
from morph.pipeline._source import Say, Source, quiet, refuse_hybrid, refuse_nonfinite
from morph.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

Target = Literal["auto", "stock", "package"]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> (dtype, shape, bytes)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `convert` wrote and what was checked about it."""

    path: Path
    format: str  # stock model type, or the morph_ type
    pattern: str
    serve: str
    load: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what the user of a stock checkpoint must know
    verification: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def convert(
    source: Source,
    plan: Plan,
    out: str | Path,
    *,
    target: Target = "auto",
    force: bool = False,
    with_code: bool = False,
    student: nn.Module | None = None,
    provenance: Mapping[str, Any] | None = None,
    card: str = "",
    say: Say = quiet,
) -> Written:
    """Write the hybrid that `plan` makes of `source` to `out`, verified before it appears.

    Untouched tensors are copied byte for byte. A plan that a stock architecture can hold becomes a
    stock checkpoint unless `target` is `package`; with `target` `stock` anything else is an error.
    `student` is a distilled hybrid whose changed tensors replace the source's. `with_code` adds
    the files that load a package checkpoint by remote code. Raises MismatchError where plan and
    source differ, VerificationFailed where the loaded result is not what it should be.
    """
    from morph import modeling, surgery

    start = time.perf_counter()
    refuse_hybrid(source, "convert")
    check_plan(plan, source)
    if not plan.replaced_layers:
        raise UsageError("the plan replaces nothing: every layer stays full. Nothing to convert.")
    checkpoint.check_output(Path(out), [source.path], force)
    refuse_nonfinite(source)
    plan = surgery.resolve_costs(plan)
    stock, reasons = find_target(source, plan, target)
    if with_code and stock is not None:
        raise UsageError(f"--with-code: a stock {stock.model_type} checkpoint needs no code.")
    if student is None and surgery.own_parameter_names(source.family, plan):
        # so that what is compared has the values that are stored, rounding included
        student = modeling.hybrid(source.model(_verify.compute_dtype(source, None)), plan)
    new, replaced = _tensors(source, student)
    names = tuple(sorted({*source.checkpoint.tensors, *new}))
    config = _config(source, plan, stock)
    given = {**new, **replaced}
    moves, dropped = mapping(source, plan, stock, names)
    notes = _notes(source, plan, stock, given)
    for note in notes:
        say(f"note: {note}")
    serve = _serve(stock, shlex.quote(str(out)), with_code)
    verdict: dict[str, Any] = {}

    def check(staged: Path) -> None:
        say("verifying: loading it in a fresh process, comparing tensors, layers and logits")
        verdict.update(
            _verify.load_and_compare(
                source, plan, staged, stock, moves, set(given), student, with_code, dropped
            )
        )

    extra: dict[str, bytes] = {}
    auto_map: dict[str, str] | None = None
    if with_code:
        from morph.pipeline import _remote

        extra, auto_map = _remote.files(source.family, config), _remote.auto_map(source.family)
    summary = {
        "plan": strict.plain(plan),
        "pattern": plan.pattern,
        "format": config["model_type"],
        "source": {"name": source.path.name, "sha256": source.checkpoint.fingerprint},
        "provenance": strict.plain(dict(provenance or {})),
        "serve": _serve(stock, "{path}", with_code),  # same inputs, same bytes, wherever
        **({"notes": notes} if notes else {}),
    }
    card = card or _card(source, plan, config, stock, [*reasons, *notes], with_code)
    extra["README.md"] = card.encode()
    say(f"writing {config['model_type']} checkpoint {escape(out)}")
    checkpoint.write_checkpoint(
        Path(out),
        config=config,
        source=source.checkpoint,
        moves=moves,
        dropped=dropped,
        given=given,
        extra_files=extra,
        auto_map=auto_map,
        provenance=summary,
        force=force,
        verify=check,
    )
    return Written(
        path=Path(out),
        format=config["model_type"],
        pattern=plan.pattern,
        serve=serve,
        load=_load_line(stock, out, with_code),
        reasons=tuple(reasons),
        notes=tuple(notes),
        verification=verdict,
        seconds=time.perf_counter() - start,
    )


def find_target(source: Source, plan: Plan, target: Target) -> tuple[StockTarget | None, list[str]]:
    """Return the stock architecture that holds the plan, or None and the reasons against each."""
    if target == "package":
        return None, ["a package checkpoint was asked for."]
    stock, reasons = _stock.pick(source.family, source.checkpoint.config, plan)
    if stock is None and target == "stock":
        raise UsageError(
            f"no stock architecture can hold this plan: {' '.join(reasons)} "
            "Use --target package, or change the plan."
        )
    return stock, [] if stock else reasons


def mapping(
    source: Source, plan: Plan, stock: StockTarget | None, names: tuple[str, ...]
) -> tuple[list[Move] | None, dict[str, str]]:
    """Return the target's moves (None: all tensors stay), and what it leaves out, with reasons."""
    if stock is None:
        return None, {}
    config = source.checkpoint.config
    moves = stock.moves(config, plan, names) if stock.moves else None
    return moves, stock.dropped(config, plan, names) if stock.dropped else {}


def as_source(source: Source, plan: Plan, given: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
    """Return the tensors of a written checkpoint, float32, under source names: moves undone.

    What was computed comes back as numbers that make the same function.
    """
    import numpy as np

    from morph import surgery

    stock = None
    if not str(given.config.get("model_type", "")).startswith("morph_"):
        stock, _ = _stock.pick(source.family, source.checkpoint.config, plan)
    if stock is None or stock.moves is None:
        return {n: given.read_float(n) for n in given.tensors}
    names = (*source.checkpoint.tensors, *surgery.own_parameter_names(source.family, plan))
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for move in stock.moves(source.checkpoint.config, plan, tuple(sorted({*names}))):
        if move.source is not None:
            first = move.rows[0] if move.rows else 0
            parts.setdefault(move.source, []).append((first, given.read_float(move.target)))
    found = {}
    for name, rows in parts.items():
        ordered = {first: array for first, array in sorted(rows, key=lambda r: r[0])}
        found[name] = np.concatenate([*ordered.values()])
    if stock.undo is not None:
        found |= stock.undo(source.checkpoint.config, plan, given.read_float)
    return found


def _notes(source: Source, plan: Plan, stock: StockTarget | None, given: Tensors) -> list[str]:
    """Return what the user of a stock checkpoint must know."""
    import numpy as np

    def read(name: str) -> np.ndarray:
        if name not in given:
            return source.checkpoint.read_float(name)
        code, shape, data = given[name]
        flat = np.frombuffer(data, {"BF16": "<u2", "F16": "<f2", "F64": "<f8"}.get(code, "<f4"))
        return checkpoint.to_float(code, flat.reshape(shape))

    if stock is None or stock.notes is None:
        return []
    return stock.notes(source.checkpoint.config, plan, read)


def _config(source: Source, plan: Plan, stock: StockTarget | None) -> dict[str, Any]:
    config = dict(source.checkpoint.config)
    if stock is not None:
        return stock.config(config, plan)
    family = source.family
    config["model_type"] = f"morph_{family.model_type}"
    config["architectures"] = [f"Morph{family.causal_class}"]
    config["morph"] = {"plan": strict.plain(plan)}
    return config


def _tensors(source: Source, student: nn.Module | None) -> tuple[Tensors, Tensors]:
    """Return (new tensors, replaced tensors): mixers' own, and those that training changed."""
    from morph import surgery

    if student is None:
        return {}, {}
    changed = trained_names(student)
    code = source.checkpoint.main_dtype
    own = {name for name, _ in surgery.mixer_parameters(student)}
    parameters = dict(student.named_parameters(remove_duplicate=False))
    new = {n: _bytes(parameters[n], code) for n in sorted(own)}
    replaced = {
        n: _bytes(parameters[n], source.checkpoint.tensors[n].dtype) for n in sorted(changed - own)
    }
    return new, replaced


def trained_names(student: nn.Module) -> set[str]:
    """Return the names of parameters that distillation un-shared from the teacher."""
    return set(getattr(student, "morph_trained", ()))


def _bytes(tensor: Any, code: str) -> tuple[str, tuple[int, ...], bytes]:
    """Return a tensor as (safetensors dtype, shape, bytes), rounded once, in memory too."""
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    dtype = dtypes.get(code, torch.bfloat16)
    with torch.no_grad():
        tensor.copy_(tensor.to(dtype))  # what is in memory is now what is stored
    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    code = code if code in dtypes else "BF16"
    return code, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _serve(stock: StockTarget | None, path: str, with_code: bool) -> str:
    if stock is not None:
        return stock.serve.format(path=path)
    how = "trust_remote_code=True" if with_code else "import morph"
    return f"no server runs this plan yet; load it in Python with `{how}`"


def _load_line(stock: StockTarget | None, out: str | Path, with_code: bool) -> str:
    start = "" if stock is not None or with_code else "import morph; "
    trust = ", trust_remote_code=True" if with_code else ""
    return (
        f"{start}from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}{trust})"
    )


def _card(
    source: Source,
    plan: Plan,
    config: Mapping[str, Any],
    stock: StockTarget | None,
    reasons: list[str],
    with_code: bool,
) -> str:
    """Return the model card: what was changed, how to load and serve it."""
    rows = "\n".join(
        f"| {n // 1024}K | {planning.full_plan(plan.model_type, plan.geometry).cache_bytes(n):,} "
        f"| {plan.cache_bytes(n):,} |"
        for n in (1024, 32768, 131072)
    )
    name, serve = escape(source.path.name), _serve(stock, "PATH_TO_THIS_FOLDER", with_code)
    serve = f"`{serve}`" if stock is not None else serve
    about = "Note:" if stock is not None else "Why not a stock architecture:"
    why = f"\n\n{about} {' '.join(reasons)}" if reasons else ""
    load = "" if not config["model_type"].startswith("morph_") else "import morph\n"
    load, trust = ("", ", trust_remote_code=True") if with_code else (load, "")
    return (
        f"# Hybrid of {name}\n\n"
        f"Made by morph from `{name}` (model type `{source.family.model_type}`). "
        f"Attention per layer, {_legend(plan)}:\n\n"
        f"    {plan.pattern}\n\n"
        f"Saved as `{config['model_type']}`.{why}\n\n"
        "| tokens | cache of the source, bytes (16 bit) | cache of the hybrid |\n|---|---|---|\n"
        f"{rows}\n\n"
        f"```python\n{load}from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER"{trust})\n```\n\n'
        f"Serving: {serve}\n"
    )


def _legend(plan: Plan) -> str:
    """Return what the letters of a plan's pattern mean."""
    parts = [f"{letter} {escape(mixer)}" for mixer, letter in plan.letters.items()]
    return ", ".join(["F full", *parts, "* heads of several kinds"])


def probe_ids(source: Source, plan: Plan) -> np.ndarray:
    """Return the token ids `[1, T]` that verification runs: long enough to leave every window.

    And what a mixer that reads a part of the past reads as the source does.
    """
    import numpy as np

    from morph.surgery import exact_prefix

    groups = [g for x in plan.layers for g in x.groups if g.mixer != "full"]
    windows = [g.cache.tokens for g in groups if g.cache and g.cache.tokens]
    windows += [n for n in map(exact_prefix, groups) if n < sys.maxsize]
    config = {**source.family.defaults, **source.checkpoint.config}
    limit = int(config.get("max_position_embeddings") or 2048)
    length = max(16, min(max([48, *(2 * w for w in windows)]), limit, 4096))
    vocab = config["vocab_size"]
    return np.random.default_rng(0).integers(0, vocab, size=(1, length))
