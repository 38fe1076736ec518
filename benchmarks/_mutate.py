"""Mutations that know what they mutate: bytes, tokens, trees of JSON, headers of safetensors.

Everything is drawn from the `random.Random` that is passed in, so a case can be made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 7, 8, 255, 256, 65535, 65536, 10**9, 2**31 - 1, 2**31, 2**32]
NUMBERS += [2**53 + 1, 2**60, 2**62 + 16, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70]
NUMBERS += [-(2**31), -(2**63)]
SPELLED = """
    1.0 -0 -0.0 1e0 1e3 1E400 -1e999 1e-400 0.1 01 +1 0x10 NaN -NaN Infinity -Infinity 1_000 .5 5.
    true false null [] {} [[]] [{}] True None 'a' "" "1"
""".split()  # noqa: SIM905
SPELLED += ["9" * 400, "9" * 5000]
TEXTS = ["", " ", ".", "..", "../x", "/etc/passwd", "C:\\x", "\\\\host\\x", "a/../../x", "~"]
TEXTS += ["a:b", "\0", "a\0b", "\x1b[2J", "a\nb", "\r", "\u202e", "\u200b", "\ufeff", "\ud800"]
TEXTS += ["\U0001f600", "é", "e\u0301", "[/x]", "[red]", "{0}", "%s", "${HOME}", "$(id)", "`id`"]
TEXTS += ["-", "#", "1", "no", "CON", "x.safetensors", "x.bin", "__metadata__", "n" * 300]
TEXTS += ["n" * 9000, "model.safetensors"]
PARTS = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff"]
PARTS += [b"\n", b"\t", b" ", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"//", b"#", b"-"]
YAML = ["&a ", "*a", "!!python/name:os.system ", "!!int ", "!local ", "!!binary ", "<<: ", "? "]
YAML += ["- ", "|\n", ">\n", "---\n", "...\n", "%YAML 1.2\n", "%TAG ! x\n", "0o17", ".inf"]
YAML += [".nan", "1e3", "no", "12:30:45", "2026-01-02", "0b1", "=", "\t", "\u2028", "\x85", "'"]
YAML += ['"', '"\\x1b"', "@", "[", "]", "{", "}", ": ", "#", "\r\n", "~", "1/4", "2M", "64K"]
YAML += ["-1", "1e999", "9" * 60]
BOMBS = ["[],", "{},", '"",', "1,", "0.1,", "[[]],", '{"a":{}},', "1234567890,", "é,"]
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.\w]+|\s+|.', re.DOTALL)

Tree = Any


class Pairs(list):  # type: ignore[type-arg]
    """The (key, value) pairs of a JSON object, which may name a key twice."""


class Raw(str):
    """Text that is written as it is in place of a JSON value."""


# --- Bytes and tokens ---------------------------------------------------------------------------


def cut(rng: Random, data: bytes) -> tuple[int, int]:
    """Return a random piece of the data, mostly a short one."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(rng.expovariate(1 / 12)))


def mutate_bytes(rng: Random, data: bytes, other: bytes) -> bytes:
    """Flip, insert, drop, repeat or cut bytes, or splice in a piece of another seed."""
    if not data:
        return rng.choice(PARTS)
    start, stop = cut(rng, data)
    at = min(start, len(data) - 1)
    return [
        lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: data[:start] + rng.choice(PARTS) + data[start:],
        lambda: data[:start] + data[stop:],
        lambda: data[:start] + data[start:stop] * rng.randint(2, 4) + data[stop:],
        lambda: data[:start],
        lambda: data[:start] + other[rng.randrange(len(other) + 1) :],
        lambda: data[:start] + b"".join(other[a:b] for a, b in [cut(rng, other)]) + data[stop:],
    ][rng.randrange(8)]()


