"""An executor whose state and tasks are in a worker process.

The state is sent to the worker only when it is needed: a session is opened in the worker at its
first task, so creating or restoring a session does not make other clients wait.  Between two tasks,
the state can be fetched, so that the worker can be stopped to make room for a worker of another
owner.  The next task then passes the state to a new worker.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    LocalProtocolError,
    ProcessFailed,
    SplitonnxError,
    StageTooSlow,
    WorkerLost,
)
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, TRAIN, UPDATE
from splitonnx.runtime.storage.outcomes import publish_state
from splitonnx.runtime.workers.messages import (
    Action,
    Begin,
    Continue,
    Done,
    Fetch,
    Finish,
    Open,
    Work,
)
from splitonnx.runtime.workers.processes import Worker, WorkerEnded


class Owner(Protocol):
    """The interface of the pool that an executor belongs to."""

    @property
    def party(self) -> PartyBundle:
        """Return the party that the pool's workers run."""

    def get_worker(self, executor: RemoteExecutor) -> Worker:
        """Return the worker that has an executor's state, or that will receive the state."""

    def close_executor(self, executor: RemoteExecutor) -> None:
        """Forget an executor that is no longer needed."""

    def note_death(self, key: TaskKey | None, session: str, how: str) -> WorkerLost:
        """Record that a worker ended, and return the error to raise.

        ``key`` is the task that made the worker end, or ``None`` if no task did.  ``how`` describes
        how the worker ended.
        """

    def note_success(self, key: TaskKey) -> None:
        """Record that a task succeeded."""

    def note_failed_start(self, key: TaskKey | None, session: str, why: str) -> WorkerLost:
        """Record that no worker can be started, and return the error to raise.

        ``key`` is the task that needed a worker, and ``why`` is the reason for the failure.
        """


class _Task:
    """An open task; ``begin`` is set until the task has been sent to the worker."""

    def __init__(self, begin: Begin) -> None:
        self.begin: Begin | None = begin
        self.wires: Mapping[str, np.ndarray] = {}
        self.is_finished = self.is_waiting = False


