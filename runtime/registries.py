"""The sessions that a server has in memory: who may have which, how many, and where they begin.

It finds a session for a greeting, makes a new one, or takes one up from disk, within its limits.
What a session does is its own business, and when to look for those that nobody attends is the
caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    BundleMismatch,
    ForeignSession,
    NotSaved,
    RemoteProtocolError,
    ServerBusy,
    SessionLost,
    WorkerLost,
)
from splitonnx.manifests import PREDICT, TRAIN
from splitonnx.messages import Hello
from splitonnx.runtime.checkpoints import CheckpointStore
from splitonnx.runtime.executors import Executor, SessionExecutor
from splitonnx.runtime.sessions import Session
from splitonnx.states import is_session, read_state

if TYPE_CHECKING:
    from splitonnx.runtime.pools import WorkerPool

_logger = logging.getLogger("splitonnx.server")


class Registry:
    """The sessions of one server's part; safe for use from several threads.

    Args:
        executor: at the state of the party's folder, and never trained itself.
        sessions: the most sessions in memory.
        sessions_per_owner: the most of one owner; of ``""``, who may be many, as many as of all.
        memory_bytes: the most that their states may take together; ``None`` for no limit.
        unattended_seconds: how long a session without a connection stays in memory.
        resume: also take up sessions that an earlier server left in the folder.
        workers: who runs the sessions' stages; this process where there are none.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        sessions: int = 32,
        sessions_per_owner: int = 8,
        memory_bytes: int | None = None,
        unattended_seconds: float = 3600.0,
        resume: bool = False,
        workers: WorkerPool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = executor.manifest
        for phase in (TRAIN, PREDICT):
            executor.prepare(phase)  # before sessions share what is loaded
        self._base = executor
        self._untrained = executor if executor.party.trained is None else _rewind(executor)
        self._folder = executor.party.path
        self._resume = resume
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._users: Counter[str] = Counter()
        self._left: dict[str, float] = {}
        self._parked: set[str] = set()
        self._most = sessions
        if memory_bytes is not None:
            self._most = min(sessions, memory_bytes // max(1, executor.nbytes))
        self._most_per_owner = sessions_per_owner
        self._unattended_seconds = unattended_seconds

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions in memory."""
        return tuple(self._sessions.values())

    def find(self, hello: Hello, owner: str) -> Session:
        """Find the session that a greeting asks for, in memory or on disk, or make a new one.

        It stays in memory until it is released as often as it was found.

        Raises:
            RemoteProtocolError: its name is none.
            ForeignSession: it is another owner's.
            ServerBusy: it would be one too many.
            SessionLost: it cannot be gone on with at any of the client's steps.
            BundleMismatch: the client's trained state and the server's do not belong together.
        """
        if not is_session(hello.session):
            raise RemoteProtocolError("a session is named by 32 hexadecimal digits")
        with self._lock:
            session = self._find_whole(hello.session)
            if session is None:
                self._make_room(owner, hello.session)
                session = self._take_up(hello) or self._make(hello, owner)
            if session.owner != owner:
                raise ForeignSession(hello.session)
            self._sessions[session.id] = session
            self._users[session.id] += 1
            self._left.pop(session.id, None)
            self._parked.discard(session.id)
            return session

    def release(self, session: Session) -> None:
        """Note that one connection less attends the session."""
        with self._lock:
            self._users[session.id] -= 1
            if not self._users[session.id]:
                del self._users[session.id]
                if session.id in self._sessions:
                    self._left[session.id] = self._clock()

    def end(self, session: Session) -> None:
        """Forget a session whose client is done; what it saved stays."""
        with self._lock:
            self._sessions.pop(session.id, None)
            self._left.pop(session.id, None)
            session.close()

    def park_idle(self) -> None:
        """Move sessions from memory to disk that nobody has attended for too long."""
        with self._lock:
            for name, left in list(self._left.items()):
                if self._clock() - left > self._unattended_seconds:
                    self._park(self._sessions[name])

    def park_all(self) -> None:
        """Write every session's state to disk: the server is about to end."""
        with self._lock:
            for session in self.sessions:
                self._park(session)

    def _make_room(self, owner: str, name: str) -> None:
        if self._workers is not None and not self._workers.has_room(owner, name):
            self._park_owner()
        own = [session for session in self.sessions if session.owner == owner]
        if owner and len(own) >= self._most_per_owner and not self._park_one(own):
            raise ServerBusy(f"{self._most_per_owner} sessions of one token")
        if len(self._sessions) >= self._most and not self._park_one(self.sessions):
            raise ServerBusy(f"{self._most} sessions")

    def _find_whole(self, name: str) -> Session | None:
        """Find a session in memory; one whose worker is gone is forgotten, for its checkpoints."""
        session = self._sessions.get(name)
        if session is None or not session.is_lost:
            return session
        self._forget(session)
        return None

    def _park_owner(self) -> None:
        """Free the worker of the owner whose sessions were all left, the longest ago."""
        owners: dict[str, list[Session]] = {}
        for session in self.sessions:
            owners.setdefault(session.owner or session.id, []).append(session)
        left = {
            owner: max(self._left[session.id] for session in sessions)
            for owner, sessions in owners.items()
            if all(session.id in self._left for session in sessions)
        }
        for owner in sorted(left, key=lambda owner: left[owner]):
            parked = [self._folder is not None and self._park(s) for s in owners[owner]]
            if all(parked):
                return

    def _park_one(self, sessions: Iterable[Session]) -> bool:
        """Move the session to disk that was left the longest ago, if any was left."""
        left = [session for session in sessions if session.id in self._left]
        for session in sorted(left, key=lambda session: self._left[session.id]):
            if self._folder is not None and self._park(session):
                return True
        return False

    def _park(self, session: Session) -> bool:
        try:
            session.park()
        except NotSaved as error:
            _logger.error("session %s stays in memory: %s", session.id, error)
            return False
        except WorkerLost:  # it was logged; what is on disk is all there is
            pass
        self._forget(session)
        return True

    def _forget(self, session: Session) -> None:
        """Let a session leave the memory; it can be taken up again from disk."""
        self._sessions.pop(session.id, None)
        self._left.pop(session.id, None)
        self._parked.add(session.id)
        session.close()

    def _take_up(self, hello: Hello) -> Session | None:
        """Make the session of its newest checkpoint on disk."""
        if not (self._resume or hello.session in self._parked):
            return None
        store = self._open_store(hello.session)
        if store is None or not (steps := store.steps()):
            return None
        checkpoint = store.read(steps[0])
        executor = self._fork(self._base, checkpoint.owner, hello.session)
        executor.restore(checkpoint.tensors, checkpoint.step)
        return Session(
            hello.session,
            owner=checkpoint.owner,
            executor=executor,
            start=self._find_start(hello),
            store=store,
        )

    def _make(self, hello: Hello, owner: str) -> Session:
        """Make a session that begins; one that is known to be older cannot be made again."""
        start = self._find_start(hello)
        if hello.kept:
            raise SessionLost(hello.session, hello.candidates, ())
        if start is None:
            raise self._explain(hello)
        store = self._open_store(hello.session)
        executor = self._fork(start, owner, hello.session)
        return Session(hello.session, owner=owner, executor=executor, start=start, store=store)

    def _fork(self, start: Executor, owner: str, session: str) -> SessionExecutor:
        """Make a session's executor, in a worker where there are workers."""
        if self._workers is None:
            return start.fork()
        is_untrained = start is self._untrained and start.party.trained is None
        tensors = None if is_untrained else start.state()
        return self._workers.open(owner, session, tensors, start.step)

    def _find_start(self, hello: Hello) -> Executor | None:
        """Find the state that a session began from: published, untrained, or another session's."""
        origin, step = hello.origin, hello.start
        if (origin, step) == (self._base.party.session, self._base.step):
            return self._base
        if not origin and step == 0:
            return self._untrained
        tensors = self._find_tensors(origin, step) if is_session(origin) else None
        if tensors is None:
            return None
        executor = self._base.fork()
        executor.restore(tensors, step)
        return executor

    def _find_tensors(self, session: str, step: int) -> Mapping[str, np.ndarray] | None:
        """Find what a session left in the folder: its outcome, or a checkpoint."""
        if self._folder is None:
            return None
        outcome = read_state(self._folder, self.manifest, session)
        if outcome is not None and (outcome.session, outcome.step) == (session, step):
            return outcome.tensors
        store = CheckpointStore(self._folder, self.manifest, session)
        return store.read(step).tensors if step in store.steps() else None

    def _explain(self, hello: Hello) -> BundleMismatch:
        if hello.start != self._base.step:
            return BundleMismatch(
                "the number of steps trained", str(self._base.step), str(hello.start)
            )
        here, there = self._base.party.session or "unknown", hello.origin or "unknown"
        return BundleMismatch("the session that trained them", here, there)

    def _open_store(self, session: str) -> CheckpointStore | None:
        if self._folder is None:
            return None
        return CheckpointStore(self._folder, self.manifest, session)


def _rewind(executor: Executor) -> Executor:
    """Make an executor at the weights that training starts from."""
    party = executor.party
    untrained = PartyBundle(manifest=party.manifest, graphs={}, weights=party.weights)
    twin = executor.fork()
    twin.restore(untrained.state(), 0)
    return twin
