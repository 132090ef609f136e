"""What client and server say to each other, and how a message is written.

A message is one safetensors message: its own fields are JSON in the metadata under
``splitonnx``, its tensors are the message's tensors.  So any safetensors reader can look into a
recorded message.  This module knows what can be said; when it may be said is the protocol's
business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np

from splitonnx.codecs import Chunk, decode_tensors, encode_tensors
from splitonnx.errors import FormatError
from splitonnx.manifests import Wire

PROTOCOL = 2
"""Version of the protocol; both sides must speak the same."""
REPLACED = 4001
"""The closing code of a connection whose session another client has taken over."""
MAX_HEADER = 1 << 20
"""Bytes.  A greeting lists every wire, some 200 bytes each; other messages stay below 16 KiB."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""Steps, turns, seeds: what fits an I64, so that nobody sends numbers too long to print."""

_FIELD = "splitonnx"

Wires = dict[str, tuple[Wire, ...]]
"""Phase name to everything that travels in the phase."""


class TaskKey(msgspec.Struct, frozen=True):
    """What a task is known by: one micro-batch of one step of one phase of one session."""

    session: str
    phase: str
    step: int
    micro_batch: int


class Login(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A client's token, as a message: browsers cannot send it in a header."""

    token: str


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Client: I have this bundle and am at this step of this session.

    ``session`` is 32 hex digits of the client's choice, new or one to continue with.  It began at
    step ``start``, from a state that came out of session ``origin``, empty for an untrained
    bundle.  ``generation`` counts the session's connections: it must be larger than that of any
    before.  ``kept`` are the steps that the client has checkpoints of; without any it can go back
    to ``start``.  ``is_open`` says that it is in the middle of ``step`` and will send that step's
    messages again; ``can_repeat`` that it has those of the step before ``step`` as well, the last
    of which may not have arrived.
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
    wires: Wires

    @property
    def candidates(self) -> tuple[int, ...]:
        """The steps at which the client could continue, the newest first."""
        return tuple(sorted({self.step, *(self.kept or (self.start,))}, reverse=True))


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server: so have I; we continue at ``step``, the client's own or one that it kept.

    ``wants_repeat``: I have not made the step before that yet; send its messages again.
    """

    session: str
    digest: str
    step: Count
    wants_repeat: bool = False
    wires: Wires


class Tensors(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Either: wires of a task.  ``seed`` and ``learning_rate`` are the client's to choose.

    ``turn`` counts its sender's messages of the task from 0.  A message that is sent again is the
    same to the byte.
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
        """The task that the wires belong to."""
        return TaskKey(self.session, self.phase, self.step, self.micro_batch)


class Save(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Client: write your state at ``step`` to disk, durably; then I write mine.

    ``publish``: as the outcome of the training, and not only to go back to.
    """

    session: str
    step: Count
    publish: bool = False


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server: done."""

    session: str
    step: Count


class Unsaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server: it could not be written; what was saved before is kept, and training may continue."""

    session: str
    step: Count
    reason: str


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Either: this went wrong here, and this connection ends.  ``code`` is the error's class.

    ``newest``: with ``StaleConnection``, the generation of the session's newest connection.
    ``subject``: with ``NotFinite`` and ``BatchTooLarge``, the tensor's name; with ``NotFinite``
    ``reason`` says where it was.  ``needed`` and ``limit``: with ``BatchTooLarge``, the rows that
    came and the most that may.
    """

    code: str
    reason: str
    newest: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)] = 0  # the client's next is one more
    subject: str = ""
    needed: Count = 0
    limit: Count = 0


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Client: I am done."""


Message = Login | Hello | Welcome | Tensors | Save | Saved | Unsaved | Fault | Bye

# msgspec ends the process where two threads meet a type for the first time at once
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode_message(
    message: Message, tensors: Mapping[str, np.ndarray] | None = None
) -> list[Chunk]:
    """Write a message and its tensors as chunks to be sent as one; tensors are not copied."""
    return encode_tensors(tensors or {}, {_FIELD: msgspec.json.encode(message).decode()})


def decode_message(content: Chunk | bytearray) -> tuple[Message, dict[str, np.ndarray]]:
    """Read a message and its tensors, which are views of ``content``.

    Raises:
        FormatError: the bytes are not a message.
    """
    tensors, metadata = decode_tensors(content, max_header=MAX_HEADER)
    if metadata.keys() != {_FIELD}:
        raise FormatError("not a message", f"its metadata hold {sorted(metadata)}")
    try:
        message = _DECODER.decode(metadata[_FIELD])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError("not a message", str(error)) from error
    if tensors and not isinstance(message, Tensors):
        raise FormatError("not a message", f"a {type(message).__name__} carries no tensors")
    return message, tensors
