"""Values that no training survives."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from splitonnx.errors import NormTooLarge, NotFinite
from splitonnx.runtime.wire.validation import check_finite, check_norm
from tests.support.arenas import MIB


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_wherever_they_stand(
    dtype: type[np.floating], value: float
) -> None:
    array = np.ones((3, 5), dtype)
    check_finite("x", array, "step 1")
    array[2, 4] = value
    with pytest.raises(NotFinite, match=r"'x' .*step 1"):
        check_finite("x", array, "step 1")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_values_whose_squares_overflow_are_finite(dtype: type[np.floating]) -> None:
    check_finite("x", np.full(7, np.finfo(dtype).max, dtype), "step 1")


def test_the_norm_is_that_of_the_whole_tensor() -> None:
    array = np.array([[3.0], [4.0]], np.float32)
    check_norm("x", array, 5.0)
    with pytest.raises(NormTooLarge, match="norm 5, over the limit of 4"):
        check_norm("x", array, 4.0)
    huge = np.array([1e30, 1e30], np.float32)
    with pytest.raises(NormTooLarge, match=r"1\.41421e\+30"):
        check_norm("x", huge, 1e6)
    check_norm("x", huge, 1e31)


def test_integers_and_empty_arrays_have_nothing_to_be_looked_at() -> None:
    for array in (np.array([2**62]), np.zeros((0, 3), np.float32)):
        check_finite("x", array, "step 1")
        check_norm("x", array, 1.0)


def test_looking_at_a_message_s_values_takes_no_memory_of_its_size() -> None:
    array = np.ones(64 * MIB // 4, np.float32)
    tracemalloc.start()
    try:
        check_finite("x", array, "step 1")
        check_norm("x", array, 1e9)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
