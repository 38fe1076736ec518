"""Shared by all tests: no network, seeded torch, `gpu` tests skipped where there is no GPU."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

# Read when the libraries are imported, so they are set before any test module is
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Triton decides when a kernel is defined: interpreted on the CPU, compiled where there is a GPU
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPO = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests with the reason; torch is imported only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch, where a test module has imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Let SIGINT raise KeyboardInterrupt: a shell that starts jobs in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real checkpoints beside the repository; the test skips without it."""
    folder = REPO.parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/models with real checkpoints is not here")
    return folder
