"""The workers of a server: which owner has one, who may get one, and when it ends.

A worker serves one owner at a time and ends before another owner's begins, so neither a crash nor
a read beyond an array's end reaches from one owner to another.  Clients that nothing tells apart
have a worker for each session.  An owner gets one at its first task, and keeps it until another
needs it: then the states of its sessions are fetched, and go into a new worker at their next task.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from weakref import WeakSet

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import ServerBusy, StageStopped, WorkerLost
from splitonnx.messages import TaskKey
from splitonnx.runtime.workers.processes import Worker, WorkerOptions
from splitonnx.runtime.workers.remote_executors import RemoteExecutor

MAX_DEATHS = 2
"""Workers that one step may end; the second time its client is told so."""
INTERRUPT_SECONDS = 0.1
"""Seconds between two orders to end what runs."""
MAX_REMEMBERED = 1024
"""Steps that ended a worker and are remembered."""

_logger = logging.getLogger("splitonnx.server")


class _Lease:
    """An owner's worker, which starts when it is first needed; ``since`` is when that was.

    ``executors`` are those whose state it has, or is about to have; ``starting`` is held while it
    starts or ends.
    """

    def __init__(self, options: WorkerOptions, kept_bytes: Callable[[], int], now: float) -> None:
        self.executors: WeakSet[RemoteExecutor] = WeakSet()
        self.since = self.last_used = now
        self._options = options
        self._kept_bytes = kept_bytes
        self._worker: Worker | None = None
        self.starting = threading.Lock()
        self._is_over = self._is_interrupted = False

    def get_worker(self) -> Worker:
        """Return the worker, a new one where the last one has ended.

        Raises:
            ProcessFailed, SplitonnxError: none can be started; see :class:`Worker`.
            ServerBusy: the server closes.
            StageStopped: nothing is to be begun any more.
        """
        with self.starting:
            if self._is_interrupted and (self._worker is None or not self._worker.is_alive):
                raise StageStopped("of the task")
            if self._is_over:
                raise ServerBusy("workers")
            if self._worker is None or not self._worker.is_alive:
                self._worker = Worker(self._options, self._kept_bytes)
            return self._worker

    def tidy(self) -> None:
        """Ask the worker to free soon what it may not keep any more."""
        if self._worker is not None:
            self._worker.tidy()

    def interrupt(self) -> None:
        """End the stage that runs, and begin no other; to be called again until that is done."""
        self._is_interrupted = True
        if self._worker is not None:
            self._worker.interrupt()

    def end(self) -> None:
        """End the worker for good."""
        with self.starting:
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
        self._moving = threading.Lock()  # held while a worker is taken from its owner
        self._is_closed = threading.Event()
        self._leases: dict[str, _Lease] = {}
        self._deaths: OrderedDict[TaskKey, int] = OrderedDict()

    @property
    def party(self) -> PartyBundle:
        """What the workers run."""
        return self._options.party

    def open(
        self, owner: str, session: str, tensors: Mapping[str, np.ndarray] | None, step: int
    ) -> RemoteExecutor:
        """Make an executor for a session, at a state, or at the untrained one."""
        return RemoteExecutor(self, _name_user(owner, session), session, tensors, step)

    def get_worker(self, executor: RemoteExecutor) -> Worker:
        """Return the worker of an executor's owner, or make one, if need be in another's place.

        Raises:
            ProcessFailed, SplitonnxError: it cannot be started; see :class:`Worker`.
            ServerBusy: every worker is another owner's, who has an open task in it.
        """
        lease = self._find(executor)
        if lease is None:
            with self._moving:
                lease = self._find(executor) or self._take_over(executor)
        return lease.get_worker()

    def close_executor(self, executor: RemoteExecutor) -> None:
        """Note that a session has left the memory."""
        with self._lock:
            for lease in self._leases.values():
                if executor in lease.executors:
                    lease.executors.discard(executor)
                    lease.last_used = self._clock()

    def retire_idle(self, seconds: float) -> None:
        """End the workers that have had no session for so long."""
        with self._lock:
            now = self._clock()
            for name, lease in list(self._leases.items()):
                if not lease.executors and now - lease.last_used > seconds:
                    self._leases.pop(name).end()

    def note_death(self, key: TaskKey | None, session: str, how: str) -> WorkerLost:
        """Log that a worker ended over a task, if over one, and make the error that tells it."""
        error = WorkerLost(session, how, is_repeated=self._count_death(key))
        _logger.error("%s", error, extra={"session": session})
        return error

    def note_success(self, key: TaskKey) -> None:
        """Forget the workers that ended over a task: it was carried out."""
        if self._deaths:
            with self._lock:
                self._deaths.pop(key, None)

    def note_failed_start(self, key: TaskKey | None, session: str, why: str) -> WorkerLost:
        """Log why none can be started, which the error's sentence does not tell the client."""
        _logger.error("no worker can be started: %s", why, extra={"session": session})
        is_repeated = self._count_death(key)
        return WorkerLost(session, why, is_repeated=is_repeated, is_early=True)

    def _count_death(self, key: TaskKey | None) -> bool:
        """Count a worker's end, and say whether the same task has ended as many as it may."""
        self._on_death()
        if key is None:
            return False
        with self._lock:
            deaths = self._deaths[key] = self._deaths.get(key, 0) + 1
            self._deaths.move_to_end(key)
            if len(self._deaths) > MAX_REMEMBERED:
                self._deaths.popitem(last=False)
        return deaths >= MAX_DEATHS

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
        """End every worker; may be called twice."""
        self._is_closed.set()
        with self._lock:
            leases = list(self._leases.values())
            self._leases.clear()
        for lease in leases:
            lease.end()
        if self._options.weights is not None:
            self._options.weights.close()

    def _find(self, executor: RemoteExecutor) -> _Lease | None:
        """Find the owner's lease, or make one where there is room for one more."""
        with self._lock:
            if executor.user not in self._leases and len(self._leases) >= self._most:
                return None
            return self._enter(executor)

    def _enter(self, executor: RemoteExecutor) -> _Lease:
        lease = self._leases.get(executor.user)
        if lease is None:
            others = list(self._leases.values())
            lease = _Lease(self._options, self._compute_share, self._clock())
            self._leases[executor.user] = lease
            for other in others:
                other.tidy()
        lease.executors.add(executor)
        return lease

    def _compute_share(self) -> int:
        """Compute what each worker may keep, in bytes: one that is alone keeps what all may."""
        return self._options.kept_bytes // max(1, len(self._leases))

    def _take_over(self, executor: RemoteExecutor) -> _Lease:
        """Free a place by ending the oldest worker that has no open task."""
        with self._lock:
            by_age = sorted(self._leases.items(), key=lambda entry: entry[1].since)
        for waits in (False, True):
            for user, before in by_age:
                if self._unload(before, waits=waits):
                    lease = self._replace(user, before, executor)
                    if lease is not None:
                        return lease
        raise ServerBusy(f"{self._most} workers")

    def _unload(self, lease: _Lease, *, waits: bool) -> bool:
        """Fetch every session's state, unless one has an open task; say whether all are here.

        ``waits``: also for a session that is being saved.
        """
        with self._lock:
            executors = list(lease.executors)
        return all(executor.unload(waits=waits) for executor in executors)

    def _replace(self, user: str, before: _Lease, executor: RemoteExecutor) -> _Lease | None:
        """End a worker, and only then let another owner's begin."""
        with ExitStack() as stack:
            with self._lock:
                is_needed = any(executor.is_loaded for executor in before.executors)
                if is_needed or self._leases.get(user) is not before:
                    return None  # a task was begun meanwhile, or the worker is gone
                del self._leases[user]
                lease = self._enter(executor)
                stack.enter_context(lease.starting)
            before.end()
            return lease


def _name_user(owner: str, session: str) -> str:
    """Name whom a worker serves: an owner, or a session of those whom nothing tells apart."""
    return f"owner {owner}" if owner else f"session {session}"
