"""The process that reads pickles, seen from outside: nothing that it says is believed unchecked.

It tells where in a file each tensor lies; the bytes are then copied from the file, and never come
from that process. See `morph._unpickle`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from morph import _sandbox
from morph.checkpoint._format import BITS, MAX_NAME, MIB, TORCH_NAMES
from morph.errors import CheckpointError, escape
from morph.pipeline._torch_files import TorchFile

SCRIPT = Path(_sandbox.__file__).with_name("_unpickle.py")
START_SECONDS = 180  # for importing torch, on a busy machine
CPU_SECONDS = 300  # for pickles; weights are given a second per 20 MB beside
LAYOUT_MEGABYTES = 1024  # of Python objects: many times what a checkpoint needs
MAX_LINE = MIB
EXPANDED = 16 * MIB  # bytes that a tensor may have beyond those it is stored in
DTYPES = TORCH_NAMES | {
    **{"uint16": "U16", "uint32": "U32", "uint64": "U64", "complex64": "C64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}
_UNTOUCHED = "Nothing of it was run, and nothing was written."


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a file: safetensors dtype, shape, strides in elements, place of the first one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.width

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return BITS[self.dtype] // 8

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow each other in the file."""
        at = 1
        for size, stride in reversed(list(zip(self.shape, self.stride))):
            if size != 1 and stride != at:
                return self.nbytes == 0
            at *= size
        return True


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a pickle holds: its tensors, entries that are none, and what lay beside the weights."""

    tensors: tuple[Stored, ...]
    others: Mapping[str, str]
    beside: tuple[str, ...]


class Reader:
    """A process that reads files of torch.save; `protections` are those in force in it."""

    def __init__(
        self,
        what: str,
        files: Sequence[TorchFile],
        *,
        megabytes: int,
        seconds: int,
        tensors: Sequence[Sequence[str]] = (),
    ) -> None:
        self.files, self.seconds, self.buffer = files, seconds, b""
        self.patience = CPU_SECONDS + sum(f.nbytes for f in files) / 10**7
        self.process = _sandbox.start(SCRIPT, [file.fd for file in files])
        wanted = tensors or [()] * len(files)
        told = [
            {"fd": f.fd, "bytes": f.nbytes, "zip": f.zip, "tensors": list(names)}
            for f, names in zip(files, wanted, strict=True)
        ]
        job = {
            "paths": [os.path.abspath(path) for path in sys.path if path],
            "what": what,
            "files": told,
            "megabytes": megabytes,
            "seconds": seconds,
        }
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(job).encode() + b"\n")  # type: ignore[union-attr]
                self.process.stdin.flush()  # type: ignore[union-attr]
            ready = self._line(START_SECONDS, files[0])
            self.protections = tuple(map(str, _field(ready, "ready", list, files[0])))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def lines(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield (number of the file, what is told of it); raise CheckpointError for errors."""
        number = 0
        while True:
            line = self._line(self.patience, self.files[number])
            if "done" in line:
                return
            if "file" in line:
                number = _field(line, "file", int, self.files[number])
                if not 0 <= number < len(self.files):
                    raise _odd(self.files[0])
                continue
            if "error" in line:
                raise self._error(line, self.files[number])
            yield number, line

    def _line(self, seconds: float, file: TorchFile) -> Mapping[str, Any]:
        out = self.process.stdout.fileno()  # type: ignore[union-attr]
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([out], [], [], seconds)
            if not ready:
                raise CheckpointError(
                    f"{escape(file.path)}: the process that read it said nothing for {seconds:.0f} "
                    f"s and was stopped. {_UNTOUCHED}"
                )
            block = os.read(out, 65536)
            if not block or len(self.buffer) > MAX_LINE:
                raise self._ended(file)
            self.buffer += block
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise _odd(file) from None
        if not isinstance(found, dict):
            raise _odd(file)
        return found

    def _ended(self, file: TorchFile) -> CheckpointError:
        why = _sandbox.ending(self.process, self.seconds)
        hint = " Was the machine out of memory?" if "SIGKILL" in why else ""
        return CheckpointError(
            f"{escape(file.path)}: the process that read it {why}.{hint} The file may be damaged "
            "or hostile. Nothing was written."
        )

    def _error(self, line: Mapping[str, Any], file: TorchFile) -> CheckpointError:
        kind, text = str(line["error"]), escape(line.get("text"), 300)
        shown = escape(file.path)
        if kind == "global":
            return CheckpointError(
                f"{shown}: its pickle asks for {text}, which plain weights do not need. "
                f"{_UNTOUCHED} Ask the publisher for safetensors, or, if you trust the file, load "
                "it yourself where nothing can be lost, and save its state dict as safetensors."
            )
        if kind == "memory":
            return CheckpointError(
                f"{shown} needs more memory than its size explains, or than there is. {_UNTOUCHED}"
            )
        if kind == "quantised":
            return CheckpointError(
                f"{shown} holds tensors quantised by torch, which safetensors cannot hold. "
                "Dequantise them first. Nothing was written."
            )
        return CheckpointError(
            f"{shown} cannot be read as weights ({text}). {_UNTOUCHED} Is the download complete?"
        )


def _odd(file: TorchFile) -> CheckpointError:
    return CheckpointError(
        f"{escape(file.path)}: the process that read it said what it never should. The file may be "
        "hostile. Nothing was written."
    )


def _field(line: Mapping[str, Any], key: str, kind: type, file: TorchFile) -> Any:
    value = line.get(key)
    if type(value) is not kind:
        raise _odd(file)
    return value


