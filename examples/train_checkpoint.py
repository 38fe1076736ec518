"""Train the embedded checkpoint: a small Qwen3 that recalls what stands far back in a novel.

    python examples/train_checkpoint.py --out my_checkpoint          train, two CPU cores
    python examples/train_checkpoint.py --evaluate my_checkpoint     recall, perplexity, all pairs

Recall forms on short, dense sequences (few distinct keys, every fact asked for) and is then
carried to longer ones with more text between the facts. A run resumes from OUT/.state.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from morph import data

HERE = Path(__file__).resolve().parent
TEXTS = [HERE / "data" / "pride_and_prejudice.txt", HERE / "data" / "sherlock_holmes.txt"]
WINDOW = 64
HELD_OUT = 0.1  # the last tenth of each text is never trained on
VOCABULARY = 1536
NOISE, TEXT, ANSWER, REPEAT = 0, 1, 2, 3  # what a token is to the loss
KINDS = {TEXT: "text", ANSWER: "answer", REPEAT: "repeat"}
MUON_LR, ADAM_LR = 5e-3, 3e-3
LOG_EVERY, EVALUATE_EVERY = 20, 100


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the curriculum: `steps` steps of `rows` sequences of `length` tokens."""

    steps: int
    rows: int
    length: int
    num_words: int  # how many distinct keys are in use
    num_keys: tuple[int, int]  # needles in one sequence, from and to
    repeat: float = 0.0  # part of the rows that repeat random segments
    text: float = 0.0  # part of the rows that are plain text
    text_part: float = 0.5  # part of the text tokens that enter the loss
    local: float = 0.0  # part of the steps that are plain text, the window in every layer


# Each phase has its own rise and fall of the learning rate: recall forms on short sequences,
# then it is carried to long ones.
PHASES = (
    (
        Stage(
            steps=200, rows=16, length=64, num_words=16, num_keys=(1, 1), repeat=1.0, text_part=0.25
        ),
        Stage(
            steps=200,
            rows=16,
            length=128,
            num_words=16,
            num_keys=(2, 4),
            repeat=0.25,
            text_part=0.25,
        ),
    ),
    (
        Stage(steps=100, rows=8, length=256, num_words=128, num_keys=(2, 6), text=0.1),
        Stage(steps=150, rows=4, length=512, num_words=128, num_keys=(2, 10), text=0.2, local=0.1),
        Stage(steps=700, rows=2, length=1024, num_words=128, num_keys=(2, 16), text=0.2, local=0.2),
    ),
)


# --- Tokenizer, model ---------------------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits stand alone; the words of the needle tasks are single tokens.

    A digit takes the space before it along (` 4` `8` `2` `1`), so that a number starts right after
    the word before it.
    """
    tokenizer = Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The keys are repeated until merging them pays more than merging any rare word of the novels.
    words = [data.STATEMENT.format(key=key, value=len(key)) for key in data.KEY_WORDS] * 200
    words += [f" {digit}" for digit in range(10)] * 1000
    tokenizer.train_from_iterator([*texts, *words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, hidden: int, head_dim: int, seed: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 of 8 layers, 8 query heads and 4 KV heads."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=head_dim,
        max_position_embeddings=2048,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="train_attention",
    )
    return Qwen3ForCausalLM(config)


# --- Attention for training: a window per layer that can change from step to step ---------------

windows: dict[int, int] = {}  # layer index -> window; layers not named see everything


def train_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention in float32, `[B, H, T, K]`; full, or banded where `windows` says so.

    bfloat16 pays in the linear layers but not in this function on a CPU.
    """
    length, dtype = query.shape[2], query.dtype
    window = windows.get(module.layer_idx)
    if window is not None and length > window:
        out = banded_attention(query, key, value, window)
    elif length <= 128:
        mask = query.new_full((length, length), -torch.inf).triu(1)
        out = dense_attention(query, key, value, mask)
    else:
        repeats = query.shape[1] // key.shape[1]
        query, key, value = query.float(), key.float(), value.float()
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.transpose(1, 2).to(dtype), None


