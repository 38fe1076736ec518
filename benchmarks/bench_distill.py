"""Distillation steps: align beside logits, ours beside two plain models, and memory that stays.

    python benchmarks/bench_distill.py [--parts align naive memory] [--models checkpoint ...]

One thread; CPU seconds of whole optimizer steps (batch, forward, backward, clip, AdamW, log), in
turns; first and last step of every turn are left out (start-up; the saved state). `train:
attention`, 512 tokens a row. Gates first, or no speed is printed: the first loss of align is the
relative error of the layers computed by hand and that of logits the KL of whole logits (1e-5); in
`naive` the losses of three steps in float64 agree with the plain loop's to 1e-8.

align: tokens/s of an align stage over those of a logits stage. naive: tokens/s of a logits stage
over those of a plain loop with two models of transformers that trains the same parameters; its
student is the same hybrid as an ordinary module ("module"), or transformers' own sliding window
("native"); then the same with the teacher's hidden states kept from an earlier run. memory: what a
process holds after one step beyond its imports, over one model with an optimizer of what trains.
Goals: 1.6x, 1.5x, at most 1.15x.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _bench
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from morph import distill, modeling, surgery
from morph.data import read_text, token_ids
from morph.plan import uniform_plan
from morph.recipes.schema import Stage, Training

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "data" / "sherlock_holmes.txt"
WINDOW, SEQ_LEN, LR = 64, 512, 1e-4
MIXERS: dict[str, dict[str, Any]] = {"sliding": {"window": WINDOW}, "decay": {}}
DEEP = {"num_hidden_layers": 24, "head_dim": 32, "hidden_size": 256, "intermediate_size": 768}
EVERY_FOURTH, LOWER_HALF = tuple(range(3, 24, 4)), tuple(range(12))
# name -> vocabulary (None: the embedded checkpoint), full layers, rows of a batch
MODELS: dict[str, tuple[int | None, tuple[int, ...], int]] = {
    "checkpoint": (None, (5, 7), 4),
    "32K": (32768, EVERY_FOURTH, 2),
    "32K-lower": (32768, LOWER_HALF, 2),
    "152K": (151936, EVERY_FOURTH, 1),
    "152K-lower": (151936, LOWER_HALF, 1),
}
Measured = tuple[list[float], list[float]]  # losses of all steps, CPU seconds of each


@dataclass(frozen=True, kw_only=True)
class Case:
    """A source on disk, the text it learns on, and what is converted."""

    name: str
    folder: Path
    ids: torch.Tensor  # [N]
    full: tuple[int, ...]
    rows: int
    dtype: torch.dtype = torch.float32

    def source(self, **changes: Any) -> nn.Module:
        """Return the source, loaded anew; `changes` go to its config."""
        config = {"config": _config(self.folder, **changes)} if changes else {}
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=self.dtype, attn_implementation="sdpa", **config
        ).eval()

    def hybrid(self, source: nn.Module, mixer: str) -> nn.Module:
        geometry = surgery.geometry_of(source)
        plan = uniform_plan("qwen3", geometry, self.full, mixer, MIXERS[mixer], None)
        torch.manual_seed(0)
        return modeling.hybrid(source, plan)

    def native(self) -> nn.Module:
        """Return the source with transformers' own sliding window in the layers to convert."""
        count = _config(self.folder).num_hidden_layers
        kinds = ["full_attention" if i in self.full else "sliding_attention" for i in range(count)]
        return self.source(layer_types=kinds, sliding_window=WINDOW, use_sliding_window=True)

    def stage(self, loss: str, steps: int) -> Stage:
        """Return a stage of so many steps at a constant rate, saved at its end only."""
        return Stage(
            loss=loss,  # type: ignore[arg-type]
            tokens=steps * self.rows * SEQ_LEN,
            seq_len=SEQ_LEN,
            batch_size=self.rows,
            train="attention",
            lr=LR,
            gate_lr=LR,
            min_lr_fraction=1.0,
            warmup_fraction=0.0,
            save_every=steps,
        )


