"""A server's model: a state that training changes, its version, and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import msgspec
import numpy as np

from splitonnx.errors import BundleError
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, STEP_PHASES, UPDATE
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from splitonnx.runtime.storage.archives import Archive
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore


class SessionExecutor(Protocol):
    """The interface of a session's executor on a server, in this process or a worker process.

    The methods are those of :class:`~executors.Executor`, and may also raise ``WorkerLost``.
    """

    @property
    def step(self) -> int:
        """Return the number of training steps committed so far."""

    @property
    def is_lost(self) -> bool:
        """Return whether the state was lost because the worker that held it ended."""

    def begin(
        self, key: TaskKey, *, data: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        """Open a task with this party's data."""

    def deliver(self, key: TaskKey, tensors: Mapping[str, np.ndarray]) -> None:
        """Pass tensors from the other party to an open task."""

    def advance(self, key: TaskKey) -> Iterator[dict[str, np.ndarray]]:
        """Run all stages whose inputs are available; after each, yield the tensors to send."""

    def is_waiting(self, key: TaskKey) -> bool:
        """Return whether a stage of an open task needs nothing but :meth:`advance`."""

    def is_finished(self, key: TaskKey) -> bool:
        """Return whether a task is ready for :meth:`finish`."""

    def finish(self, key: TaskKey) -> dict[str, np.ndarray]:
        """Commit a finished task's changes to the state, close the task and return its results."""

    def abandon(self, key: TaskKey) -> None:
        """Abort a task and discard its changes to the state."""

    def state(self) -> dict[str, np.ndarray]:
        """Return all tensors of the state, including those of the optimizer."""

    def restore(self, tensors: Mapping[str, np.ndarray], step: int) -> None:
        """Replace the state and the number of committed steps, and abort open tasks."""

    def publish(self, *, session: str = "", position: str = "", owner: str = "") -> None:
        """Write the state to the party's folder as the outcome of training."""

    def close(self) -> None:
        """Close the executor and release its state."""


