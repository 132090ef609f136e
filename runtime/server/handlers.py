"""The connection handler, which passes messages between a client's connection and its dispatcher.

One handler serves one connection on the event loop.  Slow work runs in threads; at most one of
them works on a session at a time.  A fair queue (see :mod:`turns`) decides which client's work runs
next.  If a reply can no longer be sent, any remaining work is still done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Literal, TypeVar

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    ConnectionLost,
    RemoteProtocolError,
    ServerBusy,
    SplitonnxError,
    StaleConnection,
    TaskTooLarge,
    Unauthorized,
)
from splitonnx.messages import REPLACED, Hello, Message, Save, Tensors, is_bye
from splitonnx.runtime.edge.websockets import Peer
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.deliveries import pass_on
from splitonnx.runtime.server.dispatchers import Dispatcher, ReceivedMessage
from splitonnx.runtime.server.ledgers import Reply, list_finished
from splitonnx.runtime.server.metrics import Part
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.server.reply_senders import ReplySender
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.server.task_memory import TaskMemory
from splitonnx.runtime.wire.close_codes import BUSY, POLICY, RESTART

STEP_PARTS: tuple[Part, ...] = ("receive", "compute", "send")
STOP_GRACE = 30.0
"""Seconds that a stopping server waits for the next message of a running step."""

BYE_GRACE = 1.0
"""Seconds that a stopping server waits for a message that has partly arrived, to see a goodbye."""

SEND_GRACE = 5.0
"""Seconds that a stopping server waits for a client to read a reply."""

_Result = TypeVar("_Result")

_logger = logging.getLogger("splitonnx.server")


class ConnectionHandler:
    """The handler of one connection, from its first message to its end."""

    def __init__(self, context: ServerContext, peer: Peer) -> None:
        self._context = context
        self._peer = peer
        self._metrics = context.metrics
        self._seconds: dict[Part, float] = dict.fromkeys(STEP_PARTS, 0.0)
        self._dispatcher: Dispatcher | None = None
        self._owner: Hashable = object()  # that takes turns; of its own if the client has none
        self._has_message = False  # a message arrived and is not handled yet
        self._delivering: set[asyncio.Task[None]] = set()
        self._sender = ReplySender(self._send)

    async def run(self) -> None:
        """Serve the connection until it ends or the server stops."""
        self._loop = asyncio.get_running_loop()
        self._metrics.open_connection()
        self._log(logging.INFO, "came")
        stopping = self._stopping = asyncio.create_task(self._context.stop.wait())
        self._gone = asyncio.create_task(self._peer.wait_closed())
        self._memory = TaskMemory(
            self._context, self._peer, gone=self._gone, stopping=self._stopping
        )
        try:
            await self._serve(stopping)
            self._log(logging.INFO, "left")
        except ConnectionLost as error:
            self._log(logging.WARNING, "lost", error)
        except (ServerBusy, Unauthorized) as error:
            self._metrics.count_refusal(type(error).__name__)
            self._log(logging.WARNING, "refused", error)
            code = BUSY if isinstance(error, ServerBusy) else POLICY
            await self._peer.close(code, str(error))
        finally:
            stopping.cancel()
            self._gone.cancel()
            self._sender.cancel()
            self._metrics.close_connection()
            if self._dispatcher is not None:
                self._release(self._dispatcher)

    @property
    def is_sending(self) -> bool:
        """Return whether a message, or part of one, has arrived but has not been handled yet."""
        return self._has_message or self._peer.is_sending

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection without waiting; send the reason if the client is reading.

        ``code`` is the websocket close code.
        """
        self._peer.dismiss(code, reason)

    def _pass_on(self, delivery: Delivery) -> None:
        """Give a delivery to another session's connection; may be called in any thread."""
        self._loop.call_soon_threadsafe(pass_on, self._context, delivery)

    def deliver(self, delivery: Delivery) -> None:
        """Send the reply that another session's task caused, without waiting."""
        task = asyncio.create_task(self._deliver(delivery))
        self._delivering.add(task)
        task.add_done_callback(self._delivering.discard)

    async def _deliver(self, delivery: Delivery) -> None:
        dispatcher = self._dispatcher
        assert dispatcher is not None  # a session's connection has greeted
        with suppress(ConnectionLost):  # the client asks again on its next connection
            async with self._context.lock(delivery.key.session):
                await self._reply(dispatcher.take(delivery), self._context.storage)
                self._note_refusal(dispatcher)
                if delivery.is_last:
                    self._metrics.count_step(delivery.key.phase)
            if dispatcher.is_interrupted:
                await self._peer.close(RESTART, str(dispatcher.refused))

    def _release(self, dispatcher: Dispatcher) -> None:
        dispatcher.end()
        session, holders = dispatcher.session, self._context.holders
        if session is not None and holders.get(session.id) is self:
            del holders[session.id]

    async def _serve(self, stopping: asyncio.Task[Literal[True]]) -> None:
        owner = self._peer.owner
        if owner is None:
            content = await self._next_message(stopping)
            if content is None:
                return
            tokens = self._context.tokens
            owner = await self._peer.log_in(content, None if tokens is None else tokens.find)
        self._owner = owner or self._owner
        dispatcher = Dispatcher(
            self._context.registry,
            owner,
            roles=self._peer.roles,
            norm=self._context.norm,
            batch=self._context.batch,
            estimates=self._context.estimates,
            task_bytes=None if self._context.budget is None else self._context.budget.total,
            pass_on=self._pass_on,
        )
        self._dispatcher = dispatcher
        while not dispatcher.is_closed:
            begun = time.perf_counter()
            content = await self._next_message(stopping)
            if content is None:
                return
            self._seconds["receive"] += time.perf_counter() - begun
            await self._handle(dispatcher, content)
        await self._finish_sending()

    async def _receive(self) -> Chunk | bytearray:
        content = await self._peer.receive()
        self._has_message = True
        if self._dispatcher is not None and self._dispatcher.in_flight > 1:
            self._peer.read_ahead(len(content))
        return content

    async def _next_message(
        self, stopping: asyncio.Task[Literal[True]]
    ) -> Chunk | bytearray | None:
        """Wait for a message; once the server stops, for one of an open step or a goodbye."""
        receiving = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and (self._is_mid_step or self._peer.is_sending):
                grace = STOP_GRACE if self._is_mid_step else BYE_GRACE
                await self._context.wait_unless_halted(receiving, grace)
            if receiving.done() and (
                self._is_mid_step or not stopping.done() or is_bye(receiving.result())
            ):
                return receiving.result()
        finally:
            if receiving.cancel():
                await asyncio.wait((receiving,))
            if not receiving.cancelled():
                receiving.exception()  # mark the exception as retrieved
        await self._finish_sending()
        await self._peer.close(RESTART, "the server restarts")
        return None

    @property
    def _is_mid_step(self) -> bool:
        return self._dispatcher is not None and self._dispatcher.is_mid_step

    async def _handle(self, dispatcher: Dispatcher, content: Chunk | bytearray) -> None:
        self._metrics.count_bytes("up", len(content))
        has_greeted = dispatcher.session is not None
        turns = self._context.compute if has_greeted else self._context.storage
        try:
            received = await self._take_turn(turns, partial(self._read, dispatcher, content))
            if isinstance(received.message, Hello):
                await self._enter(dispatcher, received)
        except ConnectionLost:
            raise
        except SplitonnxError as error:
            async with self._own(dispatcher):
                await self._refuse(dispatcher, error)
            return
        if dispatcher.session is not None:
            dispatcher.session.note_received(len(content), time.monotonic())
        if isinstance(received.message, Hello):
            self._take_over(dispatcher, received.message.generation)
        async with self._own(dispatcher):
            await self._answer(dispatcher, received)
        if dispatcher.is_interrupted:
            await self._peer.close(RESTART, str(dispatcher.refused))

    async def _refuse(self, dispatcher: Dispatcher, error: SplitonnxError) -> None:
        """Report an error to the client; the error ends the connection."""
        await self._reply(dispatcher.refuse(error), self._context.storage)
        self._note_refusal(dispatcher)

    async def _answer(self, dispatcher: Dispatcher, received: ReceivedMessage) -> None:
        """Act on a message as soon as there is memory for its task."""
        session, message = dispatcher.session, received.message
        done, before = (0, ()) if session is None else (session.tasks_done, session.open_tasks)
        try:
            if session is not None and isinstance(message, Tensors):
                dispatcher.check_session(message.session)
                await self._memory.reserve(session, self._owner, message, received.needed)
        except (ServerBusy, TaskTooLarge, RemoteProtocolError, StaleConnection) as error:
            await self._refuse(dispatcher, error)
            return
        begun = time.perf_counter()
        try:
            is_work = isinstance(message, Tensors)
            turns = self._context.compute if is_work else self._context.storage
            group = self._sender.find_group(message)
            await self._reply(dispatcher.answer(received), turns, group)
        finally:  # count the work even if the reply could not be sent
            if session is not None:
                seconds = time.perf_counter() - begun
                number = session.tasks_done - done
                self._note(message, session, list_finished(message, before, number), seconds)
            self._note_refusal(dispatcher)

    async def _enter(self, dispatcher: Dispatcher, received: ReceivedMessage) -> None:
        """Find the session of a greeting; no thread waits while a session is written to disk."""
        enter = partial(dispatcher.enter, received)
        while (pending := await self._take_turn(self._context.storage, enter)) is not None:
            written = asyncio.wrap_future(pending)
            await asyncio.wait((written, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if not written.done():
                raise ConnectionLost(self._peer.name, "it left before its session was there")

    def _take_over(self, dispatcher: Dispatcher, generation: int) -> None:
        """End the session's older connection, which may be waiting for a reply to be read."""
        session = dispatcher.session
        if session is None or generation <= session.generation:
            return
        older = self._context.holders.get(session.id)
        if older is not None:
            reason = f"connection {generation} took the session over"
            older.dismiss(REPLACED, reason)
        self._context.holders[session.id] = self

    @asynccontextmanager
    async def _own(self, dispatcher: Dispatcher) -> AsyncIterator[None]:
        """Hold the lock of the connection's session while the context is open."""
        if dispatcher.session is None:
            self._has_message = False
            yield
            return
        async with self._context.lock(dispatcher.session.id):
            self._has_message = False
            yield

    async def _take_turn(self, turns: Turns, function: Callable[[], _Result]) -> _Result:
        """Run a function when it is the owner's turn, unless the connection ends before.

        Raises:
            ConnectionLost: the connection ended; its message is dropped.
        """
        piece = turns.run(self._owner, function)
        withdraw = partial(self._withdraw, turns, piece)
        self._gone.add_done_callback(withdraw)
        try:
            return await piece
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            reason = "it left before its message's turn came"
            raise ConnectionLost(self._peer.name, reason) from None
        finally:
            self._gone.remove_done_callback(withdraw)

    @staticmethod
    def _withdraw(turns: Turns, piece: asyncio.Future[_Result], _: object) -> None:
        turns.withdraw(piece)

    async def _reply(self, replies: Iterator[Reply], turns: Turns, group: Hashable = None) -> None:
        """Compute all replies, and send each once it is ready and the previous one was sent.

        The work does not wait for the client to read, and the task's memory is freed as soon as the
        work is done.  The next message waits while more runs of tasks are unread than may be open.
        """
        dispatcher, work = self._dispatcher, partial(self._work_off, replies, group)
        assert dispatcher is not None
        try:
            await asyncio.shield(turns.run(self._owner, work))
            self._memory.settle(dispatcher.session)
            most = 0 if dispatcher.is_closed or dispatcher.in_flight == 1 else dispatcher.in_flight
            if self._sender.unsent > most:
                with self._memory.letting_go(dispatcher.session):
                    await self._finish_sending(most)
        finally:
            self._memory.settle(dispatcher.session)

    async def _finish_sending(self, most: int = 0) -> None:
        """Wait until replies of ``most`` tasks are unread; not for long if the server stops."""
        sending = asyncio.create_task(self._sender.wait(most))
        await asyncio.wait((sending, self._stopping), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            await self._context.wait_unless_halted(sending, SEND_GRACE)
        if not sending.done():
            self._peer.dismiss(RESTART, "the server restarts")
        await sending

    async def _send(self, reply: Reply) -> None:
        begun, size = time.perf_counter(), sum(map(len, reply))
        if self._dispatcher is not None and self._dispatcher.session is not None:
            self._dispatcher.session.note_sent(size)
        await self._peer.send(reply)
        self._seconds["send"] += time.perf_counter() - begun
        self._metrics.count_bytes("down", size)

    def _read(self, dispatcher: Dispatcher, content: Chunk | bytearray) -> ReceivedMessage:
        begun = time.perf_counter()
        try:
            return dispatcher.read(content)
        finally:
            self._seconds["compute"] += time.perf_counter() - begun

    def _work_off(self, replies: Iterator[Reply], group: Hashable) -> None:
        """Compute all replies in a thread; each is sent as soon as it is ready."""
        begun = time.perf_counter()
        try:
            for reply in replies:
                self._loop.call_soon_threadsafe(self._sender.put, reply, group)
        finally:
            self._seconds["compute"] += time.perf_counter() - begun

    def _note(
        self, message: Message, session: Session, finished: Sequence[str], seconds: float
    ) -> None:
        """Update the metrics after a message; ``finished`` are the phases of the ended tasks."""
        for phase in finished:
            self._metrics.count_step(phase)
        match message:
            case Tensors() if finished:
                for part in STEP_PARTS:
                    self._metrics.observe(part, self._seconds[part])
                    self._seconds[part] = 0.0
            case Hello(generation=generation) if generation > 1:
                self._metrics.count_reconnect()
            case Save():
                self._metrics.observe("checkpoint", seconds)
                self._metrics.count_checkpoint("saved" if session.is_saved else "failed")

    def _note_refusal(self, dispatcher: Dispatcher) -> None:
        if (error := dispatcher.refused) is not None:
            self._metrics.count_refusal(type(error).__name__)
            self._log(logging.WARNING, "refused", error)

    def _log(self, level: int, event: str, reason: SplitonnxError | None = None) -> None:
        session = None if self._dispatcher is None else self._dispatcher.session
        _logger.log(
            level,
            "%s %s",
            self._peer.name,
            event if reason is None else f"{event}: {reason}",
            extra={
                "peer": self._peer.name,
                "owner": self._peer.owner or None,
                "session": None if session is None else session.id,
                "step": None if session is None else session.ledger.step,
                "reason": None if reason is None else type(reason).__name__,
            },
        )
