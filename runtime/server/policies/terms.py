"""What a policy asks of clients, told to each in the answer to its greeting."""

from __future__ import annotations

from dataclasses import dataclass


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

    def describe(self) -> tuple[str, ...]:
        """Return a sentence about what clients share; none if they share nothing."""
        if not self.local_steps:
            return ()
        end = f", for {self.rounds:,} rounds" if self.rounds else ""
        return (
            f"policy '{self.policy}': after every {self.local_steps:,} steps{end}, each client "
            "also sends the trained weights and statistics of its part",
        )
