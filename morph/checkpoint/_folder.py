"""What lies in a checkpoint folder: config, shards, index and side files, none of them trusted."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from morph import registry
from morph.checkpoint._format import (
    MAX_JSON,
    Header,
    TensorInfo,
    check_basename,
    load_json,
    open_regular,
    read_small,
)
from morph.errors import CheckpointError, escape

SINGLE, INDEX, MANIFEST = "model.safetensors", "model.safetensors.index.json", "MANIFEST.json"
ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# never copied: code, pickles, and weights in formats that morph does not check
NOT_COPIED = (
    *(".py", ".pyc", ".so", *PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".npz", ".npy"),
    *(".ot", ".onnx", ".onnx_data", ".tflite", ".index.json"),
)
# keys by which a config can choose code or files to load; the kernel ones name a Hub repository
HOSTILE = re.compile(
    r"auto_map|trust_remote_code|custom_pipelines?|custom_generate|model_file|transformers_weights"
    r"|_?(attn|experts)_implementation.*|(use|hub)_kernels?|kernel_config"
)
# the layers of the decoder, not those of a tower beside it
LAYER = re.compile(
    r"(?!(?:[a-z_]+\.)*[a-z_]*(?:vision|visual|audio|encoder|mtp))"
    r"(?:[a-z_]+\.){0,4}(?:layers|h|blocks)\.(\d+)\."
)
_QUANT_DTYPES = ("I8", "U8", "I32", "U32", "I16", "U16", "F4")
_QUANT_NAMES = re.compile(
    r".*\.(qweight|qzeros|g_idx|weight_scale|weight_scale_inv|weight_packed|absmax|quant_map"
    r"|SCB|weight\.(absmax|quant_map|quant_state\..*))|.*_proj_(blocks|scales)"
)


def clean_config(raw: Mapping[str, Any], dropped: list[str], where: str = "") -> dict[str, Any]:
    """Return a copy without the keys that choose code, at any depth; append them to `dropped`."""

    def clean(value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return clean_config(value, dropped, place)
        if isinstance(value, list):
            return [clean(v, f"{place}[{i}]") for i, v in enumerate(value)]
        return value

    kept = {}
    for key, value in raw.items():
        place = f"{where}.{key}" if where else str(key)
        if HOSTILE.fullmatch(str(key)):
            dropped.append(place)
        else:
            kept[key] = clean(value, place)
    return kept


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the decoder."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "num_hidden_layers" not in config else config


def disagreements(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], absent: Iterable[str] = ()
) -> list[str]:
    """Return sentences that say where config.json contradicts itself or the tensors.

    `absent` are names of tensors in files that are not here.
    """
    text, found = text_config(config), []
    sizes = {}
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = text.get(key)
        if type(value) is int and 0 < value < 2**31:
            sizes[key] = value
        else:
            found.append(f"config.json: {key} is {escape(value, 40)}, not a size.")
    heads = sizes.get("num_attention_heads", 1)
    groups = text.get("num_key_value_heads")
    groups = heads if groups is None else groups
    if type(groups) is not int or groups < 1 or heads % groups:
        found.append(
            f"config.json: num_key_value_heads is {escape(groups, 40)}, which does not divide "
            f"num_attention_heads {heads}."
        )
    if found:
        return found
    layers = sizes["num_hidden_layers"]
    names = [*tensors, *absent]
    stored = {int(m[1]) for m in map(LAYER.match, names) if m and len(m[1]) < 10}
    extra = text.get("num_nextn_predict_layers")
    extra = extra if type(extra) is int and 0 < extra < 100 else 0
    if stored and (max(stored) + 1 > layers + extra or len(stored) < layers):
        found.append(
            f"config.json: num_hidden_layers is {layers}, the weights hold {len(stored)} layers "
            f"(0-{max(stored)})."
        )
    if not stored:
        found.append("The weights hold no decoder layers (no tensor named *.layers.0.*).")
    types = text.get("layer_types")
    if isinstance(types, list) and len(types) != layers:
        found.append(f"config.json: layer_types has {len(types)} entries for {layers} layers.")
    if known_family(str(config.get("model_type"))) is not None:
        found += _row_disagreements(text, heads, groups, sizes["hidden_size"], tensors)
    return found


def known_family(model_type: str) -> str | None:
    """Return the stem of the family file that serves a model type or its morph hybrid."""
    stem = model_type.removeprefix("morph_").replace("-", "_")
    return stem if stem in registry.names("families") else None


def _row_disagreements(
    text: Mapping[str, Any],
    heads: int,
    groups: int,
    hidden: int,
    tensors: Mapping[str, TensorInfo],
) -> list[str]:
    """Compare q, k and v rows with the head sizes; other architectures may mean other things."""
    head_dim = text.get("head_dim") or hidden // heads
    if type(head_dim) is not int or head_dim < 1:
        return [f"config.json: head_dim is {escape(head_dim, 40)}, not a size."]
    expect = {"q": heads * head_dim, "k": groups * head_dim, "v": groups * head_dim}
    for name, info in tensors.items():
        match = re.search(r"\.self_attn\.([qkv])_proj\.weight$", name)
        if not match or len(info.shape) != 2 or not LAYER.match(name):
            continue
        rows, want = info.shape[0], expect[match[1]]
        if rows != want:
            return [
                f"{escape(name)} has {rows} rows; config.json says {want} "
                f"({want // head_dim} heads of head_dim {head_dim})."
            ]
    return []


def find_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that a path names, links followed; raise CheckpointError for no folder."""
    given = Path(path).expanduser()
    try:
        mode = given.stat().st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{escape(given)} does not exist. Looked for a local folder with config.json and "
            f"{SINGLE}; a Hub id must be downloaded first (`hf download`)."
        ) from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{escape(given)} is a file; give the folder that holds config.json.")
    if not os.access(given, os.R_OK | os.X_OK):
        raise CheckpointError(f"{escape(given)} cannot be read: permission is missing.")
    return given.resolve()


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json as it is stored; raise CheckpointError where it is no model's."""
    if not os.path.lexists(folder / "config.json"):
        names = sorted(p.name for p in folder.iterdir())
        if "adapter_config.json" in names:
            hint = "It is a LoRA adapter: merge it into its base model first."
        else:
            shown = ", ".join(escape(n, 40) for n in names[:5])
            hint = (
                f"It holds {shown}{', …' if len(names) > 5 else ''}." if names else "It is empty."
            )
        raise CheckpointError(f"{escape(folder)} is no checkpoint: config.json is missing. {hint}")
    where = escape(folder / "config.json")
    config = load_json(read_small(folder, "config.json", MAX_JSON["config"]), where)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} must be a JSON object, not {type(config).__name__}.")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CheckpointError(f"{where} has no model_type: is it a transformers model?")
    return config


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Names of the weight files of a folder, and what the index, if one is used, says of them."""

    names: tuple[str, ...]
    index: str = ""
    weight_map: Mapping[str, str] | None = None
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    total_size: Any = None


def find_shards(folder: Path, *, partial: bool = False, adapters: bool = False) -> Shards:
    """Return the weight files of a folder; `partial` allows that some are not here."""
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single):
        notes: tuple[str, ...] = ()
        if os.path.lexists(index):
            notes = (
                f"Both {SINGLE} and {INDEX} exist: the single file is used, as by transformers.",
            )
        return Shards(names=(SINGLE,), notes=notes)
    if not os.path.lexists(index):
        if adapters and os.path.lexists(folder / ADAPTER):
            return Shards(names=(ADAPTER,))
        _no_weights(folder)
    where = escape(index)
    data = load_json(read_small(folder, INDEX, MAX_JSON["index"]), where)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map must map tensor names to files.")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{where}: '{escape(key, 80)}' maps to {escape(name, 40)}, not a file."
            )
    shards = tuple(sorted(set(weight_map.values())))
    for name in shards:
        check_basename(name, where)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: '{escape(name)}' is no .safetensors file.")
    # a download that was stopped leaves links to blobs that never came
    here = (lambda n: (folder / n).exists()) if partial else (lambda n: os.path.lexists(folder / n))
    missing = tuple(n for n in shards if not here(n))
    if missing and (not partial or len(missing) == len(shards)):
        raise CheckpointError(
            f"{escape(folder)}: {len(missing)} of {len(shards)} shards are missing, such as "
            f"{escape(missing[0])}. Is the download complete?"
        )
    names = tuple(n for n in shards if n not in missing)
    metadata = data.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Shards(names=names, index=INDEX, weight_map=weight_map, absent=missing, total_size=total)


def _no_weights(folder: Path) -> NoReturn:
    names = sorted(p.name for p in folder.iterdir())
    pickles = [n for n in names if n.endswith(PICKLES)]
    if ADAPTER in names:
        raise CheckpointError(f"{escape(folder)} is a LoRA adapter: merge it into its base first.")
    if pickles:
        raise CheckpointError(
            f"{escape(folder)} has only pickle weights ({escape(pickles[0], 60)}), which can run "
            f"code and are not opened. Convert them first: `morph convert-pickle {escape(folder)} "
            "OUT`."
        )
    raise CheckpointError(f"{escape(folder)} has no weights: neither {SINGLE} nor {INDEX}.")


def collect_tensors(
    folder: Path, headers: Mapping[str, Header], found: Shards
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors of all headers, compared with the index, and name -> absent shard."""
    tensors: dict[str, TensorInfo] = {}
    absent: dict[str, str] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{escape(folder)}: tensor '{escape(name, 80)}' is in two files, "
                    f"{escape(tensors[name].file.name)} and {escape(shard)}."
                )
            tensors[name] = info
    if found.weight_map is not None:
        for name, shard in found.weight_map.items():
            if shard in found.absent and name not in tensors:
                absent[name] = shard
            elif name not in tensors or tensors[name].file.name != shard:
                raise CheckpointError(
                    f"{escape(folder / INDEX)} puts tensor '{escape(name, 80)}' into "
                    f"{escape(shard)}, which does not hold it."
                )
        for name, info in tensors.items():
            if name not in found.weight_map:
                raise CheckpointError(
                    f"{escape(info.file)} holds tensor '{escape(name, 80)}', which {INDEX} does "
                    "not list."
                )
    if not tensors:
        raise CheckpointError(f"{escape(folder)}: the weights hold no tensors.")
    return dict(sorted(tensors.items())), dict(sorted(absent.items()))


