"""What a distillation looks at while it runs: the student's recall and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from morph._processes import rank
from morph.errors import RecipeError
from morph.recipes.schema import Evaluate, Training

if TYPE_CHECKING:
    from torch import nn

    from morph.pipeline._data import Corpus

PERPLEXITY_TOKENS = 8192
LEAST = 0.1  # of its own questions, which a teacher must answer for a share of that to mean much

Probe = Callable[[], Mapping[str, float]]


def probe_of(
    training: Training,
    student: nn.Module,
    teacher: nn.Module,
    corpus: Corpus,
    tokenizer: Any,
    seed: int,
) -> Probe | None:
    """Return what measures the student now, or None where the recipe asks for no probes.

    It gives `recall`, `perplexity`, and the same of the teacher, measured once. The questions hide
    in held-out text and are the same every time. Raises DataError where the text is too short, and
    RecipeError where a recall target is set for a teacher that cannot do the task itself.
    """
    if not training.probe_every:
        return None
    from morph import evaluate

    settings = Evaluate(
        tasks=(training.probe_task,),
        lengths=(training.probe_length,),
        examples=training.probe_examples,
        depths=min(8, training.probe_examples),
    )
    held_out = corpus.held_out
    examples = evaluate.build_examples(settings, tokenizer, held_out, seed=seed)
    length = max(2, min(512, training.probe_length, len(held_out)))

    def measured(model: Any) -> dict[str, float]:
        hits = evaluate.recall(model, examples)
        loss = evaluate.perplexity(
            model,
            held_out,
            seq_len=length,
            max_tokens=PERPLEXITY_TOKENS,
            bos=tokenizer.bos_token_id,
        )
        return {"recall": sum(hit.correct for hit in hits) / len(hits), "perplexity": loss.ppl}

    if rank():  # of several processes, the first measures
        return dict
    of_teacher = {f"teacher_{name}": value for name, value in measured(teacher).items()}
    known = of_teacher["teacher_recall"]
    if training.recall_target is not None and known < LEAST:
        raise RecipeError(
            f"training.recall_target: the teacher itself recalls {known:.2f} of {len(examples)} "
            f"questions of {training.probe_task!r} at {training.probe_length} tokens; a share of "
            "that says nothing. Choose another probe_task or probe_length, or no recall_target."
        )
    return lambda: {**measured(student), **of_teacher}
