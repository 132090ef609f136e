"""The workers of a server: which owner has one, who may get one, and when it ends.

A worker serves one owner at a time and ends before another owner's begins, so neither a crash nor
a read beyond an array's end reaches from one owner to another.  Clients that nothing tells apart
have a worker for each session.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from weakref import WeakSet

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import ServerBusy, StageStopped, WorkerLost
from splitonnx.messages import TaskKey
from splitonnx.runtime.remote_executors import RemoteExecutor
from splitonnx.runtime.workers import Worker, WorkerOptions

MAX_DEATHS = 2
"""Workers that one step may end; the second time its client is told so."""
INTERRUPT_SECONDS = 0.1
"""Seconds between two orders to end what runs."""
MAX_REMEMBERED = 1024
"""Steps that ended a worker and are remembered."""

_logger = logging.getLogger("splitonnx.server")


class _Lease:
    """An owner's worker, which starts when it is first needed."""

    def __init__(self, options: WorkerOptions, now: float) -> None:
        self.executors: WeakSet[RemoteExecutor] = WeakSet()
        self.last_used = now
        self._options = options
        self._worker: Worker | None = None
        self._lock = threading.Lock()
        self._is_over = self._is_interrupted = False

    def get_worker(self) -> Worker:
        """Return the worker, a new one where the last one has ended.

        Raises:
            ProcessFailed: none can be started.
            ServerBusy: the owner had no session and lost its place.
            StageStopped: nothing is to be begun any more.
        """
        with self._lock:
            if self._is_interrupted and (self._worker is None or not self._worker.is_alive):
                raise StageStopped("of the task")
            if self._is_over:
                raise ServerBusy("workers")
            if self._worker is None or not self._worker.is_alive:
                self._worker = Worker(self._options)
            return self._worker

    def interrupt(self) -> None:
        """End the stage that runs, and begin no other; to be called again until that is done."""
        self._is_interrupted = True
        if self._worker is not None:
            self._worker.interrupt()

    def end(self) -> None:
        """End the worker for good."""
        with self._lock:
            self._is_over = True
            if self._worker is not None:
                self._worker.end()


class WorkerPool:
    """At most ``workers`` processes; safe for use from several threads.

    ``on_death`` is called for each that ended without being asked to.
    """

    def __init__(
        self,
        options: WorkerOptions,
        *,
        workers: int,
        on_death: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._most = workers
        self._on_death = on_death
        self._clock = clock
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._leases: dict[str, _Lease] = {}
        self._deaths: OrderedDict[TaskKey, int] = OrderedDict()

    @property
    def party(self) -> PartyBundle:
        """What the workers run."""
        return self._options.party

    def has_room(self, owner: str, session: str) -> bool:
        """Whether a session could have a worker now."""
        with self._lock:
            return (
                _name(owner, session) in self._leases
                or len(self._leases) < self._most
                or any(not lease.executors for lease in self._leases.values())
            )

    def open(
        self, owner: str, session: str, tensors: Mapping[str, np.ndarray] | None, step: int
    ) -> RemoteExecutor:
        """Make an executor for a session, at a state, or at the untrained one.

        Raises:
            ServerBusy: every worker is another owner's, who has sessions in it.
        """
        name = _name(owner, session)
        with self._lock:
            lease = self._leases.get(name)
            if lease is None:
                self._make_room()
                lease = self._leases[name] = _Lease(self._options, self._clock())
            lease.last_used = self._clock()
            executor = RemoteExecutor(self, lease.get_worker, session, tensors, step)
            lease.executors.add(executor)
            return executor

    def close_executor(self, executor: RemoteExecutor) -> None:
        """Note that a session has left the memory."""
        with self._lock:
            for lease in self._leases.values():
                lease.executors.discard(executor)

    def retire_idle(self, seconds: float) -> None:
        """End the workers that have had no session for so long."""
        with self._lock:
            now = self._clock()
            for name, lease in list(self._leases.items()):
                if not lease.executors and now - lease.last_used > seconds:
                    self._leases.pop(name).end()

    def note_death(self, key: TaskKey | None, session: str, how: str) -> WorkerLost:
        """Log that a worker ended over a task, if over one, and make the error that tells it."""
        self._on_death()
        deaths = 0
        if key is not None:
            with self._lock:
                deaths = self._deaths.get(key, 0) + 1
                self._deaths[key] = deaths
                self._deaths.move_to_end(key)
                if len(self._deaths) > MAX_REMEMBERED:
                    self._deaths.popitem(last=False)
        error = WorkerLost(session, how, is_repeated=deaths >= MAX_DEATHS)
        _logger.error("%s", error, extra={"session": session})
        return error

    def interrupt(self) -> None:
        """End every stage that runs, and let none begin, until :meth:`close`."""
        threading.Thread(target=self._interrupt, name="splitonnx-interrupt", daemon=True).start()

    def _interrupt(self) -> None:
        while not self._is_closed.is_set():  # a worker may not have begun what was asked
            with self._lock:
                leases = list(self._leases.values())
            for lease in leases:
                lease.interrupt()
            self._is_closed.wait(INTERRUPT_SECONDS)

    def close(self) -> None:
        """End every worker."""
        self._is_closed.set()
        with self._lock:
            leases = list(self._leases.values())
            self._leases.clear()
        for lease in leases:
            lease.end()

    def _make_room(self) -> None:
        if len(self._leases) < self._most:
            return
        empty = [name for name, lease in self._leases.items() if not lease.executors]
        if not empty:
            raise ServerBusy(f"{self._most} workers")
        oldest = min(empty, key=lambda name: self._leases[name].last_used)
        self._leases.pop(oldest).end()


def _name(owner: str, session: str) -> str:
    """Name whom a worker serves: an owner, or a session of those whom nothing tells apart."""
    return f"owner {owner}" if owner else f"session {session}"
