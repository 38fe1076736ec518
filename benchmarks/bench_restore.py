"""`morph restore` beside `cp -r`, transformers and mergekit, on the same folders in one run.

    python benchmarks/bench_restore.py [--gigabytes 2] [--shards 6] [--repeats 5] [--folder DIR]
        [--mergekit PATH] [--sparse 20] [--json out.json]

PRE and POST have Qwen3's shapes in bfloat16, one layer of four full; POST is PRE with the low bits
of every number changed. Timed in turns, each in a process of its own: `cp -r`, `cp -r` and `sync`,
the restore without hashes and fsync, without hashes, and as it is; sha256 of POST alone; with
transformers: load both, copy q and k, save; with `--mergekit` (its `mergekit-yaml`, installed
elsewhere) the same replacement. Gate first: every tensor of every result must be the right one,
byte for byte, or no speed is printed. Then the plan of a 70B layout (headers and holes), and with
`--sparse` a restore of that many GB, for the peak memory. A run is refused where `cp` itself varied
by more than 30 % of CPU. CPU is user and system; the peak is VmHWM, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from morph.checkpoint import Checkpoint

HIDDEN, HEADS, GROUPS, HEAD_DIM, WIDE, VOCAB = 2048, 16, 8, 128, 6144, 32000
STEP = 1 << 22

CHILD = """
import json, sys
{body}
status = open("/proc/self/status").read()
print(json.dumps({{"peak_rss": int(status.split("VmHWM:")[1].split()[0]) * 1024,
                  "torch": "torch" in sys.modules}}))
"""
COMMAND = """
from morph import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as done:
    assert not done.code, done.code
"""
QUICK = """
from morph import restore
made = restore.plan(sys.argv[1], sys.argv[2], restore.Options())
restore.write(made, sys.argv[3], hashing=False, durable=False)
"""
TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
pre, post = (AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in sys.argv[1:3])
for kind, one, two in zip(pre.config.layer_types, pre.model.layers, post.model.layers):
    if kind == "full_attention":
        for name in ("q_proj", "k_proj"):
            getattr(two.self_attn, name).weight.data.copy_(getattr(one.self_attn, name).weight)
post.save_pretrained(sys.argv[3], max_shard_size=int(sys.argv[4]))
"""
HASH = """
import hashlib, pathlib
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    hashlib.file_digest(open(path, "rb"), "sha256")
"""


def config(layers: int, hidden: int = HIDDEN, heads: int = HEADS, wide: int = WIDE) -> dict:
    """Return the config.json of a Qwen3 in which every fourth layer is full."""
    types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "layer_types": types,
        "use_sliding_window": True,
        "sliding_window": 512,
        "max_window_layers": 0,
        "dtype": "bfloat16",
    }


def shapes(told: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that such a config has."""
    hidden, wide = told["hidden_size"], told["intermediate_size"]
    q, kv = told["num_attention_heads"] * HEAD_DIM, GROUPS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for i in range(told["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "self_attn.q_norm": (HEAD_DIM,),
            "self_attn.k_norm": (HEAD_DIM,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB, hidden)}


def size(shape: tuple[int, ...]) -> int:
    """Return the bytes of a bfloat16 tensor."""
    return int(np.prod(shape)) * 2


def layers_for(gigabytes: float) -> int:
    """Return how many layers make a model of about this size."""
    one, two = (sum(size(s) for s in shapes(config(n)).values()) for n in (1, 2))
    return max(4, round((gigabytes * 1e9 - one) / (two - one)) + 1)


def make(folder: Path, told: dict[str, Any], shards: int, fill: str) -> None:
    """Write a folder: `pre` random numbers, `post` the same with other low bits, `holes` zeros.

    With holes only q and k of the full layers are written, so that the disk holds little else.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(told))
    table = shapes(told)
    total, parts = sum(map(size, table.values())), [{}]
    for name, shape in table.items():
        if sum(map(size, parts[-1].values())) >= total / shards and len(parts) < shards:
            parts.append({})
        parts[-1][name] = shape
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        write_shard(folder / file, part, told["layer_types"], number, fill)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(
    path: Path, part: dict[str, tuple[int, ...]], types: list[str], seed: int, fill: str
) -> None:
    """Write header and data of one shard."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in part.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size(shape)]}
        at += size(shape)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(seed)
    with open(path, "wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in part.items():
            layer = name.split(".")[2] if ".layers." in name else ""
            kept = layer and types[int(layer)] == "full_attention"
            if fill == "holes" and not (kept and (".q_proj." in name or ".k_proj." in name)):
                out.seek(size(shape), os.SEEK_CUR)
                continue
            for left in range(size(shape), 0, -STEP):
                numbers = rng.normal(0, 0.02, min(left, STEP) // 2).astype("<f4").view("<u4") >> 16
                out.write((numbers ^ (fill == "post")).astype("<u2").tobytes())
        out.truncate(8 + len(raw) + at)


def run(command: list[str], **extra: str) -> dict[str, Any]:
    """Run a process; return wall seconds, CPU seconds, and what it prints as JSON, if it does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **extra}
    used, start = os.times(), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, now = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    last = (done.stdout.strip().splitlines() or ["{}"])[-1]
    told = json.loads(last) if last.startswith("{") else {}
    return {
        "wall": wall,
        "cpu": now.children_user + now.children_system - used.children_user - used.children_system,
        **told,
    }


