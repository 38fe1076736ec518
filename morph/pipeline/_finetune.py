"""Fine-tuning the finished hybrid on short problems: rows, what stays fixed, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import layouts, strict
from morph.errors import UsageError, escape
from morph.pipeline._data import Corpus
from morph.pipeline._source import Say, Source, quiet
from morph.plan import Plan
from morph.recipes.schema import Finetune, Recipe, Stage, Training

if TYPE_CHECKING:
    from torch import nn

    from morph.distill import Batch, Event, Log
    from morph.distill import Source as Batches

SHARED = (  # by both sections, and meant alike
    *("tokens", "seq_len", "batch_size", "lr", "gate_lr", "min_lr_fraction"),
    *("warmup_fraction", "weight_decay", "clip", "save_every"),
)
ROLES = {"q": ("q",), "k": ("k",), "v": ("v",), "o": ("o",), "norm": ("q_norm", "k_norm")}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a fine-tuning did; `recall` are the probes, the first one from before it began."""

    log: Log
    steps: int
    stopped: str  # "tokens" or "recall"
    recall: tuple[float, ...] = ()

    def told(self, section: Finetune) -> dict[str, Any]:
        """Return it as plain data, beside what was asked for."""
        losses = self.log.losses(0)
        ends = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
        found = {"tokens_seen": self.log.tokens, "steps": self.steps, "stopped": self.stopped}
        probes = {"probes": list(self.recall)} if self.recall else {}
        return {**strict.plain(section), **found, **ends, **probes}


def stage_of(section: Finetune) -> Stage:
    """Return the fine-tuning as a stage of the training loop: plain cross-entropy, all weights."""
    return Stage(loss="long", train="all", **{name: getattr(section, name) for name in SHARED})


def tune(
    recipe: Recipe,
    student: nn.Module,
    teacher: nn.Module,
    source: Source,
    plan: Plan,
    corpus: Corpus,
    work: Path,
    *,
    say: Say = quiet,
    progress: Callable[[Any], None] | None = None,
) -> Tuned:
    """Train the hybrid `student` in place as the recipe's finetune section says.

    `teacher` is the source, whose tensors the student shares until they train; nothing is learnt
    from it. State and log live in the folder `work`; the same call resumes. Marks the student with
    the names of what changed.
    """
    from morph import distill as training
    from morph.pipeline import _probe

    section, tokenizer = recipe.finetune, source.tokenizer()
    assert section is not None
    settings = replace(
        recipe.training, probe_every=section.probe_every, recall_target=None, teacher_cache=None
    )
    probe, start = _probe.probe_of(settings, student, teacher, corpus, tokenizer, recipe.seed), None
    if probe is not None:
        start = probe()["recall"]
        say(f"recall before tuning: {start:.2f} ({_words(settings)})")

    def until(found: Mapping[str, float]) -> str:
        share, now = section.stop_below, found["recall"]
        if share is None or start is None or now >= share * start:
            return ""
        return f"recall fell to {now:.2f}, below {share:g} of the {start:.2f} it was at the start."

    def told(event: Event) -> None:
        if event.kind == "note":
            say(event.text)
        elif progress is not None:
            progress(event)

    log = training.distill(
        student,
        teacher,
        [stage_of(section)],
        rows_of(section, corpus, tokenizer, recipe.seed),
        out=work,
        text=corpus.identity,
        training=settings,
        probe=probe,
        until=until,
        frozen=frozen_names(
            source, plan, section.freeze, (n for n, _ in student.named_parameters())
        ),
        seed=recipe.seed,
        progress=told,
    )
    earlier = getattr(student, "morph_trained", ())
    student.morph_trained = tuple(sorted({*log.trained, *earlier}))  # type: ignore[assignment]
    student.eval()
    asked = training.steps_of(stage_of(section))
    steps = len(log.losses(0))
    probes = [r["recall"] for r in log.records if r.get("recall") is not None]
    return Tuned(
        log=log,
        steps=steps,
        stopped="tokens" if steps == asked else "recall",
        recall=(start, *probes) if start is not None else (),
    )


def _words(settings: Training) -> str:
    count = settings.probe_examples
    return f"{count} questions of {settings.probe_task} at {settings.probe_length} tokens"


def frozen_names(
    source: Source, plan: Plan, freeze: Collection[str], names: Iterable[str]
) -> frozenset[str]:
    """Return the parameters of a hybrid, of all its `names`, that `freeze` holds fixed.

    Projections and norms are those of the layers that keep full attention; `rest` is all but
    those. Raises UsageError where a layer has none, or only as rows of a tensor that holds more.
    """
    if not freeze:
        return frozenset()
    shapes = {name: info.shape for name, info in source.checkpoint.tensors.items()}
    reading = layouts.read(source.checkpoint.config, shapes)
    whole = [r for r in reading.rows if r.layer in plan.full_layers]
    found = set()
    for part in freeze:
        if part == "rest":
            roles = [role for roles in ROLES.values() for role in roles]
            found |= set(names) - {r.tensor for r in whole if r.role in roles}
            continue
        rows = [r for r in whole if r.role in ROLES[part]]
        fused = next((r.tensor for r in rows if r.ranges is not None), None)
        if fused is not None or not rows:
            why = f"{escape(fused)} holds more than that" if fused else "the layers have no such"
            raise UsageError(
                f"finetune.freeze: {part} cannot be held fixed in {source.family.model_type}: "
                f"{why}. Leave it out."
            )
        found |= {r.tensor for r in rows}
    return frozenset(found)


def rows_of(section: Finetune, corpus: Corpus, tokenizer: Any, seed: int) -> Batches:
    """Return the batches of the fine-tuning: packed problems, and a share of rows of plain text.

    A batch is a pure function of the step. Of problems only the solutions are labelled, of text
    every token; what is padded counts for neither.
    """
    from morph import data

    class Problems:
        def __init__(self, index: int, stage: Stage) -> None:
            self.stage = stage
            self.text = None
            if section.text:
                self.text = data.TextBatches(
                    corpus.train, 1, stage.seq_len, seed, tokenizer.bos_token_id
                )

        def batch(self, step: int) -> Batch:
            first = step * self.stage.batch_size
            return batch_of([self.row(first + i) for i in range(self.stage.batch_size)])

        def row(self, number: int) -> Any:
            from morph.reasoning import Row, reasoning_row

            length, before = self.stage.seq_len, math.floor(number * section.text)
            if self.text is None or math.floor((number + 1) * section.text) == before:
                own = number - before
                return reasoning_row(tokenizer, section.tasks, length, seed=seed, row=own)
            ids = self.text.batch(before)[0].tolist()
            return Row(ids=ids, labels=ids, positions=[*range(length)], real=[True] * length)

    return Problems


def batch_of(rows: list[Any]) -> Batch:
    """Return rows of `reasoning` as a batch of the training loop."""
    import torch

    from morph.distill import Batch

    columns = {n: torch.tensor([getattr(r, n) for r in rows]) for n in ("ids", "labels", "real")}
    return Batch(positions=torch.tensor([r.positions for r in rows]), **columns)
