"""The model a command starts from: its folder, checked, and what is loaded of it on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.checkpoint import Checkpoint, resolve
from morph.errors import CheckpointError, UnsupportedModel, escape
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.plan import Geometry

if TYPE_CHECKING:
    from torch import nn

Say = Callable[[str], None]


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
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                names = ", ".join(escape(n) for n in sorted(map(str, info[kind]))[:3])
                raise CheckpointError(
                    f"{self.path}: {kind.replace('_', ' ')} for {cls.__name__}: {names}."
                )
        return model.eval()

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
