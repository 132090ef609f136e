"""The pool of a server's workers: which owner has a worker, who gets one, and when it is stopped.

A worker serves only one owner.  To serve another owner, it is stopped and a new worker is started.
Therefore, a crash does not affect another owner, and an out-of-bounds read does not reveal another
owner's data.  If a client has no owner, each of its sessions has its own worker.

An owner gets a worker at its first task, and keeps it until the pool is full and another owner
needs a worker.  Before the worker is stopped, the states of the owner's sessions are fetched.  Each
state is passed to a new worker at the session's next task.
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
"""How many workers one step may crash before its client gets an error."""
INTERRUPT_SECONDS = 0.1
"""Seconds between two attempts to stop running stages."""
MAX_REMEMBERED = 1024
"""Most steps that are remembered because they crashed a worker."""

_logger = logging.getLogger("splitonnx.server")


class _Lease:
    """The worker of one owner; the process starts when it is first needed.

    ``since`` is the time at which the owner got its place.  ``executors`` are the executors whose
    state the worker has or will get.  The lock ``starting`` is held while the worker starts or
    ends.
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
        """Return the worker; start a process if none is running.

        Raises:
            ProcessFailed, SplitonnxError: no worker can be started; see :class:`Worker`.
            ServerBusy: the server is closing.
            StageStopped: :meth:`interrupt` was called, and nothing may be started any more.
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
        """Ask the worker to free memory that it may not keep; return without waiting."""
        if self._worker is not None:
            self._worker.tidy()

    def interrupt(self) -> None:
        """Stop the running stage and start no other; call this repeatedly until it works."""
        self._is_interrupted = True
        if self._worker is not None:
            self._worker.interrupt()

    def end(self) -> None:
        """Stop the worker for good."""
        with self.starting:
            self._is_over = True
            if self._worker is not None:
                self._worker.end()


class WorkerPool:
    """A pool of at most ``workers`` processes; safe to use from several threads.

    ``on_death`` is called for each worker that ended unexpectedly.
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
        """Return the party that the workers run."""
        return self._options.party

    def open(
        self, owner: str, session: str, tensors: Mapping[str, np.ndarray] | None, step: int
    ) -> RemoteExecutor:
        """Create an executor for a session.

        The session begins with the state in ``tensors``, or with the untrained state if ``tensors``
        is ``None``.  ``step`` is the number of training steps that led to that state.
        """
        return RemoteExecutor(self, _name_user(owner, session), session, tensors, step)

    def get_worker(self, executor: RemoteExecutor) -> Worker:
        """Return the worker for the owner of an executor, starting it if necessary.

        If the pool is full, a worker of another owner is stopped first.

        Raises:
            ProcessFailed, SplitonnxError: no worker can be started.
            ServerBusy: every worker belongs to another owner and has an open task.
        """
        lease = self._find(executor)
        if lease is None:
            with self._moving:
                lease = self._find(executor) or self._take_over(executor)
        return lease.get_worker()

    def close_executor(self, executor: RemoteExecutor) -> None:
        """Forget the executor of a session that is no longer in memory."""
        with self._lock:
            for lease in self._leases.values():
                if executor in lease.executors:
                    lease.executors.discard(executor)
                    lease.last_used = self._clock()

    def retire_idle(self, seconds: float) -> None:
        """Stop the workers that have had no session for more than ``seconds``."""
        with self._lock:
            now = self._clock()
            for name, lease in list(self._leases.items()):
                if not lease.executors and now - lease.last_used > seconds:
                    self._leases.pop(name).end()

    def note_death(self, key: TaskKey | None, session: str, how: str) -> WorkerLost:
        """Log and count the end of a worker, and return the error to raise.

        ``key`` is the task that made the worker end, or ``None`` if no task did.  ``how`` describes
        how the worker ended.
        """
        error = WorkerLost(session, how, is_repeated=self._count_death(key))
        _logger.error("%s", error, extra={"session": session})
        return error

    def note_success(self, key: TaskKey) -> None:
        """Forget how many workers a task has crashed, because the task has now succeeded."""
        if self._deaths:
            with self._lock:
                self._deaths.pop(key, None)

    def note_failed_start(self, key: TaskKey | None, session: str, why: str) -> WorkerLost:
        """Log and count that no worker can be started, and return the error to raise.

        The text of the error does not contain the reason ``why``; only the log does.
        """
        _logger.error("no worker can be started: %s", why, extra={"session": session})
        is_repeated = self._count_death(key)
        return WorkerLost(session, why, is_repeated=is_repeated, is_early=True)

    def _count_death(self, key: TaskKey | None) -> bool:
        """Count a crash, and return whether the task has now crashed ``MAX_DEATHS`` workers."""
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
        """Stop all running stages and run no more stages, without waiting for them to end."""
        threading.Thread(target=self._interrupt, name="splitonnx-interrupt", daemon=True).start()

    def _interrupt(self) -> None:
        while not self._is_closed.is_set():  # a worker may not have begun what was asked
            with self._lock:
                leases = list(self._leases.values())
            for lease in leases:
                lease.interrupt()
            self._is_closed.wait(INTERRUPT_SECONDS)

    def close(self) -> None:
        """Stop all workers; do nothing if they are already stopped."""
        self._is_closed.set()
        with self._lock:
            leases = list(self._leases.values())
            self._leases.clear()
        for lease in leases:
            lease.end()
        if self._options.weights is not None:
            self._options.weights.close()

    def _find(self, executor: RemoteExecutor) -> _Lease | None:
        """Return the owner's lease; create it if there is a free place, or return ``None``."""
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
        """Compute how many bytes each worker may keep: an equal share of the total."""
        return self._options.kept_bytes // max(1, len(self._leases))

    def _take_over(self, executor: RemoteExecutor) -> _Lease:
        """Stop the oldest worker that has no open task, and return a lease in its place."""
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
        """Fetch the states of all sessions of a worker; return whether all could be fetched.

        A session with an open task cannot be fetched.  With ``waits``, also wait for a session that
        is being saved.
        """
        with self._lock:
            executors = list(lease.executors)
        return all(executor.unload(waits=waits) for executor in executors)

    def _replace(self, user: str, before: _Lease, executor: RemoteExecutor) -> _Lease | None:
        """Stop a worker before another owner's worker starts.

        Return ``None`` if the worker got a new task in the meantime or is gone.
        """
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
    """Return the name of a worker's user: an owner, or a session without an owner."""
    return f"owner {owner}" if owner else f"session {session}"
