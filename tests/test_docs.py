"""Every block of every documentation page runs, and what a page shows is what comes out.

```console          `$ morph ...` lines run in this process; every output line that is shown must
                    appear, numbers aside; `...` stands for anything. `exit=2`: that exit code.
```python           runs; a ```text block right after it shows what it prints
```yaml             is a recipe that loads; `file=NAME` also writes it (python blocks too)
```sh               anything but morph: only its syntax is checked
<!-- needs: ... --> what the page starts with, besides the folder model/ and the file text.txt
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from morph import _flags, cli
from morph.recipes import schema

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted((REPO / "docs").glob("*.md"))
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```([a-z]*)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NEEDS = {
    "hybrid": "convert model hybrid --selector uniform --budget 1/4 --set mixer.window=64",
    "decayed": "convert model decayed --selector uniform --budget 1/4 --mixer decay",
}
COPIED = {"recalls": REPO / "examples" / "checkpoint"}  # a model that can answer questions
FOREIGN_FLAGS = {"--model-impl"}  # vllm's
FOREIGN_FLAGS |= {"--standalone", "--nproc", "--config", "--machine"}  # torchrun's, accelerate's


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, the words after it, its text, and the line it starts on."""

    language: str
    words: dict[str, str]
    text: str
    line: int


@dataclass
class Page:
    """A page being run: what its python blocks share, and what the last one printed."""

    name: str
    playground: Playground
    namespace: dict[str, object] = field(default_factory=lambda: {"__name__": "page"})
    printed: str | None = None


class Playground:
    """What pages start with, each made once in a folder of its own; pages get copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.told: dict[str, str] = {}
        runpy.run_path(str(REPO / "examples" / "tiny_model.py"))["main"](root)

    def copy(self, name: str, folder: Path) -> str:
        """Copy a thing into a folder, made on first use; return what making it printed."""
        if name in NEEDS and name not in self.told:
            with contextlib.chdir(self.root):
                code, self.told[name] = morph(NEEDS[name].split())
            assert code == 0, self.told[name]
        made = COPIED.get(name, self.root / name)
        copy = shutil.copytree if made.is_dir() else shutil.copy
        copy(made, folder / name)
        return self.told.get(name, "")


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        words = dict(word.partition("=")[::2] for word in found[2].split())
        line = text.count("\n", 0, found.start()) + 1
        yield Block(language=found[1], words=words, text=found[3], line=line)


def morph(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and all it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main(arguments)
        except SystemExit as done:
            code = done.code
    return int(code or 0), out.getvalue()


def commands(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (words of a command, lines of output that the page shows)."""
    shown: list[str] | None = None
    words: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            if shown is not None:
                yield words, shown
            words, shown = shlex.split(line[2:], comments=True), []
        else:
            assert shown is not None, f"output before any command: {line}"
            shown.append(line)
    assert shown is not None, "a console block without a command"
    yield words, shown


def folded(line: str) -> str:
    """Return a line without what changes from run to run: numbers, bars, blanks."""
    line = re.sub(r"[-+−]?\d[\d,.]*(e[-+]?\d+)?%?", "#", line.replace("█", " "))
    return " ".join(line.split())


def check_shown(shown: list[str], real: str) -> None:
    there = [folded(line) for line in real.splitlines()]
    for line in shown:
        parts = [re.escape(folded(part)) for part in line.split("...")]
        pattern = re.compile(r"\s*.*\s*".join(parts))
        if line.strip() and not any(pattern.fullmatch(one) for one in there):
            raise AssertionError(f"the page shows\n  {line}\nbut this came out:\n{real}")


def run_console(page: Page, block: Block) -> None:
    for words, shown in commands(block.text):
        assert words[0] == "morph", f"{words[0]}: put it into a ```sh block"
        made = next((n for n, line in NEEDS.items() if line.split() == words[1:]), None)
        if made and not Path(made).exists():  # the same command has the same result
            code, real = 0, page.playground.copy(made, Path())
        else:
            code, real = morph(words[1:])
        wanted = int(block.words.get("exit", 0))
        assert code == wanted, f"{shlex.join(words)}: exit {code}, not {wanted}\n{real}"
        check_shown(shown, real)


def run_python(page: Page, block: Block) -> None:
    if name := block.words.get("file"):
        compile(block.text, name, "exec")
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(block.text, encoding="utf-8")
        return
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, f"{page.name}:{block.line}", "exec"), page.namespace)
    page.printed = out.getvalue()


def run_text(page: Page, block: Block) -> None:
    if page.printed is not None:
        check_shown(block.text.splitlines(), page.printed)


def run_yaml(page: Page, block: Block) -> None:
    schema.load_text(block.text, page.name)
    if name := block.words.get("file"):
        Path(name).write_text(block.text, encoding="utf-8")


def run_sh(page: Page, block: Block) -> None:
    assert not re.search(r"^morph ", block.text, flags=re.MULTILINE), "use a ```console block"
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUN: dict[str, Callable[[Page, Block], None]] = {
    "console": run_console,
    "python": run_python,
    "text": run_text,
    "yaml": run_yaml,
    "sh": run_sh,
}


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}.items():
            patch.setenv(key, value)
        yield Playground(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("name", TEXT)
def test_page_runs(name, playground, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = re.findall(r"<!-- needs: (.*?) -->", TEXT[name])
    found = list(blocks(TEXT[name]))
    if any(block.language in ("console", "python") for block in found):
        for thing in ["model", "text.txt", *" ".join(asked).split()]:
            playground.copy(thing, tmp_path)
    page, before = Page(name, playground), set(sys.modules)
    try:
        for block in found:
            if block.language != "text":
                page.printed = None
            assert block.language in RUN, f"{name}, line {block.line}: {block.language!r}"
            try:
                RUN[block.language](page, block)
            except Exception as error:
                raise AssertionError(f"{name}, line {block.line}: {error}") from error
    finally:
        for module in set(sys.modules) - before:  # what the page itself wrote and imported
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[module]


def test_every_page_is_on_the_map_and_short():
    for name, text in TEXT.items():
        assert name == "index.md" or f"]({name})" in TEXT["index.md"], f"{name} is not on the map"
        assert text.count("\n") <= 130, f"{name} is too long"


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT[name]):
        if "://" not in target:
            assert (REPO / "docs" / target).exists(), f"{name}: {target}"


def test_every_command_has_a_page():
    parser = _flags.parser(cli.app)
    text = TEXT["index.md"]
    for command in parser.commands:
        assert f"`morph {command}`" in text, f"index.md does not name morph {command}"


def test_every_flag_that_is_named_exists():
    parser = _flags.parser(cli.app)
    known = {opt for c in (parser, *parser.commands.values()) for p in c.params for opt in p.opts}
    known |= {"--help", *FOREIGN_FLAGS}
    for name, text in TEXT.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", text)))
        assert named <= known, f"{name}: {sorted(named - known)}"


def test_the_recipe_in_the_readme_is_valid():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert schema.load_text(block, "README.md").mixer.options == {"window": 64}