def python(body: str, *arguments: object) -> dict[str, Any]:
    """Run one of the programs above in a fresh interpreter."""
    return run([sys.executable, "-c", CHILD.format(body=body), *map(str, arguments)])


def merge_recipe(root: Path, types: list[str]) -> Path:
    """Write mergekit's recipe: a linear merge whose weights are 0 or 1, by part of the name."""
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    names = [f".layers.{i}.self_attn.{p}_proj" for i in full for p in "qk"]

    def weights(inside: int) -> str:
        rows = [f"        - {{filter: '{n}', value: {inside}}}" for n in names]
        return "\n".join([*rows, f"        - {{value: {1 - inside}}}"])

    text = "models:\n"
    for name, inside in (("pre", 1), ("post", 0)):
        text += f"  - model: {root / name}\n    parameters:\n      weight:\n{weights(inside)}\n"
    path = root / "merge.yaml"
    path.write_text(text + "merge_method: linear\ndtype: bfloat16\n")
    return path


def jobs(root: Path, types: list[str], shards: int, mergekit: str | None) -> dict[str, Callable]:
    """Return what is timed, by name; each writes `out`."""
    pre, post, out = (str(root / name) for name in ("pre", "post", "out"))
    largest = max(p.stat().st_size for p in Path(post).iterdir())

    def synced() -> dict[str, Any]:
        script = f"cp -r {post} {out} && sync {out}/* {out}"
        return run(["sh", "-c", script])

    found: dict[str, Callable[[], dict[str, Any]]] = {
        "cp": lambda: run(["cp", "-r", post, out]),
        "cp_sync": synced,
        "restore_bare": lambda: python(QUICK, pre, post, out),
        "restore_no_hash": lambda: python(COMMAND, "restore", pre, post, out, "--no-hash"),
        "restore": lambda: python(COMMAND, "restore", pre, post, out),
        "sha256": lambda: python(HASH, post),
    }
    if mergekit != "none":
        found["transformers"] = lambda: python(TRANSFORMERS, pre, post, out, largest + 1)
    if mergekit and mergekit != "none":
        recipe = str(merge_recipe(root, types))
        found["mergekit"] = lambda: run([mergekit, recipe, out, "--lazy-unpickle"])
    return found


