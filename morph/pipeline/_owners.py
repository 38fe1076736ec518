"""`morph share`: choose which layers of a hybrid keep an index of their own, and write it so."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import __version__, checkpoint, strict
from morph.errors import DataError, MismatchError, UsageError, escape
from morph.pipeline._source import Say, Source, open_source, quiet
from morph.plan import Plan
from morph.recipes.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

    from morph.surgery import Batch, Owners


def share_command(
    recipe: Recipe,
    out: Path,
    *,
    owners: str = "1/4",
    teacher: str | None = None,
    force: bool = False,
    say: Say = quiet,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the hybrid `recipe.model` with indexes in some of its shared-routing layers only.

    `owners` is a count (`2`) or a share (`1/4`, `25%`) of these layers. They are chosen by the loss
    on the recipe's text (`surgery.choose_owners`): `select.examples` texts of `select.seq_len`
    tokens, by the KL to `teacher` where that is given. What was measured waits in OUT.partial; the
    same command goes on from there. Every tensor but those of dropped indexes stays as it is.
    Returns what was written and verified, and as `next` the command to go on with. Raises
    UsageError for a count that cannot be had, MismatchError for a model without shared routing,
    VerificationFailed.
    """
    from morph import surgery
    from morph.pipeline import _next, _stages, _verify

    start = time.perf_counter()
    source = open_source(recipe.model, recipe.family)
    plan = _plan_of(source)
    wanted = count_of(owners, len(surgery.sharing(plan)))
    checkpoint.check_output(out, [source.path], force)
    given = open_source(teacher) if teacher is not None else None
    batches = _batches(recipe, source, plan)
    dtype = _verify.compute_dtype(source, None)
    model = source.model(dtype)
    told = _stages.record_of(source.path)
    if given is not None:
        _check_teacher(source, given, told)
    facts = _facts(source, given, batches)
    partial = out.with_name(f"{out.name}.partial")
    memo = surgery.Memo(partial, _digest(facts))
    if len(memo):
        say(f"going on from {escape(partial)}: {len(memo)} measurements are at hand")
    if wanted < len(surgery.sharing(plan)):  # else it is refused
        say(f"choosing {wanted} of {len(surgery.sharing(plan))} layers to keep an index")
    found = surgery.choose_owners(
        model,
        plan,
        batches,
        wanted,
        teacher=None if given is None else given.model(dtype),
        memo=memo,
        progress=progress,
    )
    _tell(found, say)
    surgery.follow(model, found.plan)
    verdict = _write(source, plan, found, model, out, told, facts, force, say)
    memo.clear()
    following = ["distill", str(out), "--teacher", teacher, "--out", f"{out}-trained"]
    if teacher is None:
        following = ["evaluate", str(out)]
    return {
        **_result(out, source, found, verdict),
        "seconds": round(time.perf_counter() - start, 1),
        "next": [*following, *_next.flags(data=recipe.data.text)],
    }


def count_of(text: str, layers: int) -> int:
    """Return the count that `2`, `1/4`, `0.25` or `25%` of so many layers is, 1 at least.

    Raises UsageError for anything else.
    """
    from morph import plan as planning
    from morph.errors import PlanError

    try:
        budget = planning.Budget.parse(text)
    except PlanError:
        budget = planning.Budget(cache_bytes_per_token=1)
    if budget.full_layers is not None:
        return budget.full_layers
    if budget.full_fraction is not None:
        return max(1, int(layers * budget.full_fraction + 1e-9))
    raise UsageError(
        f"--owners {escape(text, 60)!r} is not understood. Give layers (2) or a share of those "
        "with shared routing (1/4, 0.25, 25%)."
    )


def _plan_of(source: Source) -> Plan:
    """Return the plan of a package checkpoint that shares an index, or could."""
    from morph import modeling, surgery

    if not source.is_hybrid:
        raise MismatchError(
            f"{escape(source.path)} is no hybrid with shared routing; convert it with --mixer "
            "shared_routing first."
        )
    plan = modeling.plan_of(source.config())
    if not surgery.sharing(plan):
        raise MismatchError(
            f"{escape(source.path)}: no layer has shared routing (pattern {escape(plan.pattern)}); "
            "there is no index to share. Convert with --mixer shared_routing first."
        )
    return plan


def _batches(recipe: Recipe, source: Source, plan: Plan) -> list[Batch]:
    """Return texts whose every token counts, longer than what is read of them."""
    from morph import surgery
    from morph.pipeline import _data

    corpus = _data.corpus(recipe.data, source.tokenizer(), seed=recipe.seed)
    groups = [g for i in surgery.sharing(plan) for g in plan.layers[i].groups]
    groups = [g for g in groups if g.mixer == "shared_routing"]
    k = max(int(g.options["k"]) for g in groups)
    context = int(source.checkpoint.config.get("max_position_embeddings") or 2**31)
    length = recipe.select.seq_len or min(max(512, 2 * k), context, 4096)
    if len(corpus.train) < length:
        raise DataError(
            f"the text has {len(corpus.train)} tokens; one example has {length}. Give more text, "
            "or set select.seq_len."
        )
    whole = min(map(surgery.exact_prefix, groups))
    if length <= whole:
        raise UsageError(
            f"texts of {length} tokens are read whole, whatever index chooses (k is {k}): no loss "
            f"would tell layers apart. Set select.seq_len above {whole}, or convert with a smaller "
            "mixer.k."
        )
    section = replace(recipe.select, task="text", seq_len=length)
    return _data.calibration(section, corpus, source.tokenizer(), recipe.seed, batch_size=4)


