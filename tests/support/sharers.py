"""Clients by hand that share what they learned, around one server of the tiny bundle."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.codecs import Chunk
from splitonnx.messages import Hello, Message, Save, Tensors, decode_message, encode_message
from splitonnx.names import CLIENT, OWN, PREDICT, SERVER, SHARE, SPLITFED_V1, TRAIN
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.protocols import list_wires
from splitonnx.sharing import LEAVES, SAMPLES
from tests.support import tiny
from tests.support.sharing import sharing_bundle

WEIGHT = "W1"
"""The client's weight, which is shared; the server's is W2."""
BATCH = {
    "h": np.ones((2, 4), np.float32),
    "labels": np.zeros((2, 2), np.float32),
}


class Table:
    """A server, with or without a folder, and the clients around it; nothing waits."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        clients: int = 2,
        quorum: int | None = None,
        policy: str = SPLITFED_V1,
    ) -> None:
        self.sharers: dict[str, Sharer] = {}
        self._folder = folder
        self._passed: deque[Delivery] = deque()
        self._joins = PolicyOptions(
            name=policy, clients_min=clients, quorum=quorum or clients, round_timeout=60.0
        )
        if folder is not None and not folder.exists():
            bundle = sharing_bundle()
            bundle.parties[SERVER].save(folder)
        self.open(resume=False)

    def open(self, *, resume: bool) -> None:
        """Start the server; one that ran before is gone without a word."""
        party = (
            sharing_bundle().parties[SERVER]
            if self._folder is None
            else PartyBundle.load(self._folder)
        )
        executor = Executor(party, Engine(threads=1))
        self.registry = Registry(executor, joins=self._joins, resume=resume)
        self.sharers = {}

    def tick(self) -> None:
        """Let every time be over."""
        self._passed += self.registry.policy.tick(1e18)
        self.drain()

    def pass_on(self, delivery: Delivery) -> None:
        """Keep a delivery for the client that it is for, as a server does while a thread works."""
        self._passed.append(delivery)

    def drain(self) -> None:
        """Give the deliveries to the clients that they are for."""
        while self._passed:
            delivery = self._passed.popleft()
            self.sharers[delivery.key.session].take(delivery)

    def read(self, session: str) -> dict[str, np.ndarray]:
        """Return the state of a session's copy at the server, after anything that is due."""
        self.registry.policy.unload(session)
        return dict(self.registry.policy.models[session].executor.state())  # type: ignore[attr-defined]


class Sharer:
    """A client by hand; ``heard`` are the replies that came unasked, with their tensors."""

    def __init__(
        self,
        table: Table,
        session: str,
        *,
        step: int = 0,
        kept: tuple[int, ...] = (),
        generation: int = 1,
        owner: str = "",
    ) -> None:
        self._table = table
        self.session = session
        self.heard: list[dict[str, np.ndarray]] = []
        table.sharers[session] = self
        self.dispatcher = Dispatcher(table.registry, owner, pass_on=table.pass_on)
        manifest = sharing_bundle().parties[CLIENT].manifest
        hello = Hello(
            digest=manifest.digest,
            session=session,
            generation=generation,
            step=step,
            kept=kept,
            can_share=True,
            wires=list_wires(manifest),
        )
        ((self.greeting, _),) = self.say(hello)

    def say(
        self, message: Message, tensors: Mapping[str, np.ndarray] | None = None
    ) -> list[tuple[Message, dict[str, np.ndarray]]]:
        """Send a message, whatever it is, and return the replies."""
        content = b"".join(encode_message(message, tensors or {}))
        replies = [_read(reply) for reply in self.dispatcher.handle(content)]
        self._table.drain()
        return replies

    def take(self, delivery: Delivery) -> None:
        """Hear what another client's share has caused."""
        self.heard += [_read(reply)[1] for reply in self.dispatcher.take(delivery)]

    def share(
        self,
        step: int,
        value: float = 0.0,
        *,
        samples: int = 1,
        changes: Mapping[str, np.ndarray | None] | None = None,
    ) -> list[tuple[Message, dict[str, np.ndarray]]]:
        """Share a weight full of ``value``; ``changes`` replace tensors, or leave them out."""
        tensors: dict[str, np.ndarray | None] = {
            SAMPLES: np.array(samples),
            LEAVES: np.array(0),
            f"{WEIGHT}{OWN}": np.full_like(tiny.WEIGHTS[WEIGHT], value),
        }
        tensors |= changes or {}
        message = self._make(SHARE, step)
        return self.say(message, {n: array for n, array in tensors.items() if array is not None})

    def train(self, step: int) -> list[tuple[Message, dict[str, np.ndarray]]]:
        """Make a step: two messages, of which the second is answered."""
        first, second = ({name: array} for name, array in BATCH.items())
        return [
            *self.say(self._make(TRAIN, step), first),
            *self.say(msgspec.structs.replace(self._make(TRAIN, step), turn=1), second),
        ]

    def predict(self) -> dict[str, np.ndarray]:
        """Return what the server's part predicts."""
        ((_, tensors),) = self.say(self._make(PREDICT, 0), {"h": BATCH["h"]})
        return tensors

    def begin(self, step: int) -> None:
        """Begin a step, and leave it there."""
        self.say(self._make(TRAIN, step), {"h": BATCH["h"]})

    def save(self, step: int) -> Message:
        """Have the server write a checkpoint, and return its answer."""
        ((answer, _),) = self.say(Save(session=self.session, step=step))
        return answer

    def _make(self, phase: str, step: int) -> Tensors:
        return Tensors(
            session=self.session,
            phase=phase,
            step=step,
            micro_batch=0,
            turn=0,
            seed=0,
            learning_rate=0.1,
        )


def _read(reply: list[Chunk]) -> tuple[Message, dict[str, np.ndarray]]:
    message, tensors = decode_message(b"".join(reply))
    return message, {name: np.array(array) for name, array in tensors.items()}
