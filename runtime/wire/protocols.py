"""The protocol between a client and a server, without any network input or output.

It decodes and checks received messages, and encodes messages to be sent.  An exchange of messages
goes through states: :data:`MOVES` lists which party may send which message in which state, and
which state follows.  The table is the same for both sides.  Before a message is used, the names,
dtypes, shapes and value ranges of its tensors are compared with the manifest.  This module does not
know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from threading import Lock

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    BundleMismatch,
    FormatError,
    LocalProtocolError,
    RemoteProtocolError,
    quote,
)
from splitonnx.manifests import PartyManifest, Wire, WireKind
from splitonnx.messages import (
    PROTOCOL,
    Bye,
    Fault,
    Hello,
    Login,
    Message,
    Save,
    Saved,
    TaskKey,
    Tensors,
    Unsaved,
    Welcome,
    Wires,
    decode_message,
    encode_message,
)
from splitonnx.micro_batches import MOST_IN_FLIGHT
from splitonnx.names import ACCUMULATE, CLIENT, SERVER, SHARE, STEP_PHASES, TRAIN, UPDATE
from splitonnx.runtime.wire.validation import check_finite, check_norm
from splitonnx.tensors import check_array, check_rows


class State(StrEnum):
    """The state of an exchange of messages between a client and a server."""

    START = "start"
    GREETING = "greeting"  # the client said hello
    OPEN = "open"
    SAVING = "saving"  # the client asked the server to save
    CLOSED = "closed"


MOVES: Mapping[tuple[State, str, type[Message]], State] = {
    (State.START, CLIENT, Login): State.START,
    (State.START, CLIENT, Hello): State.GREETING,
    (State.START, SERVER, Fault): State.CLOSED,
    (State.START, CLIENT, Bye): State.CLOSED,
    (State.GREETING, SERVER, Welcome): State.OPEN,
    (State.GREETING, SERVER, Fault): State.CLOSED,
    (State.GREETING, CLIENT, Bye): State.CLOSED,
    (State.OPEN, CLIENT, Tensors): State.OPEN,
    (State.OPEN, SERVER, Tensors): State.OPEN,
    (State.OPEN, CLIENT, Save): State.SAVING,
    (State.OPEN, CLIENT, Fault): State.CLOSED,
    (State.OPEN, SERVER, Fault): State.CLOSED,
    (State.OPEN, CLIENT, Bye): State.CLOSED,
    (State.SAVING, SERVER, Saved): State.OPEN,
    (State.SAVING, SERVER, Unsaved): State.OPEN,
    (State.SAVING, SERVER, Fault): State.CLOSED,
    (State.SAVING, CLIENT, Bye): State.CLOSED,
}
"""The allowed messages: maps (state, sender, message type) to the state that follows.

