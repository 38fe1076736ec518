"""Which layers of a hybrid with shared routing need an index of their own, found by trying.

Source: IndexCache's greedy choice by calibration loss. Nothing is trained and nothing copied:
layers of the live model are told to follow another one, and told back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from morph import registry, strict
from morph.errors import MismatchError, UsageError
from morph.mixers._hybrid import HybridAttention
from morph.plan import HeadGroup, LayerPlan, Plan
from morph.surgery._graft import hybrid_layers, resolve_costs
from morph.surgery._memo import Memo
from morph.surgery._morphable import Batch
from morph.surgery._trace import answer_losses

MIXER = "shared_routing"
Setting = tuple[tuple[int, int, int], ...]  # (k, block, local) of a layer's groups, each once
_LOGITS = 2**27  # elements of logits alive at once: 512 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Drop:
    """One step: `layer` gave up its index and follows `owner`; the loss after it.

    `tried` are the losses of all that could have been dropped in its place, by layer.
    """

    layer: int
    owner: int
    loss: float
    tried: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Owners:
    """The plan with owners written into its options, who owns, and how the loss went.

    `loss` names what was measured in nats a token: `nll`, or `kl` to a teacher; `start` is its
    value before anything was dropped.
    """

    plan: Plan
    owners: tuple[int, ...]
    loss: str
    start: float
    drops: tuple[Drop, ...]


def sharing(plan: Plan) -> dict[int, int | None]:
    """Return the layers with shared routing, and whom each follows (None: its own index).

    Layers that slide in the source have no index and are left out. Raises MismatchError for a
    layer whose groups of heads differ in this.
    """
    found: dict[int, int | None] = {}
    for i, layer in enumerate(plan.layers):
        whom = {g.options.get("owner") for g in layer.groups if g.mixer == MIXER}
        if len(whom) > 1:
            raise MismatchError(
                f"layer {i}: some groups of heads have an index of their own and some follow; "
                "owners are chosen by whole layers."
            )
        if whom and plan.geometry.windows[i] is None:
            found[i] = next(iter(whom))
    return found


def choose_owners(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    wanted: int,
    *,
    teacher: nn.Module | None = None,
    memo: Memo | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Owners:
    """Return which `wanted` layers of a hybrid with this plan keep an index, chosen greedily.

    From what owns one now, the index goes whose layer and followers do best with the nearest owner
    before it, one at a time: where the mean loss of the batches' answer tokens (negative
    log-likelihood, or KL from a `teacher`) rises least; of equals the later layer. A layer follows
    one of the same k, block and local only, so the first of each keeps its index. `progress` is
    told measurements done, of all. The model comes back as it was. Raises UsageError for a count
    that cannot be had, MismatchError for a plan without shared routing.
    """
    model_layers, follows = hybrid_layers(model), sharing(plan)
    settings = {i: _settings(model_layers[i]) for i in follows}
    owners = [i for i, whom in follows.items() if whom is None]
    _check(owners, settings, wanted)
    memo = Memo() if memo is None else memo  # an empty one is false
    fixed = len(owners) - len(_free(owners, settings))
    many = 1 + sum(n - fixed for n in range(wanted + 1, len(owners) + 1))
    count, kind, drops = 0, "nll" if teacher is None else "kl", []

    def measured(chosen: Sequence[int]) -> float:
        nonlocal count
        with _following(model_layers, _whom(follows, chosen, settings)):
            key = f"{kind} {','.join(map(str, chosen))}"
            found = memo.of(key, lambda: [_loss(model, batches, teacher)])[0]
        count += 1
        if progress is not None:
            progress(count, many)
        if not math.isfinite(found):
            raise MismatchError(
                f"the loss with an index in layers {', '.join(map(str, chosen))} is {found}."
            )
        return found

    start = measured(owners)
    while len(owners) > wanted:
        tried = {i: measured([o for o in owners if o != i]) for i in _free(owners, settings)}
        layer = min(tried, key=lambda i: (tried[i], -i))
        owners = [o for o in owners if o != layer]
        owner = _whom(follows, owners, settings)[layer]
        assert owner is not None
        drops.append(Drop(layer=layer, owner=owner, loss=tried[layer], tried=tried))
    made = with_owners(plan, _whom(follows, owners, settings))
    return Owners(plan=made, owners=tuple(owners), loss=kind, start=start, drops=tuple(drops))


def with_owners(plan: Plan, whom: Mapping[int, int | None]) -> Plan:
    """Return the plan in which each of these layers follows the one named; None: nobody."""
    layers = []
    for i, layer in enumerate(plan.layers):
        groups = tuple(
            HeadGroup(mixer=g.mixer, heads=g.heads, options={**g.options, "owner": whom[i]})
            if g.mixer == MIXER and i in whom
            else g
            for g in layer.groups
        )
        layers.append(LayerPlan(groups=groups, fusion=layer.fusion))
    return resolve_costs(dataclasses.replace(plan, layers=tuple(layers)))


def follow(model: nn.Module, plan: Plan) -> None:
    """Let the layers of a live hybrid follow whom `plan` says; their parameters stay."""
    layers = hybrid_layers(model)
    for i, whom in sharing(plan).items():
        _switch(layers[i], whom)


def _settings(layer: HybridAttention) -> Setting:
    options = [m.options for m in _mixers(layer)]
    return tuple(sorted({(o.k, o.block, o.local) for o in options}))


def _mixers(layer: HybridAttention) -> list[Any]:
    kind = registry.load("mixers", MIXER).Mixer
    return [m for m in layer.mixers if isinstance(m, kind)]


def _check(owners: Sequence[int], settings: Mapping[int, Setting], wanted: int) -> None:
    if not settings:
        raise MismatchError(
            f"no layer of this plan has {MIXER}: there is no index to share. Convert with --mixer "
            f"{MIXER} first."
        )
    least = len(owners) - len(_free(owners, settings))
    if not least <= wanted < len(owners):
        raise UsageError(
            f"{len(owners)} layers have an index of their own, and {wanted} cannot be left: give "
            f"{least} to {len(owners) - 1}."
            if least < len(owners)
            else "no index can be spared: each layer that has one is the first with its k, block "
            "and local."
        )


def _free(owners: Sequence[int], settings: Mapping[int, Setting]) -> list[int]:
    """Return the owners that could follow an earlier one."""
    return [
        i
        for i in owners
        if len(settings[i]) == 1 and any(o < i and settings[o] == settings[i] for o in owners)
    ]


def _whom(
    follows: Mapping[int, int | None],
    owners: Sequence[int],
    settings: Mapping[int, Setting],
) -> dict[int, int | None]:
    """Return whom every layer follows: as it did while that one owns, else the nearest before."""
    found: dict[int, int | None] = {}
    for i, before in follows.items():
        if i in owners:
            found[i] = None
        elif before in owners:
            found[i] = before
        else:
            found[i] = max(o for o in owners if o < i and settings[o] == settings[i])
    return found


@contextmanager
def _following(
    layers: Mapping[int, HybridAttention], whom: Mapping[int, int | None]
) -> Iterator[None]:
    """Let layers follow others for a while."""
    held = [(m, m.options) for i in whom for m in _mixers(layers[i])]
    try:
        for i, owner in whom.items():
            _switch(layers[i], owner)
        yield
    finally:
        for mixer, options in held:
            mixer.options = options


def _switch(layer: HybridAttention, owner: int | None) -> None:
    for mixer in _mixers(layer):
        mixer.options = strict.build(
            type(mixer.options), {**strict.plain(mixer.options), "owner": owner}
        )


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[Batch], teacher: nn.Module | None) -> float:
    """Return the mean over all answer tokens, in nats."""
    total, count = 0.0, 0
    config: Any = model.config
    for batch in batches:
        rows = max(1, _LOGITS // (batch.ids.shape[1] * config.vocab_size))
        for start in range(0, len(batch.ids), rows):
            answers = batch.answers[start : start + rows]
            if not bool(answers.any()):
                continue
            part = Batch(ids=batch.ids[start : start + rows], answers=answers)
            part = part.on(next(model.parameters()).device)
            logits = _logits(model, part)
            if teacher is None:
                losses = answer_losses(logits, part)
            else:
                log, wanted = (F.log_softmax(x, -1) for x in (logits, _logits(teacher, part)))
                losses = F.kl_div(log, wanted, reduction="none", log_target=True).sum(dim=-1)
            total += losses.double().sum().item()
            count += len(losses)
    return total / max(1, count)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits `[N, vocab]` of all answer tokens, float32."""
    found = model(input_ids=batch.ids, use_cache=False).logits
    return found[:, :-1][batch.answers[:, 1:]].float()