def _config(folder: Path, **changes: Any) -> Qwen3Config:
    config = Qwen3Config.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def make(name: str, work: Path) -> Case:
    """Return a case; a random model is written into the folder `work` once."""
    vocab, full, rows = MODELS[name]
    if vocab is None:
        folder = ROOT / "examples" / "checkpoint"
        ids = token_ids(AutoTokenizer.from_pretrained(folder), read_text(TEXT))
        return Case(name=name, folder=folder, ids=ids, full=full, rows=rows)
    folder = work / str(vocab)
    if not folder.exists():
        random_model(folder, vocab_size=vocab, **DEEP)
    ids = torch.randint(0, vocab, (65536,), generator=torch.Generator().manual_seed(1))
    return Case(name=name, folder=folder, ids=ids, full=full, rows=rows)


def random_model(folder: Path, **shape: int) -> None:
    """Write a random Qwen3 whose attention is far from uniform, so that a window changes it."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(**heads, max_position_embeddings=2048, **shape))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_().mul_(p.shape[-1] ** -0.5)
    model.save_pretrained(folder)


# --- the two loops ------------------------------------------------------------------------------


def ours(
    case: Case,
    mixer: str,
    loss: str,
    steps: int,
    *,
    with_labels: bool = False,
    models: tuple[nn.Module, nn.Module] | None = None,
    cache: str | None = None,
    after: Callable[[], None] = lambda: None,
) -> Measured:
    """Distil through the public function, by default a new hybrid; `after` is called every step.

    With labels, the last position of a row is left out. `cache` keeps the teacher's hidden states.
    """
    if models is None:
        teacher = case.source()
        models = case.hybrid(teacher, mixer), teacher
    marks = [time.process_time()]

    def told(event: distill.Event) -> None:
        if event.kind == "step":
            marks.append(time.process_time())
            after()

    with tempfile.TemporaryDirectory() as out:
        stages, source = [case.stage(loss, steps)], _source(case, with_labels)
        log = distill.distill(
            *models,
            stages,
            source,
            out=Path(out),
            seed=0,
            progress=told,
            training=Training(teacher_cache=cache),
        )
    return log.losses(0), [b - a for a, b in pairwise(marks)]


def naive(
    case: Case,
    student: nn.Module,
    steps: int,
    teacher: nn.Module | None = None,
    after: Callable[[], None] = lambda: None,
) -> Measured:
    """Distil as a plain loop over two whole models does; `after` is called every step."""
    teacher, stage = teacher or case.source(), case.stage("logits", steps)
    batches, trained = _source(case)(0, stage), _trained(case, student)
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses, marks = [], [time.process_time()]
    for step in range(steps):
        ids = batches.batch(step)
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits
        logits = student(input_ids=ids, use_cache=False).logits
        loss = plain_kl(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del target, logits, loss  # nothing of a step stays, neither in memory nor in the next one
        marks.append(time.process_time())
        after()
    return losses, [b - a for a, b in pairwise(marks)]


def _trained(case: Case, model: nn.Module) -> list[nn.Parameter]:
    """Freeze a model but for the attention of the layers to convert; return its parameters."""
    model.requires_grad_(False)
    layers = [x.self_attn for i, x in enumerate(model.model.layers) if i not in case.full]
    return [p.requires_grad_(True) for layer in layers for p in layer.parameters()]


def _source(case: Case, with_labels: bool = False) -> distill.Source:
    plain = distill.text_batches(case.ids, seed=0)

    def labelled(index: int, stage: Stage) -> Any:
        own = plain(index, stage)
        return SimpleNamespace(batch=lambda step: (own.batch(step), own.batch(step)))

    return labelled if with_labels else plain


def plain_kl(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the KL of whole logits [B, T, V], mean over tokens."""
    p, q = (log_softmax(x.flatten(0, 1), -1) for x in (target, logits))
    return kl_div(q, p, reduction="batchmean", log_target=True)


def students(case: Case, mixer: str) -> dict[str, Callable[[], nn.Module]]:
    """Return what the plain loop can train: our hybrid, and transformers' own where it has one."""
    module = {"module": lambda: copy.deepcopy(case.hybrid(case.source(), mixer))}
    return {**module, "native": case.native} if mixer == "sliding" else module


# --- parts --------------------------------------------------------------------------------------


