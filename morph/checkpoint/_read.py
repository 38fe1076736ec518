"""A checked checkpoint folder: its weights, and a config that fits them. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from morph.checkpoint._folder import (
    clean_config,
    disagreements,
    find_folder,
    find_shards,
    quantisation,
    read_config,
)
from morph.checkpoint._format import read_at
from morph.checkpoint._weights import Weights, read_weights
from morph.errors import CheckpointError, UnsupportedModel, escape


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint(Weights):
    """A checked checkpoint folder.

    `config` is config.json without the keys that choose code (`dropped_keys`, dotted), `raw_config`
    the original. `quantised` says what shows that the weights are quantised ("": they are not).
    The other fields are those of `Weights`.
    """

    config: Mapping[str, Any]
    raw_config: Mapping[str, Any]
    dropped_keys: tuple[str, ...]
    quantised: str

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        strict: bool = True,
        partial: bool = False,
        quantised: bool = False,
        index: bool = True,
    ) -> Checkpoint:
        """Open `path`; `strict` also compares config and tensors and refuses what disagrees.

        `partial` allows that shards which the index names are not here (see `absent`), `quantised`
        that the weights are quantised. With `index` false the index only names the shards, and
        what it says of tensors is not compared with their headers. Raises CheckpointError naming
        file, tensor or key, and UnsupportedModel for quantised weights. Reads headers only.
        """
        folder = find_folder(path)
        raw = read_config(folder)
        dropped: list[str] = []
        config = clean_config(raw, dropped)
        shards = find_shards(folder, partial=partial)
        weights = read_weights(folder, shards if index else replace(shards, weight_map=None))
        reason = quantisation(config, weights.tensors)
        if reason and not quantised:
            raise UnsupportedModel(
                f"{escape(folder)} is quantised ({reason}). Convert the unquantised model, and "
                "quantise the result."
            )
        notes = weights.notes
        if dropped:
            notes += (f"config.json: ignored {', '.join(map(escape, dropped))}.",)
        found = cls(
            **vars(weights) | {"notes": notes},
            config=config,
            raw_config=raw,
            dropped_keys=tuple(dropped),
            quantised=reason,
        )
        if strict:
            problems = disagreements(config, weights.tensors, weights.absent)
            if problems:
                raise CheckpointError(f"{escape(folder)}: {' '.join(problems)}")
        return found

    @property
    def fingerprint(self) -> str:
        """A quick identity: sha256 over config, headers and the first and last 2 KiB of tensors.

        It tells models apart; it does not prove that two are equal.
        """
        digest = hashlib.sha256(repr(sorted(_flat(self.config))).encode())
        for shard in self.shards:
            digest.update(self.headers[shard].raw)
            with self._file(shard) as fd:
                infos = [i for i in self.tensors.values() if i.file.name == shard]
                for info in sorted(infos, key=lambda i: i.start):
                    take = min(2048, info.nbytes)
                    digest.update(read_at(fd, info.start, take, info.file))
                    digest.update(read_at(fd, info.stop - take, take, info.file))
        return digest.hexdigest()

    def tie_conflict(self) -> str:
        """Return why stored tied embeddings contradict each other, or an empty string."""
        tied = self.config.get("tie_word_embeddings", False)
        heads = [n for n in self.tensors if n.endswith("lm_head.weight")]
        embeddings = [n for n in self.tensors if n.endswith("embed_tokens.weight")]
        if not tied or not heads or not embeddings:
            return ""
        a, b = self.info(heads[0]), self.info(embeddings[0])
        if (a.dtype, a.shape) == (b.dtype, b.shape):
            pairs = zip(self.blocks(heads[0]), self.blocks(embeddings[0]), strict=True)
            if all(x == y for x, y in pairs):
                return ""
        return (
            f"config.json ties the embeddings, but {heads[0]} and {embeddings[0]} are stored with "
            "different values. Set tie_word_embeddings to what is meant, or delete one of them."
        )


def refuse_adapter(source: Checkpoint) -> None:
    """Raise CheckpointError where an adapter lies beside a model, so that it is two models."""
    if "adapter_config.json" in source.other_files:
        raise CheckpointError(
            f"{escape(source.path)} holds a model and an adapter (adapter_config.json), and "
            "transformers would load both as one. Move the adapter to a folder of its own, or "
            "merge it first."
        )


def _flat(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}")
    else:
        yield f"{place}={value!r}"
