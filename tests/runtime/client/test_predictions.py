"""Outputs of several batches become one array each."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.client.predictions import join_outputs


def test_samples_of_all_batches_stand_one_after_the_other() -> None:
    joined = join_outputs([{"y": np.ones((2, 3))}, {"y": np.zeros((1, 3))}])
    np.testing.assert_array_equal(joined["y"], [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_a_single_number_has_one_entry_for_each_batch() -> None:
    joined = join_outputs([{"s": np.array(1)}, {"s": np.array(2)}])
    np.testing.assert_array_equal(joined["s"], [1, 2])


def test_other_sizes_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'y' differ.*predict_batches"):
        join_outputs([{"y": np.ones((2, 3))}, {"y": np.ones((2, 4))}])
