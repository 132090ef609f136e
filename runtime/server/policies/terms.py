"""What a policy asks of clients, told to each in the answer to its greeting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from splitonnx.errors import RemoteProtocolError
from splitonnx.names import ACCUMULATE, ONE_MODEL, SYNCHRONOUS, UPDATE

if TYPE_CHECKING:  # the command line reads a policy's name without what computes
    from splitonnx.manifests import PartyManifest


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a policy asks of clients; a client learns it in the answer to its greeting.

    ``policy`` is the policy's name.  Where clients share what they learn, ``local_steps`` is how
    many steps a client trains between two shares, and ``rounds`` is the number of rounds after
    which the training is complete, or 0 if the clients decide.  Otherwise, both are 0.
    """

    policy: str
    local_steps: int = 0
    rounds: int = 0

    def can_accumulate(self, manifest: PartyManifest) -> bool:
        """Return whether a client's step may consist of several micro-batches.

        ``manifest`` is that of the server's part.  A joint step needs to know what micro-batches
        count, which clients do not send to a server that trains nothing.
        """
        from splitonnx.micro_batches import MICRO_BATCH_WEIGHT

        sent = {wire.tensor.name for wire in manifest.phase(ACCUMULATE).wires}
        return self.policy != SYNCHRONOUS or MICRO_BATCH_WEIGHT in sent

    def count_in_flight(self, manifest: PartyManifest) -> int:
        """Return how many tasks of one step a client of a server's part may have open at once.

        One model for all clients runs one task at a time.
        """
        from splitonnx.micro_batches import MOST_IN_FLIGHT
        from splitonnx.runtime.engine.dataflows import can_overlap

        if self.policy in ONE_MODEL or not can_overlap(manifest.phase(ACCUMULATE), manifest.party):
            return 1
        return MOST_IN_FLIGHT

    def check(self, phase: str, manifest: PartyManifest) -> None:
        """Check that a client of a server's part may send tensors in a phase.

        Raises:
            RemoteProtocolError: the phase accumulates, which the policy does not permit.
        """
        if phase in (ACCUMULATE, UPDATE) and not self.can_accumulate(manifest):
            raise RemoteProtocolError(f"the policy '{self.policy}' does not let it {phase}")

    def describe(self) -> tuple[str, ...]:
        """Return a sentence about what clients share; none if they share nothing."""
        if not self.local_steps:
            return ()
        end = f", for {self.rounds:,} rounds" if self.rounds else ""
        return (
            f"policy '{self.policy}': after every {self.local_steps:,} steps{end}, each client "
            "also sends the trained weights and statistics of its part",
        )