def _check_teacher(source: Source, teacher: Source, told: Mapping[str, Any]) -> None:
    """Raise MismatchError where a teacher is not the model that the hybrid was made of."""
    made_of = told.get("source")
    theirs = teacher.checkpoint.fingerprint
    if isinstance(made_of, dict) and made_of.get("sha256") != theirs:
        raise MismatchError(
            f"{escape(source.path)} was made of another model ({escape(made_of.get('name'))}) than "
            f"{escape(teacher.path)}: weights or config differ."
        )


def _facts(source: Source, teacher: Source | None, batches: list[Batch]) -> dict[str, Any]:
    """Return what the losses depend on."""
    from morph.pipeline import _score

    return {
        "morph": __version__,
        "model_sha256": source.checkpoint.fingerprint,
        "teacher_sha256": None if teacher is None else teacher.checkpoint.fingerprint,
        "data_sha256": _score.data_digest(batches),
        "tokens": sum(batch.ids.numel() for batch in batches),
    }


def _digest(facts: Mapping[str, Any]) -> str:
    from morph.pipeline import _score

    return _score.digest(facts)


def _tell(found: Owners, say: Say) -> None:
    say(f"loss ({found.loss}, nats a token) with every index: {found.start:.4f}")
    for drop in found.drops:
        say(f"layer {drop.layer} follows layer {drop.owner}: {drop.loss:.4f}")


def _write(
    source: Source,
    plan: Plan,
    found: Owners,
    model: nn.Module,
    out: Path,
    told: Mapping[str, Any],
    facts: Mapping[str, Any],
    force: bool,
    say: Say,
) -> dict[str, Any]:
    """Write and verify the checkpoint; return what verification found."""
    from morph import surgery
    from morph.pipeline import _convert, _verify

    kept = set(surgery.own_parameter_names(source.family, found.plan))
    gone = set(surgery.own_parameter_names(source.family, plan)) - kept
    dropped = {n: "its layer follows the index of an earlier one" for n in sorted(gone)}
    if source.checkpoint.dropped_keys:
        say(
            "note: the code files of the hybrid are not copied; load the result with `import morph`"
        )
    verdict: dict[str, Any] = {}

    def check(staged: Path) -> None:
        say("verifying: loading it in a fresh process, comparing tensors, layers and logits")
        verdict.update(
            _verify.load_and_compare(
                source, found.plan, staged, None, None, set(), model, dropped=dropped
            )
        )

    config = {**source.checkpoint.config, "morph": {"plan": strict.plain(found.plan)}}
    before = told.get("provenance")
    provenance = {**(before if isinstance(before, dict) else {}), "owners": _story(found, facts)}
    summary = {
        **{k: v for k, v in told.items() if k in ("source", "notes", "format")},
        "plan": strict.plain(found.plan),
        "pattern": found.plan.pattern,
        "provenance": provenance,
        "serve": _convert._serve(None, "{path}", False),
    }
    say(f"writing {escape(out)}")
    checkpoint.write_checkpoint(
        out,
        config=config,
        source=source.checkpoint,
        dropped=dropped,
        extra_files={"README.md": _card(source, plan, found).encode()},
        provenance=summary,
        force=force,
        verify=check,
    )
    return verdict


def _story(found: Owners, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **facts,
        "loss": found.loss,
        "start": found.start,
        "owners": list(found.owners),
        "drops": [
            {"layer": d.layer, "follows": d.owner, "loss": d.loss, "tried": _texts(d.tried)}
            for d in found.drops
        ],
    }


def _texts(tried: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): loss for layer, loss in tried.items()}


def _card(source: Source, plan: Plan, found: Owners) -> str:
    """Return the hybrid's card, and below it who has an index."""
    from morph.pipeline import _convert

    card = _convert._card(source, found.plan, {"model_type": "morph_"}, None, [], False)
    rows = "\n".join(f"| {d.layer} | {d.owner} | {d.loss:.4f} |" for d in found.drops)
    owners = ", ".join(map(str, found.owners))
    return (
        f"{card}\n## Who has an index\n\nLayers {owners}. The others with shared routing follow; "
        f"they were chosen one by one by the loss ({found.loss}, nats a token), which was "
        f"{found.start:.4f} with every index.\n\n| layer | follows | loss then |\n|---|---|---|\n"
        f"{rows}\n"
    )


def _result(out: Path, source: Source, found: Owners, verdict: Mapping[str, Any]) -> dict[str, Any]:
    from morph.pipeline import _convert
    from morph.pipeline._choosing import describe

    return {
        "wrote": str(out),
        "format": source.checkpoint.config["model_type"],
        "owners": list(found.owners),
        "loss": f"{found.loss} {found.start:.4f} -> {found.drops[-1].loss:.4f} nats a token",
        **describe(found.plan),
        "verification": dict(verdict),
        "load": _convert._load_line(None, out, False),
        "serve": _convert._serve(None, str(out), False),
    }
