"""A connection between a client and a server in the same process and thread, without a network.

The connection is meant for tests and for verifying a bundle.  Messages are encoded and decoded as
on any other connection.  Everything happens in a fixed order, so a run can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, LocalProtocolError
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.registries import Registry


class MemoryTransport:
    """A client's connection to a server in the same thread.

    The server works while the client waits for a reply.  Any remaining work is done before the
    client's next message is sent, or when :meth:`drain` or :meth:`close` is called.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._dispatcher = dispatcher
        self._replies: Iterator[list[Chunk]] = iter(())
        self._waiting: list[bytes] = []
        self._closed = False
        self._executor: Executor | None = None

    @property
    def executor(self) -> Executor:
        """Return the server's executor for this session, also after the session has ended.

        The executor exists once the client has sent its greeting.
        """
        if self._executor is None:
            raise LocalProtocolError("nobody has said hello")
        return self._executor

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send one message to the server, after the server has finished its remaining work."""
        if self._closed:
            raise ConnectionLost("the server", "the connection is closed")
        self.drain()
        content = b"".join(chunks)
        self.bytes_sent += len(content)
        self._replies = self._dispatcher.handle(content)

    def receive(self) -> bytes:
        """Run the server until its next reply, and return the reply."""
        content = self._waiting.pop(0) if self._waiting else self._next_reply()
        if content is None:
            raise ConnectionLost("the server", "it has nothing to say")
        self.bytes_received += len(content)
        return content

    def drain(self) -> None:
        """Run the server until its work is done, and keep its replies for :meth:`receive`."""
        while (content := self._next_reply()) is not None:
            self._waiting.append(content)

    def close(self) -> None:
        """Finish the server's remaining work and close the connection, if it is still open."""
        if not self._closed:
            self.drain()
            self._dispatcher.end()
        self._closed = True

    def _next_reply(self) -> bytes | None:
        chunks = next(self._replies, None)
        if self._executor is None and self._dispatcher.session is not None:
            self._executor = self._find_executor(self._dispatcher.session.id)
        return None if chunks is None else b"".join(chunks)

    def _find_executor(self, session: str) -> Executor | None:
        policy = self._dispatcher.registry.policy
        if not isinstance(policy, PerClient):
            return None  # the models are elsewhere
        executor = policy.models[session].executor
        assert isinstance(executor, Executor)  # nothing is isolated in memory
        return executor


def connect_in_memory(executor: Executor) -> MemoryTransport:
    """Start a server in memory from an executor's current state, and return a connection to it."""
    return MemoryTransport(Dispatcher(Registry(executor)))
