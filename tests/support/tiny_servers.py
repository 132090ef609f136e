"""A server of the tiny bundle that computes nothing, and lies or loses steps as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost
from splitonnx.messages import (
    Hello,
    Message,
    Save,
    Saved,
    Tensors,
    Unsaved,
    Welcome,
    decode_message,
    encode_message,
)
from splitonnx.runtime.wire.protocols import list_wires


def tell_the_truth(answer: Saved) -> Saved:
    return answer


@dataclass(kw_only=True)
class TinyServer:
    """Connect to it by :meth:`dial`.

    Args:
        bundle: the tiny one.
        losses: how many steps were made when it loses all of them, each time.
        gradient: every number of the gradient that it sends.
        saved: makes the answer to Save; it may raise ConnectionLost.

    ``heard`` are the messages that came.
    """

    bundle: Bundle
    losses: list[int] = field(default_factory=list)
    gradient: float = 0.1
    saved: Callable[[Saved], Saved | Unsaved] = tell_the_truth
    heard: list[Message] = field(default_factory=list)

    def dial(self) -> Connection:
        return Connection(self)

    def answer(self, asked: Message, sent: dict[str, np.ndarray]) -> bytes:
        if isinstance(asked, Hello):
            manifest = self.bundle.client.manifest
            welcome = Welcome(
                session=asked.session,
                digest=manifest.digest,
                step=asked.start,
                wires=list_wires(manifest),
            )
            return b"".join(encode_message(welcome))
        if isinstance(asked, Save):
            saved = self.saved(Saved(session=asked.session, step=asked.step))
            return b"".join(encode_message(saved))
        assert isinstance(asked, Tensors)
        if self.losses and asked.step == self.losses[0]:
            del self.losses[0]
            raise ConnectionLost("the server", "it closed")
        gradient = np.full_like(sent["h"], self.gradient)
        reply = {"h.grad": gradient, "loss": np.array(1.0, np.float32)}
        return b"".join(encode_message(asked, reply))


class Connection:
    """A transport; see :class:`splitonnx.runtime.wire.transports.Transport`."""

    def __init__(self, server: TinyServer) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._server = server
        self._last: tuple[Message, dict[str, np.ndarray]] | None = None

    def send(self, chunks: Sequence[Chunk]) -> None:
        message, tensors = decode_message(b"".join(chunks))
        self._server.heard.append(message)
        self._last = message, dict(tensors)

    def receive(self) -> bytes:
        assert self._last is not None
        return self._server.answer(*self._last)

    def close(self) -> None:
        pass
