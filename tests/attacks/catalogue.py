"""The list of attacks, in the order of the table."""

from __future__ import annotations

from tests.attacks import bounds, costs, files, liars, randoms, replacements, sessions, shapes, weak
from tests.attacks.verdicts import Attack


def list_attacks(*, messages: int, seed: int | None) -> list[Attack]:
    """List the attacks; ``messages`` random ones are sent, drawn from ``seed``."""
    return [
        *shapes.ATTACKS,
        *costs.ATTACKS,
        *files.ATTACKS,
        *sessions.ATTACKS,
        *bounds.ATTACKS,
        *weak.ATTACKS,
        *replacements.ATTACKS,
        *liars.ATTACKS,
        randoms.make_attack(messages, seed),
    ]
