"""What each micro-batch of a joint step counts in the loss of the whole step.

A client says what its micro-batch counts in its own step.  A joint micro-batch has micro-batches of
several clients, and counts its part of all their rows.  How many rows the clients have in the
micro-batches to come follows from the weights of their first ones: a client of which 2 rows count
a quarter has 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey

MOST_ROWS = 1 << 20
"""The largest number of rows that a client's step may have, so that its F32 weights tell it."""
TOLERANCE = 2.0**-22
"""How much a weight may differ from a quotient of two numbers of rows, as a part of it."""


class RowWeights:
    """The weights of one step's joint micro-batches, from what its clients say of their own.

    A client that says something else than its rows are is refused, so that no client counts more
    than it has rows.
    """

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}  # rows of each client's whole step
        self._counted: Counter[str] = Counter()  # rows of each that have come

    def weigh(
        self, keys: Sequence[TaskKey], rows: Sequence[int], weights: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return the weight of the next joint micro-batch.

        ``keys`` are those of the clients' own micro-batches, ``rows`` their numbers of rows, and
        ``weights`` what the clients say that they count.  All clients of the step have the first.

        Raises:
            RemoteProtocolError: a client's loss does not count each of its rows alike, or a client
                sends more rows than its first weight says.
        """
        for key, count, array in zip(keys, rows, weights, strict=True):
            weight = float(array)
            if key.micro_batch == 0:
                self._totals[key.session] = _find_total(count, weight)
            total = self._totals[key.session]
            if abs(weight - count / total) > TOLERANCE * weight:
                raise _refuse(count, weight)
            self._counted[key.session] += count
            if self._counted[key.session] > total:
                raise _refuse_total(self._counted[key.session], total)
        return np.array(sum(rows) / sum(self._totals.values()), np.float32)

    def check_end(self, keys: Sequence[TaskKey], counts: Sequence[np.ndarray]) -> None:
        """Check what the clients of a step say when they ask for the update.

        ``counts`` are the numbers of micro-batches that they say they have sent.

        Raises:
            RemoteProtocolError: a client has sent fewer rows than its first weight says, or another
                number of micro-batches than it says.
        """
        for key, array in zip(keys, counts, strict=True):
            if int(array) != key.micro_batch:
                raise RemoteProtocolError(
                    f"it updates after {int(array)} micro-batches, and sent {key.micro_batch}"
                )
            counted, total = self._counted[key.session], self._totals[key.session]
            if counted != total:
                raise _refuse_total(counted, total)


def _find_total(count: int, weight: float) -> int:
    """Return the number of rows of a step, of which ``count`` have ``weight``."""
    if not (0 < weight <= 1 and count / weight < MOST_ROWS + 0.5):  # NaN fails too
        raise _refuse(count, weight)
    return max(1, round(count / weight))


def _refuse(count: int, weight: float) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"of its micro-batches, one of {count:,} rows counts {weight:.6g} of its step, which is "
        "not its part of the rows: the loss ignores labels, or weighs classes or samples.  With "
        "the policy 'synchronous' each row must count alike in steps of micro-batches; train "
        "without accumulate and micro_batches (--accumulate, --micro-batches)"
    )


def _refuse_total(counted: int, total: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"its micro-batches have {counted:,} rows, and {total:,} by the weight of the first one"
    )
