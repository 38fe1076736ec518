"""Distillation: a converted model learns to do what its source does.

Stages are data (`recipes.schema.Stage`): what trains, which loss, how many tokens. `align` lets
every converted layer regress its layer's attention output on the teacher's input; `logits` is the
KL divergence to the teacher's distribution; `long` is cross-entropy. The output head never trains
(nor an embedding tied to it), which is what keeps logits out of memory; see `_losses`. Dropout is
off: the teacher is a function to be matched. Teacher and student share every tensor that does not
train, and the teacher is bit-identical afterwards.

A run resumes from `out/states`: weights, optimizer and random state as safetensors and JSON, and
batches are pure functions of the step, so on one device the resumed run equals the uninterrupted
one bit for bit. `out/log.jsonl` holds the numbers, `out/seconds.jsonl` the times.

Reference: RADLADS (arXiv 2505.03005) and HALO for the order of the stages; AdamW with
betas (0.9, 0.95), linear warm-up and cosine decay.
"""

from morph.distill._batches import (
    Batch,
    Batches,
    Source,
    check_epochs,
    document_batches,
    epochs_of,
    needle_batches,
    text_batches,
)
from morph.distill._loop import distill
from morph.distill._losses import Head, head_cross_entropy, head_kl, relative_mse
from morph.distill._record import Event, Log
from morph.distill._stages import check, estimate, learning_rate_factor, steps_of
from morph.distill._trainee import Candidates

__all__ = [
    "Batch",
    "Batches",
    "Candidates",
    "Event",
    "Head",
    "Log",
    "Source",
    "check",
    "check_epochs",
    "distill",
    "document_batches",
    "epochs_of",
    "estimate",
    "head_cross_entropy",
    "head_kl",
    "learning_rate_factor",
    "needle_batches",
    "relative_mse",
    "steps_of",
    "text_batches",
]
