"""Averages weigh by samples, and lose no bit where all clients have the same tensors."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.runtime.server.policies.joining.averages import average


def test_tensors_weigh_by_the_samples_that_they_were_trained_with() -> None:
    first, second = np.array([1, 10], np.float32), np.array([4, 40], np.float32)
    found = average([(1, {"w": first}), (2, {"w": second})])
    np.testing.assert_array_equal(found["w"], np.array([3, 30], np.float32))
    assert found["w"].dtype == np.float32


def test_without_any_samples_all_weigh_alike() -> None:
    found = average([(0, {"w": np.array(value)}) for value in (1.0, 2.0, 6.0)])
    assert found["w"] == 3.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_tensors_are_their_own_average_to_the_bit(dtype: type[np.floating]) -> None:
    array = np.random.default_rng(3).normal(size=(5, 7)).astype(dtype)
    found = average([(n, {"w": array.copy()}) for n in (3, 5, 11)])
    assert (found["w"].dtype, found["w"].tobytes()) == (array.dtype, array.tobytes())


def test_one_client_keeps_what_it_learned_to_the_bit() -> None:
    array = np.random.default_rng(4).normal(size=9).astype(np.float32)
    assert average([(7, {"w": array})])["w"].tobytes() == array.tobytes()
