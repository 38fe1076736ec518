"""Feed mutated headers, indexes, configs, manifests, recipes, plans and scores to their readers.

    python benchmarks/fuzz.py [--cases 200000] [--seed 0] [--start 0] [--only N] [--json FILE]
        [--folder DIR] [--targets shard,index,...]

Every case must end in success or in a MorphError of the documented exit code, in one printable
line that names the file, within 2 CPU seconds and 256 MiB and without a warning; one case in 50
goes through the command line too. Where we accept a shard, safetensors must accept it and see the
same tensors; where we accept an index or a manifest, no path may leave the folder. What only they
accept is counted by reason. A case depends on the seed and its number alone: a batch that is in the
folder already is not run again, failing inputs are kept there, and each has a command that runs it
alone. Exit status 6 if anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import mmap
import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from _readers import MIB, Broken, StricterError, Target, require, targets

from morph import checkpoint, cli
from morph.errors import MismatchError, MorphError

CPU_SECONDS, WALL_SECONDS, GROWTH, BATCH = 2.0, 5.0, 256 * MIB, 2000
FOUND = Path(tempfile.gettempdir()) / "morph-fuzz"


class Hang(BaseException):
    """A case that takes too long; nothing that catches exceptions may catch it."""


@dataclass
class Tally:
    """What the cases so far came to; `failures` say what, where and how to see it again."""

    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    only_safetensors: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: tuple[float, int, str] = (0.0, -1, "")
    largest: tuple[int, int, str] = (0, -1, "")

    def add(self, other: Tally) -> None:
        """Take over what another tally counted."""
        self.outcomes += other.outcomes
        self.refusals += other.refusals
        self.only_safetensors += other.only_safetensors
        self.failures += other.failures
        self.slowest = max(self.slowest, other.slowest)
        self.largest = max(self.largest, other.largest)

    def dump(self) -> dict[str, Any]:
        """Return plain data that `load` reads."""
        return {
            "outcomes": dict(sorted(self.outcomes.items())),
            "refusals": dict(self.refusals.most_common()),
            "only_safetensors": dict(self.only_safetensors.most_common()),
            "failures": self.failures,
            "slowest": list(self.slowest),
            "largest": list(self.largest),
        }

    @classmethod
    def load(cls, data: dict[str, Any]) -> Tally:
        """Return the tally that `dump` wrote."""
        counts = {k: Counter(data[k]) for k in ("outcomes", "refusals", "only_safetensors")}
        slowest, largest = tuple(data["slowest"]), tuple(data["largest"])
        return cls(**counts, failures=data["failures"], slowest=slowest, largest=largest)


# --- One case -----------------------------------------------------------------------------------


def memory() -> tuple[int, int]:
    """Return bytes resident now and at the peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = {k: v for k, _, v in (line.partition(":") for line in file)}
    return tuple(int(found[k].split()[0]) * 1024 for k in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def forget_peak() -> None:
    """Let the peak of this process start again from what it holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise Hang where what runs takes too much of the CPU, or waits for something for ever."""
    used, idle = time.process_time(), 0

    def ring(number: int, frame: Any) -> None:
        nonlocal used, idle
        now = time.process_time()
        idle = idle + 1 if now - used < 0.01 else 0  # others may have had the CPU meanwhile
        if number == signal.SIGPROF or idle > 1:  # once: this process may have been held
            raise Hang
        used = now

    signals = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, ring) for number in signals}
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS, WALL_SECONDS)
    try:
        yield
    finally:
        for number, timer in signals.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def template(error: BaseException, file: Path) -> str:
    """Return what was wrong, without the names and numbers of this case."""
    text = str(error).replace(str(file), "FILE").replace(str(file.parent), "FOLDER")
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\S*\\\S*|[^\x00-\x7f]+", "…", text)
    return re.sub(r"-?\d[\d.e+]*", "N", text)[:90]