def in_turns(runs: dict[str, Callable[[], Measured]], rounds: int) -> tuple[Any, dict[str, float]]:
    """Return losses, and the median CPU seconds of a step, of runs taken A B A B."""
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            losses[name], taken = run()
            seconds[name] += taken[1:-1]
    return losses, {n: statistics.median(s) for n, s in seconds.items()}


def gate_first_losses(case: Case, mixer: str) -> None:
    """Compare the first losses of both stages with what they mean, computed by hand."""
    teacher = case.source()
    student = case.hybrid(teacher, mixer)
    ids = _source(case)(0, case.stage("align", 1)).batch(0)
    seen: dict[int, Any] = {}
    for i, layer in enumerate(teacher.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _m, args, kwargs, out, i=i: seen.update({i: (args, kwargs, out[0])}),
            with_kwargs=True,
        )
    with torch.no_grad():
        target = teacher(input_ids=ids, use_cache=False).logits.double()
        errors = []
        for i, module in surgery.hybrid_layers(student).items():
            args, kwargs, right = seen[i]
            got = module(*args, **kwargs)[0]
            errors.append((got - right).double().square().sum() / right.double().square().sum())
        logits = student(input_ids=ids, use_cache=False).logits.double()
    by_hand = {"align": torch.stack(errors).mean(), "logits": plain_kl(logits, target)}
    for loss, expected in by_hand.items():
        first = ours(case, mixer, loss, 1)[0][0]
        _bench.gate(f"{case.name} {mixer} {loss}", expected, torch.tensor(first).double())


def gate_loops(case: Case, mixer: str) -> None:
    """Compare three losses of both loops; in float64, for Adam makes much of what is rounded."""
    mine = ours(case, mixer, "logits", 3)[0]
    for name, made in students(case, mixer).items():
        for step, right in enumerate(naive(case, made(), 3)[0]):
            got = torch.tensor(mine[step], dtype=torch.float64)
            right = torch.tensor(right, dtype=torch.float64)
            _bench.gate(f"{case.name} {mixer} {name} {step}", right, got, 1e-8)


