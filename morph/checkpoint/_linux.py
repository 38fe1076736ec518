"""Three system calls of Linux that Python has no name for; elsewhere they say that they cannot."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
from pathlib import Path
from typing import Any

_FICLONE = 0x40049409
_CANNOT = (
    *(errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM),
    *(errno.EACCES, errno.ETXTBSY, errno.EBADF),
)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (renameat2); False where the system cannot."""
    call = _function("renameat2")
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and not call(here, os.fsencode(one), here, os.fsencode(other), swap)


def reserve(fd: int, size: int) -> None:
    """Take the space of a file, which grows to `size`; does nothing where that is not at once.

    os.posix_fallocate would write to every block where the file system cannot.
    """
    call = _function("fallocate64") or _function("fallocate")
    if call is None or size == 0:
        return
    wide = ctypes.c_int64
    while call(fd, 0, wide(0), wide(size)):
        code = ctypes.get_errno()
        if code in _CANNOT:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def clone(fd: int, target: int) -> bool:
    """Let an empty file share all blocks of another (FICLONE); False where it cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, fd)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


@functools.cache
def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name, None)
    except (OSError, TypeError):
        return None
