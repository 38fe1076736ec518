"""A tour of morph in one script: load, inspect, score, plan, generate, compare, write, load back.

    python examples/tour.py              on the small checkpoint of this repository
    python examples/tour.py MODEL        on a folder of yours

Takes less than a minute on two cores and writes to a temporary folder only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import morph
from morph import checkpoint, data, surgery
from morph.cache import held_bytes
from morph.selectors import nll
from morph.surgery import Batch

HERE = Path(__file__).resolve().parent
TEXT = HERE / "data" / "sherlock_holmes.txt"
WINDOW, LENGTH, QUESTIONS = 64, 256, 8


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


def look(folder: Path) -> None:
    """Say what is in a checkpoint, from its headers alone."""
    title("1. What is in the folder")
    found = checkpoint.inspect(folder)
    print(f"{found['model_type']}: {found['num_hidden_layers']} layers of", end=" ")
    print(f"{found['num_attention_heads']} query heads on {found['num_key_value_heads']} KV heads,")
    print(f"{found['num_parameters']:,} parameters in {found['bytes']:,} bytes.")
    print(f"At 32K tokens one sequence needs {found['cache_bytes']['32K']:,} bytes of cache.")


def questions(tokenizer: Any) -> list[Batch]:
    """Return recall questions: codes hidden in a novel, one of them asked at the end."""
    text = data.token_ids(tokenizer, data.read_text(TEXT)[:200_000])
    examples = data.needle_examples(
        "multikey",
        tokenizer,
        text,
        length=LENGTH,
        depths=[0.0, 0.25, 0.5],
        count=QUESTIONS,
        seed=0,
    )
    answers = torch.zeros(len(examples), LENGTH, dtype=torch.bool)
    for row, example in enumerate(examples):
        answers[row, example.answer_start :] = True
    ids = torch.tensor([example.ids for example in examples])
    print(f"One of {len(ids)} questions ends like this:")
    print(f"  ...{tokenizer.decode(ids[0, -40:])!r}")
    return [Batch(ids=ids, answers=answers)]


def select(model: Any, batches: list[Batch]) -> morph.Plan:
    """Score every layer by what its full attention is worth to the answers; keep a quarter."""
    with surgery.morphable(model, "sliding", {"window": WINDOW}) as probe:
        every = [(i, 0) for i in probe.candidates]
        print(f"Loss on the answers, all layers full: {probe.nll(batches, every):.3f} nats,")
        print(f"all layers with a window of {WINDOW}: {probe.nll(batches, []):.3f} nats.")
        scores = nll.score(probe, batches, nll.Options())
        shape = probe.geometry
    for layer, (value,) in enumerate(scores.values):
        print(f"  layer {layer}: {value:+.4f}")
    plan = morph.choose(
        scores,
        morph.Budget.parse("1/4"),
        geometry=shape,
        mixer="sliding",
        options={"window": WINDOW},
    )
    print(f"The plan: {plan.pattern} (F full, S sliding).")
    return plan


def recall(model: Any, batches: list[Batch]) -> str:
    """Return how many questions a model answers, every token of the answer right."""
    right = total = 0
    for batch in batches:
        with torch.no_grad():
            guesses = model(batch.ids).logits.argmax(dim=-1)[:, :-1]
        wrong = (guesses != batch.ids[:, 1:]) & batch.answers[:, 1:]
        right, total = right + int((~wrong.any(dim=1)).sum()), total + len(wrong)
    return f"{right} of {total} questions right"


def compare(source: Any, hybrid: Any, tokenizer: Any, batches: list[Batch]) -> None:
    """Generate with both and count what their caches hold."""
    text = "\nIt was a cold morning of the early spring, and we sat after breakfast"
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    for name, model in (("source", source), ("hybrid", hybrid)):
        out = model.generate(
            **prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        new = out[0, prompt["input_ids"].shape[1] :]
        with torch.no_grad():
            cache = model(batches[0].ids[:1], use_cache=True).past_key_values
        print(
            f"{name}: {recall(model, batches)}; {held_bytes(cache):,} bytes after {LENGTH} tokens"
        )
        print(f"  goes on with {tokenizer.decode(new)!r}")


def write(folder: Path, plan: morph.Plan, hybrid: Any, batches: list[Batch]) -> None:
    """Write the hybrid, load it back, and see that it computes the same."""
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "hybrid"
        written = morph.convert(str(folder), out, plan)
        checked = written.verification
        print(f"Wrote a {written.format} checkpoint; {checked['tensors_byte_equal']} tensors are")
        print(f"the source's bytes; logits differ by {checked['logit_error']:.1e} of their size.")
        print(f"Serve it: {written.serve.replace(str(out), 'OUT')}")
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            gap = (again(batches[0].ids).logits - hybrid(batches[0].ids).logits).abs().max()
        print(f"Loaded back as {type(again).__name__}; largest difference {float(gap):.1e}.")


def main(folder: Path) -> None:
    """Take the tour on a checkpoint folder."""
    logging.disable_progress_bar()
    look(folder)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    title("2. Which layers need full attention?")
    batches = questions(tokenizer)
    plan = select(source, batches)
    title("3. The hybrid, in memory, beside its source")
    hybrid = morph.hybrid(source, plan)
    compare(source, hybrid, tokenizer, batches)
    title("4. Written, verified, loaded back")
    write(folder, plan, hybrid, batches)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    elif (HERE / "checkpoint" / "config.json").is_file():
        main(HERE / "checkpoint")
    else:
        sys.exit("examples/checkpoint is not here; name a folder: python examples/tour.py MODEL")
