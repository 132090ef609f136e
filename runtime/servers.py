"""The server: one part of a model, trained in as many sessions as clients come.

The event loop moves messages and answers pings; ONNX Runtime works in threads beside it, for each
session one message after the other.  While a reply is on its way, the work that follows it has
begun, and it goes on to its end whether or not the reply arrives.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

from splitonnx.bundles import PartyBundle
from splitonnx.errors import ConnectionLost, SplitonnxError, UsageError
from splitonnx.runtime.conversations import Conversation
from splitonnx.runtime.engines import Engine
from splitonnx.runtime.executors import Executor
from splitonnx.runtime.ledgers import Reply
from splitonnx.runtime.protocols import SERVER
from splitonnx.runtime.registries import Registry
from splitonnx.runtime.sockets import Peer, serve

DEFAULT_PORT = 8765
RESTARTING = 1012
"""The websocket closing code of a server that will be back."""
STOP_GRACE = 30.0
"""Seconds that a server that stops waits for the next message of a step that runs."""

_Result = TypeVar("_Result")

_logger = logging.getLogger("splitonnx.server")


class Server:
    """Serves a bundle's server part over websockets.

    Either :meth:`serve_forever`, or use it as a context manager, which serves in a thread while
    the context lasts::

        with Server("bundle/server", port=0) as server:
            Client("bundle/client", server.url).fit(data)

    A client that leaves, or is lost, leaves the state as its last whole step made it; the next
    client goes on from there.

    Args:
        bundle: the server's folder, or the loaded part.
        host: the address to listen on.
        port: the port; 0 takes any free one.
        threads: threads of one operator; all cores by default.

    Raises:
        BundleError, FormatError: the folder cannot be used.
        UsageError: the bundle is not a server's part.
        WrongRuntime, StageFailed: a stage cannot be loaded.
    """

    def __init__(
        self,
        bundle: str | Path | PartyBundle,
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        threads: int | None = None,
        resume: bool = False,
    ) -> None:
        party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
        if party.manifest.party != SERVER:
            raise UsageError(f"this is the {party.manifest.party}'s part; serve the server's")
        self.host = host
        self.port = port
        executor = Executor(party, Engine(threads))
        self._registry = Registry(executor, resume=resume)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._attending: set[asyncio.Task[Any]] = set()
        self._worker = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="splitonnx")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address for clients on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"ws://[{host}]:{self.port}" if ":" in host else f"ws://{host}:{self.port}"

    def serve_forever(self) -> None:
        """Serve until SIGINT or SIGTERM comes.

        Raises:
            PortInUse: another program has the port.
        """
        asyncio.run(self._run(handle_signals=True))

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run_in_thread, args=(started,), daemon=True)
        self._thread.start()
        started.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving; what a client has not finished is given up.  May be called twice."""
        if self._thread is not None and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None
        self._worker.shutdown()

    def _run_in_thread(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._run(started=started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _run(
        self, *, handle_signals: bool = False, started: Future[None] | None = None
    ) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if handle_signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._stop.set)
        async with serve(self._attend, self.host, self.port) as port:
            self.port = port
            _logger.info("serving on %s", self.url)
            if started is not None:
                started.set_result(None)
            await self._stop.wait()
            _logger.info("stopping: steps that run are finished first")
            if self._attending:
                await asyncio.wait(self._attending)
        await self._work(self._registry.park_all)
        _logger.info("stopped")

    async def _attend(self, peer: Peer) -> None:
        """Serve one connection from its greeting to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)
        conversation = Conversation(self._registry)
        _logger.info("%s came", peer.name)
        try:
            while not conversation.is_closed:
                content = await self._next_message(peer, conversation)
                if content is None:
                    await peer.close(RESTARTING, "the server stops")
                    break
                await self._handle(peer, conversation, content)
            _logger.info("%s left%s", peer.name, _describe_step(conversation))
        except ConnectionLost as error:
            _logger.warning("%s%s", error, _describe_step(conversation))
        finally:
            conversation.end()

    async def _next_message(self, peer: Peer, conversation: Conversation) -> bytes | None:
        """Wait for a message; ``None`` once the server stops and no step is in the middle."""
        assert self._stop is not None
        receiving = asyncio.ensure_future(peer.receive())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done() and conversation.is_mid_step:
                await asyncio.wait((receiving,), timeout=STOP_GRACE)
            if self._stop.is_set() and not (receiving.done() and conversation.is_mid_step):
                return None
            return await receiving
        finally:
            stopping.cancel()
            receiving.cancel()
            await asyncio.wait((receiving, stopping))

    async def _handle(self, peer: Peer, conversation: Conversation, content: bytes) -> None:
        try:
            incoming = await self._work(partial(conversation.read, content))
        except SplitonnxError as error:
            _logger.warning("%s: %s", peer.name, error)
            async with self._own(conversation):
                await self._reply(peer, conversation.refuse(error))
            return
        async with self._own(conversation):
            await self._reply(peer, conversation.answer(incoming))

    @asynccontextmanager
    async def _own(self, conversation: Conversation) -> AsyncIterator[None]:
        """Have the conversation's session for oneself."""
        if conversation.session is None:
            yield
            return
        name = conversation.session.id
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        async with lock:
            yield

    async def _reply(self, peer: Peer, replies: Iterator[Reply]) -> None:
        """Send replies as they become ready; the work goes on to its end in any case."""
        advance = partial(next, replies, None)
        lost: ConnectionLost | None = None
        pending = self._work(advance)
        while (chunks := await asyncio.shield(pending)) is not None:
            pending = self._work(advance)  # goes on while the reply is sent
            if lost is None:
                try:
                    await peer.send(chunks)
                except ConnectionLost as error:
                    lost = error
        if lost is not None:
            raise lost

    def _work(self, function: Callable[[], _Result]) -> asyncio.Future[_Result]:
        """Run a function in the worker's thread."""
        return asyncio.get_running_loop().run_in_executor(self._worker, function)


def _describe_step(conversation: Conversation) -> str:
    session = conversation.session
    return "" if session is None else f"; session {session.id} at step {session.executor.step}"
