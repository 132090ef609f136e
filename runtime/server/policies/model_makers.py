"""Create the models of sessions from the server's state, another session's state, or a checkpoint.

A model may start only from a state that belongs to the session's owner or to nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    BundleError,
    BundleMismatch,
    ForeignSession,
    SessionLost,
    UsageError,
)
from splitonnx.messages import Hello
from splitonnx.names import ACCUMULATE, PREDICT, TRAIN, UPDATE
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.models import ServerModel, SessionExecutor
from splitonnx.runtime.storage.archives import Archive
from splitonnx.runtime.storage.outcomes import publish_state
from splitonnx.states import is_session

if TYPE_CHECKING:
    from splitonnx.runtime.workers.pools import WorkerPool


class ModelMaker:
    """A factory for the models of sessions, which creates them or loads them from disk.

    ``base`` is an executor that holds the state of the server's folder; it is never trained itself.
    ``archive`` holds the sessions on disk; it is ``None`` if there is no folder.  ``workers`` are
    the processes that run the sessions' stages; without them, this process runs the stages.
    """

    def __init__(self, base: Executor, archive: Archive | None, workers: WorkerPool | None) -> None:
        for phase in (TRAIN, PREDICT, ACCUMULATE, UPDATE):
            base.prepare(phase)  # before sessions share the loaded stages
        self._base = base
        self._untrained = base if base.party.trained is None else _rewind(base)
        self._archive = archive
        self._workers = workers

    def load(self, hello: Hello, owner: str) -> ServerModel | None:
        """Load a session's model from its newest checkpoint; return ``None`` if there is none.

        Raises:
            ForeignSession: the session started from another owner's state.
        """
        store = None if self._archive is None else self._archive.open_store(hello.session)
        if store is None or not (steps := store.steps()):
            return None
        checkpoint = store.read(steps[0])
        executor = self._fork(self._base, checkpoint.owner, hello.session)
        executor.restore(checkpoint.tensors, checkpoint.step)
        return ServerModel(
            hello.session,
            owner=checkpoint.owner,
            executor=executor,
            start=self._find_start(hello, owner),
            store=store,
            archive=self._archive,
        )

    def make(self, hello: Hello, owner: str) -> ServerModel:
        """Create the model of a new session, which starts from the state that the greeting names.

        Raises:
            SessionLost: the client already has checkpoints of this session, so the server must have
                lost it.
            BundleMismatch, ForeignSession: the state to start from is missing, or belongs to
                another owner.
            ServerBusy: no worker is available.
        """
        start = self._find_start(hello, owner)
        if hello.kept:
            raise SessionLost(hello.session, hello.candidates, ())
        if start is None:
            raise self._explain(hello, owner)
        return ServerModel(
            hello.session,
            owner=owner,
            executor=self._fork(start, owner, hello.session),
            start=start,
            store=None if self._archive is None else self._archive.open_store(hello.session),
            archive=self._archive,
        )

    def restore(self, tensors: Mapping[str, np.ndarray], version: int) -> ServerModel:
        """Create a model of no session, with a recorded state after ``version`` updates.

        Raises:
            UsageError: the record does not hold the whole state.
            ServerBusy: no worker is available.
        """
        names = [spec.tensor.name for spec in self._base.manifest.state]
        if missing := [name for name in names if name not in tensors]:
            raise UsageError(
                f"the newest round in the server's folder was recorded without '{missing[0]}', by "
                "another policy; serve with the policy that recorded it, or without --resume to "
                "begin a new training"
            )
        executor = self._fork(self._base, "", "")
        executor.restore({name: tensors[name] for name in names}, version)
        return ServerModel("", owner="", executor=executor, start=None, store=None)

    def publish(
        self, tensors: Mapping[str, np.ndarray], *, step: int, session: str, owner: str
    ) -> None:
        """Write a state to the server's folder as the outcome of a session's training.

        Raises:
            BundleError, NotSaved: it cannot be written.
        """
        if self._archive is None:
            raise BundleError("bundle in memory", "it has no folder to save the state in")
        store = self._archive.open_store(session)
        with self._archive.saving(store, owner, publish=True):
            publish_state(
                self._base.party, tensors, step=step, session=session, position="", owner=owner
            )

    def _fork(self, start: Executor, owner: str, session: str) -> SessionExecutor:
        """Create a model's executor, in a worker process if the server uses workers."""
        if self._workers is None:
            return start.fork()
        is_untrained = start is self._untrained and start.party.trained is None
        tensors = None if is_untrained else start.state()
        return self._workers.open(owner, session, tensors, start.step)

    def _find_start(self, hello: Hello, owner: str) -> Executor | None:
        """Return the state from which a session starts, or ``None`` if it is not on the server.

        This is the published state, the untrained state, or the state of another session.

        Raises:
            ForeignSession: the state belongs to another owner.  Anyone may use a published state
                that has no owner.
        """
        origin, step, published = hello.origin, hello.start, self._base.party
        if (origin, step) == (published.session, self._base.step):
            if origin and published.owner not in ("", owner):
                raise ForeignSession(origin)
            return self._base
        if not origin and step == 0:
            return self._untrained
        if origin == published.session and owner and not published.owner:
            return None  # anyone may use that session's state, but only at the published step
        if self._archive is None or not is_session(origin):
            return None
        tensors = self._archive.find_tensors(origin, step, owner)
        if tensors is None:
            return None
        executor = self._base.fork()
        executor.restore(tensors, step)
        return executor

    def _explain(self, hello: Hello, owner: str) -> BundleMismatch:
        if hello.start != self._base.step:
            return BundleMismatch(
                "the number of steps trained", str(self._base.step), str(hello.start)
            )
        published = self._base.party
        here = published.session if published.owner in ("", owner) else ""
        return BundleMismatch(
            "the session that trained them", here or "unknown", hello.origin or "unknown"
        )


def _rewind(executor: Executor) -> Executor:
    """Return a copy of an executor, with the weights that training started from."""
    party = executor.party
    untrained = PartyBundle(manifest=party.manifest, graphs={}, weights=party.weights)
    twin = executor.fork()
    twin.restore(untrained.state(), 0)
    return twin
