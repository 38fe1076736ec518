"""What the stages of distillation cost, by arithmetic: FLOPs, memory and hours. No torch.

Per token, with A and M the weights of one layer's attention projections and of its MLP (three
matrices), O those of the output projection alone, U the mixers' own, N = L (A + M), and `head`
the weights of the output head; a weight is 2 FLOPs on the way forward, 2 for the gradient of its
input and 2 for its own:

    mixing    softmax: 2 (K + V) for every head and every key that a query sees, (T + 1) / 2 of
              them on average, less under a window; linear: 4 K V + 4 C (K + V) for every head
              at a chunk C of 64. The way back through it is twice the way forward.
    align     the teacher's forward without its head, 2 N and its mixing; then every converted
              layer by itself: 2 A + 2 U and its mixing forward, 2 O and twice its mixing back,
              2 U for the mixers' own weights and 2 A where the projections train
    logits    teacher 2 N, student 2 N, back through the activations 2 N, each with its mixing; 2
              for every weight that trains: 6 N where weights are frozen, 8 N where all of them
              train. The frozen head: teacher and student 2 each, back 2.
    long      the same without the teacher

What is saved: a teacher whose final states are kept costs its head alone; layers below the first
converted one are the teacher's own, so that they are computed once and have no way back, unless
everything trains. What is added: `recompute` runs the student's layers, or their MLPs, again.

Memory is one model (teacher and student share what does not train); for every weight that trains a
copy of its own, a float32 master where it has 16 bits, two float32 moments and a float32 gradient;
and, coarsely, activations. Norms, biases and the selector are left out; hours are FLOPs over a
share of the peak, which nothing here has measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morph.errors import CheckpointError, escape
from morph.pipeline import _reach
from morph.plan import Geometry, Plan
from morph.recipes._rules import kl_share
from morph.recipes.schema import Mixer, Recipe, Stage

UTILISATION = 0.4  # of the dense peak: what a large, well-fed model reaches in training
_CHUNK = 64  # tokens that a linear kernel takes at a time


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense bfloat16 peak in FLOP/s and memory in bytes."""

    peak: float
    memory: float


