"""Logits of a source model before and after a plan, in a process of its own. Run with `-m`.

Reads a JSON job from standard input; writes `source.npy` and `hybrid.npy`. The plan is grafted
into the stock classes, so that the registered classes and stock exports are checked against a
path they do not share.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    import torch

    from morph import plan, surgery
    from morph._fresh import peak_bytes
    from morph.pipeline._source import open_source

    out = Path(job["out"])
    source = open_source(job["path"], job["family"])
    model = source.model(job["dtype"])
    ids = torch.from_numpy(np.load(job["ids"]))

    def logits() -> np.ndarray:
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False, logits_to_keep=job["keep"]).logits
        return found.float().numpy()

    np.save(out / "source.npy", logits())
    surgery.graft(model, source.family, plan.loads_plan(job["plan"]), inherit=True)
    np.save(out / "hybrid.npy", logits())
    (out / "reference.json").write_text(json.dumps({"peak_rss_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
