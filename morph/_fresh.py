"""Load a written checkpoint in a fresh process and say what it really is. Run as a script.

Imports nothing of morph unless the job asks for it, so that a stock checkpoint is loaded by plain
transformers alone. Reads a JSON job from standard input, writes `report.json` and `logits.npy`.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    job = json.load(sys.stdin)
    out = Path(job["out"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    if job["morph"]:
        sys.path.insert(0, job["morph"])
        sys.path.extend(job["paths"])
        import morph  # noqa: F401

        for name in job["imports"]:
            importlib.import_module(name)
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model, info = AutoModelForCausalLM.from_pretrained(
        job["path"],
        dtype=getattr(torch, job["dtype"], "auto"),
        attn_implementation=job["attention"],
        output_loading_info=True,
        trust_remote_code=job["remote_code"],
    )
    model.eval()
    runs: dict[str, int] = {}
    layers = []
    base = model.base_model
    for i, layer in enumerate(base.layers):
        attention = getattr(layer, "self_attn", None)  # a stock layer may have something else
        entry = {
            "attention": type(attention).__name__,
            "sliding_window": getattr(attention, "sliding_window", None),
            "mixers": [],
        }
        for j, mixer in enumerate(getattr(attention, "mixers", ())):
            key = f"{i}.{j}"
            runs[key] = 0
            mixer.register_forward_hook(lambda *_, key=key: runs.__setitem__(key, runs[key] + 1))
            entry["mixers"].append(type(mixer).__module__.rpartition(".")[2])
        layers.append(entry)
    ids = torch.from_numpy(np.load(job["ids"]))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=job["keep"]).logits
    np.save(out / "logits.npy", logits.float().numpy())
    config = model.config
    report = {
        "class": type(model).__name__,
        "model_type": config.model_type,
        "layer_types": getattr(config, "layer_types", None),
        "layers": layers,
        "runs": runs,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_rss_bytes": peak_bytes(),
        "seconds": time.perf_counter() - start,
        "morph_loaded": any(m == "morph" or m.startswith("morph.") for m in sys.modules),
    }
    (out / "report.json").write_text(json.dumps(report))


def peak_bytes() -> int:
    """Return this process's own peak of resident memory; getrusage starts at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
