"""The loop: batches, teacher, student, loss, backward, step, log, save."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morph import strict
from morph.distill import _watch
from morph.distill._admission import accelerator_for, refuse
from morph.distill._batches import Batch, Source, StageBatches
from morph.distill._losses import Head
from morph.distill._objectives import align, end_to_end, shared_head
from morph.distill._process import (
    model_digest,
    quiet,
    random_state,
    seeded,
    set_random_state,
    uninterrupted,
)
from morph.distill._record import Event, Log, Position
from morph.distill._stages import check, estimate, learning_rate_factor, steps_of
from morph.distill._states import RunStates, keep_lines, storage
from morph.distill._teacher import HiddenCache, Teacher
from morph.distill._trackers import open_trackers
from morph.distill._trainee import Trainee
from morph.errors import (
    Interrupted,
    MismatchError,
    TrainingError,
    VerificationFailed,
)
from morph.mixers._hybrid import HybridAttention
from morph.recipes.schema import Stage, Training


def distill(
    student: Any,
    teacher: Any,
    stages: Sequence[Stage],
    batches: Source,
    *,
    out: Path,
    seed: int,
    layers: Mapping[int, nn.Module] | None = None,
    needles: Source | None = None,
    progress: Callable[[Event], None] | None = None,
    accelerator: Any = None,
    training: Training | None = None,
    probe: Callable[[], Mapping[str, float]] | None = None,
    until: Callable[[Mapping[str, float]], str] | None = None,
    frozen: Collection[str] = (),
    text: str = "",
) -> Log:
    """Train the converted layers of `student` towards `teacher`, in place, stage by stage.

    Both are causal LMs of one geometry; `layers` are the student's converted attention modules by
    index (default: every HybridAttention; several `Candidates` of a layer are aligned together).
    Called again with the same `out`, and with the student as it was at first, it goes on where it
    was stopped. A stage with nothing to train is skipped with a note. `training` are settings of
    the run, and `probe` measures the student, in the first process: `recall`, and whatever else is
    to be logged; `until` is told what it found and returns why the stage ends there, or "".
    Parameters named `frozen` keep their values whatever a stage trains. `text` is the digest of the
    text behind `batches`, of which few are looked at before a run goes on.

    Raises RecipeError, DataError, UnsupportedModel (an unknown output head, float16),
    MismatchError (student, teacher or saved state do not belong together), TrainingError (loss or
    gradient not finite; saved states stay), StorageError, and Interrupted after Ctrl-C, with the
    state saved.
    """
    check(stages)
    if accelerator is None:
        accelerator = accelerator_for(training.mixed_precision if training else None)
    training = training or Training()
    alone = accelerator.num_processes == 1
    shard = training.shard and not alone
    if layers is None:
        layers = {m.layer_idx: m for m in student.modules() if isinstance(m, HybridAttention)}
    refuse(student, teacher, stages, accelerator, needles, layers)
    _watch.check(training, probe)
    trainee = Trainee(student, teacher, dict(sorted(layers.items())), frozen)
    if not shard:  # else whole weights stay where they are, and their shards go there
        teacher.to(accelerator.device)
        student.to(accelerator.device)
    vocab = student.get_input_embeddings().weight.shape[0]
    fed = StageBatches(stages, batches, needles, vocab)
    run = _Run(
        trainee, stages, fed, Path(out), seed, progress, accelerator, training, probe, until, text
    )
    with quiet(student, teacher), seeded(seed, accelerator.device):
        try:
            if training.shard and alone:
                run.note("training.shard: there is one process, so nothing is split.")
            run.resume()
            while run.position.stage < len(stages):
                run.stage()
        except KeyboardInterrupt:
            raise Interrupted(run.interrupted()) from None
        finally:
            trainee.close()
            run.close()
    run.log.remarks = tuple(run.position.remarks)
    run.log.tokens, run.log.trained = run.position.tokens, tuple(sorted(trainee.touched))
    return run.log


PROBE = ("probe_every", "probe_task", "probe_length", "probe_examples", "recall_target")


class _Run:
    """One run: the loop and all that changes in it."""

    def __init__(
        self,
        trainee: Trainee,
        stages: Sequence[Stage],
        batches: StageBatches,
        out: Path,
        seed: int,
        progress: Callable[[Event], None] | None,
        accelerator: Any,
        training: Training,
        probe: Callable[[], Mapping[str, float]] | None,
        until: Callable[[Mapping[str, float]], str] | None,
        text: str,
    ) -> None:
        self.trainee, self.stages, self.out, self.accelerator = trainee, stages, out, accelerator
        self.progress, self.device, self.seed = progress, accelerator.device, seed
        self.student = trainee.student
        self.batches, self.training = batches, training
        self.log = Log(path=out / "log.jsonl")
        self.recall = math.nan
        self.position = Position()
        self.random: dict[str, str] = {}
        self.total = sum(estimate(stages))
        self.loaded: dict[str, torch.Tensor] = {}
        plan = getattr(self.student.config, "morph", None) or sorted(trainee.layers)
        settings = {
            "data": batches.digest(),
            "plan": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest(),
            "probe": {k: getattr(training, k) for k in PROBE} if training.probe_every else None,
            "precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "seed": seed,
            "stages": strict.plain(list(stages)),
            "student": model_digest(self.student, besides=trainee.source),  # as it starts
            "teacher": model_digest(trainee.source),
            "text": text,
            **({"frozen": sorted(trainee.frozen)} if trainee.frozen else {}),
        }
        self.states = RunStates(out / "states", settings, self.note, keep=training.keep_states)
        cache = None
        if training.teacher_cache is not None:
            folder = Path(training.teacher_cache).expanduser()
            cache = HiddenCache(folder, trainee.source, accelerator.mixed_precision, self.note)
        self.targets = Teacher(trainee, accelerator, cache)
        measured = probe and self._probe(probe)
        self.watch = _watch.Watch(training, stages, measured, self.remark, until)
        self.track = open_trackers(training.trackers, out, accelerator, settings, self.note)

    # --- one stage, top to bottom ---------------------------------------------------------------

    def stage(self) -> None:
        """Run the current stage from the current step to its end."""
        at, stage = self.position, self.stages[self.position.stage]
        names = self.trainee.names(stage) if self.trainee.layers else []
        if not names and (stage.train != "lora" or not self.trainee.layers):
            why = "no layer is converted."
            if self.trainee.layers:
                why = f"`train: {stage.train}` names nothing; these mixers have no parameters."
            self.remark(f"stage {at.stage} ({stage.loss}) is skipped: {why}")
            self.total -= estimate([stage])[0]
            at.stage, at.step = at.stage + 1, 0
            return
        head = None
        if stage.loss != "align":
            head = self._head(self._batch(at.stage, 0))
        seed = self.seed + 1000003 * at.stage
        shard = self.training.shard and self.accelerator.num_processes > 1
        self.trainee.begin(stage, names, self.accelerator, seed, shard)
        self.targets.model = self.trainee.teacher
        self.trainee.restore_optimizer(self.loaded)
        self.watch.begin(at.stage, self.trainee.gates(), at.watch or None)
        self.loaded = {}
        index, clock, first = at.stage, time.perf_counter(), at.tokens
        begun, steps = clock, steps_of(stage)
        for step in range(at.step, steps):
            self.trainee.progress(min(1.0, at.tokens / max(self.total, 1)))
            try:
                loss, extra = self._backward(stage, head, self._batch(index, step))
                norm = self.trainee.clip(stage, self.accelerator)
            except TrainingError as error:
                raise TrainingError(f"{self._here()}: {error}; {self._advice()}") from None
            factor = learning_rate_factor(stage, step)
            with uninterrupted():  # weights, position and log move together or not at all
                self.trainee.step(factor)
                seen = self.watch.after(index, step, steps, loss, extra.get("layers"))
                over = step + 1 == steps or self.watch.reached()
                self._advance(stage, over)
                if over and step + 1 < steps:
                    self._stop_early(index, step + 1, steps)
                record = {"stage": index, "name": stage.loss, "step": step, "loss": loss}
                record |= {"lr": stage.lr * factor, "grad_norm": norm, "tokens": at.tokens}
                now = time.perf_counter()
                self._write({**record, **extra, **seen}, now - clock)
            if loss == 0 and step == 0 and stage.lr and stage.gate_lr:
                self.note(
                    f"stage {index} ({stage.loss}): the loss is 0: on rows of {stage.seq_len} "
                    "tokens the hybrid is its teacher, as with a window that holds a whole row. "
                    "Nothing can be learnt so; give the stage a longer seq_len."
                )
            self.log.seconds, clock = self.log.seconds + now - clock, now
            if (step + 1) % stage.save_every == 0 or over:
                self.save()
            self._report(record | seen, steps, (at.tokens - first) / max(now - begun, 1e-9))
            if over:
                break
        self.trainee.progress(1.0)

    def _head(self, batch: Batch) -> Head:
        # Where weights are split, the whole ones are elsewhere.
        home = self.trainee.source.get_input_embeddings().weight.device
        head = shared_head(self.student, self.trainee.source, batch.map(lambda t: t.to(home)))
        bias = None if head.bias is None else head.bias.to(self.device)
        return replace(head, weight=head.weight.to(self.device), bias=bias)

    def _backward(self, stage: Stage, head: Any, batch: Batch) -> tuple[float, dict[str, Any]]:
        """Do one batch of a stage: forward and backward; return its loss and more for the log."""
        shared = self.trainee, self.accelerator, self.targets
        if head is None:
            return align(*shared, stage, batch)
        return end_to_end(*shared, stage, head, batch)

    def _advance(self, stage: Stage, is_last: bool) -> None:
        at = self.position
        at.tokens += stage.batch_size * stage.seq_len
        at.ordinal, at.step, at.watch = at.ordinal + 1, at.step + 1, self.watch.state()
        if is_last:
            self.trainee.end()
            at.stage, at.step, at.watch = at.stage + 1, 0, {}
        self.random = random_state(self.device)

    def _stop_early(self, index: int, done: int, steps: int) -> None:
        stage = self.stages[index]
        self.total -= (steps - done) * stage.batch_size * stage.seq_len
        self.remark(
            f"stage {index} ({stage.loss}) ends after step {done} of {steps}: {self.watch.why}"
        )

    def _probe(self, probe: Callable[[], Mapping[str, float]]) -> Callable[[], Mapping[str, float]]:
        """Return the probe as the loop has it: one process measures, and tells the others."""

        def measured() -> Mapping[str, float]:
            self.trainee.sync()
            told: list[Any] = [None]
            try:
                if self.accelerator.is_main_process:
                    told = [dict(probe())]
            except VerificationFailed as error:
                raise TrainingError(f"{self._here()}: {error} {self._advice()}") from None
            if self.accelerator.num_processes > 1:
                from accelerate.utils import broadcast_object_list

                broadcast_object_list(told)
            return told[0]

        return measured

    def _report(self, record: Mapping[str, Any], steps: int, rate: float) -> None:
        told = {k: record[k] for k in ("stage", "name", "loss", "lr", "tokens")}
        if record.get("recall") is not None:
            self.recall = record["recall"]
        self._tell(
            Event(
                kind="step",
                step=record["step"] + 1,
                steps=steps,
                total_tokens=self.total,
                tokens_per_second=rate,
                eta_seconds=(self.total - record["tokens"]) / rate,
                recall=self.recall,
                **told,
            )
        )

    def _batch(self, index: int, step: int) -> Batch:
        """Return this process's rows of a batch, on its device."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return self.batches.batch(index, step).map(lambda t: t[rank::world].to(self.device))

    # --- log, state, trouble --------------------------------------------------------------------

    def resume(self) -> None:
        """Go to where a saved state is, or to the start."""
        self.random = random_state(self.device)
        found = self.states.load()
        if found:
            tensors, content = found
            self.position = Position(**{k: v for k, v in content.items() if k != "random"})
            self.trainee.restore_weights(tensors)
            self.loaded = {k: t for k, t in tensors.items() if not k.startswith("model/")}
            self._count_skipped()
            set_random_state(content["random"], self.device)
            self.random = content["random"]
            self.note(f"resuming after {self.position.ordinal} steps ({self.out}).")
        self._agree()
        if self.accelerator.is_main_process:
            with storage(self.out, "nothing was changed"):
                self.out.mkdir(parents=True, exist_ok=True)
                have = keep_lines(self.log.path, self.position.lines)
                keep_lines(self.out / "seconds.jsonl", self.position.lines)
            if have < self.position.lines:
                self.note(f"{self.log.path} lost {self.position.lines - have} lines.")
                self.position.lines = have
            if have:
                try:
                    lines = self.log.path.read_text(encoding="utf-8").splitlines()
                    self.log.records = [json.loads(line) for line in lines]
                except (ValueError, RecursionError):
                    self.note(f"{self.log.path} cannot be read; it is left as it is.")
        self.accelerator.wait_for_everyone()

    def _agree(self) -> None:
        """Raise MismatchError where processes go on from different steps."""
        if self.accelerator.num_processes == 1:
            return
        mine = torch.tensor([self.position.ordinal], device=self.device)
        found = self.accelerator.gather(mine).tolist()
        if len(set(found)) > 1:
            raise MismatchError(
                f"{self.out}: the processes found states after {found} steps. All of them must "
                "see the same folder; put it on a file system that the nodes share."
            )

    def interrupted(self) -> str:
        """Save the state, where this process can alone; say what is kept."""
        several = self.accelerator.num_processes > 1
        if several and self.training.shard:  # the others may be gone, and no weight is whole
            last = self.states.last
            kept = "no state was saved yet" if last is None else f"the state after {last} is kept"
        else:
            self.save()
            kept = "the state is saved"
        done = self.position.ordinal
        return (
            f"stopped after {done} steps; {kept} in {self.out}. "
            "The same command goes on from there."
        )

    def _count_skipped(self) -> None:
        """Take out of the total what an earlier process left out."""
        spent = estimate(self.stages)[: self.position.stage]
        inside = self.position.step
        if self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage]
            inside *= stage.batch_size * stage.seq_len
        self.total -= sum(spent) + inside - self.position.tokens

    def save(self) -> None:
        """Write the state of the current position, once, from the main process."""
        if self.position.ordinal == self.states.last:
            return
        with uninterrupted():
            tensors = self.trainee.tensors(with_optimizer=self.position.step > 0)
            if not self.accelerator.is_main_process:
                self.states.last = self.position.ordinal
                return
            content = {**asdict(self.position), "random": self.random}
            self.states.save(self.position.ordinal, tensors, content)
        self._tell(Event(kind="saved", stage=self.position.stage, tokens=self.position.tokens))

    def _write(self, record: dict[str, Any], seconds: float) -> None:
        self.log.records.append(record)
        self.position.lines += 1
        if not self.accelerator.is_main_process:
            return
        self.track(record)
        times = {"stage": record["stage"], "step": record["step"], "seconds": round(seconds, 6)}
        with storage(self.out, "the last state is intact"):
            for path, line in ((self.log.path, record), (self.out / "seconds.jsonl", times)):
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Let go of what a run holds open."""
        self.track.close()

    def note(self, text: str) -> None:
        """Remember a remark and tell it."""
        self.log.notes.append(text)
        self._tell(Event(kind="note", text=text, total_tokens=self.total))

    def remark(self, text: str) -> None:
        """Note what an unbroken run would have noted too."""
        self.position.remarks.append(text)
        self.note(text)

    def _tell(self, event: Event) -> None:
        if self.progress is not None and self.accelerator.is_main_process:
            self.progress(event)

    def _here(self) -> str:
        stage = self.stages[self.position.stage]
        return f"stage {self.position.stage} ({stage.loss}), step {self.position.step}"

    def _advice(self) -> str:
        last = self.states.last
        kept = "no state was saved yet" if last is None else f"the state after step {last} is kept"
        stage = self.stages[self.position.stage]
        return f"{kept} in {self.out}. Lower lr ({stage.lr}) or gate_lr ({stage.gate_lr})."