class RemoteExecutor:
    """A session's executor in a worker, with the same methods as :class:`~executors.Executor`.

    ``user`` names the owner or session that the worker serves.  ``tensors`` is the state to begin
    with, or ``None`` for the untrained state, and ``step`` is the number of steps that led to it.
    Only :meth:`unload` may be called while another thread is using the executor.
    """

    _numbers = iter(range(1 << 62))

    def __init__(
        self,
        pool: Owner,
        user: str,
        session: str,
        tensors: Mapping[str, np.ndarray] | None,
        step: int,
    ) -> None:
        self.step = step
        self.party = pool.party
        self.manifest: PartyManifest = pool.party.manifest
        self.user = user
        self._pool = pool
        self._lock = threading.RLock()  # held during a request to the worker
        self._session = session
        self._number = next(self._numbers)
        self._start = tensors
        self._worker: Worker | None = None
        self._tasks: dict[TaskKey, _Task] = {}
        self._has_open_step = False  # the worker has accumulated micro-batches of the next step

    @property
    def is_lost(self) -> bool:
        """Return whether the state was lost because the worker that held it ended."""
        return self._worker is not None and not self._worker.is_alive

    @property
    def is_loaded(self) -> bool:
        """Return whether the state is in a worker, or will be sent to a worker for an open task."""
        return self._is_used or (self._worker is not None and self._worker.is_alive)

    @property
    def _is_used(self) -> bool:
        """Return whether the worker has something that :meth:`state` does not return."""
        return bool(self._tasks) or self._has_open_step

    def begin(
        self, key: TaskKey, *, data: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        """Open a task; the worker checks it later, together with the first tensors.

        Raises:
            LocalProtocolError: the task is already open, or ``data`` is not empty although a server
                has no data of its own.
        """
        if data:
            raise LocalProtocolError("a worker takes wires alone")
        if key in self._tasks:
            raise LocalProtocolError(f"{key} is open already")
        with self._lock:  # from now on it cannot be unloaded
            self._tasks[key] = _Task(Begin(seed=seed, learning_rate=learning_rate))

    def deliver(self, key: TaskKey, tensors: Mapping[str, np.ndarray]) -> None:
        """Record tensors from the other party for an open task.

        :meth:`advance` sends them to the worker, which checks them.
        """
        self._task(key).wires = tensors

    def advance(self, key: TaskKey) -> Iterator[dict[str, np.ndarray]]:
        """Run all stages whose inputs are available; after each, yield the tensors to send.

        Raises:
            WorkerLost: the worker ended during the task.
            SplitonnxError: as raised by ``deliver`` and ``advance`` of
                :class:`~executors.Executor`.
        """
        task = self._task(key)
        begin, wires = task.begin, task.wires
        task.begin, task.wires = None, {}
        action: Action = Work(session=self._number, key=key, begin=begin, wires=())
        given = self._ask(action, key, wires)
        while not isinstance(given, Done):
            yield given
            given = self._ask(Continue(session=self._number, key=key), key)
        task.is_finished, task.is_waiting = given.is_finished, given.is_waiting

    def is_waiting(self, key: TaskKey) -> bool:
        """Return whether an open task has a stage that needs nothing but :meth:`advance`.

        After that method, such a stage waits for an earlier task of the step.
        """
        task = self._task(key)
        return task.is_waiting or task.begin is not None or bool(task.wires)

    def is_finished(self, key: TaskKey) -> bool:
        """Return whether a task is ready for :meth:`finish`.

        A task is ready once every stage has run, every expected tensor has arrived, and every
        outgoing tensor has been yielded.
        """
        return self._task(key).is_finished

    def finish(self, key: TaskKey) -> dict[str, np.ndarray]:
        """Close a finished task and commit its changes to the state.

        Return an empty dictionary, because a server's phases have no results.

        Raises:
            LocalProtocolError: the task is not finished.
            WorkerLost: the worker ended.
        """
        if not self._task(key).is_finished:
            raise LocalProtocolError(f"{key} is not finished")
        self._ask(Finish(session=self._number, key=key), key)
        self._pool.note_success(key)
        del self._tasks[key]
        self._has_open_step = key.phase == ACCUMULATE or (
            self._has_open_step and key.phase != UPDATE
        )
        self.step += key.phase in (TRAIN, UPDATE)
        return {}

    def abandon(self, key: TaskKey) -> None:
        """Abort a task and discard its changes to the state; do nothing if it is not open.

        Of a step of several micro-batches, whose tasks need not be open, the whole step is aborted,
        with all its tasks.
        """
        task = self._tasks.pop(key, None)
        is_begun = task is not None and task.begin is None
        if key.phase in (ACCUMULATE, UPDATE) and key.step == self.step:
            is_begun, self._has_open_step = is_begun or self._has_open_step, False
            for other in [k for k in self._tasks if k.phase in (ACCUMULATE, UPDATE)]:
                is_begun = self._tasks.pop(other).begin is None or is_begun
        if is_begun and self._worker is not None:
            self._worker.abandon(self._number, key)

    def state(self) -> dict[str, np.ndarray]:
        """Return all tensors of the state, and fetch them from the worker if necessary.

        Raises:
            WorkerLost: the worker ended.
        """
        with self._lock:
            if self._worker is None:  # it is not there
                return dict(self._start) if self._start is not None else _make_untrained(self.party)
            given = self._ask(Fetch(session=self._number), None)
        assert not isinstance(given, Done)
        return given

    def unload(self, *, waits: bool) -> bool:
        """Fetch the state, so that the worker is not needed until the next task.

        Return whether the worker is not needed now, which is also true if it has ended and the
        state is lost.  Return ``False`` if a task is open, or if the state cannot be fetched.
        ``waits`` means to wait if another thread is using the worker for this session; otherwise,
        ``False`` is returned at once.
        """
        if self._is_used or not self._lock.acquire(blocking=waits):
            return False
        try:
            if self._is_used:
                return False
            if self._worker is not None and self._worker.is_alive:
                given = self._worker.ask(Fetch(session=self._number))
                assert not isinstance(given, Done)
                self._worker.forget(self._number)  # it may stay, for another session's open task
                self._number = next(self._numbers)
                self._worker, self._start = None, given
            return True
        except WorkerEnded:
            return True  # the session is lost; its next message gets the error
        except SplitonnxError:
            return False
        finally:
            self._lock.release()

    def restore(self, tensors: Mapping[str, np.ndarray], step: int) -> None:
        """Replace the state and abort open tasks.

        Do not change the arrays before the next task, because they are not copied.
        """
        with self._lock:
            self._tasks.clear()
            self._has_open_step = False
            if self._worker is not None:
                self._worker.forget(self._number)
            self._number = next(self._numbers)
            self._worker, self._start, self.step = None, tensors, step

    def publish(self, *, session: str = "", position: str = "", owner: str = "") -> None:
        """Write the state to the party's folder as the outcome of training.

        See :meth:`executors.Executor.publish`.
        """
        publish_state(
            self.party,
            self.state(),
            step=self.step,
            session=session,
            position=position,
            owner=owner,
        )

    def close(self) -> None:
        """Drop the session in the worker, and remove this executor from its pool."""
        if self._worker is not None:
            self._worker.forget(self._number)
        self._pool.close_executor(self)

    def _task(self, key: TaskKey) -> _Task:
        if key not in self._tasks:
            raise LocalProtocolError(f"{key} is not open")
        return self._tasks[key]

    def _ask(
        self,
        action: Action,
        key: TaskKey | None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray] | Done:
        try:
            with self._lock:
                return self._open().ask(action, tensors)
        except WorkerEnded as error:
            cause = None if error.is_before else key
            raise self._pool.note_death(cause, self._session, error.how) from error
        except ProcessFailed as error:
            raise self._pool.note_failed_start(key, self._session, error.reason) from error
        except StageTooSlow:
            if self.is_lost:  # it did not end, so the process was killed
                self._pool.note_death(None, self._session, "a stage did not end")
            raise

    def _open(self) -> Worker:
        """Return the worker; if it does not have the state yet, send the state first."""
        if self._worker is None:
            worker = self._pool.get_worker(self)
            action = Open(session=self._number, step=self.step, state=None)
            worker.ask(action, self._start)
            self._worker, self._start = worker, None
        return self._worker


def _make_untrained(party: PartyBundle) -> dict[str, np.ndarray]:
    return replace(party, trained=None).state()
