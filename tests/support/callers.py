"""A client by hand, which says what it is told to: for tests of a server's sessions."""

from __future__ import annotations

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.messages import Fault, Hello, Message, Tensors
from splitonnx.names import CLIENT
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.protocols import Protocol, list_wires

SESSION = "0123456789abcdef" * 2


class Caller:
    """A client by hand: it says what it is told to and hears every reply."""

    def __init__(
        self,
        bundle: Bundle,
        registry: Registry | None = None,
        *,
        session: str = SESSION,
        generation: int = 1,
        owner: str = "",
        norm: float | None = None,
    ) -> None:
        assert bundle.server is not None
        self.manifest = bundle.client.manifest
        registry = registry or Registry(Executor(bundle.server, Engine(threads=1)))
        self.dispatcher = Dispatcher(registry, owner, norm=norm)
        self._protocol = Protocol(self.manifest, CLIENT)
        (self.greeting,) = self.say(
            Hello(
                digest=self.manifest.digest,
                session=session,
                generation=generation,
                step=0,
                wires=list_wires(self.manifest),
            )
        )

    def say(self, message: Message, wires: dict[str, np.ndarray] | None = None) -> list[Message]:
        content = b"".join(self._protocol.send(message, wires))
        return [self._hear(reply) for reply in self.dispatcher.handle(content)]

    def _hear(self, reply: list[Chunk]) -> Message:
        message, self.tensors = self._protocol.receive(b"".join(reply))
        return message

    @property
    def step(self) -> int:
        assert self.dispatcher.session is not None
        return self.dispatcher.session.ledger.step


ACTIVATION = {"act1@server": np.ones((2, 7), np.float32)}

GRADIENT = {"act3@client_grad": np.ones((2, 6), np.float32)}


def make_task(session: str = SESSION, step: int = 0, turn: int = 0) -> Tensors:
    return Tensors(
        session=session,
        phase="train",
        step=step,
        micro_batch=0,
        turn=turn,
        seed=0,
        learning_rate=1e-3,
    )


def expect_fault(replies: list[Message], code: str, reason: str) -> None:
    (fault,) = replies
    assert isinstance(fault, Fault)
    assert fault.code == code
    assert reason in fault.reason
