"""Put queries and keys from before a fine-tuning back into a checkpoint (QK-Restore), on files.

`plan` compares two folders and says what would change; `write` writes it. No torch.

    from morph import restore

    plan = restore.plan("hybrid", "hybrid-sft", restore.Options(layers="full"))
    print(plan.layers, plan.nbytes, plan.notes)
    restore.write(plan, "restored")
"""

from morph.restore._maths import projector, ridge
from morph.restore._options import ALLOWANCES, METHODS, PARTS, Options
from morph.restore._plan import Plan, plan
from morph.restore._record import restored_records
from morph.restore._write import write

__all__ = [
    "ALLOWANCES",
    "METHODS",
    "PARTS",
    "Options",
    "Plan",
    "plan",
    "projector",
    "restored_records",
    "ridge",
    "write",
]
