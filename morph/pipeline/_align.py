"""The morphable model of a source, its mixers aligned first where they have parameters.

A linear mixer straight after surgery is far from the attention it stands for, and a selector that
compares the two would measure that. `align` trains every candidate layer's mixer towards the
layer's own attention output, all from one pass of the source; the result is kept in a folder and
shared by every selector, and by the swap pass, for the same model, mixer and text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import __version__, strict
from morph import plan as planning
from morph.pipeline import _data
from morph.pipeline._source import Say, Source, quiet
from morph.recipes.schema import Mixer, Select, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    from morph.surgery import Morphable
    from morph.surgery._streaming import StreamedLayers

SEQ_LEN, BATCH = 512, 4


@contextmanager
def probing(
    source: Source,
    model: nn.Module,
    mixer: Mixer,
    section: Select,
    corpus: _data.Corpus | None,
    *,
    seed: int = 0,
    work: Path | None = None,
    streamed: StreamedLayers | None = None,
    say: Say = quiet,
) -> Iterator[Morphable]:
    """Give the morphable model of `source`, with aligned mixers where that applies.

    `work` is the folder that keeps what was aligned; None: nothing is kept. Where there is a GPU
    the model is on it meanwhile. `streamed` reads the layers of a model that is streamed, whose
    mixers are neither calibrated nor aligned.
    """
    import torch

    from morph import surgery

    home = next(p.device for p in model.parameters() if not p.is_meta)
    try:
        aligned = None
        if streamed is None:
            aligned = mixers(source, model, mixer, section, corpus, seed=seed, work=work, say=say)
            model.to("cuda" if torch.cuda.is_available() else home)
        elif corpus is not None and _has_parameters(source, mixer):
            say(
                f"warning: {mixer.name} is neither calibrated nor aligned where a model is streamed"
            )
        with surgery.morphable(
            model, mixer.name, mixer.options, source.family, aligned=aligned, streamed=streamed
        ) as probe:
            yield probe
    finally:
        if streamed is None:
            model.to(home)


def mixers(
    source: Source,
    model: nn.Module,
    mixer: Mixer,
    section: Select,
    corpus: _data.Corpus | None,
    *,
    seed: int = 0,
    work: Path | None = None,
    say: Say = quiet,
) -> dict[str, torch.Tensor] | None:
    """Return the aligned parameters of every candidate layer's mixer; None where it has none.

    Trained once for a model, mixer, text and seed, and read from `work` after that. With
    `select.align` 0 they are only calibrated; without text mixers stay as surgery starts them.
    """
    from safetensors.torch import load_file, save_file

    from morph import surgery

    if corpus is None or not _has_parameters(source, mixer):
        return None
    if not section.align:
        return surgery.mixer_state(surgery.hybrid_layers(_started(source, model, mixer, corpus)))
    stage = _stage(section, corpus)
    key = _key(source, mixer, stage, corpus, seed)
    with tempfile.TemporaryDirectory(prefix="morph-align-") as scratch:
        folder = Path(scratch) if work is None else work
        file = folder / f"align-{key[:12]}.safetensors"
        if file.is_file():
            try:
                found = load_file(file)
                if found:
                    say(f"aligned mixers are at hand: {file}")
                    return found
            except Exception as error:  # safetensors raises its own class for a broken file
                say(f"{file} cannot be read ({error}); aligning again")
        found = _align(source, model, mixer, stage, corpus, seed, folder / f"{file.name}.work", say)
        partial = file.with_name(f".{file.name}.partial")
        save_file(found, partial)
        partial.replace(file)
        shutil.rmtree(folder / f"{file.name}.work", ignore_errors=True)
    return found


def _has_parameters(source: Source, mixer: Mixer) -> bool:
    import torch

    from morph.mixers._hybrid import make_mixer

    heads = tuple(range(source.geometry.num_attention_heads))
    group = planning.HeadGroup(mixer=mixer.name, heads=heads, options=mixer.options)
    with torch.device("meta"):
        made = make_mixer(group, source.geometry, source.geometry.candidates[0], 1.0, None)
    return any(True for _ in made.parameters())


def _stage(section: Select, corpus: _data.Corpus) -> Stage:
    length = min(SEQ_LEN, max(2, len(corpus.train) - 1))
    return Stage(loss="align", tokens=section.align, seq_len=length, batch_size=BATCH, train="new")


def _key(source: Source, mixer: Mixer, stage: Stage, corpus: _data.Corpus, seed: int) -> str:
    facts: dict[str, Any] = {
        "morph": __version__,
        "model": source.checkpoint.fingerprint,
        "mixer": strict.plain(mixer),
        "stage": strict.plain(stage),
        "text": corpus.sha256,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _align(
    source: Source,
    model: nn.Module,
    mixer: Mixer,
    stage: Stage,
    corpus: _data.Corpus,
    seed: int,
    work: Path,
    say: Say,
) -> dict[str, torch.Tensor]:
    from morph import distill as training
    from morph import surgery

    say(f"aligning {mixer.name} in every layer ({stage.tokens:,} tokens, once)")
    student = _started(source, model, mixer, corpus)
    log = training.distill(
        student,
        model,
        [stage],
        training.text_batches(corpus.train, seed=seed, bos=source.tokenizer().bos_token_id),
        out=work,
        seed=seed,
    )
    losses = log.losses(0)
    say(f"aligned: relative error {losses[0]:.3f} -> {losses[-1]:.3f}")
    return surgery.mixer_state(surgery.hybrid_layers(student))


def _started(source: Source, model: nn.Module, mixer: Mixer, corpus: _data.Corpus) -> nn.Module:
    """Return the hybrid that has the mixer in every layer, calibrated where that is asked for."""
    from morph import surgery
    from morph.pipeline import _start

    plan = planning.uniform_plan(
        source.family.model_type, source.geometry, [], mixer.name, mixer.options, None
    )
    return _start.hybrid_of(model, surgery.resolve_costs(plan), corpus, mixer.calibrate)
