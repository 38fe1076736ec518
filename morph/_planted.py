"""Recall models built by hand: it is known which layers carry far recall, and no other can.

`planted_model` returns a small causal LM with weights set by rule and questions for it. A question
is answered by looking up facts far behind it, in one hop (`single`), in two (`chain`), in two with
the second one stored twice (`redundant`), or in one beside a head that looks at the same fact and
passes nothing on (`bystander`). All other heads are noise. The true answer to "which layers must
stay full?" therefore stands in the fixture, which is what selectors are judged by. Every selector
runs on it unchanged, since it has the shape of a model of transformers.

The residual stream is a row of blocks: one-hot keys and values of the facts, the key a query
carries, what hops write, and noise. Key k of an A-fact leads to m, key m of a B-fact leads to the
answer v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from morph.families._family import Family
from morph.surgery import Batch

Layout = Literal["single", "chain", "redundant", "bystander"]
Unit = tuple[int, int]

LAYERS, HEAD_DIM, WINDOW = 8, 32, 8
VALUES, FACTS, QUESTIONS, HELD_OUT = 10, 6, 4, 64
CONTEXT = 44  # tokens before the first query; facts stand among the first FACT_SPAN of them
FACT_SPAN = 34
LENGTH = CONTEXT + 2 * QUESTIONS
SHARP = 30.0  # a hop's query; one matching key then gets all of the softmax
CLOSED = -1e4  # logit of tokens that are no answer
SIZES = {"qk": 10, "kA": 10, "vA": 10, "kB": 10, "vB": 10, "mid": 10, "out": 20, "noise": 16}
ROLES: dict[str, dict[int, str]] = {
    "single": {4: "hop2"},
    "chain": {2: "hop1", 5: "hop2"},
    "redundant": {0: "hop1", 3: "hop2", 5: "hop2"},
    "bystander": {2: "bystander", 4: "hop2"},
}


def _blocks() -> tuple[dict[str, slice], int]:
    found, start = {}, 0
    for name, size in SIZES.items():
        found[name] = slice(start, start + size)
        start += size
    return found, start


BLOCKS, HIDDEN = _blocks()


class PlantedConfig(PreTrainedConfig):
    """The sizes of a planted model; not registered with transformers."""

    model_type = "planted"


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k as they are: planted heads look at content alone."""
    return q, k


