"""The interface of a policy."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Protocol

from splitonnx.messages import Hello, Save, TaskKey
from splitonnx.runtime.server.policies.tasks import (
    Delivery,
    Joined,
    MemberReport,
    RoundReport,
    Task,
)
from splitonnx.runtime.server.policies.terms import Terms


class Policy(Protocol):
    """What sessions may ask of a policy.

    A session is named by its ID, and a step is the number of steps that its client has done.
    Deliveries may be for any session.  No method waits for another client.  Two threads must not
    call a policy for the same session at the same time.
    """

    def terms(self) -> Terms:
        """Return what the policy asks of clients."""

    def report(self) -> RoundReport:
        """Return the numbers that describe the rounds; zeros if there are none."""

    def report_members(self) -> Mapping[str, MemberReport]:
        """Return what is known of each session in memory; may be called at any time."""

    def join(self, hello: Hello, owner: str, *, resume: bool) -> Joined:
        """Admit a session, and choose the model that its client's greeting asks for.

        ``resume`` means to continue at the session's newest checkpoint, if it has one.

        Raises:
            SplitonnxError: there is no model for this session.
        """

    def submit(self, task: Task) -> Generator[Delivery, None, None]:
        """Accept a task's tensors, and yield each delivery as soon as it is ready.

        The caller must exhaust the iterator.  After an error, call :meth:`withdraw`.

        Raises:
            DataError, StageFailed, WorkerLost: the task cannot be carried out.
        """

    def withdraw(self, key: TaskKey) -> None:
        """Abort a task that is not finished, and discard its changes."""

    def list_steps(self, session: str) -> tuple[int, ...]:
        """Return the steps whose state can be restored for a session, other than its current one.

        Raises:
            BundleError: the session's folder cannot be read.
        """

    def rewind(self, session: str, step: int) -> None:
        """Go back to the state of an earlier step that :meth:`list_steps` returned."""

    def save(self, request: Save) -> None:
        """Write a durable checkpoint and, if requested, the outcome of the training.

        Raises:
            BundleError, NotSaved: the state cannot be written.
        """

    def finish(self, session: str) -> None:
        """End a session for good; if its current state was published, delete its checkpoints."""

    def unload(self, session: str) -> None:
        """Write the session's state to disk, unless it is already there.

        Raises:
            NotSaved: the state cannot be written.
        """

    def is_lost(self, session: str) -> bool:
        """Return whether the session's state was lost, because a worker process has ended."""

    def leave(self, session: str) -> None:
        """Release everything that the session holds in memory."""

    def tick(self, now: float) -> Iterator[Delivery]:
        """Yield what is due at the time ``now``, in seconds of a monotonic clock."""
