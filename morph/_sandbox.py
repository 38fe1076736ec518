"""A process for what is not trusted: it starts with little, and closes its doors before it looks.

The parent calls `start` and `ending`; the script it starts loads this file by its path, so that
nothing of morph is imported there, prepares all it needs, and calls `close`. From then on the
kernel refuses files, sockets, processes, signals and new code pages (Linux: seccomp and Landlock;
elsewhere limits and an audit hook do what they can). Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REFUSED = ("socket.", "open", "os.", "subprocess.", "ctypes.", "shutil.", "import", "pty.")
MIB = 2**20
# Neither tokens nor keys that the user's environment may hold
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "PATH": os.defpath}
_ENVIRONMENT |= {"HOME": "/", "USER": "nobody"}  # so that nobody asks the system who this is
_ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # where the libraries of torch may lie

# System calls by machine; what is not listed is refused. Memory, time, open files, and the end
_CALLS = {
    "x86_64": {
        **{"read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "munmap": 11, "brk": 12},
        **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17},
        **{"readv": 19, "writev": 20, "sched_yield": 24, "mremap": 25, "madvise": 28},
        **{"nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96, "getrusage": 98},
        **{"sysinfo": 99, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202},
        **{"sched_getaffinity": 204, "clock_gettime": 228, "clock_getres": 229},
        **{"clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "set_robust_list": 273},
        **{"getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334},
        **{"mmap": 9, "mprotect": 10, "prlimit64": 302, "openat": 257},
    },
    "aarch64": {
        **{"read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "munmap": 215},
        **{"brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139},
        **{"pread64": 67, "readv": 65, "writev": 66, "sched_yield": 124, "mremap": 216},
        **{"madvise": 233, "nanosleep": 101, "getpid": 172, "exit": 93, "gettimeofday": 169},
        **{"getrusage": 165, "sysinfo": 179, "sigaltstack": 132, "gettid": 178, "futex": 98},
        **{"sched_getaffinity": 123, "clock_gettime": 113, "clock_getres": 114},
        **{"clock_nanosleep": 115, "exit_group": 94, "newfstatat": 79, "set_robust_list": 99},
        **{"getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293},
        **{"mmap": 222, "mprotect": 226, "prlimit64": 261, "openat": 56},
    },
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_LANDLOCK = (444, 445, 446)  # create a ruleset, add a rule, restrict this process
# (argument, bits that it may not have): no memory that can run, no limits of others, no writing
_FORBIDDEN = {"mmap": (2, 0x4), "mprotect": (2, 0x4), "prlimit64": (0, 0xFFFFFFFF)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000


def start(script: Path, pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a script of this package with pipes for its input and output, and nothing else."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={**_ENVIRONMENT, **inherited},
        pass_fds=tuple(pass_fds),
    )


def ending(process: subprocess.Popen[bytes], seconds: int) -> str:
    """End a process that broke off, and say why it did; `seconds` is its limit of CPU time."""
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code == -signal.SIGXCPU:
        return f"took more than {seconds} s of CPU time and was stopped"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ended its process ({name})"


def close(
    *, megabytes: int, seconds: int | None = None, readable: Sequence[str] = ()
) -> tuple[str, ...]:
    """Leave this process with what it has: memory and CPU time within bounds, and nothing else.

    `megabytes` may be added to what is in use; `seconds` of CPU time to what was spent. The paths
    in `readable`, such as `/proc/self/fd/3`, can still be opened for reading. Returns what is in
    force: of `limits`, `seccomp`, `landlock`, `audit`.
    """
    size = _size()
    files = max(map(int, os.listdir("/dev/fd"))) + 9 if readable else 0
    landlock = _landlock(readable)  # before the limits: it needs a descriptor of its own
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * MIB,) * 2)
    _limits(seconds, files)
    seccomp = _seccomp(bool(readable))

    def refuse(event: str, arguments: Any) -> None:
        if event == "open" and arguments[0] in readable and not arguments[2] & _WRITING:
            return
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)
    force = {"limits": True, "seccomp": seccomp, "landlock": landlock, "audit": True}
    return tuple(name for name, done in force.items() if done)


def _size() -> int:
    """Return the bytes of address space in use; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _limits(seconds: int | None, files: int) -> None:
    if seconds is not None:
        spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    for kind in ("RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CORE"):
        resource.setrlimit(getattr(resource, kind), (0, 0))


def _linux() -> str:
    """Return the machine if its system calls are known here, else an empty string."""
    machine = platform.machine() if sys.platform == "linux" else ""
    return machine if machine in _CALLS and struct.calcsize("P") == 8 else ""


def _call(number: int, *arguments: Any) -> int:
    """Make a system call; -1 where the kernel refuses or does not know it."""
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    done: int = ctypes.CDLL(None).syscall(ctypes.c_long(number), *given)
    return done


def _no_new_rights() -> bool:
    done: int = ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return done == 0


def _landlock(readable: Sequence[str]) -> bool:
    """Let the kernel refuse every file but these; False where it cannot."""
    if not _linux():
        return False
    create, add, restrict = _LANDLOCK
    abi = _call(create, 0, 0, 1)
    if abi < 1 or not _no_new_rights():
        return False
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    rules = _call(create, ctypes.create_string_buffer(struct.pack("<Q", rights), 8), 8, 0)
    if rules < 0:
        return False
    done = True
    for path in readable:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        read_file = struct.pack("<Qi", 1 << 2, fd)
        done = done and _call(add, rules, 1, ctypes.create_string_buffer(read_file, 12), 0) == 0
        os.close(fd)
    done = done and _call(restrict, rules, 0) == 0
    os.close(rules)
    return done


def _seccomp(opening: bool) -> bool:
    """Let the kernel refuse every call but the listed ones, for all threads; False if it cannot."""
    machine = _linux()
    if not machine or not _no_new_rights():
        return False
    filter_ = _filter(machine, opening)
    code = ctypes.create_string_buffer(filter_, len(filter_))
    program = struct.pack("<HxxxxxxQ", len(filter_) // 8, ctypes.addressof(code))
    every_thread, set_filter = 1, 1
    given = ctypes.create_string_buffer(program, len(program))
    return _call(_SECCOMP[machine], set_filter, every_thread, given) == 0


def _filter(machine: str, opening: bool) -> bytes:
    """Return the filter as instructions of the classic BPF machine."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (answer, 0, 0, refuse)]
    program.append((load, 0, 0, 0))
    forbidden = dict(_FORBIDDEN)
    if opening:
        forbidden["openat"] = (2, _WRITING)
    for name, number in _CALLS[machine].items():
        if name == "openat" and not opening:
            continue
        if name in forbidden:
            argument, bits = forbidden[name]
            # the low half of the argument: none of these flags lies in the high one
            program += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument)]
            program += [(any_bit, 0, 1, bits), (answer, 0, 0, refuse), (answer, 0, 0, allow)]
        else:
            program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    program.append((answer, 0, 0, refuse))
    return b"".join(struct.pack("<HBBI", *step) for step in program)