def align_part(case: Case, mixer: str, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    gate_first_losses(case, mixer)
    both = ("align", "logits")
    runs = {x: functools.partial(ours, case, mixer, x, args.steps) for x in both}
    _, seconds = in_turns(runs, args.rounds)
    rates = {n: case.rows * SEQ_LEN / s for n, s in seconds.items()}
    ratio = rates["align"] / rates["logits"]
    line = (
        f"align {case.name} {mixer}: {rates['align']:.0f} tokens/s, logits "
        f"{rates['logits']:.0f}: {ratio:.2f}x"
    )
    return line, {"tokens_per_second": rates, "align_over_logits": ratio}


def naive_part(case: Case, mixer: str, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    runs: dict[str, Callable[[], Measured]] = {
        "ours": functools.partial(ours, case, mixer, "logits", args.steps)
    }
    others = students(case, mixer)
    gate_loops(replace(case, dtype=torch.float64), mixer)
    for name, made in others.items():
        runs[name] = lambda made=made: naive(case, made(), args.steps)
    with tempfile.TemporaryDirectory() as kept:
        runs["cached"] = functools.partial(ours, case, mixer, "logits", args.steps, cache=kept)
        runs["cached"]()  # fills the cache: what is measured is a second run on the same text
        losses, seconds = in_turns(runs, args.rounds)
    if losses["cached"] != losses["ours"]:
        raise SystemExit("refused: with the teacher kept, the losses are others.")
    rates = {n: case.rows * SEQ_LEN / s for n, s in seconds.items()}
    ratios = {n: rates["ours"] / rates[n] for n in others}
    cached = {n: rates["cached"] / rates[n] for n in others}
    told = ", ".join(f"{n} {rates[n]:.0f} ({ratios[n]:.2f}x, {cached[n]:.2f}x)" for n in others)
    line = (
        f"naive {case.name} {mixer}: ours {rates['ours']:.0f} tokens/s, with the teacher kept "
        f"{rates['cached']:.0f}; {told}"
    )
    return line, {
        "tokens_per_second": rates,
        "ours_over": ratios,
        "cached_over": cached,
        "losses": losses,
    }


# --- memory -------------------------------------------------------------------------------------

BIG = {"num_hidden_layers": 16, "head_dim": 96, "hidden_size": 768, "intermediate_size": 2304}
BIG_FULL = (3, 7, 11, 15)


def resident(side: str, mixer: str, folder: Path) -> None:
    """Print what one side holds after its first step, and its peak; a child's whole life."""
    found: list[int] = []
    ids = torch.randint(0, 500, (4096,), generator=torch.Generator().manual_seed(1))
    for name in ("small", "big"):  # the small one brings all imports, so that base is theirs
        base = _bench.settled_bytes()
        case = Case(name=name, folder=folder / name, ids=ids, full=BIG_FULL, rows=1)
        found.clear()
        peak = _step(case, side, mixer, lambda: found.append(_bench.settled_bytes()))
    print(found[0] - base, peak - base)


def _step(case: Case, side: str, mixer: str, after: Callable[[], None]) -> int:
    """Load, take two steps, call `after` each; return the peak of the process since loading."""
    source = case.source()
    if side == "ours":
        student = case.hybrid(source, mixer)
        _bench.forget_peak()
        ours(case, mixer, "logits", 2, models=(student, source), after=after)
    elif side == "two models":
        student = copy.deepcopy(case.hybrid(source, mixer))
        _bench.forget_peak()
        naive(case, student, 2, source, after)
    else:
        trained = _trained(case, source)
        optimizer = torch.optim.AdamW(trained, lr=LR)
        _bench.forget_peak()
        ids = case.ids[None, :SEQ_LEN]
        for _ in range(2):
            source(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after()
    return _bench.memory("VmHWM")


def memory_part(mixer: str, work: Path) -> tuple[str, dict[str, Any]]:
    if not (work / "big").exists():
        small = {"hidden_size": 64, "intermediate_size": 64}
        random_model(work / "small", vocab_size=32768, **{**BIG, **small})
        random_model(work / "big", vocab_size=32768, **BIG)
    held: dict[str, dict[str, float]] = {}
    for side in ("one model", "ours", "two models"):
        out = _bench.last_line(__file__, "--resident", side, mixer, str(work))
        stays, peak = (int(x) / 2**20 for x in out.split())
        held[side] = {"resident_mib": stays, "peak_mib": peak}
    one = held["one model"]
    ratios = {
        f"{n} {k}": held[n][f"{k}_mib"] / one[f"{k}_mib"]
        for n in ("ours", "two models")
        for k in ("resident", "peak")
    }
    line = (
        f"memory {mixer}: one model and optimizer {one['resident_mib']:.0f} MiB; ours "
        f"{ratios['ours resident']:.2f}x, two plain models {ratios['two models resident']:.2f}x; "
        f"peaks of a step {one['peak_mib']:.0f} MiB (cross-entropy), {ratios['ours peak']:.2f}x, "
        f"{ratios['two models peak']:.2f}x"
    )
    return line, {**held, "over_one_model": ratios}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("align", "naive", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS)[:3])
    parser.add_argument("--mixers", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--steps", type=int, default=5, help="of each turn; 3 of 5 count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    parser.add_argument("--resident", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error("--steps: give 3 or more; the first and the last do not count.")
    _bench.one_thread()
    logging.disable_progress_bar()
    if args.resident:
        side, mixer, folder = args.resident
        resident(side, mixer, Path(folder))
        return
    lines: list[str] = [f"one thread, float32, rows of {SEQ_LEN} tokens, window {WINDOW}"]
    result: dict[str, Any] = {}

    def keep(key: str, told: tuple[str, dict[str, Any]]) -> None:
        lines.append(told[0])
        result[key] = told[1]
        print(told[0], flush=True)

    with tempfile.TemporaryDirectory(prefix="morph-bench-") as name:
        work = Path(name)
        for part, run in (("align", align_part), ("naive", naive_part)):
            for model in args.models if part in args.parts else ():
                for mixer in args.mixers:
                    keep(f"{part} {model} {mixer}", run(make(model, work), mixer, args))
        for mixer in args.mixers if "memory" in args.parts else ():
            keep(f"memory {mixer}", memory_part(mixer, work))
    _bench.report(lines, result, args.json)


if __name__ == "__main__":
    main()
