"""Distillations described in JSON, for tests that run them in several processes or kill them.

`python _distill_worker.py JOBS.json` runs a list of jobs one after the other, under torchrun in
several processes. `... --fork JOBS.json` runs each in a process of its own, which may be killed,
and pays for the imports once; it prints how each process ended and what it left. `out` is a job's
folder; what came of it is in `<result>-<rank>.json` and, the weights, in `<result>.safetensors`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from morph import modeling, surgery
from morph.distill import Batch, distill
from morph.distill import _states as states
from morph.distill._trainee import Trainee
from morph.errors import MorphError
from morph.plan import uniform_plan
from morph.recipes.schema import Stage, Training
from morph.testing import tiny_model

Job = dict[str, Any]

TEXT = torch.randint(0, 60, (400,), generator=torch.Generator().manual_seed(3))
STAGE = {"seq_len": 12, "batch_size": 4, "save_every": 3, "chunk_tokens": 7, "lr": 3e-3}


class Stop(RuntimeError):
    """The run is to end here, as if it had been killed."""


class Rows:
    """Windows of the text; "needles": few tokens supervised; "packed": two documents, padding."""

    def __init__(self, index: int, stage: Stage, kind: str) -> None:
        self.index, self.stage, self.kind = index, stage, kind

    def batch(self, step: int) -> Any:
        rows, length = self.stage.batch_size, self.stage.seq_len
        make = torch.Generator().manual_seed(1000 * self.index + step)
        starts = torch.randint(0, len(TEXT) - length, (rows,), generator=make)
        ids = torch.stack([TEXT[s : s + length] for s in starts.tolist()])
        if self.kind == "needles":
            labels = torch.full_like(ids, -100)
            labels[::2, -2:] = ids[::2, -2:]  # in two processes, the second has nothing to learn
            return ids, labels
        if self.kind == "windows":
            return ids
        place = torch.arange(length).expand(rows, length)
        first = torch.randint(1, length, (rows, 1), generator=make)
        real = place < torch.randint(length - 3, length + 1, (rows, 1), generator=make)
        positions = torch.where(place < first, place, place - first)
        return Batch(ids=ids, positions=positions, real=real)


def models(job: Job) -> tuple[Any, Any]:
    """Return teacher and student; the lowest layer stays."""
    shape = {"num_hidden_layers": 3, **job.get("config", {})}
    teacher: Any = tiny_model("llama", **shape).to(getattr(torch, job.get("dtype", "float32")))
    mixer, options = job.get("mixer", "decay"), job.get("options", {})
    geometry = surgery.geometry_of(teacher)
    student = modeling.hybrid(teacher, uniform_plan("llama", geometry, [0], mixer, options, None))
    return teacher, student


def run(job: Job) -> dict[str, Any]:
    """Run a job; return what it came to in this process."""
    rank = int(os.environ.get("RANK", "0"))
    out = Path(job["out"] + str(rank) * job.get("apart", False))
    teacher, student = models(job)
    training = dict(job.get("training", {}))
    if "cache" in job:  # each process has its own
        training["teacher_cache"] = job["cache"] + str(rank)
        if job.get("forgets") == rank:
            shutil.rmtree(training["teacher_cache"])
    before, places = digest(teacher), [p.data_ptr() for p in teacher.parameters()]
    told: dict[str, Any] = {"rank": rank, "error": None, "events": [], "share": {}, "saves": 0}

    def rows(kind: str) -> Any:
        return lambda index, stage: Rows(index, stage, kind)

    with watched(job, rank, told):
        try:
            log = distill(
                student,
                teacher,
                [Stage(**{**STAGE, **stage}) for stage in job["stages"]],
                rows(job.get("rows", "windows")),
                out=out,
                seed=1,
                needles=rows("needles"),
                progress=lambda event: told["events"].append(event.kind),
                training=Training(**training),
            )
            told |= {"records": log.records, "notes": log.notes, "trained": log.trained}
        except Stop:
            told["error"] = "Stop"
        except MorphError as error:
            told["error"] = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    told["weights"] = digest(student)
    told["teacher_has_its_bits"] = digest(teacher) == before
    told["teacher_is_where_it_was"] = [p.data_ptr() for p in teacher.parameters()] == places
    result = job.get("result", f"{out}-result")
    Path(f"{result}-{rank}.json").write_text(json.dumps(told))
    if rank == 0:
        weights = {n: p.detach().clone() for n, p in student.named_parameters()}
        save_file(weights, f"{result}.safetensors")
    return told


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(name.encode() + p.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def watched(job: Job, rank: int, told: dict[str, Any]) -> Iterator[None]:
    """Stop or end a job where it says so; note how its weights are split, and who saves."""
    inner_step, inner_begin, inner_clip = Trainee.step, Trainee.begin, Trainee.clip
    inner_save, steps = states.save_file, [0]

    def step(trainee: Any, factor: float) -> None:
        inner_step(trainee, factor)
        steps[0] += 1
        if steps[0] == job.get("stop"):
            raise Stop
        if steps[0] == job.get("ctrl_c"):
            signal.raise_signal(signal.SIGINT)

    def clip(*arguments: Any) -> float:
        if [rank, steps[0]] == job.get("die"):  # while the others wait for its gradients
            os._exit(3)
        return inner_clip(*arguments)

    def begin(trainee: Any, stage: Stage, *rest: Any) -> None:
        inner_begin(trainee, stage, *rest)
        told["share"][f"{stage.loss} {stage.train}"] = share(trainee.model), share(trainee.teacher)

    def save(*arguments: Any) -> None:
        inner_save(*arguments)
        told["saves"] += 1

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (Trainee, "step", step),
            (Trainee, "begin", begin),
            (Trainee, "clip", clip),
            (states, "save_file", save),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield


def share(model: Any) -> float:
    """Return which share of a base model's parameters lies in this process."""
    whole = list(model.base_model.parameters())
    mine = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in whole)
    return mine / sum(p.numel() for p in whole)