def layouts(files: Sequence[TorchFile]) -> tuple[list[Layout], tuple[str, ...]]:
    """Return what each file holds, and the protections under which it was read.

    Raises CheckpointError where a pickle asks for more than tensors, and for what safetensors
    cannot hold: tensors that are sparse, quantised, nested or without data, and nested mappings.
    """
    old = max((f.nbytes for f in files if not f.zip), default=0)  # addresses, not memory
    megabytes = LAYOUT_MEGABYTES + old // MIB * 5 // 4
    tensors: list[dict[str, Stored]] = [{} for _ in files]
    others: list[dict[str, str]] = [{} for _ in files]
    beside: list[list[str]] = [[] for _ in files]
    with Reader("layout", files, megabytes=megabytes, seconds=CPU_SECONDS) as reader:
        for number, line in reader.lines():
            file = files[number]
            if "name" in line:
                found = _stored(line, file)
                if found.name in tensors[number]:
                    raise _odd(file)
                tensors[number][found.name] = found
            elif "entry" in line:
                name, what = _other(line, "entry", file)
                if line["tensors"]:
                    raise CheckpointError(
                        f"{escape(file.path)}: entry '{escape(name, 80)}' is no tensor with a "
                        f"name, but {what}: this is no flat state dict. Nothing was written. Save "
                        "the part that holds the weights alone."
                    )
                others[number][name] = what
            elif "beside" in line:
                beside[number].append(": ".join(_other(line, "beside", file)))
            else:
                kind = escape(_field(line, "none", str, file), 60)
                raise CheckpointError(
                    f"{escape(file.path)} holds {_a(kind)}, no tensors by name. Nothing was "
                    "written."
                )
        protections = reader.protections
    made = [
        Layout(tensors=tuple(t.values()), others=o, beside=tuple(b))
        for t, o, b in zip(tensors, others, beside)
    ]
    return made, protections


def _other(line: Mapping[str, Any], key: str, file: TorchFile) -> tuple[str, str]:
    name, kind = _field(line, key, str, file), escape(_field(line, "type", str, file), 60)
    count = _field(line, "tensors", int, file)
    return escape(name, 80), f"{_a(kind)} with {count} tensors" if count else _a(kind)


def _a(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _stored(line: Mapping[str, Any], file: TorchFile) -> Stored:
    """Return a tensor as it was told, after comparing it with the file."""
    name = _field(line, "name", str, file)
    where = f"{escape(file.path)}: tensor '{escape(name, 80)}'"
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(
            f"{where}: the name is empty, too long, reserved or holds control characters."
        )
    if "not" in line:
        reason = escape(_field(line, "not", str, file), 80)
        raise CheckpointError(
            f"{where} is {reason}; safetensors holds plain tensors. Nothing was written."
        )
    dtype = _field(line, "dtype", str, file).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{where} is {escape(dtype, 40)}, which safetensors cannot hold. Nothing was written."
        )
    shape, stride = (_sizes(line, key, file) for key in ("shape", "stride"))
    if len(shape) != len(stride):
        raise _odd(file)
    offset, held = _size(line, "offset", file), _size(line, "held", file)
    width = BITS[DTYPES[dtype]] // 8
    found = Stored(name=name, dtype=DTYPES[dtype], shape=shape, stride=stride, start=0)
    if found.nbytes == 0:
        return found
    if line.get("place") is None:
        raise CheckpointError(
            f"{where}: where its data lie is not known. It has none (a meta tensor), or the "
            "archive was not written by torch.save. Nothing was written."
        )
    place = _size(line, "place", file)
    inside = file.storages.get(place, -1) if file.zip else file.nbytes - place
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if held > inside or (last + 1) * width > held:
        raise CheckpointError(
            f"{where} reaches beyond the data that the file holds. It is damaged, or the archive "
            "was not written by torch.save. Nothing was written."
        )
    if found.nbytes > held + EXPANDED:
        raise CheckpointError(
            f"{where} has {found.nbytes} bytes made of {held} (an expanded tensor). Save it as it "
            "is meant. Nothing was written."
        )
    start = place + offset * width
    return Stored(name=name, dtype=DTYPES[dtype], shape=shape, stride=stride, start=start)


def _size(line: Mapping[str, Any], key: str, file: TorchFile) -> int:
    found = _field(line, key, int, file)
    if not 0 <= found < 2**62:
        raise _odd(file)
    return int(found)


def _sizes(line: Mapping[str, Any], key: str, file: TorchFile) -> tuple[int, ...]:
    found = _field(line, key, list, file)
    if len(found) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in found):
        raise _odd(file)
    return tuple(found)


def hashes(
    files: Sequence[TorchFile], tensors: Sequence[Sequence[Stored]]
) -> Generator[tuple[Stored, str], None, None]:
    """Yield each tensor with the sha256 of its bytes as torch itself loads them from the files."""
    largest = max(file.nbytes for file in files)
    copied = max((t.nbytes for found in tensors for t in found if not t.contiguous), default=0)
    seconds = CPU_SECONDS + sum(file.nbytes for file in files) // (20 * 10**6)
    names = [[t.name for t in found] for found in tensors]
    megabytes = LAYOUT_MEGABYTES + (largest + 2 * copied) // MIB
    expected = ((i, t) for i, found in enumerate(tensors) for t in found)
    with Reader("hashes", files, megabytes=megabytes, seconds=seconds, tensors=names) as reader:
        for number, line in reader.lines():
            wanted, stored = next(expected, (-1, None))
            file = files[number]
            if stored is None or wanted != number or line.get("name") != stored.name:
                raise _odd(file)
            dtype = DTYPES.get(_field(line, "dtype", str, file).removeprefix("torch."))
            if (dtype, _sizes(line, "shape", file)) != (stored.dtype, stored.shape):
                raise _odd(file)
            yield stored, _field(line, "sha256", str, file)
    if next(expected, None) is not None:
        raise _odd(files[-1])
