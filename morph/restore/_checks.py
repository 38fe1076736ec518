"""Whether two checkpoints belong together, as far as configs and headers tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from morph.checkpoint import Checkpoint, TensorInfo, text_config
from morph.errors import CheckpointError, MismatchError, MorphError, UnsupportedModel, escape
from morph.layouts import Heads, Reading
from morph.layouts import read as read_layout
from morph.restore._options import Options
from morph.restore._pair import Place
from morph.restore._record import read_record

NOTHING = "Nothing was written."
# what places or scales attention scores; other keys of two fine-tuned siblings may differ
_GEOMETRY = (
    *("head_dim", "num_attention_heads", "num_key_value_heads", "partial_rotary_factor"),
    *("rotary_pct", "rotary_emb_base", "rope_interleave", "rope_interleaved", "no_rope_layers"),
    *("no_rope_layer_interval", "sliding_window", "attention_multiplier", "attn_scale"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "attn_temperature_tuning"),
    *("use_qk_norm", "qk_layernorm", "position_embedding_type", "attention_chunk_size"),
)
_SIZES = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "num_hidden_layers"),
)
# where null means what other keys, or the class, say
_DERIVED = ("head_dim", "num_key_value_heads", "no_rope_layers", "partial_rotary_factor")
_ROPES = ("rope_parameters", "rope_scaling")
_ADVICE = f"Restore before quantising, then quantise. {NOTHING}"
_WIDER = {("BF16", "F32"), ("F16", "F32")}


def shapes_of(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name."""
    return {name: info.shape for name, info in source.tensors.items()}


def read_post(post: Checkpoint) -> Reading:
    """Return what POST's rows are for; raise MismatchError for packed, quantised weights.

    Scales beside a quantised weight are no reason to refuse: they go with it, or `check_quantised`
    refuses.
    """
    try:
        found = read_layout(post.config, shapes_of(post))
        softmax = {i for i, shape in enumerate(found.heads) if shape is not None}
        known = [{r.layer for r in found.rows if r.role == role} for role in ("q", "k")]
        told_apart = bool(softmax) and all(softmax <= layers for layers in known)
        return dataclasses.replace(found, refusal="") if post.quantised and told_apart else found
    except CheckpointError as error:
        if not post.quantised:
            raise _of(post, error) from error
        raise MismatchError(
            f"POST ({escape(post.path.name, 80)}) is quantised ({post.quantised}) in a form whose "
            f"rows cannot be told apart. Restore before quantising, then quantise. {NOTHING}"
        ) from error


def check_layers(
    pre: Checkpoint, post: Checkpoint, before: Reading | None, reading: Reading
) -> list[str]:
    """Raise MismatchError at the first layer that attends differently in PRE; return notes."""
    if before is None:
        return [
            "PRE's config is of another form than POST's, so their layers were not compared one by "
            "one; shapes, types and values were."
        ]
    if len(before.kinds) != len(reading.kinds):
        raise MismatchError(
            f"PRE has {len(before.kinds)} layers, POST {len(reading.kinds)}. {_wrong_pre(pre)}"
        )
    for layer, (a, b) in enumerate(zip(before.kinds, reading.kinds)):
        if a == b and (a != "mixed" or _parts(before, layer) == _parts(reading, layer)):
            continue
        heads = " (its heads differ)" if a == b else ""
        teacher = dense_teacher(pre, post, before, reading)
        raise MismatchError(
            f"layer {layer} has {a} attention in PRE and {b} in POST{heads}. {teacher} {NOTHING}"
        )
    return []


def _wrong_pre(pre: Checkpoint) -> str:
    return (
        f"PRE ({escape(pre.path.name, 80)}) must be the hybrid just before it was fine-tuned. "
        f"{NOTHING}"
    )


def read_pre(pre: Checkpoint, post: Checkpoint) -> Reading | None:
    """Return what PRE's rows are for; where only some of its shards are here, by POST's names."""
    try:
        return read_layout(pre.config, shapes_of(post if pre.absent else pre))
    except UnsupportedModel:
        return None
    except MorphError as error:
        if pre.absent:
            return None
        raise _of(pre, error) from error


