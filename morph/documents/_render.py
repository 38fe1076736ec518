"""Render conversations with a chat template, without files, network or processes. Run as a script.

A line of JSON in, a line of JSON out: first the job, then a conversation a line. Imports nothing
of morph. The template is run by the sandbox of transformers; what would get out of that finds that
this process can open nothing; see `_sandbox`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import math
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Uses what jinja imports only when it is needed
WARM_UP = "{% for m in messages %}{{ m | tojson | wordwrap | pprint }}{{ lipsum(1) }}{% endfor %}"


class Fixed(datetime.datetime):
    """A clock that stands still: the same chats are the same text on any day."""

    @classmethod
    def now(cls, tz: Any = None) -> Fixed:
        """Return the first of January 2025."""
        return cls(2025, 1, 1, tzinfo=tz)


def main() -> None:
    """Do the jobs on standard input."""
    job = json.loads(sys.stdin.readline())
    sys.path.extend(path for path in job["paths"] if path not in sys.path)
    try:
        render = renderer(job["template"], job["special"])
    except Exception as error:
        say({"error": f"cannot be run: {type(error).__name__}: {error}"})
        return
    give_up(job["megabytes"])
    say({"text": ""})
    for line in sys.stdin:
        one = json.loads(line)
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used) + job["seconds"], hard))
        say(answer(render, one, job["megabytes"]))


def answer(render: Callable[[Any], str], one: dict[str, Any], megabytes: int) -> dict[str, str]:
    """Return the text of a conversation, or what went wrong."""
    random.seed(0)  # jinja has a filter that draws
    try:
        text = render(one["messages"])
    except MemoryError:
        return {"error": f"needs more than {megabytes} MB of memory"}
    except Exception as error:
        return {"error": f"raised {type(error).__name__}: {error}"}
    if len(text) > one["longest"]:
        return {"error": f"gives {len(text)} characters, at most {one['longest']} are allowed"}
    return {"text": text}


def renderer(template: str, special: dict[str, str]) -> Callable[[Any], str]:
    """Return the function that renders messages, with all that it needs imported."""
    import jinja2.constants
    import jinja2.debug  # noqa: F401
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = Fixed  # type: ignore[attr-defined]

    def render(source: str, messages: Any) -> str:
        # It returns (texts, spans), whatever its annotation says
        found, _ = chat_template_utils.render_jinja_template(  # type: ignore[str-unpack]
            conversations=[messages],
            chat_template=source,
            **special,  # type: ignore[arg-type]
        )
        return found[0]

    render(WARM_UP, [{"role": "user", "content": "a"}])
    with contextlib.suppress(Exception):
        render("{{ raise_exception('a') }}", [])
    return lambda messages: render(template, messages)


def give_up(megabytes: int) -> None:
    """Leave this process with what it has: more memory within bounds, and nothing else."""
    place = Path(__file__).resolve().parents[1] / "_sandbox.py"
    spec = importlib.util.spec_from_file_location("_sandbox", place)
    sandbox = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(sandbox)  # type: ignore[union-attr]
    sandbox.close(megabytes=megabytes)


def say(told: dict[str, str]) -> None:
    """Write one line."""
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
