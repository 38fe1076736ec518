"""What every kind of file is read by in the fuzzer, and what must be true of what was accepted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import _mutate
import _seeds

from morph import checkpoint, exchange, layouts, plan, restore
from morph.errors import MorphError
from morph.pipeline import _diff, _select, _verify_files
from morph.recipes import schema

MIB = 1 << 20
BOMBS = 1 / 1000  # of the cases hold one value that is as large as the reader's limit allows
HOSTILE = {"auto_map", "trust_remote_code", "custom_pipelines", "model_file", "hub_kernel"}
HOSTILE |= {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}


class Broken(Exception):
    """A promise that a case shows to be broken."""


class StricterError(Exception):
    """A refusal of ours, the cause of this, where safetensors accepts."""


@dataclass(frozen=True)
class Target:
    """One kind of file: where it goes, how it is mutated, read and judged, and what may come out.

    `read` returns a word on what happened, and raises what the reader raises or Broken. `command`
    is the one of the command line that reads such a file.
    """

    file: str
    share: int
    codes: tuple[int, ...]
    make: Callable[[Random], bytes]
    read: Callable[[Path], str]
    command: str = ""


def require(true: object, what: str) -> None:
    """Raise Broken unless `true`."""
    if not true:
        raise Broken(what)


def theirs(file: Path) -> dict[str, tuple[str, tuple[int, ...]]] | str:
    """Return what safetensors sees in a file, or why it refuses it."""
    from safetensors import SafetensorError, safe_open

    if file.stat().st_size > 4 * MIB:
        return "not asked, for it takes many times the size of a header"
    try:
        with safe_open(file, framework="np") as found:
            slices = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        return str(error)


def read_shard(file: Path) -> str:
    """Open a folder of one shard, and compare with what safetensors sees in it."""
    try:
        found = checkpoint.Weights.open(file.parent)
    except MorphError as error:
        if not isinstance(theirs(file), str):
            raise StricterError from error
        raise
    ours = {n: (i.dtype, i.shape) for n, i in found.tensors.items()}
    other = theirs(file)
    if file.stat().st_size > 4 * MIB:
        return "accepted, not compared"
    require(ours == other, f"safetensors sees something else: {str(other)[:300]}")
    read_numbers(file, found)
    with contextlib.suppress(MorphError):  # a config that does not fit it is no matter here
        json.dumps(checkpoint.inspect(file.parent, health=True))
    return "accepted"


def read_numbers(file: Path, found: checkpoint.Weights) -> None:
    """Compare the bytes of every tensor that numpy can hold with those that safetensors returns."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as other:
        for name, info in found.tensors.items():
            if info.dtype in ("F64", "F32", "F16", "I64", "I32", "U8", "BOOL"):
                same = other.get_tensor(name).tobytes() == found.read_bytes(name)
                require(same, f"tensor {name!r} has other bytes for safetensors")


def read_index(file: Path) -> str:
    """Open a folder by its index: nothing outside may be read."""
    folder = file.parent
    found = checkpoint.Weights.open(folder)
    require(set(found.shards) <= set(os.listdir(folder)), "a shard has no plain name")
    for name in found.shards:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        require(inside, f"shard {name!r} leaves the folder")
    weight_map = json.loads(file.read_bytes())["weight_map"]
    listed = {n: i.file.name for n, i in found.tensors.items()}
    require(listed == weight_map, "the index says something else than what was opened")
    with contextlib.suppress(MorphError):
        checkpoint.inspect(folder)
    checkpoint.Weights.open(folder, partial=True)
    return "accepted"


def read_config(file: Path) -> str:
    """Open a folder by its config: no key that chooses code is left, every row is accounted for."""
    json.dumps(checkpoint.inspect(file.parent))
    found = checkpoint.Checkpoint.open(file.parent)
    left = HOSTILE & set(keys(found.config))
    require(not left, f"config keys that choose code are kept: {left}")
    shapes = {n: i.shape for n, i in found.tensors.items()}
    try:
        reading = layouts.read(found.config, shapes)
    except MorphError as error:  # it is given no file that it could name
        raise type(error)(f"{file}: {error}") from error
    covered = Counter(
        (r.tensor, row)
        for r in reading.rows
        for a, b in r.ranges or ((0, (shapes[r.tensor] or (1,))[0]),)
        for row in range(a, b)
    )
    wanted = {(n, row): 1 for n, s in shapes.items() for row in range((s or (1,))[0])}
    require(covered == wanted, "a row is read never or twice")
    return "accepted"


def keys(value: Any) -> Iterator[str]:
    """Yield every key at any depth."""
    pending = [value]
    while pending:
        here = pending.pop()
        if isinstance(here, dict):
            yield from map(str, here)
            pending += here.values()
        elif isinstance(here, (list, tuple)):
            pending += here


