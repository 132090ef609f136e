"""The registry of the sessions that a server has in memory.

The registry finds the session that a greeting asks for, and moves sessions to disk when they are no
longer needed.  :mod:`capacities` decides how many sessions may be in memory, and the policy decides
which model a session trains.  The server decides when to look for sessions without a connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from splitonnx.errors import (
    BundleError,
    DiskQuotaUsed,
    RemoteProtocolError,
    SplitonnxError,
    StateNotFinite,
    WorkerLost,
)
from splitonnx.messages import Hello
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.capacities import Capacity, Occupant
from splitonnx.runtime.server.ledgers import KeptContents
from splitonnx.runtime.server.policies.choices import make_policy
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.storage.archives import Archive
from splitonnx.states import is_session

_WRITERS = 4
"""Sessions that are written to disk at a time as they leave the memory."""

if TYPE_CHECKING:
    from splitonnx.runtime.workers.pools import WorkerPool

_logger = logging.getLogger("splitonnx.server")


class Registry:
    """The sessions that a server has in memory; safe to use from several threads.

    Args:
        executor: an executor that holds the state of the server's folder; it is never trained
            itself.
        sessions: the largest number of sessions in memory.
        sessions_per_owner: the largest number of sessions per owner.  The owner ``""`` may stand
            for many clients, so only the total limit applies to it.
        memory_bytes: the largest number of bytes that all states together may use; ``None`` for no
            limit.
        unattended_seconds: how long a session without a connection stays in memory.
        resume: also load sessions that an earlier server left in the folder.
        workers: processes that run the sessions' stages; ``None`` to run them in this process.
        disk_per_owner: the largest number of bytes that an owner's checkpoints and outcomes may
            use; ``None`` for no limit.
        keep_seconds: how long the files of unused sessions are kept; ``None`` to keep them forever.
        joins: how the server joins what its clients learn; by default, it does not.
        policy: the policy itself, in place of one by ``joins``.
        clock: a monotonic clock in seconds.
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
        disk_per_owner: int | None = None,
        keep_seconds: float | None = None,
        joins: PolicyOptions | None = None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = executor.manifest
        self.contents = KeptContents()
        self._folder = executor.party.path
        self._resume = resume
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._users: Counter[str] = Counter()
        self._left: dict[str, float] = {}
        self._unloaded: set[str] = set()
        self._busy: dict[str, Future[None]] = {}  # sessions being unloaded, opened or deleted
        self._opening: dict[str, str] = {}  # sessions being opened, with their owners
        self._threads: set[threading.Thread] = set()
        self._slots = threading.BoundedSemaphore(_WRITERS)
        self._archive: Archive | None = None
        if self._folder is not None:
            self._archive = Archive(
                self._folder, self.manifest, most_bytes=disk_per_owner, keep_seconds=keep_seconds
            )
            self.expire()
        self.policy = policy or make_policy(
            joins or PolicyOptions(),
            ModelMaker(executor, self._archive, workers),
            self.manifest,
            self._folder,
            resume=resume,
        )
        if memory_bytes is not None:
            sessions = min(sessions, memory_bytes // max(1, executor.nbytes))
        self._capacity = Capacity(
            sessions=sessions,
            sessions_per_owner=sessions_per_owner,
            can_unload=self._folder is not None,
        )
        self._unattended_seconds = unattended_seconds

    @property
    def folder(self) -> Path | None:
        """Return the folder of the server's part, or ``None`` for a bundle in memory."""
        return self._folder

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Return the sessions in memory."""
        return tuple(self._sessions.values())

    def list_left(self) -> dict[str, float]:
        """Return when the last connection of each session ended, for sessions that have none.

        The times are of the registry's clock.
        """
        return dict(self._left)  # without the lock, which may be held while a model is released

    def find(self, hello: Hello, owner: str) -> Session:
        """Find the session that a greeting asks for, in memory or on disk, or create a new session.

        The session stays in memory until :meth:`release` has been called once for every call of
        this method.

        Raises:
            RemoteProtocolError: the session's name is invalid.
            ForeignSession: the session, or the session it started from, belongs to another owner.
            ServerBusy: there is no room for another session.
            SessionLost: the session cannot be resumed at any of the client's steps.
            BundleMismatch: the trained states of the client and the server do not belong together.
        """
        tried: set[str] = set()
        while not isinstance(found := self.seek(hello, owner, tried), Session):
            found.result()
        return found

    def seek(self, hello: Hello, owner: str, tried: set[str]) -> Session | Future[None]:
        """Find a session as :meth:`find` does, but return a future if that requires waiting.

        The future is done when another thread has opened a session or written one to disk.  Then
        call this method again.  In this way, a slow disk does not delay other clients.  Pass an
        empty set as ``tried`` at first, and the same set each time after that: this method adds the
        sessions that it chose to unload.

        Raises:
            SplitonnxError: see :meth:`find`.
        """
        if not is_session(hello.session):
            raise RemoteProtocolError("a session is named by 32 hexadecimal digits")
        with self._lock:
            if (pending := self._busy.get(hello.session)) is not None:
                return pending
            if (session := self._find_whole(hello.session)) is not None:
                session.require_owner(owner)
                return self._note_connection(session)
            if (pending := self._find_room(owner, tried)) is not None:
                return pending
            done = self._busy[hello.session] = _promise()
            self._opening[hello.session] = owner
        session = None
        try:
            session = self._open(hello, owner)
        finally:
            with self._lock:
                if session is not None:
                    self._sessions[session.id] = session
                    self._note_connection(session)
                del self._opening[hello.session], self._busy[hello.session]
            done.set_result(None)
        return session

    def _note_connection(self, session: Session) -> Session:
        self._users[session.id] += 1
        self._left.pop(session.id, None)
        self._unloaded.discard(session.id)
        return session

    def _open(self, hello: Hello, owner: str) -> Session:
        """Load a session from disk, or make a new one; in either case check its owner."""
        if self._archive is not None:
            self._archive.require_owner(hello.session, owner)
        resume = self._resume or hello.session in self._unloaded
        joined = self.policy.join(hello, owner, resume=resume)
        return Session(hello.session, joined, self.policy)

    def release(self, session: Session) -> None:
        """Record that a connection no longer uses the session."""
        with self._lock:
            self._users[session.id] -= 1
            if not self._users[session.id]:
                del self._users[session.id]
                if session.id in self._sessions:
                    self._left[session.id] = self._clock()

    def end(self, session: Session) -> None:
        """Remove a finished session from memory; its saved files are kept."""
        with self._lock:
            self._sessions.pop(session.id, None)
            self._left.pop(session.id, None)
            session.close()

    def unload_idle(self) -> None:
        """Move sessions that have had no connection for too long from memory to disk.

        Afterwards, delete the files of expired sessions.
        """
        with self._lock:
            overdue = [
                self._sessions[name]
                for name, left in self._left.items()
                if name not in self._busy and self._clock() - left > self._unattended_seconds
            ]
            pending = [self._start_unloading(session) for session in overdue]
        for unloaded in pending:
            unloaded.result()
        self.expire()

    def unload_all(self) -> None:
        """Write every session's state to disk before the server stops."""
        with self._lock:
            for session in self.sessions:
                if session.id not in self._busy:
                    self._start_unloading(session)
            threads = tuple(self._threads)
        for thread in threads:
            thread.join()

    def expire(self) -> None:
        """Delete the files of sessions that have been unused for too long.

        Sessions that are in memory keep their files.
        """
        if (archive := self._archive) is None:
            return
        try:
            expired = archive.list_expired()
        except BundleError as error:
            _logger.error("no old sessions are deleted: %s", error)
            return
        for name in expired:
            with self._lock:
                if name in self._sessions or name in self._busy:
                    continue
                done = self._busy[name] = _promise()
            try:
                archive.remove(name)
            finally:
                with self._lock:
                    del self._busy[name]
                done.set_result(None)

    def _find_whole(self, name: str) -> Session | None:
        """Find a session in memory; drop it if its worker has ended, to reload its checkpoint."""
        session = self._sessions.get(name)
        if session is None or not session.is_lost:
            return session
        self._forget(session)
        return None

    def _find_room(self, owner: str, tried: set[str]) -> Future[None] | None:
        """Make room for another session; return a future if the caller must wait for that."""
        occupants = [
            Occupant(
                name=session.id,
                owner=session.owner,
                left=self._left.get(session.id),
                is_busy=session.id in self._busy,
            )
            for session in self.sessions
        ]
        opening = list(self._opening.values())
        leaving = self._capacity.find_leaving(owner, occupants, opening, tried)
        if leaving is None:
            return None
        tried.add(leaving.name)
        if leaving.is_busy:
            return self._busy[leaving.name]
        return self._start_unloading(self._sessions[leaving.name])

    def _start_unloading(self, session: Session) -> Future[None]:
        """Write a session to disk in a separate thread; greetings for the session wait for it."""
        done = self._busy[session.id] = _promise()
        thread = threading.Thread(
            target=self._unload, args=(session, done), name="splitonnx-unload", daemon=True
        )
        self._threads.add(thread)
        thread.start()
        return done

    def _unload(self, session: Session, done: Future[None]) -> None:
        is_gone = False
        try:
            with self._slots:
                is_gone = _leave_memory(session)
        finally:
            with self._lock:
                if is_gone:
                    self._forget(session)
                del self._busy[session.id]
                self._threads.discard(threading.current_thread())
            done.set_result(None)

    def _forget(self, session: Session) -> None:
        """Remove a session from memory; it can be loaded from disk again."""
        self._sessions.pop(session.id, None)
        self._left.pop(session.id, None)
        self._unloaded.add(session.id)
        session.close()


def _promise() -> Future[None]:
    """Make a future that its waiters cannot cancel."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _leave_memory(session: Session) -> bool:
    """Write a session to disk, and return whether it can be removed from memory."""
    try:
        session.unload()
    except WorkerLost:  # it was logged; only the files on disk remain
        pass
    except (DiskQuotaUsed, StateNotFinite) as error:
        _logger.error("session %s continues from its last checkpoint: %s", session.id, error)
    except SplitonnxError as error:
        _logger.error("session %s stays in memory: %s", session.id, error)
        return False
    return True
