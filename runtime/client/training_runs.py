"""The records that let a client resume training: its session, checkpoints and position in the data.

A run is unfinished while its checkpoints are newer than the outcome stored in the folder.  This
module reads and writes files, and opens the session's channel; it does not run tasks.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Self

import msgspec
import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import BundleError, UnfinishedRun, UsageError
from splitonnx.folder_locks import FolderLock
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.runtime.channels.channels import Channel, Dial
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.greetings import ResumePoint
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.channels.websockets import split_address
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.storage.checkpoint_files import list_sessions
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore
from splitonnx.runtime.storage.positions import DataPosition
from splitonnx.runtime.wire.transports import Transport
from splitonnx.states import check_home

# msgspec crashes if two threads use a type for the first time at the same moment
_POSITION = msgspec.json.Decoder(DataPosition)


_FIXED = ("batch_size", "accumulate", "seed", "shuffle", "samples", "schedule", "stopping")
"""Fields of a position that must be the same when a run is resumed."""


class TrainingRun:
    """The record of one training session of a client; created by :meth:`open`.

    ``position`` is the position in the data at which a resumed run continues, or ``None`` for a new
    run.  ``is_behind`` is true if the last checkpoint could not be written.
    """

    def __init__(
        self, party: PartyBundle, session: str, checkpoint: Checkpoint | None = None
    ) -> None:
        self.session = session
        self.is_behind = False
        self._party = party
        self._lock: FolderLock | None = None
        self._kept: tuple[int, Mapping[str, np.ndarray], DataPosition | None] | None = None
        self._origin, self._start = party.session, party.step
        self._state: Mapping[str, np.ndarray] = party.state()
        self._store = _open_store(party, session)
        if checkpoint is not None:
            self.position = checkpoint.position
        else:
            self.position = _read_position(party.position) if party.position else None

    @classmethod
    def open(cls, executor: Executor, *, resume: bool) -> Self:
        """Start a new session, or resume the unfinished session in the folder; return its record.

        If ``resume`` is true, the folder is locked until :meth:`release` is called, and an
        unfinished session is resumed if there is one: its state is loaded into ``executor``.
        Otherwise, training starts from the folder's state.

        Raises:
            FolderInUse: another client is training in the folder.
        """
        party = executor.party
        lock = FolderLock.acquire(party.path) if resume and party.path is not None else None
        found = find_unfinished(party) if resume else None
        if found is None:
            run = cls(party, uuid.uuid4().hex)
            if not resume:
                run.position = None
        else:
            executor.restore(found.tensors, found.step)
            run = cls(party, found.session, found)
        run._lock = lock
        return run

    def connect(
        self,
        executor: Executor,
        server: str | Transport | Dial | None,
        credentials: Credentials | None,
        *,
        give_up_after: float | None,
        is_patient: bool,
        can_share: bool,
    ) -> Channel | None:
        """Open the session's channel to its server; without a server, return ``None``.

        ``executor`` holds the client's state, and :class:`~clients.Client` explains the other
        arguments.  ``is_patient`` means to retry if the first connection fails.

        Raises:
            ConnectionLost, ServerBusy: the server cannot be reached or is full.
            BundleMismatch, SharingNotPermitted, RemoteFault: the server refuses the client.
        """
        if server is None:
            return None
        dial, transport = split_address(server, credentials)
        return Channel(
            dial,
            transport,
            manifest=self._party.manifest,
            session=self.session,
            find_resume_point=lambda: self.find_resume_point(executor.step),
            backoff=Backoff(give_up_after=give_up_after),
            patient=is_patient,
            can_share=can_share,
            in_background=isinstance(server, str),
        )

    def hold(self) -> None:
        """Lock the folder until :meth:`release` is called; may be called twice.

        Raises:
            FolderInUse: another client is training in the folder.
        """
        if self._lock is None and self._party.path is not None:
            self._lock = FolderLock.acquire(self._party.path)

    def release(self) -> None:
        """Unlock the folder, so that other clients can train in it; may be called twice."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    @property
    def start(self) -> int:
        """Return the step at which the session began, or at which it was last published."""
        return self._start

    def find_resume_point(self, step: int) -> ResumePoint:
        """Return the steps from which a client that is at ``step`` can resume."""
        kept = () if self._store is None else self._store.steps()
        return ResumePoint(origin=self._origin, start=self._start, step=step, kept=kept)

    @property
    def has_checkpoints(self) -> bool:
        """Return whether the session has checkpoints to resume from; a finished run has none."""
        try:
            return self._store is not None and bool(self._store.steps())
        except BundleError:  # they may exist but be unreadable
            return True

    def write(
        self, executor: Executor, position: DataPosition | None, *, keep: bool = False
    ) -> None:
        """Write the executor's state and the position in the data to disk as a durable checkpoint.

        ``keep`` means that the client may return to this step at the end of training.  A bundle
        that exists only in memory keeps such a state in memory.

        Raises:
            NotSaved: the checkpoint cannot be written; earlier checkpoints are kept.
            BundleError: the bundle exists only in memory.
            FolderInUse: another client is training in the folder.
        """
        if self._store is None:
            if not keep:
                raise BundleError("bundle in memory", "it has no folder to keep checkpoints in")
            self._kept = (executor.step, executor.state(), position)
            return
        self.hold()
        self.is_behind = True
        if self._party.path is not None:
            check_home(self._party.path, self._party.manifest.digest)
        self._store.write(
            Checkpoint(
                session=self.session,
                step=executor.step,
                tensors=executor.state(),
                position=position,
            ),
            keep=keep,
        )
        self.is_behind = False

    def publish(self, executor: Executor, position: DataPosition | None) -> None:
        """Save the state as the outcome of the training, and delete the run's checkpoints.

        Raises:
            BundleError: the bundle exists only in memory, or the folder cannot be written.
            NotSaved: the state contains NaN or infinity, or the folder was deleted or replaced
                after it was loaded.
            FolderInUse: another client is training in the folder.
        """
        self.hold()
        text = "" if position is None else msgspec.json.encode(position).decode()
        executor.publish(session=self.session, position=text)
        self._origin, self._start = self.session, executor.step
        self._state = executor.state()
        if self._store is not None:
            self._store.remove()

    def go_back(self, executor: Executor, step: int) -> DataPosition | None:
        """Restore the state of an earlier step, and return the position in the data at that step.

        The position is ``None`` at the start of the run.

        Raises:
            BundleError: the state of ``step`` was not kept.
        """
        is_on_disk = self._store is not None and step in self._store.steps()
        is_in_memory = self._kept is not None and step == self._kept[0]
        if not is_on_disk and not is_in_memory and step != self._start:
            raise BundleError(f"session {self.session}", f"no state of step {step} was kept")
        if self._store is not None:
            self._store.rewind(step)
            if is_on_disk:
                checkpoint = self._store.read(step)
                executor.restore(checkpoint.tensors, step)
                return checkpoint.position
        if self._kept is not None and is_in_memory:
            executor.restore(self._kept[1], step)
            return self._kept[2]
        executor.restore(self._state, step)
        return None

    def take_position(self, start: DataPosition) -> DataPosition:
        """Return the position in the data at which training begins.

        ``start`` is the position at which a new run begins.  For a resumed run, the first call
        returns the position where the run was interrupted.  In all other cases, the result is
        ``start``.

        Raises:
            UsageError: the resumed run started with a different seed, batch size, shuffling, number
                of samples or micro-batches, learning-rate schedule or early stopping.
        """
        kept = self.position
        if kept is None:
            return start
        for field in _FIXED:
            before, now = getattr(kept, field), getattr(start, field)
            if before != now:
                raise UsageError(
                    f"the run was begun with {field.replace('_', ' ')} {_show(before)}, not "
                    f"{_show(now)}; resume it with the same"
                )
        self.position = None
        return kept

    def begin_run(self, *, restart: bool) -> None:
        """Lock the folder, and check that it does not contain an unfinished run of another session.

        If there is such a run and ``restart`` is true, no error is raised.  Instead, the
        checkpoints of all other sessions in the folder are deleted.

        Raises:
            UnfinishedRun: the folder contains an unfinished run.
            FolderInUse: another client is training in the folder.
        """
        self.hold()
        found = find_unfinished(self._party)
        if found is None or found.session == self.session:
            return
        if not restart:
            raise UnfinishedRun(str(self._party.path), found.step)
        assert self._party.path is not None  # a run was found there
        for session in list_sessions(self._party.path):
            if session != self.session:
                CheckpointStore(self._party.path, self._party.manifest, session).remove()


def find_unfinished(party: PartyBundle) -> Checkpoint | None:
    """Return the newest checkpoint of the latest unfinished run, or ``None`` if there is none."""
    if party.path is None:
        return None
    for session in list_sessions(party.path):
        store = CheckpointStore(party.path, party.manifest, session)
        steps = store.steps()
        if steps and not (session == party.session and steps[0] <= party.step):
            return store.read(steps[0])
    return None


def _show(setting: object) -> object:
    return "none" if setting == "" else setting


def _open_store(party: PartyBundle, session: str) -> CheckpointStore | None:
    if party.path is None:
        return None
    return CheckpointStore(party.path, party.manifest, session)


def _read_position(text: str) -> DataPosition:
    try:
        return _POSITION.decode(text)
    except JSON_ERRORS as error:
        raise BundleError("the state's position in the data", str(error)) from error