def _of(source: Checkpoint, error: MorphError) -> MorphError:
    """Return an error about a config with the folder it lies in: there are two."""
    return type(error)(f"{escape(source.path)}: {error}")


def _parts(reading: Reading, layer: int) -> list[tuple[str, str, Any]]:
    """Return which rows of a layer's q and k have which kind."""
    rows = [r for r in reading.rows if r.layer == layer and r.role in ("q", "k")]
    return sorted((r.role, r.kind, r.ranges or ()) for r in rows)


def dense_teacher(pre: Checkpoint, post: Checkpoint, before: Reading, reading: Reading) -> str:
    """Say what PRE seems to be, where its layers are not POST's."""
    if _recorded(post, "source") == pre.fingerprint:
        return _teacher(pre)
    dense = set(before.kinds) <= {"full", "sliding"} and "linear" in reading.kinds
    if dense or set(before.kinds) == {"full"}:
        return (
            f"PRE ({escape(pre.path.name, 80)}) looks like the dense model that a hybrid is "
            "converted from. Give the hybrid just before it was fine-tuned."
        )
    return f"PRE ({escape(pre.path.name, 80)}) must be the hybrid just before it was fine-tuned."


def _teacher(pre: Checkpoint) -> str:
    return (
        f"PRE ({escape(pre.path.name, 80)}) is the model that POST was converted from, as POST's "
        "morph.json records: its q and k belong to other attention. Give the hybrid just before it "
        "was fine-tuned."
    )


def check_parent(pre: Checkpoint, post: Checkpoint, options: Options) -> list[str]:
    """Raise MismatchError where POST's morph.json says that PRE is its teacher; return notes."""
    if _recorded(post, "source") == pre.fingerprint:
        if options.allows("unrelated"):
            return [_teacher(pre)]
        raise MismatchError(f"{_teacher(pre)} Or --allow unrelated. {NOTHING}")
    parent = _recorded(post, "pre")
    if parent and not pre.absent and parent != pre.fingerprint:
        return ["POST's morph.json names another checkpoint as the one it was tuned from."]
    if "plan" in read_record(post) and not read_record(pre):
        return [
            "POST has a morph.json that tells of a conversion, and PRE has none: is the order PRE "
            "POST right? PRE is the hybrid before its fine-tuning."
        ]
    return []


def _recorded(post: Checkpoint, key: str) -> str:
    """Return the fingerprint that POST's morph.json has under a key, or an empty string."""
    source = read_record(post).get(key)
    found = source.get("sha256") if isinstance(source, Mapping) else None
    return found if isinstance(found, str) else ""


def check_tensors(places: Iterable[Place], pre: Checkpoint, post: Checkpoint, o: Options) -> int:
    """Raise MismatchError for a shape or type that differs; return how many are widened."""
    widened = 0
    for place in places:
        a, b = place.pre, place.post
        name = escape(place.part.tensor, 120)
        if a.shape != b.shape:
            raise MismatchError(
                f"'{name}' has shape {list(a.shape)} in PRE and {list(b.shape)} in POST. "
                f"{_explain(pre, post)} {NOTHING}"
            )
        if a.dtype == b.dtype:
            continue
        if (a.dtype, b.dtype) not in _WIDER:
            raise MismatchError(
                f"'{name}' is {a.dtype} in PRE and {b.dtype} in POST. {_loss(a, b)} {NOTHING}"
            )
        if not o.allows("widening"):
            raise MismatchError(
                f"'{name}' is {a.dtype} in PRE and {b.dtype} in POST. {b.dtype} holds every "
                f"{a.dtype} number: --allow widening converts, exactly. {NOTHING}"
            )
        widened += 1
    return widened


def _loss(a: TensorInfo, b: TensorInfo) -> str:
    return (
        f"Turning {a.dtype} into {b.dtype} would change values, so the result would be neither "
        "PRE's nor POST's. Save both in one type, or give the PRE that was fine-tuned."
    )


