"""How many blocks of keys the queries of sparse mixers read."""

from __future__ import annotations

from typing import Any

import torch

from morph.evaluate._common import Model, inference
from morph.evaluation import BlocksRead
from morph.surgery import hybrid_layers

MOST_ROWS, MOST_TOKENS = 4, 2**14  # read for it
_POINTS = 64  # along the positions


def text_rows(ids: torch.Tensor | None, length: int, bos: int | None) -> torch.Tensor | None:
    """Return a few rows `[B, length]` of a text `[N]`, shorter where the text is; None without."""
    if ids is None or len(ids) < 2:
        return None
    take = min(length, len(ids), MOST_TOKENS)
    count = max(1, min(MOST_ROWS, len(ids) // take, MOST_TOKENS // take))
    rows = ids[: count * take].reshape(count, take)
    if bos is not None:
        rows = torch.cat([rows.new_full((count, 1), bos), rows[:, :-1]], dim=1)
    return rows


def blocks_read(model: Model, ids: torch.Tensor) -> tuple[BlocksRead, ...]:
    """Return what the queries of rows `[B, T]` read, by layer and head group.

    Asked are the mixers that have a method `blocks_read(inputs)`, which returns [B, T, J] numbers
    of blocks of `options.block` tokens, the query's own included, and only in layers that do not
    slide in the source: elsewhere a window bounds what there is to read.
    """
    asked: list[tuple[int, Any]] = [
        (i, mixer)
        for i, layer in hybrid_layers(model).items()
        for mixer in layer.mixers
        if hasattr(mixer, "blocks_read") and mixer.shape.window is None  # type: ignore[union-attr]
    ]
    if not asked:
        return ()
    counts: list[torch.Tensor | None] = [None] * len(asked)

    def ask(n: int, mixer: Any) -> Any:
        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            counts[n] = mixer.blocks_read(args[0]).cpu()

        return mixer.register_forward_hook(after)

    handles = [ask(n, mixer) for n, (_, mixer) in enumerate(asked)]
    try:
        with inference(model) as device:
            model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        _summary(i, mixer, found) for (i, mixer), found in zip(asked, counts) if found is not None
    )


def _summary(layer: int, mixer: Any, counts: torch.Tensor) -> BlocksRead:
    """Return the record of counts [B, T, J] over all positions of unpadded rows."""
    block, tokens = int(mixer.options.block), counts.shape[1]
    at = torch.arange(tokens)
    causal, counts = at // block + 1, counts.double()
    # a listed block is read whole, the own one up to the query
    read = ((counts - 1) * block + (at % block + 1)[:, None]).clamp(min=0)
    parts = list(zip(at.tensor_split(_POINTS), counts.transpose(0, 1).tensor_split(_POINTS)))
    parts = [(x, y.flatten()) for x, y in parts if len(x)]
    ends = torch.tensor([0.1, 0.9], dtype=torch.float64)
    bands = [y.quantile(ends).tolist() for _, y in parts]
    return BlocksRead(
        layer=layer,
        mixer=type(mixer).__module__.rpartition(".")[2],
        heads=mixer.shape.heads,
        block=block,
        positions=tuple(int(x[len(x) // 2]) for x, _ in parts),
        causal=tuple(float(causal[x].double().mean()) for x, _ in parts),
        mean=tuple(float(y.mean()) for _, y in parts),
        low=tuple(low for low, _ in bands),
        high=tuple(high for _, high in bands),
        sparsity=1.0 - float(read.mean(dim=(0, 2)).sum() / (at + 1).sum()),
    )