def mutate_tokens(rng: Random, data: bytes, other: bytes, words: Sequence[str]) -> bytes:
    """Replace, drop, repeat or swap tokens; new ones are `words`, numbers or the other seed's."""
    tokens = _TOKEN.findall(data) or [b""]
    at, to = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    kind = rng.randrange(6)
    if kind == 0:
        del tokens[at]
    elif kind == 1:
        tokens[at] *= 2
    elif kind == 2:
        tokens[at], tokens[to] = tokens[to], tokens[at]
    elif kind == 3:
        tokens[at] = rng.choice(_TOKEN.findall(other) or [b""])
    else:
        word = rng.choice([*words, *SPELLED, str(rng.choice(NUMBERS))])
        tokens[at] = word.encode("utf-8", "surrogatepass")
    return b"".join(tokens)


def mutate_lines(rng: Random, data: bytes, other: bytes) -> bytes:
    """Drop, repeat, swap, indent or exchange lines."""
    lines = data.splitlines(keepends=True) or [b""]
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(to, lines[at])
    elif kind == 2:
        lines[at], lines[to] = lines[to], lines[at]
    elif kind == 3:
        lines[at] = rng.choice([b" ", b"  ", b"\t", b"- "]) + lines[at]
    else:
        lines[at] = rng.choice(other.splitlines(keepends=True) or [b""])
    return b"".join(lines)


# --- Trees of JSON ------------------------------------------------------------------------------


def parse(data: bytes) -> Tree:
    """Return JSON with its objects as `Pairs`."""
    return json.loads(data, object_pairs_hook=Pairs)


def write(tree: Tree, rng: Random | None = None) -> bytes:
    """Return the tree as JSON text, spaced and escaped one way or another."""
    comma, colon = rng.choice([(",", ":"), (", ", ": "), (",\n", ":")]) if rng else (",", ":")
    ascii_only = rng.random() < 0.5 if rng else True

    def key(name: Tree) -> str:  # numbers too: mutated keys are text in the end
        return json.dumps(str(name), ensure_ascii=ascii_only)

    def text(node: Tree) -> str:
        if isinstance(node, Raw):
            return node
        if isinstance(node, Pairs):
            return "{" + comma.join(f"{key(k)}{colon}{text(v)}" for k, v in node) + "}"
        if isinstance(node, list):
            return "[" + comma.join(map(text, node)) + "]"
        return json.dumps(node, ensure_ascii=ascii_only)

    return text(tree).encode("utf-8", "surrogatepass")


def slots(tree: Tree) -> list[tuple[list[Any], int]]:
    """Return where every value below the top lies: its container and its index."""
    found: list[tuple[list[Any], int]] = []
    pending = [tree]
    while pending:
        here = pending.pop()
        if isinstance(here, list):
            found += [(here, i) for i in range(len(here))]
            pending += [v[1] if isinstance(here, Pairs) else v for v in here]
    return found


def get(slot: tuple[list[Any], int]) -> Tree:
    """Return the value at a slot."""
    node = slot[0][slot[1]]
    return node[1] if isinstance(slot[0], Pairs) else node


def put(slot: tuple[list[Any], int], value: Tree) -> None:
    """Replace the value at a slot."""
    where, at = slot
    where[at] = (where[at][0], value) if isinstance(where, Pairs) else value


