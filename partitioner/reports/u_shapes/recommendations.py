"""Choose the pairs worth considering among all pairs at which a model can be cut in a U-shape.

A pair is recommended if the head, the server's part and the tail all have trained parameters, and
no other pair with trained parameters in all three parts is better.  A pair is better than another
one if it sends fewer bytes per sample and the client's share of the trained elements is not larger,
or if the client's share is smaller and the pair does not send more bytes.  Shares are compared in
whole percent, so that a bias or a scale makes no difference.  If several pairs have
equal bytes and shares, only the last one is recommended.  Pairs with unknown bytes cannot be
compared and are not recommended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Costs(Protocol):
    """The costs of a pair of cut points: bytes sent per sample, and trained elements per part."""

    @property
    def bytes_up(self) -> int | None:
        """The number of bytes per sample that are sent to the server, or ``None`` if unknown."""

    @property
    def bytes_down(self) -> int | None:
        """The number of bytes per sample that the server sends back, or ``None`` if unknown."""

    @property
    def head_parameters(self) -> int:
        """The number of trained elements in the head, the client's part before the server's."""

    @property
    def tail_parameters(self) -> int:
        """The number of trained elements in the tail, the client's part after the server's."""

    @property
    def server_parameters(self) -> int:
        """The number of trained elements in the server's part."""

    @property
    def client_share(self) -> float:
        """The fraction of all trained elements that are at the client, from 0 to 1."""


def find_recommended(pairs: Sequence[Costs]) -> list[bool]:
    """Return, for each pair in order, whether it is recommended."""
    known = [
        (pair.bytes_up + pair.bytes_down, round(100 * pair.client_share), -place)
        for place, pair in enumerate(pairs)
        if pair.bytes_up is not None
        and pair.bytes_down is not None
        and pair.head_parameters
        and pair.tail_parameters
        and pair.server_parameters
    ]
    chosen: set[int] = set()
    smallest = 101
    for _, share, place in sorted(known):
        if share < smallest:
            smallest = share
            chosen.add(-place)
    return [place in chosen for place in range(len(pairs))]
