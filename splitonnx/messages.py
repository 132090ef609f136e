"""What client and server say to each other, and how a message is written.

A message is one safetensors message: its own fields stand as JSON in the metadata under
``splitonnx``, its tensors are the message's tensors.  So any safetensors reader can look into a
recorded message.  This module knows what can be said; when it may be said is the protocol's
business.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from splitonnx.codecs import Chunk, decode_tensors, encode_tensors
from splitonnx.errors import FormatError
from splitonnx.manifests import Wire

PROTOCOL = 1
"""Version of the protocol; both sides must speak the same."""
MAX_HEADER = 1 << 20
"""Bytes.  A greeting lists every wire, some 200 bytes each; other messages stay below 16 KiB."""

_FIELD = "splitonnx"

Wires = dict[str, tuple[Wire, ...]]
"""Phase name to everything that travels in the phase."""


class TaskKey(msgspec.Struct, frozen=True):
    """What a task is known by: one micro-batch of one step of one phase of one session."""

    session: str
    phase: str
    step: int
    micro_batch: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Client: I have this bundle and have made so many steps."""

    protocol: int = PROTOCOL
    digest: str
    step: int
    wires: Wires


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server: so have I; this is our session."""

    session: str
    digest: str
    step: int
    wires: Wires


class Tensors(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Either: wires of a task.  ``seed`` and ``learning_rate`` are the client's to choose."""

    session: str
    phase: str
    step: int
    micro_batch: int
    seed: int
    learning_rate: float

    @property
    def key(self) -> TaskKey:
        """The task that the wires belong to."""
        return TaskKey(self.session, self.phase, self.step, self.micro_batch)


class Save(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Client: write your state to disk; we have made so many steps."""

    session: str
    step: int


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Server: done."""

    session: str
    step: int


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Either: this went wrong here, and this connection ends.  ``code`` is the error's class."""

    code: str
    reason: str


class Bye(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Client: I am done."""


Message = Hello | Welcome | Tensors | Save | Saved | Fault | Bye


def encode_message(
    message: Message, tensors: Mapping[str, np.ndarray] | None = None
) -> list[Chunk]:
    """Write a message and its tensors as chunks to be sent as one; tensors are not copied."""
    return encode_tensors(tensors or {}, {_FIELD: msgspec.json.encode(message).decode()})


def decode_message(content: Chunk | bytearray) -> tuple[Message, dict[str, np.ndarray]]:
    """Read a message and its tensors, which are views of ``content``.

    Raises:
        FormatError: the bytes are no message.
    """
    tensors, metadata = decode_tensors(content, max_header=MAX_HEADER)
    if metadata.keys() != {_FIELD}:
        raise FormatError("not a message", f"its metadata hold {sorted(metadata)}")
    try:
        message = msgspec.json.decode(metadata[_FIELD], type=Message)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError("not a message", str(error)) from error
    if tensors and not isinstance(message, Tensors):
        raise FormatError("not a message", f"a {type(message).__name__} carries no tensors")
    return message, tensors
