"""A session: the server's side of one client, without a network.

Messages in, replies out, one by one as soon as each is ready, so that a gradient leaves before
the server's own update runs.  It knows the protocol and the executor; threads, sockets and how
many clients there are is the server's business.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.errors import BundleMismatch, RemoteProtocolError, SplitonnxError
from splitonnx.messages import Bye, Fault, Hello, Message, Save, Saved, TaskKey, Tensors, Welcome
from splitonnx.runtime.executors import TRAIN, Executor
from splitonnx.runtime.protocols import SERVER, Protocol, State, list_wires


class Session:
    """The server's half of one conversation; not safe for use from two threads at a time.

    ``executor`` outlives the session: the next client finds the state that this one left.
    """

    def __init__(self, executor: Executor) -> None:
        self.id = uuid.uuid4().hex
        self.executor = executor
        self._protocol = Protocol(executor.manifest, SERVER)
        self._open: set[TaskKey] = set()

    @property
    def is_closed(self) -> bool:
        """Whether the conversation has ended."""
        return self._protocol.state is State.CLOSED

    def handle(self, content: Chunk | bytearray) -> Iterator[list[Chunk]]:
        """Act on one message and yield the replies, each as chunks to be sent as one message.

        An error becomes a Fault as the last reply and ends the conversation; an unfinished task
        is given up, and the state is as it was before it.
        """
        try:
            message, tensors = self._protocol.receive(content)
            yield from self._answer(message, tensors)
        except SplitonnxError as error:
            self.abandon()
            if not self.is_closed:
                yield self._protocol.send(Fault(code=type(error).__name__, reason=str(error)))

    def abandon(self) -> None:
        """Give up every unfinished task."""
        while self._open:
            self.executor.abandon(self._open.pop())

    def _answer(self, message: Message, tensors: Mapping[str, np.ndarray]) -> Iterator[list[Chunk]]:
        match message:
            case Hello():
                yield self._greet(message)
            case Tensors():
                yield from self._work(message, tensors)
            case Save():
                self._check_session(message.session)
                self._check_step(message.step)
                self.executor.save()
                yield self._protocol.send(Saved(session=self.id, step=self.executor.step))
            case Bye() | Fault():
                self.abandon()
            case _:
                raise RemoteProtocolError(f"a server takes no {type(message).__name__}")

    def _greet(self, hello: Hello) -> list[Chunk]:
        executor = self.executor
        if hello.step != executor.step:
            raise BundleMismatch(
                "the number of steps trained",
                str(executor.step),
                str(hello.step),
                "restart the server to go back to what was last saved",
            )
        welcome = Welcome(
            session=self.id,
            digest=executor.manifest.digest,
            step=executor.step,
            wires=list_wires(executor.manifest),
        )
        return self._protocol.send(welcome)

    def _work(self, message: Tensors, tensors: Mapping[str, np.ndarray]) -> Iterator[list[Chunk]]:
        self._check_session(message.session)
        if message.phase == TRAIN:
            self._check_step(message.step)
        key = message.key
        if key not in self._open:
            self.executor.begin(
                key, data={}, seed=message.seed, learning_rate=message.learning_rate
            )
            self._open.add(key)
        self.executor.deliver(key, tensors)
        for wires in self.executor.advance(key):
            yield self._protocol.send(message, wires)
        if self.executor.is_finished(key):
            self.executor.finish(key)
            self._open.discard(key)

    def _check_session(self, session: str) -> None:
        if session != self.id:
            raise RemoteProtocolError(f"it speaks of session '{session}', this is '{self.id}'")

    def _check_step(self, step: int) -> None:
        if step != self.executor.step:
            raise RemoteProtocolError(
                f"it stands at step {step}, the server at {self.executor.step}"
            )
