"""A server and the connections to it, in one thread and by a script: which message is lost, comes
late or twice, and where either side's process ends.

A connection of this network does what TCP's do: what was sent arrives in order, up to where the
connection breaks, and maybe long after the client has given it up.  Mischief goes beyond that.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from pathlib import Path

from splitonnx.bundles import PartyBundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost
from splitonnx.messages import TaskKey, Tensors, decode_message
from splitonnx.names import STEP_PHASES
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.ledgers import Reply
from splitonnx.runtime.server.registries import Registry


class Event(Enum):
    """What happens when the client dials, sends or receives."""

    PASS = auto()  # nothing
    BREAK = auto()  # the connection breaks, and what was to be carried is lost
    LOSE = auto()  # the connection breaks, of which the client hears when it has read what came
    BREAK_AFTER = auto()  # what was sent is acted on; then the connection breaks
    DELAY = auto()  # the connection breaks for the client; the server sees what was sent later
    LATE = auto()  # what was delayed arrives now
    CRASH_SERVER = auto()
    CRASH_SERVER_AT_WORK = auto()  # after its first reply to this message, with work left
    CRASH_SERVER_AFTER = auto()
    STOP_SERVER = auto()  # SIGTERM
    CRASH_CLIENT = auto()
    CRASH_CLIENT_AFTER = auto()  # after the server acted on what was sent
    DROP = auto()  # mischief: the message is lost, the connection stays
    TWICE = auto()  # mischief: the message arrives twice
    SWAP = auto()  # mischief: the message arrives after the next one


HONEST = tuple(event for event in Event if event not in (Event.DROP, Event.TWICE, Event.SWAP))
"""The events that a network over TCP, and processes that are killed, can come to."""


class ClientCrash(BaseException):
    """The client's process ends here; nothing of it goes on."""


class Network:
    """Serves the folder's server part, and takes events from ``script`` one after the other.

    Where the script is over, nothing happens any more, or with ``ends_in_crash`` the client's
    process ends.  ``events`` counts them.
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.script: deque[Event] = deque()
        self.ends_in_crash = False
        self.events = 0
        self.registry: Registry
        self._folder = folder
        self._engine = engine
        self._lines: list[Line] = []
        self._delayed: list[tuple[Line, bytes]] = []
        self._noted: set[bytes] = set()
        self._start_server()

    def dial(self) -> Line:
        """Connect, as a client does."""
        event = self.next_event()
        self.act(event)
        if event in (Event.BREAK, Event.BREAK_AFTER, Event.LOSE, Event.DROP):
            raise ConnectionLost("the server", "nobody answers")
        line = Line(self, Dispatcher(self.registry))
        self._lines.append(line)
        return line

    def next_event(self) -> Event:
        """Take the next event."""
        self.events += 1
        if self.script:
            return self.script.popleft()
        return Event.CRASH_CLIENT if self.ends_in_crash else Event.PASS

    def act(self, event: Event) -> None:
        """Let happen what happens before anything is carried."""
        if event is Event.LATE:
            self.deliver_late()
        elif event is Event.CRASH_SERVER:
            self.crash_server()
        elif event is Event.STOP_SERVER:
            self.stop_server()
        elif event is Event.CRASH_CLIENT:
            self.crash_client()

    def crash_client(self) -> None:
        """End the client's process: its connections break, and nothing more is heard of it.

        Raises:
            ClientCrash: always.
        """
        for line in self._lines:
            line.hang_up()
        self._lines = []
        raise ClientCrash

    def crash_server(self) -> None:
        """End the server's process and start another on the same folder."""
        for line in self._lines:
            line.cut()
        self._lines, self._delayed = [], []
        self._start_server()

    def stop_server(self) -> None:
        """End the server's process as SIGTERM does, and start another."""
        self.registry.unload_all()
        self.crash_server()

    def note(self, reply: bytes) -> None:
        """Note what a server answers."""
        self._noted.add(reply)

    def count_replies(self) -> Counter[tuple[TaskKey, int]]:
        """Count the different replies in training that went out for each turn of each step."""
        messages = [decode_message(reply)[0] for reply in self._noted]
        return Counter(
            (message.key, message.turn)
            for message in messages
            if isinstance(message, Tensors) and message.phase in STEP_PHASES
        )

    def delay(self, line: Line, content: bytes) -> None:
        """Keep a message that the server is to see when its client has given the line up."""
        self._delayed.append((line, content))

    def deliver_late(self) -> None:
        """Let the server see what was delayed; its replies find nobody."""
        delayed, self._delayed = self._delayed, []
        for line, content in delayed:
            line.deliver(content)
        for line in {id(line): line for line, _ in delayed}.values():
            line.hang_up()

    def _start_server(self) -> None:
        party = PartyBundle.load(self._folder / "server")
        self.registry = Registry(Executor(party, self._engine), resume=True)


