"""A session: one client's training run, with its own copy of the server's part of the model.

A session outlives its connections.  The session yields each reply as soon as it is ready, so that a
gradient is sent before the server's own update runs.  The dispatcher decodes messages and encodes
replies.  The registry decides who may use a session and how many sessions there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import msgspec
import numpy as np

from splitonnx.errors import (
    BundleError,
    ForeignSession,
    NotSaved,
    RemoteProtocolError,
    SessionLost,
    StaleConnection,
)
from splitonnx.messages import Hello, Save, Saved, TaskKey, Tensors, Unsaved
from splitonnx.names import TRAIN
from splitonnx.runtime.engine.executors import Executor, SessionExecutor
from splitonnx.runtime.server.ledgers import Fingerprint, Ledger, Reply, Verdict
from splitonnx.runtime.storage.archives import Archive
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore

Encoder = Callable[[Tensors, Mapping[str, np.ndarray]], Reply]

_logger = logging.getLogger("splitonnx.server")


class Session:
    """The server's side of one client's training run, which handles one message at a time.

    ``executor`` holds the session's state.  ``store`` holds its checkpoints, and is part of
    ``archive``; both are ``None`` if there is no folder.  ``start`` is an executor with the state
    that the session started from, or ``None`` if that state is not known.  ``generation`` is the
    number of the newest connection.  ``tasks_done`` counts finished steps and predictions.
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
        self.id = name
        self.owner = owner
        self.executor = executor
        self.ledger = Ledger(executor.step)
        self.generation = 0
        self.tasks_done = 0
        self._start = start
        self._store, self._archive = store, archive
        self._saved = executor.step
        self._published = -1
        self._running: TaskKey | None = None
        self._query: TaskKey | None = None
        self._query_turns = self._query_replies = 0

    @property
    def is_saved(self) -> bool:
        """Return whether the state can be restored.

        This is possible if the state is on disk, or has not changed since the session started.
        """
        return self._saved == self.executor.step

    @property
    def open_phases(self) -> frozenset[str]:
        """Return the phases that have an unfinished task."""
        return frozenset(key.phase for key in (self._running, self._query) if key is not None)

    def require_owner(self, owner: str) -> None:
        """Check that the session belongs to ``owner``.

        Raises:
            ForeignSession: the session belongs to another owner.
        """
        if self.owner != owner:
            raise ForeignSession(self.id)

    def greet(self, hello: Hello) -> int:
        """Accept a new connection, and return the step at which both sides continue.

        If possible, that is the client's current step (see :meth:`Ledger.suits`).  Otherwise, both
        sides go back to the newest step whose state both have.

        Raises:
            StaleConnection: the session has already had a connection of this or a newer generation.
            SessionLost: there is no step at which both sides can continue.
        """
        if hello.generation <= self.generation:
            raise StaleConnection(hello.generation, self.generation)
        if self.ledger.suits(hello.step, is_open=hello.is_open, can_repeat=hello.can_repeat):
            step = hello.step
        else:
            step = self._find_common(hello)
            self._go_back(step)
        self.generation = hello.generation
        return step

    def check_generation(self, generation: int) -> None:
        """Check that ``generation`` is the number of the session's newest connection.

        Raises:
            StaleConnection: a newer connection has taken over the session.
        """
        if generation != self.generation:
            raise StaleConnection(generation, self.generation)

    def handle_training(
        self,
        message: Tensors,
        tensors: Mapping[str, np.ndarray],
        fingerprint: Fingerprint,
        encode: Encoder,
    ) -> Iterator[Reply]:
        """Handle a message with a task's tensors, and yield each reply as soon as it is ready.

        ``fingerprint`` is the hash of the message's bytes.  ``encode`` converts a reply and its
        tensors to chunks.  If a message of a training step arrives again, the replies are the same
        as the first time.  After an error, call :meth:`abandon`.

        Raises:
            RemoteProtocolError, StepConflict: the message is not allowed now.
            DataError, StageFailed: the task cannot be carried out.
        """
        if message.phase != TRAIN:
            yield from self._handle_query(message, tensors, encode)
            return
        match self.ledger.classify(message.step, message.turn, fingerprint):
            case Verdict.REPEAT:
                yield from self.ledger.repeat(message.step, message.turn)
                return
            case Verdict.BEGIN:
                self.abandon()
                self._begin(message)
                self._running = message.key
                self.ledger.begin(fingerprint)
            case Verdict.CONTINUE:
                if message.key != self._running:
                    raise RemoteProtocolError(f"it continues {message.key}, which is not open")
                self.ledger.continue_step(fingerprint)
        self.executor.deliver(message.key, tensors)
        for wires in self.executor.advance(message.key):
            reply = msgspec.structs.replace(message, turn=self.ledger.count_replies())
            yield self.ledger.answer(encode(reply, wires))
        if self.executor.is_finished(message.key):
            self.executor.finish(message.key)
            self.tasks_done += 1
            self._running = None
            self.ledger.commit()
        fingerprint.take()  # after the replies, so that they need not wait for the hash

    def save(self, message: Save) -> Saved | Unsaved:
        """Write a durable checkpoint and, if requested, the outcome of the training.

        Returns:
            ``Saved``, or ``Unsaved`` with the reason if the state cannot be written.

        Raises:
            RemoteProtocolError: the client is at another step, or a step is unfinished.
        """
        if message.step != self.executor.step or self.ledger.is_open:
            raise RemoteProtocolError(
                f"it would save step {message.step}, the server is at {self.executor.step}"
            )
        try:
            if self._store is None:
                raise BundleError("bundle in memory", "it has no folder to save the state in")
            with self._saving(self._store, publish=message.publish):
                self._store.write(self._make_checkpoint(), keep=message.keep)
                if message.publish:
                    self.executor.publish(session=self.id, owner=self.owner)
                    self._published = message.step
        except (BundleError, NotSaved) as error:
            _logger.error("session %s: %s", self.id, error)  # the client may not learn the path
            return Unsaved(session=self.id, step=message.step, reason=error.reason)
        self._saved = message.step
        return Saved(session=self.id, step=message.step, keep=message.keep)

    def finish(self) -> None:
        """End the session for good; if its current state was published, delete its checkpoints."""
        self.abandon()
        if self._store is not None and self._published == self.executor.step:
            self._store.remove()

    def unload(self) -> None:
        """Write the state to disk, unless it is already there, before the session leaves memory.

        Any unfinished task is aborted first.

        Raises:
            NotSaved: the state cannot be written.
        """
        self.abandon()
        if self._store is not None and not self.is_saved:
            with self._saving(self._store):
                self._store.write_stopped(self._make_checkpoint())
            self._saved = self.executor.step

    @property
    def is_lost(self) -> bool:
        """Return whether the state was lost because the session's worker process has ended."""
        return self.executor.is_lost

    def close(self) -> None:
        """Release the state after the session has been removed from memory."""
        self.executor.close()

    def abandon(self) -> None:
        """Abort every unfinished task and discard its changes to the state."""
        for phase in self.open_phases:
            self.give_up(phase)
        self.ledger.abandon()

    def give_up(self, phase: str) -> None:
        """Abort the unfinished task of a phase, if there is one."""
        if self._running is not None and self._running.phase == phase:
            self.executor.abandon(self._running)
            self._running = None
            self.ledger.abandon()
        if self._query is not None and self._query.phase == phase:
            self.executor.abandon(self._query)
            self._query = None

    def _begin(self, message: Tensors) -> None:
        self.executor.begin(
            message.key, data={}, seed=message.seed, learning_rate=message.learning_rate
        )

    def _handle_query(
        self, message: Tensors, tensors: Mapping[str, np.ndarray], encode: Encoder
    ) -> Iterator[Reply]:
        """Run a task that changes no state, so that it can be computed again if it is repeated."""
        key = message.key
        if message.turn == 0:
            if self._query is not None:
                self.executor.abandon(self._query)
            self._begin(message)
            self._query, self._query_turns, self._query_replies = key, 0, 0
        elif key != self._query or message.turn != self._query_turns:
            raise RemoteProtocolError(f"message {message.turn} of {key} is not due now")
        self._query_turns += 1
        self.executor.deliver(key, tensors)
        for wires in self.executor.advance(key):
            yield encode(msgspec.structs.replace(message, turn=self._query_replies), wires)
            self._query_replies += 1
        if self.executor.is_finished(key):
            self.executor.finish(key)
            self.tasks_done += 1
            self._query = None

    def _find_common(self, hello: Hello) -> int:
        """Return the newest step that both sides can go back to."""
        present = {self.ledger.step}
        if self._store is not None:
            present.update(self._store.steps())
        if self._start is not None:
            present.add(self._start.step)
        for step in hello.candidates:
            if step in present:
                return step
        raise SessionLost(self.id, hello.candidates, sorted(present, reverse=True))

    def _go_back(self, step: int) -> None:
        self.abandon()
        if step == self.ledger.step:
            return
        if self._store is not None:
            self._store.rewind(step)
        if self._store is not None and step in self._store.steps():
            self.executor.restore(self._store.read(step).tensors, step)
        elif self._start is not None and step == self._start.step:
            self.executor.restore(self._start.state(), step)
        self.ledger = Ledger(step)
        self._saved = step

    def _saving(
        self, store: CheckpointStore, *, publish: bool = False
    ) -> AbstractContextManager[None]:
        if self._archive is None:
            return nullcontext()
        return self._archive.saving(store, self.owner, publish=publish)

    def _make_checkpoint(self) -> Checkpoint:
        executor = self.executor
        return Checkpoint(
            session=self.id, step=executor.step, tensors=executor.state(), owner=self.owner
        )
