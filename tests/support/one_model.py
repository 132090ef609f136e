"""Clients by hand around a server of one model; nothing waits, and time stands until it is set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.messages import Hello, Message, Tensors, decode_message, encode_message
from splitonnx.names import (
    CLIENT,
    SHARE,
    TRAIN,
)
from splitonnx.optimizers import SGD
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.ledgers import Reply
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.protocols import list_wires
from splitonnx.sharing import LEAVES, SAMPLES, list_joined, name_own
from tests.support.zoo import ZOO

ENTRY = ZOO["chain"]
RATE = 0.1
ROWS = 4
ACTIVATION, GRADIENT = "act1@server", "act3@client_grad"


MOMENTUM = SGD(lr=RATE, momentum=0.9)


def make_bundle() -> Bundle:
    return cut(ENTRY.build(), at="act1", tail_at=("act3",), loss=ENTRY.loss, optimizer=MOMENTUM)


class Table:
    """A server and raw clients around it; time stands until it is set."""

    def __init__(self, policy: str, *, clients: int = 2, bundle: Bundle | None = None) -> None:
        self.bundle = bundle or make_bundle()
        joins = PolicyOptions(name=policy, clients_min=clients, round_timeout=60.0)
        assert self.bundle.server is not None
        executor = Executor(self.bundle.server, Engine(threads=1))
        self.registry = Registry(executor, joins=joins)
        self.members = [Member(self, f"{number:x}" * 32) for number in range(clients)]
        for member in self.members:
            member.share(0, samples=0)
        assert all(len(member.heard) == 1 for member in self.members)
        for member in self.members:
            member.heard.clear()

    def pass_on(self, delivery: Delivery) -> None:
        for member in self.members:
            if member.session == delivery.key.session:
                member.take(delivery)

    def tick(self, now: float = 0.0) -> None:
        for delivery in self.registry.policy.tick(now):
            self.pass_on(delivery)

    @property
    def version(self) -> int:
        model = self.registry.policy._model  # type: ignore[attr-defined]
        return int(model.version)


class Member:
    """A client by hand, which may send anything; ``heard`` are the replies and its own errors."""

    def __init__(self, table: Table, session: str, *, generation: int = 1) -> None:
        self.session, self._table = session, table
        self.heard: list[tuple[Message, dict[str, np.ndarray]]] = []
        self._dispatcher = Dispatcher(table.registry, pass_on=table.pass_on)
        self._party = table.bundle.parties[CLIENT]
        hello = Hello(
            digest=self._party.manifest.digest,
            session=session,
            generation=generation,
            step=0,
            is_open=True,
            can_share=True,
            wires=list_wires(self._party.manifest),
        )
        self._say(hello)
        self.heard.clear()

    @property
    def error(self) -> Exception | None:
        return self._dispatcher.refused

    def again(self) -> Member:
        member = Member(self._table, self.session, generation=2)
        self._table.members[self._table.members.index(self)] = member
        return member

    def take(self, delivery: Delivery) -> None:
        self._hear(self._dispatcher.take(delivery))

    def train(self, turn: int, tensors: Mapping[str, np.ndarray], *, rate: float = RATE) -> None:
        """Send a message of the step 0, with arrays by the names of wires."""
        message = msgspec.structs.replace(self._make(TRAIN, 0), turn=turn, learning_rate=rate)
        self._say(message, tensors)

    def share(self, step: int, *, samples: int) -> None:
        state = self._party.state()
        tensors = {name_own(name): state[name] for name in list_joined(self._party.manifest)}
        counts = {SAMPLES: np.array(samples), LEAVES: np.array(0)}
        self._say(self._make(SHARE, step), {**tensors, **counts})

    def _say(self, message: Message, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        content = b"".join(encode_message(message, tensors or {}))
        self._hear(self._dispatcher.handle(content))

    def _hear(self, replies: Iterator[Reply]) -> None:
        for reply in replies:
            message, tensors = decode_message(b"".join(reply))
            self.heard.append((message, {n: np.array(array) for n, array in tensors.items()}))

    def _make(self, phase: str, step: int) -> Tensors:
        return Tensors(
            session=self.session,
            phase=phase,
            step=step,
            micro_batch=0,
            turn=0,
            seed=0,
            learning_rate=RATE,
        )


def activation(value: float = 1.0) -> dict[str, np.ndarray]:
    return {ACTIVATION: np.full((ROWS, 7), value, np.float32)}


def gradient(value: float = 0.1) -> dict[str, np.ndarray]:
    return {GRADIENT: np.full((ROWS, 6), value, np.float32)}
