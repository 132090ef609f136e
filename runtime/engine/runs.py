"""Runs of stages, and ways to stop them: after a time limit, with Ctrl-C, or all at once.

Python cannot interrupt native code.  ONNX Runtime checks for a request to stop only between two
operators, and between two iterations of a loop.  Therefore, a single slow operator always runs to
its end.  If you cannot wait for that, run stages in a process that you can kill.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from importlib import import_module
from typing import NoReturn, Protocol

from splitonnx.errors import StageFailed, StageStopped, StageTooSlow
from splitonnx.interrupts import note_interrupt

GRACE_SECONDS = 2.0
"""Seconds after which a run that was asked to stop, but still runs, is considered stuck.

A single large operator may take longer.
"""


class RunOptions(Protocol):
    """The part of ONNX Runtime's run options that this module uses.

    Setting ``terminate`` to ``True`` stops the run.
    """

    terminate: bool


class _Ending(Enum):
    LATE = auto()
    INTERRUPTED = auto()  # Ctrl-C
    STOPPED = auto()


class Run:
    """One run of a stage; it is stopped at ``deadline``, measured by ``time.monotonic()``."""

    __slots__ = ("_ending", "_options", "deadline", "stage")

    def __init__(self, stage: str, options: RunOptions, deadline: float) -> None:
        self.deadline = deadline
        self.stage = stage
        self._options = options
        self._ending: _Ending | None = None

    def end(self, ending: _Ending) -> None:
        """Ask ONNX Runtime to stop the run; the first ``ending`` is kept as the reason."""
        if self._ending is None:
            self._ending = ending
        self._options.terminate = True

    def explain(self, error: Exception, reason: str, seconds: float | None) -> NoReturn:
        """Raise the exception that describes why the run ended with ``error``.

        If the run was not stopped, raise ``StageFailed`` with ``reason``.  ``seconds`` is the time
        limit that is named in the exception if the run was too slow.
        """
        match self._ending:
            case _Ending.LATE:
                raise StageTooSlow(self.stage, seconds or 0.0) from error
            case _Ending.INTERRUPTED:
                raise KeyboardInterrupt from error
            case _Ending.STOPPED:
                raise StageStopped(self.stage) from error
        raise StageFailed(self.stage, reason) from error


class Runs:
    """The current runs of one engine, each limited to ``seconds``; ``None`` means no limit.

    ``on_stuck`` is called in a separate thread with the name of a stage that is still running
    ``GRACE_SECONDS`` after its time limit.
    """

    def __init__(
        self, seconds: float | None = None, on_stuck: Callable[[str], object] | None = None
    ) -> None:
        self.seconds = seconds
        self._on_stuck = on_stuck
        self._changed = threading.Condition(threading.Lock())
        self._running: set[Run] = set()
        self._is_stopped = self._is_idle = False
        self._watchdog: threading.Thread | None = None

    def begin(self, stage: str, options: RunOptions) -> Run:
        """Start watching a new run of a stage, and return the run.

        ``options`` are the options with which ONNX Runtime is about to run the stage.  Call
        :meth:`finish` when the run is over, even after an error.

        Raises:
            StageStopped: :meth:`stop` was called, and no stage may run any more.
        """
        run = Run(stage, options, time.monotonic() + (self.seconds or 0.0))
        with self._changed:
            if self._is_stopped:
                raise StageStopped(stage)
            self._running.add(run)
            self._watch()
        if threading.current_thread() is threading.main_thread():
            _INTERRUPTS.arm(run)
        return run

    def finish(self, run: Run) -> None:
        """Stop watching a run that is over."""
        if run is _INTERRUPTS.run:
            _INTERRUPTS.disarm()
        with self._changed:
            self._running.discard(run)

    def stop(self) -> None:
        """Stop all runs, and allow no new runs."""
        with self._changed:
            self._is_stopped = True
            for run in self._running:
                run.end(_Ending.STOPPED)
            self._changed.notify()
        if self._watchdog is not None:
            self._watchdog.join()

    def _watch(self) -> None:
        """Start or wake the thread that watches the deadlines."""
        if self.seconds is None:
            return
        if self._watchdog is None:
            self._watchdog = threading.Thread(
                target=self._end_late, name="splitonnx-watchdog", daemon=True
            )
            self._watchdog.start()
        elif self._is_idle:
            self._changed.notify()

    def _end_late(self) -> None:
        """End runs that exceed their deadline, until :meth:`stop`; sleep while nothing runs."""
        with self._changed:
            while not self._is_stopped:
                now = time.monotonic()
                for run in self._running:
                    if run.deadline <= now:
                        run.end(_Ending.LATE)
                    if run.deadline + GRACE_SECONDS <= now and self._on_stuck is not None:
                        self._on_stuck(run.stage)
                # a run that begins later has a later deadline
                due = [
                    run.deadline + grace for run in self._running for grace in (0, GRACE_SECONDS)
                ]
                waiting = [moment for moment in due if moment > now]
                self._is_idle = not waiting
                self._changed.wait(min(waiting) - now if waiting else None)


class _Interrupts:
    """Ends the run in the main thread when Ctrl-C is pressed.

    Python calls signal handlers only after native code has returned.  But it writes the signal's
    number to a file descriptor at once, and a separate thread reads it there.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self._pid = 0
        self._writer: socket.socket | None = None
        self._before = -1

    def arm(self, run: Run) -> None:
        """End ``run`` if Ctrl-C is pressed before :meth:`disarm`; call this in the main thread.

        If the program has its own SIGINT handler, that handler stays in place and the run is not
        ended.
        """
        if _get_handler(signal.SIGINT) not in _RAISING:
            return
        if self._writer is None or self._pid != os.getpid():
            self._writer, self._pid = self._start(), os.getpid()
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.run = run

    def disarm(self) -> None:
        """Return the handling of Ctrl-C to Python."""
        self.run = None
        signal.set_wakeup_fd(self._before)

    def _start(self) -> socket.socket:
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        threading.Thread(
            target=self._read, args=(reader,), name="splitonnx-interrupts", daemon=True
        ).start()
        return writer

    def _read(self, reader: socket.socket) -> None:
        with reader, suppress(OSError):
            while number := reader.recv(1):
                run = self.run
                if run is not None and number[0] == signal.SIGINT:
                    run.end(_Ending.INTERRUPTED)


_get_handler = import_module("_signal").getsignal
"""The C function behind ``signal.getsignal``, which takes 4 us to convert the result to an enum."""
_RAISING = (signal.default_int_handler, note_interrupt)
"""The handlers that raise ``KeyboardInterrupt`` and do nothing that a caller could wait for."""
_INTERRUPTS = _Interrupts()
