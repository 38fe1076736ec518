"""Chats as text: a tokenizer's chat template is a program, and runs where it can do no harm.

It is run in a child process that has imported all it needs and then gives up files, sockets and
processes, with limits on time, memory and length; see `_render` and `morph._sandbox`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morph import _sandbox
from morph.documents._rows import check_column, kind, text_of
from morph.errors import DataError, escape

START_SECONDS = 120  # for importing transformers, on a busy machine
SHORT = 2**16  # characters that a template may add to any conversation


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one conversation may cost: CPU seconds, MB of memory, seconds in all."""

    seconds: int = 5
    megabytes: int = 256
    wall_seconds: float = 60.0


def messages_of(where: str, place: str, value: Any) -> list[dict[str, str]]:
    """Return the messages of a row: `role` and `content`, both text; other keys are left out.

    Raises DataError, naming the row and the message, where it holds anything else.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind(value)
        raise DataError(
            f"{where}: {place} is {what}; with data.chat it must be a list of messages, each with "
            "role and content"
        )
    messages = []
    for number, message in enumerate(value, 1):
        at = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {at} is {kind(message)}, not an object")
        for key in ("role", "content"):
            if key not in message:
                check_column(where, at, key, message)
        messages.append(
            {k: text_of(where, f"{k} of {at}", message[k]) for k in ("role", "content")}
        )
    return messages


def rendered(
    where: str,
    talks: Iterable[tuple[str, list[dict[str, str]]]],
    tokenizer: Any,
    limits: Limits,
) -> Iterator[str]:
    """Yield the text of each (place in the file, messages)."""
    with Renderer(where, tokenizer, limits) as renderer:
        for place, messages in talks:
            yield renderer.render(place, messages)


class Renderer:
    """A child process that renders one conversation after the other. Raises DataError."""

    def __init__(self, where: str, tokenizer: Any, limits: Limits) -> None:
        self.where, self.limits = where, limits
        try:
            template = tokenizer.get_chat_template()
        except (ValueError, AttributeError):
            raise DataError(
                f"{where}: data.chat needs a chat template, and the model's tokenizer has none. "
                "Take a model that was trained on chats, or give plain text and leave data.chat out"
            ) from None
        self.late = False
        self.process = _sandbox.start(Path(__file__).with_name("_render.py"))
        job = {
            "paths": [path for path in sys.path if path],
            "template": template,
            "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            "seconds": limits.seconds,
            "megabytes": limits.megabytes,
        }
        try:
            self._ask("the chat template", job, START_SECONDS, SHORT)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def render(self, place: str, messages: list[dict[str, str]]) -> str:
        """Return the text of one conversation; `place` names it in errors."""
        told = f"{place}: the chat template"
        longest = SHORT + 16 * sum(len(m["role"]) + len(m["content"]) for m in messages)
        job = {"messages": messages, "longest": longest}
        return text_of(self.where, place, self._ask(told, job, self.limits.wall_seconds, longest))

    def _ask(self, told: str, job: dict[str, Any], seconds: float, longest: int) -> Any:
        watch = threading.Timer(seconds, self._end)
        watch.start()
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            # 12: a character outside the basic plane is written as two escapes
            line = self.process.stdout.readline(12 * longest + 4096)  # type: ignore[union-attr]
        except BrokenPipeError:
            line = b""
        finally:
            watch.cancel()
        if not line.endswith(b"\n"):
            raise DataError(f"{self.where}: {told} {self._why(seconds)}")
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(f"{self.where}: {told} {escape(answer['error'], 400)}")
        return answer["text"]

    def _end(self) -> None:
        self.late = True
        self.process.kill()

    def _why(self, seconds: float) -> str:
        if self.late:
            return f"ran for more than {seconds:g} s and was stopped"
        return _sandbox.ending(self.process, self.limits.seconds)
