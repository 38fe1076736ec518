"""Read torch pickles where they can do no harm. Run as a script; imports nothing of morph.

A line of JSON in, the job; lines of JSON out. Torch is imported first; then the process closes its
doors (see `_sandbox`); then it looks at the files, which came as open descriptors. It never loads
with anything but `weights_only=True`. `layout` tells where in the file each tensor lies, and reads
no weights at all; `hashes` loads the tensors as torch does, and tells the sha256 of their bytes.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib.util
import io
import json
import mmap
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK = 16 * 2**20
# What a training script puts its weights under, beside other things
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
DEPTH = 8  # of nested containers that are searched for tensors


def main() -> None:
    """Do the job on standard input."""
    job = json.loads(sys.stdin.readline())
    sys.path.extend(path for path in job["paths"] if path not in sys.path)
    warnings.simplefilter("ignore")
    files = [Opened(file["fd"], file["bytes"]) for file in job["files"]]
    again = job["what"] == "hashes"
    warm_up()
    paths = [f"/proc/self/fd/{file['fd']}" for file in job["files"] if again and file["zip"]]
    spec = importlib.util.spec_from_file_location(
        "_sandbox", Path(__file__).with_name("_sandbox.py")
    )
    sandbox = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(sandbox)  # type: ignore[union-attr]
    say(ready=sandbox.close(megabytes=job["megabytes"], seconds=job["seconds"], readable=paths))
    for number, (opened, file) in enumerate(zip(files, job["files"])):
        say(file=number)
        try:
            for line in (hashes if again else layout)(opened, file):
                say(**line)
        except Exception as error:
            say(**told(error))
            return
    say(done=len(files))


class Opened:
    """An open file that is read without a system call, and knows where it was read to."""

    def __init__(self, fd: int, size: int) -> None:
        self.map, self.at, self.skip = mmap.mmap(fd, size, access=mmap.ACCESS_READ), 0, False
        self.reads: list[tuple[int, int, int]] = []  # address in memory, bytes, place in the file

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes."""
        stop = len(self.map) if count < 0 else self.at + count
        found = self.map[self.at : stop]
        self.at += len(found)
        return found

    def readline(self) -> bytes:
        """Return the bytes up to the next line feed, or to the end."""
        end = self.map.find(b"\n", self.at)
        return self.read(end + 1 - self.at if end >= 0 else -1)

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer, and note where it lies; with `skip`, large ones are left as they are."""
        import numpy as np

        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self.map) - self.at)
        if count:
            address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
            self.reads.append((address, count, self.at))
        if not self.skip or count <= 16:  # the lengths that stand before the data are needed
            view[:count] = self.map[self.at : self.at + count]
        self.at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self.at = offset + (0, self.at, len(self.map))[whence]
        return self.at

    def tell(self) -> int:
        """Return the place that is read next."""
        return self.at


def warm_up() -> None:
    """Load both formats once, so that all that is imported late is imported now."""
    import torch

    torch.set_num_threads(1)
    weights = {"a": torch.nn.Parameter(torch.zeros(2, 2)), "b": torch.zeros(2).to(torch.bfloat16)}
    for new in (True, False):
        file = io.BytesIO()
        torch.save(weights, file, _use_new_zipfile_serialization=new)
        for place in ("meta", "cpu") if new else ("cpu",):
            file.seek(0)
            found = torch.load(file, map_location=place, weights_only=True)
            line = describe(found["a"], [])
            json.dumps([line, why_not(found["b"])])
        hashlib.sha256(as_bytes(found["b"])).hexdigest()


def layout(opened: Opened, file: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tell every entry of a file: tensors with their place, and what else there is."""
    import torch

    opened.skip = not file["zip"]
    place = "meta" if file["zip"] else "cpu"  # meta holds no data; in the old format it is not read
    loaded = torch.load(opened, map_location=place, weights_only=True)  # type: ignore[arg-type]
    root, left = unwrap(loaded)
    for name, value in left:
        yield {"beside": text(name), **other(value)}
    if not isinstance(root, dict):
        yield {"none": type(root).__name__}
        return
    opened.reads.sort()
    for key, value in root.items():
        if isinstance(value, torch.Tensor) and isinstance(key, str):
            reason = why_not(value)
            yield {"name": key, **({"not": reason} if reason else describe(value, opened.reads))}
        else:
            yield {"entry": text(key), **other(value)}


