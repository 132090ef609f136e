"""A client's channel to its server: a logical connection that reconnects automatically.

After reconnecting, the channel sends the greeting and repeats the messages of the unfinished task,
so the caller sends and receives each tensor exactly once.  In the greeting, both sides agree on the
step at which they continue; if that step is earlier than the client's current step, the caller must
go back to it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TypeAlias, TypeVar

import numpy as np

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
    Saved,
    TaskKey,
    Tensors,
    Unsaved,
    Welcome,
)
from splitonnx.runtime.channels.faults import translate_fault
from splitonnx.runtime.channels.greetings import (
    ResumePoint,
    SharingTerms,
    check_welcome,
    list_change,
    make_hello,
)
from splitonnx.runtime.channels.open_tasks import OpenTask, SentTasks
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.wire.protocols import Protocol
from splitonnx.runtime.wire.transports import Transport

GREETINGS = 10
"""Most rejected greetings in a row; then the client assumes that another one has its session."""

Dial: TypeAlias = Callable[[], Transport]
"""Opens a new connection, or raises ConnectionLost if that is not possible now."""

_Answer = TypeVar("_Answer", bound=Message)

_logger = logging.getLogger("splitonnx.client")


class Channel:
    """A client's logical connection to its server for one session; it reconnects automatically.

    Both sides continued from ``step`` after the last greeting.  It was the client's current step
    at that time, or an earlier step with a state that the client has kept.  ``terms`` say how the
    server joins what its clients learn; they are ``None`` before the first greeting.

    Args:
        dial: a function that opens a connection; ``None`` if ``transport`` is the only connection.
        transport: an open connection to use first; ``None`` to open one with ``dial``.
        manifest: the client's manifest.
        session: the session's name.
        find_resume_point: a function that returns the steps from which the client can resume.
        backoff: how long to wait between attempts to reconnect, and when to give up.
        patient: whether to retry if the first connection fails.
        can_share: whether the client may share its parameters if the server joins what its clients
            learn.

    Raises:
        ConnectionLost, ServerBusy: the server cannot be reached or is full.
        BundleMismatch, RemoteFault: the server refuses the client.
        SharingNotPermitted: the server joins what its clients learn, and ``can_share`` is false.
    """

    def __init__(
        self,
        dial: Dial | None,
        transport: Transport | None = None,
        *,
        manifest: PartyManifest,
        session: str,
        find_resume_point: Callable[[], ResumePoint],
        backoff: Backoff,
        patient: bool = False,
        can_share: bool = False,
    ) -> None:
        self.session = session
        self.terms: SharingTerms | None = None
        self._can_share = can_share
        self._dial = dial
        self._given = transport
        self._manifest = manifest
        self._find_resume_point = find_resume_point
        self._backoff = backoff
        self._generation = 0
        self._wants_repeat = self._restarts = False
        self._delays: Iterator[float] | None = None  # kept until a new message arrives
        self._lost_at: float | None = None  # time of the first loss, kept as long
        self._transport: Transport | None = None
        self._protocol = Protocol(manifest, manifest.party)
        self._tasks = SentTasks()
        self._past_traffic = (0, 0)
        self.step = self._find_server(None) if patient else self._greet()
        self._lost_at = None  # nothing was lost before the start

    @property
    def can_reconnect(self) -> bool:
        """Return whether the channel can open connections."""
        return self._dial is not None

    @property
    def traffic(self) -> tuple[int, int]:
        """Return how many bytes have been sent and received so far, across all connections."""
        sent, received = self._past_traffic
        if self._transport is None:
            return sent, received
        return sent + self._transport.bytes_sent, received + self._transport.bytes_received

    def begin(self, key: TaskKey) -> None:
        """Open the task ``key``; its messages are kept, to be sent again after a reconnect."""
        self._tasks.open = OpenTask(key=key)

    def end(self) -> None:
        """Close the open task, if any; call this when the task is complete or has been aborted."""
        self._tasks.end()

    def send_wires(self, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float) -> None:
        """Send wires (named tensors) of the open task to the server, reconnecting if necessary.

        ``seed`` and ``learning_rate`` are those of the task.  Do not change the arrays until
        :meth:`end` is called, because they may have to be sent again.

        Raises:
            StepsLost: the server is at an earlier step; the task must be aborted.
            StepRestarted: the server lost the step's micro-batches; the step must be aborted.
            ConnectionLost: the connection was lost and could not be restored in time.
        """
        task = self._tasks.require_open()
        message = Tensors(
            session=task.key.session,
            phase=task.key.phase,
            step=task.key.step,
            micro_batch=task.key.micro_batch,
            turn=len(task.sent),
            seed=seed,
            learning_rate=learning_rate,
        )
        task.sent.append((message, wires))
        try:
            self._send(message, wires)
        except ConnectionLost as error:
            self._reconnect(error)

    def receive_wires(self) -> Mapping[str, np.ndarray]:
        """Wait for the next message of the open task, and return its wires (named tensors).

        After a reconnect, the server may repeat earlier messages, which are skipped.

        Raises:
            StepsLost, ConnectionLost: see :meth:`send_wires`.
            RemoteFault: the server reported an internal error.
        """
        task = self._tasks.require_open()
        while True:
            try:
                message, tensors = self._receive(Tensors)
            except ConnectionLost as error:
                self._reconnect(error)
                continue
            task.check(message)
            if message.turn == task.received:
                task.received += 1
                self._note_progress()
                self._tasks.note_reply()
                return tensors

    def save(self, step: int, *, publish: bool = False, keep: bool = False) -> str:
        """Ask the server to save its state at ``step``; return the reason for failure, or ``""``.

        ``publish`` makes the state the outcome, too; ``keep`` is for :meth:`return_to_step`.

        Raises:
            StepsLost, ConnectionLost, RemoteFault: see :meth:`receive_wires`.
        """
        while True:
            try:
                self._send(Save(session=self.session, step=step, publish=publish, keep=keep))
                answer = self._receive_saved()
            except ConnectionLost as error:
                self._reconnect(error)
                continue
            if answer.step != step:
                raise RemoteProtocolError(f"it saved step {answer.step}, not {step}")
            self._note_progress()
            if isinstance(answer, Unsaved):
                return answer.reason
            return "its version cannot keep the best state" if keep and not answer.keep else ""

    def return_to_step(self) -> None:
        """Connect again, so that the server goes back to the client's step, an earlier one.

        Raises:
            StepsLost: the server does not have that step any more; the client must go back further.
            ConnectionLost: the server could not be reached in time.
        """
        self._hang_up()
        self.step = self._find_server(None)
        self._note_progress()
        if self.step != self._find_resume_point().step:
            raise StepsLost(self.step)

    def close(self, *, for_good: bool = True) -> None:
        """End the session with a Bye message and close the connection; may be called twice.

        ``for_good=False`` closes only the connection; the server keeps the session.
        """
        if self._transport is not None and for_good:
            with suppress(ProtocolError):  # the other side may be gone already
                self._send(Bye())
        self._hang_up()

    def _note_progress(self) -> None:
        """Record that a new message arrived; the next reconnect starts with the shortest delay."""
        self._delays = self._lost_at = None

    def _reconnect(self, cause: ConnectionLost) -> None:
        """Reconnect to the session, and send the messages again that the server may have missed."""
        while True:
            if self._dial is None:
                self._hang_up()
                raise cause
            if cause.code == REPLACED:
                self._hang_up()
                raise StaleConnection(self._generation, self._generation + 1) from cause
            _logger.warning("%s; reconnecting", cause)
            self.step = self._find_server(cause)
            _logger.info("reconnected at step %d", self.step)
            if self.step != self._find_resume_point().step:
                raise StepsLost(self.step)
            if self._restarts and self._tasks.micro_batch:
                raise StepRestarted(self.step)
            try:
                self._repeat()
            except ConnectionLost as error:
                cause = error
            else:
                return

    def _repeat(self) -> None:
        """Repeat the messages of the last task, if the server wants them, and of the open task."""
        if self._wants_repeat:
            last = self._find_last()
            if last is None:
                raise RemoteProtocolError("it wants messages again that the client does not have")
            self._send_all(last)
            for _ in range(last.received):  # these replies were received before
                last.check(self._receive(Tensors)[0])
        if self._tasks.open is not None:
            self._send_all(self._tasks.open)

    def _send_all(self, task: OpenTask) -> None:
        task.due = 0
        for message, wires in task.sent:
            self._send(message, wires)

    def _find_last(self) -> OpenTask | None:
        """Return the task before the next one, if it was kept."""
        return self._tasks.find_last(self._find_resume_point().step)

    def _find_server(self, cause: SplitonnxError | None) -> int:
        """Connect and greet until the server answers; return the step to continue at."""
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        limit = self._backoff.give_up_after
        if self._delays is None:
            self._delays = self._backoff.delays()
        for delay in self._delays:
            if cause is not None and limit is not None:
                left = self._lost_at + limit - time.monotonic()
                if left <= 0:
                    raise cause
                delay = min(delay, left)
            time.sleep(delay)
            try:
                return self._greet()
            except (ConnectionLost, ServerBusy) as error:
                cause = error
        raise AssertionError("the delays have no end")

    def _greet(self) -> int:
        """Connect, greet, and return the step at which both sides continue."""
        for attempt in itertools.count(1):
            self._hang_up()
            self._transport = self._connect()
            self._protocol = Protocol(self._manifest, self._manifest.party)
            self._generation += 1
            try:
                self._send(self._make_hello())
                welcome, _ = self._receive(Welcome)  # the protocol compares digest and wires
                self._check_welcome(welcome)
            except StaleConnection as error:
                if error.newest < self._generation or attempt == GREETINGS:
                    self._hang_up()
                    raise
                self._generation = error.newest  # used by an earlier run of this client
            except SplitonnxError:
                self._hang_up()
                raise
            else:
                self._wants_repeat, self._restarts = welcome.wants_repeat, welcome.restarts
                return welcome.step
        raise AssertionError("the count has no end")

    def _connect(self) -> Transport:
        if self._given is not None:
            transport, self._given = self._given, None
            return transport
        if self._dial is None:
            raise ConnectionLost("the server", "the connection is closed")
        return self._dial()

    def _make_hello(self) -> Hello:
        return make_hello(
            self._manifest,
            self.session,
            self._find_resume_point(),
            generation=self._generation,
            is_open=self._tasks.open is not None and bool(self._tasks.open.sent),
            can_repeat=self._find_last() is not None,
            can_share=self._can_share,
            micro_batch=self._tasks.micro_batch,
        )

    def _check_welcome(self, welcome: Welcome) -> None:
        point = self._find_resume_point()
        terms = check_welcome(
            welcome, self.session, point, manifest=self._manifest, can_share=self._can_share
        )
        if self.terms not in (None, terms):
            raise BundleMismatch(*list_change(self.terms, terms))
        self.terms = terms

    def _hang_up(self) -> None:
        if self._transport is not None:
            self._past_traffic = self.traffic
            transport, self._transport = self._transport, None
            transport.close()

    def _send(self, message: Message, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        if self._transport is None:
            raise ConnectionLost("the server", "the connection is closed")
        self._transport.send(self._protocol.send(message, tensors))

    def _receive(self, expected: type[_Answer]) -> tuple[_Answer, Mapping[str, np.ndarray]]:
        message, tensors = self._receive_any()
        if not isinstance(message, expected):
            raise RemoteProtocolError(
                f"it sent {type(message).__name__} where {expected.__name__} was due"
            )
        return message, tensors

    def _receive_saved(self) -> Saved | Unsaved:
        message, _ = self._receive_any()
        if not isinstance(message, Saved | Unsaved):
            raise RemoteProtocolError(f"it sent {type(message).__name__} where Saved was due")
        return message

    def _receive_any(self) -> tuple[Message, Mapping[str, np.ndarray]]:
        if self._transport is None:
            raise ConnectionLost("the server", "the connection is closed")
        message, tensors = self._protocol.receive(self._transport.receive())
        if isinstance(message, Fault):
            raise translate_fault(message, self._generation)
        return message, tensors
