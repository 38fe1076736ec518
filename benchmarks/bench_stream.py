"""The exact layer sweep of a model that is never in memory whole, beside the same one resident.

    python benchmarks/bench_stream.py [--layers 24] [--json out.json]

A random Llama in float32, in four shards: 24 layers of 63 MB (1.5 GB), embeddings and head of 16 MB
each; nll add sweep of two batches of one row, 128 tokens, 8 answer tokens, windows of 32. Gate
first: scores equal those of the resident model to 1e-5 of their size. Peaks are those of
processes of their own, beyond what the libraries take. Goal: peak <= 2.5 layers + embeddings and
head + the hidden states that wait. Needs 1.6 GB on disk, and frees them; the page cache holds the
shards, so that seconds are of reading memory, not a disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import Run, gate, in_turns, one_thread, peak_bytes, report, say_peak

from morph import surgery
from morph.pipeline._source import open_source
from morph.selectors import nll
from morph.surgery import Batch
from morph.testing import tiny_model

WIDTH, INNER, VOCAB, TOKENS, BATCHES = 1024, 3776, 4096, 128, 2
WAYS = ("streamed", "resident")


def write_model(folder: Path, layers: int, shards: int = 4) -> dict[str, int]:
    """Write a random checkpoint in `shards` files; return the bytes of a layer and of the rest."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    inside = {f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
    inside |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH)}
    inside |= {"mlp.down_proj": (WIDTH, INNER)}
    inside |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    rest = {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,), "lm_head": (VOCAB, WIDTH)}
    shapes = {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in inside.items()} | rest
    names, weight_map = list(shapes), {}
    rng = np.random.default_rng(0)
    for s in range(shards):
        part = names[s * len(names) // shards : (s + 1) * len(names) // shards]
        file, header, at = f"model-{s + 1:05d}-of-{shards:05d}.safetensors", {}, 0
        for name in part:
            size = 4 * int(np.prod(shapes[name]))
            offsets = [at, at + size]
            header[f"{name}.weight"] = {
                "dtype": "F32",
                "shape": shapes[name],
                "data_offsets": offsets,
            }
            weight_map[f"{name}.weight"] = file
            at += size
        raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for name in part:
                values = rng.standard_normal(int(np.prod(shapes[name])), dtype=np.float32)
                out.write((np.ones_like(values) if "norm" in name else values * 0.04).tobytes())
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bytes_of = lambda found: 4 * sum(int(np.prod(s)) for s in found.values())
    return {"layer": bytes_of(inside), "rest": bytes_of(rest)}


def batches() -> list[Batch]:
    """Return the examples that are scored."""
    generator = torch.Generator().manual_seed(1)
    answers = torch.zeros(1, TOKENS, dtype=torch.bool)
    answers[:, -8:] = True
    shape = (1, TOKENS)
    return [
        Batch(ids=torch.randint(0, VOCAB, shape, generator=generator), answers=answers)
        for _ in range(BATCHES)
    ]


def sweep(folder: str, how: str) -> torch.Tensor:
    """Open the checkpoint and return the scores of all layers."""
    source = open_source(folder)
    model, streamed = source.streamed() if how == "streamed" else (source.model(), None)
    with surgery.morphable(model, "sliding", {"window": 32}, streamed=streamed) as probe:
        found = nll.score(probe, batches(), nll.Options())
    return torch.tensor([row[0] for row in found.values])


def prepared(folder: str, how: str) -> Run:
    """Return the sweep, with everything imported and warm that is not part of the model."""
    with surgery.morphable(tiny_model("llama"), "sliding", {"window": 6}) as probe:
        few = [Batch(ids=b.ids % 70, answers=b.answers) for b in batches()]
        nll.score(probe, few, nll.Options())
    return lambda: sweep(folder, how)


def measure(folder: str, rounds: int, bytes_of: dict[str, int], layers: int) -> dict[str, Any]:
    """Return what is reported, after the gate."""
    kept = {how: sweep(folder, how) for how in WAYS}
    gate("scores", kept["resident"], kept["streamed"], 1e-5)
    peaks = {how: peak_bytes(__file__, "--peak", folder, "--way", how) for how in WAYS}
    seconds = in_turns({how: lambda how=how: sweep(folder, how) for how in WAYS}, rounds)
    waiting = (layers + 2) * BATCHES * TOKENS * WIDTH * 4
    model = layers * bytes_of["layer"] + bytes_of["rest"]
    return {
        "largest_difference": float((kept["resident"] - kept["streamed"]).abs().max()),
        "layer_bytes": bytes_of["layer"],
        "rest_bytes": bytes_of["rest"],
        "waiting_bytes": waiting,
        "model_bytes": model,
        "peak_bytes": peaks,
        "layers_at_peak": (peaks["streamed"] - bytes_of["rest"] - waiting) / bytes_of["layer"],
        "peak_over_layer_and_rest": peaks["streamed"] / (bytes_of["layer"] + bytes_of["rest"]),
        "peak_over_resident": peaks["streamed"] / peaks["resident"],
        "peak_over_model": peaks["streamed"] / model,
        "cpu_seconds": seconds,
        "cpu_ratio": seconds["streamed"] / seconds["resident"],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    one_thread()
    if args.peak:
        say_peak(lambda: prepared(args.peak, args.way))
        sys.exit()
    with tempfile.TemporaryDirectory(prefix="morph-bench-") as folder:
        bytes_of = write_model(Path(folder), args.layers)
        result = measure(folder, args.rounds, bytes_of, args.layers)
    mb = {name: size / 1e6 for name, size in result["peak_bytes"].items()}
    lines = [
        f"{result['model_bytes'] / 1e9:.2f} GB in {args.layers} layers; largest score difference "
        f"{result['largest_difference']:.1e}",
        f"peak streamed: {mb['streamed']:.0f} MB = {result['peak_over_layer_and_rest']:.2f}x one "
        f"layer, embeddings and head; without these and the hidden states that wait "
        f"({result['waiting_bytes'] / 1e6:.0f} MB): {result['layers_at_peak']:.2f} layers",
        f"peak resident: {mb['resident']:.0f} MB; streamed takes "
        f"{result['peak_over_resident']:.3f}x of it, {result['peak_over_model']:.3f}x of the model",
        f"CPU seconds: {result['cpu_ratio']:.2f}x of the resident sweep "
        f"({result['cpu_seconds']['streamed']:.1f} s), loading included in both",
    ]
    report(lines, result, args.json)


if __name__ == "__main__":
    main()
