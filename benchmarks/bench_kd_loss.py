"""KL to the teacher over a big vocabulary: chunked with the head frozen, against the plain way.

Each side runs in its own process, so that its peak memory is its own; time is CPU seconds of one
forward and backward, sides interleaved, medians. The equality gate comes first: where loss or
gradient differ by more than 1e-6 (relative, float64 as referee), no speed is printed.

    python benchmarks/bench_kd_loss.py [--tokens 512] [--hidden 256] [--vocab 151936] [--chunk 64]
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
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, log_softmax

from morph.distill import Head, head_kl


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, Head]:
    """Return student hidden [T, D], teacher hidden [T, D] and a head [V, D] with a fixed seed."""
    make = torch.Generator().manual_seed(0)
    teacher = torch.randn(args.tokens, args.hidden, generator=make)
    student = teacher + 0.3 * torch.randn(args.tokens, args.hidden, generator=make)
    weight = torch.randn(args.vocab, args.hidden, generator=make).mul_(args.hidden**-0.5)
    return student.requires_grad_(), teacher, Head(weight=weight)


def naive(student: torch.Tensor, teacher: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the KL as a few lines of PyTorch: logits of both sides, all tokens at once."""
    with torch.no_grad():
        target = log_softmax(head.logits(teacher), -1)
    return kl_div(
        log_softmax(head.logits(student), -1), target, reduction="batchmean", log_target=True
    )


def measure(args: argparse.Namespace) -> None:
    """Run one side once and print its numbers; loss and gradient go to a file."""
    student, teacher, head = inputs(args)
    if args.side == "float64":
        student = student.detach().double().requires_grad_()
        teacher, head = teacher.double(), Head(weight=head.weight.double())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    base = _status("VmRSS")
    start = time.process_time()
    if args.side == "chunked":
        loss = head_kl(student, teacher, head, chunk_tokens=args.chunk)
    elif args.side == "naive":
        loss = naive(student, teacher, head)
    else:  # chunked in float64: the plain way would need 4 GB, and equals it in the tests
        loss = head_kl(student, teacher, head, chunk_tokens=args.chunk)
    loss.backward()
    seconds = time.process_time() - start
    peak = _status("VmHWM")
    save_file({"loss": loss.detach().double(), "grad": student.grad.double()}, args.result)
    print(json.dumps({"cpu_seconds": seconds, "peak_over_base_mib": (peak - base) / 2**20}))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def side(name: str, args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Run one side in a fresh process and return what it printed."""
    result = f"{folder}/{name}.safetensors"
    shape = [f"--{k}={getattr(args, k)}" for k in ("tokens", "hidden", "vocab", "chunk")]
    command = [sys.executable, __file__, *shape, f"--side={name}", f"--result={result}"]
    # Without these, what one side leaves to the allocator would be counted by chance.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout) | {"result": result}


def main() -> int:
    """Gate, then measure, then print JSON; return 1 where the gate fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 512), ("hidden", 256), ("vocab", 151936), ("chunk", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side")
    parser.add_argument("--result")
    args = parser.parse_args()
    if args.side:
        measure(args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        exact = load_file(side("float64", args, folder)["result"])
        runs: dict[str, list[dict[str, float]]] = {"naive": [], "chunked": []}
        errors: dict[str, float] = {}
        for _ in range(args.rounds):
            for name in runs:
                runs[name].append(side(name, args, folder))
                got = load_file(runs[name][-1]["result"])
                for key in ("loss", "grad"):
                    error = (got[key] - exact[key]).norm() / exact[key].norm()
                    errors[f"{name}_{key}"] = error.item()
            if max(errors["chunked_loss"], errors["chunked_grad"]) > 1e-6:
                print(json.dumps({"gate": "failed", "errors": errors}), file=sys.stderr)
                return 1
    report: dict[str, object] = {"gate": "passed", "relative_errors": errors}
    for name, found in runs.items():
        report[name] = {
            key: statistics.median(run[key] for run in found)
            for key in ("cpu_seconds", "peak_over_base_mib")
        }
    for key in ("cpu_seconds", "peak_over_base_mib"):
        report[f"{key}_ratio"] = report["chunked"][key] / report["naive"][key]  # type: ignore[index]
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
