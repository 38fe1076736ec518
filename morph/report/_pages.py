"""A page as a list of blocks, and the two ways it is written: HTML and Markdown.

Blocks hold plain text; whoever writes them escapes it, so no name can become markup.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from morph.errors import StorageError, escape


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A section title."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table; the first column names its row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Code:
    """Commands or code to copy, with the words that stand before it."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG with the words for those who cannot see it; `name` is its file beside the page."""

    name: str
    alt: str
    png: bytes


Block = Heading | Paragraph | Bullets | Grid | Code | Picture

# Nothing may be loaded from anywhere, whatever a name contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --page: #fff; --line: #d8d8d8; --soft: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --page: #17191c; --line: #3a3e44; --soft: #22262b; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 52rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .9rem; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td, th { white-space: nowrap; }
table.facts td + td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--ink); }
tr.sub td { color: color-mix(in srgb, var(--ink) 70%, var(--page)); border-bottom-style: dotted; }
pre { padding: .7rem .9rem; background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px; white-space: pre-wrap; font-size: .85rem; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px;
  box-sizing: border-box; }
""".strip()


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return one self-contained HTML page."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        f"<h1>{_safe(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the same page as Markdown; pictures are the files beside it."""
    return "\n\n".join([f"# {_mark(title)}", *map(_markdown, blocks)]) + "\n"


def write_page(out_dir: str | Path, stem: str, title: str, blocks: Sequence[Block]) -> list[Path]:
    """Write the page as `stem`.html and `stem`.md with its pictures; return the paths.

    Raises StorageError where nothing can be written.
    """
    files = {f"{stem}.html": to_html(title, blocks), f"{stem}.md": to_markdown(title, blocks)}
    written = {name: text.encode() for name, text in files.items()}
    written |= {b.name: b.png for b in blocks if isinstance(b, Picture)}
    return [_write(Path(out_dir) / name, data) for name, data in written.items()]


def _write(path: Path, data: bytes) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(
            f"{escape(path)}: cannot write the report ({error.strerror}); choose another folder."
        ) from error
    return path


def _safe(text: str) -> str:
    return html.escape(escape(text, limit=2000), quote=True)


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{_safe(block.text)}</h2>"
        case Paragraph():
            return f"<p>{_safe(block.text)}</p>"
        case Bullets():
            return "<ul>" + "".join(f"<li>{_safe(x)}</li>" for x in block.items) + "</ul>"
        case Grid():
            return _html_table(block)
        case Code():
            lines = "\n".join(map(_safe, block.text.splitlines()))
            return f"<p>{_safe(block.title)}:</p>\n<pre><code>{lines}</code></pre>"
        case Picture():
            data = base64.b64encode(block.png).decode()
            alt = _safe(block.alt)
            return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'


def _html_table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{_safe(c)}</th>' for c in grid.head)
    lines = []
    for row in grid.rows:
        kind = ' class="sub"' if row[0].startswith("  ") else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{_safe(c)}</td>" for c in row) + "</tr>")
    kind = ' class="facts"' if len(grid.head) == 2 else ""
    top = f"<thead><tr>{head}</tr></thead>" if any(grid.head) else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table{kind}>{top}<tbody>\n{body}\n</tbody></table></div>'


def _mark(text: str) -> str:
    text = escape(text, limit=2000).strip().replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", text)
    # A bare address would become a link.
    return re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1\\\2", text)


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"## {_mark(block.text)}"
        case Paragraph():
            return _mark(block.text)
        case Bullets():
            return "\n".join(f"- {_mark(x)}" for x in block.items)
        case Grid():
            right = "---:" if len(block.head) > 2 else "---"
            rows = [block.head, ["---", *[right] * (len(block.head) - 1)], *block.rows]
            lines = [[c if n == 1 else _mark(c) for c in row] for n, row in enumerate(rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Code():
            text = "\n".join(escape(line, limit=2000) for line in block.text.splitlines())
            longest = max([2, *(len(run) for run in re.findall("`+", text))])
            fence = "`" * (longest + 1)
            return f"{_mark(block.title)}:\n\n{fence}\n{text}\n{fence}"
        case Picture():
            return f"![{_mark(block.alt)}]({block.name})"
