"""Write a checkpoint by splicing bytes, beside `cp -r` of the same folder.

    python benchmarks/bench_write.py [--gigabytes 2] [--shards 2] [--repeats 3] [--folder DIR]

Makes random weights of Qwen3's shapes in a temporary folder, warms the page cache, and times, in
turn: `cp -r`, the write with fsync, the write without, and `cp -r` followed by `sync` of the copy.
Gate first: every tensor must be byte-equal and the manifest must hold, or no speed is printed.
Peak memory is the whole child process's, imports included. Prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from morph.checkpoint import Checkpoint, kept_equal, verify, write_checkpoint

HIDDEN, HEADS, GROUPS, HEAD_DIM, WIDE, VOCAB = 1024, 16, 8, 128, 3072, 65536


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Qwen3 of this many layers, embeddings tied."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        found |= {
            f"{attention}.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{attention}.k_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
            f"{attention}.v_proj.weight": (GROUPS * HEAD_DIM, HIDDEN),
            f"{attention}.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{attention}.q_norm.weight": (HEAD_DIM,),
            f"{attention}.k_norm.weight": (HEAD_DIM,),
            f"{mlp}.gate_proj.weight": (WIDE, HIDDEN),
            f"{mlp}.up_proj.weight": (WIDE, HIDDEN),
            f"{mlp}.down_proj.weight": (HIDDEN, WIDE),
            f"model.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,)}


def make(folder: Path, gigabytes: float, shards: int) -> None:
    """Write random bfloat16 weights (finite: the exponent's top bit is cleared) in small chunks."""
    per_layer = sum(int(np.prod(s)) for n, s in shapes(1).items() if ".layers." in n) * 2
    layers = max(shards, round((gigabytes * 1e9 - VOCAB * HIDDEN * 2) / per_layer))
    table = shapes(layers)
    folder.mkdir()
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    total = sum(int(np.prod(s)) * 2 for s in table.values())
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in table.items():
        held = sum(int(np.prod(s)) * 2 for s in parts[-1].values())
        if held >= total / shards and len(parts) < shards:
            parts.append({})
        parts[-1][name] = shape
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        header, at = {}, 0
        for name, shape in part.items():
            size = int(np.prod(shape)) * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for left in range(at, 0, -(1 << 22)):
                block = rng.integers(0, 2**16, min(left, 1 << 22) // 2, dtype=np.uint16)
                out.write((block & 0xBFFF).tobytes())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_rss() -> int:
    """Return the peak resident bytes of this process (ru_maxrss would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def sha256_seconds(folder: Path) -> float:
    """Return the CPU seconds that hashing the folder takes: part of every write, not of `cp`."""
    start = time.process_time()
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, "sha256")
    return time.process_time() - start


def child(source: str, out: str, durable: bool) -> None:
    """Write once, and print seconds and peak memory of this process."""
    before = peak_rss()
    start = time.perf_counter()
    opened = Checkpoint.open(source)
    write_checkpoint(out, source=opened, config=opened.config, durable=durable)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_rss": peak_rss(),
                "peak_rss_at_start": before,
            }
        )
    )


def spawn(source: Path, out: Path, durable: bool) -> dict[str, Any]:
    """Run `child` in a fresh process."""
    command = [sys.executable, __file__, "--child", str(source), str(out), str(int(durable))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def copy(source: Path, out: Path, durable: bool) -> float:
    """Return the seconds of `cp -r`, with `sync` of the copy where `durable`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    if durable:
        subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    return time.perf_counter() - start


def gate(source: Path, out: Path) -> int:
    """Return how many tensors are byte-equal; stop where one is not."""
    equal, changed, new = kept_equal(Checkpoint.open(source), verify(out))
    if changed or new:
        raise SystemExit(f"the copy differs: {changed[:3] + new[:3]}. No speed is printed.")
    return len(equal)


def measure(root: Path, gigabytes: float, shards: int, repeats: int) -> dict[str, Any]:
    """Return everything that was measured."""
    source, out = root / "source", root / "out"
    make(source, gigabytes, shards)
    os.sync()
    sizes = {p.name: p.stat().st_size for p in source.iterdir()}
    spawn(source, out, True)
    equal = gate(source, out)  # reads everything: the page cache is warm from here on
    shutil.rmtree(out)
    times: dict[str, list[float]] = {"cp": [], "cp_sync": [], "write": [], "write_no_fsync": []}
    cpu: list[float] = []
    cp_cpu: list[float] = []
    peak = start = 0
    for _ in range(repeats):
        for kind in times:
            os.sync()
            if kind.startswith("cp"):
                used = os.times()
                times[kind].append(copy(source, out, kind == "cp_sync"))
                now = os.times()
                cp_cpu.append(now[2] + now[3] - used[2] - used[3])
            else:
                found = spawn(source, out, kind == "write")
                times[kind].append(found["seconds"])
                cpu.append(found["cpu_seconds"])
                peak, start = max(peak, found["peak_rss"]), found["peak_rss_at_start"]
            shutil.rmtree(out)
    best = {kind: min(values) for kind, values in times.items()}
    largest = max(sizes.values())
    return {
        "bytes": sum(sizes.values()),
        "largest_shard": largest,
        "tensors_equal": equal,
        "seconds_best": {k: round(v, 3) for k, v in best.items()},
        "seconds_median": {k: round(statistics.median(v), 3) for k, v in times.items()},
        "cpu_seconds_write": round(statistics.median(cpu), 3),
        "cpu_seconds_cp": round(statistics.median(cp_cpu), 3),
        "cpu_seconds_sha256": round(sha256_seconds(source), 3),
        "ratio_to_cp": round(best["write"] / best["cp"], 2),
        "ratio_to_cp_no_fsync": round(best["write_no_fsync"] / best["cp"], 2),
        "ratio_to_cp_sync": round(best["write"] / best["cp_sync"], 2),
        "peak_rss": peak,
        "peak_rss_after_imports": start,
        "peak_rss_to_largest_shard": round(peak / largest, 3),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to make it (temporary)")
    options = parser.parse_args()
    need = 3 * options.gigabytes * 1e9
    place = options.folder or Path(tempfile.gettempdir())
    if shutil.disk_usage(place).free < need:
        raise SystemExit(f"{place} has less than {need:.0f} bytes free.")
    with tempfile.TemporaryDirectory(dir=place) as root:
        result = measure(Path(root), options.gigabytes, options.shards, options.repeats)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
