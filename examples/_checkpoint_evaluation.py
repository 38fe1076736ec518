"""What the embedded checkpoint can do: recall and perplexity under a window, pair by pair.

Used by `train_checkpoint.py`. Windows are set by the fields of the config that plain transformers
reads, so nothing of morph's own attention is involved.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from morph import data

WINDOW = 64
DEPTHS = [i / 10 for i in range(11)]


@torch.no_grad()
def recalled(model, examples: list[data.Example]) -> list[bool]:
    """Per example: are its answer tokens all the most likely ones, teacher-forced?"""
    right = []
    for start in range(0, len(examples), 4):
        chunk = examples[start : start + 4]
        hidden = model.model(torch.tensor([e.ids for e in chunk]), use_cache=False)[0]
        for example, row in zip(chunk, hidden):
            logits = model.lm_head(row[example.answer_start - 1 : -1])
            right.append(logits.argmax(-1).tolist() == list(example.answer))
    return right


def recall(model, examples: list[data.Example]) -> float:
    """Part of the examples that are recalled."""
    return sum(recalled(model, examples)) / len(examples)


@torch.no_grad()
def perplexity(model, ids: torch.Tensor, bos: int, length: int, rows: int) -> float:
    """Exponential of the mean loss on `rows` windows of held-out text, evenly spaced."""
    starts = torch.linspace(0, len(ids) - length, rows).long().tolist()
    total = []
    for start in starts:
        row = torch.cat([torch.tensor([bos]), ids[start : start + length - 1]])[None]
        logits = model(row, use_cache=False).logits[0, :-1].float()
        total.append(F.cross_entropy(logits, row[0, 1:]).item())
    return math.exp(sum(total) / len(total))


def needle_set(tokenizer, haystack, length: int, count: int, task: str = "multikey"):
    """Needle examples of all depths, always the same ones."""
    return data.needle_examples(
        task, tokenizer, haystack, length=length, depths=DEPTHS, count=count, seed=7
    )


def with_window(source: PreTrainedModel, full: tuple[int, ...]) -> PreTrainedModel:
    """The same weights with the window in all layers but `full`, as plain transformers reads it.

    A Llama knows no window; the same weights make a Ministral, which does.
    """
    fields = source.config.to_dict()
    model_type = fields.pop("model_type")
    config = AutoConfig.for_model("ministral" if model_type == "llama" else model_type, **fields)
    config.use_sliding_window, config.sliding_window = True, WINDOW
    config.layer_types = [
        "full_attention" if layer in full else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(source.state_dict())
    return model.eval()


def evaluate(path: str, held_out: list[str], length: int, count: int) -> None:
    """Print recall and perplexity: all layers full, all windowed, and every pair of full layers."""
    source = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.cat([data.token_ids(tokenizer, text) for text in held_out])
    layers = range(source.config.num_hidden_layers)
    for name, full in (("full", tuple(layers)), ("window", ())):
        model = with_window(source, full)
        line = {"perplexity": perplexity(model, ids, tokenizer.bos_token_id, length, 32)}
        for task in data.NEEDLE_TASKS:
            line[task] = recall(model, needle_set(tokenizer, ids, length, count, task))
        print(f"{name:>7}  " + "  ".join(f"{k} {v:.3f}" for k, v in line.items()), flush=True)
    examples = needle_set(tokenizer, ids, length, count)
    right = recalled(with_window(source, tuple(layers)), examples)
    for depth in DEPTHS:
        of_depth = [r for r, example in zip(right, examples) if example.depth == depth]
        print(f"full, depth {depth}: multikey {sum(of_depth)}/{len(of_depth)}", flush=True)
    pair_table(source, examples)


def pair_table(source: PreTrainedModel, examples: list[data.Example]) -> None:
    """Print the recall of every pair of full layers, the best and the evenly spaced ones."""
    layers = range(source.config.num_hidden_layers)
    pairs = {}
    for pair in itertools.combinations(layers, 2):
        pairs[pair] = recall(with_window(source, pair), examples)
        print(f"full layers {pair}: multikey {pairs[pair]:.3f}", flush=True)
    best = sorted(pairs, key=lambda pair: -pairs[pair])
    print("best:", ", ".join(f"{pair} {pairs[pair]:.3f}" for pair in best[:8]))
    uniform = [(i, i + len(layers) // 2) for i in range(len(layers) // 2)]
    print("uniform:", ", ".join(f"{pair} {pairs[pair]:.3f}" for pair in uniform))
