"""Experiment trackers, asked for by name, that are told what the local log holds."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morph.errors import UsageError, escape

PROJECT = "morph"
Tell = Callable[[Mapping[str, Any]], None]


class Trackers:
    """The trackers of one run: call it with every record of the log, close it at the end.

    Also a context manager. A tracker that fails is closed and left out with a note: the local log
    has everything, and a network that is gone is no reason to stop training.
    """

    def __init__(self, opened: Mapping[str, Any], note: Callable[[str], None]) -> None:
        self._opened, self._note, self._count = dict(opened), note, 0

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Tell the numbers of a record; its tokens are the step, so a resumed run goes on."""
        self._count += 1
        if not self._opened:
            return
        values, tokens = flat(record), record.get("tokens")
        step = tokens if isinstance(tokens, int) else self._count
        for name, tracker in list(self._opened.items()):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # foreign code, which raises what it likes
                del self._opened[name]
                self._say(name, "is left out from here on", error)
                self._finish(name, tracker)

    def close(self) -> None:
        """Finish every tracker; a second call does nothing."""
        while self._opened:
            self._finish(*self._opened.popitem())

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, name: str, tracker: Any) -> None:
        try:
            tracker.finish()
        except Exception as error:  # foreign code, which raises what it likes
            self._say(name, "did not close", error)

    def _say(self, name: str, what: str, error: Exception) -> None:
        self._note(f"tracker {name} {what}: {_words(error)}. The local log is complete.")


def open_trackers(
    names: Sequence[str],
    out: Path,
    accelerator: Any,
    config: Mapping[str, Any],
    note: Callable[[str], None] = lambda text: None,
) -> Trackers:
    """Start the trackers of accelerate that are named, on the main process only.

    tensorboard writes under `out/tensorboard`; wandb keeps its files under `out` and follows
    WANDB_MODE and its other variables. `config` is what the run is. Raises UsageError for a tracker
    that is not installed, on every process, or does not start.
    """
    for name in names:
        if not _installed(name):
            raise UsageError(
                f"training.trackers: {escape(name, 40)} is not installed. "
                f"`pip install {escape(name, 40)}`, or leave it out; the local log is always "
                "written."
            )
    opened: dict[str, Any] = {}
    for name in dict.fromkeys(names) if accelerator.is_main_process else ():
        try:
            opened[name] = _start(name, Path(out), flat_config(config))
        except Exception as error:  # foreign code, which raises what it likes
            Trackers(opened, note).close()
            online = name == "wandb" and "WANDB_MODE" not in os.environ
            hint = " WANDB_MODE=offline needs no account and no network." * online
            raise UsageError(
                f"training.trackers: {name} does not start: {_words(error)}.{hint}"
            ) from error
    return Trackers(opened, note)


def _installed(name: str) -> bool:
    # A folder `wandb` of old runs in the working directory is found too, but has no file.
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def _start(name: str, out: Path, config: dict[str, Any]) -> Any:
    from accelerate import tracking

    out.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker("tensorboard", logging_dir=str(out))
    elif name == "wandb":
        tracker = tracking.WandBTracker(PROJECT, dir=str(out))
    else:
        tracker = tracking.TrackioTracker(PROJECT)
    tracker.start()
    tracker.store_init_configuration(config)
    return tracker


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record: `layers/3`, `gates/A_log/p50` and so on."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if key == "gates" and isinstance(value, Mapping):
            for group, points in value.items():
                found |= {f"gates/{group}/{p}": x for p, x in zip(_POINTS, points)}
        elif isinstance(value, Mapping):
            found |= {f"{key}/{k}": x for k, x in value.items()}
        else:
            found[key] = value
    return {name: float(x) for name, x in found.items() if _is_finite(x)}


_POINTS = ("min", "p10", "p25", "p50", "p75", "p90", "max")


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of numbers and text: `distill.0.lr`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat_config(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(x, Mapping) for x in value):
            found |= flat_config({str(i): x for i, x in enumerate(value)}, f"{name}.")
        else:
            found[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def _is_finite(value: Any) -> bool:
    # `bool` counts as a number: needle batches are 1 and text is nothing.
    return isinstance(value, (int, float)) and abs(value) < 1e300 and math.isfinite(value)


def _words(error: Exception) -> str:
    return escape(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
