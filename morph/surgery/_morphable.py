"""The morphable model: every candidate layer can be full, cheap, or any blend, without copies.

All selectors probe through it. A `Trace` keeps the inputs of every layer for one batch, so that a
change in layer i recomputes only layers >= i; where the cheap mixer equals full attention on the
first tokens (a window, say), those tokens are computed once and shared by every variant too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from morph import registry, strict
from morph.cache import FrozenCache, FrozenCacheLayer, MixerCacheLayer
from morph.errors import PlanError
from morph.families._family import Family
from morph.families._lookup import family_of
from morph.mixers._hybrid import HybridAttention
from morph.plan import Granularity, HeadGroup, LayerPlan
from morph.surgery._graft import base_of, geometry_of, layers_of

FULL: Literal["full"] = "full"
CHEAP: Literal["cheap"] = "cheap"
# A blend maps the heads' full and cheap outputs [B, T, H, V] to what the layer puts out.
Blend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Mode = Literal["full", "cheap"] | Blend
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


class Switch(nn.Module):
    """Stands at `self_attn`: runs the source, the cheap mixer, or a blend of both."""

    def __init__(self, source: nn.Module, cheap: HybridAttention, exact: HybridAttention) -> None:
        super().__init__()
        self.source, self.cheap, self.exact = source, cheap, exact
        self.mode: Mode = FULL
        self.prime: MixerCacheLayer | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        morph_prefix: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Return what the chosen mode puts out for `[B, T, D]`."""
        if self.prime is not None:
            return self._remember(hidden_states, position_embeddings, past_key_values), None
        if self.mode == FULL:
            return self.source(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        if self.mode == CHEAP:
            return self.cheap(hidden_states, position_embeddings, past_key_values=morph_prefix)
        full = self.exact.mix(hidden_states, position_embeddings)
        cheap = self.cheap.mix(hidden_states, position_embeddings)
        assert callable(self.mode)
        return self.exact.output(self.mode(full, cheap)), None

    def _remember(self, hidden: torch.Tensor, positions: Any, cache: Any) -> torch.Tensor:
        """Run tokens on which full and cheap agree, filling the caches of both."""
        q, k, v = self.cheap.project(hidden)
        _, k = self.cheap.rotate(q, k, positions)
        cache.update(k.transpose(1, 2), v.transpose(1, 2), self.cheap.layer_idx)
        view = SimpleNamespace(layers={self.cheap.layer_idx: self.prime})
        return self.cheap.output(self.cheap.mix(hidden, positions, view))


class Morphable:
    """A source model whose candidate layers carry switches; see `morphable`.

    `layer_evaluations` counts what was computed since the start, in units of one layer over one
    whole batch of tokens; `forwards` is the same in units of the whole model.
    """

    def __init__(
        self, model: nn.Module, family: Family, mixer: str, options: Mapping[str, Any] | None
    ) -> None:
        self.model, self.family, self.mixer = model, family, mixer
        self.base = base_of(model)
        self.geometry = geometry_of(self.base, family)
        self.candidates = self.geometry.candidates
        self.layer_evaluations = 0.0
        self.tokens = 0
        module = registry.load("mixers", mixer)
        parsed = strict.build(module.Options, options or {}, f"mixer {mixer}", PlanError)
        self.options = strict.plain(parsed)
        self.prefix = module.Mixer.exact_prefix(parsed)
        self.switches: dict[int, Switch] = {}
        self.base_layers: list[nn.Module] = []
        if not self.candidates:
            raise PlanError("no layer of this model attends to everything: nothing to choose.")

    @property
    def forwards(self) -> float:
        """Whole-model forwards spent so far."""
        return self.layer_evaluations / self.geometry.num_hidden_layers

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
        span = self.geometry.num_attention_heads // width
        heads = [u * span + r for u in sorted(units) for r in range(span)]
        mask = torch.zeros(self.geometry.num_attention_heads, 1)
        mask[heads] = 1.0

        def blend(full: torch.Tensor, cheap: torch.Tensor) -> torch.Tensor:
            return torch.where(mask.to(full.device) > 0, full, cheap)

        return blend

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

    def logits(self, batch: Batch, modes: Mapping[int, Mode]) -> torch.Tensor:
        """Return the logits `[N, vocab]` that predict the batch's N answer tokens, with gradients.

        One whole forward; row by row, answers in order.
        """
        with self.assigned(modes):
            out = self.base(input_ids=batch.ids, use_cache=False)
        self._count(self.geometry.num_hidden_layers, batch.ids.numel())
        return self.head(_predicting(out.last_hidden_state, batch.answers, 0))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, vocab]` of normed hidden states `[N, D]`, by the model's own head."""
        output = BaseModelOutputWithPast(last_hidden_state=hidden[None])
        self.base.forward = lambda *args, **kwargs: output  # every scaling and cap of the head runs
        try:
            return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del self.base.forward

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

    def _count(self, layers: float, tokens: int) -> None:
        self.layer_evaluations += layers
        self.tokens += tokens


class Trace:
    """One batch under a base assignment, and any variant of it from its first changed layer on."""

    def __init__(
        self,
        morphable: Morphable,
        batch: Batch,
        modes: dict[int, Mode],
        reuse: bool,
        share_prefix: bool,
    ) -> None:
        self.morphable, self.batch, self.modes, self.reuse = morphable, batch, modes, reuse
        self.calls: list[dict[str, Any]] = []
        self.skip = self._prefix_length() if reuse and share_prefix else 0
        self.share = 1 - self.skip / batch.ids.shape[1]
        with torch.no_grad():
            extra = self._run_prefix() if self.skip else {}
            self.final = self._record(extra)
            self.logits = self._head(self.final)

    def _prefix_length(self) -> int:
        plain = all(mode in (FULL, CHEAP) for mode in self.modes.values())
        first = int(self.batch.answers.any(dim=0).nonzero()[0])
        length = min(self.morphable.prefix, first - 1)
        return length if plain and length >= 8 else 0

    def _run_prefix(self) -> dict[str, Any]:
        """Compute the shared tokens once; return the keywords that continue from them."""
        m = self.morphable
        past = DynamicCache(config=m.base.config)
        for switch in m.switches.values():
            switch.prime = MixerCacheLayer()
            switch.prime.state(0)
        try:
            m.base(input_ids=self.batch.ids[:, : self.skip], past_key_values=past, use_cache=True)
            frozen = {i: FrozenCacheLayer(s.prime) for i, s in m.switches.items() if s.prime}
        finally:
            for switch in m.switches.values():
                switch.prime = None
        m._count(len(m.base_layers) * (1 - self.share), 0)
        cache = FrozenCache(layers=past.layers)
        return {
            "past_key_values": cache,
            "use_cache": True,
            "morph_prefix": SimpleNamespace(layers=frozen),
        }

    def _record(self, extra: dict[str, Any]) -> torch.Tensor:
        """Run the rest under the base assignment, keeping what every layer was called with."""
        m = self.morphable

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self.calls.append({"hidden": hidden, "kwargs": rest})

        handles = [x.register_forward_pre_hook(before, with_kwargs=True) for x in m.base_layers]
        outputs: list[torch.Tensor] = []
        last = m.base_layers[-1].register_forward_hook(
            lambda module, args, output: outputs.append(_tensor(output))
        )
        try:
            with m.assigned(self.modes):
                m.base(input_ids=self.batch.ids[:, self.skip :], **({"use_cache": False} | extra))
        finally:
            for handle in (*handles, last):
                handle.remove()
        m._count(len(m.base_layers) * self.share, self.batch.ids.numel())
        return outputs[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.morphable.base.norm(_predicting(hidden, self.batch.answers, self.skip))
        return self.morphable.head(normed)

    @torch.no_grad()
    def variant(self, changes: Mapping[int, Mode]) -> torch.Tensor:
        """Return answer logits `[N, vocab]` with these layers' modes changed."""
        m = self.morphable
        changes = {i: mode for i, mode in changes.items() if mode != self.modes[i]}
        if not changes:
            return self.logits
        if self.skip and not all(mode in (FULL, CHEAP) for mode in changes.values()):
            raise PlanError("this trace shares its first tokens; blends need share_prefix=False.")
        first = min(changes) if self.reuse else 0
        hidden = self.calls[first]["hidden"]
        with m.assigned({**self.modes, **changes}):
            for call, layer in zip(self.calls[first:], m.base_layers[first:]):
                hidden = _tensor(layer(hidden, **call["kwargs"]))
        m._count((len(m.base_layers) - first) * self.share, 0)
        return self._head(hidden)

    def losses(self, changes: Mapping[int, Mode] | None = None) -> torch.Tensor:
        """Return the negative log-likelihood `[N]` of every answer token under a variant."""
        logits = self.variant(changes) if changes else self.logits
        return answer_losses(logits, self.batch)


def answer_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the negative log-likelihood `[N]`, in nats, of answer tokens given their logits."""
    targets = batch.ids[:, 1:][batch.answers[:, 1:]]
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _predicting(hidden: torch.Tensor, answers: torch.Tensor, skip: int) -> torch.Tensor:
    """Return the hidden states `[N, D]` from which the answers are predicted."""
    return hidden[:, :-1][answers[:, skip + 1 :]]


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def morphable(
    model: nn.Module,
    mixer: str,
    options: Mapping[str, Any] | None = None,
    family: Family | None = None,
) -> Iterator[Morphable]:
    """Give a causal LM switches in every candidate layer for the length of a `with` block.

    The model is in eval mode inside, and exactly as it was afterwards: the same attention
    modules, flags and no hook. Raises UnknownName and PlanError for a mixer or options that do
    not exist, and PlanError where no layer attends to everything.
    """
    family = family or family_of(model.config.to_dict())
    found = Morphable(model, family, mixer, options)
    layers = layers_of(found.base, family)
    found.base_layers = list(layers)
    heads = tuple(range(found.geometry.num_attention_heads))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for i in found.candidates:
            source = getattr(layers[i], family.attention)
            hybrids = [
                HybridAttention(
                    source,
                    family,
                    found.geometry,
                    LayerPlan(groups=(HeadGroup(mixer=stem, heads=heads, options=chosen),)),
                    i,
                )
                for stem, chosen in ((mixer, found.options), ("full", {}))
            ]
            first = next(source.parameters())
            for hybrid in hybrids:
                hybrid.mixers.to(first.device)
                for part in hybrid.mixers:
                    part.inherit(source)
                hybrid.eval()
            found.switches[i] = Switch(source, hybrids[0], hybrids[1])
            setattr(layers[i], family.attention, found.switches[i])
        yield found
    finally:
        for i, switch in found.switches.items():
            setattr(layers[i], family.attention, switch.source)
        for module, flag in training.items():
            module.training = flag
