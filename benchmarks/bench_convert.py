"""Convert a checkpoint of real shapes by a given sliding plan, verification included.

    python benchmarks/bench_convert.py [--gigabytes 2] [--json out.json]

Random Qwen3 weights in bfloat16, written shard by shard. Gate: the command itself verifies that
untouched tensors are byte-equal and that a fresh process computes the same logits; it fails
otherwise. Goals: writing takes <= 2x `cp -r`; the load-and-compare processes hold <= 1.3x of one
model each, never two. Needs twice the size on disk, and frees it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import report

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1536,
    "intermediate_size": 4608,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65536,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def tensors(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of the model, layer by layer."""
    d, f, h, g, k = 1536, 4608, 16, 8, 128
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (65536, d))]
    for i in range(layers):
        found += [
            (f"model.layers.{i}.{name}.weight", shape)
            for name, shape in {
                "self_attn.q_proj": (h * k, d),
                "self_attn.k_proj": (g * k, d),
                "self_attn.v_proj": (g * k, d),
                "self_attn.o_proj": (d, h * k),
                "self_attn.q_norm": (k,),
                "self_attn.k_norm": (k,),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
            }.items()
        ]
    return [*found, ("model.norm.weight", (d,))]


def write_model(folder: Path, size: int, shards: int = 4) -> int:
    """Write a random model of about `size` bytes in `shards` files; return its bytes."""
    per_layer = 2 * sum(int(np.prod(s)) for n, s in tensors(1) if ".0." in n)
    layers = max(2, round((size - 2 * 65536 * 1536) / per_layer))
    names, weight_map, total = tensors(layers), {}, 0
    rng = np.random.default_rng(0)
    for s in range(shards):
        part = names[s * len(names) // shards : (s + 1) * len(names) // shards]
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        header, at = {}, 0
        for name, shape in part:
            count = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + count]}
            weight_map[name] = file
            at += count
        raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for name, shape in part:
                values = rng.standard_normal(int(np.prod(shape)), dtype=np.float32)
                values = np.ones_like(values) if "norm" in name else values * 0.02
                out.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        total += at
    config = {**CONFIG, "num_hidden_layers": layers, "max_window_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="morph-bench-") as name:
        work = Path(name)
        (work / "model").mkdir()
        total = write_model(work / "model", int(args.gigabytes * 1e9))
        layers = json.loads((work / "model" / "config.json").read_text())["num_hidden_layers"]
        start = time.perf_counter()
        shutil.copytree(work / "model", work / "copy")
        copy_seconds = time.perf_counter() - start
        shutil.rmtree(work / "copy")
        code = (
            "import json, sys, time\n"
            "from morph import pipeline, plan\n"
            "from morph.pipeline import _convert\n"
            "source = pipeline.open_source(sys.argv[1])\n"
            "full = list(range(3, source.geometry.num_hidden_layers, 4))\n"
            "made = plan.uniform_plan('qwen3', source.geometry, full, 'sliding',"
            " {'window': 512}, None)\n"
            "marks = [time.perf_counter()]\n"
            "written = _convert.convert(source, made, sys.argv[2],"
            " say=lambda text: marks.append(time.perf_counter()))\n"
            "from morph._fresh import peak_bytes\n"
            "peak = peak_bytes()\n"
            "print(json.dumps({'write': marks[2] - marks[1], 'all': written.seconds,"
            " 'peak': peak, **written.verification}))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(work / "model"), str(work / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"refused: converting failed, so no speed is reported. {done.stderr[-600:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        largest = max(f.stat().st_size for f in (work / "model").glob("*.safetensors"))
    result = {
        "bytes": total,
        "layers": layers,
        "copy_seconds": copy_seconds,
        "write_over_copy": found["write"] / copy_seconds,
        "writer_peak_over_largest_shard": found["peak"] / largest,
        "load_peak_over_model": found["peak_rss_bytes"] / total,
        "reference_peak_over_model": found["reference_peak_rss_bytes"] / total,
        "tensors_byte_equal": found["tensors_byte_equal"],
        "logit_error": found["logit_error"],
        "changed_by_plan": found["changed_by_plan"],
        "all_seconds": found["all"],
    }
    lines = [
        f"{total / 1e9:.2f} GB, {layers} layers; all verified: "
        f"{found['tensors_byte_equal']} tensors byte-equal, logits within "
        f"{found['logit_error']:.1e} (the plan changes them by {found['changed_by_plan']:.2f})",
        f"writing (fsync included): {result['write_over_copy']:.2f}x of cp -r",
        f"peak of the writer: {result['writer_peak_over_largest_shard']:.2f}x the largest shard",
        f"peak of the load-and-compare: {result['load_peak_over_model']:.2f}x and "
        f"{result['reference_peak_over_model']:.2f}x of one model",
    ]
    report(lines, result, args.json)


if __name__ == "__main__":
    main()
