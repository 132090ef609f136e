"""A TCP proxy that strikes each connection with one fault, at its byte.

It cuts by itself; kills and stops it leaves to whoever made it.  It knows no websocket and no
message: bytes are all that it sees.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from tests.chaos.faults import CUTS, Direction, Fault, Kind

CHUNK = 1 << 16
"""Bytes read at once."""
LINGER = 0.05
"""Seconds that an ended connection is still read from, so that its end is a FIN and no reset."""


class Proxy:
    """Passes connections on to ``upstream``, the server's port, ``None`` while there is none.

    ``faults`` gives each connection that reaches the server its fault; ``strike`` is called for
    those that are not cuts.  ``struck`` counts the faults that did strike, ``carried`` the bytes
    that were passed on.
    """

    def __init__(self, faults: Iterator[Fault | None], strike: Callable[[Kind], None]) -> None:
        self.port = 0
        self.upstream: int | None = None
        self.struck: Counter[Kind] = Counter()
        self.carried = 0
        self.orphans: list[_Orphan] = []
        self._faults = faults
        self._strike = strike
        self._links: set[asyncio.Task[None]] = set()

    @property
    def cuts(self) -> int:
        """How often a connection was cut so far."""
        return sum(self.struck[kind] for kind in CUTS)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Serve on a free port, which ``port`` then tells, while the context lasts."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in tuple(self._links):
                task.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)
            for orphan in self.orphans:
                orphan.reset()
            await asyncio.gather(*(orphan.released for orphan in self.orphans if orphan.released))

    def notice(self, fault: Fault) -> None:
        """Count a fault that has struck, and hand on what is not a cut."""
        self.struck[fault.kind] += 1
        if fault.kind not in CUTS:
            self._strike(fault.kind)

    def carry(self, link: _Link, direction: Direction, size: int) -> None:
        """Count bytes passed on; let an older connection's held bytes go when it is time."""
        self.carried += size
        if direction is Direction.UP:
            for orphan in self.orphans:
                if orphan.number < link.number and orphan.after <= link.passed_up:
                    orphan.release()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        client = _End(reader, writer)
        try:
            await self._link(client)
        except asyncio.CancelledError:  # only `listening` cancels, and it waits for this end
            return
        finally:
            client.reset()
            self._links.discard(task)

    async def _link(self, client: _End) -> None:
        if self.upstream is None:
            return
        try:
            server = _End(*await asyncio.open_connection("127.0.0.1", self.upstream))
        except OSError:
            return
        link = _Link(self, client, server, next(self._faults, None))
        try:
            await link.run()
        finally:
            if not link.orphaned:
                server.reset()


class _End:
    """One of the two connections of a link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        """Read what has come; nothing at the end, whatever kind of end it is."""
        try:
            return await self._reader.read(CHUNK)
        except OSError:
            return b""

    async def write(self, content: bytes) -> None:
        """Write; what the other side does not want any more is lost."""
        if content and not self._writer.is_closing():
            self._writer.write(content)
            try:
                await self._writer.drain()
            except OSError:
                return

    def finish(self) -> None:
        """Send a FIN; bytes still come."""
        try:
            self._writer.write_eof()
        except OSError:
            return

    def reset(self) -> None:
        """End the connection with a RST; nothing where it has ended already."""
        if not self._writer.transport.is_closing():
            handle: socket.socket = self._writer.get_extra_info("socket")
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()


class _Orphan:
    """The server's end of a link whose client is gone, with bytes that are still to come."""

    def __init__(self, number: int, server: _End, held: bytes, after: int) -> None:
        self.number = number
        self.after = after
        self.released: asyncio.Future[None] | None = None
        self._server = server
        self._held = held

    def release(self) -> None:
        """Let the held bytes go, once, and end the connection in good order."""
        if self.released is None:
            self.released = asyncio.ensure_future(self._release())

    def reset(self) -> None:
        """End the connection."""
        self._server.reset()

    async def _release(self) -> None:
        await self._server.write(self._held)
        self._server.finish()
        await asyncio.sleep(LINGER)
        self._server.reset()


