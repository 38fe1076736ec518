"""One batch under a base assignment, and any number of variants of it that share what they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from morph.cache import FrozenCache, FrozenCacheLayer, MixerCacheLayer
from morph.errors import PlanError
from morph.surgery._modes import CHEAP, FULL, Mode

if TYPE_CHECKING:
    from morph.surgery._morphable import Batch, Morphable

T = TypeVar("T")


class Trace:
    """One batch under a base assignment, and any variant of it from its first changed layer on.

    The base runs when it is first needed. Of a model whose layers are streamed nothing is kept
    between layers: variants then go through the model together, layer by layer; see `together`.
    """

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
        share_prefix = share_prefix and not morphable.streaming
        self.skip = self._prefix_length() if reuse and share_prefix else 0
        self.share = 1 - self.skip / batch.ids.shape[1]
        self._logits: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """Answer logits `[N, vocab]` of the base assignment."""
        if self._logits is None:
            with torch.no_grad():
                if self.morphable.streaming:
                    self._logits = next(together([self], [[{}]], lambda _, logits: logits))[2]
                else:
                    self._logits = self._head(self._record())
        return self._logits

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
        m.count(len(m.base_layers) * (1 - self.share), self.batch)
        cache = FrozenCache(layers=past.layers)
        return {
            "past_key_values": cache,
            "use_cache": True,
            "morph_prefix": SimpleNamespace(layers=frozen),
        }

    def _record(self) -> torch.Tensor:
        """Run the rest under the base assignment, keeping what every layer was called with.

        A streamed model is only asked how it calls its layers; the layers themselves do not run.
        """
        m, self.calls = self.morphable, []
        extra = {"use_cache": False, **(self._run_prefix() if self.skip else {})}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self.calls.append({"hidden": hidden, "kwargs": rest})

        outputs: list[torch.Tensor] = []
        handles = [x.register_forward_pre_hook(before, with_kwargs=True) for x in m.base_layers]
        handles.append(
            m.base_layers[-1].register_forward_hook(
                lambda module, args, output: outputs.append(_tensor(output))
            )
        )
        try:
            with m.assigned(self.modes), m.skipped_layers(m.streaming):
                m.base(input_ids=self.batch.ids[:, self.skip :], **extra)
        finally:
            for handle in handles:
                handle.remove()
        m.count(0 if m.streaming else len(m.base_layers) * self.share, self.batch)
        return outputs[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.morphable.base.norm(predicting(hidden, self.batch.answers, self.skip))
        return self.morphable.head(normed)

    def variant(self, changes: Mapping[int, Mode]) -> torch.Tensor:
        """Return answer logits `[N, vocab]` with these layers' modes changed."""
        return self.variants([changes], lambda logits: logits)[0]

    def variants(
        self, changes: Sequence[Mapping[int, Mode]], reduce: Callable[[torch.Tensor], T]
    ) -> list[T]:
        """Return `reduce(answer logits [N, vocab])` for each of several changes of the base."""
        found = dict(self.each(changes, reduce))
        return [found[n] for n in range(len(changes))]

    def each(
        self, changes: Sequence[Mapping[int, Mode]], reduce: Callable[[torch.Tensor], T]
    ) -> Iterator[tuple[int, T]]:
        """Yield (index, `reduce(answer logits [N, vocab])`) for several changes of the base.

        Variants that begin alike share those layers: depth first, keeping one hidden state per
        layer; breadth first, layer by layer, where the model is streamed. They come in the order
        in which they are computed, and logits are handed to `reduce` one variant at a time.
        """
        real = [{i: x for i, x in c.items() if x is not self.modes[i]} for c in changes]
        if self.skip and any(x not in (FULL, CHEAP) for c in real for x in c.values()):
            raise PlanError("this trace shares its first tokens; blends need share_prefix=False.")
        if self.morphable.streaming:
            found = together([self], [real], lambda _, logits: reduce(logits))
            yield from ((n, value) for _, n, value in found)
        else:
            with torch.no_grad():
                yield from self._in_turn(real, reduce)

    def _in_turn(
        self, real: Sequence[Mapping[int, Mode]], reduce: Callable[[torch.Tensor], T]
    ) -> Iterator[tuple[int, T]]:
        base = self.logits
        numbers: dict[Any, int] = {}
        keys = [
            tuple(
                numbers.setdefault(_mark(c.get(i, self.modes.get(i))), len(numbers))
                for i in self._layers
            )
            for c in real
        ]
        before, last, stack = None, None, [call["hidden"] for call in self.calls]
        for n in sorted(range(len(real)), key=keys.__getitem__):
            if not real[n]:
                yield n, reduce(base)
            elif keys[n] == before:
                yield n, last
            else:
                shared = 0 if before is None else _common(before, keys[n])
                first = min(real[n]) if self.reuse else 0
                hidden = self._from(real[n], max(shared, first) if self.reuse else 0, first, stack)
                before, last = keys[n], reduce(self._head(hidden))
                yield n, last

    @property
    def _layers(self) -> range:
        return range(len(self.morphable.base_layers))

    def _from(
        self, changes: Mapping[int, Mode], start: int, first: int, stack: list[torch.Tensor]
    ) -> torch.Tensor:
        """Run one variant from layer `start` on; `stack` holds the inputs of the last variant."""
        m = self.morphable
        hidden = self.calls[start]["hidden"] if start <= first else stack[start]
        with m.assigned({**self.modes, **changes}):
            for i in range(start, len(m.base_layers)):
                stack[i] = hidden
                hidden = _tensor(m.base_layers[i](hidden, **self.calls[i]["kwargs"]))
        m.count((len(m.base_layers) - start) * self.share, self.batch)
        return hidden

    def losses(self, changes: Mapping[int, Mode] | None = None) -> torch.Tensor:
        """Return the negative log-likelihood `[N]` of every answer token under a variant."""
        logits = self.variant(changes) if changes else self.logits
        return answer_losses(logits, self.batch)