class PlantedAttention(nn.Module):
    """Causal softmax attention with the names and the signature of transformers' own."""

    def __init__(self, config: PlantedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling = config, layer_idx, 1.0
        width = config.num_attention_heads * HEAD_DIM
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(HIDDEN, width, bias=False))
        self.o_proj = nn.Linear(width, HIDDEN, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return (output `[B, T, D]`, None); every token is taken as real."""
        shape = (*hidden_states.shape[:2], -1, HEAD_DIM)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        tokens, seen = q.shape[2], k.shape[2]
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return self.o_proj(heads.transpose(1, 2).flatten(2)), None


class PlantedLayer(nn.Module):
    """The residual stream plus attention: no norm, no MLP."""

    def __init__(self, config: PlantedConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = PlantedAttention(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return `[B, T, D]` after this layer."""
        return hidden_states + self.self_attn(hidden_states=hidden_states, **kwargs)[0]


class PlantedModel(nn.Module):
    """The decoder without its head; it knows no padding."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, HIDDEN)
        self.layers = nn.ModuleList(PlantedLayer(config, i) for i in range(LAYERS))
        self.norm = nn.Identity()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden state `[B, T, D]`, and the cache where there is one."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        still = hidden.new_ones(1, hidden.shape[1], HEAD_DIM)
        for layer in self.layers:
            hidden = layer(
                hidden,
                position_embeddings=(still, torch.zeros_like(still)),
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


class PlantedForCausalLM(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = PlantedModel(config)
        self.lm_head = nn.Linear(HIDDEN, config.vocab_size)

    @property
    def base_model(self) -> PlantedModel:
        """The decoder, under the name that transformers gives it."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """Return logits `[B, T, vocab]`; takes what the decoder takes."""
        out = self.model(*args, **kwargs)
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values
        )


FAMILY = Family(
    model_type="planted",
    module="morph._planted",
    config_class="PlantedConfig",
    base_class="PlantedModel",
    causal_class="PlantedForCausalLM",
    attention_class="PlantedAttention",
    tiny_config={},
)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A planted model, questions to select on, other questions to judge by, and the true answer.

    `correct_units` holds every correct set as (layer, head) pairs; `correct` holds them as layers
    where the model has one head a layer, and is the same as `correct_units` where it has more.
    `mixer` and `options` are the cheap side under which this answer is true.
    """

    layout: Layout
    model: PlantedForCausalLM
    family: Family
    batches: list[Batch]
    held_out: list[Batch]
    heads: int
    correct_units: tuple[frozenset[Unit], ...]
    window: int = WINDOW
    mixer: str = "sliding"
    options: Mapping[str, Any] = field(default_factory=lambda: {"window": WINDOW})

    @property
    def correct(self) -> tuple[frozenset[Any], ...]:
        """Every correct set: of layers, or of (layer, head) pairs where layers have many heads."""
        if self.heads > 1:
            return self.correct_units
        return tuple(frozenset(layer for layer, _ in units) for units in self.correct_units)


def planted_model(
    layout: Layout, seed: int, *, examples: int = 16, heads: int = 1, copy: bool = False
) -> Planted:
    """Return the planted model of a layout, in eval mode, float32, with `examples` questions.

    Of several `heads` one per planted layer carries the role, the rest are noise. With `copy` an
    answer is the very token that stands at its B-fact, as scores that compare token ids need it,
    and guessing costs ln 100 instead of ln 10. The same seed gives the same model and questions;
    held-out questions and weights do not depend on `examples`.
    """
    data = _Questions(copy=copy, direct="hop1" not in ROLES[layout].values())
    generator = torch.Generator().manual_seed(seed)
    table = [data.answer_rows(generator)]
    weights = [_layer(ROLES[layout].get(i), heads, copy, generator) for i in range(LAYERS)]
    unembed = _unembedding(copy, generator)
    batches = []
    for count in (HELD_OUT, examples):
        rows, batch = data.draw(count, sum(map(len, table)), generator)
        table.append(rows)
        batches.append(batch)
    model = PlantedForCausalLM(_config(sum(map(len, table)), heads)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.cat(table))
        for layer, named in zip(model.model.layers, weights):
            for name, weight in named.items():
                getattr(layer.self_attn, name).weight.copy_(weight)
        model.lm_head.weight.zero_()[: data.num_answers] = unembed
        model.lm_head.bias.fill_(CLOSED)[: data.num_answers] = 0.0
    return Planted(
        layout=layout,
        model=model,
        family=FAMILY,
        batches=batches[1:],
        held_out=batches[:1],
        heads=heads,
        correct_units=_correct(ROLES[layout], heads),
    )


def _correct(roles: Mapping[int, str], heads: int) -> tuple[frozenset[Unit], ...]:
    """Return every smallest set of heads that answers: the first hop, if any, and one last hop."""
    first = [layer for layer, role in roles.items() if role == "hop1"]
    last = [layer for layer, role in roles.items() if role == "hop2"]
    return tuple(frozenset((i, _head(heads)) for i in (*first, layer)) for layer in last)


def _config(vocab_size: int, heads: int) -> PlantedConfig:
    return PlantedConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
    )


def _head(heads: int) -> int:
    """Return the head that carries a layer's role: not the first, which wins ties."""
    return heads // 2


def _pick(*names: str) -> torch.Tensor:
    """Return the `[K, D]` projection that reads these blocks, one after the other."""
    weight = torch.zeros(HEAD_DIM, HIDDEN)
    columns = torch.cat([torch.arange(HIDDEN)[BLOCKS[name]] for name in names])
    weight[torch.arange(len(columns)), columns] = 1.0
    return weight