def _explain(pre: Checkpoint, post: Checkpoint) -> str:
    a, b = text_config(pre.config), text_config(post.config)
    pairs = [
        f"{key} {escape(a.get(key), 30)} and {escape(b.get(key), 30)}"
        for key in _SIZES
        if a.get(key) != b.get(key)
    ]
    if pairs:
        return f"config.json of PRE and POST: {'; '.join(pairs)}."
    return "Their config.json name the same sizes, so one of them does not fit its weights."


def check_norms(
    before: Reading | None, reading: Reading, layers: Iterable[int], options: Options
) -> list[str]:
    """Raise MismatchError where only one of the two norms q and k; return notes if allowed."""
    if before is None:
        return []
    one, other = (
        {(r.layer, r.role) for r in found.rows if r.role in ("q_norm", "k_norm")}
        for found in (before, reading)
    )
    apart = sorted(x for x in one ^ other if x[0] in set(layers))
    if not apart:
        return []
    layer, role = apart[0]
    has, lacks = ("PRE", "POST") if apart[0] in one else ("POST", "PRE")
    text = f"layer {layer} has a norm of {role[0]} in {has} and none in {lacks}"
    if options.allows("geometry"):
        return [f"{text}: restored rows meet another function than they were made for."]
    raise MismatchError(
        f"{text}: the same rows would be another function there. Give the PRE that was "
        f"fine-tuned, or --allow geometry. {NOTHING}"
    )


def differences_told(pre: Checkpoint, post: Checkpoint) -> list[str]:
    """Return notes on differences that do not touch q and k, but that a user may not expect."""
    a, b = text_config(pre.config), text_config(post.config)
    told = []
    for key, what in (("vocab_size", "tokens were added or taken away"), ("model_type", "")):
        if key in a and key in b and a[key] != b[key]:
            why = f": {what}; q and k do not see it" if what else ": is PRE the right one?"
            told.append(
                f"{key} is {escape(a[key], 40)} in PRE and {escape(b[key], 40)} in POST{why}."
            )
    return told


def check_geometry(pre: Checkpoint, post: Checkpoint, options: Options) -> list[str]:
    """Raise MismatchError where heads are placed or scaled differently; return notes if allowed.

    Keys that only one of the configs has are left out: versions of transformers differ in what
    they write.
    """
    pairs: dict[str, tuple[Any, Any]] = {}
    for told in (_placing, _rope):
        one, other = told(text_config(pre.config)), told(text_config(post.config))
        shared = [key for key in one if key in other and one[key] != other[key]]
        pairs |= {key: (one[key], other[key]) for key in sorted(shared)}
    if not pairs:
        return []
    text = "; ".join(
        f"{escape(k, 60)} is {escape(x, 60)} in PRE and {escape(y, 60)} in POST"
        for k, (x, y) in pairs.items()
    )
    if options.allows("geometry"):
        return [f"{text}: restored q and k meet another geometry than the one they were made for."]
    raise MismatchError(
        f"{text}. Restored q and k would meet another geometry than the one they were made for. "
        f"Give the PRE that was fine-tuned, or --allow geometry. {NOTHING}"
    )


