"""Train a tiny model whose one long-range layer is known by construction.

    python examples/train_planted.py --seed 0 --planted 2 --arch llama

The task is multi-query associative recall: pairs of a key and a value, a gap wider than the window,
then the keys again, each followed by its value. The planted layer always sees everything; of every
other layer it is drawn at each step whether it sees everything or the window only. So only the
planted layer can be relied on, and it alone carries the recall.
"""

from __future__ import annotations

import argparse
import math
import random
import time

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LAYERS, WINDOW = 4, 8
KEYS, VALUES = 12, 12
FILLER, FIRST_KEY, FIRST_VALUE = 0, 1, 1 + KEYS
VOCABULARY = 1 + KEYS + VALUES
PAIRS, GAP = 6, 8
REPEAT_STEPS, RECALL_STEPS, ROWS = 110, 50, 32
MUON_LR, ADAM_LR = 2e-2, 2e-2

near: set[int] = set()  # the layers that see the window only, for the steps of training


def planted_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention, `[B, H, T, K]`, with the window in the layers of `near`."""
    length = query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if module.layer_idx in near:
        mask = mask.triu(1 - WINDOW)
    out = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("planted_attention", planted_attention)


def draw_batch(
    rows: int, generator: torch.Generator, pairs: int = PAIRS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and which of them are answers, both `[B, T]`, T = 1 + 4 * pairs + gap.

    The keys of a row differ; values may come twice, so that no answer is known by elimination.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(1)

    def interleave(keys, values):
        return torch.stack([keys + FIRST_KEY, values + FIRST_VALUE], dim=2).flatten(1)

    asked = interleave(keys.gather(1, order), values.gather(1, order))
    filler = torch.full((rows, 1 + GAP), FILLER)
    ids = torch.cat([filler[:, :1], interleave(keys, values), filler[:, 1:], asked], dim=1)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, -2 * pairs + 1 :: 2] = True
    return ids, answers


def draw_repeats(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random segments said again and again, and the tokens that can be known, both `[B, T]`.

    Induction forms on these within a hundred steps, on the recall task itself hardly ever.
    """
    size = torch.randint(WINDOW + 1, 20, (rows, 1), generator=generator)
    segment = torch.rand(rows, VOCABULARY, generator=generator).argsort(1)
    position = torch.arange(2 + GAP + 4 * PAIRS)[None]
    return segment.gather(1, position % size), position > size


def build_model(seed: int, arch: str) -> PreTrainedModel:
    """A fresh Llama or Qwen3 of four layers, hidden 64, 4 query heads and 2 KV heads."""
    torch.manual_seed(seed)
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[arch]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="planted_attention",
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The usual 0.02 leaves attention flat for long where queries and keys have no norm.
            if "q_proj" in name or "k_proj" in name:
                parameter.normal_(std=0.1)
    return model


def answer_loss(model: PreTrainedModel, ids: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the answers."""
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1][answers[:, 1:]]
    return F.cross_entropy(model.lm_head(hidden), ids[:, 1:][answers[:, 1:]])


def train(
    seed: int,
    planted_layer: int,
    *,
    arch: str = "llama",
    batch_rows: int = 32,
    verbose: bool = False,
) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """Return a model whose recall sits in `planted_layer`, and a held-out batch to judge it on.

    The batch is token ids and which of them are answers, both `[B, T]`; the answers cannot be seen
    within the window. The first layer cannot be planted: a key must first be told its neighbour.
    """
    if not 1 <= planted_layer < LAYERS:
        raise ValueError(f"planted_layer {planted_layer}: give one of 1 to {LAYERS - 1}")
    model = build_model(seed, arch)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(f"{seed}/layout")
    steps = REPEAT_STEPS + RECALL_STEPS
    for step in range(steps):
        factor = min(1.0, (step + 1) / 20, 0.02 + (steps - step) / (0.4 * steps))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_LR * factor, ADAM_LR * factor
        near.clear()
        near.update(i for i in range(LAYERS) if i != planted_layer and rng.random() < 0.5)
        draw = draw_repeats if step < REPEAT_STEPS else draw_batch
        loss = answer_loss(model, *draw(ROWS, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if verbose and step % 20 == 19:
            print(f"step {step + 1}: {loss.item():.4f}", flush=True)
    near.clear()
    model.set_attn_implementation("sdpa")
    held_out = torch.Generator().manual_seed(seed + 1_000_000)
    return model.eval(), *draw_batch(batch_rows, held_out)


@torch.no_grad()
def layout_loss(model: PreTrainedModel, ids, answers, full: set[int]) -> float:
    """Negative log-likelihood of the answers with only the layers of `full` seeing everything."""
    model.set_attn_implementation("planted_attention")
    near.update(set(range(LAYERS)) - full)
    loss = answer_loss(model, ids, answers).item()
    near.clear()
    model.set_attn_implementation("sdpa")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--planted", type=int, help="the layer; seed %% 3 + 1 where not given")
    parser.add_argument("--arch", choices=["llama", "qwen3"], default="llama")
    parser.add_argument("--verbose", action="store_true", help="print the loss as it falls")
    args = parser.parse_args()
    print(f"chance {math.log(VALUES):.3f}")
    for seed in args.seed:
        planted = seed % (LAYERS - 1) + 1 if args.planted is None else args.planted
        began = time.time()
        model, ids, answers = train(seed, planted, arch=args.arch, verbose=args.verbose)
        seconds = time.time() - began
        layouts = {"full": set(range(LAYERS)), "windowed": set(), "planted only": {planted}}
        layouts |= {f"only {i}": {i} for i in range(LAYERS) if i != planted}
        layouts["all but planted"] = set(range(LAYERS)) - {planted}
        found = {name: layout_loss(model, ids, answers, full) for name, full in layouts.items()}
        line = ", ".join(f"{name} {loss:.4f}" for name, loss in found.items())
        print(f"{args.arch} seed {seed} planted {planted}: {line} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