def dense_attention(query, key, value, mask) -> torch.Tensor:
    """Softmax attention in bfloat16 with the scores written out, `[B, H, T, K]`.

    Up to about 128 tokens this is twice as fast, forward and backward, as the library's kernel.
    """
    batch, heads, length, dim = query.shape
    groups, size = key.shape[1], key.shape[2]
    query = (query * dim**-0.5).bfloat16().reshape(batch * groups, -1, dim)
    key, value = (x.bfloat16().reshape(batch * groups, size, dim) for x in (key, value))
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, heads, length, size)
    weights = torch.softmax(scores + mask.bfloat16(), dim=-1)
    return torch.bmm(weights.view(batch * groups, -1, size), value).view(batch, heads, length, dim)


def banded_attention(query, key, value, window: int) -> torch.Tensor:
    """Keys q - window < k <= q only, in blocks of one window: cost linear in T, `[B, H, T, K]`."""
    batch, heads, length, dim = query.shape
    pad = -length % window
    blocks = (length + pad) // window

    def split(x):  # [B, H, T, K] -> [B, N, H, W, K], N blocks of W
        x = F.pad(x, (0, 0, 0, pad)).unflatten(2, (blocks, window))
        return x.transpose(1, 2)

    def with_previous(x):
        x = split(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=3).flatten(0, 1)

    row = torch.arange(window)[:, None]
    column = torch.arange(-window, window)[None, :]
    band = ((column <= row) & (column > row - window)).repeat(blocks, 1, 1)
    band[0] &= column >= 0  # the first block has no block before it
    mask = torch.zeros(band.shape).masked_fill(~band, -torch.inf).repeat(batch, 1, 1)[:, None]
    out = dense_attention(
        split(query).flatten(0, 1), with_previous(key), with_previous(value), mask
    )
    out = out.view(batch, blocks, heads, window, dim).transpose(1, 2)
    return out.reshape(batch, heads, -1, dim)[:, :, :length]


ALL_ATTENTION_FUNCTIONS.register("train_attention", train_attention)


# --- Batches: rows of (tokens, weight of the loss at each token) --------------------------------


