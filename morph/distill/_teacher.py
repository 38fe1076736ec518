"""What the teacher computes for a batch, and what the student need not compute again.

Below the first layer that differs, teacher and student are one model: its output is taken from the
teacher's forward, and the student starts there. Final hidden states can be kept on disk, where
another run over the same batches finds them; the head turns them into the very same logits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from morph.distill._batches import Batch
from morph.distill._states import storage
from morph.distill._trainee import Trainee
from morph.errors import escape
from morph.mixers._hybrid import Context
from morph.mixers._packed import Documents

Calls = dict[int, tuple[Any, dict[str, Any], torch.Tensor]]


class _Enough(Exception):
    """The last layer that is asked for has answered."""


class Teacher:
    """The teacher's side of every stage; `cache` keeps final hidden states, None: nothing."""

    def __init__(self, trainee: Trainee, accelerator: Any, cache: HiddenCache | None) -> None:
        self.trainee, self.accelerator, self.cache = trainee, accelerator, cache
        self.model = trainee.teacher

    def calls(self, batch: Batch) -> Calls:
        """Return (args, kwargs, output) of the teacher's attention in every converted layer.

        Nothing above the last of them is computed.
        """
        calls: Calls = {}
        layers, told = self.trainee.teacher_layers, _context(batch)

        def watch(i: int) -> Any:
            def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                calls[i] = (args, {**kwargs, **told}, first_of(output))
                if len(calls) == len(layers) and not self.trainee.sharded:
                    raise _Enough

            return after

        handles = [m.register_forward_hook(watch(i), with_kwargs=True) for i, m in layers.items()]
        try:
            with torch.no_grad(), self.accelerator.autocast():
                self.model.base_model(**batch.inputs())
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, Any]:
        """Return the final hidden states `[B, T, D]`, and what the shared lower layers give.

        The latter is None where no layer is shared, or the states come from the cache.
        """
        key = None if self.cache is None else self.cache.key(batch)
        found = None if key is None else self.cache.read(key, batch.ids.device)
        if key is not None and self.trainee.sharded:  # a split teacher computes in all or in none
            mine = torch.tensor([found is not None], device=batch.ids.device)
            found = found if bool(self.accelerator.gather(mine).all()) else None
        if found is not None:
            return found, None
        lower: list[Any] = []
        handle = None
        if self.trainee.shared_depth:
            last = self.trainee.teacher_decoder[self.trainee.shared_depth - 1]
            handle = last.register_forward_hook(lambda m, args, output: lower.append(output))
        try:
            with torch.no_grad(), self.accelerator.autocast():
                hidden = self.model.base_model(**batch.inputs()).last_hidden_state
        finally:
            if handle is not None:
                handle.remove()
        if key is not None:
            self.cache.write(key, hidden)
        return hidden, lower[0] if lower else None


@contextmanager
def starting_from(trainee: Trainee, lower: Any) -> Iterator[None]:
    """Let the student's shared lower layers give `lower` without computing; None: they compute."""
    layers, depth = trainee.decoder, trainee.shared_depth if lower is not None else 0
    held = {str(i): layers[i] for i in range(depth)}
    for name, layer in held.items():
        layers._modules[name] = _Given(layer, lower)
    try:
        yield
    finally:
        layers._modules.update(held)


class _Given(nn.Module):
    """Stands for a layer whose output is known; all else is the layer's."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, output=output)  # not a part: no parameter is listed twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


class HiddenCache:
    """Final hidden states on disk, a file for all that is computed at once.

    Its name is a sha256 over the teacher's weights, the tokens, their positions, and how it was
    computed (dtype, device, torch, attention). The file says what its own content must hash to; a
    damaged one is told in words and made again.
    """

    def __init__(
        self, folder: Path, teacher: nn.Module, precision: str, note: Callable[[str], None]
    ) -> None:
        self.folder, self.note = folder, note
        digest = hashlib.sha256(f"{torch.__version__} {precision}\n".encode())
        for name, p in sorted(teacher.state_dict().items()):
            digest.update(f"{name} {tuple(p.shape)} {p.dtype} {p.device.type}\n".encode())
            digest.update(_bytes(p))
        told = {k: v for k, v in teacher.config.to_dict().items() if k != "_name_or_path"}
        told["attention"] = teacher.config._attn_implementation
        if torch.cuda.is_available():
            told["device"] = torch.cuda.get_device_name(), torch.backends.cuda.matmul.allow_tf32
        digest.update(str(sorted(told.items(), key=str)).encode())
        self.teacher = digest.hexdigest()

    def key(self, batch: Batch) -> str:
        """Return the name of a batch's file."""
        digest = hashlib.sha256(self.teacher.encode())
        for name, tensor in batch.tensors().items():
            if name in ("ids", "positions"):
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()

    def read(self, key: str, device: torch.device) -> torch.Tensor | None:
        """Return the hidden states kept under `key`, or None."""
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                hidden, told = opened.get_tensor("hidden"), opened.metadata() or {}
            if hashlib.sha256(_bytes(hidden)).hexdigest() != told.get("sha256"):
                raise ValueError("the content is not what was written")
        except (OSError, ValueError, SafetensorError) as error:
            self.note(f"{file} is damaged ({escape(error, 120)}); it is made again.")
            return None
        return hidden.to(device)

    def write(self, key: str, hidden: torch.Tensor) -> None:
        """Keep hidden states; raise StorageError where the disk refuses."""
        file, kept = self._file(key), hidden.detach().to("cpu").contiguous()
        partial = file.with_name(f".{file.name}.{os.getpid()}")  # others may make the same one
        with storage(self.folder, "give another training.teacher_cache, or none"):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                told = {"sha256": hashlib.sha256(_bytes(kept)).hexdigest()}
                save_file({"hidden": kept}, partial, metadata=told)
                partial.replace(file)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[:40]}.safetensors"


def first_of(output: Any) -> torch.Tensor:
    """Return the hidden states among what an attention module returns."""
    return output[0] if isinstance(output, tuple) else output


def _context(batch: Batch) -> Mapping[str, Any]:
    """Return what a converted layer must know of the batch, and a source's layer does not."""
    documents = None if batch.positions is None else Documents.of(batch.positions)
    return {"morph_context": Context(documents=documents)}  # one, so that layers can share


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
