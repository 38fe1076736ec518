"""What trains in distillation: choosing it, un-sharing it from the teacher, and stepping it."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from morph.errors import MismatchError, TrainingError, UsageError
from morph.recipes.schema import Stage

BETAS = (0.9, 0.95)


class Trainee:
    """The student's parameters: those a stage trains, in an optimizer; the rest frozen and shared.

    `layers` are the converted attention modules by layer index. `touched` are the names of all
    parameters trained so far. Parameters in bfloat16 are stepped through float32 copies.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layers: Mapping[int, nn.Module]
    ) -> None:
        self.student, self.teacher, self.layers = student, teacher, layers
        names = {id(m): n for n, m in student.named_modules()}
        try:
            self.paths = {i: names[id(m)] for i, m in layers.items()}
        except KeyError:
            raise UsageError("layers: a module given is not part of the student.") from None
        self.teacher_layers = {i: teacher.get_submodule(path) for i, path in self.paths.items()}
        self.touched: dict[str, None] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._teacher_names = {n for n, _ in teacher.named_parameters(remove_duplicate=False)}
        self._share()

    def _share(self) -> None:
        """Let the student hold the teacher's own parameters wherever they are equal."""
        theirs = dict(self.teacher.named_parameters(remove_duplicate=False))
        for name, p in list(self.student.named_parameters(remove_duplicate=False)):
            q = theirs.get(name)
            if q is None or q is p:
                continue
            if p.shape != q.shape:
                raise MismatchError(
                    f"{name} is {tuple(p.shape)} in the student and {tuple(q.shape)} in the "
                    "teacher; the student must be a conversion of this teacher."
                )
            if p.dtype == q.dtype and p.device == q.device and torch.equal(p, q):
                _put(self.student, name, q)

    def names(self, stage: Stage) -> list[str]:
        """Return the names of the parameters that `stage` trains."""
        head = {id(p) for p in self.student.get_output_embeddings().parameters()}
        found = []
        for name, p in self.student.named_parameters():
            inside = self.layer_of(name) is not None
            new = inside and name not in self._teacher_names
            wanted = {"new": new, "attention": inside, "all": inside or stage.loss != "align"}
            if wanted[stage.train] and id(p) not in head:
                found.append(name)
        return found

    def layer_of(self, name: str) -> int | None:
        """Return the converted layer that the parameter `name` belongs to, or None."""
        owners = (i for i, path in self.paths.items() if name.startswith(path + "."))
        return next(owners, None)

    def begin(self, stage: Stage, names: Iterable[str], accelerator: Any) -> None:
        """Make exactly `names` trainable, in copies of their own, and a fresh optimizer."""
        for p in self.student.parameters():
            p.requires_grad_(False)
        self.unshare(names)
        self.masters = {}
        for name in names:
            p = self.student.get_parameter(name).requires_grad_(True)
            if accelerator.num_processes > 1:
                from accelerate.utils import broadcast

                p.data.copy_(broadcast(p.data.clone()))
            exact = p.dtype in (torch.float32, torch.float64)
            self.masters[name] = p if exact else nn.Parameter(p.detach().float())
        self.optimizer = torch.optim.AdamW(self._groups(stage), betas=BETAS)

    def unshare(self, names: Iterable[str]) -> None:
        """Give the student its own copy of every named parameter that the teacher holds too."""
        held = {p.untyped_storage().data_ptr() for p in self.teacher.parameters()}
        for name in names:
            self.touched[name] = None
            p = self.student.get_parameter(name)
            if p.untyped_storage().data_ptr() in held:
                own = nn.Parameter(p.detach().clone())
                for module in self.student.modules():  # a tied parameter has several places
                    for leaf, other in module._parameters.items():
                        if other is p:
                            module._parameters[leaf] = own
            assert self.student.get_parameter(name).untyped_storage().data_ptr() not in held

    def _groups(self, stage: Stage) -> list[dict[str, Any]]:
        """Gates (own rate), vectors and inherited norms, matrices; only matrices decay."""
        gates = self._gates()
        kinds: dict[str, list[str]] = {"gates": [], "vectors": [], "matrices": []}
        for name, p in self.masters.items():
            kind = "gates" if name in gates else "vectors" if p.dim() < 2 else "matrices"
            kinds[kind].append(name)
        return [
            {
                "params": [self.masters[n] for n in names],
                "names": names,
                "kind": kind,
                "peak_lr": stage.gate_lr if kind == "gates" else stage.lr,
                "weight_decay": stage.weight_decay if kind == "matrices" else 0.0,
            }
            for kind, names in kinds.items()
            if names
        ]

    def _gates(self) -> set[str]:
        """Return the names that a mixer lists as gates, and the gains of norms that are new."""
        gates = set()
        for path in self.paths.values():
            for place, module in self.student.get_submodule(path).named_modules(prefix=path):
                listed = getattr(type(module), "gates", ())
                is_norm = type(module).__name__.endswith("Norm")
                for sub, _ in module.named_parameters():
                    name = f"{place}.{sub}"
                    if any(sub == g or sub.startswith(g + ".") for g in listed):
                        gates.add(name)
                    if is_norm and name not in self._teacher_names:
                        gates.add(name)
        return gates

    def clip(self, stage: Stage, accelerator: Any) -> float:
        """Sum gradients over processes, clip them, return their norm before clipping.

        In `align` every layer is a regression of its own and is clipped alone. Raises
        TrainingError, naming the parameter, where a gradient is not finite.
        """
        groups: dict[int | None, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            p = self.student.get_parameter(name)
            if p.grad is None:
                continue
            if master is not p:
                master.grad, p.grad = p.grad.to(master.dtype), None
            if accelerator.num_processes > 1:
                master.grad = accelerator.reduce(master.grad, "sum")
            layer = self.layer_of(name) if stage.loss == "align" else None
            groups.setdefault(layer, []).append(master)
        norms = [torch.nn.utils.clip_grad_norm_(g, stage.clip) for g in groups.values()]
        norm = torch.stack(norms).double().square().sum().sqrt().item() if norms else 0.0
        if not math.isfinite(norm):
            bad = [n for n, m in self.masters.items() if not _finite(m.grad)]
            raise TrainingError(f"the gradient of {bad[0] if bad else 'a parameter'} is {norm}")
        return norm

    def step(self, factor: float) -> None:
        """Take one optimizer step at `factor` times the peak learning rates."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                p = self.student.get_parameter(name)
                if p is not master:
                    p.copy_(master)
        self.clear()

    def clear(self) -> None:
        """Drop all gradients."""
        for name, master in self.masters.items():
            master.grad = self.student.get_parameter(name).grad = None

    def tensors(self, with_optimizer: bool) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs: weights trained so far and, mid-stage, the optimizer."""
        out = {f"model/{n}": self.student.get_parameter(n) for n in self.touched}
        if with_optimizer and self.optimizer is not None:
            for name, master in self.masters.items():
                if master is not self.student.get_parameter(name):
                    out[f"master/{name}"] = master
                for key, value in self.optimizer.state.get(master, {}).items():
                    out[f"optimizer/{key}/{name}"] = value
        return {k: v.detach() for k, v in out.items()}

    @torch.no_grad()
    def restore_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the saved weights into the student."""
        saved = {k.removeprefix("model/"): t for k, t in tensors.items() if k[:6] == "model/"}
        known = {n for n, _ in self.student.named_parameters()}
        if not saved.keys() <= known:
            missing = min(saved.keys() - known)
            raise MismatchError(f"the saved state has {missing}, which the student lacks.")
        self.unshare(saved)
        for name, tensor in saved.items():
            self.student.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def restore_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the saved optimizer into the one that `begin` made."""
        assert self.optimizer is not None
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "master":
                self.masters[name].copy_(tensor)
            elif kind == "optimizer":
                field, _, name = name.partition("/")
                master = self.masters[name]
                device = tensor.device if field == "step" else master.device
                # A copy, so that alignment in memory, and with it rounding, is as in a first run.
                self.optimizer.state[master][field] = tensor.to(device).clone()


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


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter
