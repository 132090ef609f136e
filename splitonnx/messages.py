"""The messages between client and server, and their encoding.

Every message has the safetensors format: its tensors are stored as usual, and its other fields are
stored as JSON in the metadata, under ``splitonnx``.  Therefore any safetensors reader can inspect a
recorded message.  This module defines the messages; :mod:`splitonnx.runtime.wire.protocols` defines
when each message may be sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np

from splitonnx.codecs import Chunk, decode_tensors, encode_tensors
from splitonnx.errors import FormatError
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.manifests import Wire
from splitonnx.names import PER_CLIENT

PROTOCOL = 2
"""The version of the protocol; both sides must use the same version."""
REPLACED = 4001
"""The close code of a connection whose session was taken over by another client."""
MAX_HEADER = 1 << 20
"""The largest header in bytes.

A greeting lists every wire, with some 200 bytes each; other headers stay below 16 KiB.
"""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Steps, turns and seeds: limited to an I64, so that nobody sends numbers too long to print."""

_FIELD = "splitonnx"

Wires = dict[str, tuple[Wire, ...]]
"""All tensors that are sent in each phase, by the name of the phase."""


class TaskKey(msgspec.Struct, frozen=True):
    """The identity of a task: its session, phase, step and micro-batch."""

    session: str
    phase: str
    step: int
    micro_batch: int


class Login(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The client's token, sent as a message because browsers cannot send it in an HTTP header."""

    token: str


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The client's greeting: its bundle, its session, and its current step.

    ``session`` is the ID of a new session or of a session to continue: 32 hex digits, chosen by the
    client.  The session began at step ``start``, from a state produced by the session ``origin``;
    ``origin`` is empty for an untrained bundle.  ``generation`` counts the session's connections
    and must be larger than in any earlier connection.  ``kept`` are the steps for which the client
    has checkpoints; without checkpoints, it can go back to ``start``.  ``is_open`` means that the
    client is in the middle of ``step`` and will send that step's messages again.  ``can_repeat``
    means that the client also still has the messages of the previous step, in case the last of them
    did not arrive.  ``can_share`` means that the client's user permits it to share its parameters.
    ``micro_batch`` is the number of micro-batches of ``step`` that the client has completed; then
    ``is_open`` and ``can_repeat`` are about the next one and the last one.  ``in_flight`` is the
    largest number of tasks of one step that the client may have open at the same time.
    """

    protocol: int = PROTOCOL
    digest: str
    session: str
    origin: str = ""
    start: Count = 0
    generation: Count = 1
    step: Count
    kept: tuple[Count, ...] = ()
    is_open: bool = False
    can_repeat: bool = False
    can_share: bool = False
    micro_batch: Count = 0
    in_flight: Count = 1
    wires: Wires

    @property
    def candidates(self) -> tuple[int, ...]:
        """Return the steps from which the client could continue, newest first."""
        return tuple(sorted({self.step, *(self.kept or (self.start,))}, reverse=True))


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The server's reply to a greeting: both sides have the same bundle and start at ``step``.

    ``step`` is the client's current step, or a step for which the client has a checkpoint.
    ``wants_repeat`` means that the server has not completed the previous step, so the client must
    send the messages of that step again.  If ``local_steps`` is not 0, the server's ``policy``
    joins what its clients learn: the client shares its parameters after this many steps, until
    ``rounds`` rounds are complete; 0 means that the client decides.  ``can_accumulate`` means that
    a step may consist of several micro-batches.  ``restarts`` means that the server does not have
    the client's micro-batches of the running step, so the client must begin the step again.
    ``in_flight`` is how many tasks of one step the client may have open at the same time; it is not
    more than the client asked for.
    """

    session: str
    digest: str
    step: Count
    wants_repeat: bool = False
    can_accumulate: bool = False
    restarts: bool = False
    policy: str = PER_CLIENT
    local_steps: Count = 0
    rounds: Count = 0
    in_flight: Count = 1
    wires: Wires


class Tensors(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tensors of a task, sent by either side.

    The client chooses ``seed`` and ``learning_rate``.  ``turn`` counts the sender's messages in
    this task, starting from 0.  If a message is sent again, it has exactly the same bytes.
    """

    session: str
    phase: str
    step: Count
    micro_batch: Count
    turn: Count
    seed: Count
    learning_rate: float

    @property
    def key(self) -> TaskKey:
        """Return the identity of the task that the tensors belong to."""
        return TaskKey(self.session, self.phase, self.step, self.micro_batch)


class Save(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The client's request that the server save its state at ``step``.

    When the server has saved its state, the client saves its own.  ``publish`` means that the state
    is not only a checkpoint to go back to, but also the outcome of the training.  ``keep`` means
    that the client may want to return to this step at the end of training; the server keeps its
    newest two such checkpoints, however many come after them.
    """

    session: str
    step: Count
    publish: bool = False
    keep: bool = False


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The server's reply to :class:`Save`: its state was saved.

    ``keep`` is that of the request; a server that does not know it leaves it out.
    """

    session: str
    step: Count
    keep: bool = False


class Unsaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The server's reply to :class:`Save` if its state could not be saved.

    Earlier checkpoints remain, and training may continue.
    """

    session: str
    step: Count
    reason: str


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A report that an error occurred on the sender's side; the connection is then closed.

    ``code`` is the name of the error's class, and ``reason`` describes the error.  For some errors,
    the fields have a special meaning:

    - ``BatchTooLarge``: ``subject`` is the name of the tensor, ``needed`` is the number of rows
      received, and ``limit`` is the largest number allowed.
    - ``NotFinite``: ``subject`` is the name of the tensor, and ``reason`` says where the
      value occurred.
    - ``NotPermitted``: ``subject`` is the missing role, and ``reason`` is the forbidden action.
    - ``ServerBusy``: ``reason`` is the name of the limit.
    - ``SharingNotPermitted``: ``subject`` is the name of the server's policy.
    - ``StaleConnection``: ``newest`` is the generation of the session's newest connection.
    - ``TaskTooLarge``: ``needed`` and ``limit`` are sizes in bytes.
    """

    code: str
    reason: str
    newest: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)] = 0  # the client's next is one more
    subject: str = ""
    needed: Count = 0
    limit: Count = 0


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The client's last message, which says that the client has finished."""


Message = Login | Hello | Welcome | Tensors | Save | Saved | Unsaved | Fault | Bye

# msgspec crashes if two threads use a type for the first time simultaneously
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode_message(
    message: Message, tensors: Mapping[str, np.ndarray] | None = None
) -> list[Chunk]:
    """Encode a message and its tensors as a list of chunks; contiguous tensors are not copied."""
    return encode_tensors(tensors or {}, {_FIELD: msgspec.json.encode(message).decode()})


def decode_message(content: Chunk | bytearray) -> tuple[Message, dict[str, np.ndarray]]:
    """Decode a message and its tensors; the tensors are views of ``content``.

    Raises:
        FormatError: ``content`` is not a valid message.
    """
    tensors, metadata = decode_tensors(content, max_header=MAX_HEADER)
    if metadata.keys() != {_FIELD}:
        raise FormatError("not a message", f"its metadata hold {sorted(metadata)}")
    try:
        message = _DECODER.decode(metadata[_FIELD])
    except JSON_ERRORS as error:
        raise FormatError("not a message", str(error)) from error
    if tensors and not isinstance(message, Tensors):
        raise FormatError("not a message", f"a {type(message).__name__} carries no tensors")
    return message, tensors


def is_bye(content: Chunk | bytearray) -> bool:
    """Return whether ``content`` is a client's last message; it need not be valid."""
    try:
        return isinstance(decode_message(content)[0], Bye)
    except FormatError:
        return False
