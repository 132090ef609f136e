"""Averages are those of exact arithmetic, and do not depend on who comes first."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from splitonnx.runtime.server.policies.joining.averages import average

COUNTS = (3, 1, 4, 2)


def draw(seed: int, dtype: type, shape: tuple[int, ...] = (5, 40)) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    spread = 10.0 ** generator.uniform(-3, 3, shape)
    return [(generator.standard_normal(shape) * spread).astype(dtype) for _ in COUNTS]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_an_average_is_that_of_fractions(dtype: type) -> None:
    arrays = draw(1, dtype)
    joined = average([(n, {"w": a}) for n, a in zip(COUNTS, arrays, strict=True)])["w"]
    assert (joined.dtype, joined.shape) == (arrays[0].dtype, arrays[0].shape)
    for place in np.ndindex(joined.shape):
        terms = [Fraction(float(a[place])) * n for n, a in zip(COUNTS, arrays, strict=True)]
        exact = float(sum(terms, Fraction(0)) / sum(COUNTS))
        nearest = float(np.array(exact).astype(dtype))
        largest = max(abs(float(a[place])) for a in arrays)
        assert abs(float(joined[place]) - nearest) <= 4 * np.finfo(np.float64).eps * largest or (
            dtype is not np.float64 and float(joined[place]) == nearest
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_order_of_clients_changes_no_bit(dtype: type) -> None:
    contributions = [
        (n, {"w": a, "b": a[0], "s": a[0, 0]})
        for n, a in zip((5, 5, 5, 7), draw(2, dtype), strict=True)
    ]
    contributions.append((5, dict(contributions[0][1])))  # two that are alike
    results = {
        tuple(array.tobytes() for array in average(order).values())
        for order in itertools.permutations(contributions)
    }
    assert len(results) == 1


def test_the_largest_numbers_do_not_become_infinite() -> None:
    most = np.finfo(np.float64).max
    joined = average([(1, {"w": np.array([most])}), (1, {"w": np.array([-most])})])["w"]
    np.testing.assert_array_equal(joined, [0.0])


def test_a_tensor_without_elements_stays_one() -> None:
    joined = average([(1, {"w": np.zeros((0, 3), np.float32)})] * 2)["w"]
    assert joined.shape == (0, 3)
