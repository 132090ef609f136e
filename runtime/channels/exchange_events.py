"""What an exchange wants done outside, what its caller has waited for, and its states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.errors import SplitonnxError
from splitonnx.messages import TaskKey


@dataclass(frozen=True)
class Connect:
    """Open a connection; then report :meth:`Exchange.connected` or its loss."""


@dataclass(frozen=True)
class Transmit:
    """Send ``chunks``, one after the other, as one message."""

    chunks: list[Chunk] = field(repr=False)


@dataclass(frozen=True)
class HangUp:
    """Close the connection, if there is one."""


@dataclass(frozen=True)
class Greeted:
    """The first connection was welcomed, or one that the caller asked for."""


@dataclass(frozen=True)
class Replied:
    """The next reply to an open task came, with its wires (named tensors)."""

    key: TaskKey
    wires: Mapping[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class SaveAnswered:
    """The server saved its state, or could not for a ``reason``."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """What the caller asked for has failed."""

    error: SplitonnxError


Effect: TypeAlias = Connect | Transmit | HangUp
Outcome: TypeAlias = Greeted | Replied | SaveAnswered | Failed


class State(Enum):
    """Whether an exchange has a connection, and what may be sent on it."""

    CLOSED = auto()  # there is no connection, and none is wanted
    WAITING = auto()  # to connect
    DIALING = auto()
    GREETING = auto()
    REPEATING = auto()  # the last task's replies come again
    OPEN = auto()


class Aim(Enum):
    """Where the next greeting is to lead."""

    START = auto()  # at any step that both sides have
    RETURN = auto()  # at the client's step
    RESUME = auto()  # at the client's step, with its open tasks
