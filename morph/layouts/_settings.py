"""The keys of a config.json, none of them trusted: every wrong one is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from morph.errors import CheckpointError, escape, nearest
from morph.families._family import MAX_LAYERS
from morph.layouts._shapes import Heads, Rotary

MAX_HEADS = 4096  # like MAX_LAYERS: a hostile config must not cost time before it is refused


class Settings:
    """The part of a config.json that describes the decoder, with an architecture's defaults.

    `where` names that part in messages.
    """

    def __init__(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "config.json: "
    ) -> None:
        inner = config.get("text_config")
        nested = isinstance(inner, Mapping) and "num_hidden_layers" not in config
        self.where = f"{where}text_config." if nested else where
        self.given: Mapping[str, Any] = inner if nested else config  # type: ignore[assignment]
        self._defaults = defaults

    def get(self, name: str) -> Any:
        """Return a value; an absent key means the default, null means null."""
        return self.given[name] if name in self.given else self._defaults.get(name)

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """Return the error that names a key, its value and what it must be."""
        found = escape(repr(self.get(name)), 60)
        return CheckpointError(f"{self.where}{name} is {found}; it must be {expected}.")

    def size(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31
    ) -> int:
        """Return a whole number from `least` to `most`."""
        found = self.get(name)
        if found is None:
            found = default
        if type(found) is not int or not least <= found <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return found

    def flag(self, name: str) -> bool:
        """Return true or false; an absent key is false."""
        found = self.get(name)
        if found is not None and type(found) is not bool:
            raise self.wrong(name, "true or false")
        return bool(found)

    @property
    def layers(self) -> int:
        """The decoder's layers."""
        return self.size("num_hidden_layers", most=MAX_LAYERS)

    def list_for_layers(self, name: str, count: int | None = None) -> Sequence[Any]:
        """Return a list with one entry for each of `count` layers (None: num_hidden_layers)."""
        found, count = self.get(name), self.layers if count is None else count
        if not isinstance(found, (list, tuple)) or len(found) != count:
            raise self.wrong(name, f"a list of {count} entries, one for each layer")
        return found

    def words(
        self, name: str, kinds: Mapping[str, str], count: int | None = None
    ) -> tuple[str, ...]:
        """Return the kind that each layer's word in a list such as `layer_types` stands for.

        `kinds` maps the words that this architecture knows to kinds; `count` is the number of
        layers (None: num_hidden_layers).
        """
        found = self.list_for_layers(name, count)
        return tuple(self._kind(name, i, word, kinds) for i, word in enumerate(found))

    def _kind(self, name: str, layer: int, word: Any, kinds: Mapping[str, str]) -> str:
        if isinstance(word, str) and word in kinds:
            return kinds[word]
        raise CheckpointError(
            f"{self.where}{name}[{layer}] is {escape(repr(word), 60)}; it must be one of "
            f"{', '.join(kinds)}.{nearest(word, kinds) if isinstance(word, str) else ''}"
        )

    def numbers(self, name: str, least: int = 0) -> tuple[int, ...]:
        """Return a list of whole numbers of at least `least`, as the indices of layers are."""
        found = self.get(name)
        if not isinstance(found, (list, tuple)) or len(found) > MAX_LAYERS:
            raise self.wrong(name, "a list of whole numbers")
        if any(type(n) is not int or n < least for n in found):
            raise self.wrong(name, f"a list of whole numbers of at least {least}")
        return tuple(found)

    def heads(
        self,
        *,
        rotary: bool = True,
        share: float = 1.0,
        interleaved: bool = False,
        qk_norm: bool = False,
        head_dim: int | None = None,
    ) -> Heads:
        """Return the shape of a layer's attention, its sizes under their usual keys.

        `share` of each head turns; `head_dim` is the default where the config is silent (None, and
        where it says null: the hidden size over the query heads).
        """
        heads = self.size("num_attention_heads", most=MAX_HEADS)
        kv_heads = self.size("num_key_value_heads", heads, most=MAX_HEADS)
        if heads % kv_heads:
            raise self.wrong("num_key_value_heads", f"a divisor of the {heads} query heads")
        if self.get("head_dim") is None and ("head_dim" in self.given or head_dim is None):
            head_dim = max(1, self.size("hidden_size") // heads)
        dim = self.size("head_dim", head_dim)
        turned = Rotary(dim=int(dim * share), interleaved=interleaved) if rotary else None
        return Heads(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            rotary=turned if turned is not None and turned.dim > 0 else None,
            qk_norm=qk_norm,
        )

    def rope(self) -> Mapping[str, Any]:
        """Return the rotary parameters, of full layers where each layer type has its own."""
        for name in ("rope_scaling", "rope_parameters"):  # the order of transformers
            found = self.given.get(name)
            if not found:
                continue
            if not isinstance(found, Mapping):
                raise self.wrong(name, "a mapping of keys")
            nested = found.get("full_attention")
            return nested if isinstance(nested, Mapping) else found
        return {}

    def share(self, default: float = 1.0, older: str = "partial_rotary_factor") -> float:
        """Return the share of each head that rotary positions turn.

        Today's spelling is among the rotary parameters, `older` the key beside them, if any.
        """
        found = self.rope().get("partial_rotary_factor")
        if found is None and older:
            found = self.get(older)
        if found is None:
            found = default
        if type(found) not in (int, float) or not 0 < found <= 1:
            raise CheckpointError(
                f"{self.where}{older or 'partial_rotary_factor'} is {escape(repr(found), 60)}; it "
                "must be a number above 0 and at most 1."
            )
        return float(found)


def joined(items: Iterable[Any], shown: int = 6) -> str:
    """Return a few items as a list for a message."""
    texts = [escape(i, 100) for i in items]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more
