"""Train a small Llama that joins two far facts: one layer finds the first, a later one the second.

    python examples/train_two_hop.py --out my_two_hop          train, one CPU thread
    python examples/train_two_hop.py --evaluate my_two_hop     recall by the layers left full

Two layers (`--first`, `--second`) see everything; in most steps all others see a window. Steps in
which one of the two is windowed as well ask for one fact only, so that each learns its own lookup.
A run resumes from OUT.state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _two_hop
from _checkpoint_evaluation import DEPTHS, WINDOW, perplexity, recall, with_window
from _checkpoint_rows import train_tokenizer
from _two_hop import ASK_BOTH, ASK_OWNER, ASK_PLACE, USED, Wording, two_hop_examples
from train_checkpoint import (
    HELD_OUT,
    TEXTS,
    VOCABULARY,
    optimizers,
    resume,
    save_checkpoint,
    save_state,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from morph import data

NOISE, TEXT, REPEAT, OWNER, PLACE, BOTH = range(6)  # what a token is to the loss
KINDS = {TEXT: "text", REPEAT: "repeat", OWNER: "owner", PLACE: "place", BOTH: "both"}
MUON_LR, ADAM_LR = 2e-2, 1e-2
LOG_EVERY, EVALUATE_EVERY = 25, 100


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the curriculum: `steps` steps of `rows` sequences of `length` tokens."""

    steps: int
    rows: int
    length: int
    words: int = USED  # names, treasures and places in use
    chains: tuple[int, int] = (2, 4)  # chains in one row, from and to
    repeat: float = 0.0  # part of the rows that repeat random segments
    text: float = 0.0  # part of the rows that are plain text
    text_part: float = 0.0  # part of the text tokens that enter the loss
    window: int  # largest of the layers that do not see everything
    sentences: float = 1.0  # part of the rows whose questions are whole sentences
    single: tuple[float, float]  # part of the steps in which one layer alone sees everything
    pair_share: float = 1.0  # part of the other steps in which the two layers alone do
    rate: float = 1.0  # part of the peak learning rates
    bridge: float = 0.0  # weight of the loss that asks the treasure of a middle layer


STAGES = (
    Stage(steps=150, rows=32, length=48, window=8, repeat=1.0, single=(0.4, 0.4)),
    Stage(
        steps=250,
        rows=32,
        length=64,
        window=16,
        chains=(2, 4),
        repeat=0.1,
        sentences=0.1,
        pair_share=0.8,
        single=(0.2, 0.2),
        bridge=0.5,
        rate=0.7,
    ),
    Stage(
        steps=100,
        rows=16,
        length=128,
        window=32,
        chains=(2, 5),
        text_part=0.1,
        pair_share=0.6,
        single=(0.15, 0.15),
        bridge=0.25,
        rate=0.5,
    ),
    Stage(
        steps=100,
        rows=5,
        length=320,
        window=64,
        chains=(2, 7),
        text=0.2,
        text_part=0.25,
        pair_share=0.6,
        single=(0.1, 0.1),
        rate=0.35,
    ),
    Stage(
        steps=250,
        rows=5,
        length=320,
        window=64,
        chains=(3, 7),
        text=0.1,
        text_part=0.25,
        pair_share=0.5,
        single=(0.05, 0.1),
        rate=0.35,
    ),
)


def schedule() -> list[tuple[Stage, float]]:
    """Stage and learning-rate factor of every step: 20 steps up, over the last quarter down."""
    stages = [stage for stage in STAGES for _ in range(stage.steps)]
    total = len(stages)
    return [
        (stage, stage.rate * min(1.0, (step + 1) / 20, 0.05 + 0.95 * (total - step) / (total / 4)))
        for step, stage in enumerate(stages)
    ]


near: dict[int, int] = {}  # layer index -> window; layers not named see everything


def two_hop_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention, `[B, H, T, K]`; banded where `near` says so."""
    length = query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if module.layer_idx in near:
        mask = mask.triu(1 - near[module.layer_idx])
    out = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("two_hop_attention", two_hop_attention)


def build_model(tokenizer, args) -> LlamaForCausalLM:
    """A fresh Llama; tied embeddings let a treasure that was found ask for its place."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=args.head_dim,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="two_hop_attention",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Without norms on queries and keys the usual 0.02 leaves attention flat for long.
            if "q_proj" in name or "k_proj" in name:
                parameter.normal_(std=0.1)
    return model