def judge(target: Target, file: Path, tally: Tally, name: str) -> tuple[str, int]:
    """Read one file; return the outcome and the exit code; raise what must not happen."""
    try:
        return target.read(file), 0
    except StricterError as beside:
        error = beside.__cause__
        assert isinstance(error, MorphError)
        tally.only_safetensors[template(error, file)] += 1
    except MorphError as found:
        error = found
    text = str(error)
    require(error.exit_code in target.codes, f"{type(error).__name__} has code {error.exit_code}")
    require(text.isprintable() and 0 < len(text) < 4000, f"not one printable line: {text!r:.300}")
    named = str(file.parent) in text or (isinstance(error, MismatchError) and "PRE" in text)
    require(named, f"the message names no file: {text:.300}")
    tally.refusals[f"{name}: {template(error, file)}"] += 1
    return f"refused, {type(error).__name__}", error.exit_code


def by_command(target: Target, file: Path, code: int) -> None:
    """Give the file to the command line: the same code, one error line, no control character."""
    place = file if target.command == "check" else file.parent
    if target.command == "inspect":  # which opens what the reader may refuse for other reasons
        code = 0
        try:
            checkpoint.inspect(place)
        except MorphError as error:
            code = error.exit_code
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([target.command, str(place)])
        except SystemExit as done:
            found = int(done.code or 0)
    said = err.getvalue()
    require(found == code, f"morph {target.command}: exit {found}, expected {code}: {said[:300]}")
    require(not code or said.splitlines()[-1].startswith("error: "), f"no error line: {said[:300]}")
    wild = [c for c in out.getvalue() + said if not c.isprintable() and c not in "\n"]
    require(not wild, f"morph {target.command} printed {wild[:5]}")


def case(number: int, seed: int, known: dict[str, Target], root: Path, tally: Tally) -> bytes:
    """Run one case and count it; return its input."""
    rng = Random(f"{seed}:{number}")
    names = list(known)
    name = rng.choices(names, [known[n].share for n in names])[0]
    target, file = known[name], root / known[name].file
    data = target.make(rng)
    file.write_bytes(data)
    before, start = memory(), time.process_time()
    failure = ""
    try:
        with watched():
            outcome, code = judge(target, file, tally, name)
        if target.command and number % 50 == 0:
            by_command(target, file, code)
    except Hang:
        failure = "hang"
    except Broken as error:
        failure = f"broken promise: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    peak = memory()[1]
    grown = peak - before[0] if peak > before[1] else 0
    if grown > GROWTH // 8:
        forget_peak()
    if not failure and seconds > CPU_SECONDS:  # inside a call that no signal can stop
        failure = f"hang: {seconds:.1f} CPU seconds"
    if not failure and grown > GROWTH:
        failure = f"memory: {grown >> 20} MiB more"
    if failure:
        told = {"case": number, "target": name, "seconds": round(seconds, 2), "why": failure[:500]}
        tally.failures.append(told | {"grown": grown, "bytes": len(data)})
    tally.outcomes[f"{name}: {'FAILED' if failure else outcome}"] += 1
    tally.slowest = max(tally.slowest, (seconds, number, name))
    tally.largest = max(tally.largest, (grown, number, name))
    return data


def run(
    numbers: Iterable[int],
    seed: int,
    root: Path,
    *,
    only: Iterable[str] = (),
    keep: Path | None = None,
    at: Callable[[int], object] = id,
) -> Tally:
    """Run cases in this process, in the empty folder `root`; keep failing inputs in `keep`.

    `only` names the targets to choose from; `at` is told each number before it runs.
    """
    known, tally = targets(root), Tally()
    known = {name: known[name] for name in only or known}
    open_before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            at(number)
            before = len(tally.failures)
            data = case(number, seed, known, root, tally)
            if keep is not None and len(tally.failures) > before:
                keep.mkdir(parents=True, exist_ok=True)
                suffix = Path(known[tally.failures[-1]["target"]].file).suffix
                (keep / f"case-{seed}-{number}{suffix}").write_bytes(data)
    if len(os.listdir("/proc/self/fd")) > open_before:
        tally.failures.append({"case": -1, "target": "", "why": "a file was left open"})
    return tally


