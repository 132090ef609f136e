"""A client's channel to its server: an exchange with its connections, for a caller that waits.

The exchange decides what is sent and when to connect again; the channel does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import numpy as np

from splitonnx.errors import ConnectionLost, LocalProtocolError, SplitonnxError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.runtime.channels.background_sending import BackgroundSending
from splitonnx.runtime.channels.exchange_events import (
    Connect,
    Effect,
    Greeted,
    HangUp,
    Outcome,
    Replied,
    SaveAnswered,
    Transmit,
)
from splitonnx.runtime.channels.exchanges import Exchange
from splitonnx.runtime.channels.greetings import ResumePoint, SharingTerms
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.wire.transports import Transport

Dial: TypeAlias = Callable[[], Transport]
"""Opens a new connection, or raises ConnectionLost if that is not possible now."""

_Expected = TypeVar("_Expected", bound=Outcome)


class Channel:
    """A client's logical connection to its server for one session; it reconnects automatically.

    Args:
        dial: a function that opens a connection; ``None`` if ``transport`` is the only one.
        transport: an open connection to use first; ``None`` to open one with ``dial``.
        manifest: the client's manifest.
        session: the session's name.
        find_resume_point: a function that returns the steps from which the client can resume.
        backoff: how long to wait between attempts to reconnect, and when to give up.
        patient: whether to retry if the first connection fails.
        can_share: whether the client may share its parameters if the server joins what its clients
            learn.
        in_background: whether a thread may send on a connection while the caller computes.

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
        in_background: bool = False,
    ) -> None:
        self.session = session
        self._dial = dial
        self._given = transport
        self._transport: Transport | None = None
        self._past_traffic = (0, 0)
        self._in_background = in_background
        self._exchange = Exchange(
            manifest=manifest,
            session=session,
            find_resume_point=find_resume_point,
            backoff=backoff,
            can_reconnect=dial is not None,
            can_share=can_share,
        )
        self._exchange.start(time.monotonic(), is_patient=patient)
        self._wait_for(Greeted)

    @property
    def step(self) -> int:
        """Return the step at which both sides continued after the last greeting."""
        return self._exchange.step

    @property
    def in_flight(self) -> int:
        """Return how many tasks of one step may be open at once."""
        return self._exchange.in_flight

    @property
    def terms(self) -> SharingTerms | None:
        """Return how the server joins what its clients learn."""
        return self._exchange.terms

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

    def widen(self, in_flight: int) -> None:
        """Ask the server to let as many tasks of a step be open at once; it may permit fewer.

        This connects again if the server was not asked for as many before.

        Raises:
            StepsLost, ConnectionLost, ServerBusy: see :meth:`return_to_step`.
        """
        if self._exchange.widen(in_flight):
            self.return_to_step()

    def end(self, key: TaskKey) -> None:
        """Close a task that is complete; do nothing if it is not open."""
        self._exchange.tasks.end(key)

    def end_all(self) -> None:
        """Close all tasks, complete or aborted."""
        self._exchange.tasks.end_all()

    def send_wires(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        """Send wires (named tensors) of a task to the server, reconnecting if necessary.

        The first message opens the task.  ``seed`` and ``learning_rate`` are those of the task.  Do
        not change the arrays until the task is ended, because they may have to be sent again.

        Raises:
            StepsLost: the server is at an earlier step; the task must be aborted.
            StepRestarted: the server lost the step's micro-batches; the step must be aborted.
            ConnectionLost: the connection was lost and could not be restored in time.
        """
        self._exchange.send(key, wires, seed, learning_rate)
        self._settle()

    def receive_wires(self) -> tuple[TaskKey, Mapping[str, np.ndarray]]:
        """Wait for the next reply to an open task; return the task and its wires (named tensors).

        After a reconnect, the server may repeat earlier messages, which are skipped.

        Raises:
            StepsLost, StepRestarted, ConnectionLost: see :meth:`send_wires`.
            RemoteFault: the server reported an internal error.
        """
        replied = self._wait_for(Replied)
        return replied.key, replied.wires

    def save(self, step: int, *, publish: bool = False, keep: bool = False) -> str:
        """Ask the server to save its state at ``step``; return the reason for failure, or ``""``.

        ``publish`` makes the state the outcome, too; ``keep`` is for :meth:`return_to_step`.

        Raises:
            StepsLost, ConnectionLost, RemoteFault: see :meth:`receive_wires`.
        """
        self._exchange.save(step, publish=publish, keep=keep)
        return self._wait_for(SaveAnswered).reason

    def return_to_step(self) -> None:
        """Connect again, so that the server goes back to the client's step, an earlier one.

        Raises:
            StepsLost: the server does not have that step any more; the client must go back further.
            ConnectionLost: the server could not be reached in time.
        """
        self._exchange.return_to_step(time.monotonic())
        self._wait_for(Greeted)

    def close(self, *, for_good: bool = True) -> None:
        """End the session with a Bye message and close the connection; may be called twice.

        ``for_good=False`` closes only the connection; the server keeps the session.
        """
        self._exchange.close(for_good=for_good)
        self._perform_effects()  # the other side may be gone already

    def _settle(self) -> None:
        """Do what is to be done outside, until there is a connection and all was sent."""
        while True:
            self._perform_effects()
            if (failed := self._exchange.next_failure()) is not None:
                raise failed.error
            if not self._exchange.is_connecting:
                return
            self._wait_outside()

    def _wait_for(self, expected: type[_Expected]) -> _Expected:
        """Wait for an outcome of that kind."""
        while True:
            self._settle()
            outcome = self._exchange.next_outcome()
            if isinstance(outcome, expected):
                return outcome
            if outcome is not None:
                raise LocalProtocolError(f"{outcome} came while {expected.__name__} was due")
            self._wait_outside()

    def _wait_outside(self) -> None:
        """Wait for a message, or until the exchange wants to be woken, and report it."""
        exchange = self._exchange
        if exchange.wake_at is not None:
            time.sleep(max(exchange.wake_at - time.monotonic(), 0))
            exchange.wake(max(exchange.wake_at, time.monotonic()))
            return
        try:
            content = self._require_transport().receive()
        except SplitonnxError as error:
            exchange.lost(error, time.monotonic())
        else:
            exchange.receive(content, time.monotonic())

    def _perform_effects(self) -> None:
        while (effect := self._exchange.next_effect()) is not None:
            try:
                self._perform(effect)
            except SplitonnxError as error:
                self._exchange.lost(error, time.monotonic())

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Connect():
                self._transport = self._open()
                self._exchange.connected()
            case Transmit(chunks):
                self._require_transport().send(chunks)
            case HangUp():
                self._hang_up()

    def _open(self) -> Transport:
        if self._given is not None:
            transport, self._given = self._given, None
        elif self._dial is not None:
            transport = self._dial()
        else:
            raise ConnectionLost("the server", "the connection is closed")
        has_use = self._in_background and self._exchange.in_flight_wanted > 1
        return BackgroundSending(transport) if has_use else transport

    def _require_transport(self) -> Transport:
        if self._transport is None:
            raise ConnectionLost("the server", "the connection is closed")
        return self._transport

    def _hang_up(self) -> None:
        if self._transport is not None:
            self._past_traffic = self.traffic
            transport, self._transport = self._transport, None
            transport.close()
