"""Which faults strike and where: a seeded row of them, one a connection.  It strikes nothing.

A fault waits for its connection to carry so many bytes in one direction, so it lies anywhere: in
the websocket's handshake, in the greeting, in a message's header, in the midst of a tensor.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Which way bytes travel."""

    UP = "up"  # client to server
    DOWN = "down"


class Kind(StrEnum):
    """What happens when the bytes have passed."""

    FIN = "fin"  # both connections end in good order, in the midst of whatever it was
    RESET = "reset"
    SILENCE = "silence"  # one direction is swallowed for a while before the reset
    ORPHAN = "orphan"  # the client is reset; what it last sent comes after its next words
    KILL_SERVER = "kill server"
    KILL_CLIENT = "kill client"
    KILL_BOTH = "kill both"
    STOP_SERVER = "stop server"  # SIGTERM; some bytes later a reset, mostly in the farewell


CUTS = frozenset({Kind.FIN, Kind.RESET, Kind.SILENCE, Kind.ORPHAN})
"""The faults that count as cuts."""

DECK: dict[Kind, int] = {
    Kind.FIN: 21,
    Kind.RESET: 21,
    Kind.SILENCE: 9,
    Kind.ORPHAN: 9,
    Kind.KILL_SERVER: 3,
    Kind.KILL_CLIENT: 3,
    Kind.KILL_BOTH: 1,
    Kind.STOP_SERVER: 2,
}
"""Faults are drawn as from a deck of cards, shuffled anew when it is empty: sixty cuts to four
kills of each side, however short the training is."""

HANDSHAKE = 220
"""Bytes, roughly, of either half of the websocket's handshake."""
GREETING = 4_000
"""Bytes, roughly, by which handshake and greeting are over."""
LONGEST_DELAY = 0.012
"""Seconds from the trigger to a kill: some steps, or a checkpoint's write."""
LONGEST_SILENCE = 0.06
"""Seconds that a direction is swallowed."""
LONGEST_FAREWELL = 60
"""Bytes that still pass down after a stop: a close frame is some 30."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """``kind`` strikes when a connection has carried ``offset`` bytes in ``direction``.

    ``delay`` are seconds from then to a kill, or to the end of a silence.  ``after`` are the bytes
    that still pass down after a stop, or those that the next connection carries up before what an
    orphan held arrives.
    """

    kind: Kind
    direction: Direction
    offset: int
    delay: float = 0.0
    after: int = 0

    def __str__(self) -> str:
        return f"{self.kind} at {self.offset} bytes {self.direction}"


def draw_faults(seed: str, reach: dict[Direction, int]) -> Iterator[Fault]:
    """Draw faults without end, one for each connection in turn.

    ``reach`` is how many bytes after the greeting a fault may lie, for each direction.  An eighth
    lies in the handshake, an eighth in the greeting, the rest evenly in what follows.
    """
    chance = random.Random(seed)
    for kind in _deal(chance):
        direction = chance.choice(list(Direction))
        yield Fault(
            kind=kind,
            direction=direction,
            offset=_draw_offset(chance, reach[direction]),
            delay=chance.uniform(0, LONGEST_SILENCE if kind is Kind.SILENCE else LONGEST_DELAY),
            after=chance.randint(0, GREETING if kind is Kind.ORPHAN else LONGEST_FAREWELL),
        )


def _deal(chance: random.Random) -> Iterator[Kind]:
    while True:
        yield from chance.sample(list(DECK), counts=DECK.values(), k=sum(DECK.values()))


def _draw_offset(chance: random.Random, reach: int) -> int:
    where = chance.random()
    if where < 1 / 8:
        return chance.randint(0, HANDSHAKE)
    if where < 1 / 4:
        return chance.randint(HANDSHAKE, GREETING)
    return GREETING + chance.randint(0, reach)
