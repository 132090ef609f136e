"""A client's channel to its server on an event loop: an exchange with its connections.

The exchange decides what is sent and when to connect again; the channel does it.  While the caller
computes, the loop sends what waits and reads ahead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar, TypeVarTuple

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, LocalProtocolError, SplitonnxError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.runtime.channels.asynchronous.queued_sending import QueuedSending
from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from splitonnx.runtime.channels.asynchronous.transports import AsyncDial, AsyncTransport
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
from splitonnx.runtime.wire.fragments import FRAGMENT

CLOSE_SECONDS = 10.0
"""Longest time in seconds that closing may take."""

_Arguments = TypeVarTuple("_Arguments")
_Expected = TypeVar("_Expected", bound=Outcome)


class AsyncChannel:
    """A client's logical connection to its server for one session; it reconnects automatically.

    Call :meth:`open` first.  Only one method may run at a time.  If a method is cancelled, close
    the channel: it does not know what was done.

    Args:
        dial: a function that opens a connection.
        thread: checks and decodes large messages, so that the loop is free meanwhile.
        manifest: the client's manifest.
        session: the session's name.
        find_resume_point: a function that returns the steps from which the client can resume.
        backoff: how long to wait between attempts to reconnect, and when to give up.
        can_share: whether the client may share its parameters if the server joins what its clients
            learn.
    """

    def __init__(
        self,
        dial: AsyncDial,
        thread: WorkThread,
        *,
        manifest: PartyManifest,
        session: str,
        find_resume_point: Callable[[], ResumePoint],
        backoff: Backoff,
        can_share: bool = False,
    ) -> None:
        self._dial = dial
        self._thread = thread
        self._transport: AsyncTransport | None = None
        self._exchange = Exchange(
            manifest=manifest,
            session=session,
            find_resume_point=find_resume_point,
            backoff=backoff,
            can_reconnect=True,
            can_share=can_share,
        )

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

    async def open(self, *, is_patient: bool = False) -> None:
        """Connect for the first time; ``is_patient`` means to retry if that fails.

        Raises:
            ConnectionLost, ServerBusy: the server cannot be reached or is full.
            BundleMismatch, RemoteFault: the server refuses the client.
            SharingNotPermitted: the server joins what its clients learn, and ``can_share`` is
                false.
        """
        self._exchange.start(time.monotonic(), is_patient=is_patient)
        await self._wait_for(Greeted)

    async def widen(self, in_flight: int) -> None:
        """Ask the server to let as many tasks of a step be open at once; it may permit fewer.

        This connects again if the server was not asked for as many before.

        Raises:
            StepsLost, ConnectionLost, ServerBusy: see :meth:`return_to_step`.
        """
        if self._exchange.widen(in_flight):
            await self.return_to_step()

    def end(self, key: TaskKey) -> None:
        """Close a task that is complete; do nothing if it is not open."""
        self._exchange.tasks.end(key)

    def end_all(self) -> None:
        """Close all tasks, complete or aborted."""
        self._exchange.tasks.end_all()

    async def send_wires(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        """Send wires (named tensors) of a task to the server, reconnecting if necessary.

        The first message opens the task.  ``seed`` and ``learning_rate`` are those of the task.
        This returns before the message was sent.  Do not change the arrays until the task is ended.

        Raises:
            StepsLost: the server is at an earlier step; the task must be aborted.
            StepRestarted: the server lost the step's micro-batches; the step must be aborted.
            ConnectionLost: the connection was lost and could not be restored in time.
        """
        size = sum(array.nbytes for array in wires.values())
        await self._call(size, self._exchange.send, key, wires, seed, learning_rate)
        await self._connect_and_send()

    async def receive_wires(self) -> tuple[TaskKey, Mapping[str, np.ndarray]]:
        """Wait for the next reply to an open task; return the task and its wires (named tensors).

        After a reconnect, the server may repeat earlier messages, which are skipped.

        Raises:
            StepsLost, StepRestarted, ConnectionLost: see :meth:`send_wires`.
            RemoteFault: the server reported an internal error.
        """
        replied = await self._wait_for(Replied)
        return replied.key, replied.wires

    async def save(self, step: int, *, publish: bool = False, keep: bool = False) -> str:
        """Ask the server to save its state at ``step``; return the reason for failure, or ``""``.

        ``publish`` makes the state the outcome, too; ``keep`` is for :meth:`return_to_step`.

        Raises:
            StepsLost, ConnectionLost, RemoteFault: see :meth:`receive_wires`.
        """
        self._exchange.save(step, publish=publish, keep=keep)
        return (await self._wait_for(SaveAnswered)).reason

    async def return_to_step(self) -> None:
        """Connect again, so that the server goes back to the client's step, an earlier one.

        Raises:
            StepsLost: the server does not have that step any more; the client must go back further.
            ConnectionLost: the server could not be reached in time.
        """
        self._exchange.return_to_step(time.monotonic())
        await self._wait_for(Greeted)

    async def close(self, *, for_good: bool = True) -> None:
        """End the session with a Bye message and close the connection; may be called twice.

        ``for_good=False`` closes only the connection; the server keeps the session.  If this is
        cancelled, or takes longer than 10 s, the connection is closed at once.
        """
        self._exchange.close(for_good=for_good)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._perform_effects()  # the other side may be gone already
        finally:
            if self._transport is not None:
                self._transport.abort()

    async def _connect_and_send(self) -> None:
        """Do what is to be done outside, until there is a connection and all waits to be sent."""
        while True:
            await self._perform_effects()
            if (failed := self._exchange.next_failure()) is not None:
                raise failed.error
            if not self._exchange.is_connecting:
                return
            await self._wait_outside()

    async def _wait_for(self, expected: type[_Expected]) -> _Expected:
        """Wait for an outcome of that kind."""
        while True:
            await self._connect_and_send()
            outcome = self._exchange.next_outcome()
            if isinstance(outcome, expected):
                return outcome
            if outcome is not None:
                raise LocalProtocolError(f"{outcome} came while {expected.__name__} was due")
            await self._wait_outside()

    async def _wait_outside(self) -> None:
        """Wait for a message, or until the exchange wants to be woken, and report it."""
        exchange = self._exchange
        if exchange.wake_at is not None:
            await asyncio.sleep(max(exchange.wake_at - time.monotonic(), 0))
            exchange.wake(max(exchange.wake_at, time.monotonic()))
            return
        try:
            content = await self._require_transport().receive()
        except SplitonnxError as error:
            exchange.lost(error, time.monotonic())
        else:
            await self._report(content)

    async def _report(self, content: Chunk | bytearray) -> None:
        await self._call(len(content), self._exchange.receive, content, time.monotonic())

    async def _call(
        self, size: int, function: Callable[[*_Arguments], None], *arguments: *_Arguments
    ) -> None:
        """Call a function that looks at ``size`` bytes, in the thread if these are many."""
        if size <= FRAGMENT:
            function(*arguments)
        else:
            await self._thread.run(function, *arguments)

    async def _perform_effects(self) -> None:
        while (effect := self._exchange.next_effect()) is not None:
            try:
                await self._perform(effect)
            except SplitonnxError as error:
                self._exchange.lost(error, time.monotonic())

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Connect():
                self._transport = QueuedSending(await self._dial())
                self._exchange.connected()
            case Transmit(chunks):
                await self._require_transport().send(chunks)
            case HangUp():
                await self._hang_up()

    def _require_transport(self) -> AsyncTransport:
        if self._transport is None:
            raise ConnectionLost("the server", "the connection is closed")
        return self._transport

    async def _hang_up(self) -> None:
        if self._transport is not None:
            transport, self._transport = self._transport, None
            await transport.close()
