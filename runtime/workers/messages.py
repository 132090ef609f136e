"""The messages between a server and its workers: requests, answers and errors, as bytes.

Each message is a msgspec struct, encoded as MessagePack with a length prefix.  Tensors are passed
separately, in shared memory.  Pickle is not used.  A worker may have been compromised by the data
that it processed, so its answers are validated as strictly as messages from an unknown client.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Protocol

import msgspec

import splitonnx.errors
from splitonnx.errors import FormatError, SplitonnxError
from splitonnx.messages import TaskKey
from splitonnx.runtime.workers.blocks import Place, Slot

MAX_ANSWER = 16 << 20
"""Largest size of an answer in bytes; the largest answers list the tensors of a state."""
MAX_TEXT = 1000
"""Most characters of a text in an error."""
RAISED = frozenset(
    {
        "ArrayMismatch",
        "BatchTooLarge",
        "InternalRuntimeError",
        "LocalProtocolError",
        "MissingArray",
        "NormTooLarge",
        "NotFinite",
        "RemoteProtocolError",
        "StageFailed",
        "StageStopped",
        "StageTooSlow",
        "TaskTooLarge",
        "UsageError",
        "ValueOutOfRange",
        "WrongRuntime",
    }
)
"""Errors that a worker may report to its server, which raises them again."""

_LENGTH = struct.Struct("<Q")

Fact = str | int | float | bool | None | list[str | int]


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that loads the party whose stages the worker runs.

    ``file`` is the descriptor of an inherited file with the weights; if it is ``None``, the weights
    are in the shared memory block.  ``weights`` lists their positions.  ``threads`` is the number
    of threads per operator, and ``provider`` the execution provider.  ``stage_seconds`` limits the
    time of each stage, ``memory_bytes`` the memory of the process, and ``norm`` the norm of each
    decoded gradient.
    """

    manifest: bytes
    graphs: dict[str, bytes]
    file: int | None
    weights: tuple[Slot, ...]
    threads: int | None
    provider: str
    stage_seconds: float
    memory_bytes: int | None
    norm: float | None = None


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that begins or restores a session.

    ``state`` lists the positions of the state's tensors in the shared memory block.  If it is
    ``None``, the session begins with the initial weights.  ``session`` is a number by which later
    actions name the session.
    """

    session: int
    step: int
    state: tuple[Slot, ...] | None


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """The seed and the learning rate with which a task is started."""

    seed: int
    learning_rate: float


class Work(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that passes tensors to a task, and runs the task as far as possible.

    It runs until it has tensors to send, waits for others, or is finished.  If ``begin`` is given,
    the task is opened first.
    """

    session: int
    key: TaskKey
    begin: Begin | None
    wires: tuple[Slot, ...]


class Continue(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that continues a task that was paused to send tensors."""

    session: int
    key: TaskKey


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that commits a finished task."""

    session: int
    key: TaskKey


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that returns the session's state."""

    session: int


class Tidy(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An action that only frees memory.

    The worker drops the tasks and sessions named in the :class:`Request`, and frees their memory.
    """


Action = Start | Open | Work | Continue | Finish | Fetch | Tidy


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request to the worker, with one action.

    The worker first drops the tasks in ``abandoned`` and the sessions in ``closed``, and then
    performs ``action``.  ``inbox`` is the shared memory block with the action's tensors, and
    ``outbox`` is the block for the answer's tensors.  After a task, the worker may keep
    ``kept_bytes`` of freed memory.
    """

    inbox: Place
    outbox: Place
    action: Action
    kept_bytes: int
    abandoned: tuple[tuple[int, TaskKey], ...] = ()
    closed: tuple[int, ...] = ()


class Grown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The server's reply to :class:`Need`: the outbox is now large enough."""

    outbox: Place


class Need(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker's request to enlarge its outbox to ``size`` bytes, so that an answer fits."""

    size: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer if an action succeeded.

    ``is_finished`` is true if the task can be committed, and ``is_waiting`` if one of its stages
    waits for an earlier task of the step.
    """

    is_finished: bool = False
    is_waiting: bool = False


class Given(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An answer with tensors in the shared memory block: tensors for the client, or a state."""

    tensors: tuple[Slot, ...]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer if an action failed, with the error's class and the values of its fields.

    ``is_last`` is true if the worker exits because of the error.
    """

    code: str
    facts: list[Fact]
    is_last: bool = False


ToWorker = Request | Grown
FromWorker = Need | Done | Given | Failed


class Pipe(Protocol):
    """One end of an unbuffered pipe."""

    def read(self, size: int, /) -> bytes | None:
        """Read at most ``size`` bytes; an empty result means that the other end was closed."""

    def write(self, content: bytes | memoryview, /) -> int | None:
        """Write some of the bytes, and return how many were written."""


def fill_slots(action: Action, slots: tuple[Slot, ...]) -> Action:
    """Return a copy of ``action`` that refers to its tensors by ``slots``.

    A slot is a tensor's position in the shared memory block.
    """
    match action:
        case Start():
            return msgspec.structs.replace(action, weights=slots)
        case Open():
            return msgspec.structs.replace(action, state=slots)
        case Work():
            return msgspec.structs.replace(action, wires=slots)
    raise AssertionError(f"a {type(action).__name__} carries no tensors")


def write_frame(pipe: Pipe, message: ToWorker | FromWorker) -> None:
    """Write a message with its length prefix."""
    body = msgspec.msgpack.encode(message)
    rest = memoryview(_LENGTH.pack(len(body)) + body)
    while rest:
        rest = rest[pipe.write(rest) or 0 :]


def read_frame(pipe: Pipe, most: int | None = None) -> bytes:
    """Read one message and return its bytes, without the length prefix.

    Raises:
        EOFError: the other process has ended.
        FormatError: the message has more than ``most`` bytes.
    """
    (size,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    if most is not None and size > most:
        raise FormatError("a worker's answer", f"it has {size} bytes")
    return _read(pipe, size)


def _read(pipe: Pipe, size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def describe_error(error: SplitonnxError, *, is_last: bool = False) -> Failed:
    """Convert an exception to a :class:`Failed` answer, so that the server can raise it again."""
    facts: list[Fact] = []
    for field in dataclasses.fields(error):  # type: ignore[arg-type]  # all are dataclasses
        value = getattr(error, field.name)
        if isinstance(value, str):
            value = value[:MAX_TEXT]
        facts.append(list(value) if isinstance(value, tuple) else value)
    return Failed(code=type(error).__name__, facts=facts, is_last=is_last)


def make_error(failed: Failed) -> SplitonnxError:
    """Convert a :class:`Failed` answer back to the exception that it describes.

    Raises:
        FormatError: the answer does not describe an error that a worker may report.
    """
    kind = getattr(splitonnx.errors, failed.code, None) if failed.code in RAISED else None
    if kind is None or len(failed.facts) != len(dataclasses.fields(kind)):
        raise FormatError("a worker's answer", f"it tells of a '{failed.code[:80]}'")
    names = [field.name for field in dataclasses.fields(kind)]
    for fact in failed.facts:
        if isinstance(fact, str) and len(fact) > MAX_TEXT:
            raise FormatError("a worker's answer", "its error is too long")
    made: SplitonnxError = kind(**dict(zip(names, failed.facts, strict=True)))
    try:
        str(made)
    except (TypeError, ValueError) as error:
        raise FormatError("a worker's answer", "its error cannot be told") from error
    return made
