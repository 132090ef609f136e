"""Trigonometric and hyperbolic functions: dynamic batches, and slopes at their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.partitioner.rewrites.elementwise import (
    find_slopes,
    hold_dynamic_batch,
    hold_slopes,
)

FUNCTIONS: list[tuple[str, dict[str, Any], float, float]] = [
    ("Acos", {}, -0.9, 0.9),
    ("Acosh", {}, 1.5, 5),
    ("Asin", {}, -0.9, 0.9),
    ("Asinh", {}, -3, 3),
    ("Atan", {}, -3, 3),
    ("Atanh", {}, -0.9, 0.9),
    ("Cosh", {}, -2, 2),
    ("Sinh", {}, -2, 2),
    ("Tan", {}, -1, 1),
]


@pytest.mark.parametrize(("kind", "attributes", "low", "high"), FUNCTIONS)
def test_functions_of_a_dynamic_batch(
    kind: str, attributes: dict[str, Any], low: float, high: float
) -> None:
    hold_dynamic_batch(kind, attributes, low, high)


LIMITS = [
    ("Acosh", [1e10, 1e30], [1e-10, 1e-30]),
    ("Asinh", [-1e30, 0, 1e30], [1e-30, 1, 1e-30]),
    ("Atan", [-1e30, 0, 1e4], [0, 1, 1e-8]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), LIMITS)
def test_no_slope_overflows_on_a_branch_that_is_not_taken(
    kind: str, values: list[float], expected: list[float]
) -> None:
    hold_slopes(kind, values, expected)


@pytest.mark.parametrize("kind", ["Acos", "Asin"])
def test_an_infinite_slope_spoils_no_value(kind: str) -> None:
    for loss, slopes in find_slopes(kind, [-1.0, 1.0]):
        assert abs(float(loss) - {"Acos": np.pi, "Asin": 0.0}[kind]) < 1e-6
        assert (np.abs(slopes) > 1e38).all()
