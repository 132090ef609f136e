"""Watch a process system call by system call, and kill it at any of them.  Linux only.

It is ptrace by ctypes: nothing to install, and no privilege where a process may trace its own
children.  The tracing process must be single-threaded, for it forks: tests start a fresh one.
Calls are told with the paths that they concern, for those that change files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NoReturn

_TRACEME, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_GOOD, _FORK, _VFORK, _CLONE, _EXEC, _EXITKILL = 1, 2, 4, 8, 16, 1 << 20
_OPTIONS = _GOOD | _FORK | _VFORK | _CLONE | _EXEC | _EXITKILL
_ENTRY = 1
_ALL_THREADS = 0x40000000  # __WALL
_REFUSED = 97  # exit code of a child that may not be traced

_X86_64 = {1: "write", 3: "close", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync",
           77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink",
           257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat",
           316: "renameat2"}  # fmt: skip
_AARCH64 = {64: "write", 57: "close", 68: "pwrite64", 66: "writev", 82: "fsync", 83: "fdatasync",
            46: "ftruncate", 56: "openat", 34: "mkdirat", 35: "unlinkat", 37: "linkat",
            38: "renameat", 276: "renameat2"}  # fmt: skip
NAMES: Mapping[int, str] = (
    {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine(), {})
    if sys.platform == "linux"
    else {}
)
"""The calls that change files, by number; empty on a system or machine that has other numbers."""

_PATHS = {"rename": (0, 1), "link": (0, 1), "linkat": (1, 3), "mkdir": (0,),
          "rmdir": (0,), "unlink": (0,), "openat": (1,),
          "mkdirat": (1,), "unlinkat": (1,), "renameat": (1, 3), "renameat2": (1, 3)}  # fmt: skip
_ON_HANDLES = {"write", "close", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate"}


class TracingRefused(Exception):
    """This machine does not let a process trace its own child."""


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info; ``words`` is number and arguments, or the result."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("words", ctypes.c_uint64 * 7),
    )


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A thread stands before a system call, or after it (``result`` is set then).

    ``call`` is the call's name, or its number where :data:`NAMES` has none; ``paths`` the files
    that it concerns; ``arguments`` its six words.
    """

    call: str
    paths: tuple[str, ...] = ()
    arguments: tuple[int, ...] = field(default=(), repr=False)
    result: int | None = None


@cache
def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    return libc


def trace(run: Callable[[], object]) -> Generator[Stop, None, None]:
    """Run a function in a child process, and yield each stop before and after a system call.

    While the caller holds a stop the child stands still.  Whoever closes the generator kills the
    child there with SIGKILL: before a call, the call does not happen.  It ends when the child
    does.

    Raises:
        TracingRefused: the child may not be traced.
    """
    child = os.fork()
    if child == 0:
        _run_traced(run)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise TracingRefused("PTRACE_TRACEME is not permitted here")
    ended = False
    try:
        _ptrace(_SETOPTIONS, child, data=_OPTIONS)
        _resume(child, 0)
        yield from _follow(child)
        ended = True
    finally:
        if not ended:
            _kill(child)


def _run_traced(run: Callable[[], object]) -> NoReturn:
    os.setpgid(0, 0)  # its threads are waited for by this group; other children are let be
    if _load_libc().ptrace(_TRACEME, 0, None, None) != 0:
        os._exit(_REFUSED)
    os.kill(os.getpid(), signal.SIGSTOP)
    code = 1
    try:
        run()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def _follow(child: int) -> Iterator[Stop]:
    calls: dict[int, Stop] = {}
    while True:
        thread, status = os.waitpid(-child, _ALL_THREADS)
        if not os.WIFSTOPPED(status):
            if thread == child:
                return
            continue
        sign = os.WSTOPSIG(status)
        if sign == signal.SIGTRAP | 0x80:
            if (stop := _look(thread, calls)) is not None:
                yield stop
            sign = 0
        elif status >> 16 or sign in (signal.SIGSTOP, signal.SIGTRAP):
            sign = 0  # a new thread or program: nothing that the child itself should notice
        _resume(thread, sign)


def _look(thread: int, calls: dict[int, Stop]) -> Stop | None:
    """See what a thread is about to do or has done; ``None`` where it is gone meanwhile."""
    try:
        return _look_closely(thread, calls)
    except (ProcessLookupError, FileNotFoundError):
        return None


def _look_closely(thread: int, calls: dict[int, Stop]) -> Stop:
    info = _Info()
    _ptrace(_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
    if info.op != _ENTRY:
        before = calls.get(thread, Stop(call="?"))
        result = ctypes.c_int64(info.words[0]).value
        return Stop(call=before.call, paths=before.paths, arguments=before.arguments, result=result)
    name = NAMES.get(info.words[0], str(info.words[0]))
    arguments = tuple(info.words[1:])
    paths = tuple(_read_text(thread, arguments[at]) for at in _PATHS.get(name, ()))
    if name in _ON_HANDLES:
        paths = (_read_handle(thread, ctypes.c_int32(arguments[0]).value),)
    calls[thread] = Stop(call=name, paths=paths, arguments=arguments)
    return calls[thread]


def _read_text(thread: int, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        content = memory.read(4096 - address % 4096)  # a page: the next one may not be there
        if b"\0" not in content:
            content += memory.read(4096)
    return os.fsdecode(content.partition(b"\0")[0])


def _read_handle(thread: int, handle: int) -> str:
    try:
        return os.readlink(f"/proc/{thread}/fd/{handle}")
    except FileNotFoundError:
        return ""


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _load_libc().ptrace(request, thread, address, data) < 0:
        code = ctypes.get_errno()
        if code in (errno.EIO, errno.EINVAL, errno.ENOSYS, errno.EPERM):  # an older system's
            raise TracingRefused(f"ptrace does not know request {request:#x} here")
        raise OSError(code, os.strerror(code))


def _resume(thread: int, sign: int) -> None:
    try:
        _ptrace(_SYSCALL, thread, data=sign)
    except OSError as error:
        if error.errno != errno.ESRCH:  # it was killed meanwhile
            raise


def _kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        return
    while True:
        try:
            thread, status = os.waitpid(-child, _ALL_THREADS)
        except ChildProcessError:
            return
        if thread == child and not os.WIFSTOPPED(status):
            return