class Line:
    """One connection: a transport to the client, with the server's dispatcher at its end."""

    def __init__(self, network: Network, dispatcher: Dispatcher) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._network = network
        self._dispatcher: Dispatcher | None = dispatcher  # None: the server is gone, or left
        self._is_cut = False  # for the client
        self._inbox: deque[bytes] = deque()
        self._swapped: list[bytes] = []

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Carry a message to the server, which acts on it at once, or do what the script says."""
        self._require()
        content = b"".join(chunks)
        event = self._network.next_event()
        self._network.act(event)
        self._require()
        match event:
            case Event.BREAK:
                self._break()
            case Event.DELAY:
                self._network.delay(self, content)
                self.cut(hang_up=False)
                self._require()
            case Event.LOSE:
                self._let_go()
            case Event.DROP:
                return
            case Event.SWAP:
                self._swapped.append(content)
                return
        self._carry(content, event)
        while self._swapped and not self._is_cut:
            self.deliver(self._swapped.pop())
        self.bytes_sent += len(content)

    def receive(self) -> bytes:
        """Return the next reply."""
        self._require()
        event = self._network.next_event()
        self._network.act(event)
        self._require()
        if event in (Event.BREAK, Event.BREAK_AFTER, Event.DELAY):
            self._break()
        if event is Event.LOSE:
            self._let_go()
        if event is Event.DROP and self._inbox:
            self._inbox.popleft()
        if event is Event.SWAP:
            self._inbox.rotate(-1)
        if event is Event.TWICE and self._inbox:
            self._inbox.appendleft(self._inbox[0])
        if not self._inbox:
            self._break()
        content = self._inbox.popleft()
        self.bytes_received += len(content)
        return content

    def close(self) -> None:
        """End the connection; what the server has not read is lost."""
        self.hang_up()

    def deliver(self, content: bytes) -> None:
        """Have the server act on a message, whole, whether or not anybody wants the replies."""
        for chunks in self._work(content):
            reply = b"".join(chunks)
            self._network.note(reply)
            self._inbox.append(reply)

    def cut(self, *, hang_up: bool = True) -> None:
        """Break the connection for the client; the server learns of it with ``hang_up``."""
        self._is_cut = True
        if hang_up:
            self.hang_up()

    def hang_up(self) -> None:
        """Let both sides learn that the connection is over."""
        self._is_cut = True
        self._let_go()

    def _let_go(self) -> None:
        """Let the server learn that the connection is over."""
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.end()

    def _carry(self, content: bytes, event: Event) -> None:
        if event is Event.CRASH_SERVER_AT_WORK:
            next(self._work(content), None)
            self._network.crash_server()
            self._require()
        self.deliver(content)
        match event:
            case Event.TWICE:
                self.deliver(content)
            case Event.BREAK_AFTER:
                self._break()
            case Event.CRASH_SERVER_AFTER:
                self._network.crash_server()
            case Event.CRASH_CLIENT_AFTER:
                self._network.crash_client()

    def _work(self, content: bytes) -> Iterator[Reply]:
        dispatcher = self._dispatcher
        if dispatcher is None or dispatcher.is_closed:
            return iter(())
        return dispatcher.handle(content)

    def _require(self) -> None:
        if self._is_cut:
            raise ConnectionLost("the server", "the connection broke")

    def _break(self) -> None:
        self.cut()
        self._require()