def wrong(root: Path, types: list[str]) -> Iterator[str]:
    """Yield the tensors of `out` that are not what they must be, bytes compared."""
    pre, post, out = (Checkpoint.open(root / name) for name in ("pre", "post", "out"))
    for name in post.tensors:
        layer = int(name.split(".")[2]) if ".layers." in name else None
        kept = layer is not None and types[layer] == "full_attention"
        source = pre if kept and (".q_proj." in name or ".k_proj." in name) else post
        if name not in out.tensors or out.sha256(name) != source.sha256(name):
            yield name


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time everything in turns and return medians, after a round that warms up and is checked."""
    told = config(layers_for(args.gigabytes))
    for name in ("pre", "post"):
        make(root / name, told, args.shards, name)
    todo = jobs(root, told["layer_types"], args.shards, args.mergekit)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in todo}
    for number in range(args.repeats + 1):
        for name, job in todo.items():
            if number > 2 and name in ("transformers", "mergekit"):
                continue  # an order of magnitude apart: two rounds say it
            os.sync()
            row = job()
            if number == 0 and name.startswith(("restore", "transformers", "mergekit")):
                bad = list(wrong(root, told["layer_types"]))
                if bad:
                    raise SystemExit(f"{name}: {bad[:3]} are wrong; no speed is printed.")
            shutil.rmtree(root / "out", ignore_errors=True)
            if number:
                rows[name].append(row)
                print(name, {k: v for k, v in row.items() if k != "torch"}, file=sys.stderr)
    used = [r["cpu"] for r in rows["cp"]]
    found = {
        name: {
            "cpu": statistics.median(r["cpu"] for r in them),
            "wall": statistics.median(r["wall"] for r in them),
            "peak_rss_mib": max(r.get("peak_rss", 0) for r in them) / 2**20,
        }
        for name, them in rows.items()
    }
    nbytes = sum(p.stat().st_size for p in (root / "post").iterdir())
    spread = max(used) / min(used)
    assert not any(r.get("torch") for n, them in rows.items() if n != "transformers" for r in them)
    return {"bytes": nbytes, "cp_cpu_spread": spread, "layers": len(told["layer_types"]), **found}


def plan_70b(root: Path) -> dict[str, Any]:
    """Return the cost of planning a 70B layout of 80 layers in 30 shards: headers and holes."""
    told = config(80, hidden=8192, heads=64, wide=28672)
    names = ("big-pre", "big-post")
    for name in names:
        folder = root / name
        make(folder, {**told, "layer_types": ["sliding_attention"] * 80}, 30, "holes")
        (folder / "config.json").write_text(json.dumps(told))
    apparent = sum(p.stat().st_size for p in (root / names[1]).iterdir())
    command = ["restore", *(str(root / n) for n in names), str(root / "out"), "--dry-run"]
    command += ["--allow", "nonfinite,unchanged,unrelated", "--json"]
    row = min((run([sys.executable, "-m", "morph", *command]) for _ in range(3)), key=_wall)
    for name in names:
        shutil.rmtree(root / name)
    return {"bytes": apparent, "wall": row["wall"], "cpu": row["cpu"]}


def _wall(row: dict[str, Any]) -> float:
    return float(row["wall"])


def sparse(root: Path, gigabytes: float) -> dict[str, Any]:
    """Return the peak memory of restoring a folder of holes of this size."""
    told = config(layers_for(gigabytes))
    for name in ("hole-pre", "hole-post"):
        make(root / name, told, 6, "holes")
    command = ["restore", root / "hole-pre", root / "hole-post", root / "out", "--no-hash"]
    row = python(COMMAND, *command, "--allow", "unchanged")
    nbytes = sum(p.stat().st_size for p in (root / "out").iterdir())
    for name in ("hole-pre", "hole-post", "out"):
        shutil.rmtree(root / name)
    return {"bytes": nbytes, "wall": row["wall"], "cpu": row["cpu"],
            "peak_rss_mib": row["peak_rss"] / 2**20}  # fmt: skip


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the table and the goals."""
    yield f"{found['bytes'] / 1e9:.2f} GB, {found['layers']} layers; medians"
    for name, row in found.items():
        if isinstance(row, dict) and "peak_rss_mib" in row and "bytes" not in row:
            peak = f"{row['peak_rss_mib']:7.0f} MiB" if row["peak_rss_mib"] else ""
            yield f"  {name:16} {row['cpu']:7.2f} CPU-s {row['wall']:7.2f} s {peak}"
    cp, bare, full = found["cp"], found["restore_bare"], found["restore"]
    slower = max(found["restore_no_hash"]["wall"], found["sha256"]["wall"])
    yield f"CPU: {bare['cpu']:.2f} s; goal {1.3 * cp['cpu'] + 0.3:.2f} (1.3 cp + 0.3 s)"
    yield f"wall: {bare['wall']:.2f} s; goal {1.5 * cp['wall'] + 0.5:.2f} (1.5 cp + 0.5 s)"
    ratio = found["restore_no_hash"]["wall"] / found["cp_sync"]["wall"]
    yield f"with fsync: {ratio:.2f} of cp + sync; goal 1.25"
    yield f"with hashes: {full['wall'] / slower:.2f} of the slower of copy and hash; goal 1.1"
    for rival in ("transformers", "mergekit"):
        if rival in found:
            yield f"{rival}: {found[rival]['cpu'] / full['cpu']:.1f}x the CPU with hashes, " \
                f"{found[rival]['cpu'] / found['restore_no_hash']['cpu']:.1f}x without"  # fmt: skip
    for name in ("plan_70b", "sparse"):
        if name in found:
            row = found[name]
            peak = f", peak {row['peak_rss_mib']:.0f} MiB" if "peak_rss_mib" in row else ""
            spent = f"{row['wall']:.2f} s, {row['cpu']:.2f} CPU-s"
            yield f"{name}: {row['bytes'] / 1e9:.0f} GB, {spent}{peak}"


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    parser.add_argument("--mergekit", help="mergekit-yaml elsewhere; none: no rivals")
    parser.add_argument("--sparse", type=float, help="GB of a folder of holes, for the peak")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-restore-", dir=args.folder) as folder:
        root = Path(folder)
        found = measure(root, args)
        found["plan_70b"] = plan_70b(root)
        if args.sparse:
            found["sparse"] = sparse(root, args.sparse)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if found["cp_cpu_spread"] > 1.3:
        print(f"note: cp itself varied by {found['cp_cpu_spread']:.2f}x; run it again, alone")
    print("\n".join(lines(found)))


if __name__ == "__main__":
    main()
