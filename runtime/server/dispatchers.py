"""The dispatcher, which passes a connection's messages to the session and encodes the replies.

The dispatcher checks messages against the protocol, and finds the session that the client's
greeting asks for.  It does not use the network.  :mod:`handlers` manages threads, sockets, and the
order of messages if a session has several connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    BatchTooLarge,
    InternalRuntimeError,
    NotFinite,
    NotPermitted,
    RemoteProtocolError,
    ServerBusy,
    SharingNotPermitted,
    SplitonnxError,
    StageStopped,
    StaleConnection,
    StepEnded,
    TaskTooLarge,
    WorkerLost,
)
from splitonnx.faults import attribute_errors_to_us
from splitonnx.messages import (
    Bye,
    Fault,
    Hello,
    Login,
    Message,
    Save,
    Saved,
    Tensors,
    Unsaved,
    Welcome,
)
from splitonnx.names import SERVER
from splitonnx.runtime.edge.tokens import DEFAULT_ROLES, Role
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.server.ledgers import Fingerprint, Reply
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.wire.protocols import Protocol, State, list_wires


@dataclass(frozen=True, kw_only=True)
class ReceivedMessage:
    """A decoded and checked message; ``fingerprint`` is the hash of its encoded bytes.

    If the message belongs to a task, ``needed`` is an estimate of the task's memory in bytes.
    """

    message: Message
    tensors: Mapping[str, np.ndarray]
    fingerprint: Fingerprint
    needed: int = 0


class Dispatcher:
    """The dispatcher of one connection, whose client belongs to ``owner``.

    ``roles`` are the client's permissions.  ``norm`` is the largest L2 norm allowed for a received
    gradient, and ``batch`` is the largest number of rows allowed for a tensor; ``None`` means no
    limit.  ``estimates`` computes how much memory a task needs, and ``task_bytes`` is the largest
    amount allowed.  If ``estimates`` is ``None``, memory is not checked.  ``pass_on`` is called
    with what other sessions' clients wait for; without it, there are no others.

    ``registry`` holds the server's sessions.  ``session`` is ``None`` until the client has sent its
    greeting, and ``refused`` is ``None`` until an error ends the connection.  ``in_flight`` is how
    many tasks of a step the client may have open at once.  :meth:`read` may be called at any time.
    While any other method runs, nothing else may use the session.
    """

    def __init__(
        self,
        registry: Registry,
        owner: str = "",
        *,
        roles: frozenset[Role] = DEFAULT_ROLES,
        norm: float | None = None,
        batch: int | None = None,
        estimates: Estimates | None = None,
        task_bytes: int | None = None,
        pass_on: Callable[[Delivery], None] | None = None,
    ) -> None:
        self.session: Session | None = None
        self.refused: SplitonnxError | None = None
        self.in_flight = 1
        self.registry = registry
        self._owner = owner
        self._estimates = estimates
        self._pass_on = pass_on
        self._task_bytes = task_bytes
        self._roles = roles
        self._tried: set[str] = set()
        self._generation = 0
        self._terms = registry.policy.terms()
        self._wires = list_wires(registry.manifest)
        self._protocol = Protocol(registry.manifest, SERVER, norm=norm, batch=batch)

    @property
    def is_closed(self) -> bool:
        """Return whether the connection has ended."""
        return self._protocol.state is State.CLOSED

    @property
    def is_interrupted(self) -> bool:
        """Return whether an error ended the connection but the session can be resumed."""
        match self.refused:
            case StageStopped() | StepEnded() | WorkerLost(is_repeated=False):
                return True
            case ServerBusy():  # there may be memory when the task is repeated
                return self._generation > 0
        return False

    @property
    def is_mid_step(self) -> bool:
        """Return whether an unfinished training step of the session is waiting for the client."""
        session = self._held
        return session is not None and session.ledger.is_open and not session.awaits_others

    def handle(self, content: Chunk | bytearray) -> Iterator[Reply]:
        """Decode one message, act on it, and yield the replies, each to be sent as one message.

        An error ends the connection and is reported in the last reply (see :meth:`refuse`).  Any
        unfinished task is then aborted, and its changes to the state are discarded.
        """
        try:
            received = self.read(content)
            while (pending := self.enter(received)) is not None:
                pending.result()
        except SplitonnxError as error:
            yield from self.refuse(error)
            return
        yield from self.answer(received)

    def enter(self, received: ReceivedMessage) -> Future[None] | None:
        """Find or create the session that a greeting asks for; do nothing for other messages.

        Returns:
            A future to wait for before calling this method again, or ``None`` if there is nothing
            to wait for.

        Raises:
            SplitonnxError: the client cannot use this session; pass the error to :meth:`refuse`.
        """
        if isinstance(received.message, Hello):
            with attribute_errors_to_us("a greeting"):
                found = self.registry.seek(received.message, self._owner, self._tried)
            if not isinstance(found, Session):
                return found
            self.session = found
        return None

    def read(self, content: Chunk | bytearray) -> ReceivedMessage:
        """Decode and check one message; call :meth:`enter` next, and then :meth:`answer`.

        Raises:
            SplitonnxError: the message is not valid or not allowed; pass the error to
                :meth:`refuse`.
        """
        with attribute_errors_to_us("the reading of a message"):
            message, tensors = self._protocol.receive(content)
        if isinstance(message, Hello):
            self._admit(message)
        if isinstance(message, Tensors):
            self._terms.check(message.phase, self.registry.manifest)
        return ReceivedMessage(
            message=message,
            tensors=tensors,
            fingerprint=Fingerprint(content, self.registry.contents),
            needed=self._estimate(message) if isinstance(message, Tensors) else 0,
        )

    def _admit(self, hello: Hello) -> None:
        """Check that the client may open a session, and permits what the policy needs."""
        if Role.TRAIN not in self._roles:
            raise NotPermitted(Role.TRAIN, "open a session")
        if self._terms.local_steps and not hello.can_share:
            raise SharingNotPermitted(self._terms.policy)

    def _estimate(self, message: Tensors) -> int:
        if self._estimates is None:
            return 0
        needed = self._estimates.measure(message.phase, self._protocol.list_sizes(message.key))
        if self._task_bytes is not None and needed > self._task_bytes:
            raise TaskTooLarge(needed, self._task_bytes)
        return needed

    def answer(self, received: ReceivedMessage) -> Iterator[Reply]:
        """Act on a message from :meth:`read`, and yield the replies, as :meth:`handle` does.

        The caller must exhaust the iterator, even if the replies can no longer be sent.
        """
        try:
            with attribute_errors_to_us(f"a message '{type(received.message).__name__}'"):
                yield from self._act(received)
        except SplitonnxError as error:
            yield from self.refuse(error)

    def take(self, delivery: Delivery) -> Iterator[Reply]:
        """Yield the reply to this connection's client that another session's task caused."""
        session = self._held
        if session is None or self.is_closed:
            if self.session is not None:
                self.session.hold(delivery)
            return
        try:
            yield from self._pass_deliveries(session.take(delivery, self._protocol.send))
        except SplitonnxError as error:
            yield from self.refuse(error)

    def _pass_deliveries(self, replies: Iterator[Reply | Delivery]) -> Iterator[Reply]:
        """Yield the replies to this client, and pass on what is for others."""
        for reply in replies:
            if not isinstance(reply, Delivery):
                yield reply
            elif self._pass_on is not None:
                self._pass_on(reply)

    def refuse(self, error: SplitonnxError) -> Iterator[Reply]:
        """End the connection because of an error, and yield a message that reports the error.

        Unfinished tasks of the session are aborted.  If the session can be resumed
        (:attr:`is_interrupted`), no message is yielded, and the client reconnects.
        """
        self.refused = error
        if self._held is not None:
            self._held.abandon()
        if self.is_interrupted:
            self._protocol.close()
        if not self.is_closed:
            yield self._protocol.send(_describe(error))

    def end(self) -> None:
        """Record that this connection no longer uses the session; call this method once.

        The session is kept for the client's next connection.
        """
        if self.session is not None:
            self.registry.release(self.session)

    @property
    def _held(self) -> Session | None:
        """The session, while this is its newest connection."""
        session = self.session
        return session if session is not None and session.generation == self._generation else None

    def _act(self, received: ReceivedMessage) -> Iterator[Reply]:
        message = received.message
        match message:
            case Hello():
                yield self._greet(message)
            case Tensors():
                session = self.check_session(message.session)
                yield from self._pass_deliveries(
                    session.handle_training(
                        message, received.tensors, received.fingerprint, self._protocol.send
                    )
                )
            case Save():
                yield self._protocol.send(self._save(message))
            case Bye():
                self._leave()
            case Login() | Fault():
                pass
            case _:
                raise RemoteProtocolError(f"a server takes no {type(message).__name__}")

    def _greet(self, hello: Hello) -> Reply:
        assert self.session is not None  # found when the greeting was read
        manifest = self.registry.manifest
        self.in_flight = max(1, min(hello.in_flight, self._terms.count_in_flight(manifest)))
        found = self.session.greet(hello, self.in_flight)
        self._generation = hello.generation
        return self._protocol.send(
            Welcome(
                session=self.session.id,
                digest=manifest.digest,
                step=found.step,
                wants_repeat=found.wants_repeat,
                can_accumulate=self._terms.can_accumulate(manifest),
                restarts=found.restarts,
                policy=self._terms.policy,
                local_steps=self._terms.local_steps,
                rounds=self._terms.rounds,
                in_flight=self.in_flight,
                wires=self._wires,
            )
        )

    def _save(self, message: Save) -> Saved | Unsaved:
        """Save the session's state; without the role PUBLISH, only as a checkpoint."""
        session = self.check_session(message.session)
        if not message.publish or Role.PUBLISH in self._roles:
            return session.save(message)
        answer = session.save(msgspec.structs.replace(message, publish=False))
        if isinstance(answer, Unsaved):
            return answer
        error = NotPermitted(Role.PUBLISH, "replace the newest state")
        reason = f"{error}; step {message.step} is kept as a checkpoint"
        return Unsaved(session=session.id, step=message.step, reason=reason)

    def _leave(self) -> None:
        if self._held is not None:
            self._held.finish()
            self.registry.end(self._held)

    def check_session(self, name: str) -> Session:
        """Check that a message names this connection's session, and return the session.

        Raises:
            RemoteProtocolError: ``name`` is not the name of this connection's session.
            StaleConnection: a newer connection has taken over the session.
        """
        session = self.session
        if session is None or name != session.id:
            own = "none" if session is None else f"'{session.id}'"
            raise RemoteProtocolError(f"it speaks of session '{name[:40]}', its own is {own}")
        session.check_generation(self._generation)
        return session


def _describe(error: SplitonnxError) -> Fault:
    """Convert an error to a message, from which the client can raise the same error."""
    code = type(error).__name__
    match error:
        case StaleConnection():
            return Fault(code=code, reason=str(error), newest=error.newest)
        case InternalRuntimeError():  # an exception's text may reveal internals of the server
            return Fault(
                code=code,
                reason=f"a mistake in splitonnx, at the server: {error.subject} failed; please "
                "report it, with the traceback in the server's log",
            )
        case ServerBusy():
            return Fault(code=code, reason=error.limit)
        case NotFinite():
            return Fault(code=code, reason=error.where, subject=error.name)
        case BatchTooLarge():
            return Fault(
                code=code,
                reason=str(error),
                subject=error.name,
                needed=error.rows,
                limit=error.limit,
            )
        case NotPermitted():
            return Fault(code=code, reason=error.action, subject=error.role)
        case SharingNotPermitted():
            return Fault(code=code, reason=str(error), subject=error.policy)
        case TaskTooLarge():
            return Fault(code=code, reason=str(error), needed=error.needed, limit=error.limit)
    return Fault(code=code, reason=str(error))
