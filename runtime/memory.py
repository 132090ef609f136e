"""A client's connection to a server's part in the same process and thread, without a network.

It is meant for tests and for verifying a bundle.  It encodes and decodes messages like any other
transport, and always works in the same order, so that a run can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, LocalProtocolError
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry


class MemoryTransport:
    """A client's connection to a dispatcher in the same thread.

    The server does its work while the client waits for a reply.  Work that is left after the reply
    is done before the client's next message, in :meth:`drain` or in :meth:`close`.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._dispatcher = dispatcher
        self._replies: Iterator[list[Chunk]] = iter(())
        self._waiting: list[bytes] = []
        self._closed = False

    @property
    def executor(self) -> Executor:
        """Return the server's executor for this session, which exists after the greeting."""
        if self._dispatcher.session is None:
            raise LocalProtocolError("nobody has said hello")
        executor = self._dispatcher.session.executor
        assert isinstance(executor, Executor)  # nothing is isolated in memory
        return executor

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Deliver one message to the dispatcher."""
        if self._closed:
            raise ConnectionLost("the server", "the connection is closed")
        self.drain()
        content = b"".join(chunks)
        self.bytes_sent += len(content)
        self._replies = self._dispatcher.handle(content)

    def receive(self) -> bytes:
        """Run the server until its next reply."""
        content = self._waiting.pop(0) if self._waiting else self._next_reply()
        if content is None:
            raise ConnectionLost("the server", "it has nothing to say")
        self.bytes_received += len(content)
        return content

    def drain(self) -> None:
        """Run the server until it has handled every message, and keep its replies."""
        while (content := self._next_reply()) is not None:
            self._waiting.append(content)

    def close(self) -> None:
        """End the connection."""
        if not self._closed:
            self.drain()
            self._dispatcher.end()
        self._closed = True

    def _next_reply(self) -> bytes | None:
        chunks = next(self._replies, None)
        return None if chunks is None else b"".join(chunks)


def connect_in_memory(executor: Executor) -> MemoryTransport:
    """Connect to a new in-memory server for ``executor``'s part, starting from its state."""
    return MemoryTransport(Dispatcher(Registry(executor)))
