"""Distillation steps of ours beside those of trl, whose environment is its own.

    python benchmarks/bench_distill_peers.py --install                # makes the environment, too
    python benchmarks/bench_distill_peers.py --python ENV/bin/python [--models checkpoint 32K]

Forward KL on the same tokens, towards the same teacher, training the same parameters with the same
AdamW; one thread, CPU seconds of whole optimizer steps in turns, first and last left out. Gate
first: the losses of every step agree to 1e-4, or no speed is printed for that trainer.

gkd: trl's GKDTrainer without its generation (lmbda 0), whole logits of both models.
distillation: trl's DistillationTrainer with a loss in chunks. It has no run without generation, so
a subclass hands it the given tokens as if generated: what is timed is the training alone.
What differs: trl's student is the source with transformers' own sliding window, ours a hybrid of
the same window; trl holds two whole models. Padding: none on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

PEERS = ("gkd", "distillation")
TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "checkpoint"


# --- in the other environment: nothing of morph, and no neighbour of this file -------------------


def worker(peer: str, folder: Path, settings: dict[str, Any]) -> None:
    """Train as many steps as there are batches; print losses and CPU seconds as JSON."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)
    rows = load_file(folder / "batches.safetensors")["ids"]  # [steps, B, T]
    config = AutoConfig.from_pretrained(settings["model"])
    config.layer_types = settings["layer_types"]
    config.sliding_window, config.use_sliding_window = settings["window"], True
    plain = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    teacher = AutoModelForCausalLM.from_pretrained(settings["model"], **plain).eval()
    student = AutoModelForCausalLM.from_pretrained(settings["model"], config=config, **plain)
    student.requires_grad_(False)
    for kind, layer in zip(config.layer_types, student.model.layers):
        layer.self_attn.requires_grad_(kind == "sliding_attention")
    losses: list[float] = []
    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.process_time())

    base, config_class = _trainer(peer)
    common: dict[str, Any] = {
        "output_dir": str(folder / peer),
        "per_device_train_batch_size": rows.shape[1],
        "max_steps": len(rows),
        "learning_rate": settings["lr"],
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "beta": 0.0,
        "temperature": 1.0,
    }
    batches, own = iter(rows), {"lmbda": 0.0} if peer == "gkd" else {}

    class Trainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _generate_and_score_completions(self, _inputs: Any) -> dict[str, Any]:
            ids = next(batches)
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": torch.ones_like(ids[:, :1]),
                "completion_ids": ids[:, 1:],
                "completion_mask": torch.ones_like(ids[:, 1:]),
                "num_items_in_batch": torch.tensor(float(ids[:, 1:].numel())),
            }

    def collate(_examples: Any) -> dict[str, Any]:
        ids = next(batches)
        labels = ids.clone()
        labels[:, 0] = -100  # nothing predicts it, and it must not be counted
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)  # asked for, not used
    tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model=student,
        teacher_model=teacher,
        args=config_class(**common, **own),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * rows.shape[0] * rows.shape[1]}),
        processing_class=tokenizer,
        callbacks=[Marks()],
        **({"data_collator": collate} if peer == "gkd" else {}),
    )
    trainer.train()
    seconds = [b - a for a, b in zip(marks, marks[1:])]  # noqa: RUF007 - may run on old Pythons
    print(json.dumps({"losses": losses, "seconds": seconds}))


def _trainer(peer: str) -> tuple[Any, Any]:
    if peer == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        return GKDTrainer, GKDConfig
    from trl import DistillationConfig, DistillationTrainer

    return DistillationTrainer, DistillationConfig


# --- here ---------------------------------------------------------------------------------------


def install(folder: Path) -> str:
    """Make an environment with trl and the torch of this one; return its Python."""
    import torch

    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = [f"torch=={torch.__version__.split('+')[0]}", "trl"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"trl could not be installed, so nothing was measured:\n{done.stderr[-1500:]}")
    return python


def ask(python: str, peer: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a trainer once in the other environment; return what it prints, or its error."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    env.pop("PYTHONPATH", None)
    command = [python, __file__, "--worker", peer, str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, python: str, steps: int, rounds: int, work: Path) -> dict[str, Any]:
    """Measure ours and every trainer in turns; gate; return tokens per second and ratios."""
    import _bench
    import bench_distill as bench
    import torch
    from safetensors.torch import save_file

    case = bench.make(name, work)
    stage = case.stage("logits", steps)
    own = bench.distill.text_batches(case.ids, seed=0)(0, stage)
    count = case.source().config.num_hidden_layers
    kinds = ["full_attention" if i in case.full else "sliding_attention" for i in range(count)]
    settings = {
        "model": str(case.folder),
        "layer_types": kinds,
        "window": bench.WINDOW,
        "lr": bench.LR,
    }
    save_file(
        {"ids": torch.stack([own.batch(s) for s in range(steps)])}, work / "batches.safetensors"
    )
    seconds: dict[str, list[float]] = {"ours": [], **{p: [] for p in PEERS}}
    errors: dict[str, str] = {}
    for _ in range(rounds):
        # With labels, ours leaves out the last position as trl does.
        losses, taken = bench.ours(case, "sliding", "logits", steps, with_labels=True)
        seconds["ours"] += taken[1:-1]
        for peer in PEERS:
            found = ask(python, peer, work, settings)
            if "error" in found:
                errors[peer] = found["error"]
                continue
            for step, right in enumerate(found["losses"]):
                got = torch.tensor(losses[step])
                _bench.gate(f"{name} {peer} {step}", torch.tensor(right), got, 1e-4)
            seconds[peer] += found["seconds"][:-1]  # gaps: the first step is no gap
    tokens = case.rows * bench.SEQ_LEN
    rates = {n: tokens / statistics.median(s) for n, s in seconds.items() if s}
    ratios = {n: rates["ours"] / r for n, r in rates.items() if n != "ours"}
    return {"tokens_per_second": rates, "ours_over": ratios, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="of an environment with trl")
    parser.add_argument("--install", action="store_true", help="make that environment, and drop it")
    parser.add_argument("--models", nargs="+", default=["checkpoint", "32K"])
    parser.add_argument("--steps", type=int, default=5, help="of each turn; 3 of 5 count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH", help="write the result there")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        peer, folder, settings = args.worker
        worker(peer, Path(folder), json.loads(settings))
        return
    if not (args.python or args.install):
        print("nothing was measured: trl needs an environment of its own; --python or --install.")
        return
    import _bench
    from transformers.utils import logging

    _bench.one_thread()
    logging.disable_progress_bar()
    lines: list[str] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="morph-bench-") as name:
        work = Path(name)
        python = args.python or install(work / "env")
        code = "import trl, transformers; print(trl.__version__, transformers.__version__)"
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        versions = asked.stdout.split()
        lines.append(f"trl {versions[0]} on transformers {versions[1]}, one thread, float32")
        for model in args.models:
            found = result[model] = compare(model, python, args.steps, args.rounds, work)
            rates, ratios = found["tokens_per_second"], found["ours_over"]
            told = [f"{n} {rates[n]:.0f} ({r:.2f}x)" for n, r in ratios.items()]
            told += [f"{n} failed: {error}" for n, error in found["errors"].items()]
            lines.append(f"{model}: ours {rates['ours']:.0f} tokens/s; {', '.join(told)}")
        result["versions"] = dict(zip(("trl", "transformers"), versions))
    _bench.report(lines, result, args.json)


if __name__ == "__main__":
    main()
