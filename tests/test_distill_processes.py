"""Distillation in two processes on a CPU: replicated and split weights, dying processes, bfloat16.

All jobs of two processes run in one launch, because the imports are what costs time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("_distill_worker.py")
STEP = 48  # tokens of a step
STAGES = [
    {"loss": "align", "train": "new", "tokens": 5 * STEP},
    {"loss": "logits", "train": "attention", "tokens": 6 * STEP, "needles": 0.34},
    {"loss": "long", "train": "all", "tokens": 5 * STEP, "lr": 1e-3, "weight_decay": 0.1},
    {"loss": "logits", "train": "lora", "tokens": 5 * STEP, "recompute": "layer"},
]
ALIGN_ALL = [{"loss": "align", "train": "all", "tokens": 4 * STEP}]
TRAIN_ALL = [{"loss": "logits", "train": "all", "tokens": 4 * STEP}]
SPLIT = {"shard": True}
JOBS: dict[str, dict[str, Any]] = {
    "all": {"stages": STAGES},
    "all-float64": {"stages": STAGES, "dtype": "float64", "rows": "packed"},
    "align-attention": {"stages": ALIGN_ALL},
    "tied": {"stages": TRAIN_ALL, "config": {"tie_word_embeddings": True}},
    "cached": {"stages": TRAIN_ALL},  # the cache is filled by the same job, run before
    "bfloat16": {"stages": STAGES, "dtype": "bfloat16"},
    "mixed": {"stages": STAGES, "training": {"mixed_precision": "bf16"}},
}


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("_distill_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(folder: Path, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Run jobs in two processes, started by torchrun."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*run, str(WORKER), str(file)], env=environment, capture_output=True, text=True, timeout=300
    )
