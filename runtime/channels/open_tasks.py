"""The client's record of an open task: the messages sent, and the answer that is expected next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey, Tensors


@dataclass(kw_only=True)
class OpenTask:
    """The messages sent in a task, the number of answers received, and the answer expected next.

    After a reconnect every message is sent again.  The server may then repeat its answers, in order
    and each at most once.
    """

    key: TaskKey
    sent: list[tuple[Tensors, Mapping[str, np.ndarray]]] = field(default_factory=list)
    received: int = 0
    due: int = 0

    def check(self, message: Tensors) -> None:
        """Raise an error unless a message is the expected one.

        Raises:
            RemoteProtocolError: the message belongs to another task, is a repetition, or is too
                early.
        """
        if message.key != self.key:
            raise RemoteProtocolError(f"it answered {message.key}, open is {self.key}")
        if message.turn != self.due:
            raise RemoteProtocolError(f"it sent message {message.turn} where {self.due} was due")
        self.due += 1
