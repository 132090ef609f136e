"""Errors between two parties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitonnx.errors.roots import SplitonnxError, flatten


class ProtocolError(SplitonnxError):
    """Root of what can go wrong between two parties."""


@dataclass(eq=False)
class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow now: a bug on this side."""

    reason: str

    def __str__(self) -> str:
        return f"not allowed now: {self.reason}"


@dataclass(eq=False)
class RemoteProtocolError(ProtocolError):
    """The other side sent what the protocol does not allow."""

    reason: str

    def __str__(self) -> str:
        return f"the other side broke the protocol: {flatten(self.reason)}"


@dataclass(eq=False)
class BundleMismatch(ProtocolError):
    """The two sides were not cut together, or are at different steps."""

    subject: str
    local: str
    remote: str
    advice: str = "use the two folders of one bundle"

    def __str__(self) -> str:
        return (
            f"client and server do not belong together: {flatten(self.subject)} is {self.local} "
            f"here and {flatten(self.remote)} there; {self.advice}"
        )


@dataclass(eq=False)
class ServerBusy(ProtocolError):
    """The server has as many clients or sessions as it takes; ``limit`` says which and how many."""

    limit: str

    def __str__(self) -> str:
        return f"the server is full ({self.limit}); try again later"


@dataclass(eq=False)
class StaleConnection(ProtocolError):
    """A newer connection has taken the session over; ``newest`` is its generation."""

    generation: int
    newest: int

    def __str__(self) -> str:
        return (
            f"connection {self.generation} of this session was replaced by connection "
            f"{self.newest}; two clients must not train one session"
        )


@dataclass(eq=False)
class SessionLost(ProtocolError):
    """The server cannot continue with a session at any step at which the client could."""

    session: str
    wanted: Sequence[int]
    present: Sequence[int]

    def __str__(self) -> str:
        return (
            f"the server cannot continue with session {self.session}: the client could at step "
            f"{_list_steps(self.wanted)}, the server at {_list_steps(self.present)}; serve with "
            "--resume the folder that it was trained with, or train again with --restart"
        )


@dataclass(eq=False)
class WorkerLost(ProtocolError):
    """The process that ran a session's stages ended; ``how`` says how.

    ``is_repeated``: the same step ended one before, so it is not tried again.  ``is_early``: it
    ended before it was ready, which is not for want of anything that the client sends.
    """

    session: str
    how: str
    is_repeated: bool = False
    is_early: bool = False

    def __str__(self) -> str:
        if self.is_early:
            return (
                f"no worker can be started for session {self.session}; once whoever runs the "
                "server has mended what its log says, train with --resume"
            )
        if self.is_repeated:
            return (
                f"the worker of session {self.session} was lost again at the same step "
                f"({self.how}); check what is sent in it, and make the batch smaller"
            )
        return (
            f"the worker of session {self.session} was lost ({self.how}); the session resumes "
            "from its last checkpoint, or from its start"
        )


@dataclass(eq=False)
class ForeignSession(ProtocolError):
    """A session that belongs to another token's owner was asked for."""

    session: str

    def __str__(self) -> str:
        return (
            f"session {self.session} was begun with another token; only that one continues with it"
        )


@dataclass(eq=False)
class StepConflict(ProtocolError):
    """A step that was made already is asked for once more, with other inputs."""

    step: int

    def __str__(self) -> str:
        return (
            f"step {self.step} was made already, with other inputs; train with the same data, "
            "batches and seed, or again with --restart"
        )


@dataclass(eq=False)
class StepsLost(ProtocolError):
    """The server lost steps, and both sides went back to ``step``: continue from there."""

    step: int

    def __str__(self) -> str:
        return (
            f"the server lost its newest steps, and both sides went back to step {self.step}; "
            "give it the batches again from there"
        )


@dataclass(eq=False)
class RemoteFault(ProtocolError):
    """The other side reported an error of its own."""

    code: str
    reason: str

    def __str__(self) -> str:
        return f"the other side reported {flatten(self.code)}: {flatten(self.reason)}"


@dataclass(eq=False)
class ConnectionLost(ProtocolError):
    """The connection could not be made, broke, or fell silent for too long: worth trying again.

    ``code`` is the websocket's closing code (1012: the server starts again, 1013: it is full, 4001:
    another client has the session now), or the HTTP status with which a handshake was refused
    (503: it is full); ``None`` where there was neither.
    """

    peer: str
    reason: str
    code: int | None = None

    def __str__(self) -> str:
        return f"connection to {self.peer} lost: {flatten(self.reason)}"


@dataclass(eq=False)
class Unauthorized(ProtocolError):
    """The server knows whoever asks and lets them not in: trying again does not help.

    ``status`` is the HTTP status, or the closing code 1008 where a first message was refused.
    """

    peer: str
    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} refused to let this side in ({self.status}): {flatten(self.reason)}"


@dataclass(eq=False)
class NotPermitted(ProtocolError):
    """The token that was shown lacks the role that something takes: another token helps."""

    role: str
    action: str

    def __str__(self) -> str:
        return (
            f"this token may not {flatten(self.action)}: it lacks the role '{flatten(self.role)}'; "
            "ask whoever runs the server for a token that has it"
        )


@dataclass(eq=False)
class UntrustedPeer(ProtocolError):
    """TLS cannot verify who the other side is; trying again does not help."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} cannot be trusted: {flatten(self.reason)}"


@dataclass(eq=False)
class Redirected(ProtocolError):
    """The server names another address, to which a client does not go by itself."""

    status: int
    target: str

    def __str__(self) -> str:
        return (
            f"the server answers with a redirect to '{flatten(self.target[:200])}' "
            f"({self.status}), which is not followed; if that address is the right one, name it "
            "with --server"
        )


@dataclass(eq=False, kw_only=True)
class MessageTooLarge(ProtocolError):
    """A message is over its receiver's limit: sending it again does not help."""

    peer: str = field(kw_only=False)
    is_outgoing: bool
    reason: str

    def __str__(self) -> str:
        if self.is_outgoing:
            return (
                f"{self.peer} takes no message as large as this side's ({flatten(self.reason)}); "
                "make the batch smaller, or serve with a larger --max-message-bytes"
            )
        return (
            f"{self.peer} sent a message larger than this side takes ({flatten(self.reason)}); "
            "make the batch smaller, or let this side take more with --max-message-bytes"
        )


@dataclass(eq=False)
class UnusableFile(SplitonnxError):
    """A file of tokens, a certificate or a key has another form than it should have."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class PortInUse(SplitonnxError):
    """The server's port is taken."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"port {self.port} on {self.host} is in use; choose another with --port"


def _list_steps(steps: Iterable[int]) -> str:
    return " or ".join(str(step) for step in steps) or "none"