A message that is not in the table is not allowed.
"""


_FINITE_PHASES = STEP_PHASES | {SHARE}
"""Phases in which NaN or infinity in a tensor would become part of the state."""


class Protocol:
    """One side of an exchange of messages; ``role`` is that side's party, ``client`` or ``server``.

    ``state`` is the state of the exchange.  This side does not accept gradients with an L2 norm
    above ``norm``, or tensors with more than ``batch`` rows; ``None`` means no limit.
    """

    def __init__(
        self,
        manifest: PartyManifest,
        role: str,
        *,
        norm: float | None = None,
        batch: int | None = None,
    ) -> None:
        self.state = State.START
        self._norm = norm
        self._batch = batch
        self._manifest = manifest
        self._role = role
        self._peer = SERVER if role == CLIENT else CLIENT
        self._sizes: dict[TaskKey, dict[str, int]] = {}  # of the newest tasks, in order
        self._mutex = Lock()  # a message may be read while a reply is encoded

    def send(
        self, message: Message, tensors: Mapping[str, np.ndarray] | None = None
    ) -> list[Chunk]:
        """Encode a message and move to the next state.

        Raises:
            LocalProtocolError: this side may not send this message or these tensors now.
            ArrayMismatch, ValueOutOfRange: a tensor differs from its declaration in the manifest.
        """
        following = MOVES.get((self.state, self._role, type(message)))
        if following is None:
            raise LocalProtocolError(f"a {type(message).__name__} while {self.state}")
        if isinstance(message, Tensors) and tensors:
            self._check_tensors(message, tensors, sender=self._role)
        self.state = following
        return encode_message(message, tensors)

    def list_sizes(self, key: TaskKey) -> Mapping[str, int]:
        """Return the known sizes of a task's named dimensions; the newest tasks are known."""
        return self._sizes.get(key, {})

    def close(self) -> None:
        """End the exchange without sending a message."""
        self.state = State.CLOSED

    def receive(self, content: Chunk | bytearray) -> tuple[Message, dict[str, np.ndarray]]:
        """Decode and check a message, and move to the next state.

        The returned tensors are views of ``content``, not copies.

        Raises:
            RemoteProtocolError: the message is invalid, or the other side may not send it now.
            BundleMismatch: the greeting shows that the two parts do not belong together, or that
                the two sides use different versions of the protocol.
            ArrayMismatch, ValueOutOfRange: a tensor differs from its declaration in the manifest.
            BatchTooLarge: a tensor has more rows than this side accepts.
            NotFinite, NormTooLarge: a tensor of a training step contains NaN or infinity, or the
                norm of a gradient is too large.
        """
        try:
            message, tensors = decode_message(content)
        except FormatError as error:
            raise RemoteProtocolError(str(error)) from error
        following = MOVES.get((self.state, self._peer, type(message)))
        if following is None:
            raise RemoteProtocolError(f"it sent a {type(message).__name__} while {self.state}")
        if isinstance(message, Hello | Welcome):
            self._compare(message)
        if isinstance(message, Tensors):
            if not self._manifest.phase(message.phase).wires:
                raise RemoteProtocolError(f"there is no phase '{message.phase[:40]}'")
            _check_place(message)
            self._check_tensors(message, tensors, sender=self._peer)
        self.state = following
        return message, tensors

    def _compare(self, greeting: Hello | Welcome) -> None:
        if isinstance(greeting, Hello) and greeting.protocol != PROTOCOL:
            raise BundleMismatch("the protocol", str(PROTOCOL), str(greeting.protocol))
        _compare_wires(list_wires(self._manifest), greeting.wires)
        if greeting.digest != self._manifest.digest:
            raise BundleMismatch("the bundle's digest", self._manifest.digest, greeting.digest)

    def _check_tensors(
        self, message: Tensors, tensors: Mapping[str, np.ndarray], *, sender: str
    ) -> None:
        """Compare tensors with the tensors that ``sender`` may send in the message's phase."""
        wires = {
            wire.tensor.name: wire
            for wire in self._manifest.phase(message.phase).wires
            if wire.sender == sender
        }
        if unknown := tensors.keys() - wires.keys():
            error = RemoteProtocolError if sender == self._peer else LocalProtocolError
            raise error(f"{quote(sorted(unknown))} is not a wire of phase '{message.phase}'")
        if message.phase == SHARE and (missing := wires.keys() - tensors.keys()):
            error = RemoteProtocolError if sender == self._peer else LocalProtocolError
            raise error(f"a share comes whole, and {quote(sorted(missing))} is missing from it")
        sizes = self._find_sizes(message, sender)
        for name, array in tensors.items():
            if self._batch is not None and sender == self._peer:
                check_rows(array, wires[name].tensor, self._batch)
            kind = wires[name].kind
            is_output = kind is WireKind.OUTPUT
            check_array(array, wires[name].tensor, sizes, is_output=is_output)
            if message.phase in _FINITE_PHASES and sender == self._peer:
                check_finite(name, array, f"step {message.step + 1}")
                if self._norm is not None and kind is WireKind.GRADIENT:
                    check_norm(name, array, self._norm)

    def _find_sizes(self, message: Tensors, sender: str) -> dict[str, int]:
        """Return the sizes that are known in a message's task; a task's first message has none."""
        with self._mutex:
            if message.key not in self._sizes or (message.turn == 0 and sender == CLIENT):
                self._sizes.pop(message.key, None)
                while len(self._sizes) > MOST_IN_FLIGHT:
                    del self._sizes[next(iter(self._sizes))]
                self._sizes[message.key] = {}
            return self._sizes[message.key]


def list_wires(manifest: PartyManifest) -> Wires:
    """Return the wires of each phase, for use in a greeting.

    A wire is a tensor that one party sends to the other.  Phases without wires are left out, and so
    are those of micro-batches, which send what ``train`` sends: greetings would be twice as large,
    and the digest tells whether they are the same.
    """
    return {
        phase.name: phase.wires
        for phase in manifest.phases
        if phase.wires and phase.name not in (ACCUMULATE, UPDATE)
    }


def _check_place(message: Tensors) -> None:
    """Check that a task of a training step may have its number of micro-batches before it."""
    number, phase = message.micro_batch, message.phase
    if (number and phase == TRAIN) or (phase == UPDATE and not number):
        raise RemoteProtocolError(f"it would {phase} after {number} micro-batches")


def _compare_wires(local: Wires, remote: Wires) -> None:
    for phase in sorted({*local, *remote}):
        here = {wire.tensor.name: wire for wire in local.get(phase, ())}
        there = {wire.tensor.name: wire for wire in remote.get(phase, ())}
        for name in sorted({*here, *there}):
            if here.get(name) != there.get(name):
                raise BundleMismatch(
                    f"wire '{name}' of phase '{phase}'",
                    _describe_wire(here.get(name)),
                    _describe_wire(there.get(name)),
                )


def _describe_wire(wire: Wire | None) -> str:
    if wire is None:
        return "absent"
    return f"{wire.tensor} ({wire.kind} from {wire.sender} to {wire.receiver})"
