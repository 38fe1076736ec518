"""Every error a user can meet, and the exit code the command line gives it.

    MorphError (1: never raised itself)
    ├── UserError (2)             what was asked for cannot be asked
    │   ├── UsageError            a flag or an argument
    │   ├── RecipeError           a recipe or plan file that does not say what it should
    │   ├── UnknownName           a selector, mixer, kernel or family that does not exist
    │   ├── PlanError             scores, budget or plan that contradict themselves or the model
    │   └── OutputExists          the output is there already, is the input, or lies inside it
    ├── InputFileError (3)        a file that was read is not what it must be
    │   ├── CheckpointError       a checkpoint folder, shard, index or config
    │   ├── UnsupportedModel      a valid checkpoint of a kind morph cannot convert
    │   └── DataError             text or task data
    ├── MismatchError (4)         two inputs that do not belong together
    ├── StorageError (5)          no space, no permission, a failing disk
    ├── VerificationFailed (6)    the result was made, compared, and is not what it should be
    ├── Interrupted (7)           stopped on request; the same command goes on from there
    ├── TrainingError (1)         the loss is not finite; the last good state is kept
    └── KernelUnavailable (1)     a fast path was demanded by name and cannot run here

A message says what is wrong (with the value), where, what is allowed or nearest, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MorphError(ValueError):
    """Base of every error morph raises on purpose."""

    exit_code = 1


class UserError(MorphError):
    """What was asked for cannot be asked."""

    exit_code = 2


class UsageError(UserError):
    """A flag or an argument is wrong."""


class RecipeError(UserError):
    """A recipe, plan or option does not say what it should."""


class UnknownName(UserError):
    """A name that no file, and no `package.module:object`, answers to."""


class PlanError(UserError):
    """Scores, a budget or a plan contradict themselves or the model."""


class OutputExists(UserError):
    """The output exists, is the input, or lies inside it."""


class InputFileError(MorphError):
    """A file that was read is not what it must be."""

    exit_code = 3


class CheckpointError(InputFileError):
    """A checkpoint folder, shard, index or config is broken."""


class UnsupportedModel(InputFileError):
    """A valid checkpoint of a kind morph cannot convert."""


class DataError(InputFileError):
    """Text or task data is missing, empty or too short."""


class MismatchError(MorphError):
    """Two inputs do not belong together."""

    exit_code = 4


class StorageError(MorphError):
    """No space, no permission, or a failing disk."""

    exit_code = 5


class VerificationFailed(MorphError):
    """The result was compared with what it should be, and differs."""

    exit_code = 6


class Interrupted(MorphError):
    """Stopped on request; the same command resumes."""

    exit_code = 7


class TrainingError(MorphError):
    """Training cannot go on, for example because the loss is not finite."""


class KernelUnavailable(MorphError):
    """A fast path was demanded by name and cannot run here."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return a hint such as ` Did you mean 'fisher'?`, or an empty string when nothing is near."""
    found = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def escape(text: object, limit: int = 200) -> str:
    """Return `text` with control characters made visible: names cannot drive a terminal."""
    out = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return out if len(out) <= limit else out[:limit] + "…"