# --- Many cases ---------------------------------------------------------------------------------


def apart(numbers: range, seed: int, folder: Path, only: list[str]) -> Tally:
    """Run cases in a process of their own; one that kills it is a failure, and the rest goes on."""
    told = folder / f"seed-{seed}-{numbers.start}-{numbers.stop}.json"
    if told.is_file():
        return Tally.load(json.loads(told.read_text()))
    board = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with tempfile.TemporaryDirectory(dir=_memory_folder()) as root:
                at = lambda number: board.__setitem__(slice(8), number.to_bytes(8, "little"))
                tally = run(numbers, seed, Path(root), only=only, keep=folder, at=at)
            told.with_suffix(".part").write_text(json.dumps(tally.dump()))
            status = 0
        except BaseException:  # of the fuzzer itself
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status == 0:
        told.with_suffix(".part").rename(told)
        return Tally.load(json.loads(told.read_text()))
    killer = int.from_bytes(board[:8], "little")
    why = f"the process ended with {os.waitstatus_to_exitcode(status)}"
    found = Tally(failures=[{"case": killer, "target": "", "why": why}])
    for rest in (range(numbers.start, killer), range(killer + 1, numbers.stop)):
        if rest:
            found.add(apart(rest, seed, folder, only))
    return found


def _memory_folder() -> str | None:
    """Return a folder in memory where there is one: the files are tiny, and many."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def report(tally: Tally, seed: int, cases: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Print what was found; return it with the versions that it holds for."""
    for failure in tally.failures[:20]:
        print(f"case {failure['case']} ({failure['target']}): {failure['why']}")
        print(f"  python benchmarks/fuzz.py --seed {seed} --only {failure['case']}")
    slow, large = tally.slowest, tally.largest
    print(f"{cases} cases, {len(tally.failures)} failures; failing inputs are kept in {folder}")
    for outcome, count in sorted(tally.outcomes.items()):
        print(f"  {count:7d}  {outcome}")
    print(f"slowest: case {slow[1]} ({slow[2]}), {slow[0]:.2f} CPU s")
    print(f"largest: case {large[1]} ({large[2]}), {large[0] / MIB:.0f} MiB more than before")
    print(f"refused by us and accepted by safetensors: {sum(tally.only_safetensors.values())}")
    packages = ("morph-hybrid", "safetensors", "numpy", "PyYAML")
    return {
        "seed": seed,
        "cases": cases,
        "cpu_seconds": round(seconds, 1),
        "versions": {n: version(n) for n in packages} | {"python": platform.python_version()},
        **tally.dump(),
        "refusals": dict(tally.refusals.most_common(100)),
    }


def main() -> int:
    """Run the cases that are asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run one case, in this process")
    parser.add_argument(
        "--targets", default="", help="some of them, such as shard,index (see _readers.py)"
    )
    parser.add_argument("--folder", type=Path, default=FOUND)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    only = [name for name in given.targets.split(",") if name]
    tally = Tally()
    if given.only is not None:
        with tempfile.TemporaryDirectory() as root:
            tally = run([given.only], given.seed, Path(root), only=only, keep=given.folder)
        return 6 if report(tally, given.seed, 1, 0.0, given.folder)["failures"] else 0
    given.folder.mkdir(parents=True, exist_ok=True)
    stop = given.start + given.cases
    for first in range(given.start, stop, BATCH):
        numbers = range(first, min(stop, first + BATCH))
        tally.add(apart(numbers, given.seed, given.folder, only))
        print(f"{numbers.stop - given.start} of {given.cases}", file=sys.stderr)
    used = os.times()
    seconds = used.user + used.system + used.children_user + used.children_system
    found = report(tally, given.seed, given.cases, seconds, given.folder)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 6 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
