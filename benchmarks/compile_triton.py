"""Compile every Triton kernel ahead of time and say what it uses: registers, shared memory, spills.

    python benchmarks/compile_triton.py [--arch 90] [--only decay] [--json out.json]

Needs no GPU: the compiler that comes with Triton makes the binary, and `cuobjdump` beside it reads
the resources back. The kernels and configurations are those that the operators launch
(`variants()` of `morph/kernels/_triton_*.py`). Exits with status 6 where one spills or asks for
more shared memory than the architecture has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from morph.kernels._triton import SHARED_BYTES, Variant, interpreted

KERNELS = Path(__file__).resolve().parent.parent / "morph" / "kernels"


def all_variants(only: str | None) -> list[tuple[str, Variant]]:
    found = []
    for path in sorted(KERNELS.glob("_triton_*.py")):
        op = path.stem.removeprefix("_triton_")
        if only in (None, op):
            module = importlib.import_module(f"morph.kernels.{path.stem}")
            found += [(op, v) for v in module.variants()]
    return found


def compile_one(variant: Variant, arch: int) -> dict[str, Any]:
    """Return the resources of one kernel on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.signature)
    pointers = [i for i, n in enumerate(names) if variant.signature[n].startswith("*")]
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs={(names.index(n),): v for n, v in variant.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    start = time.perf_counter()
    made = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    seconds = time.perf_counter() - start
    registers, stack, local = resources(made.asm["cubin"])
    return {
        "arch": arch,
        "registers": registers,
        "shared_bytes": made.metadata.shared,
        "shared_limit": SHARED_BYTES[arch],
        "spill_bytes": stack + local,
        "seconds": round(seconds, 2),
    }


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Return (registers, stack bytes, local bytes) of the one kernel in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    if len(usage) != 1:
        raise SystemExit(f"cuobjdump said nothing about one kernel: {said!r}")
    registers, stack, local = usage[0]
    return int(registers), int(stack), int(local)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_BYTES))
    parser.add_argument("--only", help="one operator")
    parser.add_argument("--json", metavar="PATH", help="write the rows there; - is stdout")
    args = parser.parse_args()
    if interpreted():
        raise SystemExit("TRITON_INTERPRET=1 is set: unset it to compile.")
    rows = []
    for op, variant in all_variants(args.only):
        for arch in args.arch or sorted(SHARED_BYTES):
            row = {"op": op, "kernel": variant.name, **compile_one(variant, arch)}
            rows.append(row)
            if args.json != "-":
                print(
                    f"{op:12} {variant.name:28} sm_{arch}: {row['registers']} registers, "
                    f"{row['shared_bytes']} bytes shared, {row['spill_bytes']} spilled"
                )
    if args.json == "-":
        print(json.dumps(rows))
    elif args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    bad = [r for r in rows if r["spill_bytes"] or r["shared_bytes"] > r["shared_limit"]]
    if bad:
        print(f"refused: {len(bad)} configurations spill or do not fit: {bad[0]}", file=sys.stderr)
        raise SystemExit(6)


if __name__ == "__main__":
    main()
