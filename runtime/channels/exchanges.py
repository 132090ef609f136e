"""A client's side of a session as an event machine: it sends, receives and waits for nothing.

An exchange greets the server, and after a lost connection connects again, greets, and sends the
messages of the unfinished tasks again, so the caller sends and receives each tensor exactly once.
In the greeting, both sides agree on the step at which they continue; if that step is earlier than
the client's current step, the caller must go back to it.

What happens outside is reported by :meth:`Exchange.connected`, :meth:`~Exchange.lost`,
:meth:`~Exchange.receive` and :meth:`~Exchange.wake`, with the time in seconds.  What is to
be done outside is returned by :meth:`~Exchange.next_effect`, and what the caller waits for by
:meth:`~Exchange.next_outcome`.  ``runtime/js/src/channels/exchanges.ts`` is the twin.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    BundleMismatch,
    ConnectionLost,
    ProtocolError,
    RemoteProtocolError,
    ServerBusy,
    SplitonnxError,
    StaleConnection,
    StepRestarted,
    StepsLost,
)
from splitonnx.manifests import PartyManifest
from splitonnx.messages import (
    REPLACED,
    Bye,
    Fault,
    Hello,
    Message,
    Save,
    TaskKey,
    Tensors,
    Welcome,
)
from splitonnx.runtime.channels.exchange_events import (
    Aim,
    Connect,
    Effect,
    Failed,
    Greeted,
    HangUp,
    Outcome,
    Replied,
    SaveAnswered,
    State,
    Transmit,
)
from splitonnx.runtime.channels.faults import expect, read_saved, translate_fault
from splitonnx.runtime.channels.greetings import (
    ResumePoint,
    SharingTerms,
    check_welcome,
    list_change,
    make_hello,
)
from splitonnx.runtime.channels.open_tasks import OpenTask, SentTasks
from splitonnx.runtime.channels.retries import Attempts, Backoff
from splitonnx.runtime.wire.protocols import Protocol

GREETINGS = 10
"""Most rejected greetings in a row; then the client assumes that another one has its session."""

_logger = logging.getLogger("splitonnx.client")


class Exchange:
    """A client's exchange with its server in one session.

    Both sides continued from ``step`` after the last greeting.  It was the client's current step
    at that time, or an earlier step with a state that the client has kept.  ``terms`` say how the
    server joins what its clients learn; they are ``None`` before the first greeting.  ``in_flight``
    is the number of tasks of one step that may be open at once, and ``in_flight_wanted`` the number
    that the server is asked for; the caller ends tasks in ``tasks``.
    ``wake_at`` is when :meth:`wake` is to be called, or ``None``.

    Args:
        manifest: the client's manifest.
        session: the session's name.
        find_resume_point: a function that returns the steps from which the client can resume.
        backoff: how long to wait between attempts to reconnect, and when to give up.
        can_reconnect: whether a lost connection can be replaced.
        can_share: whether the client may share its parameters if the server joins what its clients
            learn.
    """

    def __init__(
        self,
        *,
        manifest: PartyManifest,
        session: str,
        find_resume_point: Callable[[], ResumePoint],
        backoff: Backoff,
        can_reconnect: bool,
        can_share: bool = False,
    ) -> None:
        self.session = session
        self.terms: SharingTerms | None = None
        self.step = 0
        self.in_flight = self.in_flight_wanted = 1
        self.wake_at: float | None = None
        self._manifest = manifest
        self._find_resume_point = find_resume_point
        self._attempts = Attempts(backoff)
        self._can_reconnect = can_reconnect
        self._can_share = can_share
        self._state = State.CLOSED
        self._aim = Aim.START  # where the next greeting is to lead
        self._is_patient = False
        self._generation = 0
        self._greetings = 0  # rejected in a row
        self._protocol = Protocol(manifest, manifest.party)
        self.tasks = SentTasks()
        self._repeated: OpenTask | None = None  # whose replies come once more
        self._saving: Save | None = None
        self._effects: deque[Effect] = deque()
        self._outcomes: deque[Outcome] = deque()

    def next_effect(self) -> Effect | None:
        """Return what is to be done next, or ``None``; the caller does it before it goes on."""
        return self._effects.popleft() if self._effects else None

    def next_outcome(self) -> Outcome | None:
        """Return what the caller has waited for, or ``None``."""
        return self._outcomes.popleft() if self._outcomes else None

    def next_failure(self) -> Failed | None:
        """Return the newest outcome if it is a failure, and forget those before it."""
        if not (self._outcomes and isinstance(self._outcomes[-1], Failed)):
            return None
        failed = self._outcomes[-1]
        self._outcomes.clear()
        return failed

    def start(self, now: float, *, is_patient: bool) -> None:
        """Connect for the first time; :class:`Greeted` follows, or :class:`Failed`.

        ``is_patient`` means to retry if the first connection fails.
        """
        self._aim, self._is_patient = Aim.START, is_patient
        if is_patient:
            self._seek(None, now)
        else:
            self._dial()

    def return_to_step(self, now: float) -> None:
        """Connect again, so that the server goes back to the client's step, an earlier one.

        :class:`Greeted` follows, or :class:`Failed` with ``StepsLost`` if the server does not have
        that step any more; the client must then go back further.
        """
        self._aim, self._is_patient = Aim.RETURN, True
        self._seek(None, now)

    def widen(self, in_flight: int) -> bool:
        """Ask for more tasks in flight from the next greeting on; return whether one is needed.

        If it is, call :meth:`return_to_step`.  The server may permit fewer than ``in_flight``.
        """
        if in_flight <= self.in_flight_wanted or not self._can_reconnect:
            return False
        self.in_flight_wanted = in_flight
        return True

    def send(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        """Send wires (named tensors) of an open task to the server, as soon as that is possible.

        ``seed`` and ``learning_rate`` are those of the task.  Do not change the arrays until the
        task is ended, because they may have to be sent again.
        """
        self._offer(self.tasks.record(key, wires, seed, learning_rate), wires)

    def save(self, step: int, *, publish: bool = False, keep: bool = False) -> None:
        """Ask the server to save its state at ``step``; :class:`SaveAnswered` or Failed follows.

        ``publish`` makes the state the outcome, too; ``keep`` is for :meth:`return_to_step`.
        """
        self._saving = Save(session=self.session, step=step, publish=publish, keep=keep)
        self._offer(self._saving)

    def close(self, *, for_good: bool = True) -> None:
        """End the session with a Bye message and close the connection; may be called twice.

        ``for_good=False`` closes only the connection; the server keeps the session.
        """
        if for_good and self._is_connected:
            with suppress(ProtocolError):
                self._transmit(Bye())
        self._hang_up()

    def connected(self) -> None:
        """Report that the connection is open."""
        self._state = State.GREETING
        self._protocol = Protocol(self._manifest, self._manifest.party)
        self._generation += 1
        self.tasks.begin_connection()
        self._transmit(self._make_hello())

    def wake(self, now: float) -> None:
        """Report that it is ``wake_at``."""
        if self.wake_at is not None and now >= self.wake_at:
            self._dial()

    def lost(self, error: SplitonnxError, now: float) -> None:
        """Report that the connection has ended, or could not be opened."""
        self._effects.clear()  # it was for that connection
        if self._state in (State.DIALING, State.GREETING):
            self._fail_greeting(error, now)
        elif self._is_connected:
            self._reconnect(error, now)

    def receive(self, content: Chunk | bytearray, now: float) -> None:
        """Report that a message has arrived; the tensors of an outcome are views of it."""
        try:
            message, tensors = self._protocol.receive(content)
            if isinstance(message, Fault):
                raise translate_fault(message, self._generation)
            if self._state is State.GREETING:
                self._handle_welcome(expect(Welcome, message))
            elif self._state is State.REPEATING:
                self._handle_repeated(expect(Tensors, message))
            elif self._saving is not None:
                reason = read_saved(self._saving, message)
                self._attempts.note_progress()
                self._saving = None
                self._outcomes.append(SaveAnswered(reason))
            else:
                self._handle_reply(expect(Tensors, message), tensors)
        except SplitonnxError as error:
            if self._state is State.GREETING:
                self._fail_greeting(error, now)
            else:
                self._fail(error)

    @property
    def is_connecting(self) -> bool:
        """Return whether messages wait for a connection, or for its greeting."""
        return self._state not in (State.CLOSED, State.OPEN)

    @property
    def _is_connected(self) -> bool:
        return self._state in (State.GREETING, State.REPEATING, State.OPEN)

    def _dial(self) -> None:
        self.wake_at = None
        self._state = State.DIALING
        self._effects.append(Connect())

    def _hang_up(self) -> None:
        self.wake_at = None
        if self._state is not State.CLOSED:
            self._effects.append(HangUp())
        self._state = State.CLOSED

    def _offer(self, message: Message, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        """Send a message now; or later, with all others, if there is no connection yet."""
        if self._state is State.OPEN:
            self._transmit(message, tensors)
        elif self._state is State.CLOSED:
            self._fail(ConnectionLost("the server", "the connection is closed"))

    def _transmit(self, message: Message, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        self._effects.append(Transmit(self._protocol.send(message, tensors)))

    def _fail(self, error: SplitonnxError) -> None:
        self._saving = None
        self._outcomes.append(Failed(error))

    def _make_hello(self) -> Hello:
        return make_hello(
            self._manifest,
            self.session,
            self._find_resume_point(),
            generation=self._generation,
            is_open=self.tasks.count > 0,
            can_repeat=self._find_last() is not None,
            can_share=self._can_share,
            micro_batch=self.tasks.micro_batch,
            in_flight=self.in_flight_wanted,
        )

    def _find_last(self) -> OpenTask | None:
        return self.tasks.find_last(self._find_resume_point().step)

    def _seek(self, cause: SplitonnxError | None, now: float) -> None:
        """Wait before the next attempt to connect, or give up."""
        self._hang_up()
        delay = self._attempts.find_delay(now, can_give_up=cause is not None)
        if cause is not None and delay is None:
            self._fail(cause)
        else:
            self._state, self.wake_at = State.WAITING, now + (delay or 0.0)

    def _fail_greeting(self, error: SplitonnxError, now: float) -> None:
        """Greet again if that can help."""
        self._hang_up()
        if isinstance(error, StaleConnection):
            self._greetings += 1
            if error.newest < self._generation or self._greetings == GREETINGS:
                self._greetings = 0
                self._fail(error)
            else:
                self._generation = error.newest  # used by an earlier run of this client
                self._dial()
            return
        self._greetings = 0
        if self._is_patient and isinstance(error, ConnectionLost | ServerBusy):
            self._seek(error, now)
        else:
            self._fail(error)

    def _reconnect(self, cause: SplitonnxError, now: float) -> None:
        """Connect again in place of a lost connection, unless that is impossible or refused."""
        self._aim, self._is_patient = Aim.RESUME, True
        is_lost = isinstance(cause, ConnectionLost)
        is_replaced = isinstance(cause, ConnectionLost) and cause.code == REPLACED
        if is_lost and not is_replaced and self._can_reconnect:
            _logger.warning("%s; reconnecting", cause)
            self._seek(cause, now)
            return
        self._hang_up()
        stale = StaleConnection(self._generation, self._generation + 1)
        self._fail(stale if is_replaced else cause)

    def _handle_welcome(self, welcome: Welcome) -> None:
        point = self._find_resume_point()
        terms = check_welcome(
            welcome, self.session, point, manifest=self._manifest, can_share=self._can_share
        )
        if self.terms not in (None, terms):
            raise BundleMismatch(*list_change(self.terms, terms))
        self.terms, self.step, self._state = terms, welcome.step, State.OPEN
        self.in_flight = max(1, min(welcome.in_flight, self.in_flight_wanted))
        self._greetings = 0
        if self._aim is Aim.RESUME:
            _logger.info("reconnected at step %d", self.step)
        if self._aim is Aim.START:
            self._attempts.forget_loss()  # nothing was lost before the start
            self._outcomes.append(Greeted())
        elif self.step != point.step:
            self._fail(StepsLost(self.step))
        elif self.tasks.count > self.in_flight or (welcome.restarts and self.tasks.micro_batch):
            self._fail(StepRestarted(self.step))
        else:
            if self._aim is Aim.RETURN:
                self._attempts.note_progress()
                self._outcomes.append(Greeted())
            self._repeat_last() if welcome.wants_repeat else self._repeat_open()

    def _repeat_last(self) -> None:
        """Repeat the messages of the last task, before those of the open ones."""
        last = self._find_last()
        if last is None:
            raise RemoteProtocolError("it wants messages again that the client does not have")
        last.due = 0
        for message, wires in last.sent:
            self._transmit(message, wires)
        self._repeated, self._state = last, State.REPEATING
        if not last.received:
            self._repeat_open()

    def _handle_repeated(self, message: Tensors) -> None:
        """Check a reply to the last task, which was received before."""
        assert self._repeated is not None  # as its messages were sent
        self._repeated.take(message)
        if self._repeated.due == self._repeated.received:
            self._repeat_open()

    def _repeat_open(self) -> None:
        """Repeat the messages of the open tasks, and the request to save."""
        self._state = State.OPEN
        for message, wires in self.tasks.repeat():
            self._transmit(message, wires)
        if self._saving is not None:
            self._transmit(self._saving)

    def _handle_reply(self, message: Tensors, tensors: Mapping[str, np.ndarray]) -> None:
        task = self.tasks.find_answered(message)
        if task.take(message):
            self._attempts.note_progress()
            self.tasks.note_reply(task)
            self._outcomes.append(Replied(message.key, tensors))
