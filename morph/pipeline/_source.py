"""The model a command starts from: its folder, checked, and what is loaded of it on demand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.checkpoint import Checkpoint, refuse_adapter, resolve
from morph.checkpoint._format import TORCH_NAMES
from morph.errors import CheckpointError, UnsupportedModel, escape
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.plan import Geometry

if TYPE_CHECKING:
    import torch
    from torch import nn

    from morph.surgery._streaming import StreamedLayers

Say = Callable[[str], None]
_OLD_BUFFERS = r"rotary_emb\.inv_freq"  # older checkpoints hold what is computed today
_BLOCK = 2**20  # bytes read at a time: what a tensor needs beside itself while it is read


def quiet(message: str) -> None:
    """Say nothing; the default of every `say` parameter."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checked local checkpoint and the family that reads it."""

    path: Path
    checkpoint: Checkpoint
    family: Family
    geometry: Geometry

    def config(self) -> Any:
        """Return the transformers config, made from cleaned JSON only."""
        config_class = self.family.part(self.family.config_class)
        data = dict(self.checkpoint.config)
        if self.is_hybrid:
            from morph import modeling

            config_class = modeling.classes(self.family.model_type)[0]
        data.pop("model_type", None)
        try:
            return config_class.from_dict(data)
        except _refusals() as error:
            raise CheckpointError(
                f"{self.path}/config.json: {config_class.__name__} does not accept it: "
                f"{escape(error, 300)}"
            ) from error

    @property
    def is_hybrid(self) -> bool:
        """True for a checkpoint of a registered `morph_*` class."""
        return str(self.checkpoint.config.get("model_type", "")).startswith("morph_")

    def model(self, dtype: str = "float32") -> nn.Module:
        """Load and return the causal LM in eval mode; no remote code, no pickle.

        Raises CheckpointError where tensors are missing or have other shapes.
        """
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = self.config()
        if self.is_hybrid:
            from morph import modeling

            cls = modeling.classes(self.family.model_type)[2]
        else:
            cls = self.family.part(self.family.causal_class)
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            model, info = cls.from_pretrained(
                self.path,
                config=config,
                dtype=getattr(torch, dtype) if dtype != "auto" else "auto",
                attn_implementation=self.family.attention_implementation,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, *_refusals()) as error:
            raise CheckpointError(f"{self.path}: cannot be loaded: {escape(error, 300)}") from error
        finally:
            logging.set_verbosity(before)
        self._refuse_keys(cls.__name__, info)
        return model.eval()

    def _refuse_keys(self, class_name: str, info: Mapping[str, Iterable[Any]]) -> None:
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                names = ", ".join(escape(n) for n in sorted(map(str, info[kind]))[:3])
                raise CheckpointError(
                    f"{self.path}: {kind.replace('_', ' ')} for {class_name}: {names}."
                )

    def streamed(
        self, dtype: str = "float32", device: str = "cpu"
    ) -> tuple[nn.Module, StreamedLayers]:
        """Return the causal LM without its layers' weights, and what reads those when a layer runs.

        Embeddings, final norm and head are read at once; of the layers one at a time is resident,
        read from the shards in blocks, so that no whole shard is held. Give both to
        `surgery.morphable`. The model can only run forwards. Raises CheckpointError where tensors
        are missing or have other shapes, UnsupportedModel for a hybrid.
        """
        import torch

        from morph.surgery._streaming import StreamedLayers

        refuse_hybrid(self, "streaming")
        model = self._skeleton(dtype)
        stored = self._stored_names(model)

        def load(name: str) -> torch.Tensor:
            return read_tensor(self.checkpoint, stored[name], model.dtype)

        layers = StreamedLayers(model, load, self.family, device)
        waiting = {n for i in range(self.geometry.num_hidden_layers) for n in layers.names(i)}
        absent = set()
        for prefix, module in model.named_modules():
            for short in module._buffers:
                if module._buffers[short] is not None:
                    module._buffers[short] = module._buffers[short].to(device)
            for short in module._parameters:
                name = f"{prefix}.{short}"
                if module._parameters[short] is None or name in waiting:
                    continue
                if name in stored:
                    found = load(name).to(device)
                    module._parameters[short] = torch.nn.Parameter(found, requires_grad=False)
                else:
                    absent.add(name)
        model.tie_weights(missing_keys=absent, recompute_mapping=False)
        return model.requires_grad_(False).eval(), layers

    def _skeleton(self, dtype: str) -> nn.Module:
        """Return the causal LM with parameters on the meta device and real buffers."""
        import torch
        from accelerate import init_empty_weights

        config, how = self.config(), self.family.attention_implementation
        if dtype != "auto":
            wanted = getattr(torch, dtype)
        else:
            wanted = config.dtype or _torch_dtype(self.checkpoint, self.checkpoint.main_dtype)
        cls = self.family.part(self.family.causal_class)
        try:
            with init_empty_weights(include_buffers=False):
                return cls._from_config(
                    config, dtype=wanted, **({"attn_implementation": how} if how else {})
                )
        except _refusals() as error:
            raise CheckpointError(f"{self.path}: cannot be built: {escape(error, 300)}") from error

    def _stored_names(self, model: nn.Module) -> dict[str, str]:
        """Return the tensor that holds each parameter; raise where from_pretrained would refuse."""
        tensors, stored, mismatched = self.checkpoint.tensors, {}, []
        prefix = f"{model.base_model_prefix}."
        for name, p in model.named_parameters(remove_duplicate=False):
            held = name if name in tensors else name.removeprefix(prefix)  # saved without its head
            if held in tensors:
                stored[name] = held
                if tensors[held].shape != tuple(p.shape):
                    mismatched.append(held)
        tied = model.all_tied_weights_keys
        there = {*stored, *(t for t, s in tied.items() if s in stored)}
        there |= {s for t, s in tied.items() if t in stored}
        missing = [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in there]
        known = re.compile("|".join([*model._keys_to_ignore_on_load_unexpected, _OLD_BUFFERS]))
        left = [n for n in tensors.keys() - set(stored.values()) if not known.search(n)]
        kinds = {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": left}
        self._refuse_keys(type(model).__name__, kinds)
        return stored

    def tokenizer(self) -> Any:
        """Return the tokenizer of the folder; raise CheckpointError where it has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise CheckpointError(
                f"{self.path}: no tokenizer can be loaded ({escape(error, 200)}). Put "
                "tokenizer.json and tokenizer_config.json beside the weights."
            ) from error


def read_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Read one tensor in `dtype`, block by block: little is held beside the result."""
    import torch

    info = checkpoint.info(name)
    kind = _torch_dtype(checkpoint, info.dtype)
    flat, at = torch.empty(math.prod(info.shape), dtype=dtype), 0
    for block in checkpoint.blocks(name, _BLOCK):
        part = torch.frombuffer(bytearray(block), dtype=kind)
        flat[at : at + len(part)] = part
        at += len(part)
    return flat.view(info.shape)


def _torch_dtype(checkpoint: Checkpoint, stored: str) -> torch.dtype:
    import torch

    names = {short: long for long, short in TORCH_NAMES.items()}
    if stored not in names:
        raise CheckpointError(f"{checkpoint.path}: {stored} cannot be turned into numbers here.")
    found: torch.dtype = getattr(torch, names[stored])
    return found


def _refusals() -> tuple[type[Exception], ...]:
    """Return what transformers raises where a config says what its classes cannot be built of."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError),
        *(TypeError, ValueError, StrictDataclassError),
    )


def open_source(model: str, family: str | None = None, revision: str | None = None) -> Source:
    """Return the checked Source of a local folder or Hub id.

    Raises CheckpointError and UnsupportedModel; headers are read, weights are not.
    """
    path = resolve(model, revision)
    checkpoint = Checkpoint.open(path)
    refuse_adapter(checkpoint)
    found = family_of(checkpoint.config, family)
    return Source(
        path=Path(path),
        checkpoint=checkpoint,
        family=found,
        geometry=found.geometry(checkpoint.config),
    )


def refuse_nonfinite(source: Source) -> None:
    """Raise CheckpointError naming the tensors of a source that hold NaN or infinity."""
    bad = source.checkpoint.nonfinite()
    if bad:
        shown = ", ".join(escape(n) for n in bad[:3])
        raise CheckpointError(
            f"{source.path}: NaN or infinity in {len(bad)} tensors ({shown}). "
            "Get an intact copy; such weights cannot be converted."
        )


def refuse_hybrid(source: Source, verb: str) -> None:
    """Raise UnsupportedModel where a command needs an unconverted model."""
    if source.is_hybrid:
        raise UnsupportedModel(
            f"{source.path}: is a hybrid already; {verb} starts from the model it was made of."
        )


def write_result(path: Path, text: str) -> None:
    """Write a small result file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
