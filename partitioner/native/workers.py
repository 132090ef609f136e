"""Start and use the separate process for native code, so that no model can crash the caller.

The first call starts the process, and later calls reuse it.  If a model crashes the process, the
next call starts a new one.  The process exits together with the caller's process.  This module
handles processes and pipes; the process runs :mod:`main`, and its functions are in
:mod:`natives`.  Both import onnx.  This module does not, so that it can start the process while
the caller still imports it.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, BinaryIO, ParamSpec, TypeVar, cast

import msgspec

from splitonnx.errors import InternalModelError, NativeCrash, ProcessFailed
from splitonnx.faults import log_mistake
from splitonnx.interrupts import check_interrupt
from splitonnx.partitioner.native.requests import (
    SECONDS,
    RequestWriter,
    read_frame,
    write_frame,
)

_MOST_KEPT = 1 << 26
"""After a request or response with more bytes, the process is ended to free its memory.

The same goes for a process that keeps contents with more than twice as many bytes.
"""

_MAIN = "splitonnx.partitioner.native.main"
"""The module that the process runs."""
_ADVICE = "check how the model was exported"
_STOPPED = ("SIGKILL", "SIGTERM", "SIGINT", "SIGXCPU")
"""Signals by which a user or the system stops a process, whatever it runs."""

P = ParamSpec("P")
R = TypeVar("R")


class Refused(RuntimeError):
    """Raised if native code raises an exception; ``kind`` is the class name of that exception."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class _Worker:
    """A running process for native code, which still imports what it needs at first."""

    def __init__(self) -> None:
        paths = [os.path.abspath(path) for path in sys.path]  # the same modules as here
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MAIN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # crash output is not fit for users
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "OPENBLAS_NUM_THREADS": "1",  # numpy's, of which the others wait in a loop
                    "ORT_DISABLE_TELEMETRY": "1",  # of ONNX Runtime from 1.29 on
                },
                cwd=sys.prefix,  # a folder that will not be deleted
            )
        except (OSError, ValueError) as error:
            raise ProcessFailed(_MAIN, str(error)) from error
        self.writer = RequestWriter()
        self._requests = cast(BinaryIO, self._process.stdin)
        self._answers = cast(BinaryIO, self._process.stdout)
        self._is_ready = False

    def wait(self) -> None:
        """Wait until the process is ready; raise ``EOFError`` if it ends before."""
        if not self._is_ready:
            read_frame(self._answers)
            self._is_ready = True

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes) -> bytes:
        """Send a request and return the response; raise ``EOFError`` or ``OSError`` on failure."""
        write_frame(self._requests, request)
        return read_frame(self._answers)

    def end(self) -> str:
        """End the process and return its exit code or signal, which shows whether it crashed."""
        self.release()
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"exit code {code}"

    def kill(self) -> None:
        """End the process at once, also while another thread waits for its response."""
        self._process.kill()

    def release(self) -> None:
        """Close the pipes; the process then exits unless another process has them open."""
        for pipe in (self._requests, self._answers):
            with suppress(OSError):  # unsent data cannot be sent any more
                pipe.close()

    def forget(self) -> None:
        """Close a forked process's copies of the pipes; the process belongs to the parent."""
        self.release()
        self._process.returncode = 0  # only the parent may wait for it


