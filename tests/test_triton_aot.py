"""Every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, without a GPU.

Compiled in one process of its own, since whether Triton interprets is decided when a kernel is
defined. Checked: nothing spills to local memory and shared memory fits the architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
pytest.importorskip("triton", reason="triton is not installed: nothing to compile")


def compiled(*args: str) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPO / "benchmarks" / "compile_triton.py"), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "op", sorted(p.stem for p in (REPO / "morph/kernels").glob("_triton_*.py"))
)
def test_kernels_compile_without_spilling(op: str) -> None:
    found = compiled("--json", "-", "--only", op.removeprefix("_triton_"))
    assert {row["arch"] for row in found} == {80, 90, 100}
    for row in found:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
