"""What values of a recipe mean together: shares of a whole, and pairs that exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from morph import strict
from morph.errors import RecipeError, escape


def shares_as_tokens(data: Any, asked: bool) -> Any:
    """Return the data with `tokens` where stages have a `share` of `training.tokens`.

    `asked`: somebody set the whole, so that a stage must have a share of it.
    """
    raw = data.get("distill") if isinstance(data, Mapping) else None
    stages = list(raw) if isinstance(raw, (list, tuple)) else []
    shares = {
        i: strict.convert(float, stage["share"], f"distill[{i}].share")
        for i, stage in enumerate(stages)
        if isinstance(stage, Mapping) and stage.get("share") is not None
    }
    section = data.get("training") if isinstance(data, Mapping) else None
    whole = section.get("tokens") if isinstance(section, Mapping) else None
    if not shares and asked and whole is not None:
        raise RecipeError(
            "training.tokens: no stage has a share of it; set the tokens of the stages, such as "
            "distill.0.tokens."
        )
    for i, share in shares.items():
        where = f"distill[{i}].share"
        if stages[i].get("tokens") is not None:
            raise RecipeError(
                f"{where}: the stage has tokens too; give one of the two (a share of null is none)."
            )
        if not 0 < share <= 1:
            raise RecipeError(
                f"{where}: {share} is out of range; it must be above 0 and at most 1."
            )
        if whole is None:
            raise RecipeError(f"{where}: of what? Set training.tokens, such as 64M.")
    if (total := sum(shares.values())) > 1 + 1e-9:
        raise RecipeError(f"distill: the shares of the stages sum to {total:.6g}; 1 is the most.")
    tokens = strict.convert(int, whole, "training.tokens") if shares else 0
    for i, stage in enumerate(stages):
        if not isinstance(stage, Mapping) or "share" not in stage:
            continue
        stages[i] = {k: v for k, v in stage.items() if k != "share"}
        if i in shares:
            stages[i]["tokens"] = _part(shares[i], tokens, i)
    return {**data, "distill": stages} if stages else data


def _part(share: float, whole: int, index: int) -> int:
    found = round(share * whole)
    if found < 1:
        raise RecipeError(
            f"training.tokens: {whole:,} is too small; the stage distill[{index}] has a share of "
            f"{share:.4g}, which is less than one token."
        )
    return found


def cross_entropy_share(stage: Any) -> float:
    """Return the share of next-token cross-entropy in the loss of a `logits` or `long` stage."""
    default = 1.0 if stage.loss == "long" else 0.0
    return float(default if stage.cross_entropy is None else stage.cross_entropy)


def kl_share(stage: Any) -> float:
    """Return the share of the KL to the teacher in the loss of a `logits` or `long` stage."""
    return 1.0 - cross_entropy_share(stage)


def _needed(training: Any, stages: Any) -> None:
    """Raise for settings of the run that no stage of it would look at."""
    if stages and training.recall_target is not None and all(s.loss == "align" for s in stages):
        raise RecipeError("training.recall_target: it ends logits and long stages; none is here.")
    whole = [s for s in stages if s.loss != "align" and kl_share(s) > 0]
    if stages and training.teacher_cache is not None and not whole:
        raise RecipeError(
            "training.teacher_cache: no stage needs the teacher's final hidden states; align takes "
            "its layers, and cross-entropy has no teacher."
        )


def together(recipe: Any) -> None:
    """Raise where values that are each in range mean nothing together."""
    training, data = recipe.training, recipe.data
    if training.recall_target is not None and not training.probe_every:
        raise RecipeError(
            "training.recall_target: recall is never measured; set training.probe_every too."
        )
    for name in data.text:
        if name.startswith("hub:") and data.limit is None:
            raise RecipeError(
                f"data.text: {escape(name)} is a dataset of the Hub, read up to data.limit tokens; "
                "set that, such as 100M."
            )
    _needed(training, recipe.distill)
    for i, stage in enumerate(recipe.distill):
        where = f"distill[{i}]"
        if stage.loss == "align" and (stage.recompute != "none" or stage.temperature != 1):
            name = "temperature" if stage.temperature != 1 else "recompute"
            raise RecipeError(
                f"{where}.{name}: align has no use for it: one layer's graph lives at a time, and "
                "outputs are regressed."
            )
        if stage.loss == "align" and stage.cross_entropy is not None:
            raise RecipeError(f"{where}.cross_entropy: align regresses outputs; it has none.")
        if stage.kl != "forward" and (stage.loss == "align" or kl_share(stage) == 0):
            raise RecipeError(
                f"{where}.kl: {stage.kl} has no meaning here: the loss of this {stage.loss} stage "
                "has no KL. Leave it out, or set cross_entropy below 1 in a logits or long stage."
            )
        defaults = {f.name: f.default for f in fields(stage)}
        for name in ("lora_rank", "lora_alpha"):
            if stage.train != "lora" and getattr(stage, name) != defaults[name]:
                raise RecipeError(
                    f"{where}.{name}: only `train: lora` has it; this stage trains {stage.train}."
                )
