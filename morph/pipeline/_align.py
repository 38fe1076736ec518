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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph import __version__, strict
from morph import plan as planning
from morph.errors import UsageError, escape
from morph.pipeline import _data
from morph.pipeline._source import Say, Source, quiet
from morph.recipes.schema import Mixer, Select, Stage, Training

if TYPE_CHECKING:
    import torch
    from torch import nn

    from morph.distill import Event, Log
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
        return surgery.mixer_state(surgery.hybrid_layers(*started(source, model, [mixer], corpus)))
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
    from morph import surgery

    say(f"aligning {mixer.name} in every layer ({stage.tokens:,} tokens, once)")
    made = started(source, model, [mixer], corpus)
    _, log = together(source, made, [mixer], model, stage, corpus, out=work, seed=seed)
    losses = log.losses(0)
    say(f"aligned: relative error {losses[0]:.3f} -> {losses[-1]:.3f}")
    return surgery.mixer_state(surgery.hybrid_layers(made[0]))


# --- Several mixers at once ---------------------------------------------------------------------


def started(
    source: Source,
    model: nn.Module,
    mixers: Sequence[Mixer],
    corpus: _data.Corpus | None,
    say: Say = quiet,
) -> list[nn.Module]:
    """Return one hybrid a mixer, which has it in every candidate layer, calibrated on the text."""
    from morph import surgery
    from morph.pipeline import _start

    made = []
    for mixer in mixers:

        def told(message: str, name: str = mixer.name) -> None:
            say(f"{name}: {message}")

        plan = planning.uniform_plan(
            source.family.model_type, source.geometry, [], mixer.name, mixer.options, None
        )
        plan = surgery.resolve_costs(plan)
        made.append(_start.hybrid_of(model, plan, corpus, mixer.calibrate, say=told))
    return made


def together(
    source: Source,
    hybrids: Sequence[nn.Module],
    mixers: Sequence[Mixer],
    teacher: nn.Module,
    stage: Stage,
    corpus: _data.Corpus,
    *,
    out: Path,
    seed: int,
    training: Training | None = None,
    progress: Callable[[Event], None] | None = None,
) -> tuple[list[dict[str, torch.Tensor]], Log]:
    """Align every layer of all `hybrids` (one a mixer) in place, from one teacher forward a batch.

    Returns what was aligned, one dictionary a mixer, by the names that tensors have in a hybrid:
    all that was trained, and all that the mixers own. `out` keeps log and state.
    """
    from morph import distill as distillation
    from morph import surgery
    from morph.pipeline import _train

    student, names = hybrids[0], labels(mixers)
    every = [surgery.hybrid_layers(hybrid) for hybrid in hybrids]
    places = surgery.layers_of(surgery.base_of(student), source.family)
    joined = {
        i: distillation.Candidates({f"@{name}": own[i] for name, own in zip(names, every)})
        for i in every[0]
    }
    config: Any = student.config
    plan = config.morph
    # No plan has several mixers in a layer, and a saved state must know which ones it is of
    config.morph = {"candidates": strict.plain(list(mixers))}
    try:
        for i, layer in joined.items():
            setattr(places[i], source.family.attention, layer)
        log = distillation.distill(
            student,
            teacher,
            [stage],
            _train.rows_of(corpus, source.tokenizer(), seed),
            out=out,
            text=corpus.identity,
            seed=seed,
            layers=joined,
            training=training,
            progress=progress,
        )
    finally:
        config.morph = plan
        for i, own in every[0].items():
            setattr(places[i], source.family.attention, own)
    trained = set(log.trained)
    return [_aligned(source, own, f"@{name}", trained) for name, own in zip(names, every)], log


def _aligned(
    source: Source, layers: Mapping[int, Any], candidate: str, trained: set[str]
) -> dict[str, torch.Tensor]:
    found = {}
    for i, layer in layers.items():
        place, own = stem(source, i), {name for name, _ in layer.own_parameters()}
        for name, p in layer.named_parameters():
            if name in own or f"{place}.{candidate}.{name}" in trained:
                found[f"{place}.{name}"] = p.detach()
    return found


def stem(source: Source, layer: int) -> str:
    """Return the name of a layer's attention in a causal LM."""
    return f"model.{source.family.layers}.{layer}.{source.family.attention}"


def complete(source: Source, mixers: Sequence[Mixer]) -> list[Mixer]:
    """Return the mixers with all their options; refuse doubles, and what is no replacement."""
    from morph import surgery

    shape, found = source.geometry, []
    if not shape.candidates:
        raise UsageError("no layer of this model attends to everything: there is none to replace.")
    heads = tuple(range(shape.num_attention_heads))
    for mixer in mixers:
        if mixer.name == "full":
            raise UsageError("--mixer full: that is the source's own attention; nothing to align.")
        group = planning.HeadGroup(mixer=mixer.name, heads=heads, options=mixer.options)
        options, _ = surgery.group_cost(group, shape, shape.candidates[0])
        made = replace(mixer, options=options)
        if made in found:
            raise UsageError(
                f"--mixer {escape(mixer.name)}: named twice with the same options; name it once."
            )
        found.append(made)
    return found


def refuse_untrained(source: Source, mixers: Sequence[Mixer], stage: Stage) -> None:
    """Raise UsageError for a mixer of which the stage trains nothing."""
    from morph import surgery

    for mixer in mixers if stage.train == "new" else ():
        plan = planning.uniform_plan(
            source.family.model_type, source.geometry, [], mixer.name, mixer.options, None
        )
        if not surgery.own_parameter_names(source.family, plan):
            raise UsageError(
                f"--mixer {escape(mixer.name)} has no parameters of its own, and "
                "distill.align.train=new trains nothing else. Leave one of the two out."
            )


def labels(mixers: Sequence[Mixer]) -> list[str]:
    """Return a plain name for each mixer: its own, and a number where that is taken."""
    found: list[str] = []
    for mixer in mixers:
        stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in mixer.name)
        same = sum(x == stem or x.startswith(f"{stem}-") for x in found)
        found.append(f"{stem}-{same + 1}" if same else stem)
    return found