class ServerModel:
    """The state of a model on the server, which runs one task after another.

    ``version`` is the number of updates that led to the state.  It is the step of the optimizer, so
    it does not depend on how many steps a client has done.  ``name`` is the session whose files
    hold the checkpoints, and ``owner`` is the owner of these files.  ``store`` holds the
    checkpoints, and is part of ``archive``; both are ``None`` if there is no folder.  ``start`` is
    an executor with the state that the model started from, or ``None`` if that state is not known.
    """

    def __init__(
        self,
        name: str,
        *,
        owner: str,
        executor: SessionExecutor,
        start: Executor | None,
        store: CheckpointStore | None,
        archive: Archive | None = None,
    ) -> None:
        self.name = name
        self.owner = owner
        self.executor = executor
        self._start = start
        self._store, self._archive = store, archive
        self._saved = executor.step
        self._published = -1
        self._keys: dict[TaskKey, TaskKey] = {}

    @property
    def version(self) -> int:
        """Return the number of updates that led to the state."""
        return self.executor.step

    @property
    def is_saved(self) -> bool:
        """Return whether the state can be restored.

        This is possible if the state is on disk, or has not changed since the model was made.
        """
        return self._saved == self.version

    @property
    def is_lost(self) -> bool:
        """Return whether the state was lost because the worker process that held it has ended."""
        return self.executor.is_lost

    def begin(self, key: TaskKey, *, seed: int, learning_rate: float) -> None:
        """Open a task.

        The model runs it as its own next step, whatever the client's step in ``key`` is.

        Raises:
            SplitonnxError: as raised by :meth:`Executor.begin`.
        """
        own = self._find_own(key)
        self.executor.begin(own, data={}, seed=seed, learning_rate=learning_rate)
        self._keys[key] = own

    def run(
        self, key: TaskKey, tensors: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Pass tensors to an open task, and yield the tensors that the stages send.

        Raises:
            SplitonnxError: as raised by :meth:`Executor.deliver` and :meth:`Executor.advance`.
        """
        self.executor.deliver(self._keys[key], tensors)
        yield from self.executor.advance(self._keys[key])

    def finish(self, key: TaskKey) -> bool:
        """Commit a task's changes to the state if all its stages have run; return whether."""
        if not self.executor.is_finished(self._keys[key]):
            return False
        self.executor.finish(self._keys.pop(key))
        return True

    def perform(self, task: Task) -> Iterator[Delivery]:
        """Run what a submission of a task makes possible, and yield each delivery for its session.

        Several tasks of a step of micro-batches may be open.  They end in the order of their
        numbers; what waited for this task is run, too.

        Raises:
            SplitonnxError: as raised by :meth:`begin` and :meth:`run`.
        """
        key = task.key
        if task.turn == 0:
            self.begin(key, seed=task.seed, learning_rate=task.learning_rate)
        for tensors in self.run(key, task.tensors):
            yield Delivery(key=key, version=self.version, tensors=tensors)
        if key.phase not in (ACCUMULATE, UPDATE):
            if self.finish(key):
                yield Delivery(key=key, version=self.version, is_last=True)
            return
        is_first = True
        for later in self._list_open_step(key.session):
            if later != key and self.executor.is_waiting(self._keys[later]):
                for tensors in self.executor.advance(self._keys[later]):
                    yield Delivery(key=later, version=self.version, tensors=tensors)
            is_first = is_first and self.finish(later)
            if is_first:
                yield Delivery(key=later, version=self.version, is_last=True)

    def _list_open_step(self, session: str) -> list[TaskKey]:
        """Return the open tasks of a session's step of micro-batches, in their order."""
        own = [k for k in self._keys if k.session == session and k.phase in (ACCUMULATE, UPDATE)]
        return sorted(own, key=lambda key: key.micro_batch)

    def abandon(self, key: TaskKey) -> None:
        """Abort a task and discard its changes to the state; do nothing if it is not open.

        Of a step of several micro-batches, whose tasks need not be open, the whole step is aborted,
        with all its tasks.
        """
        own = self._keys.pop(key, None)
        if key.phase in (ACCUMULATE, UPDATE):
            own = own or self._find_own(key)
            for other in self._list_open_step(key.session):
                del self._keys[other]
        if own is not None:
            self.executor.abandon(own)

    def _find_own(self, key: TaskKey) -> TaskKey:
        is_step = key.phase in STEP_PHASES
        return msgspec.structs.replace(key, step=self.version) if is_step else key

    def list_versions(self) -> tuple[int, ...]:
        """Return the versions of the checkpoints and of the start.

        Raises:
            BundleError: the folder cannot be read.
        """
        found = set() if self._store is None else set(self._store.steps())
        if self._start is not None:
            found.add(self._start.step)
        return tuple(found)

    def rewind(self, version: int) -> None:
        """Go back to a version that :meth:`list_versions` returned, and abort open tasks."""
        self._keys.clear()
        if self._store is not None:
            self._store.rewind(version)
        if self._store is not None and version in self._store.steps():
            self.executor.restore(self._store.read(version).tensors, version)
        elif self._start is not None and version == self._start.step:
            self.executor.restore(self._start.state(), version)
        self._saved = version

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the tensors of the state that have these names, as read-only arrays."""
        state = self.executor.state()
        return {name: state[name] for name in names}

    def forget_stopped(self) -> None:
        """Delete the state that a graceful stop left on disk, as it is about to be replaced.

        A state that :meth:`adopt` changes keeps its version.  After a crash, the one before the
        change would otherwise be mistaken for it.

        Raises:
            NotSaved: it cannot be deleted.
        """
        if self._store is not None and self._store.remove_stopped():
            self._saved = -1

    def adopt(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace some tensors of the state; the version stays, and the state counts as unsaved."""
        if tensors:
            self.executor.restore({**self.executor.state(), **tensors}, self.version)
            self._saved = -1

    def save(self, *, publish: bool = False, keep: bool = False) -> None:
        """Write a durable checkpoint and, if ``publish`` is true, the outcome of the training.

        Raises:
            BundleError, NotSaved: the state cannot be written.
        """
        if self._store is None:
            raise BundleError("bundle in memory", "it has no folder to save the state in")
        with self._saving(self._store, publish=publish):
            self._store.write(self._make_checkpoint(), keep=keep)
            if publish:
                self.executor.publish(session=self.name, owner=self.owner)
                self._published = self.version
        self._saved = self.version

    def remove_published(self) -> None:
        """Delete the checkpoints if the current state was published."""
        if self._store is not None and self._published == self.version:
            self._store.remove()

    def remove_saved(self) -> None:
        """Delete the checkpoints, because the session goes on with another model."""
        if self._store is not None:
            self._store.remove()

    def unload(self) -> None:
        """Write the state to disk, unless it is already there.

        Raises:
            NotSaved: the state cannot be written.
        """
        if self._store is not None and not self.is_saved:
            with self._saving(self._store):
                self._store.write_stopped(self._make_checkpoint())
            self._saved = self.version

    def close(self) -> None:
        """Release the state."""
        self.executor.close()

    def _saving(
        self, store: CheckpointStore, *, publish: bool = False
    ) -> AbstractContextManager[None]:
        if self._archive is None:
            return nullcontext()
        return self._archive.saving(store, self.owner, publish=publish)

    def _make_checkpoint(self) -> Checkpoint:
        executor = self.executor
        return Checkpoint(
            session=self.name, step=executor.step, tensors=executor.state(), owner=self.owner
        )
