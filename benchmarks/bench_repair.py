"""What a fine-tuning on short problems takes from recall, and what each way of restoring returns.

    python benchmarks/bench_repair.py [--arms replay problems] [--seeds 3] [--work DIR]

The hybrid of the embedded checkpoint that keeps layers 5 and 7 full (window 64 in the others) is
tuned on problems of at most 128 tokens. `replay`: lookups and sums at a high rate, half of the rows
plain text; `problems`: lookups alone; `gentle`: lookups and text at half the rate, first seed only;
`attention`: lookups alone at a very high rate, where only the attention of layers 5 and 7 trains.
Then queries, keys and other parts are put back by `morph restore`. The checkpoints that matter most
get the same 200 questions a cell, all get the first 60 of `multikey`, and 200 held-out problems of
each task. Answers already in the work folder are not asked again, a stopped tuning goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _bench import one_thread, report

from morph import checkpoint, pipeline, repair, strict, surgery
from morph import plan as planning
from morph.evaluation import Hit, Measured
from morph.pipeline import _convert, _data, _finetune, _repair, _restore, _train
from morph.recipes.schema import Data, Evaluate, Finetune, Recipe

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "data" / "sherlock_holmes.txt"
FULL, WINDOW = [5, 7], 64
LENGTHS = (256, 512, 1024)
MAIN = ("multikey", "single_2")  # asked of the checkpoints that matter most
FEW, FEW_EXAMPLES = ("multikey",), 60  # asked of the others
BOTH = ("lookups", "sums")
ARMS = {
    "problems": Finetune(tokens=196608, lr=1e-3, tasks=("lookups",), probe_every=16),
    "replay": Finetune(tokens=262144, lr=6e-3, tasks=BOTH, text=0.5, probe_every=16),
    "attention": Finetune(
        tokens=131072, lr=1e-2, tasks=("lookups",), freeze=("rest",), probe_every=16
    ),
    "gentle": Finetune(tokens=196608, lr=3e-3, tasks=("lookups",), text=0.5, probe_every=16),
}
# name: what is restored from PRE into POST, in the words of `morph restore`
RESTORED: dict[str, dict[str, Any]] = {
    "q,k": {"include": "q,k"},
    "q": {"include": "q"},
    "k": {"include": "k"},
    "v": {"include": "v"},
    "q,k,v": {"include": "q,k,v"},
    "o": {"include": "o"},
    "norms": {"include": "norm"},
    "q,k,norms": {"include": "q,k,norm"},
    "q,k,v,o,norms": {"include": "q,k,v,o,norm"},
    "alpha 0.25": {"include": "q,k", "method": "interpolate", "alpha": 0.25},
    "alpha 0.5": {"include": "q,k", "method": "interpolate", "alpha": 0.5},
    "alpha 0.75": {"include": "q,k", "method": "interpolate", "alpha": 0.75},
    "rho 0.1": {"include": "q,k", "method": "ridge", "rho": 0.1},
    "rho 1": {"include": "q,k", "method": "ridge", "rho": 1.0},
    "rho 10": {"include": "q,k", "method": "ridge", "rho": 10.0},
    "q,k of all layers": {"include": "q,k", "layers": "all"},
    "attention of windows": {"include": "q,k,v,o,norm", "layers": "0,1,2,3,4,6"},
}
SWAPPED = "pre with q,k of post"
SHORT = ("gentle", "attention")  # arms without the other ways of restoring
IMPORTANT = ("pre", "post", "q,k", "frozen q,k")
Make = Callable[[], Any]


class Bench:
    """The hybrid before tuning, its text, and answers kept in the work folder."""

    def __init__(self, work: Path, examples: int) -> None:
        self.work = work
        self.source = pipeline.open_source(str(ROOT / "examples" / "checkpoint"))
        self.tokenizer = self.source.tokenizer()
        self.corpus = _data.corpus(Data(text=(str(TEXT),), held_out=0.1), self.tokenizer)
        self.teacher = self.source.model("float32")
        self.recipe = Recipe(
            model=str(self.source.path),
            evaluate=Evaluate(lengths=LENGTHS, examples=examples, perplexity_tokens=16384),
        )
        self.plan = surgery.resolve_costs(
            planning.uniform_plan(
                self.source.family.model_type,
                self.source.geometry,
                FULL,
                "sliding",
                {"window": WINDOW},
                None,
            )
        )
        self.pre = work / "pre"
        if not self.pre.is_dir():
            _convert.convert(self.source, self.plan, self.pre)

    def load(self, folder: Path) -> Any:
        """Return the hybrid in a folder, with morph's own mixers."""
        given = checkpoint.Checkpoint.open(folder, strict=False)
        return _train.student_of(self.teacher, self.plan, self.source, given)

    def tuned(self, section: Finetune, seed: int, out: Path) -> tuple[Path, dict[str, Any]]:
        """Tune the hybrid and write it, unless it is there; return the folder and what was told."""
        told = out.with_name(out.name + ".json")
        if not told.is_file():
            student = self.load(self.pre)
            recipe = replace(self.recipe, finetune=section, seed=seed)
            done = _finetune.tune(
                recipe,
                student,
                self.teacher,
                self.source,
                self.plan,
                self.corpus,
                out.with_name(out.name + ".state"),
            )
            _convert.convert(self.source, self.plan, out, student=student, force=out.exists())
            text = json.dumps(done.told(section), indent=1)
            told.write_text(text + "\n", encoding="utf-8")
        return out, json.loads(told.read_text(encoding="utf-8"))

    def answers(
        self, file: Path, make: Make, important: bool, section: Finetune
    ) -> tuple[list[Hit], Measured]:
        """Return what a model answers, from the work folder where it is there."""
        if not file.is_file():
            evaluate = self.recipe.evaluate
            examples = evaluate.examples if important else min(FEW_EXAMPLES, evaluate.examples)
            tasks = MAIN if important else FEW
            evaluate = replace(evaluate, tasks=tasks, examples=examples)
            recipe = replace(self.recipe, evaluate=evaluate, finetune=section)
            hits, loss = _repair.ask(recipe, make(), self.corpus, self.tokenizer)
            told = {"hits": strict.plain(hits), "loss": strict.plain(loss)}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(told) + "\n", encoding="utf-8")
            right = sum(h.correct for h in hits)
            print(f"{file.parent.name}/{file.stem}: {right} of {len(hits)} right", flush=True)
        found = json.loads(file.read_text(encoding="utf-8"))
        return [strict.build(Hit, h) for h in found["hits"]], strict.build(Measured, found["loss"])

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the repairs of one tuning: few checkpoints on all tasks, all on few."""
        section = ARMS[arm]
        work = self.work / f"{arm}-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        post, told = self.tuned(section, seed, work / "post")
        fixed = replace(section, freeze=("q", "k", *section.freeze))
        frozen, _ = self.tuned(fixed, seed, work / "frozen")
        makes: dict[str, Make] = {
            "pre": lambda: self.load(self.pre),
            "post": lambda: self.load(post),
        }
        for name, options in RESTORED.items():
            makes[name] = lambda n=name, o=options: self.load(self.restored(self.pre, post, n, o))
        swapped = {"include": "q,k"}
        makes[SWAPPED] = lambda: self.load(self.restored(post, self.pre, "swapped", swapped, work))
        makes["mlp of all layers"] = lambda: self.with_parts(post, ".mlp.")
        makes["frozen q,k"] = lambda: self.load(frozen)
        hits, losses = {}, {}
        for name, make in makes.items():
            important = name in IMPORTANT
            if arm in SHORT and not important and name != SWAPPED:
                continue
            folder = work / "answers"
            if name == "pre":  # the same for all that are tuned on the same tasks
                folder = self.work / "_".join(section.tasks)
            file = folder / f"{name.replace(',', '').replace(' ', '_')}.json"
            hits[name], losses[name] = self.answers(file, make, important, section)
        few = {name: _first(found, section.tasks) for name, found in hits.items()}
        told = {"tuning": told, "drift": _repair.drift(self.pre, post), "seed": seed}
        common: dict[str, Any] = {"tuned": section.tasks, **told}
        return {
            "arm": arm,
            "seed": seed,
            "main": repair.compare({n: hits[n] for n in IMPORTANT}, losses, **common),
            "all": repair.compare(few, losses, **common),
        }

    def restored(
        self, pre: Path, post: Path, name: str, options: dict[str, Any], work: Path | None = None
    ) -> Path:
        """Write what `morph restore` makes of two folders, beside POST; return the folder."""
        out = (work or post.parent) / "restored" / name.replace(",", "").replace(" ", "_")
        out.parent.mkdir(exist_ok=True)
        _restore.restore_command(
            str(pre),
            str(post),
            out,
            **options,
            allow=["unchanged", "unrelated"],
            force=True,
            say=lambda text: None,
        )
        return out

    def with_parts(self, post: Path, part: str) -> Any:
        """Return the tuned hybrid with the tensors of PRE whose name has `part`."""
        made, before = self.load(post), dict(self.load(self.pre).named_parameters())
        for name, parameter in made.named_parameters():
            if part in name:
                parameter.data = before[name].data
        return made


def _first(hits: Sequence[Hit], tuned: Sequence[str]) -> list[Hit]:
    """Return the hits that every checkpoint has: of recall the first of `FEW`, all problems."""
    found, seen = [], dict[tuple[str, int], int]()
    for hit in hits:
        key = hit.task, hit.length
        seen[key] = seen.get(key, 0) + 1
        if hit.task in tuned or (hit.task in FEW and seen[key] <= FEW_EXAMPLES):
            found.append(hit)
    return found


def lines_of(runs: list[dict[str, Any]]) -> list[str]:
    """Return a table per arm: the mean over seeds and, of recall, the lowest and highest."""
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        lines.append(f"{arm}, {len(mine)} seeds")
        lines += [_tuning(run) for run in mine]
        for kind in ("main", "all"):
            lines += _table([run[kind] for run in mine])
        lines += [line for run in mine for line in _changes(run)]
    return lines


def _tuning(run: dict[str, Any]) -> str:
    found = run["all"]
    moved = []
    for role in ("q", "k", "v", "o"):
        of_role = [d.drift for d in found.drift if d.role == role and d.layer in FULL]
        moved.append(f"{role} {statistics.fmean(of_role):.3f}")
    told = found.tuning
    return (
        f"  seed {run['seed']}: {told['tokens_seen']} tokens, loss {told['first_loss']:.2f} -> "
        f"{told['last_loss']:.3f}, probes {told['probes']}, drift of layers {FULL}: "
        f"{' '.join(moved)}"
    )


def _table(found: list[repair.Repair]) -> list[str]:
    cells = [(r.task, r.length) for r in found[0].sides[0].rows]
    head = [f"{task} {length or 'solved'}" for task, length in cells]
    lines = [_line(["", *head, "perplexity"])]
    for n, side in enumerate(found[0].sides):
        shown = []
        for cell in cells:
            rows = [r for x in found for r in x.sides[n].rows if (r.task, r.length) == cell]
            shares = [r.recall for r in rows]
            shown.append(f"{statistics.fmean(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})")
        losses = [p.ppl for x in found if (p := x.sides[n].perplexity)]
        lines.append(_line([side.name, *shown, f"{statistics.geometric_mean(losses):.1f}"]))
    return lines


def _line(cells: list[str]) -> str:
    return "  " + "  ".join([f"{cells[0]:21s}", *[f"{cell:>19s}" for cell in cells[1:]]])


def _changes(run: dict[str, Any]) -> list[str]:
    lines = []
    for change in run["main"].changes:
        d = change.found
        lines.append(
            f"  seed {run['seed']}: {d.model} - {change.since}, {d.task} {d.length or ''}: "
            f"{d.difference:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
        )
    for back in run["main"].back:
        if back.share is not None:
            lines.append(
                f"  seed {run['seed']}: back with {back.name}, {back.task} {back.length}: "
                f"{back.share:.2f} ({back.low:.2f} to {back.high:.2f})"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=200, help="questions a cell")
    parser.add_argument("--work", type=Path, default=Path("bench-repair"))
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    args = parser.parse_args()
    one_thread()
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, args.examples)
    cases = [(arm, seed) for seed in range(args.seeds) for arm in args.arms]
    runs = [bench.run(arm, seed) for arm, seed in cases if arm != "gentle" or not seed]
    report(lines_of(runs), {"runs": strict.plain(runs)}, args.json)


if __name__ == "__main__":
    main()
