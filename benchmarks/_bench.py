"""What benchmarks share: a gate before any speed, CPU seconds taken in turns, peak memory.

Speeds are ratios of CPU seconds (user and system) of one thread, measured side by side in one run,
so that another load on the machine weighs on both sides alike.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from morph.testing import assert_close

Run = Callable[[], object]


def one_thread() -> None:
    """Make torch compute on one thread, so that CPU seconds are seconds."""
    torch.set_num_threads(1)


def gate(name: str, reference: torch.Tensor, got: torch.Tensor, ratio: float = 1e-5) -> None:
    """Exit with status 6 and no speed printed unless `got` matches the reference."""
    try:
        assert_close(name, reference, got, ratio)
    except AssertionError as error:
        print(f"refused: the gate failed, so no speed is reported. {error}", file=sys.stderr)
        raise SystemExit(6) from error


def in_turns(runs: dict[str, Run], rounds: int = 5) -> dict[str, float]:
    """Return the median CPU seconds of each run, measured A B A B after one warm-up of each."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_bytes(script: str, *args: str) -> int:
    """Return what `python script *args` says on its last line: see `say_peak`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *args], env=env, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def say_peak(prepare: Callable[[], Run]) -> None:
    """Print how many bytes `prepare()()` needs at its peak, beyond what was resident before it.

    Meant for a child process of its own: a peak never falls.
    """
    run = prepare()
    before = memory("VmRSS")
    run()
    print(memory("VmHWM") - before)


def last_line(script: str, *args: str) -> str:
    """Return the last line that `python script *args` prints, with memory freed when dropped."""
    # Without these, what one side leaves to the allocator would be counted by chance.
    limits = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run(
        [sys.executable, script, *args],
        env={**os.environ, **limits, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def settled_bytes() -> int:
    """Return the resident bytes of this process once nothing dropped is held any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory("VmRSS")


def forget_peak() -> None:
    """Let the peak of this process start again from what it holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(field: str) -> int:
    """Return a size from /proc: unlike getrusage's, it does not start at the parent's peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def report(lines: list[str], result: dict[str, Any], path: str | None) -> None:
    """Print the lines for people, and write the result as JSON where a path is given."""
    print("\n".join(lines))
    if path is not None:
        text = json.dumps({"torch": torch.__version__, **result}, indent=1, sort_keys=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