def another(rng: Random, value: Tree) -> Tree:
    """Return a value near this one, or a remarkable one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.6:
        near = [value + 1, value - 1, value + 4, value - 8, -value, value * 2, value // 2]
        return rng.choice([*near, float(value), str(value)])
    if isinstance(value, str) and value and rng.random() < 0.4:
        start, stop = sorted((rng.randrange(len(value) + 1), rng.randrange(len(value) + 1)))
        return value[:start] + rng.choice([*TEXTS, value]) + value[stop:]
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(NUMBERS)
    return Raw(rng.choice(SPELLED)) if kind == 1 else rng.choice(TEXTS)


def deep(rng: Random, inner: str = "1") -> Raw:
    """Return a value inside many brackets."""
    depth = rng.choice([2, 10, 31, 33, 40, 100, 900, 1100, 20_000])
    if rng.random() < 0.5:
        return Raw("[" * depth + inner + "]" * depth)
    return Raw('{"a":' * depth + inner + "}" * depth)


def keys_of(places: Sequence[tuple[list[Any], int]]) -> list[str]:
    """Return every key of the objects among these places."""
    return [where[at][0] for where, at in places if isinstance(where, Pairs)]


def mutate_tree(rng: Random, tree: Tree, other: Tree) -> Tree:
    """Change one place of the tree in place, and return the tree."""
    places = slots(tree)
    if not places:
        return another(rng, tree)
    slot = rng.choice(places)
    where, at = slot
    kind = rng.randrange(12)
    if kind < 4:
        put(slot, another(rng, get(slot)))
    elif kind == 4:
        del where[at]
    elif kind == 5:  # the same key or item again, equal or not
        where.insert(rng.randrange(len(where) + 1), where[at])
        if rng.random() < 0.5:
            put(slot, another(rng, get(slot)))
    elif kind == 6:  # leaves only: a branch put below itself would never end
        to = rng.choice(places)
        one, two = get(slot), get(to)
        if not isinstance(one, list) and not isinstance(two, list):
            put(slot, two)
            put(to, one)
    elif kind == 7:
        from_other = slots(other)
        put(slot, get(rng.choice(from_other)) if from_other else other)
    elif kind == 8:
        value = get(slot)
        put(slot, rng.choice([[value], Pairs([("a", value)]), [value, value]]))
    elif kind == 9:
        put(slot, deep(rng) if rng.random() < 0.3 else Raw(rng.choice(SPELLED)))
    elif kind == 10 and isinstance(where, Pairs):
        name = rng.choice([another(rng, str(where[at][0])), rng.choice(keys_of(places))])
        where[at] = (name, where[at][1])
    else:
        rng.shuffle(where)
    return tree


def bomb(rng: Random, limit: int) -> Raw:
    """Return a value of up to `limit` bytes that is cheap to write and dear to hold."""
    unit = rng.choice(BOMBS)
    size = int(limit ** rng.uniform(0.7, 1.0)) - 64
    if rng.random() < 0.3:
        count = max(1, size // 12)
        return Raw("{" + ",".join(f'"k{i}":{i % 10}' for i in range(count)) + "}")
    if rng.random() < 0.2:
        return Raw(rng.choice(["[", '{"a":']) * (size // 6))
    return Raw("[" + unit * (size // len(unit.encode())) + "1]")


def mutate_json(rng: Random, seeds: Sequence[bytes], limit: int, bombs: float = 0.0) -> bytes:
    """Return one of the seeds after one to five mutations of any kind."""
    data, other = rng.choice(seeds), rng.choice(seeds)
    times = min(5, 1 + int(rng.expovariate(0.9)))
    if rng.random() < bombs:
        tree = parse(data)
        place = slots(tree)
        if not place:
            return bomb(rng, limit).encode()
        put(rng.choice(place), bomb(rng, limit))
        return write(tree)
    if rng.random() < 0.7:
        tree = parse(data)
        for _ in range(times):
            tree = mutate_tree(rng, tree, parse(other))
        data, times = write(tree, rng), int(rng.random() < 0.2)
    for _ in range(times):
        if rng.random() < 0.5:
            data = mutate_tokens(rng, data, other, [])
        else:
            data = mutate_bytes(rng, data, other)
    return data


def mutate_text(rng: Random, seeds: Sequence[bytes], limit: int, bombs: float = 0.0) -> bytes:
    """Return one of the seeds, YAML or a table, after one to five mutations of any kind."""
    data, other = rng.choice(seeds), rng.choice(seeds)
    if rng.random() < bombs:
        unit = rng.choice(["- a\n", "[", "{a: ", "a: 1\n", "? ", "- - ", "#\n", "&a [*a],", "0\t"])
        return data + unit.encode() * (int(limit ** rng.uniform(0.7, 1.0)) // len(unit))
    for _ in range(min(5, 1 + int(rng.expovariate(0.9)))):
        kind = rng.random()
        if kind < 0.5:
            data = mutate_tokens(rng, data, other, [*YAML, *TEXTS])
        elif kind < 0.75:
            data = mutate_lines(rng, data, other)
        else:
            data = mutate_bytes(rng, data, other)
    return data


# --- safetensors --------------------------------------------------------------------------------


def pack(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file of this header and data."""
    told = len(header) if length is None else length
    return (told % 2**64).to_bytes(8, "little") + header + data


