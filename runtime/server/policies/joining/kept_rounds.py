"""The newest round that was recorded, with the state of the one model that all clients train.

It says which steps can be restored after a failure, and what a client that leaves ends with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from splitonnx.errors import NotSaved
from splitonnx.manifests import StateSpec
from splitonnx.runtime.server.policies.joining.rounds import Adoptions
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.states import check_finite_state


class KeptRounds:
    """The recorded rounds of one model, whose state has the tensors ``specs``.

    ``newest`` is the last round, which is in memory even if it could not be written.  ``write``
    writes a record to disk, and ``read_before`` reads the newest one before a number; it is
    ``None`` if there is no disk.  Not thread-safe.
    """

    def __init__(
        self,
        newest: RoundRecord | None,
        *,
        specs: Sequence[StateSpec],
        write: Callable[[RoundRecord], None],
        read_before: Callable[[int], RoundRecord | None] | None = None,
    ) -> None:
        self.newest = newest
        self._specs = specs
        self._write = write
        self._read_before = read_before
        self._is_restored = newest is not None  # from disk, and no round was closed since
        self._candidates: dict[str, tuple[int, ...]] = {}  # steps of those that came since
        self._durable: Adoptions = {} if newest is None else dict(newest.adoptions)
        self._savers = set(
            () if newest is None else newest.savers
        )  # whose clients keep checkpoints
        self._ends: dict[str, RoundRecord | None] = {}  # of sessions that leave

    def write(self, joint: RoundRecord) -> None:
        """Write a round to disk.

        Raises:
            StateNotFinite: the model contains NaN or infinity.
            BundleError, NotSaved: it cannot be written.
        """
        joint = replace(joint, savers=tuple(sorted(self._savers & joint.adoptions.keys())))
        self.newest, self._is_restored = joint, False
        self._candidates.clear()
        check_finite_state(Path(f"round {joint.number}"), joint.tensors, self._specs)
        self._write(joint)
        self._durable = dict(joint.adoptions)

    def keep(
        self, session: str, step: int, *, adoptions: Adoptions, owners: Mapping[str, str]
    ) -> None:
        """Check that a session's step can be restored, and write the round again if need be.

        ``adoptions`` say what every session has received by now, perhaps after the round was
        written, and ``owners`` are the sessions' owners.

        Raises:
            NotSaved: the step is not the end of a round.
            StateNotFinite, BundleError: the round cannot be written.
        """
        if self.newest is None or step not in dict(adoptions.get(session, ())):
            reason = "with this server's policy, only the end of a round can be restored"
            raise NotSaved(f"step {step}", reason)
        self._savers.add(session)
        if step not in dict(self._durable.get(session, ())):
            known = {name: owner for name, owner in owners.items() if name in adoptions}
            self.write(replace(self.newest, adoptions=adoptions, owners=known))

    def find_common(
        self, session: str, candidates: Sequence[int], adoptions: Adoptions, version: int
    ) -> RoundRecord | None:
        """Return the round before the newest, if all clients have to continue there.

        That is so after a failure of the server, if a client failed as well before it had written a
        checkpoint of the newest round.  ``candidates`` are the steps at which the client of a
        session can continue.  Return ``None`` if the model, which has ``version``, has learned
        since the server started, or if a client could not go back.
        """
        if self.newest is None or self._read_before is None:
            return None
        if not self._is_restored or version != self.newest.version:
            return None
        self._candidates[session] = tuple(candidates)
        received = adoptions.get(session, ())
        if not received or received[0][0] in candidates:
            return None
        earlier = self._read_before(self.newest.number)
        if earlier is None or earlier.adoptions.keys() != adoptions.keys():
            return None  # a client came or left in between
        can_return = all(
            entries[0][0] in self._candidates[name]
            if name in self._candidates
            else name in self._savers
            for name, entries in earlier.adoptions.items()
        )
        return earlier if can_return else None

    def return_to(self, earlier: RoundRecord) -> None:
        """Make a round that :meth:`find_common` returned the newest one."""
        self.newest, self._durable = earlier, dict(earlier.adoptions)

    def note_leaving(self, session: str, *, leaves: bool) -> None:
        """Note whether a session leaves with what it shares now."""
        self._ends.pop(session, None)
        if leaves:
            self._ends[session] = None

    def note_answer(self, session: str) -> None:
        """Note that a session is answered with the newest round; if it leaves, it ends with it."""
        if session in self._ends:
            self._ends[session] = self.newest

    def find_end(self, session: str) -> dict[str, np.ndarray] | None:
        """Return the state that a session ended with, or ``None`` if it has not left.

        Others may have changed the model since.
        """
        record = self._ends.get(session)
        if record is None:
            return None
        return {spec.tensor.name: record.tensors[spec.tensor.name] for spec in self._specs}