def read_manifest(file: Path) -> str:
    """Verify a folder: what is accepted is what the manifest says, and lies inside."""
    folder = file.parent
    checkpoint.verify(folder)
    files = json.loads(file.read_bytes())["files"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    require(set(files) == there - {file.name}, "the manifest lists other files than there are")
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        require(told == entry, f"{name!r} is not what the manifest says")
    return "accepted"


def read_recipe(file: Path) -> str:
    """Load a recipe, write it, and load that."""
    found = schema.load(file)
    require(schema.load_text(schema.dumps(found)) == found, "the canonical text is another recipe")
    return "accepted"


def read_plan(file: Path) -> str:
    """Load a plan, write it, and load that."""
    found = _select.read_plan(file)
    require(plan.loads_plan(plan.dumps(found)) == found, "written and read it is another plan")
    return "accepted"


def read_scores(file: Path) -> str:
    """Read a file of scores of any format, write it as ours, and read that."""
    found = exchange.read(file, _seeds.GEOMETRY, "llama")
    require(
        plan.loads_scores(plan.dumps(found)) == found, "written and read these are other scores"
    )
    return f"accepted as {found.selector if found.selector in exchange.FORMATS else 'ours'}"


def read_donor(file: Path) -> str:
    """Plan a restore from a folder whose config is mutated: nothing but q and k may be touched."""
    pre, post = file.parent, file.parent.with_name("tuned")
    for a, b in ((pre, post), (post, pre)) if file.stat().st_size < MIB // 8 else ():
        with contextlib.suppress(MorphError):
            json.dumps(_diff.diff_command(str(a), str(b)))
    found = restore.plan(pre, post)
    touched = {s.shard: 0 for s in found.splices()}
    infos = checkpoint.Weights.open(post).tensors
    for splice in found.splices():
        inside = [n for n, i in infos.items() if i.start <= splice.start and splice.stop <= i.stop]
        require(len(inside) == 1, f"a splice at {splice.start} lies in no tensor")
        require(".q_proj." in inside[0] or ".k_proj." in inside[0], f"{inside[0]} is spliced")
        touched[splice.shard] += splice.nbytes
    require(sum(touched.values()) == found.nbytes, "the plan tells another number of bytes")
    json.dumps(found.summary())
    return "accepted"


def read_record(file: Path) -> str:
    """Verify a restored folder and restore it again, with a morph.json that is mutated."""
    folder = file.parent
    with contextlib.suppress(MorphError):
        if file.stat().st_size < MIB // 8:
            json.dumps(restore.plan(folder.with_name("tuned"), folder).summary())
    (folder / "MANIFEST.json").write_bytes(_seeds.manifest(folder, "MANIFEST.json"))
    json.dumps(_verify_files.verify_command(folder))
    record = json.loads(file.read_bytes())
    require(isinstance(record, dict), "a record that is no object is accepted")
    return "accepted"


def read_adapter(file: Path) -> str:
    """Plan a restore of an adapter whose config is mutated: nothing but q and k may be touched."""
    found = restore.plan(file.parent.with_name("tuned"), file.parent)
    require(all(re.search(r"\.[qk]_proj\.lora_B", n) for n in found.tensors), "more than q and k")
    json.dumps(found.summary())
    return "accepted"


def targets(root: Path) -> dict[str, Target]:
    """Prepare a folder for every kind of file; return how each is made and read."""
    for name in ("shard", "config", "manifest"):
        _seeds.write_model(root / name)
    _seeds.trap(_seeds.write_model(root / "index", sharded=True))
    (root / "text").mkdir()
    _seeds.write_model(root / "donor")
    _seeds.write_model(root / "tuned", tuned=True)
    _seeds.write_adapter(root / "adapter")
    restore.write(restore.plan(root / "donor", root / "tuned"), root / "record", durable=False)
    records = [(root / "record" / "morph.json").read_bytes()]
    sizes = {**{"F32": 32, "BF16": 16, "U8": 8, "F64": 64, "F4": 4, "F8_E4M3": 8, "I64": 64}}
    shards, indexes = _seeds.shards(), _seeds.indexes()
    manifest = [_seeds.manifest(root / "manifest", "MANIFEST.json")]

    def texts(seeds: list[bytes], limit: int) -> Callable[[Random], bytes]:
        return lambda rng: _mutate.mutate_text(rng, seeds, limit, BOMBS)

    def trees(seeds: list[bytes], limit: int) -> Callable[[Random], bytes]:
        return lambda rng: _mutate.mutate_json(rng, seeds, limit, BOMBS)

    def shard(rng: Random) -> bytes:
        return _mutate.mutate_shard(rng, shards, sizes, 16 * MIB, BOMBS)

    scores = _seeds.scores()
    either = (trees(scores[:3], 4 * MIB), texts(scores, 4 * MIB))
    return {
        "shard": Target("shard/model.safetensors", 8, (3,), shard, read_shard, "inspect"),
        "index": Target(
            f"index/{_seeds.INDEX}", 4, (3,), trees(indexes, 64 * MIB), read_index, "inspect"
        ),
        "config": Target(
            "config/config.json", 5, (3,), trees(_seeds.configs(), 8 * MIB), read_config, "inspect"
        ),
        "donor": Target(
            "donor/config.json", 2, (3, 4), trees(_seeds.configs(), 8 * MIB), read_donor
        ),
        "record": Target("record/morph.json", 2, (3, 4, 6), trees(records, 64 * MIB), read_record),
        "adapter": Target(
            "adapter/adapter_config.json", 1, (3,), trees(_seeds.adapters(), 8 * MIB), read_adapter
        ),
        "manifest": Target(
            "manifest/MANIFEST.json", 3, (3, 6), trees(manifest, 64 * MIB), read_manifest, "verify"
        ),
        "recipe": Target(
            "text/recipe.yaml", 5, (2,), texts(_seeds.recipes(), MIB), read_recipe, "check"
        ),
        "plan": Target("text/plan.json", 3, (2, 3), trees(_seeds.plans(), 4 * MIB), read_plan),
        "scores": Target(
            "text/scores.json", 3, (2,), lambda rng: rng.choice(either)(rng), read_scores
        ),
    }