# --- processes that are killed ------------------------------------------------------------------


def forked(job: Job) -> dict[str, Any]:
    """Run a job in a process of its own, killed where it says so; return how that ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            endangered(job)
            run(job)
            code = 0
        finally:
            os._exit(code)
    if "kill" in job:  # [lines of the log, seconds]: whatever it is doing then
        lines, wait = job["kill"]
        log = Path(job["out"]) / "log.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            time.sleep(0.0005)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still the child's
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "states": left(Path(job["out"]) / "states")}


def left(folder: Path) -> dict[str, bool]:
    """Return the states in a folder, and whether each is whole."""
    found = {}
    for path in sorted(folder.glob("step-*")):
        try:
            told = json.loads((path / "state.json").read_text())["sha256"]
            data = (path / "tensors.safetensors").read_bytes()
            found[path.name] = hashlib.sha256(data).hexdigest() == told
        except OSError:
            found[path.name] = False
    return found


_TOUCHES = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.scandir", "shutil.rmtree")


def endangered(job: Job) -> None:
    """From step `after` on, kill this process in a save, or let the disk take no large file.

    `at` n: before the n-th thing that Python does to the folder of states. `half`: with half of
    the tensors written. `limit`: the largest file in bytes.
    """
    if "after" not in job:
        return
    folder, todo, steps = str(Path(job["out"]) / "states"), [job.get("at", 0)], [0]
    step, save = Trainee.step, states.save_file

    def counted(trainee: Any, factor: float) -> None:
        step(trainee, factor)
        steps[0] += 1
        if steps[0] == job["after"] and "limit" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))

    def half(tensors: Any, file: Any) -> None:
        save(tensors, file)
        if steps[0] >= job["after"] and job.get("half"):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _TOUCHES and steps[0] >= job["after"] and folder in str(arguments[0]):
            todo[0] -= 1
            if todo[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    Trainee.step, states.save_file = counted, half  # type: ignore[method-assign]
    sys.addaudithook(touched)


def main() -> None:
    jobs = json.loads(Path(sys.argv[-1]).read_text())
    torch.set_num_threads(1)
    if "--fork" not in sys.argv:
        for job in jobs:
            run(job)
        return
    # What is imported now need not be imported by every process
    import accelerate  # noqa: F401

    teacher, student = models(jobs[0])
    with torch.no_grad():
        teacher(TEXT[None, :9])
        student(TEXT[None, :9])
    print(json.dumps([forked(job) for job in jobs]))


if __name__ == "__main__":
    main()
