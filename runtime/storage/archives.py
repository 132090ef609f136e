"""A server's archive of its sessions on disk: checkpoints, outcomes, owners and disk usage.

An *outcome* is a state that a session published as the result of its training.  A session belongs
to its owner even after it is finished or abandoned.  Nobody else may resume it, start it again, or
start training from its result.  Each owner has a quota of bytes, and the files of unused sessions
are deleted after some time.  This module handles files; the registry knows which sessions are in
memory.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from splitonnx.errors import DiskQuotaUsed, ForeignSession
from splitonnx.manifests import PartyManifest, StateSpec
from splitonnx.runtime.storage.checkpoint_files import list_folders
from splitonnx.runtime.storage.checkpoints import CheckpointStore
from splitonnx.states import (
    STATE,
    check_home,
    is_session,
    list_outcomes,
    read_newest,
    read_owner,
    read_state,
)
from splitonnx.tensors import DTYPES

DAY = 86_400.0

_logger = logging.getLogger("splitonnx.server")


class Archive:
    """The archive of the sessions in a server's ``folder``; safe to use from several threads.

    ``most_bytes`` is the quota per owner, and ``keep_seconds`` is how long the files of unused
    sessions are kept; ``None`` means no limit.  ``clock`` returns the current time, for comparison
    with the timestamps of files.
    """

    def __init__(
        self,
        folder: Path,
        manifest: PartyManifest,
        *,
        most_bytes: int | None = None,
        keep_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self._manifest = manifest
        self._most_bytes = most_bytes
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._owners: dict[str, str] = {}
        self._pending: Counter[str] = Counter()
        self._most_state_bytes = 1024 + sum(map(_estimate, manifest.state))

    def open_store(self, session: str) -> CheckpointStore:
        """Return the checkpoint store of a session."""
        return CheckpointStore(self.folder, self._manifest, session)

    def require_owner(self, session: str, owner: str) -> None:
        """Check that all files of a session belong to ``owner``.

        Raises:
            ForeignSession: the session belongs to another owner.
        """
        found = self.open_store(session).owners()
        outcome = read_owner(self.folder, session)
        if found - {owner} or outcome not in (None, owner):
            raise ForeignSession(session)

    def find_tensors(self, session: str, step: int, owner: str) -> Mapping[str, np.ndarray] | None:
        """Return a session's state at a step, or ``None`` if that state is not on disk.

        The state comes from the session's outcome or from a checkpoint.

        Raises:
            ForeignSession: the session belongs to another owner.
        """
        self.require_owner(session, owner)
        outcome = read_state(self.folder, self._manifest, session, is_held=True)
        if outcome is not None and (outcome.session, outcome.step) == (session, step):
            return outcome.tensors
        store = self.open_store(session)
        return store.read(step).tensors if step in store.steps() else None

    @contextmanager
    def saving(
        self, store: CheckpointStore, owner: str, *, publish: bool = False
    ) -> Iterator[None]:
        """Reserve space in the owner's quota while a ``with`` block writes a checkpoint to disk.

        First check that the folder was not replaced after it was loaded.  ``publish`` means
        that the block writes an outcome, not only a checkpoint.

        Raises:
            NotSaved: the folder was deleted or replaced.
            DiskQuotaUsed: the owner's quota does not have enough space left.
        """
        check_home(self.folder, self._manifest.digest)
        if self._most_bytes is None:
            yield
            return
        nbytes = self._most_state_bytes
        more = store.estimate_growth(nbytes)
        if publish:
            outcome = self._find_outcome(store.session)
            more += nbytes - (0 if outcome is None else _measure(outcome))
        with self._lock:
            self._owners[store.session] = owner
            used = self._measure_owner(owner) + self._pending[owner]
            if more > 0 and used + more > self._most_bytes:
                raise DiskQuotaUsed(str(self.folder), self._most_bytes, used)
            self._pending[owner] += max(0, more)
        try:
            yield
        finally:
            with self._lock:
                self._pending[owner] -= max(0, more)

    def list_expired(self) -> list[str]:
        """List the sessions whose files are all older than ``keep_seconds``.

        The newest outcome in the folder never expires.
        """
        if self._keep_seconds is None:
            return []
        oldest = self._clock() - self._keep_seconds
        return [name for name in self._list_sessions() if self._find_age(name) < oldest]

    def remove(self, session: str) -> None:
        """Delete a session's checkpoints and its outcome, but keep the folder's newest outcome."""
        self.open_store(session).remove()
        if (outcome := list_outcomes(self.folder).get(session)) is not None:
            try:
                outcome.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("%s is left: %s", outcome, error.strerror)
        with self._lock:
            self._owners.pop(session, None)
        _logger.info("session %s is deleted: nobody came back to it", session)

    def _list_sessions(self) -> set[str]:
        return {*list_folders(self.folder), *list_outcomes(self.folder)}

    def _find_age(self, session: str) -> float:
        outcome = list_outcomes(self.folder).get(session)
        paths = [*self.open_store(session).list_files(), *([] if outcome is None else [outcome])]
        times = []
        for path in paths:
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                continue
        return max(times, default=self._clock())

    def _find_outcome(self, session: str) -> Path | None:
        newest = self.folder / STATE
        if read_newest(self.folder).get("session") == session:
            return newest
        return list_outcomes(self.folder).get(session)

    def _measure_owner(self, owner: str) -> int:
        newest = read_newest(self.folder)
        total = _measure(self.folder / STATE) if newest.get("owner", "") == owner else 0
        outcomes = list_outcomes(self.folder)
        for session in {*list_folders(self.folder), *outcomes}:
            if self._find_owner(session) == owner:
                total += sum(map(_measure, self.open_store(session).list_files()))
                total += _measure(outcomes[session]) if session in outcomes else 0
        return total

    def _find_owner(self, session: str) -> str | None:
        """Return the owner of a session on disk, or ``None``; known owners are not read again."""
        if session not in self._owners and is_session(session):
            owners = self.open_store(session).owners()
            outcome = read_owner(self.folder, session)
            found = next(iter(owners), outcome)
            if found is None:
                return None
            self._owners[session] = found
        return self._owners[session]


def _estimate(spec: StateSpec) -> int:
    """Compute the most bytes that a tensor takes in a file, including its entry in the header."""
    count = math.prod(dim for dim in spec.tensor.shape if isinstance(dim, int))
    return count * DTYPES[spec.tensor.dtype].itemsize + 128 + 6 * len(spec.tensor.name)


def _measure(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