def _placing(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that place or scale scores, without those that say nothing."""
    found = {key: text[key] for key in _GEOMETRY if key in text}
    if text.get("use_sliding_window") is False:  # Qwen's configs name the window nonetheless
        found.pop("sliding_window", None)
    return {k: v for k, v in found.items() if v is not None or k not in _DERIVED}


def check_heads(
    before: Reading | None, reading: Reading, layers: Iterable[int], options: Options
) -> list[str]:
    """Raise MismatchError where heads of a layer have another shape; return notes if allowed."""
    if before is None:
        return []
    for layer in sorted(set(layers)):
        a, b = before.heads[layer], reading.heads[layer]
        if a == b or a is None or b is None:
            continue
        text = f"layer {layer} has {_shape(a)} in PRE and {_shape(b)} in POST"
        if options.allows("geometry"):
            return [f"{text}: restored rows meet another geometry than they were made for."]
        raise MismatchError(
            f"{text}, though the rows are as many. Give the PRE that was fine-tuned, or --allow "
            f"geometry. {NOTHING}"
        )
    return []


def _shape(heads: Heads) -> str:
    turned = "no rotary positions"
    if heads.rotary is not None:
        pairs = "neighbours" if heads.rotary.interleaved else "halves"
        turned = f"rotary positions on {heads.rotary.dim} of them ({pairs})"
    return (
        f"{heads.num_attention_heads} heads ({heads.num_key_value_heads} KV heads) of "
        f"{heads.head_dim} numbers, {turned}"
    )


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings by dotted name, today's spelling and the older one made the same."""
    found: dict[str, Any] = {}
    for name in _ROPES:
        value = text.get(name)
        for key, inner in value.items() if isinstance(value, Mapping) else ():
            if isinstance(inner, Mapping):
                found |= {f"{key}.{k}": v for k, v in inner.items()}
            else:
                found[str(key)] = inner
    nested = any("." in key for key in found)
    if not nested:
        kind = found.pop("type", None)
        found.setdefault("rope_type", kind or "default")
        if text.get("rope_theta") is not None:
            found.setdefault("rope_theta", text["rope_theta"])
    small = {k for k, v in found.items() if type(v) is int and abs(v) < 2**53}  # exact as floats
    return {k: float(v) if k in small else v for k, v in found.items()}


def check_schemes(pre: Checkpoint, post: Checkpoint, options: Options) -> None:
    """Raise MismatchError where only one is quantised, or each in another way, or numbers count."""
    if not (pre.quantised or post.quantised):
        return
    named = _quantised(pre, post)
    if options.method != "exact":
        raise MismatchError(f"{named}: --method {options.method} needs numbers. {_ADVICE}")
    if not (pre.quantised and post.quantised):
        raise MismatchError(f"{named}, and the other is not. {_ADVICE}")
    for key in ("quantization_config", "compression_config"):
        a, b = (text_config(c.config).get(key, c.config.get(key)) for c in (pre, post))
        if a != b:
            raise MismatchError(f"{named}; {key} differs in PRE and POST. {_ADVICE}")


def _quantised(pre: Checkpoint, post: Checkpoint) -> str:
    which, found = ("PRE", pre) if pre.quantised else ("POST", post)
    return f"{which} ({escape(found.path.name, 80)}) is quantised ({found.quantised})"


def check_packing(pre: Checkpoint, post: Checkpoint, places: list[Place]) -> list[str]:
    """Raise MismatchError unless whole quantised modules, packed alike in both, are exchanged."""
    if not post.quantised:
        return []
    taken = {p.part.tensor for p in places}
    modules: dict[str, list[str]] = {}
    for name in post.tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for place in places:
        inside = modules[place.part.tensor.rpartition(".")[0]]
        problem = _other_packing(pre, post, place, inside, taken)
        if problem:
            raise MismatchError(f"{_quantised(pre, post)}. {problem} {_ADVICE}")
    return ["Weights are quantised: whole modules are exchanged, scales included."]


def _other_packing(
    pre: Checkpoint, post: Checkpoint, place: Place, inside: list[str], taken: set[str]
) -> str:
    """Return why a module cannot be exchanged with all that is inside it, or an empty string."""
    if not place.part.whole:
        return f"Of '{escape(place.part.tensor, 120)}' only some rows would be restored."
    module, source = (n.rpartition(".")[0] for n in (place.part.tensor, place.source))
    for name in inside:
        shown, here = escape(name, 120), post.tensors[name]
        twin = pre.tensors.get(source + name[len(module) :])
        if name not in taken and not name.endswith(".bias"):
            return f"'{shown}' belongs to a module that is restored, but is not restored with it."
        if twin is None or (twin.dtype, twin.shape) != (here.dtype, here.shape):
            return f"'{shown}' is packed differently in PRE."
    return ""


def check_ties(post: Checkpoint, options: Options) -> list[str]:
    """Raise CheckpointError where POST's tied embeddings differ; return notes if allowed."""
    conflict = post.tie_conflict()
    if not conflict:
        return []
    if options.allows("ties"):
        return [f"{conflict} OUT is the same in this."]
    raise CheckpointError(f"POST ({escape(post.path.name, 80)}): {conflict} Or --allow ties.")