class Rows:
    """Draws training rows of one stage; a pure function of seed and step."""

    def __init__(self, tokenizer, text_ids: torch.Tensor, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.text = text_ids.tolist()
        self.bos = tokenizer.bos_token_id
        self.intro = tokenizer.encode(data.INTRO, add_special_tokens=False)

        def one(text: str) -> int:
            (token,) = tokenizer.encode(text, add_special_tokens=False)
            return token

        digits = [one(f"{space}{digit}") for space in ("", " ") for digit in range(10)]
        self.alphabet = digits + [one(f" {word}") for word in data.KEY_WORDS]
        self.end = tokenizer.encode(".", add_special_tokens=False)

    def batch(self, stage: Stage, step: int):
        """Token ids and their kinds (NOISE, TEXT, REPEAT, ANSWER), both `[B, T]`."""
        rng = random.Random(f"{self.seed}/{step}")
        rows = []
        for _ in range(stage.rows):
            kind = rng.random()
            if kind < stage.repeat:
                rows.append(self.repeated(stage.length, self.alphabet[: stage.num_words + 20], rng))
            elif kind < stage.repeat + stage.text:
                rows.append(self.plain(stage.length, rng))
            else:
                rows.append(self.needles(stage, rng))
        ids, kinds = zip(*rows)
        return torch.tensor(ids), torch.tensor(kinds)

    def cut(self, length: int, rng: random.Random) -> list[int]:
        start = rng.randrange(len(self.text) - length + 1)
        return self.text[start : start + length]

    def plain(self, length: int, rng: random.Random):
        return [self.bos, *self.cut(length - 1, rng)], [TEXT] * length

    def repeated(self, length: int, alphabet: list[int], rng: random.Random):
        """Random tokens said again and again: the second time on, every token can be known."""
        size = rng.randint(length // 8, min(length // 2, len(alphabet)))
        segment = rng.sample(alphabet, size)
        ids = [self.bos, *(segment * (length // size + 1))][:length]
        return ids, [REPEAT if i > size + 1 else NOISE for i in range(length)]

    def needles(self, stage: Stage, rng: random.Random):
        """Facts strewn in text, then a question for each: the sentences of `needle_examples`."""
        words = data.KEY_WORDS[: stage.num_words]
        task = "single_3" if rng.random() < 0.1 else "multikey"
        needles = data.draw_needles(
            task, self.tokenizer, rng.randint(*stage.num_keys), rng, words=words
        )
        asked = rng.sample(needles, len(needles))
        tail: list[int] = []
        kinds: list[int] = []
        for number, needle in enumerate(asked):
            if number:
                tail += self.end
                kinds += [TEXT]
            tail += [*needle.question, *needle.answer]
            kinds += [TEXT] * len(needle.question) + [ANSWER] * len(needle.answer)
        statements = [needle.statement for needle in needles]
        room = stage.length - 1 - len(self.intro) - len(tail) - sum(map(len, statements))
        if room < 0:
            smaller = replace(stage, num_keys=(1, max(1, len(needles) - 1)))
            return self.needles(smaller, rng)
        haystack = self.cut(room, rng) if room else []
        offsets = [rng.randint(0, room) for _ in statements]
        context = data.hide(haystack, statements, offsets)
        ids = [self.bos, *self.intro, *context, *tail]
        return ids, [TEXT] * (len(ids) - len(tail)) + kinds


# --- Training -----------------------------------------------------------------------------------


def optimizers(model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def losses(model, ids: torch.Tensor, kinds: torch.Tensor, text_part: float):
    """Mean loss on text tokens (a random part of them) and on answers, and answers right."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # The last token predicts nothing; cutting it after the model keeps the length even.
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    targets, kinds = ids[:, 1:], kinds[:, 1:]
    chosen = (kinds > TEXT) | ((kinds == TEXT) & (torch.rand(kinds.shape) < text_part))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.lm_head(hidden[chosen])
    targets, kinds = targets[chosen], kinds[chosen]
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    right = (logits.argmax(-1) == targets).float()
    means = {}
    for kind in (TEXT, ANSWER, REPEAT):
        of_kind = kinds == kind
        if of_kind.any():
            means[kind] = (each[of_kind].mean(), right[of_kind].mean().item())
    return means


def schedule() -> list[tuple[Stage, float]]:
    """Stage and learning-rate factor of every step.

    Within a phase: 20 steps up, then constant, over the last third down to a twentieth.
    """
    plan = []
    for phase in PHASES:
        stages = [stage for stage in phase for _ in range(stage.steps)]
        total = len(stages)
        for step, stage in enumerate(stages):
            fall = 0.05 + 0.95 * (total - step) / (total / 3)
            plan.append((stage, min(1.0, (step + 1) / 20, fall)))
    return plan


def train(args, tokenizer, train_ids, haystack) -> None:
    """The loop: batch, loss, backward, step, log, save. Resumes from `OUT.state`."""
    state = Path(f"{args.out}.state")
    model = build_model(tokenizer, args.hidden, args.head_dim, args.seed)
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
        local = random.Random(f"{args.seed}/local/{step}").random() < stage.local
        if local:
            stage = replace(stage, text=1.0, repeat=0.0)
            windows.update(dict.fromkeys(range(8), WINDOW))
        means = losses(model, *rows.batch(stage, step), stage.text_part)
        windows.clear()
        sum(loss for loss, _ in means.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        recent.append({KINDS[kind]: (loss.item(), right) for kind, (loss, right) in means.items()})
        step += 1
        if step % LOG_EVERY == 0:
            log.append(summary(step, stage, recent, time.time() - began))
            print(json.dumps(log[-1]), flush=True)
            recent = []
        if step % EVALUATE_EVERY == 0 or step == total:
            log[-1].update(quick_evaluation(model, tokenizer, haystack, stage.length))
            print(json.dumps(log[-1]), flush=True)
            save_state(state, model, opts, step, log, time.time() - began)
    save_checkpoint(args.out, model, tokenizer, log)


def summary(step: int, stage: Stage, recent: list[dict], seconds: float) -> dict:
    """One line of the log: means since the last line."""
    line: dict = {"step": step, "length": stage.length, "seconds": round(seconds)}
    for kind in KINDS.values():
        pairs = [entry[kind] for entry in recent if kind in entry]
        if pairs:
            line[f"{kind}_loss"] = round(sum(loss for loss, _ in pairs) / len(pairs), 4)
            line[f"{kind}_right"] = round(sum(right for _, right in pairs) / len(pairs), 4)
    return line


def save_state(folder: Path, model, opts, step: int, log: list, seconds: float) -> None:
    """All a run needs to go on as if it had not stopped; written aside, then swapped in."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(opts):
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"opt/{number}/{index}/{name}": t for name, t in entry.items()}
    fresh = Path(f"{folder}.new")
    fresh.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, fresh / "state.safetensors")
    (fresh / "log.json").write_text(json.dumps({"step": step, "seconds": seconds, "log": log}))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def resume(folder: Path, model, opts) -> tuple[int, list, float]:
    """Load what `save_state` wrote, if anything: step, log and seconds so far."""
    if not folder.exists():
        return 0, [], 0.0
    tensors = load_file(folder / "state.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for number, optimizer in enumerate(opts):
        states: dict = {}
        for name, tensor in tensors.items():
            if name.startswith(f"opt/{number}/"):
                index, field = name.split("/")[2:]
                states.setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    saved = json.loads((folder / "log.json").read_text())
    return saved["step"], saved["log"], saved["seconds"]


def save_checkpoint(out: str, model, tokenizer, log: list) -> None:
    """Write config, bfloat16 weights, tokenizer and log to a new folder, then swap it in."""
    fresh = Path(f"{out}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.config._attn_implementation = "sdpa"
    half = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.tie_weights()
    half.save_pretrained(fresh)
    model.config._attn_implementation = "train_attention"
    tokenizer.save_pretrained(fresh)
    described = json.loads((fresh / "tokenizer_config.json").read_text())
    # The name that transformers 4 and 5 both know.
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    (fresh / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (fresh / "model.safetensors").chmod(0o644)
    lines = ",\n".join(json.dumps(line) for line in log)
    (fresh / "training_log.json").write_text(f"[\n{lines}\n]\n")
    card = Path(out) / "README.md"
    if card.exists():
        shutil.copy(card, fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


# --- Evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def recall(model, examples: list[data.Example]) -> float:
    """Part of the examples whose answer tokens are all the most likely ones, teacher-forced."""
    right = []
    for start in range(0, len(examples), 4):
        chunk = examples[start : start + 4]
        hidden = model.model(torch.tensor([e.ids for e in chunk]), use_cache=False)[0]
        for example, row in zip(chunk, hidden):
            logits = model.lm_head(row[example.answer_start - 1 : -1])
            right.append(logits.argmax(-1).tolist() == list(example.answer))
    return sum(right) / len(right)


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
    depths = [i / 10 for i in range(11)]
    return data.needle_examples(
        task, tokenizer, haystack, length=length, depths=depths, count=count, seed=7
    )


def quick_evaluation(model, tokenizer, haystack, length: int) -> dict:
    """Recall and perplexity with everything seen and with the window in every layer."""
    length = max(length, 256)
    examples = needle_set(tokenizer, haystack, length, 22)
    found = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, active in (("full", {}), ("window", dict.fromkeys(range(8), WINDOW))):
            windows.update(active)
            found[f"recall_{name}"] = round(recall(model, examples), 3)
            ppl = perplexity(model, haystack, tokenizer.bos_token_id, length, 4096 // length)
            found[f"ppl_{name}"] = round(ppl, 3)
    windows.clear()
    return found


def with_window(source: Qwen3ForCausalLM, full: tuple[int, ...]) -> Qwen3ForCausalLM:
    """The same weights with the window in all layers but `full`, as plain transformers reads it."""
    config = Qwen3Config(**source.config.to_dict())
    config.use_sliding_window, config.sliding_window = True, WINDOW
    config.layer_types = [
        "full_attention" if layer in full else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(source.state_dict())
    return model.eval()


def evaluate(path: str, held_out: list[str], length: int, count: int) -> dict:
    """Print recall and perplexity: all layers full, all windowed, and every pair of full layers."""
    source = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.cat([data.token_ids(tokenizer, text) for text in held_out])
    layers = range(source.config.num_hidden_layers)
    found: dict = {"length": length, "examples": count, "window": WINDOW}
    for name, full in (("full", tuple(layers)), ("window", ())):
        model = with_window(source, full)
        line = {"perplexity": perplexity(model, ids, tokenizer.bos_token_id, length, 32)}
        for task in data.NEEDLE_TASKS:
            line[task] = recall(model, needle_set(tokenizer, ids, length, count, task))
        found[name] = {key: round(value, 3) for key, value in line.items()}
        print(f"{name:>7}  " + "  ".join(f"{k} {v:.3f}" for k, v in line.items()), flush=True)
    examples = needle_set(tokenizer, ids, length, count)
    by_depth: dict = {}
    model = with_window(source, tuple(layers))
    for example in examples:
        by_depth.setdefault(example.depth, []).append(recall(model, [example]))
    found["by_depth"] = {depth: sum(v) / len(v) for depth, v in by_depth.items()}
    print("full, multikey by depth: ", found["by_depth"], flush=True)
    pairs = {}
    for pair in itertools.combinations(layers, 2):
        pairs[pair] = recall(with_window(source, pair), examples)
        print(f"full layers {pair}: multikey {pairs[pair]:.3f}", flush=True)
    best = sorted(pairs, key=lambda pair: -pairs[pair])
    print("best:", ", ".join(f"{pair} {pairs[pair]:.3f}" for pair in best[:8]))
    uniform = [(i, i + len(layers) // 2) for i in range(len(layers) // 2)]
    print("uniform:", ", ".join(f"{pair} {pairs[pair]:.3f}" for pair in uniform))
    found["pairs"] = {f"{a},{b}": round(value, 3) for (a, b), value in pairs.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluate", metavar="FOLDER", help="evaluate this checkpoint instead")
    parser.add_argument("--length", type=int, default=1024, help="tokens, for --evaluate")
    parser.add_argument("--count", type=int, default=44, help="examples, for --evaluate")
    parser.add_argument("--out", default="my_checkpoint", help="folder to write")
    parser.add_argument("--text", nargs="*", type=Path, default=TEXTS, help="plain text files")
    parser.add_argument("--steps", type=int, help="stop after so many steps; goes on when rerun")
    parser.add_argument("--minutes", type=float, default=120, help="stop after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--head_dim", type=int, default=32)
    args = parser.parse_args()
    texts = [data.read_text(path) for path in args.text]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    parts = [text[:cut] for text, cut in zip(texts, cuts)]
    rest = [text[cut:] for text, cut in zip(texts, cuts)]
    if args.evaluate:
        evaluate(args.evaluate, rest, args.length, args.count)
        return
    tokenizer = train_tokenizer(parts, VOCABULARY)
    train_ids = torch.cat([data.token_ids(tokenizer, part) for part in parts])
    held_out = torch.cat([data.token_ids(tokenizer, text) for text in rest])
    train(args, tokenizer, train_ids, held_out)


if __name__ == "__main__":
    main()