class _Link:
    """One client's connection and the one to the server behind it."""

    _count = 0

    def __init__(self, proxy: Proxy, client: _End, server: _End, fault: Fault | None) -> None:
        _Link._count += 1
        self.number = _Link._count
        self.orphaned = False
        self._proxy = proxy
        self._ends = {Direction.UP: (client, server), Direction.DOWN: (server, client)}
        self._fault = fault
        self._passed = Counter[Direction]()
        self._swallowed: set[Direction] = set()
        self._farewell: int | None = None
        self._cut = asyncio.Event()

    @property
    def passed_up(self) -> int:
        """Bytes passed on to the server."""
        return self._passed[Direction.UP]

    async def run(self) -> None:
        """Pass bytes both ways until both have ended, or the link is cut."""
        pumping = asyncio.ensure_future(self._pump_both())
        cutting = asyncio.ensure_future(self._wait_for_cut())
        try:
            done, _ = await asyncio.wait([pumping, cutting], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (pumping, cutting):
                task.cancel()
            await asyncio.gather(pumping, cutting, return_exceptions=True)

    async def _pump_both(self) -> None:
        await asyncio.gather(*(self._pump(direction) for direction in Direction))

    async def _wait_for_cut(self) -> None:
        await self._cut.wait()

    async def _pump(self, direction: Direction) -> None:
        source, target = self._ends[direction]
        while content := await source.read():
            if direction not in self._swallowed:
                await self._pass(direction, content, target)
        target.finish()

    async def _pass(self, direction: Direction, content: bytes, target: _End) -> None:
        room = self._room(direction)
        passing = content if room is None else content[:room]
        await target.write(passing)
        self._passed[direction] += len(passing)
        self._proxy.carry(self, direction, len(passing))
        if room is None or len(content) < room:
            return
        rest = content[room:]
        if self._farewell is not None:
            self._sever()
            return
        await self._strike(direction, rest, target)

    def _room(self, direction: Direction) -> int | None:
        """How many bytes may pass in a direction before something happens."""
        if self._farewell is not None and direction is Direction.DOWN:
            return max(self._farewell - self._passed[direction], 0)
        if self._fault is not None and direction is self._fault.direction:
            return max(self._fault.offset - self._passed[direction], 0)
        return None

    async def _strike(self, direction: Direction, rest: bytes, target: _End) -> None:
        fault, self._fault = self._fault, None
        assert fault is not None
        loop = asyncio.get_running_loop()
        match fault.kind:
            case Kind.RESET:
                self._sever()
            case Kind.FIN:
                self._swallowed = set(Direction)
                for _, end in self._ends.values():
                    end.finish()
                loop.call_later(LINGER, self._cut.set)
            case Kind.SILENCE:
                self._swallowed.add(direction)
                loop.call_later(fault.delay, self._cut.set)
            case Kind.ORPHAN:
                self._orphan(fault, rest if direction is Direction.UP else b"")
            case Kind.STOP_SERVER:
                self._farewell = self._passed[Direction.DOWN] + fault.after
            case _:
                loop.call_later(fault.delay, self._proxy.notice, fault)
        if fault.kind in CUTS or fault.kind is Kind.STOP_SERVER:
            self._proxy.notice(fault)
        if direction not in self._swallowed:
            await self._pass(direction, rest, target)

    def _sever(self) -> None:
        """Let nothing more pass, and have :meth:`run` end."""
        self._swallowed = set(Direction)
        self._cut.set()

    def _orphan(self, fault: Fault, held: bytes) -> None:
        _, server = self._ends[Direction.UP]
        self.orphaned = True
        self._proxy.orphans.append(_Orphan(self.number, server, held, fault.after))
        self._sever()
