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
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    ConnectionLost,
    FormatError,
    ServerBusy,
    SplitonnxError,
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
from splitonnx.runtime.budgets import IDLE_SECONDS, Budget
from splitonnx.runtime.conversations import Conversation, Incoming
from splitonnx.runtime.estimates import Estimates
from splitonnx.runtime.ledgers import Reply
from splitonnx.runtime.metrics import Metrics, Part
from splitonnx.runtime.registries import Registry
from splitonnx.runtime.sessions import Session
from splitonnx.runtime.sockets import BUSY, POLICY, RESTART, Peer
from splitonnx.runtime.tokens import Tokens
from splitonnx.runtime.turns import Turns

STEP_PARTS: tuple[Part, ...] = ("receive", "compute", "send")
STOP_GRACE = 30.0
"""Seconds that a server that stops waits for the next message of a step that runs."""

_Result = TypeVar("_Result")

_logger = logging.getLogger("splitonnx.server")


@dataclass(kw_only=True, eq=False)
class Premises:
    """What the connections of a server share; ``stop`` is set once it is to end, ``halt`` once it
    is to end without waiting for steps that run.

    ``compute`` gives turns to what runs stages, ``storage`` to what reads and writes the disk, so
    that greetings and saving do not wait for steps.  ``locks`` and ``holders`` are by session: who
    may touch it, and whose connection is its newest.  ``waiting`` names the sessions whose lock is
    held by a message that waits for memory.
    """

    registry: Registry
    compute: Turns
    storage: Turns
    metrics: Metrics
    stop: asyncio.Event
    tokens: Tokens | None = None
    norm: float | None = None
    batch: int | None = None
    estimates: Estimates | None = None
    budget: Budget | None = None
    halt: asyncio.Event = field(default_factory=asyncio.Event)
    locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    holders: dict[str, Attendance] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)

    def give_up_idle(self) -> None:
        """Give up open tasks whose clients let others wait for memory; those can begin again."""
        assert self.budget is not None
        sessions = {session.id: session for session in self.registry.sessions}
        for task in self.budget.list_idle():
            name, phase = task
            session, lock = sessions.get(name), self.locks.get(name)
            if lock is not None and lock.locked() and name not in self.waiting:
                continue  # its next message has just come
            if session is not None and phase in session.open_phases:
                session.abandon()
                holder = self.holders.get(name)
                if holder is not None:
                    holder._peer.dismiss(RESTART, "others wait for the memory of its step")
            self.budget.release(task)


class Attendance:
    """One connection, from its first message to its end."""

    def __init__(self, premises: Premises, peer: Peer) -> None:
        self._premises = premises
        self._peer = peer
        self._metrics = premises.metrics
        self._seconds: dict[Part, float] = dict.fromkeys(STEP_PARTS, 0.0)
        self._conversation: Conversation | None = None
        self._owner: Hashable = self  # whose turn it is when this connection's is

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
        self._owner = owner or self
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
                await self._wait_for_step(receiving)
            if receiving.done() and (self._is_mid_step or not stopping.done()):
                return receiving.result()
        finally:
            receiving.cancel()
            await asyncio.wait((receiving,))
            if not receiving.cancelled():
                receiving.exception()  # was seen
        await self._peer.close(RESTART, "the server restarts")
        return None

    async def _wait_for_step(self, receiving: asyncio.Future[bytes | bytearray]) -> None:
        """Wait for a running step's next message, unless the server halts."""
        halting = asyncio.create_task(self._premises.halt.wait())
        try:
            await asyncio.wait(
                (receiving, halting), timeout=STOP_GRACE, return_when=asyncio.FIRST_COMPLETED
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
        except SplitonnxError as error:
            if isinstance(error, ConnectionLost):
                raise
            async with self._own(conversation):
                await self._reply(conversation.refuse(error), self._premises.storage)
                self._settle(conversation.session)
            self._note_refusal(conversation)
            return
        if isinstance(incoming.message, Hello):
            self._take_over(conversation, incoming.message.generation)
        async with self._own(conversation):
            session = conversation.session
            done = 0 if session is None else session.tasks_done
            if session is not None and isinstance(incoming.message, Tensors):
                await self._reserve(session, incoming.message, incoming.needed)
            begun = time.perf_counter()
            try:
                is_work = isinstance(incoming.message, Tensors)
                turns = self._premises.compute if is_work else self._premises.storage
                await self._reply(conversation.answer(incoming), turns)
            finally:  # what was done counts, whether or not the client could be told
                if session is not None:
                    seconds = time.perf_counter() - begun
                    self._note(incoming.message, session, session.tasks_done > done, seconds)
                self._note_refusal(conversation)
                self._settle(session)
        if conversation.is_interrupted:
            await self._peer.close(RESTART, str(conversation.refused))

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
            older._peer.dismiss(REPLACED, reason)
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
        """
        budget, task = self._premises.budget, (session.id, message.phase)
        if budget is None:
            return
        if message.turn > 0:  # the task has its memory, or is none that is open
            budget.extend(task, self._owner, needed)
            return
        granted = budget.ask(task, self._owner, needed)
        self._premises.waiting.add(session.id)
        try:
            while not granted.done() and not (self._gone.done() or self._stopping.done()):
                self._premises.give_up_idle()
                await asyncio.wait(
                    (granted, self._gone, self._stopping),
                    timeout=IDLE_SECONDS / 10,
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            self._premises.waiting.discard(session.id)
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

    async def _reply(self, replies: Iterator[Reply], turns: Turns) -> None:
        """Send replies as they become ready; the work goes on to its end in any case."""
        lost: ConnectionLost | None = None
        advance = partial(self._advance, replies)
        pending = turns.run(self._owner, advance)
        while (chunks := await asyncio.shield(pending)) is not None:
            pending = turns.run(self._owner, advance)  # while it is sent
            if lost is not None:
                continue
            begun = time.perf_counter()
            try:
                await self._peer.send(chunks)
            except ConnectionLost as error:
                lost = error
            self._seconds["send"] += time.perf_counter() - begun
            self._metrics.count_bytes("down", sum(map(len, chunks)))
        if lost is not None:
            raise lost

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
