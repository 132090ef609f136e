"""A client by hand that has several tasks of a step open, over connections that can be cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitonnx.messages import Fault, Hello, TaskKey, Tensors, Welcome
from splitonnx.micro_batches import MICRO_BATCH_WEIGHT, MICRO_BATCHES, split_batch
from splitonnx.names import ACCUMULATE, CLIENT, UPDATE
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.protocols import Protocol, list_wires
from splitonnx.runtime.wire.transports import Transport

RATE, SEED = 0.05, 11
Arrays = Mapping[str, np.ndarray]


@dataclass(kw_only=True, eq=False)
class Sent:
    """An open task: its data, what was sent of it, and how many replies came and are due next."""

    data: Arrays
    messages: list[tuple[Tensors, Arrays]] = field(default_factory=list)
    received: int = 0
    due: int = 0


class WindowedClient:
    """A client whose connection carries messages and replies one by one, as they are moved.

    ``up`` are the messages under way to the server, and ``down`` the replies under way to the
    client.  ``replies`` are the bytes of every reply that ever came, by task and turn.
    """

    def __init__(
        self,
        registry: Registry | None,
        executor: Executor,
        in_flight: int,
        session: str = "a" * 32,
    ) -> None:
        self.executor = executor
        self.open: dict[TaskKey, Sent] = {}
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.replies: dict[tuple[TaskKey, int], bytes] = {}
        self.results: list[Arrays] = []
        self.restarts = 0
        self._registry = registry
        self._in_flight = in_flight
        self._session = session
        self._generation = 0
        self._order: list[tuple[TaskKey, int]] = []  # of the messages of open tasks
        self._parts: list[Arrays] = []
        self._begun = self._finished = 0
        self.dispatcher: Dispatcher | None = None
        self.connect()

    @property
    def in_flight(self) -> int:
        """How many tasks of a step the server lets the client have open."""
        return self.welcome.in_flight

    def begin_step(self, batch: Arrays, parts: int) -> None:
        """Divide a batch; :meth:`begin` begins its micro-batches and the update."""
        specs = self.executor.manifest.phase("train").data
        weight = np.array(1 / parts, np.float32)
        self._parts = [{**p, MICRO_BATCH_WEIGHT: weight} for p in split_batch(batch, specs, parts)]
        self._parts.append({MICRO_BATCHES: np.array(len(self._parts))})
        self._begun = self._finished = 0

    @property
    def can_begin(self) -> bool:
        """Whether a task of the step remains, and fits the window."""
        return self._begun < len(self._parts) and len(self.open) < self.in_flight

    @property
    def is_done(self) -> bool:
        """Whether the step is over."""
        return self._finished == len(self._parts)

    def begin(self) -> None:
        """Begin the next task of the step, and send its first message."""
        phase = UPDATE if self._begun == len(self._parts) - 1 else ACCUMULATE
        key = TaskKey(self._session, phase, self.executor.step, self._begun)
        data = self._parts[self._begun]
        self._begun += 1
        self.executor.begin(key, data=data, seed=SEED, learning_rate=RATE)
        self.open[key] = Sent(data=data)
        self._settle()

    def handle_up(self) -> None:
        """Have the server handle the next message."""
        assert self.dispatcher is not None
        self.down += [b"".join(reply) for reply in self.dispatcher.handle(self.up.popleft())]

    def handle_down(self) -> None:
        """Have the client handle the next reply."""
        content = self.down.popleft()
        message, tensors = self._protocol.receive(content)
        assert isinstance(message, Tensors), message
        task = self.open[message.key]
        assert message.turn == task.due  # in order, and once a connection
        task.due += 1
        known = self.replies.setdefault((message.key, message.turn), content)
        assert known == content
        if message.turn == task.received:
            task.received += 1
            self.executor.deliver(message.key, tensors)
            self._settle()

    def connect(self) -> None:
        """Connect again, when what was under way is lost, and send all open tasks' messages."""
        self._dial()
        self._generation += 1
        self._protocol = Protocol(self.executor.manifest, CLIENT)
        hello = Hello(
            digest=self.executor.manifest.digest,
            session=self._session,
            generation=self._generation,
            step=self.executor.step,
            micro_batch=self._finished % max(1, len(self._parts)),
            is_open=bool(self.open),
            can_share=True,
            in_flight=self._in_flight,
            wires=list_wires(self.executor.manifest),
        )
        welcome, _ = self._protocol.receive(self._ask(b"".join(self._protocol.send(hello))))
        assert isinstance(welcome, Welcome), welcome
        assert (welcome.step, welcome.wants_repeat) == (self.executor.step, False)
        self.welcome = welcome
        self.up.clear()
        self.down.clear()
        if welcome.restarts and self._finished:
            self._restart()
        for task in self.open.values():
            task.due = 0
        for key, turn in self._order:
            self.up.append(self._encode(*self.open[key].messages[turn]))

    def _dial(self) -> None:
        assert self._registry is not None
        if self.dispatcher is not None:
            self.dispatcher.end()
        self.dispatcher = Dispatcher(self._registry)

    def _ask(self, content: bytes) -> bytes:
        assert self.dispatcher is not None
        (reply,) = self.dispatcher.handle(content)
        return b"".join(reply)

    def refused(self, message: Tensors, wires: Arrays) -> Fault:
        """Say something that the server refuses."""
        assert self.dispatcher is not None
        replies = list(self.dispatcher.handle(self._encode(message, wires)))
        fault, _ = self._protocol.receive(b"".join(replies[-1]))
        assert isinstance(fault, Fault), fault
        return fault

    def _restart(self) -> None:
        self.restarts += 1
        self.executor.abandon(TaskKey(self._session, ACCUMULATE, self.executor.step, 0))
        self.open, self._order, self.replies = {}, [], {}
        del self.results[len(self.results) - self._finished :]
        self._begun = self._finished = 0

    def _settle(self) -> None:
        """Run what is ready, in the order of the tasks, and finish what is finished."""
        for key in list(self.open):
            if self.executor.is_waiting(key) or not self.open[key].messages:
                for wires in self.executor.advance(key):
                    self._send(key, {name: array.copy() for name, array in wires.items()})
            if next(iter(self.open)) == key and self.executor.is_finished(key):
                self.results.append(self.executor.finish(key))
                del self.open[key]
                self._order = [entry for entry in self._order if entry[0] != key]
                self._finished += 1

    def _send(self, key: TaskKey, wires: Arrays) -> None:
        messages = self.open[key].messages
        message = make_message(key, len(messages))
        self._order.append((key, len(messages)))
        messages.append((message, wires))
        self.up.append(self._encode(message, wires))

    def _encode(self, message: Tensors, wires: Arrays) -> bytes:
        return b"".join(self._protocol.send(message, wires))


