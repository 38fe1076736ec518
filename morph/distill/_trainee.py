"""What trains in distillation: choosing it, un-sharing it from the teacher, and stepping it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from morph.distill._sharding import (
    clip_gradients,
    gathered,
    gradient_norm,
    is_split,
    split_like,
    whole,
)
from morph.errors import MismatchError, TrainingError, UsageError
from morph.mixers._base import MixerBase
from morph.recipes.schema import Stage

BETAS = (0.9, 0.95)


class Candidates(nn.ModuleDict):
    """Several modules that could stand where one layer's attention stood; only `align` knows them.

    Keys are `@name`. Each has all that it trains to itself.
    """


def candidates(layer: nn.Module) -> dict[str, nn.Module]:
    """Return what may stand in a layer by name; a layer that is decided has one, without name."""
    if not isinstance(layer, Candidates):
        return {"": layer}
    return {name.removeprefix("@"): module for name, module in layer.items()}


class Trainee:
    """The student's parameters: those a stage trains, in an optimizer; the rest frozen and shared.

    `layers` are the converted attention modules by layer index. Parameters named `frozen` never
    train. `touched` are the names of all parameters trained so far. Parameters in bfloat16 are
    stepped through float32 copies. `model` and `teacher` are what computes: the student and its
    teacher, or their shards while a stage runs.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Mapping[int, nn.Module],
        frozen: Collection[str] = (),
    ) -> None:
        self.student, self.teacher, self._layers = student, teacher, layers
        self.frozen = frozenset(frozen)
        self.model, self.source = student, teacher
        for layer in layers.values():
            if isinstance(layer, Candidates):
                _part(layer)
        names = {id(m): n for n, m in student.named_modules()}
        try:
            self.paths = {i: names[id(m)] for i, m in layers.items()}
        except KeyError:
            raise UsageError("layers: a module given is not part of the student.") from None
        self.container = next((p.rsplit(".", 2)[0] for p in self.paths.values()), "")
        self.shared_depth, self.sharded = 0, False
        self.lora: Any = None
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

    @property
    def layers(self) -> Mapping[int, nn.Module]:
        """The converted attention modules of the model that computes."""
        if self.model is self.student:
            return self._layers
        return {i: self.model.get_submodule(path) for i, path in self.paths.items()}

    @property
    def decoder(self) -> Any:
        """The decoder layers of the model that computes."""
        return self.model.get_submodule(self.container)

    @property
    def teacher_decoder(self) -> Any:
        """The decoder layers of the teacher that computes."""
        return self.teacher.get_submodule(self.container)

    @property
    def teacher_layers(self) -> dict[int, nn.Module]:
        """The teacher's attention modules in the converted layers."""
        return {i: self.teacher.get_submodule(path) for i, path in self.paths.items()}

    def upper_layers(self) -> list[nn.Module]:
        """Return the decoder layers from the first that differs from the teacher's."""
        return list(self.decoder)[self.shared_depth :]

    def _depth(self) -> int:
        """Return how many of the lowest layers the teacher has too, down to the embedding."""
        mine, theirs = self.student.get_input_embeddings(), self.source.get_input_embeddings()
        if not _same(mine, theirs):
            return 0
        layers = self.student.get_submodule(self.container).children()
        others = self.source.get_submodule(self.container).children()
        depth = 0
        for i, (layer, other) in enumerate(zip(layers, others)):
            if i in self.layers or not _same(layer, other):
                break
            depth += 1
        return depth

    def names(self, stage: Stage) -> list[str]:
        """Return the names of the parameters that `stage` trains, low-rank updates apart."""
        head = {id(p) for p in self.student.get_output_embeddings().parameters()}
        found = []
        for name, p in self.student.named_parameters():
            inside = self.layer_of(name) is not None
            new = inside and _without_candidate(name) not in self._teacher_names
            wanted = {"new": new, "lora": new, "attention": inside}
            wanted["all"] = inside or stage.loss != "align"
            if wanted[stage.train] and id(p) not in head and name not in self.frozen:
                found.append(name)
        return found

    def regression_of(self, name: str) -> str | None:
        """Return what `name` is regressed with in `align`: its layer, or its candidate."""
        path = next((p for p in self.paths.values() if name.startswith(p + ".")), None)
        if path is None or not isinstance(self.student.get_submodule(path), Candidates):
            return path
        return f"{path}.{name.removeprefix(path + '.').partition('.')[0]}"

    def layer_of(self, name: str) -> int | None:
        """Return the converted layer that the parameter `name` belongs to, or None."""
        owners = (i for i, path in self.paths.items() if name.startswith(path + "."))
        return next(owners, None)

    def begin(
        self,
        stage: Stage,
        names: Sequence[str],
        accelerator: Any,
        seed: int = 0,
        shard: bool = False,
    ) -> None:
        """Make exactly `names` trainable, in copies of their own, and a fresh optimizer.

        With `train: lora` also the low-rank updates. With `shard` the weights are split over the
        processes, the teacher's too; in `align` those of converted layers stay whole.
        """
        for p in self.student.parameters():
            p.requires_grad_(False)
        self.unshare(names)
        if stage.train == "lora":
            from morph.distill._lora import Lora

            rank, alpha = stage.lora_rank, stage.lora_alpha
            paths = [*self.paths.values()]
            self.lora = Lora(self.student, paths, rank=rank, alpha=alpha, seed=seed)
            names = [*names, *self.lora.names]
        for name in names:
            p = self.student.get_parameter(name).requires_grad_(True)
            if accelerator.num_processes > 1:
                from accelerate.utils import broadcast

                p.data.copy_(broadcast(p.detach().to(accelerator.device, copy=True)))
        self.shared_depth = self._depth()
        self.sharded = shard
        if shard:
            self._shard(accelerator.device, stage.loss)
        self.masters = {}
        for name in names:
            p = self.model.get_parameter(name)
            exact = p.dtype in (torch.float32, torch.float64)
            self.masters[name] = p if exact else nn.Parameter(p.detach().float())
        self.optimizer = torch.optim.AdamW(self._groups(stage), betas=BETAS)

    def _shard(self, device: torch.device, loss: str) -> None:
        from morph.distill._sharding import shard, with_copies

        self.teacher = shard(self.source, self.container, device)
        if loss == "align":
            self.model = with_copies(self.student, self.paths.values(), device)
        else:
            self.model = shard(self.student, self.container, device)

    @torch.no_grad()
    def sync(self) -> None:
        """Bring the student up to date with the shards that were trained; every process must."""
        if self.model is not self.student:
            for name in self.masters:
                self.student.get_parameter(name).copy_(whole(self.model.get_parameter(name)))

    @torch.no_grad()
    def end(self) -> None:
        """End a stage: whole weights in the student, low-rank updates merged, nothing trainable."""
        self.clear()
        self.sync()
        self.model, self.teacher, self.sharded = self.student, self.source, False
        if self.lora is not None:
            merged = self.lora.merge()
            self.lora = None
            self.unshare(merged)
            for name, tensor in merged.items():
                self.student.get_parameter(name).copy_(tensor)
        self.masters, self.optimizer = {}, None

    def close(self) -> None:
        """Leave the student whole, wherever the run has stopped."""
        self.clear()
        self.model, self.teacher, self.sharded = self.student, self.source, False
        if self.lora is not None:
            self.lora.remove()
            self.lora = None

    def unshare(self, names: Iterable[str]) -> None:
        """Give the student its own copy of every named parameter that the teacher holds too."""
        held = {p.untyped_storage().data_ptr() for p in self.source.parameters()}
        for name in names:
            self.touched[name] = None
            p = self.student.get_parameter(name)
            if p.untyped_storage().data_ptr() in held:
                own = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
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
        old = self._teacher_names
        gates = set()
        for path in self.paths.values():
            for place, module in self.student.get_submodule(path).named_modules(prefix=path):
                listed = getattr(type(module), "gates", ())
                is_norm = type(module).__name__.endswith("Norm")
                for sub, _ in module.named_parameters():
                    name = f"{place}.{sub}"
                    if any(sub == g or sub.startswith(g + ".") for g in listed):
                        gates.add(name)
                    if is_norm and _without_candidate(name) not in old:
                        gates.add(name)
        return gates

    def clip(self, stage: Stage, accelerator: Any) -> float:
        """Sum gradients over processes, clip them, return their norm before clipping.

        In `align` every layer is a regression of its own and is clipped alone. Raises
        TrainingError, naming the parameter, where a gradient is not finite.
        """
        groups: dict[str | None, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            p = self.model.get_parameter(name)
            if accelerator.num_processes > 1 and not is_split(p) and master.grad is p.grad is None:
                p.grad = torch.zeros_like(p)  # every process takes part in every sum
            self._collect(master, p)
            if master.grad is None:
                continue
            if is_split(p):  # FSDP gives the mean over processes; the loss is a share of one sum
                master.grad *= accelerator.num_processes
            elif accelerator.num_processes > 1:
                master.grad = accelerator.reduce(master.grad, "sum")
            owner = self.regression_of(name) if stage.loss == "align" else None
            groups.setdefault(owner, []).append(master)
        norms = [gradient_norm(group) for group in groups.values()]
        norm = torch.stack(norms).double().square().sum().sqrt().item() if norms else 0.0
        if not math.isfinite(norm):
            bad = [n for n, m in self.masters.items() if not _finite(m.grad)]
            raise TrainingError(f"the gradient of {bad[0] if bad else 'a parameter'} is {norm}")
        for group, found in zip(groups.values(), norms):
            clip_gradients(group, stage.clip, found)
        return norm

    def collect(self) -> None:
        """Add what a micro-batch gave to the gradients, in float32 where weights have 16 bits."""
        for name, master in self.masters.items():
            self._collect(master, self.model.get_parameter(name))

    @staticmethod
    def _collect(master: nn.Parameter, p: nn.Parameter) -> None:
        if master is p or p.grad is None:
            return
        more, p.grad = p.grad.to(master.dtype), None
        master.grad = more if master.grad is None else master.grad + more

    def step(self, factor: float) -> None:
        """Take one optimizer step at `factor` times the peak learning rates."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                p = self.model.get_parameter(name)
                if p is not master:
                    p.copy_(master)
        self.clear()

    def clear(self) -> None:
        """Drop all gradients."""
        for name, master in self.masters.items():
            master.grad = self.model.get_parameter(name).grad = None

    def progress(self, share: float) -> None:
        """Tell every mixer which share of all tokens of the training is done; 1 is the end."""
        for model in {id(m): m for m in (self.student, self.model)}.values():
            for module in model.modules():
                if isinstance(module, MixerBase):
                    module.progress(share)

    def gates(self) -> dict[str, nn.Parameter]:
        """Return the gates, decays and gains that the running stage trains."""
        gates = self._gates()
        return {n: m for n, m in self.masters.items() if n in gates}

    def tensors(self, with_optimizer: bool) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs: weights trained so far and, mid-stage, the optimizer.

        Where weights are split over processes, every process must ask.
        """
        self.sync()
        names = dict(self.student.named_parameters(remove_duplicate=False))
        out = {f"model/{n}": names[self._now(n)] for n in self.touched}
        if with_optimizer and self.optimizer is not None:
            for name, master in self.masters.items():
                if name not in self.touched:  # low-rank updates, gone when the stage ends
                    out[f"stage/{name}"] = master
                elif master is not self.model.get_parameter(name):
                    out[f"master/{name}"] = master
                for key, value in self.optimizer.state.get(master, {}).items():
                    out[f"optimizer/{key}/{name}"] = value
        return gathered(out)

    def _now(self, name: str) -> str:
        """Return the name that a parameter has while low-rank updates wrap its module."""
        return name if self.lora is None else self.lora.wrapped(name)

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
            if kind in ("master", "stage"):
                master = self.masters[name]
                master.copy_(split_like(tensor, master))
            elif kind == "optimizer":
                field, _, name = name.partition("/")
                master = self.masters[name]
                if field == "step":
                    self.optimizer.state[master][field] = tensor.clone()
                    continue
                # A copy, so that alignment in memory, and with it rounding, is as in a first run.
                kept = split_like(tensor.to(master.device), master)
                self.optimizer.state[master][field] = kept.clone()


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(whole(tensor)).all())


def _part(layer: nn.Module) -> None:
    """Give candidates parameters of their own, for now in the memory that they share."""
    for module in layer.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                module._parameters[leaf] = nn.Parameter(p.data, requires_grad=p.requires_grad)


def _without_candidate(name: str) -> str:
    """Return the name that a candidate's parameter has in a model where it was chosen."""
    return re.sub(r"\.@[^.]*\.", ".", name)


def _same(mine: nn.Module, theirs: nn.Module) -> bool:
    """Return whether two modules hold the very same, frozen parameters."""
    ours, others = list(mine.parameters()), list(theirs.parameters())
    same = type(mine) is type(theirs) and len(ours) == len(others)
    return same and all(p is q and not p.requires_grad for p, q in zip(ours, others))


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter
