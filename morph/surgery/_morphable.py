"""The morphable model: every candidate layer can be full, cheap, or any blend, without copies.

All selectors probe through it. A `Trace` keeps the inputs of every layer for one batch, so that a
change in layer i recomputes only layers >= i; where the cheap mixer equals full attention on the
first tokens (a window, say), those tokens are computed once and shared by every variant too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from morph import strict
from morph.errors import PlanError
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.mixers._base import MixerBase
from morph.mixers._hybrid import HybridAttention, mixer_module
from morph.plan import Granularity, HeadGroup, LayerPlan
from morph.surgery._graft import base_of, geometry_of, layers_of
from morph.surgery._memo import Memo
from morph.surgery._modes import CHEAP, FULL, Mode, Probe, Switch
from morph.surgery._streaming import StreamedLayers, refuse_streaming
from morph.surgery._trace import Trace, answer_losses, predicting

Units = Iterable[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids `[B, T]` and `answers` `[B, T]` bool: the tokens whose prediction is scored."""

    ids: torch.Tensor
    answers: torch.Tensor

    def __post_init__(self) -> None:
        if self.ids.shape != self.answers.shape:
            raise PlanError(
                f"batch: ids {tuple(self.ids.shape)} and answers {tuple(self.answers.shape)} "
                "differ in shape."
            )
        if not bool(self.answers[:, 1:].any()) or bool(self.answers[:, 0].any()):
            raise PlanError("batch: mark at least one answer token, never the first of a row.")

    def on(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on a device."""
        if self.ids.device == torch.device(device):
            return self
        return Batch(ids=self.ids.to(device), answers=self.answers.to(device))


@dataclass(kw_only=True)
class Run:
    """What one forward left behind, gradients attached; N answer tokens, B rows, T tokens.

    `logits` `[N, vocab]` and `final_hidden` `[N, D]` (after the last norm) predict the answers.
    By layer, where asked for: `mixer_out` `[N, D]` (what attention adds), `residual` `[N, D]` (the
    layer's output), `inputs` `[B, T, D]` and `attention` `[B, T, D]`. `hidden` `[B, T, D]` is the
    final hidden state of every token.
    """

    logits: torch.Tensor
    final_hidden: torch.Tensor
    hidden: torch.Tensor
    mixer_out: dict[int, torch.Tensor] = field(default_factory=dict)
    residual: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)


class Morphable:
    """A source model whose candidate layers carry switches; see `morphable`.

    `layer_evaluations` counts what was computed since the start, in units of one layer over one
    whole batch of tokens; `forwards` is the same in units of the whole model, and `backwards`
    counts ways back through it. `memo` remembers what was measured, `progress(done, total)` is told
    how far a selector is.
    """

    def __init__(
        self, model: nn.Module, family: Family, mixer: str, options: Mapping[str, Any] | None
    ) -> None:
        self.model, self.family, self.mixer = model, family, mixer
        self.base = base_of(model)
        self.geometry = geometry_of(self.base, family)
        self.candidates = self.geometry.candidates
        self.layer_evaluations = 0.0
        self.backwards = 0.0
        self.tokens = self.backward_tokens = 0.0
        self._latest = 0
        self.memo = Memo()
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.streaming = False
        self.fetch: Callable[[int], None] = lambda layer: None
        self.release: Callable[[int | None], None] = lambda layer: None
        module = mixer_module(mixer)
        parsed = strict.build(module.Options, options or {}, f"mixer {mixer}", PlanError)
        self.options = strict.plain(parsed)
        self.prefix = module.Mixer.exact_prefix(parsed)
        self.switches: dict[int, Switch] = {}
        self.base_layers: list[nn.Module] = []
        self._modes: dict[tuple[int, ...], Mode] = {}
        if not self.candidates:
            raise PlanError("no layer of this model attends to everything: nothing to choose.")

    # --- what is full and what is cheap ----------------------------------------------------------

    @property
    def forwards(self) -> float:
        """Whole-model forwards spent so far."""
        return self.layer_evaluations / self.geometry.num_hidden_layers

    @property
    def device(self) -> torch.device:
        """Where the embeddings, and so the tokens, must lie."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]

    def modes(self, keep: Units, granularity: Granularity = "layer") -> dict[int, Mode]:
        """Return the mode of every candidate layer when exactly `keep` stays full."""
        width = self.geometry.units(granularity)
        kept: dict[int, set[int]] = {i: set() for i in self.candidates}
        for layer, unit in keep:
            kept[layer].add(unit)
        return {i: self._mode(units, width) for i, units in kept.items()}

    def _mode(self, units: set[int], width: int) -> Mode:
        if len(units) == width:
            return FULL
        if not units:
            return CHEAP
        key = (width, *sorted(units))
        if key not in self._modes:  # equal sets are one object, so that traces can tell
            mask = self.head_mask(units, width)[:, None]

            def blend(full: torch.Tensor, cheap: torch.Tensor) -> torch.Tensor:
                return torch.where(mask.to(full.device), full, cheap)

            self._modes[key] = blend
        return self._modes[key]

    def head_mask(self, units: Iterable[int], width: int) -> torch.Tensor:
        """Return bool `[H]`: the query heads of some of a layer's `width` units."""
        mask = torch.zeros(width, dtype=torch.bool)
        mask[sorted(units)] = True
        return mask.repeat_interleave(self.geometry.num_attention_heads // width)

    @contextmanager
    def assigned(self, modes: Mapping[int, Mode]) -> Iterator[None]:
        """Run with these modes; layers not named keep theirs. Restores them at the end."""
        before = {i: self.switches[i].mode for i in modes}
        try:
            for i, mode in modes.items():
                self.switches[i].mode = mode
            yield
        finally:
            for i, mode in before.items():
                self.switches[i].mode = mode

    # --- whole forwards --------------------------------------------------------------------------

    def logits(self, batch: Batch, modes: Mapping[int, Mode]) -> torch.Tensor:
        """Return the logits `[N, vocab]` that predict the batch's N answer tokens, with gradients.

        One whole forward; row by row, answers in order.
        """
        return self.run(batch, modes).logits

    def run(
        self,
        batch: Batch,
        modes: Mapping[int, Mode],
        want: Sequence[str] = (),
        probe: Probe | None = None,
    ) -> Run:
        """Run one whole forward and return what it left behind.

        `want` names the fields of `Run` that are kept by layer. `probe` is shown every candidate
        layer's rotated queries and keys, and values.
        """
        kept: dict[str, dict[int, torch.Tensor]] = {name: {} for name in want}
        handles = [*self._hooks(kept, batch)]
        try:
            for switch in self.switches.values():
                switch.probe = probe
            with self.assigned(modes):
                out = self.base(input_ids=batch.ids, use_cache=False)
        finally:
            for switch in self.switches.values():
                switch.probe = None
            for handle in handles:
                handle.remove()
        self.count(self.geometry.num_hidden_layers, batch)
        hidden = out.last_hidden_state
        final = predicting(hidden, batch.answers)
        return Run(logits=self.head(final), final_hidden=final, hidden=hidden, **kept)

    def _hooks(self, kept: dict[str, dict[int, torch.Tensor]], batch: Batch) -> Iterator[Any]:
        def out(name: str, i: int, whole: bool) -> Any:
            def after(module: nn.Module, args: Any, output: Any) -> None:
                found = output[0] if isinstance(output, tuple) else output
                kept[name][i] = found if whole else predicting(found, batch.answers)

            return after

        def incoming(i: int) -> Any:
            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                kept["inputs"][i] = args[0] if args else kwargs["hidden_states"]

            return before

        for i, layer in enumerate(self.base_layers):
            if "residual" in kept:
                yield layer.register_forward_hook(out("residual", i, False))
            if "inputs" in kept:
                yield layer.register_forward_pre_hook(incoming(i), with_kwargs=True)
            attention = getattr(layer, self.family.attention)
            for name, whole in (("mixer_out", False), ("attention", True)):
                if name in kept:
                    yield attention.register_forward_hook(out(name, i, whole))

    def full_heads(self, batch: Batch) -> dict[int, torch.Tensor]:
        """Return the source's head outputs `[B, T, H, V]` by candidate layer; one forward."""
        return self.teacher(batch)[0]

    @torch.no_grad()
    def teacher(self, batch: Batch) -> tuple[dict[int, torch.Tensor], Run]:
        """Return what `full_heads` does, and the source's Run."""
        found: dict[int, torch.Tensor] = {}

        def keep(i: int) -> Mode:
            def blend(full: torch.Tensor, cheap: torch.Tensor) -> torch.Tensor:
                found[i] = full
                return full

            return blend

        return found, self.run(batch, {i: keep(i) for i in self.candidates})

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, vocab]` of normed hidden states `[N, D]`, by the model's own head."""
        output = BaseModelOutputWithPast(last_hidden_state=hidden[None])
        self.base.forward = lambda *args, **kwargs: output  # every scaling and cap of the head runs
        try:
            return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del self.base.forward

    def gradients(
        self, loss: torch.Tensor, inputs: Sequence[torch.Tensor], *, again: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return d loss / d inputs; `again` keeps the graph for a further way back.

        Inputs that the loss does not depend on get zeros. Raises PlanError where the model is
        streamed.
        """
        refuse_streaming(self, "this score")
        self.backwards += 1
        self.backward_tokens += self._latest
        with _no_denormals():
            found = torch.autograd.grad(loss, list(inputs), retain_graph=again, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))

    def nll(
        self, batches: Iterable[Batch], keep: Units, granularity: Granularity = "layer"
    ) -> float:
        """Return the mean negative log-likelihood of answer tokens, in nats, with `keep` full."""
        modes = self.modes(keep, granularity)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                losses = answer_losses(self.logits(batch, modes), batch)
                total, count = total + float(losses.sum()), count + losses.numel()
        return total / count

    def trace(
        self,
        batch: Batch,
        modes: Mapping[int, Mode],
        *,
        reuse: bool = True,
        share_prefix: bool = True,
    ) -> Trace:
        """Return the Trace of a batch under `modes`.

        `share_prefix` False is needed where variants will blend heads; `reuse` False recomputes
        every layer of every variant, for comparison.
        """
        return Trace(self, batch, dict(modes), reuse, share_prefix)

    # --- what it costs ---------------------------------------------------------------------------

    def count(self, layers: float, batch: Batch) -> None:
        """Add evaluations of so many layers on one whole batch to the bill."""
        self._latest = batch.ids.numel()
        self.layer_evaluations += layers
        self.tokens += layers * self._latest / self.geometry.num_hidden_layers

    @contextmanager
    def skipped_layers(self, skip: bool) -> Iterator[None]:
        """Let layers hand on what they are given, so that only how they are called is seen."""
        if not skip:
            yield
            return
        try:
            for layer in self.base_layers:
                layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
            yield
        finally:
            for layer in self.base_layers:
                del layer.forward

    def cheap_parameters(self) -> list[nn.Parameter]:
        """Return the mixers' own parameters of every candidate layer."""
        return [p for i in self.candidates for p in self.switches[i].cheap.mixers.parameters()]


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Round numbers below 1e-38 to 0 on this thread's CPU: sharp attention is full of them.

    Their arithmetic is many times slower; on a small Llama the way back took 3.2 forwards with
    them and 1.2 without.
    """
    off = float(torch.tensor(1e-39) * 1.0) != 0.0  # there is no other way to ask
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if off:
            torch.set_flush_denormal(False)


@contextmanager
def morphable(
    model: nn.Module,
    mixer: str,
    options: Mapping[str, Any] | None = None,
    family: Family | None = None,
    *,
    aligned: Mapping[str, torch.Tensor] | None = None,
    streamed: StreamedLayers | None = None,
) -> Iterator[Morphable]:
    """Give a causal LM switches in every candidate layer for the length of a `with` block.

    The model is in eval mode inside, its weights frozen, and exactly as it was afterwards: the same
    attention modules, flags and no hook. `aligned` are the mixers' own parameters by
    `<layer>.<name>` (see `mixer_state`). `streamed` reads the layers of a model that keeps them on
    the meta device, one at a time; none is resident before or after. Raises UnknownName and
    PlanError for a mixer or options that do not exist, and PlanError where no layer attends to
    everything.
    """
    family = family or family_of(model.config.to_dict())
    found = Morphable(model, family, mixer, options)
    if streamed is not None:
        found.streaming, found.fetch, found.release = True, streamed.fetch, streamed.drop
        streamed.drop()
    layers = layers_of(found.base, family)
    found.base_layers = list(layers)
    training = {module: module.training for module in model.modules()}
    learning = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        for i in found.candidates:
            source = getattr(layers[i], family.attention)
            found.switches[i] = _switch(found, source, i)
            setattr(layers[i], family.attention, found.switches[i])
        if aligned is not None:
            _load(found, aligned)
        yield found
    finally:
        found.release(None)
        for i, switch in found.switches.items():
            setattr(layers[i], family.attention, switch.source)
        for module, flag in training.items():
            module.training = flag
        for p, flag in learning.items():
            p.requires_grad_(flag)


def _switch(found: Morphable, source: nn.Module, layer: int) -> Switch:
    heads = tuple(range(found.geometry.num_attention_heads))
    hybrids = [
        HybridAttention(
            source,
            found.family,
            found.geometry,
            LayerPlan(groups=(HeadGroup(mixer=stem, heads=heads, options=chosen),)),
            layer,
        )
        for stem, chosen in ((found.mixer, found.options), ("full", {}))
    ]
    first = next(source.parameters())
    device = next(found.model.parameters()).device if first.is_meta else first.device
    for hybrid in hybrids:
        hybrid.mixers.to(device)
        for part in hybrid.mixers:
            if type(part).inherit is not MixerBase.inherit:
                found.fetch(layer)
            part.inherit(source)
        hybrid.mixers.requires_grad_(False)
        hybrid.eval()
    return Switch(source, hybrids[0], hybrids[1])


def mixer_state(attentions: Mapping[int, HybridAttention]) -> dict[str, torch.Tensor]:
    """Return copies of the mixers' own parameters of uniform layers, by `<layer>.<name>`."""
    return {
        f"{i}.{name}": p.detach().clone()
        for i, attention in attentions.items()
        for name, p in attention.mixers[0].named_parameters()
    }


def _load(found: Morphable, aligned: Mapping[str, torch.Tensor]) -> None:
    for i in found.candidates:
        for name, p in found.switches[i].cheap.mixers[0].named_parameters():
            value = aligned.get(f"{i}.{name}")
            if value is None or value.shape != p.shape:
                raise PlanError(
                    f"layer {i}: the aligned mixers do not fit: {name} is "
                    f"{'missing' if value is None else list(value.shape)}, {list(p.shape)} is "
                    "needed. Align again."
                )
            with torch.no_grad():
                p.copy_(value)
