"""What a run changes outside the student, and puts back: modes, flags, random state, Ctrl-C."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def quiet(*models: nn.Module) -> Iterator[None]:
    """Freeze models and put them into eval mode; give every flag back at the end."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    flags = [
        (model, name, p.requires_grad)
        for model in models
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    try:
        for model in models:
            model.eval()
            for p in model.parameters():
                p.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for model, name, flag in flags:
            model.get_parameter(name).requires_grad_(flag)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch, prefer deterministic operations on a GPU; put both back at the end."""
    gpu = device.type == "cuda"
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.manual_seed(seed)
        try:
            if gpu and not strict:
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no step is half taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if held and callable(before):
        before(*held[0])


def random_state(device: torch.device) -> dict[str, str]:
    """Return torch's random state as text."""
    state = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, str], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(_bytes(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def model_digest(model: nn.Module, besides: nn.Module | None = None) -> str:
    """Return a sha256 over names, shapes, dtypes and a sample of every parameter.

    The values of parameters that `besides` holds too are left out.
    """
    digest = hashlib.sha256()
    shared = set() if besides is None else {id(p) for p in besides.parameters()}
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        if id(p) not in shared:
            sample = p.detach().reshape(-1)[:: max(1, p.numel() // 64)].double().cpu()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
