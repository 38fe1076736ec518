"""CPU seconds of the commands that need no model: `--help`, `list`, `show`, `check`, `inspect`.

Each command runs in a process of its own; user and system seconds of that process are taken from
the operating system. The gate: every command exits with 0, prints what it should, and torch is
not among its modules. `bare` is an interpreter that does nothing, for comparison.

    python benchmarks/bench_startup.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LIMIT = 0.3  # CPU seconds, the target of every command
RUN = (
    "import atexit, sys\n"
    "atexit.register(lambda: 'torch' in sys.modules and sys.stderr.write('TORCH'))\n"
    "from morph.cli import main\n"
    "main({!r})"
)


def main() -> None:
    """Measure every command in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="morph-bench-") as folder:
        commands = _commands(Path(folder))
        for name, (arguments, wanted) in commands.items():
            _gate(name, arguments, wanted)
        codes = {"bare": "pass", **{n: RUN.format(a) for n, (a, _) in commands.items()}}
        seconds: dict[str, list[float]] = {name: [] for name in codes}
        for _ in range(given.rounds):
            for name, code in codes.items():
                seconds[name].append(_cpu_seconds(code))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        verdict = "" if name == "bare" else "  ok" if median <= LIMIT else f"  over {LIMIT}"
        print(f"{name:10} {median:.3f} CPU-s (best {min(seconds[name]):.3f}){verdict}")
    if given.json:
        result = {"limit": LIMIT, "rounds": given.rounds, "cpu_seconds": medians}
        Path(given.json).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def _commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Return name -> (arguments, a word the output must hold); inputs are made in `folder`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: some/model\nselect:\n  selector: uniform\n  budget: 1/4\n")
    _checkpoint(folder / "model")
    return {
        "--help": (["--help"], "convert"),
        "list": (["list"], "sliding"),
        "show": (["show", "mixers/sliding"], "window"),
        "check": (["check", str(recipe)], "uniform"),
        "inspect": (["inspect", str(folder / "model")], "28"),
    }


def _checkpoint(folder: Path) -> None:
    """Write a Qwen3 of 28 layers and 311 tensors whose weights are all zero, tiny in size."""
    folder.mkdir()
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        **size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = {
        "input_layernorm": [16],
        "post_attention_layernorm": [16],
        "self_attn.q_proj": [32, 16],
        "self_attn.k_proj": [16, 16],
        "self_attn.v_proj": [16, 16],
        "self_attn.o_proj": [16, 32],
        "self_attn.q_norm": [8],
        "self_attn.k_norm": [8],
        "mlp.gate_proj": [32, 16],
        "mlp.up_proj": [32, 16],
        "mlp.down_proj": [16, 32],
    }
    shapes = {"model.embed_tokens.weight": [64, 16], "model.norm.weight": [16]}
    for i in range(28):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        count = 2 * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def _gate(name: str, arguments: list[str], wanted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(arguments)],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or wanted not in done.stdout or "TORCH" in done.stderr:
        print(f"refused: `morph {name}` is not right. {done.stderr.strip()}", file=sys.stderr)
        raise SystemExit(6)


def _cpu_seconds(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