def _layer(
    role: str | None, heads: int, copy: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the four projections of one layer."""
    found: list[tuple[torch.Tensor, ...]] = []
    for head in range(heads):
        noise = _noise(heads, generator)  # drawn for planted heads too: layouts share their noise
        found.append(_hop(role, copy) if role and head == _head(heads) else noise)
    q, k, v, o = zip(*found)
    return {
        "q_proj": torch.cat(q),
        "k_proj": torch.cat(k),
        "v_proj": torch.cat(v),
        "o_proj": torch.cat(o, dim=1),
    }


def _noise(heads: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return a head that reads everything and writes noise, as loud in sum as a single head."""
    q, k, v = (torch.zeros(HEAD_DIM, HIDDEN) for _ in range(3))
    q[:8] = 0.3 * torch.randn(8, HIDDEN, generator=generator)
    k[:8] = 0.3 * torch.randn(8, HIDDEN, generator=generator)
    v[:16] = 0.15 * torch.randn(16, HIDDEN, generator=generator) / heads**0.5
    return q, k, v, _pick("noise").T


def _hop(role: str, copy: bool) -> tuple[torch.Tensor, ...]:
    """Return a head that finds the one fact with the query's key and writes what it says."""
    if role == "hop1":
        return SHARP * _pick("qk"), _pick("kA"), _pick("vA"), _pick("mid").T
    value = _pick("vB", "kB") if copy else _pick("vB")
    if role == "bystander":
        value = torch.zeros_like(value)
    return SHARP * _pick("mid"), _pick("kB"), value, _pick("out").T


def _unembedding(copy: bool, generator: torch.Generator) -> torch.Tensor:
    """Return the head's rows for the answers: what the last hop wrote, and a little noise."""
    count = VALUES * VALUES if copy else VALUES
    weight = torch.zeros(count, HIDDEN)
    values = torch.eye(VALUES)
    out = [values.repeat(VALUES, 1), values.repeat_interleave(VALUES, dim=0)] if copy else [values]
    start = BLOCKS["out"].start
    weight[:, start : start + VALUES * len(out)] = 8.0 * torch.cat(out, dim=1)
    weight[:, BLOCKS["noise"]] = 0.15 * torch.randn(count, SIZES["noise"], generator=generator)
    return weight


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """How questions are drawn: a context of facts, then query, answer, query, answer, ...

    Tokens of the context and queries have an id each, so that they can carry anything; answers are
    the first ids. With `copy` an answer's id is 10 m + v and its B-fact is that very token; queries
    then never ask twice, because the first answer would tell. `direct` queries carry m, others k.
    """

    copy: bool
    direct: bool

    @property
    def num_answers(self) -> int:
        return VALUES * VALUES if self.copy else VALUES

    def answer_rows(self, generator: torch.Generator) -> torch.Tensor:
        """Return the embeddings of the answers."""
        ids = torch.arange(self.num_answers)
        rows = torch.zeros(self.num_answers, HIDDEN)
        if self.copy:
            _mark(rows, ids, kB=ids // VALUES, vB=ids % VALUES)
        rows[:, BLOCKS["noise"]] = 0.5 * torch.randn(
            self.num_answers, SIZES["noise"], generator=generator
        )
        return rows

    def draw(
        self, count: int, first_id: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, Batch]:
        """Return the embeddings `[count T, D]` of ids from `first_id` on, and a batch of them."""
        rows = torch.zeros(count, LENGTH, HIDDEN)
        rows[..., BLOCKS["noise"]] = 0.5 * torch.randn(
            count, LENGTH, SIZES["noise"], generator=generator
        )
        ids = first_id + torch.arange(count * LENGTH).view(count, LENGTH)
        for row, tokens in zip(rows, ids):
            self._fill(row, tokens, generator)
        answers = torch.zeros(count, LENGTH, dtype=torch.bool)
        answers[:, CONTEXT + 1 :: 2] = True
        return rows.flatten(0, 1), Batch(ids=ids, answers=answers)

    def _fill(self, row: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> None:
        def pick(count: int, of: int) -> torch.Tensor:
            return torch.randperm(of, generator=generator)[:count]

        keys, mids = pick(FACTS, VALUES), pick(FACTS, VALUES)
        values = torch.randint(VALUES, (FACTS,), generator=generator)
        a, b = pick(2 * FACTS, FACT_SPAN).split(FACTS)
        _mark(row, a, kA=keys, vA=mids)
        _mark(row, b, kB=mids, vB=values)
        asked = torch.randint(FACTS, (QUESTIONS,), generator=generator)
        if self.copy:
            asked = pick(QUESTIONS, FACTS)
        queries = torch.arange(CONTEXT, LENGTH, 2)
        if self.direct:
            _mark(row, queries, mid=mids[asked])
        else:
            _mark(row, queries, qk=keys[asked])
        names = VALUES * mids + values if self.copy else values
        tokens[queries + 1] = names[asked]
        if self.copy:
            tokens[b] = names


def _mark(rows: torch.Tensor, places: torch.Tensor, **values: torch.Tensor) -> None:
    """Write one-hot values into the named blocks of some rows, in place."""
    for name, value in values.items():
        rows[places, BLOCKS[name].start + value] = 1.0
