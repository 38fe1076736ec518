"""What a mixer remembers between calls, and how `generate()` carries it.

`State` is a bag of tensors with the batch first, plus the number of tokens seen; beams, repeats
and selection act on all of it at once. `MixerCacheLayer` hangs one State per head group into a
transformers `Cache`, in the place of the layer that transformers would have put there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class State:
    """Generation state of one head group: named tensors `[B, ...]` and `seen`, tokens so far."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen = 0

    def map(self, function: Any) -> None:
        """Replace every tensor by `function(tensor)`."""
        self.tensors = {name: function(t) for name, t in self.tensors.items()}

    def nbytes(self) -> int:
        """Return the bytes held by all tensors, counting each as its own storage."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def clone(self) -> State:
        """Return an independent copy."""
        other = State()
        other.seen = self.seen
        other.tensors = {name: t.clone() for name, t in self.tensors.items()}
        return other


class MixerCacheLayer(CacheLayerMixin):
    """The generation state of one converted layer: one `State` per head group."""

    is_sliding = True  # so that transformers sizes its masks by a full layer, where there is one
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.states: list[State] = []

    def state(self, group: int) -> State:
        """Return the state of a head group, making it on first use."""
        while len(self.states) <= group:
            self.states.append(State())
        return self.states[group]

    @property
    def seen(self) -> int:
        """Tokens seen so far."""
        return self.states[0].seen if self.states else 0

    def nbytes(self) -> int:
        """Return the bytes held by all groups."""
        return sum(s.nbytes() for s in self.states)

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Nothing to make before the first tokens."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse: this layer belongs to a mixer, and plain attention must not write to it."""
        raise RuntimeError("a converted layer was run by plain attention")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (key length, key offset) as an unbounded layer would."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens seen so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: no maximum."""
        return -1

    def _map(self, function: Any) -> None:
        for state in self.states:
            state.map(function)

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        """Mixers move their state to the inputs' device themselves."""

    def reset(self) -> None:
        """Forget everything."""
        self.states = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Pick the beams `beam_idx`."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`."""
        self._map(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what a bounded or recurrent state has dropped cannot be put back."""
        raise RuntimeError(
            "a converted layer cannot be cropped: its state has no past to go back to. Generate "
            "without assisted decoding or prompt lookup."
        )


class FrozenCacheLayer(MixerCacheLayer):
    """A layer whose states are handed out as copies, so that many runs can start from one past."""

    def __init__(self, layer: MixerCacheLayer) -> None:
        super().__init__()
        self.states = layer.states

    def state(self, group: int) -> State:
        """Return a copy of the state of a head group."""
        return self.states[group].clone()


class FrozenCache(Cache):
    """A transformers cache that answers updates without remembering them."""

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Return past and new keys and values; the past stays as it is."""
        layer = copy.copy(self.layers[layer_idx])
        return layer.update(key_states, value_states, *args, **kwargs)


def adopt(cache: Cache, swapped: tuple[int, ...], num_layers: int) -> None:
    """Give a fresh transformers cache the layers that converted layers need, in place.

    `generate()` builds its cache from the config and knows nothing of mixers; an empty cache is
    corrected here on the first forward. Static layers become dynamic ones: transformers takes a
    cache that is static in part only for a dynamic one, and would read slots not yet written.
    """
    while len(cache.layers) < num_layers:
        cache.layers.append(DynamicLayer())
    cache.layer_class_to_replicate = None
    for i, layer in enumerate(cache.layers):
        if i in swapped:
            cache.layers[i] = MixerCacheLayer()
        elif isinstance(layer, StaticSlidingWindowLayer):
            cache.layers[i] = DynamicSlidingWindowLayer(sliding_window=layer.max_cache_len)
        elif isinstance(layer, StaticLayer):
            cache.layers[i] = DynamicLayer()


def held_bytes(cache: Cache) -> int:
    """Return the bytes of generation state a cache really holds, storage by storage."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            total += layer.nbytes()
            continue
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                total += tensor.numel() * tensor.element_size()
    return total
