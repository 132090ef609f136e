"""A session: one client's training run, in which each step is performed exactly once.

A session outlives its connections.  It counts its client's steps; a policy decides how they change
the server's model.  Session and policy exchange data only.  The session yields each reply as soon
as it is ready, so that a gradient is sent before the server's own update runs.  The dispatcher
decodes messages and encodes replies.  The registry decides who may use a session and how many
sessions there are.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing

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
from splitonnx.names import ACCUMULATE, SHARE, STEP_PHASES
from splitonnx.runtime.server.ledgers import (
    Continuation,
    Fingerprint,
    Ledger,
    OpenTask,
    Query,
    Reply,
    Verdict,
)
from splitonnx.runtime.server.operations.session_statuses import SessionStatus
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.policies.tasks import Delivery, Joined, make_task

MOST_DEFERRED = 8  # messages that a client may send before what its earlier ones wait for
Encoder = Callable[[Tensors, Mapping[str, np.ndarray]], Reply]

_logger = logging.getLogger("splitonnx.server")


class Session:
    """The server's side of one client's training run, which handles one message at a time.

    ``policy`` has let the session join, with the answer ``joined``.  ``generation`` is the number
    of the newest connection.  ``tasks_done`` counts finished steps and predictions.
    """

    def __init__(self, name: str, joined: Joined, policy: Policy) -> None:
        self.id = name
        self.owner = joined.owner
        self.ledger = Ledger(joined.step, is_joint=joined.is_joint)
        self.generation = 0
        self.tasks_done = 0
        self._policy = policy
        self._saved = joined.step
        self._joined = joined
        self._held: deque[Delivery] = deque()
        self._deferred: deque[tuple[Tensors, Mapping[str, np.ndarray], Fingerprint]] = deque()
        self._is_closed = False
        self._open: dict[TaskKey, OpenTask] = {}  # of the running step, in their order
        self._running: TaskKey | None = None  # the running step's newest task, also between two
        self._query: Query | None = None
        self._bytes_up = self._bytes_down = 0
        self._received_at: float | None = None

    @property
    def is_saved(self) -> bool:
        """Return whether the client's current step is the last one that was saved."""
        return self._saved == self.ledger.step

    @property
    def open_phases(self) -> frozenset[str]:
        """Return the phases that have an unfinished task."""
        query = self._query  # another thread may end it meanwhile
        keys = (self._running, None if query is None else query.key, *self.open_tasks)
        return frozenset(key.phase for key in keys if key is not None)

    @property
    def open_tasks(self) -> tuple[TaskKey, ...]:
        """Return the unfinished tasks of the running step; may be read in any thread."""
        return tuple(self._open.copy())

    @property
    def is_joint(self) -> bool:
        """Return whether a step is made of the batches of several sessions."""
        return self._joined.is_joint

    @property
    def awaits_others(self) -> bool:
        """Return whether the running step waits for other sessions, and not for its client."""
        count = self.ledger.count_turns
        tasks = self._open.copy().items() if self._joined.is_shared else ()
        return any(t.answered < count(key.step, key.micro_batch) for key, t in tasks)

    @property
    def status(self) -> SessionStatus:
        """Return what the session is doing; may be read at any time, in any thread."""
        return SessionStatus(
            id=self.id,
            owner=self.owner,
            step=self.ledger.step,
            open_phases=self.open_phases,
            is_saved=self.is_saved,
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
            received_at=self._received_at,
        )

    def note_received(self, size: int, now: float) -> None:
        """Count the bytes of a message from the client, which arrived at the time ``now``."""
        self._bytes_up += size
        self._received_at = now

    def note_sent(self, size: int) -> None:
        """Count the bytes of a message to the client."""
        self._bytes_down += size

    def require_owner(self, owner: str) -> None:
        """Raise ``ForeignSession`` if the session does not belong to ``owner``."""
        if self.owner != owner:
            raise ForeignSession(self.id)

    def greet(self, hello: Hello, in_flight: int = 1) -> Continuation:
        """Accept a new connection, and return where both sides continue.

        ``in_flight`` is how many tasks of a step the client may have open at once.

        If possible, that is the client's current step (see :meth:`Ledger.suits`).  Otherwise, both
        sides go back to the newest step that both have, or begin the current one again if its
        micro-batches are missing.  A step that was joint with others' is not taken back: a client
        that lost it receives its replies again.

        Raises:
            StaleConnection: the session has already had a connection of this or a newer generation.
            SessionLost: there is no step at which both sides can continue.
        """
        if hello.generation <= self.generation:
            raise StaleConnection(hello.generation, self.generation)
        self._deferred.clear()
        for task in self._open.values():
            task.heard = 0
        self.give_up(SHARE)  # the client shares again, on the new connection
        if len(self._open) > 1 and not (hello.is_open or hello.micro_batch):
            self.abandon()  # it makes the step anew, and its first message may be the same
        self.ledger.in_flight = in_flight
        found = self.ledger.welcome(hello)
        if found is None:
            step = self._find_common(hello)
            self._go_back(step)
            found = Continuation(step=step, restarts=step == hello.step)
        self.generation = hello.generation
        return found

    def check_generation(self, generation: int) -> None:
        """Check that ``generation`` is the number of the session's newest connection.

        Raises:
            StaleConnection: a newer connection has taken over the session.
        """
        if generation != self.generation:
            raise StaleConnection(generation, self.generation)
        if self._is_closed:  # it was lost, and a newer connection has loaded it again
            raise StaleConnection(generation, generation + 1)

    def handle_training(
        self,
        message: Tensors,
        tensors: Mapping[str, np.ndarray],
        fingerprint: Fingerprint,
        encode: Encoder,
    ) -> Iterator[Reply | Delivery]:
        """Handle a message with a task's tensors, and yield each reply as soon as it is ready.

        Deliveries for other sessions are yielded, too, for these sessions to :meth:`take`.
        ``fingerprint`` is the hash of the message's bytes.  ``encode`` converts a reply and its
        tensors to chunks.  If a message of a training step arrives again, the replies are the same
        as the first time.  After an error, call :meth:`abandon`.

        Raises:
            RemoteProtocolError, StepConflict: the message is not allowed now.
            DataError, StageFailed: the task cannot be carried out.
        """
        step, turn, number = message.step, message.turn, message.micro_batch
        is_new = message.key not in self._open or turn >= self.ledger.count_turns(step, number)
        if is_new and self.awaits_others:  # whose results come first
            if len(self._deferred) == MOST_DEFERRED:
                raise RemoteProtocolError("it goes on before its step has ended")
            self._deferred.append((message, tensors, fingerprint))
            return
        while self._held:  # what came while the client was away
            list(self.take(self._held.popleft(), encode))
        if message.phase not in STEP_PHASES:
            yield from self._handle_query(message, tensors, encode)
            return
        match self.ledger.classify(step, turn, fingerprint, number):
            case Verdict.REPEAT:
                if (task := self._open.get(message.key)) is not None:
                    task.heard = max(task.heard, turn + 1)
                yield from self.ledger.repeat(step, turn, number)
                return
            case Verdict.BEGIN:
                if number == 0:
                    self.abandon()
                self._running = message.key
                self._open[message.key] = OpenTask(message=message)
                self.ledger.begin(fingerprint, ends_step=message.phase != ACCUMULATE)
            case Verdict.CONTINUE:
                if message.key not in self._open:
                    raise RemoteProtocolError(f"it continues {message.key}, which is not open")
                self.ledger.continue_task(fingerprint, step, number)
                self._open[message.key].heard = turn + 1
        with closing(self._policy.submit(make_task(message, tensors))) as deliveries:
            for delivery in deliveries:
                if delivery.key not in self._open:
                    yield delivery
                else:  # perhaps of a later task, which waited for this one
                    yield from self._answer_step(delivery, encode)
        fingerprint.settle()  # after the replies, so that they need not wait for a hash

    def hold(self, delivery: Delivery) -> None:
        """Keep the result of a step, which another session's task caused, until the client asks.

        May be called in any thread.
        """
        if delivery.key.phase in STEP_PHASES:
            self._held.append(delivery)

    def take(self, delivery: Delivery, encode: Encoder) -> Iterator[Reply | Delivery]:
        """Yield the reply that a delivery, which another session yielded, has for this client.

        Nothing is yielded if the client does not wait for it.  What it sent meanwhile is handled.
        The error that ended the client's task is raised.
        """
        query = self._query
        if query is not None and delivery.key == query.key:
            yield from self._answer_query(query, delivery, encode)
        elif delivery.key in self._open:
            yield from self._answer_step(delivery, encode)
        while self._deferred and not self.awaits_others:
            yield from self.handle_training(*self._deferred.popleft(), encode)

    def save(self, message: Save) -> Saved | Unsaved:
        """Write a durable checkpoint and, if requested, the outcome of the training.

        Return ``Saved``, or ``Unsaved`` with the reason if the state cannot be written.

        Raises:
            RemoteProtocolError: the client is at another step, or a step is unfinished.
        """
        if not self._is_at(message.step):
            raise RemoteProtocolError(
                f"it would save step {message.step}, the server is at {self.ledger.step}"
            )
        try:
            self._policy.save(message)
        except (BundleError, NotSaved) as error:
            _logger.error("session %s: %s", self.id, error)  # the client may not learn the path
            return Unsaved(session=self.id, step=message.step, reason=error.reason)
        self._saved = message.step
        return Saved(session=self.id, step=message.step, keep=message.keep)

    def finish(self) -> None:
        """End the session for good; if its current state was published, delete its checkpoints."""
        self.abandon()
        self._policy.finish(self.id)

    def unload(self) -> None:
        """Write the state to disk, unless it is already there, before the session leaves memory.

        Any unfinished task is aborted first.

        Raises:
            NotSaved: the state cannot be written.
        """
        self.abandon()
        self._policy.unload(self.id)

    @property
    def is_lost(self) -> bool:
        """Return whether the state was lost because the session's worker process has ended."""
        return self._policy.is_lost(self.id)

    def close(self) -> None:
        """Release the state after the session has been removed from memory."""
        self._running, self._open, self._query = None, {}, None
        if not self._is_closed:
            self._policy.leave(self.id)
        self._is_closed = True

    def abandon(self) -> None:
        """Abort every unfinished task and discard its changes to the state."""
        self._held.clear()
        self._deferred.clear()
        for phase in self.open_phases:
            self.give_up(phase)
        self.ledger.abandon()

    def give_up(self, phase: str) -> None:
        """Abort the unfinished task of a phase, if there is one, with its whole step."""
        if self._running is not None and phase in {k.phase for k in (self._running, *self._open)}:
            self._policy.withdraw(self._running)
            self._running, self._open = None, {}
            self.ledger.abandon()
        if self._query is not None and self._query.key.phase == phase:
            self._policy.withdraw(self._query.key)
            self._query = None

    def _handle_query(
        self, message: Tensors, tensors: Mapping[str, np.ndarray], encode: Encoder
    ) -> Iterator[Reply | Delivery]:
        """Handle a task that changes no step, so that it can be performed again if repeated."""
        if message.phase == SHARE and not self._is_at(message.step):
            raise RemoteProtocolError(
                f"it shares at step {message.step}, the server is at {self.ledger.step}"
            )
        query = self._query
        if message.turn == 0:
            if query is not None:
                self._policy.withdraw(query.key)
            query = self._query = Query(message=message)
        elif query is None or message.key != query.key or message.turn != query.turns:
            raise RemoteProtocolError(f"message {message.turn} of {message.key} is not due now")
        query.turns += 1
        with closing(self._policy.submit(make_task(message, tensors))) as deliveries:
            for delivery in deliveries:
                if delivery.key == query.key:
                    yield from self._answer_query(query, delivery, encode)
                else:
                    yield delivery

    def _answer_step(self, delivery: Delivery, encode: Encoder) -> Iterator[Reply]:
        """Record a delivery of an open task of the step, and yield the reply to the client.

        What answers a message that came on an earlier connection is not sent, as the client will
        send that message again.
        """
        if delivery.error is not None:
            raise delivery.error
        task, step, number = self._open[delivery.key], delivery.key.step, delivery.key.micro_batch
        newest = self.ledger.count_turns(step, number) - 1
        turn = newest if delivery.turn is None else delivery.turn
        task.answered = max(task.answered, delivery.handled)
        if delivery.tensors:
            count = self.ledger.count_replies(step, number)
            reply = msgspec.structs.replace(task.message, turn=count)
            answer = self.ledger.answer(encode(reply, delivery.tensors), turn, step, number)
            if turn < task.heard:
                yield answer
        if delivery.is_last:
            self.tasks_done += 1
            del self._open[delivery.key]
            if delivery.key.phase != ACCUMULATE:
                self._running = None
            self.ledger.commit()

    def _answer_query(self, query: Query, delivery: Delivery, encode: Encoder) -> Iterator[Reply]:
        if delivery.error is not None:
            raise delivery.error
        if delivery.tensors:
            reply = msgspec.structs.replace(query.message, turn=query.replies)
            yield encode(reply, delivery.tensors)
            query.replies += 1
        if delivery.is_last:
            self.tasks_done += 1
            self._query = None

    def _is_at(self, step: int) -> bool:
        """Return whether the client is between two steps, and ``step`` comes next.

        That may be a joint step whose replies the client has lost.
        """
        if self.ledger.is_open:
            return False
        is_behind = self.is_joint and self.ledger.suits(step, is_open=True)
        return step == self.ledger.step or is_behind

    def _find_common(self, hello: Hello) -> int:
        """Return the newest step that both sides can go back to."""
        present = {self.ledger.step, *self._policy.list_steps(self.id)}
        for step in hello.candidates:
            if step in present:
                return step
        raise SessionLost(self.id, hello.candidates, sorted(present, reverse=True))

    def _go_back(self, step: int) -> None:
        self.abandon()
        if step == self.ledger.step:
            return
        self._policy.rewind(self.id, step)
        self.ledger = Ledger(step, self.ledger.in_flight, is_joint=self.is_joint)
        self._saved = step
