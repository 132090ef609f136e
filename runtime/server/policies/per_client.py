"""The policy ``per-client``: each client trains a copy of the server's model of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from splitonnx.messages import Hello, Save, TaskKey
from splitonnx.names import PER_CLIENT
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.tasks import (
    Delivery,
    Joined,
    MemberReport,
    RoundReport,
    Task,
)
from splitonnx.runtime.server.policies.terms import Terms


class ModelSource(Protocol):
    """What makes the models of sessions that join, such as :class:`~model_makers.ModelMaker`."""

    def load(self, hello: Hello, owner: str) -> ServerModel | None:
        """Load a session's model from its newest checkpoint; return ``None`` if there is none."""

    def make(self, hello: Hello, owner: str) -> ServerModel:
        """Create a model that starts from the state that the greeting names."""


class PerClient:
    """A policy that gives each session a model, whose version is always the client's step."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._models: dict[str, ServerModel] = {}

    @property
    def models(self) -> Mapping[str, ServerModel]:
        """Return the models in memory, by the sessions that train them."""
        return MappingProxyType(self._models)

    def terms(self) -> Terms:
        """Return that clients share nothing."""
        return Terms(policy=PER_CLIENT)

    def report(self) -> RoundReport:
        """Return that there are no rounds."""
        return RoundReport()

    def report_members(self) -> Mapping[str, MemberReport]:
        """Return the version of each session's model."""
        models = dict(self._models)  # a copy, since sessions may come and leave meanwhile
        return {name: MemberReport(version=model.version) for name, model in models.items()}

    def join(self, hello: Hello, owner: str, *, resume: bool) -> Joined:
        """Load the session's model from disk, or make a new one.

        Raises:
            SessionLost, BundleMismatch, ForeignSession, ServerBusy: see :class:`ModelMaker`.
        """
        model = self._source.load(hello, owner) if resume else None
        model = model or self._source.make(hello, owner)
        self._models[hello.session] = model
        return Joined(owner=model.owner, step=model.version)

    def submit(self, task: Task) -> Generator[Delivery, None, None]:
        """Run a task on the session's model at once; every delivery is for the same session.

        Raises:
            DataError, StageFailed, WorkerLost: the task cannot be carried out.
        """
        yield from self._models[task.key.session].perform(task)

    def withdraw(self, key: TaskKey) -> None:
        """Abort a task that is not finished, and discard its changes."""
        if (model := self._models.get(key.session)) is not None:
            model.abandon(key)

    def list_steps(self, session: str) -> tuple[int, ...]:
        """Return the steps whose state can be restored for a session, other than its current one.

        Raises:
            BundleError: the session's folder cannot be read.
        """
        return self._models[session].list_versions()

    def rewind(self, session: str, step: int) -> None:
        """Go back to the state of an earlier step that :meth:`list_steps` returned."""
        self._models[session].rewind(step)

    def save(self, request: Save) -> None:
        """Write a durable checkpoint and, if requested, the outcome of the training.

        Raises:
            BundleError, NotSaved: the state cannot be written.
        """
        self._models[request.session].save(publish=request.publish, keep=request.keep)

    def finish(self, session: str) -> None:
        """End a session for good; if its current state was published, delete its checkpoints."""
        self._models[session].remove_published()

    def unload(self, session: str) -> None:
        """Write the session's state to disk, unless it is already there.

        Raises:
            NotSaved: the state cannot be written.
        """
        self._models[session].unload()

    def is_lost(self, session: str) -> bool:
        """Return whether the session's state was lost, because a worker process has ended."""
        return self._models[session].is_lost

    def leave(self, session: str) -> None:
        """Release the session's model."""
        if (model := self._models.pop(session, None)) is not None:
            model.close()

    def release(self, session: str) -> ServerModel | None:
        """Remove a session's model without closing it; return it, or ``None`` if there is none."""
        return self._models.pop(session, None)

    def tick(self, now: float) -> Iterator[Delivery]:
        """Yield nothing, because no client waits for another one."""
        yield from ()
