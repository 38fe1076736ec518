"""Distillations described in JSON, for tests that run them in several processes or kill them.

`python _distill_worker.py JOBS.json` runs a list of jobs one after the other, under torchrun in
several processes. `... --fork JOBS.json` runs each in a process of its own that may be killed, and
costs the imports once. What came of a job lies in its folder: `result-<rank>.json`, and from the
main process `weights.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from morph import modeling, surgery
from morph.distill import Batch, distill
from morph.distill import _states as states
from morph.distill import _trainee as trainee
from morph.errors import MorphError
from morph.plan import uniform_plan
from morph.recipes.schema import Stage, Training
from morph.testing import tiny_model

TEXT = torch.randint(0, 60, (400,), generator=torch.Generator().manual_seed(3))
STAGE = {"seq_len": 12, "batch_size": 4, "save_every": 4, "chunk_tokens": 7, "lr": 3e-3}
Job = dict[str, Any]


class Stop(RuntimeError):
    """The run is to end here, as if it had been killed."""


class Rows:
    """Windows of the text; with `needles` two tokens are supervised, with `packed` two documents
    and padding lie in a row."""

    def __init__(self, index: int, stage: Stage, kind: str = "windows") -> None:
        self.index, self.stage, self.kind = index, stage, kind

    def batch(self, step: int) -> Any:
        rows, length = self.stage.batch_size, self.stage.seq_len
        make = torch.Generator().manual_seed(1000 * self.index + step)
        starts = torch.randint(0, len(TEXT) - length, (rows,), generator=make)
        ids = torch.stack([TEXT[s : s + length] for s in starts.tolist()])
        if self.kind == "needles":
            labels = torch.full_like(ids, -100)
            labels[:, -2:] = ids[:, -2:]
            return ids, labels
        if self.kind == "packed":
            first = torch.randint(1, length, (rows, 1), generator=make)
            place = torch.arange(length).expand(rows, length)
            real = place < torch.randint(length - 3, length + 1, (rows, 1), generator=make)
            return Batch(ids=ids, positions=torch.where(place < first, place, place - first), real=real)
        return ids


def models(job: Job) -> tuple[Any, Any]:
    """Return teacher and student; the lowest layer stays."""
    shape = {"num_hidden_layers": 3, **job.get("config", {})}
    teacher: Any = tiny_model(job.get("family", "llama"), **shape)
    teacher = teacher.to(getattr(torch, job.get("dtype", "float32")))
    mixer, options = job.get("mixer", "decay"), job.get("options", {})
    geometry = surgery.geometry_of(teacher)
    student = modeling.hybrid(teacher, uniform_plan("llama", geometry, [0], mixer, options, None))
    return teacher, student


def run(job: Job) -> dict[str, Any]:
    """Run a job; return what it came to, for this process."""
    out = Path(job["out"])
    rank = int(os.environ.get("RANK", "0"))
    teacher, student = models(job)
    bits, places = digest(named(teacher)), [p.data_ptr() for p in teacher.parameters()]
    told: dict[str, Any] = {"error": None, "notes": [], "events": 0, "share": {}}
    stages = [Stage(**{**STAGE, **stage}) for stage in job["stages"]]

    def progress(event: Any) -> None:
        told["events"] += 1

    with watched(job, rank, told):
        try:
            log = distill(
                student,
                teacher,
                stages,
                lambda i, stage: Rows(i, stage, job.get("rows", "windows")),
                out=out,
                seed=1,
                needles=lambda i, stage: Rows(i, stage, "needles"),
                progress=progress,
                training=Training(**job.get("training", {})),
            )
            told |= {"records": log.records, "notes": log.notes, "trained": log.trained}
        except Stop:
            told["error"] = "Stop"
        except MorphError as error:
            told["error"] = f"{type(error).__name__}: {error}"
    weights = named(student)
    told["weights"] = digest(weights)
    told["teacher_is_the_same"] = digest(named(teacher)) == bits
    told["teacher_is_where_it_was"] = [p.data_ptr() for p in teacher.parameters()] == places
    out.mkdir(parents=True, exist_ok=True)
    (out / f"result-{rank}.json").write_text(json.dumps(told))
    if rank == 0:
        save_file({n: p.clone() for n, p in weights.items()}, out / "weights.safetensors")
    return told


def named(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def digest(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class watched:
    """Stops or kills a job where it says so, and looks at how its weights are split."""

    def __init__(self, job: Job, rank: int, told: dict[str, Any]) -> None:
        self.job, self.rank, self.told, self.steps = job, rank, told, 0

    def __enter__(self) -> None:
        self.step, self.begin = trainee.Trainee.step, trainee.Trainee.begin
        job, told, watch = self.job, self.told, self

        def step(this: Any, factor: float) -> None:
            watch.step(this, factor)
            watch.steps += 1
            if watch.steps == job.get("stop"):
                raise Stop
            if job.get("die") == [watch.rank, watch.steps]:
                os._exit(3)

        def begin(this: Any, stage: Stage, *args: Any) -> None:
            watch.begin(this, stage, *args)
            told["share"][stage.loss + stage.train] = [_share(this.model), _share(this.teacher)]

        trainee.Trainee.step, trainee.Trainee.begin = step, begin  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        trainee.Trainee.step, trainee.Trainee.begin = self.step, self.begin  # type: ignore[method-assign]


def _share(model: Any) -> float:
    """Return which share of a base model's parameters lies in this process."""
    whole = list(model.base_model.parameters())
    mine = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in whole)
    return mine / sum(p.numel() for p in whole)


# --- processes that are killed --------------------------------------------------------------------


def forked(job: Job) -> int:
    """Run a job in a process of its own, killed where it says so; return its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if "limit" in job:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
            if "write" in job:
                _kill_in_save(job)
            run(job)
            code = 0
        finally:
            os._exit(code)
    if "kill" in job:  # [lines of the log, seconds more]: whatever it is doing then
        lines, wait = job["kill"]
        log = Path(job["out"]) / "log.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            time.sleep(0.0005)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still the child's
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_in_save(job: Job) -> None:
    """Kill this process at what a save does to the disk for the `write`-th time after a step."""
    folder, after, left = str(Path(job["out"]) / "states"), job["after"], [job["write"]]
    steps = [0]
    step, save = trainee.Trainee.step, states.save_file

    def counted(this: Any, factor: float) -> None:
        step(this, factor)
        steps[0] += 1

    def half(tensors: Any, file: Any) -> None:
        save(tensors, file)
        if steps[0] >= after and job.get("half"):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        touches = event in _TOUCHES and any(folder in str(x) for x in arguments)
        if steps[0] >= after and touches and not job.get("half"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    trainee.Trainee.step = counted  # type: ignore[method-assign]
    states.save_file = half
    sys.addaudithook(hook)


_TOUCHES = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "os.scandir"}


def main() -> None:
    jobs = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    if "--fork" not in sys.argv:
        for job in jobs:
            run(job)
        return
    print(json.dumps([forked(job) for job in jobs]))


if __name__ == "__main__":
    main()