class Isolation:
    """The separate process for native code.

    The first call starts the process.  All calls share it and run one after the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._is_abandoned = False

    @property
    def pid(self) -> int | None:
        """The process id, or ``None`` if the process is not running."""
        return None if self._worker is None else self._worker.pid

    def call(
        self, function: Callable[P, R], subject: str, *arguments: P.args, **named: P.kwargs
    ) -> R:
        """Call a function of :mod:`natives` in the separate process for native code.

        ``subject`` is the name of the model or node for error messages.

        Raises:
            Refused: the function raised an exception.
            InternalModelError: the exception indicates a bug in the function itself.
            NativeCrash: the function crashed the process, took too long, or needed more memory than
                allowed.  If the process has ended, the next call starts a new one.
            ProcessFailed: the process cannot be started.
        """
        assert not named, "arguments go by their place"
        check_interrupt()  # long work on a model consists of many calls
        name = function.__name__
        with self._lock:
            answer = self._ask(name, arguments, subject)
        result: list[Any] = msgspec.msgpack.decode(answer)
        if len(result) > 1 and result[0] == "MemoryError":
            code = _name_code(name)
            reason = f"{code} needs more memory than it may take for a model of this size"
            raise NativeCrash(subject, reason, _ADVICE)
        if len(result) > 1:
            kind, text, *trace = result
            refused = Refused(kind, text)
            raise _own_up(subject, name, refused, *trace) if trace else refused
        made: R = result[0]
        return made

    def _ask(self, name: str, arguments: tuple[Any, ...], subject: str) -> bytes:
        self._start()
        assert self._worker is not None
        try:
            self._worker.wait()
        except EOFError as error:
            raise ProcessFailed(_MAIN, self.end()) from error
        except BaseException:
            self.end()
            raise
        request = self._worker.writer.write(name, arguments)
        started = time.monotonic()
        try:
            answer = self._worker.ask(request)
        except (EOFError, OSError) as error:
            late = time.monotonic() - started >= SECONDS
            how = self.end()
            reason = f"took over {SECONDS} s" if late else f"broke down over it ({how})"
            code = _name_code(name)
            is_breakdown = not late and how not in _STOPPED
            raise NativeCrash(subject, f"{code} {reason}", _ADVICE, is_breakdown) from error
        except BaseException:  # the next call would read this call's late response
            self.end()
            raise
        most = max(len(request), len(answer), self._worker.writer.kept_bytes // 2)
        if most > _MOST_KEPT:
            self.end()
        return answer

    def start(self) -> None:
        """Start the process if none is running, and do not wait until it is ready.

        The first call then waits for less time, or not at all.

        Raises:
            ProcessFailed: the process cannot be started.
        """
        if self._lock.acquire(blocking=False):  # else another thread is starting or using it
            try:
                self._start()
            finally:
                self._lock.release()

    def _start(self) -> None:
        if self._is_abandoned:
            raise ProcessFailed(_MAIN, "what it was for has ended")
        if self._worker is None or not self._worker.is_alive():
            self.end()
            self._worker = _Worker()

    def end(self) -> str:
        """Stop the process, and return its exit code or the signal that ended it.

        If no process is running, return an empty string.
        """
        worker, self._worker = self._worker, None
        return worker.end() if worker is not None else ""

    def abandon(self) -> None:
        """Have a call that another thread makes fail, and every later call as well."""
        self._is_abandoned = True
        worker = self._worker
        if worker is not None:
            worker.kill()

    def forget(self) -> None:
        """Stop using the parent's worker process; call this in a child process after a fork.

        The parent and the child must not share the worker's pipes.  The next call in the child
        starts a new worker process.
        """
        worker, self._worker = self._worker, None
        self._lock = threading.Lock()
        if worker is not None:
            worker.forget()


def _name_code(name: str) -> str:
    """Return the name of the native code that a function runs."""
    from splitonnx.partitioner.native.natives import NATIVES

    return NATIVES[name][1]


def _own_up(subject: str, name: str, error: Refused, trace: str) -> InternalModelError:
    """Log where a function failed in the process, and return an error that asks for a report."""
    error.add_note(trace)
    log_mistake(f"{subject}, in {name}", error)
    work = f"given to {_name_code(name)}"
    made = InternalModelError(subject, work, f"{error.kind}: {' '.join(str(error).split())[:160]}")
    made.__cause__ = error
    return made


_HERE = Isolation()
_CURRENT = ContextVar("isolation", default=_HERE)
start = _HERE.start


def call(function: Callable[P, R], subject: str, *arguments: P.args, **named: P.kwargs) -> R:
    """Call a function of :mod:`natives` in the process of this context (:meth:`Isolation.call`)."""
    return _CURRENT.get().call(function, subject, *arguments, **named)


@contextmanager
def using(isolation: Isolation) -> Iterator[None]:
    """Have :func:`call` use another process inside a ``with`` block, which is ended behind it."""
    token = _CURRENT.set(isolation)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        isolation.end()


atexit.register(_HERE.end)
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_HERE.forget)
