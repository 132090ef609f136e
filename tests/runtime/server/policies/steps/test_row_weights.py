"""A joint micro-batch weighs its part of all rows, and no client may count for more than it has."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, UPDATE
from splitonnx.runtime.server.policies.steps.row_weights import RowWeights

ANN, BOB = "a" * 32, "b" * 32


def part(session: str, number: int) -> TaskKey:
    return TaskKey(session, ACCUMULATE, 0, number)


def weight(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def test_the_weights_of_a_step_are_the_parts_of_all_rows_and_add_up_to_one() -> None:
    """Ann has 3 + 2 + 2 rows, and Bob 4 + 1."""
    weights = RowWeights()
    keys = [part(ANN, 0), part(BOB, 0)]
    found = [weights.weigh(keys, (3, 4), [weight(3 / 7), weight(4 / 5)])]
    keys = [part(ANN, 1), part(BOB, 1)]
    found.append(weights.weigh(keys, (2, 1), [weight(2 / 7), weight(1 / 5)]))
    found.append(weights.weigh([part(ANN, 2)], (2,), [weight(2 / 7)]))
    np.testing.assert_array_equal(np.stack(found), np.array([7, 3, 2], np.float32) / np.float32(12))
    ends = [TaskKey(ANN, UPDATE, 0, 3), TaskKey(BOB, UPDATE, 0, 2)]
    weights.check_end(ends, [np.array(3), np.array(2)])


@pytest.mark.parametrize("rows", [1, 7, 1023, 99_991, 1 << 20])
def test_the_rows_of_a_step_are_known_from_one_of_them_and_its_weight(rows: int) -> None:
    weights = RowWeights()
    for number in range(2):
        if number < rows:
            weights.weigh([part(ANN, number)], (1,), [weight(1 / rows)])
    assert weights._totals == {ANN: rows}


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, np.nan, np.inf, 0.3, 1e-9])
def test_a_weight_that_is_no_part_of_rows_is_refused_with_what_to_do(value: float) -> None:
    with pytest.raises(RemoteProtocolError, match=r"not its part of the rows.*train without"):
        RowWeights().weigh([part(ANN, 0)], (1,), [weight(value)])


def test_a_later_weight_that_does_not_fit_its_rows_is_refused() -> None:
    weights = RowWeights()
    weights.weigh([part(ANN, 0)], (2,), [weight(2 / 6)])
    with pytest.raises(RemoteProtocolError, match="not its part of the rows"):
        weights.weigh([part(ANN, 1)], (2,), [weight(3 / 6)])


def test_a_client_sends_neither_more_nor_fewer_rows_than_it_says() -> None:
    weights = RowWeights()
    weights.weigh([part(ANN, 0)], (2,), [weight(2 / 3)])
    with pytest.raises(RemoteProtocolError, match="have 2 rows, and 3 by"):
        weights.check_end([TaskKey(ANN, UPDATE, 0, 1)], [np.array(1)])
    with pytest.raises(RemoteProtocolError, match="have 4 rows, and 3 by"):
        weights.weigh([part(ANN, 1)], (2,), [weight(2 / 3)])


def test_the_number_of_micro_batches_is_that_which_came() -> None:
    weights = RowWeights()
    weights.weigh([part(ANN, 0)], (3,), [weight(1)])
    with pytest.raises(RemoteProtocolError, match="updates after 2 micro-batches, and sent 1"):
        weights.check_end([TaskKey(ANN, UPDATE, 0, 1)], [np.array(2)])
