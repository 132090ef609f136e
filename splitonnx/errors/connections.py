"""Errors in the communication between client and server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitonnx.errors.roots import SplitonnxError, flatten


class ProtocolError(SplitonnxError):
    """Base class of errors in the communication between client and server."""


@dataclass(eq=False)
class LocalProtocolError(ProtocolError):
    """Due to a bug, this side tried to send something that the protocol forbids at this point."""

    reason: str

    def __str__(self) -> str:
        return f"not allowed now: {self.reason}"


@dataclass(eq=False)
class RemoteProtocolError(ProtocolError):
    """The other side sent something that the protocol forbids."""

    reason: str

    def __str__(self) -> str:
        return f"the other side broke the protocol: {flatten(self.reason)}"


@dataclass(eq=False)
class BundleMismatch(ProtocolError):
    """The client and the server have parts of different bundles, or are at different steps."""

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
    """The server has no free capacity; ``limit`` describes the limit that was reached."""

    limit: str

    def __str__(self) -> str:
        return f"the server is full ({self.limit}); try again later"


@dataclass(eq=False)
class StaleConnection(ProtocolError):
    """A newer connection has taken over the session.

    ``generation`` is the number of this connection, and ``newest`` is the number of the newest
    connection.
    """

    generation: int
    newest: int

    def __str__(self) -> str:
        return (
            f"connection {self.generation} of this session was replaced by connection "
            f"{self.newest}; two clients must not train one session"
        )


@dataclass(eq=False)
class SessionLost(ProtocolError):
    """The client and the server have no common step from which the session could continue.

    ``wanted`` are the steps from which the client could continue, and ``present`` are the steps
    from which the server could continue.
    """

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
    """The process that ran a session's stages (its worker) ended unexpectedly.

    ``how`` describes how it ended.  ``is_repeated`` means that an earlier worker was lost at the
    same step; the step is then not attempted again.  ``is_early`` means that the worker ended
    before it was ready, so the client's messages cannot be the cause.
    """

    session: str
    how: str
    is_repeated: bool = False
    is_early: bool = False

    def __str__(self) -> str:
        if self.is_early:
            return (
                f"no worker can be started for session {self.session}; once whoever runs the "
                "server has fixed the problem in its log, train with --resume"
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
    """The requested session does not belong to the owner of the client's token."""

    session: str

    def __str__(self) -> str:
        return (
            f"session {self.session} was begun with another token; only that one continues with it"
        )


@dataclass(eq=False)
class StepConflict(ProtocolError):
    """A completed step was requested again with different inputs."""

    step: int

    def __str__(self) -> str:
        return (
            f"step {self.step} was made already, with other inputs; train with the same data, "
            "batches and seed, or again with --restart"
        )


@dataclass(eq=False)
class StepEnded(ProtocolError):
    """A step of a model that several clients train was ended, and is repeated."""

    step: int

    def __str__(self) -> str:
        return (
            f"step {self.step} was ended, because a client did not continue it in time, or it "
            "failed for several clients together; it is repeated"
        )


@dataclass(eq=False)
class StepsLost(ProtocolError):
    """The server lost its newest steps, and both sides went back to ``step``."""

    step: int

    def __str__(self) -> str:
        return (
            f"the server lost its newest steps, and both sides went back to step {self.step}; "
            "give it the batches again from there"
        )


@dataclass(eq=False)
class StepRestarted(ProtocolError):
    """The server lost the micro-batches of the running step, which begins again at its first."""

    step: int

    def __str__(self) -> str:
        return (
            f"the server lost the micro-batches of step {self.step}; give them to it again, "
            "from the first one"
        )


@dataclass(eq=False)
class RemoteFault(ProtocolError):
    """The other side reported an error; ``code`` is the name of the error's class."""

    code: str
    reason: str

    def __str__(self) -> str:
        return f"the other side reported {flatten(self.code)}: {flatten(self.reason)}"


@dataclass(eq=False)
class ConnectionLost(ProtocolError):
    """The connection failed, was interrupted, or was silent for too long; a retry may help.

    ``code`` is the close code of the WebSocket (1012: the server is restarting, 1013: it is full,
    4001: another client has taken over the session), or the HTTP status with which the handshake
    was refused (503: the server is full).  If there is neither, ``code`` is ``None``.
    """

    peer: str
    reason: str
    code: int | None = None

    def __str__(self) -> str:
        return f"connection to {self.peer} lost: {flatten(self.reason)}"


@dataclass(eq=False)
class Unauthorized(ProtocolError):
    """The server refused this client's credentials; trying again does not help.

    ``status`` is the HTTP status, or the close code 1008 if the server refused the client's first
    message.
    """

    peer: str
    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} refused to let this side in ({self.status}): {flatten(self.reason)}"


@dataclass(eq=False)
class NotPermitted(ProtocolError):
    """The client's token lacks the role that an action requires; another token is needed."""

    role: str
    action: str

    def __str__(self) -> str:
        return (
            f"this token may not {flatten(self.action)}: it lacks the role '{flatten(self.role)}'; "
            "ask whoever runs the server for a token that has it"
        )


@dataclass(eq=False)
class SessionsNotListed(ProtocolError):
    """The server does not answer with a list of its sessions; it may be an earlier version."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} does not list its sessions: {flatten(self.reason)}"


@dataclass(eq=False)
class StateNotFetched(ProtocolError):
    """The server does not hand out the trained state of its part, or one that cannot be used."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"the server's part cannot be fetched from {self.peer}: {flatten(self.reason)}"


@dataclass(eq=False)
class SharingNotPermitted(ProtocolError):
    """The server's policy joins what clients learn, and this client may not share its weights."""

    policy: str

    def __str__(self) -> str:
        return (
            f"the server's policy '{flatten(self.policy)}' joins what its clients learn, so it "
            "asks for the trained weights of the client's part; permit it with --share (Python: "
            "share=True), or train with a server that has the policy 'per-client'"
        )


@dataclass(eq=False)
class UntrustedPeer(ProtocolError):
    """TLS cannot verify the identity of the other side; trying again does not help."""

    peer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.peer} cannot be trusted: {flatten(self.reason)}"


@dataclass(eq=False)
class Redirected(ProtocolError):
    """The server answered with a redirect; clients do not follow redirects."""

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
    """A message exceeds its receiver's limit; sending it again does not help.

    ``is_outgoing`` means that this side sent the message.
    """

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
    """A token file, a certificate or a key cannot be read or is not valid."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class PortInUse(SplitonnxError):
    """The server's port is already in use."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"port {self.port} on {self.host} is in use; choose another with --port"


def _list_steps(steps: Iterable[int]) -> str:
    return " or ".join(str(step) for step in steps) or "none"