# Published: NVIDIA's data sheets of the A100 SXM 80GB, H100 SXM, H200 SXM and HGX B200 (dense, half
# of the figures with sparsity), and the Ada architecture whitepaper (float32 accumulation)
GPUS: Mapping[str, Gpu] = {
    "A100": Gpu(peak=312e12, memory=80e9),
    "H100": Gpu(peak=989.5e12, memory=80e9),
    "H200": Gpu(peak=989.5e12, memory=141e9),
    "B200": Gpu(peak=2250e12, memory=180e9),
    "RTX 4090": Gpu(peak=165.2e12, memory=24e9),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many weights the parts of a decoder have; `intermediate` is the width of a gated MLP."""

    geometry: Geometry
    intermediate: int
    vocab: int
    tied: bool

    @property
    def output(self) -> int:
        """Weights of one output projection."""
        shape = self.geometry
        return shape.num_attention_heads * shape.v_head_dim * shape.hidden_size

    @property
    def attention(self) -> int:
        """Weights of one layer's q, k, v and output projections."""
        shape = self.geometry
        keys = shape.num_key_value_heads * (shape.head_dim + shape.v_head_dim)
        queries = shape.num_attention_heads * shape.head_dim
        return (queries + keys) * shape.hidden_size + self.output

    @property
    def mlp(self) -> int:
        """Weights of one layer's MLP."""
        return 3 * self.geometry.hidden_size * self.intermediate

    @property
    def layers(self) -> int:
        """Weights of all layers, N."""
        return self.geometry.num_hidden_layers * (self.attention + self.mlp)

    @property
    def head(self) -> int:
        """Weights of the output head, and of the embedding."""
        return self.vocab * self.geometry.hidden_size

    @property
    def total(self) -> int:
        """All weights that are matrices."""
        return self.layers + self.head * (1 if self.tied else 2)


def sizes_of(config: Mapping[str, Any], geometry: Geometry) -> Sizes:
    """Return the sizes that a config.json states; raise CheckpointError where it does not."""
    found = {}
    for name in ("intermediate_size", "vocab_size"):
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"config.json: {name} is {escape(repr(value), 60)}; what training costs follows "
                "from it, so it must be a whole number of at least 1."
            )
        found[name] = value
    return Sizes(
        geometry=geometry,
        intermediate=found["intermediate_size"],
        vocab=found["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Heads of a layer that share a mixer; `heads` is their number, on average."""

    heads: float
    mixer: str = "full"
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the student; `converted` is False for the source's own attention."""

    converted: bool
    window: int | None
    groups: tuple[Group, ...]


def planned_layers(plan: Plan) -> tuple[Layer, ...]:
    """Return the layers of a plan."""
    return tuple(
        Layer(
            converted=layer.fusion != "none" or any(g.mixer != "full" for g in layer.groups),
            window=window,
            groups=tuple(
                Group(heads=len(g.heads), mixer=g.mixer, options=g.options) for g in layer.groups
            ),
        )
        for layer, window in zip(plan.layers, plan.geometry.windows)
    )


def expected_layers(
    mixer: Mixer, geometry: Geometry, kept: int, granularity: str
) -> tuple[Layer, ...]:
    """Return the layers of a plan that keeps `kept` units, before it is known which.

    Whole layers that stay are put last, so that the way back is as long as it can be; heads that
    stay are spread evenly.
    """
    heads, candidates = geometry.num_attention_heads, geometry.candidates
    new = {"mixer": mixer.name, "options": mixer.options}
    old = {"mixer": mixer.kept, "options": mixer.kept_options}
    last = set(candidates[max(0, len(candidates) - kept) :]) if granularity == "layer" else set()
    units = len(candidates) * geometry.units(granularity)  # type: ignore[arg-type]
    share = 0.0 if granularity == "layer" else kept / max(1, units)
    layers = []
    for i, window in enumerate(geometry.windows):
        stays = 1.0 if window is not None or i in last else share
        source = {"mixer": "full", "options": {}} if window is not None else old
        sides = [(stays, source), (1.0 - stays, new)]
        groups = tuple(Group(heads=s * heads, **g) for s, g in sides if s > 0)  # type: ignore[arg-type]
        converted = any(g.mixer != "full" for g in groups)
        layers.append(Layer(converted=converted, window=window, groups=groups))
    return tuple(layers)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage costs: whole batches, so at least the tokens that it asks for."""

    loss: str
    tokens: int
    steps: int
    flops_per_token: float
    memory_bytes: float

    @property
    def flops(self) -> float:
        """FLOPs of the whole stage."""
        return self.tokens * self.flops_per_token


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What all stages cost; `memory_bytes` is that of the largest."""

    stages: tuple[StageCost, ...]

    @property
    def flops(self) -> float:
        """FLOPs of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def memory_bytes(self) -> float:
        """Bytes at the largest stage."""
        return max((stage.memory_bytes for stage in self.stages), default=0.0)

    def seconds(self, gpu: str) -> float:
        """Return seconds on one GPU at `UTILISATION` of its peak."""
        return self.flops / (GPUS[gpu].peak * UTILISATION)


def cost(recipe: Recipe, sizes: Sizes, layers: Sequence[Layer], *, cached: bool = False) -> Cost:
    """Return what the stages of a recipe cost; `cached`: the teacher's final states are at hand."""
    stored = 4 if recipe.dtype == "float32" else 2
    computed = 2 if computes_in_16_bits(recipe) else 4
    made = []
    for stage in recipe.distill:
        work = _Work(stage, sizes, tuple(layers), cached)
        batch = stage.batch_size * stage.seq_len
        steps = math.ceil(stage.tokens / batch)
        made.append(
            StageCost(
                loss=stage.loss,
                tokens=steps * batch,
                steps=steps,
                flops_per_token=work.flops(),
                memory_bytes=work.memory(stored, computed),
            )
        )
    return Cost(stages=tuple(made))


def computes_in_16_bits(recipe: Recipe) -> bool:
    """Return whether training runs at the speed that the table of GPUs states."""
    return recipe.dtype != "float32" or recipe.training.mixed_precision == "bf16"


class _Work:
    """The arithmetic of one stage."""

    def __init__(self, stage: Stage, sizes: Sizes, layers: tuple[Layer, ...], cached: bool) -> None:
        self.stage, self.sizes, self.layers, self.cached = stage, sizes, layers, cached
        self.converted = [layer for layer in layers if layer.converted]
        first = next((i for i, layer in enumerate(layers) if layer.converted), len(layers))
        self.first = 0 if stage.train == "all" else first
        self.teaches = stage.loss == "align" or kl_share(stage) > 0

    def flops(self) -> float:
        """Return FLOPs per token."""
        return self._align() if self.stage.loss == "align" else self._end_to_end()

    def _align(self) -> float:
        sizes, total = self.sizes, self._teacher()
        for layer in self.converted:
            own, mixing = self._own(layer), self._mixing(layer)
            total += 2 * (sizes.attention + own) + mixing
            total += 2 * sizes.output + 2 * mixing + 2 * self._trained(layer)
        return total

    def _end_to_end(self) -> float:
        sizes, upper = self.sizes, self.layers[self.first :]
        teacher = self.teaches and not self.cached
        total = self._teacher() if teacher else 0.0
        forward = [self._forward(layer) for layer in self.layers]
        total += sum(forward[self.first :] if teacher else forward)
        for layer in upper:
            total += 2 * (sizes.attention + sizes.mlp + self._own(layer)) + 2 * self._mixing(layer)
            total += 2 * self._trained(layer)
            if self.stage.recompute == "mlp":
                total += 2 * sizes.mlp
            elif self.stage.recompute == "layer":
                total += self._forward(layer)
        return total + sizes.head * (6 if self.teaches else 4)

    def _teacher(self) -> float:
        full = [_softmax(self.sizes, self.stage.seq_len, layer.window) for layer in self.layers]
        return 2 * self.sizes.layers + self.sizes.geometry.num_attention_heads * sum(full)

    def _forward(self, layer: Layer) -> float:
        sizes = self.sizes
        return 2 * (sizes.attention + sizes.mlp + self._own(layer)) + self._mixing(layer)

    def _mixing(self, layer: Layer) -> float:
        """FLOPs per token of the mixers themselves, forward."""
        total = 0.0
        for group in layer.groups:
            total += group.heads * _mixing(group, self.sizes, self.stage.seq_len, layer.window)
        return total

    def _own(self, layer: Layer) -> float:
        return sum(group.heads * _own(group, self.sizes) for group in layer.groups)

    def _trained(self, layer: Layer) -> float:
        """Weights of a layer that train."""
        sizes, train = self.sizes, self.stage.train
        if not layer.converted:
            whole = train == "all" and self.stage.loss != "align"
            return sizes.attention + sizes.mlp if whole else 0.0
        own = self._own(layer)
        if train == "new":
            return own
        if train == "lora":
            return own + self.stage.lora_rank * _sides(sizes)
        whole = train == "all" and self.stage.loss != "align"
        return own + sizes.attention + (sizes.mlp if whole else 0)

    def memory(self, stored: int, computed: int) -> float:
        """Return bytes, given those of a stored weight and of a computed number."""
        stage, sizes = self.stage, self.sizes
        trained = sum(self._trained(layer) for layer in self.layers)
        if stage.train == "all" and stage.loss != "align" and not sizes.tied:
            trained += sizes.head  # the embedding; the head never trains
        per_weight = stored + 4 + 8 + (4 if stored == 2 else 0)
        total = stored * (sizes.total + sum(map(self._own, self.layers))) + per_weight * trained
        tokens = (stage.micro_batch or stage.batch_size) * stage.seq_len
        width = sizes.geometry.hidden_size
        heads = sizes.geometry.num_attention_heads
        mixed = 2 * heads * (sizes.geometry.head_dim + sizes.geometry.v_head_dim)
        attention, mlp = 4 * width + mixed, 2 * width + 4 * sizes.intermediate
        if stage.loss == "align":  # every layer's input and target, and one layer's graph
            return total + computed * tokens * (2 * width * len(self.converted) + attention)
        depth = len(self.layers) - self.first
        kept = {
            "none": depth * (attention + mlp),
            "mlp": depth * (attention + width) + mlp,
            "layer": depth * width + attention + mlp,
        }
        logits = 3 * 4 * min(stage.chunk_tokens, tokens) * sizes.vocab
        return total + computed * tokens * (kept[stage.recompute] + 2 * width) + logits


def _softmax(sizes: Sizes, seq_len: int, window: int | None) -> float:
    """FLOPs per token and head of softmax attention."""
    width = seq_len if window is None else min(window, seq_len)
    keys = (width * (width + 1) / 2 + (seq_len - width) * width) / seq_len
    return 2 * (sizes.geometry.head_dim + sizes.geometry.v_head_dim) * keys


def _mixing(group: Group, sizes: Sizes, seq_len: int, window: int | None) -> float:
    """FLOPs per token and head of a mixer."""
    shape, options = sizes.geometry, _reach.options_of(group.mixer, group.options)
    own = _reach.sees(group.mixer, group.options)
    if own is not None:
        window = own if window is None else min(own, window)
    softmax = _softmax(sizes, seq_len, window)
    has_softmax, has_linear = _reach.parts(group.mixer)
    if not has_linear:
        return softmax
    size, value = shape.head_dim, shape.v_head_dim
    if isinstance(features := options.get("features"), int):  # phi has two halves
        size = 2 * features
    linear = 4 * size * value + 4 * _CHUNK * (size + value)
    return linear + (softmax if has_softmax else 0.0)


def _own(group: Group, sizes: Sizes) -> float:
    """Weights per head that a mixer brings: its gate's and its feature maps'."""
    options, shape = _reach.options_of(group.mixer, group.options), sizes.geometry
    gated = group.mixer == "mamba2" or options.get("gate", False) not in (False, "none")
    found = shape.v_head_dim * shape.hidden_size if gated else 0
    if isinstance(features := options.get("features"), int):
        found += 2 * shape.head_dim * features
    return found


def _sides(sizes: Sizes) -> int:
    """Rows and columns of the four projections: the weights of an update of rank 1."""
    shape = sizes.geometry
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    rows = heads * shape.head_dim + groups * (shape.head_dim + shape.v_head_dim)
    return rows + heads * shape.v_head_dim + 4 * shape.hidden_size
