"""The server: one part of a model, kept in memory, at the service of one client at a time.

The event loop moves messages and answers pings; ONNX Runtime works in a thread beside it, one
message after the other.  While a reply is on its way, the work that follows it has begun.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from splitonnx.bundles import PartyBundle
from splitonnx.errors import ConnectionLost, ServerBusy, UsageError
from splitonnx.messages import Fault
from splitonnx.runtime.engines import Engine
from splitonnx.runtime.executors import PREDICT, TRAIN, Executor
from splitonnx.runtime.protocols import SERVER, Protocol
from splitonnx.runtime.sessions import Session
from splitonnx.runtime.sockets import Peer, serve

DEFAULT_PORT = 8765

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
    ) -> None:
        party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
        if party.manifest.party != SERVER:
            raise UsageError(f"this is the {party.manifest.party}'s part; serve the server's")
        self.host = host
        self.port = port
        self._executor = Executor(party, Engine(threads))
        for phase in (TRAIN, PREDICT):
            self._executor.prepare(phase)
        self._busy = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="splitonnx")
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
            _logger.info("serving on %s, step %d", self.url, self._executor.step)
            if started is not None:
                started.set_result(None)
            await self._stop.wait()
        _logger.info("stopped at step %d", self._executor.step)

    async def _attend(self, peer: Peer) -> None:
        """Serve one client from its hello to its end, or tell it that another is served."""
        if self._busy:
            _logger.warning("%s refused: busy", peer.name)
            await self._refuse(peer)
            return
        self._busy = True
        session = Session(self._executor)
        _logger.info("%s came", peer.name)
        try:
            while not session.is_closed:
                await self._reply(peer, session, await peer.receive())
            _logger.info("%s left at step %d", peer.name, self._executor.step)
        except ConnectionLost as error:
            _logger.warning("%s; step %d stands", error, self._executor.step)
        finally:
            await asyncio.shield(self._work(session.abandon))
            self._busy = False

    async def _reply(self, peer: Peer, session: Session, content: bytes) -> None:
        replies = session.handle(content)
        advance = partial(next, replies, None)
        pending = self._work(advance)
        while (chunks := await pending) is not None:
            pending = self._work(advance)  # goes on while the reply is sent
            try:
                await peer.send(chunks)
            finally:
                await asyncio.wait([pending])

    async def _refuse(self, peer: Peer) -> None:
        busy = ServerBusy()
        protocol = Protocol(self._executor.manifest, SERVER)
        try:
            await peer.receive()
            await peer.send(protocol.send(Fault(code=type(busy).__name__, reason=str(busy))))
        except ConnectionLost:
            return

    def _work(self, function: Callable[[], _Result]) -> asyncio.Future[_Result]:
        """Run a function in the worker's thread."""
        return asyncio.get_running_loop().run_in_executor(self._worker, function)