class SocketClient(WindowedClient):
    """The same over websockets: what is moved up is sent, and a move down waits for a reply."""

    def __init__(self, url: str, executor: Executor, in_flight: int, session: str) -> None:
        self._url = url
        self._transport: Transport | None = None
        super().__init__(None, executor, in_flight, session)

    def handle_up(self) -> None:
        assert self._transport is not None
        self._transport.send([self.up.popleft()])

    def handle_down(self) -> None:
        assert self._transport is not None
        self.down.append(bytes(self._transport.receive()))
        super().handle_down()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _dial(self) -> None:
        self.close()
        self._transport = connect(self._url)

    def _ask(self, content: bytes) -> bytes:
        assert self._transport is not None
        self._transport.send([content])
        return bytes(self._transport.receive())


def make_message(key: TaskKey, turn: int) -> Tensors:
    """Make the envelope of a task's message."""
    return Tensors(
        session=key.session,
        phase=key.phase,
        step=key.step,
        micro_batch=key.micro_batch,
        turn=turn,
        seed=SEED,
        learning_rate=RATE,
    )


def make_calm_steps(client: WindowedClient, batches: Sequence[Arrays], parts: int) -> None:
    """Take steps without a fault, one task after the other."""
    for batch in batches:
        client.begin_step(batch, parts)
        while not client.is_done:
            if client.can_begin:
                client.begin()
            while client.up or client.down:
                (client.handle_up if client.up else client.handle_down)()