def length_of(info: dict[str, Any]) -> int:
    """Return the bytes that an entry of a header says it has."""
    start, stop = info["data_offsets"]
    return stop - start


def resized(rng: Random, tree: Tree, sizes: dict[str, int]) -> Tree:
    """Say the same bytes otherwise (dtype, shape, order, name), so that a reader may accept it."""
    named = [(k, dict(v)) for k, v in tree if k != "__metadata__"]
    for _ in range(rng.randint(1, 3) if named else 0):
        key, info = rng.choice(named)
        start, stop = info["data_offsets"]
        kind = rng.randrange(5)
        if kind == 0:
            dtype = rng.choice(list(sizes))
            if (stop - start) * 8 % sizes[dtype] == 0:
                info |= {"dtype": dtype, "shape": [(stop - start) * 8 // sizes[dtype]]}
        elif kind == 1:
            shape = info["shape"]
            info["shape"] = rng.choice([[*shape, 1], [1, *shape], shape[::-1]])
        elif kind == 2:  # two tensors of one size change places
            twin = rng.choice([i for _, i in named if length_of(i) == stop - start])
            info["data_offsets"], twin["data_offsets"] = twin["data_offsets"], info["data_offsets"]
        elif kind == 3:
            at, shape = rng.choice([start, stop, 0]), rng.choice([[0], [0, 7], [3, 0]])
            empty = {"dtype": "F32", "shape": shape, "data_offsets": [at, at]}
            named.append((f"empty{len(named)}", empty))
        else:
            at = named.index((key, info))
            named[at] = (rng.choice([key + ".x", "é", rng.choice(TEXTS)]), info)
    rng.shuffle(named)
    table = Pairs((k, Pairs(v.items())) for k, v in named)
    if rng.random() < 0.3:
        table.insert(rng.randrange(len(table) + 1), ("__metadata__", Pairs([("a", "b")])))
    return table


def shifted(rng: Random, tree: Tree) -> Tree:
    """Move the bytes of one tensor, or the border between two, by a little."""
    named = [dict(v) for k, v in tree if k != "__metadata__"]
    if not named:
        return tree
    info = rng.choice(named)
    by = rng.choice([-8, -4, -1, 1, 4, 8, 64])
    start, stop = info["data_offsets"]
    one, two = start + by, stop + by
    moved = [[one, two], [start, two], [one, stop], [stop, start], [start, start]]
    info["data_offsets"] = rng.choice(moved)
    if rng.random() < 0.5:  # and a shape that fits the new length
        info |= {"dtype": "U8", "shape": [length_of(info)]}
    keys = [k for k, _ in tree if k != "__metadata__"]
    return Pairs((k, Pairs(v.items())) for k, v in zip(keys, named))


def mutate_shard(
    rng: Random,
    seeds: Sequence[tuple[bytes, bytes]],
    sizes: dict[str, int],
    limit: int,
    bombs: float = 0.0,
) -> bytes:
    """Return a safetensors file whose header, length, data or bytes are not what they were."""
    header, data = rng.choice(seeds)
    other = rng.choice(seeds)
    kind = rng.random()
    if kind < 0.25:
        header = write(resized(rng, parse(header), sizes), rng)
    elif kind < 0.4:
        header = write(shifted(rng, parse(header)), rng)
    elif kind < 0.8:
        header = mutate_json(rng, [header, other[0]], limit, bombs)
    if rng.random() < 0.15:
        header += rng.choice([b" ", b"\n", b"\0", b"x", b"        ", b"\t"]) * rng.randint(1, 9)
    if rng.random() < 0.15:
        data = rng.choice([data[:-1], data + b"\0", data[:-8], data + data, b"", other[1]])
    length = len(header)
    if rng.random() < 0.08:
        near = [length + by for by in (-9, -8, -2, -1, 1, 2, 8)]
        length = rng.choice([*near, *NUMBERS, length + len(data), length + len(data) + 1])
    found = pack(header, data, length)
    if kind >= 0.8:
        found = mutate_bytes(rng, found, pack(*other))
    return found
