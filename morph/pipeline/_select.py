"""Score layers or heads, and turn scores and a budget into a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from morph import plan as planning
from morph import registry, selection
from morph.errors import MismatchError, PlanError, UsageError, escape
from morph.pipeline import _data, _reach
from morph.pipeline._source import Say, Source, quiet
from morph.plan import Budget, Granularity, Plan, Scores
from morph.recipes.schema import Mixer, Select

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


def budget_of(section: Select) -> Budget:
    """Return the Budget of a select section; raise PlanError where it contradicts itself."""
    return Budget.parse(
        section.budget,
        keep=section.keep,
        replace=section.replace,
        min_full_per_layer=section.min_full_per_layer,
    )


def with_length(section: Select, mixer: Mixer, source: Source) -> Select:
    """Return the section with `seq_len` filled in: longer than what the mixer sees, in context."""
    if section.seq_len is not None:
        return section
    seen = _reach.sees(mixer.name, mixer.options) or 0
    config = {**source.family.defaults, **source.checkpoint.config}
    context = int(config.get("max_position_embeddings") or 2**31)
    return replace(section, seq_len=min(max(512, 2 * seen), context))


def blank(
    source: Source, granularity: Granularity, provenance: Mapping[str, Any] | None = None
) -> Scores:
    """Return scores of zero, to find out what real ones would do."""
    row = (0.0,) * source.geometry.units(granularity)
    return Scores(
        selector="none",
        model_type=source.family.model_type,
        granularity=granularity,
        values=(row,) * source.geometry.num_hidden_layers,
        unit="none",
        provenance=provenance or {},
    )


def kept_count(source: Source, section: Select) -> int:
    """Return how many units the budget keeps; raise PlanError where the model cannot meet it."""
    nothing = blank(source, section.granularity)
    return len(selection.choose_units(nothing, budget_of(section), geometry=source.geometry))


def make_plan(
    scores: Scores,
    section: Select,
    mixer: Mixer,
    source: Source,
    *,
    corpus: _data.Corpus | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    dtype: str = "float32",
    work: Path | None = None,
    say: Say = quiet,
) -> tuple[Plan, dict[str, Any]]:
    """Return (plan, what the swap pass did) for scores under the budget of `section`.

    With a corpus, and unless `section.verify_swaps` is off, the chosen set is improved by single
    swaps until none lowers the answer loss. `work` is the folder that keeps aligned mixers.
    """
    from morph import surgery
    from morph.pipeline import _align

    section = with_length(section, mixer, source)
    budget = budget_of(section)
    _check_scores(scores, source)
    keep = selection.choose_units(scores, budget, geometry=source.geometry)
    heads = tuple(range(source.geometry.num_attention_heads))
    group = planning.HeadGroup(mixer=mixer.name, heads=heads, options=mixer.options)
    options, cache = surgery.group_cost(group, source.geometry, source.geometry.candidates[0])
    for warning in [
        *_mismatches(scores, mixer.name, options, len(keep)),
        *_below_floor(scores, budget),
    ]:
        say(f"warning: {warning}")
    report: dict[str, Any] = {}
    chosen_blindly = scores.selector in ("uniform", "random")
    if section.verify_swaps and corpus is not None and not chosen_blindly:
        from morph.selectors import _common

        batches = _data.calibration(section, corpus, source.tokenizer(), seed)
        width = source.geometry.units(scores.granularity)
        model = model if model is not None else source.model(dtype)
        say("verifying the choice by single swaps")
        with _align.probing(
            source, model, mixer, section, corpus, seed=seed, work=work, say=say
        ) as probe:
            keep, report = _common.verify_and_swap(
                probe,
                [batch.on(probe.device) for batch in batches],
                keep,
                scores.granularity,
                pinned=_pinned(budget.keep, width),
                barred=_pinned(budget.replace, width),
                min_full_per_layer=budget.min_full_per_layer,
                promise=lambda kept: selection.swap_gain(scores, kept, source.geometry),
                tries=section.swap_tries,
                progress=say,
            )
    plan = selection.plan_of_units(
        scores,
        keep,
        geometry=source.geometry,
        mixer=mixer.name,
        options=options,
        cache=cache,
    )
    return surgery.resolve_costs(dressed(plan, mixer)), report


def dressed(plan: Plan, mixer: Mixer) -> Plan:
    """Return the plan with the recipe's mixer for what is kept, and its fusion of heads.

    Layers that slide in the source stay as they are.
    """
    if mixer.kept == "full" and mixer.fusion == "none":
        return plan
    _check_kept(plan, mixer)
    layers = []
    for layer, window in zip(plan.layers, plan.geometry.windows):
        groups = layer.groups
        if window is None and mixer.kept != "full":
            groups = tuple(
                replace(g, mixer=mixer.kept, options=dict(mixer.kept_options), cache=None)
                if g.mixer == "full"
                else g
                for g in groups
            )
        fusion = mixer.fusion if any(g.mixer != "full" for g in groups) else "none"
        layers.append(planning.LayerPlan(groups=groups, fusion=fusion))
    return replace(plan, layers=tuple(layers))


def _check_kept(plan: Plan, mixer: Mixer) -> None:
    """Raise UsageError unless the mixer of what is kept keeps every token."""
    from morph import surgery

    heads = tuple(range(plan.geometry.num_attention_heads))
    group = planning.HeadGroup(mixer=mixer.kept, heads=heads, options=mixer.kept_options)
    _, cost = surgery.group_cost(group, plan.geometry, plan.geometry.candidates[0])
    if cost.tokens is not None:
        raise UsageError(
            f"mixer.kept is {escape(mixer.kept)!r}, which does not keep every token; what the "
            "budget keeps stays 'full', or 'nope' (attention without positions)."
        )


def _below_floor(scores: Scores, budget: Budget) -> list[str]:
    """Return that a method wants more full heads in every layer than the budget asks for."""
    wanted = scores.provenance.get("min_full_per_layer")
    if scores.granularity == "layer" or not isinstance(wanted, int):
        return []
    if wanted <= budget.min_full_per_layer:
        return []
    return [
        f"{escape(scores.selector)} keeps at least {wanted} full in every layer; give "
        f"--set select.min_full_per_layer={wanted} to do so."
    ]


def _mismatches(scores: Scores, mixer: str, options: Mapping[str, Any], count: int) -> list[str]:
    """Return what the scores were measured for that differs from what the plan will be."""
    found, how, again = [], scores.provenance, "Score again for this plan."
    chosen, scored = (_mapping(how.get(key)) for key in ("selector_options", "mixer_options"))
    placed = chosen.get("count") if chosen.get("mode", "greedy") == "greedy" else None
    placed = how.get("placed", placed)
    if placed not in (None, count):
        found.append(f"{scores.selector} placed {placed} units, the budget keeps {count}. {again}")
    if scores.selector not in ("uniform", "random") and "mixer" in how:
        differ = [k for k, v in options.items() if scored.get(k, v) != v]
        a, b = (" ".join(f"{k}={x[k]}" for k in differ) for x in (scored, options))
        if how["mixer"] != mixer:
            found.append(f"the scores were measured with {how['mixer']}, not {mixer}. {again}")
        elif differ:
            found.append(f"the scores were measured with {a}, the plan has {b}. {again}")
    window = how.get("window")
    if window not in (None, options.get("window")):
        found.append(
            f"the file is for a window of {window}, the plan has {options.get('window')}. "
            f"Give --set mixer.window={window}."
        )
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _check_scores(scores: Scores, source: Source) -> None:
    """Raise MismatchError where scores were measured on another model."""
    if scores.model_type != source.family.model_type:
        raise MismatchError(
            f"the scores are of a {escape(scores.model_type)}, the model is a "
            f"{source.family.model_type}. Score this model first."
        )
    scored = scores.provenance.get("model_sha256")
    if scored is not None and scored != source.checkpoint.fingerprint:
        raise MismatchError(
            f"the scores are of another model ({escape(scores.provenance.get('model'))}) than "
            f"{source.path}: weights or config differ. Score this model first."
        )


def check_plan(plan: Plan, source: Source) -> None:
    """Raise MismatchError naming the first thing in which plan and source differ."""
    if plan.model_type != source.family.model_type:
        raise MismatchError(
            f"the plan is for a {escape(plan.model_type)}, the model is a "
            f"{source.family.model_type}."
        )
    for field in fields(plan.geometry):
        wanted, found = getattr(plan.geometry, field.name), getattr(source.geometry, field.name)
        if wanted != found:
            raise MismatchError(
                f"the plan is for another model: its {field.name} is {wanted}, the model's {found}."
            )


def _pinned(pins: Sequence[Any], width: int) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for pin in pins:
        found |= {pin} if isinstance(pin, tuple) else {(pin, u) for u in range(width)}
    return found


def baseline(source: Source, mixer: Mixer, count: int, name: str) -> Plan:
    """Return the plan of a baseline: `uniform` keeps `count` layers, `window` keeps none."""
    from morph import surgery
    from morph.selectors import uniform

    found = source.geometry.candidates
    full: list[int] = []
    if name == "uniform":
        full = [found[i] for i in sorted(uniform.positions(len(found), count, "last"))]
    plan = planning.uniform_plan(
        source.family.model_type, source.geometry, full, mixer.name, mixer.options, None
    )
    return surgery.resolve_costs(dressed(plan, mixer))


def read_plan(path: str | Path, named: Iterable[str] = ()) -> Plan:
    """Read a plan.json; raise PlanError naming what is wrong in it.

    A file may not choose what is imported: mixers from outside must be imported already, or be
    `named` by the user. Raises CheckpointError otherwise.
    """
    found = _loaded(planning.loads_plan, path)
    outside = [m for m in found.mixers if ("." in m or ":" in m) and m not in set(named)]
    registry.refuse_imports("mixers", outside, escape(path))  # no other name is ever imported
    return found


def read_scores(path: str | Path, source: Source | None = None) -> Scores:
    """Read a scores.json, or, for a `source`, a file of another tool; see `exchange`.

    Raises PlanError naming what is wrong in it, MismatchError for scores of another model.
    """
    if source is None:
        return _loaded(planning.loads_scores, path)
    from morph import exchange

    try:
        return exchange.read(path, source.geometry, source.family.model_type)
    except PlanError:
        with suppress(PlanError):  # ours, of another model: that says more than its shape
            _check_scores(_loaded(planning.loads_scores, path), source)
        raise


def _loaded(loads: Callable[[str, str], T], path: str | Path) -> T:
    text, where = _text(path), escape(path)
    try:
        return loads(text, where)
    except PlanError as error:  # what is wrong inside a value does not know its file
        if str(error).startswith(where):
            raise
        raise PlanError(f"{where}: {error}") from error


def _text(path: str | Path) -> str:
    from morph import exchange

    try:
        return exchange.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{escape(path)}: cannot be read ({error}).") from error


def provenance_of(scores: Scores | None, swaps: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the card and report say about how the plan was chosen."""
    if scores is None:
        return {}
    return {
        "selector": scores.selector,
        "granularity": scores.granularity,
        "scores_sha256": scores.digest,
        **({"swaps": dict(swaps)} if swaps else {}),
    }
