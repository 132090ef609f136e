"""The server's side of its connections: from the socket to the conversation and back.

One attendance serves one connection, on the event loop; what takes time runs in threads when it
is its owner's turn, and a session has one of them at a time.  A reply that cannot be sent any more
does not end the work that follows it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Literal, TypeVar

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    ConnectionLost,
    FormatError,
    ServerBusy,
    SplitonnxError,
    TaskTooLarge,
    Unauthorized,
)
from splitonnx.manifests import PREDICT, TRAIN
from splitonnx.messages import (
    REPLACED,
    Fault,
    Hello,
    Login,
    Message,
    Save,
    Tensors,
    decode_message,
    encode_message,
)
from splitonnx.runtime.budgets import IDLE_SECONDS
from splitonnx.runtime.conversations import Conversation, Incoming
from splitonnx.runtime.ledgers import Reply
from splitonnx.runtime.metrics import Part
from splitonnx.runtime.premises import Premises
from splitonnx.runtime.sessions import Session
from splitonnx.runtime.sockets import BUSY, POLICY, RESTART, Peer
from splitonnx.runtime.turns import Turns

STEP_PARTS: tuple[Part, ...] = ("receive", "compute", "send")
STOP_GRACE = 30.0
"""Seconds that a server that stops waits for the next message of a step that runs."""

SEND_GRACE = 5.0
"""Seconds that a server that stops waits until a reply is read."""

_Result = TypeVar("_Result")

_logger = logging.getLogger("splitonnx.server")


class Attendance:
    """One connection, from its first message to its end."""

    def __init__(self, premises: Premises, peer: Peer) -> None:
        self._premises = premises
        self._peer = peer
        self._metrics = premises.metrics
        self._seconds: dict[Part, float] = dict.fromkeys(STEP_PARTS, 0.0)
        self._conversation: Conversation | None = None
        # Whose turn it is when this connection's is; turns keep it when the connection is gone.
        self._owner: Hashable = object()

    async def run(self) -> None:
        """Serve the connection until it ends or the server stops."""
        self._metrics.open_connection()
        self._log(logging.INFO, "came")
        stopping = self._stopping = asyncio.create_task(self._premises.stop.wait())
        self._gone = asyncio.create_task(self._peer.wait_closed())
        try:
            await self._converse(stopping)
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
            self._metrics.close_connection()
            if self._conversation is not None:
                self._let_go(self._conversation)

    def dismiss(self, code: int, reason: str) -> None:
        """End the connection without waiting; the other side is told why, if it reads."""
        self._peer.dismiss(code, reason)

    def _let_go(self, conversation: Conversation) -> None:
        conversation.end()
        session = conversation.session
        if session is not None and self._premises.holders.get(session.id) is self:
            del self._premises.holders[session.id]

    async def _converse(self, stopping: asyncio.Task[Literal[True]]) -> None:
        owner = self._peer.owner
        if owner is None:
            content = await self._next_message(stopping)
            if content is None:
                return
            owner = await self._log_in(content)
        self._owner = owner or self._owner
        conversation = Conversation(
            self._premises.registry,
            owner,
            roles=self._peer.roles,
            norm=self._premises.norm,
            batch=self._premises.batch,
            estimates=self._premises.estimates,
            task_bytes=None if self._premises.budget is None else self._premises.budget.total,
        )
        self._conversation = conversation
        while not conversation.is_closed:
            begun = time.perf_counter()
            content = await self._next_message(stopping)
            if content is None:
                return
            self._seconds["receive"] += time.perf_counter() - begun
            await self._handle(conversation, content)

    async def _log_in(self, content: Chunk | bytearray) -> str:
        """Find whose token a stranger's first message shows.

        Raises:
            Unauthorized: it shows none that is known.
        """
        try:
            message, _ = decode_message(content)
        except FormatError:
            message = None
        tokens = self._premises.tokens
        found = None
        if isinstance(message, Login) and tokens is not None:
            found = tokens.find(message.token)
        if found is None:
            error = Unauthorized(self._peer.name, POLICY, "no token that is known here")
            fault = Fault(code=type(error).__name__, reason=error.reason)
            await self._peer.send(encode_message(fault))
            raise error
        await self._peer.admit(found)
        return found.owner

    async def _next_message(
        self, stopping: asyncio.Task[Literal[True]]
    ) -> bytes | bytearray | None:
        """Wait for a message; ``None`` once the server stops, unless a step is in its middle."""
        receiving = asyncio.ensure_future(self._peer.receive())
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and self._is_mid_step:
                await self._wait_unless_halted(receiving, STOP_GRACE)
            if receiving.done() and (self._is_mid_step or not stopping.done()):
                return receiving.result()
        finally:
            receiving.cancel()
            await asyncio.wait((receiving,))
            if not receiving.cancelled():
                receiving.exception()  # was seen
        await self._peer.close(RESTART, "the server restarts")
        return None

    async def _wait_unless_halted(self, awaited: asyncio.Future[_Result], seconds: float) -> None:
        """Wait some seconds, unless the server is to end without waiting for steps that run."""
        halting = asyncio.create_task(self._premises.halt.wait())
        try:
            await asyncio.wait(
                (awaited, halting), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            halting.cancel()

    @property
    def _is_mid_step(self) -> bool:
        return self._conversation is not None and self._conversation.is_mid_step

    async def _handle(self, conversation: Conversation, content: Chunk | bytearray) -> None:
        self._metrics.count_bytes("up", len(content))
        has_greeted = conversation.session is not None
        turns = self._premises.compute if has_greeted else self._premises.storage
        try:
            incoming = await self._take_turn(turns, partial(self._read, conversation, content))
            if isinstance(incoming.message, Hello):
                await self._enter(conversation, incoming)
        except ConnectionLost:
            raise
        except SplitonnxError as error:
            async with self._own(conversation):
                await self._refuse(conversation, error)
            return
        if isinstance(incoming.message, Hello):
            self._take_over(conversation, incoming.message.generation)
        async with self._own(conversation):
            await self._answer(conversation, incoming)
        if conversation.is_interrupted:
            await self._peer.close(RESTART, str(conversation.refused))

    async def _refuse(self, conversation: Conversation, error: SplitonnxError) -> None:
        """Tell the client of an error, which ends the conversation."""
        await self._reply(conversation, conversation.refuse(error), self._premises.storage)
        self._note_refusal(conversation)

    async def _answer(self, conversation: Conversation, incoming: Incoming) -> None:
        """Act on a message, once there is memory for its task."""
        session, message = conversation.session, incoming.message
        done = 0 if session is None else session.tasks_done
        is_work = isinstance(message, Tensors)
        try:
            if session is not None and isinstance(message, Tensors):
                await self._reserve(session, message, incoming.needed)
        except (ServerBusy, TaskTooLarge) as error:
            await self._refuse(conversation, error)
            return
        begun = time.perf_counter()
        try:
            turns = self._premises.compute if is_work else self._premises.storage
            await self._reply(conversation, conversation.answer(incoming), turns)
        finally:  # what was done counts, whether or not the client could be told
            if session is not None:
                seconds = time.perf_counter() - begun
                self._note(message, session, session.tasks_done > done, seconds)
            self._note_refusal(conversation)

    async def _enter(self, conversation: Conversation, incoming: Incoming) -> None:
        """Find the session of a greeting; while a session is written to disk no thread waits."""
        enter = partial(conversation.enter, incoming)
        while (pending := await self._take_turn(self._premises.storage, enter)) is not None:
            written = asyncio.wrap_future(pending)
            await asyncio.wait((written, self._gone), return_when=asyncio.FIRST_COMPLETED)
            if not written.done():
                raise ConnectionLost(self._peer.name, "it left before its session was there")

    def _take_over(self, conversation: Conversation, generation: int) -> None:
        """End the session's older connection, which may be stuck with a reply that nobody reads."""
        session = conversation.session
        if session is None or generation <= session.generation:
            return
        older = self._premises.holders.get(session.id)
        if older is not None:
            reason = f"connection {generation} took the session over"
            older.dismiss(REPLACED, reason)
        self._premises.holders[session.id] = self

    @asynccontextmanager
    async def _own(self, conversation: Conversation) -> AsyncIterator[None]:
        """Have the conversation's session for oneself."""
        if conversation.session is None:
            yield
            return
        name = conversation.session.id
        lock = self._premises.locks.get(name)
        if lock is None:
            lock = self._premises.locks[name] = asyncio.Lock()
        async with lock:
            yield

    async def _reserve(self, session: Session, message: Tensors, needed: int) -> None:
        """Wait for the memory of the message's task, unless the connection or the server ends.

        Raises:
            ConnectionLost: it does; what it sent is forgotten.
            ServerBusy, TaskTooLarge: there is not so much, or not so much left.
        """
        budget, task = self._premises.budget, (session.id, message.phase)
        if budget is None:
            return
        if message.turn > 0:  # the task has its memory, or is none that is open
            budget.extend(task, self._owner, needed)
            return
        granted = budget.ask(task, self._owner, needed)
        try:
            with self._letting_go(session):
                while not granted.done() and not (self._gone.done() or self._stopping.done()):
                    self._premises.give_up_idle()
                    await asyncio.wait(
                        (granted, self._gone, self._stopping),
                        timeout=IDLE_SECONDS / 10,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
        finally:
            if not granted.done():
                granted.cancel()
        if granted.cancelled():
            if self._stopping.done():
                await self._peer.close(RESTART, "the server restarts")
            raise ConnectionLost(self._peer.name, "it ended before its task had its memory")

    def _settle(self, session: Session | None) -> None:
        """Give back the memory of a session's tasks that are over."""
        budget = self._premises.budget
        if budget is None or session is None:
            return
        for phase in (TRAIN, PREDICT):
            if phase in session.open_phases:
                budget.pause((session.id, phase))
            else:
                budget.release((session.id, phase))

    async def _take_turn(self, turns: Turns, function: Callable[[], _Result]) -> _Result:
        """Run a function when it is the owner's turn, unless the connection ends before.

        Raises:
            ConnectionLost: it did; what it sent is forgotten.
        """
        piece = turns.run(self._owner, function)
        await asyncio.wait((piece, self._gone), return_when=asyncio.FIRST_COMPLETED)
        if not piece.done() and turns.withdraw(piece):
            raise ConnectionLost(self._peer.name, "it left before its message's turn came")
        return await piece

    async def _reply(
        self, conversation: Conversation, replies: Iterator[Reply], turns: Turns
    ) -> None:
        """Work on replies to the end, and send each once it is ready and the one before is gone.

        The work does not wait for the client to read, and what its task held is given back as soon
        as it is done.
        """
        ready: asyncio.Queue[Reply | None] = asyncio.Queue()
        sending = asyncio.create_task(self._send(ready))
        advance = partial(self._advance, replies)
        try:
            while (chunks := await asyncio.shield(turns.run(self._owner, advance))) is not None:
                ready.put_nowait(chunks)
            ready.put_nowait(None)
            self._settle(conversation.session)
            with self._letting_go(conversation.session):
                await self._finish_sending(sending)
        finally:
            if not sending.cancel() and not sending.cancelled():
                sending.exception()  # was seen
            self._settle(conversation.session)

    async def _finish_sending(self, sending: asyncio.Task[None]) -> None:
        """Wait until replies are read; once the server stops, not for long, and not if it halts."""
        await asyncio.wait((sending, self._stopping), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            await self._wait_unless_halted(sending, SEND_GRACE)
        if not sending.done():
            self._peer.dismiss(RESTART, "the server restarts")
        await sending

    async def _send(self, ready: asyncio.Queue[Reply | None]) -> None:
        while (chunks := await ready.get()) is not None:
            begun = time.perf_counter()
            await self._peer.send(chunks)
            self._seconds["send"] += time.perf_counter() - begun
            self._metrics.count_bytes("down", sum(map(len, chunks)))

    @contextmanager
    def _letting_go(self, session: Session | None) -> Iterator[None]:
        """Let the session's open tasks be given up, although its lock is held: nothing runs."""
        if session is None:
            yield
            return
        self._premises.waiting.add(session.id)
        try:
            yield
        finally:
            self._premises.waiting.discard(session.id)

    def _read(self, conversation: Conversation, content: Chunk | bytearray) -> Incoming:
        begun = time.perf_counter()
        try:
            return conversation.read(content)
        finally:
            self._seconds["compute"] += time.perf_counter() - begun

    def _advance(self, replies: Iterator[Reply]) -> Reply | None:
        begun = time.perf_counter()
        try:
            return next(replies, None)
        finally:
            self._seconds["compute"] += time.perf_counter() - begun

    def _note(self, message: Message, session: Session, is_done: bool, seconds: float) -> None:
        """Count what a message led to."""
        match message:
            case Tensors(phase=phase) if is_done:
                self._metrics.count_step(phase)
                for part in STEP_PARTS:
                    self._metrics.observe(part, self._seconds[part])
                    self._seconds[part] = 0.0
            case Hello(generation=generation) if generation > 1:
                self._metrics.count_reconnect()
            case Save():
                self._metrics.observe("checkpoint", seconds)
                self._metrics.count_checkpoint("saved" if session.is_saved else "failed")

    def _note_refusal(self, conversation: Conversation) -> None:
        error = conversation.refused
        if error is not None:
            self._metrics.count_refusal(type(error).__name__)
            self._log(logging.WARNING, "refused", error)

    def _log(self, level: int, event: str, reason: SplitonnxError | None = None) -> None:
        session = None if self._conversation is None else self._conversation.session
        _logger.log(
            level,
            "%s %s",
            self._peer.name,
            event if reason is None else f"{event}: {reason}",
            extra={
                "peer": self._peer.name,
                "owner": self._peer.owner or None,
                "session": None if session is None else session.id,
                "step": None if session is None else session.executor.step,
                "reason": None if reason is None else type(reason).__name__,
            },
        )
