"""The messages between a server and its workers: requests, answers and errors, as bytes.

Messages are msgspec structs in MessagePack with a length prefix; tensors are passed beside them in
shared memory.  Nothing is unpickled.  A worker may have been compromised by the data it processed,
so its answers are validated as strictly as messages from an unknown client.
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
"""Most bytes of an answer; a worker's largest answer lists the tensors of a state."""
MAX_TEXT = 1000
"""Most characters of one text in an error."""
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
"""Executor errors that a worker may raise in its server."""

_LENGTH = struct.Struct("<Q")

Fact = str | int | float | bool | None | list[str | int]


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The party to run.

    ``weights`` are in the inherited file with this descriptor, or in the shared block;
    ``memory_bytes`` limits the memory of the process.
    """

    manifest: bytes
    graphs: dict[str, bytes]
    file: int | None
    weights: tuple[Slot, ...]
    threads: int | None
    stage_seconds: float
    memory_bytes: int | None


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Begin or restore a session, from a state in the shared block or from the initial weights."""

    session: int
    step: int
    state: tuple[Slot, ...] | None


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments with which a task is opened."""

    seed: int
    learning_rate: float


class Work(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Open a task if ``begin`` is given, pass wires to it, and run it until it sends wires."""

    session: int
    key: TaskKey
    begin: Begin | None
    wires: tuple[Slot, ...]


class Continue(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Continue a task after it had wires to send."""

    session: int
    key: TaskKey


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Commit a finished task."""

    session: int
    key: TaskKey


class Fetch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request for the session's state."""

    session: int


class Tidy(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget the tasks and sessions that the request names, and free their memory."""


Action = Start | Open | Work | Continue | Finish | Fetch | Tidy


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request to the worker.

    First drop the tasks in ``abandoned`` and the sessions in ``closed``, then perform ``action``.
    After a task, ``kept_bytes`` of the process's memory may stay allocated.
    """

    inbox: Place
    outbox: Place
    action: Action
    kept_bytes: int
    abandoned: tuple[tuple[int, TaskKey], ...] = ()
    closed: tuple[int, ...] = ()


class Grown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The shared block for answers has the requested size."""

    outbox: Place


class Need(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer's tensors need a block of this many bytes."""

    size: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The action is done; ``is_finished`` is true if the task can be committed."""

    is_finished: bool = False


class Given(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tensors in the shared block: wires to send, or a state."""

    tensors: tuple[Slot, ...]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An error with its class and facts; ``is_last`` is true if the worker exits because of it."""

    code: str
    facts: list[Fact]
    is_last: bool = False


ToWorker = Request | Grown
FromWorker = Need | Done | Given | Failed


class Pipe(Protocol):
    """One end of an unbuffered pipe."""

    def read(self, size: int, /) -> bytes | None:
        """Read at most ``size`` bytes; an empty result means the end."""

    def write(self, content: bytes | memoryview, /) -> int | None:
        """Write some of the bytes, and return how many were written."""


def fill_slots(action: Action, slots: tuple[Slot, ...]) -> Action:
    """Return a copy of the action with the positions of its tensors in the block."""
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
    """Read a message's bytes.

    Raises:
        EOFError: the other process has ended.
        FormatError: the message is larger than ``most``.
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
    """Convert an error to a message."""
    facts: list[Fact] = []
    for field in dataclasses.fields(error):  # type: ignore[arg-type]  # all are dataclasses
        value = getattr(error, field.name)
        if isinstance(value, str):
            value = value[:MAX_TEXT]
        facts.append(list(value) if isinstance(value, tuple) else value)
    return Failed(code=type(error).__name__, facts=facts, is_last=is_last)


def make_error(failed: Failed) -> SplitonnxError:
    """Convert a message back to the error that it describes.

    Raises:
        FormatError: the message does not describe a known error.
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