class _Underway:
    """The variants of one trace before some layer: which are alike so far, and what they hold."""

    def __init__(self, trace: Trace, changes: Sequence[Mapping[int, Mode]]) -> None:
        if not trace.calls:
            trace._record()
        self.trace, self.assigned = trace, [{**trace.modes, **c} for c in changes]
        self.groups = [list(range(len(changes)))] if changes else []
        self.states: torch.Tensor | None = None  # [V, B, T, D]; a group's lies at its first variant

    def step(self, i: int) -> None:
        """Take each group through layer `i`, once for those of its variants that are alike there.

        States are copied into one block: heap memory of thousands that come and go would be torn.
        """
        trace, m, ahead = self.trace, self.trace.morphable, []
        for members in self.groups:
            split: dict[Any, list[int]] = {}
            for n in members:
                split.setdefault(_mark(self.assigned[n].get(i)), []).append(n)
            first = members[0]
            hidden = trace.calls[0]["hidden"] if self.states is None else self.states[first]
            for alike in reversed(split.values()):  # the first one last: it takes the group's place
                modes = self.assigned[alike[0]]
                with m.assigned({i: modes[i]} if i in modes else {}):
                    out = _tensor(m.base_layers[i](hidden, **trace.calls[i]["kwargs"]))
                if self.states is None:
                    self.states = out.new_empty(len(self.assigned), *out.shape)
                self.states[alike[0]] = out
                m.count(trace.share, trace.batch)
            ahead += split.values()
        self.groups = ahead

    def logits(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the variants of each group and their answer logits, index 0 first."""
        for alike in sorted(self.groups):
            assert self.states is not None
            yield alike, self.trace._head(self.states[alike[0]])


def together(
    traces: Sequence[Trace],
    changes: Sequence[Sequence[Mapping[int, Mode]]],
    reduce: Callable[[int, torch.Tensor], T],
    passed: Callable[[int], None] = lambda layer: None,
) -> Iterator[tuple[int, int, T]]:
    """Yield (trace, index, `reduce(trace, answer logits [N, vocab])`) for changes of many traces.

    `changes[t]` are the variants of `traces[t]`, which come trace by trace, index 0 first. All of
    them pass layer i before any passes i + 1, so of a streamed model each layer is read once for
    all batches and variants; `passed` is told. What lives meanwhile is one hidden state for every
    batch and variant: (V + 1) x B x T x D numbers for each batch, V its variants, and what one
    layer needs for one of them. Nothing is yielded before the last layer is done.
    """
    m = traces[0].morphable
    with torch.no_grad():
        underway = [_Underway(trace, own) for trace, own in zip(traces, changes)]
        for i in range(len(m.base_layers)):
            for each in underway:
                each.step(i)
            m.release(i)
            passed(i)
    for t, each in enumerate(underway):
        with torch.no_grad():
            found = [(alike, reduce(t, logits)) for alike, logits in each.logits()]
        each.states = None
        yield from ((t, n, value) for alike, value in found for n in alike)


def answer_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the negative log-likelihood `[N]`, in nats, of answer tokens given their logits."""
    return F.cross_entropy(logits.float(), answer_tokens(batch), reduction="none")


def answer_tokens(batch: Batch) -> torch.Tensor:
    """Return the answer tokens `[N]`, row by row."""
    return batch.ids[:, 1:][batch.answers[:, 1:]]


def answer_rows(batch: Batch) -> torch.Tensor:
    """Return the row `[N]` of every answer token."""
    return batch.answers[:, 1:].nonzero()[:, 0]


def predicting(hidden: torch.Tensor, answers: torch.Tensor, skip: int = 0) -> torch.Tensor:
    """Return the hidden states `[N, D]` from which the answers are predicted."""
    return hidden[:, :-1][answers[:, skip + 1 :]]


def _mark(mode: Mode | None) -> Any:
    """Return what tells a mode from others for as long as all of them live."""
    return mode if mode is None or isinstance(mode, str) else id(mode)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), len(a))


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
