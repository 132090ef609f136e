"""A client's transport that records the tensors of every message, by phase and direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.messages import Tensors, decode_message
from splitonnx.runtime.wire.transports import Transport

Arrays = dict[str, np.ndarray]


class RecordingTransport:
    """Hands messages on, and notes per phase and step the tensors that were sent and received."""

    def __init__(self, transport: Transport) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.sent: dict[str, dict[int, Arrays]] = defaultdict(lambda: defaultdict(dict))
        self.received: dict[str, dict[int, Arrays]] = defaultdict(lambda: defaultdict(dict))
        self._transport = transport
        self._tasks = 0

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._note(b"".join(chunks), self.sent, is_mine=True)
        self._transport.send(chunks)

    def receive(self) -> Chunk:
        content = self._transport.receive()
        self._note(content, self.received, is_mine=False)
        return content

    def close(self) -> None:
        self._transport.close()

    def _note(self, content: Chunk, noted: dict[str, dict[int, Arrays]], *, is_mine: bool) -> None:
        message, tensors = decode_message(content)
        if isinstance(message, Tensors):
            self._tasks += is_mine and message.turn == 0
            noted[message.phase][self._tasks].update(tensors)
        else:
            assert not tensors