def hashes(opened: Opened, file: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tell the sha256 of the tensors that are asked for, as torch itself loads them."""
    import torch

    path: Any = f"/proc/self/fd/{file['fd']}" if file["zip"] else opened
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=file["zip"])
    root, _ = unwrap(loaded)
    for name in file["tensors"]:
        tensor = root[name].detach()
        digest = hashlib.sha256()
        data = as_bytes(tensor)
        for at in range(0, len(data), BLOCK):
            digest.update(data[at : at + BLOCK])
        dtype, shape = str(tensor.dtype), list(tensor.shape)
        yield {"name": name, "dtype": dtype, "shape": shape, "sha256": digest.hexdigest()}


def unwrap(loaded: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return the mapping of names to tensors, and the entries beside it.

    A mapping without tensors of its own, of which exactly one entry has a name that training
    scripts give to weights, stands for that entry; so at most twice.
    """
    import torch

    left: list[tuple[Any, Any]] = []
    for _ in range(2):
        if not isinstance(loaded, dict) or any(
            isinstance(v, torch.Tensor) for v in loaded.values()
        ):
            break
        names = [n for n in WRAPPERS if isinstance(loaded.get(n), dict)]
        if len(names) != 1:
            break
        left += [(key, value) for key, value in loaded.items() if key != names[0]]
        loaded = loaded[names[0]]
    return loaded, left


def other(value: Any) -> dict[str, Any]:
    """Tell what is no named tensor: its type, and how many tensors it holds."""
    return {"type": type(value).__name__, "tensors": count(value, set(), DEPTH)}


def count(value: Any, seen: set[int], depth: int) -> int:
    """Return the number of tensors in a value; containers that hold themselves count once."""
    import torch

    if isinstance(value, torch.Tensor):
        return 1
    if not isinstance(value, (dict, list, tuple, set)) or id(value) in seen or not depth:
        return 0
    seen.add(id(value))
    inner = value.values() if isinstance(value, dict) else value
    return sum(count(one, seen, depth - 1) for one in inner)


def why_not(tensor: Any) -> str:
    """Return why a tensor is no plain block of numbers, or an empty string."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised by torch"
    if tensor.is_conj() or tensor.is_neg():
        return "conjugated or negated, but only by a flag"
    return ""


def describe(tensor: Any, reads: list[tuple[int, int, int]]) -> dict[str, Any]:
    """Tell dtype, shape, strides, and where in the file the storage lies: place and bytes."""
    storage = tensor.untyped_storage()
    place = getattr(storage, "_checkpoint_offset", None)
    if place is None and not tensor.is_meta and reads:
        start = storage.data_ptr()
        low, size, at = reads[max(0, bisect.bisect(reads, start, key=lambda read: read[0]) - 1)]
        place = at + start - low if low <= start < low + size else None
    return {
        "dtype": str(tensor.dtype),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "place": place,
        "held": storage.nbytes(),
    }


def as_bytes(tensor: Any) -> memoryview:
    """Return the bytes of a tensor in the order of its elements."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()).cast("B")


def told(error: Exception) -> dict[str, Any]:
    """Tell an error: what was asked for that is no tensor, too little memory, or broken."""
    words = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in words:
        return {"error": "memory", "text": ""}
    if "quantized" in words and not isinstance(error, pickle.UnpicklingError):
        return {"error": "quantised", "text": ""}
    wanted = re.search(r"GLOBAL (\S+)", words)
    if wanted and isinstance(error, pickle.UnpicklingError):
        return {"error": "global", "text": wanted[1]}
    words = words.rpartition("WeightsUnpickler error:")[2].strip() or words
    first = (words.splitlines() or [""])[0]
    return {"error": "broken", "text": f"{type(error).__name__}: {first}"[:400]}


def text(key: Any) -> str:
    """Return a key that need not be text, so that it can be shown."""
    return key if isinstance(key, str) else repr(key)[:100]


def say(**line: Any) -> None:
    """Write one line."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