class Rows:
    """Draws training rows of one stage; a pure function of seed and step."""

    def __init__(self, tokenizer, text_ids: torch.Tensor, seed: int) -> None:
        self.wording, self.seed = Wording(tokenizer), seed
        self.text, self.bos = text_ids.tolist(), tokenizer.bos_token_id
        self.ask = {
            kind: (whole, whole[whole.index("?") + 1 :])
            for kind, whole in ((OWNER, ASK_OWNER), (PLACE, ASK_PLACE), (BOTH, ASK_BOTH))
        }

    def batch(self, stage: Stage, step: int, kinds: tuple[int, ...]):
        """Token ids, their kinds, and the treasure behind every BOTH answer, all `[B, T]`."""
        rng = random.Random(f"{self.seed}/{step}")
        rows = []
        for _ in range(stage.rows):
            draw = rng.random()
            if draw < stage.repeat:
                rows.append(self.repeated(stage, rng))
            elif draw < stage.repeat + stage.text:
                rows.append(self.plain(stage.length, rng))
            else:
                rows.append(self.facts(stage, rng, kinds, rng.randint(*stage.chains)))
        return tuple(torch.tensor(part) for part in zip(*rows))

    def cut(self, length: int, rng: random.Random) -> list[int]:
        start = rng.randrange(len(self.text) - length + 1)
        return self.text[start : start + length]

    def plain(self, length: int, rng: random.Random):
        return [self.bos, *self.cut(length - 1, rng)], [TEXT] * length, [0] * length

    def repeated(self, stage: Stage, rng: random.Random):
        """Random words said again and again: the second time on, every one can be known."""
        w, n, length = self.wording, stage.words, stage.length
        words = w.names[:n] + w.things[:n] + w.places[:n]
        size = rng.randint(length // 4, min(2 * length // 5, len(words)))
        ids = [self.bos, *(rng.sample(words, size) * (length // size + 1))][:length]
        kinds = [REPEAT if i > size + 1 else NOISE for i in range(length)]
        return ids, kinds, [0] * length

    def facts(self, stage: Stage, rng: random.Random, kinds: tuple[int, ...], count: int):
        """Facts strewn in text, then one question for each chain: two would answer each other."""
        w = self.wording
        chains = w.draw(count, rng, stage.words)
        statements = [fact for c in chains for fact in (c.owner_fact, c.place_fact)]
        rng.shuffle(statements)
        short = rng.random() >= stage.sentences
        tail: list[int] = []
        tail_kinds: list[int] = []
        bridges: list[int] = []
        for number, c in enumerate(rng.sample(chains, count)):
            kind = rng.choice(kinds)
            words = {"thing": c.thing} if kind == PLACE else {"name": c.name}
            ask = w.say(self.ask[kind][short], **words)
            end = w.say(".") if number else ()
            tail += [*end, *ask, c.thing if kind == OWNER else c.place]
            tail_kinds += [TEXT] * (len(end) + len(ask)) + [kind]
            bridges += [0] * (len(end) + len(ask)) + [c.thing if kind == BOTH else 0]
        head = [self.bos, *w.intro] if stage.length > 128 else [self.bos]
        room = stage.length - len(head) - len(tail) - sum(map(len, statements))
        if room < 0:
            return self.facts(stage, rng, kinds, count - 1)
        offsets = sorted(rng.randint(0, room) for _ in statements)
        ids = [*head, *data.hide(self.cut(room, rng), statements, offsets), *tail]
        rest = stage.length - len(tail)
        return ids, [TEXT] * rest + tail_kinds, [0] * rest + bridges


def draw_layout(args, stage: Stage, step: int) -> tuple[set[int], tuple[int, ...]]:
    """The layers that see everything in this step, and the kinds of questions they can answer."""
    rng = random.Random(f"{args.seed}/layout/{step}")
    draw, pair = rng.random(), {args.first, args.second}
    if draw < stage.single[0]:
        return {args.first}, (OWNER,)
    if draw < sum(stage.single):
        return {args.second}, (PLACE,)
    draw = rng.random()
    if draw < stage.pair_share:
        full = pair
    else:
        # Models are also used with everything full, or with any other layers full.
        share = 1.0 if draw < (1 + stage.pair_share) / 2 else rng.random()
        full = pair | {layer for layer in range(args.layers) if rng.random() < share}
    return full, (OWNER, PLACE, BOTH, BOTH)


def draw_windows(args, stage: Stage, step: int, full: set[int]) -> dict[int, int]:
    """A window for every other layer; with long rows, every second time the widest one for all.

    Wide windows in a row can pass a segment on without any lookup, narrow ones alone teach
    "the previous token" in a way that fails as soon as more can be seen.
    """
    rng = random.Random(f"{args.seed}/windows/{step}")
    choices = [window for window in (2, 4, 8, 16, 32, 64) if window <= stage.window]
    if stage.window > 16 and rng.random() < 0.5:
        choices = choices[-1:]
    return {layer: rng.choice(choices) for layer in range(args.layers) if layer not in full}


def losses(model, batch, stage: Stage, middle: int) -> dict:
    """Mean loss and part right of every kind of token in the batch, and of the bridge."""
    ids, kinds, bridges = batch
    out = model.model(ids, use_cache=False, output_hidden_states=True)
    hidden = out.last_hidden_state[:, :-1]
    targets, kinds, bridges = ids[:, 1:], kinds[:, 1:], bridges[:, 1:]
    chosen = (kinds > TEXT) | ((kinds == TEXT) & (torch.rand(kinds.shape) < stage.text_part))
    means = {}
    logits = model.lm_head(hidden[chosen])
    if stage.bridge and (bridges > 0).any():
        between = out.hidden_states[middle + 1][:, :-1][bridges > 0]
        guess = model.lm_head(model.model.norm(between))
        loss = F.cross_entropy(guess, bridges[bridges > 0])
        right = (guess.argmax(-1) == bridges[bridges > 0]).float().mean().item()
        means["bridge"] = (stage.bridge * loss, right)
    targets, kinds = targets[chosen], kinds[chosen]
    each = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets).float()
    for kind, name in KINDS.items():
        of_kind = kinds == kind
        if of_kind.any():
            means[name] = (each[of_kind].mean(), right[of_kind].mean().item())
    return means


def train(args, tokenizer, train_ids, haystack) -> None:
    """The loop: layout, batch, loss, backward, step, log, save. Resumes from `OUT.state`."""
    state = Path(f"{args.out}.state")
    model = build_model(tokenizer, args)
    opts = optimizers(model, MUON_LR, ADAM_LR)
    step, log, seconds = resume(state, model, opts)
    rows = Rows(tokenizer, train_ids, args.seed)
    plan = schedule()
    total = min(args.steps or len(plan), len(plan))
    began, recent = time.time() - seconds, []
    while step < total and time.time() - began < 60 * args.minutes:
        torch.manual_seed(args.seed + step)
        stage, factor = plan[step]
        for optimizer, peak in zip(opts, (MUON_LR, ADAM_LR)):
            optimizer.param_groups[0]["lr"] = peak * factor
        full, kinds = draw_layout(args, stage, step)
        near.update(draw_windows(args, stage, step, full))
        between = (args.first + args.second) // 2
        means = losses(model, rows.batch(stage, step, kinds), stage, between)
        near.clear()
        sum(loss for loss, _ in means.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        recent.append({name: (loss.item(), right) for name, (loss, right) in means.items()})
        step += 1
        if step % LOG_EVERY == 0 or step == total:
            log.append(summary(step, stage, recent, time.time() - began))
            recent = []
            if step % EVALUATE_EVERY == 0 or step == total:
                log[-1].update(quick_evaluation(args, model, tokenizer, haystack, stage.length))
                save_state(state, model, opts, step, log, time.time() - began)
            print(json.dumps(log[-1]), flush=True)
    save_state(state, model, opts, step, log, time.time() - began)
    save_checkpoint(args.out, model, tokenizer, log)


def summary(step: int, stage: Stage, recent: list[dict], seconds: float) -> dict:
    """One line of the log: means since the last line."""
    line: dict = {"step": step, "length": stage.length, "seconds": round(seconds)}
    for name in (*KINDS.values(), "bridge"):
        pairs = [entry[name] for entry in recent if name in entry]
        if pairs:
            line[f"{name}_loss"] = round(sum(loss for loss, _ in pairs) / len(pairs), 3)
            line[f"{name}_right"] = round(sum(right for _, right in pairs) / len(pairs), 3)
    return line


def quick_evaluation(args, model, tokenizer, haystack, length: int) -> dict:
    """Recall with everything seen, with the two layers, and with the window everywhere."""
    length = max(length, 256)
    examples = two_hop_examples(tokenizer, haystack, length=length, depths=DEPTHS, count=44, seed=7)
    layouts = {
        "full": range(args.layers),
        "pair": (args.first, args.second),
        "window": (),
    }
    found = {}
    for name, full in layouts.items():
        near.update(dict.fromkeys(set(range(args.layers)) - set(full), WINDOW))
        found[f"recall_{name}"] = round(recall(model, examples), 3)
        near.clear()
    found["ppl_full"] = round(perplexity(model, haystack, tokenizer.bos_token_id, length, 8), 2)
    return found


@torch.no_grad()
def scored(model, examples) -> tuple[float, float]:
    """Part of the examples answered right, and the mean loss of their answers."""
    right, loss = [], []
    for start in range(0, len(examples), 4):
        ids = torch.tensor([example.ids for example in examples[start : start + 4]])
        logits = model(ids, use_cache=False, logits_to_keep=2).logits[:, 0].float()
        right += (logits.argmax(-1) == ids[:, -1]).tolist()
        loss += F.cross_entropy(logits, ids[:, -1], reduction="none").tolist()
    return sum(right) / len(right), sum(loss) / len(loss)


def evaluate(args, held_out: list[str]) -> None:
    """Print recall, loss and perplexity by the layers left full; plain transformers, float32."""
    source = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    ids = torch.cat([data.token_ids(tokenizer, text) for text in held_out])
    examples = two_hop_examples(
        tokenizer, ids, length=args.length, depths=DEPTHS, count=args.count, seed=7
    )
    layers = range(source.config.num_hidden_layers)
    pair = {args.first, args.second}
    layouts = [set(layers), set(), pair, {args.first}, {args.second}]
    layouts += [set(layers) - {layer} for layer in layers]
    if args.pairs:
        layouts += map(set, itertools.combinations(layers, 2))
    for number, full in enumerate(layouts):
        model = with_window(source, tuple(full))
        right, loss = scored(model, examples)
        line = f"full {sorted(full)}: right {right:.3f}, loss {loss:.3f}"
        if number < 3:
            ppl = perplexity(model, ids, tokenizer.bos_token_id, args.length, 32)
            line += f", perplexity {ppl:.2f}"
        print(line, flush=True)


def make_tokenizer(parts: list[str]):
    """The tokenizer of `train_checkpoint.py` in which the words of this task are tokens too."""
    words = {*_two_hop.NAMES, *_two_hop.THINGS, *_two_hop.PLACES}
    # Repeated until merging them pays more than merging any rare word of the novels.
    said = [_two_hop.OWNER.format(name=word, thing=word) for word in sorted(words)] * 200
    said += [_two_hop.PLACE.format(thing="ring", place="city")] * 200
    return train_tokenizer([*parts, *said], VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluate", metavar="FOLDER", help="evaluate this checkpoint instead")
    parser.add_argument("--length", type=int, default=384, help="tokens, for --evaluate")
    parser.add_argument("--count", type=int, default=110, help="examples, for --evaluate")
    parser.add_argument("--pairs", action="store_true", help="every pair too, for --evaluate")
    parser.add_argument("--out", default="my_two_hop", help="folder to write")
    parser.add_argument("--text", nargs="*", type=Path, default=TEXTS, help="plain text files")
    parser.add_argument("--steps", type=int, help="stop after so many steps; goes on when rerun")
    parser.add_argument("--minutes", type=float, default=120, help="stop after so many minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--first", type=int, default=3, help="layer that finds the treasure")
    parser.add_argument("--second", type=int, default=6, help="layer that finds the place")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--head_dim", type=int, default=16)
    args = parser.parse_args()
    texts = [data.read_text(path) for path in args.text]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    parts = [text[:cut] for text, cut in zip(texts, cuts)]
    rest = [text[cut:] for text, cut in zip(texts, cuts)]
    if args.evaluate:
        evaluate(args, rest)
        return
    if Path(args.out).exists() and not Path(f"{args.out}.state").exists():
        raise SystemExit(f"{args.out} exists and is no run of this script; pass another --out")
    tokenizer = make_tokenizer(parts)
    train_ids = torch.cat([data.token_ids(tokenizer, part) for part in parts])
    held_out = torch.cat([data.token_ids(tokenizer, text) for text in rest])
    train(args, tokenizer, train_ids, held_out)


if __name__ == "__main__":
    main()
