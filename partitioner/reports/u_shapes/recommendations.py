"""Choose the pairs worth considering among all those that a model can be cut at.

A pair is recommended if the head, the server's part and the tail all have trained parameters, and
no other such pair is better.  A pair is better if it sends fewer bytes per sample and the client's
share of the trained elements is not larger, or if this share is smaller and it does not send more.
Shares are compared in whole percent, so that a bias or a scale does not count.  If several pairs
have equal bytes and shares, only the last one is recommended.  Pairs with unknown bytes cannot be
compared and are not recommended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Costs(Protocol):
    """The figures by which pairs of cut points are compared: bytes sent and trained elements."""

    @property
    def bytes_up(self) -> int | None:
        """Bytes per sample sent to the server."""

    @property
    def bytes_down(self) -> int | None:
        """Bytes per sample sent back."""

    @property
    def head_parameters(self) -> int:
        """Trained elements at the client before the server's part."""

    @property
    def tail_parameters(self) -> int:
        """Trained elements at the client after the server's part."""

    @property
    def server_parameters(self) -> int:
        """Trained elements at the server."""

    @property
    def client_share(self) -> float:
        """The fraction of all trained elements that are at the client, from 0 to 1."""


def find_recommended(pairs: Sequence[Costs]) -> list[bool]:
    """Return for each pair whether it is recommended."""
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