def quantisation(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Return what shows that weights are quantised, or an empty string."""
    for place in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                return f"config.json: {key}"
    for name, info in tensors.items():
        narrow = info.dtype.startswith(("F8", "F6_")) or info.dtype in _QUANT_DTYPES
        weight = name.endswith("weight") and len(info.shape) >= 2
        if _QUANT_NAMES.fullmatch(name) or (narrow and weight):
            return f"{escape(name, 80)} is {info.dtype}"
    return ""


def side_files(folder: Path, shards: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names of (files that a copy takes along, files it never does), without hidden ones."""
    other, ignored = [], []
    pending = [folder]
    while pending:
        here = pending.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda e: e.name)
        except OSError as error:
            raise CheckpointError(f"{escape(here)} cannot be read: {error.strerror}.") from error
        for entry in entries:
            name = Path(entry.path).relative_to(folder).as_posix()
            if entry.name.startswith(".") or name in shards or name in ("config.json", INDEX):
                continue
            if entry.is_dir(follow_symlinks=False):
                if name.count("/") < 3:
                    pending.append(Path(entry.path))
                else:
                    ignored.append(name)
            elif entry.name.lower().endswith(NOT_COPIED) or not entry.name.isprintable():
                ignored.append(name)
            elif entry.is_symlink() or not entry.is_file():
                try:
                    os.close(open_regular(folder, name))
                except CheckpointError:
                    if entry.is_symlink() and not entry.is_dir():
                        raise
                    ignored.append(name)
                else:
                    other.append(name)
            else:
                other.append(name)
    return tuple(sorted(other)), tuple(sorted(ignored))
